"""Write a verification's result as text for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from vera_convert import rules
from vera_convert.formats.merge import adapter_rows
from vera_convert.formats.shared import Row, labelled, origin_text
from vera_convert.merging.changes import Kind
from vera_convert.rules import alike
from vera_convert.text import and_more, counted, printable
from vera_convert.verification.comparator import LIMIT
from vera_convert.verification.forms import FormCheck, FormEffect
from vera_convert.verification.lora import LoraCheck
from vera_convert.verification.merged import MergedCheck
from vera_convert.verification.model_comparison import ModelComparison, QuantizedComparison
from vera_convert.verification.tensors import MergedTensors, TensorCheck
from vera_convert.verification.verify import Verification

_MOST_LISTED = 12
_MOST_OTHERS = 5


def verification_text(result: Verification) -> str:
    """Return a verification's result as text for people."""
    is_merge_alone = result.form is None and result.lora is None
    has_run = result.model is not None or result.not_run is not None
    rows: list[Row] = [
        ("adapter", None if is_merge_alone else result.adapter),
        *([] if result.form is None else _form_rows(result.form)),
        *([] if result.lora is None else _lora_rows(result.lora)),
        *([] if result.merged is None else _merged_rows(result.merged)),
        ("total time", f"{result.seconds:.1f} s" if has_run else None),
        ("result", _verdict(result)),
    ]
    return "\n".join([labelled(*rows), *_error_lines(result)])


def _verdict(result: Verification) -> str:
    if not result.wrong:
        return "verified" if result.passed else "weights verified; the model was NOT RUN"
    tensors = 0 if result.merged is None else len(result.merged.tensors.worst_first)
    others = result.wrong - tensors
    said = [f"{counted(tensors, 'tensor')} differ{'s' if tensors == 1 else ''}"] if tensors else []
    said += [counted(others, "other error" if tensors else "error")] if others else []
    return f"FAILED: {', '.join(said)}"


def _form_rows(form: FormCheck) -> list[Row]:
    ours, theirs = map(origin_text, form.origins)
    return [
        ("other form", form.label),
        ("trained", f"{counted(form.tensors, 'tensor')} compared byte for byte"),
        ("A and B", f"adapter: {ours}; other form: {theirs}"),
        *((f"  {effect.dtype} base", _effect_text(effect)) for effect in form.effects),
    ]


def _effect_text(effect: FormEffect) -> str:
    peft = "PEFT 0.21 and later"
    if effect.same:
        return "same A and B" if effect.same_in_peft else f"same A and B here, DIFFERENT in {peft}"
    in_peft = f"the same in {peft}" if effect.same_in_peft else f"different in {peft} too"
    return f"DIFFERENT A and B: {effect.difference}; {in_peft}"


def _lora_rows(check: LoraCheck) -> list[Row]:
    lacking = sum(finding.rule is rules.LORA_LAYER_LACKING for finding in check.findings)
    worst, layers = check.worst, counted(len(check.layers) + lacking, "layer")
    right = sum(layer.passed for layer in check.layers)
    rows: list[Row] = [
        ("LoRA", check.label),
        ("  A and B", origin_text(check.origin)),
        ("  layers", f"{right:,} of {layers} have the adapter's delta"),
    ]
    if worst is not None:
        error = f"{worst.error:.2g} of the delta (limit {worst.limit:.2g})"
        rows.append(("  largest error", f"{error}, in {printable(worst.module)}"))
    zeros, whole = counted(check.zeros, "layer"), counted(check.trained_whole, "tensor")
    return [
        *rows,
        ("  zeros", f"{zeros} of the LoRA alone, without effect" if check.zeros else None),
        ("  modules_to_save", f"{whole} compared byte for byte" if check.trained_whole else None),
        *_model_rows(check, again="without PEFT", cause="the LoRA's own error"),
    ]


# --- a merged model ------------------------------------------------------------------------------


