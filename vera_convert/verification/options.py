"""How a verification is to be done: what its caller says, and what a merge's provenance says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vera_convert.base.onbase import BaseWish
from vera_convert.conversion.projections import Meant
from vera_convert.draws.generator import Variant
from vera_convert.errors import UsageError
from vera_convert.files.reading import printable
from vera_convert.merging.options import DTYPES
from vera_convert.merging.parts import Tied
from vera_convert.verification.provenance import MergeSettings, Provenance

SAMPLES = 8
"""Sequences that both models are run on, where nothing else is said."""


@dataclass(frozen=True, slots=True)
class GivenAdapter:
    """A further adapter of a merge, as a caller names it.

    Attributes:
        adapter: a folder or a repo on the Hub.
        weight: the factor of its deltas; None for the one of the provenance, or 1.
        revision: its branch, tag or commit on the Hub.
    """

    adapter: str | Path
    weight: float | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How to verify; what is None is taken from the provenance of the merged model.

    Attributes:
        weight: the factor of the first adapter's deltas.
        add: the further adapters that were merged.
        projections: which A and B are meant.
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
    add: Sequence[GivenAdapter] = ()
    projections: Meant | None = None
    generator: Variant | None = None
    dtype: str | None = None
    tied: Tied | None = None
    dequantize: bool | None = None
    layers_only: bool = False
    samples: int | None = None
    text: Path | None = None
    jobs: int | None = None

    def validate(self) -> None:
        """Raise `UsageError` for an option that makes no sense."""
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"--dtype {printable(self.dtype)}: give one of {', '.join(DTYPES)}.")
        for weight in (self.weight, *(each.weight for each in self.add)):
            if weight is not None and not math.isfinite(weight):
                raise UsageError(f"the weight of an adapter is a finite number, not {weight}.")
        if self.samples is not None and self.samples < 1:
            raise UsageError("--samples is a positive number of sequences.")
        if self.jobs is not None and self.jobs < 1:
            raise UsageError("--jobs is a positive number of threads.")
        runs = {"--samples": self.samples, "--text": self.text}
        names = [name for name, value in runs.items() if value is not None]
        if self.layers_only and names:
            raise UsageError(f"{', '.join(names)}: with --layers-only no model is run.")

    def demand_no_merge(self) -> None:
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


def settle(options: VerifyOptions, base: BaseWish, provenance: Provenance | None) -> MergeSettings:
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


def demand_all_adapters(given: Sequence[GivenAdapter], provenance: Provenance) -> None:
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
