"""Compute the expected tensors of a merged model from the inputs and the options alone.

The plan of the merge is not used, so an error in the plan shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from numpy.typing import NDArray

from vera_convert.assembly.addends import Term
from vera_convert.assembly.input_files import StoredTensor
from vera_convert.base.model import BaseModel
from vera_convert.base.quantized.recognize import quantized_tensors
from vera_convert.dtypes import FLOATS
from vera_convert.merging.base_files import BaseFiles
from vera_convert.merging.changes import Changes

Array = NDArray[Any]


_HEADS = frozenset(
    """
    cls lm_head pooler predictions generator_predictions generator_lm_head lm_loss embed_out
    discriminator_predictions vocab_transform vocab_layer_norm vocab_projector classifier score
    qa_outputs
    """.split()  # noqa: SIM905 - words read best as a text
)
"""The names of heads and poolers in transformers' classes, which other classes lack."""


class Kind(StrEnum):
    """How a merge changes a tensor."""

    SAME = "same"
    """Not at all: the bytes are the base's."""
    CONVERTED = "converted"
    """Only its dtype changes."""
    ADDED = "added"
    """Deltas are added."""
    REPLACED = "replaced"
    """A tensor of an adapter replaces the tensor."""
    NEW = "new"
    """An adapter brings the tensor; the base has none of this name."""


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """An expected tensor of the merged model.

    Attributes:
        name: the name.
        kind: how the merge changes the tensor.
        dtype: the dtype in the merged model, in safetensors' names.
        source: the stored values to start from.
        terms: the deltas to add, in this order.
        conv1d: whether the tensor is stored as (in, out).
        decode: computes rows of a packed weight or of a resized bias; None for plain values.
    """

    name: str
    kind: Kind
    dtype: str
    source: StoredTensor
    terms: tuple[Term, ...] = ()
    conv1d: bool = False
    decode: Callable[[int, int], Array] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self.source.shape

    @property
    def is_copied(self) -> bool:
        """Whether the bytes are copied from the source."""
        return not self.terms and self.decode is None and self.dtype == self.source.dtype

    @property
    def matrix(self) -> tuple[int, int]:
        """The rows and columns; a tensor of another shape is a single column."""
        if len(self.shape) == 2 or (self.decode is not None and self.shape):
            return math.prod(self.shape[:-1]), self.shape[-1]
        return self.source.count, 1


def expected_tensors(
    files: BaseFiles, changes: Changes, *, dtype: str | None = None
) -> dict[str, Expected]:
    """Return every tensor that the merged model must have, by name.

    Args:
        files: the base and its files.
        changes: the changes that the adapters make to the base.
        dtype: the dtype of all float tensors, in safetensors' names; None keeps each dtype.
    """
    base = files.model
    converts = dtype is not None and files.packed is None
    # The dtype of quantized tensors stays.
    kept = quantized_tensors(base) if converts else frozenset[str]()
    found = {}
    for name, stored in {**{name: name for name in base.tensors}, **changes.heads}.items():
        own, replacement = files.tensor(stored), changes.replaced.get(name)
        written = _written(own.dtype, dtype)
        if replacement is not None:
            found[name] = _expected(name, Kind.REPLACED, replacement.stored, written, changes)
            continue
        written = own.dtype if stored in kept else written
        resized = changes.resized_biases.get(name)
        source = own if resized is None else resized.stored
        tensor = _expected(name, Kind.SAME, source, written, changes)
        tensor = replace(tensor, decode=resized or files.decoder(stored))
        is_converted = tensor.kind is Kind.SAME and not tensor.is_copied
        found[name] = replace(tensor, kind=Kind.CONVERTED) if is_converted else tensor
    for name, replacement in changes.new.items():
        written = _written(replacement.stored.dtype, dtype)
        found[name] = _expected(name, Kind.NEW, replacement.stored, written, changes)
    return found


def _written(stored: str, dtype: str | None) -> str:
    """Return the dtype of a tensor in the merged model, if all float tensors get a dtype."""
    return dtype if dtype is not None and stored in FLOATS else stored


def _expected(
    name: str, kind: Kind, source: StoredTensor, written: str, changes: Changes
) -> Expected:
    """Return a tensor that begins with stored values; `kind` is that of a tensor without deltas."""
    terms = changes.terms.get(name, ())
    kind = Kind.ADDED if terms else kind
    return Expected(name, kind, written, source, terms, conv1d=name in changes.conv1d)


def without_old_head(expected: Mapping[str, Expected], merged: BaseModel) -> dict[str, Expected]:
    """Return the expected tensors if the merged model is of another class than the base.

    transformers saves no head that the class lacks, so the base's own head may be missing.
    """
    return {
        name: each
        for name, each in expected.items()
        if name in merged.tensors
        or each.kind not in (Kind.SAME, Kind.CONVERTED)
        or _HEADS.isdisjoint(name.split(".")[:2])
    }
