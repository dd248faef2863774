"""Packed weights dequantized here and by the quantizers' own libraries, if these are installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from packedlayers import decoded

from vera_convert.base.quantized import bitsandbytes_4bit, compressed_tensors, torchao
from vera_convert.draws.generator import Rounding, rounded

torch = pytest.importorskip("torch")


def array(tensor: Any) -> NDArray[Any]:
    """A tensor's values, those of bfloat16 by way of their bits."""
    from vera_convert.with_torch.arrays import to_array

    return to_array(tensor.contiguous())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(16, 128), (33, 65), (64, 100)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_bitsandbytes_4bit(kind: str, shape: tuple[int, int], nested: bool, dtype: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=getattr(torch, dtype))
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type=kind, compress_statistics=nested
    )
    arrays = {
        "weight": array(packed),
        **{f"weight.{name}": array(part) for name, part in state.as_dict(packed=True).items()},
    }
    # The library's fast path for AVX-512 is wrong for some shapes, its table in float32 is right.
    codes = np.stack([arrays["weight"] >> 4, arrays["weight"] & 15], -1).reshape(-1)
    absmax = state.absmax
    if nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    every = np.repeat(array(absmax.float()), 64)[: weight.numel()]
    wanted = torch.from_numpy(array(state.code)[codes[: weight.numel()]] * every)
    wanted = wanted.to(weight.dtype).reshape(shape)
    found = decoded(bitsandbytes_4bit.weights, arrays)
    np.testing.assert_array_equal(found.astype(np.float64), array(wanted).astype(np.float64))
    if shape[1] % 64 == 0:
        theirs = array(functional.dequantize_4bit(packed, state))
        np.testing.assert_array_equal(found.astype(np.float64), theirs.astype(np.float64))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [32, None])
def test_compressed_tensors_pack_quantized(bits: int, symmetric: bool, size: int | None) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    torch.manual_seed(0)
    settings = {
        "num_bits": bits,
        "type": "int",
        "strategy": "channel" if size is None else "group",
        "group_size": size,
        "symmetric": symmetric,
    }
    scheme = quantization.QuantizationArgs(**settings)
    half = 1 << (bits - 1)
    q = torch.randint(-half, half, (24, 96), dtype=torch.int8)
    scale = torch.rand(24, 96 // (size or 96)).to(torch.bfloat16) + 0.01
    zero = torch.randint(-half, half, scale.shape, dtype=torch.int8)
    if symmetric:
        zero = torch.zeros_like(zero)
    wanted = forward.dequantize(q, scale, zero, scheme)
    arrays = {
        "weight_packed": array(helpers.pack_to_int32(q, bits)),
        "weight_shape": np.array(q.shape),
        "weight_scale": array(scale),
    }
    if not symmetric:
        arrays["weight_zero_point"] = array(helpers.pack_to_int32(zero, bits, packed_dim=0))
    config = {
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": settings}},
    }
    found = decoded(compressed_tensors.weights, arrays, config)
    np.testing.assert_array_equal(found.astype(np.float64), array(wanted).astype(np.float64))


@pytest.mark.parametrize("kind", ["int8", "int4", "int2", "float8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_torchao(kind: str, dtype: str) -> None:
    ao = pytest.importorskip("torchao.quantization")
    files = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    configs = {
        "int8": lambda: ao.Int8WeightOnlyConfig(version=2),
        "int4": lambda: ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(32), version=2),
        "int2": lambda: ao.IntxWeightOnlyConfig(torch.int2, ao.PerAxis(0), version=2),
        "float8": lambda: ao.Float8WeightOnlyConfig(version=2),
    }
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 24, bias=False, dtype=getattr(torch, dtype)))
    ao.quantize_(model, configs[kind]())
    tensors, said = files.flatten_tensor_state_dict(model.state_dict())
    arrays = {name.partition(".")[2]: array(tensor) for name, tensor in tensors.items()}
    found = decoded(torchao.weights, arrays, metadata=said["0.weight"])
    wanted = array(model[0].weight.dequantize())
    np.testing.assert_array_equal(found.astype(np.float64), wanted.astype(np.float64))


def test_the_cast_to_fp8_is_that_of_torch() -> None:
    values = torch.empty(100_000).uniform_(-0.6, 0.6, generator=torch.Generator().manual_seed(0))
    values = torch.cat([values, values * 2**-9, values * 2**-12])
    wanted = values.to(torch.float8_e4m3fn).to(torch.float32)
    assert array(wanted).tobytes() == rounded(array(values), Rounding.FP8).tobytes()
