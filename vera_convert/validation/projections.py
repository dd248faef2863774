"""Whether A and B come back as they were trained with: in each PEFT, stored or drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.fingerprint import Fingerprint
from vera_convert.adapter.tensors import WEIGHTS_NAME
from vera_convert.base.facts import BaseFacts
from vera_convert.conversion.projections import default_variant
from vera_convert.conversion.proof import damage, unproven_draw
from vera_convert.draws.comparison import difference
from vera_convert.draws.generator import Draw, Rounding, effective_rounding
from vera_convert.draws.recognition import Recognition, recognize
from vera_convert.rules import (
    FINGERPRINT_DISAGREES,
    OTHER_DIMS,
    PROJECTIONS_CONTRADICT,
    PROJECTIONS_IGNORED,
    PROJECTIONS_ROUNDED,
    REDRAWN_OTHERWISE,
    Finding,
)


@dataclass(frozen=True, slots=True)
class Pair:
    """Stored A (r, in) and B (out, r), and which draw they are."""

    A: NDArray[Any]
    B: NDArray[Any]
    recognition: Recognition


def recognized(config: VeraConfig, A: NDArray[Any], B: NDArray[Any]) -> Pair:
    """Return a stored pair with the draw that it is."""
    return Pair(A, B, recognize(A, B, key=config.projection_prng_key))


def stored_findings(
    config: VeraConfig, pair: Pair, base_facts: BaseFacts, *, tallest: int
) -> Iterator[Finding]:
    """Yield where a PEFT uses other A and B than the stored ones.

    Args:
        config: the adapter's config.
        pair: what is stored.
        base_facts: what is known of the base; nothing, if there is none.
        tallest: the length of the longest lambda_b.
    """
    width, height = pair.A.shape[1], pair.B.shape[0]
    damaged = damage(pair.recognition, pair.A.size + pair.B.size, place=WEIGHTS_NAME)
    if damaged is not None:
        yield damaged
    elif base_facts.out_features is None and height > tallest:
        reason = f"vera_B has {height} rows, the longest lambda_b {tallest} values."
        yield OTHER_DIMS.at(WEIGHTS_NAME, reason)
    elif not base_facts.fits(width, height):
        reason = f"they are for {width} inputs and {height} outputs; {base_facts.dims_text}."
        yield OTHER_DIMS.at(WEIGHTS_NAME, reason)
    else:
        yield from _held_against_the_key(config, pair, base_facts)


def _held_against_the_key(
    config: VeraConfig, pair: Pair, base_facts: BaseFacts
) -> Iterator[Finding]:
    reason = _why_other(config, pair, base_facts)
    if reason and config.save_projection:
        yield PROJECTIONS_IGNORED.at(WEIGHTS_NAME, reason)
    elif reason:
        yield PROJECTIONS_CONTRADICT.at(WEIGHTS_NAME, reason)
    draw = pair.recognition.draw
    if draw is not None and draw.rounding is not Rounding.NONE and base_facts.rounding is None:
        yield PROJECTIONS_ROUNDED.at(WEIGHTS_NAME, f"they are {draw.description}.")


def _why_other(config: VeraConfig, pair: Pair, base_facts: BaseFacts) -> str:
    """Say why what PEFT draws from the key is not what is stored; empty if it is.

    Where the base's dtype is not known, whatever rounding is stored is taken for the base's.
    """
    draw, key = pair.recognition.draw, config.projection_prng_key
    if draw is None:
        found = pair.recognition.difference
        return f"they are no draw of key {key}{f': {found.description}' if found else ''}."
    if not draw.has_key(key):
        return (
            f"they are the draw of key {draw.key}; the config says {key}. With "
            f"projection_prng_key {draw.key} every PEFT would use them."
        )
    expected = _as_drawn(config, draw, base_facts, (pair.A.shape[1], pair.B.shape[0]))
    if expected == draw:
        return ""
    same_dims = (expected.in_features, expected.out_features) == (
        pair.A.shape[1],
        pair.B.shape[0],
    )
    if same_dims and difference(pair.A, pair.B, expected) is None:
        return ""  # variants can agree in every value, as small or 16-bit matrices do
    return f"stored is {draw.description}; PEFT draws {expected.description}."


def _as_drawn(
    config: VeraConfig, found: Draw | Fingerprint, base_facts: BaseFacts, dims: tuple[int, int]
) -> Draw:
    """Return what PEFT draws, rounded as the base rounds it, or as `found` is without a base."""
    usual = default_variant(config, base_facts, *dims)
    rounding = found.rounding
    if base_facts.rounding is not None:
        rounding = effective_rounding(usual.variant, base_facts.rounding)
    return replace(usual, rounding=rounding)


def stripped_findings(
    config: VeraConfig, fingerprint: Fingerprint | None, base_facts: BaseFacts
) -> Iterator[Finding]:
    """Yield what is not certain of projections that have to be drawn again.

    Args:
        config: the adapter's config.
        fingerprint: what a strip recorded of them.
        base_facts: what is known of the base; nothing, if there is none.
    """
    if fingerprint is None:
        by = f"PEFT {config.peft_version} wrote it" if config.peft_version else "no PEFT is named"
        reason = f"it stores no A and B and no fingerprint of them ({by.strip()})."
        yield unproven_draw(config, reason, place=WEIGHTS_NAME)
        return
    if fingerprint.rank != config.r or not fingerprint.draw.has_key(config.projection_prng_key):
        return  # told when it was read
    dims = fingerprint.in_features, fingerprint.out_features
    if not base_facts.fits(*dims):
        reason = f"it is for {dims[0]} inputs and {dims[1]} outputs; {base_facts.dims_text}."
        yield FINGERPRINT_DISAGREES.at(WEIGHTS_NAME, reason)
        return
    dropped, expected = fingerprint.draw, _as_drawn(config, fingerprint, base_facts, dims)
    if replace(dropped, key=expected.key) != expected:
        reason = f"dropped was {dropped.description}; PEFT draws {expected.description}."
        yield REDRAWN_OTHERWISE.at(WEIGHTS_NAME, reason)
