"""A validation for GitHub: annotations as workflow commands, and a job's summary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from vera_convert.formats.locations import file_path
from vera_convert.formats.validation import closing_line, verdict
from vera_convert.rules import Finding, Severity
from vera_convert.text import and_more, printable_whole
from vera_convert.validation.result import Checked, Validation

_COMMANDS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.NOTE: "notice"}
_MOST_ROWS = 500
"""Findings in a summary: GitHub drops a summary of more than 1 MiB."""


def github_text(result: Validation) -> str:
    """Return one workflow command for each finding, then the counts."""
    lines = []
    for checked in result.adapters:
        if checked.failure is not None:
            lines.append(_command("error", f"{checked.label}: {checked.failure}", title="not read"))
        lines += [_annotation(checked, finding) for finding in checked.findings]
    return "\n".join([*lines, closing_line(result)])


def _annotation(checked: Checked, finding: Finding) -> str:
    rule = finding.rule
    where = f"{finding.place}: {finding.reason}"
    path = file_path(checked, finding)
    message = f"{where} {finding.remedy}" if path else f"{checked.label}: {where} {finding.remedy}"
    file = printable_whole(path) if path else None
    title = f"{rule.code} {rule.title}"
    return _command(_COMMANDS[rule.severity], message, file=file, title=title)


def _command(name: str, message: str, **properties: str | None) -> str:
    named = ",".join(f"{key}={_property(value)}" for key, value in properties.items() if value)
    return f"::{name} {named}::{_data(message)}"


def _data(text: str) -> str:
    """Escape the characters that would end a command's message."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """Escape the characters that would end a property of a command."""
    return _data(text).replace(":", "%3A").replace(",", "%2C")


# --- the summary of a job ------------------------------------------------------------------------


def job_summary(result: Validation) -> str:
    """Return a table of adapters and a table of findings in Markdown."""
    adapters = ([_code(checked.label), verdict(checked)] for checked in result.adapters)
    lines = ["### vera-convert validate", "", closing_line(result), ""]
    lines += _table(("adapter", "result"), adapters)
    pairs = [(checked, finding) for checked in result.adapters for finding in checked.findings]
    if pairs:
        head = ("severity", "code", "adapter", "place", "reason", "remedy")
        lines += ["", *_table(head, (_cells(*pair) for pair in pairs[:_MOST_ROWS]))]
    if len(pairs) > _MOST_ROWS:
        lines += [
            "",
            f"{and_more(len(pairs) - _MOST_ROWS, 'finding').lstrip()}, which the log lists.",
        ]
    unread = [checked for checked in result.adapters if checked.failure is not None]
    if unread:
        rows = ([_code(checked.label), _escaped(str(checked.failure))] for checked in unread)
        lines += ["", *_table(("adapter", "why it was not read"), rows)]
    not_checked = dict.fromkeys(text for checked in result.adapters for text in checked.not_checked)
    if not_checked:
        lines += ["", "Not checked:", "", *(f"- {_escaped(text)}" for text in not_checked)]
    return "\n".join(lines) + "\n"


def _cells(checked: Checked, finding: Finding) -> list[str]:
    return [
        str(finding.severity),
        finding.code,
        _code(checked.label),
        _code(finding.place),
        _escaped(finding.reason),
        _escaped(finding.remedy),
    ]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    cells = [*head]
    yield f"| {' | '.join(cells)} |"
    yield f"| {' | '.join('---' for _ in cells)} |"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _code(text: str) -> str:
    """Show a name literally, free of mentions, links and markup."""
    return f"<code>{_escaped(text)}</code>"


def _escaped(text: str) -> str:
    """Escape a text for Markdown and HTML."""
    one_line = " ".join(text.split())
    return re.sub(r"[^A-Za-z0-9 ,;()'/+=-]", lambda match: f"&#{ord(match[0])};", one_line)
