"""Make, wrap, widen and run models side by side, and report each run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from vera_convert.draws.generator import rounding_on_base
from vera_convert.files.tensorfile import TensorData
from vera_convert.hub.lookup import HubAccess
from vera_convert.text import counted, printable
from vera_convert.verification.model_comparison import ModelJob, Stage, Tell
from vera_convert.with_torch.arrays import to_tensor
from vera_convert.with_torch.build import Blueprint, UnfitError, build_model, guarded
from vera_convert.with_torch.model import VeraModel
from vera_convert.with_torch.samples import Outputs, Sample, drawn_samples, run_model, text_samples


class Runs:
    """Run the models of a job on the same samples, and report each stage.

    Attributes:
        samples: the samples; empty before the base runs.
        wide: the dtype of all computation, to hide no error: float32, or the base's float64.
    """

    def __init__(self, job: ModelJob, tell: Tell) -> None:
        self.samples: list[Sample] = []
        self.wide = torch.float32
        self._job = job
        self._tell = tell
        self._done = 0

    def enter(self, stage: Stage) -> None:
        """Report the beginning of a stage, and the number of runs so far."""
        self._tell(stage, self._done, self._job.models * len(self.samples))

    def outputs(self, model: nn.Module) -> Outputs:
        """Run a model on the samples."""
        return run_model(model, self.samples, self._begin)

    def _begin(self) -> None:
        self.enter(Stage.RUN)
        self._done += 1

    def base(self, plan: Blueprint) -> tuple[nn.Module, Outputs]:
        """Build the base, make the samples, and run the base."""
        model = build_model(plan)
        self.enter(Stage.TEXT)
        with guarded(f"make samples for {plan.name}"):
            if self._job.lines is None:
                self.samples = drawn_samples(model, self._job.samples)
            else:
                self.samples = text_samples(model, plan.base.location.fetched, self._job.lines)
        if any(parameter.dtype == torch.float64 for parameter in model.parameters()):
            self.wide = torch.float64
        with _widened(model, self.wide):
            return model, self.outputs(model)


@contextmanager
def _widened(model: nn.Module, wide: torch.dtype) -> Iterator[None]:
    """Let a model compute in a wider dtype inside the block, and restore the dtypes afterwards."""
    before = {name: tensor.dtype for name, tensor in _parameters_and_buffers(model)}
    model.to(wide)
    try:
        yield
    finally:
        for name, tensor in _parameters_and_buffers(model):
            tensor.data = tensor.data.to(before[name])


def _parameters_and_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def wrapped_model(model: nn.Module, job: ModelJob) -> VeraModel:
    """Wrap a model with the adapters, all of them active."""
    vera, settings = VeraModel(model), job.settings
    dtype = settings.base_dtype
    names = [f"adapter_{number}" for number in range(len(job.adapters))]
    for name, (folder, weight) in zip(names, job.adapters, strict=True):
        vera.load_adapter(
            folder,
            adapter=name,
            projections=settings.projections,
            variant=settings.generator,
            rounding=None if dtype is None else rounding_on_base(dtype),
            key_map=settings.key_map,
            access=HubAccess(offline=True),
        )
        for layer in vera.vera_layers().values():
            if name in layer.vera_lambda_b:
                layer.vera_lambda_b[name].data.mul_(weight)
    vera.set_adapter(*names, trainable=False)
    vera.eval()
    return vera


def loaded_by_peft(
    model: nn.Module, kind: str, fields: Mapping[str, Any], tensors: Iterable[TensorData]
) -> nn.Module:
    """Return a model into which PEFT has loaded an adapter.

    Args:
        model: the model.
        kind: the class of the adapter's config.
        fields: the fields of the config.
        tensors: the adapter's tensors, named as in its file.

    Raises:
        UnfitError: PEFT refuses the adapter, or finds no place for some of its tensors.
    """
    peft = import_module("peft")
    with guarded("load the adapter", "PEFT"):
        wrapped = peft.get_peft_model(model, getattr(peft, kind)(**fields))
        values = {each.name: to_tensor(each.array()) for each in tensors}
        loaded = peft.set_peft_model_state_dict(wrapped, values)
        wrapped.eval()
    if loaded.unexpected_keys:
        count, first = len(loaded.unexpected_keys), printable(loaded.unexpected_keys[0])
        raise UnfitError(f"PEFT finds no place for {counted(count, 'tensor')}, such as {first}.")
    base: nn.Module = wrapped.get_base_model()
    return base
