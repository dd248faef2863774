"""Save and load small transformers models, and write adapters for these with PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from releases import AS_STORED, of_transformers
from smallmodels import EYE, LLM, MODELS, T5, TINY

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

KINDS: dict[str, tuple[str, Mapping[str, Any]]] = {
    **MODELS,
    "LlamaForCausalLM": ("LlamaConfig", LLM),
    "LlamaModel": ("LlamaConfig", LLM),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16},
    ),
    "BertForSequenceClassification": ("BertConfig", {**TINY, "vocab_size": 40}),
    "RobertaForSequenceClassification": ("RobertaConfig", {**TINY, "vocab_size": 40}),
    "T5ForConditionalGeneration": ("T5Config", T5),
    "ViTForImageClassification": ("ViTConfig", EYE),
}
HEADS = {
    "BertForSequenceClassification": ["classifier"],
    "RobertaForSequenceClassification": ["classifier"],
    "ViTForImageClassification": ["classifier"],
}
TARGETS = {
    # PEFT knows no layer of the router's class
    "MixtralForCausalLM": ["q_proj", "v_proj", "o_proj"],
    "Qwen2MoeForCausalLM": ["q_proj", "shared_expert.down_proj", "shared_expert.up_proj"],
    "GPT2LMHeadModel": ["c_attn", "c_proj", "c_fc"],
}


def saved(folder: Path, name: str, dtype: str) -> Path:
    config, values = KINDS[name]
    torch.manual_seed(0)
    model = of_transformers(name)(of_transformers(config)(**values))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def loaded(name: str, base: Path) -> Any:
    return getattr(transformers, name).from_pretrained(base, **AS_STORED)


def trained(
    folder: Path,
    base: Path,
    name: str,
    *,
    targets: Any,
    stored: bool,
    bias: str = "none",
    rank: int = 6,
) -> Path:
    """Save an adapter with random vectors and head, and random biases if biases are trained."""
    config = peft.VeraConfig(
        r=rank,
        target_modules=targets,
        modules_to_save=HEADS.get(name),
        save_projection=stored,
        projection_prng_key=11,
        bias=bias,
    )
    model = peft.get_peft_model(loaded(name, base), config)
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            size = 0.3 if "lambda" in key else 0.1
            parameter.data = (torch.randn(parameter.shape) * size).to(parameter.dtype)
    model.save_pretrained(folder)
    return folder


def randomized(adapted: Any) -> Any:
    """Set random values in everything that a model of PEFT trains, and return the model."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * 0.3
    return adapted


def logits(model: Any) -> Any:
    """Return the logits of a causal model or an encoder-decoder for two random sequences."""
    ids = torch.randint(3, 38, (2, 6), generator=torch.Generator().manual_seed(3))
    more = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **more).logits
