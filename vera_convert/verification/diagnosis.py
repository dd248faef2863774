"""What went wrong with a merged tensor, where its values tell that for certain.

    rows around the worst value ──► no delta? base rounded before? rounded on the way?
                                    a multiple? transposed? other adapters? another matrix?

A cause is named only if it gives the values that are there. Otherwise nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.delta import FLOAT64
from vera_convert.dtypes import SIXTEEN_BIT
from vera_convert.verification.comparator import LIMIT, Comparator, Comparison, last_bits, rounded
from vera_convert.verification.other_adapters import of_other_adapters
from vera_convert.verification.pairs import Buffers, Pair, is_wider
from vera_convert.verification.roundings import rounded_on_the_way

Array = NDArray[Any]

_LEFT_OVER = 0.02
"""The share of a change that a multiple of the delta may leave unexplained, beside rounding."""
_CLEAR = 4.0
"""How many times larger than what rounding does must a delta be, to be told from it."""
_SIGMAS = 5.0
_ALL = 0.999
"""The share of values that a cause which explains all of them must explain."""
_FEW = 8
"""Values from which on a tensor that is right for another base shows that."""
_MANY_OFF = 0.1
"""The share of values that a base in a wider dtype brings off: it is a quarter."""
_UNLIKE = 0.5
"""The cosine below which a change has little to do with the delta."""
_MOST_VALUES = 1 << 18


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a tensor that are looked at.

    Attributes:
        first: the number of the first row.
        stored: the base's, as they are stored.
        found: the merged model's.
        judge: of the tensor.
        weights: the base's values.
        change: what was added, in float64.
        delta: what should have been.
        noise: for each value half a last bit of the merged dtype: what one rounding does at most.
    """

    first: int
    stored: Array
    found: Array
    judge: Comparator
    weights: Array
    change: Array
    delta: Array
    noise: Array

    @property
    def noise_norm(self) -> float:
        return float(np.linalg.norm(self.noise))


@np.errstate(over="ignore", invalid="ignore")
def hint(pair: Pair, judgment: Comparison) -> str:
    """Return in a sentence what happened to a tensor that deltas are added to; empty if unclear.

    Args:
        pair: the tensor.
        judgment: what its values came to.
    """
    rows = _rows(pair, judgment.worst.index if judgment.worst else 0)
    if not (np.isfinite(rows.found.astype(FLOAT64)).all() and np.isfinite(rows.weights).all()):
        return ""
    if (np.abs(rows.change) <= rows.noise).all():
        return "It is the base's own weight: the delta is not there."
    if float(np.linalg.norm(rows.delta)) >= _CLEAR * rows.noise_norm and _holds_for_rounded(
        pair, rows
    ):
        return (
            f"The base was rounded to {pair.expected.dtype} before the delta was added, and is "
            f"stored in {pair.expected.stored}: verify against the base in that dtype."
        )
    said = rounded_on_the_way(rows.judge, rows.weights, rows.found, rows.first)
    if said or float(np.linalg.norm(rows.delta)) < _CLEAR * rows.noise_norm:
        return said
    return _of_sizes(pair, rows, judgment)


