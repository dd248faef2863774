"""Models with an untied head: the merged model gives PEFT's outputs.

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
from smallmodels import BART, FSMT, LLM, T5, TINY
from theirwarnings import OF_PEFT
from trainedmodels import logits, randomized

from vera_convert import MergeOptions, UsageError, Verification, VerifyOptions, merge, verify
from vera_convert.merging.options import Tied

pytestmark = [OF_PEFT, pytest.mark.usefixtures("models_here")]

if not has("transformers", "5.0"):
    pytest.skip("needs transformers 5.0, which ties encoders by a field", allow_module_level=True)

WORDS: Mapping[str, Any] = {**TINY, "vocab_size": 40, "pad_token_id": 1}
SIGHT: Mapping[str, Any] = {**TINY, "image_size": 16, "patch_size": 8}
STACK: Mapping[str, Any] = {**LLM, "pad_token_id": 1, "layer_types": ["full_attention"] * 2}
T5GEMMA2: Mapping[str, Any] = {
    "encoder": {"text_config": STACK, "vision_config": SIGHT},
    "decoder": STACK,
    "image_token_index": 39,
    "eoi_token_index": 38,
}
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
    "T5Gemma2ForConditionalGeneration": ("T5Gemma2Config", T5GEMMA2, ["q_proj", "out_proj"]),
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
def test_an_untied_model_gives_peft_s_outputs(kind: str, tmp_path: Path) -> None:
    wanted = trained(kind, tmp_path)
    torch.testing.assert_close(logits(untied(kind, tmp_path)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tables", [["encoder.text_model.embed_tokens"], ["embed_tokens"]])
def test_a_stack_keeps_the_embedding_that_peft_did_not_train(
    tables: list[str], tmp_path: Path
) -> None:
    wanted = trained("T5Gemma2ForConditionalGeneration", tmp_path, modules_to_save=tables)
    model = untied("T5Gemma2ForConditionalGeneration", tmp_path)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][2][0] == "q"])
@pytest.mark.parametrize("changed", CHANGED)
def test_no_release_scales_the_output_of_an_untied_model(
    kind: str, changed: str, tmp_path: Path
) -> None:
    """transformers 4 reads only the field of the tie, and never scales if the field is false."""
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

    transformers also rounds a head that an adapter stores in a wider dtype than the base's.
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


def test_a_head_that_the_adapter_stores_is_untied_with_the_stacks(tmp_path: Path) -> None:
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


# --- merged by PEFT, saved by transformers --------------------------------------------------------

SAVED_ONCE = ["T5ForConditionalGeneration", "UMT5ForConditionalGeneration"]
HEAD: Mapping[str, Any] = {"target_modules": ["q"], "modules_to_save": ["lm_head"]}


def merged_by_peft(kind: str, folder: Path, **changes: object) -> Verification:
    """Merge in PEFT, save with transformers, change the config, and verify."""
    model = of_transformers(kind).from_pretrained(folder / "base")
    adapted = peft.PeftModel.from_pretrained(model, folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "out")
    path = folder / "out" / "config.json"
    document = {**json.loads(path.read_bytes()), **changes}
    path.write_text(json.dumps({name: x for name, x in document.items() if x is not None}))
    options = VerifyOptions(tied=Tied.UNTIE, layers_only=True)
    out, base = folder / "out", folder / "base"
    return verify(folder / "adapter", merged=out, base=base, options=options)


@pytest.mark.parametrize("keeps_field", [True, False])
@pytest.mark.parametrize("kind", SAVED_ONCE)
def test_a_head_that_peft_merged_may_leave_the_scale_in_the_config(
    kind: str, keeps_field: bool, tmp_path: Path
) -> None:
    """transformers 5 stores the embedding once, and reads the scale from a separate field."""
    wanted = trained(kind, tmp_path, keeps_field=keeps_field, **HEAD)
    checked = merged_by_peft(kind, tmp_path)
    assert checked.passed, [str(each) for each in checked.findings]
    by_release = {"V582"} if kind.startswith("UMT5") else set[str]()
    assert {each.code for each in checked.findings} == {"V608", "V632"} | by_release
    model = of_transformers(kind).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{FIELD: False}, {FIELD: None}, {"d_kv": 4}])
def test_a_scale_that_does_not_fit_the_head_is_an_error(
    changes: dict[str, object], tmp_path: Path
) -> None:
    kind = "T5ForConditionalGeneration"
    trained(kind, tmp_path, **HEAD)
    checked = merged_by_peft(kind, tmp_path, tie_word_embeddings=False, **changes)
    expected = {"V615"} if "d_kv" in changes else {"V602"}
    assert {each.code for each in checked.findings if each.severity == "error"} == expected


def test_a_base_without_the_field_shows_that_a_scale_is_wrong(tmp_path: Path) -> None:
    """An untied T5 1.1, whose published config lacks the field, is not scaled."""
    kind = "T5ForConditionalGeneration"
    trained(kind, tmp_path, target_modules=["q"])
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "tie_word_embeddings": False}))
    right = merged_by_peft(kind, tmp_path)
    assert right.passed, [str(each) for each in right.findings]
    wrong = merged_by_peft(kind, tmp_path, **{FIELD: True})
    assert {each.code for each in wrong.findings if each.severity == "error"} == {"V615"}


def test_only_transformers_5_reads_a_head_that_differs_from_the_embedding(tmp_path: Path) -> None:
    """Earlier releases of transformers 5 save an untied T5 with `tie_word_embeddings` true."""
    kind = "T5ForConditionalGeneration"
    trained(kind, tmp_path, **HEAD)
    checked = merged_by_peft(kind, tmp_path, tie_word_embeddings=True)
    assert checked.passed, [str(each) for each in checked.findings]
    warned = [each for each in checked.findings if each.code == "V632"]
    assert [each.reason.split(",")[0] for each in warned] == [
        "transformers 4 ties lm_head.weight to the embedding"
    ]


def test_a_run_expects_the_head_as_peft_rounds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 24 columns the scale is no power of 2, so a scaled head rounds differently."""
    kind = "T5ForConditionalGeneration"
    config, fields, targets = KINDS[kind]
    monkeypatch.setitem(KINDS, kind, (config, {**fields, "d_model": 24}, targets))
    trained(kind, tmp_path, dtype="bfloat16", **HEAD)
    assert merged_by_peft(kind, tmp_path).passed
    options = VerifyOptions(tied=Tied.UNTIE)
    out, base = tmp_path / "out", tmp_path / "base"
    checked = verify(tmp_path / "adapter", merged=out, base=base, options=options)
    assert checked.passed, [str(each) for each in checked.findings]


def test_a_base_that_only_transformers_4_scales_is_named(tmp_path: Path) -> None:
    kind = "MT5ForConditionalGeneration"
    model = of_transformers(kind)(of_transformers("MT5Config")(**T5))
    model.save_pretrained(tmp_path / "base")
    config = peft.VeraConfig(r=4, **HEAD)
    randomized(peft.get_peft_model(model, config)).save_pretrained(tmp_path / "adapter")
    merged = merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base", options=UNTIE)
    assert [each.code for each in merged.findings] == ["V582"]
