"""Layers that share one tensor: a merge refuses a change of one layer; other commands do not."""

# mypy: allow-untyped-calls
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from adapters import good_adapter
from heads import PREFIX
from merges import filled_base, merged_with, tensors_of
from releases import has, of_transformers
from theirwarnings import OF_PEFT
from trainedmodels import randomized

from vera_convert import CheckpointError, embed, merge, strip, to_lora, validate
from vera_convert.base.shared_layers import shared_layers
from vera_convert.embeddings import is_embedding, is_output_head

pytestmark = OF_PEFT

BARK = {
    "block_size": 32,
    "input_vocab_size": 40,
    "output_vocab_size": 40,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_size": 16,
    "n_codes_total": 4,
    "n_codes_given": 1,
}
CASES: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "the head": ({"modules_to_save": ["lm_heads.0"]}, "lm_heads.0.weight"),
    "the table": ({"modules_to_save": ["input_embeds_layers.2"]}, "input_embeds_layers.2.weight"),
    "a delta": ({"target_modules": ["att_proj", "lm_heads.1"]}, "lm_heads.1"),
    "a table without a head": ({"modules_to_save": ["input_embeds_layers.0"]}, ""),
}


@pytest.mark.parametrize("case", CASES)
def test_a_merge_refuses_a_change_of_one_of_the_layers(case: str, tmp_path: Path) -> None:
    wanted, place = CASES[case]
    model_class, base, adapter = of_transformers("BarkFineModel"), tmp_path / "b", tmp_path / "a"
    torch.manual_seed(0)
    model_class(model_class.config_class(**BARK)).save_pretrained(base)
    config = peft.VeraConfig(**{"r": 4, "target_modules": ["att_proj"], **wanted})
    adapted = peft.get_peft_model(model_class.from_pretrained(base), config)
    randomized(adapted).save_pretrained(adapter)
    checked = validate(adapter, base=base, select=["V2", "V5"])
    told = [(each.code, each.place.rpartition(" ")[2]) for each in checked.findings]
    assert (checked.passed, told) == (True, [("V583", place)] if place else [])
    strip(adapter, tmp_path / "stripped", base=base)
    done = embed(tmp_path / "stripped", tmp_path / "embedded", base=base)
    weights = "adapter_model.safetensors"
    assert (done.out / weights).read_bytes() == (adapter / weights).read_bytes()
    assert to_lora(adapter, tmp_path / "lora", base=base).out.is_dir()
    if place:
        with pytest.raises(CheckpointError, match=rf"V583 {place}: .*input_embeds_layers"):
            merge(adapter, tmp_path / "merged", base=base)
    else:
        out = merge(adapter, tmp_path / "merged", base=base).out
        found = model_class.from_pretrained(out).state_dict()
        for name, values in adapted.merge_and_unload().state_dict().items():
            torch.testing.assert_close(found[name], values, msg=name)


@pytest.mark.parametrize("is_same", [True, False])
def test_a_shared_bias_that_peft_stores_under_each_name_is_replaced_once(
    is_same: bool, tmp_path: Path
) -> None:
    names = ("model.decoder.class_embed.bias", "model.enc_score_head.bias")
    biases = {
        f"{PREFIX}{name}": np.full(3, 2 + (not is_same) * position, np.float32)
        for position, name in enumerate(names)
    }
    adapter = good_adapter(tmp_path / "a", tensors=biases, bias="all")
    head = {names[1]: (3,), names[1].replace("bias", "weight"): (3, 16)}
    base = filled_base(tmp_path / "b", tensors=head, config={"model_type": "pp_doclayout_v3"})
    assert validate(adapter, base=base, select=["V5"]).passed
    if is_same:
        merged_with(adapter, base, tmp_path / "out")
        found = tensors_of(tmp_path / "out")
        assert np.array_equal(found[names[1]], biases[f"{PREFIX}{names[1]}"])
        assert names[0] not in found
    else:
        with pytest.raises(CheckpointError, match=r"V583 model\.decoder\.class_embed\.bias: "):
            merged_with(adapter, base, tmp_path / "out")


OTHERWISE = frozenset(("flava", "sam", "sam_hq", "t5gemma2"))
"""Types whose further shared tensors are biases of heads, buffers, or rows of an embedding."""


@pytest.mark.skipif(not has("transformers", "5.0"), reason="transformers 4 states no pairs")
def test_every_type_whose_layers_share_tensors_is_in_the_table() -> None:
    found = {
        model_type
        for model_type, *pair in _pairs_of_transformers()
        if not all(is_embedding(each) or is_output_head(each, model_type) for each in pair)
        and not pair[0].endswith("predictions.decoder")  # the bias of this head has two names
    }
    assert found - shared_layers().keys() - OTHERWISE == set()


def _pairs_of_transformers() -> Iterator[tuple[str, str, str]]:
    """Yield the model type and the two modules of each pair that a class of transformers states."""
    for name in dir(transformers):
        each = getattr(transformers, name, None)
        if isinstance(each, type) and transformers.PreTrainedModel in each.__mro__:
            pairs = getattr(each, "_tied_weights_keys", None)
            kind = getattr(getattr(each, "config_class", None), "model_type", "")
            for pair in pairs.items() if isinstance(pairs, dict) else ():
                first, second = (re.sub(r"\.(weight|bias)\$?$", "", path) for path in pair)
                yield kind, first, second
