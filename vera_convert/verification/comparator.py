"""One block of a merged tensor held against what it must be: the formula, in NumPy alone.

    allowed = half a last bit of the stored dtype      rounded once
            + LIMIT last bits of the working dtype     the order of sums is free

The first is what one correct rounding does and no more. The second is what makes two correct
merges differ: a BLAS or a GPU adds r products in an order of its own. Each costs a few last bits of
float32, or of float64 where an operand is, at the scale of the largest value that took part: the
weight, the sum, or the product of the norms of the row and the column that were multiplied. For
bfloat16 all that together is a few thousandths of a last bit more than half of one, so a sum that
was rounded on the way shows, whatever the dtype of the base is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.assembly.addends import Term
from vera_convert.delta import FLOAT32, FLOAT64, scaled_A, scaled_B, working_dtype
from vera_convert.dtypes import PRECISION
from vera_convert.files.tensorfile import NUMPY_DTYPE
from vera_convert.verification.expected import Expected

Array = NDArray[Any]

LIMIT = 16.0
"""Last bits of the working dtype by which a sum may be off before it was rounded.

Measured on matrices of 256 by 2,048, rank 64 to 1,024, deltas from a ten-thousandth to three times
the weights, one adapter and three: exact sums, another BLAS and one product after the other come to
4 at most, in every dtype. Where the delta, or the sum, is rounded to 16 bits on the way it is 770
at least, however small the delta is.
"""

_CHUNK = 1 << 17
"""Values that are added, rounded and compared at a time: they stay in the cache of a core."""


@dataclass(frozen=True, slots=True)
class Worst:
    """The value of a tensor that is off the most.

    Attributes:
        index: its place among the values of the tensor, as they are stored.
        found: what the merged model has.
        expected: what it must be.
    """

    index: int
    found: float
    expected: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison of values came to; those of blocks add up.

    Attributes:
        values: how many were compared.
        off: how many differ in any bit from what is expected.
        wrong: how many of these differ by more than is allowed.
        ulps: the largest difference in last bits of the stored dtype.
        excess: the largest difference beyond one rounding, in last bits of the working dtype.
        worst: the value with the largest excess of those that are off, if any is.
        moved: whether any is known to be another than that which was added to.
    """

    values: int = 0
    off: int = 0
    wrong: int = 0
    ulps: float = 0.0
    excess: float = 0.0
    worst: Worst | None = None
    moved: bool = False

    def __add__(self, other: Comparison) -> Comparison:
        first, second = (self, other) if self._leads(other) else (other, self)
        return Comparison(
            self.values + other.values,
            self.off + other.off,
            self.wrong + other.wrong,
            max(self.ulps, other.ulps),
            max(self.excess, other.excess),
            first.worst or second.worst,
            self.moved or other.moved,
        )

    def _leads(self, other: Comparison) -> bool:
        """Say whether the worst of both is the own one; of two alike it is the first."""
        if self.worst is None or other.worst is None:
            return other.worst is None
        return (-self.excess, self.worst.index) <= (-other.excess, other.worst.index)


# --- bytes ---------------------------------------------------------------------------------------


