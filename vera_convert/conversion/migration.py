"""migrate: bring an adapter, or a tree of adapters, to the current form and the wanted mode."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path, PurePosixPath

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter, StoredProjections
from vera_convert.adapter.config import OtherMethodError
from vera_convert.adapter.folder import (
    adapters_below,
    is_vera,
    side_files,
    write_adapter,
    written_files,
)
from vera_convert.adapter.opening import Repair, open_adapter
from vera_convert.adapter.repairs import repaired
from vera_convert.adapter.values import refuse_values
from vera_convert.arguments import NEWEST_PEFT, one_of, optional, path, require_flags
from vera_convert.arguments import peft_version as version_of
from vera_convert.base.bases import Bases
from vera_convert.base.facts import BaseFacts, BaseOptions, base_options_of
from vera_convert.base.resolve import Need, resolve_base
from vera_convert.conversion.projections import ProjectionSource, with_projections
from vera_convert.conversion.proof import other_dims
from vera_convert.conversion.strip_embed import need_to_embed
from vera_convert.conversion.transforms import (
    NewAdapter,
    already_stripped,
    as_it_is,
    embedded,
    stripped,
)
from vera_convert.conversion.work import Conversion, content_of, opened, publish, reported
from vera_convert.errors import SurroundingsError, VeraConvertError
from vera_convert.files.tensorfile import from_array
from vera_convert.files.walk import files_and_links
from vera_convert.hub.lookup import HubAccess, hub_access_of
from vera_convert.publish.publishing import Output, files_but
from vera_convert.rules import Finding
from vera_convert.text import listed, printable, short_repr


class Mode(StrEnum):
    """The form of A and B after a migration: stored, dropped, or unchanged."""

    EMBEDDED = "embedded"
    STRIPPED = "stripped"
    ASIS = "asis"


def migrate(
    adapter: str | Path,
    out: str | Path,
    *,
    to: Mode | str,
    base: BaseOptions | str | Path | None = None,
    projections: ProjectionSource | str = ProjectionSource.AUTO,
    accept_change: bool = False,
    peft_version: tuple[int, ...] | str | None = None,
    force: bool = False,
    revision: str | None = None,
    access: HubAccess | None = None,
) -> Conversion:
    """Write an adapter in the current form, with A and B stored, dropped or unchanged.

    Known old and damaged forms are repaired if nothing is lost, and every change is named. A second
    migration changes nothing more.

    Args:
        adapter: a folder or a repo on the Hub.
        out: the folder to write.
        to: the mode.
        base: the base.
        projections: the source of A and B: ``auto``, ``file`` or ``key``.
        accept_change: as for `strip`.
        peft_version: the oldest PEFT that must read the result, such as ``"0.13"``.
        force: replace an adapter that lies at `out`.
        revision: the adapter's revision on the Hub.
        access: how the Hub is reached.

    Raises:
        CheckpointError: the migration would lose something.
        UsageError: dims or dtype are not known; `out` exists, or overlaps the adapter.
        SurroundingsError: a file, a repo or the disk fails.

    Example:
        >>> migrate("adapter", "migrated", to="asis").changes
        ()
    """
    access = hub_access_of(access)
    plan = _Plan.checked(
        to, base, Bases(access), projections, accept_change=accept_change, peft_version=peft_version
    )
    output = Output(path("out", out), is_vera, force)
    with opened(adapter, output, revision=revision, access=access, repair=plan.repair) as work:
        converted, base_facts = _migrated(work.adapter, plan)
        named = {work.adapter.config.base_model_name_or_path}
        findings = (*converted.findings, *plan.idle_places(named))
        return publish(work, replace(converted, findings=findings), base_facts)


@dataclass(frozen=True, slots=True)
class TreeMigration:
    """The report of the migration of a tree.

    Attributes:
        out: the folder with the migrated adapters; not written if every adapter failed.
        done: the conversions, by path relative to the tree.
        failed: the errors of the adapters that could not be migrated, by path.
        outside: files and links that lie outside all adapters and are not copied.
        passed_over: the method of each adapter of another method than VeRA, by path.
        findings: warnings about the options.
    """

    out: Path
    done: dict[str, Conversion]
    failed: dict[str, VeraConvertError]
    outside: tuple[str, ...] = ()
    passed_over: dict[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    __repr__ = short_repr


def migrate_tree(
    tree: str | Path,
    out: str | Path,
    *,
    to: Mode | str,
    base: BaseOptions | str | Path | None = None,
    projections: ProjectionSource | str = ProjectionSource.AUTO,
    accept_change: bool = False,
    peft_version: tuple[int, ...] | str | None = None,
    force: bool = False,
    access: HubAccess | None = None,
) -> TreeMigration:
    """Migrate every adapter below a folder into the same place below `out`.

    The other adapters are migrated even if one fails. An adapter of another method is passed over.
    Only the files of adapters are copied, and links to folders stay unfollowed. `out` appears in
    one rename.

    Args:
        tree: the folder, on this machine.
        out: the folder to write.
        to: the form of every adapter in `out`.
        base: the options of the bases; `BaseOptions.places` names a base for each name in configs.
        projections: the source of A and B: ``auto``, ``file`` or ``key``.
        accept_change: strip even if PEFT would regenerate different matrices.
        peft_version: write configs that this version of PEFT can read.
        force: replace an `out` that an earlier call wrote.
        access: how the Hub is reached.

    Raises:
        UsageError: `out` exists, or overlaps the tree.
        SurroundingsError: no adapter is there, the disk fails, or an input changed meanwhile.

    Example:
        >>> result = migrate_tree("tree", "out", to="embedded")
        >>> list(result.done), list(result.failed)
        (['one'], [])
    """
    tree, out = path("tree", tree), path("out", out)
    output = Output(out, is_tree, force)
    bases = Bases(hub_access_of(access), of_tree=True)
    plan = _Plan.checked(
        to, base, bases, projections, accept_change=accept_change, peft_version=peft_version
    )
    if not os.path.isdir(tree):  # noqa: PTH112 -- Path's own can raise
        raise SurroundingsError(f"there is no folder {printable(str(tree))}.")
    inputs = [tree]
    if plan.base.model is not None:  # a wrong base is reported once, and not for each adapter
        location = bases.located(plan.base.model, plan.base.revision)
        inputs += [location.folder] if location.folder else []
    unreadable: dict[str, VeraConvertError] = {}
    names = tuple(adapters_below(tree, unreadable=unreadable))
    result = TreeMigration(out, {}, unreadable, tuple(_outside_adapters(tree, names)))
    output = replace(
        output, inputs=inputs, strangers=lambda old: files_but(old, _written(tree, names))
    )
    with output.staged(is_wanted=lambda: bool(result.done)) as staging:
        named = {_migrate_below(tree, staging, name, plan, result) for name in names}
        if not result.done and not result.failed:
            raise SurroundingsError(_nothing_below(tree, result))
    # The config of a failed adapter may be the one with the name.
    return result if result.failed else replace(result, findings=tuple(plan.idle_places(named)))


def _nothing_below(tree: Path, result: TreeMigration) -> str:
    """Say that a tree has no VeRA adapter, and name the methods of the other adapters."""
    others = sorted({*result.passed_over.values()})
    if not others:
        return f"no adapter lies below {printable(str(tree))}."
    number = len(result.passed_over)
    said = "the one adapter there is" if number == 1 else f"the {number:,} adapters there are"
    return f"no VeRA adapter lies below {printable(str(tree))}: {said} {listed(others)}."


@dataclass(frozen=True, slots=True)
class _Plan:
    """The checked options of a migration, the same for every adapter."""

    to: Mode
    base: BaseOptions
    bases: Bases
    projections: ProjectionSource
    accept_change: bool
    peft_version: tuple[int, ...] | None

    @property
    def repair(self) -> Repair:
        """The repair of each adapter as it is read."""
        return partial(repaired, peft_version=self.peft_version)

    def idle_places(self, named: Collection[str | None]) -> Iterator[Finding]:
        """Yield a warning for each --base-for whose name no migrated config has for its base."""
        for name, model in self.base.places:
            if name not in named:
                reason = f"no migrated adapter's config calls the base {printable(name)}."
                place = printable(f"--base-for {name}={model}")
                yield rules.OPTION_WITHOUT_EFFECT.at(place, reason)

    @classmethod
    def checked(
        cls,
        to: object,
        base: BaseOptions | str | Path | None,
        bases: Bases,
        projections: object,
        *,
        accept_change: bool,
        peft_version: object,
    ) -> _Plan:
        """Check the options of a caller, which are of any class."""
        require_flags(accept_change=accept_change)
        return cls(
            one_of("to", Mode, to),
            base_options_of(base),
            bases,
            one_of("projections", ProjectionSource, projections),
            accept_change,
            optional(version_of, "peft_version", peft_version),
        )


def _migrate_below(
    tree: Path, staging: Path, name: str, plan: _Plan, result: TreeMigration
) -> str | None:
    """Migrate the adapter called `name` below `tree` to the same place below `staging`.

    Returns:
        The name that the config has for the base; None also for an adapter that is not migrated.
    """
    writing = False
    try:
        with open_adapter(tree / name, repair=plan.repair) as adapter:
            refuse_values(adapter)
            converted, base_facts = _migrated(adapter, plan)
            content = content_of(converted)
            side_files(tree / name)  # an unreadable file is found before anything is written
            writing = True
            (staging / name).mkdir(parents=True, exist_ok=True)
            sides = write_adapter(content, staging / name)
            label, out = printable(name), result.out / name
            result.done[name] = reported(converted, base_facts, sides, label=label, out=out)
            return adapter.config.base_model_name_or_path
    except OtherMethodError as error:
        result.passed_over[name] = error.method
    except VeraConvertError as error:
        if writing:  # a half-written adapter must not be published
            raise
        result.failed[name] = error
    return None


def is_tree(folder: Path) -> bool:
    """Say whether a folder holds VeRA adapters and no others, as `migrate_tree` writes them."""
    names = tuple(adapters_below(folder))
    return bool(names) and all(is_vera(folder / name) for name in names)


def _written(tree: Path, names: Sequence[str]) -> set[str]:
    """Return the files that a migration of all adapters of a tree writes."""
    found: set[str] = set()
    for name in names:
        with suppress(SurroundingsError):
            prefix = "" if name == "." else f"{name}/"
            found |= {prefix + file for file in written_files(tree / name)}
    return found


def _outside_adapters(tree: Path, names: Sequence[str]) -> Iterator[str]:
    """Yield the files and links below a folder that lie in none of its adapters, in order."""
    for file in files_and_links(tree, failed={}):
        if not any(name == "." or PurePosixPath(file).is_relative_to(name) for name in names):
            yield file


def _migrated(adapter: Adapter, plan: _Plan) -> tuple[NewAdapter, BaseFacts]:
    """Bring a repaired adapter to the wanted mode, and name every change."""
    base_facts = resolve_base(adapter, plan.base, bases=plan.bases, need=_need(adapter, plan))
    adapter, cut = _cut(adapter, base_facts)
    if plan.to is Mode.ASIS:
        converted = _as_it_is(adapter, base_facts, plan.projections)
    elif plan.to is Mode.EMBEDDED:
        converted = embedded(adapter, base_facts, projections=plan.projections)
    else:
        converted = stripped(
            adapter, base_facts, projections=plan.projections, accept_change=plan.accept_change
        )
    changes = (*adapter.changes, *cut, *converted.changes)
    findings = (*converted.findings, *_newer_peft(plan.peft_version))
    return replace(converted, changes=changes, findings=findings), base_facts


def _newer_peft(version: tuple[int, ...] | None) -> Iterator[Finding]:
    """Warn of a PEFT that is newer than the newest known PEFT."""
    if version is not None and version[:2] > NEWEST_PEFT:
        newest, given = (".".join(map(str, each)) for each in (NEWEST_PEFT, version))
        reason = f"{given} is newer than {newest}, the newest PEFT known here."
        yield rules.OPTION_WITHOUT_EFFECT.at("--peft-version", reason)


def _as_it_is(adapter: Adapter, base_facts: BaseFacts, projections: ProjectionSource) -> NewAdapter:
    """Keep A and B, unless they are damaged or contradict the config."""
    if adapter.projections is None:
        converted = already_stripped(adapter)
    else:
        is_auto = projections is ProjectionSource.AUTO
        kept = projections if is_auto else ProjectionSource.FILE
        embedded(adapter, base_facts, projections=kept)  # refuses a contradiction or damage
        converted = as_it_is(adapter)
    findings = (*adapter.findings, *base_facts.findings, *other_dims(adapter, base_facts))
    return replace(converted, findings=findings)


def _need(adapter: Adapter, plan: _Plan) -> Need:
    """Say how much a migration needs the base, whose dims can require a smaller A and B."""
    if plan.to is Mode.ASIS:
        return Need.NONE
    need = need_to_embed(adapter, plan.base, plan.projections)
    if adapter.projections is None:
        return need if plan.to is Mode.EMBEDDED else Need.NONE
    return Need.VITAL if need is Need.VITAL else Need.HELPFUL


def _cut(adapter: Adapter, base_facts: BaseFacts) -> tuple[Adapter, tuple[str, ...]]:
    """Cut A and B to the dims of the base.

    A and B are larger if the adapter shared a model with a wider adapter, and PEFT 0.21 refuses
    larger matrices. A layer uses the leading slices alone, so the cut loses nothing.
    """
    stored = adapter.projections
    width, height = base_facts.in_features, base_facts.out_features
    if stored is None or width is None or height is None:
        return adapter, ()
    if width > stored.in_features or height > stored.out_features:
        return adapter, ()
    if base_facts.fits(stored.in_features, stored.out_features):
        return adapter, ()
    pair = StoredProjections(
        from_array(stored.A.name, stored.A.array()[:, :width], stored.A.dtype),
        from_array(stored.B.name, stored.B.array()[:height], stored.B.dtype),
    )
    change = (
        f"cut A from {list(stored.A.shape)} to {list(pair.A.shape)} "
        f"and B from {list(stored.B.shape)} to {list(pair.B.shape)}"
    )
    return with_projections(adapter, pair), (change,)
