"""Tensors of an adapter that replace a base's tensors, refused replacements, and tied heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapters import good_adapter, good_tensors
from folders import refusal
from heads import HEAD, PREFIX, TIED, head, on_the_head
from merges import (
    INDEX,
    assert_same,
    exact_change,
    expected_tensors,
    filled_base,
    merged_with,
    tensors_of,
)
from safetensors.numpy import load_file, save_file

from vera_convert.errors import CheckpointError, UsageError
from vera_convert.merging.adapters import AdapterSpec
from vera_convert.merging.options import Tied
from vera_convert.rules import Severity
from vera_convert.validation.validate import validate
from vera_convert.verification.options import VerifyOptions
from vera_convert.verification.verify import verify

Q = "model.layers.0.self_attn.q_proj"


# --- replaced tensors ----------------------------------------------------------------------------


def test_an_adapter_s_head_replaces_the_base_s_head(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "a", tensors=head(0.3), modules_to_save=["score"])
    base = filled_base(tmp_path / "base", tensors=HEAD, dtypes={"score": "bfloat16"})
    done = merged_with(adapter, base, tmp_path / "out", weight=5.0)
    found = tensors_of(tmp_path / "out")["score.weight"]
    assert found.dtype == ml_dtypes.bfloat16, "the base's dtype is kept"
    assert np.array_equal(found, np.full((3, 16), 0.3).astype(ml_dtypes.bfloat16))
    assert {each.kind for each in done.tensors} == {"added", "replaced"}


def test_a_new_head_is_added(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "a", tensors=head(0.3), modules_to_save=["score"])
    base = filled_base(tmp_path / "base", shards=3)
    done = merged_with(adapter, base, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert np.array_equal(found.pop("score.weight"), np.full((3, 16), 0.3, np.float32))
    assert_same(found, expected_tensors({adapter: 1.0}, base))
    codes = [finding.code for finding in done.findings]
    assert codes == ["V533", "V574"], "of no known class, and every value is 0.3"
    index = json.loads((tmp_path / "out" / INDEX).read_bytes())
    assert index["weight_map"]["score.weight"] == "model-00003-of-00003.safetensors"
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in found.values()) + 3 * 16 * 4


def test_a_new_tensor_that_the_class_does_not_have_is_a_warning(tmp_path: Path) -> None:
    library = "transformers.models.llama.modeling_llama"
    adapter = good_adapter(
        tmp_path / "a",
        tensors=head(0.3),
        modules_to_save=["score"],
        task_type=None,
        auto_mapping={"base_model_class": "LlamaForCausalLM", "parent_library": library},
    )
    base = filled_base(tmp_path / "base", config={"architectures": ["LlamaForCausalLM"]})
    done = merged_with(adapter, base, tmp_path / "out")
    (finding,) = (each for each in done.findings if each.code == "V533")
    assert finding.tensor == "score.weight"


def test_a_head_that_is_stored_in_part_is_refused(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "a", tensors=head(0.3), modules_to_save=["score"])
    base = filled_base(tmp_path / "base", tensors={**HEAD, "score.bias": (3,)})
    with pytest.raises(CheckpointError, match=r"V222 score\.bias: the base has it"):
        merged_with(adapter, base, tmp_path / "out")
    found = validate(adapter, base=base).findings
    assert "V222" in {finding.code for finding in found}


def test_a_bias_that_peft_would_drop_is_refused(tmp_path: Path) -> None:
    """PEFT reads the biases of adapted layers only under ``base_layer``."""
    bias = {f"{PREFIX}{Q}.bias": np.ones(16, np.float32)}
    adapter = good_adapter(tmp_path / "a", tensors=bias, bias="vera_only")
    base = filled_base(tmp_path / "base", tensors={f"{Q}.bias": (16,)})
    assert refusal(lambda: merged_with(adapter, base, tmp_path / "out")) == "V220"


def test_a_head_of_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "a", tensors=head(0.3, rows=4), modules_to_save=["score"])
    base = filled_base(tmp_path / "base", tensors=HEAD)
    with pytest.raises(CheckpointError, match=r"V531 score\.weight: .*4 by 16.*3 by 16"):
        merged_with(adapter, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_embedding_of_another_height_is_refused_with_both_heights(
    tmp_path: Path, base: Path
) -> None:
    taller = {f"{PREFIX}model.embed_tokens.weight": np.zeros((38, 16), np.float32)}
    adapter = good_adapter(tmp_path / "a", tensors=taller)
    with pytest.raises(CheckpointError, match=r"V531 .*38 by 16.*32 by 16"):
        merged_with(adapter, base, tmp_path / "out")


def test_trained_biases_replace_the_base_s_biases(tmp_path: Path) -> None:
    biases = {
        f"{PREFIX}{Q}.base_layer.bias": np.full(16, 2, np.float32),
        f"{PREFIX}model.norm.bias": np.full(16, 3, np.float32),
    }
    adapter = good_adapter(tmp_path / "a", tensors=biases, bias="all")
    shapes = {f"{Q}.bias": (16,), "model.norm.bias": (16,)}
    base = filled_base(tmp_path / "base", tensors=shapes)
    merged_with(adapter, base, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert np.array_equal(found[f"{Q}.bias"], np.full(16, 2, np.float32))
    assert np.array_equal(found["model.norm.bias"], np.full(16, 3, np.float32))


def test_a_bias_that_the_base_does_not_have_is_refused(tmp_path: Path, base: Path) -> None:
    biases = {f"{PREFIX}{Q}.base_layer.bias": np.full(16, 2, np.float32)}
    adapter = good_adapter(tmp_path / "a", tensors=biases, bias="all")
    assert refusal(lambda: merged_with(adapter, base, tmp_path / "out")) == "V532"


BIAS_NAMES = ("bias", "decoder.bias")


@pytest.mark.parametrize("head", ["cls.predictions", "lm_head", "predictions", "mmm_text_head"])
@pytest.mark.parametrize("in_base", BIAS_NAMES)
@pytest.mark.parametrize("in_adapter", [BIAS_NAMES, ("bias",), ("decoder.bias",)])
def test_the_bias_of_a_head_has_two_names(
    head: str, in_base: str, in_adapter: tuple[str, ...], tmp_path: Path
) -> None:
    biases = {f"{PREFIX}{head}.{name}": np.full(16, 2, np.float32) for name in in_adapter}
    adapter = good_adapter(tmp_path / "a", tensors=biases, bias="all")
    base = filled_base(tmp_path / "base", tensors={f"{head}.{in_base}": (16,)})
    merged_with(adapter, base, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert np.array_equal(found[f"{head}.{in_base}"], np.full(16, 2, np.float32))
    assert found.keys() == tensors_of(base).keys()
    assert validate(adapter, base=base).passed


def two_biases(folder: Path) -> Path:
    """Write an adapter whose head stores a different bias under each name of the bias."""
    biases = {
        f"{PREFIX}lm_head.{name}": np.full(16, value, np.float32)
        for value, name in enumerate(BIAS_NAMES, start=2)
    }
    return good_adapter(folder, tensors=biases, bias="all")


def test_two_values_for_a_head_s_single_bias_are_refused(tmp_path: Path) -> None:
    adapter = two_biases(tmp_path / "a")
    base = filled_base(tmp_path / "base", tensors={"lm_head.bias": (16,)})
    assert refusal(lambda: merged_with(adapter, base, tmp_path / "out")) == "V525"
    assert "V525" in {found.code for found in validate(adapter, base=base).findings}


def test_a_head_with_two_biases_in_the_base_gets_both(tmp_path: Path) -> None:
    adapter = two_biases(tmp_path / "a")
    names = [f"lm_head.{name}" for name in BIAS_NAMES]
    base = filled_base(tmp_path / "base", tensors=dict.fromkeys(names, (16,)))
    merged_with(adapter, base, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert [found[name][0] for name in names] == [2, 3]


@pytest.mark.parametrize(("other", "code"), [(0.3, None), (0.4, "V534")])
def test_two_adapters_may_bring_the_same_head_only(
    tmp_path: Path, other: float, code: str | None
) -> None:
    first, second = (
        good_adapter(tmp_path / name, tensors=head(value), modules_to_save=["score"])
        for name, value in (("a", 0.3), ("b", other))
    )
    base = filled_base(tmp_path / "base", tensors=HEAD)

    def act() -> None:
        merged_with(first, base, tmp_path / "out", add=(AdapterSpec(second),))

    if code is None:
        act()
        assert (tensors_of(tmp_path / "out")["score.weight"] == np.float32(0.3)).all()
    else:
        assert refusal(act) == code


def test_a_layer_that_another_adapter_replaces_is_refused(tmp_path: Path, base: Path) -> None:
    first = good_adapter(tmp_path / "a")
    whole = {f"{PREFIX}{Q}.weight": np.zeros((16, 16), np.float32)}
    second = good_adapter(
        tmp_path / "b",
        tensors={**{name: None for name in good_tensors() if Q in name}, **whole},
        modules_to_save=["layers.0.self_attn.q_proj"],
    )
    add = (AdapterSpec(second),)
    assert refusal(lambda: merged_with(first, base, tmp_path / "out", add=add)) == "V534"


EXPERTS = {f"model.layers.0.mlp.experts.{number}.up_proj.weight": (4, 16) for number in range(2)}
STACK = f"{PREFIX}model.layers.0.mlp.experts.up_proj"


def test_a_stack_of_experts_replaces_each_expert(tmp_path: Path) -> None:
    stack = np.random.default_rng(3).normal(size=(2, 4, 16)).astype(np.float32)
    adapter = good_adapter(tmp_path / "a", tensors={STACK: stack}, modules_to_save=["experts"])
    base = filled_base(tmp_path / "base", tensors=EXPERTS)
    merged_with(adapter, base, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert all(
        np.array_equal(found[name], values) for name, values in zip(EXPERTS, stack, strict=True)
    )
    assert found.keys() == tensors_of(base).keys()
    assert validate(adapter, base=base).passed


def test_a_stack_of_experts_that_the_base_stores_in_another_layout_is_refused(
    tmp_path: Path,
) -> None:
    stack = {STACK: np.ones((3, 4, 16), np.float32)}
    adapter = good_adapter(tmp_path / "a", tensors=stack, modules_to_save=["experts"])
    base = filled_base(tmp_path / "base", tensors=EXPERTS)
    with pytest.raises(CheckpointError, match=r"V532 .*in another form"):
        merged_with(adapter, base, tmp_path / "out")


# --- tied heads ----------------------------------------------------------------------------------


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return filled_base(tmp_path / "tied", tensors={"lm_head.weight": None}, config=TIED, shards=2)


def test_a_tied_head_is_refused(tmp_path: Path, tied: Path) -> None:
    adapter = on_the_head(tmp_path / "a")
    assert refusal(lambda: merged_with(adapter, tied, tmp_path / "out")) == "V524"
    assert not (tmp_path / "out").exists()


def head_of(adapter: Path, tied: Path) -> Any:
    stored = tensors_of(tied)["model.embed_tokens.weight"]
    return stored + exact_change(adapter, "lm_head", 16)


def test_a_tied_head_is_added_to_the_embedding(tmp_path: Path, tied: Path) -> None:
    adapter = on_the_head(tmp_path / "a")
    merged_with(adapter, tied, tmp_path / "out", tied=Tied.ADD)
    found = tensors_of(tmp_path / "out")
    assert "lm_head.weight" not in found
    assert np.allclose(found["model.embed_tokens.weight"], head_of(adapter, tied), atol=1e-6)
    assert (tmp_path / "out" / INDEX).read_bytes() == (tied / INDEX).read_bytes()
    assert (tmp_path / "out/config.json").read_bytes() == (tied / "config.json").read_bytes()


def test_a_tied_head_is_untied(tmp_path: Path, tied: Path) -> None:
    adapter = on_the_head(tmp_path / "a")
    merged_with(adapter, tied, tmp_path / "out", tied=Tied.UNTIE)
    found = tensors_of(tmp_path / "out")
    assert np.allclose(found.pop("lm_head.weight"), head_of(adapter, tied), atol=1e-6)
    assert_same(found, expected_tensors({adapter: 1.0}, tied))
    text, field = (tied / "config.json").read_text(), '"tie_word_embeddings": '
    text = text.replace(f"{field}true", f"{field}false")
    # transformers 4 ties Gemma 3 by the field of `text_config`, which is true by default.
    text = text.replace('"text_config": {"x": 1', f'"text_config": {{"x": 1,{field}false')
    assert (tmp_path / "out/config.json").read_text() == text
    weight_map = json.loads((tmp_path / "out" / INDEX).read_bytes())["weight_map"]
    assert weight_map["lm_head.weight"] == weight_map["model.embed_tokens.weight"]


def test_a_stored_head_is_tied_to_its_embedding(tmp_path: Path) -> None:
    adapter = on_the_head(tmp_path / "a")
    base = filled_base(tmp_path / "base", config=TIED)
    assert refusal(lambda: merged_with(adapter, base, tmp_path / "out")) == "V524"
    merged_with(adapter, base, tmp_path / "untied", tied=Tied.UNTIE)
    assert_same(
        tensors_of(tmp_path / "untied"), expected_tensors({adapter: 1.0}, base), within=1e-6
    )
    merged_with(adapter, base, tmp_path / "added", tied=Tied.ADD)
    found = tensors_of(tmp_path / "added")
    assert np.allclose(found["model.embed_tokens.weight"], head_of(adapter, base), atol=1e-6)


@pytest.mark.parametrize("tied", [None, *Tied])
def test_a_head_with_other_values_than_the_embedding_is_not_tied(
    tmp_path: Path, tied: Tied | None
) -> None:
    adapter, base = on_the_head(tmp_path / "a"), filled_base(tmp_path / "base", config=TIED)
    path = base / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] * 2}, path)
    merged_with(adapter, base, tmp_path / "out", tied=tied)
    assert_same(tensors_of(tmp_path / "out"), expected_tensors({adapter: 1.0}, base), within=1e-6)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_bytes())["tie_word_embeddings"] is False
    )


@pytest.mark.parametrize("same", [True, False])
def test_the_head_s_own_base_weight_is_compared_and_not_merged(
    tmp_path: Path, tied: Path, same: bool
) -> None:
    own = tensors_of(tied)["model.embed_tokens.weight"] + np.float32(0 if same else 0.1)
    adapter = on_the_head(tmp_path / "a", **{f"{PREFIX}lm_head.base_layer.weight": own})

    def act() -> None:
        merged_with(adapter, tied, tmp_path / "out", tied=Tied.ADD)

    if same:
        act()
        found = tensors_of(tmp_path / "out")["model.embed_tokens.weight"]
        assert np.allclose(found, head_of(adapter, tied), atol=1e-6)
    else:
        assert refusal(act) == "V535"


def embeddings(value: float, head_value: float) -> dict[str, Any]:
    return {
        f"{PREFIX}model.embed_tokens.weight": np.full((32, 16), value, np.float32),
        f"{PREFIX}lm_head.weight": np.full((32, 16), head_value, np.float32),
    }


def test_an_embedding_saved_under_both_names_replaces_the_tied_tensor(
    tmp_path: Path, tied: Path
) -> None:
    adapter = good_adapter(tmp_path / "a", tensors=embeddings(1.0, 1.0))
    done = merged_with(adapter, tied, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert (found["model.embed_tokens.weight"] == 1).all()
    assert "lm_head.weight" not in found
    assert "V536" not in [finding.code for finding in done.findings], "the two were one in training"


def test_an_untied_merge_does_not_say_that_embedding_and_head_stay_tied(
    tmp_path: Path, tied: Path
) -> None:
    adapter = good_adapter(tmp_path / "a", tensors=embeddings(1.0, 2.0))
    done = merged_with(adapter, tied, tmp_path / "out", tied=Tied.UNTIE)
    found = tensors_of(tmp_path / "out")
    assert (found["model.embed_tokens.weight"] == 1).all()
    assert (found["lm_head.weight"] == 2).all()
    assert "V536" not in [finding.code for finding in done.findings]


def test_a_saved_head_that_differs_from_the_saved_embedding_must_be_untied(
    tmp_path: Path, tied: Path
) -> None:
    adapter = good_adapter(tmp_path / "a", tensors=embeddings(1.0, 2.0))
    assert refusal(lambda: merged_with(adapter, tied, tmp_path / "out")) == "V524"
    merged_with(adapter, tied, tmp_path / "out", tied=Tied.UNTIE)
    found = tensors_of(tmp_path / "out")
    assert (found["lm_head.weight"] == 2).all()
    assert json.loads((tmp_path / "out/config.json").read_bytes())["tie_word_embeddings"] is False


EMBEDDING = {f"{PREFIX}model.embed_tokens.weight": np.full((32, 16), 0.5, np.float32)}


@pytest.fixture
def trained_embedding(tmp_path: Path) -> Path:
    return good_adapter(tmp_path / "e", tensors=EMBEDDING, modules_to_save=["embed_tokens"])


def test_the_task_shows_that_a_base_without_a_head_was_trained_with_a_head(
    tmp_path: Path, trained_embedding: Path
) -> None:
    """For CAUSAL_LM, the task of the good adapter, PEFT accepts only classes with a head."""
    config = {**TIED, "architectures": ["LlamaModel"]}
    base = filled_base(tmp_path / "base", tensors={"lm_head.weight": None}, config=config)
    assert refusal(lambda: merged_with(trained_embedding, base, tmp_path / "out")) == "V524"
    merged_with(trained_embedding, base, tmp_path / "out", tied=Tied.UNTIE)
    assert "lm_head.weight" in tensors_of(tmp_path / "out")


def test_an_embedding_saved_without_its_tied_head_needs_a_choice(
    tmp_path: Path, tied: Path, trained_embedding: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"V524 lm_head\.weight: .*PEFT keeps the head"):
        merged_with(trained_embedding, tied, tmp_path / "out")


@pytest.mark.parametrize("beside", [False, True])
def test_an_untied_head_keeps_the_old_embedding(
    tmp_path: Path, tied: Path, trained_embedding: Path, *, beside: bool
) -> None:
    base = filled_base(tmp_path / "beside", config=TIED) if beside else tied
    done = merged_with(trained_embedding, base, tmp_path / "out", tied=Tied.UNTIE)
    found, stored = tensors_of(tmp_path / "out"), tensors_of(base)
    assert (found["model.embed_tokens.weight"] == 0.5).all()
    old = "lm_head.weight" if beside else "model.embed_tokens.weight"
    assert np.array_equal(found["lm_head.weight"], stored[old])
    assert json.loads((tmp_path / "out/config.json").read_bytes())["tie_word_embeddings"] is False
    assert "V536" not in [finding.code for finding in done.findings]


@pytest.mark.parametrize("beside", [False, True])
def test_an_embedding_that_also_replaces_the_tied_head_is_a_warning(
    tmp_path: Path, tied: Path, trained_embedding: Path, *, beside: bool
) -> None:
    base = filled_base(tmp_path / "beside", config=TIED) if beside else tied
    done = merged_with(trained_embedding, base, tmp_path / "out", tied=Tied.ADD)
    found = tensors_of(tmp_path / "out")
    assert (found.get("lm_head.weight", found["model.embed_tokens.weight"]) == 0.5).all()
    assert "V536" in [finding.code for finding in done.findings]


def test_an_embedding_that_peft_loads_in_place_changes_the_tied_head(
    tmp_path: Path, tied: Path
) -> None:
    """Without modules_to_save, PEFT loads the embedding into the tensor that the head shares."""
    adapter = good_adapter(tmp_path / "a", tensors=EMBEDDING)
    done = merged_with(adapter, tied, tmp_path / "out", tied=Tied.UNTIE)
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    assert "V536" not in [finding.code for finding in done.findings]


@pytest.mark.parametrize("name", ["LlamaModel", "LlamaForSequenceClassification"])
def test_a_class_without_an_output_head_has_no_head_to_untie(tmp_path: Path, name: str) -> None:
    adapter = good_adapter(
        tmp_path / "e",
        tensors=EMBEDDING,
        modules_to_save=["embed_tokens"],
        task_type="FEATURE_EXTRACTION",
    )
    config = {**TIED, "architectures": [name]}
    base = filled_base(tmp_path / "base", tensors={"lm_head.weight": None}, config=config)
    merged_with(adapter, base, tmp_path / "out")
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()


def test_the_head_of_a_class_with_its_own_code_cannot_be_named(
    tmp_path: Path, trained_embedding: Path
) -> None:
    config = {**TIED, "auto_map": {"AutoModel": "own.Own"}}
    base = filled_base(tmp_path / "base", tensors={"lm_head.weight": None}, config=config)
    with pytest.raises(UsageError, match=r"a class of its own.* Give --tied add"):
        merged_with(trained_embedding, base, tmp_path / "out", tied=Tied.UNTIE)


def test_a_taller_embedding_without_its_head_cannot_be_untied(tmp_path: Path) -> None:
    taller = {f"{PREFIX}model.embed_tokens.weight": np.full((38, 16), 0.5, np.float32)}
    adapter = good_adapter(tmp_path / "a", tensors=taller, modules_to_save=["embed_tokens"])
    config = {**TIED, "vocab_size": 32}
    base = filled_base(tmp_path / "base", tensors={"lm_head.weight": None}, config=config)
    with pytest.raises(CheckpointError, match=r"V531 .*no output head of the new size"):
        merged_with(adapter, base, tmp_path / "out", tied=Tied.UNTIE)


def test_a_saved_head_without_its_tied_embedding_must_be_untied(tmp_path: Path) -> None:
    own = {f"{PREFIX}lm_head.weight": np.full((32, 16), 2, np.float32)}
    adapter = good_adapter(tmp_path / "a", tensors=own, modules_to_save=["lm_head"])
    base = filled_base(tmp_path / "base", config=TIED)
    assert refusal(lambda: merged_with(adapter, base, tmp_path / "out")) == "V524"
    merged_with(adapter, base, tmp_path / "out", tied=Tied.UNTIE)
    assert (tensors_of(tmp_path / "out")["lm_head.weight"] == 2).all()
    assert json.loads((tmp_path / "out/config.json").read_bytes())["tie_word_embeddings"] is False


@pytest.mark.parametrize("beside", [False, True])
def test_a_head_that_also_replaces_the_tied_embedding_is_a_warning(
    tmp_path: Path, tied: Path, *, beside: bool
) -> None:
    own = {f"{PREFIX}lm_head.weight": np.full((32, 16), 2, np.float32)}
    adapter = good_adapter(tmp_path / "a", tensors=own, modules_to_save=["lm_head"])
    base = filled_base(tmp_path / "beside", config=TIED) if beside else tied
    done = merged_with(adapter, base, tmp_path / "out", tied=Tied.ADD)
    found = tensors_of(tmp_path / "out")
    assert (found["model.embed_tokens.weight"] == 2).all()
    assert found.keys() == tensors_of(base).keys()
    assert "V536" in [finding.code for finding in done.findings]


@pytest.mark.parametrize("tied_option", [None, Tied.ADD])
def test_a_saved_embedding_and_a_delta_on_the_head_must_be_untied(
    tmp_path: Path, tied: Path, tied_option: Tied | None
) -> None:
    adapter = on_the_head(tmp_path / "a", **EMBEDDING)
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    config |= {"modules_to_save": ["embed_tokens"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        merged_with(adapter, tied, tmp_path / "out", tied=tied_option)
    assert {finding.code for finding in error.value.findings} == {"V524"}
    merged_with(adapter, tied, tmp_path / "out", tied=Tied.UNTIE)
    found = tensors_of(tmp_path / "out")
    assert (found["model.embed_tokens.weight"] == 0.5).all()
    assert np.allclose(found["lm_head.weight"], head_of(adapter, tied), atol=1e-6)


# --- resized heads -------------------------------------------------------------------------------


def on_a_resized_head(folder: Path, base: Path, **more: Any) -> Path:
    """Write an adapter as PEFT does for a resized head: with the head's 36 rows."""
    old = tensors_of(base)["model.embed_tokens.weight"]
    copy = np.concatenate([old, np.full((4, 16), 0.7, np.float32)])
    values = np.random.default_rng(2)
    tensors = {
        f"{PREFIX}lm_head.base_layer.weight": copy,
        f"{PREFIX}lm_head.vera_lambda_b": values.normal(size=36).astype(np.float32),
        f"{PREFIX}lm_head.vera_lambda_d": values.normal(size=4).astype(np.float32),
        "base_model.vera_B": values.normal(size=(36, 4)).astype(np.float32),
    }
    targets = ["q_proj", "v_proj", "lm_head"]
    return good_adapter(folder, tensors=tensors | more, target_modules=targets)


