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

pytestmark = [OF_PEFT, pytest.mark.usefixtures("models_here")]

if not has("transformers", "5.0"):
    pytest.skip("needs transformers 5.0, which ties encoders by a field", allow_module_level=True)

WORDS: Mapping[str, Any] = {**TINY, "vocab_size": 40, "pad_token_id": 1}
KINDS: dict[str, tuple[str, Mapping[str, Any], list[str]]] = {
    "BartForConditionalGeneration": ("BartConfig", BART, ["q_proj", "lm_head"]),
    "MarianMTModel": ("MarianConfig", BART, ["q_proj", "lm_head"]),
    "T5ForConditionalGeneration": ("T5Config", T5, ["q", "lm_head"]),
    "UMT5ForConditionalGeneration": ("UMT5Config", T5, ["q", "lm_head"]),
    "LongT5ForConditionalGeneration": ("LongT5Config", T5, ["q", "lm_head"]),
    "Pop2PianoForConditionalGeneration": (
        *("Pop2PianoConfig", {**T5, "composer_vocab_size": 3}, ["q", "lm_head"]),
    ),
    "SwitchTransformersForConditionalGeneration": (
        "SwitchTransformersConfig",
        {**T5, "num_experts": 2, "expert_capacity": 64},
        ["q", "lm_head"],
    ),
    "FSMTForConditionalGeneration": ("FSMTConfig", FSMT, ["q_proj", "output_projection"]),
    "BertForMaskedLM": ("BertConfig", WORDS, ["query", "decoder"]),
    "EsmForMaskedLM": ("EsmConfig", {**WORDS, "mask_token_id": 39}, ["query", "decoder"]),
    "LukeForMaskedLM": (
        "LukeConfig",
        {**WORDS, "entity_vocab_size": 9, "entity_emb_size": 8},
        ["query", "lm_head.decoder"],
    ),
}


UNTIE = MergeOptions(tied=Tied.UNTIE)
CHANGED: Mapping[str, Mapping[str, Any]] = {
    "a head": {"target_modules": ["q"], "modules_to_save": ["lm_head"]},
    "both stacks": {"target_modules": ["q"], "modules_to_save": ["lm_head", "embed_tokens"]},
}
FIELD = "scale_decoder_outputs"
"""A field that transformers 5 writes for the T5 family; published configs lack the field."""


def trained(
    kind: str, folder: Path, *, keeps_field: bool = False, dtype: str = "float32", **wanted: Any
) -> Any:
    """Write a base, and an adapter with random vectors; return the logits of PEFT."""
    config, fields, targets = KINDS[kind]
    torch.manual_seed(0)
    model = of_transformers(kind)(of_transformers(config)(**fields))
    model.to(getattr(torch, dtype)).save_pretrained(folder / "base")
    path = folder / "base" / "config.json"
    document = json.loads(path.read_bytes())
    if not keeps_field:
        document.pop(FIELD, None)
    path.write_text(json.dumps(document))
    peft_config = peft.VeraConfig(**{"r": 4, "target_modules": targets, **wanted})
    adapted = randomized(peft.get_peft_model(model, peft_config)).to(getattr(torch, dtype))
    adapted.save_pretrained(folder / "adapter")
    return logits(adapted)


def untied(kind: str, folder: Path) -> Any:
    """Merge with ``--tied untie`` and verify; return the model that transformers loads."""
    merge(folder / "adapter", folder / "out", base=folder / "base", options=UNTIE)
    checked = verify(
        folder / "adapter",
        merged=folder / "out",
        base=folder / "base",
        options=VerifyOptions(tied=Tied.UNTIE, layers_only=True),
    )
    assert checked.passed, [str(each) for each in checked.findings]
    model, told = of_transformers(kind).from_pretrained(folder / "out", output_loading_info=True)
    assert (told["missing_keys"], told["unexpected_keys"]) == (set(), set())
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_an_untied_model_computes_what_peft_computes(kind: str, tmp_path: Path) -> None:
    wanted = trained(kind, tmp_path)
    torch.testing.assert_close(logits(untied(kind, tmp_path)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "T5" in kind or "Switch" in kind])
@pytest.mark.parametrize("changed", CHANGED)
def test_no_release_scales_the_output_of_an_untied_model(
    kind: str, changed: str, tmp_path: Path
) -> None:
    """transformers 4 reads the field of the tie alone, and never scales if the field is false."""
    wanted = trained(kind, tmp_path, keeps_field=True, **CHANGED[changed])
    model = untied(kind, tmp_path)
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert (config["tie_word_embeddings"], config.get(FIELD, False)) == (False, False)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "dtype", "changed"),
    [
        ("T5ForConditionalGeneration", "bfloat16", CHANGED["a head"]),
        ("T5ForConditionalGeneration", "float32", CHANGED["a head"]),
        (
            "SwitchTransformersForConditionalGeneration",
            "bfloat16",
            {"target_modules": ["q", "lm_head"]},
        ),
    ],
)
def test_a_run_of_the_model_expects_the_scaled_and_rounded_head(
    kind: str,
    dtype: str,
    changed: Mapping[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 24 columns the scale is no power of 2, so the multiplication rounds.

    transformers also rounds a head that an adapter stores wider than the base.
    """
    config, fields, targets = KINDS[kind]
    monkeypatch.setitem(KINDS, kind, (config, {**fields, "d_model": 24}, targets))
    trained(kind, tmp_path, dtype=dtype, **changed)
    of_transformers(kind).from_pretrained(tmp_path / "base").bfloat16().save_pretrained(
        tmp_path / "base"
    )
    merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base", options=UNTIE)
    checked = verify(tmp_path / "adapter", merged=tmp_path / "out", base=tmp_path / "base")
    assert checked.passed, [str(each) for each in checked.findings]


def test_a_head_of_the_adapter_s_own_is_untied_with_the_stacks(tmp_path: Path) -> None:
    kind = "BartForConditionalGeneration"
    wanted = trained(kind, tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base", options=UNTIE)
    model = of_transformers(kind).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)


def test_udop_cannot_be_untied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = of_transformers("UdopForConditionalGeneration")(of_transformers("UdopConfig")(**T5))
    model.save_pretrained(tmp_path / "base")
    config = peft.VeraConfig(r=4, target_modules=["q", "lm_head"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UsageError, match=r"output of UDOP.*--tied add"):
        merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base", options=UNTIE)
    add = MergeOptions(tied=Tied.ADD)
    assert merge(
        tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base", options=add
    ).written
