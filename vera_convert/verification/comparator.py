"""Compare a block of a merged tensor with the expected values: the formula, in NumPy alone.

    allowed = half a ULP of the stored dtype      one rounding
            + LIMIT ULP of the working dtype      the order of summation is free

The first term is the largest error of one correct rounding. The second allows the difference of two
correct merges: each BLAS and GPU adds r products in another order. Each order costs a few ULP of
float32, or of float64 if an operand is in float64, at the scale of the largest value in the sum:
the weight, the sum, or the product of the norms of the multiplied row and column. For bfloat16 the
two terms together exceed half a ULP by a few thousandths, so an intermediate rounding shows,
for every dtype of the base.

ULP is the unit in the last place: the value of the last bit at the size of a number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vera_convert.assembly.addends import Term
from vera_convert.delta import FLOAT32, FLOAT64, Array, scaled_A, scaled_B, working_dtype
from vera_convert.dtypes import PRECISION
from vera_convert.files.tensorfile import NUMPY_DTYPE
from vera_convert.merging.changes import MergedTensor

LIMIT = 16.0
"""How many ULP of the working dtype an unrounded sum may differ by.

Measured on matrices of 256 by 2,048 with ranks of 64 to 1,024, one adapter and three, and deltas
from a ten-thousandth to three times the weights. Exact sums, another BLAS, and one product after
the other differ by at most 4, in every dtype. An intermediate rounding of the delta or of the sum
to 16 bits costs at least 770, however small the delta.
"""

_CHUNK = 1 << 17
"""How many values are added, rounded and compared at a time: as many as fit a core's cache."""


@dataclass(frozen=True, slots=True)
class Worst:
    """The value of a tensor with the largest error.

    Attributes:
        index: the index of the value in the flattened tensor.
        found: the value in the merged model.
        expected: the expected value.
    """

    index: int
    found: float
    expected: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of comparing values; the results of blocks can be added.

    Attributes:
        values: how many values were compared.
        off: how many values differ in any bit from the expected values.
        wrong: how many values differ by more than is allowed.
        ulps: the largest difference in ULP of the stored dtype.
        excess: the largest difference beyond one rounding, in ULP of the working dtype.
        worst: the value with the largest excess; None if no value differs.
        moved: whether a value is known to differ from the base's value.
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
        """Return whether this result holds the worse value; of two equal values, the first."""
        if self.worst is None or other.worst is None:
            return other.worst is None
        return (-self.excess, self.worst.index) <= (-other.excess, other.worst.index)


# --- bytes ---------------------------------------------------------------------------------------


