"""What a verification came to, as one record."""

from __future__ import annotations

from dataclasses import dataclass

from vera_convert.rules import Finding, Severity
from vera_convert.verification.comparison import ModelComparison
from vera_convert.verification.forms import FormCheck
from vera_convert.verification.merged import MergedCheck


@dataclass(frozen=True, slots=True)
class Verification:
    """What holding a conversion against an adapter came to.

    Attributes:
        adapter: how the caller named the adapter.
        form: what another form of it came to; None if none was given.
        merged: what a merged model came to; None if none was given.
        model: what running that model came to; None if it was left at the weights, or if those
            were wrong already.
        findings: what is wrong, the worst first; then warnings and notes.
    """

    adapter: str
    form: FormCheck | None
    merged: MergedCheck | None
    model: ModelComparison | None
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What is wrong, the worst first."""
        return tuple(each for each in self.findings if each.severity is Severity.ERROR)

    @property
    def passed(self) -> bool:
        """Whether all that was looked at holds."""
        return not self.errors
