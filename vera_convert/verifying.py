"""verify: a conversion held against the adapter that it was made of.

    another form ──► tensors, config, A and B in effect
    merged model ──► every tensor, by the formula ──► the whole model, against our own layer

Nothing is written. What differs is a finding; the result has all of them.
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path

from vera_convert.arguments import function, instance, optional, place
from vera_convert.base.facts import BaseOptions, base_options_of
from vera_convert.errors import SurroundingsError, UsageError, VeraConvertError
from vera_convert.hub.lookup import HubAccess
from vera_convert.merging.adapters import AdapterSpec
from vera_convert.publish.signals import signals_raise
from vera_convert.rules import (
    MODEL_DIFFERS,
    MODEL_SHOWS_LITTLE,
    MODEL_SHOWS_NOTHING,
    Finding,
    Rule,
    Severity,
)
from vera_convert.text import printable
from vera_convert.verification.forms import check_form
from vera_convert.verification.merged import MergedCheck, check_merged
from vera_convert.verification.model_comparison import ModelComparison, ModelJob
from vera_convert.verification.options import SAMPLES, VerifyOptions
from vera_convert.verification.result import Verification
from vera_convert.verification.running import run_models
from vera_convert.verification.tensors import Progress


def verify(
    adapter: str | Path,
    *,
    base: BaseOptions | str | Path | None = None,
    other: str | Path | None = None,
    merged: str | Path | None = None,
    options: VerifyOptions | None = None,
    revision: str | None = None,
    access: HubAccess | None = None,
    progress: Progress = lambda _done, _of: None,
    runs: Progress = lambda _done, _of: None,
) -> Verification:
    """Hold what was made of an adapter against it: another form, a merged model, or both.

    Args:
        adapter: a folder or a repo on the Hub.
        base: what the caller says of the base; without it that of the adapter's config.
        other: the adapter stripped, embedded or migrated.
        merged: the model that it was merged into.
        options: how to verify.
        revision: the adapter's, on the Hub.
        access: how the Hub is reached.
        progress: told now and then how many bytes of the merged model have been compared.
        runs: told, if models are run, how many runs of a model on a sample are done, of how many.

    Raises:
        CheckpointError: something is malformed, or what is given does not belong together. What
            differs is no error but a finding of the result.
        UsageError: an option makes no sense, or something must be given that is not.
        SurroundingsError: a file or a repo cannot be had or changed meanwhile, or torch is needed
            and is not there. Why the whole model could not be run is `not_run` of the result.
    """
    started = time.monotonic()
    options = optional(instance, "options", VerifyOptions, options) or VerifyOptions()
    access = optional(instance, "access", HubAccess, access) or HubAccess()
    other, merged = optional(place, "other", other), optional(place, "merged", merged)
    base, progress = base_options_of(base), function("progress", progress)
    runs = function("runs", runs)
    if other is None and merged is None:
        raise UsageError("say what is to be verified: --adapter OTHER or --merged MODEL.")
    if merged is None:
        options.require_no_merge()
    elif not options.layers_only:
        _require_torch()
        _require_text(options.text)
    given = AdapterSpec(adapter, options.weight, revision)
    form, check, model, not_run = None, None, None, None
    with signals_raise():
        if other is not None:
            form = check_form(given, other, base, options, access=access)
        if merged is not None:
            check = check_merged(given, merged, base, options, access=access, progress=progress)
            if not options.layers_only and _passed(check.findings):
                try:
                    model = _run(check, options, runs)
                except VeraConvertError as error:  # what the layers came to is not lost with it
                    # Nor does it say that the merge is wrong: its weights are right.
                    not_run = SurroundingsError(str(error))
    findings = [
        *(form.findings if form is not None else ()),
        *(check.findings if check is not None else ()),
    ]
    if check is not None and model is not None and not model.passed:
        findings.append(_rule(check, model).at(check.label, model.reason))
    findings.sort(key=lambda each: each.severity is not Severity.ERROR)
    return Verification(
        printable(str(adapter)),
        form,
        check,
        model,
        not_run,
        time.monotonic() - started,
        tuple(dict.fromkeys(findings)),
    )


def _rule(check: MergedCheck, model: ModelComparison) -> Rule:
    """Return the rule that a model breaks which did not pass.

    One that can show nothing is no reason to refuse weights that are right and are not the base's.
    """
    if model.conclusive:
        return MODEL_DIFFERS
    return MODEL_SHOWS_LITTLE if check.tensors.moved else MODEL_SHOWS_NOTHING


def _passed(findings: tuple[Finding, ...]) -> bool:
    return all(finding.severity is not Severity.ERROR for finding in findings)


def _require_torch() -> None:
    """Raise `SurroundingsError` where models cannot be run, before anything else takes time."""
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise SurroundingsError(
            f"running a whole model needs {' and '.join(missing)}. Install what is missing with: "
            "pip install 'vera-convert[torch]'; or leave it at the weights with --layers-only."
        )


def _require_text(path: Path | None) -> None:
    """Raise `SurroundingsError` where the text to be run is not there, as early."""
    if path is not None and not path.is_file():
        raise SurroundingsError(f"{printable(str(path))}: there is no such file to take text from.")


def _run(check: MergedCheck, options: VerifyOptions, runs: Progress) -> ModelComparison:
    settings = check.settings
    job = ModelJob(
        adapters=tuple((adapter.folder, adapter.weight) for adapter in check.adapters),
        base=check.base_folder,
        merged=check.folder,
        samples=SAMPLES if options.samples is None else options.samples,
        text=options.text,
        dtype=settings.dtype,
        tied=settings.tied,
        projections=settings.projections,
        generator=settings.generator,
        key_map=settings.key_map,
        base_dtype=settings.base_dtype,
        wider=check.tensors.wider,
    )
    return run_models(job, weights=check.tensors.nbytes, progress=runs)
