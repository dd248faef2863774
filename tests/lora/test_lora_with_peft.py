"""In real models, PEFT gives the same outputs for the LoRA and for the VeRA adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import theirwarnings
from safetensors.numpy import load_file, save_file
from trainedmodels import KINDS, TARGETS, loaded, saved, trained

from vera_convert import BaseOptions, VerifyOptions, verify
from vera_convert.lora.conversion import to_lora
from vera_convert.lora.options import LoraOptions

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = theirwarnings.OF_PEFT

CASES = [
    ("LlamaForCausalLM", "float32", True),
    ("LlamaForCausalLM", "float32", False),
    ("LlamaForCausalLM", "bfloat16", False),
    ("LlamaForCausalLM", "float16", True),
    ("GPT2LMHeadModel", "float32", True),
    ("GPT2LMHeadModel", "bfloat16", False),
    ("BertForSequenceClassification", "float32", True),
    ("RobertaForSequenceClassification", "float32", True),
    ("T5ForConditionalGeneration", "float32", True),
    ("ViTForImageClassification", "float32", True),
    ("LlavaForConditionalGeneration", "float32", True),
    ("MixtralForCausalLM", "float32", False),
]


def logits(name: str, base: Path, adapter: Path | None = None) -> Any:
    model = loaded(name, base)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    model.eval()
    torch.manual_seed(4)
    if "pixel_values" in str(model.main_input_name):
        side = model.config.image_size
        inputs = {"pixel_values": torch.randn(2, 3, side, side).to(model.dtype)}
    else:
        inputs = {"input_ids": torch.randint(3, 30, (2, 8))}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        return model(**inputs).logits.float()


@pytest.mark.parametrize(("name", "dtype", "stored"), CASES)
def test_peft_gives_the_outputs_of_the_vera_adapter(
    name: str, dtype: str, stored: bool, tmp_path: Path
) -> None:
    base = saved(tmp_path / "base", name, dtype)
    targets = TARGETS.get(name, "all-linear")
    adapter = trained(tmp_path / "adapter", base, name, targets=targets, stored=stored)
    to_lora(adapter, tmp_path / "lora", base=base)
    plain, vera, lora = (logits(name, base, each) for each in (None, adapter, tmp_path / "lora"))
    assert (vera - plain).abs().max() > 0.05
    limit = {"float32": 1e-5, "bfloat16": 0.0, "float16": 2e-3}[dtype]
    assert (vera - lora).abs().max() <= limit


@pytest.mark.parametrize("bias", ["vera_only", "all"])
def test_trained_biases_are_kept(bias: str, tmp_path: Path) -> None:
    name = "BertForSequenceClassification"
    base = saved(tmp_path / "base", name, "float32")
    adapter = trained(
        tmp_path / "adapter", base, name, targets=["query", "value"], stored=True, bias=bias
    )
    to_lora(adapter, tmp_path / "lora", base=base)
    vera, lora = (logits(name, base, each) for each in (adapter, tmp_path / "lora"))
    assert (vera - lora).abs().max() < 1e-5
    written = json.loads((tmp_path / "lora" / "adapter_config.json").read_bytes())
    assert written["bias"] == {"vera_only": "lora_only", "all": "all"}[bias]


@pytest.mark.parametrize("targets", [r".*layers\.1\..*(q|down)_proj", ["layers.0.mlp.up_proj"]])
def test_targets_of_any_form_adapt_the_same_layers(targets: Any, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "LlamaForCausalLM", "float32")
    adapter = trained(tmp_path / "vera", base, "LlamaForCausalLM", targets=targets, stored=True)
    to_lora(adapter, tmp_path / "lora", base=base)
    vera, lora = (logits("LlamaForCausalLM", base, p) for p in (adapter, tmp_path / "lora"))
    assert (vera - lora).abs().max() < 1e-5
    model = peft.PeftModel.from_pretrained(loaded("LlamaForCausalLM", base), tmp_path / "lora")
    adapted = {key.split(".lora_")[0] for key, _ in model.named_parameters() if ".lora_" in key}
    stored = peft.utils.load_peft_weights(str(tmp_path / "lora"))
    assert len(adapted) == len(stored) / 2


def test_a_key_map_gives_the_names_of_the_given_base(tmp_path: Path) -> None:
    """With names of another model, PEFT would only warn, and the LoRA would have no effect."""
    name = "LlamaForCausalLM"
    base = saved(tmp_path / "base", name, "float32")
    adapter = trained(tmp_path / "vera", base, name, targets=["q_proj", "up_proj"], stored=True)
    shutil.copytree(adapter, tmp_path / "other")
    weights = tmp_path / "other" / "adapter_model.safetensors"
    tensors = {
        key.replace("model.layers", "model.other.layers"): tensor
        for key, tensor in load_file(weights).items()
    }
    save_file(tensors, weights, {"format": "pt"})
    mapped = BaseOptions(str(base), key_map=[("model.other", "model")])
    to_lora(tmp_path / "other", tmp_path / "lora", base=mapped)
    vera, lora = (logits(name, base, each) for each in (adapter, tmp_path / "lora"))
    assert (vera - logits(name, base)).abs().max() > 0.01
    assert (vera - lora).abs().max() < 1e-5
    options = VerifyOptions(layers_only=True)
    assert verify(tmp_path / "other", base=mapped, lora=tmp_path / "lora", options=options).passed


def test_zeros_in_filled_layers_change_nothing(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "LlamaForCausalLM", "float32")
    adapter = trained(
        tmp_path / "vera", base, "LlamaForCausalLM", targets=["layers.1.mlp.up_proj"], stored=True
    )
    options = LoraOptions(engine="tgi", fill_layers=True)  # type: ignore[arg-type]
    to_lora(adapter, tmp_path / "lora", base=base, options=options)
    vera, lora = (logits("LlamaForCausalLM", base, p) for p in (adapter, tmp_path / "lora"))
    assert (vera - lora).abs().max() < 1e-5


def test_a_rank_above_a_layers_outputs_is_exact(tmp_path: Path) -> None:
    """PEFT's own conversion refuses the layer: k_proj has fewer outputs than the adapter's rank."""
    name = "LlamaForCausalLM"
    base = saved(tmp_path / "base", name, "float32")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapter = trained(tmp_path / "vera", base, name, targets=targets, stored=True, rank=24)
    done = to_lora(adapter, tmp_path / "lora", base=base)
    assert min(layer.shape.out_features for layer in done.plan.layers) < 24
    exact = LoraOptions(rank=done.plan.exact_rank)
    to_lora(adapter, tmp_path / "low", base=base, options=exact)
    assert done.plan.exact_rank < 24
    vera = logits(name, base, adapter)
    assert (vera - logits(name, base)).abs().max() > 0.05
    for lora in ("lora", "low"):
        assert (vera - logits(name, base, tmp_path / lora)).abs().max() < 1e-5


@pytest.mark.parametrize("rows", [46, 38])
def test_a_resized_vocabulary_is_kept(rows: int, tmp_path: Path) -> None:
    """PEFT stores a resized embedding, although no field of the config names the embedding."""
    name = "LlamaForCausalLM"
    base = saved(tmp_path / "base", name, "float32")

    def resized() -> Any:
        model = loaded(name, base)
        model.resize_token_embeddings(rows, mean_resizing=False)
        return model

    config = peft.VeraConfig(r=4, target_modules=["q_proj"], modules_to_save=None)
    adapted = peft.get_peft_model(resized(), config)
    for parameter in adapted.parameters():
        parameter.data = torch.randn(parameter.shape)
    adapted.save_pretrained(tmp_path / "adapter")
    lora = to_lora(tmp_path / "adapter", tmp_path / "lora", base=base).out
    checked = verify(tmp_path / "adapter", lora=lora, base=base)
    assert checked.passed, [str(each) for each in checked.findings]
    vera, ours = (
        peft.PeftModel.from_pretrained(resized(), each).merge_and_unload().state_dict()
        for each in (tmp_path / "adapter", lora)
    )
    assert vera["lm_head.weight"].shape[0] == rows
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(vera[key], ours[key])


def test_every_model_of_this_file_is_also_merged_by_other_tests() -> None:
    assert {name for name, _, _ in CASES} <= {*KINDS}
