"""Compare a LoRA with the VeRA adapter that the LoRA was made from, layer by layer.

    names    every layer of the adapter, and no other layer with an effect
    deltas   lora_B lora_A with diag(b) B diag(d) A, by the relative error
    others   modules_to_save and trained biases, byte for byte
    record   the SHA-256 of the source
    config   whether the engine would load every tensor

The error is computed from thin matrices, so no delta is formed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from vera_convert import rules
from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.opening import open_adapter
from vera_convert.adapter.repairs import repaired
from vera_convert.adapter.sorting import same_tensor
from vera_convert.adapter.values import refuse_values
from vera_convert.assembly.pool import one_blas_thread
from vera_convert.base.bases import Bases
from vera_convert.base.facts import BaseFacts, BaseOptions
from vera_convert.base.resolve import Need, resolve_base
from vera_convert.base.side_files import sort_files
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.errors import SurroundingsError
from vera_convert.files.file_names import CONFIG_NAME, WEIGHTS_NAME
from vera_convert.files.reading import file_sha256
from vera_convert.hub.lookup import HubAccess, Location, fetch_base, list_files
from vera_convert.lora.checks import peft_findings
from vera_convert.lora.engines import EngineName, Form
from vera_convert.lora.factors import (
    Decomposition,
    Factors,
    cancellation,
    relative_error,
    squared_norm,
)
from vera_convert.lora.reading import ReadLayer, ReadLora, open_lora
from vera_convert.merging.adapters import AdapterSpec
from vera_convert.merging.in_effect import InEffect, Origin, in_effect
from vera_convert.rules import Finding
from vera_convert.text import printable
from vera_convert.verification.forms import fetched_adapter
from vera_convert.verification.lora_config import unloaded_findings
from vera_convert.verification.lora_names import in_transformers_order, layer_names
from vera_convert.verification.model_comparison import ModelComparison, ModelJob, missing_packages
from vera_convert.verification.options import VerifyOptions, settle

_LIMITS = {"F64": 1e-6, "F32": 1e-6, "BF16": 6e-3, "F16": 2e-3}
"""The relative error that rounding to a dtype explains."""
_SLACK = 1.05
"""The factor by which the error of a lower rank may exceed the recorded error."""


@dataclass(frozen=True, slots=True)
class LoraLayerCheck:
    """One layer of a LoRA, compared with the adapter's layer.

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
        return rules.LORA_DELTA_DIFFERS.at(printable(self.module), reason)


