"""The changes that adapters make to a base, and the tensors of the merged model, as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.adapter.saved_modules import SavedModules, replaced_name
from vera_convert.assembly.addends import Term
from vera_convert.assembly.input_files import StoredTensor
from vera_convert.base.model import BaseModel
from vera_convert.base.quantized.recognize import quantized_tensors
from vera_convert.base.replacements import is_of_classifier
from vera_convert.base.resizes import NO_RESIZES, Resizes
from vera_convert.base.saved_places import Part
from vera_convert.base.tied import is_head, scales_tied_logits
from vera_convert.base.vocabulary import tied_copies
from vera_convert.delta import working_dtype
from vera_convert.dtypes import BITS, FLOATS
from vera_convert.files.tensorfile import NUMPY_DTYPE, TensorData
from vera_convert.merging.adapters import MatchedAdapter
from vera_convert.merging.base_files import BaseFiles
from vera_convert.rules import Finding

Decode = Callable[[int, int], NDArray[Any]]
"""Computes rows `first` to `last` (exclusive) of a packed weight, resized bias or scaled head."""


@dataclass(frozen=True, slots=True, eq=False)
class Replacement:
    """A tensor of an adapter that replaces a tensor of the base, or is new.

    Attributes:
        owner: the adapter.
        tensor: the complete tensor of the adapter.
        stored: the part of the tensor that becomes a tensor of the merged model.
    """

    owner: MatchedAdapter
    tensor: TensorData
    stored: StoredTensor

    @classmethod
    def of(cls, owner: MatchedAdapter, tensor: TensorData, part: Part) -> Replacement:
        """Return the replacement by a part of a tensor."""
        header = owner.adapter.file.header
        info = header.tensors[tensor.name]
        start = header.data_start + info.start + part.first * BITS[info.dtype] // 8
        return cls(owner, tensor, StoredTensor(owner.weights, start, info.dtype, part.shape))

    @property
    def is_of_classifier(self) -> bool:
        """Whether the tensor belongs to a classifier, not to an embedding or output head."""
        return is_of_classifier(self.owner.adapter.config, self.tensor.name)

    @property
    def is_of_copy(self) -> bool:
        """Whether PEFT trained a copy of the module; a tied tensor keeps the base's values."""
        module = replaced_name(self.tensor.name).rpartition(".")[0]
        return bool(SavedModules(self.owner.adapter.config).of(module))


@dataclass(frozen=True, slots=True, eq=False)
class ResizedBias:
    """The bias of the logits (1, vocabulary) after the vocabulary is resized.

    Attributes:
        own: the base's tensor.
        count: the number of values in the merged model.
    """

    own: StoredTensor
    count: int

    @property
    def stored(self) -> StoredTensor:
        """The base's tensor with the new shape."""
        return replace(self.own, shape=(1, self.count))

    def __call__(self, first: int, last: int) -> NDArray[Any]:
        """Return the rows `first` to `last` (exclusive): the base's values, cut or with zeros.

        The dtype is the base's.
        """
        values = np.zeros((1, self.count), NUMPY_DTYPE[self.own.dtype])
        kept = min(self.own.count, self.count)
        values[0, :kept] = np.concatenate([*self.own.blocks(kept)])
        return values[first:last]


@dataclass(frozen=True, slots=True, eq=False)
class ScaledRows:
    """Rows of a matrix, times a factor.

    Attributes:
        stored: the matrix in an input file.
        decode: computes rows of the matrix; None for the stored values.
        factor: the factor.
    """

    stored: StoredTensor
    decode: Decode | None
    factor: float

    def __call__(self, first: int, last: int) -> NDArray[Any]:
        """Return the rows `first` to `last` (exclusive) in the dtype of the merge's sums."""
        rows = self.stored.rows(first, last) if self.decode is None else self.decode(first, last)
        wide = rows.astype(working_dtype(rows.dtype))
        wide *= self.factor
        return wide


