"""Run two whole models side by side: a base wrapped with adapters, and the merged model.

    base ──► run ──► wrap ──► run ──► merge here ──► run ──► round ──► run ─┐
                                                                           ├──► ModelComparison
    merged model, after the base is freed ──► run ──────────────────────────┘

All models compute in float32, or in float64 if the weights are in float64: the errors of 16-bit
arithmetic would hide the errors of a merge. A correct merge into 16 bits still differs by the
rounding of its weights, so there are two comparisons.

The first compares the merged model with the wrapped base, whose arithmetic does not depend on any
merge. Our own merge, rounded in the same way, measures how much rounding changes this model for
these samples; this is the limit. The second compares the merged model with our own rounded merge.
Only the order of summation can differ there, so the limit is narrow: a merge that leaves out one of
the thirty adapted layers of a trained MiniLM exceeds the limit many times over. In a model of real
size, the second comparison also shows deltas that were rounded before they were added. In a tiny
model a delta below a few hundredths of the weights hides them, because a single weight that is
rounded to the other side has the same effect. The comparison of the weights shows them in every
model.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn

from vera_convert.adapter.opening import open_adapter
from vera_convert.dtypes import FLOATS, NAMES
from vera_convert.merging.options import Tied
from vera_convert.verification.model_comparison import ModelComparison, ModelJob, Stage, Tell
from vera_convert.with_torch.build import Blueprint, UnfitError, blueprint, build_model
from vera_convert.with_torch.compare_quantized import compare_quantized
from vera_convert.with_torch.layer import VeraLinear
from vera_convert.with_torch.modules import modules_of, share_trained
from vera_convert.with_torch.runs import Runs, wrapped_model
from vera_convert.with_torch.verdict import Reference, difference, order_noise, verdict


def compare_models(job: ModelJob, tell: Tell = lambda _stage, _done, _of: None) -> ModelComparison:
    """Run the base with the adapters, run the merged model, and compare the outputs.

    One model is in memory at a time, with 4 bytes for each parameter.

    Args:
        job: the models, and how the merged model was made.
        tell: called at the start of each stage.

    Raises:
        CheckpointError: an adapter or the base is malformed, or the two do not belong together.
        UsageError: the models take no text, or two adapters replace the same module.
        SurroundingsError: transformers cannot build or run a model, or a file cannot be read.
    """
    runs = Runs(job, tell)
    runs.enter(Stage.BUILD)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_adapter(folder)) for folder, _ in job.adapters]
        base = blueprint(
            job.base,
            label=str(job.base),
            adapters=opened,
            dequantize=job.settings.dequantize,
        )
        labels = getattr(base.config, "num_labels", None)
    reference = _reference(base, job, runs)
    gc.collect()  # frees the first model even with references in a circle
    runs.enter(Stage.BUILD)
    try:
        merged = blueprint(job.found, label=str(job.found), like=base.name)
        if labels is not None and labels != merged.config.num_labels:
            merged.config.num_labels = labels  # the number of labels of the adapter's head
        model = build_model(merged).to(runs.wide)
        outputs = runs.outputs(model)
        found = verdict(base.name, reference, outputs)
    except UnfitError as error:
        return verdict(base.name, reference, None, f"{error}")
    if not job.quantizer or not found.passed:
        return found
    del model
    gc.collect()
    quantized = compare_quantized(base, job, reference, outputs, runs)
    return replace(found, quantized=quantized)


def _reference(plan: Blueprint, job: ModelJob, runs: Runs) -> Reference:
    """Run the base, the base with adapters, and our own merge before and after rounding."""
    model, base = runs.base(plan)
    runs.enter(Stage.MERGE)
    vera = wrapped_model(model, job)
    layers = {name: part for name, part in modules_of(vera.model) if isinstance(part, VeraLinear)}
    dtype = getattr(torch, job.settings.dtype) if job.settings.dtype is not None else None
    stored = _stored_dtype(plan)
    if plan.packed is not None:
        stored = _torch_dtype(plan.packed.dtype)
        _round_others(vera.model, layers.values(), dtype or stored)
    rounding = [
        dtype or _dtype_of_module(name, job.wider) or stored or layer.weight.dtype
        for name, layer in layers.items()
    ]
    vera.to(runs.wide)
    wrapped = runs.outputs(vera)
    runs.enter(Stage.MERGE)
    tied = job.settings.tied
    vera.merge(check=False, tied=tied)
    if tied == Tied.ADD:
        share_trained(vera.model)
    unrounded = runs.outputs(vera)
    branches, noise = difference(wrapped, unrounded), order_noise(unrounded, runs.wide)
    skips_layers = branches > noise and wrapped.are_finite and unrounded.are_finite
    weights = [layer.weight for layer in layers.values()]
    merged = vera.unload()
    _round(zip(weights, rounding, strict=True))
    if dtype is not None:
        _round((tensor, dtype) for tensor in merged.state_dict(keep_vars=True).values())
    return Reference(
        base,
        unrounded if skips_layers else wrapped,
        unrounded,
        remerged=runs.outputs(merged),
        rounding=max([runs.wide, *rounding], key=lambda each: torch.finfo(each).eps),
        wide=runs.wide,
        weights=sum(weight.numel() for weight in weights),
        branches=min(branches, noise),
        # If embedding and head share a change of one of the two, the wrapped model lacks a part.
        calls_layers=not skips_layers or tied == Tied.ADD,
        wrapped_is_merged=skips_layers,
    )


def _stored_dtype(plan: Blueprint) -> torch.dtype | None:
    """Return the dtype of the base's stored matrices; None if there are several.

    In memory transformers keeps some layers wider than the file and the merge.
    """
    infos = [tensor.info for tensor in plan.base.tensors.values()]
    found = {info.dtype for info in infos if len(info.shape) == 2 and info.dtype in FLOATS}
    return _torch_dtype(found.pop()) if len(found) == 1 else None


def _dtype_of_module(module: str, dtypes: Mapping[str, str]) -> torch.dtype | None:
    """Return the dtype of a module's weight. Names in files can have more or fewer prefixes."""
    weight = f".{module}.weight"
    for name, dtype in dtypes.items():
        if f".{name}".endswith(weight) or weight.endswith(f".{name}"):
            return _torch_dtype(dtype)
    return None


def _torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, NAMES[name])
    return dtype


def _round_others(model: nn.Module, layers: Iterable[VeraLinear], dtype: torch.dtype) -> None:
    """Round the dequantized weights without a delta, as a merge does."""
    own = {id(layer.weight) for layer in layers}
    linear = (part.weight for part in model.modules() if isinstance(part, nn.Linear))
    _round((weight, dtype) for weight in linear if id(weight) not in own)


def _round(tensors: Iterable[tuple[Tensor, torch.dtype]]) -> None:
    """Round the values of tensors to a dtype, and keep the dtype of the tensors."""
    for tensor, dtype in tensors:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype).to(tensor.dtype)
