"""The adapters of a merge: as a caller names an adapter, opened and matched, and for a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.sorting import same_tensor
from vera_convert.arguments import adapter_and_weight, number, optional, place, set_checked, text
from vera_convert.assembly.input_files import InputFile
from vera_convert.base.match import Match
from vera_convert.draws.generator import Draw
from vera_convert.errors import ParameterError
from vera_convert.files.file_names import WEIGHTS_NAME
from vera_convert.files.header import Header
from vera_convert.files.reading import LocalFile
from vera_convert.hub.lookup import HubAccess, Location, locate
from vera_convert.merging.in_effect import InEffect
from vera_convert.rules import Finding


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """An adapter to merge or to verify, with weight and revision.

    Attributes:
        adapter: a folder or a repo on the Hub.
        weight: the factor of the adapter's deltas; None for 1, and for `verify` for the factor
            that the merge recorded.
        revision: the branch, tag or commit on the Hub.

    Example:
        >>> AdapterSpec("org/adapter", weight=0.5).weight
        0.5
    """

    adapter: str | Path
    weight: float | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        set_checked(
            self,
            adapter=place("adapter", self.adapter),
            weight=optional(number, "weight", self.weight),
            revision=optional(text, "revision", self.revision),
        )


def adapter_specs(value: object) -> tuple[AdapterSpec, ...]:
    """Return a list of adapters as specs.

    Each item is a spec, or a text ``ADAPTER`` or ``ADAPTER=WEIGHT``.

    Raises:
        UsageError: the value is no list, or an item is malformed.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ParameterError(
            "add", "is no list: give a list of adapters, each a text or an AdapterSpec."
        )
    return tuple(
        each if isinstance(each, AdapterSpec) else AdapterSpec(*adapter_and_weight("add", each))
        for each in value
    )


@dataclass(frozen=True, slots=True, eq=False)
class MatchedAdapter:
    """An open adapter of a merge, matched with the base.

    Attributes:
        location: where the adapter lies, fetched.
        adapter: the open adapter.
        match: the base's tensor for each layer of the adapter.
        pair: the A and B in effect.
        weight: the factor of the adapter's deltas.
        weights: the adapter's file of weights.
    """

    location: Location
    adapter: Adapter
    match: Match
    pair: InEffect
    weight: float = 1.0
    weights: InputFile = field(init=False)

    def __post_init__(self) -> None:
        source, folder = self.adapter.file.source, self.location.fetched
        assert isinstance(source, LocalFile)  # noqa: S101 -- an adapter is opened in a folder
        set_checked(self, weights=InputFile(folder / WEIGHTS_NAME, folder, source.identity))

    @property
    def label(self) -> str:
        """The name that the caller gave the adapter, with the commit on the Hub."""
        return self.location.label

    @property
    def header(self) -> Header:
        """The header of the file of weights."""
        return self.adapter.file.header


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """An adapter of a merged model, for a report.

    Attributes:
        label: the name that the caller gave the adapter, with the commit on the Hub.
        weight: the factor of the adapter's deltas.
        rank: the adapter's rank.
        layers: how many layers the adapter adapts.
        strategy: how the names of the layers became names of the base's tensors.
        origin: where A and B came from: ``file``, ``fingerprint`` or ``key``.
        draw: the draw of A and B; None if A and B are stored.
        folder: the adapter's folder on this machine.
    """

    label: str
    weight: float
    rank: int
    layers: int
    strategy: str
    origin: str
    draw: Draw | None
    folder: Path

    @classmethod
    def of(cls, matched: MatchedAdapter) -> MergedAdapter:
        """Return the record of an open adapter."""
        return cls(
            label=matched.label,
            weight=matched.weight,
            rank=matched.adapter.config.r,
            layers=len(matched.adapter.layers),
            strategy=matched.match.strategy.name,
            origin=matched.pair.origin,
            draw=matched.pair.draw,
            folder=matched.adapter.folder,
        )


def repeated_findings(adapters: Sequence[MatchedAdapter]) -> Iterator[Finding]:
    """Yield a warning for each adapter that has the vectors of an adapter before."""
    for index, later in enumerate(adapters):
        same = (each for each in adapters[:index] if _is_same(each, later))
        if (first := next(same, None)) is not None:
            reason = f"it has the vectors, A and B of {first.label}, so the same delta is added."
            yield rules.ADAPTER_REPEATED.at(later.label, reason)


def _is_same(one: MatchedAdapter, other: MatchedAdapter) -> bool:
    """Say whether two adapters have the same vectors, A and B, perhaps in other forms."""
    layers, others = one.adapter.layers, other.adapter.layers
    return (
        layers.keys() == others.keys()
        and all(
            same_tensor(layer.lambda_b, others[module].lambda_b)
            and same_tensor(layer.lambda_d, others[module].lambda_d)
            for module, layer in layers.items()
        )
        and np.array_equal(one.pair.A, other.pair.A)
        and np.array_equal(one.pair.B, other.pair.B)
    )


def find_adapters(
    specs: Sequence[AdapterSpec], access: HubAccess
) -> tuple[tuple[AdapterSpec, Location], ...]:
    """Find the adapters without fetching any file, and return each spec with the place.

    Raises:
        UsageError: a spec is malformed, or names a revision of a folder.
        SurroundingsError: a folder or repo is missing.
    """
    return tuple(
        (spec, locate(str(spec.adapter), kind="adapter", access=access, revision=spec.revision))
        for spec in specs
    )
