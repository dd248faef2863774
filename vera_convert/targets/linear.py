"""The linear layers of a model, which VeRA can adapt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vera_convert.embeddings import is_output_head, is_table


class Linear(NamedTuple):
    """A layer that VeRA can adapt.

    Attributes:
        out_features: rows of the weight as ``torch.nn.Linear`` stores it.
        in_features: its columns.
        conv1d: whether the layer is a transformers ``Conv1D``, which stores (in, out).
    """

    out_features: int
    in_features: int
    conv1d: bool = False


class ModelLayers(NamedTuple):
    """The facts of a model that the target rules need.

    Attributes:
        source: the source of these facts, for people: a model class, or the tensors' headers.
        model_type: ``model_type`` of the base's config; decides PEFT's default targets.
        linear: every linear layer by module path, heads included, in the model's order.
        output_heads: the linear layers that are the output embedding, which all-linear leaves out.
        embeddings: modules whose two-dimensional weight is a table and not a linear layer.
        dtype: the dtype of the weights (safetensors' name).
    """

    source: str
    model_type: str | None
    linear: Mapping[str, Linear]
    output_heads: frozenset[str] = frozenset()
    embeddings: tuple[str, ...] = ()
    dtype: str = "F32"


def kind_of(module: str) -> str:
    """Return the kind of a layer: the path after the last index."""
    return re.split(r"(?:^|\.)\d+\.", module)[-1]


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Adapted layers of one kind and one shape.

    Attributes:
        name: the layers' path after the last index.
        out_features: rows of each weight.
        in_features: columns of each weight; None if no base tells the number.
        layers: the number of layers.
    """

    name: str
    out_features: int
    in_features: int | None
    layers: int


def layer_groups(layers: Iterable[tuple[str, int, int | None]]) -> tuple[LayerGroup, ...]:
    """Group layers, each with its path, outputs and inputs, in the order of the first of a group.

    >>> layer_groups([("h.0.q", 8, 4), ("h.1.q", 8, 4)])
    (LayerGroup(name='q', out_features=8, in_features=4, layers=2),)
    """
    counted = Counter((kind_of(path), outputs, inputs) for path, outputs, inputs in layers)
    return tuple(LayerGroup(*shape, number) for shape, number in counted.items())


CONV1D_LAYERS: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(
        ("gpt2", "imagegpt", "decision_transformer"),
        frozenset(("c_attn", "q_attn", "c_proj", "c_fc")),
    ),
    "openai-gpt": frozenset(("c_attn", "c_proj", "c_fc")),
    "clvp_decoder": frozenset(("c_proj", "c_fc")),
}
"""Layers that are ``Conv1D`` in transformers, stored as (in, out), by model type."""


def layers_from_shapes(
    shapes: Mapping[str, Sequence[int]], *, model_type: str | None
) -> ModelLayers:
    """Return the linear layers of a model from the names and shapes of the tensors on disk.

    A tensor with two dimensions and the name ``<module>.weight`` is a linear layer, unless the
    name is that of an embedding. Newer transformers can change the names on disk in memory.

    Args:
        shapes: shape by tensor name, in the order of the layers.
        model_type: the type of the base; GPT-2 and similar models have Conv1D layers.
    """
    modules = {
        name.removesuffix(".weight"): (int(shape[0]), int(shape[1]))
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }
    embeddings = tuple(name for name in modules if is_table(name))
    transposed = CONV1D_LAYERS.get(model_type or "", frozenset())
    linear = {
        name: Linear(columns, rows, conv1d=True)
        if name.rpartition(".")[2] in transposed
        else Linear(rows, columns)
        for name, (rows, columns) in modules.items()
        if not is_table(name)
    }
    heads = frozenset(name for name in linear if is_output_head(name, model_type or ""))
    return ModelLayers("the tensors' headers", model_type, linear, heads, embeddings)
