"""Open the inputs of a merge: the adapters, the base, and the files of both."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.folder import is_training_state
from vera_convert.adapter.opening import open_adapter
from vera_convert.adapter.values import refuse_values
from vera_convert.assembly.input_files import InputFile
from vera_convert.base.bases import Bases
from vera_convert.base.facts import BaseFacts, BaseOptions
from vera_convert.base.model import CONFIG_LIMIT, INDEX_LIMIT, BaseModel, parse_config_file
from vera_convert.base.quantized.targets import quantized_elsewhere, refuse_quantized
from vera_convert.base.quantized.unpack import unpacked
from vera_convert.base.resolve import Need, resolve_base
from vera_convert.base.side_files import ModelFiles, sort_files
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.conversion.proof import other_dims
from vera_convert.draws.generator import Variant
from vera_convert.errors import SurroundingsError, UsageError
from vera_convert.files.header import Header
from vera_convert.files.reading import LocalFile, open_local
from vera_convert.files.shards import read_weight_map
from vera_convert.files.strict_json import read_json
from vera_convert.hub.lookup import (
    HubAccess,
    Location,
    fetch_adapter,
    fetch_base,
    list_files,
    open_remote,
)
from vera_convert.hub.range_file import RemoteFile
from vera_convert.hub.repo_name import SCHEME
from vera_convert.merging.adapter_files import AdapterFiles, adapter_files
from vera_convert.merging.adapters import AdapterSpec, MatchedAdapter
from vera_convert.merging.dequantize import (
    Dequantization,
    check_values,
    plan_dequantization,
)
from vera_convert.merging.in_effect import in_effect
from vera_convert.rules import OPTION_WITHOUT_EFFECT, Finding
from vera_convert.text import printable


@dataclass(frozen=True, slots=True, eq=False)
class MergeInputs:
    """All that a merge reads.

    Attributes:
        adapters: the adapters, matched with the base, in the order of the merge.
        base: the base.
        files: the base's weight files by name.
        sides: the base's other files, sorted into copied and left out.
        copied: the base's files that are copied, by name.
        texts: the bytes of the base's config and index, by name; a base may lack both.
        beside: the files beside the first adapter.
        read_whole: the files of `texts`.
        dequantization: how the base becomes a 16-bit model; None if no tensor is dequantized.
        findings: warnings and notes.
    """

    adapters: tuple[MatchedAdapter, ...]
    base: BaseModel
    files: Mapping[str, InputFile]
    sides: ModelFiles
    copied: Mapping[str, InputFile]
    texts: Mapping[str, bytes]
    beside: AdapterFiles
    read_whole: Mapping[str, InputFile]
    dequantization: Dequantization | None
    findings: tuple[Finding, ...]

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that are read, which no output may touch."""
        locations = (*(each.location for each in self.adapters), self.base.location)
        return tuple(each.folder for each in locations if each.folder is not None)

    def check_unchanged(self) -> None:
        """Raise `SurroundingsError` if an input changed after it was first read."""
        for matched in self.adapters:
            matched.adapter.check_unchanged()
            matched.weights.check_unchanged()
        beside = self.beside
        for files in (
            *(self.files, self.copied, self.read_whole),
            *(beside.tokenizer, beside.copied),
        ):
            for file in files.values():
                file.check_unchanged()


@contextmanager
def open_inputs(
    specs: Sequence[AdapterSpec],
    locations: Sequence[Location],
    base: BaseOptions,
    *,
    access: HubAccess,
    projections: ProjectionSource = ProjectionSource.AUTO,
    variant: Variant | None = None,
    dequantize: bool = False,
    fetch: bool = True,
) -> Iterator[MergeInputs]:
    """Fetch and open the adapters and the base of a merge.

    Args:
        specs: the adapters.
        locations: where the adapters lie.
        base: the caller's options for the base.
        access: how the Hub is reached.
        projections: which A and B to use if file, flag and key disagree.
        variant: the generator's variant; None for the variant of the fingerprint, or PEFT's.
        dequantize: make a 16-bit model of a quantized base.
        fetch: download a base on the Hub. If False, only its headers are read, which is enough
            for a plan.

    Raises:
        CheckpointError: an adapter or the base is malformed, or an adapter does not fit the base.
        UsageError: no base is named, or options clash.
        SurroundingsError: a file, a repo or the disk fails.
    """
    with ExitStack() as stack:
        fetched = [
            fetch_adapter(location, access, is_training_state=is_training_state)
            for location in locations
        ]
        opened = [stack.enter_context(open_adapter(each.fetched)) for each in fetched]
        for adapter in opened:
            refuse_values(adapter)
        need = Need.DEQUANTIZED if dequantize else Need.WHOLE
        facts = _resolve_all(opened, base, access, need)
        model = _base_of(facts[0])
        packed = unpacked(model)
        dequantization = plan_dequantization(packed) if dequantize else None
        is_idle = dequantization is not None and not dequantization.weights
        dequantization = None if is_idle else dequantization
        if dequantization is None:
            matches = [each.match for each in facts if each.match is not None]
            refuse_quantized(packed, [name for each in matches for name in each.tensors.values()])
        read = _read_base(model, access, fetch=fetch)
        model = read.base
        if dequantization is not None:
            model = replace(packed.view, location=model.location)
            if model.location.folder is not None:
                check_values(dequantization, read.files)
        adapters = tuple(
            _matched(spec, location, adapter, each, projections=projections, variant=variant)
            for spec, location, adapter, each in zip(specs, fetched, opened, facts, strict=True)
        )
        beside = [adapter_files(location, model) for location in fetched]
        findings = [*read.sides.findings(model.location.label)]
        if is_idle:
            reason = f"{model.location.label} has no quantized weights."
            findings.append(OPTION_WITHOUT_EFFECT.at("--dequantize", reason))
        if dequantization is None:
            findings += filter(None, [quantized_elsewhere(packed.stored)])
        else:
            findings.append(dequantization.finding(model.location.label))
        for matched, base_facts, files in zip(adapters, facts, beside, strict=True):
            findings += _findings(matched, base_facts, files)
        written = beside[0].over(read.copied)
        for matched, files in zip(adapters[1:], beside[1:], strict=True):
            findings += files.unused(matched.label, written)
        yield MergeInputs(
            adapters=adapters,
            base=model,
            files=read.files,
            sides=read.sides,
            copied=read.copied,
            texts=read.texts,
            read_whole=read.read_whole,
            beside=beside[0],
            dequantization=dequantization,
            findings=tuple(dict.fromkeys(findings)),
        )


