"""A validation as JUnit XML, which nearly every CI shows."""

from __future__ import annotations

import re
from xml.etree.ElementTree import Element, SubElement, tostring

from vera_convert.formats.locations import file_path
from vera_convert.rules import Finding, Severity
from vera_convert.validation.result import Checked, Validation

_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 forbids, escaped or not."""


def junit_text(result: Validation) -> str:
    """Return the XML, in ASCII: one suite for each adapter, one case for each finding.

    A finding that fails the call is a failure. An unreadable adapter is an error, and an omitted
    check is a skipped case. An adapter without findings has one passed case.
    """
    root = Element("testsuites", name="vera-convert validate")
    for checked in result.adapters:
        root.append(_suite(checked, {Severity.ERROR, result.fail_on}))
    for count in ("tests", "failures", "errors", "skipped"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in root)))
    text: str = tostring(root, encoding="us-ascii", xml_declaration=True).decode("ascii")
    return text


def _legal(text: str) -> str:
    return _ILLEGAL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _suite(checked: Checked, failing: set[Severity]) -> Element:
    name = _legal(checked.label)
    suite = Element("testsuite", name=name)
    for finding in checked.findings:
        _finding_case(suite, checked, finding, fails=finding.severity in failing)
    if checked.failure is not None:
        case = SubElement(suite, "testcase", classname=name, name="read")
        SubElement(case, "error", type="not read", message=_legal(str(checked.failure)))
    elif not checked.findings and not checked.has_hidden_errors:
        SubElement(suite, "testcase", classname=name, name="no finding")
    for sentence in checked.not_checked:
        case = SubElement(suite, "testcase", classname=name, name="not checked")
        SubElement(case, "skipped", message=_legal(sentence))
    suite.set("tests", str(len(suite)))
    for count, element in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(count, str(len(suite.findall(f"testcase/{element}"))))
    return suite


def _finding_case(suite: Element, checked: Checked, finding: Finding, *, fails: bool) -> None:
    place, rule = finding.place, finding.rule
    case = SubElement(
        suite,
        "testcase",
        classname=_legal(checked.label),
        name=_legal(f"{rule.code} {rule.title}: {place}"),
    )
    path = file_path(checked, finding)
    if path is not None:
        case.set("file", _legal(path))
    text = f"{place}: {finding.reason}\nWhy: {rule.why}\nRemedy: {finding.remedy}"
    if fails:
        message = _legal(f"{place}: {finding.reason}")
        failure = SubElement(case, "failure", type=rule.code, message=message)
        failure.text = _legal(text)
    else:
        SubElement(case, "system-out").text = _legal(f"{rule.severity}: {text}")
