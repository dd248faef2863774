"""What a merge reads, understood before anything is planned: adapters, base, and their files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.folder import is_training_state
from vera_convert.adapter.opening import open_adapter
from vera_convert.adapter.tensors import WEIGHTS_NAME
from vera_convert.adapter.values import refuse_values
from vera_convert.arguments import number, optional, place, set_checked, text
from vera_convert.assembly.input_files import InputFile
from vera_convert.base.facts import BaseFacts, BaseOptions, loaded_in
from vera_convert.base.model import CONFIG_LIMIT, INDEX_LIMIT, BaseModel, parse_config_file
from vera_convert.base.quantized import quantized_elsewhere, refuse_quantized
from vera_convert.base.resolve import Bases, Need, resolve_base
from vera_convert.base.side_files import ModelFiles, sort_files
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.conversion.proof import other_dims
from vera_convert.draws.generator import Variant
from vera_convert.errors import SurroundingsError, UsageError
from vera_convert.files.header import Header
from vera_convert.files.reading import LocalFile, open_local, read_json
from vera_convert.files.shards import read_weight_map
from vera_convert.hub.lookup import (
    HubAccess,
    Location,
    fetch_adapter,
    fetch_base,
    list_files,
    locate,
    open_remote,
)
from vera_convert.hub.range_file import RemoteFile
from vera_convert.hub.repo_name import SCHEME
from vera_convert.merging.adapter_files import AdapterFiles, adapter_files
from vera_convert.merging.changes import MatchedAdapter
from vera_convert.merging.dequantize import Dequantization, plan_dequantization
from vera_convert.merging.in_effect import InEffect, in_effect
from vera_convert.rules import Finding
from vera_convert.text import printable


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """One adapter as a caller names it.

    Attributes:
        adapter: a folder or a repo on the Hub.
        weight: the factor of its deltas.
        revision: its branch, tag or commit on the Hub.
    """

    adapter: str | Path
    weight: float = 1.0
    revision: str | None = None

    def __post_init__(self) -> None:
        set_checked(
            self,
            adapter=place("adapter", self.adapter),
            weight=number("weight", self.weight),
            revision=optional(text, "revision", self.revision),
        )


@dataclass(frozen=True, slots=True, eq=False)
class MergeInputs:
    """All that a merge reads.

    Attributes:
        parts: the adapters, matched with the base, in the order of the merge.
        locations: where each adapter lies.
        base: the base.
        files: its weight files, by name.
        sides: its other files by what becomes of them.
        copied: those that are carried, by name.
        texts: the bytes of its config and index, by name, as far as there are such files.
        beside: the files beside the first adapter.
        read_whole: the files of `texts`.
        dequantization: how the base becomes a 16-bit model; None if it stays as it is.
        findings: warnings and notes.
    """

    parts: tuple[MatchedAdapter, ...]
    locations: tuple[Location, ...]
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
        folders = [location.folder for location in (*self.locations, self.base.location)]
        return tuple(folder for folder in folders if folder is not None)

    def check_unchanged(self) -> None:
        """Raise `SurroundingsError` if anything changed since it was looked at first."""
        for part in self.parts:
            part.adapter.check_unchanged()
            part.weights.check_unchanged()
        beside = self.beside
        for files in (
            *(self.files, self.copied, self.read_whole),
            *(beside.tokenizer, beside.copied),
        ):
            for file in files.values():
                file.check_unchanged()


def find_adapters(specs: Sequence[AdapterSpec], access: HubAccess) -> tuple[Location, ...]:
    """Find where the adapters lie; nothing is fetched.

    Raises:
        UsageError: malformed, or a revision of something that has none.
        SurroundingsError: there is no such folder or repo.
    """
    return tuple(
        locate(str(spec.adapter), kind="adapter", access=access, revision=spec.revision)
        for spec in specs
    )


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
    """Fetch, open and understand what is merged.

    Args:
        specs: the adapters.
        locations: where they lie.
        base: what the caller says of the base.
        access: how the Hub is reached.
        projections: which A and B count where file, flag and key disagree.
        variant: how they are drawn, where they are and no fingerprint says it.
        dequantize: make a base whose weights are fp8 a 16-bit model.
        fetch: bring a base on the Hub here; without that its headers alone are read, and what is
            returned serves for a plan.

    Raises:
        CheckpointError: an adapter or the base is malformed, or they do not belong together.
        UsageError: no base is named, or options clash.
        SurroundingsError: a file, a repo or the disk fails.
    """
    with ExitStack() as stack:
        fetched = [
            fetch_adapter(location, access, is_training_state=is_training_state)
            for location in locations
        ]
        adapters = [stack.enter_context(open_adapter(each.fetched)) for each in fetched]
        known = _learn_all(adapters, base, access)
        model = known[0].base
        assert model is not None  # noqa: S101 -- `_learn_all` demands it
        dequantization = plan_dequantization(model) if dequantize else None
        if dequantization is None:
            matches = [each.match for each in known if each.match is not None]
            refuse_quantized(model, [name for each in matches for name in each.tensors.values()])
        elif base.dtype is None:
            known = [loaded_in(each, dequantization.dtype) for each in known]
        names = list_files(model.location, access)
        sides = sort_files(names, model)
        whole = [name for name in (sides.config, model.index) if name is not None]
        if fetch:
            needed = [*model.files, *whole, *sides.copied]
            model = replace(model, location=fetch_base(model.location, access, names=needed))
        find = _Finder(model.location, names)
        files = {name: find.file(name, header) for name, header in model.files.items()}
        read_whole = {name: find.file(name) for name in whole} if fetch else {}
        texts = {name: _text(model.location, name, access) for name in whole}
        _hold_against_base(texts, sides, model)
        parts = []
        for spec, location, adapter, base_facts in zip(
            specs, fetched, adapters, known, strict=True
        ):
            refuse_values(adapter)
            pair = in_effect(adapter, base_facts, projections=projections, variant=variant)
            parts.append(_part(spec, location, adapter, base_facts, pair))
        findings = [*sides.findings(model.location.label)]
        if dequantization is None:
            findings += filter(None, [quantized_elsewhere(model)])
        else:
            findings.append(dequantization.finding(model.location.label))
        beside = [adapter_files(location, model) for location in fetched]
        for part, base_facts, files_beside in zip(parts, known, beside, strict=True):
            findings += files_beside.findings(part.label)
            findings += [*part.adapter.findings, *base_facts.findings, *part.pair.findings]
            findings += other_dims(part.adapter, base_facts)
        inputs = MergeInputs(
            parts=tuple(parts),
            locations=tuple(fetched),
            base=model,
            files=files,
            sides=sides,
            copied={name: find.file(name) for name in sides.copied},
            texts=texts,
            beside=beside[0],
            read_whole=read_whole,
            dequantization=dequantization,
            findings=tuple(dict.fromkeys(findings)),
        )
        yield inputs


def _learn_all(
    adapters: Sequence[Adapter], base_options: BaseOptions, access: HubAccess
) -> list[BaseFacts]:
    """Match every adapter with the one base, that of the first if none is given."""
    bases = Bases(access)
    known = [resolve_base(adapters[0], base_options, bases=bases, need=Need.WHOLE)]
    base = known[0].base
    if base is None:
        raise UsageError(f"a merge needs the base, and {known[0].source}: name it with --base.")
    same = replace(base_options, model=_name(base.location), revision=None)
    known += [resolve_base(each, same, bases=bases, need=Need.WHOLE) for each in adapters[1:]]
    components = dict.fromkeys(each.base.prefix for each in known if each.base is not None)
    if len(components) > 1:
        shown = " and ".join(printable(prefix.rstrip("/")) for prefix in components)
        raise UsageError(
            f"the adapters are of different components of the base ({shown}): merge one adapter, "
            "and merge the next into the result."
        )
    return known


def _name(location: Location) -> str:
    """Return what names a location so that it is found again."""
    if location.folder is not None:
        return str(location.folder)
    subfolder = f"/{location.subfolder}" if location.subfolder else ""
    return f"{SCHEME}{location.repo_id}@{location.commit}{subfolder}"


@dataclass(frozen=True, slots=True)
class _Finder:
    """Makes input files of names in the base's folder; of sizes alone where it is not here."""

    location: Location
    sizes: Mapping[str, int]

    def file(self, name: str, header: Header | None = None) -> InputFile:
        folder = self.location.folder
        if folder is None:
            return InputFile(Path(name), Path(), (0, 0, self.sizes[name], 0, 0))
        return InputFile.look(folder / name, within=folder, header=header)


def _hold_against_base(texts: Mapping[str, bytes], sides: ModelFiles, base: BaseModel) -> None:
    """Demand that the config and the index that are carried are those that were understood."""
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


def _part(
    spec: AdapterSpec,
    location: Location,
    adapter: Adapter,
    base_facts: BaseFacts,
    pair: InEffect,
) -> MatchedAdapter:
    source, folder = adapter.file.source, location.fetched
    assert isinstance(source, LocalFile)  # noqa: S101 -- an adapter is opened in a folder
    assert base_facts.match is not None  # noqa: S101 -- it is known from a base
    return MatchedAdapter(
        label=location.label,
        adapter=adapter,
        match=base_facts.match,
        pair=pair,
        weights=InputFile(folder / WEIGHTS_NAME, folder, source.identity),
        header=adapter.file.header,
        weight=spec.weight,
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
