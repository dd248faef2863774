"""validate: find every error of an adapter at once, each with its code.

    files ─► config ─► tensors ─► targets ─► values ─► projections ─► base (headers alone)

If an earlier step could not read the input of a step, the step is reported as not checked.
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
    hub_access_of,
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
"""Returns the base facts for an adapter, and the findings for the adapter on the base."""

_REMOTE = Path(os.devnull, "on-the-hub")
"""The folder of an adapter that was not fetched; it cannot exist."""


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
    """Find every error of adapters, without writing a file or guessing a base.

    Args:
        adapters: one or several: folders, files of an adapter (which stand for their folder), or
            repos on the Hub, of which only config and header are read.
        base: the base to compare with, by its headers; None for no base.
        recursive: search the folders for adapters.
        deep: also fetch the weights of repos, and prove fingerprints by drawing A and B.
        select: codes, or beginnings of codes, that count; empty means all.
        ignore: codes, or beginnings of codes, that do not count.
        fail_on: the lowest severity that fails the call.
        revision: the branch, tag or commit of the adapters on the Hub.
        access: how the Hub is reached.

    Raises:
        UsageError: a code is unknown, or an adapter's name is malformed.
        SurroundingsError: the base cannot be read, or a searched folder holds no adapter.

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
    access = hub_access_of(access)
    resolve_base: Resolve | None = None
    if base_options.model is not None:
        from vera_convert.validation.base import resolver  # takes half of the loading time

        resolve_base = resolver(base_options, access)
    checked = [
        named
        if isinstance(named, Checked)
        else _checked(named, base_options, resolve_base, access, deep=deep, revision=revision)
        for named in _named(named_adapters, recursive=recursive)
    ]
    return Validation(tuple(_chosen(one, select, ignore) for one in checked), fail_on)


def _chosen(checked: Checked, select: Sequence[str], ignore: Sequence[str]) -> Checked:
    """Return an adapter with its selected findings; hidden errors are mentioned."""
    kept = selected(checked.findings, select=select, ignore=ignore)
    hidden = {f.code for f in {*checked.findings}.difference(kept) if f.severity is Severity.ERROR}
    note = f"errors that are not selected: {', '.join(sorted(hidden))}."
    not_checked = (*checked.not_checked, note) if hidden else checked.not_checked
    return replace(checked, findings=kept, not_checked=not_checked, has_hidden_errors=bool(hidden))


# --- which adapters ------------------------------------------------------------------------------


def _named(adapters: Sequence[str | Path], *, recursive: bool) -> Iterator[str | Checked]:
    """Yield each adapter once, by its folder or its repo, or why a folder cannot be read."""
    seen: set[str] = set()
    for adapter in adapters:
        text = str(adapter)
        if Path(text).is_dir():
            text = str(Path(text))  # ./a and a/ are a
        elif Path(text).name in (CONFIG_NAME, WEIGHTS_NAME):
            text = str(Path(text).parent)
            if not Path(text).is_dir():  # never a repo on the Hub
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
        raise SurroundingsError(f"no adapter was found in {printable(str(tree))} and its folders.")
    return found


# --- one adapter ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Result:
    """The result for one adapter while it is checked."""

    findings: list[Finding] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    draw: Draw | None = None
    embedded: bool | None = None
    base: str = ""
    read: int | None = None
    failure: VeraConvertError | None = None
    other_method: str | None = None

    def step(self, step: str, find: Callable[[], Iterable[Finding]]) -> None:
        """Add the findings of a step; record a failed step, and continue."""
        try:
            self.findings += find()
        except CheckpointError as error:
            self.findings += error.findings
        except SurroundingsError as error:
            self.failure = self.failure or error
            self.not_checked.append(f"{step}: {error}")


def _checked(
    named: str,
    base_options: BaseOptions,
    resolve_base: Resolve | None,
    access: HubAccess,
    *,
    deep: bool,
    revision: str | None,
) -> Checked:
    """Check one adapter; an unreadable adapter is a result, too."""
    label, remote = printable(named), False
    result = _Result()
    try:
        location = locate(named, kind="adapter", access=access, revision=revision)
        label = location.label
        remote = location.folder is None
        if deep and remote:
            location = fetch_weights(location, access)
        with _examined(location, access, result) as (examined, sources):
            if examined.other_method is not None:
                result.findings, result.other_method = [], examined.other_method.method
            result.findings += examined.findings
            if examined.other_method is None:
                result.embedded = _is_embedded(examined)
                _check(examined, location, base_options, resolve_base, result, deep=deep)
            result.read = _bytes_read(sources) if remote else None
    except CheckpointError as error:
        result.findings += error.findings
    except SurroundingsError as error:
        if isinstance(error.__cause__, PermissionError):
            result.findings.append(FILE_UNREADABLE.at(label, str(error)))
            result.not_checked.append("the contents of unreadable files.")
        else:
            result.failure = error
    return Checked(
        label=label,
        path=None if remote else named,
        findings=tuple(_placed(finding, named) for finding in result.findings),
        draw=result.draw,
        embedded=result.embedded,
        base=result.base,
        not_checked=tuple(result.not_checked),
        bytes_read=result.read,
        failure=result.failure,
        other_method=result.other_method,
    )


