"""validate: every way in which adapters are wrong, each finding with its code, at once.

    files ─► config ─► tensors ─► targets ─► values ─► projections ─► base (headers alone)

What a step needs and the steps before could not read is told as not checked, and not guessed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.config import CONFIG_NAME, VeraConfig
from vera_convert.adapter.folder import adapters_below
from vera_convert.adapter.names import A_NAME
from vera_convert.adapter.opening import Examined, examine, examined_folder
from vera_convert.adapter.tensors import (
    MAX_PROJECTION_BYTES,
    MAX_WIDTH,
    WEIGHTS_NAME,
    StoredProjections,
)
from vera_convert.arguments import (
    instance,
    one_of,
    optional,
    places,
    require_flags,
    text,
    texts,
)
from vera_convert.base.facts import BaseFacts, BaseOptions, base_options_of, loaded_in
from vera_convert.conversion.proof import recognized
from vera_convert.draws.generator import Draw, Rounding
from vera_convert.dtypes import FLOATS
from vera_convert.errors import CheckpointError, SurroundingsError, UsageError, VeraConvertError
from vera_convert.files.reading import ByteSource
from vera_convert.files.value_range import value_ranges
from vera_convert.hub.lookup import (
    HubAccess,
    Location,
    adapter_files,
    fetch_weights,
    locate,
    open_remote,
)
from vera_convert.hub.range_file import RemoteFile
from vera_convert.rules import FILE_UNREADABLE, Finding, Severity
from vera_convert.text import printable
from vera_convert.validation.config import config_findings, undeclared_embeddings
from vera_convert.validation.files import folder_findings, names_findings
from vera_convert.validation.projections import stored_findings, stripped_findings
from vera_convert.validation.selection import check_codes, selected
from vera_convert.validation.targets import TARGET_FIELDS, target_findings, uneven_findings
from vera_convert.validation.validation import Checked, Validation
from vera_convert.validation.values import value_findings

Resolve = Callable[[Adapter], tuple[BaseFacts, list[Finding]]]
"""Says what is known of the base of an adapter, and what is wrong with the adapter on it."""

_REMOTE = Path(os.devnull, "on-the-hub")
"""The folder of an adapter that was not fetched; nothing can lie there."""


def validate(
    adapters: Sequence[str | Path] | str | Path,
    *,
    base: BaseOptions | str | Path | None = None,
    recursive: bool = False,
    deep: bool = False,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    fail_on: Severity | str = Severity.ERROR,
    revision: str | None = None,
    access: HubAccess | None = None,
) -> Validation:
    """Find everything that is wrong with adapters; nothing is written and no base is guessed.

    Args:
        adapters: one or several: folders, files of an adapter (which stand for their folder), or
            repos on the Hub, of which only config and header are read.
        base: the model to hold them against, by its headers; None holds them against none.
        recursive: search the folders for adapters.
        deep: fetch the weights of repos too, and draw what a fingerprint promises.
        select: the only codes that count, or beginnings of codes; none means all.
        ignore: codes that do not count.
        fail_on: from which severity on the call fails.
        revision: the adapters', on the Hub.
        access: how the Hub is reached.

    Raises:
        UsageError: an unknown code, or a name that can be no adapter's.
        SurroundingsError: the base cannot be had, or there is no adapter in a searched folder.

    Example:
        >>> found = validate("adapter", base="base")
        >>> found.passed, [finding.code for finding in found.findings]
        (True, ['V122'])
    """
    named_adapters = places("adapters", adapters)
    if isinstance(select, str) or isinstance(ignore, str):
        raise UsageError("select and ignore are lists of codes, not texts.")
    select, ignore = texts("select", select), texts("ignore", ignore)
    fail_on = one_of("fail_on", Severity, fail_on)
    require_flags(recursive=recursive, deep=deep)
    check_codes((*select, *ignore))
    base_options, revision = base_options_of(base), optional(text, "revision", revision)
    access = optional(instance, "access", HubAccess, access) or HubAccess()
    resolve_base: Resolve | None = None
    if base_options.model is not None:
        from vera_convert.validation.base import resolver  # takes as long to load as all the rest

        resolve_base = resolver(base_options, access)
    checked = [
        named
        if isinstance(named, Checked)
        else _checked(named, base_options, resolve_base, access, deep=deep, revision=revision)
        for named in _named(named_adapters, recursive=recursive)
    ]
    return Validation(tuple(_chosen(one, select, ignore) for one in checked), fail_on)


def _chosen(checked: Checked, select: Sequence[str], ignore: Sequence[str]) -> Checked:
    """Return an adapter with the findings that count; that others are errors is told."""
    kept = selected(checked.findings, select=select, ignore=ignore)
    hidden = {f.code for f in {*checked.findings}.difference(kept) if f.severity is Severity.ERROR}
    said = f"errors that are not selected: {', '.join(sorted(hidden))}."
    not_checked = (*checked.not_checked, said) if hidden else checked.not_checked
    return replace(checked, findings=kept, not_checked=not_checked, has_hidden_errors=bool(hidden))


# --- which adapters ------------------------------------------------------------------------------


def _named(adapters: Sequence[str | Path], *, recursive: bool) -> Iterator[str | Checked]:
    """Yield each adapter once, by its folder or its name on the Hub; or why it cannot be read."""
    seen: set[str] = set()
    for adapter in adapters:
        text = str(adapter)
        if Path(text).is_dir():
            text = str(Path(text))  # ./a and a/ are a
        elif Path(text).name in (CONFIG_NAME, WEIGHTS_NAME):
            text = str(Path(text).parent)
            if not Path(text).is_dir():  # nor is it asked for on the Hub
                absent = SurroundingsError(f"there is no folder {printable(text)}.")
                yield Checked(printable(text), text, failure=absent)
                continue
        unreadable: dict[str, VeraConvertError] = {}
        below = _below(Path(text), unreadable) if recursive else [text]
        for name in below:
            if name not in seen:
                seen.add(name)
                yield name
        for name, error in unreadable.items():
            path = str(Path(text, name))
            yield Checked(printable(path), path, failure=error)


def _below(tree: Path, unreadable: dict[str, VeraConvertError]) -> list[str]:
    if not tree.is_dir():
        raise SurroundingsError(
            f"there is no folder {printable(str(tree))}; --recursive searches folders only."
        )
    found = [str(tree / name) for name in adapters_below(tree, unreadable=unreadable)]
    if not found and not unreadable:
        raise SurroundingsError(f"no adapter lies below {printable(str(tree))}.")
    return found


# --- one adapter ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Told:
    """What is to be told of one adapter, as it is found."""

    findings: list[Finding] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    draw: Draw | None = None
    embedded: bool | None = None
    base: str = ""
    read: int | None = None
    failure: VeraConvertError | None = None
    other_method: str | None = None

    def step(self, what: str, find: Callable[[], Iterable[Finding]]) -> None:
        """Add what a step finds; that it could not be taken is told, and stops no other."""
        try:
            self.findings += find()
        except CheckpointError as error:
            self.findings += error.findings
        except SurroundingsError as error:
            self.failure = self.failure or error
            self.not_checked.append(f"{what}: {error}")


def _checked(
    named: str,
    base_options: BaseOptions,
    resolve_base: Resolve | None,
    access: HubAccess,
    *,
    deep: bool,
    revision: str | None,
) -> Checked:
    """Check one adapter; that it cannot be had is a result as well."""
    label, remote = printable(named), False
    told = _Told()
    try:
        location = locate(named, kind="adapter", access=access, revision=revision)
        label = location.label
        remote = location.folder is None
        if deep and remote:
            location = fetch_weights(location, access)
        with _examined(location, access, told) as (examined, sources):
            if examined.other_method is not None:
                told.findings, told.other_method = [], examined.other_method.method
            told.findings += examined.findings
            if examined.other_method is None:
                told.embedded = _is_embedded(examined)
                _check(examined, location, base_options, resolve_base, told, deep=deep)
            told.read = _bytes_read(sources) if remote else None
    except CheckpointError as error:
        told.findings += error.findings
    except SurroundingsError as error:
        if isinstance(error.__cause__, PermissionError):
            told.findings.append(FILE_UNREADABLE.at(label, str(error)))
            told.not_checked.append("whatever stands in what cannot be read.")
        else:
            told.failure = error
    return Checked(
        label=label,
        path=None if remote else named,
        findings=tuple(_placed(finding, named) for finding in told.findings),
        draw=told.draw,
        embedded=told.embedded,
        base=told.base,
        not_checked=tuple(told.not_checked),
        bytes_read=told.read,
        failure=told.failure,
        other_method=told.other_method,
    )


def _placed(finding: Finding, named: str) -> Finding:
    """Return a finding with its place and file relative to the adapter's folder."""
    folder = printable(f"{Path(named)}{os.sep}")
    file = finding.file and finding.file.removeprefix(folder)
    return replace(finding, place=finding.place.removeprefix(folder), file=file)


