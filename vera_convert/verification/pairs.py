"""Read a merged tensor and its expected source in blocks, never as a whole.

tensors, in the order of their bytes ──► runs of adjacent small tensors ──► blocks
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.assembly.input_files import StoredTensor
from vera_convert.delta import Array
from vera_convert.dtypes import BITS, FLOATS, holds_every_value
from vera_convert.files.tensorfile import NUMPY_DTYPE
from vera_convert.merging.base_files import BaseFiles
from vera_convert.merging.changes import Kind, MergedTensor

BLOCK_VALUES = 1 << 20
"""The values of a block: with sums, about 20 MiB for each thread. Larger blocks are no faster."""
_BLOCK_BYTES = 1 << 23

Buffers = NDArray[np.uint8]
"""Two read buffers of a thread, (2, bytes of a block). New memory for each block costs a third more
CPU time, because the system clears the memory."""


def new_buffers() -> Buffers:
    """Return the buffers of a thread."""
    return np.empty((2, _BLOCK_BYTES), np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A tensor of the merged model with the expected shape.

    Attributes:
        expected: the expected tensor.
        found: the stored tensor. If the dtype is wider than expected, the values must be values of
            the expected dtype.
    """

    expected: MergedTensor
    found: StoredTensor

    @property
    def row_bytes(self) -> int:
        """The bytes of one row in the merged model; a copied tensor is read byte by byte."""
        return (
            1 if self.expected.is_copied else self.expected.matrix[1] * BITS[self.found.dtype] // 8
        )

    def continues(self, other: Pair) -> bool:
        """Return whether the copied bytes follow those of another pair, in both files."""
        mine, before = self.expected, other.expected
        return (
            mine.is_copied
            and before.is_copied
            and self.found.file is other.found.file
            and mine.stored.file is before.stored.file
            and self.found.start == other.found.start + other.found.nbytes
            and mine.stored.start == before.stored.start + other.found.nbytes
        )

    def raw(self, first: int, last: int, buffers: Buffers) -> tuple[Array, Array]:
        """Return bytes of a copied tensor, or of a run of these, and of the source."""
        found = self.found.read(first, last, buffers[0])
        return found, self.expected.stored.read(first, last, buffers[1])

    def rows(self, first: int, last: int) -> tuple[Array, Array]:
        """Return rows of the merged tensor in the expected dtype, and the source's decoded rows."""
        tensor, columns = self.expected, self.expected.matrix[1]
        found = self.found.rows(first, last, columns)
        if self.found.dtype != tensor.dtype:
            found = _narrowed(found, NUMPY_DTYPE[tensor.dtype])
        if tensor.decode is not None:
            return found, tensor.decode(first, last)
        return found, tensor.stored.rows(first, last, columns)


@np.errstate(over="ignore", invalid="ignore")
def _narrowed(values: Array, dtype: np.dtype[Any]) -> Array:
    """Return values in a narrower dtype; a value without an equal becomes NaN."""
    narrow = values.astype(dtype)
    narrow[narrow.astype(values.dtype) != values] = np.nan
    return narrow


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A part of a tensor, or a run of small tensors whose copied bytes are adjacent.

    Attributes:
        run: the tensor, or the tensors of the run.
        first: the number of the first row.
        last: the number of the row after the block.
    """

    run: tuple[Pair, ...]
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        """The bytes of the block in the merged model."""
        return (self.last - self.first) * self.run[0].row_bytes


def blocks_of(pairs: Iterable[Pair]) -> Iterator[Block]:
    """Yield the blocks of all tensors; a run of several tensors is a single block."""
    for run in _runs_of(pairs):
        tensor = run[0].expected
        if tensor.is_copied:
            size, step = sum(pair.found.nbytes for pair in run), _BLOCK_BYTES
        else:
            size, columns = tensor.matrix
            ranks = [len(term.A) for term in tensor.terms]
            step = max(1, BLOCK_VALUES // max(columns, *ranks, 1))
        for first in range(0, size, step):
            yield Block(run, first, min(first + step, size))


def _runs_of(pairs: Iterable[Pair]) -> Iterator[tuple[Pair, ...]]:
    """Yield runs of small tensors that are at most as long as a block, and other tensors alone."""
    run: list[Pair] = []
    size = 0
    for pair in pairs:
        size += pair.found.nbytes
        if run and (size > _BLOCK_BYTES or not pair.continues(run[-1])):
            yield tuple(run)
            run, size = [], pair.found.nbytes
        run.append(pair)
    if run:
        yield tuple(run)


def is_wider(found: str, due: str) -> bool:
    """Return whether a dtype holds all values of another dtype, and more."""
    return found != due and {found, due} <= FLOATS and holds_every_value(found, due)


def pairs_of(
    expected: Mapping[str, MergedTensor], merged: BaseFiles, *, wider_too: bool
) -> dict[str, Pair]:
    """Return the comparable tensors by name, in the order of the bytes on the disk.

    Args:
        expected: the expected tensors, by name.
        merged: the merged model.
        wider_too: include tensors with a wider dtype, and expect the wider dtype.
    """
    found = []
    for name, tensor in expected.items():
        there = merged.model.tensors.get(name)
        if there is None or there.info.shape != tensor.shape:
            continue
        due = tensor
        if there.info.dtype != tensor.dtype:
            if not (wider_too and is_wider(there.info.dtype, tensor.dtype)):
                continue
            kind = Kind.CONVERTED if tensor.kind is Kind.SAME else tensor.kind
            due = replace(tensor, dtype=there.info.dtype, kind=kind)
        found.append(Pair(due, merged.tensor(name)))
    found.sort(key=lambda pair: (str(pair.found.file.path), pair.found.start))
    return {pair.expected.name: pair for pair in found}
