"""The formulas of a LoRA equal to a VeRA layer, with NumPy alone.

    VeRA:  dy = diag(b) B diag(d) A x            A (r, in), B (out, r), d (r), b (out)
    LoRA:  dy = (lora_alpha / r) lora_B lora_A x     lora_A (r, in), lora_B (out, r)

    lora_A = A        lora_B = diag(b) B diag(d)        lora_alpha = r, so the scaling is 1

d goes into lora_B. lora_A is then the shared matrix itself, and every module with the same number
of inputs has the same lora_A, bit for bit: engines that fuse q, k and v need that.

Each entry of lora_B is the product of three numbers, taken in float64 and rounded once to the
stored dtype. No sum is involved, so the bytes do not depend on a BLAS or the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vera_convert.delta import Array

Float64 = NDArray[np.float64]

_CACHED_VALUES = 1 << 16
"""Values of lora_B computed at a time: the float64 copy stays in a core's cache."""
PRODUCT_VALUES = 1 << 19
"""Values of a block multiplied by a matrix."""


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """The four operands of one VeRA layer, sliced to the layer's size.

    Attributes:
        A: (r, in), in the stored dtype.
        B: (out, r).
        d: (r,).
        b: (out,).
    """

    A: Array
    B: Array
    d: Array
    b: Array

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return len(self.d)

    @property
    def in_features(self) -> int:
        """The layer's number of inputs."""
        return int(self.A.shape[1])

    @property
    def out_features(self) -> int:
        """The layer's number of outputs."""
        return len(self.b)

    def select(self, rows: NDArray[np.intp]) -> Factors:
        """Return the operands with these rows of A, columns of B and entries of d alone."""
        return Factors(self.A[rows], self.B[:, rows], self.d[rows], self.b)

    def outputs(self, rows: NDArray[np.intp]) -> Factors:
        """Return the operands of these outputs alone."""
        return Factors(self.A, self.B[rows], self.d, self.b[rows])

    def lora_B(self) -> Float64:  # noqa: N802 -- the matrix is called B
        """Return lora_B (out, r) in float64."""
        found = np.empty((self.out_features, self.rank))
        for place, block in self.lora_B_blocks():
            found[place] = block
        return found

    def lora_B_blocks(  # noqa: N802
        self, values: int = _CACHED_VALUES
    ) -> Iterator[tuple[slice, Float64]]:
        """Yield the rows and the values of each block of lora_B, in one buffer for all blocks."""
        rows = max(1, values // max(1, self.rank))
        buffer = np.empty((min(rows, self.out_features), self.rank), np.float64)
        b, d = self.b.astype(np.float64), self.d.astype(np.float64)
        for first in range(0, self.out_features, rows):
            place = slice(first, min(first + rows, self.out_features))
            block = buffer[: place.stop - first]
            block[...] = self.B[place]  # faster than a cast within the product
            block *= d
            block *= b[place, None]
            yield place, block


# --- balancing for float16 -----------------------------------------------------------------------


def balancing_powers(factors: Factors) -> NDArray[np.int64]:
    """Return the power of two by which each row of lora_A grows and each column of lora_B shrinks.

    float16 has few exponents, so entries of lora_B fall below its normal range if b is small. The
    two norms of each rank row become about equal. Powers of two change no digit.
    """
    of_A, of_B = _squared_factors(factors)
    usable = (of_A > 0) & (of_B > 0)
    powers = np.zeros(factors.rank, np.int64)
    powers[usable] = np.rint(np.log2(of_B[usable] / of_A[usable]) / 4).astype(np.int64)
    return powers


def _squared_factors(factors: Factors) -> tuple[Float64, Float64]:
    """Return the squared norms of the rows of lora_A and of the columns of lora_B, (r,) each."""
    of_A = np.einsum("ij,ij->i", factors.A, factors.A, dtype=np.float64)
    blocks = factors.lora_B_blocks()
    of_B = sum((np.square(block).sum(axis=0) for _, block in blocks), np.zeros(factors.rank))
    return of_A, of_B


# --- the best approximation of a lower rank ------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The input side of a delta, which all layers with as many inputs share.

    The rows of ``basis @ A`` are orthonormal, and ``core @ basis @ A`` is A again.

    Attributes:
        gram: (r, r), the products of the rows of A.
        core: (r, n), n = min(r, in).
        basis: (n, r).
    """

    gram: Float64
    core: Float64
    basis: Float64

    @classmethod
    def of(cls, A: Array) -> Inputs:
        """Return the input side for A (r, in)."""
        gram = _gram((block.T for _, block in _column_blocks(A)), len(A))
        squares, vectors = np.linalg.eigh(gram)
        n = min(A.shape)
        roots, vectors = np.sqrt(np.maximum(squares[-n:], 0)), vectors[:, -n:]
        return cls(gram, vectors * roots, _inverse(roots)[:, None] * vectors.T)


@dataclass(frozen=True, slots=True, eq=False)
class Decomposition:
    """The singular values and the right singular vectors of a delta.

    Attributes:
        inputs: the input side of the delta.
        gram: (r, r), the products of the columns of lora_B.
        values: (n,), the singular values, the largest first.
        vectors: (n, n), the right singular vectors as columns, in the basis of the inputs.
    """

    inputs: Inputs
    gram: Float64
    values: Float64
    vectors: Float64

    @property
    def size(self) -> float:
        """The sum of the squares of the delta."""
        return float(np.vdot(self.gram, self.inputs.gram))

    @classmethod
    def of(cls, factors: Factors, known: dict[int, Inputs]) -> Decomposition:
        """Decompose a delta by the eigenvectors of an n x n matrix; the delta is never formed.

        Squares lose half of the digits: a singular value below 1e-8 of the largest is noise. The
        delta of a lower rank loses nothing, because this delta is the exact delta projected on the
        vectors.

        Args:
            factors: the layer's operands.
            known: the input sides so far, by the number of inputs; all of the same A.
        """
        width = factors.in_features
        if width not in known:
            known[width] = Inputs.of(factors.A)
        inputs = known[width]
        rows = (block for _, block in factors.lora_B_blocks(PRODUCT_VALUES))
        gram = _gram(rows, factors.rank)
        squares, vectors = np.linalg.eigh(inputs.core.T @ gram @ inputs.core)
        return cls(inputs, gram, np.sqrt(np.maximum(squares[::-1], 0)), vectors[:, ::-1])

    def truncated(self, rank: int) -> tuple[Float64, Float64]:
        """Return two matrices P (k, r) and Q (r, k) for the best delta of rank k, k <= n.

        lora_A of the best delta is ``P @ A``, and lora_B is ``lora_B @ Q``.
        """
        roots, vectors = np.sqrt(self.values[:rank]), self.vectors[:, :rank]
        left = roots[:, None] * (vectors.T @ self.inputs.basis)
        return left, (self.inputs.core @ vectors) * _inverse(roots)


def _inverse(values: Float64) -> Float64:
    """Return 1 / values, and 0 for 0."""
    return np.divide(1.0, values, out=np.zeros_like(values), where=values > 0)


def _column_blocks(A: Array) -> Iterator[tuple[slice, Float64]]:
    """Yield the columns and the values of each block of A in float64."""
    columns = max(1, PRODUCT_VALUES // max(1, len(A)))
    for first in range(0, A.shape[1], columns):
        place = slice(first, first + columns)
        yield place, A[:, place].astype(np.float64)


def product(left: Float64, A: Array) -> Float64:
    """Return ``left @ A`` (k, in) in float64, without a float64 copy of A."""
    found = np.empty((len(left), A.shape[1]))
    for place, block in _column_blocks(A):
        found[:, place] = left @ block
    return found


def smallest_rank(values: Float64, error: float) -> int:
    """Return the smallest rank, 1 at least, that keeps to a relative Frobenius error.

    Args:
        values: the singular values of the delta, the largest first.
        error: the error.
    """
    squares = np.square(values)
    total = float(squares.sum())
    left_out = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])
    allowed = np.nonzero(left_out <= error * error * total)[0]
    return max(1, int(allowed[0]))


# --- measuring without the dense delta -----------------------------------------------------------


def squared_norm(factors: Factors) -> float:
    """Return the sum of the squares of a delta."""
    rows = (block for _, block in factors.lora_B_blocks(PRODUCT_VALUES))
    columns = (block.T for _, block in _column_blocks(factors.A))
    return float(np.vdot(_gram(rows, factors.rank), _gram(columns, factors.rank)))


def cancellation(factors: Factors) -> float:
    """Return the norm of the r terms of a delta divided by the norm of the delta, at least 1.

    A delta is the sum of one term for each row of A. Rounding changes each term by a share of the
    term. If the terms cancel each other, the relative error of the delta grows by this factor.
    """
    of_A, of_B = _squared_factors(factors)
    size = squared_norm(factors)
    return max(1.0, float(np.sqrt(np.vdot(of_A, of_B) / size))) if size > 0 else 1.0


def relative_error(factors: Factors, size: float, lora_A: Array, lora_B: Array) -> float:
    """Return the relative Frobenius error of stored factors; only thin matrices are multiplied.

    If the ranks are equal, small differences are taken value by value, and nothing cancels in the
    sums. Otherwise an error below 1e-7 is noise.

    Args:
        factors: the layer's operands.
        size: the squared norm of the layer's delta.
        lora_A: (k, in), as stored.
        lora_B: (out, k), as stored.

    Returns:
        The error; 0 if both deltas are 0, and infinity if the layer's alone is.
    """
    if lora_A.shape == factors.A.shape:
        off = _squared_difference(factors, lora_A, lora_B)
    else:
        of_A, of_B = np.zeros((2, factors.rank, len(lora_A)))
        own_A, own_B = np.zeros((2, len(lora_A), len(lora_A)))
        for place, columns in _column_blocks(factors.A):
            stored = lora_A[:, place].astype(np.float64)
            of_A += columns @ stored.T
            own_A += stored @ stored.T
        for place, rows in factors.lora_B_blocks(PRODUCT_VALUES):
            stored = lora_B[place].astype(np.float64)
            of_B += rows.T @ stored
            own_B += stored.T @ stored
        off = size - 2 * float(np.vdot(of_A, of_B)) + float(np.vdot(own_A, own_B))
    if size <= 0:
        return 0.0 if off <= 0 else float("inf")
    return float(np.sqrt(max(0.0, off) / size))


def _squared_difference(factors: Factors, lora_A: Array, lora_B: Array) -> float:
    """Return the squared norm of ``(own_B - lora_B) @ own_A + lora_B @ (own_A - lora_A)``."""

    def rows() -> Iterator[Float64]:
        for place, block in factors.lora_B_blocks(PRODUCT_VALUES):
            stored = lora_B[place].astype(np.float64)
            yield np.hstack([block - stored, stored])

    def columns() -> Iterator[Float64]:
        for place, block in _column_blocks(factors.A):
            yield np.vstack([block, block - lora_A[:, place]]).T

    rank = 2 * factors.rank
    return float(np.vdot(_gram(rows(), rank), _gram(columns(), rank)))


def _gram(blocks: Iterable[Float64], rank: int) -> Float64:
    """Return ``M.T @ M`` (rank, rank) for a matrix M in blocks of rows."""
    found = np.zeros((rank, rank))
    for block in blocks:
        found += block.T @ block
    return found


def rounding_error(
    factors: Factors,
    lora_A: Array,
    lora_B: Array,
    rows: NDArray[np.intp],
    powers: NDArray[np.int64],
) -> float:
    """Return the relative error of stored factors of the same rank, measured on some outputs.

    Args:
        factors: the layer's operands.
        lora_A: (r, in), as stored.
        lora_B: (out, r), as stored.
        rows: the outputs to measure.
        powers: the powers of two to balance the factors (r,).
    """
    sample = factors.outputs(rows)
    exact, stored = sample.lora_B(), lora_B[rows].astype(np.float64)
    scale = float(np.abs(exact).max(initial=0.0))
    if not scale:
        return 0.0
    if powers.any():
        stored = np.ldexp(stored, powers)
    # float32 has enough digits for an error, and b can be too small for its exponents.
    A = np.ascontiguousarray(factors.A, np.float32)
    change = ((exact - stored) / scale).astype(np.float32) @ A
    if lora_A.dtype != factors.A.dtype or powers.any():
        other = np.ldexp(lora_A.astype(np.float32), -powers[:, None])
        change += (stored / scale).astype(np.float32) @ np.subtract(A, other, out=other)
    size = np.linalg.norm((exact / scale).astype(np.float32) @ A)
    return float(np.linalg.norm(change) / size) if size else 0.0
