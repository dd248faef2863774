"""A LoRA in a real engine gives the outputs of the VeRA adapter in PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import theirwarnings
import torch
from llamacpp import completion, gguf_base, server
from trainedmodels import loaded, saved, trained

from vera_convert import CheckpointError, LoraOptions, to_lora

peft = pytest.importorskip("peft")
pytestmark = theirwarnings.OF_PEFT

IDS = [1, 5, 9, 3, 30, 12, 7, 22]
LLAMA = "LlamaForCausalLM"


def log_probabilities(base: Path, adapter: Path | None = None, name: str = LLAMA) -> Any:
    model = loaded(name, base)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return torch.log_softmax(model.eval()(torch.tensor([IDS])).logits[0].float(), -1).numpy()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write a tiny Llama, and a trained adapter of all of its linear layers."""
    folder = tmp_path_factory.mktemp("llama")
    base = saved(folder / "base", LLAMA, "float32")
    return base, trained(folder / "vera", base, LLAMA, targets="all-linear", stored=True)


def converted(adapter: Path, base: Path, out: Path, engine: Any, **options: Any) -> Path:
    to_lora(adapter, out, base=base, options=LoraOptions(engine=engine, **options))
    return out


# --- MLX-LM --------------------------------------------------------------------------------------


def by_mlx(base: Path, adapter: Path | None) -> Any:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    model, _ = utils.load_model(base)
    if adapter is not None:
        model = pytest.importorskip("mlx_lm.tuner.utils").load_adapters(model, str(adapter))
    model.eval()
    logits = model(mx.array([IDS]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


@pytest.mark.parametrize(
    "targets", ["all-linear", ["layers.1.mlp.up_proj", "q_proj"], ["lm_head", "o_proj"]], ids=str
)
def test_mlx_gives_the_outputs_of_the_adapter(
    targets: Any, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    base, _ = llama
    adapter = trained(tmp_path / "vera", base, LLAMA, targets=targets, stored=True)
    lora = converted(adapter, base, tmp_path / "lora", "mlx")
    plain, expected = by_mlx(base, None), log_probabilities(base, adapter)
    assert np.abs(plain - log_probabilities(base)).max() < 1e-5
    assert np.abs(plain - expected).max() > 0.01
    assert np.abs(by_mlx(base, lora) - expected).max() < 1e-5


# --- llama.cpp -----------------------------------------------------------------------------------


def by_llama_cpp(model: Path, adapter: Path | None) -> Any:
    """Return the log-probabilities after each token."""
    started, rows = server(model, adapter), []
    for end in range(1, len(IDS) + 1):
        answer = completion(started, prompt=IDS[:end], n_predict=1, logprobs=40)
        (found,) = answer["logprobs"]["content"]
        row = np.full(40, np.nan)
        for each in found["top_logprobs"]:
            row[each["id"]] = each["logprob"]
        rows.append(row)
    return np.stack(rows)


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head", "k_proj"]], ids=str)
def test_llama_cpp_gives_the_outputs_of_the_adapter(
    targets: Any, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    base, _ = llama
    adapter = trained(tmp_path / "vera", base, LLAMA, targets=targets, stored=True)
    lora = converted(adapter, base, tmp_path / "lora", "gguf")
    model = gguf_base(base, tmp_path / "base.gguf")
    plain, expected = by_llama_cpp(model, None), log_probabilities(base, adapter)
    assert np.abs(plain - log_probabilities(base)).max() < 1e-5
    assert np.abs(plain - expected).max() > 0.01
    assert np.abs(by_llama_cpp(model, lora / "adapter.gguf") - expected).max() < 1e-5


# --- vLLM ----------------------------------------------------------------------------------------


def deltas_of_vera(adapter: Path, base: Path) -> dict[str, Any]:
    vera = peft.PeftModel.from_pretrained(loaded(LLAMA, base), adapter)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        for name, module in vera.named_modules()
        if hasattr(module, "vera_lambda_b")
    }


def deltas_by_vllm(reader: Any, lora: Path, targets: set[str]) -> dict[str, Any]:
    helper = reader.PEFTHelper.from_local_dir(str(lora), max_position_embeddings=64)
    found = reader.LoRAModel.from_local_checkpoint(
        str(lora), targets, helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )
    layers = {name: found.get_lora(name).optimize() for name in found.loras}
    return {name: layer.lora_b @ layer.lora_a for name, layer in layers.items()}


def test_vllm_reads_the_delta_of_each_layer(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own code checks the config and reads the weights; only its kernels need a GPU."""
    config = pytest.importorskip("vllm.config.lora", exc_type=ImportError)
    reader = pytest.importorskip("vllm.lora.lora_model", exc_type=ImportError)
    monkeypatch.setattr(reader, "PIN_MEMORY", False)  # pinned memory needs a GPU
    base, adapter = llama
    lora = converted(adapter, base, tmp_path / "lora", "vllm")
    helper = reader.PEFTHelper.from_local_dir(str(lora), max_position_embeddings=64)
    helper.validate_legal(config.LoRAConfig(max_lora_rank=8))
    with pytest.raises(ValueError, match="greater than max_lora_rank"):
        helper.validate_legal(config.LoRAConfig(max_lora_rank=1))
    expected = deltas_of_vera(adapter, base)
    targets = {name.rpartition(".")[2] for name in expected}
    found = deltas_by_vllm(reader, lora, targets)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert delta.abs().max() > 0.01
        torch.testing.assert_close(found[name], delta, rtol=0, atol=1e-5)
    # The comparison finds a wrong scaling, and a layer that the engine ignores.
    fields = json.loads((lora / "adapter_config.json").read_bytes())
    fields["lora_alpha"] *= 2
    (lora / "adapter_config.json").write_text(json.dumps(fields))
    for name, delta in deltas_by_vllm(reader, lora, targets).items():
        torch.testing.assert_close(delta, 2 * expected[name], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="but received"):
        deltas_by_vllm(reader, lora, targets - {"q_proj"})


# --- Diffusers -----------------------------------------------------------------------------------

FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 4, 8],
}
UNET = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32,
    "norm_num_groups": 2,
    "attention_head_dim": 8,
}
WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}
CONTROLNET = {
    "in_channels": 4,
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}
AUTOENCODER = {"block_out_channels": (16,), "norm_num_groups": 2, "sample_size": 8}
COMPONENTS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "AutoencoderKL": (AUTOENCODER, "vae", ["to_q", "to_k", "to_out.0"]),
    "ControlNetModel": (CONTROLNET, "controlnet", ["to_q", "to_v", "ff.net.2"]),
    "FluxTransformer2DModel": (FLUX, "transformer", ["to_q", "to_v", "to_out.0", "proj_mlp"]),
    "UNet2DConditionModel": (UNET, "unet", ["to_q", "to_k", "to_v", "to_out.0"]),
    "WanTransformer3DModel": (WAN, "transformer_2", ["to_q", "to_v", "to_out.0", "ffn.net.2"]),
}


def run_component(model: Any) -> Any:
    torch.manual_seed(6)
    name = type(model).__name__
    with torch.no_grad():
        if name == "UNet2DConditionModel":
            text = torch.randn(1, 4, 32)
            return model(torch.randn(1, 4, 8, 8), 3, text, return_dict=False)[0]
        if name == "ControlNetModel":
            image = torch.randn(1, 3, 16, 16)
            inputs = torch.randn(1, 4, 8, 8), 3, torch.randn(1, 4, 32), image
            return model(*inputs, return_dict=False)[0][-1]
        if name == "AutoencoderKL":
            return model(torch.randn(1, 3, 8, 8), return_dict=False)[0]
        if name == "WanTransformer3DModel":
            text = torch.randn(1, 6, 16)
            return model(torch.randn(1, 4, 1, 8, 8), torch.tensor([3]), text, return_dict=False)[0]
        return model(
            hidden_states=torch.randn(1, 16, 4),
            encoder_hidden_states=torch.randn(1, 6, 32),
            pooled_projections=torch.randn(1, 32),
            timestep=torch.tensor([1.0]),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(6, 3),
            return_dict=False,
        )[0]


def with_vera(model: Any, targets: list[str]) -> Any:
    """Put random vectors of VeRA into a model."""
    model = peft.get_peft_model(model, peft.VeraConfig(r=8, target_modules=targets))
    for key, parameter in model.named_parameters():
        if "lambda" in key:
            parameter.data = torch.randn(parameter.shape) * 0.5
    return model.eval()


@pytest.mark.parametrize("whole", [False, True], ids=["component", "pipeline"])
@pytest.mark.parametrize("name", COMPONENTS)
def test_diffusers_gives_the_outputs_of_the_adapter(name: str, whole: bool, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    values, component, targets = COMPONENTS[name]
    torch.manual_seed(0)
    kind = getattr(diffusers, name)
    place = tmp_path / "pipeline" / component
    created = kind(**values)
    for parameter in created.parameters():
        if not parameter.any():  # a ControlNet starts with outputs of 0
            parameter.data = torch.randn(parameter.shape) * 0.1
    created.save_pretrained(place)
    if whole:
        index = {"_class_name": "DiffusionPipeline", component: ["diffusers", name]}
        (place.parent / "model_index.json").write_text(json.dumps(index))
    model = with_vera(kind.from_pretrained(place), targets)
    model.save_pretrained(tmp_path / "vera")
    expected = run_component(model.base_model.model)
    lora = converted(
        tmp_path / "vera", place.parent if whole else place, tmp_path / "lora", "diffusers"
    )
    plain = kind.from_pretrained(place).eval()
    before = run_component(plain)
    plain.load_lora_adapter(str(lora), prefix=component, use_safetensors=True)
    assert (before - expected).abs().max() > 0.01
    assert (run_component(plain) - expected).abs().max() < 1e-5
    plain.unload_lora()
    assert torch.equal(run_component(plain), before)


def stable_diffusion(out: Path) -> None:
    """Write a tiny pipeline of Stable Diffusion, which takes embeddings instead of prompts."""
    diffusers = pytest.importorskip("diffusers")
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 37, "projection_dim": 32, "vocab_size": 100}
    sizes |= {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    text = transformers.CLIPTextConfig(**sizes)
    down, up = ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2
    diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            down_block_types=down,
            up_block_types=up,
            block_out_channels=[8, 16],
            latent_channels=4,
            norm_num_groups=2,
        ),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=None,
        unet=diffusers.UNet2DConditionModel(**UNET),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(out)


def picture(pipeline: Any) -> Any:
    """Return the pixels of a picture, from 0 to 1."""
    torch.manual_seed(6)
    prompt, noise = torch.randn(1, 4, 32), torch.randn(1, 4, 8, 8)
    drawn = pipeline(
        prompt_embeds=prompt,
        negative_prompt_embeds=torch.zeros_like(prompt),
        latents=noise,
        num_inference_steps=2,
        output_type="np",
    )
    return drawn.images[0]


def test_a_pipeline_loads_fuses_and_unloads_the_adapter(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    stable_diffusion(tmp_path / "pipeline")
    missing = dict.fromkeys(("tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    kind = diffusers.StableDiffusionPipeline
    pipeline = kind.from_pretrained(tmp_path / "pipeline", **missing)
    pipeline.set_progress_bar_config(disable=True)
    before, plain = picture(pipeline), pipeline.unet
    other = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "pipeline" / "unet")
    model = with_vera(other, COMPONENTS["UNet2DConditionModel"][2])
    model.save_pretrained(tmp_path / "vera")
    pipeline.unet = model.base_model.model
    expected = picture(pipeline)
    lora = converted(tmp_path / "vera", tmp_path / "pipeline", tmp_path / "lora", "diffusers")
    pipeline.unet = plain
    pipeline.load_lora_weights(str(lora))
    assert np.abs(before - expected).max() > 0.01
    assert np.abs(picture(pipeline) - expected).max() < 1e-5
    pipeline.fuse_lora()
    assert np.abs(picture(pipeline) - expected).max() < 1e-5
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    assert np.abs(picture(pipeline) - before).max() < 1e-5


def hidden_states(text_encoder: Any) -> Any:
    """Return the last hidden states of eight tokens."""
    with torch.no_grad():
        return text_encoder.eval()(torch.tensor([IDS])).last_hidden_state


@pytest.mark.parametrize("whole", [False, True], ids=["component", "pipeline"])
def test_a_pipeline_loads_the_adapter_of_its_text_encoder(whole: bool, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    import transformers

    stable_diffusion(tmp_path / "pipeline")
    place = tmp_path / "pipeline" / "text_encoder"
    other = transformers.CLIPTextModel.from_pretrained(place)
    model = with_vera(other, ["q_proj", "v_proj", "fc1"])
    model.save_pretrained(tmp_path / "vera")
    expected = hidden_states(model.base_model.model)
    base = tmp_path / "pipeline" if whole else place
    lora = converted(tmp_path / "vera", base, tmp_path / "lora", "diffusers")
    missing = dict.fromkeys(("tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    kind = diffusers.StableDiffusionPipeline
    pipeline = kind.from_pretrained(tmp_path / "pipeline", **missing)
    before = hidden_states(pipeline.text_encoder)
    pipeline.load_lora_weights(str(lora))
    assert (before - expected).abs().max() > 0.01
    assert (hidden_states(pipeline.text_encoder) - expected).abs().max() < 1e-5
    pipeline.unload_lora_weights()
    assert torch.equal(hidden_states(pipeline.text_encoder), before)


def test_a_text_encoder_of_another_kind_loads_the_adapter_itself(tmp_path: Path) -> None:
    import transformers

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    place = tmp_path / "text_encoder_2"
    kind = transformers.T5EncoderModel
    kind(transformers.T5Config(**sizes, vocab_size=100)).save_pretrained(place)
    model = with_vera(kind.from_pretrained(place), ["q", "v", "wo"])
    model.save_pretrained(tmp_path / "vera")
    expected = hidden_states(model.base_model.model)
    with pytest.raises(CheckpointError, match=r"V705 .*text_encoder_2\.load_adapter\(LORA\)"):
        converted(tmp_path / "vera", place, tmp_path / "lora", "diffusers")
    lora = converted(tmp_path / "vera", place, tmp_path / "lora", "peft")
    plain = kind.from_pretrained(place)
    before = hidden_states(plain)
    plain.load_adapter(str(lora))
    assert (before - expected).abs().max() > 0.01
    assert (hidden_states(plain) - expected).abs().max() < 1e-5
