"""Define the result of a verification."""

from __future__ import annotations

from dataclasses import dataclass

from vera_convert.errors import SurroundingsError
from vera_convert.rules import Finding, errors_of
from vera_convert.text import short_repr
from vera_convert.verification.forms import FormCheck
from vera_convert.verification.lora import LoraCheck
from vera_convert.verification.merged import MergedCheck
from vera_convert.verification.model_comparison import ModelComparison


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of comparing a conversion with the adapter.

    Attributes:
        adapter: the caller's name of the adapter.
        form: the result for another form of the adapter; None if no other form was given.
        merged: the result for a merged model; None if no merged model was given.
        lora: the result for a LoRA; None if no LoRA was given.
        seconds: how long the verification took.
        findings: errors, the worst first; then warnings and notes.
    """

    adapter: str
    form: FormCheck | None
    merged: MergedCheck | None
    lora: LoraCheck | None
    seconds: float
    findings: tuple[Finding, ...]

    __repr__ = short_repr

    @property
    def model(self) -> ModelComparison | None:
        """The result of running the merged model; None if the model was not run."""
        return None if self.merged is None else self.merged.model

    @property
    def not_run(self) -> SurroundingsError | None:
        """Why models could not be run; None if no run failed."""
        failures = (each.failure for each in (self.merged, self.lora) if each is not None)
        return next((each for each in failures if each is not None), None)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The errors among the findings, the worst first."""
        return tuple(errors_of(self.findings))

    @property
    def wrong(self) -> int:
        """How many errors there are, wrong tensors without a finding of their own included."""
        unlisted = self.merged.tensors.unlisted if self.merged is not None else 0
        return len(self.errors) + unlisted

    @property
    def passed(self) -> bool:
        """Whether every comparison was made, and none found an error."""
        return not self.errors and self.not_run is None