@pytest.fixture
def sized_base(tmp_path: Path) -> Path:
    config = {**TIED, "vocab_size": 32}
    return filled_base(tmp_path / "counted", tensors={"lm_head.weight": None}, config=config)


@pytest.mark.parametrize("choice", [Tied.ADD, Tied.UNTIE])
def test_a_resized_tied_head_starts_from_the_stored_weight(
    tmp_path: Path, sized_base: Path, choice: Tied
) -> None:
    adapter = on_a_resized_head(tmp_path / "a", sized_base)
    assert refusal(lambda: merged_with(adapter, sized_base, tmp_path / "out")) == "V524"
    assert {"V526"} <= {found.code for found in validate(adapter, base=sized_base).findings}
    assert validate(adapter, base=sized_base).passed
    merged_with(adapter, sized_base, tmp_path / "out", tied=choice)
    found = tensors_of(tmp_path / "out")
    copy = tensors_of(adapter)[f"{PREFIX}lm_head.base_layer.weight"]
    summed = copy + exact_change(adapter, "lm_head", 16)
    embedding = found["model.embed_tokens.weight"]
    assert np.allclose(embedding, copy if choice is Tied.UNTIE else summed, atol=1e-6)
    assert np.allclose(found.get("lm_head.weight", embedding), summed, atol=1e-6)
    assert json.loads((tmp_path / "out/config.json").read_bytes())["vocab_size"] == 36
    layers_only = VerifyOptions(layers_only=True)
    assert verify(adapter, merged=tmp_path / "out", base=sized_base, options=layers_only).passed


