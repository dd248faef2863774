"""Embeddings and output heads by name: one table for every part of the program."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from adapters import good_adapter
from bases import tiny_base
from folders import weights

from vera_convert.adapter.opening import examined_folder
from vera_convert.conversion.strip_embed import strip
from vera_convert.embeddings import is_embedding, is_output_head, is_table, may_be_resized
from vera_convert.targets.linear import layers_from_shapes
from vera_convert.validation.validate import validate


@pytest.mark.parametrize(
    ("module", "model_type"),
    [
        ("lm_head", "llama"),
        ("language_model.lm_head", None),
        ("cls.predictions.decoder", "bert"),
        ("lm_head.decoder", "roberta"),
        ("embed_out", "gpt_neox"),
        ("output", "internlm2"),
        ("output", None),
        ("proj_out", "whisper"),
        ("proj_out", None),
        ("transformer.output_layer", "chatglm"),
        ("head", "rwkv"),
        ("decoder", "modernbert"),
    ],
)
def test_names_of_output_heads(module: str, model_type: str | None) -> None:
    assert is_output_head(module, model_type)
    assert may_be_resized(module)
    assert not is_embedding(module)


@pytest.mark.parametrize(
    ("module", "model_type"),
    [
        ("model.layers.0.mlp.up_proj", "llama"),
        ("down_blocks.0.attentions.0.proj_out", None),
        ("single_transformer_blocks.3.proj_out", None),
        ("proj_out", "flux"),
        ("encoder.layer.0.output", "bert"),
        ("encoder.layer.0.output.dense", "bert"),
        ("rwkv.blocks.0.attention.output", "rwkv"),
        ("head", "swin"),
        ("decoder", "bart"),
        ("lm_head.dense", "roberta"),
        ("score", "llama"),
    ],
)
def test_names_that_are_no_output_heads(module: str, model_type: str | None) -> None:
    assert not is_output_head(module, model_type)


@pytest.mark.parametrize(
    "module",
    """
    model.embed_tokens shared encoder.embed_tokens transformer.wte bert.embeddings.word_embeddings
    gpt_neox.embed_in model.tok_embeddings model.embeddings.tok_embeddings transformer.tokens_embed
    rwkv.embeddings backbone.embeddings text_model.embeddings.token_embedding transformer.w embed
    """.split(),  # noqa: SIM905 -- words read best as a text
)
def test_an_embedding_is_a_table_and_may_be_resized(module: str) -> None:
    assert is_embedding(module)
    assert is_table(module) or module.endswith(".w")
    assert may_be_resized(module)
    assert not is_output_head(module)


@pytest.mark.parametrize(
    "module", ["transformer.wpe", "bert.embeddings.position_embeddings", "model.embed_positions"]
)
def test_other_tables_are_no_embeddings(module: str) -> None:
    assert is_table(module)
    assert not is_embedding(module)
    assert not may_be_resized(module)


RESIZED = ("tok_embeddings", "model.tok_embeddings", "output", "proj_out", "embed_out", "head")


@pytest.mark.parametrize("module", RESIZED)
def test_a_resized_vocabulary_is_a_note_for_every_name_of_the_table(
    module: str, tmp_path: Path
) -> None:
    stored = {f"base_model.model.{module}.weight": np.ones((40, 16), np.float32)}
    folder = good_adapter(tmp_path / "adapter", tensors=stored)
    codes = {finding.code for finding in validate(folder).findings}
    assert "V231" in codes
    assert "V221" not in codes
    base = tiny_base(tmp_path / "base")
    strip(folder, tmp_path / "out", base=base)
    assert f"base_model.model.{module}.weight" in weights(tmp_path / "out")


@pytest.mark.parametrize(
    "module",
    ["model.layers.0.mlp.up_proj", "model.layers.0.proj_out", "model.layers.1.attention.output"],
)
def test_a_weight_of_a_layer_is_no_embedding(module: str, tmp_path: Path) -> None:
    stored = {f"base_model.model.{module}.weight": np.ones((24, 16), np.float32)}
    folder = good_adapter(tmp_path / "adapter", tensors=stored)
    codes = {finding.code for finding in validate(folder).findings}
    assert "V221" in codes
    assert "V231" not in codes
    with examined_folder(folder) as found:
        assert found.adapter is None


def test_all_linear_leaves_out_only_the_head_of_the_model_type() -> None:
    shapes = {"proj_out.weight": (8, 8), "blocks.0.proj_out.weight": (8, 8)}
    assert layers_from_shapes(shapes, model_type="whisper").output_heads == {"proj_out"}
    assert layers_from_shapes(shapes, model_type=None).output_heads == frozenset()
