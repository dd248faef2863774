"""Write a verification's result as text for people."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from vera_convert.formats.shared import origin_text, table
from vera_convert.text import and_more, counted, printable
from vera_convert.verification.comparator import LIMIT
from vera_convert.verification.expected import Kind
from vera_convert.verification.forms import FormCheck
from vera_convert.verification.lora import LoraCheck
from vera_convert.verification.merged import MergedCheck
from vera_convert.verification.model_comparison import ModelComparison, QuantizedComparison
from vera_convert.verification.result import Verification
from vera_convert.verification.tensors import MergedTensors, TensorCheck

_MOST_LISTED = 12
_MOST_OTHERS = 5

Rows = list[list[str]]


def verification_text(result: Verification) -> str:
    """Return a verification's result as text for people."""
    rows: Rows = []
    if result.merged is None or result.form is not None or result.lora is not None:
        rows.append(["adapter", result.adapter])
    if result.form is not None:
        rows += _form_rows(result.form)
    if result.lora is not None:
        rows += _lora_rows(result.lora)
    if result.merged is not None:
        rows += _merged_rows(result.merged)
    if result.model is not None:
        rows += _model_rows(result.model, _MERGED_WORDS)
    elif result.merged is not None:
        rows.append(["model", _why_not_run(result.merged)])
    if result.model is not None or result.not_run is not None:
        rows.append(["total time", f"{result.seconds:.1f} s"])
    rows.append(["result", _verdict(result)])
    return "\n".join([table(rows), *_error_lines(result)])


def _why_not_run(check: MergedCheck | LoraCheck) -> str:
    return f"NOT RUN: {check.failure}" if check.failure is not None else f"not run: {check.run}"


def _verdict(result: Verification) -> str:
    if not result.wrong:
        return "verified" if result.passed else "weights verified; the model was NOT RUN"
    tensors = len(result.merged.tensors.worst_first) if result.merged is not None else 0
    others = result.wrong - tensors
    said = [f"{counted(tensors, 'tensor')} differ{'s' if tensors == 1 else ''}"] if tensors else []
    said += [counted(others, "other error" if tensors else "error")] if others else []
    return f"FAILED: {', '.join(said)}"


def _form_rows(form: FormCheck) -> Rows:
    origins = [origin_text(origin) for origin in form.origins]
    rows = [
        ["other form", form.label],
        ["trained", f"{counted(form.tensors, 'tensor')} compared byte for byte"],
        ["A and B", f"adapter: {origins[0]}; other form: {origins[1]}"],
    ]
    for effect in form.effects:
        here = "same" if effect.same else f"DIFFERENT: {effect.difference}"
        in_peft = "same" if effect.same_in_peft else "different"
        rows.append([f"  {effect.dtype} base", f"{here}; in PEFT 0.21 and later: {in_peft}"])
    return rows


def _lora_rows(check: LoraCheck) -> Rows:
    right, count = sum(layer.passed for layer in check.layers), len(check.layers)
    rows = [
        ["LoRA", check.label],
        ["  A and B", origin_text(check.origin)],
        [
            "  layers",
            f"{right:,} of {counted(count, 'layer')} have the adapter's delta",
        ],
    ]
    if check.worst is not None:
        worst = check.worst
        error = f"{worst.error:.2g} of the delta (limit {worst.limit:.2g})"
        rows.append(["  largest error", f"{error}, in {printable(worst.module)}"])
    if check.zeros:
        rows.append(
            ["  zeros", f"{counted(check.zeros, 'layer')} of the LoRA alone, without effect"]
        )
    if check.trained_whole:
        compared = f"{counted(check.trained_whole, 'tensor')} compared, byte for byte"
        rows.append(["  modules_to_save", compared])
    if check.model is not None:
        return [*rows, *_model_rows(check.model, _LORA_WORDS)]
    return [*rows, ["model", _why_not_run(check)]]


# --- a merged model ------------------------------------------------------------------------------


