"""Find the cause of a wrong tensor, if the values prove the cause.

    rows around the worst value ──► no delta? rounded base? intermediate rounding?
                                    a multiple? transposed? other adapters? another matrix?

A cause is named only if the cause reproduces the values of the tensor.

A delta is diag(b) B diag(d) A. The rows are combinations of the rows of A, so a change shows the A
and then the vectors of the merge.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vera_convert.delta import FLOAT64, Array
from vera_convert.dtypes import SIXTEEN_BIT
from vera_convert.verification.comparator import LIMIT, Comparator, Comparison, last_bits, rounded
from vera_convert.verification.pairs import Pair, is_wider
from vera_convert.verification.roundings import intermediate_rounding

_CLEAR = 4.0
"""How many times larger than the rounding errors a delta must be to show."""
_SIGMAS = 5.0
_ALL = 0.999
"""The share of values to explain by a cause of all values."""
_FEW = 8
"""How many values of a tensor are needed to prove another base."""
_MANY_OFF = 0.1
"""The share of values that must differ for a base in a wider dtype, which changes a quarter."""
_UNLIKE = 0.5
"""The cosine below which a change is unrelated to the delta."""
_MOST_VALUES = 1 << 18
_LEFT_OVER = 0.02
"""The largest unexplained share of a matrix, beyond rounding."""
_STEPS = 50
_FEWEST_VECTORS = 3
"""The smallest rank at which two vectors cannot explain every combination of the rows of A."""
_MOST_ROWS = 256


@dataclass(frozen=True, slots=True)
class _Rows:
    """The examined rows of a tensor.

    Attributes:
        first: the number of the first row.
        weights: the base's rows, as stored.
        found: the merged model's rows.
        comparator: the comparator of the tensor.
        change: the difference between merged and base, in float64.
        delta: the expected difference.
        noise: for each value, half a ULP of the merged dtype, the largest error of one rounding.
    """

    first: int
    weights: Array
    found: Array
    comparator: Comparator
    change: Array
    delta: Array
    noise: Array

    @property
    def noise_norm(self) -> float:
        return float(np.linalg.norm(self.noise))


@np.errstate(over="ignore", invalid="ignore")
def cause(pair: Pair, comparison: Comparison) -> str:
    """Return a sentence about the cause of a tensor's errors; empty if unknown.

    Args:
        pair: a tensor with deltas.
        comparison: the result of comparing the values.
    """
    rows = _rows(pair, comparison.worst.index if comparison.worst else 0)
    if not (np.isfinite(rows.found.astype(FLOAT64)).all() and np.isfinite(rows.weights).all()):
        return ""
    if (np.abs(rows.change) <= rows.noise).all():
        return "The weight equals the base's: the delta was not added."
    if float(np.linalg.norm(rows.delta)) >= _CLEAR * rows.noise_norm and _holds_for_rounded(
        pair, rows
    ):
        return (
            f"The base, in {pair.expected.stored.dtype}, was rounded to {pair.expected.dtype} "
            f"before the delta was added: verify against a base in {pair.expected.dtype}."
        )
    sentence = intermediate_rounding(rows.comparator, rows.weights, rows.found, rows.first)
    if sentence or float(np.linalg.norm(rows.delta)) < _CLEAR * rows.noise_norm:
        return sentence
    return _of_sizes(pair, rows, comparison)


def _rows(pair: Pair, worst: int) -> _Rows:
    """Read the rows around the worst value."""
    count, columns = pair.expected.matrix
    step = max(1, _MOST_VALUES // columns)
    first = worst // columns // step * step
    last = min(first + step, count)
    found, weights = pair.rows(first, last)
    comparator = Comparator(pair.expected)
    values, merged = weights.astype(FLOAT64), found.astype(FLOAT64)
    noise = last_bits(np.maximum(np.abs(values), np.abs(merged)), pair.expected.dtype) / 2
    delta = _sum(comparator.deltas(first, last), values.shape)
    return _Rows(first, weights, found, comparator, merged - values, delta, noise)


def _of_sizes(pair: Pair, rows: _Rows, comparison: Comparison) -> str:
    """Return the cause by the size and the direction of the change."""
    factor = _explained(rows.change, rows.delta, rows.noise_norm)
    if factor is not None:
        return _multiple(factor, pair, rows, comparison)
    count, columns = pair.expected.matrix
    if count == columns:
        last = rows.first + len(rows.change)
        turned = _sum(rows.comparator.transposed_deltas(rows.first, last), rows.change.shape)
        if _explained(rows.change, turned, rows.noise_norm) is not None:
            return "The delta was added transposed."
    if sentence := _of_other_adapters(rows):
        return sentence
    norms = float(np.linalg.norm(rows.change) * np.linalg.norm(rows.delta))
    if abs(float(np.vdot(rows.change, rows.delta))) < _UNLIKE * norms:
        return (
            "Another matrix was added: the delta of another layer, of another A and B, or of "
            "another slice of A and B."
        )
    return ""


def _sum(deltas: Iterable[Array], shape: tuple[int, ...]) -> Array:
    total = np.zeros(shape, FLOAT64)
    for delta in deltas:
        total += delta
    return total


def _explained(change: Array, delta: Array, noise: float) -> float | None:
    """Return the factor by which a change is a multiple of a delta; None if it is no multiple."""
    factor = float(np.vdot(change, delta) / np.vdot(delta, delta))
    return factor if _is_small(change - factor * delta, change, noise) else None


def _multiple(factor: float, pair: Pair, rows: _Rows, comparison: Comparison) -> str:
    """Return the cause of a change that is a multiple of the delta, or nearly the delta."""
    if abs(factor - 2) < _LEFT_OVER:
        return (
            "The delta was added twice: a merged model was merged again, or the merge had twice "
            "this --weight."
        )
    if abs(factor + 1) < _LEFT_OVER:
        return (
            "The delta was subtracted, as if the base and the merged model were exchanged, or "
            "--weight were negative."
        )
    # The largest change of the factor by rounding alone.
    doubt = _SIGMAS * rows.noise_norm / (3 * rows.noise.size) ** 0.5
    doubt /= float(np.linalg.norm(rows.delta))
    if abs(factor - 1) > max(doubt, 1e-6):
        left = np.abs(rows.change - factor * rows.delta)
        of_order = (
            LIMIT * rows.comparator.last_bit * (np.abs(rows.weights) + np.abs(rows.delta).max())
        )
        allowed = rows.noise + of_order + doubt * np.abs(rows.delta)
        if abs(factor - 1) > _LEFT_OVER or np.mean(left <= allowed) >= _ALL:
            return f"The delta was added {_shown(factor, doubt)} times."
        return ""
    return _of_wider_base(pair, rows, comparison)


def _shown(factor: float, doubt: float) -> str:
    """Return a factor with the certain digits, but never rounded to 1."""
    digits = int(np.clip(-np.floor(np.log10(doubt)) - 2, 2, 6))
    while round(factor, digits) == 1:
        digits += 1
    return f"{round(factor, digits):.10g}"


def _of_wider_base(pair: Pair, rows: _Rows, comparison: Comparison) -> str:
    """Return a sentence if the values fit a base in a wider dtype, of which this base is rounded.

    The wider base differs by at most half a ULP.
    """
    stored = pair.expected.stored.dtype
    if stored not in SIXTEEN_BIT or pair.expected.decode is not None:
        return ""
    base = last_bits(np.abs(rows.weights.astype(FLOAT64)), stored) / 2
    off = np.abs(rows.change - rows.delta)
    fits = np.mean(off <= (rows.noise + base) * (1 + 2**-10)) >= _ALL
    if not fits or comparison.wrong < _MANY_OFF * comparison.values:
        return ""
    return (
        f"Every value fits a base in a wider dtype than {stored} that was rounded to this "
        "base. If the model was merged from the wider base, verify against the wider base."
    )


def _holds_for_rounded(pair: Pair, rows: _Rows) -> bool:
    """Return whether the rows are right for a base rounded to the dtype of the merged model."""
    tensor = pair.expected
    if not is_wider(tensor.stored.dtype, tensor.dtype) or tensor.decode is not None:
        return False
    before = rounded(rows.weights, rows.found.dtype)
    compared = rows.comparator.compare(before, rows.found, rows.first)
    return not compared.wrong and compared.values >= _FEW


# --- other adapters ------------------------------------------------------------------------------


def _of_other_adapters(rows: _Rows) -> str:
    """Return a sentence about other adapters that were merged; empty if unknown."""
    tensor = rows.comparator.tensor
    if tensor.conv1d or len(tensor.terms) != 1:
        return ""
    (term,) = tensor.terms
    noise = rows.noise_norm * float(np.sqrt(min(1.0, _MOST_ROWS / len(rows.change))))
    change, delta = rows.change[:_MOST_ROWS], rows.delta[:_MOST_ROWS]
    A = term.A[:, : change.shape[1]].astype(FLOAT64)
    if _FEWEST_VECTORS <= len(A) < change.shape[1]:
        inverse = np.linalg.pinv(A)
        inside = change @ inverse
        if _is_small(change - inside @ A, change, noise):
            B = np.zeros((len(change), len(A)))
            in_block, in_layer = term.overlap(slice(rows.first, rows.first + len(change)))
            B[in_block] = term.B[in_layer]
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
    return _is_small(matrix - b[:, np.newaxis] * B * d, matrix, noise)


def _is_small(rest: Array, matrix: Array, noise: float) -> bool:
    """Say whether rounding errors of a norm, and a small share of a matrix, explain the rest."""
    allowed = 2 * noise + _LEFT_OVER * float(np.linalg.norm(matrix))
    return float(np.linalg.norm(rest)) <= allowed


def _rank(matrix: Array, noise: float) -> int:
    """Return the rank of a matrix above rounding errors of this norm."""
    rows, columns = matrix.shape
    mean = noise / np.sqrt(matrix.size)
    largest = mean * (np.sqrt(rows) + np.sqrt(columns))
    values = np.linalg.svd(matrix, compute_uv=False)
    return int(np.count_nonzero(values > max(largest, 1e-6 * values[0])))