def _merged_rows(check: MergedCheck) -> list[Row]:
    same = ", THE SAME FOLDER AS THE MERGED MODEL" if check.is_base else ""
    size, jobs = check.tensors.nbytes, check.tensors.jobs
    return [
        ("merged", check.label),
        ("base", check.base + same),
        *(row for adapter in check.adapters for row in adapter_rows(adapter)),
        ("options", _settings_text(check)),
        *_tensor_rows(check.tensors.checks),
        ("time", f"{check.seconds:.1f} s for {size:,} bytes, {counted(jobs, 'thread')}"),
        *_model_rows(check, again="re-merged", cause="rounding to {}"),
    ]


def _settings_text(check: MergedCheck) -> str:
    """Return the options of the merge, and the source of each."""
    settings = check.settings
    weights = [f"{adapter.weight:g}" for adapter in check.adapters]
    shown = {
        "projections": settings.projections if settings.projections != "auto" else "",
        "generator": settings.generator,
        "base_dtype": settings.base_dtype,
        "dtype": settings.dtype,
        "tied": settings.tied,
        "key_map": ", ".join(printable(f"{old}={new}") for old, new in settings.key_map),
        "weight": " and ".join(weights) if "weight" in settings.given or weights != ["1"] else "",
    }
    said = {name: f"{name.replace('_', ' ')} {value}" for name, value in shown.items() if value}
    said |= {"dequantize": "dequantized"} if settings.dequantize else {}
    given = [text for name, text in said.items() if name in settings.given]
    others = [text for name, text in said.items() if name not in settings.given]
    source = "recorded by the merge" if settings.recorded else "the merge recorded none"
    groups = [f"{', '.join(given)} (given)"] if given else []
    if others or not given:
        groups.append(f"{', '.join(others) or 'defaults'} ({source})")
    return "; ".join(groups)


def _tensor_rows(checks: Sequence[TensorCheck]) -> Iterator[Row]:
    for kind, words in _IN_WORDS.items():
        of_kind = [check for check in checks if check.kind is kind]
        if not of_kind:
            continue
        passed = sum(check.passed for check in of_kind)
        verified = f"{passed:,} of {counted(len(of_kind), 'tensor')} verified"
        if kind is not Kind.ADDED:
            yield words, verified
            continue
        values = sum(check.comparison.values for check in of_kind)
        excess = max(check.comparison.excess for check in of_kind)
        yield words, f"{verified}, {values:,} values"
        yield "  rounding", _rounding_text(of_kind, values)
        yield "  largest error", f"{excess:.3g} ULP (limit {LIMIT:g}) before rounding"


_IN_WORDS = {
    Kind.ADDED: "with a delta",
    Kind.SAME: "same as base",
    Kind.CONVERTED: "other dtype",
    Kind.REPLACED: "modules_to_save",
    Kind.NEW: "new",
}


def _rounding_text(checks: Sequence[TensorCheck], values: int) -> str:
    off = sum(check.comparison.off for check in checks)
    if not off:
        return "bit-equal to our own merge"
    share = f"{off / values:.2%}" if off * 10_000 >= values else "less than 0.01%"
    ulps = max(check.comparison.ulps for check in checks)
    return f"{share} of values differ from our own merge, by up to {ulps:.3g} ULP"


# --- errors --------------------------------------------------------------------------------------


def _error_lines(result: Verification) -> Iterator[str]:
    """Yield a line for each error that is no tensor's, then for each wrong tensor, worst first."""
    tensors = result.merged.tensors if result.merged is not None else None
    wrong = tensors.worst_first if tensors is not None else []
    of_tensors = {check.finding() for check in wrong}
    shown = alike(each for each in result.errors if each not in of_tensors)
    for first, *others in shown[:_MOST_OTHERS]:
        yield f"WRONG {first.code} {first.place}{and_more(len(others))}: {first.reason}"
    rest = sum(map(len, shown[_MOST_OTHERS:]))
    if rest:
        yield and_more(rest, "error").lstrip()
    if tensors is not None:
        yield from _wrong_lines(tensors)


