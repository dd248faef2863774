"""A LoRA checked against the VeRA adapter that the LoRA was made from, layer by layer.

    names    every layer of the adapter, and no other that does anything
    deltas   lora_B lora_A against diag(b) B diag(d) A, by their relative error
    heads    modules and biases that were trained whole, byte for byte

The error is computed from thin matrices, so no delta is formed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.opening import open_adapter
from vera_convert.adapter.repairs import Repairs
from vera_convert.adapter.sorting import same_tensor
from vera_convert.adapter.values import refuse_values
from vera_convert.assembly.pool import one_blas_thread
from vera_convert.base.facts import BaseFacts, BaseOptions
from vera_convert.base.resolve import Bases, Need, resolve_base
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.hub.lookup import HubAccess
from vera_convert.lora.factors import Factors, relative_error
from vera_convert.lora.reading import ReadLayer, ReadLora, open_lora
from vera_convert.merging.adapters import AdapterSpec
from vera_convert.merging.in_effect import InEffect, Origin, in_effect
from vera_convert.rules import (
    LORA_DELTA_DIFFERS,
    LORA_LAYER_EXTRA,
    LORA_LAYER_LACKING,
    LORA_TENSOR_DIFFERS,
    Finding,
)
from vera_convert.text import counted, printable
from vera_convert.verification.forms import fetched_adapter
from vera_convert.verification.options import VerifyOptions

_MOST_FINDINGS = 50
_LIMITS = {"F64": 1e-6, "F32": 1e-6, "BF16": 6e-3, "F16": 2e-3}
"""The relative error that rounding to a dtype explains."""


@dataclass(frozen=True, slots=True)
class LoraLayerCheck:
    """One layer of a LoRA beside the adapter's.

    Attributes:
        module: the layer's path in the adapter.
        name: the layer's path in the LoRA.
        rank: the rank of the LoRA's layer.
        error: the relative Frobenius error of the LoRA's delta.
        limit: the error that is allowed.
    """

    module: str
    name: str
    rank: int
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is allowed."""
        return self.error <= self.limit

    def finding(self) -> Finding:
        """Return the finding that the error is not allowed."""
        reason = f"the relative error is {self.error:.3g}; {self.limit:.3g} is allowed."
        return LORA_DELTA_DIFFERS.at(printable(self.module), reason)


@dataclass(frozen=True, slots=True)
class LoraCheck:
    """The comparison of a LoRA with an adapter.

    Attributes:
        label: how the caller named the LoRA.
        origin: where the adapter's A and B come from.
        layers: the layers that both have.
        zeros: how many layers the LoRA alone has, which do nothing.
        trained_whole: how many heads and biases were compared.
        recorded: the error that was recorded when the LoRA was written; None if none was.
        findings: everything that is wrong; then warnings and notes.
    """

    label: str
    origin: Origin
    layers: tuple[LoraLayerCheck, ...]
    zeros: int
    trained_whole: int
    recorded: float | None
    findings: tuple[Finding, ...]

    @property
    def worst(self) -> LoraLayerCheck | None:
        """The layer with the largest error; None if there is no layer."""
        return max(self.layers, key=lambda layer: layer.error, default=None)


def check_lora(
    adapter: AdapterSpec,
    lora: str | Path,
    base_options: BaseOptions,
    options: VerifyOptions,
    *,
    access: HubAccess,
) -> LoraCheck:
    """Compare a LoRA with the adapter that the LoRA was made from.

    Args:
        adapter: the adapter; a known old or damaged form is repaired while the adapter is read.
        lora: the LoRA, a folder or a repo on the Hub.
        base_options: the options of the base, which is needed if A and B are not stored.
        options: the options of the comparison.
        access: how the Hub is reached.

    Raises:
        CheckpointError: the adapter or the LoRA is malformed, or the adapter is not for the base.
        UsageError: A and B have to be drawn, and the base is not known.
        SurroundingsError: a file or a repo cannot be read, or changed meanwhile.
    """
    with ExitStack() as stack:
        stack.enter_context(one_blas_thread())
        first = fetched_adapter(adapter.adapter, access, adapter.revision)
        second = fetched_adapter(lora, access, None)
        ours = stack.enter_context(open_adapter(first.fetched, repair=Repairs()))
        refuse_values(ours)
        theirs = stack.enter_context(open_lora(second.fetched))
        facts = resolve_base(ours, base_options, bases=Bases(access), need=Need.HELPFUL)
        projections = options.projections or ProjectionSource.AUTO
        pair = in_effect(ours, facts, projections=projections, variant=options.generator)
        names = {module: _name_in(theirs, module, facts) for module in ours.layers}
        compared = [*_compared(ours, theirs, names, pair)]
        layers = [each for each in compared if isinstance(each, LoraLayerCheck)]
        wrong = [each for each in compared if isinstance(each, Finding)]
        wrong += [layer.finding() for layer in layers if not layer.passed]
        extra = [theirs.layers[name] for name in theirs.layers.keys() - {*names.values()}]
        doing = [layer for layer in extra if _does_something(layer)]
        if doing:
            first_name = min(n for n, layer in theirs.layers.items() if layer in doing)
            reason = f"the adapter has no such layer; {counted(len(doing), 'layer')} in all."
            wrong.append(LORA_LAYER_EXTRA.at(printable(first_name), reason))
        wrong += _other_tensors(ours, theirs)
        ours.check_unchanged()
        return LoraCheck(
            label=second.label,
            origin=pair.origin,
            layers=tuple(layers),
            zeros=len(extra) - len(doing),
            trained_whole=len(ours.replacements),
            recorded=_recorded(theirs),
            findings=(
                *wrong[:_MOST_FINDINGS],
                *dict.fromkeys((*ours.findings, *facts.findings, *pair.findings)),
            ),
        )


