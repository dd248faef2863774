"""What a verification came to, as one record."""

from __future__ import annotations

from dataclasses import dataclass

from vera_convert.errors import VeraConvertError
from vera_convert.rules import Finding, Severity
from vera_convert.text import short_repr
from vera_convert.verification.forms import FormCheck
from vera_convert.verification.lora import LoraCheck
from vera_convert.verification.merged import MergedCheck
from vera_convert.verification.model_comparison import ModelComparison


@dataclass(frozen=True, slots=True)
class Verification:
    """What holding a conversion against an adapter came to.

    Attributes:
        adapter: how the caller named the adapter.
        form: what another form of it came to; None if none was given.
        merged: what a merged model came to; None if none was given.
        lora: the comparison with a LoRA; None if none was given.
        model: what running that model came to; None if it was left at the weights, if those were
            wrong already, or if it could not be run.
        not_run: why it could not; None if it was, or was not to be.
        seconds: how long all of it took.
        findings: what is wrong, the worst first; then warnings and notes.
    """

    adapter: str
    form: FormCheck | None
    merged: MergedCheck | None
    lora: LoraCheck | None
    model: ModelComparison | None
    not_run: VeraConvertError | None
    seconds: float
    findings: tuple[Finding, ...]

    __repr__ = short_repr

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What is wrong, the worst first."""
        return tuple(each for each in self.findings if each.severity is Severity.ERROR)

    @property
    def wrong(self) -> int:
        """How many things are wrong: every error, and every wrong tensor that has none."""
        unlisted = self.merged.tensors.unlisted if self.merged is not None else 0
        return len(self.errors) + unlisted

    @property
    def passed(self) -> bool:
        """Whether all that was to be looked at was, and holds."""
        return not self.errors and self.not_run is None