@dataclass(frozen=True, slots=True)
class LoraCheck:
    """The comparison of a LoRA with an adapter.

    Attributes:
        label: how the caller named the LoRA.
        origin: where the adapter's A and B come from.
        layers: the compared layers.
        zeros: how many layers without effect the LoRA alone has.
        trained_whole: how many heads and biases were compared.
        recorded: the error that the LoRA's record states; None without a record.
        run: the models to run, or the reason why no model is run.
        findings: errors; then warnings and notes.
        model: the result of running the base with the LoRA in PEFT; None if that was not run.
        failure: the error that stopped the run; None without an error.
    """

    label: str
    origin: Origin
    layers: tuple[LoraLayerCheck, ...]
    zeros: int
    trained_whole: int
    recorded: float | None
    run: ModelJob | str
    findings: tuple[Finding, ...]
    model: ModelComparison | None = None
    failure: SurroundingsError | None = None

    @property
    def worst(self) -> LoraLayerCheck | None:
        """The layer with the largest error; None if there is no layer."""
        return max(self.layers, key=lambda layer: layer.error, default=None)

    def with_model(self, model: ModelComparison) -> LoraCheck:
        """Return this result, completed by the result of the run."""
        found = [] if model.passed else [rules.LORA_MODEL_DIFFERS.at(self.label, model.reason)]
        findings = found if model.conclusive else []
        return replace(self, model=model, findings=(*self.findings, *findings))


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
        UsageError: A and B must be drawn, and the base is unknown.
        SurroundingsError: a file or a repo cannot be read, or changed meanwhile.
    """
    with ExitStack() as stack:
        stack.enter_context(one_blas_thread())
        first = fetched_adapter(adapter.adapter, access, adapter.revision)
        places = first, fetched_adapter(lora, access, None)
        ours = stack.enter_context(open_adapter(places[0].fetched, repair=repaired))
        refuse_values(ours)
        theirs = stack.enter_context(open_lora(places[1].fetched))
        is_stored = ours.projections is not None or ours.fingerprint is not None
        need = Need.HELPFUL if is_stored else Need.VITAL
        base_facts = resolve_base(ours, base_options, bases=Bases(access), need=need)
        projections = options.projections or ProjectionSource.AUTO
        pair = in_effect(ours, base_facts, projections=projections, variant=options.generator)
        names = layer_names(theirs, ours, base_facts)
        read = in_transformers_order(theirs, names, base_facts)
        pairing = _Pairing(ours, read, base_facts, pair, names)
        layers, wrong = pairing.compared()
        extra = pairing.extra
        acting = [name for name, layer in extra.items() if _has_effect(layer)]
        for name in acting:
            reason = "the adapter has no such layer."
            wrong.append(rules.LORA_LAYER_EXTRA.at(printable(name), reason))
        task = ours.config.task_type
        others = [*_other_tensors(ours, theirs)]
        unloaded = [*unloaded_findings(pairing.lora, pairing.found, task, base_facts)]
        ours.check_unchanged()
        return LoraCheck(
            label=places[1].label,
            origin=pair.origin,
            layers=layers,
            zeros=len(extra) - len(acting),
            trained_whole=len(ours.replacements),
            recorded=_recorded(theirs),
            run=_job(pairing, places, base_options, options, access),
            findings=(
                *wrong,
                *others,
                *unloaded,
                *_other_source(ours, theirs),
                *dict.fromkeys((*ours.findings, *base_facts.findings, *pair.findings)),
            ),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Pairing:
    """An adapter, a LoRA, and the LoRA's name for each layer of the adapter.

    Attributes:
        adapter: the adapter.
        lora: the LoRA.
        base_facts: the base facts.
        pair: the A and B in effect.
        names: the LoRA's name by the adapter's module path; None if the LoRA has no such layer.
    """

    adapter: Adapter
    lora: ReadLora
    base_facts: BaseFacts
    pair: InEffect
    names: Mapping[str, str | None]

    @property
    def found(self) -> dict[str, str]:
        """The LoRA's names of the adapter's layers, by the adapter's module path."""
        return {module: name for module, name in self.names.items() if name is not None}

    @property
    def extra(self) -> dict[str, ReadLayer]:
        """The LoRA's layers that the adapter does not have, by the LoRA's name."""
        found = {*self.found.values()}
        return {name: layer for name, layer in self.lora.layers.items() if name not in found}

    def compared(self) -> tuple[tuple[LoraLayerCheck, ...], list[Finding]]:
        """Compare the layers; return the compared layers and the errors."""
        checks, wrong, recorded = [], [], _recorded(self.lora)
        for module, name in self.names.items():
            ours, A, B = self.adapter.layers[module], self.pair.A, self.pair.B
            if name is None:
                reason = "the LoRA has no such layer."
                wrong.append(rules.LORA_LAYER_LACKING.at(printable(module), reason))
                continue
            layer = self.lora.layers[name]
            out, width = layer.shape
            if out != ours.out_features or width > A.shape[1]:
                reason = (
                    f"the LoRA's layer has {width} inputs and {out} outputs; the adapter's has "
                    f"{ours.out_features} outputs and {A.shape[1]} inputs at most."
                )
                wrong.append(rules.LORA_DELTA_DIFFERS.at(printable(module), reason))
                continue
            factors = Factors(A[:, :width], B[:out], ours.lambda_d.array(), ours.lambda_b.array())
            error, limit = _error_and_limit(factors, layer, recorded)
            checks.append(LoraLayerCheck(module, name, layer.rank, error, limit))
        return tuple(checks), [*wrong, *(check.finding() for check in checks if not check.passed)]

    def why_not_run(self) -> str:
        """Return the reason why PEFT cannot run this LoRA; empty if nothing is in the way."""
        base = self.base_facts.base
        if self.lora.form is not Form.PEFT:
            return "PEFT does not load this form"
        missing = missing_packages("peft", "torch", "transformers")
        if missing:
            return f"install {missing} to run the LoRA in PEFT"
        if base is None:
            return "give --base MODEL to run the LoRA in PEFT"
        if base.prefix or base.model_type is None or "quantization_config" in base.config:
            return "the base is no 16-bit or 32-bit model of transformers"
        if any(module != name for module, name in self.names.items()):
            return "the names are those of the base's files, which PEFT does not look up"
        if any(peft_findings([*self.found], self.base_facts)):
            return "PEFT does not load every layer of this LoRA"
        return ""


# --- layers --------------------------------------------------------------------------------------


