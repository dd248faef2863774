"""strip drops A and B only if embed restores the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapterdefects import A, B, drawn, fields, tensors
from adapters import KEY, RANK, good_adapter
from bases import tiny_base
from commandline import Run
from draws import ROUNDINGS, STORED, as_peft_stored
from folders import (
    CONFIG_NAME,
    DATA,
    WEIGHTS,
    base_of,
    bytes_by_name,
    codes,
    metadata,
    refusal,
    weights,
)
from numpy.typing import NDArray
from safetensors.numpy import save_file

from vera_convert.adapter import folder as adapterfolder
from vera_convert.adapter.fingerprint import METADATA_KEY, from_text
from vera_convert.adapter.opening import open_adapter
from vera_convert.base.bases import Bases
from vera_convert.base.facts import BaseOptions
from vera_convert.base.resolve import Need, resolve_base
from vera_convert.conversion import work
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.conversion.strip_embed import embed, strip
from vera_convert.conversion.transforms import embedded
from vera_convert.conversion.work import Conversion
from vera_convert.draws.generator import Rounding, Variant
from vera_convert.errors import CheckpointError, SurroundingsError, UsageError
from vera_convert.validation.validate import validate

FIXTURES = DATA / "fixtures"
ADAPTERS = sorted(path.parent for path in FIXTURES.glob("*/*/adapter_config.json"))
FOREIGN = [folder for folder in ADAPTERS if "foreign" in folder.name]
EMBEDDED = [folder for folder in ADAPTERS if folder.name.endswith("_proj")]
STRIPPED = [folder for folder in ADAPTERS if folder.name.endswith("_noproj")]
EXPECTED = sorted(FIXTURES.glob("*/*/expected*.json"))


def case_name(path: Path) -> str:
    return "/".join(path.relative_to(FIXTURES).parts)


# --- what PEFT wrote -----------------------------------------------------------------------------


def test_no_fixture_is_missing() -> None:
    assert (len(ADAPTERS), len(FOREIGN), len(EMBEDDED), len(STRIPPED)) == (74, 2, 48, 24)
    assert len(EXPECTED) == 98


@pytest.mark.parametrize("path", EXPECTED, ids=case_name)
def test_the_projections_equal_those_in_effect_in_peft(path: Path) -> None:
    expected = json.loads(path.read_bytes())
    # PEFT 0.21 works like `auto`; PEFT up to 0.20 ignored the file.
    by_key = expected["projection_source"] == "key"
    means = [ProjectionSource.KEY] if by_key else [ProjectionSource.AUTO, ProjectionSource.FILE]
    if "ignored" not in expected.get("default_semantics_note", ""):
        means.append(ProjectionSource.AUTO)
    with open_adapter(path.parent) as adapter:
        base = BaseOptions(str(FIXTURES / expected["base"]))
        base_facts = resolve_base(adapter, base, bases=Bases(), need=Need.NONE)
        for projections in means:
            result = {
                t.name: t.array()
                for t in embedded(adapter, base_facts, projections=projections).tensors
            }
            for name, effect in expected["projections_in_effect"].items():
                values = result[f"base_model.{name}"].astype(effect["dtype"])
                assert list(values.shape) == effect["shape"]
                assert sha256(values.tobytes()).hexdigest() == effect["sha256"]


@pytest.mark.parametrize("folder", EMBEDDED, ids=case_name)
def test_strip_and_embed_restore_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    before = bytes_by_name(folder)
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
    assert bytes_by_name(tmp_path / "embedded") == before
    assert bytes_by_name(folder) == before


@pytest.mark.parametrize("folder", STRIPPED, ids=case_name)
def test_a_stripped_adapter_is_copied_and_embedded_for_its_base(
    folder: Path, tmp_path: Path
) -> None:
    done = strip(folder, tmp_path / "stripped")
    assert done.changes == ()
    assert bytes_by_name(tmp_path / "stripped") == bytes_by_name(folder)
    back = embed(folder, tmp_path / "embedded", base=base_of(folder))
    assert codes(back) == {"V410"}
    stored = weights(tmp_path / "embedded")
    expected = json.loads((folder / "expected.json").read_bytes())["projections_in_effect"]
    assert [*stored[A].shape] == expected["vera_A"]["shape"]
    assert [*stored[B].shape] == expected["vera_B"]["shape"]
    # strip recognizes the draw, so strip can undo embed.
    strip(tmp_path / "embedded", tmp_path / "again", base=base_of(folder))
    assert weights(tmp_path / "again").keys() == weights(folder).keys()


@pytest.mark.parametrize("folder", FOREIGN, ids=case_name)
@pytest.mark.parametrize("accept_change", [False, True])
def test_projections_that_are_no_draw_are_never_stripped(
    folder: Path, tmp_path: Path, *, accept_change: bool
) -> None:
    out = tmp_path / "out"
    act = partial(strip, folder, out, base=base_of(folder), accept_change=accept_change)
    assert refusal(act) == "V401"
    assert not out.exists()
    assert embed(folder, out).changes == ()
    assert bytes_by_name(out) == bytes_by_name(folder)


def test_the_trained_adapter_is_restored_with_its_base(
    minilm: Path, minilm_model: Path, tmp_path: Path
) -> None:
    source, base = minilm / "save_projection_true", BaseOptions(str(minilm_model))
    done = strip(source, tmp_path / "stripped", base=base)
    assert done.findings == ()
    assert done.bytes_after * 8 < done.bytes_before
    embed(tmp_path / "stripped", tmp_path / "embedded", base=base)
    assert bytes_by_name(tmp_path / "embedded") == bytes_by_name(source)
    embed(minilm / "save_projection_false", tmp_path / "drawn", base=base)
    assert (tmp_path / "drawn" / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()


# --- every way in which A and B can have been drawn ----------------------------------------------


def tiny_options(base: str, folder: Path) -> BaseOptions:
    """Write a base with one dtype for the first layer and another for the second layer."""
    first, _, second = base.partition("+")
    dtypes = {"layers.0": first, "layers.1": second or first}
    return BaseOptions(str(tiny_base(folder, dtype=first, dtypes=dtypes)))


def draws() -> Iterator[tuple[Variant, str, str]]:
    """Yield every variant on every base in float32, and the usual variant in every possible
    dtype.
    """
    for variant in Variant:
        for base in ROUNDINGS:
            for dtype in STORED if variant is Variant.FLOAT32_FUSED else ("F32", "F64"):
                as_wide = dtype != "F64" or base == "float64"
                if as_wide and as_peft_stored(variant, base, dtype) is not None:
                    yield variant, base, dtype


def equal(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]] | None) -> bool:
    """Say whether two pairs hold the same values, in any dtype."""
    return other is not None and all(np.array_equal(one[n], other[n].astype("f8")) for n in one)


@pytest.mark.parametrize(("variant", "base", "dtype"), [*draws()])
def test_every_draw_on_every_base_is_restored(
    variant: Variant, base: str, dtype: str, tmp_path: Path
) -> None:
    pair = as_peft_stored(variant, base, dtype)
    assert pair is not None
    folder = good_adapter(tmp_path / "adapter", tensors=pair)
    options = tiny_options(base, tmp_path / "base")
    orders = {base, "+".join(reversed(base.split("+")))}  # headers do not show the order
    usual = [as_peft_stored(Variant.FLOAT32_FUSED, order, "F64") for order in orders]
    same = any(equal(pair, each) for each in usual)
    told = {finding.code for finding in validate([folder], base=options).adapters[0].findings}
    assert ("V414" in told) is not same
    if not same:
        assert refusal(lambda: strip(folder, tmp_path / "no", base=options)) == "V403"
    done = strip(folder, tmp_path / "stripped", base=options, accept_change=True)
    assert any(change.startswith("accepted") for change in done.changes) is not same
    assert codes(done) <= {"V207", "V404", "V415"}
    embed(tmp_path / "stripped", tmp_path / "embedded")
    assert bytes_by_name(tmp_path / "embedded") == bytes_by_name(folder)


@pytest.mark.parametrize("base", ["float32", "bfloat16", "float16", "float16+bfloat16"])
@pytest.mark.parametrize("origin", ["float32", "bfloat16", "float16", "bfloat16+float16"])
def test_projections_that_the_base_rounds_differently_are_refused_with_the_difference(
    origin: str, base: str, tmp_path: Path
) -> None:
    pair = as_peft_stored(Variant.FLOAT32_FUSED, origin, "F32")
    folder = good_adapter(tmp_path / "adapter", tensors=pair)
    options = tiny_options(base, tmp_path / "base")
    # float16 keeps all values that bfloat16 keeps, and headers do not show the order of two casts.
    same = {origin, base} <= {"bfloat16", "bfloat16+float16", "float16+bfloat16"} and (
        "+" in base or "float16+bfloat16" not in (origin, base)
    )
    told = {finding.code for finding in validate([folder], base=options).adapters[0].findings}
    assert ("V414" in told) is not (origin == base or same)
    if origin == base or same:
        done = strip(folder, tmp_path / "stripped", base=options)
        assert codes(done) == ({"V404", "V415"} if "+" in base else set())
        return
    with pytest.raises(CheckpointError, match=r"V403 .*the largest difference is \d"):
        strip(folder, tmp_path / "stripped", base=options)
    assert not (tmp_path / "stripped").exists()
    strip(folder, tmp_path / "stripped", base=options, accept_change=True)
    embed(tmp_path / "stripped", tmp_path / "embedded", base=options)
    assert bytes_by_name(tmp_path / "embedded") == bytes_by_name(folder)


@pytest.mark.parametrize(("option", "base"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_option_base_dtype_takes_precedence_over_the_files(
    option: str, base: str, tmp_path: Path
) -> None:
    pair = as_peft_stored(Variant.FLOAT32_FUSED, option, "F32")
    folder = good_adapter(tmp_path / "adapter", tensors=pair)
    model = str(tiny_base(tmp_path / "base", dtype=base))
    assert strip(folder, tmp_path / "a", base=BaseOptions(model, dtype=option)).findings == ()
    assert refusal(lambda: strip(folder, tmp_path / "b", base=BaseOptions(model))) == "V403"


def test_a_wider_draw_that_was_cut_is_restored_with_the_cut(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    drawn(width=24, kept=16)(folder)
    options = BaseOptions(str(tiny_base(tmp_path / "base")))
    with pytest.raises(CheckpointError, match=r"24 inputs.*the largest difference"):
        strip(folder, tmp_path / "no", base=options)
    strip(folder, tmp_path / "stripped", base=options, accept_change=True)
    recorded = from_text(metadata(tmp_path / "stripped")[METADATA_KEY], place="weights")
    assert (recorded.in_features, recorded.drawn_in_features) == (16, 24)
    embed(tmp_path / "stripped", tmp_path / "embedded")
    assert bytes_by_name(tmp_path / "embedded") == bytes_by_name(folder)


@pytest.mark.parametrize("name", [A, B])
@pytest.mark.parametrize("place", [(0, 0), (3, 3), (-1, -1)])
@pytest.mark.parametrize("bit", [0, 31])
def test_a_single_flipped_bit_is_refused(
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
    with pytest.raises(
        CheckpointError, match=f"V402 .*draw of key {key}; the config's key is {KEY}"
    ):
        strip(folder, tmp_path / "out", accept_change=True)


def test_a_negative_key_is_restored(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter", projection_prng_key=-1)
    drawn(key=-1)(folder)
    strip(folder, tmp_path / "stripped", base=BaseOptions(str(tiny_base(tmp_path / "base"))))
    embed(tmp_path / "stripped", tmp_path / "embedded")
    assert bytes_by_name(tmp_path / "embedded") == bytes_by_name(folder)


# --- metadata, fields and files that are kept ----------------------------------------------------


def test_metadata_and_unknown_fields_are_kept(tmp_path: Path) -> None:
    notes = {"format": "pt", "note": 'zwölf\n"\u2028', "a": ""}
    folder = good_adapter(tmp_path / "adapter", metadata=notes, foo_config={"b": [1, None]})
    strip(folder, tmp_path / "stripped")
    assert metadata(tmp_path / "stripped").keys() == {*notes, METADATA_KEY}
    embed(tmp_path / "stripped", tmp_path / "embedded")
    assert metadata(tmp_path / "embedded") == notes
    assert (tmp_path / "embedded" / CONFIG_NAME).read_bytes() == (folder / CONFIG_NAME).read_bytes()


def test_a_file_without_metadata_is_restored_without_metadata(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    save_file(weights(folder), folder / WEIGHTS)
    strip(folder, tmp_path / "stripped")
    embed(tmp_path / "stripped", tmp_path / "embedded")
    assert bytes_by_name(tmp_path / "embedded") == bytes_by_name(folder)


def test_the_fingerprint_records_the_dropped_matrices(tmp_path: Path) -> None:
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
def test_an_input_that_changes_during_strip_is_noticed(
    run: Callable[..., Conversion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = good_adapter(tmp_path / "adapter")
    finish = adapterfolder.write_adapter

    def change_and_finish(*args: Any, **kwargs: Any) -> object:
        fields({"r": RANK})(folder)
        return finish(*args, **kwargs)

    monkeypatch.setattr(work, "write_adapter", change_and_finish)
    with pytest.raises(SurroundingsError, match="changed while it was read"):
        run(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_an_existing_out_and_an_out_inside_an_input_are_refused(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    outs = [folder, folder / "out", tmp_path]
    if os.name == "posix":  # links need a permission on Windows
        (tmp_path / "link").symlink_to(folder, target_is_directory=True)
        outs.append(tmp_path / "link" / "out")
    for out in outs:
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
    assert bytes_by_name(tmp_path / "out0") == bytes_by_name(tmp_path / "out1")


def test_a_config_without_save_projection_gets_the_field(tmp_path: Path) -> None:
    folder = good_adapter(tmp_path / "adapter")
    text = (folder / CONFIG_NAME).read_bytes()
    bare = text.replace(b'  "save_projection": true,\n', b"")
    assert bare != text
    (folder / CONFIG_NAME).write_bytes(bare)
    strip(folder, tmp_path / "stripped")
    added = bare.replace(b"\n}", b',\n  "save_projection": false\n}')
    assert (tmp_path / "stripped" / CONFIG_NAME).read_bytes() == added
    embed(tmp_path / "stripped", tmp_path / "embedded")
    assert (tmp_path / "embedded" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("form", ["stripped", "embedded"])
@pytest.mark.parametrize("command", ["same", "asis"])
def test_an_adapter_that_already_has_the_form_keeps_every_byte(
    form: str, command: str, tmp_path: Path, run: Run
) -> None:
    adapter = good_adapter(tmp_path / "adapter", stripped=form == "stripped")
    path = adapter / WEIGHTS
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8 : 8 + length]), indent=1).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    name = {"stripped": "strip", "embedded": "embed"}[form]
    call = [name] if command == "same" else ["migrate", "--to", "asis"]
    ended = run(*call, adapter, tmp_path / "out")
    assert ended.status == 0, ended.err
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == path.read_bytes()
    assert f"{path.stat().st_size:,} bytes" in ended.out
    assert "->" not in ended.out
