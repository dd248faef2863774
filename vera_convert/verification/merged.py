"""Compare a merged model with base and adapters: tensors, config, and other files."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vera_convert import rules
from vera_convert.arguments import Progress
from vera_convert.assembly.input_files import InputFile
from vera_convert.base.facts import BaseOptions
from vera_convert.base.model import BaseModel, read_base
from vera_convert.base.quantized.recognize import method_of
from vera_convert.base.side_files import PROVENANCE_NAME, sort_files
from vera_convert.base.tied import always_ties_stacks, scales_logits
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.draws.generator import Rounding, rounding_on_base
from vera_convert.dtypes import BASE_NAMES
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.files.reading import open_local
from vera_convert.files.shards import component_folders
from vera_convert.hub.lookup import HubAccess, Location, fetch_base, list_files, locate
from vera_convert.merging.adapters import AdapterSpec, MergedAdapter
from vera_convert.merging.base_files import BaseFiles
from vera_convert.merging.changes import Kind, MergedTensor, shared_copies
from vera_convert.merging.model_config import ConfigEdits, config_edits
from vera_convert.rules import Finding
from vera_convert.text import printable
from vera_convert.verification.model_comparison import (
    ModelComparison,
    ModelJob,
    QuantizedComparison,
    missing_packages,
)
from vera_convert.verification.model_files import (
    config_findings,
    copied_findings,
    file_findings,
    loaders,
    tie_findings,
)
from vera_convert.verification.options import VerifyOptions, given_alone, settle
from vera_convert.verification.provenance import MergeSettings, Provenance, read_provenance
from vera_convert.verification.repeated_merge import (
    OpenedMerge,
    RepeatedMerge,
    right_with_other_projections,
)
from vera_convert.verification.tensors import MergedTensors, check_tensors

_DTYPE_OF_ROUNDING = {Rounding.NONE: "float32"} | {
    rounding_on_base(name): name for name in BASE_NAMES if name != "float64"
}


@dataclass(frozen=True, slots=True)
class MergedCheck:
    """The result of comparing a merged model with base and adapters.

    Attributes:
        label: the caller's name of the model.
        base: the name of the base, with the commit on the Hub.
        is_base: whether the model lies in the folder of the base.
        adapters: the adapters.
        settings: the options of the merge.
        tensors: the result for the tensors.
        seconds: how long the comparison took.
        run: the models to run, or the reason why no model is run.
        findings: errors, the worst first; then warnings and notes.
        model: the result of running the models; None if no model was run.
        failure: the error that stopped the run; None without an error.
    """

    label: str
    base: str
    is_base: bool
    adapters: tuple[MergedAdapter, ...]
    settings: MergeSettings
    tensors: MergedTensors
    seconds: float
    run: ModelJob | str
    findings: tuple[Finding, ...]
    model: ModelComparison | None = None
    failure: SurroundingsError | None = None

    def with_model(self, model: ModelComparison) -> MergedCheck:
        """Return this result, completed by the result of the run."""
        if isinstance(self.run, ModelJob) and self.run.not_quantized:
            reason = self.run.not_quantized
            model = replace(model, quantized=QuantizedComparison(not_compared=reason))
        findings = [*self.findings]
        if not model.passed:
            # An inconclusive run must not fail correct, changed weights.
            unclear = rules.MODEL_SHOWS_LITTLE if self.tensors.moved else rules.MODEL_SHOWS_NOTHING
            rule = rules.MODEL_DIFFERS if model.conclusive else unclear
            findings.append(rule.at(self.label, model.reason))
        if model.quantized is not None and not model.quantized.passed:
            found = model.quantized
            reason = (
                "The merged model differs from the quantized base with the adapter in PEFT by "
                f"{found.difference:.1e} (RMS; limit {found.threshold:.1e}: computing in "
                f"{found.dtype})."
            )
            findings.append(rules.MODEL_DIFFERS.at(self.label, reason))
        return replace(self, model=model, findings=tuple(findings))


def check_merged(
    adapter: AdapterSpec,
    merged: str | Path,
    base: BaseOptions,
    options: VerifyOptions,
    *,
    access: HubAccess,
    progress: Progress,
) -> MergedCheck:
    """Compare a merged model with base and adapters, tensor by tensor.

    Args:
        adapter: the first adapter.
        merged: a folder or a repo on the Hub.
        base: the caller's options for the base.
        options: how to verify.
        access: how the Hub is reached.
        progress: called with the compared bytes, and with the total.

    Raises:
        CheckpointError: a file is malformed, or the arguments do not belong together.
        UsageError: an option makes no sense, or an adapter of the merge is not given.
        SurroundingsError: a file or a repo is missing, unreadable, or changed meanwhile.
    """
    started = time.monotonic()
    complete = not options.layers_only
    read = _read_merged(merged, access, complete=complete)
    settings = settle(options, base, read.provenance)
    merge = RepeatedMerge((adapter, *options.add), base, settings, read.provenance, access)
    with merge.opened() as source:
        inputs, base_model = source.inputs, source.inputs.base.model
        source.changes.keeps_scale = read.provenance is None and scales_logits(read.model)
        if read.model.prefix and read.model.prefix != base_model.prefix:
            # The adapter's layers select the component of a pipeline.
            read = _read_merged(merged, access, complete=complete, component=base_model.prefix)
        edits = config_edits(inputs, source.changes)
        tensors = check_tensors(
            _expected(read, source, edits),
            read.files,
            jobs=options.jobs,
            wider_too=merge.may_be_wider,
            progress=progress,
            explain=partial(right_with_other_projections, merge, read.files),
        )
        findings = dict.fromkeys(_findings(read, source, edits, tensors, settings))
        read.files.check_unchanged()
        inputs.check_unchanged()
        folder = read.model.location.fetched
        adapters = tuple(map(MergedAdapter.of, inputs.adapters))
        job = _job(adapters, base_model, folder, settings, tensors)
        return MergedCheck(
            label=read.model.location.label,
            base=base_model.location.label,
            is_base=base_model.location.fetched.resolve() == folder.resolve(),
            adapters=adapters,
            settings=settings,
            tensors=tensors,
            seconds=time.monotonic() - started,
            run=job if complete else "--layers-only",
            findings=tuple(findings),
        )


def _expected(read: _ReadModel, source: OpenedMerge, edits: ConfigEdits) -> dict[str, MergedTensor]:
    """Return the expected tensors, by name.

    transformers saves no head that the class lacks, so the base's own head may be missing from a
    merged model of another class. The copies of an embedding that transformers always ties may be
    missing, too.
    """
    expected = source.expected
    if read.provenance is not None:
        return expected
    if always_ties_stacks(read.model):
        copies = {copy for copy, _ in shared_copies(source.inputs.base.model, source.changes)}
        for name in copies - read.model.tensors.keys():
            del expected[name]
    if ("architectures",) not in edits.members:
        return expected
    heads = {*loaders("modules")["heads"]}
    return {
        name: each
        for name, each in expected.items()
        if name in read.model.tensors
        or each.kind not in (Kind.SAME, Kind.CONVERTED)
        or heads.isdisjoint(name.split(".")[:2])
    }


def _findings(
    read: _ReadModel,
    source: OpenedMerge,
    edits: ConfigEdits,
    tensors: MergedTensors,
    settings: MergeSettings,
) -> Iterator[Finding]:
    """Yield all findings about a merged model, errors of the weights first."""
    model, inputs = read.model, source.inputs
    is_copied = read.provenance is not None and not any(
        finding.rule is rules.OTHER_BASE_MERGED for finding in source.findings
    )
    yield from read.findings
    yield from tensors.findings
    is_ours = read.provenance is not None
    yield from tie_findings(read.files, inputs.base.model, source.changes, is_ours=is_ours)
    yield from config_findings(model, inputs, edits, is_copied=is_copied)
    if is_copied:
        yield from copied_findings(model, read.names, inputs.side_files)
    yield from source.findings
    if read.provenance is None:
        yield rules.PROVENANCE_MISSING.at(model.location.label, f"it has no {PROVENANCE_NAME}.")
    yield from given_alone(inputs.findings, settings)
    yield from given_alone(source.changes.findings, settings)
    yield from edits.findings


# --- the models to run ---------------------------------------------------------------------------


def _job(
    adapters: Sequence[MergedAdapter],
    base: BaseModel,
    merged: Path,
    settings: MergeSettings,
    tensors: MergedTensors,
) -> ModelJob:
    """Return the models to run for a merged model whose weights are right.

    Args:
        adapters: the adapters, in the order of the merge.
        base: the base.
        merged: the folder of the merged model.
        settings: the options of the merge.
        tensors: the result of comparing the weights.
    """
    job = ModelJob(
        adapters=tuple((adapter.folder, adapter.weight) for adapter in adapters),
        base=base.location.fetched,
        found=merged,
        weights=tensors.nbytes,
        settings=settings,
        wider=tensors.wider,
    )
    if not settings.dequantize:
        return job
    quantization, draw = base.config.get("quantization_config"), adapters[0].draw
    method = method_of(quantization) if isinstance(quantization, dict) else ""
    if draw is not None and settings.base_dtype is None:
        # The base is run dequantized, where PEFT would round A and B otherwise.
        rounded = replace(settings, base_dtype=_DTYPE_OF_ROUNDING.get(draw.rounding))
        job = replace(job, settings=rounded)
    reason = _why_not_quantized(method, adapters, settings)
    quantizer = "" if reason else loaders("quantizers")[method][0]
    return replace(job, quantizer=quantizer, not_quantized=reason)


def _why_not_quantized(
    method: str, adapters: Sequence[MergedAdapter], settings: MergeSettings
) -> str:
    """Return the reason against a run of the stored quantized base; empty without a reason."""
    packages = loaders("quantizers").get(method)
    if packages is None:
        return f"the kernels of {printable(method) or 'this method'} are not run"
    missing = missing_packages(*packages, "peft")
    if missing:
        return f"{missing} not installed"
    if len(adapters) != 1 or adapters[0].weight != 1:
        return "PEFT loads a single adapter of weight 1"
    auto = settings.projections is ProjectionSource.AUTO and settings.generator is None
    if not auto or settings.base_dtype is not None or settings.tied is not None:
        return "the options of the merge differ from PEFT's loading"
    return ""


# --- reading the merged model --------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _ReadModel:
    """A merged model as read.

    Attributes:
        files: the headers, and the fetched weight files.
        names: all files of the folder.
        provenance: the record of the merge; None without a record.
        findings: files foreign to a merged model.
    """

    files: BaseFiles
    names: Collection[str]
    provenance: Provenance | None
    findings: tuple[Finding, ...]

    @property
    def model(self) -> BaseModel:
        """The headers, and the folder of the fetched files."""
        return self.files.model


@contextmanager
def _of_the_merged_model() -> Iterator[None]:
    """Mark the errors of the block as defects of the merged model, not of the adapter."""
    try:
        yield
    except CheckpointError as error:
        if error.findings[0].rule is rules.BASE_IS_ADAPTER:
            finding = rules.MERGED_IS_ADAPTER.at(error.findings[0].place, error.findings[0].reason)
            error = CheckpointError(finding)
        error.validate_shows_all = False
        raise error from None


@_of_the_merged_model()
def _read_merged(
    merged: str | Path, access: HubAccess, *, complete: bool, component: str = ""
) -> _ReadModel:
    """Fetch a merged model, and read the headers and the provenance.

    Args:
        merged: a folder or a repo on the Hub.
        access: how the Hub is reached.
        complete: fetch the files for a run of the model, too.
        component: the folder of the component of a pipeline; empty to look in the provenance.
    """
    location = locate(str(merged), kind="base", access=access)
    names = list_files(location, access)
    provenance = _provenance(location, names, access)
    component = component or _recorded_component(provenance, names)
    model = read_base(location, access, component=component)
    sides = sort_files(names, model)
    findings = tuple(file_findings(names, model, sides))
    needed = [name for name in (sides.config, model.index) if name is not None]
    needed += [*model.files, *(sides.copied if complete else ())]
    model = replace(model, location=fetch_base(location, access, names=needed))
    folder = model.location.fetched
    files = {
        name: InputFile.look(folder / name, within=folder, header=header)
        for name, header in model.files.items()
    }
    return _ReadModel(BaseFiles(model, sides, files, {}), names, provenance, findings)


def _provenance(location: Location, names: Collection[str], access: HubAccess) -> Provenance | None:
    if PROVENANCE_NAME not in names:
        return None
    folder = fetch_base(location, access, names=[PROVENANCE_NAME]).fetched
    with open_local(folder / PROVENANCE_NAME, within=folder) as source:
        return read_provenance(source)


def _recorded_component(provenance: Provenance | None, names: Collection[str]) -> str:
    """Return the folder of the pipeline component that a merge recorded; empty without one."""
    recorded = provenance.base_headers if provenance is not None else ()
    folders = {f"{name.partition('/')[0]}/" for name in recorded}
    return next((folder for folder in component_folders(names) if {folder} == folders), "")
