"""Merge real models with the installed PEFT and with this package, and compare every tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import theirwarnings
from merges import Tensors, assert_same, merged_with, tensors_of
from releases import has, needs
from smallmodels import TINY
from trainedmodels import HEADS, KINDS, TARGETS, loaded, saved, trained

from vera_convert.merging.options import Tied

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = theirwarnings.OF_PEFT

MAMBA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "vocab_size": 40,
    "state_size": 8,
    "num_heads": 8,
    "head_dim": 8,
    "n_groups": 1,
    "chunk_size": 8,
    "tie_word_embeddings": False,
}
"""The default of Mamba 2's `time_step_limit` ends at infinity."""


def by_peft(name: str, base: Path, adapter: Path, folder: Path) -> Tensors:
    model = peft.PeftModel.from_pretrained(loaded(name, base), adapter)
    if name == "RobertaForSequenceClassification":
        return with_its_head(model)  # PEFT cannot unload a head that has more than one layer
    model.merge_and_unload().save_pretrained(folder)
    return tensors_of(folder)


def with_its_head(model: Any) -> Tensors:
    model.merge_adapter()
    merged = model.base_model.model.state_dict()
    return {
        key.replace(".base_layer", "").replace(".modules_to_save.default", ""): value.numpy()
        for key, value in merged.items()
        if "vera_" not in key and "original_module" not in key
    }


CASES = [
    *((name, "float32", True) for name in KINDS),
    ("LlamaForCausalLM", "bfloat16", True),
    ("LlamaForCausalLM", "bfloat16", False),
    ("GPT2LMHeadModel", "float16", False),
    ("LlavaForConditionalGeneration", "bfloat16", False),
]


def assert_same_logits(
    name: str, base: Path, adapter: Path, ours: Path, logits: str = "logits"
) -> None:
    """Check that our merge gives the logits of PEFT's adapter, and that the base's logits
    differ.
    """
    tokens = {"input_ids": torch.tensor([[3, 5, 8, 13, 21]])}
    if name.startswith("T5"):
        tokens["decoder_input_ids"] = tokens["input_ids"]
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(loaded(name, base), adapter).eval()(**tokens)
        merged = loaded(name, ours).eval()(**tokens)
        plain = loaded(name, base).eval()(**tokens)
    assert (merged[logits] - adapted[logits]).abs().max() < 1e-5
    assert (plain[logits] - adapted[logits]).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "dtype", "stored"), CASES)
