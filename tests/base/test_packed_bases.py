"""Bases whose adapted layers are packed: a warning that names the method; a merge is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import good_adapter
from bases import LLAMA_SIZES
from commandline import Run
from merges import filled_base
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from vera_convert.base.facts import BaseOptions
from vera_convert.counting import count
from vera_convert.errors import CheckpointError
from vera_convert.summary import info
from vera_convert.validation.validate import validate
from vera_convert.verification.verify import verify

Pack = Callable[[NDArray[Any]], Mapping[str, NDArray[Any]]]
I4, F4, F2, U1, I1, I8 = "i4", "f4", "f2", "u1", "i1", "i8"


def fixed(**tensors: tuple[tuple[int, ...], str]) -> Pack:
    """Return the tensors of a packed layer; a keyword's `__` stands for a dot."""
    return lambda _: {
        name.replace("__", "."): np.zeros(shape, kind) for name, (shape, kind) in tensors.items()
    }


def shaped(kind: str, *siblings: str, transposed: bool = False) -> Pack:
    """Return the packing with a weight of another dtype and with further tensors."""
    return lambda weight: {
        "weight": np.zeros(weight.shape[::-1] if transposed else weight.shape, kind),
        **{name: np.ones(weight.shape[0], F4) for name in siblings},
    }


PACKED: Mapping[str, tuple[str, Mapping[str, object], Pack]] = {
    "gptq": (
        "GPTQ",
        {"quant_method": "gptq", "bits": 4},
        fixed(qweight=((2, 16), I4), qzeros=((1, 2), I4), scales=((1, 16), F2), g_idx=((16,), I4)),
    ),
    "awq": (
        "AWQ",
        {"quant_method": "awq"},
        fixed(qweight=((16, 2), I4), qzeros=((1, 2), I4), scales=((1, 16), F2)),
    ),
    "bnb4": (
        "bitsandbytes 4-bit",
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        fixed(weight=((128, 1), U1), weight__absmax=((4,), F4), weight__quant_map=((16,), F4)),
    ),
    "pack_quantized": (
        "compressed-tensors",
        {"quant_method": "compressed-tensors"},
        fixed(weight_packed=((16, 2), I4), weight_scale=((16, 1), F2), weight_shape=((2,), I8)),
    ),
    "torchao": (
        "torchao",
        {"quant_method": "torchao"},
        fixed(_weight_qdata=((16, 16), I1), _weight_scale=((16, 1), F4)),
    ),
    "quanto": (
        "quanto",
        {"quant_method": "quanto", "weights": "int8"},
        fixed(weight___data=((16, 16), I1), weight___scale=((16, 1), F4), input_scale=((1,), F4)),
    ),
    "quanto_4_bit": (
        "quanto",
        {"quant_method": "quanto", "weights": "int4"},
        fixed(weight___data___data=((8, 16), U1), weight___scale=((16, 1), F4)),
    ),
    "eetq": (
        "EETQ",
        {"quant_method": "eetq"},
        shaped(I1, "weight_scales", transposed=True),
    ),
    "spqr": (
        "SpQR",
        {"quant_method": "spqr"},
        fixed(dense_weights=((9,), I8), row_offsets=((4,), I4), col_vals=((4,), I4)),
    ),
    "vptq": (
        "VPTQ",
        {"quant_method": "vptq"},
        fixed(centroids__weight=((1, 64), F2), indices=((1, 2, 4), I4), weight_scale=((16,), F2)),
    ),
    "aqlm": (
        "AQLM",
        {"quant_method": "aqlm"},
        fixed(codes=((2, 2, 1), I1), codebooks=((1, 4, 1, 8), F2), scales=((2, 1, 1, 1), F2)),
    ),
    "hqq": (
        "HQQ",
        {"quant_method": "hqq"},
        fixed(W_q=((8, 16), U1), scale=((16, 1), F4), zero=((16, 1), F4)),
    ),
    "higgs": (
        "HIGGS",
        {"quant_method": "higgs"},
        fixed(weight=((16, 4), "i2"), scales=((16, 1), F2), tables=((16,), F2)),
    ),
    "bitnet": (
        "BitNet",
        {"quant_method": "bitnet"},
        fixed(weight=((4, 16), U1), weight_scale=((1,), F4)),
    ),
    "fp_quant": (
        "FP-Quant",
        {"quant_method": "fp_quant"},
        fixed(qweight=((16, 8), U1), scales=((16, 1), U1), act_global_scale=((1,), F4)),
    ),
    "metal": (
        "Metal",
        {"quant_method": "metal"},
        fixed(weight=((16, 2), "u4"), scales=((16, 1), F2), qbiases=((16, 1), F2)),
    ),
}


