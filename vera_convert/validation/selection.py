"""Select findings by code, on the command line or in ``pyproject.toml``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vera_convert.errors import UsageError
from vera_convert.files.reading import unreadable
from vera_convert.rules import CATALOG, Finding, Severity
from vera_convert.text import printable

FILE_NAME = "pyproject.toml"
_TABLE = ("tool", "vera-convert", "validate")
_LARGEST = 1_000_000
_MOST_DOTS = 32
_NO_KEYS = re.compile(
    r"""\"{3}(?:[^\\"]|\\.?|"(?!""))*+(?:\"{3}|\Z)|'{3}(?:[^']|'(?!''))*+(?:'{3}|\Z)"""
    r"""|"(?:[^"\\\n]|\\.?)*+"?|'[^'\n]*+'?|\#[^\n]*+""",
    re.DOTALL,
)
"""Texts and comments. A text without an end reaches to the end, so each letter is read once."""
_DEEP_KEY = re.compile(rf"(?:\.[\w-]*+){{{_MOST_DOTS + 1}}}", re.ASCII)
"""A key such as ``a.b.c`` with too many dots; tomllib's memory grows with their square."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of ``[tool.vera-convert.validate]``.

    Attributes:
        select: codes, or beginnings of codes, to show; empty means all.
        ignore: codes, or beginnings of codes, to hide.
        fail_on: the lowest failing severity; None for the default.
    """

    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    fail_on: Severity | None = None


def read_settings(start: Path) -> Settings:
    """Read the settings from the nearest ``pyproject.toml`` with settings, at or above `start`.

    Raises:
        UsageError: the table has unknown keys, values or codes.
        SurroundingsError: a file cannot be read.
    """
    start = start.absolute()
    for folder in (start, *start.parents):
        table = _table_of(folder / FILE_NAME)
        if table is not None:
            return _settings(table, printable(str(folder / FILE_NAME)))
    return Settings()


def _table_of(path: Path) -> dict[str, Any] | None:
    """Return the settings table of a project's file; None without the file or the table."""
    if not path.is_file():
        return None
    import tomllib  # folders of adapters rarely have such a file

    place = printable(str(path))
    try:
        if path.stat().st_size > _LARGEST:
            raise UsageError(f"{place} has more than {_LARGEST:,} bytes.")
        text = path.read_text(encoding="utf-8")
        if _DEEP_KEY.search(re.sub(r"[ \t]+", "", _NO_KEYS.sub("x", text))):
            raise UsageError(f"{place} has a key with more than {_MOST_DOTS} dots.")
        found: Any = tomllib.loads(text)
    except OSError as error:
        raise unreadable(place, error) from error
    except (ValueError, RecursionError) as error:  # also for an integer of 4,301 digits
        raise UsageError(f"{place} is not TOML: {printable(str(error))}.") from error
    for name in _TABLE:
        found = found.get(name) if isinstance(found, dict) else None
    if found is None:
        return None
    if not isinstance(found, dict):
        raise UsageError(f"{place}: {'.'.join(_TABLE)} is not a table.")
    return found


def _settings(table: dict[str, Any], place: str) -> Settings:
    unknown = sorted(table.keys() - {"select", "ignore", "fail-on"})
    if unknown:
        names = ", ".join(map(printable, unknown))
        raise UsageError(f"{place}: unknown keys {names}; known are select, ignore and fail-on.")
    lists = {name: table.get(name, []) for name in ("select", "ignore")}
    for name, value in lists.items():
        if not isinstance(value, list) or not all(isinstance(code, str) for code in value):
            raise UsageError(f"{place}: {name} must be a list of codes.")
        check_codes(value, place=place)
    fail_on = table.get("fail-on")
    if fail_on not in (None, "error", "warning"):
        raise UsageError(f"{place}: fail-on must be error or warning.")
    severity = None if fail_on is None else Severity(fail_on)
    return Settings(tuple(lists["select"]), tuple(lists["ignore"]), severity)


def check_codes(codes: Iterable[str], *, place: str = "") -> None:
    """Raise `UsageError` unless each text is a code or the beginning of a code."""
    before = f"{place}: " if place else ""
    for code in codes:
        if not code or not any(known.startswith(code) for known in CATALOG):
            from difflib import get_close_matches

            near = get_close_matches(code, CATALOG, 1) if len(code) > 3 else []
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UsageError(
                f'{before}"{printable(code)}" is not a code. --rules lists the codes; V2 means all '
                f"codes that begin with V2.{hint}"
            )


def selected(
    findings: Iterable[Finding], *, select: Sequence[str], ignore: Sequence[str]
) -> tuple[Finding, ...]:
    """Return the selected findings, by code and then in the order of the checks."""
    chosen = (
        finding
        for finding in dict.fromkeys(findings)
        if (not select or finding.code.startswith(tuple(select)))
        and not finding.code.startswith(tuple(ignore))
    )
    return tuple(sorted(chosen, key=lambda finding: finding.code))
