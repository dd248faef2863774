"""Layers that PEFT loads for VeRA but not for LoRA are refused before any write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapters import good_adapter, good_tensors
from bases import TENSORS, tiny_base

from vera_convert.errors import CheckpointError
from vera_convert.lora.checks import lost_to_experts, refused_in_mamba
from vera_convert.lora.conversion import to_lora
from vera_convert.lora.engines import EngineName
from vera_convert.lora.options import LoraOptions

EXPERTS = [
    f"model.layers.0.mlp.experts.{n}.{name}"
    for n in range(2)
    for name in ("gate_proj", "up_proj", "down_proj")
]


def pair_with(folder: Path, name: str, model_type: str) -> tuple[Path, Path]:
    """Write an adapter and a base in which q_proj has another name."""

    def renamed(key: str) -> str:
        return key.replace("self_attn.q_proj", name)

    tensors: dict[str, Any] = dict.fromkeys(good_tensors())
    tensors |= {renamed(key): tensor for key, tensor in good_tensors().items()}
    shapes: dict[str, Any] = dict.fromkeys(TENSORS)
    shapes |= {renamed(key): shape for key, shape in TENSORS.items()}
    last = name.rpartition(".")[2]
    adapter = good_adapter(
        folder / "adapter", tensors=tensors, target_modules=[last, "v_proj", "up_proj"]
    )
    base = tiny_base(folder / "base", tensors=shapes, config={"model_type": model_type})
    return adapter, base


@pytest.mark.parametrize(
    ("name", "model_type", "code"),
    [
        ("shared_experts.down_proj", "afmoe", "V714"),
        ("shared_experts.w2", "mixtral", "V714"),
        ("mixer.out_proj", "falcon_mamba", "V715"),
        ("mlp.shared_experts.gate_proj", "mistral_large4", "V718"),
    ],
)
def test_a_layer_that_peft_does_not_load_is_refused_only_for_peft(
    name: str, model_type: str, code: str, tmp_path: Path
) -> None:
    adapter, base = pair_with(tmp_path, name, model_type)
    with pytest.raises(CheckpointError, match=rf"{code} model\.layers\.0\..*{model_type}.*--for"):
        to_lora(adapter, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
    options = LoraOptions(engine=EngineName.VLLM)
    assert to_lora(adapter, tmp_path / "out", base=base, options=options).written


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("shared_expert.down_proj", "qwen2_moe"),  # PEFT's table has no row for this type itself
        ("router.gate", "mixtral"),
        ("mixer.in_proj", "falcon_mamba"),
        ("self_attn.out_proj", "llama"),
        ("mlp.shared_experts.gate_proj", "llama"),
    ],
)
def test_a_layer_that_peft_loads_is_written(name: str, model_type: str, tmp_path: Path) -> None:
    adapter, base = pair_with(tmp_path, name, model_type)
    assert to_lora(adapter, tmp_path / "out", base=base).written


@pytest.mark.parametrize(
    ("adapted", "lost"),
    [
        (EXPERTS, []),
        ([each for each in EXPERTS if "down" in each], []),
        ([each for each in EXPERTS if "down" not in each], EXPERTS[:2] + EXPERTS[3:5]),
        (EXPERTS[:3], EXPERTS[:3]),
        ([*EXPERTS, "model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
    ],
    ids=["all", "down alone", "no down", "one expert", "a dense layer"],
)
def test_experts_load_if_peft_can_fuse_them(adapted: list[str], lost: list[str]) -> None:
    modules = [*EXPERTS, "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]
    assert lost_to_experts(adapted, modules, "qwen3_moe") == lost
    assert lost_to_experts(adapted, modules, "qwen2_moe") == []


def test_peft_refuses_the_names_of_layers_of_mamba_models() -> None:
    modules = ["backbone.layers.0.mixer.out_proj", "backbone.layers.0.mixer.x_proj"]
    assert refused_in_mamba(modules, "mamba2") == modules[:1]
    assert refused_in_mamba(modules, "jamba") == []


def test_the_tables_agree_with_the_installed_peft() -> None:
    conversion = pytest.importorskip(
        "peft.utils.transformers_weight_conversion", exc_type=ImportError
    )
    for pattern, last in (("mixtral", "w2"), ("qwen2_moe", "down_proj")):
        for kind, known in conversion._MODEL_TO_CONVERSION_PATTERN.items():
            if known == pattern and kind.islower():  # the other keys are names of classes
                assert lost_to_experts([f"mlp.{last}"], [], kind), kind
