"""Quantized layers among those that an adapter changes: refused, or noted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from vera_convert.base.quantized.recognize import quantized_elsewhere, quantized_targets
from vera_convert.base.quantized.unpack import Unpacked
from vera_convert.errors import CheckpointError
from vera_convert.rules import CAN_DEQUANTIZE, TARGET_IS_QUANTIZED, Finding

__all__ = ["quantized_elsewhere", "refuse_quantized", "target_findings"]


def refuse_quantized(base: Unpacked, weights: Iterable[str]) -> None:
    """Refuse a merge into quantized weights that are not dequantized.

    Args:
        base: the base with its packed weights.
        weights: the weights that something is added to, by their names in the view.

    Raises:
        CheckpointError: with a finding for each kind of quantization.
    """
    findings = refusals(base, weights)
    if findings:
        raise CheckpointError.of(findings)


def refusals(base: Unpacked, weights: Iterable[str]) -> list[Finding]:
    """Return an error for each way in which weights are quantized, with the use of --dequantize.

    Args:
        base: the base with its packed weights.
        weights: the weights that something is added to, by their names in the view.
    """
    names = [*weights]
    findings = quantized_targets(base.stored, map(base.stored_name, names))
    text = ""
    if findings:
        text = _what(base, names) or " With --dequantize, a merge writes a 16-bit model."
    return [replace(each, reason=each.reason + text) for each in findings]


def target_findings(base: Unpacked, weights: Iterable[str]) -> Iterator[Finding]:
    """Yield a note if `merge --dequantize` can merge into these weights, or else a warning.

    Args:
        base: the base with its packed weights.
        weights: the weights that an adapter adds to, by their names in the view.
    """
    names = [*weights]
    rule = TARGET_IS_QUANTIZED if base.defects or _only_claimed(base, names) else CAN_DEQUANTIZE
    for finding in quantized_targets(base.stored, map(base.stored_name, names)):
        yield rule.at(finding.place, finding.reason + _what(base, names))


def _only_claimed(base: Unpacked, names: Iterable[str]) -> bool:
    """Return whether the config alone says that weights are quantized: the files do not."""
    return bool(quantized_targets(base.stored, [n for n in names if n not in base.weights]))


def _what(base: Unpacked, names: Iterable[str]) -> str:
    """Return why --dequantize is of no use here, in a sentence; empty if it supports the base."""
    if not base.defects and _only_claimed(base, names):
        return " The files hold these layers unpacked: a loader quantizes them."
    if not base.defects:
        return ""
    first, more = base.defects[0], len(base.defects) - 1
    others = f" (and {more:,} more)" if more else ""
    return f" --dequantize refuses this base: {first.code} {first.place}: {first.reason}{others}"
