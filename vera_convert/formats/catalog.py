"""Write the rules as a table, as explanations and as JSON."""

from __future__ import annotations

from collections.abc import Iterable

from vera_convert.formats.document import Document, document
from vera_convert.formats.shared import table
from vera_convert.rules import CATALOG, Rule, Severity
from vera_convert.text import wrapped

MEANINGS = {
    Severity.ERROR: "the checkpoint cannot be loaded, loads wrongly, or would lose data",
    Severity.WARNING: "the checkpoint works, but some environments fail or give other results",
    Severity.NOTE: "information; the checkpoint is correct",
}
"""The meaning of each severity, for people."""


def rules_text(rules: Iterable[Rule] = CATALOG.values()) -> str:
    """Return a line for each rule, for people."""
    rows = [["code", "severity", "since", "title"]]
    rows += [[rule.code, rule.severity, rule.since, rule.title] for rule in rules]
    return table(rows)


def explanation(rules: Iterable[Rule], *, width: int | None) -> str:
    """Return the meaning, the reason and the remedy of each rule as text."""
    return "\n\n".join("\n".join(_explained(rule, width)) for rule in rules)


def _explained(rule: Rule, width: int | None) -> list[str]:
    rows = [
        (rule.code, rule.title),
        ("severity", f"{rule.severity}: {MEANINGS[rule.severity]}"),
        ("why", rule.why),
        ("remedy", rule.remedy),
        ("since", rule.since),
    ]
    lines: list[str] = []
    for name, text in rows:
        lines += wrapped(text, width, first=f"{name:<8}  ", indent=" " * 10)
    return lines


def rules_document(rules: Iterable[Rule]) -> Document:
    """Return the rules as data (schema ``rules``)."""
    return document("rules", None, rules=[*rules])
