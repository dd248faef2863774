"""Open the inputs of a merge: the options, the adapters, the base, and the files of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.opening import open_adapter
from vera_convert.adapter.values import refuse_values
from vera_convert.assembly.input_files import InputFile
from vera_convert.base.bases import Bases
from vera_convert.base.facts import BaseFacts, BaseOptions
from vera_convert.base.model import BaseModel
from vera_convert.base.quantized.targets import misdescribed, quantized_elsewhere, refuse_quantized
from vera_convert.base.quantized.unpack import Unpacked, unpacked
from vera_convert.base.resolve import Need, idle_key_maps, resolve_base
from vera_convert.conversion.proof import other_dims
from vera_convert.conversion.transforms import IDLE_GENERATOR
from vera_convert.errors import UsageError, naming_adapter
from vera_convert.hub.lookup import HubAccess, Location, fetch_adapter
from vera_convert.hub.repo_name import SCHEME
from vera_convert.merging.adapter_files import AdapterFiles, adapter_files
from vera_convert.merging.adapters import AdapterSpec, MatchedAdapter
from vera_convert.merging.base_files import BaseFiles, read_base_files
from vera_convert.merging.dequantize import dequantized_finding
from vera_convert.merging.in_effect import in_effect
from vera_convert.merging.options import MergeOptions
from vera_convert.rules import Finding
from vera_convert.text import listed


@dataclass(frozen=True, slots=True, eq=False)
class MergeInputs:
    """Everything that decides the result of a merge.

    Attributes:
        options: the options of the merge.
        base_options: the caller's options for the base.
        adapters: the adapters, matched with the base, in the order of the merge.
        base: the base and its files.
        beside: the files beside the first adapter.
        findings: warnings and notes.
    """

    options: MergeOptions
    base_options: BaseOptions
    adapters: tuple[MatchedAdapter, ...]
    base: BaseFiles
    beside: AdapterFiles
    findings: tuple[Finding, ...]

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders of the inputs; the output must stay outside."""
        locations = (*(each.location for each in self.adapters), self.base.model.location)
        return tuple(each.folder for each in locations if each.folder is not None)

    @property
    def side_files(self) -> dict[str, InputFile]:
        """The files beside the merged weights; the adapter's files replace the base's."""
        return self.beside.over(self.base.copied)

    def check_unchanged(self) -> None:
        """Raise `SurroundingsError` if an input changed after the first look."""
        for matched in self.adapters:
            matched.adapter.check_unchanged()
            matched.weights.check_unchanged()
        self.base.check_unchanged()
        for file in self.beside.in_model.values():
            file.check_unchanged()


@contextmanager
def open_inputs(
    found: Sequence[tuple[AdapterSpec, Location]],
    base: BaseOptions,
    options: MergeOptions,
    access: HubAccess,
) -> Iterator[MergeInputs]:
    """Fetch and open the adapters and the base of a merge.

    A dry run reads only the headers of a base on the Hub.

    Args:
        found: the adapters as the caller names them, each with the place.
        base: the caller's options for the base.
        options: the options of the merge.
        access: how the Hub is reached.

    Raises:
        CheckpointError: an adapter or the base is malformed, or an adapter does not fit the base.
        UsageError: no base is named, or options clash.
        SurroundingsError: a file, a repo or the disk fails.
    """
    with ExitStack() as stack:
        locations = [fetch_adapter(location, access) for _, location in found]
        names = ["", *(location.label for location in locations[1:])]
        opened = [
            stack.enter_context(_opened(location, name))
            for location, name in zip(locations, names, strict=True)
        ]
        need = Need.DEQUANTIZED if options.dequantize else Need.WHOLE
        facts = _resolve_all(opened, names, base, access, need)
        packed = unpacked(_base_of(facts[0]))
        dequantizes = _is_dequantized(packed, facts, options)
        files = read_base_files(packed.stored, access, fetch=not options.dry_run)
        if dequantizes:
            files = files.dequantized(packed)
        adapters = []
        for (spec, _), name, location, adapter, each in zip(
            found, names, locations, opened, facts, strict=True
        ):
            with naming_adapter(name):
                adapters.append(_matched(spec, location, adapter, each, options))
        beside = [adapter_files(location, files.model) for location in locations]
        written = beside[0].over(files.copied)
        findings = [
            *_base_findings(files, packed, adapters),
            *_adapter_findings(adapters, facts, beside),
            *chain.from_iterable(
                files.unused(matched.label, written)
                for matched, files in zip(adapters[1:], beside[1:], strict=True)
            ),
            *_idle_options(files, adapters, options),
            *idle_key_maps(base.key_map, [(each.adapter, each.match) for each in adapters]),
        ]
        unique = tuple(dict.fromkeys(findings))
        yield MergeInputs(options, base, tuple(adapters), files, beside[0], unique)


