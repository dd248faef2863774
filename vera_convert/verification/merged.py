"""A merged model and all that it is held against: options, adapters, base, tensors, config."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from vera_convert.assembly.input_files import InputFile
from vera_convert.base.facts import BaseOptions
from vera_convert.base.model import BaseModel, read_base
from vera_convert.base.quantized.targets import refuse_quantized
from vera_convert.base.quantized.unpack import unpacked
from vera_convert.base.side_files import PROVENANCE_NAME, sort_files
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.dtypes import HEADER_NAMES, USUAL_OF_BASES
from vera_convert.errors import CheckpointError, UsageError, VeraConvertError
from vera_convert.files.reading import open_local
from vera_convert.files.shards import component_folders
from vera_convert.hub.lookup import HubAccess, Location, fetch_base, list_files, locate
from vera_convert.merging.adapters import (
    AdapterSpec,
    MatchedAdapter,
    MergedAdapter,
    find_adapters,
)
from vera_convert.merging.changes import Changes, collect
from vera_convert.merging.inputs import MergeInputs, open_inputs
from vera_convert.merging.model_config import config_edits
from vera_convert.rules import (
    BASE_IS_ADAPTER,
    HEAD_TIED,
    MERGED_IS_ADAPTER,
    OTHER_ADAPTER_MERGED,
    OTHER_BASE_MERGED,
    PROVENANCE_MISSING,
    Finding,
)
from vera_convert.text import printable
from vera_convert.verification.expected import Expected, expected_tensors, without_old_head
from vera_convert.verification.model_files import config_findings, file_findings, tie_findings
from vera_convert.verification.options import (
    VerifyOptions,
    require_all_adapters,
    settle,
)
from vera_convert.verification.provenance import (
    MergeSettings,
    Provenance,
    RecordedAdapter,
    read_provenance,
)
from vera_convert.verification.tensors import MergedTensors, Progress, check_tensors


@dataclass(frozen=True, slots=True)
class MergedCheck:
    """What holding a merged model against base and adapters came to.

    Attributes:
        label: how the caller named the model.
        folder: where it lies here.
        base: how the base is named, with its commit on the Hub.
        base_folder: where that lies here.
        is_base: whether the two are one folder.
        adapters: the adapters.
        settings: the options of the merge.
        tensors: what its tensors came to.
        layers_only: whether the model is not to be run.
        seconds: how long that took.
        findings: what is wrong, the worst first; then warnings and notes.
    """

    label: str
    folder: Path
    base: str
    base_folder: Path
    is_base: bool
    adapters: tuple[MergedAdapter, ...]
    settings: MergeSettings
    tensors: MergedTensors
    layers_only: bool
    seconds: float
    findings: tuple[Finding, ...]


def check_merged(
    adapter: AdapterSpec,
    merged: str | Path,
    base: BaseOptions,
    options: VerifyOptions,
    *,
    access: HubAccess,
    progress: Progress,
) -> MergedCheck:
    """Hold a merged model against its base and its adapters, tensor by tensor.

    Args:
        adapter: the first adapter.
        merged: a folder or a repo on the Hub.
        base: what the caller says of the base.
        options: how to verify.
        access: how the Hub is reached.
        progress: told now and then how far it is.

    Raises:
        CheckpointError: something is malformed, or what is given does not belong together.
        UsageError: an option makes no sense, or an adapter that was merged is not given.
        SurroundingsError: a file or a repo cannot be had, or changed meanwhile.
    """
    started = time.monotonic()
    model, provenance, beside = _read_merged(merged, access, whole=not options.layers_only)
    settings = settle(options, base, provenance)
    if settings.dequantize and not options.layers_only:
        raise UsageError(
            "the base is fp8 and the merged model is not, so the two cannot be run alike: leave "
            "it at the weights with --layers-only."
        )
    given = (adapter, *options.add)
    if provenance is not None:
        require_all_adapters(options.add, provenance)
    with _opened(given, base, settings, access=access) as inputs:
        if model.prefix and model.prefix != inputs.base.prefix:  # the adapter's layers decide
            whole, component = not options.layers_only, inputs.base.prefix
            model, _, beside = _read_merged(merged, access, whole=whole, component=component)
        adapters, findings = _weighted(inputs.adapters, given, provenance)
        others = [*_other_base(inputs.base, provenance)] if provenance is not None else []
        findings += others
        if provenance is None:
            reason = f"it has no {PROVENANCE_NAME}."
            findings.append(PROVENANCE_MISSING.at(model.location.label, reason))
        changes = _collected(adapters, inputs, settings)
        if inputs.dequantization is None:
            refuse_quantized(unpacked(inputs.base), changes.replaced)
        expected = _expected(inputs, changes, settings)
        edits = config_edits(
            inputs.base,
            changes,
            inputs.beside.facts,
            architecture=settings.architecture,
            labels=settings.labels,
        )
        if provenance is None and ("architectures",) in edits.members:
            expected = without_old_head(expected, model)
        files = _files(model)
        tensors = check_tensors(
            expected,
            model,
            files,
            jobs=options.jobs,
            wider_too=settings.dtype is None and not settings.recorded,
            progress=progress,
            explain=_OtherProjections(given, base, provenance, settings, access, model).explain,
        )
        folder, base_folder = model.location.fetched, inputs.base.location.fetched
        inputs.check_unchanged()
        for file in files.values():
            file.check_unchanged()
        found = [
            *beside,
            *tensors.findings,
            *tie_findings(model, files, inputs.base, changes),
            *config_findings(
                model,
                inputs.base,
                edits,
                [matched.adapter.config.task_type for matched in adapters],
                is_copied=provenance is not None and not others,
                dequantized=inputs.dequantization is not None,
            ),
            *findings,
            *inputs.findings,
            *changes.findings,
            *edits.findings,
        ]
        return MergedCheck(
            label=model.location.label,
            folder=folder,
            base=inputs.base.location.label,
            base_folder=base_folder,
            is_base=base_folder.resolve() == folder.resolve(),
            adapters=tuple(map(MergedAdapter.of, adapters)),
            settings=settings,
            tensors=tensors,
            layers_only=options.layers_only,
            seconds=time.monotonic() - started,
            findings=tuple(dict.fromkeys(found)),
        )


def _expected(
    inputs: MergeInputs, changes: Changes, settings: MergeSettings
) -> dict[str, Expected]:
    return expected_tensors(
        inputs.base,
        inputs.files,
        changes,
        dtype=HEADER_NAMES[settings.dtype] if settings.dtype is not None else None,
        dequantization=inputs.dequantization,
    )


@contextmanager
def _of_the_merged_model() -> Iterator[None]:
    """Mark every `CheckpointError` inside as a defect of the merged model, not of the adapter."""
    try:
        yield
    except CheckpointError as error:
        if error.findings[0].rule is BASE_IS_ADAPTER:
            finding = MERGED_IS_ADAPTER.at(error.findings[0].place, error.findings[0].reason)
            error = CheckpointError(finding)
        error.of_merged = True
        raise error from None


@_of_the_merged_model()
def _read_merged(
    merged: str | Path, access: HubAccess, *, whole: bool, component: str = ""
) -> tuple[BaseModel, Provenance | None, list[Finding]]:
    """Fetch a merged model and read its headers and provenance; the rest too, to run it whole.

    Returns:
        also what lies beside the weights and does not belong there.
    """
    location = locate(str(merged), kind="base", access=access)
    names = list_files(location, access)
    provenance = _provenance(location, names, access)
    component = component or _recorded_component(provenance, names)
    model = read_base(location, access, component=component)
    sides = sort_files(names, model)
    beside = [*file_findings(names, model, sides)]
    needed = [name for name in (sides.config, model.index) if name is not None]
    needed += [*model.files, *(sides.copied if whole else ())]
    model = replace(model, location=fetch_base(location, access, names=needed))
    return model, provenance, beside


def _provenance(location: Location, names: Collection[str], access: HubAccess) -> Provenance | None:
    if PROVENANCE_NAME not in names:
        return None
    folder = fetch_base(location, access, names=[PROVENANCE_NAME]).fetched
    with open_local(folder / PROVENANCE_NAME, within=folder) as source:
        return read_provenance(source)


def _recorded_component(provenance: Provenance | None, names: Collection[str]) -> str:
    """Return the folder of the component of a pipeline that a merge recorded; else empty."""
    recorded = provenance.base_headers if provenance is not None else ()
    folders = {f"{name.partition('/')[0]}/" for name in recorded}
    return next((folder for folder in component_folders(names) if {folder} == folders), "")


def _collected(
    adapters: Sequence[MatchedAdapter], inputs: MergeInputs, settings: MergeSettings
) -> Changes:
    """Collect the changes of all adapters; a missing `--tied` is a fault of the call.

    Raises:
        CheckpointError: the adapters do not belong together or do not fit the base.
        UsageError: an adapter changes a tied head and nothing says how it was merged.
    """
    try:
        return collect(adapters, inputs.base, inputs.files, tied=settings.tied)
    except CheckpointError as error:
        if any(finding.rule is not HEAD_TIED for finding in error.findings):
            raise
        raise UsageError(
            f"{error} The merged model does not record how it was merged: give the `--tied` of "
            "the merge."
        ) from error


def _files(model: BaseModel) -> dict[str, InputFile]:
    folder = model.location.fetched
    return {
        name: InputFile.look(folder / name, within=folder, header=header)
        for name, header in model.files.items()
    }


@contextmanager
def _opened(
    given: Sequence[AdapterSpec], base: BaseOptions, settings: MergeSettings, *, access: HubAccess
) -> Iterator[MergeInputs]:
    """Open what was merged, as the merge did."""
    with open_inputs(
        given,
        find_adapters(given, access),
        replace(base, dtype=settings.base_dtype, key_map=settings.key_map),
        access=access,
        projections=settings.projections,
        variant=settings.generator,
        dequantize=settings.dequantize,
    ) as inputs:
        yield inputs


# --- other A and B -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _OtherProjections:
    """Tries the A and B that other versions of PEFT have in effect on tensors that are wrong."""

    given: Sequence[AdapterSpec]
    base: BaseOptions
    provenance: Provenance | None
    settings: MergeSettings
    access: HubAccess
    model: BaseModel

    def explain(self, names: Sequence[str]) -> dict[str, str]:
        """Return for each wrong tensor that is right with other A and B how to say so."""
        for projections, dtype in self._others():
            settings = replace(self.settings, projections=projections, base_dtype=dtype)
            # Most trials end with the two worst tensors.
            if self._right(settings, names[:2]):
                said = _IN_WORDS[projections]
                if dtype != self.settings.base_dtype:
                    said += f" --base-dtype {dtype}"
                return dict.fromkeys(self._right(settings, names), f"{said}.")
        return {}

    def _others(self) -> Iterator[tuple[ProjectionSource, str | None]]:
        own = self.settings.base_dtype
        for projections in (ProjectionSource.KEY, ProjectionSource.FILE):
            if projections is not self.settings.projections:
                yield projections, own
        for dtype in USUAL_OF_BASES:
            if dtype != own:
                yield ProjectionSource.KEY, dtype

    def _right(self, settings: MergeSettings, names: Sequence[str]) -> list[str]:
        """Return the names of those tensors that are right with these options, if the first is."""
        try:
            with _opened(self.given, self.base, settings, access=self.access) as inputs:
                adapters, _ = _weighted(inputs.adapters, self.given, self.provenance)
                expected = _expected(inputs, _collected(adapters, inputs, settings), settings)
                found = check_tensors(
                    {name: expected[name] for name in names if name in expected},
                    self.model,
                    _files(self.model),
                    wider_too=settings.dtype is None and not settings.recorded,
                    explain=lambda wrong: dict.fromkeys(wrong, "not with these"),
                )
        except VeraConvertError:  # the adapter has no such A and B
            return []
        right = {check.name for check in found.checks if check.passed}
        return [name for name in names if name in right] if right.issuperset(names[:2]) else []


_IN_WORDS = {
    ProjectionSource.KEY: (
        "It is right with A and B drawn from the key, as PEFT 0.11 to 0.20 merges: verify with "
        "--projections key"
    ),
    ProjectionSource.FILE: (
        "It is right with the stored A and B, as PEFT 0.21 merges if save_projection is true: "
        "verify with --projections file"
    ),
}


# --- what was merged, and what is given ----------------------------------------------------------


def _weighted(
    adapters: Sequence[MatchedAdapter], given: Sequence[AdapterSpec], provenance: Provenance | None
) -> tuple[tuple[MatchedAdapter, ...], list[Finding]]:
    """Return the adapters with the weights that they were merged with, and what is doubtful.

    An adapter is known by its hashes, in whatever order they are given; what has none of the
    recorded ones is another form of the one in its place.
    """
    findings: list[Finding] = []
    records = _records(adapters, provenance)
    weighted = []
    for matched, spec, record in zip(adapters, given, records, strict=True):
        weight = spec.weight
        if weight is None:
            weight = record.weight if record is not None else 1.0
        weighted.append(replace(matched, weight=weight))
        if record is not None and _hashes(matched) != (record.config_sha256, record.header_sha256):
            reason = f'"{printable(record.name)}" was merged in its place.'
            findings.append(OTHER_ADAPTER_MERGED.at(matched.label, reason))
    return tuple(weighted), findings


def _records(
    adapters: Sequence[MatchedAdapter], provenance: Provenance | None
) -> list[RecordedAdapter | None]:
    """Return for each adapter what was recorded of it, or of the one in its place."""
    if provenance is None:
        return [None] * len(adapters)
    left = [*provenance.adapters]
    found: list[RecordedAdapter | None] = []
    for matched in adapters:
        same = [r for r in left if (r.config_sha256, r.header_sha256) == _hashes(matched)]
        found.append(same[0] if same else None)
        if same:
            left.remove(same[0])
    return [record or left.pop(0) for record in found]


def _hashes(matched: MatchedAdapter) -> tuple[str, str]:
    config, header = matched.adapter.config_file.text, matched.header.raw
    return sha256(config).hexdigest(), sha256(header).hexdigest()


def _other_base(base: BaseModel, provenance: Provenance) -> Iterator[Finding]:
    headers = {name: sha256(header.raw).hexdigest() for name, header in base.files.items()}
    if headers != dict(provenance.base_headers):
        names = {*headers.items()} ^ {*provenance.base_headers.items()}
        reason = f"{printable(min(names)[0])} is another one."
        yield OTHER_BASE_MERGED.at(base.location.label, reason)
