"""Run a base with a VeRA adapter, and the base with a LoRA in PEFT, and compare the outputs.

    base ──► run ──► wrap with VeRA ──► run ──► LoRA's factors instead ──► run ─┐
                                                                                ├──► verdict
    base, built again ──► PEFT loads the LoRA ──► run ──────────────────────────┘

All models compute in float32, or in float64 if the weights are in float64. The LoRA's factors,
applied without PEFT, give the limits: PEFT may differ from these by the order of summation alone,
and from the adapter also by the error of the LoRA, which the comparison of the files has checked.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vera_convert.adapter.opening import open_adapter
from vera_convert.lora.reading import ReadLora, open_lora
from vera_convert.verification.model_comparison import ModelComparison, ModelJob, Stage, Tell
from vera_convert.with_torch.arrays import to_tensor
from vera_convert.with_torch.build import Blueprint, UnfitError, blueprint, build_model
from vera_convert.with_torch.layer import VeraLinear
from vera_convert.with_torch.model import VeraModel
from vera_convert.with_torch.modules import modules_of
from vera_convert.with_torch.runs import Runs, loaded_by_peft, wrapped_model
from vera_convert.with_torch.verdict import LORA, Reference, difference, verdict

_FIELDS = (
    *("r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"),
    *("use_rslora", "fan_in_fan_out", "bias", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "task_type"),
)
"""The fields of PEFT's config that a plain LoRA needs; PEFT gets no other field."""


def compare_lora(job: ModelJob, tell: Tell) -> ModelComparison:
    """Compare a base with the adapter, and the same base with the LoRA in PEFT.

    Args:
        job: the base, the adapter, and the LoRA's folder.
        tell: called at the start of each stage.

    Raises:
        CheckpointError: the adapter, the LoRA or the base is malformed.
        UsageError: the models cannot use the text.
        SurroundingsError: transformers cannot build or run the base, or a file cannot be read.
    """
    runs = Runs(job, tell)
    runs.enter(Stage.BUILD)
    ((folder, _),) = job.adapters
    with open_adapter(folder) as adapter:
        plan = blueprint(job.base, label=str(job.base), adapters=[adapter])
    with open_lora(job.found) as lora:
        reference = _reference(plan, lora, job, runs)
        gc.collect()  # frees the first model even with references in a circle
        runs.enter(Stage.BUILD)
        try:
            model = _with_lora(build_model(plan).to(runs.wide), lora)
            return verdict(plan.name, reference, runs.outputs(model), words=LORA)
        except UnfitError as error:
            return verdict(plan.name, reference, None, f"{error}", words=LORA)


def _reference(plan: Blueprint, lora: ReadLora, job: ModelJob, runs: Runs) -> Reference:
    """Run the base, the base with the adapter, and the base with the LoRA's factors."""
    model, base = runs.base(plan)
    runs.enter(Stage.MERGE)
    vera = wrapped_model(model, job).to(runs.wide)
    wrapped = runs.outputs(vera)
    layers = _layers(vera, lora, runs.wide)
    for layer, _, _ in layers:
        for b in layer.vera_lambda_b.values():
            b.data.zero_()
    with _branches(layers):
        applied = runs.outputs(vera)
    with torch.no_grad():
        for layer, A, B in layers:
            delta = B @ A
            layer.weight.add_(delta.T if layer.conv1d else delta)
    merged = runs.outputs(vera)
    dtypes = {to_tensor(each.lora_B.array()).dtype for each in lora.layers.values()}
    return Reference(
        base,
        wrapped,
        applied,
        applied,
        rounding=max(dtypes, key=lambda each: torch.finfo(each).eps),
        wide=runs.wide,
        weights=sum(layer.weight.numel() for layer, _, _ in layers),
        branches=difference(applied, merged),
    )


def _layers(
    vera: VeraModel, lora: ReadLora, wide: torch.dtype
) -> list[tuple[VeraLinear, Tensor, Tensor]]:
    """Return the layers of the adapter with the LoRA's factors, scaled."""
    found = []
    for path, module in modules_of(vera.model):
        if isinstance(module, VeraLinear) and path in lora.layers:
            A, B = lora.layers[path].factors()
            found.append((module, to_tensor(A).to(wide), to_tensor(B).to(wide)))
    return found


@contextmanager
def _branches(layers: list[tuple[VeraLinear, Tensor, Tensor]]) -> Iterator[None]:
    """Let layers add the product of the LoRA's factors to the outputs inside the block."""

    def adds(A: Tensor, B: Tensor) -> Any:  # noqa: ANN401 -- a hook
        return lambda _module, inputs, output: output + (inputs[0] @ A.T) @ B.T

    hooks = [layer.register_forward_hook(adds(A, B)) for layer, A, B in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _with_lora(model: nn.Module, lora: ReadLora) -> nn.Module:
    """Return a model into which PEFT has loaded a LoRA."""
    config: Mapping[str, Any] = lora.config or {}
    fields = {name: config[name] for name in _FIELDS if config.get(name) is not None}
    stored = [each for layer in lora.layers.values() for each in (layer.lora_A, layer.lora_B)]
    tensors = [*stored, *lora.others.values()]
    return loaded_by_peft(model, "LoraConfig", fields, tensors)
