"""Whether a merged tensor holds what is known to come of rounding on the way to the sum.

Each known way is done again. It is named only if it gives the merged values where these differ from
the right ones, and differs from the right ones nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vera_convert.assembly.addends import Term
from vera_convert.delta import FLOAT32
from vera_convert.dtypes import NAMES
from vera_convert.files.tensorfile import NUMPY_DTYPE
from vera_convert.verification.comparator import Comparator, rounded

Array = NDArray[Any]

_AGREES = 0.95
"""The share of differing values that a way must give exactly: sums in another order flip some."""
_FEWEST = 8
_NARROW = {NAMES[header]: NUMPY_DTYPE[header] for header in ("BF16", "F16")}


def rounded_on_the_way(judge: Comparator, weights: Array, found: Array, first: int) -> str:
    """Return in a sentence what was rounded before it was added; empty if nothing known fits.

    Args:
        judge: of the tensor.
        weights: rows of the base.
        found: the same rows of the merged model.
        first: the number of the first row.
    """
    last = first + len(weights)
    right = _added(weights, [*judge.deltas(first, last)], found.dtype, each=False)
    off = found != right
    if np.count_nonzero(off) < _FEWEST:
        return ""
    best, said = _AGREES, ""
    for way, values in _ways(judge, weights, found.dtype, first):
        differing = off | (values != right)
        share = np.count_nonzero((values == found) & differing) / np.count_nonzero(differing)
        if share >= best and (not said or share > best):
            best, said = share, way
    return said


def _ways(
    judge: Comparator, weights: Array, written: np.dtype[Any], first: int
) -> Iterator[tuple[str, Array]]:
    """Yield each known way to round on the way, and what comes of it."""
    last = first + len(weights)
    deltas = [*judge.deltas(first, last)]
    if len(deltas) > 1:
        yield _AFTER_EACH, _added(weights, deltas, written, each=True)
    for name, narrow in _NARROW.items():
        if written.itemsize == 2 and written != narrow:
            continue
        coarse = Comparator(replace(judge.tensor, terms=_narrowed(judge.tensor.terms, narrow)))
        products = [*coarse.deltas(first, last)]
        native = [*coarse.deltas_in(first, last, narrow)]
        for said, added in ((_DELTA, deltas), (_DELTA_AND_VECTORS, products), (_NATIVE, native)):
            narrowed = [_through(delta, narrow) for delta in added]
            yield said.format(name), _added(weights, narrowed, written, each=True)
        yield _VECTORS.format(name), _added(weights, products, written, each=False)


_AFTER_EACH = "The sum was rounded after each adapter, as PEFT does it."
_ADVICE = "merge with autocast_adapter_dtype=True, or with vera-convert."
_DELTA = "The delta was rounded to {} before it was added: " + _ADVICE
_DELTA_AND_VECTORS = (
    "The vectors, A and B were rounded to {}, and the delta too before it was added, as PEFT does "
    "it with autocast_adapter_dtype=False: " + _ADVICE
)
_NATIVE = (
    "The delta was computed in {} throughout, as PEFT 0.11 does it, and PEFT 0.12 with "
    "autocast_adapter_dtype=False: " + _ADVICE
)
_VECTORS = "The vectors, A and B were rounded to {} before the merge."


def _added(weights: Array, deltas: Sequence[Array], written: np.dtype[Any], *, each: bool) -> Array:
    """Return the sums, rounded at the end or after each delta."""
    total = weights
    for delta in deltas:
        total = total.astype(np.promote_types(delta.dtype, FLOAT32)) + delta
        if each:
            total = rounded(total, written)
    return rounded(total, written)


def _through(values: Array, narrow: np.dtype[Any]) -> Array:
    """Return values rounded to a narrower dtype, in their own."""
    return rounded(values, narrow).astype(values.dtype)


def _narrowed(terms: Sequence[Term], narrow: np.dtype[Any]) -> tuple[Term, ...]:
    return tuple(
        replace(
            term,
            A=_through(term.A.astype(FLOAT32), narrow),
            B=_through(term.B.astype(FLOAT32), narrow),
            layer=_NarrowVectors(term, narrow),
        )
        for term in terms
    )


@dataclass(frozen=True, slots=True)
class _NarrowVectors:
    """The vectors of a layer, rounded."""

    term: Term
    narrow: np.dtype[Any]

    @property
    def dtypes(self) -> tuple[np.dtype[Any], ...]:
        return FLOAT32, FLOAT32

    def vectors(self) -> tuple[Array, Array]:
        d, b = self.term.layer.vectors()
        return _through(d.astype(FLOAT32), self.narrow), _through(b.astype(FLOAT32), self.narrow)
