"""Whether what was added to a tensor is of another adapter, or of one more than were given.

A delta is diag(b) B diag(d) A. Its rows lie in the few dimensions that the rows of A span, so what
was added shows which A, and within that which vectors, it was made with.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.delta import FLOAT64
from vera_convert.verification.comparator import Comparator

Array = NDArray[Any]

_LEFT_OVER = 0.02
"""The share of a matrix that an explanation may leave, beside rounding."""
_STEPS = 50
_FEWEST_VECTORS = 3
"""The rank from which on two vectors cannot explain whatever lies in the rows of A."""
_MOST_ROWS = 256


def of_other_adapters(
    judge: Comparator, change: Array, delta: Array, noise: float, first: int
) -> str:
    """Return in a sentence which adapters were merged instead, or as well; empty if unclear.

    Args:
        judge: of the tensor.
        change: rows of what was added, in float64.
        delta: the same rows of what should have been.
        noise: the norm of the rounding errors of these rows.
        first: the number of the first row.
    """
    if judge.tensor.conv1d or len(judge.tensor.terms) != 1:
        return ""
    noise *= np.sqrt(min(1.0, _MOST_ROWS / len(change)))
    change, delta = change[:_MOST_ROWS], delta[:_MOST_ROWS]
    (term,) = judge.tensor.terms
    A = term.A[:, : change.shape[1]].astype(FLOAT64)
    B = term.B[first : first + len(change)].astype(FLOAT64)
    if _FEWEST_VECTORS <= len(A) < change.shape[1]:
        inverse = np.linalg.pinv(A)
        inside = change @ inverse
        if _is_small(change - inside @ A, change, noise):
            within = noise * float(np.linalg.norm(inverse, 2))
            return _of_vectors(inside, delta @ inverse, B, within)
    dimensions = _rank(change, noise)
    if dimensions < min(change.shape) and _rank(change - delta, noise) < dimensions:
        return (
            "The delta is there, and a further matrix with it: another adapter was merged too. "
            "Give that adapter with --add."
        )
    return ""


def _of_vectors(inside: Array, own: Array, B: Array, noise: float) -> str:
    """Return what coordinates (rows, r) in the rows of A tell about the vectors.

    Args:
        inside: of what was added.
        own: of what should have been.
        B: the rows of B.
        noise: the norm of the errors.
    """
    if _is_scaled(inside, B, noise):
        return (
            "What was added has the same A and B but other vectors: those of another layer, of "
            "another checkpoint of this adapter, or of another adapter with the same key."
        )
    if _is_scaled(inside - own, B, noise):
        return (
            "The delta is there, and that of a further adapter with the same A and B: another "
            "adapter was merged too. Give that adapter with --add."
        )
    return ""


def _is_scaled(matrix: Array, B: Array, noise: float) -> bool:
    """Say whether a matrix is diag(b) B diag(d) for some vectors; they are fitted in turn."""
    d = np.ones(B.shape[1])
    squares = B * B
    with np.errstate(divide="ignore", invalid="ignore"):
        for _ in range(_STEPS):
            b = np.nan_to_num((matrix * B) @ d / (squares @ (d * d)))
            d = np.nan_to_num((matrix * B).T @ b / (squares.T @ (b * b)))
    return _is_small(matrix - b[:, np.newaxis] * B * d, matrix, noise)


def _is_small(rest: Array, matrix: Array, noise: float) -> bool:
    allowed = 2 * noise + _LEFT_OVER * float(np.linalg.norm(matrix))
    return float(np.linalg.norm(rest)) <= allowed


def _rank(matrix: Array, noise: float) -> int:
    """Return how many dimensions of a matrix rise above rounding errors of this norm."""
    rows, columns = matrix.shape
    mean = noise / np.sqrt(matrix.size)
    largest = mean * (np.sqrt(rows) + np.sqrt(columns))
    values = np.linalg.svd(matrix, compute_uv=False)
    return int(np.count_nonzero(values > max(largest, 1e-6 * values[0])))