def _wrong_lines(tensors: MergedTensors) -> Iterator[str]:
    """Yield a line for each wrong tensor, and a single line for tensors with the same cause."""
    added = sum(check.kind is Kind.ADDED for check in tensors.checks)
    groups: dict[str, list[TensorCheck]] = {}
    for check in tensors.worst_first:
        groups.setdefault(check.cause or check.name, []).append(check)
    shown = [*groups.values()]
    for worst, *others in shown[:_MOST_LISTED]:
        name, found = printable(worst.name), worst.comparison
        if others:
            layers = f"{1 + len(others):,} of {counted(added, 'layer')}"
            yield f"WRONG {layers}: {worst.cause} The worst is {name}."
            continue
        said = f"{found.wrong:,} of {counted(found.values, 'value')} differ. {worst.cause}"
        yield f"WRONG {name}: {said.rstrip()}"
    rest = sum(map(len, shown[_MOST_LISTED:]))
    if rest:
        yield and_more(rest, "tensor").lstrip()


# --- whole models --------------------------------------------------------------------------------


def _model_rows(check: MergedCheck | LoraCheck, *, again: str, cause: str) -> list[Row]:
    """Return the rows about the run of the models, or the reason why no model was run.

    Args:
        check: the result for the merged model, or for the LoRA.
        again: the label of the second comparison.
        cause: the cause that allows the first comparison to differ; ``{}`` stands for the dtype.
    """
    model = check.model
    if model is None:
        failed = check.failure is not None
        return [("model", f"NOT RUN: {check.failure}" if failed else f"not run: {check.run}")]
    doubt = "  failed" if model.conclusive else "  inconclusive"
    ran = f"{counted(model.samples, 'sample')}, {counted(model.tokens, 'position')}"
    return [
        ("model", f"{printable(model.model_class)} in {model.dtype}, {ran}"),
        *(
            [("  logits", "NaN or infinite: not comparable")]
            if math.isinf(model.largest_difference)
            else _difference_rows(model, again, cause.format(model.dtype))
        ),
        (doubt, None if model.passed else model.reason),
    ]


def _difference_rows(model: ModelComparison, again: str, cause: str) -> Iterator[Row]:
    def difference(value: float, limit: float, cause: str) -> str:
        return f"largest difference {value:.3g} (limit {limit:.3g}: {cause})"

    results = "logits" if model.kl is not None else "hidden states"
    yield "  effect", f"adapter changes {results} by up to {model.effect:.3g}"
    first = difference(model.largest_difference, model.threshold_difference, cause)
    if model.wrapped:
        yield "  with the adapter", first
    else:
        why = "the adapter's unmerged result differs from any merge: not compared"
        yield "  unrounded merge", [first, why]
    second = difference(model.remerged_difference, model.threshold_remerged, "order of summation")
    yield f"  {again}", second
    if model.kl is not None:
        limit = f"limit {model.threshold_kl:.3g}"
        yield "  probabilities", f"diverge by {model.kl:.3g} nats of KL divergence ({limit})"
    if model.top1 is not None:
        limit = f"limit {model.threshold_top1:.2%}"
        yield "  most likely", f"same token at {model.top1:.2%} of the positions ({limit})"
    if model.quantized is not None:
        yield "  quantized base", _quantized_lines(model.quantized)


def _quantized_lines(found: QuantizedComparison) -> list[str]:
    if found.not_compared:
        reason = printable(found.not_compared)
        return [f"not compared, only the dequantized base was: {reason}"]
    difference = f"RMS difference {found.difference:.3g}"
    limit = f"limit {found.threshold:.3g}: computing in {found.dtype}"
    effect = f"adapter's effect {found.effect:.3g}"
    hidden = ", which the limit hides" if found.effect <= found.threshold else ""
    return [f"run by {found.libraries}", f"{difference} ({limit}; {effect}{hidden})"]