def _merged_rows(check: MergedCheck) -> Rows:
    same = ", THE SAME FOLDER AS THE MERGED MODEL" if check.is_base else ""
    rows = [["merged", check.label], ["base", check.base + same]]
    for adapter in check.adapters:
        weight = "" if adapter.weight == 1 else f", weight {adapter.weight:g}"
        layers = f"{counted(adapter.layers, 'layer')} of rank {adapter.rank}{weight}"
        is_plain = adapter.strategy == "names as they are"
        rows += [
            ["adapter", f"{adapter.label}, {layers}"],
            ["  layer names", "same as in the base" if is_plain else adapter.strategy],
            ["  A and B", origin_text(adapter.origin)],
        ]
    rows.append(["options", _settings_text(check)])
    rows += _tensor_rows(check.tensors.checks)
    size, jobs = check.tensors.nbytes, check.tensors.jobs
    rows.append(["time", f"{check.seconds:.1f} s for {size:,} bytes, {counted(jobs, 'thread')}"])
    return rows


def _settings_text(check: MergedCheck) -> str:
    """Return the options of the merge, and the source of each."""
    settings = check.settings
    values = {
        "projections": settings.projections if settings.projections != "auto" else None,
        "generator": settings.generator,
        "base_dtype": settings.base_dtype,
        "dtype": settings.dtype,
        "tied": settings.tied,
    }
    said = {
        name: f"{name.replace('_', ' ')} {value}"
        for name, value in values.items()
        if value is not None
    }
    if settings.key_map:
        renames = ", ".join(printable(f"{old}={new}") for old, new in settings.key_map)
        said["key_map"] = f"key map {renames}"
    if settings.dequantize:
        said["dequantize"] = "dequantized"
    weights = [f"{adapter.weight:g}" for adapter in check.adapters]
    if "weight" in settings.given or weights != ["1"]:
        said["weight"] = f"weight {' and '.join(weights)}"
    given = [text for name, text in said.items() if name in settings.given]
    others = [text for name, text in said.items() if name not in settings.given]
    source = "recorded by the merge" if settings.recorded else "the merge recorded none"
    groups = [f"{', '.join(given)} (given)"] if given else []
    if others or not given:
        groups.append(f"{', '.join(others) or 'defaults'} ({source})")
    return "; ".join(groups)


def _tensor_rows(checks: Sequence[TensorCheck]) -> Rows:
    added = [check for check in checks if check.kind is Kind.ADDED]
    rows = []
    if added:
        values = sum(check.comparison.values for check in added)
        off = sum(check.comparison.off for check in added)
        ulps = max(check.comparison.ulps for check in added)
        excess = max(check.comparison.excess for check in added)
        rows += [
            ["with a delta", f"{_verified(added)}, {values:,} values"],
            ["  rounding", _rounding_text(off, values, ulps)],
            ["  largest error", f"{excess:.3g} ULP (limit {LIMIT:g}) before rounding"],
        ]
    for kind, words in _IN_WORDS.items():
        alike = [check for check in checks if check.kind is kind]
        rows += [[words, _verified(alike)]] if alike else []
    return rows


def _rounding_text(off: int, values: int, ulps: float) -> str:
    if not off:
        return "bit-equal to our own merge"
    share = f"{off / values:.2%}" if off * 10_000 >= values else "less than 0.01%"
    return f"{share} of values differ from our own merge, by up to {ulps:.3g} ULP"


def _error_lines(result: Verification) -> Iterator[str]:
    """Yield a line for each error that is no tensor's, then for each wrong tensor, worst first."""
    tensors = result.merged.tensors if result.merged is not None else None
    wrong = tensors.worst_first if tensors is not None else []
    of_tensors = {check.finding() for check in wrong}
    others = [each for each in result.errors if each not in of_tensors][:_MOST_OTHERS]
    for finding in others:
        yield f"WRONG {finding.code} {finding.place}: {finding.reason}"
    more = result.wrong - len(wrong) - len(others)
    if more:
        yield and_more(more, "error").lstrip()
    if tensors is not None:
        yield from _wrong_lines(tensors)


