"""verify: compare a conversion with the adapter that it was made from.

    another form ──► tensors, config, A and B in effect
    merged model ──► every tensor, by the formula ──► the whole model, against our own layer

Nothing is written. Each difference is a finding of the result.
"""

from __future__ import annotations

import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from vera_convert.arguments import Progress, instance, optional, place, progress_function
from vera_convert.base.facts import BaseOptions, base_options_of
from vera_convert.draws.generator import Rounding, rounding_on_base
from vera_convert.dtypes import BASE_NAMES
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
from vera_convert.rules import (
    MERGED_IS_ADAPTER,
    MODEL_DIFFERS,
    MODEL_SHOWS_LITTLE,
    MODEL_SHOWS_NOTHING,
    Finding,
    Rule,
    Severity,
)
from vera_convert.text import printable
from vera_convert.verification.forms import check_form
from vera_convert.verification.lora import check_lora
from vera_convert.verification.merged import MergedCheck, check_merged
from vera_convert.verification.model_comparison import ModelComparison, ModelJob
from vera_convert.verification.options import VerifyOptions
from vera_convert.verification.result import Verification
from vera_convert.verification.running import run_models
from vera_convert.verification.sample_text import text_lines


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
        base: the base, and how to read it; None for the base that the adapter's config names.
        other: the adapter after strip, embed or migrate.
        merged: the model that the adapter was merged into.
        lora: the LoRA that was made of the adapter.
        options: how to verify.
        revision: the adapter's branch, tag or commit on the Hub.
        access: how the Hub is reached.
        progress: called with the bytes of the merged model compared so far, and with their total.
        runs: called with the samples run so far, over all models, and with their total.

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
    access = hub_access_of(access)
    other, merged = optional(place, "other", other), optional(place, "merged", merged)
    base, progress = base_options_of(base), progress_function("progress", progress)
    runs = progress_function("runs", runs)
    lora, lines = optional(place, "lora", lora), None
    if all(each is None for each in (other, merged, lora)):
        raise UsageError("nothing to verify: give --adapter OTHER, --merged MODEL or --lora LORA.")
    if merged is None:
        options.refuse_merge_options()
    elif not options.layers_only:
        _refuse_adapter(merged)
        _require_torch()
        lines = None if options.text is None else text_lines(options.text, options.samples_to_run)
    given = AdapterSpec(adapter, options.weight, revision)
    form, check, model, not_run, of_lora = None, None, None, None, None
    with signals_raise():
        if other is not None:
            form = check_form(given, other, base, options, access=access)
        if lora is not None:
            of_lora = check_lora(given, lora, base, options, access=access)
        if merged is not None:
            check = check_merged(given, merged, base, options, access=access, progress=progress)
            if not options.layers_only and _passed(check.findings):
                model, not_run = _run(check, options, lines, runs)
    done = [each for each in (form, of_lora, check) if each is not None]
    findings = [finding for each in done for finding in each.findings]
    if check is not None and model is not None and not model.passed:
        findings.append(_rule(check, model).at(check.label, model.reason))
    findings.sort(key=lambda each: each.severity is not Severity.ERROR)
    return Verification(
        printable(str(adapter)),
        form,
        check,
        of_lora,
        model,
        not_run,
        time.monotonic() - started,
        tuple(dict.fromkeys(findings)),
    )


def _run(
    check: MergedCheck, options: VerifyOptions, lines: tuple[str, ...] | None, runs: Progress
) -> tuple[ModelComparison | None, SurroundingsError | None]:
    """Run the models; return their comparison, or the reason why they could not be run."""
    try:
        job = _model_job(check, options, lines)
        return run_models(job, weights=check.tensors.nbytes, progress=runs), None
    except UsageError:
        raise
    except VeraConvertError as error:  # the comparison of the weights stays valid
        return None, SurroundingsError(str(error))


def _rule(check: MergedCheck, model: ModelComparison) -> Rule:
    """Return the rule that a failed or inconclusive run breaks.

    An inconclusive run must not fail weights that are correct and changed.
    """
    if model.conclusive:
        return MODEL_DIFFERS
    return MODEL_SHOWS_LITTLE if check.tensors.moved else MODEL_SHOWS_NOTHING


def _passed(findings: tuple[Finding, ...]) -> bool:
    return all(finding.severity is not Severity.ERROR for finding in findings)


def _refuse_adapter(merged: str) -> None:
    """Raise `CheckpointError` if a folder that must be a merged model is an adapter."""
    folder = Path(merged)
    if (folder / CONFIG_NAME).is_file() and not (folder / "config.json").is_file():
        reason = "there is adapter_config.json and no model."
        error = CheckpointError(MERGED_IS_ADAPTER.at(printable(merged), reason))
        error.of_merged = True
        raise error


def _require_torch() -> None:
    """Raise `SurroundingsError` if models cannot be run, before any slow work."""
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise SurroundingsError(
            f"running a whole model needs {' and '.join(missing)}. Install with: "
            "pip install 'vera-convert[torch]', or compare the weights alone with --layers-only."
        )


_DTYPE_OF_ROUNDING = {Rounding.NONE: "float32"} | {
    rounding_on_base(name): name for name in BASE_NAMES if name != "float64"
}


def _model_job(
    check: MergedCheck, options: VerifyOptions, lines: tuple[str, ...] | None
) -> ModelJob:
    settings = check.settings
    draw = check.adapters[0].draw
    if settings.dequantize and settings.base_dtype is None and draw is not None:
        # The base is run dequantized, where PEFT would round A and B otherwise.
        settings = replace(settings, base_dtype=_DTYPE_OF_ROUNDING.get(draw.rounding))
    return ModelJob(
        adapters=tuple((adapter.folder, adapter.weight) for adapter in check.adapters),
        base=check.base_folder,
        merged=check.folder,
        samples=options.samples_to_run,
        lines=lines,
        settings=settings,
        wider=check.tensors.wider,
    )
