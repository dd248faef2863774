"""Conversions on a quantized base that does not show to which dtype PEFT rounds A and B."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from folders import DATA, weights
from safetensors.numpy import save_file

import vera_convert
from vera_convert import BaseOptions, UsageError

FIXTURES = DATA / "quantized"
UNDECIDED = ["awq-gemm", "fp8-block", "gptq-4bit-v1"]
FP8 = "float8_e4m3fn"
Convert = Callable[[Path, Path, BaseOptions], object]
CONVERSIONS: dict[str, Convert] = {
    "embed": lambda source, out, base: vera_convert.embed(source, out, base=base),
    "migrate": lambda source, out, base: vera_convert.migrate(
        source, out, to="embedded", base=base
    ),
    "regenerate": lambda source, out, base: vera_convert.regenerate_for(source, out, base=base),
    "to-lora": lambda source, out, base: vera_convert.to_lora(source, out, base=base),
}


def unrecorded(name: str, folder: Path) -> Path:
    """Write the adapter of a fixture without A and B, and without a fingerprint."""
    shutil.copytree(FIXTURES / name / "adapter", folder)
    stored = weights(folder)
    kept = {key: value for key, value in stored.items() if not key.endswith(("vera_A", "vera_B"))}
    save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps({**config, "save_projection": False}))
    return folder


def base_of(name: str, dtype: str | None = None) -> BaseOptions:
    return BaseOptions(str(FIXTURES / name / "base"), dtype=dtype)


@pytest.mark.parametrize("name", UNDECIDED)
@pytest.mark.parametrize("command", CONVERSIONS)
def test_a_conversion_that_regenerates_a_and_b_asks_for_the_dtype(
    name: str, command: str, tmp_path: Path
) -> None:
    adapter, out = unrecorded(name, tmp_path / "adapter"), tmp_path / "out.safetensors"
    with pytest.raises(UsageError, match=r"the adapted layers are quantized .*--base-dtype"):
        CONVERSIONS[command](adapter, out, base_of(name))
    assert not out.exists()
    CONVERSIONS[command](adapter, out, base_of(name, FP8))
    assert out.exists()


@pytest.mark.parametrize("name", UNDECIDED)
def test_a_and_b_on_layers_that_stay_fp8_are_rounded_to_fp8(name: str, tmp_path: Path) -> None:
    adapter = unrecorded(name, tmp_path / "adapter")
    for dtype in ("float32", FP8):
        vera_convert.embed(adapter, tmp_path / dtype, base=base_of(name, dtype))
    drawn, rounded = (weights(tmp_path / dtype) for dtype in ("float32", FP8))
    for key in ("base_model.vera_A", "base_model.vera_B"):
        wanted = drawn[key].astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        assert rounded[key].tobytes() == wanted.tobytes()


@pytest.mark.parametrize("name", UNDECIDED)
def test_a_and_b_that_were_rounded_to_fp8_are_restored(name: str, tmp_path: Path) -> None:
    adapter = unrecorded(name, tmp_path / "adapter")
    embedded, stripped = tmp_path / "embedded", tmp_path / "stripped"
    vera_convert.embed(adapter, embedded, base=base_of(name, FP8))
    told = vera_convert.info(embedded, base=base_of(name))
    assert told.effects[0].same_on == (FP8,)
    assert "V414" not in {finding.code for finding in told.findings}
    (warning,) = vera_convert.strip(embedded, stripped, base=base_of(name)).findings
    assert warning.code == "V404"
    assert f"on a base loaded in {FP8}" in warning.reason
    vera_convert.embed(stripped, tmp_path / "again", base=base_of(name))
    file = "adapter_model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (embedded / file).read_bytes()


@pytest.mark.parametrize("name", UNDECIDED)
def test_a_merge_is_verified_with_its_recorded_dtype(name: str, tmp_path: Path) -> None:
    adapter, out = unrecorded(name, tmp_path / "adapter"), tmp_path / "out"
    options = vera_convert.MergeOptions(dequantize=True)
    vera_convert.merge(adapter, out, base=base_of(name, FP8), options=options)
    only_layers = vera_convert.VerifyOptions(layers_only=True)
    for dtype, passed in ((None, True), (FP8, True), ("bfloat16", False)):
        found = vera_convert.verify(
            adapter, merged=out, base=base_of(name, dtype), options=only_layers
        )
        assert found.passed is passed
