"""to-lora: write a VeRA adapter as the LoRA adapter with the same effect.

The steps:

    read: adapter, base, A and B ──> plan: layers, names, rank ──> check for the engine
        ──> write layer by layer, measure ──> read back ──> publish in one rename ──> report
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vera_convert import rules
from vera_convert.adapter.fingerprint import NO_SHA256
from vera_convert.adapter.folder import SideFiles, copy_files, side_files
from vera_convert.adapter.lora_record import is_lora, lora_records
from vera_convert.arguments import Progress, instance, optional, path, progress_function
from vera_convert.assembly.pool import one_blas_thread
from vera_convert.base.bases import Bases
from vera_convert.base.facts import BaseFacts, BaseOptions, base_options_of
from vera_convert.base.resolve import Need, resolve_base
from vera_convert.conversion.proof import other_dims
from vera_convert.conversion.transforms import IDLE_GENERATOR
from vera_convert.conversion.work import Work, opened
from vera_convert.draws.generator import Draw
from vera_convert.errors import CheckpointError
from vera_convert.files.file_names import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from vera_convert.files.reading import file_sha256
from vera_convert.hub.lookup import HubAccess
from vera_convert.lora.checks import adapter_findings, copy_findings, engine_findings
from vera_convert.lora.engines import Form, is_in_tower
from vera_convert.lora.forms import Extras, FormFiles, extras_of, files_of
from vera_convert.lora.gguf_form import GgufModel, GgufWeights, gguf_model
from vera_convert.lora.options import LoraOptions
from vera_convert.lora.pipeline_component import component_findings
from vera_convert.lora.plan import LoraPlan, plan_lora
from vera_convert.lora.record import LoraSource, lora_card, record_of
from vera_convert.lora.stored import ComputedFactors, Measured
from vera_convert.lora.writing import SafetensorsWeights, require_space
from vera_convert.merging.in_effect import InEffect, in_effect
from vera_convert.publish.publishing import Output, files_but
from vera_convert.rules import Finding, errors_of
from vera_convert.text import printable, short_repr

ERROR_LIMIT = 0.5
"""The relative error of a layer's delta above which a LoRA is refused."""


@dataclass(frozen=True, slots=True, eq=False)
class LoraConversion:
    """The result of a conversion to LoRA.

    Attributes:
        adapter: how the caller named the adapter, with its commit on the Hub.
        out: the folder of the LoRA.
        written: whether the LoRA was written; False for a dry run.
        options: the options of the conversion.
        plan: the LoRA's layers and rank.
        naming: how the LoRA names layers, for people.
        names: each layer's name in the LoRA, by the adapter's module path.
        source_rank: the rank of the VeRA adapter.
        measured: the error of each layer.
        origin: where A and B come from.
        draw: which draw A and B are, if they were drawn.
        extras: the heads and biases stored with the LoRA.
        base_facts: the base: its name, its dtype, and the sizes of its layers.
        size: bytes of the file of weights.
        free: bytes free for the output.
        side_files: the files beside the adapter's weights: copied, or left out.
        findings: warnings and notes.
    """

    adapter: str
    out: Path
    written: bool
    options: LoraOptions
    plan: LoraPlan
    naming: str
    names: Mapping[str, str]
    source_rank: int
    measured: Measured
    origin: str
    draw: Draw | None
    extras: Extras
    base_facts: BaseFacts
    size: int
    free: int
    side_files: SideFiles
    findings: tuple[Finding, ...]

    __repr__ = short_repr

    @property
    def server_arguments(self) -> str:
        """The arguments that start the engine's server with the LoRA; empty for PEFT."""
        engine = self.options.target
        rank = engine.server_rank(self.plan.rank) or self.plan.rank
        start = engine.start.format(rank=rank, path=shlex.quote(str(self.out)))
        has_tower = any(is_in_tower(layer.written) for layer in self.plan.layers)
        return f"{engine.tower} {start}" if engine.tower and has_tower else start


