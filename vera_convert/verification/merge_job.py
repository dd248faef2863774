"""Describe the models to run for a merged model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vera_convert.base.model import BaseModel
from vera_convert.base.quantized.recognize import method_of
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.draws.generator import Rounding, rounding_on_base
from vera_convert.dtypes import BASE_NAMES
from vera_convert.merging.adapters import MergedAdapter
from vera_convert.text import printable
from vera_convert.verification.model_comparison import ModelJob, missing_packages
from vera_convert.verification.provenance import MergeSettings
from vera_convert.verification.tensors import MergedTensors

_QUANTIZERS = ("bitsandbytes", "compressed-tensors", "torchao")
"""The methods whose packages, of the same names, run on a CPU."""
_DTYPE_OF_ROUNDING = {Rounding.NONE: "float32"} | {
    rounding_on_base(name): name for name in BASE_NAMES if name != "float64"
}


def merge_job(
    adapters: Sequence[MergedAdapter],
    base: BaseModel,
    merged: Path,
    settings: MergeSettings,
    tensors: MergedTensors,
) -> ModelJob:
    """Return the models to run for a merged model whose weights are right.

    Args:
        adapters: the adapters, in the order of the merge.
        base: the base.
        merged: the folder of the merged model.
        settings: the options of the merge.
        tensors: the result of comparing the weights.
    """
    job = ModelJob(
        adapters=tuple((adapter.folder, adapter.weight) for adapter in adapters),
        base=base.location.fetched,
        found=merged,
        weights=tensors.nbytes,
        settings=settings,
        wider=tensors.wider,
    )
    if not settings.dequantize:
        return job
    quantization, draw = base.config.get("quantization_config"), adapters[0].draw
    method = method_of(quantization) if isinstance(quantization, dict) else ""
    if draw is not None and settings.base_dtype is None:
        # The base is run dequantized, where PEFT would round A and B otherwise.
        rounded = replace(settings, base_dtype=_DTYPE_OF_ROUNDING.get(draw.rounding))
        job = replace(job, settings=rounded)
    reason = _why_not_quantized(method, adapters, settings)
    return replace(job, quantizer="" if reason else method, not_quantized=reason)


def _why_not_quantized(
    method: str, adapters: Sequence[MergedAdapter], settings: MergeSettings
) -> str:
    """Return the reason against a run of the stored quantized base; empty without a reason."""
    if method not in _QUANTIZERS:
        return f"the kernels of {printable(method) or 'this method'} are not run"
    missing = missing_packages(method, "peft")
    if missing:
        return f"{missing} not installed"
    if len(adapters) != 1 or adapters[0].weight != 1:
        return "PEFT loads a single adapter of weight 1"
    auto = settings.projections is ProjectionSource.AUTO and settings.generator is None
    if not auto or settings.base_dtype is not None or settings.tied is not None:
        return "the options of the merge differ from PEFT's loading"
    return ""
