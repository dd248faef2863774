"""verify: compare a conversion with the source adapter.

    another form ──► tensors, config, A and B in effect
    merged model ──► every tensor, by the formula ──► the whole model, against our own layer
    LoRA ──► every layer, by thin matrices ──► the whole model through PEFT

Nothing is written. Each difference is a finding of the result.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from vera_convert import rules
from vera_convert.arguments import Progress, instance, optional, place, progress_function
from vera_convert.base.facts import BaseOptions, base_options_of
from vera_convert.errors import (
    CheckpointError,
    SurroundingsError,
    UsageError,
    VeraConvertError,
)
from vera_convert.files.file_names import CONFIG_NAME
from vera_convert.hub.lookup import HubAccess, hub_access_of
from vera_convert.merging.adapters import AdapterSpec
from vera_convert.publish.signals import signals_raise
from vera_convert.rules import Severity, errors_of
from vera_convert.text import printable
from vera_convert.verification.forms import check_form
from vera_convert.verification.lora import LoraCheck, check_lora
from vera_convert.verification.merged import MergedCheck, check_merged
from vera_convert.verification.model_comparison import missing_packages
from vera_convert.verification.options import VerifyOptions
from vera_convert.verification.result import Verification
from vera_convert.verification.running import run_models
from vera_convert.verification.sample_text import text_lines

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
    progress = progress_function("progress", progress)
    _check_asked(options, other, merged, lora)
    run = _Run(options, progress_function("runs", runs))
    given = AdapterSpec(adapter, options.weight, revision)
    form, of_merged, of_lora = None, None, None
    with signals_raise():
        if other is not None:
            form = check_form(given, other, base, options, access=access)
        if lora is not None:
            of_lora = run.models_of(check_lora(given, lora, base, options, access=access))
        if merged is not None:
            check = check_merged(given, merged, base, options, access=access, progress=progress)
            of_merged = run.models_of(check)
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


class _Run:
    """Run the models of a check, if its files are right."""

    def __init__(self, options: VerifyOptions, progress: Progress) -> None:
        self._samples = options.samples_to_run
        self._lines = None if options.text is None else text_lines(options.text, self._samples)
        self._progress = progress

    def models_of(self, check: Check) -> Check:
        """Return the check with the result of the run, or with the reason why nothing ran."""
        if isinstance(check.run, str):
            return check
        if errors_of(check.findings):
            return replace(check, run="fix the errors below first")
        job = replace(check.run, samples=self._samples, lines=self._lines)
        try:
            return check.with_model(run_models(job, progress=self._progress))
        except UsageError:
            raise
        except VeraConvertError as error:  # the comparison of the weights stays valid
            return replace(check, run=str(error), failure=SurroundingsError(str(error)))


def _refuse_adapter(merged: str) -> None:
    """Raise `CheckpointError` if a folder that must be a merged model is an adapter."""
    folder = Path(merged)
    if (folder / CONFIG_NAME).is_file() and not (folder / "config.json").is_file():
        reason = "there is adapter_config.json and no model."
        error = CheckpointError(rules.MERGED_IS_ADAPTER.at(printable(merged), reason))
        error.validate_shows_all = False
        raise error


def _require_torch() -> None:
    """Raise `SurroundingsError` if models cannot be run, before any slow work."""
    missing = missing_packages("torch", "transformers")
    if missing:
        raise SurroundingsError(
            f"running a whole model needs {missing}. Install with: "
            "pip install 'vera-convert[torch]', or compare the weights alone with --layers-only."
        )
