"""Find which intermediate rounding explains the values of a merged tensor.

Each known procedure is repeated. A procedure is named only if it reproduces the merged values that
differ from the correct values, and no other differences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vera_convert.delta import FLOAT32, Array
from vera_convert.dtypes import NAMES
from vera_convert.files.tensorfile import NUMPY_DTYPE
from vera_convert.verification.comparator import Comparator, rounded, rounded_to

_AGREES = 0.95
"""The share of differing values to reproduce; the order of summation changes some values."""
_FEWEST = 8
_NARROW = {NAMES[header]: NUMPY_DTYPE[header] for header in ("BF16", "F16")}


def intermediate_rounding(comparator: Comparator, weights: Array, found: Array, first: int) -> str:
    """Return a sentence that names the intermediate rounding; empty if none explains the values.

    Args:
        comparator: the comparator of the tensor.
        weights: rows of the base.
        found: the same rows of the merged model.
        first: the number of the first row.
    """
    last = first + len(weights)
    right = _added(weights, [*comparator.deltas(first, last)], found.dtype, each=False)
    off = found != right
    if np.count_nonzero(off) < _FEWEST:
        return ""
    best, found_sentence = _AGREES, ""
    for sentence, values in _procedures(comparator, weights, found.dtype, first):
        differing = off | (values != right)
        share = np.count_nonzero((values == found) & differing) / np.count_nonzero(differing)
        if share >= best and (not found_sentence or share > best):
            best, found_sentence = share, sentence
    return found_sentence


def _procedures(
    comparator: Comparator, weights: Array, written: np.dtype[Any], first: int
) -> Iterator[tuple[str, Array]]:
    """Yield the sentence for each known procedure, and the values that it gives."""
    last = first + len(weights)
    deltas = [*comparator.deltas(first, last)]
    if len(deltas) > 1:
        yield _AFTER_EACH, _added(weights, deltas, written, each=True)
    for name, narrow in _NARROW.items():
        if written.itemsize == 2 and written != narrow:
            continue
        coarse = Comparator(comparator.tensor, narrow)
        products = [*coarse.deltas(first, last)]
        native = [*coarse.deltas_in(first, last, narrow)]
        for sentence, added in (
            (_DELTA, deltas),
            (_DELTA_AND_VECTORS, products),
            (_NATIVE, native),
        ):
            narrowed = [rounded_to(delta, narrow) for delta in added]
            yield sentence.format(name), _added(weights, narrowed, written, each=True)
        yield _VECTORS.format(name), _added(weights, products, written, each=False)


_AFTER_EACH = "The sum was rounded after each adapter, as PEFT does."
_ADVICE = "merge with autocast_adapter_dtype=True, or with vera-convert."
_DELTA = "The delta was rounded to {} before it was added: " + _ADVICE
_DELTA_AND_VECTORS = (
    "The vectors, A and B were rounded to {}, and the delta too before it was added, as PEFT does "
    "with autocast_adapter_dtype=False: " + _ADVICE
)
_NATIVE = (
    "The delta was computed in {} throughout, as PEFT 0.11 does, and PEFT 0.12 with "
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
