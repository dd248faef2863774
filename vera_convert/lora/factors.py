"""The formulas of a LoRA that equals a VeRA layer, with NumPy alone.

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
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float64 = NDArray[np.float64]

_BLOCK_VALUES = 1 << 16
"""Values of lora_B that are computed at a time: their float64 copy stays in a core's cache."""


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """The four operands of one VeRA layer, sliced to the layer's size.

    Attributes:
        A: (r, in), in the dtype that it is stored in.
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

    def lora_A(self) -> Float64:  # noqa: N802 -- the matrix is called A
        """Return lora_A (r, in) in float64."""
        return self.A.astype(np.float64)

    def lora_B(self) -> Float64:  # noqa: N802
        """Return lora_B (out, r) in float64."""
        blocks = [block.copy() for block in self.lora_B_blocks()]  # each overwrites the last
        return np.concatenate(blocks)

    def lora_B_blocks(self) -> Iterator[Float64]:  # noqa: N802
        """Yield lora_B in blocks of rows, each in one float64 buffer that the next overwrites."""
        rows = max(1, _BLOCK_VALUES // max(1, self.rank))
        buffer = np.empty((min(rows, self.out_features), self.rank), np.float64)
        d = self.d.astype(np.float64)
        for first in range(0, self.out_features, rows):
            b = self.b[first : first + rows].astype(np.float64)
            block = buffer[: len(b)]
            np.multiply(self.B[first : first + rows], d, out=block, dtype=np.float64)
            yield np.multiply(block, b[:, None], out=block)


def nonzero_rows(d: Array) -> NDArray[np.bool_]:
    """Return which rows of A a layer uses: a row whose entry of d is 0 adds nothing."""
    return np.asarray(d != 0)


# --- balancing for float16 -----------------------------------------------------------------------


def balancing_powers(lora_A_norms: Float64, lora_B_norms: Float64) -> NDArray[np.int64]:
    """Return the power of two by which each row of lora_A grows and each column of lora_B shrinks.

    float16 has few exponents, so entries of lora_B fall below its normal range if b is small. The
    two norms of each rank row become about equal. Powers of two change no digit.

    Args:
        lora_A_norms: the norm of each row of lora_A (r,).
        lora_B_norms: the norm of each column of lora_B (r,).
    """
    usable = (lora_A_norms > 0) & (lora_B_norms > 0)
    powers = np.zeros(len(lora_A_norms), np.int64)
    ratio = lora_B_norms[usable] / lora_A_norms[usable]
    powers[usable] = np.rint(np.log2(ratio) / 2).astype(np.int64)
    return powers


# --- the best approximation of a lower rank ------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Decomposition:
    """The singular value decomposition of a delta, kept as thin factors.

    Attributes:
        left: (out, n), orthonormal columns, n = min(r, in, out).
        values: (n,), the singular values, the largest first.
        right: (n, in), orthonormal rows.
    """

    left: Float64
    values: Float64
    right: Float64

    def truncated(self, rank: int) -> tuple[Float64, Float64]:
        """Return lora_A (k, in) and lora_B (out, k) of the best delta of rank k, k <= n.

        The entry of the largest magnitude in each row of lora_A is positive.
        """
        k = min(rank, len(self.values))
        roots = np.sqrt(self.values[:k])
        lora_A = roots[:, None] * self.right[:k]
        lora_B = self.left[:, :k] * roots
        peaks = lora_A[np.arange(k), np.abs(lora_A).argmax(axis=1)]
        signs = np.where(peaks < 0, -1.0, 1.0)
        return lora_A * signs[:, None], lora_B * signs


InputBasis = tuple[Float64, Float64]
"""The thin QR factorization of lora_A.T: (in, n) and (n, r), n = min(r, in)."""


def input_basis(factors: Factors, known: dict[int, InputBasis]) -> InputBasis:
    """Return the basis of a layer's lora_A, which all layers with as many inputs share.

    Args:
        factors: the operands of the layer.
        known: the bases so far, by the number of inputs; all of the same A.
    """
    width = factors.in_features
    if width not in known:
        basis, core = np.linalg.qr(factors.lora_A().T)
        known[width] = basis, core
    return known[width]


def decompose(basis: InputBasis, lora_B: Float64) -> Decomposition:
    """Return the singular value decomposition of ``lora_B @ lora_A`` without forming the product.

    Two thin QR factorizations leave a core of r x r, and only the core is decomposed.

    Args:
        basis: the basis of lora_A.
        lora_B: (out, r).
    """
    out_basis, out_core = np.linalg.qr(lora_B)
    in_basis, in_core = basis
    left, values, right = np.linalg.svd(out_core @ in_core.T, full_matrices=False)
    return Decomposition(out_basis @ left, values, right @ in_basis.T)


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


def relative_error(
    lora_A: Array,
    lora_B: Iterable[Float64],
    other_A: Array,
    other_B: Array,
) -> float:
    """Return the relative Frobenius error of ``other_B @ other_A`` against ``lora_B @ lora_A``.

    Only thin matrices are multiplied. If the ranks are equal, the error is written as
    ``(lora_B - other_B) @ lora_A + other_B @ (lora_A - other_A)``: the small differences are taken
    value by value, so nothing cancels in the sums.

    Args:
        lora_A: (r, in).
        lora_B: (out, r), in blocks of rows.
        other_A: (k, in).
        other_B: (out, k).

    Returns:
        The error; 0 if both deltas are 0, and infinity if the first alone is.
    """
    A, A_other = lora_A.astype(np.float64), other_A.astype(np.float64)
    same_rank = A.shape == A_other.shape
    A_rest = A - A_other if same_rank else -A_other
    own, mixed, rest = A @ A.T, A @ A_rest.T, A_rest @ A_rest.T
    size = off = 0.0
    first = 0
    for block in lora_B:
        other = other_B[first : first + len(block)].astype(np.float64)
        first += len(block)
        difference = block - other if same_rank else block
        size += _inner(block, own, block)
        off += _inner(difference, own, difference)
        off += 2 * _inner(difference, mixed, other) + _inner(other, rest, other)
    if size <= 0:
        return 0.0 if off <= 0 else float("inf")
    return float(np.sqrt(max(0.0, off) / size))


def _inner(left: Float64, gram: Float64, right: Float64) -> float:
    """Return the sum of ``left @ gram @ right.T``'s diagonal."""
    return float(np.vdot(left @ gram, right)) if gram.any() else 0.0


def rounding_error(factors: Factors, lora_A: Array, lora_B: Array, rows: NDArray[np.intp]) -> float:
    """Return the relative error of stored factors of the same rank, measured on some outputs.

    Args:
        factors: the layer's operands.
        lora_A: (r, in), as stored.
        lora_B: (out, r), as stored.
        rows: the outputs to measure.
    """
    if not len(rows):
        return 0.0
    sample = factors.outputs(rows)
    exact, stored = sample.lora_B(), lora_B[rows].astype(np.float64)
    scale = float(np.abs(exact).max(initial=0.0))
    if not scale:
        return 0.0
    # float32 has the digits that an error needs, and b can be too small for its exponents.
    A = factors.A.astype(np.float32, copy=False)
    change = ((exact - stored) / scale).astype(np.float32) @ A
    if lora_A.dtype != factors.A.dtype:
        moved = factors.A.astype(np.float64) - lora_A.astype(np.float64)
        change += (stored / scale).astype(np.float32) @ moved.astype(np.float32)
    size = np.linalg.norm((exact / scale).astype(np.float32) @ A)
    return float(np.linalg.norm(change) / size) if size else 0.0