def test_a_resized_head_of_another_base_is_refused(tmp_path: Path, sized_base: Path) -> None:
    adapter = on_a_resized_head(tmp_path / "a", filled_base(tmp_path / "other"))
    stored = load_file(sized_base / "model.safetensors")
    stored["model.embed_tokens.weight"][3] += 1
    save_file(stored, sized_base / "model.safetensors", {"format": "pt"})
    act = lambda: merged_with(adapter, sized_base, tmp_path / "out", tied=Tied.ADD)  # noqa: E731
    assert refusal(act) == "V535"


def test_a_resized_head_that_is_not_tied_needs_its_embedding(tmp_path: Path) -> None:
    config = {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": 32}
    base = filled_base(tmp_path / "base", config=config)
    head = tensors_of(base)["lm_head.weight"]
    copy = {f"{PREFIX}lm_head.base_layer.weight": np.concatenate([head, head[:4]])}
    adapter = on_a_resized_head(tmp_path / "a", base, **copy)
    assert refusal(lambda: merged_with(adapter, base, tmp_path / "out")) == "V531"
    assert "V531" in {found.code for found in validate(adapter, base=base).findings}
    taller = {f"{PREFIX}model.embed_tokens.weight": np.full((36, 16), 0.5, np.float32)}
    adapter = on_a_resized_head(tmp_path / "b", base, **copy, **taller)
    assert validate(adapter, base=base).passed
    merged_with(adapter, base, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert (found["model.embed_tokens.weight"] == 0.5).all()
    summed = copy[f"{PREFIX}lm_head.base_layer.weight"] + exact_change(adapter, "lm_head", 16)
    assert np.allclose(found["lm_head.weight"], summed, atol=1e-6)


@pytest.mark.parametrize("rows", [32, 36])
def test_a_stored_bias_of_the_logits_is_no_tensor_that_peft_writes(
    tmp_path: Path, rows: int
) -> None:
    """PEFT saves no buffers, and loads no buffer whose size differs from the vocabulary."""
    own = {f"{PREFIX}final_logits_bias": np.ones((1, 32), np.float32)}
    taller = {f"{PREFIX}model.embed_tokens.weight": np.ones((rows, 16), np.float32)}
    adapter = good_adapter(tmp_path / "a", tensors=own | taller)
    base = filled_base(tmp_path / "base", tensors={"final_logits_bias": (1, 32)})
    assert refusal(lambda: merged_with(adapter, base, tmp_path / "out")) == "V221"


def test_deltas_of_two_vocabularies_contradict_each_other(tmp_path: Path, sized_base: Path) -> None:
    first, second = on_the_head(tmp_path / "a"), on_a_resized_head(tmp_path / "b", sized_base)
    add = (AdapterSpec(second),)
    act = lambda: merged_with(first, sized_base, tmp_path / "out", add=add, tied=Tied.ADD)  # noqa: E731
    assert refusal(act) == "V534"


@pytest.mark.parametrize("case", ["embedding", "head", "both", "same"])
def test_validate_names_a_tied_pair_that_a_merge_must_untie(
    tmp_path: Path, tied: Path, trained_embedding: Path, case: str
) -> None:
    own = {f"{PREFIX}lm_head.weight": np.full((32, 16), 2, np.float32)}
    adapter = {
        "embedding": lambda: trained_embedding,
        "head": lambda: good_adapter(tmp_path / "a", tensors=own, modules_to_save=["lm_head"]),
        "both": lambda: good_adapter(tmp_path / "a", tensors=embeddings(1.0, 2.0)),
        "same": lambda: good_adapter(tmp_path / "a", tensors=embeddings(1.0, 1.0)),
    }[case]()
    found = validate(adapter, base=tied)
    assert found.passed
    assert ("V526" in {finding.code for finding in found.findings}) == (case != "same")
    if case != "same":
        assert refusal(lambda: merged_with(adapter, tied, tmp_path / "out")) == "V524"


def test_the_shared_module_of_an_encoder_decoder_stays_as_in_the_base(tmp_path: Path) -> None:
    """PEFT wraps only `shared`; the encoder and the decoder read other embeddings."""
    own = {f"{PREFIX}shared.weight": np.full((32, 16), 2, np.float32)}
    adapter = good_adapter(tmp_path / "a", tensors=own, modules_to_save=["shared"])
    base = filled_base(tmp_path / "base", tensors={"shared.weight": (32, 16)})
    done = merged_with(adapter, base, tmp_path / "out")
    assert [finding.code for finding in done.findings] == ["V577"]
    assert_same(tensors_of(tmp_path / "out"), expected_tensors({adapter: 1.0}, base))


def test_a_delta_and_another_adapter_s_own_head_contradict_each_other(
    tmp_path: Path, tied: Path
) -> None:
    own = {f"{PREFIX}lm_head.weight": np.full((32, 16), 2, np.float32)}
    second = good_adapter(tmp_path / "b", tensors=own, modules_to_save=["lm_head"])
    first, add = on_the_head(tmp_path / "a"), (AdapterSpec(second),)
    assert (
        refusal(lambda: merged_with(first, tied, tmp_path / "out", add=add, tied=Tied.UNTIE))
        == "V534"
    )


def test_a_pretraining_head_that_the_adapter_s_class_does_not_build_is_not_missing(
    tmp_path: Path,
) -> None:
    """BERT's files hold `cls.predictions` and the head of next-sentence prediction."""
    trained = {f"{PREFIX}cls.seq_relationship.weight": np.full((2, 16), 0.3, np.float32)}
    adapter = good_adapter(tmp_path / "a", tensors=trained, modules_to_save=["cls"])
    heads = {"cls.seq_relationship.weight": (2, 16), "cls.predictions.bias": (32,)}
    base = filled_base(tmp_path / "base", tensors=heads)
    assert "V222" not in {finding.code for finding in validate(adapter, base=base).findings}
    merged_with(adapter, base, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert np.array_equal(found["cls.seq_relationship.weight"], next(iter(trained.values())))
    assert np.array_equal(found["cls.predictions.bias"], tensors_of(base)["cls.predictions.bias"])


@pytest.mark.parametrize(
    ("also", "severities"),
    [
        ({"sop_classifier.classifier.weight": (2, 16)}, ["note"]),  # ALBERT
        ({"distillation_classifier.weight": (3, 16)}, ["note"]),  # DeiT
        ({"mtp.classifier.weight": (3, 16)}, []),  # no class loads these layers
        ({"classifier.bias": (3,)}, ["error"]),
    ],
)
def test_a_module_of_the_same_name_is_missing_only_if_the_adapter_s_class_builds_it(
    also: dict[str, tuple[int, ...]], severities: list[str], tmp_path: Path
) -> None:
    trained = {f"{PREFIX}classifier.weight": np.full((3, 16), 0.3, np.float32)}
    adapter = good_adapter(tmp_path / "a", tensors=trained, modules_to_save=["classifier"])
    base = filled_base(tmp_path / "base", tensors={"classifier.weight": (3, 16), **also})
    found = [each for each in validate(adapter, base=base).findings if each.code == "V222"]
    assert [each.severity.value for each in found] == severities
    if "error" in severities:
        assert refusal(lambda: merged_with(adapter, base, tmp_path / "out")) == "V222"
        return
    done = merged_with(adapter, base, tmp_path / "out")
    assert [each.severity.value for each in done.findings if each.code == "V222"] == severities
    merged = tensors_of(tmp_path / "out")
    assert np.array_equal(merged["classifier.weight"], next(iter(trained.values())))


def test_both_heads_of_a_distilled_model_get_the_new_number_of_labels(tmp_path: Path) -> None:
    """SwiftFormer's heads are `head` and `dist_head`."""
    heads = {"head.weight": (4, 16), "head.bias": (4,), "dist_head.weight": (4, 16)}
    base = filled_base(
        tmp_path / "base",
        tensors=heads,
        config={
            "architectures": ["SwiftFormerForImageClassification"],
            "id2label": dict.fromkeys("0123", "x"),
        },
    )
    trained = {
        PREFIX + name: np.full((5, *each[1:]), 0.3, np.float32) for name, each in heads.items()
    }
    adapter = good_adapter(
        tmp_path / "a",
        tensors=trained,
        modules_to_save=["head", "dist_head"],
        task_type=None,
        auto_mapping={
            "base_model_class": "SwiftFormerForImageClassification",
            "parent_library": "transformers.models.swiftformer.modeling_swiftformer",
        },
    )
    merged_with(adapter, base, tmp_path / "out")
    assert len(json.loads((tmp_path / "out" / "config.json").read_bytes())["id2label"]) == 5


def test_a_norm_of_a_layer_beyond_the_model_is_not_missing(tmp_path: Path) -> None:
    """GLM and DeepSeek keep a layer that predicts several tokens after the model's last layer."""
    norm = "model.layers.{}.input_layernorm.weight"
    trained = {PREFIX + norm.format(n): np.full(16, 0.3, np.float32) for n in range(2)}
    saved = ["input_layernorm"]
    whole = good_adapter(tmp_path / "a", tensors=trained, modules_to_save=saved)
    cut = good_adapter(tmp_path / "b", tensors=dict([*trained.items()][1:]), modules_to_save=saved)
    norms = {norm.format(n): (16,) for n in range(3)}
    base = filled_base(tmp_path / "base", tensors=norms, config={"num_hidden_layers": 2})
    assert "V222" not in {each.code for each in validate(whole, base=base).findings}
    merged_with(whole, base, tmp_path / "out")
    assert refusal(lambda: merged_with(cut, base, tmp_path / "cut")) == "V222"


def test_a_pretraining_head_that_is_stored_in_part_is_refused(tmp_path: Path) -> None:
    trained = {f"{PREFIX}cls.seq_relationship.weight": np.full((2, 16), 0.3, np.float32)}
    adapter = good_adapter(tmp_path / "a", tensors=trained, modules_to_save=["cls"])
    heads = {"cls.seq_relationship.weight": (2, 16), "cls.seq_relationship.bias": (2,)}
    base = filled_base(tmp_path / "base", tensors=heads)
    assert refusal(lambda: merged_with(adapter, base, tmp_path / "out")) == "V222"


@pytest.mark.parametrize(
    ("lost", "is_due"),
    [
        ({"model.act.scale": (16,)}, True),
        ({"model.act.inner.weight": (4, 16)}, True),
        ({"model.act.inner.inv_freq": (4,)}, False),
        ({"model.act.bias": (1, 1, 8, 8)}, False),
        ({"model.acts.weight": (16,)}, False),
    ],
    ids=str,
)
def test_a_module_without_tensors_in_the_adapter_has_none_in_the_base(
    lost: dict[str, tuple[int, ...]], is_due: bool, tmp_path: Path
) -> None:
    """A stored mask, as in the files of GPT-2, is no parameter."""
    adapter = good_adapter(tmp_path / "a", modules_to_save=["act"])
    base = filled_base(tmp_path / "base", tensors=lost)
    found = [each for each in validate(adapter, base=base).findings if each.code == "V222"]
    names = [each.tensor for each in found if each.severity is Severity.ERROR]
    assert names == (list(lost) if is_due else [])
    if is_due:
        assert refusal(lambda: merged_with(adapter, base, tmp_path / "out")) == "V222"
    else:
        merged_with(adapter, base, tmp_path / "out")
