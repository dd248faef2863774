"""What went wrong with a merged tensor, where its values tell that for certain.

What was added is held against the delta, against a multiple of it, and against its transpose.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.delta import FLOAT64
from vera_convert.verification.judging import Judge, Judgement, last_bits
from vera_convert.verification.pairs import Buffers, Pair

Array = NDArray[Any]

_LEFT_OVER = 0.02
"""The share of a change that a multiple of the delta may leave unexplained, beside rounding."""
_CLEAR = 4.0
"""How many times larger than what rounding does a delta must be, to be told from it."""
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
    factor = _explained(change, delta, size)
    if factor is not None:
        return _multiple(factor, judgement)
    rows, columns = pair.expected.matrix
    if rows == columns:
        turned = _sum(judge.transposed_deltas(first, last), change.shape)
        if _explained(change, turned, size) is not None:
            return "The delta was added transposed."
    cosine = float(np.vdot(change, delta)) / float(np.linalg.norm(change) * np.linalg.norm(delta))
    if abs(cosine) < _UNLIKE:
        return (
            f"What was added is another matrix (the cosine of both is {cosine:.2f}): the delta of "
            "another layer, of other A and B, or of another slice of them."
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


def _multiple(factor: float, judgement: Judgement) -> str:
    if abs(factor - 2) < _LEFT_OVER:
        return "The delta was added twice: a merged model was merged again."
    if abs(factor - 1) > _LEFT_OVER:
        return f"The delta was added {factor:.3g} times."
    if judgement.ulps <= 1:
        return "No value is off by more than one last bit: the sum was rounded on the way."
    return ""
