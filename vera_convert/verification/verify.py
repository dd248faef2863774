"""verify: compare a conversion with the adapter that it was made from.

    another form ──► tensors, config, A and B in effect
    merged model ──► every tensor, by the formula ──► the whole model, against our own layer
    LoRA ──► every layer, by thin matrices ──► the whole model through PEFT

Nothing is written. Each difference is a finding of the result.
"""

from __future__ import annotations

import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from vera_convert.arguments import Progress, instance, optional, place, progress_function
from vera_convert.base.facts import BaseOptions, base_options_of
from vera_convert.conversion.projections import ProjectionSource
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
    LORA_MODEL_DIFFERS,
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
from vera_convert.verification.lora import LoraCheck, check_lora
from vera_convert.verification.merged import MergedCheck, check_merged
from vera_convert.verification.model_comparison import (
    ModelComparison,
    ModelJob,
    QuantizedComparison,
)
from vera_convert.verification.options import VerifyOptions, settle
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
    access, base = hub_access_of(access), base_options_of(base)
    other, merged = optional(place, "other", other), optional(place, "merged", merged)
    lora = optional(place, "lora", lora)
    progress = progress_function("progress", progress)
    _check_asked(options, other, merged, lora)
    models = _Models(options, base, progress_function("runs", runs))
    given = AdapterSpec(adapter, options.weight, revision)
    form, check, of_lora, model = None, None, None, None
    with signals_raise():
        if other is not None:
            form = check_form(given, other, base, options, access=access)
        if lora is not None:
            of_lora = models.run_lora(check_lora(given, lora, base, options, access=access))
        if merged is not None:
            check = check_merged(given, merged, base, options, access=access, progress=progress)
            model = models.run_merged(check)
    done = [each for each in (form, of_lora, check) if each is not None]
    findings = [finding for each in done for finding in each.findings]
    findings += models.findings
    findings.sort(key=lambda each: each.severity is not Severity.ERROR)
    return Verification(
        printable(str(adapter)),
        form,
        check,
        of_lora,
        model,
        models.not_run,
        time.monotonic() - started,
        tuple(dict.fromkeys(findings)),
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


class _Models:
    """Run whole models if asked to, and collect the findings and the reason of a failed run."""

    def __init__(self, options: VerifyOptions, base: BaseOptions, progress: Progress) -> None:
        self._options = options
        self._base = base
        self._progress = progress
        text = options.text
        self._lines = None if text is None else text_lines(text, options.samples_to_run)
        self.findings: list[Finding] = []
        self.not_run: SurroundingsError | None = None

    def run_merged(self, check: MergedCheck) -> ModelComparison | None:
        """Run a merged model whose weights are right, and the base with its adapters."""
        if self._options.layers_only or not _passed(check.findings):
            return None
        job = _merged_job(check, self._options, self._lines)
        quantizer = _quantizer(check) if check.settings.dequantize else ""
        job = replace(job, quantizer=quantizer if quantizer in _QUANTIZERS else "")
        model = self._run(check.tensors.nbytes, job)
        if model is not None and quantizer and not job.quantizer:
            model = replace(model, quantized=QuantizedComparison(not_compared=quantizer))
        if model is not None and not model.passed:
            self.findings.append(_rule(check, model).at(check.label, model.reason))
        if model is not None and model.quantized is not None and not model.quantized.passed:
            found = model.quantized
            reason = (
                "The merged model differs from the quantized base with the adapter in PEFT by "
                f"{found.difference:.1e} (RMS; limit {found.threshold:.1e}: computing in "
                f"{found.dtype})."
            )
            self.findings.append(MODEL_DIFFERS.at(check.label, reason))
        return model

    def run_lora(self, check: LoraCheck) -> LoraCheck:
        """Run a LoRA whose factors are right in PEFT, and the base with its adapter."""
        folders = check.run
        if isinstance(folders, str):
            return check
        if not _passed(check.findings):
            return replace(check, run="fix the errors below first")
        job = ModelJob(
            adapters=((folders.adapter, 1.0),),
            base=folders.base,
            found=folders.lora,
            samples=self._options.samples_to_run,
            lines=self._lines,
            settings=settle(self._options, self._base, None),
            is_lora=True,
        )
        model = self._run(folders.weights, job)
        if model is not None and model.conclusive and not model.passed:
            self.findings.append(LORA_MODEL_DIFFERS.at(check.label, model.reason))
        return replace(check, model=model, run=str(self.not_run) if model is None else folders)

    def _run(self, weights: int, job: ModelJob) -> ModelComparison | None:
        """Run the models of a job; None, with a reason, if the models could not be run."""
        try:
            return run_models(job, weights=weights, progress=self._progress)
        except UsageError:
            raise
        except VeraConvertError as error:  # the comparison of the weights stays valid
            self.not_run = SurroundingsError(str(error))
            return None


_QUANTIZERS = ("bitsandbytes", "compressed-tensors", "torchao")
"""The methods whose packages, of the same names, run on a CPU."""


def _quantizer(check: MergedCheck) -> str:
    """Return the package that runs the quantized base, or the reason why no package does."""
    package, adapters, settings = check.quantizer, check.adapters, check.settings
    if package not in _QUANTIZERS:
        return f"the kernels of {printable(package) or 'this method'} are not run"
    missing = [name for name in (package, "peft") if find_spec(name.replace("-", "_")) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    if len(adapters) != 1 or adapters[0].weight != 1:
        return "PEFT loads a single adapter of weight 1"
    auto = settings.projections is ProjectionSource.AUTO and settings.generator is None
    if not auto or settings.base_dtype is not None or settings.tied is not None:
        return "the options of the merge differ from PEFT's loading"
    return package


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


def _merged_job(
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
        found=check.folder,
        samples=options.samples_to_run,
        lines=lines,
        settings=settings,
        wider=check.tensors.wider,
    )
