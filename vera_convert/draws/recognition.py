"""Find the draw that equals a stored pair A and B in every bit, or the nearest draw.

The first values of A and B narrow the search to a few possible draws. A comparison of every value,
down to the sign of a zero, then decides. The search tries, in this order:

1. the config's key at the stored dimensions,
2. the config's key at a larger width, because the second adapter in a PEFT model stores the leading
   slices of the first adapter's matrices,
3. every key of 0 .. 65535, at the stored width or a larger width.

A alone shows the width: the values of A scale with 1 over the square root of the width. The
leading rows of B are equal for every number of rows, so the number of drawn rows stays unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.draws.comparison import (
    Difference,
    check_shapes,
    compared,
    difference,
    equals,
    unequal_bits,
)
from vera_convert.draws.generator import (
    Draw,
    Rounding,
    Source,
    Variant,
    centered_words,
    check_key,
    first_words,
    rounded,
    valued,
)

SEARCHED_KEYS = range(1 << 16)
"""The keys that a search tries beside the config's key."""

_TOLERANCE = 2.0**-6
"""The largest relative error of a bound computed from a single value; 16-bit rounding errs less."""

_KEYS_AT_ONCE = 1 << 12
"""The number of keys to try together; the generator of each key takes kilobytes."""

_CLUE = 8
"""The number of first values for a key to explain; by chance, 1 key in 2^40 explains all."""

_PLAUSIBLE = 0.5
"""A draw that explains more than this share of values is the origin of a damaged pair."""

_PROBE = 64
"""The number of values, or a row, to compare at each of two places to try a draw."""

_ROW = 256
"""The number of values of the first row for the estimate of the width."""

_FARTHEST = 4096
"""The largest distance of a width from the estimate."""

_WIDEST = 1 << 20
"""The largest width to try, ten times the width of the largest known layers."""

_MOST_VALUES = 1 << 30
"""The largest A to draw for a trial: a limit to the work that a file can cost."""

_BY_BITS = {
    bits: [variant for variant in Variant if variant.bits == bits]
    for bits in dict.fromkeys(variant.bits for variant in Variant)
}
"""The variants by the number of bits; variants with equal bits make the same integers."""


@dataclass(frozen=True, slots=True)
class Recognition:
    """The draw that equals a stored pair A and B, or the nearest draw.

    Attributes:
        nearest: the draw that equals the pair in every bit; else the draw that explains most of
            the first values; the usual draw of the config's key if every draw explains less than
            half of the first values.
        difference: how the pair differs from `nearest`; None if the pair equals `nearest`.
    """

    nearest: Draw
    difference: Difference | None = None

    @property
    def draw(self) -> Draw | None:
        """The draw that the pair equals in every bit, or None."""
        return self.nearest if self.difference is None else None


@np.errstate(invalid="ignore")  # a signaling NaN is a difference like any other
def recognize(A: NDArray[Any], B: NDArray[Any], *, key: int, search: bool = True) -> Recognition:
    """Return the draw that the stored A (r, in) and B (out, r) are, or the nearest draw.

    A and B can be stored in any float dtype. If several draws equal the pair in every bit, the
    first one counts, in the order of `Variant` and then of `Rounding`: float32-fused without
    rounding, if possible. The function takes a few megabytes beside the arrays.

    Args:
        A: the stored A.
        B: the stored B.
        key: the config's key.
        search: if the config's key at the stored width does not fit, try larger widths and the keys
            of `SEARCHED_KEYS`.

    Raises:
        ValueError: the shapes do not belong to a pair, or torch refuses the key.
    """
    check_shapes(A, B)
    usual = _draw_for(A, B, Variant.FLOAT32_FUSED, key=check_key(key), width=A.shape[1])
    if equals(A, B, usual):
        return Recognition(usual)
    scored = _best_hypotheses(A, B, key, search=search)
    best = max((score for score, _ in scored), default=0.0)
    plausible = [draw for score, draw in scored if score == best > _PLAUSIBLE]
    nearest, least = usual, None
    for draw in plausible or [usual]:
        found = difference(A, B, draw)
        if found is None:
            return Recognition(draw)
        if least is None or found.count < least.count:
            nearest, least = draw, found
    return Recognition(nearest, least)


def _draw_for(A: NDArray[Any], B: NDArray[Any], variant: Variant, *, key: int, width: int) -> Draw:
    return Draw(variant, key, rank=A.shape[0], in_features=width, out_features=B.shape[0])


# --- hypotheses ----------------------------------------------------------------------------------


def _best_hypotheses(
    A: NDArray[Any], B: NDArray[Any], key: int, *, search: bool
) -> list[tuple[float, Draw]]:
    """Return possible draws, each with the share of first values that the draw explains.

    The search goes on only until a plausible draw is found.
    """
    scored = [
        pair
        for variant in Variant
        for pair in _scored(A, B, _draw_for(A, B, variant, key=key, width=A.shape[1]))
    ]

    def plausible() -> bool:
        return any(score > _PLAUSIBLE for score, _ in scored)

    if search and not plausible():
        scored += _at_any_width(A, B, key)
    if search and not plausible():
        for other in searched_keys(A, B):
            scored += _at_any_width(A, B, other)
    return scored


