"""Build tiny random models of common architectures, and inputs for these; needs torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from releases import AS_STORED, has

from vera_convert.verification.model_comparison import ModelJob
from vera_convert.verification.provenance import MergeSettings
from vera_convert.verification.verify import text_lines
from vera_convert.with_torch import VeraConfig, VeraModel


@dataclass(frozen=True)
class Kind:
    """A model with its inputs, and the config of an adapter for the model."""

    model: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    config: Mapping[str, Any]


def _tokens() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(2, 96, (2, 7), generator=generator)}


def _llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=96,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=1,
    )
    return transformers.GPT2LMHeadModel(config)


def _bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def _vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


def _pixels() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))}


def _both_ends() -> dict[str, Any]:
    return {**_tokens(), "decoder_input_ids": _tokens()["input_ids"][:, :4]}


KINDS: Mapping[str, Kind] = {
    "llama": Kind(
        _llama,
        _tokens,
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"},
    ),
    "gpt2": Kind(_gpt2, _tokens, {"target_modules": ["c_attn", "mlp.c_proj"]}),
    "bert": Kind(_bert, _tokens, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "t5": Kind(_t5, _both_ends, {"target_modules": ["q", "wo"], "task_type": "SEQ_2_SEQ_LM"}),
    "vit": Kind(
        _vit,
        _pixels,
        {
            "target_modules": ["q_proj" if has("transformers", "5.0") else "query"],
            "modules_to_save": ["classifier"],
        },
    ),
}


def built(kind: str, dtype: str = "float32") -> Any:
    """Return the model of a kind in evaluation mode, with the same random weights each time."""
    torch.manual_seed(0)
    return KINDS[kind].model().to(getattr(torch, dtype)).eval()


def inputs_of(kind: str, dtype: str = "float32") -> dict[str, Any]:
    """Return inputs for the model of a kind."""
    values = KINDS[kind].inputs()
    return {
        name: value.to(getattr(torch, dtype)) if value.is_floating_point() else value
        for name, value in values.items()
    }


def logits(model: Any, kind: str, dtype: str = "float32") -> Any:
    """Return the logits of a model for the inputs of its kind."""
    with torch.no_grad():
        return model(**inputs_of(kind, dtype)).logits


def saved(model: Any, folder: Path) -> Path:
    """Save a model with matrices as large as trained ones, so that each matrix has an effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and model.config.model_type != "t5":
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


def trained(base: Path, folder: Path, kind: str, *, size: float = 0.3, **fields: Any) -> Path:
    """Save an adapter with random vectors; heads and biases differ a little from the base's."""
    fields = {"r": 4, **KINDS[kind].config, **fields}
    model = type(built(kind)).from_pretrained(base, **AS_STORED)
    vera = VeraModel(model, VeraConfig(**fields))
    torch.manual_seed(len(folder.name))
    for parameter in vera.trainable_parameters():
        noise = torch.randn(parameter.shape)
        parameter.data = (size * noise + (parameter.ndim > 1) * parameter).to(parameter.dtype)
    vera.save_pretrained(folder)
    return folder


def job(
    base: Path,
    found: Path,
    *adapters: Path | tuple[Path, float],
    samples: int = 4,
    text: Path | None = None,
    wider: Mapping[str, str] | None = None,
    **options: Any,
) -> ModelJob:
    weighted = tuple(each if isinstance(each, tuple) else (each, 1.0) for each in adapters)
    lines = None if text is None else text_lines(text, samples)
    settings = MergeSettings(**options)
    return ModelJob(weighted, base, found, 1 << 20, samples, lines, settings, wider=wider or {})


def configured(folder: Path, copy: Path, **fields: Any) -> Path:
    """Copy a model, and change fields of the copy's config."""
    shutil.copytree(folder, copy)
    config = json.loads((folder / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **fields}))
    return copy
