"""Whether PEFT regenerates an adapter's A and B from the config's key: one answer for all commands.

`mismatch` compares an adapter's own A and B, stored or recorded in a fingerprint, with the A and B
that PEFT draws for a base. strip, embed, info and validate ask this function and no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from numpy.typing import NDArray

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter, StoredProjections
from vera_convert.adapter.config import VeraConfig
from vera_convert.adapter.fingerprint import Fingerprint
from vera_convert.adapter.names import A_NAME
from vera_convert.base.facts import BaseFacts
from vera_convert.conversion.projections import ProjectionSource, check_size, usual_draw
from vera_convert.draws.comparison import difference, equals
from vera_convert.draws.generator import Draw, rounding_on_base
from vera_convert.draws.recognition import Recognition, recognize
from vera_convert.dtypes import DTYPES_OF_LAYERS
from vera_convert.errors import CheckpointError
from vera_convert.rules import Finding, Rule


@dataclass(frozen=True, slots=True, eq=False)
class RecognizedPair:
    """Stored A (r, in) and B (out, r), with the draw that the pair is or is nearest to."""

    A: NDArray[Any]
    B: NDArray[Any]
    recognition: Recognition

    @property
    def in_features(self) -> int:
        """Columns of A."""
        return int(self.A.shape[1])

    @property
    def out_features(self) -> int:
        """Rows of B."""
        return int(self.B.shape[0])

    @property
    def draw(self) -> Draw | None:
        """The draw that the pair equals in every bit, or None."""
        return self.recognition.draw


def recognized(config: VeraConfig, stored: StoredProjections) -> RecognizedPair:
    """Read stored A and B and find out which draw the pair is; large pairs take seconds."""
    A, B = stored.A.array(), stored.B.array()
    return RecognizedPair(A, B, recognize(A, B, key=config.projection_prng_key))


# --- what PEFT regenerates -----------------------------------------------------------------------


class Mismatch(NamedTuple):
    """Why PEFT does not regenerate an adapter's own A and B.

    Attributes:
        rule: `NOT_A_DRAW`, `OTHER_KEY`, or `OTHER_DRAW` if A and B are a draw of the config's key
            and PEFT makes another draw of this key on the base.
        reason: one sentence.
    """

    rule: Rule
    reason: str


def mismatch(
    config: VeraConfig, own: RecognizedPair | Fingerprint, base_facts: BaseFacts
) -> Mismatch | None:
    """Return why PEFT does not regenerate the adapter's own A and B; None if PEFT does.

    Args:
        config: the adapter's config.
        own: the stored pair, or the fingerprint of the pair that a strip dropped.
        base_facts: the dims and the rounding of the base; unknown dims are those of the pair.
    """
    if own.draw is None or not own.draw.has_key(config.projection_prng_key):
        return _not_of_the_key(config.projection_prng_key, own)
    possible = _regenerated(config, own, own.draw, base_facts)
    if any(_is_same(own, own.draw, draw) for draw in possible):
        return None
    return Mismatch(rules.OTHER_DRAW, _how_different(own, own.draw, possible[0]))


def same_on(
    config: VeraConfig, own: RecognizedPair | Fingerprint, base_facts: BaseFacts
) -> tuple[str, ...]:
    """Return the usual dtypes of layers for which PEFT regenerates the adapter's own A and B."""
    if own.draw is None or not own.draw.has_key(config.projection_prng_key):
        return ()
    usual = usual_draw(config, base_facts, own.in_features, own.out_features)
    return tuple(
        dtype
        for dtype in DTYPES_OF_LAYERS
        if _is_same(own, own.draw, usual.rounded(rounding_on_base(dtype)))
    )


def _regenerated(
    config: VeraConfig, own: RecognizedPair | Fingerprint, draw: Draw, base_facts: BaseFacts
) -> list[Draw]:
    """Return the draws that PEFT can make on this base: several if the rounding is not certain."""
    usual = usual_draw(config, base_facts, own.in_features, own.out_features)
    roundings = base_facts.roundings or (draw.rounding,)
    if base_facts.rounding is not None:
        roundings = (base_facts.rounding,)
    return [usual.rounded(each) for each in roundings]


def _is_same(own: RecognizedPair | Fingerprint, draw: Draw, regenerated: Draw) -> bool:
    if replace(draw, key=regenerated.key) == regenerated:
        return True
    dims = regenerated.in_features, regenerated.out_features
    # Variants can agree in every value, as small or 16-bit matrices do.
    return (
        isinstance(own, RecognizedPair)
        and dims == (own.in_features, own.out_features)
        and equals(own.A, own.B, regenerated)
    )


def _not_of_the_key(key: int, own: RecognizedPair | Fingerprint) -> Mismatch:
    if own.draw is not None:
        reason = (
            f"A and B are the draw of key {own.draw.key}; the config's key is {key}. With "
            f"projection_prng_key {own.draw.key} every PEFT would use the stored matrices."
        )
        return Mismatch(rules.OTHER_KEY, reason)
    assert isinstance(own, RecognizedPair)  # noqa: S101 -- a fingerprint has a draw
    found = own.recognition.difference
    detail = f": {found.description}" if found else ""
    return Mismatch(rules.NOT_A_DRAW, f"no variant of key {key} gives A and B{detail}.")


