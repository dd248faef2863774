"""One block of rows of one tensor: read as stored, deltas added, rounded once. NumPy alone.

A block is what one thread works on at a time. Its buffers are made once, so memory is that of a few
blocks and of one scaled matrix of rank by width, whatever the size of a tensor. Where blocks begin
depends on shapes alone, and each product runs on one thread of the BLAS, so the bytes that come out
do not depend on how many threads there are or what they did before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.assembly.addends import Array, NotFiniteError, Numbers, Sum
from vera_convert.assembly.float16 import rounded_to_halves, widened_halves
from vera_convert.delta import FLOAT32, FLOAT64, scaled_A, scaled_B

FLOAT16 = np.dtype(np.float16)

_CHUNK_VALUES = 1 << 16
"""Values that are added and rounded at a time: they stay in the cache of a core."""
_SAMPLED_ROWS = 32
"""Rows of a tensor, about, from which its numbers are taken unless all are asked for."""


@dataclass(frozen=True, slots=True)
class BufferSizes:
    """How many bytes the buffers of one thread need; made by `buffer_sizes_for`."""

    stored: int = 0
    written: int = 0
    product: int = 0
    left: int = 0
    right: tuple[int, ...] = ()
    several: bool = False

    def __add__(self, other: BufferSizes) -> BufferSizes:
        longer, shorter = sorted((self.right, other.right), key=len, reverse=True)
        padded = shorter + (0,) * (len(longer) - len(shorter))
        return BufferSizes(
            max(self.stored, other.stored),
            max(self.written, other.written),
            max(self.product, other.product),
            max(self.left, other.left),
            tuple(map(max, longer, padded)),
            self.several or other.several,
        )


def buffer_sizes_for(sums: Sequence[Sum]) -> BufferSizes:
    """Return the room that holds any block of these tensors."""
    room = BufferSizes()
    for each in sums:
        values = each.block_rows * each.shape[1]
        size = each.working.itemsize
        room += BufferSizes(
            stored=values * each.stored.itemsize,
            written=0 if each.stored == each.written else values * each.written.itemsize,
            product=values * size,
            left=each.block_rows * each.rank * size,
            right=tuple(len(term.A) * each.shape[1] * size for term in each.terms),
            several=len(each.terms) > 1,
        )
    return room


class Workspace:
    """The buffers of one thread, and the work on one block at a time.

    Fill `stored_bytes`, call `add`, and write `written_bytes`.
    """

    def __init__(self, room: BufferSizes, *, all_rows: bool = False) -> None:
        self._stored = np.empty(room.stored, np.uint8)
        self._written = np.empty(room.written, np.uint8)
        self._product = np.empty(room.product, np.uint8)
        self._another = np.empty(room.product if room.several else 0, np.uint8)
        self._chunk = np.empty(_CHUNK_VALUES * 8, np.uint8)
        self._scratch = np.empty((2, _CHUNK_VALUES), np.uint32)
        self._left = np.empty(room.left, np.uint8)
        self._right = [np.empty(size, np.uint8) for size in room.right]
        self._all_rows = all_rows
        self._prepared: Sum | None = None
        self._vectors: list[tuple[Array, Array]] = []

    def stored_bytes(self, tensor: Sum, first: int, last: int) -> memoryview:
        """Return the buffer for the rows `first` to `last` (not included) as they are stored."""
        count = (last - first) * tensor.shape[1] * tensor.stored.itemsize
        return self._stored[:count].data

    def written_bytes(self, tensor: Sum, first: int, last: int) -> memoryview:
        """Return the bytes of the same rows after `add`."""
        count = (last - first) * tensor.shape[1] * tensor.written.itemsize
        return self._sink(tensor)[:count].data

    def _sink(self, tensor: Sum) -> NDArray[np.uint8]:
        """Return the buffer of the result: that of what is stored, where the dtype stays."""
        return self._stored if tensor.stored == tensor.written else self._written

    @np.errstate(over="ignore", invalid="ignore", under="ignore")  # looked for and told better here
    def add(self, tensor: Sum, first: int, last: int) -> Numbers:
        """Turn the stored rows into the written ones.

        Raises:
            NotFiniteError: a sum is not finite; or, where nothing is added, a finite value got
                lost in a narrower dtype.
        """
        shape = (last - first, tensor.shape[1])
        stored = _values(self._stored, tensor.stored, shape)
        written = _values(self._sink(tensor), tensor.written, shape)
        if tensor.decode is not None:
            stored = tensor.decode(stored, first)
        if not tensor.terms:
            self._round_all(stored, written)
            if not _all_finite(written):
                _raise_not_finite(written, first, before=stored)
            return Numbers()
        if tensor is not self._prepared:
            self._prepare(tensor)
        stride = 1 if self._all_rows else max(1, tensor.shape[0] // _SAMPLED_ROWS)
        looked_at = slice(-first % stride, None, stride)
        before = stored[looked_at].copy()
        change, finite = self._sum(tensor, slice(first, last), stored, written, looked_at)
        if not finite:
            _raise_not_finite(written, first)
        return _numbers(before, change, written[looked_at])

    def _sum(
        self, tensor: Sum, rows: slice, stored: Array, written: Array, looked_at: slice
    ) -> tuple[Array, bool]:
        """Fill `written`; return what was added to the rows looked at, and if all is finite."""
        total = _values(self._product, tensor.working, stored.shape)
        change, finite = np.zeros_like(total[looked_at]), True
        for index in range(len(tensor.terms)):
            product = _values(self._another, tensor.working, stored.shape) if index else total
            self._multiply(tensor, index, rows, product)
            change += product[looked_at]
            is_last = index == len(tensor.terms) - 1
            finite = self._add(
                total if index else stored, product, total, written if is_last else None
            )
        return change, finite

    def _prepare(self, tensor: Sum) -> None:
        """Scale for each term the operand that all blocks of the tensor share."""
        self._prepared = None
        self._vectors = []
        width = tensor.shape[1]
        for term, buffer in zip(tensor.terms, self._right, strict=False):
            d, b = term.layer.vectors()
            b = weighted(b, term.weight, tensor.working)
            self._vectors.append((d, b))
            rank = len(term.A)
            if tensor.conv1d:
                scaled_B(b, term.B[:width], out=_values(buffer, tensor.working, (width, rank)))
            else:
                scaled_A(d, term.A[:, :width], out=_values(buffer, tensor.working, (rank, width)))
        self._prepared = tensor

    def _multiply(self, tensor: Sum, index: int, rows: slice, out: Array) -> None:
        """Fill `out` with the rows of one term's delta, transposed for a Conv1D."""
        term, (d, b) = tensor.terms[index], self._vectors[index]
        (count, width), rank = out.shape, len(term.A)
        if tensor.conv1d:
            left = _values(self._left, tensor.working, (rank, count))
            scaled_A(d, term.A[:, rows], out=left)
            right = _values(self._right[index], tensor.working, (width, rank))
            np.matmul(left.T, right.T, out=out)
        else:
            left = _values(self._left, tensor.working, (count, rank))
            scaled_B(b[rows], term.B[rows], out=left)
            right = _values(self._right[index], tensor.working, (rank, width))
            np.matmul(left, right, out=out)

    def _add(self, base: Array, change: Array, total: Array, rounded: Array | None) -> bool:
        """Set ``total = base + change`` and, where it is given, `rounded` to the rounded total.

        Chunk by chunk, so that each step finds its values in the cache. `rounded` can lie where
        `base` does. Returns whether all that was rounded is finite.
        """
        finite = True
        base, change, total = base.reshape(-1), change.reshape(-1), total.reshape(-1)
        flat = None if rounded is None else rounded.reshape(-1)
        for part in _chunks(total.size):
            np.add(self._wide(base[part], total.dtype), change[part], out=total[part])
            if flat is not None:
                self._round(total[part], flat[part])
                finite = finite and _all_finite(flat[part])
        return finite

    def _round_all(self, stored: Array, written: Array) -> None:
        """Set `written` to what is stored, rounded chunk by chunk."""
        values, out = stored.reshape(-1), written.reshape(-1)
        for part in _chunks(values.size):
            self._round(values[part].copy(), out[part])

    def _wide(self, values: Array, dtype: np.dtype[Any]) -> Array:
        """Return values in a wider dtype: NumPy would cast them in smaller steps while it adds."""
        if values.dtype == dtype:
            return values
        wide = _values(self._chunk, dtype, values.shape)
        if values.dtype == FLOAT16 and dtype == FLOAT32 and _all_finite(values):
            widened_halves(values, wide)
        else:
            wide[...] = values
        return wide

    def _round(self, values: Array, out: Array) -> None:
        """Set `out` to rounded values, which may be lost on the way.

        What is float64 comes to 16 bits by way of float32.
        """
        if values.dtype == FLOAT64 and out.dtype.itemsize < FLOAT32.itemsize:
            values = values.astype(FLOAT32)
        if values.dtype == FLOAT32 and out.dtype == FLOAT16:
            rounded_to_halves(values, out, self._scratch)
        else:
            out[...] = values


