"""verify: compare a conversion with the source adapter.

    another form ──► tensors, config, A and B in effect
    merged model ──► every tensor, by the formula ──► the whole model, against our own layer
    LoRA ──► every layer, by thin matrices ──► the whole model through PEFT

Nothing is written. Each difference is a finding of the result.
"""

from __future__ import annotations

import codecs
import os
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

from vera_convert import rules
from vera_convert.arguments import Progress, instance, optional, place, progress_function
from vera_convert.base.facts import BaseOptions, base_options_of
from vera_convert.errors import CheckpointError, SurroundingsError, UsageError, VeraConvertError
from vera_convert.files.file_names import CONFIG_NAME
from vera_convert.files.reading import open_local
from vera_convert.hub.lookup import HubAccess, hub_access_of
from vera_convert.merging.adapters import AdapterSpec
from vera_convert.publish.signals import signals_raise
from vera_convert.rules import Finding, Severity, errors_of
from vera_convert.text import printable, short_repr
from vera_convert.verification.forms import FormCheck, check_form
from vera_convert.verification.lora import LoraCheck, check_lora
from vera_convert.verification.merged import MergedCheck, check_merged
from vera_convert.verification.model_comparison import ModelComparison, missing_packages
from vera_convert.verification.options import VerifyOptions
from vera_convert.verification.running import run_models


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
        """How many errors there are."""
        return len(self.errors)

    @property
    def passed(self) -> bool:
        """Whether every comparison was made, and none found an error."""
        return not self.errors and self.not_run is None


Check = TypeVar("Check", MergedCheck, LoraCheck)


def verify(
    adapter: str | Path,
    *,
    base: BaseOptions | str | Path | None = None,
    other: str | Path | None = None,
    merged: str | Path | None = None,
    lora: str | Path | None = None,
    options: VerifyOptions | None = None,
    revision: str | None = None,
    access: HubAccess | None = None,
    progress: Progress | None = None,
    runs: Progress | None = None,
) -> Verification:
    """Compare another form of an adapter, a merged model or a LoRA with the adapter.

    Args:
        adapter: a folder or a repo on the Hub.
        base: the options for the base; None for the base in the adapter's config.
        other: the adapter after strip, embed or migrate.
        merged: the merged model.
        lora: the LoRA of the adapter.
        options: how to verify.
        revision: the adapter's branch, tag or commit on the Hub.
        access: how the Hub is reached.
        progress: called with the compared bytes of the merged model, and with the total.
        runs: called with the samples run on all models so far, and with the total.

    Raises:
        CheckpointError: a file is malformed, or the arguments do not belong together. A difference
            raises nothing: differences are findings of the result.
        UsageError: an option makes no sense, an option is missing, or the models cannot use the
            given text.
        SurroundingsError: a file or a repo is missing, unreadable or changed meanwhile, or torch
            is needed and not installed. If the models could not be run, `not_run` of the result
            holds the reason.

    Example:
        >>> from vera_convert import VerifyOptions, merge
        >>> _ = merge("adapter", "merged", base="base")
        >>> options = VerifyOptions(layers_only=True)
        >>> verify("adapter", merged="merged", base="base", options=options).passed
        True
    """
    started = time.monotonic()
    options = optional(instance, "options", VerifyOptions, options) or VerifyOptions()
    access, base = hub_access_of(access), base_options_of(base)
    other, merged = optional(place, "other", other), optional(place, "merged", merged)
    lora = optional(place, "lora", lora)
    progress, runs = progress_function("progress", progress), progress_function("runs", runs)
    _check_asked(options, other, merged, lora)
    lines = None if options.text is None else text_lines(options.text, options.samples_to_run)
    given = AdapterSpec(adapter, options.weight, revision)
    form, of_merged, of_lora = None, None, None
    with signals_raise():
        if other is not None:
            form = check_form(given, other, base, options, access=access)
        if lora is not None:
            check = check_lora(given, lora, base, options, access=access)
            of_lora = _with_models(check, options, lines, runs)
        if merged is not None:
            found = check_merged(given, merged, base, options, access=access, progress=progress)
            of_merged = _with_models(found, options, lines, runs)
    done = [each for each in (form, of_lora, of_merged) if each is not None]
    findings = dict.fromkeys(finding for each in done for finding in each.findings)
    return Verification(
        printable(str(adapter)),
        form,
        of_merged,
        of_lora,
        time.monotonic() - started,
        tuple(sorted(findings, key=lambda each: each.severity is not Severity.ERROR)),
    )