def to_lora(
    adapter: str | Path,
    out: str | Path,
    *,
    base: BaseOptions | str | Path | None = None,
    options: LoraOptions | None = None,
    revision: str | None = None,
    access: HubAccess | None = None,
    progress: Progress | None = None,
) -> LoraConversion:
    """Write a VeRA adapter as a LoRA adapter with the same delta.

    Args:
        adapter: a folder or a repo on the Hub.
        out: the folder to write.
        base: the options of the base; without them the base of the adapter's config is looked up.
        options: the options of the conversion.
        revision: the adapter's branch, tag or commit on the Hub.
        access: how the Hub is reached.
        progress: told how many bytes are written, and of how many.

    Raises:
        CheckpointError: the adapter is malformed, the engine would refuse the LoRA, or the LoRA
            would lose more than half of a layer's delta.
        UsageError: the layers' sizes are not known, options clash, or `out` exists.
        SurroundingsError: a file, a repo or the disk fails.

    Example:
        >>> to_lora("adapter", "lora", base="base").written
        True
    """
    options = optional(instance, "options", LoraOptions, options) or LoraOptions()
    progress = progress_function("progress", progress)
    base_options = base_options_of(base)
    output = Output(path("out", out), is_lora, options.force)
    with (
        opened(adapter, output, revision=revision, access=access) as work,
        one_blas_thread(),  # further threads of the BLAS wait longer than thin products take
    ):
        job = _planned(work, base_options, options)
        return job.measure(progress) if options.dry_run else job.write(progress)


def _planned(work: Work, base_options: BaseOptions, options: LoraOptions) -> _Job:
    """Plan a conversion, or refuse the adapter with all errors known before writing."""
    adapter, engine = work.adapter, options.target
    base_facts = resolve_base(adapter, base_options, bases=Bases(work.access), need=Need.SIZES)
    pair = in_effect(
        adapter, base_facts, projections=options.projections, variant=options.generator
    )
    plan = plan_lora(adapter, base_facts, pair, options)
    extras = extras_of(adapter)
    sides = side_files(adapter.folder, not_fetched=work.location.left_out)
    is_like_peft = engine.form in (Form.PEFT, Form.MLX)
    copied = tuple(name for name in sides.copied if is_like_peft and name != CARD_NAME)
    place = work.location.label
    of_engine = [*engine_findings(plan, extras, options, base_facts, place=place)]
    if engine.form is Form.DIFFUSERS:
        of_engine += component_findings(plan, base_facts, work.access)
    if engine.heads is not None:
        of_engine += copy_findings(adapter, base_facts, engine.title)
        extras = replace(extras, copies=())
    findings = [
        *adapter.findings,
        *base_facts.findings,
        *pair.findings,
        *other_dims(adapter, base_facts),
        *adapter_findings(work, base_facts, sides, copied),
        *of_engine,
        *_idle_options(options, plan, extras, pair),
    ]
    _refuse_errors(findings, of_engine)
    extras = Extras(copies=extras.copies) if options.drop_head else extras
    source = LoraSource(work.location, adapter, pair, options, base_options)
    files: FormFiles | GgufModel = (
        gguf_model(plan, base_facts)
        if engine.form is Form.GGUF
        else files_of(engine, adapter.config, plan, extras, base_facts)
    )
    return _Job(work, base_facts, plan, extras, source, files, sides, copied, findings)


def _refuse_errors(findings: Sequence[Finding], of_engine: Sequence[Finding]) -> None:
    """Refuse the adapter with all errors; `validate` shows no error of an engine."""
    errors = errors_of(findings)
    if errors:
        error = CheckpointError.of(errors)
        error.validate_shows_all = errors[-1] not in of_engine
        raise error


def _idle_options(
    options: LoraOptions, plan: LoraPlan, extras: Extras, pair: InEffect
) -> Iterator[Finding]:
    """Yield a warning for each option that finds nothing to act on in the adapter."""
    idle = rules.OPTION_WITHOUT_EFFECT
    if options.fill_layers and not (plan.filled or plan.missing):
        reason = f"{options.target.title} needs no layer that ADAPTER leaves out."
        yield idle.at("--fill-layers", reason)
    if options.drop_head and not extras.tensors:
        yield idle.at("--drop-head", "ADAPTER has no modules_to_save and no trained biases.")
    if options.rank is not None and options.rank > plan.rank:
        yield idle.at(f"--rank {options.rank}", f"the LoRA of rank {plan.rank} is exact.")
    if options.generator is not None and pair.draw is None:
        yield IDLE_GENERATOR


