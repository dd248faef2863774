"""Merged models equal PEFT's; an adapter that does not fit the base completely is refused."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapters import good_adapter, good_tensors
from folders import bytes_by_name, refusal
from merges import FIXTURES, assert_same, expected_tensors, filled_base, merged_with, tensors_of
from safetensors.numpy import load_file, save_file

from vera_convert.conversion.projections import ProjectionSource
from vera_convert.errors import CheckpointError, SurroundingsError, UsageError
from vera_convert.merging.adapters import AdapterSpec
from vera_convert.merging.merge import merge

EXPECTED = sorted(FIXTURES.glob("*/*/expected*.json"))
PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"


# --- compared with PEFT --------------------------------------------------------------------------


def tolerance_of(expected: Any, tensor: Any) -> float:
    """Return a fixture's tolerance: a number, or one last bit of the largest value."""
    given = expected["tolerance"]["changed_tensors_max_abs"]
    if isinstance(given, float):
        return given
    largest = float(np.abs(tensor.astype(np.float64)).max())
    return float(2.0 ** (np.floor(np.log2(largest)) - 7))


@pytest.mark.parametrize("path", EXPECTED, ids=lambda path: path.relative_to(FIXTURES).as_posix())
def test_a_merge_equals_the_merge_of_peft(path: Path, tmp_path: Path) -> None:
    expected = json.loads(path.read_bytes())
    ignored = "ignored the stored" in expected.get("default_semantics_note", "")
    projections = ProjectionSource.KEY if ignored else ProjectionSource.AUTO
    base = FIXTURES / expected["base"]
    done = merged_with(path.parent, base, tmp_path / "out", projections=projections, jobs=2)
    found = tensors_of(tmp_path / "out")
    changed = load_file(FIXTURES / expected["merged_changed_tensors_file"])
    assert found.keys() == expected["merged"].keys()
    for name, facts in expected["merged"].items():
        if not facts["changed"]:
            assert sha256(found[name].tobytes()).hexdigest() == facts["sha256"], name
            continue
        apart = np.abs(found[name].astype("f8") - changed[name].astype("f8"))
        assert apart.max() <= tolerance_of(expected, changed[name]), name
        bf16 = found[name].dtype == ml_dtypes.bfloat16 and expected["default_semantics"]
        if bf16 and "sha256_float64_reference" in facts:
            digest = sha256(found[name].tobytes()).hexdigest()
            assert digest == facts["sha256_float64_reference"], name
    assert {each.name for each in done.tensors} == changed.keys()


def test_each_tensor_keeps_its_dtype(tmp_path: Path) -> None:
    stored = {
        name: array.astype(ml_dtypes.bfloat16 if name.endswith("_b") else array.dtype)
        for name, array in good_tensors().items()
    }
    stored["base_model.vera_A"] = stored["base_model.vera_A"].astype(np.float16)
    adapter = good_adapter(tmp_path / "adapter", tensors=stored)
    base = filled_base(
        tmp_path / "base", dtypes={"q_proj": "bfloat16", "v_proj": "float16", "norm": "float64"}
    )
    merged_with(adapter, base, tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), expected_tensors({adapter: 1.0}, base))


def test_float64_is_computed_in_float64(tmp_path: Path, adapter: Path) -> None:
    base = filled_base(tmp_path / "base", dtype="float64")
    merged_with(adapter, base, tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), expected_tensors({adapter: 1.0}, base), within=1e-15)


# --- several adapters ----------------------------------------------------------------------------


def test_several_adapters_are_added_with_their_weights(tmp_path: Path, base: Path) -> None:
    first = good_adapter(tmp_path / "first")
    values = np.random.default_rng(5)
    larger = {
        name: values.normal(size=[6 if n == 4 else n for n in array.shape]).astype(array.dtype)
        for name, array in good_tensors().items()
        if "v_proj" not in name
    }
    without = {name: None for name in good_tensors() if "v_proj" in name}
    second = good_adapter(
        tmp_path / "second", r=6, tensors={**larger, **without}, target_modules=["q_proj"]
    )
    done = merged_with(first, base, tmp_path / "out", weight=0.5, add=(AdapterSpec(second, -2.0),))
    assert_same(
        tensors_of(tmp_path / "out"),
        expected_tensors({first: 0.5, second: -2.0}, base),
        within=2e-6,
    )
    assert [each.weight for each in done.adapters] == [0.5, -2.0]
    touched = {each.name: each.adapters for each in done.tensors}
    assert touched[f"{Q}.weight"] == (0, 1)
    assert touched["model.layers.0.self_attn.v_proj.weight"] == (0,)


def test_a_weight_of_zero_changes_nothing(tmp_path: Path, adapter: Path, base: Path) -> None:
    done = merged_with(adapter, base, tmp_path / "out", weight=0.0)
    assert_same(tensors_of(tmp_path / "out"), tensors_of(base), within=0)
    assert [finding.code for finding in done.findings] == ["V303"]


@pytest.mark.parametrize("weight", [float("inf"), float("nan")])
def test_a_weight_that_is_not_finite_is_refused(
    tmp_path: Path, adapter: Path, base: Path, weight: float
) -> None:
    with pytest.raises(UsageError, match="finite"):
        merged_with(adapter, base, tmp_path / "out", weight=weight)


# --- refusals, which leave no files --------------------------------------------------------------


def test_names_that_do_not_fit_are_refused_with_counts_and_examples(
    tmp_path: Path, adapter: Path
) -> None:
    renamed = {
        name: np.zeros((2, 2), np.float32)
        for name in ("model.language_model.layers.0.self_attn.q_proj.weight",)
    }
    base = tmp_path / "vlm"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "unheard_of"}')
    save_file(renamed, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"V520.*0.*4") as caught:
        merged_with(adapter, base, tmp_path / "out")
    assert "model.layers." in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "vlm"]


