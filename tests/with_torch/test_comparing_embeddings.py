"""Compare whole models with heads and embeddings that PEFT trained: tied, saved, or resized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import theirwarnings
import torch
import torchmodels
import transformers
from releases import resize_vocabulary
from safetensors.numpy import load_file, save_file

from vera_convert import BaseOptions, MergeOptions, Tied, merge, verify

pytestmark = [theirwarnings.OF_PEFT, pytest.mark.usefixtures("models_here")]

NAMES = {
    "gpt2": ("c_attn", "wte", "transformer.wte.weight"),
    "llama": ("q_proj", "embed_tokens", "model.embed_tokens.weight"),
}
ROWS = 101
WEIGHTS = "model.safetensors"


def base_of(kind: str, folder: Path, *, tied: bool) -> Path:
    model = torchmodels.built(kind)
    if tied and kind == "llama":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return torchmodels.saved(model, folder)


def by_peft(base: Path, folder: Path, *, rows: int | None = None, **fields: Any) -> Path:
    """Train an adapter with PEFT on the base, with random values and with `rows` tokens if
    given.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    if rows is not None:
        resize_vocabulary(model, rows)
    config = peft.VeraConfig(r=4, task_type="CAUSAL_LM", **fields)
    adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape) * 0.2
    adapted.save_pretrained(folder)
    return folder


def passes(base: Path, adapter: Path, out: Path, tied: Tied | None) -> Any:
    merge(adapter, out, base=BaseOptions(str(base)), options=MergeOptions(tied=tied))
    result = verify(adapter, base=str(base), merged=out)
    assert result.passed, [str(each) for each in result.findings]
    assert result.model is not None
    assert result.model.passed
    return result.model


@pytest.mark.parametrize("tied", Tied)
@pytest.mark.parametrize("of_head", [False, True])
@pytest.mark.parametrize("kind", NAMES)
def test_a_saved_embedding_or_head_passes_after_the_merge(
    kind: str, of_head: bool, tied: Tied, tmp_path: Path
) -> None:
    base = base_of(kind, tmp_path / "base", tied=True)
    layer, embedding, stored = NAMES[kind]
    module = "lm_head" if of_head else embedding
    adapter = by_peft(base, tmp_path / "a", target_modules=[layer], modules_to_save=[module])
    found = passes(base, adapter, tmp_path / "out", tied)
    assert found.wrapped == (tied is Tied.UNTIE)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    tensors[stored] = load_file(base / WEIGHTS)[stored]
    save_file(tensors, tmp_path / "out" / WEIGHTS, {"format": "pt"})
    if tied is Tied.ADD or not of_head:  # an untied head does not change the embedding
        wrong = verify(adapter, base=str(base), merged=tmp_path / "out")
        assert wrong.model is None or not wrong.model.passed


@pytest.mark.parametrize(
    ("kind", "is_tied", "with_embedding", "tied"),
    [
        ("gpt2", True, False, Tied.ADD),
        ("gpt2", True, False, Tied.UNTIE),
        ("gpt2", True, True, Tied.UNTIE),
        ("llama", True, False, Tied.ADD),
        ("llama", True, False, Tied.UNTIE),
        ("llama", True, True, Tied.UNTIE),
        ("llama", False, True, None),
    ],
)
def test_an_adapted_head_with_a_resized_vocabulary_passes_after_the_merge(
    kind: str, is_tied: bool, with_embedding: bool, tied: Tied | None, tmp_path: Path
) -> None:
    base = base_of(kind, tmp_path / "base", tied=is_tied)
    layer, embedding, _ = NAMES[kind]
    saved = [embedding] if with_embedding else None
    adapter = by_peft(
        base, tmp_path / "a", rows=ROWS, target_modules=[layer, "lm_head"], modules_to_save=saved
    )
    found = passes(base, adapter, tmp_path / "out", tied)
    assert found.wrapped == (tied is not Tied.ADD)