def compare_bytes(found: Array, wanted: Array, dtype: str, first: int) -> Comparison:
    """Compare bytes that have to be the same.

    Args:
        found: those of the merged model, whole values.
        wanted: those that have to be there.
        dtype: of the values, in safetensors' names.
        first: where they begin in the tensor, in bytes.
    """
    kind = NUMPY_DTYPE.get(dtype, np.dtype(np.uint8))
    values = found.size // kind.itemsize
    if np.array_equal(found, wanted):
        return Comparison(values)
    return _compare_bits(found.view(kind), wanted.view(kind), first // kind.itemsize)


def _compare_bits(found: Array, wanted: Array, first: int) -> Comparison:
    """Compare values that have to be the same in every bit."""
    differs = _bits(found) != _bits(wanted)
    if not differs.any():
        return Comparison(found.size)
    where = int(np.argmax(differs))
    worst = Worst(first + where, _number(found[[where]][0]), _number(wanted[[where]][0]))
    count = int(np.count_nonzero(differs))
    return Comparison(found.size, count, count, float("inf"), float("inf"), worst)


def _bits(values: Array) -> Array:
    return values.view(f"u{values.dtype.itemsize}")


def _number(values: Array) -> float:
    """Return the one value of an array of any dtype, of a complex one its real part."""
    return float(values.real if values.dtype.kind == "c" else values)


# --- values that are converted -------------------------------------------------------------------


def compare_conversion(tensor: Expected, stored: Array, found: Array, first: int) -> Comparison:
    """Compare rows whose dtype alone changes: one rounding has one result.

    Args:
        tensor: what is expected.
        stored: rows of its source.
        found: the same rows of the merged model.
        first: the number of the first row.
    """
    wanted = rounded(stored, found.dtype).reshape(-1)
    found = found.reshape(-1)
    both_no_numbers = np.isnan(found.astype(FLOAT64)) & np.isnan(wanted.astype(FLOAT64))
    wanted = np.where(both_no_numbers, found, wanted)
    return _compare_bits(found, wanted, first * tensor.matrix[1])


@np.errstate(over="ignore", invalid="ignore", under="ignore")
def rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    """Round values to a dtype; what is float64 comes to 16 bits by way of float32."""
    if values.dtype == FLOAT64 and dtype.itemsize < FLOAT32.itemsize:
        values = values.astype(FLOAT32)
    return values.astype(dtype)


# --- sums ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Factor:
    """The two operands of one delta, as PEFT folds them, and the norms of what they multiply.

    Attributes:
        of_rows: the operand that has a line for each row of the tensor, folded when it is needed.
        of_columns: the other one, (r, columns), folded.
        norms: of its columns.
    """

    term: Term
    d: Array
    b: Array
    of_columns: Array
    norms: Array


@dataclass(frozen=True, slots=True, eq=False)
class _Off:
    """Values of a block that are not what is expected, side by side.

    Attributes:
        weights: what the base has.
        total: the sum, in the working dtype.
        found: what the merged model has.
        wanted: the sum rounded.
        places: where they stand in the block.
    """

    weights: Array
    total: Array
    found: Array
    wanted: Array
    places: Array


class Comparator:
    """Judges blocks of one tensor; made anew for each, it holds the operands that they share."""

    def __init__(self, tensor: Expected) -> None:
        self.tensor = tensor
        self._stored = NUMPY_DTYPE[tensor.stored]
        operands = [dtype for term in tensor.terms for dtype in term.dtypes]
        self.working = working_dtype(self._stored, *operands)
        self._factors = [self._factor(term) for term in tensor.terms]
        # To 16 bits everything comes by way of float32, or may do so.
        narrow = NUMPY_DTYPE[tensor.dtype].itemsize < FLOAT32.itemsize
        self.last_bit = float(np.finfo(FLOAT32 if narrow else self.working).eps) / 2
        self._moved = False

    def _factor(self, term: Term) -> _Factor:
        d, b = term.layer.vectors()
        if term.weight != 1:
            b = b.astype(self.working) * self.working.type(term.weight)
        columns = self.tensor.matrix[1]
        if self.tensor.conv1d:
            folded = np.empty((columns, len(d)), self.working)
            shared = scaled_B(b, term.B[:columns], out=folded).T
        else:
            folded = np.empty((len(d), columns), self.working)
            shared = scaled_A(d, term.A[:, :columns], out=folded)
        return _Factor(term, d, b, shared, _norms(shared, axis=0))

    def _lines(self, factor: _Factor, first: int, last: int) -> Array:
        """Return the operand of rows, (n, r), folded."""
        rank = len(factor.d)
        if self.tensor.conv1d:
            folded = np.empty((rank, last - first), self.working)
            return scaled_A(factor.d, factor.term.A[:, first:last], out=folded).T
        folded = np.empty((last - first, rank), self.working)
        return scaled_B(factor.b[first:last], factor.term.B[first:last], out=folded)

    def deltas(self, first: int, last: int) -> Iterator[Array]:
        """Yield what each adapter adds to some rows, in the working dtype."""
        for factor in self._factors:
            yield self._lines(factor, first, last) @ factor.of_columns

    def deltas_in(self, first: int, last: int, narrow: np.dtype[Any]) -> Iterator[Array]:
        """Yield what each adapter adds to some rows if operands are rounded to a narrow dtype."""
        for factor in self._factors:
            lines, shared = self._lines(factor, first, last), factor.of_columns
            left, right = (rounded(each, narrow).astype(each.dtype) for each in (lines, shared))
            yield left @ right

    def transposed_deltas(self, first: int, last: int) -> Iterator[Array]:
        """Yield some rows of the transpose of what each adapter adds to a square tensor."""
        for factor in self._factors:
            lines = self._lines(factor, 0, self.tensor.matrix[0])
            yield factor.of_columns[:, first:last].T @ lines.T

    @np.errstate(over="ignore", invalid="ignore", under="ignore")
    def judge(self, stored: Array, found: Array, first: int) -> Comparison:
        """Hold rows of the merged model against the sum of the base's and the deltas.

        Args:
            stored: rows of the base as they are stored.
            found: the same rows of the merged model.
            first: the number of the first row.
        """
        weights = stored
        total: Array | None = None
        for delta in self.deltas(first, first + len(stored)):
            total = np.add(weights if total is None else total, delta, dtype=self.working)
        assert total is not None  # noqa: S101 -- there are terms
        norms = self._row_norms(first, first + len(stored))
        columns = stored.shape[1]
        step = max(1, _CHUNK // columns)
        result = Comparison()
        for row in range(0, len(stored), step):
            rows = slice(row, row + step)
            wanted = rounded(total[rows], found.dtype)
            differs = (_bits(found[rows]) != _bits(wanted)).reshape(-1)
            if not self._moved:  # one such value is enough
                before = rounded(weights[rows], found.dtype)
                self._moved = bool((found[rows] != before).any())
            result += Comparison(differs.size, moved=self._moved)
            places = np.flatnonzero(differs)
            if places.size:
                off = _Off(
                    weights[rows].reshape(-1)[places],
                    total[rows].reshape(-1)[places],
                    found[rows].reshape(-1)[places],
                    wanted.reshape(-1)[places],
                    places + row * columns,
                )
                result += self._judge_off(off, norms, first * columns)
        return result

    def _row_norms(self, first: int, last: int) -> list[Array]:
        return [_norms(self._lines(factor, first, last), axis=1) for factor in self._factors]

    def _products(self, norms: list[Array], places: Array) -> Array:
        """Return for some values the products of the norms of what was multiplied, summed up."""
        rows, across = np.divmod(places, self.tensor.matrix[1])
        scale = np.zeros(len(places), FLOAT64)
        for of_rows, factor in zip(norms, self._factors, strict=True):
            scale += of_rows[rows] * factor.norms[across]
        return scale

    def _judge_off(self, off: _Off, norms: list[Array], before: int) -> Comparison:
        """Comparator values that are not what the sum is rounded to here.

        Args:
            off: the values.
            norms: those of the rows of the block.
            before: how many values lie before the block.
        """
        sums, ours, merged = (a.astype(FLOAT64) for a in (off.total, off.wanted, off.found))
        products = self._products(norms, off.places)
        size = np.maximum(np.abs(off.weights.astype(FLOAT64)), np.abs(sums))
        dtype = self.tensor.dtype
        half = last_bits(np.maximum(np.abs(sums), np.abs(merged)), dtype) / 2
        unit = self.last_bit * np.maximum(np.maximum(size, products), _TINY)
        excess = (np.abs(merged - sums) - half) / unit
        excess = np.where(np.isfinite(excess), np.maximum(excess, 0), np.inf)
        # The same value in other bits is a zero of the other sign, or what the base has infinite.
        excess = np.where(merged == ours, 0.0, excess)
        # The deltas' own rounding is one of the working dtype, however coarse the stored one is.
        finer = 2 * self.last_bit * 2.0 ** PRECISION[dtype].mantissa
        ulps = np.abs(merged - ours) / last_bits(np.maximum(size, products * finer), dtype)
        ulps = np.where(merged == ours, 0.0, np.where(np.isfinite(ulps), ulps, np.inf))
        at = int(np.argmax(excess))
        return Comparison(
            0,
            len(sums),
            int(np.count_nonzero(excess > LIMIT)),
            float(ulps.max()),
            float(excess[at]),
            Worst(before + int(off.places[at]), float(merged[at]), float(ours[at])),
        )


_TINY = float(np.finfo(FLOAT64).tiny)


def last_bits(values: Array, dtype: str) -> Array:
    """Return what the last bit of a dtype stands for at the size of float64 values, none below 0.

    Args:
        values: sizes.
        dtype: in safetensors' names.
    """
    mantissa, lowest, _ = PRECISION[dtype]
    _, exponents = np.frexp(np.where(np.isfinite(values), values, 0.0))
    exponents = np.where(values == 0, lowest, np.maximum(exponents - 1, lowest))
    bits: Array = np.ldexp(1.0, exponents - mantissa)
    return bits


def _norms(matrix: Array, *, axis: int) -> Array:
    lengths: Array = np.einsum("ij,ij->i" if axis else "ij,ij->j", matrix, matrix, dtype=FLOAT64)
    return np.sqrt(lengths, out=lengths)
