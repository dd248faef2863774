"""Define the options of a verification, and fill missing options from a merge's provenance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vera_convert import rules
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
from vera_convert.errors import ConflictError, UsageError
from vera_convert.merging.adapters import AdapterSpec, adapter_specs
from vera_convert.merging.options import Tied
from vera_convert.rules import Finding
from vera_convert.text import printable
from vera_convert.verification.model_comparison import SAMPLES
from vera_convert.verification.provenance import MergeSettings, Provenance


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How to verify. None stands for the value in the merged model's provenance.

    Attributes:
        weight: the factor of the first adapter's deltas.
        add: the further adapters of the merge.
        projections: the source of A and B.
        generator: the variant of the generator, if no fingerprint names the variant.
        dtype: the dtype of all float tensors of the merged model, like ``bfloat16``.
        tied: how an output head that shares a tensor with the embedding was merged.
        dequantize: whether a quantized base was converted to a 16-bit model.
        layers_only: compare only the weights; no model is run, and torch is not needed.
        samples: how many sequences both models are run on; None for `SAMPLES`.
        text: a UTF-8 file with the text to run; None for random token ids.
        jobs: the number of threads; None for the number of cores, four at most.

    Example:
        >>> VerifyOptions(samples=2).samples
        2
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
            weight=optional(number, "weight", self.weight),
            add=adapter_specs(self.add),
            projections=optional(one_of, "projections", ProjectionSource, self.projections),
            generator=optional(one_of, "generator", Variant, self.generator),
            dtype=optional(dtype_name, "dtype", self.dtype),
            tied=optional(one_of, "tied", Tied, self.tied),
            samples=optional(whole_number, "samples", self.samples),
            text=optional(path, "text", self.text),
            jobs=optional(whole_number, "jobs", self.jobs),
        )
        runs = {"samples": self.samples, "text": self.text}
        names = [name for name, value in runs.items() if value is not None]
        if self.layers_only and names:
            sentence = f"{_slots(names)}: {{}} runs no model. Leave one out."
            raise ConflictError(sentence, *names, "layers_only")

    @property
    def samples_to_run(self) -> int:
        """How many sequences both models are run on."""
        return SAMPLES if self.samples is None else self.samples

    def refuse_unused(self, *, merged: bool, lora: bool) -> None:
        """Raise `UsageError` for an option that the given comparisons do not use."""
        of_runs = () if lora else ("layers_only", "samples", "text")
        default = VerifyOptions()
        names = [
            name
            for name in ("weight", "add", "dtype", "tied", "dequantize", *of_runs, "jobs")
            if getattr(self, name) != getattr(default, name)
        ]
        if names and not merged:
            sentence = f"{_slots(names)}: only for a merged model; give --merged MODEL."
            raise ConflictError(sentence, *names)


def _slots(names: Sequence[str]) -> str:
    """Return the place of each name in the sentence of a `ConflictError`."""
    return ", ".join("{}" for _ in names)


def settle(
    options: VerifyOptions, base: BaseOptions, provenance: Provenance | None
) -> MergeSettings:
    """Return the options of a merge: the given options, else the recorded options.

    Raises:
        UsageError: not as many adapters are given as were merged.
    """
    if provenance is not None:
        _require_all_adapters(options.add, provenance)
    own = ("projections", "generator", "dtype", "tied", "dequantize")
    given = {name: getattr(options, name) for name in own}
    given |= {"base_dtype": base.dtype, "key_map": tuple(base.key_map) or None}
    given = {name: value for name, value in given.items() if value is not None}
    weights = [options.weight, *(each.weight for each in options.add)]
    names = {*given, *(["weight"] if any(each is not None for each in weights) else [])}
    recorded = MergeSettings() if provenance is None else provenance.settings
    return replace(recorded, **given, given=frozenset(names))


def given_alone(findings: Iterable[Finding], settings: MergeSettings) -> Iterator[Finding]:
    """Yield findings, except those about a recorded option that the caller does not give."""
    for finding in findings:
        is_idle = finding.rule is rules.OPTION_WITHOUT_EFFECT
        if not is_idle or finding.place.startswith(settings.given_flags):
            yield finding


def _require_all_adapters(given: Sequence[AdapterSpec], provenance: Provenance) -> None:
    recorded = provenance.adapters
    if len(given) + 1 < len(recorded):
        names = ", ".join(f"--add {printable(each.name)}" for each in recorded[len(given) + 1 :])
        raise UsageError(
            f"{len(recorded)} adapters were merged, and {len(given) + 1} given. The provenance "
            f"records names, not folders; give the other adapters too: {names}."
        )
    if len(given) + 1 > len(recorded):
        raise UsageError(
            f"{len(given) + 1} adapters are given, and {len(recorded)} merged, as "
            "merge-provenance.json records: leave out the adapters that were not merged."
        )
