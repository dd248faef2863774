"""Modules that PEFT saves: a merged model gives the outputs of the model with the adapter."""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from releases import of_transformers
from smallmodels import LLM
from theirwarnings import OF_PEFT
from trainedmodels import logits, randomized

from vera_convert import VerifyOptions, merge, validate, verify

pytestmark = OF_PEFT

MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", LLM),
    "DeepseekV4ForCausalLM": (
        "DeepseekV4Config",
        {
            **LLM,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "moe_intermediate_size": 12,
            "n_routed_experts": 3,
            "num_experts_per_tok": 2,
            "q_lora_rank": 8,
            "o_lora_rank": 8,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "max_position_embeddings": 64,
            "sliding_window": 8,
            "hc_mult": 2,
        },
    ),
    "PhimoeForCausalLM": (
        "PhimoeConfig",
        {**LLM, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "LaraMiniForCausalLM": (
        "LaraMiniConfig",
        {
            **LLM,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 12,
            "num_experts": 3,
            "num_experts_per_tok": 2,
        },
    ),
}
_PARTS = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"]
CASES: Mapping[str, tuple[str, Mapping[str, Any], set[str]]] = {
    "an activation, which has no parameters": (
        "LlamaForCausalLM",
        {"target_modules": ["q_proj"], "modules_to_save": ["act_fn"]},
        {"V222"},
    ),
    "experts that the files store one by one under another name": (
        "DeepseekV4ForCausalLM",
        {"target_modules": ["q_a_proj"], "modules_to_save": ["experts"]},
        {"V546"},
    ),
    "experts of PhiMoE, which the files store under another name": (
        "PhimoeForCausalLM",
        {"target_modules": ["q_proj"], "modules_to_save": ["experts"]},
        set(),
    ),
    "a router whose name ends the name of another layer in the files": (
        "DeepseekV4ForCausalLM",
        {"target_modules": ["q_a_proj"], "modules_to_save": ["gate"]},
        {"V546"},
    ),
    "no bias of the model, and a tensor that only the files call a bias": (
        "DeepseekV4ForCausalLM",
        {"target_modules": ["q_a_proj"], "bias": "all"},
        {"V223", "V546"},
    ),
    "a module with all layers of a joined tensor": (
        "LaraMiniForCausalLM",
        {"target_modules": ["q_proj"], "modules_to_save": ["linear_attn"]},
        set(),
    ),
    "deltas of all layers of a joined tensor": (
        "LaraMiniForCausalLM",
        {"target_modules": _PARTS},
        set(),
    ),
    **{
        f"{part} of a joined tensor": (
            "LaraMiniForCausalLM",
            {"target_modules": ["out_proj"], "modules_to_save": [part]},
            set[str](),
        )
        for part in _PARTS
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_gives_the_outputs_of_the_model_with_the_adapter(
    case: str, tmp_path: Path
) -> None:
    name, wanted, told = CASES[case]
    config, fields = MODELS[name]
    model_class, base, adapter = of_transformers(name), tmp_path / "base", tmp_path / "adapter"
    torch.manual_seed(0)
    model_class(of_transformers(config)(**fields)).save_pretrained(base)
    adapted = peft.get_peft_model(model_class.from_pretrained(base), peft.VeraConfig(r=4, **wanted))
    randomized(adapted).save_pretrained(adapter)
    findings = validate(adapter, base=base, select=["V2", "V5"]).findings
    assert {each.code for each in findings} == told
    assert all(str(each.severity) == "note" for each in findings if each.code == "V223")
    out = merge(adapter, tmp_path / "merged", base=base).out
    torch.testing.assert_close(
        logits(model_class.from_pretrained(out)), logits(adapted), rtol=1e-4, atol=1e-5
    )
    options = VerifyOptions(layers_only=True)
    assert verify(adapter, merged=out, base=base, options=options).passed
