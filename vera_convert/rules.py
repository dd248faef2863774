"""The catalog of rules: every defect that vera-convert can find, each with a stable code.

The texts stand in ``rules.toml``. Code names a rule as this file does: ``rules.FILE_EMPTY``, after
``from vera_convert import rules``. A reader that finds a defect raises `CheckpointError`
with the `Finding`, and every command shows the finding in the same words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path

from vera_convert.text import printable


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    """The checkpoint cannot be loaded, loads wrongly, or would lose data."""
    WARNING = "warning"
    """The checkpoint works, but some environments fail or give other results."""
    NOTE = "note"
    """Information; the checkpoint is correct."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A kind of defect, with title, reason and remedy.

    Attributes:
        code: the stable code, such as ``V101``.
        severity: how bad the defect is.
        title: the defect in a few words.
        why: why the defect matters.
        remedy: what to do about the defect.
        since: the first version of vera-convert that has the rule.
    """

    code: str
    severity: Severity

    @property
    def title(self) -> str:
        """The defect in a few words."""
        return _texts(self.code)["title"]

    @property
    def why(self) -> str:
        """Why the defect matters."""
        return _texts(self.code)["why"]

    @property
    def remedy(self) -> str:
        """The way to repair the defect."""
        return _texts(self.code)["remedy"]

    @property
    def since(self) -> str:
        """The first version of vera-convert that has the rule."""
        return _texts(self.code)["since"]

    def at(self, place: str, reason: str, *, file: str | None = None) -> Finding:
        """Return a finding at a place: a layer, a folder, a base (text that is printable)."""
        return Finding(self, place, reason, file)

    def in_file(self, file: str, reason: str) -> Finding:
        """Return a finding in a file (a name or path that is printable)."""
        return Finding(self, file, reason, file)

    def in_tensor(self, name: str, reason: str, *, file: str | None = None) -> Finding:
        """Return a finding at a tensor, named as in its file; `file` is shown if given."""
        shown = printable(name)
        place = shown if file is None else f'{file} tensor "{shown}"'
        return Finding(self, place, reason, file, name)

    def as_note(self) -> Rule:
        """Return this rule for a case in which nothing is wrong."""
        return replace(self, severity=Severity.NOTE)

    def as_warning(self) -> Rule:
        """Return this rule for a case in which something may be wrong."""
        return replace(self, severity=Severity.WARNING)


@dataclass(frozen=True, slots=True)
class Finding:
    """A defect in a place.

    Attributes:
        rule: the kind of defect.
        place: the file, tensor, layer or field, as text for people.
        reason: the values that were found, as a sentence.
        file: the file with the defect, if a single file has it: a name or a path.
        tensor: the name of the tensor with the defect, if a single tensor has it.
        own_remedy: the remedy in this case, if the rule's remedy does not fit.

    Example:
        >>> from vera_convert import validate
        >>> finding = validate("broken").findings[0]
        >>> finding.code, str(finding.severity), finding.file
        ('V104', 'error', 'adapter_config.json')
    """

    rule: Rule
    place: str
    reason: str
    file: str | None = None
    tensor: str | None = None
    own_remedy: str | None = None

    @property
    def remedy(self) -> str:
        """The way to repair the defect."""
        return self.own_remedy or self.rule.remedy

    @property
    def code(self) -> str:
        """The stable code of the rule, such as ``V101``."""
        return self.rule.code

    @property
    def severity(self) -> Severity:
        """The severity of the rule."""
        return self.rule.severity

    def as_note(self) -> Finding:
        """Return this finding for a case in which nothing is wrong."""
        return replace(self, rule=self.rule.as_note())

    def of_adapter(self, label: str) -> Finding:
        """Return this finding with an adapter's name in the place, unless the name is there.

        Args:
            label: the adapter's name; an empty name changes nothing.
        """
        named = self.place == label or self.place.startswith(tuple(label + end for end in ":/\\"))
        return self if named or not label else replace(self, place=f"{label}: {self.place}")

    def with_remedy(self, remedy: str) -> Finding:
        """Return this finding with a remedy for a case that the rule's remedy does not fit."""
        return replace(self, own_remedy=remedy)

    def __str__(self) -> str:
        return f"{self.code} {self.place}: {self.reason} {self.remedy}"


def errors_of(findings: Iterable[Finding]) -> list[Finding]:
    """Return the errors among findings."""
    return [finding for finding in findings if finding.severity is Severity.ERROR]


def alike(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Return groups of findings that differ in the place alone, in the order of their firsts."""
    groups: dict[tuple[Rule, str, str], list[Finding]] = {}
    for finding in findings:
        key = finding.rule, finding.reason, finding.remedy
        groups.setdefault(key, []).append(finding)
    return [*groups.values()]


# --- the file ------------------------------------------------------------------------------------

_TEXTS = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
_HEADS = [
    *re.finditer(
        r'^\[([A-Z_0-9]+)\]\ncode = "(V\d{3})"\nseverity = "(\w+)"\n', _TEXTS, re.MULTILINE
    )
]
_NAMED = {head[1]: Rule(head[2], Severity(head[3])) for head in _HEADS}

CATALOG: Mapping[str, Rule] = {rule.code: rule for rule in _NAMED.values()}
"""Every rule by code, in order."""


def __getattr__(name: str) -> Rule:
    """Return a rule by its name."""
    if name not in _NAMED:
        raise AttributeError(f"rules.toml has no rule {name}")
    return _NAMED[name]


@cache
def _texts(code: str) -> Mapping[str, str]:
    """Return the texts of a rule.

    Only the lines of this rule are parsed: the whole file takes longer than most commands.
    """
    import tomllib

    number = [*CATALOG].index(code)
    end = _HEADS[number + 1].start() if number + 1 < len(_HEADS) else None
    return tomllib.loads(_TEXTS[_HEADS[number].end() : end])
