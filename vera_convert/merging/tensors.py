"""The tensors of a merged model: the stored values to start from, the deltas, and the dtype.

A merge writes these tensors, and `verify` expects these tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from numpy.typing import NDArray

from vera_convert.assembly.addends import Term
from vera_convert.assembly.input_files import StoredTensor
from vera_convert.base.quantized.recognize import quantized_tensors
from vera_convert.dtypes import BITS, FLOATS
from vera_convert.merging.base_files import BaseFiles
from vera_convert.merging.changes import Changes

Decode = Callable[[int, int], NDArray[Any]]
"""Computes rows `first` to `last` (exclusive) of a packed weight or of a resized bias."""


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
class MergedTensor:
    """A tensor of a merged model.

    Attributes:
        name: the name.
        kind: how the merge changes the tensor.
        dtype: the dtype in the merged model, in safetensors' names.
        stored: the values to start from.
        terms: the deltas to add, in this order.
        conv1d: whether the tensor is stored as (in, out).
        decode: computes the values to start from; None for the stored values.
    """

    name: str
    kind: Kind
    dtype: str
    stored: StoredTensor
    terms: tuple[Term, ...] = ()
    conv1d: bool = False
    decode: Decode | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self.stored.shape

    @property
    def nbytes(self) -> int:
        """The size in the merged model, in bytes."""
        return self.stored.count * BITS[self.dtype] // 8

    @property
    def is_copied(self) -> bool:
        """Whether the stored bytes are copied."""
        return not self.terms and self.decode is None and self.dtype == self.stored.dtype

    @property
    def matrix(self) -> tuple[int, int]:
        """The rows and columns; a tensor of another shape is a single column."""
        if len(self.shape) == 2 or (self.decode is not None and self.shape):
            return math.prod(self.shape[:-1]), self.shape[-1]
        return self.stored.count, 1


def merged_tensors(
    files: BaseFiles, changes: Changes, *, dtype: str | None = None
) -> dict[str, MergedTensor]:
    """Return every tensor of a merged model, by name.

    Args:
        files: the base and its files.
        changes: the changes that the adapters make to the base.
        dtype: the dtype of all float tensors, in safetensors' names; None keeps each dtype.
    """
    base = files.model
    # A quantized tensor has no meaning in another dtype, so the tensor keeps the dtype.
    stay = dtype is not None and files.packed is None
    kept = quantized_tensors(base) if stay else frozenset[str]()
    found = {}
    for name, in_base in {**{name: name for name in base.tensors}, **changes.heads}.items():
        own, replacement = files.tensor(in_base), changes.replaced.get(name)
        written = own.dtype if in_base in kept and replacement is None else _written(own, dtype)
        if replacement is not None:
            found[name] = _merged(name, Kind.REPLACED, replacement.stored, written, changes)
            continue
        resized = changes.resized_biases.get(name)
        decode = resized or files.decoder(in_base)
        stored = own if resized is None else resized.stored
        kind = Kind.SAME if decode is None and written == own.dtype else Kind.CONVERTED
        found[name] = replace(_merged(name, kind, stored, written, changes), decode=decode)
    for name, replacement in changes.new.items():
        written = _written(replacement.stored, dtype)
        found[name] = _merged(name, Kind.NEW, replacement.stored, written, changes)
    return found


def _written(tensor: StoredTensor, dtype: str | None) -> str:
    """Return the dtype of a tensor in the merged model, if all float tensors get a dtype."""
    return dtype if dtype is not None and tensor.dtype in FLOATS else tensor.dtype


def _merged(
    name: str, kind: Kind, stored: StoredTensor, written: str, changes: Changes
) -> MergedTensor:
    """Return a tensor that begins with stored values; `kind` is that of a tensor without deltas."""
    terms = changes.terms.get(name, ())
    kind = Kind.ADDED if terms else kind
    return MergedTensor(name, kind, written, stored, terms, conv1d=name in changes.conv1d)
