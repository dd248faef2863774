"""Recognize quantized bases and their format, by files or config; only adapted layers matter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from vera_convert.base.match import match_modules
from vera_convert.base.model import BaseModel, BaseTensor
from vera_convert.base.quantized.recognize import Quantization, quantized_tensors
from vera_convert.base.quantized.targets import (
    quantized_elsewhere,
    quantized_targets,
    refuse_quantized,
)
from vera_convert.base.quantized.unpack import unpacked
from vera_convert.errors import CheckpointError
from vera_convert.files.header import TensorInfo
from vera_convert.hub.lookup import Location
from vera_convert.targets.linear import Linear

Q, K = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
UP = "model.layers.0.mlp.up_proj"
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


def base_of(tensors: Tensors, config: Mapping[str, object] | None = None) -> BaseModel:
    infos = {
        name: BaseTensor("model.safetensors", TensorInfo(name, dtype, shape, 0, 0))
        for name, (dtype, shape) in tensors.items()
    }
    return BaseModel(Location("base", None), {"model_type": "llama", **(config or {})}, {}, infos)


def plain(*paths: str, dtype: str = "BF16") -> Tensors:
    return {f"{path}.weight": (dtype, (8, 8)) for path in paths}


def beside(dtype: str, *siblings: str, weight: str = "weight") -> Tensors:
    """Return a weight of a dtype, and the further tensor that the quantizer writes."""
    return {f"{Q}.{weight}": (dtype, (8, 8))} | {f"{Q}.{name}": ("F32", (8,)) for name in siblings}


def text_of(base: BaseModel, names: Iterable[str]) -> str:
    return " ".join(map(str, quantized_targets(base, names)))


# --- recognized by the files ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tensors"),
    [
        ("fp8", beside("F8_E4M3", "weight_scale_inv")),
        ("fp8", beside("F8_E5M2")),
        ("fp8 or compressed-tensors", beside("F8_E4M3", "weight_scale", "input_scale")),
        ("fp8 or compressed-tensors", beside("I8", "weight_scale")),
        ("fp8 or compressed-tensors", beside("BF16", "weight_scale")),
        ("bitsandbytes 8-bit", beside("I8", "SCB", "weight_format")),
        ("bitsandbytes 4-bit", beside("U8", "weight.absmax", "weight.quant_map")),
        ("bitsandbytes 4-bit", beside("U8", "weight.quant_state.bitsandbytes__nf4")),
        ("NVFP4", beside("U8", "weight_scale_2", "weight_scale")),
        ("compressed-tensors", beside("I32", "weight_shape", weight="weight_packed")),
        ("GPTQ or AWQ", beside("I32", "qzeros", "scales", "g_idx", weight="qweight")),
        ("HQQ", beside("U8", "zero", "scale", weight="W_q")),
        ("EETQ", beside("I8", "weight_scales")),
        ("torchao or quanto", beside("I8", "weight._data", "weight._scale")),
        ("packed or integer values", beside("I16")),
    ],
)
def test_a_weight_is_recognized_by_its_dtype_or_by_further_tensors(
    kind: str, tensors: Tensors
) -> None:
    base = base_of({**plain(K, "lm_head"), **tensors})
    weight = next(iter(tensors))
    (finding,) = quantized_targets(base, [f"{K}.weight", weight])
    assert finding.code == "V550"
    assert f"1 of 2 layers are quantized ({kind})" in finding.reason
    assert f'"{weight}"' in finding.reason
    assert quantized_targets(base, [f"{K}.weight"]) == []
    with pytest.raises(CheckpointError, match="--dequantize"):
        refuse_quantized(unpacked(base), [weight])


def test_further_tensors_of_a_plain_model_are_not_taken_for_a_quantizer_s() -> None:
    names = [f"{Q}.{name}" for name in ("weight_g", "weight_v", "bias", "lora")]
    names += ["conv.parametrizations.weight.original0", "x.weight_1"]
    tensors: Tensors = dict.fromkeys(names, ("F32", (8, 8)))
    base = base_of({**plain(Q, K), **tensors})
    assert quantized_targets(base, [f"{Q}.weight", f"{K}.weight"]) == []
    assert quantized_elsewhere(base) is None
    assert quantized_tensors(base) == frozenset()


def test_each_format_is_one_finding_with_its_count() -> None:
    layers = [f"model.layers.{n}.self_attn.q_proj" for n in range(4)]
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for index, path in enumerate(layers):
        tensors[f"{path}.weight"] = ("F8_E4M3" if index else "I8", (8, 8))
        tensors[f"{path}.{'weight_scale_inv' if index else 'SCB'}"] = ("F32", (1, 1))
    findings = quantized_targets(base_of(tensors), [f"{path}.weight" for path in layers])
    assert [finding.reason.partition(",")[0] for finding in findings] == [
        "1 of 4 layers are quantized (bitsandbytes 8-bit)",
        "3 of 4 layers are quantized (fp8)",
    ]


def test_quantized_layers_that_are_not_adapted_are_a_note_with_names() -> None:
    experts = "model.layers.0.mlp.experts"
    quantized: Tensors = {
        f"{experts}.gate_up_proj_blocks": ("U8", (2, 8, 1, 16)),
        f"{experts}.gate_up_proj_scales": ("U8", (2, 8, 1)),
        f"{UP}.weight": ("F8_E4M3", (8, 8)),
        f"{UP}.weight_scale_inv": ("F32", (1, 1)),
    }
    bias: Tensors = {f"{UP}.bias": ("BF16", (8,))}
    base = base_of({**plain(Q, "lm_head"), **quantized, **bias})
    assert quantized_targets(base, [f"{Q}.weight"]) == []
    finding = quantized_elsewhere(base)
    assert finding is not None
    assert finding.code == "V551"
    assert f'MXFP4, such as "{experts}.gate_up_proj_' in finding.reason
    assert f'fp8, such as "{UP}.weight' in finding.reason
    assert quantized_tensors(base) == set(quantized)


# --- recognized by the config --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("bitsandbytes 4-bit", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("bitsandbytes 8-bit", {"load_in_4bit": False, "load_in_8bit": True}),
        ("GPTQ", {"quant_method": "gptq", "bits": 4}),
        ("AWQ", {"quant_method": "awq"}),
        ("fp8", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        ("torchao", {"quant_method": "torchao"}),
        ("HQQ", {"quant_method": "hqq"}),
        ("EETQ", {"quant_method": "eetq"}),
        ("quanto", {"quant_method": "quanto", "modules_to_not_convert": ["lm_head"]}),
        (
            "compressed-tensors",
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"targets": ["Linear"]}},
                "ignore": ["lm_head"],
            },
        ),
        ("new_method", {"quant_method": "new_method"}),
        ("of an unnamed method", {}),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_the_config_alone_is_enough(kind: str, config: Mapping[str, object], nested: bool) -> None:
    inner = {"quantization_config": config}
    base = base_of(plain(Q, "lm_head"), {"text_config": inner} if nested else inner)
    (finding,) = quantized_targets(base, [f"{Q}.weight"])
    assert f"1 of 1 layers are quantized ({kind})" in finding.reason
    assert "the config says so" in finding.reason
    assert quantized_targets(base, ["lm_head.weight"]) == []  # quantizers skip the head by default


def claimed(config: Mapping[str, object], *paths: str, **more: object) -> set[str]:
    """Return the paths that the config calls quantized; all weights are matrices in 16 bits."""
    base = base_of(plain(*paths), {"quantization_config": config, **more})
    return {path for path in paths if quantized_targets(base, [f"{path}.weight"])}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quant_method": "fp8", "modules_to_not_convert": ["self_attn"]}, {UP}),
        ({"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0"]}, set()),
        ({"quant_method": "fp8", "modules_to_not_convert": ["layers.0.self_attn.k_proj"]}, {Q, UP}),
        ({"quant_method": "fp8", "modules_to_not_convert": ["model.layers.*.self_attn"]}, {UP}),
        ({"quant_method": "fp8", "modules_to_not_convert": ["attn"]}, {Q, K, UP}),
        ({"quant_method": "fp8", "modules_to_not_convert": ["_proj"]}, set()),
        ({"quant_method": "fp8", "modules_to_not_convert": ["n.q_proj", ""]}, {K, UP}),
        ({"quant_method": "awq", "modules_to_not_convert": [r"model\.layers\.\d+\.mlp"]}, {Q, K}),
        ({"load_in_8bit": True, "llm_int8_skip_modules": ["q_proj", "k_proj"]}, {UP}),
        ({"quant_method": "modelopt", "ignore": ["*self_attn*"]}, {UP}),
        ({"quant_method": "compressed-tensors", "ignore": ["re:.*self_attn.*", "lm_head"]}, {UP}),
        ({"quant_method": "compressed-tensors", "ignore": ["re:(broken"]}, {Q, K, UP}),
        ({"quant_method": "aqlm", "linear_weights_not_to_quantize": [f"{Q}.weight"]}, {K, UP}),
        ({"quant_method": "mxfp4"}, set()),
        ({"quant_method": "gptq", "modules_in_block_to_quantize": [["mlp.up_proj"]]}, {UP}),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"targets": ["re:.*mlp.*"]}},
            },
            {UP},
        ),
        ({"quant_method": "fp8", "modules_to_not_convert": None}, {Q, K, UP}),
    ],
)
def test_lists_of_modules_are_honored(config: Mapping[str, object], expected: set[str]) -> None:
    assert claimed(config, Q, K, UP) == expected


def test_a_list_can_use_names_in_memory() -> None:
    path = f"language_model.{Q}"
    config = {"quant_method": "fp8", "modules_to_not_convert": [f"model.language_{Q}"]}
    assert claimed(config, path, model_type="llava") == set()
    assert claimed(config, path) == {path}


def test_a_head_is_quantized_if_the_config_says_so() -> None:
    assert claimed({"quant_method": "gptq", "lm_head": True}, "lm_head") == {"lm_head"}


def test_norms_and_biases_are_never_called_quantized() -> None:
    tensors: Tensors = {"model.norm.weight": ("BF16", (8,)), f"{Q}.bias": ("BF16", (8,))}
    base = base_of(tensors, {"quantization_config": {"quant_method": "fp8"}})
    assert quantized_targets(base, tensors) == []


@pytest.mark.parametrize("value", [None, "fp8", []])
def test_a_malformed_config_calls_no_layer_quantized(value: Any) -> None:
    assert text_of(base_of(plain(Q), {"quantization_config": value}), [f"{Q}.weight"]) == ""


# --- packed shapes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tensors"),
    [
        ("GPTQ or AWQ", {f"{Q}.qweight": ("I32", (1, 8)), f"{Q}.g_idx": ("I32", (8,))}),
        (
            "bitsandbytes 4-bit",
            {f"{Q}.weight": ("U8", (32, 1)), f"{Q}.weight.absmax": ("F32", (1,))},
        ),
        ("compressed-tensors", {f"{Q}.weight_packed": ("I32", (8, 1))}),
    ],
)
def test_a_packed_layer_is_refused_as_quantized_and_not_as_missing(
    kind: str, tensors: Tensors
) -> None:
    for prefix in ("", "model."):  # with the adapter's names, and with names that need a strategy
        layers = {f"{path}".removeprefix(prefix): 8 for path in (Q, K)}
        with pytest.raises(CheckpointError) as error:
            match_modules(layers, base_of({**tensors, **plain(K)}))
        assert error.value.findings[0].code == "V550"
        assert f"({kind})" in str(error.value)


def test_a_layer_whose_values_are_not_packed_matches() -> None:
    base = base_of({**beside("F8_E4M3", "weight_scale_inv"), **plain(K)})
    assert match_modules({Q: 8, K: 8}, base).layers == {Q: Linear(8, 8), K: Linear(8, 8)}
    assert not Quantization(base).is_packed(f"{Q}.weight")
