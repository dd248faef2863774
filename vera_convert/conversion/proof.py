"""Whether stored A and B would come back: what PEFT draws, held against what lies in the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.names import A_NAME
from vera_convert.adapter.tensors import StoredProjections
from vera_convert.base.facts import BaseFacts
from vera_convert.conversion.projections import (
    ProjectionSource,
    base_dtypes_of,
    check_size,
    default_variant,
)
from vera_convert.draws.comparison import difference
from vera_convert.draws.generator import Draw, effective_rounding
from vera_convert.draws.recognition import Recognition, recognize
from vera_convert.errors import CheckpointError
from vera_convert.rules import (
    NOT_A_DRAW,
    OTHER_DIMS,
    OTHER_KEY,
    PROJECTION_TYPES_DIFFER,
    PROJECTIONS_CONTRADICT,
    PROJECTIONS_DAMAGED,
    ROUNDING_UNPROVEN,
    UNPROVEN_DRAW,
    UNPROVEN_ROWS,
    Finding,
)


def redrawable(adapter: Adapter, stored: StoredProjections, projections: ProjectionSource) -> Draw:
    """Return the draw of the config's key that the stored projections are, or refuse.

    Raises:
        CheckpointError: `NOT_A_DRAW`, `OTHER_KEY`, or `PROJECTIONS_CONTRADICT` where the config
            says that they are not stored at all; `PROJECTION_TYPES_DIFFER`.
    """
    key = adapter.config.projection_prng_key
    recognition = recognize(stored.A.array(), stored.B.array(), key=key)
    drawn = recognition.draw
    if drawn is None or not drawn.has_key(key):
        if is_undecided(adapter, projections):
            reason = "A and B are not the draw of the config's key."
            raise CheckpointError(PROJECTIONS_CONTRADICT.at(adapter.place, reason))
        if drawn is not None:
            reason = f"A and B are the draw of key {drawn.key}; the config says {key}."
            raise CheckpointError(OTHER_KEY.at(adapter.place, reason))
        detail = f" {recognition.difference.description}." if recognition.difference else ""
        reason = f"no variant of key {key} gives A and B.{detail}"
        raise CheckpointError(NOT_A_DRAW.at(adapter.place, reason))
    if stored.A.dtype != stored.B.dtype:
        reason = f"A is {stored.A.dtype}, B is {stored.B.dtype}."
        raise CheckpointError(PROJECTION_TYPES_DIFFER.at(adapter.place, reason))
    return drawn


def unproven_draw(config: VeraConfig, reason: str, *, place: str) -> Finding:
    """Return the finding that nothing records which A and B an adapter was trained on.

    It is a note if PEFT wrote the adapter, because A and B are drawn as PEFT draws them; other
    trainers have other draws.
    """
    rule = UNPROVEN_DRAW.as_note() if config.written_by_peft else UNPROVEN_DRAW
    return rule.at(place, reason)


def damage(recognition: Recognition, values: int, *, place: str) -> Finding | None:
    """Return the finding that stored projections are a draw but for some values.

    Args:
        recognition: what they turned out to be.
        values: how many values A and B have.
        place: for messages.
    """
    found = recognition.difference
    # More than a few can have been meant: A stored in 16 bits, and B in 32.
    if recognition.draw is not None or found is None or 16 * found.count > values:
        return None
    reason = f"they are {recognition.nearest.description}, but {found.description}."
    return PROJECTIONS_DAMAGED.at(place, reason)


def undamaged(adapter: Adapter, stored: StoredProjections) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return stored A and B that are to be used or kept.

    Raises:
        CheckpointError: `PROJECTIONS_DAMAGED`.
    """
    A, B = stored.A.array(), stored.B.array()
    recognition = recognize(A, B, key=adapter.config.projection_prng_key)
    finding = damage(recognition, A.size + B.size, place=adapter.place)
    if finding is not None:
        raise CheckpointError(finding)
    return A, B


def is_undecided(adapter: Adapter, projections: ProjectionSource) -> bool:
    """Say whether the config denies what is stored and nobody said which is meant."""
    return not adapter.config.save_projection and projections is ProjectionSource.AUTO


def require_proof_of_rows(
    adapter: Adapter, stored: StoredProjections, base_facts: BaseFacts
) -> None:
    """Refuse a B that is taller than the adapter's own layers explain, where no base is known."""
    if base_facts.in_features is None and stored.out_features > adapter.longest_b:
        raise CheckpointError(
            UNPROVEN_ROWS.at(
                adapter.place,
                f"it has {stored.out_features} rows, the longest lambda_b {adapter.longest_b}.",
            )
        )


def unproven(
    adapter: Adapter, stored: StoredProjections, drawn: Draw, base_facts: BaseFacts
) -> Iterator[Finding]:
    """Warn where no base proves the width of A and the rounding of what PEFT will draw."""
    unproven = []
    if base_facts.in_features is None:
        unproven.append(f"the width of A ({stored.in_features})")
    if base_facts.rounding is None:
        unproven.append("the rounding")
    if unproven:
        dtypes = base_dtypes_of(drawn)
        comes_back = f"on a base loaded in {dtypes[0]}" if dtypes else "on no base of one dtype"
        why = f" ({base_facts.source.rstrip('.')})" if base_facts.source else ""
        reason = f"A and B come back {comes_back}; not proven: {' and '.join(unproven)}{why}."
        yield ROUNDING_UNPROVEN.at(adapter.place, reason)


def change_by_redrawing(
    adapter: Adapter, stored: StoredProjections, drawn: Draw, base_facts: BaseFacts
) -> str | None:
    """Say how what PEFT will draw differs from what is stored, or None if it need not."""
    usual = default_variant(adapter.config, base_facts, stored.in_features, stored.out_features)
    possible = base_facts.roundings or (drawn.rounding,)
    if base_facts.rounding is not None:
        possible = (base_facts.rounding,)
    said = [
        _difference(
            stored, drawn, replace(usual, rounding=effective_rounding(usual.variant, rounding))
        )
        for rounding in possible
    ]
    return None if None in said else said[0]


def _difference(stored: StoredProjections, drawn: Draw, expected: Draw) -> str | None:
    """Say how stored projections differ from what is expected, or None if they do not."""
    if expected == drawn:
        return None
    reason = f"stored is {drawn.description}, PEFT would draw {expected.description}"
    if expected.in_features < stored.in_features or expected.out_features < stored.out_features:
        return f"{reason}, which is smaller."
    check_size(expected.rank, expected.in_features, expected.out_features, place=A_NAME)
    # A wider draw is compared where both have values: a layer uses the leading slice.
    found = difference(stored.A.array(), stored.B.array(), expected)
    largest = 0.0 if found is None else found.largest
    dims = expected.in_features, expected.out_features
    if largest == 0 and dims == (stored.in_features, stored.out_features):
        return None  # variants can agree in every value, as small or 16-bit matrices do
    return f"{reason}; the largest difference is {largest:.3g}."


def other_dims(adapter: Adapter, base_facts: BaseFacts) -> Iterator[Finding]:
    """Warn that stored projections have not the dims that PEFT demands on the base."""
    stored = adapter.projections
    if stored is not None and not base_facts.fits(stored.in_features, stored.out_features):
        reason = (
            f"they are for {stored.in_features} inputs and {stored.out_features} outputs; "
            f"{base_facts.dims_text}."
        )
        yield OTHER_DIMS.at(adapter.place, reason)