def _values(buffer: NDArray[np.uint8], dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Return the beginning of a buffer as an array."""
    return buffer[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK_VALUES) for start in range(0, count, _CHUNK_VALUES))


def _all_finite(values: Array) -> bool:
    """Say whether no value is infinite or no number.

    Those have the largest bit patterns of either sign, so two looks at the largest integer find
    them: faster than asking each value, and alike in every dtype.
    """
    return all(
        values.view(integer).max(initial=0) < infinity
        for integer, infinity in _infinities(values.dtype)
    )


@cache
def _infinities(dtype: np.dtype[Any]) -> tuple[tuple[str, Any], ...]:
    """Return both infinities of a dtype as the integers that their bits are, with those' dtypes."""
    signed, unsigned = f"i{dtype.itemsize}", f"u{dtype.itemsize}"
    both = np.array([np.inf, -np.inf], dtype)
    return (signed, both.view(signed)[0]), (unsigned, both.view(unsigned)[1])


def _raise_not_finite(written: Array, first: int, *, before: Array | None = None) -> None:
    """Raise for the first value that is not finite and was so `before`, if that is given."""
    wrong = ~np.isfinite(written.astype(FLOAT64))
    if before is not None:
        wrong &= np.isfinite(before.astype(FLOAT64))
    if wrong.any():
        row, column = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        raise NotFiniteError((first + int(row), int(column)))


def _numbers(stored: Array, change: Array, written: Array) -> Numbers:
    """Compare rows before and after."""
    before, after = stored.astype(FLOAT64), written.astype(FLOAT64)
    wanted = change.astype(FLOAT64)
    lost = (after - before) - wanted
    return Numbers(
        values=stored.size,
        changed=int(np.count_nonzero(after != before)),
        base=_squares(before),
        change=_squares(wanted),
        loss=_squares(lost),
    )


def _squares(values: NDArray[np.float64]) -> float:
    return float(np.vdot(values, values))


def weighted(b: Array, weight: float, dtype: np.dtype[Any]) -> Array:
    """Return b times its adapter's weight, in the working dtype; b itself for a weight of 1."""
    return b if weight == 1 else b.astype(dtype) * dtype.type(weight)


# --- where it is done ----------------------------------------------------------------------------


def product_sha256(multiply: Callable[[Array, Array], Array] = np.matmul) -> str:
    """Return the SHA-256 of a small fixed product: merges are the same bytes where it is the same.

    The order in which a BLAS adds depends on the kind of CPU, and with it the last bit of a sum.
    """
    values = np.random.RandomState(0)  # its values never change
    left = values.random_sample((96, 256)).astype(FLOAT32)
    right = values.random_sample((256, 160)).astype(FLOAT32)
    return sha256(np.ascontiguousarray(multiply(left, right)).data).hexdigest()


@dataclass(frozen=True, slots=True)
class Device:
    """What does the products.

    Attributes:
        name: how the user calls it.
        bench: makes the bench of one thread, for a room, and for all rows to be looked at or some.
        product: multiplies what `product_sha256` does and returns the hash.
    """

    name: str
    bench: Callable[[BufferSizes, bool], Workspace]
    product: Callable[[], str]


CPU = Device("cpu", lambda room, all_rows: Workspace(room, all_rows=all_rows), product_sha256)
