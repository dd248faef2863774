"""The three ways a command fails, each with the exit status that it stands for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from vera_convert.rules import Finding

OF_MERGED = "this is a defect of the merged model"
"""A note on errors of `verify` that are no fault of the adapter."""


class VeraConvertError(Exception):
    """Base of every error that this package raises on purpose."""

    status: ClassVar[int] = 1


class CheckpointError(VeraConvertError):
    """The checkpoint is at fault: it is malformed, or what was asked cannot be done without loss.

    Attributes:
        findings: every defect met before the reader had to stop; at least one.
    """

    status = 1

    def __init__(self, first: Finding, *more: Finding) -> None:
        self.findings: tuple[Finding, ...] = (first, *more)
        super().__init__(str(first))

    @classmethod
    def of(cls, findings: Iterable[Finding]) -> CheckpointError:
        """Build the error from findings that are known not to be empty."""
        first, *more = findings
        return cls(first, *more)


class UsageError(VeraConvertError):
    """The call is at fault: options clash, something must be given that is not, OUT exists."""

    status = 2


class SurroundingsError(VeraConvertError):
    """The surroundings are at fault: no such folder or repo, disk full, network, missing extra."""

    status = 3
