"""The errors that this package raises on purpose, each with the exit status of a command."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

from vera_convert.rules import Finding

READING_REMEDY = "Give your user the right to read, with `chmod u+rX`, or run as another user."
"""The remedy for a file or folder that the system does not let the user read."""


class VeraConvertError(Exception):
    """An error that this package raises on purpose: the base class of the others.

    Attributes:
        status: the exit status of a command that fails with the error.
    """

    status: ClassVar[int] = 1


class CheckpointError(VeraConvertError):
    """A checkpoint is malformed, or the command would lose a part of the checkpoint.

    Attributes:
        findings: every defect found before reading stopped; at least one.
        validate_shows_all: whether `validate` shows these defects of the adapter too; False for the
            defects of a merged model, and for the rules of an engine.
        adapter: the adapter with the defects, if the call names several adapters; else empty.
    """

    status = 1

    def __init__(self, first: Finding, *more: Finding) -> None:
        self.findings: tuple[Finding, ...] = (first, *more)
        self.validate_shows_all = True
        self.adapter = ""
        super().__init__(str(first))

    @classmethod
    def of(cls, findings: Iterable[Finding]) -> CheckpointError:
        """Return the error for one or more findings."""
        first, *more = findings
        return cls(first, *more)


@contextmanager
def naming_adapter(label: str) -> Iterator[None]:
    """Name an added adapter in the errors about the adapter; an empty label changes nothing."""
    try:
        yield
    except CheckpointError as error:
        if label:
            error.findings = tuple(finding.of_adapter(label) for finding in error.findings)
            error.adapter, error.args = label, (str(error.findings[0]),)
        raise


def refuse(findings: Iterable[Finding]) -> None:
    """Raise a `CheckpointError` with the findings, if there are any."""
    if found := [*findings]:
        raise CheckpointError.of(found)


class UsageError(VeraConvertError):
    """An argument or option is wrong: options conflict, one is missing, or OUT exists.

    Attributes:
        reason: the message without the remedy.
    """

    status = 2

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason} {remedy}".rstrip())
        self.reason = reason


class ParameterError(UsageError):
    """The value of a single parameter is wrong.

    Attributes:
        parameter: the name of the parameter, or of the option on the command line.
        reason: the rest of the message, which begins with a verb.
    """

    def __init__(self, parameter: str, reason: str) -> None:
        super().__init__(f"{parameter} {reason}")
        self.parameter = parameter
        self.reason = reason


class ConflictError(UsageError):
    """The values of several parameters contradict each other.

    Attributes:
        parameters: the names of the parameters, or of the options on the command line.
        sentence: the message, with ``{}`` in the place of each name.
    """

    def __init__(self, sentence: str, *parameters: str) -> None:
        super().__init__(sentence.format(*parameters))
        self.sentence = sentence
        self.parameters = parameters


class SurroundingsError(VeraConvertError):
    """A path or repo is missing, or the disk, network, permissions or packages fail.

    Attributes:
        reason: the message without the remedy, for a message with another remedy.
    """

    status = 3

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason} {remedy}".rstrip())
        self.reason = reason


def mark_resumable(error: BaseException) -> None:
    """Mark an error after which `--resume` continues the merge from the finished shards."""
    error.__dict__["resumable"] = True


def is_resumable(error: BaseException) -> bool:
    """Return whether a merge that failed with this error can be continued with `--resume`."""
    return error.__dict__.get("resumable") is True