@contextmanager
def _opened(location: Location, name: str) -> Iterator[Adapter]:
    """Open a fetched adapter; an error about an added adapter has the adapter's name."""
    with ExitStack() as stack:
        with naming_adapter(name):
            adapter = stack.enter_context(open_adapter(location.fetched))
            refuse_values(adapter)
        yield adapter


def _resolve_all(
    adapters: Sequence[Adapter],
    names: Sequence[str],
    base: BaseOptions,
    access: HubAccess,
    need: Need,
) -> list[BaseFacts]:
    """Match every adapter with the same base: the given one, or the base of the first adapter.

    An error about an added adapter has the adapter's name.
    """
    bases = Bases(access)
    facts = [resolve_base(adapters[0], base, bases=bases, need=need)]
    same = replace(base, model=_name(_base_of(facts[0]).location), revision=None)
    for adapter, name in zip(adapters[1:], names[1:], strict=True):
        with naming_adapter(name):
            facts.append(resolve_base(adapter, same, bases=bases, need=need))
    components = dict.fromkeys(_base_of(each).prefix for each in facts)
    if len(components) > 1:
        shown = listed(prefix.rstrip("/") for prefix in components)
        raise UsageError(
            f"the adapters are of different components of the base ({shown}): merge one adapter, "
            "and merge the next into the result."
        )
    return facts


def _base_of(facts: BaseFacts) -> BaseModel:
    assert facts.base is not None  # noqa: S101 -- else `resolve_base` raised an error
    return facts.base


def _name(location: Location) -> str:
    """Return the text that names a location for a later `locate`."""
    return str(location.folder) if location.folder else f"{SCHEME}{location.address}"


def _is_dequantized(packed: Unpacked, facts: Sequence[BaseFacts], options: MergeOptions) -> bool:
    """Say whether a merge makes a 16-bit model of the base.

    Raises:
        CheckpointError: the base cannot be dequantized; or is not, and an adapted layer is packed.
    """
    if options.dequantize:
        packed.refuse_defects()
        if packed.weights:
            return True
    matches = [each.match for each in facts if each.match is not None]
    refuse_quantized(packed, [name for each in matches for name in each.tensors.values()])
    return False


def _matched(
    spec: AdapterSpec, location: Location, adapter: Adapter, facts: BaseFacts, options: MergeOptions
) -> MatchedAdapter:
    assert facts.match is not None  # noqa: S101 -- `resolve_base` read the base
    pair = in_effect(adapter, facts, projections=options.projections, variant=options.generator)
    weight = 1.0 if spec.weight is None else spec.weight
    return MatchedAdapter(location, adapter, facts.match, pair, weight)


# --- findings ------------------------------------------------------------------------------------


def _base_findings(
    files: BaseFiles, packed: Unpacked, adapters: Sequence[MatchedAdapter]
) -> Iterator[Finding]:
    label = files.model.location.label
    yield from files.sides.findings(label)
    if files.packed is not None:
        yield dequantized_finding(packed, label)
        changed = (name for matched in adapters for name in matched.match.tensors.values())
        yield from misdescribed(packed, changed)
        return
    elsewhere = quantized_elsewhere(packed.stored)
    if elsewhere is not None:
        yield elsewhere


def _adapter_findings(
    adapters: Sequence[MatchedAdapter], facts: Sequence[BaseFacts], beside: Sequence[AdapterFiles]
) -> Iterator[Finding]:
    for matched, base_facts, files in zip(adapters, facts, beside, strict=True):
        yield from files.findings(matched.label)
        name = "" if matched is adapters[0] else matched.label
        yield from (each.of_adapter(name) for each in matched.adapter.findings)
        # An option can have an effect on another adapter: see `_idle_options`.
        yield from (f for f in base_facts.findings if f.rule is not rules.OPTION_WITHOUT_EFFECT)
        of_pair = (*matched.pair.findings, *other_dims(matched.adapter, base_facts))
        yield from (each.of_adapter(name) for each in of_pair)


def _idle_options(
    files: BaseFiles, adapters: Sequence[MatchedAdapter], options: MergeOptions
) -> Iterator[Finding]:
    """Yield a warning for each option that finds nothing to act on, in the base or an adapter."""
    if options.dequantize and files.packed is None:
        reason = f"{files.model.location.label} has no quantized weights."
        yield rules.OPTION_WITHOUT_EFFECT.at("--dequantize", reason)
    if options.generator is not None and all(each.pair.draw is None for each in adapters):
        yield IDLE_GENERATOR
