"""`VeraModel` unties the head of a model and saves a model that every transformers can load."""

# mypy: allow-untyped-calls
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from releases import has, of_transformers
from safetensors import safe_open
from smallmodels import BART, LLM, T5, TINY
from trainedmodels import logits, randomized

from vera_convert.errors import UsageError
from vera_convert.merging.options import Tied
from vera_convert.with_torch import VeraConfig, VeraModel

if not has("transformers", "5.0"):
    pytest.skip("needs transformers 5.0, which ties encoders by a field", allow_module_level=True)

TIED = {"tie_word_embeddings": True}
WORDS: Mapping[str, Any] = {**TINY, "vocab_size": 40, "pad_token_id": 1}
STACKS = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "shared.weight"}
KINDS: dict[str, tuple[str, Mapping[str, Any], list[str], set[str]]] = {
    "T5ForConditionalGeneration": ("T5Config", T5, ["q", "lm_head"], STACKS),
    "UMT5ForConditionalGeneration": ("UMT5Config", T5, ["q", "lm_head"], STACKS),
    "MT5ForConditionalGeneration": ("MT5Config", {**T5, **TIED}, ["q", "lm_head"], STACKS),
    "SwitchTransformersForConditionalGeneration": (
        "SwitchTransformersConfig",
        {**T5, "num_experts": 2, "expert_capacity": 64},
        ["q", "lm_head"],
        STACKS,
    ),
    "BartForConditionalGeneration": (
        "BartConfig",
        BART,
        ["q_proj", "lm_head"],
        {f"model.{name}" for name in STACKS},
    ),
    "BertForMaskedLM": (
        "BertConfig",
        WORDS,
        ["query", "decoder"],
        {"cls.predictions.decoder.bias", "cls.predictions.bias"},
    ),
    "LlamaForCausalLM": ("LlamaConfig", {**LLM, **TIED}, ["q_proj", "lm_head"], set()),
}


def base(kind: str, folder: Path) -> Any:
    """Return the model as a user gets the model from files."""
    config, fields, _, _ = KINDS[kind]
    torch.manual_seed(0)
    of_transformers(kind)(of_transformers(config)(**fields)).save_pretrained(folder / "base")
    return of_transformers(kind).from_pretrained(folder / "base")


def check_saved(kind: str, model: Any, wanted: Any, folder: Path) -> None:
    """Check that transformers 5 loads the saved model, and that transformers 4 would."""
    model.save_pretrained(folder / "out")
    again, told = of_transformers(kind).from_pretrained(folder / "out", output_loading_info=True)
    assert (told["missing_keys"], told["unexpected_keys"]) == (set(), set())
    torch.testing.assert_close(logits(again), wanted, rtol=1e-4, atol=1e-5)
    config = json.loads((folder / "out" / "config.json").read_bytes())
    # transformers 4 reads only the field of the tie, and neither ties nor scales if the field is
    # false.
    assert config["tie_word_embeddings"] is False
    assert not config.get("scale_decoder_outputs", False)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untied_head_is_saved_for_every_release(kind: str, tmp_path: Path) -> None:
    _, _, targets, names = KINDS[kind]
    model = VeraModel(base(kind, tmp_path), VeraConfig(r=4, target_modules=tuple(targets)))
    wanted = logits(randomized(model))
    model.merge(tied=Tied.UNTIE)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    merged = model.unload()
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    check_saved(kind, merged, wanted, tmp_path)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert names <= {*file.keys()}


@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "LlamaForCausalLM"])
def test_a_fully_trained_head_is_saved_for_every_release(kind: str, tmp_path: Path) -> None:
    target = KINDS[kind][2][0]
    config = VeraConfig(r=4, target_modules=(target,), modules_to_save=("lm_head",))
    model = VeraModel(base(kind, tmp_path), config)
    wanted = logits(randomized(model))
    model.merge()
    check_saved(kind, model.unload(), wanted, tmp_path)


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    kind = "T5ForConditionalGeneration"
    model = VeraModel(base(kind, tmp_path), VeraConfig(r=4, target_modules=("q", "lm_head")))
    randomized(model).merge(tied=Tied.ADD)
    merged = model.unload()
    assert merged.lm_head.weight is merged.shared.weight
    assert (merged.config.tie_word_embeddings, merged.config.scale_decoder_outputs) == (True, True)


def test_the_head_of_udop_cannot_be_untied() -> None:
    udop = of_transformers("UdopForConditionalGeneration")(of_transformers("UdopConfig")(**T5))
    model = VeraModel(udop, VeraConfig(r=4, target_modules=("q", "lm_head")))
    with pytest.raises(UsageError, match=r"output of UDOP.*Tied\.ADD"):
        model.merge(tied=Tied.UNTIE)
    model.merge(tied=Tied.ADD)