def _scored(A: NDArray[Any], B: NDArray[Any], draw: Draw) -> Iterator[tuple[float, Draw]]:
    """Yield the draw under each rounding, with the share of first values that the draw explains.

    The values come from two blocks, and so from several rows or from A and B, because the
    first row alone says little about the width.
    """
    blocks = list(islice(compared(A, B, draw, block=_PROBE), 2))
    total = sum(unequal.size for *_, unequal in blocks)
    for rounding in Rounding:
        equal = sum(
            np.count_nonzero(~unequal_bits(stored, rounded(drawn, rounding)))
            for _, _, stored, drawn, _ in blocks
        )
        yield equal / total, replace(draw, rounding=rounding)


def _at_any_width(A: NDArray[Any], B: NDArray[Any], key: int) -> list[tuple[float, Draw]]:
    """Return the scored draws of a key at the widths that fit the first row of A best."""
    row = A[0, :_ROW].astype(np.float64)
    limits = A.shape[1], min(_WIDEST, _MOST_VALUES // A.shape[0])
    scored: list[tuple[float, Draw]] = []
    for variants in _BY_BITS.values():
        centered = Source(variants[0], key=key).centered(row.size)
        widths = _conceivable_widths(row, centered, variants[0], limits=limits)
        if not widths.size:
            continue
        for variant in variants:
            drawn = valued(variant, centered, fan_in=widths[:, np.newaxis])
            for width in _fitting(row, drawn, widths):
                scored += _scored(A, B, _draw_for(A, B, variant, key=key, width=width))
    return scored


def _conceivable_widths(
    row: NDArray[np.float64], centered: NDArray[Any], variant: Variant, *, limits: tuple[int, int]
) -> NDArray[np.int64]:
    """Return the possible widths of A for the row; empty if the key does not fit.

    The bound is sqrt(6 / width), and each value gives the bound up to the value's rounding. The
    median over the larger values is right even if some values are damaged.
    """
    sizes = np.abs(centered)
    large = sizes >= max(1, int(sizes.max()) // 4)
    bounds = row[large] / centered[large] * 2.0 ** (variant.bits - 1)
    bounds = bounds[np.isfinite(bounds)]
    bound = float(np.median(bounds)) if bounds.size else 0.0
    agreeing = np.abs(bounds - bound) < _TOLERANCE * bound
    related = np.count_nonzero(agreeing) > _PLAUSIBLE * bounds.size
    # Every width is at least 1, so every bound is at most the square root of 6.
    if not related or not 6.0 / (2 * _WIDEST) <= min(bound, 4.0) ** 2 <= 6.0 * 1.5:
        return np.arange(0)
    width = round(6.0 / bound**2)
    reach = min(1 + int(width * _TOLERANCE), _FARTHEST)
    first, last = max(limits[0], width - reach), min(limits[1], width + reach)
    return np.arange(first, last + 1)


def _fitting(row: NDArray[np.float64], drawn: NDArray[Any], widths: NDArray[np.int64]) -> list[int]:
    """Return the widths whose drawn row explains most of the stored row, under any rounding."""
    fitting: set[int] = set()
    for rounding in Rounding:
        values = rounded(drawn, rounding).astype(np.float64, copy=False)
        equal = np.count_nonzero(values == row, axis=1)
        if equal.max() > _PLAUSIBLE * row.size:
            fitting.update(widths[equal == equal.max()].tolist())
    return sorted(fitting)


@np.errstate(invalid="ignore")
def searched_keys(A: NDArray[Any], B: NDArray[Any]) -> list[int]:
    """Return the possible keys of `SEARCHED_KEYS` for the first values of the pair.

    All values of a draw, divided by the centered integers, give the same factor up to the last
    bits, for every variant, rounding and width.
    """
    clue = np.array([*A.flat[:_CLUE], *B.flat[:_CLUE]][:_CLUE], np.float64)
    if clue.size < _CLUE or not np.isfinite(clue).all():
        return []
    clue *= np.sqrt(np.where(np.arange(_CLUE) < A.size, A.shape[1], A.shape[0]))
    found: list[int] = []
    for start in range(SEARCHED_KEYS.start, SEARCHED_KEYS.stop, _KEYS_AT_ONCE):
        end = min(start + _KEYS_AT_ONCE, SEARCHED_KEYS.stop)
        keys = np.arange(start, end, dtype=np.uint32)
        found += map(int, keys[_conceivable(keys, clue)])
    return found


def _conceivable(keys: NDArray[np.uint32], clue: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Say which keys are possible for the first values of a pair, scaled by the root of a width."""
    words = first_words(keys, 2 * _CLUE)
    conceivable = np.zeros(keys.size, np.bool_)
    for variant, *_ in _BY_BITS.values():
        per_value = 2 if variant.bits > 32 else 1
        centered = centered_words(variant, words[: per_value * _CLUE]).astype(np.float64)
        # The smallest values are left out: a rounding of fixed size is too large beside them.
        centered[np.abs(centered) < 2.0 ** (variant.bits - 11)] = np.nan
        factors = clue[:, np.newaxis] / centered
        low, high = np.fmin.reduce(factors), np.fmax.reduce(factors)
        conceivable |= (low > 0) & (high <= low * (1 + _TOLERANCE)) & np.isfinite(high)
    return conceivable
