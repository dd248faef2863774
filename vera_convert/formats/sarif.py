"""A validation as SARIF 2.1.0, which code scanning and editors read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

from vera_convert._version import __version__
from vera_convert.formats.document import Document
from vera_convert.formats.locations import file_name, file_uri
from vera_convert.rules import CATALOG, Finding, Rule
from vera_convert.validation.result import Checked, Validation

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_INDEX = {code: index for index, code in enumerate(CATALOG)}


def sarif_text(result: Validation) -> str:
    """Return the log as JSON in ASCII."""
    return json.dumps(sarif_document(result), indent=2, allow_nan=False)


def sarif_document(result: Validation) -> Document:
    """Return the log as data: one run, with every rule of the catalog and every finding."""
    seen: Counter[str] = Counter()
    results = [
        _result(checked, finding, seen)
        for checked in result.adapters
        for finding in checked.findings
    ]
    driver: Document = {
        "name": "vera-convert",
        "version": __version__,
        "rules": [_descriptor(rule) for rule in CATALOG.values()],
    }
    run: Document = {
        "tool": {"driver": driver},
        "invocations": [_invocation(result)],
        "columnKind": "unicodeCodePoints",
        "results": results,
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _descriptor(rule: Rule) -> Document:
    return {
        "id": rule.code,
        "name": rule.title,
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.why},
        "help": {"text": rule.remedy},
        "defaultConfiguration": {"level": str(rule.severity)},
        "properties": {"since": rule.since},
    }


def _message(text: str) -> Document:
    """Return a message; the standard makes links of `[...](...)`, and no stranger's text may."""
    return {"text": text.replace("](", "] (")}


def _result(checked: Checked, finding: Finding, seen: Counter[str]) -> Document:
    place = finding.place
    physical = {
        "artifactLocation": {"uri": file_uri(checked, finding)},
        "region": {"startLine": 1},  # GitHub demands a line; the first is as good as any
    }
    return {
        "ruleId": finding.code,
        "ruleIndex": _INDEX[finding.code],
        "level": str(finding.severity),
        "message": _message(f"{place}: {finding.reason} {finding.remedy}"),
        "locations": [
            {
                "physicalLocation": physical,
                "logicalLocations": [{"fullyQualifiedName": f"{checked.label}: {place}"}],
            }
        ],
        "partialFingerprints": {"primaryLocationLineHash": _fingerprint(checked, finding, seen)},
    }


def _fingerprint(checked: Checked, finding: Finding, seen: Counter[str]) -> str:
    """Return a hash of a finding that stays the same from run to run.

    The hash covers the code, the adapter and the place, and no measured number, commit or folder
    above the adapter. A count tells apart findings with the same hash, as in GitHub's own hashes.
    """
    adapter = checked.label.split("@")[0] if checked.path is None else checked.path
    parts = [finding.code, adapter, file_name(finding), finding.place]
    text = json.dumps(parts)
    digest = hashlib.sha256(text.encode("ascii")).hexdigest()[:32]
    seen[digest] += 1
    return f"{digest}:{seen[digest]}"


def _invocation(result: Validation) -> Document:
    failures = [checked for checked in result.adapters if checked.failure is not None]
    notifications = [
        {"level": "error", "message": _message(f"{checked.label}: {checked.failure}")}
        for checked in failures
    ]
    notifications += [
        {"level": "note", "message": _message(f"{checked.label}: not checked: {sentence}")}
        for checked in result.adapters
        for sentence in checked.not_checked
    ]
    return {
        "executionSuccessful": not failures,
        "exitCode": result.status,
        "toolExecutionNotifications": notifications,
    }