def _how_different(own: RecognizedPair | Fingerprint, draw: Draw, regenerated: Draw) -> str:
    state = "stored" if isinstance(own, RecognizedPair) else "dropped"
    is_only_rounded = replace(draw, rounding=regenerated.rounding) == regenerated
    other = f"the same draw, {regenerated.cast}" if is_only_rounded else regenerated.description
    reason = f"the {state} A and B are {draw.description}; PEFT regenerates {other}"
    if not isinstance(own, RecognizedPair):
        return f"{reason}."
    if regenerated.in_features < own.in_features or regenerated.out_features < own.out_features:
        return f"{reason}, which is smaller."
    check_size(regenerated, place=A_NAME)
    # A layer uses the leading slices, so a larger draw is compared as far as the stored pair goes.
    found = difference(own.A, own.B, regenerated)
    return f"{reason}; the largest difference is {found.largest if found else 0:.3g}."


# --- demands -------------------------------------------------------------------------------------


def accepted_mismatch(
    adapter: Adapter, own: RecognizedPair, base_facts: BaseFacts, projections: ProjectionSource
) -> str | None:
    """Return how PEFT's A and B differ from stored ones that the key can restore; None if equal.

    Args:
        adapter: the adapter.
        own: the stored pair.
        base_facts: the facts of the base.
        projections: which A and B count if file, flag and key disagree.

    Raises:
        CheckpointError: `NOT_A_DRAW`, `OTHER_KEY` or `UNPROVEN_ROWS`; `PROJECTIONS_CONTRADICT` if
            the config says that A and B are not stored, and PEFT would use others.
    """
    found = mismatch(adapter.config, own, base_facts)
    if found is not None and is_undecided(adapter, projections):
        reason = f"save_projection is false, and {found.reason}"
        raise CheckpointError(rules.PROJECTIONS_CONTRADICT.at(adapter.place, reason))
    if found is not None and found.rule is not rules.OTHER_DRAW:
        refused = found.rule.at(adapter.place, found.reason)
        damaged = damage(own, place=adapter.place)
        raise CheckpointError(refused.with_remedy(damaged.remedy) if damaged else refused)
    if base_facts.in_features is None and own.out_features > adapter.longest_b:
        reason = f"vera_B has {own.out_features} rows, the longest lambda_b {adapter.longest_b}."
        raise CheckpointError(rules.UNPROVEN_ROWS.at(adapter.place, reason))
    return found.reason if found else None


def is_undecided(adapter: Adapter, projections: ProjectionSource) -> bool:
    """Say whether A and B are stored against the config's word, and no option decides."""
    return not adapter.config.save_projection and projections is ProjectionSource.AUTO


def damage(own: RecognizedPair, *, place: str) -> Finding | None:
    """Return the finding that a few values of a stored pair differ from a draw, or None."""
    found = own.recognition.difference
    # More than a few can be on purpose: A stored in 16 bits, and B in 32.
    if found is None or 16 * found.count > own.A.size + own.B.size:
        return None
    reason = f"they are {own.recognition.nearest.description}, but {found.description}."
    return rules.PROJECTIONS_DAMAGED.at(place, reason)


def unproven_draw(config: VeraConfig, reason: str, *, place: str) -> Finding:
    """Return the finding that nothing records the A and B that an adapter was trained with.

    The finding is a note if PEFT wrote the adapter, because A and B are then drawn as PEFT draws
    them. Other trainers have other draws.
    """
    rule = rules.UNPROVEN_DRAW.as_note() if config.written_by_peft else rules.UNPROVEN_DRAW
    return rule.at(place, reason)


def unproven(adapter: Adapter, own: RecognizedPair, base_facts: BaseFacts) -> Iterator[Finding]:
    """Warn if no base proves the width of A and the rounding of the A and B that PEFT draws."""
    missing = []
    if base_facts.in_features is None:
        missing.append(f"the width of A ({own.in_features})")
    if base_facts.rounding is None:
        missing.append("the rounding")
    if missing:
        dtypes = same_on(adapter.config, own, base_facts)
        on = f"a base loaded in {dtypes[0]}" if dtypes else "no base of one dtype"
        source = (base_facts.unclear or base_facts.source).rstrip(".")
        why = f"; {source}" if source else ""
        reason = (
            f"PEFT regenerates the same A and B on {on}. Not proven: {' and '.join(missing)}{why}."
        )
        yield rules.ROUNDING_UNPROVEN.at(adapter.place, reason)


def other_dims(adapter: Adapter, base_facts: BaseFacts) -> Iterator[Finding]:
    """Warn if the dims of an adapter's stored A and B are not those that PEFT requires."""
    if adapter.projections is not None:
        yield from unfit_dims(adapter.projections, base_facts, place=adapter.place)


def unfit_dims(
    own: StoredProjections | RecognizedPair | Fingerprint, base_facts: BaseFacts, *, place: str
) -> Iterator[Finding]:
    """Yield a finding if the dims of A and B, stored or recorded, are not those of the base."""
    if base_facts.fits(own.in_features, own.out_features):
        return
    dims = f"{own.in_features} inputs and {own.out_features} outputs"
    if isinstance(own, Fingerprint):
        reason = f"the fingerprint gives A and B for {dims}; {base_facts.dims_text}."
        yield rules.FINGERPRINT_DISAGREES.at(place, reason)
    else:
        yield rules.OTHER_DIMS.at(place, f"they are for {dims}; {base_facts.dims_text}.")