@contextmanager
def _examined(
    location: Location, access: HubAccess, told: _Told
) -> Iterator[tuple[Examined, tuple[ByteSource, ...]]]:
    """Open an adapter in its folder; or on the Hub, where its config and header alone are read."""
    if location.folder is not None:
        with examined_folder(location.folder) as examined:
            yield examined, ()
        return
    told.findings += names_findings(adapter_files(location, access), place=location.label)
    with (
        open_remote(location, CONFIG_NAME, access) as config,
        open_remote(location, WEIGHTS_NAME, access) as weights,
    ):
        yield examine(_REMOTE, config, weights, values=False), (config, weights)


def _bytes_read(sources: Sequence[ByteSource]) -> int:
    return sum(source.bytes_read for source in sources if isinstance(source, RemoteFile))


def _is_embedded(examined: Examined) -> bool | None:
    """Say whether A and B are stored; None where no name tells."""
    names = examined.file.header.tensors if examined.file is not None else ()
    if A_NAME in names:
        return True
    misnamed = any(".vera_A" in f".{name}" for name in names)
    return None if misnamed or not any(".vera_lambda_" in name for name in names) else False


def _check(
    examined: Examined,
    location: Location,
    base_options: BaseOptions,
    resolve_base: Resolve | None,
    told: _Told,
    *,
    deep: bool,
) -> None:
    """Run every check for which enough could be read."""
    config, file, folder = examined.config, examined.file, location.folder
    layers = examined.sorted.layers if examined.sorted is not None else {}
    base_facts = _on_base(examined, base_options, resolve_base, told)
    if folder is not None:
        told.step("the files beside the weights", lambda: folder_findings(folder))
    if config is not None:
        told.step("the config", lambda: config_findings(config, examined.unsound))
        if examined.sorted is not None:
            told.findings += undeclared_embeddings(config, examined.sorted.replacements)
        if examined.unsound.isdisjoint(TARGET_FIELDS):
            if examined.adapter is not None and base_facts.base is None:
                told.findings += uneven_findings(config, layers)
            told.step(
                "the targets",
                lambda: target_findings(config, [*layers], alone=base_facts.base is None),
            )
    if folder is None:
        told.not_checked.append("values, and whether A and B are a draw: --deep fetches them.")
    elif file is not None and layers:
        found = value_ranges(file)
        is_float16 = base_facts.rounding is Rounding.FP16
        told.findings += value_findings(
            file, config, [*layers.values()], found, on_float16=is_float16
        )
    if config is None or examined.sorted is None:
        return
    if "projection_prng_key" in examined.unsound or "save_projection" in examined.unsound:
        told.not_checked.append("whether A and B are a draw: mend the config first.")
        return
    here = folder is not None
    told.step(
        "A and B",
        lambda: _projection_findings(config, examined, base_facts, told, here=here, deep=deep),
    )