def _measured_findings(measured: Measured) -> list[Finding]:
    lost = {module: share for module, share in measured.vanished.items() if share}
    if not lost:
        return []
    worst = max(lost, key=lambda module: lost[module])
    share = f"{lost[worst]:.2%}" if lost[worst] >= 1e-4 else "less than 0.01%"
    reason = (
        f"in {len(lost):,} of {len(measured.vanished):,} layers, float16 rounds values to 0; most "
        f"in {printable(worst)}, {share} of the values."
    )
    return [rules.LORA_VANISHED.in_file(WEIGHTS_NAME, reason)]


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """A planned conversion, to measure or to carry out."""

    work: Work
    base_facts: BaseFacts
    plan: LoraPlan
    extras: Extras
    source: LoraSource
    files: FormFiles | GgufModel
    sides: SideFiles
    copied: tuple[str, ...]
    findings: Sequence[Finding]

    def measure(self, progress: Progress) -> LoraConversion:
        """Compute every layer and write nothing."""
        computed = ComputedFactors(self.plan)
        size, layers = self._weights(NO_SHA256).file_size(), self.plan.layers
        for number, layer in enumerate(layers, 1):
            computed.of(layer)
            progress(size * number // len(layers), size)
        self._require_small_error(computed.measured)
        return self._result(computed.measured, size)

    def write(self, progress: Progress) -> LoraConversion:
        """Write the LoRA whole or not at all."""
        folder, files = self.work.adapter.folder, self.files
        weights = self._weights(file_sha256(self.work.adapter.file.source))
        written = {CONFIG_NAME, CARD_NAME, *self.copied}
        size = weights.file_size()
        output = replace(
            self.work.output,
            inputs=(folder, *self.base_facts.folders),
            strangers=lambda earlier: files_but(earlier, {*lora_records(earlier), *written}),
        )
        with output.staged() as staged:
            copied = sum((folder / name).stat().st_size for name in self.copied)
            require_space(size + copied, staged, output.path)
            check = self.source.options.check
            measured = weights.write(staged / files.weights, progress, check=check)
            self._require_small_error(measured)
            if files.config is not None:
                (staged / CONFIG_NAME).write_bytes(files.config)
            card = lora_card(self.source, self.plan, files.weights, base=self.base_facts.location)
            (staged / CARD_NAME).write_text(card, encoding="utf-8", newline="\n")
            copy_files(folder, self.copied, staged)
            self.work.adapter.check_unchanged()
        return self._result(measured, size)

    def _weights(self, source_sha256: str) -> SafetensorsWeights | GgufWeights:
        record = record_of(self.source, self.plan, source_sha256=source_sha256)
        if isinstance(self.files, GgufModel):
            return GgufWeights(self.files, record, self.plan)
        return SafetensorsWeights(self.files, self.extras.stored, record, self.plan)

    def _result(self, measured: Measured, size: int) -> LoraConversion:
        pair, options = self.source.pair, self.source.options
        return LoraConversion(
            adapter=self.work.location.label,
            out=self.work.output.path,
            written=not options.dry_run,
            options=options,
            plan=self.plan,
            naming=self.files.naming,
            names={layer.module: self.files.name(layer) for layer in self.plan.layers},
            source_rank=self.work.adapter.config.r,
            measured=measured,
            origin=pair.origin,
            draw=pair.draw,
            extras=self.extras,
            base_facts=self.base_facts,
            size=size,
            free=self.work.output.free_space,
            side_files=self.sides,
            findings=tuple(dict.fromkeys((*self.findings, *_measured_findings(measured)))),
        )

    def _require_small_error(self, measured: Measured) -> None:
        """Refuse a LoRA if a layer loses half of the delta, unless the user accepts the loss."""
        errors = measured.errors
        large = {module: error for module, error in errors.items() if error > ERROR_LIMIT}
        if large and not self.source.options.accept_error:
            worst = max(large, key=lambda module: large[module])
            reason = (
                f"at rank {self.plan.rank} the relative error is {large[worst]:.2f} here, "
                f"and above {ERROR_LIMIT} in {len(large):,} of {len(errors):,} layers."
            )
            raise CheckpointError(rules.LORA_ERROR_LARGE.at(printable(worst), reason))