def test_a_merge_equals_peft_s_merge(name: str, dtype: str, stored: bool, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", name, dtype)
    targets = TARGETS.get(name, "all-linear")
    adapter = trained(tmp_path / "adapter", base, name, targets=targets, stored=stored)
    expected = by_peft(name, base, adapter, tmp_path / "theirs")
    done = merged_with(adapter, base, tmp_path / "ours")
    found = tensors_of(tmp_path / "ours")
    assert_same(found, expected, within=3e-7 if dtype == "float32" else 0)
    changed = {n for n, tensor in tensors_of(base).items() if not np.array_equal(tensor, found[n])}
    assert changed == {each.name for each in done.tensors}
    assert len(changed) >= 3


@pytest.mark.parametrize("number", ['{"__float__": "Infinity"}', "Infinity", "1e400"])
def test_a_model_with_an_infinite_number_in_its_config_merges_as_by_peft(
    number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "Mamba2ForCausalLM"
    monkeypatch.setitem(KINDS, name, ("Mamba2Config", MAMBA))
    base = saved(tmp_path / "base", name, "float32")
    config = base / "config.json"
    tagged = json.dumps({"__float__": "Infinity"}, indent=2).replace("\n", "\n    ")
    written = tagged if has("transformers", "5.0") else "Infinity"
    assert written in config.read_text()
    config.write_text(config.read_text().replace(written, number))
    adapter = trained(tmp_path / "adapter", base, name, targets=["in_proj"], stored=True)
    document = json.loads((adapter / "adapter_config.json").read_bytes())
    document |= {"d_initial": float("-inf"), "vera_dropout": float("nan")}
    (adapter / "adapter_config.json").write_text(json.dumps(document))
    expected = by_peft(name, base, adapter, tmp_path / "theirs")
    merged_with(adapter, base, tmp_path / "ours")
    assert_same(tensors_of(tmp_path / "ours"), expected)
    assert (tmp_path / "ours/config.json").read_bytes() == config.read_bytes()
    if "__float__" in number and not has("transformers", "5.0"):
        return  # the spelling of transformers 5
    limit = loaded(name, tmp_path / "ours").config.time_step_limit
    assert tuple(limit) == (0.0, float("inf"))


@pytest.mark.parametrize("bias", ["all", "vera_only"])
@pytest.mark.parametrize(
    ("name", "copy"),
    [
        ("BertForSequenceClassification", "original_module.bias"),
        ("RobertaForSequenceClassification", "modules_to_save.default.dense.bias"),
    ],
)
def test_trained_biases_are_merged_as_by_peft(
    name: str, copy: str, bias: str, tmp_path: Path
) -> None:
    """With bias "all", PEFT stores a saved head's bias three times, and reads one of the copies."""
    base = saved(tmp_path / "base", name, "float32")
    adapter = trained(tmp_path / "adapter", base, name, targets=["query"], stored=True, bias=bias)
    stored = tensors_of(adapter)
    assert (f"base_model.model.classifier.{copy}" in stored) == (bias == "all")
    expected = by_peft(name, base, adapter, tmp_path / "theirs")
    merged_with(adapter, base, tmp_path / "ours")
    assert_same(tensors_of(tmp_path / "ours"), expected, within=3e-7)


@pytest.mark.parametrize(
    ("name", "config", "twin"),
    [
        ("BertForMaskedLM", "BertConfig", "cls.predictions.decoder.bias"),
        ("BertForPreTraining", "BertConfig", "cls.predictions.decoder.bias"),
        ("RobertaForMaskedLM", "RobertaConfig", "lm_head.decoder.bias"),
        ("AlbertForMaskedLM", "AlbertConfig", "predictions.decoder.bias"),
    ],
)
def test_a_head_whose_bias_has_two_names_gives_the_logits_of_the_adapter(
    name: str, config: str, twin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, name, (config, {**TINY, "vocab_size": 40}))
    base = saved(tmp_path / "base", name, "float32")
    adapter = trained(tmp_path / "adapter", base, name, targets=["query"], stored=True, bias="all")
    assert f"base_model.model.{twin}" in tensors_of(adapter)
    assert twin not in tensors_of(base)
    expected = by_peft(name, base, adapter, tmp_path / "theirs")
    merged_with(adapter, base, tmp_path / "ours")
    assert_same(tensors_of(tmp_path / "ours"), expected, within=3e-7)
    logits = "prediction_logits" if name == "BertForPreTraining" else "logits"
    assert_same_logits(name, base, adapter, tmp_path / "ours", logits)


def test_a_tied_head_is_added_as_peft_adds_it(tmp_path: Path) -> None:
    name = "GPT2LMHeadModel"
    base = saved(tmp_path / "base", name, "float32")
    targets = ["c_attn", "lm_head"]
    adapter = trained(tmp_path / "adapter", base, name, targets=targets, stored=True)
    expected = by_peft(name, base, adapter, tmp_path / "theirs")
    merged_with(adapter, base, tmp_path / "ours", tied=Tied.ADD)
    assert_same(tensors_of(tmp_path / "ours"), expected)


def test_an_untied_head_gives_the_logits_of_the_adapter(tmp_path: Path) -> None:
    name = "GPT2LMHeadModel"
    base = saved(tmp_path / "base", name, "float32")
    targets = ["c_attn", "lm_head"]
    adapter = trained(tmp_path / "adapter", base, name, targets=targets, stored=True)
    merged_with(adapter, base, tmp_path / "ours", tied=Tied.UNTIE)
    assert_same_logits(name, base, adapter, tmp_path / "ours")


@pytest.mark.parametrize(
    ("name", "target", "saved_module"),
    [
        ("GPT2LMHeadModel", "c_attn", "wte"),
        ("Gemma3ForConditionalGeneration", "q_proj", "embed_tokens"),
        ("T5ForConditionalGeneration", "q", "shared"),
    ],
)
def test_an_embedding_saved_without_its_tied_head_gives_the_logits_of_the_adapter(
    name: str, target: str, saved_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT trains a copy of the embedding; T5's encoder and decoder do not read `shared`."""
    base = saved(tmp_path / "base", name, "float32")
    monkeypatch.setitem(HEADS, name, [saved_module])
    adapter = trained(tmp_path / "adapter", base, name, targets=[target], stored=True)
    merged_with(adapter, base, tmp_path / "ours", tied=Tied.UNTIE)
    assert_same_logits(name, base, adapter, tmp_path / "ours")


@pytest.mark.parametrize("saved_module", [None, "wte"])
def test_a_resized_tied_head_gives_the_logits_of_the_adapter(
    saved_module: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT stores the weight of the resized head, and loads the weight into head and embedding."""
    name = "GPT2LMHeadModel"
    base = saved(tmp_path / "base", name, "float32")
    model = loaded(name, base)
    model.resize_token_embeddings(44)
    resized = tmp_path / "resized"
    model.save_pretrained(resized)
    monkeypatch.setitem(HEADS, name, [saved_module] if saved_module else None)
    targets = ["c_attn", "lm_head"]
    adapter = trained(tmp_path / "adapter", resized, name, targets=targets, stored=True)
    choice = Tied.UNTIE if saved_module else Tied.ADD
    done = merged_with(adapter, base, tmp_path / "ours", tied=choice)
    tokens = {"input_ids": torch.tensor([[3, 5, 8, 13, 42]])}
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(loaded(name, resized), adapter).eval()
        if choice is Tied.ADD:
            adapted = adapted.merge_and_unload()
        theirs = adapted(**tokens)
        ours = loaded(name, tmp_path / "ours").eval()(**tokens)
    assert ours.logits.shape[-1] == 44
    assert (ours.logits - theirs.logits).abs().max() < 1e-5
    assert "lm_head.weight" in {each.name for each in done.tensors} or saved_module is None


@needs("transformers", "5.0", "earlier releases do not fuse experts")
def test_experts_from_before_transformers_5_are_merged_although_peft_cannot_load_them(
    tmp_path: Path,
) -> None:
    """The files still hold each expert separately, under the names in old adapters."""
    from adapters import good_adapter, good_tensors

    base = saved(tmp_path / "base", "MixtralForCausalLM", "float32")
    module = "model.layers.1.block_sparse_moe.experts.1.w2"
    stored = tensors_of(base)[f"{module}.weight"]
    values = np.random.default_rng(0)
    tensors: dict[str, Any] = dict.fromkeys(good_tensors())
    for key, shape in {
        f"base_model.model.{module}.vera_lambda_b": stored.shape[:1],
        f"base_model.model.{module}.vera_lambda_d": (4,),
        "base_model.vera_A": (4, stored.shape[1]),
        "base_model.vera_B": (stored.shape[0], 4),
    }.items():
        tensors[key] = values.normal(size=shape).astype(np.float32)
    adapter = good_adapter(tmp_path / "adapter", tensors=tensors, target_modules=["w2"])
    done = merged_with(adapter, base, tmp_path / "ours")
    assert [each.name for each in done.tensors] == [f"{module}.weight"]
    ours = loaded("MixtralForCausalLM", tmp_path / "ours")
    fused = ours.model.layers[1].mlp.experts.down_proj[1].detach().numpy()
    assert np.array_equal(fused, tensors_of(tmp_path / "ours")[f"{module}.weight"])
    assert not np.array_equal(fused, stored)


@needs("transformers", "5.0", "earlier releases do not fuse experts")
def test_fully_trained_experts_give_the_logits_of_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT saves the fused experts, and cannot unload a module with more than one layer."""
    name = "MixtralForCausalLM"
    base = saved(tmp_path / "base", name, "float32")
    monkeypatch.setitem(HEADS, name, ["mlp"])
    adapter = trained(tmp_path / "adapter", base, name, targets=["q_proj"], stored=True)
    merged_with(adapter, base, tmp_path / "ours")
    assert_same_logits(name, base, adapter, tmp_path / "ours")


def test_the_trained_adapter_merged_into_its_base_gives_the_adapter_s_logits(
    minilm: Path, minilm_model: Path, tmp_path: Path
) -> None:
    adapter = minilm / "save_projection_false"
    merged_with(adapter, minilm_model, tmp_path / "out")
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    note = json.loads((minilm / "note.json").read_bytes())
    head = np.load(minilm / "head.npz")
    batch = tokenizer(
        note["probe_texts"], padding=True, truncation=True, max_length=48, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
    logits = pooled @ head["weight"].T + head["bias"]
    assert np.abs(logits - np.array(note["probe_logits"])).max() < 1e-4