def _on_base(
    examined: Examined, base_options: BaseOptions, resolve_base: Resolve | None, told: _Told
) -> BaseFacts:
    """Return what is known of the base, and tell what is wrong with an adapter on it."""
    known = (
        BaseFacts() if base_options.dtype is None else loaded_in(BaseFacts(), base_options.dtype)
    )
    adapter = examined.adapter
    if resolve_base is None:
        told.not_checked.append("whether it fits a base: --base MODEL tells.")
        return known
    if adapter is None:
        told.not_checked.append("the base: mend the errors first.")
        return known

    def find() -> list[Finding]:
        nonlocal known
        known, findings = resolve_base(adapter)
        told.base = known.source
        return findings

    told.step("the base", find)
    return known


def _projection_findings(
    config: VeraConfig,
    examined: Examined,
    base_facts: BaseFacts,
    told: _Told,
    *,
    here: bool,
    deep: bool,
) -> Iterator[Finding]:
    """Hold A and B against draws: stored ones, if their values may be read, or what was dropped."""
    assert examined.sorted is not None  # noqa: S101 -- the caller looked
    stored, fingerprint = examined.sorted.projections, examined.fingerprint
    if stored is None and not config.save_projection:
        told.draw = fingerprint.draw if fingerprint else None
        yield from stripped_findings(config, fingerprint, base_facts)
        if fingerprint is not None and (deep or fingerprint.is_small):
            from vera_convert.conversion.transforms import prove

            prove(fingerprint, place=WEIGHTS_NAME)
        elif fingerprint is not None:
            told.not_checked.append("that what is drawn has the recorded hashes: --deep draws it.")
    elif stored is not None and here and _are_unfit(stored, config):
        told.not_checked.append("whether A and B are a draw: mend their errors first.")
    elif stored is not None and here:
        pair = recognized(config, stored)
        told.draw = pair.draw
        # Without a lambda under its proper name, nothing is known of the layers' heights.
        tallest = examined.sorted.longest_b or stored.B.shape[0]
        yield from stored_findings(config, pair, base_facts, tallest=tallest)


def _are_unfit(stored: StoredProjections, config: VeraConfig) -> bool:
    """Say whether A and B cannot be compared with a draw: the wrong shape, type or size."""
    pair = (stored.A, stored.B)
    return (
        any(len(tensor.shape) != 2 or 0 in tensor.shape for tensor in pair)
        or any(tensor.dtype not in FLOATS for tensor in pair)
        or (stored.A.shape[0], stored.B.shape[1]) != (config.r, config.r)
        or stored.A.nbytes + stored.B.nbytes > MAX_PROJECTION_BYTES
        or stored.A.shape[1] > MAX_WIDTH
    )