def _recorded(lora: ReadLora) -> float | None:
    """Return the error that was recorded with a LoRA, if the record makes sense."""
    try:
        found = float(str((lora.record or {}).get("relative_error")))
    except ValueError:
        return None
    return found if 0 <= found < 100 else None


def _name_in(lora: ReadLora, module: str, facts: BaseFacts) -> str | None:
    """Return the LoRA's name of a module: the adapter's own, or that in the base's files."""
    names = [module]
    if facts.match is not None:
        tensor = facts.match.tensors.get(module, "").removesuffix(".weight")
        names += [tensor, facts.match.rename(module) or ""]
    return next((name for name in names if name in lora.layers), None)


def _compared(
    adapter: Adapter, lora: ReadLora, names: Mapping[str, str | None], pair: InEffect
) -> Iterator[LoraLayerCheck | Finding]:
    """Compare each layer of the adapter with the LoRA's; a layer that cannot be is a finding."""
    recorded = _recorded(lora)
    for module, name in names.items():
        if name is None:
            yield LORA_LAYER_LACKING.at(printable(module), "the LoRA has no such layer.")
            continue
        layer, vectors = lora.layers[name], adapter.layers[module]
        out, width = layer.shape
        if out != vectors.out_features or width > pair.A.shape[1]:
            reason = (
                f"the LoRA's layer has {width} inputs and {out} outputs; the adapter's has "
                f"{vectors.out_features} outputs and {pair.A.shape[1]} inputs at most."
            )
            yield LORA_DELTA_DIFFERS.at(printable(module), reason)
            continue
        b, d = vectors.lambda_b.array(), vectors.lambda_d.array()
        error = _error(Factors(pair.A[:, :width], pair.B[:out], d, b), layer)
        limit = max(_rounding(layer), 1.05 * (recorded or 0.0))
        yield LoraLayerCheck(module, name, layer.rank, error, limit)


def _error(ours: Factors, layer: ReadLayer) -> float:
    lora_A, lora_B = layer.factors()
    if not (np.isfinite(lora_A).all() and np.isfinite(lora_B).all()):
        return float("inf")
    return relative_error(ours.A, ours.lora_B_blocks(), lora_A, lora_B)


def _rounding(layer: ReadLayer) -> float:
    """Return the relative error that rounding the factors explains."""
    return max(_LIMITS[layer.lora_A.dtype], _LIMITS[layer.lora_B.dtype])


def _does_something(layer: ReadLayer) -> bool:
    lora_A, lora_B = layer.factors()
    return bool(np.any(lora_A != 0) and np.any(lora_B != 0))


def _other_tensors(adapter: Adapter, lora: ReadLora) -> Iterator[Finding]:
    """Yield the heads and biases that are not the adapter's."""
    options = (lora.record or {}).get("options")
    if isinstance(options, Mapping) and options.get("drop_head") is True:
        return
    for tensor in adapter.replacements:
        other = lora.others.get(tensor.name)
        if other is None:
            yield LORA_TENSOR_DIFFERS.in_tensor(tensor.name, "the LoRA does not have it.")
        elif not same_tensor(tensor, other):
            yield LORA_TENSOR_DIFFERS.in_tensor(tensor.name, "the LoRA's has other values.")
