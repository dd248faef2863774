"""The changes that adapters make to a base, as data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.assembly.addends import Term
from vera_convert.assembly.input_files import StoredTensor
from vera_convert.base.replacements import Part, is_of_classifier
from vera_convert.base.resizes import NO_RESIZES, Resizes
from vera_convert.dtypes import BITS
from vera_convert.files.tensorfile import NUMPY_DTYPE, TensorData
from vera_convert.merging.adapters import MatchedAdapter
from vera_convert.rules import Finding


class Tied(StrEnum):
    """How to merge into an output head that shares a tensor with the embedding."""

    ADD = "add"
    """Change the shared tensor, and so the embedding, as PEFT does."""
    UNTIE = "untie"
    """Give the head a separate tensor, and say so in the config."""


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
        return replace(self.own, shape=self.matrix)

    @property
    def matrix(self) -> tuple[int, int]:
        """The new rows and columns."""
        return 1, self.count

    def __call__(self, first: int, last: int) -> NDArray[Any]:
        """Return the rows `first` to `last` (exclusive): the base's values, cut or with zeros.

        The dtype is the base's.
        """
        values = np.zeros(self.matrix, NUMPY_DTYPE[self.own.dtype])
        kept = min(self.own.count, self.count)
        values[0, :kept] = np.concatenate([*self.own.blocks(kept)])
        return values[first:last]


@dataclass(slots=True, eq=False)
class Changes:
    """All changes to a base, by the names of the tensors.

    Attributes:
        terms: the terms to add, in the order of the adapters.
        conv1d: tensors that are stored as (in, out).
        replaced: tensors of the base that an adapter replaces.
        new: tensors of an adapter that the base lacks.
        heads: names of untied heads, each with the embedding whose values the head starts from.
        unties: whether the config must say that head and embedding are two tensors.
        resizes: the vocabulary and the classifier that the adapters resize.
        resized_biases: biases of the logits that the merge resizes with the vocabulary.
        findings: warnings.
    """

    terms: dict[str, tuple[Term, ...]] = field(default_factory=dict)
    conv1d: set[str] = field(default_factory=set)
    replaced: dict[str, Replacement] = field(default_factory=dict)
    new: dict[str, Replacement] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    unties: bool = False
    resizes: Resizes = NO_RESIZES
    resized_biases: dict[str, ResizedBias] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def replacing(self) -> dict[str, Replacement]:
        """All tensors of adapters, by the name in the merged model."""
        return {**self.replaced, **self.new}
