"""Models whose head is untied: the merged model computes what PEFT computes.

The field that unties the head also unties the stacks of an encoder-decoder, and the bias of a head
with two names.
"""

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
from smallmodels import BART, FSMT, T5, TINY
from theirwarnings import OF_PEFT
from trainedmodels import logits, randomized

from vera_convert import MergeOptions, UsageError, VerifyOptions, merge, verify
from vera_convert.merging.options import Tied

pytestmark = OF_PEFT

if not has("transformers", "5.0"):
    pytest.skip("needs transformers 5.0, which ties encoders by a field", allow_module_level=True)

WORDS: Mapping[str, Any] = {**TINY, "vocab_size": 40, "pad_token_id": 1}
KINDS: Mapping[str, tuple[str, Mapping[str, Any], list[str]]] = {
    "BartForConditionalGeneration": ("BartConfig", BART, ["q_proj", "lm_head"]),
    "MarianMTModel": ("MarianConfig", BART, ["q_proj", "lm_head"]),
    "T5ForConditionalGeneration": ("T5Config", T5, ["q", "lm_head"]),
    "FSMTForConditionalGeneration": ("FSMTConfig", FSMT, ["q_proj", "output_projection"]),
    "BertForMaskedLM": ("BertConfig", WORDS, ["query", "decoder"]),
    "EsmForMaskedLM": ("EsmConfig", {**WORDS, "mask_token_id": 39}, ["query", "decoder"]),
    "LukeForMaskedLM": (
        "LukeConfig",
        {**WORDS, "entity_vocab_size": 9, "entity_emb_size": 8},
        ["query", "lm_head.decoder"],
    ),
}


def trained(kind: str, folder: Path, **wanted: Any) -> Any:
    """Write a base, and an adapter with random vectors; return the logits of PEFT."""
    config, fields, targets = KINDS[kind]
    torch.manual_seed(0)
    model = of_transformers(kind)(of_transformers(config)(**fields))
    model.save_pretrained(folder / "base")
    path = folder / "base" / "config.json"
    document = json.loads(path.read_bytes())
    document.pop("scale_decoder_outputs", None)  # published configs of T5 lack this field
    path.write_text(json.dumps(document))
    peft_config = peft.VeraConfig(**{"r": 4, "target_modules": targets, **wanted})
    adapted = randomized(peft.get_peft_model(model, peft_config))
    adapted.save_pretrained(folder / "adapter")
    return logits(adapted)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untied_model_computes_what_peft_computes(kind: str, tmp_path: Path) -> None:
    wanted = trained(kind, tmp_path)
    options = MergeOptions(tied=Tied.UNTIE)
    done = merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base", options=options)
    assert ("V579" in {each.code for each in done.findings}) == kind.startswith("T5")
    model, told = of_transformers(kind).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert (told["missing_keys"], told["unexpected_keys"]) == (set(), set())
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    checked = verify(
        tmp_path / "adapter",
        merged=tmp_path / "out",
        base=tmp_path / "base",
        options=VerifyOptions(tied=Tied.UNTIE),
    )
    assert checked.passed, [str(each) for each in checked.findings]


def test_a_head_of_the_adapter_s_own_is_untied_with_the_stacks(tmp_path: Path) -> None:
    kind = "BartForConditionalGeneration"
    wanted = trained(kind, tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    options = MergeOptions(tied=Tied.UNTIE)
    merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base", options=options)
    model = of_transformers(kind).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)


def test_switch_transformers_cannot_be_untied(tmp_path: Path) -> None:
    name = "SwitchTransformersForConditionalGeneration"
    torch.manual_seed(0)
    fields = {**T5, "num_experts": 2, "expert_capacity": 8}
    model = of_transformers(name)(of_transformers("SwitchTransformersConfig")(**fields))
    model.save_pretrained(tmp_path / "base")
    config = peft.VeraConfig(r=4, target_modules=["q", "lm_head"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    for tied, error in ((Tied.UNTIE, True), (Tied.ADD, False)):
        out, options = tmp_path / tied, MergeOptions(tied=tied)
        if error:
            with pytest.raises(UsageError, match=r"SwitchTransformers scales.*--tied add"):
                merge(tmp_path / "adapter", out, base=tmp_path / "base", options=options)
        else:
            assert merge(tmp_path / "adapter", out, base=tmp_path / "base", options=options).written
