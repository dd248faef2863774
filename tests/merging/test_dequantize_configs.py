"""Every setting of a quantized base's config in many variants: refused, or without effect.

No setting may change a weight silently: either the stored parts alone, or the parts and the
settings together, determine the packing of a weight.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import DATA
from safetensors.numpy import load_file

from vera_convert.assembly.input_files import InputFile
from vera_convert.base.casts import casts_on
from vera_convert.base.model import BaseModel, read_base
from vera_convert.base.quantized.unpack import Unpacked, unpacked
from vera_convert.hub.lookup import HubAccess, Location
from vera_convert.merging import dequantize
from vera_convert.merging.dequantize import Parts, panels
from vera_convert.merging.merge import merge
from vera_convert.merging.options import MergeOptions

FIXTURES = DATA / "quantized"
NAMES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
CODES = {"V552", "V553", "V554"}
METHODS = (
    *("awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq", "mxfp4", "torchao"),
    *("hqq", "unknown"),
)
Settings = dict[str, Any]


def base_of(name: str) -> BaseModel:
    return read_base(Location("base", FIXTURES / name / "base"), HubAccess(offline=True))


def with_settings(base: BaseModel, settings: object) -> Unpacked:
    return unpacked(replace(base, config={**base.config, "quantization_config": settings}))


@np.errstate(all="ignore")
def weights_of(name: str, base: Unpacked) -> Mapping[str, tuple[object, bytes]]:
    """Return the dtype and the bytes of a dequantized weight."""
    folder = FIXTURES / name / "base"
    files = {file: InputFile.look(folder / file, within=folder) for file in base.stored.files}
    found = {}
    with Parts(base.stored, files) as parts:
        for key, weight in [*base.weights.items()][:1]:
            values = weight.decode(parts, 0, weight.matrix[0])
            found[key] = values.dtype, values.tobytes()
    return found


@pytest.mark.parametrize("panel_bytes", [1, 100, 1000, 1 << 20])
@pytest.mark.parametrize("skipped_bytes", [0, 1 << 20])
@pytest.mark.parametrize("name", ["gptq-4bit-v1", "awq-gemm"])
def test_cached_columns_equal_the_columns_of_the_file(
    name: str, panel_bytes: int, skipped_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dequantize, "_PANEL_BYTES", panel_bytes)
    monkeypatch.setattr(dequantize, "_SKIPPED_BYTES", skipped_bytes)
    folder = FIXTURES / name / "base"
    base = unpacked(base_of(name)).stored
    files = {file: InputFile.look(folder / file, within=folder) for file in base.files}
    panel = panels(base, files)
    with Parts(base, files) as plain, Parts(base, files, panel) as parts:
        for part in ("qweight", "qzeros", "scales"):
            tensor = f"model.layers.0.mlp.down_proj.{part}"
            rows, columns = base.tensors[tensor].info.shape
            whole = plain.rows(tensor, 0, rows)
            for first in range(0, columns, 3):
                for last in {min(first + count, columns) for count in (1, 2, 5, columns)}:
                    for each in (plain, parts):
                        found = each.columns(tensor, first, last)
                        np.testing.assert_array_equal(found, whole[:, first:last])


def others(value: object) -> Iterator[object]:
    """Return other values for a setting."""
    yield None
    match value:
        case bool():
            yield from (not value, "true")
        case int():
            yield from (value * 2, value // 2, 0, -1, str(value), float(value), 2**70)
        case str():
            yield from (value.upper(), "unknown", [value], 5, f"{value}_v2", value[:4])
        case list():
            yield from ([], "x", [1], [*value, "model.layers.0.mlp"], [*reversed(value)])
        case dict():
            yield from ({}, [], "x", 5)
        case _:
            yield from (["model.layers.0.mlp"], 5, "x", {"a": 1})


def variants(settings: object) -> Iterator[object]:
    """Return the settings without each setting, and with other values of each setting."""
    if not isinstance(settings, dict):
        return
    for key, value in settings.items():
        rest = {name: each for name, each in settings.items() if name != key}
        yield rest
        yield from ({**rest, key: other} for other in others(value))
        yield from ({**rest, key: inner} for inner in variants(value))


@pytest.mark.parametrize("name", NAMES)
def test_no_setting_changes_a_weight_without_a_refusal(name: str) -> None:
    base = base_of(name)
    settings = base.config["quantization_config"]
    wanted = weights_of(name, unpacked(base))
    for changed in variants(settings):
        found = with_settings(base, changed)
        codes = {finding.code for finding in found.defects}
        assert codes <= CODES
        assert codes or weights_of(name, found) == wanted, changed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [None, {}, [], "x", 5])
def test_a_config_without_settings_is_refused_or_not_needed(name: str, settings: object) -> None:
    base = base_of(name)
    found = with_settings(base, settings)
    needs_config = name.startswith(("awq", "gptq", "ct", "fp8"))  # fp8 needs the size of the blocks
    assert bool(found.defects) is needs_config
    if not needs_config:
        assert weights_of(name, found) == weights_of(name, unpacked(base))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_the_parts_contradict_is_refused(name: str, method: str) -> None:
    base = base_of(name)
    settings = base.config["quantization_config"]
    assert isinstance(settings, Mapping)
    if method == settings["quant_method"]:
        return
    found = with_settings(base, {**settings, "quant_method": method})
    # load_in_4bit and load_in_8bit take precedence over the method; fp8 stores the same parts.
    is_said_elsewhere = name.startswith("bnb")
    has_both_parts = (name, method) == ("ct-fp8-channel", "fp8")
    assert bool(found.defects) is not (is_said_elsewhere or has_both_parts)


@pytest.mark.parametrize("flags", [{}, {"load_in_4bit": False, "load_in_8bit": False}])
def test_false_fields_of_bitsandbytes_do_not_change_the_method(flags: Settings) -> None:
    base = base_of("gptq-4bit-v1")
    settings = base.config["quantization_config"]
    assert isinstance(settings, Mapping)
    assert with_settings(base, {**settings, **flags}).labels == ("GPTQ",)


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("gptq-4bit-v2", {"format": "gptq"}, "name two versions"),
        ("gptq-4bit-v1", {"checkpoint_format": "gptq_v2"}, "name two versions"),
        ("gptq-4bit-v1", {"checkpoint_format": "marlin"}, '"marlin"'),
        ("gptq-4bit-v1", {"is_marlin_format": True}, '"marlin"'),
        ("gptq-4bit-v1", {"format": "exllama"}, '"exllama"'),
        ("gptq-8bit", {"bits": 5}, "bits is 5; 2, 3, 4 and 8"),
        ("gptq-8bit", {"bits": 1}, "bits is 1; 2, 3, 4 and 8"),
        ("awq-gemm", {"version": "gemv_fast"}, '"gemv_fast"'),
        ("awq-gemm", {"checkpoint_format": "gemv"}, '"gemv"'),
        ("awq-gemm", {"format": "marlin"}, '"marlin"'),
        ("awq-gemm", {"bits": 3}, "3 bits"),
    ],
)
def test_a_refusal_names_the_layout(name: str, settings: Settings, named: str) -> None:
    base = base_of(name)
    own = base.config["quantization_config"]
    assert isinstance(own, Mapping)
    found = with_settings(base, {**own, **settings})
    assert {finding.code for finding in found.defects} == {"V554"}
    assert all(named in finding.reason for finding in found.defects)


@pytest.mark.parametrize("order", [True, "group", "dynamic", "other"])
def test_an_order_of_inputs_is_refused(order: object) -> None:
    base = base_of("ct-pack-int4-asym-group32")
    settings: Settings = json.loads(json.dumps(base.config["quantization_config"]))
    weights = settings["config_groups"]["group_0"]["weights"]
    for value, codes in ((order, {"V554"}), ("weight", set()), ("static", set()), (False, set())):
        weights["actorder"] = value
        found = with_settings(base, json.loads(json.dumps(settings)))
        assert {finding.code for finding in found.defects} == codes


@pytest.mark.parametrize("value", [["bfloat16"], 5, "unknown", "int8"])
def test_a_compute_dtype_that_is_none_leaves_the_rounding_open(value: object) -> None:
    base = base_of("bnb-nf4-double-noproj")
    settings = base.config["quantization_config"]
    assert isinstance(settings, Mapping)
    found = with_settings(base, {**settings, "bnb_4bit_compute_dtype": value})
    assert casts_on(found, found.weights).rounding is None


@pytest.mark.parametrize("name", ["ct-pack-int8-channel-noproj", "ct-fp8-channel"])
def test_a_float32_model_is_not_rounded_before_the_delta_is_added(
    name: str, tmp_path: Path
) -> None:
    """compressed-tensors casts to the dtype of the model, here float32, and keeps the dtype of the
    scales.
    """
    source, base = FIXTURES / name, tmp_path / "base"
    shutil.copytree(source / "base", base)
    config = json.loads((source / "base/config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    found = unpacked(read_base(Location("base", base), HubAccess(offline=True)))
    assert found.dtype == "BF16"
    assert {dtype for dtype, _ in weights_of(name, found).values()} == {np.dtype(np.float32)}
    merge(source / "adapter", tmp_path / "out", base=base, options=MergeOptions(dequantize=True))
    plain = "model.layers.0.mlp.up_proj.weight"
    wanted = load_file(source / "expected.safetensors")[f"dequantized.{plain}"]
    out = load_file(tmp_path / "out/model.safetensors")[plain]
    assert out.dtype == wanted.dtype
    assert out.tobytes() == wanted.tobytes()
