"""Quantized layers among the layers that an adapter changes: refused, or noted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from vera_convert import rules
from vera_convert.base.model import BaseModel
from vera_convert.base.quantized.recognize import Quantization, layer_of, plain_by_config
from vera_convert.base.quantized.unpack import Unpacked
from vera_convert.errors import refuse
from vera_convert.rules import Finding
from vera_convert.text import printable


def refuse_quantized(base: Unpacked, weights: Iterable[str]) -> None:
    """Refuse a merge into weights that stay quantized.

    Args:
        base: the base with its packed weights.
        weights: the weights that an addition changes, by the names in the view.

    Raises:
        CheckpointError: with a finding for each kind of quantization.
    """
    refuse(refusals(base, weights))


def refusals(base: Unpacked, weights: Iterable[str]) -> list[Finding]:
    """Return an error for each kind of quantized weight, with the use of --dequantize.

    Args:
        base: the base with its packed weights.
        weights: the weights that an addition changes, by the names in the view.
    """
    findings = quantized_targets(base.stored, map(base.stored_name, weights))
    text = _obstacle(base) or " With --dequantize, a merge writes a 16-bit model."
    return [replace(each, reason=each.reason + text) for each in findings]


def target_findings(base: Unpacked, weights: Iterable[str]) -> Iterator[Finding]:
    """Yield a note if `merge --dequantize` can merge into the weights, or else a warning.

    Args:
        base: the base with its packed weights.
        weights: the weights that an adapter changes, by the names in the view.
    """
    names = [*weights]
    obstacle = _obstacle(base)
    rule = rules.TARGET_IS_QUANTIZED if obstacle else rules.CAN_DEQUANTIZE
    text = obstacle or _fate_of_plain(base, names)
    for finding in quantized_targets(base.stored, map(base.stored_name, names)):
        yield rule.at(finding.place, finding.reason + text)


def _obstacle(base: Unpacked) -> str:
    """Return why --dequantize cannot be used, in a sentence; empty if a merge can use it.

    A merge keeps a plain weight as the files hold the weight, even if the config calls the layer
    quantized. If all weights are plain, only the config speaks of quantization.
    """
    if base.defects:
        return f" --dequantize refuses this base: {base.first_defect}"
    if not base.weights:
        return " The files hold these layers unpacked: a loader quantizes them."
    return ""


def _fate_of_plain(base: Unpacked, names: Iterable[str]) -> str:
    """Return how loaders treat the plain weights among layers that the config calls quantized."""
    if not quantized_targets(base.stored, [name for name in names if name not in base.weights]):
        return ""
    return "".join(dict.fromkeys(f" {each.plain}" for each in base.formats.values() if each.plain))


def misdescribed(base: Unpacked, weights: Iterable[str]) -> Iterator[Finding]:
    """Yield a warning if a loader builds packed layers as plain ones, or plain layers as packed.

    Args:
        base: the base with its packed weights.
        weights: the weights that an adapter changes, by the names in the view.
    """
    label = base.stored.location.label
    paths = dict.fromkeys(layer_of(weight.main)[0] for weight in base.weights.values())
    found = plain_by_config(base.stored, [*paths])
    if found:
        reason = f"the files hold {len(paths):,} packed layers, and quantization_config calls "
        reason += f'{len(found):,} of them plain, such as "{printable(found[0])}".'
        yield rules.BASE_MISDESCRIBED.at(label, reason)
    if any(each.plain is None for each in base.formats.values()):
        plain = [name for name in dict.fromkeys(weights) if name not in base.weights]
        lost = [*Quantization(base.stored).of_all(plain)]
        if lost:
            reason = f"the files hold {len(lost):,} of the adapter's layers plain, such as "
            reason += f'"{printable(lost[0])}", and quantization_config calls these layers packed. '
            reason += "transformers puts random values in their place."
            yield rules.BASE_MISDESCRIBED.at(label, reason)


def hides_shapes(base: Unpacked) -> bool:
    """Say whether the packed tensors of some layers leave the layers' shapes unknown.

    Args:
        base: the base with its packed weights.
    """
    quantization, tensors = Quantization(base.stored), base.view.tensors
    for name in tensors:
        path, rest = layer_of(name)
        weight = f"{path}.weight" if path else "weight"
        if weight not in tensors and quantization.packed_weight(path) in tensors:
            return True
        if rest == "weight" and name not in base.weights and quantization.is_packed(name):
            return True
    return False


def quantized_targets(base: BaseModel, tensors: Iterable[str]) -> list[Finding]:
    """Return an error for each kind of quantization among the given tensors of a base.

    Args:
        base: the base.
        tensors: names of the weights for the addition.
    """
    names = [*dict.fromkeys(tensors)]
    found: dict[str, list[tuple[str, str]]] = {}
    for name, (kind, reason) in Quantization(base).of_all(names).items():
        found.setdefault(kind, []).append((name, reason))
    return [
        rules.QUANTIZED_TARGET.at(
            base.location.label,
            f"{len(those)} of {len(names)} layers are quantized ({kind}), such as "
            f'"{printable(those[0][0])}": {those[0][1]}.',
        )
        for kind, those in found.items()
    ]


def quantized_elsewhere(base: BaseModel) -> Finding | None:
    """Return a note if any tensor of a base is quantized."""
    quantization = Quantization(base)
    kinds = {kind: name for name in base.tensors for kind, _ in quantization.by_tensors(name)}
    if not kinds:
        return None
    shown = " and ".join(f'{kind}, such as "{printable(name)}"' for kind, name in kinds.items())
    return rules.QUANTIZED_ELSEWHERE.at(base.location.label, f"it holds {shown}.")
