"""strip and embed: nothing is dropped that does not come back, to the very bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapterdefects import A, B, all_of, drawn, fields, tensors
from adapters import CONFIG, HIDDEN, KEY, RANK, good_adapter
from bases import tiny_base
from conftest import DATA
from folders import CONFIG_NAME, WEIGHTS, everything, metadata, refusal, weights
from numpy.typing import NDArray
from safetensors.numpy import save_file

from vera_convert import adapterfolder, conversion
from vera_convert.adapter import open_adapter
from vera_convert.conversion import Conversion, embed, strip
from vera_convert.errors import CheckpointError, SurroundingsError, UsageError
from vera_convert.fingerprint import METADATA_KEY, from_text
from vera_convert.generator import Rounding, Variant, draw, rounded
from vera_convert.hub import HubAccess
from vera_convert.onbase import BaseWish, Need, learn
from vera_convert.projections import Meant, embedded, materialised
from vera_convert.recognition import recognise

FIXTURES = DATA / "fixtures"
ADAPTERS = sorted(path.parent for path in FIXTURES.glob("*/*/adapter_config.json"))
FOREIGN = [folder for folder in ADAPTERS if "foreign" in folder.name]
EMBEDDED = [folder for folder in ADAPTERS if folder.name.endswith("_proj")]
STRIPPED = [folder for folder in ADAPTERS if folder.name.endswith("_noproj")]
EXPECTED = sorted(FIXTURES.glob("*/*/expected*.json"))


def case_name(path: Path) -> str:
    return "/".join(path.relative_to(FIXTURES).parts)


def base_of(folder: Path) -> BaseWish:
    """The base that a fixture was made on."""
    expected = json.loads((folder / "expected.json").read_bytes())
    return BaseWish(str(FIXTURES / expected["base"]))


def codes(result: Conversion) -> set[str]:
    return {finding.code for finding in result.findings}


# --- what PEFT wrote -----------------------------------------------------------------------------


def test_all_of_the_fixtures_are_there() -> None:
    assert (len(ADAPTERS), len(FOREIGN), len(EMBEDDED), len(STRIPPED)) == (74, 2, 48, 24)
    assert len(EXPECTED) == 98


@pytest.mark.parametrize("path", EXPECTED, ids=case_name)
def test_the_projections_are_those_that_peft_had_in_effect(path: Path) -> None:
    expected = json.loads(path.read_bytes())
    # `auto` is what PEFT 0.21 does; up to 0.20 the file was ignored.
    by_key = expected["projection_source"] == "key"
    means = [Meant.KEY] if by_key else [Meant.AUTO, Meant.FILE]
    if "ignored" not in expected.get("default_semantics_note", ""):
        means.append(Meant.AUTO)
    with open_adapter(path.parent) as adapter:
        base = BaseWish(str(FIXTURES / expected["base"]))
        on_base = learn(adapter, base, access=HubAccess(), need=Need.NONE)
        for meant in means:
            result = {t.name: t.array() for t in embedded(adapter, on_base, meant=meant).tensors}
            for name, effect in expected["projections_in_effect"].items():
                values = result[f"base_model.{name}"].astype(effect["dtype"])
                assert list(values.shape) == effect["shape"]
                assert sha256(values.tobytes()).hexdigest() == effect["sha256"]


@pytest.mark.parametrize("folder", EMBEDDED, ids=case_name)
def test_strip_and_embed_give_the_very_bytes_back(folder: Path, tmp_path: Path) -> None:
    before = everything(folder)
    done = strip(folder, tmp_path / "stripped", base=base_of(folder))
    assert not done.embedded
    assert done.findings == ()
    assert done.bytes_after < done.bytes_before
    assert weights(tmp_path / "stripped").keys() == weights(folder).keys() - {A, B}
    stripped = (tmp_path / "stripped" / CONFIG_NAME).read_bytes()
    assert stripped == before[CONFIG_NAME].replace(
        b'"save_projection": true', b'"save_projection": false'
    )
    back = embed(tmp_path / "stripped", tmp_path / "embedded")
    assert "proven" in back.changes[0]
    assert back.findings == ()
    assert everything(tmp_path / "embedded") == before
    assert everything(folder) == before


@pytest.mark.parametrize("folder", STRIPPED, ids=case_name)
def test_a_stripped_adapter_is_copied_and_embedded_for_its_base(
    folder: Path, tmp_path: Path
) -> None:
    done = strip(folder, tmp_path / "stripped")
    assert done.changes == ()
    assert everything(tmp_path / "stripped") == everything(folder)
    back = embed(folder, tmp_path / "embedded", base=base_of(folder))
    assert codes(back) == {"V410"}
    stored = weights(tmp_path / "embedded")
    expected = json.loads((folder / "expected.json").read_bytes())["projections_in_effect"]
    assert [*stored[A].shape] == expected["vera_A"]["shape"]
    assert [*stored[B].shape] == expected["vera_B"]["shape"]
    # It is a draw that strip knows, so nothing is lost by the way back.
    strip(tmp_path / "embedded", tmp_path / "again", base=base_of(folder))
    assert weights(tmp_path / "again").keys() == weights(folder).keys()


@pytest.mark.parametrize("folder", FOREIGN, ids=case_name)
@pytest.mark.parametrize("accept_change", [False, True])
def test_foreign_projections_are_never_stripped(
    folder: Path, tmp_path: Path, *, accept_change: bool
) -> None:
    out = tmp_path / "out"
    act = partial(strip, folder, out, base=base_of(folder), accept_change=accept_change)
    assert refusal(act) == "V401"
    assert not out.exists()
    assert embed(folder, out).changes == ()
    assert everything(out) == everything(folder)


def test_the_trained_adapter_comes_back_from_its_own_model(
    minilm: Path, minilm_model: Path, tmp_path: Path
) -> None:
    source, base = minilm / "save_projection_true", BaseWish(str(minilm_model))
    done = strip(source, tmp_path / "stripped", base=base)
    assert done.findings == ()
    assert done.bytes_after * 8 < done.bytes_before
    embed(tmp_path / "stripped", tmp_path / "embedded", base=base)
    assert everything(tmp_path / "embedded") == everything(source)
    embed(minilm / "save_projection_false", tmp_path / "drawn", base=base)
    assert (tmp_path / "drawn" / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()


# --- every way in which A and B can have been drawn ----------------------------------------------

ROUNDINGS = {
    "float64": Rounding.NONE,
    "float32": Rounding.FP32,
    "bfloat16": Rounding.BF16,
    "float16": Rounding.FP16,
    "float16+bfloat16": Rounding.FP16_BF16,
    "bfloat16+float16": Rounding.BF16_FP16,
}
STORED: Mapping[str, Any] = {
    "F32": np.float32,
    "F64": np.float64,
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
}


def as_peft_stored(variant: Variant, base: str, dtype: str) -> dict[str, NDArray[Any]] | None:
    """A and B as PEFT draws, rounds and stores them; None if that type would change values."""
    pair = draw(variant, key=KEY, rank=RANK, in_features=HIDDEN, out_features=16)
    kind = np.dtype(STORED[dtype])
    cast = [rounded(matrix, ROUNDINGS[base]) for matrix in pair]
    stored = [matrix.astype(kind) for matrix in cast]
    exact = all(
        np.array_equal(one.astype(np.float64), other.astype(np.float64))
        for one, other in zip(cast, stored, strict=True)
    )
    return dict(zip((A, B), stored, strict=True)) if exact else None


def on_base(base: str, folder: Path) -> BaseWish:
    """A base whose first layer is of the first dtype and the second of the second."""
    first, _, second = base.partition("+")
    dtypes = {"layers.0": first, "layers.1": second or first}
    return BaseWish(str(tiny_base(folder, dtype=first, dtypes=dtypes)))


def draws() -> Iterator[tuple[Variant, str, str]]:
    """Every variant on every base, stored in float32; the usual one in every type that can be."""
    for variant in Variant:
        for base in ROUNDINGS:
            for dtype in STORED if variant is Variant.FLOAT32_FUSED else ("F32", "F64"):
                as_wide = dtype != "F64" or base == "float64"
                if as_wide and as_peft_stored(variant, base, dtype) is not None:
                    yield variant, base, dtype


def equal(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]] | None) -> bool:
    """Whether two pairs hold the same values, of whatever type."""
    return other is not None and all(np.array_equal(one[n], other[n].astype("f8")) for n in one)


@pytest.mark.parametrize(("variant", "base", "dtype"), [*draws()])
def test_every_draw_on_every_base_comes_back(
    variant: Variant, base: str, dtype: str, tmp_path: Path
) -> None:
    pair = as_peft_stored(variant, base, dtype)
    assert pair is not None
    folder = good_adapter(tmp_path / "adapter", tensors=pair)
    wish = on_base(base, tmp_path / "base")
    orders = {base, "+".join(reversed(base.split("+")))}  # the order does not stand in headers
    usual = [as_peft_stored(Variant.FLOAT32_FUSED, order, "F64") for order in orders]
    same = any(equal(pair, each) for each in usual)
    if not same:
        assert refusal(lambda: strip(folder, tmp_path / "no", base=wish)) == "V403"
    done = strip(folder, tmp_path / "stripped", base=wish, accept_change=True)
    assert any(change.startswith("accepted") for change in done.changes) is not same
    assert codes(done) <= {"V207", "V404", "V415"}
    embed(tmp_path / "stripped", tmp_path / "embedded")
    assert everything(tmp_path / "embedded") == everything(folder)


@pytest.mark.parametrize("base", ["float32", "bfloat16", "float16", "float16+bfloat16"])
@pytest.mark.parametrize("origin", ["float32", "bfloat16", "float16", "bfloat16+float16"])
def test_what_a_base_rounds_otherwise_is_refused_with_the_difference(
    origin: str, base: str, tmp_path: Path
) -> None:
    pair = as_peft_stored(Variant.FLOAT32_FUSED, origin, "F32")
    folder = good_adapter(tmp_path / "adapter", tensors=pair)
    wish = on_base(base, tmp_path / "base")
    # What bfloat16 keeps float16 keeps too; and the order of two does not stand in the headers.
    same = {origin, base} <= {"bfloat16", "bfloat16+float16", "float16+bfloat16"} and (
        "+" in base or "float16+bfloat16" not in (origin, base)
    )
    if origin == base or same:
        done = strip(folder, tmp_path / "stripped", base=wish)
        assert codes(done) == ({"V404", "V415"} if "+" in base else set())
        return
    with pytest.raises(CheckpointError, match=r"V403 .*the largest difference is \d"):
        strip(folder, tmp_path / "stripped", base=wish)
    assert not (tmp_path / "stripped").exists()
    strip(folder, tmp_path / "stripped", base=wish, accept_change=True)
    embed(tmp_path / "stripped", tmp_path / "embedded", base=wish)
    assert everything(tmp_path / "embedded") == everything(folder)


@pytest.mark.parametrize(("option", "base"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_dtype_given_counts_more_than_that_of_the_files(
    option: str, base: str, tmp_path: Path
) -> None:
    pair = as_peft_stored(Variant.FLOAT32_FUSED, option, "F32")
    folder = good_adapter(tmp_path / "adapter", tensors=pair)
    model = str(tiny_base(tmp_path / "base", dtype=base))
    assert strip(folder, tmp_path / "a", base=BaseWish(model, dtype=option)).findings == ()
    assert refusal(lambda: strip(folder, tmp_path / "b", base=BaseWish(model))) == "V403"


def test_a_wider_draw_that_was_cut_comes_back_cut(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    drawn(width=24, kept=16)(folder)
    wish = BaseWish(str(tiny_base(tmp_path / "base")))
    with pytest.raises(CheckpointError, match=r"24 inputs.*the largest difference"):
        strip(folder, tmp_path / "no", base=wish)
    strip(folder, tmp_path / "stripped", base=wish, accept_change=True)
    recorded = from_text(metadata(tmp_path / "stripped")[METADATA_KEY], place="weights")
    assert (recorded.in_features, recorded.drawn_in_features) == (16, 24)
    embed(tmp_path / "stripped", tmp_path / "embedded")
    assert everything(tmp_path / "embedded") == everything(folder)


@pytest.mark.parametrize("name", [A, B])
@pytest.mark.parametrize("place", [(0, 0), (3, 3), (-1, -1)])
@pytest.mark.parametrize("bit", [0, 31])
def test_one_flipped_bit_is_enough(
    name: str, place: tuple[int, int], bit: int, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    stored = weights(folder)
    stored[name].view(np.uint32)[place] ^= np.uint32(1 << bit)
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    out = tmp_path / "out"
    assert refusal(lambda: strip(folder, out, accept_change=True)) == "V401"


@pytest.mark.parametrize("key", [0, 1, 65_535])
def test_the_draw_of_another_key_is_named_and_never_stripped(key: int, tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    drawn(key=key)(folder)
    with pytest.raises(CheckpointError, match=f"V402 .*draw of key {key}; the config says {KEY}"):
        strip(folder, tmp_path / "out", accept_change=True)


def test_a_negative_key_comes_back(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", projection_prng_key=-1)
    drawn(key=-1)(folder)
    strip(folder, tmp_path / "stripped", base=BaseWish(str(tiny_base(tmp_path / "base"))))
    embed(tmp_path / "stripped", tmp_path / "embedded")
    assert everything(tmp_path / "embedded") == everything(folder)


# --- what the base decides -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "base", "dims"),
    [
        ({}, {}, (16, 16)),
        ({"target_modules": ["q_proj", "v_proj", "down_proj"]}, {}, (24, 16)),
        ({"target_modules": ["q_proj", "v_proj", "up_proj"]}, {}, (16, 24)),
        ({"target_modules": r".*\.(q|v)_proj"}, {}, (16, 16)),
        ({"target_modules": r".*(q|v|down)_proj"}, {}, (24, 16)),
        ({"target_modules": "all-linear"}, {}, (24, 24)),
        ({"target_modules": None}, {}, (16, 16)),
        (
            {"layers_to_transform": [0, 1]},
            {"tensors": {"model.layers.2.self_attn.q_proj.weight": (40, 40)}},
            (16, 16),
        ),
        ({}, {"tensors": {"model.layers.2.self_attn.q_proj.weight": (40, 48)}}, (48, 40)),
        (
            {"modules_to_save": ["model.layers.2"]},
            {"tensors": {"model.layers.2.self_attn.q_proj.weight": (40, 48)}},
            (16, 16),
        ),
    ],
    ids=str,
)
def test_dims_are_those_of_the_widest_layers_that_the_config_matches(
    config: dict[str, Any], base: dict[str, Any], dims: tuple[int, int], tmp_path: Path
) -> None:
    more = {}
    if "modules_to_save" in config:
        more = {"base_model.model.model.layers.2.self_attn.q_proj.weight": np.ones((40, 48), "f4")}
    folder = good_adapter(tmp_path / "adapter", stripped=True, tensors=more, **config)
    wish = BaseWish(str(tiny_base(tmp_path / "base", **base)))
    embed(folder, tmp_path / "embedded", base=wish)
    stored = weights(tmp_path / "embedded")
    assert (stored[A].shape[1], stored[B].shape[0]) == dims
    usual = draw(
        Variant.FLOAT32_FUSED, key=KEY, rank=RANK, in_features=dims[0], out_features=dims[1]
    )
    assert np.array_equal(stored[A], usual[0])
    assert np.array_equal(stored[B], usual[1])
    assert strip(tmp_path / "embedded", tmp_path / "stripped", base=wish).embedded is False
    if dims != (16, 16):
        narrow = good_adapter(tmp_path / "narrow", tensors=more, **config)
        assert refusal(lambda: strip(narrow, tmp_path / "no", base=wish)) == "V403"


NAMES: Mapping[str, Callable[[str], str]] = {
    "prefix added": lambda name: name.replace("model.layers", "layers"),
    "prefix removed": lambda name: name.replace("model.layers", "transformer.model.layers"),
}


@pytest.mark.parametrize("rename", NAMES.values(), ids=NAMES)
def test_a_base_whose_names_have_another_prefix_counts_too(
    rename: Callable[[str], str], tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    all_of(
        tensors(
            lambda stored: {
                "base_model.model." + rename(name.removeprefix("base_model.model."))
                if "layers" in name
                else name: array
                for name, array in stored.items()
            }
        )
    )(folder)
    base = BaseWish(str(tiny_base(tmp_path / "base")))
    assert strip(folder, tmp_path / "out", base=base).findings == ()
    wider = tiny_base(
        tmp_path / "wider", tensors={"model.layers.2.self_attn.q_proj.weight": (16, 24)}
    )
    assert refusal(lambda: strip(folder, tmp_path / "no", base=BaseWish(str(wider)))) == "V403"


def test_a_tied_head_counts_with_the_embeddings_shape(tmp_path: Path) -> None:
    head = {
        "base_model.model.lm_head.vera_lambda_b": np.ones(32, np.float32),
        "base_model.model.lm_head.vera_lambda_d": np.ones(RANK, np.float32),
    }
    targets = ["q_proj", "v_proj", "lm_head"]
    folder = good_adapter(tmp_path / "adapter", tensors=head, target_modules=targets)
    drawn(height=32)(folder)
    base = tiny_base(tmp_path / "base", tensors={"lm_head.weight": None})
    assert strip(folder, tmp_path / "out", base=BaseWish(str(base))).findings == ()


def test_layers_stored_the_other_way_round_are_told_by_their_biases(tmp_path: Path) -> None:
    base = BaseWish(str(FIXTURES / "bases" / "gpt2-fp32"))
    folder = FIXTURES / "0.21.2" / "gpt2_fp32_proj"
    bare = tmp_path / "base"
    bare.mkdir()
    (bare / "model.safetensors").write_bytes(
        (Path(str(base.model)) / "model.safetensors").read_bytes()
    )
    for number, wish in enumerate((base, BaseWish(str(bare)))):  # once without its config.json
        assert strip(folder, tmp_path / f"out{number}", base=wish).findings == ()


def test_the_head_of_a_classifier_passes_through(tmp_path: Path) -> None:
    folder = FIXTURES / "0.21.2" / "bert_cls_fp32_proj"
    strip(folder, tmp_path / "out", base=base_of(folder))
    head = "base_model.model.classifier.weight"
    assert np.array_equal(weights(tmp_path / "out")[head], weights(folder)[head])


def test_another_model_is_refused(tmp_path: Path) -> None:
    folder = FIXTURES / "0.21.2" / "llama_fp32_proj"
    for base, code in (("gpt2-fp32", "V520"), ("bert-cls-fp32", "V520")):
        wish = BaseWish(str(FIXTURES / "bases" / base))
        assert refusal(partial(strip, folder, tmp_path / "out", base=wish)) == code
    other = tiny_base(
        tmp_path / "base", tensors={"model.layers.0.self_attn.v_proj.weight": (12, 16)}
    )
    adapter = good_adapter(tmp_path / "adapter")
    assert refusal(lambda: strip(adapter, tmp_path / "out", base=BaseWish(str(other)))) == "V522"


CONFIGS: Mapping[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 32,
    },
}


def test_a_base_of_a_known_type_needs_no_weights(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", stripped=True)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    wish = BaseWish(str(base))
    with pytest.raises(UsageError, match="dtype"):
        embed(folder, tmp_path / "out", base=wish)
    done = embed(folder, tmp_path / "out", base=BaseWish(str(base), dtype="float32"))
    assert codes(done) == {"V410"}
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (
        good_adapter(tmp_path / "good") / WEIGHTS
    ).read_bytes()
    for change, code in (
        ({"num_hidden_layers": 1}, "V520"),
        ({"hidden_size": 32}, "V522"),
        ({"model_type": "unheard-of"}, "V560"),
    ):
        (base / "config.json").write_text(json.dumps({**CONFIGS["llama"], **change}))
        act = lambda: embed(folder, tmp_path / "no", base=BaseWish(str(base), dtype="float32"))  # noqa: E731
        assert refusal(act) == code


def test_no_output_goes_into_the_base(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    base = tiny_base(tmp_path / "base")
    for model in (base, base / "deep"):
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(CONFIGS["llama"]))
        wish = BaseWish(str(model), dtype="float32")
        with pytest.raises(UsageError, match="input"):
            strip(folder, model / "out", base=wish, force=True)


# --- what is not known ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (BaseWish(), "cannot be drawn from the adapter alone"),
        (BaseWish(dtype="float32"), "cannot be drawn from the adapter alone"),
        (BaseWish(in_features=16), "give both"),
        (BaseWish(out_features=16, dtype="float32"), "give both"),
        (BaseWish(in_features=16, out_features=16), "dtype"),
        (BaseWish(model="base", in_features=16, out_features=16), "not both"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", [None, "/data/llama", "C:\\models\\llama"])
def test_embed_asks_for_what_it_must_know(
    wish: BaseWish, said: str, name: str | None, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter", stripped=True, base_model_name_or_path=name)
    with pytest.raises(UsageError, match=said):
        embed(folder, tmp_path / "out", base=wish)
    assert not (tmp_path / "out").exists()


def test_embed_must_have_the_base_that_only_the_config_names(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", stripped=True)
    with pytest.raises(SurroundingsError, match="example/tiny-llama"):
        embed(folder, tmp_path / "out")


def test_embed_says_what_it_drew_where_nothing_is_proven(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", stripped=True)
    wish = BaseWish(in_features=16, out_features=16, dtype="float32")
    done = embed(folder, tmp_path / "out", base=wish)
    assert codes(done) == {"V410"}
    assert "float32-fused draw of key 7 for r = 4, 16 inputs, 16 outputs" in done.changes[0]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (
        good_adapter(tmp_path / "good") / WEIGHTS
    ).read_bytes()


@pytest.mark.parametrize(
    ("lambdas", "dtype", "stored"),
    [
        (np.float32, "float32", "F32"),
        (np.float32, "bfloat16", "F32"),
        (np.float64, "float64", "F64"),
        (np.float64, "float32", "F64"),
        (ml_dtypes.bfloat16, "bfloat16", "BF16"),
        (np.float16, "float16", "F16"),
        # Where the lambdas' type cannot hold every value, float32 does.
        (ml_dtypes.bfloat16, "float32", "F32"),
        (ml_dtypes.bfloat16, "float16", "F32"),
        # bfloat16 has fewer digits than float16, which holds all but the smallest of its values.
        (np.float16, "bfloat16", "F16"),
    ],
)
def test_projections_are_stored_as_the_lambdas_are_if_that_is_exact(
    lambdas: Any, dtype: str, stored: str, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter", stripped=True)
    tensors(lambda all_: {name: array.astype(lambdas) for name, array in all_.items()})(folder)
    embed(folder, tmp_path / "out", base=BaseWish(in_features=16, out_features=16, dtype=dtype))
    pair = weights(tmp_path / "out")
    assert pair[A].dtype == pair[B].dtype == STORED[stored]
    found = recognise(pair[A], pair[B], key=KEY).draw
    assert found is not None
    assert found.variant is Variant.FLOAT32_FUSED


@pytest.mark.parametrize("variant", Variant)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_generator_can_be_asked_for(variant: Variant, dtype: str, tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", stripped=True)
    if dtype == "float64":
        tensors(lambda all_: {name: array.astype("f8") for name, array in all_.items()})(folder)
    wish = BaseWish(in_features=16, out_features=16, dtype=dtype)
    done = embed(folder, tmp_path / "out", base=wish, generator=variant)
    expected = as_peft_stored(variant, dtype, "F64")
    stored = weights(tmp_path / "out")
    assert expected is not None
    assert np.array_equal(stored[A].astype(np.float64), expected[A])
    assert np.array_equal(stored[B].astype(np.float64), expected[B])
    assert done.draw is not None
    assert done.draw.variant is variant
    again = materialised(done.draw)
    assert np.array_equal(again[0].astype(np.float64), expected[A])


def test_strip_without_a_base_says_on_which_dtype_they_come_back(tmp_path: Path) -> None:
    for rounding, dtype in ((Rounding.NONE, "float32"), (Rounding.BF16, "bfloat16")):
        folder = good_adapter(tmp_path / f"adapter-{dtype}")
        drawn(rounding=rounding)(folder)
        done = strip(folder, tmp_path / f"out-{dtype}")
        (finding,) = done.findings
        assert finding.code == "V404"
        assert f"on a base loaded in {dtype}" in finding.reason
        assert "the width of A (16) and the rounding" in finding.reason
        assert "example/tiny-llama" in finding.reason


def test_an_option_for_the_dtype_proves_the_rounding_but_not_the_width(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    done = strip(folder, tmp_path / "out", base=BaseWish(dtype="float32"))
    assert [finding.reason.count("rounding") for finding in done.findings] == [0]
    assert "the width of A" in done.findings[0].reason


def test_what_was_accepted_comes_back_even_though_the_base_would_have_it_otherwise(
    tmp_path: Path,
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    wish = BaseWish(str(tiny_base(tmp_path / "base", dtype="bfloat16")))
    strip(folder, tmp_path / "stripped", base=wish, accept_change=True)
    for number, each in enumerate((None, wish, BaseWish(dtype="bfloat16"))):
        embed(tmp_path / "stripped", tmp_path / f"back{number}", base=each)
        assert everything(tmp_path / f"back{number}") == everything(folder)


def test_a_generator_that_contradicts_the_fingerprint_is_refused(tmp_path: Path) -> None:
    strip(good_adapter(tmp_path / "adapter"), tmp_path / "stripped")
    embed(tmp_path / "stripped", tmp_path / "a", generator=Variant.FLOAT32_FUSED)
    with pytest.raises(UsageError, match=r"drawn as float32-fused.* float64-fused out"):
        embed(tmp_path / "stripped", tmp_path / "b", generator=Variant.FLOAT64_FUSED)


# --- where flag, file and key disagree -----------------------------------------------------------

OTHERS = drawn(key=KEY + 1)
BF16 = drawn(rounding=Rounding.BF16)
DENIED = fields({"save_projection": False})


@pytest.mark.parametrize(
    ("spoil", "meant", "outcome"),
    [
        # the flag is true: the file's count, unless the key's are asked for
        (all_of(), "auto", "same"),
        (all_of(), "file", "same"),
        (all_of(), "key", "same"),
        (OTHERS, "auto", "V402"),
        (OTHERS, "file", "V402"),
        (OTHERS, "key", "replaced"),
        (BF16, "auto", "V403"),
        (BF16, "key", "replaced"),
        # the flag is false: equal ones are told, unequal ones have to be decided
        (DENIED, "auto", "same"),
        (DENIED, "file", "same"),
        (DENIED, "key", "same"),
        (all_of(OTHERS, DENIED), "auto", "V406"),
        (all_of(OTHERS, DENIED), "file", "V402"),
        (all_of(OTHERS, DENIED), "key", "replaced"),
        (all_of(BF16, DENIED), "auto", "V406"),
        (all_of(BF16, DENIED), "file", "V403"),
        (all_of(BF16, DENIED), "key", "replaced"),
    ],
)
def test_strip_takes_what_is_meant(
    spoil: Callable[[Path], None], meant: str, outcome: str, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    good = weights(folder)
    spoil(folder)
    denied = not json.loads((folder / CONFIG_NAME).read_bytes())["save_projection"]
    wish = BaseWish(str(tiny_base(tmp_path / "base")))
    act = partial(strip, folder, tmp_path / "out", base=wish, projections=Meant(meant))
    if outcome.startswith("V"):
        assert refusal(act) == outcome
        assert not (tmp_path / "out").exists()
        return
    done = act()
    assert codes(done) == ({"V212"} if denied else set())
    assert ("replaced A and B" in done.changes[0]) is (outcome == "replaced")
    assert json.loads((tmp_path / "out" / CONFIG_NAME).read_bytes()) == {
        **CONFIG,
        "save_projection": False,
    }
    embed(tmp_path / "out", tmp_path / "back")
    assert np.array_equal(weights(tmp_path / "back")[A], good[A])
    assert np.array_equal(weights(tmp_path / "back")[B], good[B])


@pytest.mark.parametrize(
    ("spoil", "meant", "outcome"),
    [
        (all_of(), "auto", "copied"),
        (all_of(), "file", "copied"),
        (all_of(), "key", "copied"),
        (OTHERS, "auto", "copied"),
        (OTHERS, "key", "key"),
        (BF16, "key", "key"),
        (DENIED, "auto", "file"),
        (DENIED, "key", "file"),
        (all_of(OTHERS, DENIED), "auto", "V406"),
        (all_of(OTHERS, DENIED), "file", "file"),
        (all_of(OTHERS, DENIED), "key", "key"),
        (all_of(BF16, DENIED), "auto", "V406"),
        (all_of(BF16, DENIED), "file", "file"),
    ],
)
def test_embed_takes_what_is_meant(
    spoil: Callable[[Path], None], meant: str, outcome: str, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    good = weights(folder)
    spoil(folder)
    stored = weights(folder)
    wish = BaseWish(str(tiny_base(tmp_path / "base")))
    act = partial(embed, folder, tmp_path / "out", base=wish, projections=Meant(meant))
    if outcome.startswith("V"):
        assert refusal(act) == outcome
        assert not (tmp_path / "out").exists()
        return
    done = act()
    assert (done.changes == ()) is (outcome == "copied")
    assert done.embedded
    assert json.loads((tmp_path / "out" / CONFIG_NAME).read_bytes())["save_projection"] is True
    expected = good if outcome == "key" else stored
    assert np.array_equal(weights(tmp_path / "out")[A], expected[A])
    assert np.array_equal(weights(tmp_path / "out")[B], expected[B])


def test_the_keys_projections_cannot_be_had_without_a_dtype(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", base_model_name_or_path=None)
    OTHERS(folder)
    for act in (strip, embed):
        with pytest.raises(UsageError, match="--base-dtype"):
            act(folder, tmp_path / "out", projections=Meant.KEY)
        wish = BaseWish(dtype="bfloat16")
        done = act(folder, tmp_path / act.__name__, projections=Meant.KEY, base=wish)
        assert "replaced A and B by the draw of the config's key" in done.changes[0]


# --- what passes through -------------------------------------------------------------------------


def test_metadata_and_unknown_fields_pass_through(tmp_path: Path) -> None:
    notes = {"format": "pt", "note": 'zwölf\n"\u2028', "a": ""}
    folder = good_adapter(tmp_path / "adapter", metadata=notes, foo_config={"b": [1, None]})
    strip(folder, tmp_path / "stripped")
    assert metadata(tmp_path / "stripped").keys() == {*notes, METADATA_KEY}
    embed(tmp_path / "stripped", tmp_path / "embedded")
    assert metadata(tmp_path / "embedded") == notes
    assert (tmp_path / "embedded" / CONFIG_NAME).read_bytes() == (folder / CONFIG_NAME).read_bytes()


def test_a_file_without_metadata_comes_back_without(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    save_file(weights(folder), folder / WEIGHTS)
    strip(folder, tmp_path / "stripped")
    embed(tmp_path / "stripped", tmp_path / "embedded")
    assert everything(tmp_path / "embedded") == everything(folder)


def test_the_fingerprint_records_what_was_dropped(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    strip(folder, tmp_path / "stripped")
    recorded = from_text(metadata(tmp_path / "stripped")[METADATA_KEY], place="weights")
    stored = weights(folder)
    assert recorded.sha256_A == sha256(stored[A].tobytes()).hexdigest()
    assert recorded.sha256_B == sha256(stored[B].tobytes()).hexdigest()
    assert (recorded.variant, recorded.key, recorded.rank) == (Variant.FLOAT32_FUSED, KEY, RANK)
    assert (recorded.in_features, recorded.out_features) == (16, 16)
    assert (recorded.rounding, recorded.dtype) == (Rounding.NONE, "F32")


@pytest.mark.parametrize(
    "change",
    [
        {"projection_prng_key": KEY + 1},
        {"r": RANK + 1},
    ],
    ids=str,
)
def test_a_config_edited_after_strip_is_noticed(change: dict[str, Any], tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    strip(folder, tmp_path / "stripped")
    fields(change)(tmp_path / "stripped")
    with pytest.raises(CheckpointError) as caught:
        embed(tmp_path / "stripped", tmp_path / "out")
    assert {"V408", "V204"} >= {finding.code for finding in caught.value.findings}


def test_repeated_projections_are_all_dropped(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    copy = "base_model.model.model.layers.0.self_attn.q_proj.vera_B"
    tensors(lambda stored: {**stored, copy: stored[B].copy()})(folder)
    done = strip(folder, tmp_path / "out")
    assert codes(done) == {"V213", "V404"}
    assert not any(name.endswith(("vera_A", "vera_B")) for name in weights(tmp_path / "out"))


@pytest.mark.parametrize("run", [strip, embed])
def test_an_input_that_changes_meanwhile_is_noticed(
    run: Callable[..., Conversion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    finish = adapterfolder.publish_adapter

    def change_and_finish(*args: Any, **kwargs: Any) -> object:
        fields({"r": RANK})(folder)
        return finish(*args, **kwargs)

    monkeypatch.setattr(conversion, "publish_adapter", change_and_finish)
    with pytest.raises(SurroundingsError, match="changed while it was read"):
        run(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_out_is_not_overwritten_nor_put_into_an_input(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    for out in (folder, folder / "out", tmp_path / "link" / "out", tmp_path):
        for force in (False, True):
            with pytest.raises(UsageError):
                strip(folder, out, force=force)
    strip(folder, tmp_path / "out")
    with pytest.raises(UsageError, match="exists"):
        strip(folder, tmp_path / "out")
    strip(folder, tmp_path / "out", force=True)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_NAME, WEIGHTS]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", metadata={"format": "pt", "b": "1", "a": "2"})
    for number in range(2):
        strip(folder, tmp_path / f"out{number}")
    assert everything(tmp_path / "out0") == everything(tmp_path / "out1")