def _rows(pair: Pair, worst: int) -> _Rows:
    """Read the rows around the worst value."""
    count, columns = pair.expected.matrix
    step = max(1, _MOST_VALUES // columns)
    first = worst // columns // step * step
    last = min(first + step, count)
    found, stored = pair.rows(first, last, Buffers())
    judge = Comparator(pair.expected)
    weights = stored
    values, merged = weights.astype(FLOAT64), found.astype(FLOAT64)
    noise = last_bits(np.maximum(np.abs(values), np.abs(merged)), pair.expected.dtype) / 2
    delta = _sum(judge.deltas(first, last), values.shape)
    return _Rows(first, stored, found, judge, weights, merged - values, delta, noise)


def _of_sizes(pair: Pair, rows: _Rows, judgment: Comparison) -> str:
    """Return what the size and the direction of what was added tell."""
    factor = _explained(rows.change, rows.delta, rows.noise_norm)
    if factor is not None:
        return _multiple(factor, pair, rows, judgment)
    count, columns = pair.expected.matrix
    if count == columns:
        last = rows.first + len(rows.change)
        turned = _sum(rows.judge.transposed_deltas(rows.first, last), rows.change.shape)
        if _explained(rows.change, turned, rows.noise_norm) is not None:
            return "The delta was added transposed."
    said = of_other_adapters(rows.judge, rows.change, rows.delta, rows.noise_norm, rows.first)
    if said:
        return said
    norms = float(np.linalg.norm(rows.change) * np.linalg.norm(rows.delta))
    if abs(float(np.vdot(rows.change, rows.delta))) < _UNLIKE * norms:
        return (
            "What was added is another matrix: the delta of another layer, of other A and B, or of "
            "another slice of them."
        )
    return ""


def _sum(deltas: Iterable[Array], shape: tuple[int, ...]) -> Array:
    total = np.zeros(shape, FLOAT64)
    for delta in deltas:
        total += delta
    return total


def _explained(change: Array, delta: Array, noise: float) -> float | None:
    """Return which multiple of a delta a change is, up to rounding; None if it is none."""
    factor = float(np.vdot(change, delta) / np.vdot(delta, delta))
    left_over = float(np.linalg.norm(change - factor * delta))
    allowed = 2 * noise + _LEFT_OVER * float(np.linalg.norm(change))
    return factor if left_over <= allowed else None


def _multiple(factor: float, pair: Pair, rows: _Rows, judgment: Comparison) -> str:
    """Return what a multiple of the delta, or nearly the delta itself, says."""
    if abs(factor - 2) < _LEFT_OVER:
        return "The delta was added twice: a merged model was merged again."
    # How far rounding alone can bring the factor off: the mean of its errors, beside the delta.
    doubt = _SIGMAS * rows.noise_norm / (3 * rows.noise.size) ** 0.5
    doubt /= float(np.linalg.norm(rows.delta))
    if abs(factor - 1) > max(doubt, 1e-6):
        left = np.abs(rows.change - factor * rows.delta)
        of_order = LIMIT * rows.judge.last_bit * (np.abs(rows.weights) + np.abs(rows.delta).max())
        allowed = rows.noise + of_order + doubt * np.abs(rows.delta)
        if abs(factor - 1) > _LEFT_OVER or np.mean(left <= allowed) >= _ALL:
            return f"The delta was added {_shown(factor, doubt)} times."
        return ""
    return _of_wider_base(pair, rows, judgment)


def _shown(factor: float, doubt: float) -> str:
    """Return a factor in the digits that are certain, but never as 1, from which it differs."""
    digits = int(np.clip(-np.floor(np.log10(doubt)) - 2, 2, 6))
    while round(factor, digits) == 1:
        digits += 1
    return f"{round(factor, digits):.10g}"


def _of_wider_base(pair: Pair, rows: _Rows, judgment: Comparison) -> str:
    """Return whether values are those of a base in a wider dtype, which was rounded to this one.

    Such a base differs by half a last bit at most, and by as much in every direction.
    """
    tensor = pair.expected
    if tensor.stored not in SIXTEEN_BIT or tensor.decode is not None:
        return ""
    base = last_bits(np.abs(rows.weights.astype(FLOAT64)), tensor.stored) / 2
    off = np.abs(rows.change - rows.delta)
    fits = np.mean(off <= (rows.noise + base) * (1 + 2**-10)) >= _ALL
    if not fits or judgment.wrong < _MANY_OFF * judgment.values:
        return ""
    return (
        f"Every value fits a base in a wider dtype than {tensor.stored}, of which this base is the "
        "rounded form. If the model was merged from such a base, verify against it."
    )


def _holds_for_rounded(pair: Pair, rows: _Rows) -> bool:
    """Say whether rows are right for a base that is rounded to the dtype of the merged model."""
    tensor = pair.expected
    if not is_wider(tensor.stored, tensor.dtype) or tensor.decode is not None:
        return False
    before = rounded(rows.stored, rows.found.dtype)
    judged = rows.judge.judge(before, rows.found, rows.first)
    return not judged.wrong and judged.values >= _FEW