def packed_base(folder: Path, name: str, *, says_so: bool = True) -> Path:
    """Write a base with packed adapted layers; `says_so` puts the method into the config."""
    _, config, pack = PACKED[name]
    claim = {"quantization_config": config} if says_so else {}
    filled_base(folder, config={"model_type": "llama", **claim})
    tensors = load_file(folder / "model.safetensors")
    for weight in [each for each in tensors if each.endswith(("q_proj.weight", "v_proj.weight"))]:
        parts = pack(tensors.pop(weight))
        tensors |= {f"{weight.removesuffix('weight')}{part}": a for part, a in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_base_is_a_warning_for_commands_that_do_not_merge(
    name: str, tmp_path: Path, run: Run
) -> None:
    base, adapter = packed_base(tmp_path / "base", name), good_adapter(tmp_path / "adapter")
    method = PACKED[name][0]
    for command in (("validate", adapter), ("info", adapter), ("strip", adapter, tmp_path / "s")):
        ended = run(*command, "--base", base)
        assert ended.status == 0, ended
        text = " ".join((ended.out + ended.err).split())
        assert "V550" not in text
        assert f"4 of 4 layers are quantized ({method})" in text or command[0] != "validate"
    assert run("validate", adapter, "--base", base, "--fail-on", "warning").status == 1


WAYS_OUT = (
    "to-lora",
    "original 16-bit or 32-bit model with --base",
    "differs slightly from the model of the training",
    "quantizer's own tool",
)


@pytest.mark.parametrize("name", PACKED)
def test_a_merge_into_a_packed_base_is_refused_by_the_method(
    name: str, tmp_path: Path, run: Run
) -> None:
    base, adapter = packed_base(tmp_path / "base", name), good_adapter(tmp_path / "adapter")
    ended = run("merge", adapter, tmp_path / "out", "--base", base)
    assert ended.status == 1
    assert f"V550 {base}: 4 of 4 layers are quantized ({PACKED[name][0]})" in ended.err
    told = " ".join(ended.err.split())
    for way in WAYS_OUT:
        assert way in told
    assert not (tmp_path / "out").exists()


SUPPORTED = ("gptq", "awq", "bnb4", "pack_quantized", "torchao")


@pytest.mark.parametrize("name", [name for name in PACKED if name not in SUPPORTED])
def test_dequantize_refuses_a_method_by_name_with_the_remedies(
    name: str, tmp_path: Path, run: Run
) -> None:
    base, adapter = packed_base(tmp_path / "base", name), good_adapter(tmp_path / "adapter")
    ended = run("merge", adapter, tmp_path / "out", "--base", base, "--dequantize")
    assert ended.status == 1
    told = " ".join(ended.err.split())
    for text in ("V554", PACKED[name][0], *WAYS_OUT):
        assert text in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in PACKED if name not in ("higgs", "bitnet")])
def test_the_names_of_the_tensors_show_the_method(name: str, tmp_path: Path, run: Run) -> None:
    base = packed_base(tmp_path / "base", name, says_so=False)
    ended = run("merge", good_adapter(tmp_path / "adapter"), tmp_path / "out", "--base", base)
    assert ended.status == 1
    assert "V550" in ended.err
    found = ended.err.partition("quantized (")[2].partition(")")[0]
    assert PACKED[name][0] in found or found in ("GPTQ or AWQ", "torchao or quanto", "MLX or Metal")


def test_sizes_that_a_packed_base_hides_are_not_guessed(tmp_path: Path, run: Run) -> None:
    base = packed_base(tmp_path / "base", "gptq")
    found = info(good_adapter(tmp_path / "adapter"), base=base)
    assert found.lora_parameters is None
    assert found.base_facts.in_features is None
    bare = good_adapter(tmp_path / "bare", stripped=True)
    ended = run("embed", bare, tmp_path / "out", "--base", base)
    assert ended.status == 2
    told = " ".join(ended.err.split())
    assert "packs the adapted layers, so their sizes are not known: V554 model.layers.0" in told
    assert "GPTQ: the config names no group_size" in told
    assert "Pass the original 16-bit model with --base. Or run `vera-convert embed`" in told


def test_a_plain_layer_beside_packed_ones_needs_its_tensor(tmp_path: Path) -> None:
    base = packed_base(tmp_path / "base", "torchao")
    tensors = load_file(base / "model.safetensors")
    for part in ("_weight_qdata", "_weight_scale"):
        del tensors[f"model.layers.1.self_attn.q_proj.{part}"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    found = validate(good_adapter(tmp_path / "adapter"), base=BaseOptions(str(base)))
    assert "V520" in {finding.code for finding in found.findings}


def with_sizes(base: Path) -> Path:
    """Add the sizes of the layers to the config of a base."""
    config = json.loads((base / "config.json").read_bytes()) | LLAMA_SIZES
    (base / "config.json").write_text(json.dumps(config))
    return base


@pytest.mark.parametrize("name", PACKED)
def test_layers_whose_shapes_are_hidden_are_counted_by_the_config(
    name: str, tmp_path: Path
) -> None:
    base = with_sizes(packed_base(tmp_path / "base", name))
    found = {(each.out_features, each.in_features) for each in count(base, rank=2).groups}
    assert found == {(16, 16), (8, 16)}


def test_layers_of_unknown_shape_are_not_counted(tmp_path: Path) -> None:
    base = packed_base(tmp_path / "base", "bitnet")
    config = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "new"}))
    with pytest.raises(CheckpointError, match=r"V554 .*BitNet"):
        count(base, rank=2)


def test_a_plain_model_with_a_tensor_named_like_a_quantizer_s_is_counted(tmp_path: Path) -> None:
    filled_base(tmp_path / "base", config={"model_type": "new"})
    tensors = load_file(tmp_path / "base/model.safetensors")
    tensors["model.vq.indices"] = np.zeros((4, 4), np.int64)
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    found = count(tmp_path / "base", rank=2, targets="q_proj,v_proj").groups
    assert {(each.out_features, each.in_features) for each in found} == {(16, 16), (8, 16)}


@pytest.mark.parametrize("name", ["gptq", "torchao"])
def test_a_lora_beside_a_packed_base_has_the_sizes_of_the_config(
    name: str, tmp_path: Path, run: Run
) -> None:
    base = with_sizes(packed_base(tmp_path / "base", name))
    adapter = good_adapter(tmp_path / "adapter")
    ended = run("to-lora", adapter, tmp_path / "lora", "--base", base)
    assert ended.status == 0, ended.err
    assert verify(adapter, lora=tmp_path / "lora").passed
    config = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps(config | {"hidden_size": 8}))
    assert run("to-lora", adapter, tmp_path / "other", "--base", base).status != 0