def compare_bytes(found: Array, wanted: Array, dtype: str, first: int) -> Comparison:
    """Compare two blocks of bytes for equality.

    Args:
        found: bytes of the merged model, whole values.
        wanted: the expected bytes.
        dtype: the dtype of the values, in safetensors' names.
        first: the offset of the bytes in the tensor.
    """
    kind = NUMPY_DTYPE.get(dtype, np.dtype(np.uint8))
    values = found.size // kind.itemsize
    if np.array_equal(found, wanted):
        return Comparison(values)
    return _compare_bits(found.view(kind), wanted.view(kind), first // kind.itemsize)


def _compare_bits(found: Array, wanted: Array, first: int) -> Comparison:
    """Compare all bits of values."""
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
    """Return the single value of an array; for a complex array, the real part."""
    return float(values.real if values.dtype.kind == "c" else values)


# --- conversions ---------------------------------------------------------------------------------


def compare_conversion(tensor: MergedTensor, stored: Array, found: Array, first: int) -> Comparison:
    """Compare rows of another dtype without a delta: rounding has a single result.

    Args:
        tensor: the expected tensor.
        stored: rows of the source.
        found: the same rows of the merged model.
        first: the number of the first row.
    """
    wanted = rounded(stored, found.dtype).reshape(-1)
    found = found.reshape(-1)
    both_nan = np.isnan(found.astype(FLOAT64)) & np.isnan(wanted.astype(FLOAT64))
    wanted = np.where(both_nan, found, wanted)
    return _compare_bits(found, wanted, first * tensor.matrix[1])


@np.errstate(over="ignore", invalid="ignore", under="ignore")
def rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    """Round values to a dtype; float64 is rounded to 16 bits by way of float32."""
    if values.dtype == FLOAT64 and dtype.itemsize < FLOAT32.itemsize:
        values = values.astype(FLOAT32)
    return values.astype(dtype)


def rounded_to(values: Array, narrow: np.dtype[Any]) -> Array:
    """Round values to a narrower dtype, and return the result in the dtype of the values."""
    return rounded(values, narrow).astype(values.dtype)


# --- sums ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Factor:
    """The operands of one delta, scaled by the vectors as in PEFT.

    The operand of the rows, (rows, r), is scaled block by block.

    Attributes:
        term: the delta, with A and B as they are multiplied.
        d: the vector of the rank, (r,).
        b: the vector of the outputs, times the adapter's weight.
        of_columns: the operand of the columns, (r, columns), scaled.
        norms: the norm of each column of `of_columns`.
    """

    term: Term
    d: Array
    b: Array
    of_columns: Array
    norms: Array


class Comparator:
    """Compare blocks of one tensor, and hold the operands that all blocks share."""

    def __init__(self, tensor: MergedTensor, narrow: np.dtype[Any] | None = None) -> None:
        """Prepare the operands.

        Args:
            tensor: a tensor with deltas.
            narrow: a dtype to round the vectors, A and B to; None to use the stored values.
        """
        self.tensor = tensor
        self._stored = NUMPY_DTYPE[tensor.stored.dtype]
        operands = [dtype for term in tensor.terms for dtype in term.dtypes]
        self.working = working_dtype(self._stored, *([] if narrow is not None else operands))
        self._factors = [self._factor(term, narrow) for term in tensor.terms]
        # A merge may round to 16 bits by way of float32.
        is_narrow = NUMPY_DTYPE[tensor.dtype].itemsize < FLOAT32.itemsize
        self.last_bit = float(np.finfo(FLOAT32 if is_narrow else self.working).eps) / 2
        self._moved = False

    def _factor(self, term: Term, narrow: np.dtype[Any] | None) -> _Factor:
        A, B, (d, b) = term.A, term.B, term.vectors()
        if narrow is not None:
            A, B, d, b = (rounded_to(each.astype(FLOAT32), narrow) for each in (A, B, d, b))
        if term.weight != 1:
            b = b.astype(self.working) * self.working.type(term.weight)
        columns = self.tensor.matrix[1]
        if self.tensor.conv1d:
            folded = np.empty((columns, len(d)), self.working)
            shared = scaled_B(b, B[:columns], out=folded).T
        else:
            folded = np.empty((len(d), columns), self.working)
            shared = scaled_A(d, A[:, :columns], out=folded)
        return _Factor(replace(term, A=A, B=B), d, b, shared, _norms(shared, axis=0))

    def _row_operand(self, factor: _Factor, first: int, last: int) -> Array:
        """Return the scaled operand of some rows, (n, r)."""
        rank = len(factor.d)
        if self.tensor.conv1d:
            folded = np.empty((rank, last - first), self.working)
            return scaled_A(factor.d, factor.term.A[:, first:last], out=folded).T
        folded = np.zeros((last - first, rank), self.working)
        in_block, in_layer = factor.term.overlap(slice(first, last))
        scaled_B(factor.b[in_layer], factor.term.B[in_layer], out=folded[in_block])
        return folded

    def deltas(self, first: int, last: int) -> Iterator[Array]:
        """Yield the delta of each adapter for some rows, in the working dtype."""
        for factor in self._factors:
            yield self._row_operand(factor, first, last) @ factor.of_columns

    def deltas_in(self, first: int, last: int, narrow: np.dtype[Any]) -> Iterator[Array]:
        """Yield each adapter's delta for some rows, with operands rounded to a narrow dtype."""
        for factor in self._factors:
            lines, shared = self._row_operand(factor, first, last), factor.of_columns
            yield rounded_to(lines, narrow) @ rounded_to(shared, narrow)

    def transposed_deltas(self, first: int, last: int) -> Iterator[Array]:
        """Yield some rows of the transposed delta of each adapter, for a square tensor."""
        for factor in self._factors:
            lines = self._row_operand(factor, 0, self.tensor.matrix[0])
            yield factor.of_columns[:, first:last].T @ lines.T

    @np.errstate(over="ignore", invalid="ignore", under="ignore")
    def compare(self, stored: Array, found: Array, first: int) -> Comparison:
        """Compare rows of the merged model with the sum of the base's rows and the deltas.

        Args:
            stored: the base's rows, as stored.
            found: the same rows of the merged model.
            first: the number of the first row.
        """
        total = stored
        for delta in self.deltas(first, first + len(stored)):
            total = np.add(total, delta, dtype=self.working)
        norms = self._row_norms(first, first + len(stored))
        columns = stored.shape[1]
        step = max(1, _CHUNK // columns)
        result = Comparison()
        for row in range(0, len(stored), step):
            rows = slice(row, row + step)
            wanted = rounded(total[rows], found.dtype)
            differs = (_bits(found[rows]) != _bits(wanted)).reshape(-1)
            if not self._moved:  # one changed value is enough
                before = rounded(stored[rows], found.dtype)
                self._moved = bool((found[rows] != before).any())
            result += Comparison(differs.size, moved=self._moved)
            places = np.flatnonzero(differs)
            if places.size:
                blocks = (stored[rows], total[rows], found[rows], wanted)
                off = [block.reshape(-1)[places] for block in blocks]
                result += self._compare_off(off, norms, places + row * columns, first * columns)
        return result

    def _row_norms(self, first: int, last: int) -> list[Array]:
        return [_norms(self._row_operand(factor, first, last), axis=1) for factor in self._factors]

    def _products(self, norms: list[Array], places: Array) -> Array:
        """Return for each value the product of the norms of row and column, over all adapters."""
        rows, across = np.divmod(places, self.tensor.matrix[1])
        scale = np.zeros(len(places), FLOAT64)
        for of_rows, factor in zip(norms, self._factors, strict=True):
            scale += of_rows[rows] * factor.norms[across]
        return scale

    def _compare_off(
        self, off: Sequence[Array], norms: list[Array], places: Array, before: int
    ) -> Comparison:
        """Compare the values with differences from our own rounded sum.

        Args:
            off: the base's values, the sums in the working dtype, the merged model's values, and
                the rounded sums.
            norms: for each adapter, the norms of the operand of the block's rows.
            places: the index of each value in the flattened block.
            before: how many values of the tensor come before the block.
        """
        weights, sums, merged, ours = (each.astype(FLOAT64) for each in off)
        products = self._products(norms, places)
        size = np.maximum(np.abs(weights), np.abs(sums))
        dtype = self.tensor.dtype
        half = last_bits(np.maximum(np.abs(sums), np.abs(merged)), dtype) / 2
        unit = self.last_bit * np.maximum(np.maximum(size, products), _TINY)
        excess = (np.abs(merged - sums) - half) / unit
        excess = np.where(np.isfinite(excess), np.maximum(excess, 0), np.inf)
        # Equal values with other bits are zeros of the other sign.
        excess = np.where(merged == ours, 0.0, excess)
        # The deltas' own rounding is one of the working dtype, however coarse the stored dtype.
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
            Worst(before + int(places[at]), float(merged[at]), float(ours[at])),
        )


_TINY = float(np.finfo(FLOAT64).tiny)


def last_bits(values: Array, dtype: str) -> Array:
    """Return one ULP of a dtype at the size of each value.

    Args:
        values: absolute values, in float64.
        dtype: the dtype, in safetensors' names.
    """
    mantissa, lowest, _ = PRECISION[dtype]
    _, exponents = np.frexp(np.where(np.isfinite(values), values, 0.0))
    exponents = np.where(values == 0, lowest, np.maximum(exponents - 1, lowest))
    bits: Array = np.ldexp(1.0, exponents - mantissa)
    return bits


def _norms(matrix: Array, *, axis: int) -> Array:
    lengths: Array = np.einsum("ij,ij->i" if axis else "ij,ij->j", matrix, matrix, dtype=FLOAT64)
    return np.sqrt(lengths, out=lengths)
