"""Find the cause of a wrong tensor, if the values prove the cause.

    rows around the worst value ──► no delta? rounded base? intermediate rounding?
                                    a multiple? transposed? other adapters? another matrix?

A cause is named only if the cause reproduces the values of the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vera_convert.delta import FLOAT64, Array
from vera_convert.dtypes import SIXTEEN_BIT
from vera_convert.verification.comparator import LIMIT, Comparator, Comparison, last_bits, rounded
from vera_convert.verification.other_adapters import LEFT_OVER, is_small, of_other_adapters
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
    sentence = of_other_adapters(
        rows.comparator, rows.change, rows.delta, rows.noise_norm, rows.first
    )
    if sentence:
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
    return factor if is_small(change - factor * delta, change, noise) else None


def _multiple(factor: float, pair: Pair, rows: _Rows, comparison: Comparison) -> str:
    """Return the cause of a change that is a multiple of the delta, or nearly the delta."""
    if abs(factor - 2) < LEFT_OVER:
        return (
            "The delta was added twice: a merged model was merged again, or the merge had twice "
            "this --weight."
        )
    if abs(factor + 1) < LEFT_OVER:
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
        if abs(factor - 1) > LEFT_OVER or np.mean(left <= allowed) >= _ALL:
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
