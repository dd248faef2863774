"""A validation as text for people."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest

from vera_convert.formats.shared import table
from vera_convert.rules import Finding, Severity
from vera_convert.text import and_more, counted, wrapped
from vera_convert.validation.result import Checked, Validation

_STYLES = {"error": "1;31", "warning": "1;33", "note": "36", "good": "32", "name": "1"}
_MOST_PLACES = 5
_BELOW = {"first": "  ", "indent": "  "}
_INDENT = " " * 11  # below a finding's title, beyond its severity
_COMMAND_OF_A_LOG = re.compile(r"(?m)^(\s*):(?=:)")

Paint = Callable[[str, str], str]


def _colored(text: str, style: str) -> str:
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def _plain(text: str, style: str) -> str:  # noqa: ARG001 -- as `_colored`
    return text


def _counts(findings: Iterable[Finding]) -> str:
    found = Counter(finding.severity for finding in findings)
    return ", ".join(counted(found[severity], severity) for severity in Severity if found[severity])


def validation_text(
    result: Validation,
    *,
    color: bool = False,
    width: int | None = None,
    failures_said: bool = False,
) -> str:
    """Return the findings for people: first each adapter, then a table of all adapters.

    Args:
        result: the validation.
        color: whether to mark severities with colors of a terminal.
        width: the most columns of a line; None to break no line.
        failures_said: whether the reasons why adapters could not be read are on the screen already.
    """
    paint = _colored if color else _plain
    many = len(result.adapters) > 1
    parts = [
        _block(checked, paint, width, alone=not many, failures_said=failures_said)
        for checked in result.adapters
        if not many or (_style(checked) != "good" and not checked.is_passed_over)
    ]
    if many:
        parts += [_table(result, paint, width), "\n".join(_in_common(result, width))]
    if many or any(result.findings):
        parts.append(_closing(result, paint, width))
    text = "\n\n".join(part for part in parts if part)
    # A log of GitHub's takes a line that begins with two colons for a command.
    return _COMMAND_OF_A_LOG.sub(r"\1\\x3a", text)


def verdict(checked: Checked) -> str:
    """Return the result of an adapter in a few words."""
    counts = _counts(checked.findings)
    if checked.failure is not None:
        return f"{counts}, not all read" if counts else "not read"
    if checked.is_passed_over:
        return f"passed over ({checked.other_method})"
    if checked.has_hidden_errors:
        return f"{counts or 'nothing'} selected, other errors"
    good = [] if _worst(checked) in (Severity.ERROR, Severity.WARNING) else ["good"]
    return ", ".join(filter(None, [*good, counts]))


def _worst(checked: Checked) -> Severity | None:
    found = {finding.severity for finding in checked.findings}
    return next((severity for severity in Severity if severity in found), None)


def _style(checked: Checked) -> str:
    if checked.failure is not None:
        return "error"
    worst = _worst(checked)
    if worst in (None, Severity.NOTE):
        return "note" if checked.has_hidden_errors else "good"
    return worst


def _block(
    checked: Checked, paint: Paint, width: int | None, *, alone: bool, failures_said: bool
) -> str:
    head = f"{paint(checked.label, 'name')}: {paint(verdict(checked), _style(checked))}"
    lines = [head]
    if checked.failure is not None and not failures_said:
        lines += wrapped(str(checked.failure), width, first="  ", indent="  ")
    for findings in _by_rule(checked.findings):
        lines += _rule_lines(findings, paint, width)
    for name, text in _rows(checked) if alone else ():
        lines += wrapped(text, width, first=f"  {name:<11}  ", indent=" " * 15)
    return "\n".join(lines)


def _by_rule(findings: Iterable[Finding]) -> Iterable[list[Finding]]:
    """Group findings by rule and remedy, the worst first."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for severity in Severity:
        for finding in findings:
            if finding.severity is severity:
                groups.setdefault((finding.code, finding.remedy), []).append(finding)
    return groups.values()


def _rule_lines(findings: list[Finding], paint: Paint, width: int | None) -> Iterator[str]:
    """Yield the lines of all findings of one rule and remedy, with the remedy once, at the end."""
    rule = findings[0].rule
    head = f"  {paint(f'{rule.severity:<7}', rule.severity)}  {paint(rule.code, 'name')}  "
    indent = " " * 17
    title, *more = wrapped(rule.title, width, first=indent, indent=indent)
    yield head + title.lstrip()
    yield from more
    for place, said in _places(findings[:_MOST_PLACES]):
        yield from wrapped(f"{place}{said}", width, first=_INDENT, indent=f"{_INDENT}  ")
    if findings[_MOST_PLACES:]:
        yield f"{_INDENT}{and_more(len(findings) - _MOST_PLACES).lstrip()} (--json lists all)"
    yield from wrapped(f"Remedy: {findings[0].remedy}", width, first=_INDENT, indent=f"{_INDENT}  ")


