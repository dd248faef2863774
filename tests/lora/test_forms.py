"""The LoRA formats of Diffusers, MLX-LM and llama.cpp: names, orientation, configs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import RANK, good_adapter, good_tensors
from bases import tiny_base
from folders import bytes_by_name
from hub_server import HubServer
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vera_convert.adapter.lora_record import is_lora
from vera_convert.errors import CheckpointError
from vera_convert.hub.lookup import HubAccess
from vera_convert.lora.conversion import LoraConversion, to_lora
from vera_convert.lora.engines import EngineName
from vera_convert.lora.forms import mlx_keys
from vera_convert.lora.gguf_form import GgufModel
from vera_convert.lora.options import LoraOptions
from vera_convert.lora.plan import LoraLayer
from vera_convert.targets.linear import Linear
from vera_convert.verification.verify import verify

PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"


def vectors(module: str, outputs: int) -> dict[str, Any]:
    values = np.random.default_rng(2)
    return {
        f"{module}.vera_lambda_b": values.normal(size=outputs).astype(np.float32),
        f"{module}.vera_lambda_d": values.normal(size=RANK).astype(np.float32),
    }


def converted(adapter: Path, base: Path, out: Path, **options: Any) -> LoraConversion:
    return to_lora(adapter, out, base=base, options=LoraOptions(**options))


# --- MLX-LM --------------------------------------------------------------------------------------


def test_mlx_has_the_same_factors_transposed(tmp_path: Path) -> None:
    adapter, base = good_adapter(tmp_path / "adapter"), tiny_base(tmp_path / "base")
    converted(adapter, base, tmp_path / "peft")
    converted(adapter, base, tmp_path / "mlx", engine="mlx")
    assert {*bytes_by_name(tmp_path / "mlx")} == {
        "README.md",
        "adapter_config.json",
        "adapters.safetensors",
    }
    plain = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    found = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert len(found) == len(plain)
    for part in "AB":
        expected = plain[f"{PREFIX}{Q}.lora_{part}.weight"].T
        assert np.array_equal(found[f"{Q}.lora_{part.lower()}"], expected)
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_bytes())
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == 2
    assert config["lora_parameters"] == {
        "dropout": 0.0,
        "keys": ["self_attn.q_proj", "self_attn.v_proj"],
        "rank": RANK,
        "scale": 1.0,
    }


def test_mlx_names_single_layers_by_their_full_paths() -> None:
    modules = [f"model.layers.{n}.{name}" for n in range(3) for name in ("a.q", "b.up")]
    assert mlx_keys(modules[:1] + modules[1::2], modules) == ["b.up", "model.layers.0.a.q"]
    assert mlx_keys(modules[:1], []) == modules[:1]


def test_a_mlx_lora_can_be_replaced(tmp_path: Path) -> None:
    adapter, base = good_adapter(tmp_path / "adapter"), tiny_base(tmp_path / "base")
    converted(adapter, base, tmp_path / "mlx", engine="mlx")
    assert is_lora(tmp_path / "mlx")
    assert converted(adapter, base, tmp_path / "mlx", engine="mlx", force=True).written


@pytest.mark.parametrize("engine", ["mlx", "gguf"])
def test_gpt2_is_refused_for_engines_that_store_its_weights_transposed(
    engine: str, tmp_path: Path
) -> None:
    tensors: dict[str, Any] = dict.fromkeys(good_tensors())
    module = f"{PREFIX}transformer.h.0.attn.c_attn"
    tensors |= {n: t for n, t in good_tensors().items() if n.startswith("base_model.vera")}
    tensors |= vectors(module, 16)
    adapter = good_adapter(tmp_path / "gpt2", tensors=tensors, target_modules=["c_attn"])
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "gpt2"}')
    weights = {"transformer.h.0.attn.c_attn.weight": np.zeros((16, 16), np.float32)}
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"V71[23]|V705") as caught:
        converted(adapter, tmp_path / "base", tmp_path / "out", engine=engine)
    assert "V712" in {finding.code for finding in caught.value.findings}


def test_a_tied_head_is_refused_for_engines_without_such_a_layer(tmp_path: Path) -> None:
    tensors: dict[str, Any] = dict.fromkeys(good_tensors())
    tensors |= {n: t for n, t in good_tensors().items() if n.startswith("base_model.vera")}
    tensors["base_model.vera_B"] = np.random.default_rng(1).random((32, RANK), np.float32)
    tensors |= vectors(f"{PREFIX}lm_head", 32)
    adapter = good_adapter(tmp_path / "head", tensors=tensors, target_modules=["lm_head"])
    config = {"model_type": "llama", "tie_word_embeddings": True}
    base = tiny_base(tmp_path / "base", tensors={"lm_head.weight": None}, config=config)
    assert converted(adapter, base, tmp_path / "peft").written
    with pytest.raises(CheckpointError, match="V705 lm_head"):
        converted(adapter, base, tmp_path / "out", engine="mlx")


# --- Diffusers -----------------------------------------------------------------------------------


def component(folder: Path, kind: str | None) -> Path:
    """Write a component of a pipeline that has the layers of the good adapter."""
    tiny_base(folder, config={"_class_name": kind} if kind else {"sample_size": 8})
    (folder / "model.safetensors").rename(folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tgi", "mlx", "gguf"])
def test_a_component_of_a_pipeline_is_refused_for_servers_of_text_models(
    engine: str, tmp_path: Path
) -> None:
    adapter = good_adapter(tmp_path / "adapter", task_type=None)
    base = component(tmp_path / "unet", "UNet2DConditionModel")
    with pytest.raises(CheckpointError, match=r"V713 .*component of a pipeline, UNet2") as one:
        converted(adapter, base, tmp_path / "out", engine=engine)
    assert str(one.value).endswith("Pass --for peft or diffusers.")
    for named in ("diffusers", "peft"):
        assert converted(adapter, base, tmp_path / named, engine=named).written


@pytest.mark.parametrize(
    ("kind", "name"),
    [("FluxTransformer2DModel", "transformer"), ("UNet2DConditionModel", "unet")],
)
def test_diffusers_finds_the_layers_under_the_component(
    kind: str, name: str, tmp_path: Path
) -> None:
    adapter = good_adapter(tmp_path / "adapter", task_type=None)
    converted(adapter, component(tmp_path / "c", kind), tmp_path / "out", engine="diffusers")
    path = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    assert {*bytes_by_name(tmp_path / "out")} == {"README.md", path.name}
    assert f"{name}.{Q}.lora_A.weight" in load_file(path)
    with safe_open(path, "np") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata[f"{name}.r"] == metadata[f"{name}.lora_alpha"] == RANK
    assert metadata[f"{name}.target_modules"] == ["q_proj", "v_proj"]
    assert verify(adapter, lora=tmp_path / "out").passed


def test_the_component_has_its_name_in_the_pipeline(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter", task_type=None)
    component(tmp_path / "pipe" / "transformer_2", "WanTransformer3DModel")
    index = {"_class_name": "P", "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    for number, base in enumerate((tmp_path / "pipe", tmp_path / "pipe" / "transformer_2")):
        out = tmp_path / f"out{number}"
        done = converted(adapter, base, out, engine="diffusers")
        found = load_file(out / "pytorch_lora_weights.safetensors")
        assert all(name.startswith("transformer_2.model.layers.") for name in found)
        assert "V717" in [finding.rule.code for finding in done.findings]


def test_a_text_encoder_that_a_pipeline_does_not_adapt_is_refused(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter", task_type=None)
    base = tiny_base(tmp_path / "text_encoder", config={"model_type": "t5"})
    with pytest.raises(CheckpointError, match=r'V705 .*the type "t5".* --for peft'):
        converted(adapter, base, tmp_path / "out", engine="diffusers")
    base = tiny_base(tmp_path / "text_encoder_2", config={"model_type": "clip_text_model"})
    done = converted(adapter, base, tmp_path / "out", engine="diffusers")
    assert done.naming == "as in the adapter, under text_encoder_2"


@pytest.mark.parametrize(
    ("name", "passes"), [("HunyuanVideoPipeline", False), ("StableDiffusionXLPipeline", True)]
)
def test_the_class_of_the_pipeline_says_whether_clip_is_adapted(
    name: str, passes: bool, server: HubServer, tmp_path: Path
) -> None:
    adapter = good_adapter(tmp_path / "adapter", task_type=None)
    options = LoraOptions(engine=EngineName.DIFFUSERS)
    tiny_base(tmp_path / "pipe" / "text_encoder_2", config={"model_type": "clip_text_model"})
    index = {"_class_name": name, "text_encoder_2": ["transformers", "CLIPTextModel"]}
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    server.add("org/pipe", bytes_by_name(tmp_path / "pipe"))
    access = HubAccess(cache_dir=tmp_path / "cache", progress=False)
    folder, on_hub = tmp_path / "pipe", "hf://org/pipe@main"
    bases: tuple[Path | str, ...] = (folder, on_hub)
    bases += (folder / "text_encoder_2", f"{on_hub}/text_encoder_2")
    for number, base in enumerate(bases):
        out, lost = tmp_path / f"out{number}", r"V705 .*HunyuanVideoPipeline loads .*--for peft"
        if not passes:
            with pytest.raises(CheckpointError, match=lost):
                to_lora(adapter, out, base=base, options=options, access=access)
            continue
        done = to_lora(adapter, out, base=base, options=options, access=access)
        assert not [each for each in done.findings if each.code > "V7"]


def test_a_pipeline_without_a_loader_is_reported_before_writing(tmp_path: Path) -> None:
    """The pipeline has no load_lora_weights; the component's own method loads the LoRA."""
    adapter = good_adapter(tmp_path / "adapter", task_type=None)
    pipe = tmp_path / "pipe"
    component(pipe / "transformer", "OvisImageTransformer2DModel")
    index: dict[str, Any] = {"transformer": ["diffusers", "OvisImageTransformer2DModel"]}
    for name in ("OvisImagePipeline", "FluxPipeline", "OwnPipeline"):
        (pipe / "model_index.json").write_text(json.dumps({"_class_name": name, **index}))
        for base in (pipe, pipe / "transformer"):
            out = tmp_path / f"{name} {base.name}"
            done = converted(adapter, base, out, engine="diffusers")
            told = [each.reason for each in done.findings if each.code == "V717"]
            assert len(told) == (name == "OvisImagePipeline")
            for reason in told:
                assert reason.startswith(f"load_lora_weights is missing in the class {name}.")
                assert "pipeline.transformer.load_lora_adapter(LORA, prefix=" in reason
    tiny_base(pipe / "text_encoder", config={"model_type": "clip_text_model"})
    (pipe / "model_index.json").write_text(json.dumps({"_class_name": "OvisImagePipeline"}))
    with pytest.raises(
        CheckpointError, match=r"V705 .*load_lora_weights is missing in .*\.load_adapter\(LORA"
    ):
        converted(adapter, pipe / "text_encoder", tmp_path / "text", engine="diffusers")