def _error_and_limit(
    ours: Factors, layer: ReadLayer, recorded: float | None
) -> tuple[float, float]:
    """Return the relative error of a LoRA's layer, and the error that is allowed.

    Args:
        ours: the operands of the adapter's layer.
        layer: the LoRA's layer.
        recorded: the error in the LoRA's record; None without a record.
    """
    lora_A, lora_B = layer.factors()
    error = float("inf")
    if np.isfinite(lora_A).all() and np.isfinite(lora_B).all():
        error = relative_error(ours, squared_norm(ours), lora_A, lora_B)
    limit = max(_LIMITS[layer.lora_A.dtype], _LIMITS[layer.lora_B.dtype])
    if error > limit:
        limit *= cancellation(ours)
    if recorded is not None and error > limit:
        limit = max(limit, _SLACK * min(recorded, _error_of_rank(ours, layer.rank) + limit))
    return error, limit


def _error_of_rank(ours: Factors, rank: int) -> float:
    """Return the smallest relative error that a LoRA of a rank can have."""
    squares = np.square(Decomposition.of(ours, {}).values)
    total = float(squares.sum())
    return float(np.sqrt(squares[rank:].sum() / total)) if total else 0.0


def _has_effect(layer: ReadLayer) -> bool:
    lora_A, lora_B = layer.factors()
    return bool(np.any(lora_A != 0) and np.any(lora_B != 0))


# --- other tensors and the record ----------------------------------------------------------------


def _recorded(lora: ReadLora) -> float | None:
    """Return the error that a LoRA's record states; None without a plausible number."""
    try:
        found = float(str((lora.record or {}).get("relative_error")))
    except ValueError:
        return None
    return found if 0 <= found < 100 else None


def _other_tensors(adapter: Adapter, lora: ReadLora) -> Iterator[Finding]:
    """Yield the heads and biases that differ from the adapter's."""
    is_dropped = lora.options.get("drop_head") is True
    copies = [] if lora.engine == EngineName.PEFT else [*adapter.base_copies.values()]
    for tensor in () if is_dropped else adapter.replacements:
        other = lora.others.get(tensor.name)
        if other is None and tensor in copies:
            continue  # engines other than PEFT have the base's weight
        if other is None:
            yield rules.LORA_TENSOR_DIFFERS.in_tensor(tensor.name, "the LoRA lacks this tensor.")
        elif not same_tensor(tensor, other):
            yield rules.LORA_TENSOR_DIFFERS.in_tensor(tensor.name, "the LoRA has other values.")
    own = {tensor.name for tensor in adapter.replacements}
    for name in lora.others:
        if name not in own:
            yield rules.LORA_TENSOR_DIFFERS.in_tensor(name, "only the LoRA has this tensor.")


def _other_source(adapter: Adapter, lora: ReadLora) -> Iterator[Finding]:
    """Yield a warning if the record names another file than the adapter's."""
    record, source = lora.record or {}, adapter.file.source
    hashes = {
        "source_sha256": (WEIGHTS_NAME, file_sha256(source)),
        "config_sha256": (CONFIG_NAME, sha256(adapter.config_file.text).hexdigest()),
    }
    others = [name for key, (name, own) in hashes.items() if record.get(key, own) != own]
    if others:
        reason = f"the SHA-256 of {' and of '.join(others)} differs from the LoRA's record."
        yield rules.LORA_OTHER_SOURCE.at(adapter.folder.name, reason)


# --- running -------------------------------------------------------------------------------------


def _job(
    pairing: _Pairing,
    places: tuple[Location, Location],
    base_options: BaseOptions,
    options: VerifyOptions,
    access: HubAccess,
) -> ModelJob | str:
    """Fetch the base and return the models to run, or the reason why no model is run.

    Args:
        pairing: the adapter, the LoRA and the base facts.
        places: where the adapter and the LoRA lie.
        base_options: the caller's options for the base.
        options: the options of the comparison.
        access: how the Hub is reached.
    """
    if options.layers_only:
        return "--layers-only"
    if reason := pairing.why_not_run():
        return reason
    base, location = pairing.base_facts.base, pairing.base_facts.location
    is_reachable = location is not None and (location.folder or base_options.model) is not None
    if base is None or location is None or not is_reachable:
        return "give --base MODEL to run the LoRA in PEFT"
    sides = sort_files(list_files(location, access), base)
    needed = [name for name in (sides.config, base.index) if name is not None]
    return ModelJob(
        adapters=((places[0].fetched, 1.0),),
        base=fetch_base(location, access, names=[*needed, *base.files]).fetched,
        found=places[1].fetched,
        weights=base.weights_size,
        settings=settle(options, base_options, None),
        is_lora=True,
    )