def _places(findings: list[Finding]) -> Iterator[tuple[str, str]]:
    """Yield each place and the reason; neighbors with the same reason share one, at the last."""
    for finding, following in zip_longest(findings, findings[1:]):
        same = following is not None and following.reason == finding.reason
        yield finding.place, "," if same else f": {finding.reason}"


def _rows(checked: Checked) -> Iterator[tuple[str, str]]:
    """Yield the facts of a single adapter; several adapters have a table of these facts."""
    projections = _projections(checked, checked.draw.description if checked.draw else "")
    if projections:
        yield "A and B", projections
    if checked.base:
        yield "base", checked.base
    if checked.bytes_read is not None:
        yield "read", f"{checked.bytes_read:,} bytes of the repo"
    for index, sentence in enumerate(checked.not_checked):
        yield "" if index else "not checked", sentence


def _projections(checked: Checked, draw: str) -> str:
    form = {True: "embedded", False: "stripped", None: ""}[checked.embedded]
    return ": ".join(filter(None, (form, draw)))


def _table(result: Validation, paint: Paint, width: int | None) -> str:
    """Return one line for each adapter, with the name last because a name has any length.

    In a window that is too narrow for the table, each adapter's values stand below the name.
    """
    read = any(checked.bytes_read is not None for checked in result.adapters)
    rows = [["result", "A and B", *(["bytes read"] if read else []), "adapter"]]
    for checked in result.adapters:
        draw = checked.draw
        short = f"{draw.variant}, key {draw.key}" if draw else ""
        row = [verdict(checked), _projections(checked, short)]
        if read:
            row.append("" if checked.bytes_read is None else f"{checked.bytes_read:>10,}")
        rows.append([*row, checked.label])
    head, *lines = table(rows).split("\n")
    if width is not None and max(map(len, (head, *lines))) > width:
        return "\n".join(
            line
            for checked, (*values, label) in zip(result.adapters, rows[1:], strict=True)
            for line in (label, *wrapped(_in_a_line(checked, values), width, **_BELOW))
        )
    shown = [
        paint(line[: len(verdict(checked))], _style(checked)) + line[len(verdict(checked)) :]
        for line, checked in zip(lines, result.adapters, strict=True)
    ]
    return "\n".join([head, *shown])


def _in_a_line(checked: Checked, values: list[str]) -> str:
    """Return the values of an adapter's row as one text."""
    size = [] if checked.bytes_read is None else [f"{checked.bytes_read:,} bytes read"]
    return "; ".join(filter(None, (*values[:2], *size)))


def _in_common(result: Validation, width: int | None) -> Iterator[str]:
    """Yield each base and each check that was left out, with the number of adapters."""
    bases = Counter(checked.base for checked in result.adapters if checked.base)
    missed = Counter(text for checked in result.adapters for text in checked.not_checked)
    said = [(f"Compared with the base {base}", number) for base, number in bases.items()]
    said += [(f"Not checked: {sentence.removesuffix('.')}", n) for sentence, n in missed.items()]
    for text, number in said:
        of = "all of them" if number == len(result.adapters) else f"{number:,} of them"
        yield from wrapped(f"{text} ({of})", width, indent="  ")


def closing_line(result: Validation) -> str:
    """Return the counts of a call in one line."""
    adapters = result.adapters
    if len(adapters) == 1:
        return f"1 adapter: {verdict(adapters[0])}"
    unread = sum(checked.failure is not None for checked in adapters)
    good = sum(_style(checked) == "good" for checked in adapters)
    passed_over = sum(checked.is_passed_over for checked in adapters)
    unselected = sum(_style(checked) == "note" for checked in adapters) - passed_over
    others = {
        "with errors or warnings": len(adapters) - good - unread - passed_over - unselected,
        "with errors that are not selected": unselected,
        "of other methods passed over": passed_over,
        "not read": unread,
    }
    parts = [f"{good:,} good", *(f"{number:,} {said}" for said, number in others.items() if number)]
    counts = _counts(result.findings)
    shown = f"{counted(len(adapters), 'adapter')}: {', '.join(parts)}"
    return f"{shown}; {counts}" if counts else shown


def _closing(result: Validation, paint: Paint, width: int | None) -> str:
    counts = closing_line(result)
    if result.fail_on is not Severity.ERROR and result.count(result.fail_on):
        counts += f" (each {result.fail_on} fails this call)"
    lines = [paint(line, "name") for line in wrapped(counts, width, indent="  ")]
    if any(result.findings):
        hint = "`vera-convert validate --explain CODE` says why a finding matters."
        lines += wrapped(hint, width, indent="  ")
    return "\n".join(lines)
