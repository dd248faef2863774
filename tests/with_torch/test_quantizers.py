"""Compare packed weights dequantized here and by the quantizers' own libraries.

`make test-quantizers` installs the libraries and requires each library.
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from packedlayers import decoded
from releases import needs
from torchmodels import built

from vera_convert.base.model import BaseModel
from vera_convert.base.quantized import (
    awq,
    bitsandbytes_4bit,
    bitsandbytes_8bit,
    compressed_tensors,
    gptq,
    torchao,
)
from vera_convert.base.quantized.layer_settings import settings_by_layer
from vera_convert.base.quantized.recognize import plain_by_config
from vera_convert.draws.generator import Rounding, rounded
from vera_convert.hub.lookup import Location

torch = pytest.importorskip("torch")

BASE = BaseModel(Location("base", None), {"model_type": "llama"}, {}, {})


def library(name: str) -> Any:
    """Import a module of a quantizer's library, or skip the test if the library is missing."""
    if "REQUIRE_QUANTIZERS" in os.environ:
        return import_module(name)
    return pytest.importorskip(name)


def autoawqs_packing() -> Any:
    """Return AutoAWQ's functions for packed weights; the complete package needs an old
    transformers.
    """
    package = find_spec("awq")
    if package is None and "REQUIRE_QUANTIZERS" not in os.environ:
        pytest.skip("autoawq is not installed")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).with_name("utils") / "packing_utils.py"
    spec = spec_from_file_location("autoawqs_packing", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def array(tensor: Any) -> NDArray[Any]:
    """Return a tensor's values; bfloat16 is converted by its bits."""
    from vera_convert.with_torch.arrays import to_array

    return to_array(tensor.contiguous())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(16, 128), (33, 65), (64, 100)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_bitsandbytes_4bit_equals_the_library(
    kind: str, shape: tuple[int, int], nested: bool, dtype: str
) -> None:
    functional = library("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=getattr(torch, dtype))
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type=kind, compress_statistics=nested
    )
    arrays = {
        "weight": array(packed),
        **{f"weight.{name}": array(part) for name, part in state.as_dict(packed=True).items()},
    }
    # The library's fast path for AVX-512 is wrong for some shapes; its float32 table is right.
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


@pytest.mark.parametrize("block", [32, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_4bit_in_blocks_of_any_size(block: int, nested: bool) -> None:
    functional = library("bitsandbytes.functional")
    weight = torch.randn((5, 4096), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    packed, state = functional.quantize_4bit(
        weight, blocksize=block, quant_type="nf4", compress_statistics=nested
    )
    arrays = {
        "weight": array(packed),
        **{f"weight.{name}": array(part) for name, part in state.as_dict(packed=True).items()},
    }
    found = decoded(bitsandbytes_4bit.weights, arrays)
    wanted = array(functional.dequantize_4bit(packed, state))
    np.testing.assert_array_equal(found.astype(np.float64), wanted.astype(np.float64))


def test_bitsandbytes_8bit_equals_the_library() -> None:
    functional = library("bitsandbytes.functional")
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-128, 128, (24, 97), dtype=torch.int8, generator=generator)
    largest = torch.rand(24, generator=generator) * 10.0 ** torch.arange(-12, 12)
    found = decoded(bitsandbytes_8bit.weights, {"weight": array(q), "SCB": array(largest)})
    wanted = functional.int8_vectorwise_dequant(q, largest)
    np.testing.assert_array_equal(found, array(wanted))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [32, None])
def test_compressed_tensors_pack_quantized(bits: int, symmetric: bool, size: int | None) -> None:
    helpers = library("compressed_tensors.compressors")
    quantization = library("compressed_tensors.quantization")
    forward = library("compressed_tensors.quantization.lifecycle.forward")
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


@pytest.mark.parametrize(("strategy", "grid"), [("tensor", (1,)), ("channel", (24, 1))])
@pytest.mark.parametrize(("kind", "symmetric"), [("float", True), ("int", True), ("int", False)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_compressed_tensors_with_one_byte_for_each_value(
    strategy: str, grid: tuple[int, ...], kind: str, symmetric: bool, dtype: str
) -> None:
    quantization = library("compressed_tensors.quantization")
    forward = library("compressed_tensors.quantization.lifecycle.forward")
    settings = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": symmetric}
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-128, 128, (24, 96), dtype=torch.int8, generator=generator)
    if kind == "float":
        q = (torch.randn((24, 96), generator=generator) * 9).to(torch.float8_e4m3fn)
    scale = torch.rand(grid, generator=generator).to(getattr(torch, dtype)) + 0.01
    zero = torch.randint(-128, 128, grid, dtype=torch.int8, generator=generator)
    scheme = quantization.QuantizationArgs(**settings)
    wanted = forward.dequantize(q, scale, None if symmetric else zero, scheme)
    arrays = {"weight": array(q), "weight_scale": array(scale)}
    if not symmetric:
        arrays["weight_zero_point"] = array(zero)
    layout = "naive-quantized" if kind == "float" else "int-quantized"
    config = {
        "format": layout,
        "config_groups": {"a": {"targets": ["Linear"], "weights": settings}},
    }
    model = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    found = decoded(compressed_tensors.weights, arrays, config, dtype=model)
    np.testing.assert_array_equal(found.astype(np.float64), array(wanted).astype(np.float64))


def test_compressed_tensors_nvfp4() -> None:
    compressors = library("compressed_tensors.compressors")
    quantization = library("compressed_tensors.quantization")
    settings = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand((24, 6), generator=generator) * 400 + 1
    parts = {
        "weight_packed": torch.randint(0, 256, (24, 48), dtype=torch.uint8, generator=generator),
        "weight_scale": scale.to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([731.5]),
    }
    arrays = {name: array(part) for name, part in parts.items()}
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**settings)
    )
    wanted = compressors.NVFP4PackedCompressor.decompress(parts, scheme)["weight"]
    groups = {"a": {"targets": ["Linear"], "weights": settings}}
    config = {"format": "nvfp4-pack-quantized", "config_groups": groups}
    found = decoded(compressed_tensors.weights, arrays, config)
    np.testing.assert_array_equal(found.astype(np.float64), array(wanted).astype(np.float64))


@pytest.mark.parametrize(
    "targets",
    [
        (["Linear"], ["re:.*q_proj$"], ["model.layers.0.self_attn.q_proj"]),
        (["model.layers.0.self_attn.q_proj"], ["re:.*proj"], ["re:.*q_proj"], ["Linear"]),
        (["Embedding", "re:.*up_proj"], ["Linear"], ["q_proj"]),
        (["re:layers"], ["re:model.layers.1"], ["re:.*", "LlamaAttention"]),
        (["Linear"], ["re:lm_head"], ["Linear"]),
    ],
)
def test_the_groups_of_compressed_tensors_equal_the_library_s(
    targets: tuple[list[str], ...],
) -> None:
    quantization = library("compressed_tensors.quantization")
    # The number of bits shows the group that the library chose for a layer.
    groups = {
        f"{bits}": {"targets": names, "weights": {"num_bits": bits, "strategy": "channel"}}
        for bits, names in enumerate(targets, 2)
    }
    model = built("llama")
    config = quantization.QuantizationConfig(config_groups=groups, format="pack-quantized")
    quantization.apply_quantization_config(model, config, show_progress=False)
    theirs = {
        name: str(module.quantization_scheme.weights.num_bits)
        for name, module in model.named_modules()
        if hasattr(module, "quantization_scheme")
    }
    assert len(theirs) >= 7
    ours = settings_by_layer(BASE, {"config_groups": groups}, [*theirs])
    for name, settings in ours.items():
        found = settings["config_groups"]
        assert isinstance(found, dict)
        if any("Embedding" in group["targets"] for group in found.values()):
            # the shapes show the class, which a file does not name
            assert theirs[name] in found, name
        else:
            assert [*found] == [theirs[name]], name


@pytest.mark.parametrize(
    "rules",
    [
        {"-:.*q_proj": {}, ".*": {"bits": 8}},
        {"+:.*q_proj": {"bits": 8, "group_size": 64, "mse": 2.0}, "-:.*": {}},
        {
            r"^model\.layers\.0\.mlp\.up_proj$": {"bits": 2},
            r".*\.layers\.0\..*": {"desc_act": True},
        },
        {r"-:^lm_head$": {}, r".*up_proj": {"sym": False}, r"^model\.layers\.0\.mlp\.up_proj$": {}},
        {"layers": {"bits": 8}, "+:model.layers.1": {"bits": 3}, "-:model.layers.10": {}},
    ],
)
def test_the_rules_of_gptqmodel_equal_the_library_s(rules: dict[str, dict[str, object]]) -> None:
    theirs = library("gptqmodel.quantization.config").dynamic_get
    names = [
        f"model.layers.{layer}.{name}"
        for layer in (0, 1, 10)
        for name in ("self_attn.q_proj", "mlp.up_proj")
    ]
    settings = {"bits": 4, "group_size": 128, "desc_act": False, "dynamic": rules}
    ours = settings_by_layer(BASE, settings, [*names, "lm_head"])
    for name, found in ours.items():
        rule = theirs(rules, name)
        assert ("dynamic" in found) == (rule is False), name
        for key in ("bits", "group_size", "desc_act", "sym") if rule is not False else ():
            assert found.get(key) == theirs(rules, name, key, settings.get(key)), name


@needs("transformers", "5.20", "lists of plain layers are read in another way")
@pytest.mark.parametrize(
    "listed",
    [
        ["q_proj", "model.layers.1", "lm"],
        ["layers.1", "model.layers.1.mlp.up", "_proj"],
        [r"model\.layers\.\d+\.mlp", "model.layers.*q_proj", "head"],
        ["model.layers.1.", "self_attn", "model.layers.10|model.layers.0"],
        [],
    ],
)
def test_the_lists_of_plain_layers_equal_transformers(listed: list[str]) -> None:
    quantizers = import_module("transformers.quantizers.quantizers_utils")
    ends = ("self_attn.q_proj", "mlp.up_proj")
    paths = [f"model.layers.{layer}.{end}" for layer in (0, 1, 10) for end in ends] + ["lm_head"]
    section = {"quant_method": "awq", "modules_to_not_convert": listed}
    base = replace(BASE, config={**BASE.config, "quantization_config": section})
    plain = {path for path in paths if not quantizers.should_convert_module(path, listed)}
    assert {*plain_by_config(base, paths)} == plain


@pytest.mark.parametrize("kind", ["int8", "int4", "int2", "float8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_torchao(kind: str, dtype: str) -> None:
    ao = library("torchao.quantization")
    files = library("torchao.prototype.safetensors.safetensors_support")
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


def test_the_cast_to_fp8_equals_torch_s() -> None:
    values = torch.empty(100_000).uniform_(-0.6, 0.6, generator=torch.Generator().manual_seed(0))
    values = torch.cat([values, values * 2**-9, values * 2**-12])
    wanted = values.to(torch.float8_e4m3fn).to(torch.float32)
    assert array(wanted).tobytes() == rounded(array(values), Rounding.FP8).tobytes()


def words(values: NDArray[np.generic]) -> NDArray[np.int32]:
    """Return random 32-bit words in the shape of `values`."""
    generator = np.random.default_rng(values.size)
    return generator.integers(-(2**31), 2**31, values.shape).astype(np.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("order", ["in turn", "by activation"])
@pytest.mark.parametrize("group", [32, -1])
def test_gptq(bits: int, version: str, order: str, group: int) -> None:
    kernel = library("gptqmodel.nn_modules.qlinear.torch")
    models = library("gptqmodel.utils.model")
    inputs, outputs = 96, 64
    groups = 1 if group == -1 else inputs // group
    values = np.random.default_rng(bits)
    of_inputs = np.arange(inputs) * groups // inputs
    arrays: dict[str, NDArray[Any]] = {
        "qweight": words(np.empty((inputs * bits // 32, outputs))),
        "qzeros": words(np.empty((groups, outputs * bits // 32))),
        "scales": values.uniform(0.001, 0.1, (groups, outputs)).astype(np.float16),
        "g_idx": (values.permutation(of_inputs) if order != "in turn" else of_inputs).astype("i4"),
    }
    layer = kernel.TorchLinear(bits, group, True, order != "in turn", inputs, outputs)
    for name, values_of_part in arrays.items():
        getattr(layer, name).data = torch.from_numpy(values_of_part.copy())
    if version == "gptq":
        models.convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    wanted = layer.train().dequantize_weight()  # (in, out)
    settings = {"bits": bits, "group_size": group, "checkpoint_format": version}
    found = decoded(gptq.weights, arrays, settings)
    np.testing.assert_array_equal(found, array(wanted.T))


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("their_name", ["gptqmodel", "autoawq"])
def test_awq(their_name: str, size: int, dtype: str) -> None:
    inputs, outputs = 96, 40
    groups = inputs // size
    scales = torch.empty(groups, outputs).uniform_(0.001, 0.1).to(getattr(torch, dtype))
    arrays = {
        "qweight": words(np.empty((inputs, outputs // 8))),
        "qzeros": words(np.empty((groups, outputs // 8))),
        "scales": array(scales),
    }
    qweight, qzeros = (torch.from_numpy(arrays[name].copy()) for name in ("qweight", "qzeros"))
    if their_name == "autoawq":
        unpack = autoawqs_packing().dequantize_gemm
        wanted = unpack(qweight, qzeros, scales.to(torch.float16), 4, size)
    else:
        kernel = library("gptqmodel.nn_modules.qlinear.torch_awq")
        layer = kernel.AwqTorchLinear(4, size, False, False, inputs, outputs, register_buffers=True)
        layer.load_state_dict({"qweight": qweight, "qzeros": qzeros, "scales": scales})
        layer.post_init()
        wanted = layer._dequantize_weight_for_inference(torch.empty(1), dtype=torch.float16)
    found = decoded(awq.weights, arrays, {"group_size": size, "version": "gemm"})
    np.testing.assert_array_equal(found, array(wanted.T))