def _placed(finding: Finding, named: str) -> Finding:
    """Return a finding with its place and file relative to the adapter's folder."""
    folder = printable(f"{Path(named)}{os.sep}")
    file = finding.file and finding.file.removeprefix(folder)
    return replace(finding, place=finding.place.removeprefix(folder), file=file)


@contextmanager
def _examined(
    location: Location, access: HubAccess, result: _Result
) -> Iterator[tuple[Examined, tuple[ByteSource, ...]]]:
    """Open an adapter in its folder, or on the Hub, where only config and header are read."""
    if location.folder is not None:
        with examined_folder(location.folder) as examined:
            yield examined, ()
        return
    result.findings += names_findings(adapter_files(location, access), place=location.label)
    with (
        open_remote(location, CONFIG_NAME, access) as config,
        open_remote(location, WEIGHTS_NAME, access) as weights,
    ):
        yield examine(_REMOTE, config, weights, values=False), (config, weights)


def _bytes_read(sources: Sequence[ByteSource]) -> int:
    return sum(source.bytes_read for source in sources if isinstance(source, RemoteFile))


def _is_embedded(examined: Examined) -> bool | None:
    """Return whether A and B are stored; None if no name shows this."""
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
    result: _Result,
    *,
    deep: bool,
) -> None:
    """Run every check whose input could be read."""
    config, file, folder = examined.config, examined.file, location.folder
    layers = examined.sorted.layers if examined.sorted is not None else {}
    base_facts = _on_base(examined, base_options, resolve_base, result)
    if folder is not None:
        result.step("the other files", lambda: folder_findings(folder))
    if config is not None:
        result.step("the config", lambda: config_findings(config, examined.unsound))
        if examined.sorted is not None:
            result.findings += undeclared_embeddings(config, examined.sorted.replacements)
        if examined.unsound.isdisjoint(TARGET_FIELDS):
            if examined.adapter is not None and base_facts.base is None:
                result.findings += uneven_findings(config, layers)
            result.step(
                "the targets",
                lambda: target_findings(config, [*layers], alone=base_facts.base is None),
            )
    if folder is None:
        result.not_checked.append("values, and the source of A and B: --deep fetches the weights.")
    elif file is not None and layers:
        found = value_ranges(file)
        is_float16 = base_facts.rounding is Rounding.FP16
        result.findings += value_findings(
            file, config, [*layers.values()], found, on_float16=is_float16
        )
    if config is None or examined.sorted is None:
        return
    if "projection_prng_key" in examined.unsound or "save_projection" in examined.unsound:
        result.not_checked.append("the source of A and B: fix the config first.")
        return
    here = folder is not None
    result.step(
        "A and B",
        lambda: _projection_findings(config, examined, base_facts, result, here=here, deep=deep),
    )


def _on_base(
    examined: Examined, base_options: BaseOptions, resolve_base: Resolve | None, result: _Result
) -> BaseFacts:
    """Return the base facts, and add the findings for an adapter on the base."""
    known = (
        BaseFacts() if base_options.dtype is None else loaded_in(BaseFacts(), base_options.dtype)
    )
    adapter = examined.adapter
    if resolve_base is None:
        result.not_checked.append("the base: give --base MODEL to compare with a base.")
        return known
    if adapter is None:
        result.not_checked.append("the base: fix the errors first.")
        return known

    def find() -> list[Finding]:
        nonlocal known
        known, findings = resolve_base(adapter)
        result.base = known.source
        return findings

    result.step("the base", find)
    return known


def _projection_findings(
    config: VeraConfig,
    examined: Examined,
    base_facts: BaseFacts,
    result: _Result,
    *,
    here: bool,
    deep: bool,
) -> Iterator[Finding]:
    """Compare stored A and B, or a fingerprint, with draws."""
    assert examined.sorted is not None  # noqa: S101 -- the caller checked
    stored, fingerprint = examined.sorted.projections, examined.fingerprint
    if stored is None and not config.save_projection:
        result.draw = fingerprint.draw if fingerprint else None
        yield from stripped_findings(config, fingerprint, base_facts)
        if fingerprint is not None and (deep or fingerprint.is_small):
            from vera_convert.conversion.transforms import prove

            prove(fingerprint, place=WEIGHTS_NAME)
        elif fingerprint is not None:
            result.not_checked.append(
                "the hashes of the fingerprint: --deep draws A and B to prove the hashes."
            )
    elif stored is not None and here and _are_unfit(stored, config):
        result.not_checked.append("the source of A and B: fix their errors first.")
    elif stored is not None and here:
        pair = recognized(config, stored)
        result.draw = pair.draw
        # Without a lambda under its proper name, the layers' outputs are unknown.
        tallest = examined.sorted.longest_b or stored.B.shape[0]
        yield from stored_findings(config, pair, base_facts, tallest=tallest)


def _are_unfit(stored: StoredProjections, config: VeraConfig) -> bool:
    """Return whether shape, dtype or size of A and B rule out a comparison with draws."""
    pair = (stored.A, stored.B)
    return (
        any(len(tensor.shape) != 2 or 0 in tensor.shape for tensor in pair)
        or any(tensor.dtype not in FLOATS for tensor in pair)
        or (stored.A.shape[0], stored.B.shape[1]) != (config.r, config.r)
        or stored.A.nbytes + stored.B.nbytes > MAX_PROJECTION_BYTES
        or stored.A.shape[1] > MAX_WIDTH
    )
