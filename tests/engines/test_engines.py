"""LoRAs in real engines: the outputs are those of the VeRA adapter in PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import theirwarnings
import torch
from safetensors.numpy import load_file
from trainedmodels import loaded, saved, trained

from vera_convert import LoraOptions, to_lora

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
    """A tiny Llama and a trained adapter of all of its linear layers."""
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


@pytest.mark.parametrize("targets", ["all-linear", ["layers.1.mlp.up_proj", "q_proj"]], ids=str)
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


def gguf_base(base: Path, out: Path) -> Path:
    """Write a tiny Llama as GGUF, as llama.cpp's converter does."""
    gguf = pytest.importorskip("gguf")
    config = json.loads((base / "config.json").read_bytes())
    heads, pairs = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(pairs)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_parameters", config).get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    words = [f"<{n}>".encode() for n in range(config["vocab_size"])]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([1] * len(words))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(base / "model.safetensors").items():
        rows = {"q_proj.weight": heads, "k_proj.weight": pairs}
        count = next((number for end, number in rows.items() if name.endswith(end)), 0)
        if count:
            halves = tensor.reshape(count, 2, -1, tensor.shape[1])
            tensor = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))  # noqa: PLW2901
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def by_llama_cpp(model: Path, adapter: Path | None) -> Any:
    """The log-probabilities after each token."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = 2
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    rows = []
    for end in range(1, len(IDS) + 1):
        answer = server.handle_completions(
            {"prompt": IDS[:end], "n_predict": 1, "logprobs": 40, "cache_prompt": False}
        )
        answer = json.loads(answer) if isinstance(answer, str) else answer
        (found,) = answer["choices"][0]["logprobs"]["content"]
        row = np.full(40, np.nan)
        for each in found["top_logprobs"]:
            row[each["id"]] = each["logprob"]
        rows.append(row)
    return np.stack(rows)


def test_llama_cpp_gives_the_outputs_of_the_adapter(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = llama
    lora = converted(adapter, base, tmp_path / "lora", "gguf")
    model = gguf_base(base, tmp_path / "base.gguf")
    plain, expected = by_llama_cpp(model, None), log_probabilities(base, adapter)
    assert np.abs(plain - log_probabilities(base)).max() < 1e-5
    assert np.abs(plain - expected).max() > 0.01
    assert np.abs(by_llama_cpp(model, lora / "adapter.gguf") - expected).max() < 1e-5


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
COMPONENTS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "FluxTransformer2DModel": (FLUX, "transformer", ["to_q", "to_v", "to_out.0", "proj_mlp"]),
    "UNet2DConditionModel": (UNET, "unet", ["to_q", "to_k", "to_v", "to_out.0"]),
    "WanTransformer3DModel": (WAN, "transformer", ["to_q", "to_v", "to_out.0", "ffn.net.2"]),
}


def run_component(model: Any) -> Any:
    torch.manual_seed(6)
    name = type(model).__name__
    with torch.no_grad():
        if name == "UNet2DConditionModel":
            text = torch.randn(1, 4, 32)
            return model(torch.randn(1, 4, 8, 8), 3, text, return_dict=False)[0]
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


@pytest.mark.parametrize("whole", [False, True], ids=["component", "pipeline"])
@pytest.mark.parametrize("name", COMPONENTS)
def test_diffusers_gives_the_outputs_of_the_adapter(name: str, whole: bool, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    values, component, targets = COMPONENTS[name]
    torch.manual_seed(0)
    kind = getattr(diffusers, name)
    place = tmp_path / "pipeline" / component
    kind(**values).save_pretrained(place)
    if whole:
        index = {"_class_name": "DiffusionPipeline", component: ["diffusers", name]}
        (place.parent / "model_index.json").write_text(json.dumps(index))
    config = peft.VeraConfig(r=8, target_modules=targets, projection_prng_key=3)
    model = peft.get_peft_model(kind.from_pretrained(place), config)
    for key, parameter in model.named_parameters():
        if "lambda" in key:
            parameter.data = torch.randn(parameter.shape) * 0.5
    model.save_pretrained(tmp_path / "vera")
    expected = run_component(model.eval().base_model.model)
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
