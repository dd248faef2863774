"""Run two whole models side by side: a base wrapped with adapters, and a merged model or a LoRA.

    base ──► run ──► wrap ──► run ──► merge here ──► run ──► round ──► run ─┐
                                                                           ├──► ModelComparison
    merged model, after the base is freed ──► run ──────────────────────────┘

    base ──► run ──► wrap ──► run ──► LoRA's factors instead ──► run ───────┐
                                                                           ├──► ModelComparison
    base, built again ──► PEFT loads the LoRA ──► run ──────────────────────┘

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vera_convert.adapter.opening import open_adapter
from vera_convert.assembly.input_files import InputFile, StoredTensor
from vera_convert.base.model import read_base
from vera_convert.base.tied import is_head, scales_logits, scales_tied_logits
from vera_convert.dtypes import FLOATS
from vera_convert.files.tensorfile import NUMPY_DTYPE
from vera_convert.hub.lookup import HubAccess, Location
from vera_convert.lora.reading import ReadLora, open_lora
from vera_convert.merging.options import Tied
from vera_convert.verification.model_comparison import ModelComparison, ModelJob, Stage, Tell
from vera_convert.with_torch.arrays import TORCH_DTYPE, to_tensor
from vera_convert.with_torch.build import Blueprint, UnfitError, blueprint, build_model
from vera_convert.with_torch.compare_quantized import compare_quantized
from vera_convert.with_torch.layer import VeraLinear
from vera_convert.with_torch.model import VeraModel
from vera_convert.with_torch.modules import share_trained
from vera_convert.with_torch.runs import Runs, loaded_by_peft, wrapped_model
from vera_convert.with_torch.samples import Outputs
from vera_convert.with_torch.untying import has_tied_head, scales_logits_here
from vera_convert.with_torch.verdict import LORA, Reference, difference, order_noise, verdict


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
    reference = _reference_of_merge(base, job, runs)

    def build() -> nn.Module:
        merged = blueprint(job.found, label=str(job.found), like=base.name)
        if labels is not None and labels != merged.config.num_labels:
            merged.config.num_labels = labels  # the number of labels of the adapter's head
        return build_model(merged).to(runs.wide)

    outputs, failure = _run(build, runs)
    found = verdict(base.name, reference, outputs, failure)
    if outputs is None or not job.quantizer or not found.passed:
        return found
    gc.collect()
    quantized = compare_quantized(base, job, reference, outputs, runs)
    return replace(found, quantized=quantized)


def _run(build: Callable[[], nn.Module], runs: Runs) -> tuple[Outputs | None, str]:
    """Build and run the compared model; return the outputs, or why the model cannot be run."""
    gc.collect()  # frees the first model even with references in a circle
    runs.enter(Stage.BUILD)
    try:
        return runs.outputs(build()), ""
    except UnfitError as error:
        return None, f"{error}"


def _reference_of_merge(plan: Blueprint, job: ModelJob, runs: Runs) -> Reference:
    """Run the base, the base with adapters, and our own merge before and after rounding."""
    model, base = runs.base(plan)
    runs.enter(Stage.MERGE)
    vera = wrapped_model(model, job)
    layers = vera.vera_layers()
    dtype, stored = _dtype_of_all(job), _stored_dtype(plan)
    kept = dtype or stored
    if plan.packed is not None and kept is not None:
        _round_others(vera.model, layers.values(), kept)
    rounding = [
        dtype or _dtype_of_module(name, job.wider) or stored or layer.weight.dtype
        for name, layer in layers.items()
    ]
    loaded = model.dtype
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
    merged = _rounded_merge(vera, plan, job, rounding, (dtype or loaded, runs.wide))
    return Reference(
        base,
        unrounded if skips_layers else wrapped,
        unrounded,
        remerged=runs.outputs(merged),
        rounding=max([runs.wide, *rounding], key=lambda each: torch.finfo(each).eps),
        wide=runs.wide,
        weights=sum(layer.weight.numel() for layer in layers.values()),
        branches=min(branches, noise),
        # If embedding and head share a change of one of the two, the wrapped model lacks a part.
        calls_layers=not skips_layers or tied == Tied.ADD,
        wrapped_is_merged=skips_layers,
    )


def _rounded_merge(
    vera: VeraModel,
    plan: Blueprint,
    job: ModelJob,
    rounding: Sequence[torch.dtype],
    dtypes: Sequence[torch.dtype],
) -> nn.Module:
    """Return our own merge, rounded like the merged model.

    Args:
        vera: the base with the merged adapters.
        plan: how the base is built.
        job: the models, and how the merged model was made.
        rounding: the dtype to which the weight of each adapted layer is rounded.
        dtypes: the dtypes of a stored head: of the file, and of the computation.
    """
    weights = [layer.weight for layer in vera.vera_layers().values()]
    merged, dtype, head = vera.unload(), _dtype_of_all(job), None
    if scales_tied_logits(plan.base) and not has_tied_head(merged):
        head = _stored_head(merged, job.found, dtypes)
    _round(zip(weights, rounding, strict=True))
    if dtype is not None:
        _round((tensor, dtype) for tensor in merged.state_dict(keep_vars=True).values())
    if head is not None:
        merged.get_output_embeddings().weight = nn.Parameter(head, requires_grad=False)
    return merged


def _dtype_of_all(job: ModelJob) -> torch.dtype | None:
    """Return the dtype of all float tensors of the merge; None if each keeps its dtype."""
    return None if job.settings.dtype is None else getattr(torch, job.settings.dtype)


def _stored_head(model: nn.Module, found: Path, dtypes: Sequence[torch.dtype]) -> Tensor | None:
    """Return the head that the merged model stores, with the scale of the model in memory.

    The scale of the logits lies either in the head's weight or in the config, and the weight is
    rounded with or without the scale. The comparison of the files has checked the stored head.

    Args:
        model: the model that is merged in memory.
        found: the folder of the merged model.
        dtypes: the dtypes to convert to, in this order.

    Returns:
        The weight in the last dtype; None if the merged model stores no head.
    """
    merged = read_base(Location(str(found), found), HubAccess(offline=True))
    name = next((name for name in merged.tensors if is_head(name, merged)), None)
    if name is None:
        return None
    tensor = merged.tensors[name]
    file, header = InputFile.look(found / tensor.file, within=found), merged.files[tensor.file]
    rows, columns = tensor.info.shape
    weight = to_tensor(StoredTensor.of(file, header, tensor.info).rows(0, rows))
    for dtype in dtypes:
        weight = weight.to(dtype)
    by_config = int(scales_logits(merged)) - int(scales_logits_here(model.config))
    return weight * columns ** (-0.5 * by_config)


def _stored_dtype(plan: Blueprint) -> torch.dtype | None:
    """Return the dtype of the base's matrices, stored or dequantized; None if there are several.

    In memory transformers keeps some layers wider than the file and the merge.
    """
    if plan.packed is not None:
        return TORCH_DTYPE[NUMPY_DTYPE[plan.packed.dtype]]
    infos = [tensor.info for tensor in plan.base.tensors.values()]
    found = {info.dtype for info in infos if len(info.shape) == 2 and info.dtype in FLOATS}
    return TORCH_DTYPE[NUMPY_DTYPE[found.pop()]] if len(found) == 1 else None


def _dtype_of_module(module: str, dtypes: Mapping[str, str]) -> torch.dtype | None:
    """Return the dtype of a module's weight. Names in files can have more or fewer prefixes."""
    weight = f".{module}.weight"
    for name, dtype in dtypes.items():
        if f".{name}".endswith(weight) or weight.endswith(f".{name}"):
            return TORCH_DTYPE[NUMPY_DTYPE[dtype]]
    return None


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


# --- a LoRA ---------------------------------------------------------------------------------------


_FIELDS = (
    *("r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"),
    *("use_rslora", "fan_in_fan_out", "bias", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "task_type"),
)
"""The fields of PEFT's config that a plain LoRA needs; PEFT gets no other field."""


def compare_lora(job: ModelJob, tell: Tell) -> ModelComparison:
    """Compare a base with the adapter, and the same base with the LoRA in PEFT.

    The LoRA's factors, applied without PEFT, give the limits: PEFT may differ from these by the
    order of summation alone, and from the adapter also by the error of the LoRA, which the
    comparison of the files has checked.

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
        reference = _reference_of_lora(plan, lora, job, runs)
        outputs, failure = _run(lambda: _with_lora(build_model(plan).to(runs.wide), lora), runs)
        return verdict(plan.name, reference, outputs, failure, words=LORA)


def _reference_of_lora(plan: Blueprint, lora: ReadLora, job: ModelJob, runs: Runs) -> Reference:
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
    for path, module in vera.vera_layers().items():
        if path in lora.layers:
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
