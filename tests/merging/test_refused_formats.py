"""Layouts that --dequantize does not read are refused by name, with three ways out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from commandline import Run
from folders import DATA

from vera_convert.files.reading import open_local
from vera_convert.files.tensorfile import TensorFile, from_file, write_tensors

FIXTURES = DATA / "quantized"
Settings = dict[str, Any]
INT8, GPTQ, AWQ = "ct-pack-int8-channel-noproj", "gptq-4bit-v1", "awq-gemm"
FP8, TORCHAO = "fp8-block", "torchao-int8"


def of_group(settings: Settings, layout: str) -> Settings:
    """Return settings of compressed-tensors with another format in every place that names a
    format.
    """
    groups = {
        name: {**group, "format": layout} for name, group in settings["config_groups"].items()
    }
    return {**settings, "format": layout, "config_groups": groups}


LAYOUTS = (
    *("mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"),
    *("marlin-24", "sparse-24-bitmask", "mixed-precision", "unknown"),
)
BY_SETTINGS: Mapping[str, tuple[str, Settings, str]] = {
    "sparsity": (INT8, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    "transforms": (INT8, {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    "gptq_1_bit": (GPTQ, {"bits": 1}, "GPTQ: bits is 1"),
    "gptq_5_bits": (GPTQ, {"bits": 5}, "GPTQ: bits is 5"),
    **{
        f"gptq_{name}": (GPTQ, {"checkpoint_format": name}, f'GPTQ: the format "{name}"')
        for name in ("marlin", "exllama", "bitblas")
    },
    **{
        f"awq_{name}": (AWQ, {"version": name}, f'AWQ: the version "{name}"')
        for name in ("gemv", "gemv_fast", "marlin", "exllama")
    },
    **{
        name: (FP8, {"quant_method": name}, label)
        for name, label in (
            ("quark", "Quark"),
            ("modelopt", "ModelOpt"),
            ("fbgemm_fp8", "FBGEMM"),
            ("auto-round", "AutoRound"),
            ("mxfp8", "mxfp8"),
            ("a_new_method", "a_new_method"),
        )
    },
}
CLASSES = (
    "Int4Tensor",
    "Int4TilePackedTo4dTensor",
    "Int4PlainInt32Tensor",
    "NF4Tensor",
    "MXTensor",
)


def assert_refused(name: str, base: Path, label: str, run: Run, out: Path) -> None:
    """Check that a merge with or without the option is refused, with the format's name and three
    ways out.
    """
    for option in ((), ("--dequantize",)):
        adapter = FIXTURES / name / "adapter"
        ended = run("merge", adapter, out, "--base", base, "--base-dtype", "bfloat16", *option)
        assert ended.status == 1
        told = " ".join(ended.err.split())
        for text in (
            label,
            "to-lora",
            "original 16-bit or 32-bit model with --base",
            "differs slightly from the model of the training",
            "quantizer's own tool",
        ):
            assert text in told, option
        assert not out.exists()


def with_settings(name: str, base: Path, settings: Settings) -> Path:
    shutil.copytree(FIXTURES / name / "base", base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] |= settings
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return base


@pytest.mark.parametrize("case", BY_SETTINGS)
def test_a_layout_that_the_settings_name_is_refused_by_name(
    case: str, tmp_path: Path, run: Run
) -> None:
    name, settings, label = BY_SETTINGS[case]
    base = with_settings(name, tmp_path / "base", settings)
    assert_refused(name, base, label, run, tmp_path / "out")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_format_of_compressed_tensors_is_refused_by_name(
    layout: str, tmp_path: Path, run: Run
) -> None:
    config = json.loads((FIXTURES / INT8 / "base/config.json").read_text(encoding="utf-8"))
    settings = of_group(config["quantization_config"], layout)
    base = with_settings(INT8, tmp_path / "base", settings)
    assert_refused(INT8, base, f'the format "{layout}" is not supported', run, tmp_path / "out")


@pytest.mark.parametrize("kind", CLASSES)
def test_another_class_of_torchao_is_refused_by_name(kind: str, tmp_path: Path, run: Run) -> None:
    source, base = FIXTURES / TORCHAO / "base", tmp_path / "base"
    shutil.copytree(source, base)
    (base / "model.safetensors").unlink()
    with open_local(source / "model.safetensors") as opened:
        file = TensorFile(opened)
        metadata = {
            key: text.replace("Int8Tensor", kind) for key, text in file.header.metadata.items()
        }
        tensors = [from_file(file, key) for key in file.header.tensors]
        write_tensors(base / "model.safetensors", tensors, metadata)
    assert_refused(TORCHAO, base, f'the class "{kind}" is not supported', run, tmp_path / "out")
