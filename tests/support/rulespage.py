"""Make the page docs/rules.md from the catalog of rules.

Run as a script, this module prints the page.
"""

from __future__ import annotations

import re
import sys

from vera_convert.formats.catalog import MEANINGS
from vera_convert.rules import CATALOG, Rule, Severity

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

INTRODUCTION = """\
<!-- Made from vera_convert/rules.toml by `make docs`; a test holds the two together. -->

# Rules

The defects that `vera-convert` can find in a checkpoint, with the reason and the remedy of each. A
code keeps its meaning forever. `vera-convert validate --explain CODE` prints a rule. `--select` and
`--ignore`, also in `pyproject.toml`, accept codes and beginnings of codes, such as `V2`.

| severity | meaning |
| --- | --- |
"""
MARKUP = re.compile(r"[\\*<>|[\]#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
HEAD = "| code | severity | title |\n| --- | --- | --- |\n"


def rules_page() -> str:
    """Return every rule as a page of Markdown."""
    parts = [INTRODUCTION]
    parts += [f"| {severity} | {MEANINGS[severity]} |\n" for severity in Severity]
    for family, name in FAMILIES.items():
        rules = [rule for rule in CATALOG.values() if rule.code.startswith(family)]
        parts.append(f"\n## {family}: {name}\n\n{HEAD}")
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
    """Escape characters that are Markdown markup, except in commands, which are shown as code."""
    spans = re.split(r"(`[^`]*`)", re.sub(r'python -c ".*"', r"`\g<0>`", text))
    spans[::2] = [MARKUP.sub(r"\\\g<0>", span) for span in spans[::2]]
    return "".join(spans)


if __name__ == "__main__":
    sys.stdout.write(rules_page())
