"""What every tensor of a merged model must be, told from the inputs and the options alone.

The plan of the merge is not asked: a mistake of it would then be held against itself.
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
"""What transformers' classes call the heads and poolers that another class does not have."""


class Kind(StrEnum):
    """What a merge does to a tensor."""

    SAME = "same"
    """Nothing: it is the base's, byte for byte."""
    CONVERTED = "converted"
    """Its dtype alone is another."""
    ADDED = "added"
    """Deltas are added to it."""
    REPLACED = "replaced"
    """An adapter's own tensor takes its place."""
    NEW = "new"
    """An adapter brings it, and the base has none."""


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """One tensor as the merged model must have it.

    Attributes:
        name: its name.
        kind: what the merge does to it.
        dtype: its dtype in the merged model, in safetensors' names.
        shape: its shape.
        source: the file that holds what it starts from.
        start: where that begins there.
        stored: the dtype that it has there.
        terms: what is added, in this order.
        conv1d: whether it is stored as (in, out).
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
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def is_carried(self) -> bool:
        """Whether its bytes are those of its source."""
        return not self.terms and self.decode is None and self.dtype == self.stored

    @property
    def matrix(self) -> tuple[int, int]:
        """Its rows and columns; what is no matrix is one column."""
        if len(self.shape) == 2 or (self.decode is not None and self.shape):
            return math.prod(self.shape[:-1]), self.shape[-1]
        return self.count, 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in its source."""
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
        files: its weight files, by name.
        changes: what adapters do to it.
        dtype: what its float tensors become, in safetensors' names; None keeps each.
        dequantization: how the base becomes a 16-bit model; None if it stays as it is.
    """
    maker = _Maker(base, files, changes, dtype, dequantization)
    return {tensor.name: tensor for tensor in maker.all()}


class _Maker:
    """Makes expected tensors of those of the base, and of those that are new."""

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
        # What means nothing without its quantizer keeps its dtype.
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
        """Return a tensor that starts from one of the base's."""
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
        """Return a tensor that an adapter brings, in the dtype of what it replaces."""
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
        """Return the dtype of a tensor of the base, once it is no longer quantized."""
        return self.base.tensors[name].info.dtype

    def _written(self, dtype: str) -> str:
        return self.dtype if self.dtype is not None and dtype in FLOATS else dtype


def without_old_head(expected: Mapping[str, Expected], merged: BaseModel) -> dict[str, Expected]:
    """Return what must be there if the merged model is of another class than the base.

    transformers saves no head that the class does not have, so the base's own may be missing.
    """
    return {
        name: each
        for name, each in expected.items()
        if name in merged.tensors
        or each.kind not in (Kind.SAME, Kind.CONVERTED)
        or _HEADS.isdisjoint(name.split(".")[:2])
    }
