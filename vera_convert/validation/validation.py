"""The result of a validation as data; what formats are made of it lies in `formats`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from vera_convert.draws.generator import Draw
from vera_convert.errors import VeraConvertError
from vera_convert.rules import Finding, Severity
from vera_convert.text import short_repr


@dataclass(frozen=True, slots=True)
class Checked:
    """One adapter and what was found.

    Attributes:
        label: how its user named it, with the commit on the Hub; printable.
        path: its folder as it was given, with ``/``; None for a repo on the Hub.
        findings: in the order of the catalog, those that were not selected left out.
        draw: which draw its A and B are, stored or by the fingerprint; None where that is not
            known, or there is none.
        embedded: whether A and B are stored; None where the file cannot be read.
        base: the base that it was held against; empty if there was none.
        not_checked: what could not be looked at, and why; one sentence each.
        bytes_read: what was read of a repo on the Hub; None for a folder.
        failure: why something of it could not be read: all of it, if there are no findings.
        has_hidden_errors: whether errors were found that are not selected.
        other_method: what the adapter is instead of VeRA, such as ``LORA``; nothing but its config
            was looked at.
    """

    label: str
    path: str | None
    findings: tuple[Finding, ...] = ()
    draw: Draw | None = None
    embedded: bool | None = None
    base: str = ""
    not_checked: tuple[str, ...] = ()
    bytes_read: int | None = None
    failure: VeraConvertError | None = None
    has_hidden_errors: bool = False
    other_method: str | None = None

    __repr__ = short_repr

    @property
    def is_passed_over(self) -> bool:
        """Whether it is of another method, and the finding that says so is not selected."""
        return self.other_method is not None and not self.findings


@dataclass(frozen=True, slots=True)
class Validation:
    """What was found in every adapter of one call.

    Attributes:
        adapters: in the order in which they were named, or found in a folder.
        fail_on: the severity from which on a finding fails the call.
    """

    adapters: tuple[Checked, ...]
    fail_on: Severity = Severity.ERROR

    __repr__ = short_repr

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Every finding of every adapter."""
        return tuple(finding for checked in self.adapters for finding in checked.findings)

    def count(self, severity: Severity) -> int:
        """Return how many findings have this severity."""
        return Counter(finding.severity for finding in self.findings)[severity]

    @property
    def passed(self) -> bool:
        """Whether everything was read and nothing found that fails the call."""
        return self.status == 0

    @property
    def status(self) -> int:
        """The exit status: 1 where a finding fails the call, else that of a failure to read."""
        failing = (Severity.ERROR, self.fail_on)
        if any(finding.severity in failing for finding in self.findings):
            return 1
        return max((c.failure.status for c in self.adapters if c.failure is not None), default=0)
