"""The rules of each engine: a layer that the engine would drop is refused before any write."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import HIDDEN, RANK, good_adapter, good_tensors
from bases import TENSORS, tiny_base
from commandline import Run

from vera_convert.errors import CheckpointError
from vera_convert.lora.conversion import LoraConversion, to_lora
from vera_convert.lora.engines import EngineName
from vera_convert.lora.options import LoraOptions

DENSE = [f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
EXPERTS = [
    f"model.layers.1.mlp.experts.{number}.{name}"
    for number in range(2)
    for name in ("gate_proj", "up_proj", "down_proj")
]
SHARED = [
    f"model.layers.1.mlp.shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")
]
TOWER = [f"vision_tower.encoder.layers.{n}.self_attn.q_proj" for n in range(2)]
ATTENTION = [
    f"model.layers.{n}.self_attn.{name}" for n in range(2) for name in ("q_proj", "v_proj")
]
MODULES = [*ATTENTION, *DENSE, *EXPERTS, *SHARED, *TOWER]


def convert(
    adapted: list[str],
    folder: Path,
    *,
    modules: list[str] = MODULES,
    model_type: str = "some_moe",
    **options: Any,
) -> LoraConversion:
    """Convert an adapter of these modules of a model with a dense layer, experts and a tower."""
    tensors: dict[str, Any] = dict.fromkeys(good_tensors())
    tensors |= {name: t for name, t in good_tensors().items() if name.startswith("base_model.vera")}
    for module in adapted:
        tensors[f"base_model.model.{module}.vera_lambda_b"] = np.ones(HIDDEN, np.float32)
        tensors[f"base_model.model.{module}.vera_lambda_d"] = np.ones(RANK, np.float32)
    adapter = good_adapter(folder / "adapter", tensors=tensors, target_modules=sorted(adapted))
    shapes: dict[str, Any] = dict.fromkeys(TENSORS)
    shapes |= {f"{module}.weight": (HIDDEN, HIDDEN) for module in (*modules, *adapted)}
    base = tiny_base(folder / "base", tensors=shapes, config={"model_type": model_type})
    return to_lora(adapter, folder / "out", base=base, options=LoraOptions(**options))


def refused(
    adapted: list[str], folder: Path, match: str, *, layers: int = 1, **options: Any
) -> None:
    """Check that the conversion is refused, with one error for each of this number of layers."""
    with pytest.raises(CheckpointError, match=match) as caught:
        convert(adapted, folder, **options)
    first = caught.value.findings[0]
    alike = [each for each in caught.value.findings if each.reason == first.reason]
    assert len({each.place for each in alike}) == len(alike) == layers
    assert not (folder / "out").exists()


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_routed_experts_are_adapted_completely_or_filled_with_zeros(
    engine: str, tmp_path: Path
) -> None:
    assert convert(EXPERTS, tmp_path / "all", engine=engine).written
    part = EXPERTS[:2]
    lost = r"V704 model\.layers\.1\.mlp\.experts\.0\.down_proj: .* --fill-layers"
    refused(part, tmp_path / "some", lost, layers=4, engine=engine)
    done = convert(part, tmp_path / "filled", engine=engine, fill_layers=True)
    assert {layer.module for layer in done.plan.layers} == {*EXPERTS}
    assert done.plan.filled == 4


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_shared_experts_and_dense_layers_of_a_moe_are_converted(
    engine: str, tmp_path: Path
) -> None:
    assert convert([*SHARED, *DENSE], tmp_path, engine=engine).written


@pytest.mark.parametrize("engine", ["tgi", "mlx"])
def test_single_routed_experts_are_refused(engine: str, tmp_path: Path) -> None:
    refused(EXPERTS, tmp_path, r"V705 .*experts", layers=6, engine=engine)


def test_tgi_drops_a_kind_that_a_layer_of_the_base_lacks(tmp_path: Path) -> None:
    refused(DENSE, tmp_path / "dense", r"V705 .*layers\.0\.mlp", layers=3, engine="tgi")
    assert convert(ATTENTION, tmp_path / "attention", engine="tgi").written


@pytest.mark.parametrize("engine", ["sglang", "tgi", "mlx"])
def test_a_layer_of_a_vision_tower_is_refused(engine: str, tmp_path: Path) -> None:
    refused(TOWER, tmp_path, r"V705 vision_tower\.encoder\.layers\.0", layers=2, engine=engine)


def test_vllm_loads_a_vision_tower_only_on_request(tmp_path: Path) -> None:
    done = convert([*TOWER, *ATTENTION], tmp_path / "tower", engine="vllm")
    found = [(each.code, each.place) for each in done.findings if each.code > "V7"]
    assert found == [("V716", name) for name in TOWER]
    assert done.server_arguments.startswith("--enable-tower-connector-lora --enable-lora ")
    done = convert(ATTENTION, tmp_path / "text", engine="vllm")
    assert not [finding for finding in done.findings if finding.code > "V7"]
    assert "--enable-tower" not in done.server_arguments


@pytest.mark.parametrize(("name", "fits"), [("GPT2LMHeadModel", False), ("LlamaModel", True)])
def test_vllm_takes_no_lora_for_some_model_types(name: str, fits: bool, tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    base = tiny_base(tmp_path / "base", config={"architectures": [name, "BloomForCausalLM"]})
    options = LoraOptions(engine=EngineName.VLLM)
    if fits:
        assert to_lora(adapter, tmp_path / "out", base=base, options=options).written
        return
    with pytest.raises(CheckpointError, match=r"V713 .*vLLM takes no LoRA of a GPT2LMHeadModel"):
        to_lora(adapter, tmp_path / "out", base=base, options=options)
    assert not (tmp_path / "out").exists()
    assert to_lora(adapter, tmp_path / "out", base=base).written


def test_sglang_keeps_one_lora_for_each_name_in_a_layer(tmp_path: Path) -> None:
    twice = [SHARED[2], "model.layers.1.self_attn.down_proj"]
    refused(twice, tmp_path / "twice", r"V705 .*same name", engine="sglang")
    assert convert(twice, tmp_path / "vllm", engine="vllm").written


# --- attention with a compressed cache of keys and values ---

LATENT = [
    f"model.layers.0.self_attn.{name}" for name in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj")
]


def test_sglang_refuses_q_in_a_model_without_v(tmp_path: Path) -> None:
    refused(
        LATENT[:1], tmp_path / "q", r"V705 .*q_proj.*no v_proj", engine="sglang", modules=LATENT
    )
    assert convert(LATENT[1:], tmp_path / "kv", engine="sglang", modules=LATENT).written
    assert convert(LATENT, tmp_path / "vllm", engine="vllm", modules=LATENT).written


def test_mlx_splits_the_module_of_keys_and_values_in_most_models(tmp_path: Path) -> None:
    lost = r'V705 .*kv_b_proj: in a model of type "deepseek_v3" MLX-LM has several'
    v3: dict[str, Any] = {"engine": "mlx", "modules": LATENT, "model_type": "deepseek_v3"}
    refused(LATENT, tmp_path / "all", lost, **v3)
    assert convert(LATENT[:2], tmp_path / "rest", **v3).written
    assert convert(LATENT, tmp_path / "v2", **{**v3, "model_type": "deepseek_v2"}).written


def test_the_other_errors_of_an_engine_are_in_the_json_and_not_in_validate(
    run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    with pytest.raises(CheckpointError):
        convert(TOWER + DENSE[:1], folder, engine="tgi")
    words = ["to-lora", folder / "adapter", tmp_path / "out", "--base", folder / "base"]
    ended = run(*words, "--for", "tgi", "--json")
    assert re.search(r"V7\d\d .*\(and \d+ more: --json lists all\)$", ended.err, re.MULTILINE)
    assert len(ended.document["findings"]) > 1


def test_warnings_that_differ_only_in_the_layer_are_one_line(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    convert(TOWER, folder, engine="vllm")
    words = ["to-lora", folder / "adapter", tmp_path / "out", "--base", folder / "base"]
    ended = run(*words, "--for", "vllm")
    assert ended.err.count("V716") == ended.err.count(f"V716 {TOWER[0]} and 1 more: ") == 1
