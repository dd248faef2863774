"""validate: find every error of adapters at once, each with its code."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from vera_convert.adapter.folder import adapters_below
from vera_convert.arguments import one_of, optional, places, require_flags, text, texts
from vera_convert.base.facts import BaseOptions, base_options_of
from vera_convert.errors import SurroundingsError, UsageError, VeraConvertError
from vera_convert.files.file_names import CONFIG_NAME, WEIGHTS_NAME
from vera_convert.hub.lookup import HubAccess, hub_access_of
from vera_convert.rules import Severity
from vera_convert.text import printable
from vera_convert.validation.checks import CheckOptions, check_adapter
from vera_convert.validation.result import Checked, Validation
from vera_convert.validation.selection import check_codes, selected


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
        adapters: one or several: folders, files of an adapter (for the folder), or repos on the
            Hub, of which only config and header are read.
        base: the base to compare with, by its headers; None for no base.
        recursive: search the folders for adapters.
        deep: also fetch the weights of repos, and prove fingerprints by drawing A and B.
        select: codes, or beginnings of codes, that count; empty means all.
        ignore: codes, or beginnings of codes, to leave out.
        fail_on: the lowest severity that fails the call.
        revision: the branch, tag or commit of the adapters on the Hub.
        access: how the Hub is reached.

    Raises:
        UsageError: a code is unknown, or an adapter's name is malformed.
        SurroundingsError: reading the base fails, or a searched folder holds no adapter.

    Example:
        >>> found = validate("adapter", base="base")
        >>> found.passed, [finding.code for finding in found.findings]
        (True, ['V122'])
    """
    named_adapters = places("adapters", adapters)
    if isinstance(select, str) or isinstance(ignore, str):
        raise UsageError('select and ignore are lists of codes: give ["V4"] for "V4".')
    select, ignore = texts("select", select), texts("ignore", ignore)
    fail_on = one_of("fail_on", Severity, fail_on)
    require_flags(recursive=recursive, deep=deep)
    check_codes((*select, *ignore))
    base_options, revision = base_options_of(base), optional(text, "revision", revision)
    access = hub_access_of(access)
    check_on_base = None
    if base_options.model is not None:
        from vera_convert.validation.base import resolver  # takes half of the loading time

        check_on_base = resolver(base_options, access)
    options = CheckOptions(base_options, check_on_base, access, deep, revision)
    checked = (
        named if isinstance(named, Checked) else check_adapter(named, options)
        for named in _named(named_adapters, recursive=recursive)
    )
    return Validation(tuple(_selected(each, select, ignore) for each in checked), fail_on)


def _selected(checked: Checked, select: Sequence[str], ignore: Sequence[str]) -> Checked:
    """Return an adapter with the selected findings; hidden errors are mentioned."""
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
        place = str(adapter)
        if os.path.isdir(place):  # noqa: PTH112 -- Path's own can raise
            place = str(Path(place))  # ./a and a/ are a
        elif Path(place).name in (CONFIG_NAME, WEIGHTS_NAME):
            place = str(Path(place).parent)
            if not os.path.isdir(place):  # noqa: PTH112 -- never a repo on the Hub
                absent = SurroundingsError(f"there is no folder {printable(place)}.")
                yield Checked(printable(place), place, failure=absent)
                continue
        unreadable: dict[str, VeraConvertError] = {}
        below = _below(Path(place), unreadable) if recursive else [place]
        for name in below:
            if name not in seen:
                seen.add(name)
                yield name
        for name, error in unreadable.items():
            path = str(Path(place, name))
            yield Checked(printable(path), path, failure=error)


def _below(tree: Path, unreadable: dict[str, VeraConvertError]) -> list[str]:
    if not os.path.isdir(tree):  # noqa: PTH112 -- Path's own can raise
        raise SurroundingsError(
            f"there is no folder {printable(str(tree))}; --recursive searches folders only."
        )
    found = [str(tree / name) for name in adapters_below(tree, unreadable=unreadable)]
    if not found and not unreadable:
        raise SurroundingsError(f"no adapter was found in {printable(str(tree))} and its folders.")
    return found
