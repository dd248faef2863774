"""Compute one block of rows of a merged tensor: add the deltas, then round once. NumPy alone.

A thread works on one block at a time, in buffers that the thread allocates once. The memory of a
thread is that of a few blocks and of one scaled matrix (rank, width), for a tensor of any size.
The shapes alone decide the limits of the blocks, and each product runs on one BLAS thread. The
merged bytes are therefore the same for any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.assembly.addends import NotFiniteError, Numbers, Sum, Term
from vera_convert.delta import FLOAT32, FLOAT64, Array, scaled_A, scaled_B
from vera_convert.float16 import rounded_to_halves, widened_halves

FLOAT16 = np.dtype(np.float16)

_CHUNK_VALUES = 1 << 16
"""Values that are added and rounded at a time: so many fit into the cache of a core."""
_SAMPLED_ROWS = 32
"""About how many rows of a tensor are sampled for the statistics."""


@dataclass(frozen=True, slots=True)
class BufferSizes:
    """The bytes of each buffer of one thread.

    Attributes:
        stored: for stored rows.
        written: for written rows; 0 if the written rows take the place of the stored rows.
        product: for one delta, and for the sum.
        another: for the delta of a second term.
        left: for the operand of a product that belongs to a block of rows.
        right: for the operand that all blocks share, for each term.
    """

    stored: int = 0
    written: int = 0
    product: int = 0
    another: int = 0
    left: int = 0
    right: tuple[int, ...] = ()


def buffer_sizes_for(sums: Sequence[Sum]) -> BufferSizes:
    """Return the buffer sizes that suffice for every block of the tensors."""
    largest = map(max, zip_longest((0,) * 5, *map(_sizes_for, sums), fillvalue=0))
    stored, written, product, another, left, *right = largest
    return BufferSizes(stored, written, product, another, left, tuple(right))


def _sizes_for(tensor: Sum) -> tuple[int, ...]:
    """Return the sizes for one tensor, in the order of the attributes of `BufferSizes`."""
    values, size = tensor.block_rows * tensor.shape[1], tensor.working.itemsize
    return (
        values * tensor.stored.itemsize,
        0 if tensor.stored == tensor.written else values * tensor.written.itemsize,
        values * size,
        values * size if len(tensor.terms) > 1 else 0,
        tensor.block_rows * tensor.rank * size,
        *(len(term.A) * tensor.shape[1] * size for term in tensor.terms),
    )


class Workspace:
    """The buffers of one thread, which computes one block at a time.

    Fill `stored_bytes`, call `add`, then write `written_bytes` to the output.
    """

    def __init__(self, sizes: BufferSizes, *, all_rows: bool = False) -> None:
        self._stored = np.empty(sizes.stored, np.uint8)
        self._written = np.empty(sizes.written, np.uint8)
        self._product = np.empty(sizes.product, np.uint8)
        self._another = np.empty(sizes.another, np.uint8)
        self._chunk = np.empty(_CHUNK_VALUES * 8, np.uint8)
        self._scratch = np.empty((2, _CHUNK_VALUES), np.uint32)
        self._left = np.empty(sizes.left, np.uint8)
        self._right = [np.empty(size, np.uint8) for size in sizes.right]
        self._decoded: NDArray[np.uint8] | None = None
        self._all_rows = all_rows
        self._prepared: Sum | None = None
        self._vectors: list[tuple[Array, Array]] = []

    def stored_bytes(self, tensor: Sum, first: int, last: int) -> memoryview:
        """Return the buffer for the rows `first` to `last` (not included) in the stored dtype."""
        count = (last - first) * tensor.shape[1] * tensor.stored.itemsize
        return self._stored[:count].data

    def written_bytes(self, tensor: Sum, first: int, last: int) -> memoryview:
        """Return the bytes of the same rows after `add`."""
        if self._decoded is not None:
            return self._decoded.data
        count = (last - first) * tensor.shape[1] * tensor.written.itemsize
        return self._sink(tensor)[:count].data

    def _sink(self, tensor: Sum) -> NDArray[np.uint8]:
        """Return the buffer of the result: the buffer of the stored rows, if the dtype stays."""
        return self._stored if tensor.stored == tensor.written else self._written

    @np.errstate(over="ignore", invalid="ignore", under="ignore")  # found and reported below
    def add(self, tensor: Sum, first: int, last: int) -> Numbers:
        """Compute the written rows from the stored rows.

        Raises:
            NotFiniteError: a sum is infinite or NaN; or, if nothing is added, a finite value
                overflows a narrower dtype.
        """
        shape = (last - first, tensor.shape[1])
        stored = _values(self._stored, tensor.stored, shape)
        written = _values(self._sink(tensor), tensor.written, shape)
        self._decoded = None
        if tensor.decode is not None:
            stored = tensor.decode(first, last)
        if not tensor.terms:
            if tensor.decode is not None and stored.dtype == written.dtype:
                written = np.ascontiguousarray(stored)  # written to the file without a copy
                self._decoded = written.reshape(-1).view(np.uint8)
            else:
                self._round_all(stored, written)
            if not _all_finite(written):
                _raise_not_finite(tensor, written, first, before=stored)
            return Numbers()
        if tensor is not self._prepared:
            self._prepare(tensor)
        stride = 1 if self._all_rows else max(1, tensor.shape[0] // _SAMPLED_ROWS)
        looked_at = slice(-first % stride, None, stride)
        before = stored[looked_at].copy()
        change, finite = self._sum(tensor, slice(first, last), stored, written, looked_at)
        if not finite:
            _raise_not_finite(tensor, written, first)
        return _numbers(before, change, written[looked_at])

    def _sum(
        self, tensor: Sum, rows: slice, stored: Array, written: Array, looked_at: slice
    ) -> tuple[Array, bool]:
        """Fill `written`; return the sampled rows of the delta, and whether all sums are finite."""
        total = _values(self._product, tensor.working, stored.shape)
        change, finite = np.zeros_like(total[looked_at]), True
        for index in range(len(tensor.terms)):
            product = _values(self._another, tensor.working, stored.shape) if index else total
            self._multiply(tensor, index, rows, product)
            for kept in kept_rows(tensor.terms[index], rows):
                product[kept] = -0.0
            change += product[looked_at]
            is_last = index == len(tensor.terms) - 1
            finite = self._add(
                total if index else stored, product, total, written if is_last else None
            )
        return change, finite

    def _prepare(self, tensor: Sum) -> None:
        """Scale the operand of each term that all blocks of the tensor share."""
        self._prepared = None
        self._vectors = []
        width = tensor.shape[1]
        for term, buffer in zip(tensor.terms, self._right, strict=False):
            d, b = term.vectors()
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
            for kept in kept_rows(term, rows):
                left[kept] = 0
            in_block, in_layer = term.overlap(rows)
            scaled_B(b[in_layer], term.B[in_layer], out=left[in_block])
            right = _values(self._right[index], tensor.working, (rank, width))
            np.matmul(left, right, out=out)

    def _add(self, base: Array, change: Array, total: Array, rounded: Array | None) -> bool:
        """Set ``total = base + change``, and set `rounded`, if given, to the rounded total.

        The method works in chunks, so each step finds the values in the cache. `rounded` may share
        the memory of `base`.

        Returns:
            Whether all rounded values are finite.
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
        """Set `written` to the rounded stored values."""
        values, out = stored.reshape(-1), written.reshape(-1)
        for part in _chunks(values.size):
            self._round(values[part].copy(), out[part])

    def _wide(self, values: Array, dtype: np.dtype[Any]) -> Array:
        """Return the values in a wider dtype. NumPy's own cast during an addition is slower."""
        if values.dtype == dtype:
            return values
        wide = _values(self._chunk, dtype, values.shape)
        if values.dtype == FLOAT16 and dtype == FLOAT32 and _all_finite(values):
            widened_halves(values, wide)
        else:
            wide[...] = values
        return wide

    def _round(self, values: Array, out: Array) -> None:
        """Set `out` to the rounded values. The method may overwrite `values`.

        Float64 values are rounded to float32 first, then to 16 bits, as torch does.
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


def kept_rows(term: Term, block: slice) -> tuple[slice, slice]:
    """Return the rows of a block that a delta leaves alone, counted from the block's first row.

    There the delta is set to -0.0, because ``x + -0.0`` has the bits of any finite x.
    """
    changed, _ = term.overlap(block)
    return slice(changed.start), slice(changed.stop, None)


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK_VALUES) for start in range(0, count, _CHUNK_VALUES))


def _all_finite(values: Array) -> bool:
    """Return whether no value is infinite or NaN.

    Infinities and NaNs have the largest bit patterns of each sign. Two searches for the largest
    integer are faster than a test of each value, and work alike in every dtype.
    """
    return all(
        values.view(integer).max(initial=0) < infinity
        for integer, infinity in _infinities(values.dtype)
    )


@cache
def _infinities(dtype: np.dtype[Any]) -> tuple[tuple[str, Any], ...]:
    """Return the bits of both infinities of a dtype as integers, with the integers' dtypes."""
    signed, unsigned = f"i{dtype.itemsize}", f"u{dtype.itemsize}"
    both = np.array([np.inf, -np.inf], dtype)
    return (signed, both.view(signed)[0]), (unsigned, both.view(unsigned)[1])


