"""Whether each PEFT uses the A and B that an adapter was trained with."""

from __future__ import annotations

from collections.abc import Iterator

from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.fingerprint import Fingerprint
from vera_convert.base.facts import BaseFacts
from vera_convert.conversion.proof import (
    RecognizedPair,
    damage,
    mismatch,
    unfit_dims,
    unproven_draw,
)
from vera_convert.draws.generator import Rounding
from vera_convert.files.file_names import WEIGHTS_NAME
from vera_convert.rules import (
    OTHER_DIMS,
    PROJECTIONS_CONTRADICT,
    PROJECTIONS_IGNORED,
    PROJECTIONS_ROUNDED,
    REDRAWN_OTHERWISE,
    Finding,
)


def stored_findings(
    config: VeraConfig, own: RecognizedPair, base_facts: BaseFacts, *, tallest: int
) -> Iterator[Finding]:
    """Yield a finding if any PEFT uses other A and B than the stored pair.

    Args:
        config: the adapter's config.
        own: the stored pair.
        base_facts: the facts of the base; without a base, none.
        tallest: the length of the longest lambda_b.
    """
    damaged = damage(own, place=WEIGHTS_NAME)
    unfit = [*unfit_dims(own, base_facts, place=WEIGHTS_NAME)]
    if damaged is not None:
        yield damaged
    elif base_facts.out_features is None and own.out_features > tallest:
        reason = f"vera_B has {own.out_features} rows, the longest lambda_b {tallest} values."
        yield OTHER_DIMS.in_file(WEIGHTS_NAME, reason)
    elif unfit:
        yield from unfit
    else:
        found = mismatch(config, own, base_facts)
        if found is not None:
            rule = PROJECTIONS_IGNORED if config.save_projection else PROJECTIONS_CONTRADICT
            yield rule.in_file(WEIGHTS_NAME, found.reason)
        is_rounded = own.draw is not None and own.draw.rounding is not Rounding.NONE
        if own.draw is not None and is_rounded and base_facts.rounding is None:
            yield PROJECTIONS_ROUNDED.in_file(WEIGHTS_NAME, f"they are {own.draw.description}.")


def stripped_findings(
    config: VeraConfig, fingerprint: Fingerprint | None, base_facts: BaseFacts
) -> Iterator[Finding]:
    """Yield a finding if nothing proves that PEFT regenerates the A and B that were dropped.

    Args:
        config: the adapter's config.
        fingerprint: the record of the dropped pair.
        base_facts: the facts of the base; without a base, none.
    """
    if fingerprint is None:
        by = f"PEFT {config.peft_version} wrote it" if config.peft_version else "no PEFT is named"
        reason = f"it stores no A and B and no fingerprint of them ({by.strip()})."
        yield unproven_draw(config, reason, place=WEIGHTS_NAME)
        return
    if fingerprint.rank != config.r or not fingerprint.draw.has_key(config.projection_prng_key):
        return  # reported by the reader
    unfit = [*unfit_dims(fingerprint, base_facts, place=WEIGHTS_NAME)]
    yield from unfit
    found = None if unfit else mismatch(config, fingerprint, base_facts)
    if found is not None:
        yield REDRAWN_OTHERWISE.in_file(WEIGHTS_NAME, found.reason)
