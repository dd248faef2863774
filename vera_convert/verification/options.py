"""How a verification is to be done: what its caller says, and what a merge's provenance says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vera_convert.arguments import (
    dtype_name,
    number,
    one_of,
    optional,
    path,
    require_flags,
    set_checked,
    whole_number,
)
from vera_convert.base.facts import BaseOptions
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.draws.generator import Variant
from vera_convert.errors import UsageError
from vera_convert.merging.adapters import AdapterSpec, adapter_specs
from vera_convert.merging.changes import Tied
from vera_convert.text import printable
from vera_convert.verification.provenance import MergeSettings, Provenance

SAMPLES = 8
"""Sequences that both models are run on, where nothing else is said."""


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How to verify; what is None is taken from the provenance of the merged model.

    Attributes:
        weight: the factor of the first adapter's deltas.
        add: the further adapters that were merged.
        projections: which A and B are projections.
        generator: how they were drawn, where no fingerprint says it.
        dtype: what float tensors became, such as ``bfloat16``.
        tied: what became of an output head that shares its tensor with the embedding.
        dequantize: whether a base whose weights are fp8 was made a 16-bit model.
        layers_only: leave it at the weights; no model is loaded, and torch is not needed.
        samples: how many sequences both models are run on; None for `SAMPLES`.
        text: a file whose text they are made of; without it token ids are drawn.
        jobs: threads; None for one for each core, four at most.
    """

    weight: float | None = None
    add: Sequence[AdapterSpec] = ()
    projections: ProjectionSource | None = None
    generator: Variant | None = None
    dtype: str | None = None
    tied: Tied | None = None
    dequantize: bool | None = None
    layers_only: bool = False
    samples: int | None = None
    text: Path | None = None
    jobs: int | None = None

    def __post_init__(self) -> None:
        require_flags(layers_only=self.layers_only)
        if self.dequantize is not None:
            require_flags(dequantize=self.dequantize)
        set_checked(
            self,
            weight=optional(number, "--weight", self.weight),
            add=adapter_specs("add", self.add),
            projections=optional(one_of, "--projections", ProjectionSource, self.projections),
            generator=optional(one_of, "--generator", Variant, self.generator),
            dtype=optional(dtype_name, "--dtype", self.dtype),
            tied=optional(one_of, "--tied", Tied, self.tied),
            samples=optional(whole_number, "--samples", self.samples),
            text=optional(path, "text", self.text),
            jobs=optional(whole_number, "--jobs", self.jobs),
        )
        runs = {"--samples": self.samples, "--text": self.text}
        names = [name for name, value in runs.items() if value is not None]
        if self.layers_only and names:
            raise UsageError(f"{', '.join(names)}: with --layers-only no model is run.")

    def require_no_merge(self) -> None:
        """Raise `UsageError` for an option that says something of a merged model."""
        given = {
            "--weight": self.weight,
            "--add": self.add or None,
            "--dtype": self.dtype,
            "--tied": self.tied,
            "--dequantize": self.dequantize,
            "--layers-only": self.layers_only or None,
            "--samples": self.samples,
            "--text": self.text,
            "--jobs": self.jobs,
        }
        names = [name for name, value in given.items() if value is not None]
        if names:
            raise UsageError(f"{', '.join(names)}: there is no --merged that this could be of.")


def settle(
    options: VerifyOptions, base: BaseOptions, provenance: Provenance | None
) -> MergeSettings:
    """Return the options of a merge: those that are given, else those that it recorded."""
    said: dict[str, Any] = {
        "projections": options.projections,
        "generator": options.generator,
        "base_dtype": base.dtype,
        "key_map": tuple(base.key_map) or None,
        "dtype": options.dtype,
        "tied": options.tied,
        "dequantize": options.dequantize,
    }
    given = {name: value for name, value in said.items() if value is not None}
    weights = [options.weight, *(each.weight for each in options.add)]
    names = {*given, *(["weight"] if any(each is not None for each in weights) else [])}
    recorded = MergeSettings() if provenance is None else provenance.settings
    return replace(recorded, **given, given=frozenset(names))


def require_all_adapters(given: Sequence[AdapterSpec], provenance: Provenance) -> None:
    """Raise `UsageError` unless there are as many adapters as were merged.

    Args:
        given: the further ones.
        provenance: what was merged.
    """
    recorded = provenance.adapters
    if len(given) + 1 < len(recorded):
        names = ", ".join(f"--add {printable(each.name)}" for each in recorded[len(given) + 1 :])
        raise UsageError(
            f"{len(recorded)} adapters were merged, and {len(given) + 1} given. A provenance names "
            f"inputs, not where they lie; give the others too: {names}."
        )
    if len(given) + 1 > len(recorded):
        raise UsageError(
            f"{len(given) + 1} adapters are given, and {len(recorded)} merged: leave out "
            "what is not part of the model."
        )
