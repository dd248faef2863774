"""Compute the expected tensors of a merged model from the inputs and the options alone.

The plan of the merge is not used, so that an error in the plan shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from numpy.typing import NDArray

from vera_convert.assembly.addends import Term
from vera_convert.assembly.input_files import InputFile
from vera_convert.base.model import BaseModel
from vera_convert.base.quantized.recognize import quantized_tensors
from vera_convert.dtypes import BITS, FLOATS
from vera_convert.merging.changes import Changes, Replacement
from vera_convert.merging.dequantize import Dequantization

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
    """A tensor of an adapter replaces it."""
    NEW = "new"
    """An adapter brings it; the base has no such tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """One expected tensor of the merged model.

    Attributes:
        name: the name.
        kind: how the merge changes the tensor.
        dtype: the dtype in the merged model, in safetensors' names.
        shape: the shape.
        source: the file that holds the values to start from.
        start: the offset of these values in the file, in bytes.
        stored: the dtype of these values.
        terms: the deltas to add, in this order.
        conv1d: whether the tensor is stored as (in, out).
        decode: computes rows of a packed weight; None for plain values.
    """

    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    source: InputFile
    start: int
    stored: str
    terms: tuple[Term, ...] = ()
    conv1d: bool = False
    decode: Callable[[int, int], Array] | None = None

    @property
    def count(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def is_copied(self) -> bool:
        """Whether its bytes are copied from its source."""
        return not self.terms and self.decode is None and self.dtype == self.stored

    @property
    def matrix(self) -> tuple[int, int]:
        """Its rows and columns; a tensor of another shape is one column."""
        if len(self.shape) == 2 or (self.decode is not None and self.shape):
            return math.prod(self.shape[:-1]), self.shape[-1]
        return self.count, 1

    @property
    def row_bytes(self) -> int:
        """The bytes of one row in the source."""
        return self.matrix[1] * BITS[self.stored] // 8


def expected_tensors(
    base: BaseModel,
    files: Mapping[str, InputFile],
    changes: Changes,
    *,
    dtype: str | None = None,
    dequantization: Dequantization | None = None,
) -> dict[str, Expected]:
    """Return every tensor that the merged model must have, by name.

    Args:
        base: the base.
        files: the base's weight files, by name.
        changes: the changes that the adapters make to the base.
        dtype: the dtype of all float tensors, in safetensors' names; None keeps each dtype.
        dequantization: how the base becomes a 16-bit model; None without dequantization.
    """
    maker = _Maker(base, files, changes, dtype, dequantization)
    return {tensor.name: tensor for tensor in maker.all()}


class _Maker:
    """Makes the expected tensors from those of the base and of the adapters."""

    def __init__(
        self,
        base: BaseModel,
        files: Mapping[str, InputFile],
        changes: Changes,
        dtype: str | None,
        dequantization: Dequantization | None,
    ) -> None:
        self.base = base
        self.files = files
        self.changes = changes
        self.dtype = dtype
        self.dequantization = dequantization
        # Quantized tensors keep their dtype.
        stays = dtype is not None and dequantization is None
        self.kept = quantized_tensors(base) if stays else frozenset[str]()

    def all(self) -> Iterator[Expected]:
        for name in self.base.tensors:
            replacement = self.changes.replaced.get(name)
            if replacement is None:
                yield self._of_base(name, name)
            else:
                yield self._of_adapter(name, replacement, Kind.REPLACED, self._dtype_of(name))
        for head, embedding in self.changes.heads.items():
            yield self._of_base(head, embedding)
        for name, replacement in self.changes.new.items():
            yield self._of_adapter(name, replacement, Kind.NEW, replacement.info.dtype)

    def _of_base(self, name: str, stored_name: str) -> Expected:
        """Return a tensor that starts from a tensor of the base."""
        tensor = self.base.tensors[stored_name]
        terms = self.changes.terms.get(name, ())
        dtype = self._dtype_of(stored_name)
        written = dtype if stored_name in self.kept else self._written(dtype)
        plan = self.dequantization
        decode = None if plan is None else plan.decoder(stored_name, self.files)
        is_same = written == tensor.info.dtype and decode is None
        kind = Kind.SAME if is_same else Kind.CONVERTED
        return Expected(
            name,
            Kind.ADDED if terms else kind,
            written,
            tensor.info.shape,
            self.files[tensor.file],
            self.base.files[tensor.file].data_start + tensor.info.start,
            tensor.info.dtype,
            terms,
            conv1d=name in self.changes.conv1d,
            decode=decode,
        )

    def _of_adapter(self, name: str, replacement: Replacement, kind: Kind, dtype: str) -> Expected:
        """Return a tensor that an adapter brings."""
        info = replacement.info
        return Expected(
            name,
            kind,
            self._written(dtype),
            info.shape,
            replacement.owner.weights,
            replacement.start,
            info.dtype,
        )

    def _dtype_of(self, name: str) -> str:
        """Return the dtype of a tensor of the base after dequantization."""
        return self.base.tensors[name].info.dtype

    def _written(self, dtype: str) -> str:
        return self.dtype if self.dtype is not None and dtype in FLOATS else dtype


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
