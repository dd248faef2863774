"""`info` describes an adapter without a mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapterdefects import A, B, all_of, bare, drawn, fields, stripped, tensors
from adapters import KEY, RANK, good_adapter
from bases import tiny_base
from defects import Spoiler
from folders import DATA, WEIGHTS, base_of
from merges import filled_base

from vera_convert.base.facts import BaseOptions
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.conversion.strip_embed import embed, strip
from vera_convert.draws.generator import Rounding, Variant
from vera_convert.errors import UsageError
from vera_convert.lora import conversion
from vera_convert.lora.conversion import to_lora
from vera_convert.lora.engines import EngineName
from vera_convert.lora.options import LoraOptions
from vera_convert.lora.writing import lora_size
from vera_convert.merging.merge import merge
from vera_convert.merging.options import MergeOptions
from vera_convert.summary import AdapterInfo, info

FIXTURES = DATA / "fixtures"
EVERY_DTYPE = ("float32", "bfloat16", "float16")
OLD, NEW = "0.11 to 0.20", "0.21 and later"


def effects(found: AdapterInfo) -> dict[str, tuple[str, tuple[str, ...] | None]]:
    return {effect.peft: (effect.source, effect.same_on) for effect in found.effects}


@pytest.mark.parametrize(
    "path",
    sorted(FIXTURES.glob("*/*/expected*.json")),
    ids=lambda path: "/".join(path.relative_to(FIXTURES).parts),
)
def test_info_names_the_projections_that_the_fixture_s_peft_used(path: Path) -> None:
    expected = json.loads(path.read_bytes())
    folder = path.parent
    found = info(folder, base=base_of(folder))
    version = tuple(map(int, folder.parent.name.split(".")[:2]))
    source, same_on = effects(found)[NEW if version >= (0, 21) else OLD]
    assert source == expected["projection_source"]
    equals_file = expected["projections_in_effect"]["vera_A"]["equals_file"]
    loaded_in = "bfloat16" if "bf16" in expected["base"] else "float32"
    if found.projections is not None:
        assert same_on is not None
        assert (loaded_in in same_on) is equals_file
    else:
        assert same_on is None
        assert not equals_file
    assert found.layers == len(expected["adapted_modules"])
    unrecorded = folder.name.endswith("noproj") and found.config.peft_version is None
    assert [finding.code for finding in found.findings] == (
        ["V414"] if "foreign" in folder.name else ["V410"] * unrecorded
    )
    assert found.config.r == 4


CASES: dict[str, tuple[Spoiler, tuple[str, ...] | None, tuple[str, ...] | None]] = {
    # the stored A and B, and the base dtypes on which older and newer PEFT use exactly these
    "the usual draw": (all_of(), ("float32",), EVERY_DTYPE),
    "rounded to bfloat16": (drawn(rounding=Rounding.BF16), ("bfloat16",), EVERY_DTYPE),
    "rounded to float16": (drawn(rounding=Rounding.FP16), ("float16",), EVERY_DTYPE),
    "another variant": (drawn(Variant.FLOAT32_SEPARATE), (), EVERY_DTYPE),
    "another default dtype": (drawn(Variant.FLOAT64_FUSED), (), EVERY_DTYPE),
    "another key": (drawn(key=KEY + 1), (), EVERY_DTYPE),
    "a wider draw": (drawn(width=24, kept=16), (), EVERY_DTYPE),
    "no draw": (tensors(lambda s: {**s, A: s[A] * np.float32(3)}), (), EVERY_DTYPE),
    "denied": (fields({"save_projection": False}), ("float32",), ("float32",)),
    "denied and another": (
        all_of(drawn(key=KEY + 1), fields({"save_projection": False})),
        (),
        (),
    ),
    "stripped by PEFT": (bare, None, None),
    "stripped by us": (stripped, ("float32",), ("float32",)),
}


@pytest.mark.parametrize(("spoil", "old", "new"), CASES.values(), ids=CASES)
def test_info_names_the_projections_that_each_peft_uses(
    spoil: Spoiler, old: tuple[str, ...] | None, new: tuple[str, ...] | None, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    spoil(folder)
    stored = json.loads((folder / "adapter_config.json").read_bytes())["save_projection"]
    for options in (None, BaseOptions(str(tiny_base(tmp_path / "base")))):
        found = effects(info(folder, base=options))
        assert found == {OLD: ("key", old), NEW: ("file" if stored else "key", new)}


def test_a_base_with_other_dims_makes_peft_draw_other_projections(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", target_modules=["q_proj", "v_proj", "down_proj"])
    found = info(folder, base=BaseOptions(str(tiny_base(tmp_path / "base"))))
    assert effects(found)[OLD] == ("key", ())
    assert {finding.code for finding in found.findings} == {"V411", "V414", "V416"}


@pytest.mark.parametrize(
    ("spoil", "variant", "rounding", "known"),
    [
        (all_of(), Variant.FLOAT32_FUSED, Rounding.NONE, True),
        (drawn(Variant.BFLOAT16_2_11), Variant.BFLOAT16_2_11, Rounding.NONE, True),
        (drawn(rounding=Rounding.FP16), Variant.FLOAT32_FUSED, Rounding.FP16, True),
        (stripped, Variant.FLOAT32_FUSED, Rounding.NONE, True),
        (bare, None, None, False),
    ],
)
def test_info_names_the_draw(
    spoil: Spoiler,
    variant: Variant | None,
    rounding: Rounding | None,
    tmp_path: Path,
    *,
    known: bool,
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    spoil(folder)
    found = info(folder)
    assert (found.draw is not None) is known
    assert found.difference is None
    if found.draw is not None:
        assert (found.draw.variant, found.draw.rounding) == (variant, rounding)
        assert (found.draw.in_features, found.draw.out_features, found.draw.key) == (16, 16, KEY)


def test_info_names_the_first_difference_of_a_spoiled_draw(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")

    def spoil(stored: dict[str, Any]) -> dict[str, Any]:
        stored[B][5, 2] += np.float32(1)
        return stored

    tensors(spoil)(folder)
    found = info(folder)
    assert found.draw is None
    assert found.difference is not None
    assert (found.difference.tensor, found.difference.index) == ("vera_B", (5, 2))
    assert found.difference.largest == pytest.approx(1)


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*/*/adapter_config.json"))[::6], ids=str)
def test_sizes_equal_those_of_written_files(path: Path, tmp_path: Path) -> None:
    folder = path.parent
    found = info(folder, base=base_of(folder))
    assert found.sizes.as_is == (folder / WEIGHTS).stat().st_size
    if found.sizes.stripped is None:
        assert "foreign" in folder.name
    else:
        done = strip(folder, tmp_path / "stripped", base=base_of(folder))
        assert found.sizes.stripped == done.bytes_after
    done = embed(folder, tmp_path / "embedded", base=base_of(folder))
    assert found.sizes.embedded == done.bytes_after
    merged = merge(folder, tmp_path / "merged", base=base_of(folder))
    assert found.sizes.merged == sum(
        file.size for file in merged.files if "safetensors" in file.name
    )
    for source in ProjectionSource if found.projections is not None else [ProjectionSource.AUTO]:
        described = info(folder, base=base_of(folder), projections=source)
        options = LoraOptions(projections=source)
        lora = to_lora(folder, tmp_path / f"lora-{source}", base=base_of(folder), options=options)
        assert described.sizes.lora == lora.size == (lora.out / WEIGHTS).stat().st_size


@pytest.mark.parametrize("engine", EngineName)
def test_a_dry_run_of_a_lora_states_the_size_of_the_written_file(
    engine: EngineName, tmp_path: Path
) -> None:
    if engine is EngineName.GGUF:
        pytest.importorskip("gguf")
    config = {"model_type": "llama", "num_attention_heads": 2, "num_hidden_layers": 2}
    of_pipeline = {"_class_name": "ATransformer"} if engine is EngineName.DIFFUSERS else {}
    base = tiny_base(tmp_path / "base", config={**config, **of_pipeline})
    adapter, out = good_adapter(tmp_path / "adapter"), tmp_path / "out"
    planned = to_lora(adapter, out, base=base, options=LoraOptions(engine, dry_run=True))
    assert not out.exists()
    written = to_lora(adapter, out, base=base, options=LoraOptions(engine))
    (file,) = (file for file in out.iterdir() if file.suffix in (".safetensors", ".gguf"))
    assert planned.size == written.size == file.stat().st_size


def test_a_dry_run_reads_no_weight_to_state_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, base = good_adapter(tmp_path / "adapter"), tiny_base(tmp_path / "base")
    monkeypatch.setattr(conversion, "file_sha256", None)
    options = LoraOptions(dry_run=True)
    assert to_lora(adapter, tmp_path / "out", base=base, options=options).size > 0


def test_a_dry_run_of_a_merge_states_the_sizes_of_the_written_files(tmp_path: Path) -> None:
    adapter, base, out = good_adapter(tmp_path / "a"), filled_base(tmp_path / "b"), tmp_path / "out"
    for options in ({}, {"max_shard_size": 6000}, {"dtype": "bfloat16"}):
        planned = merge(
            adapter, out, base=base, options=MergeOptions(dry_run=True, force=True, **options)
        )
        merge(adapter, out, base=base, options=MergeOptions(force=True, **options))
        written = {file.name: file.stat().st_size for file in out.iterdir()}
        del written["merge-provenance.json"]
        assert {file.name: file.size for file in planned.files} == written
        assert planned.needed == sum(written.values())


@pytest.mark.parametrize(
    ("lambdas", "dtype"),
    [
        (np.float32, None),
        (np.float32, "float32"),
        (ml_dtypes.bfloat16, None),
        (ml_dtypes.bfloat16, "bfloat16"),
        (ml_dtypes.bfloat16, "float16"),
    ],
)
def test_the_embedded_size_is_reported_if_the_base_is_known(
    lambdas: Any, dtype: str | None, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter", stripped=True)
    tensors(lambda all_: {name: array.astype(lambdas) for name, array in all_.items()})(folder)
    assert info(folder).sizes.embedded is None
    options = BaseOptions(str(tiny_base(tmp_path / "base", dtype=dtype or "float32")), dtype=dtype)
    done = embed(folder, tmp_path / "out", base=options)
    assert info(folder, base=options).sizes.embedded == done.bytes_after


def test_a_size_that_needs_a_draw_is_not_reported(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", stripped=True)
    tensors(lambda all_: {name: a.astype(np.float16) for name, a in all_.items()})(folder)
    options = BaseOptions(str(tiny_base(tmp_path / "base")), dtype="bfloat16")
    assert info(folder, base=options).sizes.embedded is None


def test_layers_are_counted_by_kind_and_shape(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    alone = info(folder)
    assert [(g.name, g.layers, g.out_features, g.in_features) for g in alone.groups] == [
        ("self_attn.q_proj", 2, 16, None),
        ("self_attn.v_proj", 2, 8, None),
    ]
    assert alone.parameters == 2 * (16 + RANK) + 2 * (8 + RANK)
    assert alone.lora_parameters is None
    assert (alone.sizes.lora, alone.sizes.merged) == (None, None)
    based = info(folder, base=BaseOptions(str(tiny_base(tmp_path / "base"))))
    assert [group.in_features for group in based.groups] == [16, 16]
    assert based.lora_parameters == 2 * RANK * (16 + 16) + 2 * RANK * (8 + 16)
    assert based.sizes.lora is not None


def test_tensors_that_replace_the_base_s_are_listed(tmp_path: Path) -> None:
    head = {"base_model.model.score.weight": np.ones((3, 16), np.float32)}
    folder = good_adapter(tmp_path / "adapter", tensors=head, modules_to_save=["score"])
    assert info(folder).replacements == ("base_model.model.score.weight",)


def test_the_weight_of_a_head_without_vectors_replaces_the_base_s(tmp_path: Path) -> None:
    head = {"base_model.model.lm_head.base_layer.weight": np.ones((32, 16), np.float32)}
    assert info(good_adapter(tmp_path / "adapter", tensors=head)).replacements == (*head,)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (None, "names no base"),
        ("/data/llama", "/data/llama, which is not a repo on the Hub"),
        ("..\\llama", "which is not a repo on the Hub"),
        ("a\x1b[31m", "a\\x1b[31m"),
        ("example/tiny-llama", "not in the local cache"),
    ],
)
def test_an_unavailable_base_is_reported_and_not_needed(
    name: str | None, said: str, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter", base_model_name_or_path=name)
    found = info(folder)
    assert found.base_facts.base is None
    assert said in found.base_facts.source
    assert found.findings == ()


@pytest.mark.parametrize("projections", ProjectionSource)
def test_info_describes_the_stored_projections_for_every_option(
    projections: ProjectionSource, tmp_path: Path
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    drawn(key=KEY + 1)(folder)
    found = info(folder, base=BaseOptions(dtype="float32"), projections=projections)
    assert found.draw is not None
    assert found.draw.key == KEY + 1


def test_info_on_the_key_s_projections_needs_a_dtype(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    drawn(key=KEY + 1)(folder)
    with pytest.raises(UsageError, match="--base-dtype"):
        info(folder, projections=ProjectionSource.KEY)


def test_a_cached_base_of_the_config_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, name = "c" * 40, "models--example--tiny-llama"
    snapshot = tmp_path / "hub" / name / "snapshots" / commit
    tiny_base(snapshot, dtype="bfloat16")
    (tmp_path / "hub" / name / "refs").mkdir()
    (tmp_path / "hub" / name / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = good_adapter(tmp_path / "adapter")
    found = info(folder)
    assert found.base_facts.source == f"example/tiny-llama@{commit}"
    assert found.base_facts.rounding is Rounding.BF16
    # A base that cannot be read does not prevent the description of the adapter.
    (snapshot / "config.json").write_text("{")
    assert "V022" in info(folder).base_facts.source
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example").mkdir()
    (tmp_path / "example" / "tiny-llama").mkdir()
    # a folder without a model is not taken for the base
    assert "V022" in info(folder).base_facts.source
    (tmp_path / "example" / "tiny-llama" / "config.json").write_text("{}")
    assert "--base ./example/tiny-llama or" in info(folder).base_facts.source


def test_an_input_that_changes_while_it_is_read_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = good_adapter(tmp_path / "adapter")

    def change_and_measure(*args: Any) -> int | None:
        fields({"r": RANK})(folder)
        return lora_size(*args)

    monkeypatch.setattr("vera_convert.summary.lora_size", change_and_measure)
    with pytest.raises(Exception, match="changed while it was read"):
        info(folder)
