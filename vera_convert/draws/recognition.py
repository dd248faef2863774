"""Which draw a stored pair of A and B is, proven bit for bit, or how far it is from one.

Hypotheses come first and proof after: cheap looks at the first values say which draws are
conceivable, and only a comparison of every value, down to the sign of a zero, decides. The order
of hypotheses: the config's key at the stored dimensions; the same key at a larger width, because a
second adapter in one PEFT model stores the leading slices of the first one's matrices; any key
among 0 .. 65535, at the stored width or a larger one.

A larger width shows in A alone: its values scale with the bound, hence with one over the square
root of the width. How many rows B had cannot show: its leading rows are the same in any case.
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
"""The keys that a search tries beside the config's own."""

_TOLERANCE = 2.0**-6
"""How far two values of one draw may disagree on the bound: 16-bit rounding stays far below."""

_KEYS_AT_ONCE = 1 << 12
"""Searched keys that are tried together: a generator's state takes kilobytes for each."""

_CLUE = 8
"""First values that a searched key must explain; by chance not one key in 2^40 explains them."""

_PLAUSIBLE = 0.5
"""The share of equal values above which a draw is taken for the origin of a damaged pair."""

_PROBE = 64
"""Values, or one row, that a look at a hypothesis takes from each of two places."""

_ROW = 256
"""Values of the first row that a width is estimated from."""

_FARTHEST = 4096
"""How far a width may lie from its estimate."""

_WIDEST = 1 << 20
"""The largest width that is tried; the largest layers known have a tenth of it."""

_MOST_VALUES = 1 << 30
"""The largest A that is drawn for a trial, so that no file can ask for hours of work."""

_BY_BITS = {
    bits: [variant for variant in Variant if variant.bits == bits]
    for bits in dict.fromkeys(variant.bits for variant in Variant)
}
"""The variants that make the same integers of the same words."""


@dataclass(frozen=True, slots=True)
class Recognition:
    """The draw that a stored pair A and B is, or that the pair is nearest to.

    Attributes:
        nearest: the draw that the pair equals in every bit; else the draw that explains most of
            the first values; the usual draw of the config's key if no draw explains half of them.
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
    """Say which draw the stored A (r, in) and B (out, r) are, or how they differ from the nearest.

    Values are compared as they are, whatever float dtype they are stored in. Where several draws
    are equal in every bit the first counts, in the order of `Variant` and then of `Rounding`: it
    is float32-fused, and not rounded, wherever that fits. `key` is the config's. With `search`,
    larger widths and the keys of `SEARCHED_KEYS` are tried where it does not fit. Beside the
    arrays this takes a few megabytes, with a search too.

    Raises:
        ValueError: the shapes are not those of a pair, or torch refuses the key.
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
    """Return conceivable draws with the share of first values that each explains.

    The next place to look is tried only while nothing plausible was found.
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
    """Yield the draw under each rounding, with the share of first values that it explains.

    They come from two blocks, so that they show more than one row, or more than one matrix: values
    of the first row alone say little about the width.
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
    """Return what draws of one key explain, at those widths that fit the first row of A best."""
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
    """Return the widths of A whose bound could have given this row; none if it is unrelated.

    The bound is sqrt(6 / width), and each value tells it up to its own rounding. The median of
    what the larger values say withstands damaged ones.
    """
    sizes = np.abs(centered)
    large = sizes >= max(1, int(sizes.max()) // 4)
    bounds = row[large] / centered[large] * 2.0 ** (variant.bits - 1)
    bounds = bounds[np.isfinite(bounds)]
    bound = float(np.median(bounds)) if bounds.size else 0.0
    agreeing = np.abs(bounds - bound) < _TOLERANCE * bound
    related = np.count_nonzero(agreeing) > _PLAUSIBLE * bounds.size
    # No width is below one, so no bound is above the square root of six.
    if not related or not 6.0 / (2 * _WIDEST) <= min(bound, 4.0) ** 2 <= 6.0 * 1.5:
        return np.arange(0)
    width = round(6.0 / bound**2)
    reach = min(1 + int(width * _TOLERANCE), _FARTHEST)
    first, last = max(limits[0], width - reach), min(limits[1], width + reach)
    return np.arange(first, last + 1)


def _fitting(row: NDArray[np.float64], drawn: NDArray[Any], widths: NDArray[np.int64]) -> list[int]:
    """Return the widths whose drawn row explains most of the stored one, under any rounding."""
    fitting: set[int] = set()
    for rounding in Rounding:
        values = rounded(drawn, rounding).astype(np.float64, copy=False)
        equal = np.count_nonzero(values == row, axis=1)
        if equal.max() > _PLAUSIBLE * row.size:
            fitting.update(widths[equal == equal.max()].tolist())
    return sorted(fitting)


@np.errstate(invalid="ignore")
def searched_keys(A: NDArray[Any], B: NDArray[Any]) -> list[int]:
    """Return those keys of `SEARCHED_KEYS` that could have given the first values of the pair.

    A draw's values, divided by its centered integers, all give the same factor, whatever the
    variant's arithmetic or the rounding made of the last bits, and whatever the width.
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
    """Say which keys could have given the first values of a pair, scaled by the root of a width."""
    words = first_words(keys, 2 * _CLUE)
    conceivable = np.zeros(keys.size, np.bool_)
    for variant, *_ in _BY_BITS.values():
        per_value = 2 if variant.bits > 32 else 1
        centered = centered_words(variant, words[: per_value * _CLUE]).astype(np.float64)
        # The smallest say nothing: roundings of a fixed size drown them.
        centered[np.abs(centered) < 2.0 ** (variant.bits - 11)] = np.nan
        factors = clue[:, np.newaxis] / centered
        low, high = np.fmin.reduce(factors), np.fmax.reduce(factors)
        conceivable |= (low > 0) & (high <= low * (1 + _TOLERANCE)) & np.isfinite(high)
    return conceivable
