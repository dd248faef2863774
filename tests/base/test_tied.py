"""The tensors that an output head and the embeddings share."""

from __future__ import annotations

import pytest

from vera_convert.base.model import BaseModel, BaseTensor
from vera_convert.base.vocabulary import shared_embedding, tied_copies
from vera_convert.files.header import TensorInfo
from vera_convert.hub.lookup import Location

LAYERS = ("encoder.block.0.layer.0.wi.weight", "decoder.block.0.layer.0.wi.weight")


def test_only_the_weight_of_the_shared_embedding_is_stored_for_each_stack() -> None:
    names = ("shared.weight", "shared.weight_scale", "shared.weight.absmax", *LAYERS)
    tensors = {name: BaseTensor("m", TensorInfo(name, "BF16", (32, 16), 0, 0)) for name in names}
    base = BaseModel(Location("base", None), {"model_type": "t5"}, {}, tensors)
    assert {*tied_copies(base)} == {
        ("encoder.embed_tokens.weight", "shared.weight"),
        ("decoder.embed_tokens.weight", "shared.weight"),
    }
    assert len([*tied_copies(base)]) == 2


@pytest.mark.parametrize("part", ["language_model", "qformer"])
def test_a_head_shares_the_embedding_of_its_own_part(part: str) -> None:
    """The Q-Former of InstructBLIP has an embedding, perhaps of the language model's size."""
    own = "language_model.model.decoder.embed_tokens.weight"
    other = "qformer.embeddings.word_embeddings.weight"
    tensors = {
        name: BaseTensor("m", TensorInfo(name, "F32", (32, 16), 0, 0)) for name in (own, other)
    }
    base = BaseModel(Location("base", None), {"model_type": "instructblip"}, {}, tensors)
    found = shared_embedding(base, f"{part}.lm_head.weight", 32, 16)
    assert found == (own if part == "language_model" else other)


@pytest.mark.parametrize(
    ("kind", "stored", "copies"),
    [
        ("bert", "cls.predictions.bias", {"cls.predictions.decoder.bias"}),
        ("esm", "lm_head.bias", set()),
        ("udop", "patch_embed.proj.bias", {"encoder.embed_patches.proj.bias"}),
        (
            "udop",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            {
                "encoder.relative_bias.biases.0.relative_attention_bias.weight",
                "decoder.relative_bias.biases.0.relative_attention_bias.weight",
            },
        ),
    ],
)
def test_tensors_that_a_class_ties_with_the_head_are_copies(
    kind: str, stored: str, copies: set[str]
) -> None:
    tensors = {stored: BaseTensor("m", TensorInfo(stored, "F32", (4,), 0, 0))}
    base = BaseModel(Location("base", None), {"model_type": kind}, {}, tensors)
    assert {*tied_copies(base)} == {(copy, stored) for copy in copies}
