"""Define the result of a validation; `formats` writes the result in each format."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from vera_convert.draws.generator import Draw
from vera_convert.errors import VeraConvertError
from vera_convert.rules import Finding, Severity
from vera_convert.text import short_repr


@dataclass(frozen=True, slots=True)
class Checked:
    """The findings of one adapter.

    Attributes:
        label: the adapter as given by the caller, with the commit on the Hub; printable.
        path: the folder as given, with ``/``; None for a repo on the Hub.
        findings: the selected findings, in the order of the catalog.
        draw: the draw of A and B, stored or by the fingerprint; None if unknown.
        embedded: whether A and B are stored; None for an unreadable file.
        base: the compared base; empty without a base.
        not_checked: the missing checks, each with the reason in a sentence.
        bytes_read: how many bytes of a repo on the Hub were read; None for a folder.
        failure: why a file of the adapter could not be read; None if all could.
        has_hidden_errors: whether an error is hidden by the selection.
        other_method: the method of an adapter other than VeRA, such as ``LORA``; only its config
            was checked.
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
        """Whether the adapter is of another method, and no selected finding says so."""
        return self.other_method is not None and not self.findings


@dataclass(frozen=True, slots=True)
class Validation:
    """The findings of all adapters of one call.

    Attributes:
        adapters: the adapters, in the order of the call, or of the search in a folder.
        fail_on: the lowest failing severity.
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
        """Whether everything was read, and no finding fails the call."""
        return self.status == 0

    @property
    def status(self) -> int:
        """The exit status: 1 if a finding fails the call, else the status of a failure to read."""
        failing = (Severity.ERROR, self.fail_on)
        if any(finding.severity in failing for finding in self.findings):
            return 1
        return max((c.failure.status for c in self.adapters if c.failure is not None), default=0)
