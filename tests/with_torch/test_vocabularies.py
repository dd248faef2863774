"""Heads, embeddings and vocabularies of real classes: the merged model gives PEFT's outputs."""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from merges import merged_with
from releases import has, of_transformers, resize_vocabulary
from smallmodels import BART, FSMT, LLM, T5, TINY
from theirwarnings import OF_PEFT
from trainedmodels import logits, randomized

from vera_convert import validate
from vera_convert.errors import CheckpointError
from vera_convert.merging.merge import Merge

pytestmark = OF_PEFT

if not has("transformers", "5.0"):
    pytest.skip("needs transformers 5.0, which ties more by one field", allow_module_level=True)

ENCODER = {**TINY, "vocab_size": 40, "max_position_embeddings": 32}
MODERN = {**ENCODER, **dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id"), 0)}
MODERN |= dict.fromkeys(("eos_token_id", "sep_token_id"), 1)
STACK = {**LLM, "query_pre_attn_scalar": 8}
KINDS: Mapping[str, tuple[str, Mapping[str, Any], str, str]] = {
    "T5ForConditionalGeneration": ("T5Config", T5, "q", "lm_head"),
    "Pop2PianoForConditionalGeneration": (
        *("Pop2PianoConfig", {**T5, "composer_vocab_size": 3}, "q", "lm_head"),
    ),
    "BartForConditionalGeneration": ("BartConfig", BART, "q_proj", "lm_head"),
    "MarianMTModel": ("MarianConfig", BART, "q_proj", "lm_head"),
    "FSMTForConditionalGeneration": ("FSMTConfig", FSMT, "q_proj", "output_projection"),
    "T5GemmaForConditionalGeneration": (
        "T5GemmaConfig",
        {
            "encoder": STACK,
            "decoder": {**STACK, "cross_attention_hidden_size": 16},
            "vocab_size": 40,
            "decoder_start_token_id": 2,
        },
        "q_proj",
        "lm_head.out_proj",
    ),
    "BertForMaskedLM": ("BertConfig", ENCODER, "query", "cls.predictions.decoder"),
    "ModernBertForMaskedLM": ("ModernBertConfig", MODERN, "Wqkv", "decoder"),
}
EMBEDDING = {"BertForMaskedLM": "word_embeddings", "T5ForConditionalGeneration": "shared"}


@dataclass(frozen=True)
class Case:
    """A base, an adapter for the base, and the choice for the merge.

    Attributes:
    kind: the class.
    changed: further changes of the adapter: ``delta`` on the head, or the ``head`` or ``embedding``
    in modules_to_save.
    tied: whether the base ties head and embedding.
    rows: the size of the vocabulary in the training; None for the base's size.
    choice: the value of ``--tied``.
    """

    kind: str
    changed: Sequence[str] = ()
    tied: bool = True
    rows: int | None = None
    choice: str | None = None

    def write(self, folder: Path) -> Any:
        """Write base and adapter with random values; return the logits of PEFT's model."""
        config, fields, layer, head = KINDS[self.kind]
        torch.manual_seed(0)
        settings = of_transformers(config)(**fields)
        for part in (settings, *(getattr(settings, name, None) for name in ("encoder", "decoder"))):
            if hasattr(part, "tie_word_embeddings"):
                part.tie_word_embeddings = self.tied
        model = of_transformers(self.kind)(settings)
        for parameter in model.parameters():
            parameter.data += torch.randn(parameter.shape) * 0.2
        model.save_pretrained(folder / "base")
        saved = {"head": head, "embedding": EMBEDDING.get(self.kind, "embed_tokens")}
        wanted = peft.VeraConfig(
            r=4,
            target_modules=[layer, *[head] * ("delta" in self.changed)],
            modules_to_save=[saved[each] for each in self.changed if each in saved] or None,
        )
        randomized(peft.get_peft_model(self.loaded(folder), wanted)).save_pretrained(
            folder / "adapter"
        )
        return logits(peft.PeftModel.from_pretrained(self.loaded(folder), folder / "adapter"))

    def loaded(self, folder: Path) -> Any:
        """Return the base as the training loads the base."""
        model = of_transformers(self.kind).from_pretrained(folder / "base")
        if self.rows is not None:
            resize_vocabulary(model, self.rows)
        return model

    def merged(self, folder: Path) -> Merge:
        return merged_with(folder / "adapter", folder / "base", folder / "out", tied=self.choice)


T5_, BERT = "T5ForConditionalGeneration", "BertForMaskedLM"
SAME = {
    "an embedding apart from the head of BERT": Case(BERT, ["embedding"], choice="untie"),
    "a larger BERT": Case(BERT, ["head", "embedding"], rows=43, choice="untie"),
    "a larger untied BERT": Case(BERT, tied=False, rows=43),
    "a larger untied T5": Case(T5_, tied=False, rows=43),
    "a smaller untied BART": Case("BartForConditionalGeneration", tied=False, rows=38),
    "a head of a larger untied T5": Case(T5_, ["head"], tied=False, rows=43),
    "the unused `shared` of a larger T5": Case(T5_, ["embedding"], rows=43),
    "the unused `shared` of a larger untied T5": Case(T5_, ["embedding"], tied=False, rows=43),
    "a head of a larger Marian": Case("MarianMTModel", ["head"], rows=43, choice="untie"),
    "the embeddings of T5Gemma": Case(
        "T5GemmaForConditionalGeneration", ["embedding"], choice="untie"
    ),
    "a delta of the head of T5Gemma": Case(
        "T5GemmaForConditionalGeneration", ["delta"], choice="untie"
    ),
    "a head of ModernBERT": Case("ModernBertForMaskedLM", ["delta"], choice="untie"),
    "a head of a larger ModernBERT": Case(
        "ModernBertForMaskedLM", ["delta"], rows=43, choice="untie"
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_a_merged_model_gives_peft_s_outputs(name: str, tmp_path: Path) -> None:
    case = SAME[name]
    wanted = case.write(tmp_path)
    case.merged(tmp_path)
    model, told = of_transformers(case.kind).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(told.values()), told
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["BartForConditionalGeneration", "MarianMTModel"])
def test_embeddings_of_the_stacks_untie_the_head_for_transformers_4(
    kind: str, tmp_path: Path
) -> None:
    case = Case(kind, ["embedding"])
    wanted = case.write(tmp_path)
    found = {each.code for each in case.merged(tmp_path).findings}
    assert found == ({"V579"} if kind == "MarianMTModel" else set())
    model = of_transformers(case.kind).from_pretrained(tmp_path / "out")
    assert model.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)


def test_a_resized_vocabulary_gives_a_base_without_a_head_the_adapter_s_head(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    config = of_transformers("LlamaConfig")(**LLM, tie_word_embeddings=False)
    of_transformers("LlamaModel")(config).save_pretrained(tmp_path / "base")
    model = of_transformers("LlamaForCausalLM").from_pretrained(tmp_path / "base")
    resize_vocabulary(model, 43)
    adapted = peft.get_peft_model(model, peft.VeraConfig(r=4, target_modules=["q_proj"]))
    randomized(adapted).save_pretrained(tmp_path / "adapter")
    merged_with(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    merged = of_transformers("LlamaForCausalLM").from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-5, atol=1e-5)


REFUSED = {
    "the embeddings of T5Gemma alone": (
        Case("T5GemmaForConditionalGeneration", ["embedding"]),
        "V524",
    ),
    "a larger head of T5Gemma": (
        Case("T5GemmaForConditionalGeneration", ["head"], rows=43, choice="untie"),
        "V531 .*transformers resizes only a part of t5gemma",
    ),
    "a head that is not tied to the larger embedding": (
        Case("Pop2PianoForConditionalGeneration", ["delta"], rows=43),
        r"V531 .*shared\.weight has 40 rows",
    ),
    "a larger FSMT": (
        Case("FSMTForConditionalGeneration", rows=43),
        "V531 .*only a part of fsmt.*use the adapter with PEFT, without a merge",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_peft_s_files_do_not_describe_is_refused(name: str, tmp_path: Path) -> None:
    case, message = REFUSED[name]
    case.write(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        case.merged(tmp_path)
    told = {each.code for each in validate(tmp_path / "adapter", base=tmp_path / "base").findings}
    assert ("V531" in told) == message.startswith("V531")
    assert ("V526" in told) == case.kind.startswith("T5Gemma")