def _check_asked(
    options: VerifyOptions, other: str | None, merged: str | None, lora: str | None
) -> None:
    """Raise an error if nothing is to be compared, or an option belongs to another comparison."""
    if other is None and merged is None and lora is None:
        raise UsageError("nothing to verify: give --adapter OTHER, --merged MODEL or --lora LORA.")
    options.refuse_unused(merged=merged is not None, lora=lora is not None)
    if merged is not None and not options.layers_only:
        _refuse_adapter(merged)
        _require_torch()


def _with_models(
    check: Check, options: VerifyOptions, lines: tuple[str, ...] | None, progress: Progress
) -> Check:
    """Run the models of a check whose files are right; return the check with the result.

    Args:
        check: the comparison of the files, with the models to run.
        options: how to verify.
        lines: the text to run; None for token ids, or images, drawn at random.
        progress: called with the samples run on all models so far, and with the total.

    Returns:
        The check with the result of the run, or with the reason why nothing ran.
    """
    if isinstance(check.run, str):
        return check
    if errors_of(check.findings):
        return replace(check, run="fix the errors below first")
    job = replace(check.run, samples=options.samples_to_run, lines=lines)
    try:
        return check.with_model(run_models(job, progress=progress))
    except UsageError:
        raise
    except VeraConvertError as error:  # the comparison of the weights stays valid
        return replace(check, run=str(error), failure=SurroundingsError(str(error)))


def _holds(folder: str, name: str) -> bool:
    return os.path.isfile(os.path.join(folder, name))  # noqa: PTH113, PTH118 -- Path's own can raise


def _refuse_adapter(merged: str) -> None:
    """Raise `CheckpointError` if a folder that must be a merged model is an adapter."""
    if _holds(merged, CONFIG_NAME) and not _holds(merged, "config.json"):
        reason = "there is adapter_config.json and no model."
        error = CheckpointError(rules.MERGED_IS_ADAPTER.at(printable(merged), reason))
        error.validate_shows_all = False
        raise error


def _require_torch() -> None:
    """Raise `SurroundingsError` if models cannot be run, before any slow work."""
    missing = missing_packages("torch", "transformers")
    if missing:
        raise SurroundingsError(
            f"running a whole model needs {missing}. Install with "
            "`pip install 'vera-convert[torch]'`, or compare the weights alone with --layers-only."
        )


# --- the text to run ------------------------------------------------------------------------------


_MOST_BYTES = 1 << 20
_MOST_LETTERS = 4096
"""How many bytes of the file, and how many letters of each line, are read."""


def text_lines(path: Path, count: int) -> tuple[str, ...]:
    """Return the first lines of a UTF-8 text that are not empty.

    Args:
        path: the text. Long lines and long files are cut.
        count: how many lines to return at most.

    Raises:
        UsageError: the file is not UTF-8, or has no line with text.
        SurroundingsError: the file is missing or cannot be read.
    """
    shown = printable(str(path))
    if path.is_dir():
        raise UsageError(f"--text {shown} is a folder: give a text file.")
    if not path.is_file():
        raise SurroundingsError(f"--text {shown}: there is no such file.")
    with open_local(path) as file:
        raw = file.read_at(0, min(file.size, _MOST_BYTES))
        is_complete = file.size <= _MOST_BYTES
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(raw, final=is_complete)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--text {shown} is not UTF-8: {error.reason} at byte {error.start}."
        ) from error
    stripped = (line.strip()[:_MOST_LETTERS] for line in text.splitlines())
    lines = tuple(islice((line for line in stripped if line), count))
    if not lines:
        raise UsageError(f"--text {shown} has no line with text.")
    return lines
