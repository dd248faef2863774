"""What went wrong with a merged tensor, where its values tell that for certain.

What was added is held against the delta, against a multiple of it, and against its transpose.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.delta import FLOAT64
from vera_convert.verification.judging import Judge, Judgement, last_bits, rounded
from vera_convert.verification.pairs import Buffers, Pair, is_wider

Array = NDArray[Any]

_LEFT_OVER = 0.02
"""The share of a change that a multiple of the delta may leave unexplained, beside rounding."""
_CLEAR = 4.0
"""How many times larger than what rounding does a delta must be, to be told from it."""
_SIGMAS = 4.0
_MANY = 8
"""Values that have to be wrong, or right, before that says something of all."""
_UNLIKE = 0.5
"""The cosine below which a change has little to do with the delta."""


@np.errstate(over="ignore", invalid="ignore")
def hint(pair: Pair, judgement: Judgement) -> str:
    """Return in a sentence what happened to a tensor that deltas are added to; empty if unclear.

    Args:
        pair: the tensor.
        judgement: what its values came to.
    """
    row = judgement.worst.index // pair.expected.matrix[1] if judgement.worst else 0
    first, last = next(block for block in pair.blocks() if row < block[1])
    found, stored = pair.rows(first, last, Buffers())
    judge = Judge(pair.expected)
    weights = judge.weights(stored, first).astype(FLOAT64)
    merged = found.astype(FLOAT64)
    if not (np.isfinite(merged).all() and np.isfinite(weights).all()):
        return ""
    noise = last_bits(np.maximum(np.abs(weights), np.abs(merged)), pair.expected.dtype) / 2
    change = merged - weights
    if (np.abs(change) <= noise).all():
        return "It is the base's own weight: the delta is not there."
    delta = _sum(judge.deltas(first, last), change.shape)
    size = float(np.linalg.norm(noise))
    if float(np.linalg.norm(delta)) < _CLEAR * size:
        return ""
    if _holds_for_rounded(pair, stored, found, first):
        return (
            f"The base was rounded to {pair.expected.dtype} before the delta was added, and is "
            f"stored in {pair.expected.stored}: verify against the base in that dtype."
        )
    factor = _explained(change, delta, size)
    if factor is not None:
        # What rounding alone makes of a factor: the mean of its errors, beside the delta.
        doubt = size / change.size**0.5 / float(np.linalg.norm(delta))
        return _multiple(factor, _SIGMAS * doubt, judgement)
    rows, columns = pair.expected.matrix
    if rows == columns:
        turned = _sum(judge.transposed_deltas(first, last), change.shape)
        if _explained(change, turned, size) is not None:
            return "The delta was added transposed."
    cosine = float(np.vdot(change, delta)) / float(np.linalg.norm(change) * np.linalg.norm(delta))
    if abs(cosine) < _UNLIKE:
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


def _multiple(factor: float, doubt: float, judgement: Judgement) -> str:
    """Return what a multiple of the delta, or nearly the delta itself, says.

    Args:
        factor: the multiple.
        doubt: how far rounding can have brought it off.
        judgement: what the values came to.
    """
    if abs(factor - 2) < _LEFT_OVER:
        return "The delta was added twice: a merged model was merged again."
    if abs(factor - 1) > _LEFT_OVER:
        return f"The delta was added {factor:.3g} times."
    many = judgement.wrong >= max(_MANY, _LEFT_OVER * judgement.values)
    if many and judgement.ulps <= 1 and abs(factor - 1) <= doubt:
        return "No value is off by more than one last bit: the sum was rounded on the way."
    return ""


def _holds_for_rounded(pair: Pair, stored: Array, found: Array, first: int) -> bool:
    """Say whether rows are right for a base that is rounded to the dtype of the merged model."""
    tensor = pair.expected
    if not is_wider(tensor.stored, tensor.dtype) or tensor.decode is not None:
        return False
    before = replace(tensor, decode=lambda rows, _first: rounded(rows, found.dtype))
    judged = Judge(before).judge(stored, found, first)
    return not judged.wrong and judged.values >= _MANY