def _raise_not_finite(
    tensor: Sum, written: Array, first: int, *, before: Array | None = None
) -> None:
    """Raise an error for the first value that is not finite, but was finite in `before`."""
    wrong = ~np.isfinite(written.astype(FLOAT64))
    if before is not None:
        wrong &= np.isfinite(before.astype(FLOAT64))
    if wrong.any():
        row, column = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        raise NotFiniteError(tensor, (first + int(row), int(column)))


def _numbers(stored: Array, change: Array, written: Array) -> Numbers:
    """Return the statistics of rows before and after."""
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
    """Return b times the adapter's weight in the working dtype; b itself for a weight of 1."""
    return b if weight == 1 else b.astype(dtype) * dtype.type(weight)


# --- devices -------------------------------------------------------------------------------------


def product_sha256(multiply: Callable[[Array, Array], Array] = np.matmul) -> str:
    """Return the SHA-256 of a small fixed product.

    The order in which a BLAS adds depends on the kind of CPU. Two machines with the same hash merge
    to the same bytes.
    """
    values = np.random.RandomState(0)  # NumPy promises the same values forever
    left = values.random_sample((96, 256)).astype(FLOAT32)
    right = values.random_sample((256, 160)).astype(FLOAT32)
    return sha256(np.ascontiguousarray(multiply(left, right)).data).hexdigest()


@dataclass(frozen=True, slots=True)
class Device:
    """A device that computes products.

    Attributes:
        name: the user's name for the device.
        workspace: returns a workspace for one thread, given the buffer sizes and whether the
            statistics take all rows.
        product: returns `product_sha256` of the device.
    """

    name: str
    workspace: Callable[[BufferSizes, bool], Workspace]
    product: Callable[[], str]


def _on_cpu(sizes: BufferSizes, all_rows: bool) -> Workspace:  # noqa: FBT001 -- as `Device` calls
    return Workspace(sizes, all_rows=all_rows)


CPU = Device("cpu", _on_cpu, product_sha256)
