"""A verification's result as text for people and as a JSON document."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from vera_convert.files.reading import printable
from vera_convert.formats.pieces import Document, finding_document, table
from vera_convert.verification.comparison import ModelComparison
from vera_convert.verification.expected import Kind
from vera_convert.verification.forms import FormCheck
from vera_convert.verification.judging import LIMIT
from vera_convert.verification.merged import MergedCheck
from vera_convert.verification.options import MergeSettings
from vera_convert.verification.result import Verification
from vera_convert.verification.tensors import TensorCheck

_MOST_LISTED = 12

Rows = list[list[str]]


def verification_text(result: Verification) -> str:
    """What a verification came to, for people."""
    rows: Rows = [["adapter", result.adapter]]
    if result.form is not None:
        rows += _form_rows(result.form)
    if result.merged is not None:
        rows += _merged_rows(result.merged)
    if result.model is not None:
        rows += _model_rows(result.model)
    elif result.merged is not None:
        why = "left out: --layers-only" if result.passed else "not run: the weights are wrong"
        rows.append(["model", why])
    rows.append(["result", _verdict(result)])
    checks = result.merged.tensors.checks if result.merged is not None else ()
    return "\n".join([table(rows), *_wrong_lines(checks)])


def _verdict(result: Verification) -> str:
    count = len(result.errors)
    if not count:
        return "it holds"
    return f"IT DOES NOT HOLD: {count} {'things are' if count > 1 else 'thing is'} wrong"


def _form_rows(form: FormCheck) -> Rows:
    origins = [_origin(origin) for origin in form.origins]
    rows = [
        ["other form", form.label],
        ["trained", f"{form.tensors} tensors compared, byte for byte"],
        ["A and B", f"{origins[0]}, then {origins[1]}"],
    ]
    for effect in form.effects:
        here = "the same" if effect.same else f"OTHERS, {effect.difference}"
        in_peft = "the same" if effect.same_in_peft else "others"
        rows.append([f"  {effect.dtype} base", f"{here}; in PEFT 0.21 and later {in_peft}"])
    return rows


def _origin(origin: str) -> str:
    return {
        "file": "stored",
        "fingerprint": "drawn, proven by the fingerprint",
        "key": "drawn from the key",
    }[origin]


# --- a merged model ------------------------------------------------------------------------------


def _merged_rows(check: MergedCheck) -> Rows:
    rows = [["merged", check.label], ["base", check.base]]
    for adapter in check.adapters:
        weight = "" if adapter.weight == 1 else f", weight {adapter.weight:g}"
        layers = f"{adapter.layers} layers of rank {adapter.rank}{weight}"
        rows += [
            ["of", f"{adapter.label}, {layers}"],
            ["  names", adapter.strategy],
            ["  A and B", _origin(adapter.origin)],
        ]
    rows.append(["options", _settings_text(check.settings)])
    rows += _tensor_rows(check.tensors.checks)
    size, jobs = check.tensors.nbytes, check.tensors.jobs
    rows.append(["time", f"{check.seconds:.1f} s for {size:,} bytes in {jobs} threads"])
    return rows


def _settings_text(settings: MergeSettings) -> str:
    given = {
        "projections": settings.projections if settings.projections != "auto" else None,
        "generator": settings.generator,
        "base dtype": settings.base_dtype,
        "dtype": settings.dtype,
        "tied": settings.tied,
    }
    said = [f"{name} {value}" for name, value in given.items() if value is not None]
    said += [f"key map {printable(f'{old}={new}')}" for old, new in settings.key_map]
    said += ["dequantized"] if settings.dequantize else []
    where = "of its provenance" if settings.recorded else "it has no provenance"
    return f"{', '.join(said) or 'the usual ones'} ({where})"


def _tensor_rows(checks: Sequence[TensorCheck]) -> Rows:
    added = [check for check in checks if check.kind is Kind.ADDED]
    rows = []
    if added:
        values = sum(check.judgement.values for check in added)
        off = sum(check.judgement.off for check in added)
        ulps = max(check.judgement.ulps for check in added)
        excess = max(check.judgement.excess for check in added)
        rows += [
            ["with a delta", f"{_held(added)}, {values:,} values"],
            [
                "  rounding",
                f"{off / max(values, 1):.2%} of them are off, by up to {ulps:.3g} last bits",
            ],
            ["  beyond it", f"{excess:.3g} last bits of the sum (allowed {LIMIT:g})"],
        ]
    for kind, words in _IN_WORDS.items():
        alike = [check for check in checks if check.kind is kind]
        rows += [[words, _held(alike)]] if alike else []
    return rows


def _wrong_lines(checks: Sequence[TensorCheck]) -> Iterator[str]:
    """Yield a line for each tensor that is wrong, the worst first."""
    wrong = [check for check in checks if not check.passed]
    wrong.sort(key=lambda check: (-check.judgement.excess, -check.judgement.wrong))
    for check in wrong[:_MOST_LISTED]:
        found = check.judgement
        said = f"{found.wrong:,} of {found.values:,} values are wrong. {check.hint}"
        yield f"WRONG {printable(check.name)}: {said.rstrip()}"
    if len(wrong) > _MOST_LISTED:
        yield f"and {len(wrong) - _MOST_LISTED} more tensors"


_IN_WORDS = {
    Kind.SAME: "the base's own",
    Kind.CONVERTED: "of another dtype",
    Kind.REPLACED: "the adapter's",
    Kind.NEW: "new",
}


def _held(checks: Sequence[TensorCheck]) -> str:
    held = sum(check.passed for check in checks)
    return f"{held:,} of {len(checks):,} tensors are right"


def _model_rows(model: ModelComparison) -> Rows:
    ran = f"{model.samples} samples, {model.tokens:,} positions"
    wrapped = f"{model.largest_difference:.3g} (allowed {model.threshold_difference:.3g})"
    remerged = f"{model.remerged_difference:.3g} (allowed {model.threshold_remerged:.3g})"
    rows = [
        ["model", f"{printable(model.model_class)} in {model.dtype}, {ran}"],
        ["  with the adapter", f"up to {wrapped} off; it moves the base by {model.effect:.3g}"],
        ["  merged anew", f"up to {remerged} off"],
    ]
    if model.kl is not None and model.threshold_kl is not None:
        rows.append(["  KL", f"{model.kl:.3g} (allowed {model.threshold_kl:.3g})"])
    if model.top1 is not None and model.threshold_top1 is not None:
        rows.append(["  top-1", f"{model.top1:.2%} agree (at least {model.threshold_top1:.2%})"])
    return rows


# --- the document --------------------------------------------------------------------------------


def verification_document(result: Verification) -> Document:
    """What a verification came to (schema ``verification``)."""
    return {
        "format": 1,
        "command": "verify",
        "adapter": result.adapter,
        "passed": result.passed,
        "form": None if result.form is None else _form_document(result.form),
        "merged": None if result.merged is None else _merged_document(result.merged),
        "model": None if result.model is None else _model_document(result.model),
        "findings": [finding_document(finding) for finding in result.findings],
    }


def _form_document(form: FormCheck) -> Document:
    return {
        "name": form.label,
        "projections": [str(origin) for origin in form.origins],
        "tensors": form.tensors,
        "effects": [
            {
                "dtype": effect.dtype,
                "same": effect.same,
                "same_in_peft": effect.same_in_peft,
                "difference": effect.difference or None,
            }
            for effect in form.effects
        ],
    }


def _merged_document(check: MergedCheck) -> Document:
    settings, checks = check.settings, check.tensors.checks
    untouched = [c for c in checks if c.kind is Kind.SAME and c.passed]
    return {
        "name": check.label,
        "base": check.base,
        "adapters": [
            {
                "name": adapter.label,
                "weight": adapter.weight,
                "rank": adapter.rank,
                "layers": adapter.layers,
                "strategy": adapter.strategy,
                "projections": str(adapter.origin),
            }
            for adapter in check.adapters
        ],
        "options": {
            "recorded": settings.recorded,
            "projections": str(settings.projections),
            "generator": settings.generator,
            "base_dtype": settings.base_dtype,
            "key_map": [f"{old}={new}" for old, new in settings.key_map],
            "dtype": settings.dtype,
            "tied": settings.tied,
            "dequantize": settings.dequantize,
        },
        "allowed_excess": LIMIT,
        "tensors": [_tensor_document(c) for c in checks if c.kind is not Kind.SAME or not c.passed],
        "untouched": len(untouched),
        "bytes": check.tensors.nbytes,
        "seconds": round(check.seconds, 3),
        "jobs": check.tensors.jobs,
    }


def _tensor_document(check: TensorCheck) -> Document:
    found = check.judgement
    return {
        "name": check.name,
        "kind": str(check.kind),
        "dtype": check.dtype,
        "shape": list(check.shape),
        "values": found.values,
        "off": found.off,
        "wrong": found.wrong,
        "ulps": _finite(found.ulps),
        "excess": _finite(found.excess),
        "passed": check.passed,
        "hint": check.hint or None,
    }


def _model_document(model: ModelComparison) -> Document:
    return {
        name: _finite(value) if isinstance(value, float) else value
        for name, value in asdict(model).items()
    }


def _finite(value: float) -> float | None:
    """Return a number in the four digits that are meaningful; JSON has no infinity."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