@dataclass(frozen=True, slots=True, eq=False)
class ReplacedRows:
    """A tensor of several layers, in which adapters replace the rows of some layers.

    Attributes:
        own: the base's tensor: a matrix, or a vector whose values count as rows.
        parts: the adapters' tensors, by the first row that each replaces.
        decode: computes rows of the base's matrix; None for the stored values.
    """

    own: StoredTensor
    parts: Mapping[int, Replacement]
    decode: Decode | None = None

    def base_of(self, first: int) -> StoredTensor:
        """Return the rows of the base that the part beginning at row `first` replaces."""
        start = self.own.start + first * (self.own.nbytes // self.own.shape[0])
        return replace(self.own, start=start, shape=self.parts[first].stored.shape)

    @np.errstate(over="ignore", invalid="ignore")  # the merge finds and reports infinite values
    def __call__(self, first: int, last: int) -> NDArray[Any]:
        """Return rows `first` to `last` (exclusive) in the base's dtype; a vector is one row."""
        if len(self.own.shape) == 1:
            return self._rows(0, self.own.shape[0]).reshape(1, -1)[first:last]
        return self._rows(first, last)

    def _rows(self, first: int, last: int) -> NDArray[Any]:
        own = self.own.rows if self.decode is None else self.decode
        values = np.array(own(first, last))
        for start, each in self.parts.items():
            low, high = max(first, start), min(last, start + each.stored.shape[0])
            if low < high:
                new = each.stored.rows(low - start, high - start)
                values[low - first : high - first] = new.astype(values.dtype)
        return values


@dataclass(slots=True, eq=False)
class Changes:
    """All changes to a base, by the names of the tensors.

    Attributes:
        terms: the terms to add, in the order of the adapters.
        conv1d: tensors that are stored as (in, out).
        replaced: tensors of the base that an adapter replaces.
        new: tensors of an adapter that the base lacks.
        rows: tensors of several layers, in which adapters replace the rows of some layers.
        heads: names of untied heads and of other tensors that are no longer tied, each with the
            base's tensor whose values the new tensor starts from.
        unties: whether the config must say that head and embedding are two tensors.
        keeps_scale: whether the merged model still multiplies the decoder's output by d_model^-0.5
            with an untied head. transformers 5 saves such a T5; a merge never writes one.
        resizes: the vocabulary and the classifier that the adapters resize.
        resized_biases: biases of the logits that the merge resizes with the vocabulary.
        findings: warnings.
    """

    terms: dict[str, tuple[Term, ...]] = field(default_factory=dict)
    conv1d: set[str] = field(default_factory=set)
    replaced: dict[str, Replacement] = field(default_factory=dict)
    new: dict[str, Replacement] = field(default_factory=dict)
    rows: dict[str, ReplacedRows] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    unties: bool = False
    keeps_scale: bool = False
    resizes: Resizes = NO_RESIZES
    resized_biases: dict[str, ResizedBias] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def replacing(self) -> dict[str, Replacement]:
        """All tensors of adapters, by the name in the merged model."""
        return {**self.replaced, **self.new}

    def moves_scale(self, base: BaseModel) -> bool:
        """Say whether the untied head takes over the factor of the decoder's output."""
        return self.unties and not self.keeps_scale and scales_tied_logits(base)


def shared_copies(base: BaseModel, changes: Changes) -> Iterator[tuple[str, str]]:
    """Yield each new tensor that equals a tensor of the merged model, with the name of this tensor.

    The merge stores such a copy because not every release of transformers ties the two.
    """
    for copy, source in tied_copies(base):
        is_new = copy in changes.new and changes.new[copy] is changes.replaced.get(source)
        if is_new or (copy in changes.heads and source not in changes.replaced):
            yield copy, source


# --- the tensors of the merged model --------------------------------------------------------------


class Kind(StrEnum):
    """How a merge changes a tensor."""

    SAME = "same"
    """Not at all: the bytes are the base's."""
    CONVERTED = "converted"
    """Only the dtype, the size of a bias, or the scale of a head changes."""
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
    """Return every tensor of a merged model, by name: a merge writes them, `verify` expects them.

    Args:
        files: the base and its files.
        changes: the changes that the adapters make to the base.
        dtype: the dtype of all float tensors, in safetensors' names; None keeps each dtype.
    """
    base = files.model
    # A quantized tensor has no meaning in another dtype, so the tensor keeps the dtype.
    stay = dtype is not None and files.packed is None
    kept = quantized_tensors(base) if stay else frozenset[str]()
    found: dict[str, MergedTensor] = {}

    def add(
        name: str, kind: Kind, stored: StoredTensor, written: str, decode: Decode | None = None
    ) -> None:
        """Add a tensor that begins with stored values; `kind` is that of one without deltas."""
        terms, conv1d = changes.terms.get(name, ()), name in changes.conv1d
        kind = Kind.ADDED if terms else kind
        found[name] = MergedTensor(name, kind, written, stored, terms, conv1d, decode)

    for name, in_base in {**{name: name for name in base.tensors}, **changes.heads}.items():
        own, replacement = files.tensor(in_base), changes.replaced.get(name)
        written = own.dtype if in_base in kept and replacement is None else _written(own, dtype)
        if replacement is not None:
            add(name, Kind.REPLACED, replacement.stored, written)
        elif name in changes.rows:
            rows = replace(changes.rows[name], decode=files.decoder(in_base))
            add(name, Kind.REPLACED, own, written, rows)
        else:
            resized = changes.resized_biases.get(name)
            decode = resized or files.decoder(in_base)
            stored = own if resized is None else resized.stored
            kind = Kind.SAME if decode is None and written == own.dtype else Kind.CONVERTED
            add(name, kind, stored, written, decode)
    for name, replacement in changes.new.items():
        add(name, Kind.NEW, replacement.stored, _written(replacement.stored, dtype))
    if changes.moves_scale(base):
        heads = (name for name in found if is_head(name, base))
        found |= {name: _scaled(found[name]) for name in heads}
    return found


def _scaled(head: MergedTensor) -> MergedTensor:
    """Return a head that takes over the factor of the decoder's output: see `scales_tied_logits`.

    Each release of transformers computes the same with this head, because the merged config tells
    each release not to multiply the decoder's output.
    """
    factor = head.shape[1] ** -0.5
    return replace(
        head,
        kind=Kind.CONVERTED if head.kind is Kind.SAME else head.kind,
        terms=tuple(replace(term, weight=term.weight * factor) for term in head.terms),
        decode=ScaledRows(head.stored, head.decode, factor),
    )


def _written(tensor: StoredTensor, dtype: str | None) -> str:
    """Return the dtype of a tensor in the merged model, if all float tensors get a dtype."""
    return dtype if dtype is not None and tensor.dtype in FLOATS else tensor.dtype