def test_a_component_that_loads_no_lora_is_refused(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter", task_type=None)
    base = component(tmp_path / "transformer", "PixArtTransformer2DModel")
    lost = r"V705 .*PixArtTransformer2DModel.*PeftModel\.from_pretrained\(pipeline\.transformer"
    with pytest.raises(CheckpointError, match=lost):
        converted(adapter, base, tmp_path / "out", engine="diffusers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("folder", "kind", "attribute"),
    [
        ("prior", "PriorTransformer", "prior"),
        ("downloaded", "PriorTransformer", "prior"),
        ("downloaded", "ControlNetModel", "controlnet"),
        ("downloaded", "FluxControlNetModel", "controlnet"),
        ("downloaded", "AutoencoderKL", "vae"),
    ],
)
def test_a_component_outside_a_pipeline_is_loaded_under_its_own_name(
    folder: str, kind: str, attribute: str, tmp_path: Path
) -> None:
    adapter = good_adapter(tmp_path / "adapter", task_type=None)
    base = component(tmp_path / folder, kind)
    done = converted(adapter, base, tmp_path / "out", engine="diffusers")
    assert done.naming == f"as in the adapter, under {attribute}"
    found = [each for each in done.findings if each.code > "V7"]
    assert [each.code for each in found] == ["V717"]
    assert f'pipeline.{attribute}.load_lora_adapter(LORA, prefix="{attribute}"' in found[0].reason


@pytest.mark.parametrize("kind", ["CosmosControlNetModel", "SparseControlNetModel"])
def test_a_controlnet_without_a_loader_is_refused(kind: str, tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter", task_type=None)
    with pytest.raises(CheckpointError, match=rf"V705 .*into a {kind}\."):
        converted(adapter, component(tmp_path / "c", kind), tmp_path / "out", engine="diffusers")


def test_a_component_without_a_name_is_refused(tmp_path: Path) -> None:
    """The message names the engines that take the LoRA, and each of these does."""
    adapter = good_adapter(tmp_path / "adapter")
    config = {"model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2}
    base = tiny_base(tmp_path / "base", config=config)
    with pytest.raises(CheckpointError, match=r"V713 .*of type llama, no component") as one:
        converted(adapter, base, tmp_path / "out", engine="diffusers")
    named = re.findall(r"--for (.*) or (\w+)\.", str(one.value))[0]
    engines = [*named[0].split(", "), named[1]]
    assert engines == ["peft", "vllm", "sglang", "tgi", "mlx", "gguf"]
    for engine in engines:
        if engine == "gguf":
            pytest.importorskip("gguf")
        assert converted(adapter, base, tmp_path / engine, engine=engine).written


def test_a_kind_of_base_that_an_engine_refuses_leads_to_the_other_engines(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    base = tiny_base(tmp_path / "base", config=config)
    with pytest.raises(CheckpointError, match=r"V713 ") as one:
        converted(adapter, base, tmp_path / "out", engine="vllm")
    assert str(one.value).endswith("Pass --for peft, sglang, tgi or mlx. Or merge the adapter.")


# --- llama.cpp -----------------------------------------------------------------------------------


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    base = tiny_base(tmp_path / "base", config={"model_type": "starcoder9"})
    with pytest.raises(CheckpointError, match=r"V713 .*its model_type is starcoder9"):
        converted(adapter, base, tmp_path / "out", engine="gguf")


@pytest.mark.parametrize(("last", "heads"), [("q_proj", 4), ("k_proj", 2)])
def test_rows_of_q_and_k_are_reordered_into_rotated_pairs(last: str, heads: int) -> None:
    model = GgufModel("llama", (4, 2), {})
    layer = LoraLayer("m", f"model.layers.0.self_attn.{last}", Linear(16, 8), None, None)  # type: ignore[arg-type]
    found = model.stored_B(layer, np.arange(16)[:, None])[:, 0].reshape(heads, -1)
    half = 16 // heads // 2
    for head, rows in enumerate(found):
        first = head * 2 * half
        pairs = [(first + n, first + half + n) for n in range(half)]
        assert rows.tolist() == [row for pair in pairs for row in pair]


@pytest.mark.parametrize(("architecture", "last"), [("llama", "v_proj"), ("qwen2", "q_proj")])
def test_rows_of_other_layers_are_not_reordered(architecture: str, last: str) -> None:
    layer = LoraLayer("m", f"model.layers.0.self_attn.{last}", Linear(16, 8), None, None)  # type: ignore[arg-type]
    lora_B = np.arange(32).reshape(16, 2)
    assert np.array_equal(GgufModel(architecture, (4, 2), {}).stored_B(layer, lora_B), lora_B)
