"""Write the rules as a table, as explanations, as JSON and as the page docs/rules.md.

Run as a program it prints the page: ``python -m vera_convert.formats.catalog``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from vera_convert.formats.document import Document, document
from vera_convert.formats.shared import table
from vera_convert.rules import CATALOG, Rule, Severity
from vera_convert.text import wrapped

FAMILIES = {
    "V0": "files",
    "V1": "config",
    "V2": "tensors",
    "V3": "values",
    "V4": "projections",
    "V5": "base",
    "V6": "verification",
    "V7": "LoRA",
}
"""The family of rules for each first digit of a code."""

_INTRODUCTION = """\
<!-- Made from vera_convert/rules.toml by `make docs`; a test holds the two together. -->

# Rules

The defects that `vera-convert` can find in a checkpoint, with the reason and the remedy of each. A
code keeps its meaning forever. `vera-convert validate --explain CODE` prints a rule. `--select` and
`--ignore`, also in `pyproject.toml`, accept codes and beginnings of codes, such as `V2`.

| severity | meaning |
| --- | --- |
"""
_MARKUP = re.compile(r"[\\*<>|[\]#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_HEAD = "| code | severity | title |\n| --- | --- | --- |\n"


def rules_text(rules: Iterable[Rule] = CATALOG.values()) -> str:
    """Every rule in a line, for people."""
    rows = [["code", "severity", "since", "title"]]
    rows += [[rule.code, rule.severity, rule.since, rule.title] for rule in rules]
    return table(rows)


def explanation(rules: Iterable[Rule], *, width: int | None) -> str:
    """Return the meaning, the reason and the remedy of each rule as text."""
    return "\n\n".join("\n".join(_explained(rule, width)) for rule in rules)


def _explained(rule: Rule, width: int | None) -> list[str]:
    rows = [
        (rule.code, rule.title),
        ("severity", f"{rule.severity}: {_meaning(rule.severity)}"),
        ("why", rule.why),
        ("remedy", rule.remedy),
        ("since", rule.since),
    ]
    lines: list[str] = []
    for name, text in rows:
        lines += wrapped(text, width, first=f"{name:<8}  ", indent=" " * 10)
    return lines


def _meaning(severity: Severity) -> str:
    return {
        Severity.ERROR: "the checkpoint cannot be loaded, loads wrongly, or would lose data",
        Severity.WARNING: "the checkpoint works, but some environments fail or give other results",
        Severity.NOTE: "information; the checkpoint is correct",
    }[severity]


def rules_document(rules: Iterable[Rule]) -> Document:
    """Return the rules as data (schema ``rules``)."""
    return document("rules", None, rules=[*rules])


# --- the page of the docs ------------------------------------------------------------------------


def rules_page() -> str:
    """Every rule as a page of Markdown."""
    parts = [_INTRODUCTION]
    parts += [f"| {severity} | {_meaning(severity)} |\n" for severity in Severity]
    for family, name in FAMILIES.items():
        rules = [rule for rule in CATALOG.values() if rule.code.startswith(family)]
        parts.append(f"\n## {family}: {name}\n\n{_HEAD}")
        parts += [
            f"| [{rule.code}](#{rule.code.lower()}) | {rule.severity} | {_markdown(rule.title)} |\n"
            for rule in rules
        ]
        parts += [_section(rule) for rule in rules]
    return "".join(parts)


def _section(rule: Rule) -> str:
    return (
        f"\n### {rule.code}\n\n"
        f"**{_markdown(rule.title)}** ({rule.severity}, since {rule.since})\n\n"
        f"{_markdown(rule.why)}\n\n"
        f"Remedy: {_markdown(rule.remedy)}\n"
    )


def _markdown(text: str) -> str:
    """Escape what Markdown would take for markup, but for commands, which are shown as code."""
    spans = re.split(r"(`[^`]*`)", re.sub(r'python -c ".*"', r"`\g<0>`", text))
    spans[::2] = [_MARKUP.sub(r"\\\g<0>", span) for span in spans[::2]]
    return "".join(spans)


if __name__ == "__main__":
    sys.stdout.write(rules_page())
