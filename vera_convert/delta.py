"""Compute the delta that an adapter adds to one layer's weight, from A, B, d and b. NumPy alone.

    x (in) ── A (r, in) ── · d (r) ── B (out, r) ── · b (out) ──> added to y (out)

    delta = diag(b) B diag(d) A        (out, in); each layer has the leading slice of A and of B

The product is ``(b B) (d A)``, as in PEFT. The operands are first widened from their own dtypes,
which is exact. The product is float64 if an operand is float64, else float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
"""An array of any dtype that a tensor can have."""

FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)


def working_dtype(*dtypes: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype for the multiplication and addition of operands of these dtypes."""
    return FLOAT64 if FLOAT64 in dtypes else FLOAT32


def scaled_A(d: Array, A: Array, *, out: Array) -> Array:  # noqa: N802 -- the matrix is called A
    """Fill `out` (r, n) with ``diag(d) A``, A of shape (r, n), in the dtype of `out`."""
    return np.multiply(d[:, None], A, out=out, dtype=out.dtype)


def scaled_B(b: Array, B: Array, *, out: Array) -> Array:  # noqa: N802 -- the matrix is called B
    """Fill `out` (n, r) with ``diag(b) B``, b of shape (n,) and B (n, r), in the dtype of `out`."""
    return np.multiply(b[:, None], B, out=out, dtype=out.dtype)


def delta(A: Array, B: Array, d: Array, b: Array, in_features: int) -> Array:
    """Return the complete delta (out, in) of a layer.

    Args:
        A: (r, in or more).
        B: (out or more, r).
        d: (r,).
        b: (out,).
        in_features: the number of the layer's inputs.
    """
    dtype = working_dtype(A.dtype, B.dtype, d.dtype, b.dtype)
    left = scaled_B(b, B[: len(b)], out=np.empty((len(b), len(d)), dtype))
    right = scaled_A(d, A[:, :in_features], out=np.empty((len(d), in_features), dtype))
    return left @ right


def merged(weight: Array, change: Array) -> Array:
    """Return ``weight + change``, added in the wider dtype and rounded once to the weight's.

    Float64 values are rounded to float32 first, then to 16 bits, as torch does.
    """
    total = np.add(weight, change, dtype=working_dtype(weight.dtype, change.dtype))
    if weight.dtype.itemsize < FLOAT32.itemsize:
        total = total.astype(FLOAT32)
    return total.astype(weight.dtype)
