"""Find out whether another adapter, or a further adapter, was added to a tensor.

A delta is diag(b) B diag(d) A. The rows are combinations of the rows of A, so a change
shows the A and then the vectors of the merge.
"""

from __future__ import annotations

import numpy as np

from vera_convert.delta import FLOAT64, Array
from vera_convert.verification.comparator import Comparator

LEFT_OVER = 0.02
"""The largest unexplained share of a matrix, beyond rounding."""
_STEPS = 50
_FEWEST_VECTORS = 3
"""The smallest rank at which two vectors cannot explain every combination of the rows of A."""
_MOST_ROWS = 256


def of_other_adapters(
    comparator: Comparator, change: Array, delta: Array, noise: float, first: int
) -> str:
    """Return a sentence about other adapters that were merged; empty if unknown.

    Args:
        comparator: the comparator of the tensor.
        change: rows of the difference between merged and base, in float64.
        delta: the same rows of the expected difference.
        noise: the norm of the rounding errors of these rows.
        first: the number of the first row.
    """
    if comparator.tensor.conv1d or len(comparator.tensor.terms) != 1:
        return ""
    noise *= np.sqrt(min(1.0, _MOST_ROWS / len(change)))
    change, delta = change[:_MOST_ROWS], delta[:_MOST_ROWS]
    (term,) = comparator.tensor.terms
    A = term.A[:, : change.shape[1]].astype(FLOAT64)
    B = np.zeros((len(change), len(A)))
    in_block, in_layer = term.overlap(slice(first, first + len(change)))
    B[in_block] = term.B[in_layer]
    if _FEWEST_VECTORS <= len(A) < change.shape[1]:
        inverse = np.linalg.pinv(A)
        inside = change @ inverse
        if is_small(change - inside @ A, change, noise):
            within = noise * float(np.linalg.norm(inverse, 2))
            return _of_vectors(inside, delta @ inverse, B, within)
    dimensions = _rank(change, noise)
    if dimensions < min(change.shape) and _rank(change - delta, noise) < dimensions:
        return (
            "The delta and another matrix were added: another adapter was merged too. Give that "
            "adapter with --add."
        )
    return ""


def _of_vectors(inside: Array, own: Array, B: Array, noise: float) -> str:
    """Return a sentence about the vectors that a change was made with; empty if unknown.

    Args:
        inside: the change as combinations of the rows of A, (rows, r).
        own: the expected delta as combinations of the rows of A, (rows, r).
        B: the rows of B.
        noise: the norm of the errors.
    """
    if _is_scaled(inside, B, noise):
        return (
            "A delta with the same A and B but other vectors was added: the vectors of another "
            "layer, of another checkpoint of this adapter, or of another adapter with the same key."
        )
    if _is_scaled(inside - own, B, noise):
        return (
            "The delta and that of another adapter with the same A and B were added: another "
            "adapter was merged too. Give that adapter with --add."
        )
    return ""


def _is_scaled(matrix: Array, B: Array, noise: float) -> bool:
    """Return whether a matrix is diag(b) B diag(d) for some vectors, fitted in turn."""
    d = np.ones(B.shape[1])
    squares = B * B
    with np.errstate(divide="ignore", invalid="ignore"):
        for _ in range(_STEPS):
            b = np.nan_to_num((matrix * B) @ d / (squares @ (d * d)))
            d = np.nan_to_num((matrix * B).T @ b / (squares.T @ (b * b)))
    return is_small(matrix - b[:, np.newaxis] * B * d, matrix, noise)


def is_small(rest: Array, matrix: Array, noise: float) -> bool:
    """Say whether rounding errors of a norm, and a small share of a matrix, explain the rest."""
    allowed = 2 * noise + LEFT_OVER * float(np.linalg.norm(matrix))
    return float(np.linalg.norm(rest)) <= allowed


def _rank(matrix: Array, noise: float) -> int:
    """Return the rank of a matrix above rounding errors of this norm."""
    rows, columns = matrix.shape
    mean = noise / np.sqrt(matrix.size)
    largest = mean * (np.sqrt(rows) + np.sqrt(columns))
    values = np.linalg.svd(matrix, compute_uv=False)
    return int(np.count_nonzero(values > max(largest, 1e-6 * values[0])))
