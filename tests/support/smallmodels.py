"""Build small transformers models with random weights, by class name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from releases import of_transformers

TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}
LLM = {**TINY, "num_key_value_heads": 1, "vocab_size": 40, "head_dim": 8}
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 40,
    "decoder_start_token_id": 0,
}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": 40,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": 2,
    "decoder_start_token_id": 2,
}
FSMT = {**BART, "langs": ["en", "de"], "src_vocab_size": 40, "tgt_vocab_size": 40}
EYE = {**TINY, "image_size": 16, "patch_size": 8}
QWEN_EYE = {"depth": 2, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16}

MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "LlavaForConditionalGeneration": (
        "LlavaConfig",
        {
            "text_config": {**LLM, "model_type": "llama"},
            "vision_config": {**EYE, "model_type": "clip_vision_model"},
        },
    ),
    "Gemma3ForConditionalGeneration": (
        "Gemma3Config",
        {"text_config": LLM, "vision_config": {**EYE, "vision_use_head": False}},
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "Qwen2_5_VLConfig",
        {"text_config": LLM, "vision_config": {**QWEN_EYE, "intermediate_size": 24}},
    ),
    "Qwen2AudioForConditionalGeneration": (
        "Qwen2AudioConfig",
        {
            "text_config": {**LLM, "model_type": "qwen2"},
            "audio_config": {
                "d_model": 16,
                "encoder_layers": 1,
                "encoder_ffn_dim": 24,
                "encoder_attention_heads": 2,
            },
        },
    ),
    "ViTForImageClassification": ("ViTConfig", EYE),
    "DeiTForImageClassification": ("DeiTConfig", EYE),
    "Dinov2ForImageClassification": ("Dinov2Config", EYE),
    "ViTMAEForPreTraining": (
        "ViTMAEConfig",
        {
            **EYE,
            "decoder_hidden_size": 16,
            "decoder_intermediate_size": 24,
            "decoder_num_attention_heads": 2,
            "decoder_num_hidden_layers": 1,
        },
    ),
    "CLIPVisionModel": ("CLIPVisionConfig", EYE),
    "SwinForImageClassification": (
        "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]},
    ),
    "MixtralForCausalLM": ("MixtralConfig", {**LLM, "num_local_experts": 2}),
    "Qwen2MoeForCausalLM": (
        "Qwen2MoeConfig",
        {
            **LLM,
            "num_experts": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 12,
        },
    ),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", {**TINY, "vocab_size": 40}),
}


def real_model(name: str) -> Any:
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config, values = MODELS[name]
    torch.manual_seed(0)
    return of_transformers(name)(of_transformers(config)(**values))


def linear_layers(model: Any) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
