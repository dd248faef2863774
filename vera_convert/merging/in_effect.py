"""Choose the A and B of a merge: stored, or drawn from the key and rounded as PEFT rounds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from numpy.typing import NDArray

from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.names import A_NAME, B_NAME
from vera_convert.base.facts import BaseFacts
from vera_convert.conversion.projections import ProjectionSource, without_projections
from vera_convert.conversion.transforms import embedded
from vera_convert.draws.generator import Draw, Variant
from vera_convert.errors import UsageError
from vera_convert.rules import Finding


class Origin(StrEnum):
    """Where the projections in effect come from."""

    FILE = "file"
    """The adapter stores A and B."""
    FINGERPRINT = "fingerprint"
    """A and B were regenerated, and the fingerprint proves that these are the stored A and B."""
    KEY = "key"
    """A and B were drawn from the config's key, as PEFT draws on this base."""


@dataclass(frozen=True, slots=True, eq=False)
class InEffect:
    """The projections that a merge uses.

    Attributes:
        A: (r, in or more), in the stored dtype.
        B: (out or more, r).
        origin: where A and B come from.
        draw: the draw of A and B; None if A and B are stored.
        findings: warnings about A and B.
    """

    A: NDArray[Any]
    B: NDArray[Any]
    origin: Origin
    draw: Draw | None = None
    findings: tuple[Finding, ...] = ()


def in_effect(
    adapter: Adapter,
    base_facts: BaseFacts,
    *,
    projections: ProjectionSource = ProjectionSource.AUTO,
    variant: Variant | None = None,
) -> InEffect:
    """Return the A and B that are in effect when the adapter is loaded on the base.

    Args:
        adapter: the adapter.
        base_facts: dims and rounding of the base.
        projections: the source of A and B: ``auto``, ``file`` or ``key``.
        variant: the generator's variant, if A and B are drawn and no fingerprint names a variant.

    Raises:
        CheckpointError: stored A and B contradict the config, or regenerated A and B contradict
            the fingerprint.
        UsageError: `projections` asks for stored A and B and none are stored, or the rounding of
            drawn A and B is not known.
    """
    if projections is ProjectionSource.KEY:
        adapter = without_projections(adapter)
    elif (
        projections is ProjectionSource.FILE
        and adapter.projections is None
        and adapter.fingerprint is None
    ):
        raise UsageError(
            "the adapter stores no A and B for --projections file: leave the option out, or give "
            "--projections key."
        )
    if adapter.projections is not None:
        embedded(adapter, base_facts, projections=projections)  # refuses a contradiction or damage
        stored = adapter.projections
        return InEffect(stored.A.array(), stored.B.array(), Origin.FILE)
    origin = Origin.KEY if adapter.fingerprint is None else Origin.FINGERPRINT
    drawn = embedded(adapter, base_facts, projections=projections, variant=variant)
    by_name = {tensor.name: tensor for tensor in drawn.tensors}
    own = {*adapter.findings, *base_facts.findings}
    findings = tuple(finding for finding in drawn.findings if finding not in own)
    A, B = by_name[A_NAME].array(), by_name[B_NAME].array()
    return InEffect(A, B, origin, drawn.draw, findings)
