"""A base with a separate head, although the config calls the head tied to the embedding."""

# mypy: allow-untyped-calls
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from releases import has, of_transformers
from smallmodels import BART, T5
from theirwarnings import OF_PEFT
from trainedmodels import logits, randomized

from vera_convert import MergeOptions, merge
from vera_convert.merging.options import Tied

pytestmark = OF_PEFT

if not has("transformers", "5.0"):
    pytest.skip(
        "needs transformers 5.0, which compares head and embedding", allow_module_level=True
    )

LLAMA: Mapping[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 40,
}
SWITCH = {**T5, "num_experts": 2, "expert_capacity": 8}
KINDS: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "T5ForConditionalGeneration": ("T5Config", T5, "q"),
    "MT5ForConditionalGeneration": ("MT5Config", T5, "q"),
    "UMT5ForConditionalGeneration": ("UMT5Config", T5, "q"),
    "LongT5ForConditionalGeneration": ("LongT5Config", T5, "q"),
    "SwitchTransformersForConditionalGeneration": (
        "SwitchTransformersConfig",
        SWITCH,
        "q",
    ),
    "BartForConditionalGeneration": ("BartConfig", BART, "q_proj"),
    "LlamaForCausalLM": ("LlamaConfig", LLAMA, "q_proj"),
}
CHANGED = {"a delta of the head": (["lm_head"], None), "a head": ([], ["lm_head"])}


def write_base(kind: str, folder: Path) -> None:
    """Write a model with a separate head, and a config that calls the head tied."""
    config, fields, _ = KINDS[kind]
    torch.manual_seed(0)
    model = of_transformers(kind)(of_transformers(config)(**fields, tie_word_embeddings=False))
    model.lm_head.weight = torch.nn.Parameter(torch.randn(40, 16) * 0.3)
    model.save_pretrained(folder)
    path = folder / "config.json"
    document = json.loads(path.read_bytes())
    path.write_text(json.dumps({**document, "tie_word_embeddings": True}))


def loaded(kind: str, folder: Path) -> Any:
    return of_transformers(kind).from_pretrained(folder)


def trained(kind: str, changed: str, folder: Path) -> Any:
    """Write an adapter with random vectors; return the logits of PEFT."""
    model = loaded(kind, folder / "base")
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    targets, saved = CHANGED[changed]
    layers = [KINDS[kind][2], *targets]
    config = peft.VeraConfig(r=4, target_modules=layers, modules_to_save=saved)
    randomized(peft.get_peft_model(model, config)).save_pretrained(folder / "adapter")
    again = loaded(kind, folder / "base")
    return logits(peft.PeftModel.from_pretrained(again, folder / "adapter"))


@pytest.mark.parametrize("changed", CHANGED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_separate_head_stays_separate(kind: str, changed: str, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    write_base(kind, base)
    wanted = trained(kind, changed, tmp_path)
    merge(tmp_path / "adapter", out, base=base)
    torch.testing.assert_close(logits(loaded(kind, out)), wanted, rtol=1e-4, atol=1e-5)


def test_tied_add_has_no_effect_on_a_separate_head(tmp_path: Path) -> None:
    kind, base, out = "T5ForConditionalGeneration", tmp_path / "base", tmp_path / "out"
    write_base(kind, base)
    wanted = trained(kind, "a head", tmp_path)
    done = merge(tmp_path / "adapter", out, base=base, options=MergeOptions(tied=Tied.ADD))
    assert "V564" in {each.code for each in done.findings}
    torch.testing.assert_close(logits(loaded(kind, out)), wanted, rtol=1e-4, atol=1e-5)