def _wrong_lines(tensors: MergedTensors) -> Iterator[str]:
    """Yield a line for each wrong tensor, and a single line for tensors with the same cause."""
    wrong = tensors.worst_first
    added = sum(check.kind is Kind.ADDED for check in tensors.checks)
    alike = Counter(check.cause for check in wrong if check.cause)
    shown, done = 0, set[str]()
    for check in wrong:
        count = alike[check.cause]
        if check.cause in done:
            continue
        if shown == _MOST_LISTED:
            rest = [each for each in wrong[wrong.index(check) :] if each.cause not in done]
            yield and_more(len(rest), "tensor").lstrip()
            return
        shown += 1
        if count > 1:
            done.add(check.cause)
            said = f"{check.cause} The worst is {printable(check.name)}."
            yield f"WRONG {count:,} of {counted(added, 'layer')}: {said}"
            continue
        found = check.comparison
        said = f"{found.wrong:,} of {counted(found.values, 'value')} differ. {check.cause}"
        yield f"WRONG {printable(check.name)}: {said.rstrip()}"


_IN_WORDS = {
    Kind.SAME: "same as base",
    Kind.CONVERTED: "other dtype",
    Kind.REPLACED: "modules_to_save",
    Kind.NEW: "new",
}


def _verified(checks: Sequence[TensorCheck]) -> str:
    passed = sum(check.passed for check in checks)
    return f"{passed:,} of {counted(len(checks), 'tensor')} verified"


_MERGED_WORDS = ("with the adapter", "re-merged", "rounding to {}")
_LORA_WORDS = ("with the adapter", "without PEFT", "the LoRA's own error")
"""The names of the two comparisons, and the cause that allows the first to differ."""


def _model_rows(model: ModelComparison, words: tuple[str, str, str]) -> Rows:
    ran = f"{counted(model.samples, 'sample')}, {counted(model.tokens, 'position')}"
    rows = [["model", f"{printable(model.model_class)} in {model.dtype}, {ran}"]]
    if math.isinf(model.largest_difference):
        return [*rows, ["  logits", "NaN or infinite: not comparable"], *_reason_row(model)]
    results = "logits" if model.kl is not None else "hidden states"
    with_adapter, again, cause = words
    rounding = f"limit {model.threshold_difference:.3g}: {cause.format(model.dtype)}"
    order = f"limit {model.threshold_remerged:.3g}: order of summation"
    rows.append(["  effect", f"adapter changes {results} by up to {model.effect:.3g}"])
    compared = with_adapter if model.wrapped else "unrounded merge"
    rows.append([f"  {compared}", _difference_text(model.largest_difference, rounding)])
    if not model.wrapped:
        rows.append(["", "the adapter's unmerged result differs from any merge: not compared"])
    rows.append([f"  {again}", _difference_text(model.remerged_difference, order)])
    if model.kl is not None and model.threshold_kl is not None:
        rows.append(["  KL divergence", f"{model.kl:.3g} nats (limit {model.threshold_kl:.3g})"])
    if model.top1 is not None and model.threshold_top1 is not None:
        rows.append(["  same top token", f"{model.top1:.2%} (limit {model.threshold_top1:.2%})"])
    if model.quantized is not None:
        rows += _quantized_rows(model.quantized)
    return [*rows, *_reason_row(model)]


def _quantized_rows(found: QuantizedComparison) -> Rows:
    if found.not_compared:
        said = f"not compared, only the dequantized base was: {printable(found.not_compared)}"
        return [["  quantized base", said]]
    difference = f"RMS difference {found.difference:.3g}"
    limit = f"limit {found.threshold:.3g}: computing in {found.dtype}"
    effect = f"adapter's effect {found.effect:.3g}"
    hidden = ", which the limit hides" if found.effect <= found.threshold else ""
    return [
        ["  quantized base", f"run by {found.libraries}"],
        ["", f"{difference} ({limit}; {effect}{hidden})"],
    ]


def _difference_text(difference: float, limit: str) -> str:
    return f"largest difference {difference:.3g} ({limit})"


def _reason_row(model: ModelComparison) -> Rows:
    if model.passed:
        return []
    return [["  failed" if model.conclusive else "  inconclusive", model.reason]]