def _findings(
    matched: MatchedAdapter, base_facts: BaseFacts, beside: AdapterFiles
) -> Iterator[Finding]:
    """Yield the findings about one adapter and its base."""
    yield from beside.findings(matched.label)
    yield from matched.adapter.findings
    yield from base_facts.findings
    yield from matched.pair.findings
    yield from other_dims(matched.adapter, base_facts)


def _resolve_all(
    adapters: Sequence[Adapter], base: BaseOptions, access: HubAccess, need: Need
) -> list[BaseFacts]:
    """Match every adapter with the same base: the given one, or the base of the first adapter."""
    bases = Bases(access)
    facts = [resolve_base(adapters[0], base, bases=bases, need=need)]
    same = replace(base, model=_name(_base_of(facts[0]).location), revision=None)
    facts += [resolve_base(each, same, bases=bases, need=need) for each in adapters[1:]]
    components = dict.fromkeys(_base_of(each).prefix for each in facts)
    if len(components) > 1:
        shown = " and ".join(printable(prefix.rstrip("/")) for prefix in components)
        raise UsageError(
            f"the adapters are of different components of the base ({shown}): merge one adapter, "
            "and merge the next into the result."
        )
    return facts


def _base_of(facts: BaseFacts) -> BaseModel:
    if facts.base is None:
        raise UsageError(f"a merge needs the base, and {facts.source}. Pass the base with --base.")
    return facts.base


def _matched(
    spec: AdapterSpec,
    location: Location,
    adapter: Adapter,
    facts: BaseFacts,
    *,
    projections: ProjectionSource,
    variant: Variant | None,
) -> MatchedAdapter:
    assert facts.match is not None  # noqa: S101 -- `resolve_base` read the base
    pair = in_effect(adapter, facts, projections=projections, variant=variant)
    weight = 1.0 if spec.weight is None else spec.weight
    return MatchedAdapter(location, adapter, facts.match, pair, weight)


def _name(location: Location) -> str:
    """Return the text that names a location for a later `locate`."""
    if location.folder is not None:
        return str(location.folder)
    subfolder = f"/{location.subfolder}" if location.subfolder else ""
    return f"{SCHEME}{location.repo_id}@{location.commit}{subfolder}"


@dataclass(frozen=True, slots=True)
class _BaseFiles:
    """The base's part of `MergeInputs`."""

    base: BaseModel
    files: Mapping[str, InputFile]
    sides: ModelFiles
    copied: Mapping[str, InputFile]
    texts: Mapping[str, bytes]
    read_whole: Mapping[str, InputFile]


def _read_base(base: BaseModel, access: HubAccess, *, fetch: bool) -> _BaseFiles:
    """Find all files of the base, and read the config and the index whole."""
    sizes = list_files(base.location, access)
    sides = sort_files(sizes, base)
    whole = [name for name in (sides.config, base.index) if name is not None]
    if fetch:
        needed = [*base.files, *whole, *sides.copied]
        base = replace(base, location=fetch_base(base.location, access, names=needed))
    folder = base.location.folder

    def file(name: str, header: Header | None = None) -> InputFile:
        if folder is None:  # for a plan, the size is enough
            return InputFile(Path(name), Path(), (0, 0, sizes[name], 0, 0))
        return InputFile.look(folder / name, within=folder, header=header)

    files = {name: file(name, header) for name, header in base.files.items()}
    read_whole = {name: file(name) for name in whole} if fetch else {}
    texts = {name: _text(base.location, name, access) for name in whole}
    _require_same_base(texts, sides, base)
    copied = {name: file(name) for name in sides.copied}
    return _BaseFiles(base, files, sides, copied, texts, read_whole)


def _require_same_base(texts: Mapping[str, bytes], sides: ModelFiles, base: BaseModel) -> None:
    """Raise `SurroundingsError` unless config and index still describe the base."""
    changed, place = False, base.location.label
    if sides.config is not None:
        changed = parse_config_file(texts[sides.config], place=place) != base.config
    if base.index is not None:
        document = json.loads(texts[base.index])
        files = {name: tensor.file for name, tensor in base.tensors.items()}
        changed |= read_weight_map(document, base.index, place=place) != files
    if changed:
        raise SurroundingsError(
            f"{base.location.label} changed while it was read. Try again when nothing writes to it."
        )


def _text(location: Location, name: str, access: HubAccess) -> bytes:
    """Read a whole file of JSON."""
    folder = location.folder
    file: LocalFile | RemoteFile
    if folder is None:
        file = open_remote(location, name, access)
    else:
        file = open_local(folder / name, within=folder)
    with file:
        return read_json(file, limit=max(CONFIG_LIMIT, INDEX_LIMIT), pythons_numbers=True)[1]