def test_a_single_missing_layer_is_refused(tmp_path: Path, adapter: Path) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    base = filled_base(tmp_path / "base", tensors={name: None})
    assert refusal(lambda: merged_with(adapter, base, tmp_path / "out")) == "V520"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize(
    "name", [f"{PREFIX}{Q}.vera_lambda_b", f"{PREFIX}{Q}.vera_lambda_d", "base_model.vera_A"]
)
def test_a_trained_value_that_is_not_finite_is_named(
    tmp_path: Path, base: Path, name: str, value: float
) -> None:
    spoilt = good_tensors()[name]
    spoilt[(2, 3) if spoilt.ndim == 2 else 2] = value
    adapter = good_adapter(tmp_path / "a", tensors={name: spoilt})
    with pytest.raises(CheckpointError, match="V301") as caught:
        merged_with(adapter, base, tmp_path / "out")
    assert name in str(caught.value)
    assert f"[2, 3] is {value}" in str(caught.value) or f"[2] is {value}" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


def test_a_result_that_is_not_finite_is_named(tmp_path: Path, adapter: Path, base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors[f"{Q}.weight"][5, 6] = np.inf
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"V530 {Q}\.weight: its value at \[5, 6\]"):
        merged_with(adapter, base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_shard_that_is_missing_is_refused(tmp_path: Path, adapter: Path) -> None:
    base = filled_base(tmp_path / "base", shards=3)
    (base / "model-00002-of-00003.safetensors").unlink()
    assert refusal(lambda: merged_with(adapter, base, tmp_path / "out")) == "V507"


def test_an_adapter_without_a_base_on_the_hub_needs_the_option_base(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "a", base_model_name_or_path="/data/llama")
    with pytest.raises(UsageError, match="--base"):
        merge(adapter, tmp_path / "out")


def test_free_space_is_checked_before_any_write(
    tmp_path: Path, adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(SurroundingsError, match="bytes, and 100 are free"):
        merged_with(adapter, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_fails_like_a_merge_if_space_is_short(
    tmp_path: Path, adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(SurroundingsError, match="bytes, and 100 are free"):
        merged_with(adapter, base, tmp_path / "out", dry_run=True)


def test_too_little_memory_is_reported(
    tmp_path: Path, adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("vera_convert.assembly.blocks.Workspace", fail)
    with pytest.raises(SurroundingsError, match="memory"):
        merged_with(adapter, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- warnings, provenance and card ---------------------------------------------------------------


def test_a_delta_below_the_last_bit_is_a_warning(tmp_path: Path, adapter: Path) -> None:
    base = filled_base(tmp_path / "base", dtype="bfloat16")
    done = merged_with(adapter, base, tmp_path / "out", weight=1e-4)
    assert [finding.code for finding in done.findings] == ["V537"]
    assert not merged_with(adapter, base, tmp_path / "more").findings


def test_the_provenance_names_every_input_and_nothing_of_the_machine(
    tmp_path: Path, adapter: Path, schema_errors: Any
) -> None:
    base = filled_base(tmp_path / "base", shards=2)
    second = good_adapter(tmp_path / "second", stripped=True)
    options: dict[str, Any] = {"add": (AdapterSpec(second, 0.25),), "checksums": True}
    merged_with(adapter, base, tmp_path / "out", jobs=1, **options)
    merged_with(adapter, base, tmp_path / "again", jobs=3, **options)
    text = (tmp_path / "out/merge-provenance.json").read_text()
    assert bytes_by_name(tmp_path / "out") == bytes_by_name(tmp_path / "again")
    assert str(tmp_path) not in text
    document = json.loads(text)
    assert not schema_errors("merge-provenance", document)
    assert document["base"]["source"] == {"folder": "base"}
    assert [each["source"] for each in document["adapters"]] == [
        {"folder": "adapter"},
        {"folder": "second"},
    ]
    assert [each["projections"]["origin"] for each in document["adapters"]] == ["file", "key"]
    for output in document["outputs"]:
        content = (tmp_path / "out" / output["name"]).read_bytes()
        assert (output["size"], output["sha256"]) == (len(content), sha256(content).hexdigest())
    changed = {each["name"] for each in document["tensors"]}
    assert changed == {f"model.layers.{n}.self_attn.{t}_proj.weight" for n in (0, 1) for t in "qv"}


def test_the_card_names_base_and_adapters(tmp_path: Path, adapter: Path, base: Path) -> None:
    merged_with(adapter, base, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith('---\nbase_model: "example/tiny-llama"\n')
    assert "| Base | `base` |  |  |" in card
    assert "| Adapter | `adapter` |  | 1.0 |" in card


def test_a_dry_run_writes_nothing(tmp_path: Path, adapter: Path) -> None:
    base = filled_base(tmp_path / "base", shards=2)
    before = bytes_by_name(tmp_path)
    done = merged_with(adapter, base, tmp_path / "out", dry_run=True)
    assert bytes_by_name(tmp_path) == before
    assert not done.written
    weights = [file for file in done.files if file.name.endswith(".safetensors")]
    assert [file.size for file in weights] == [
        path.stat().st_size for path in sorted(base.glob("*.safetensors"))
    ]
    assert sum(file.tensors for file in weights) == 4
    assert sum(file.products for file in weights) == 2 * 4 * 2 * (16 * 16 + 8 * 16)
    assert done.seconds > 0


def test_a_merge_with_check_gives_the_same_model(tmp_path: Path, adapter: Path) -> None:
    base = filled_base(tmp_path / "base", shards=2)
    merged_with(adapter, base, tmp_path / "out", check=True)
    assert_same(tensors_of(tmp_path / "out"), expected_tensors({adapter: 1.0}, base))
