"""The options of a merge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module

from vera_convert.arguments import (
    dtype_name,
    instance,
    number,
    one_of,
    optional,
    require_flags,
    set_checked,
    size_in_bytes,
    text,
    texts,
    whole_number,
)
from vera_convert.assembly.blocks import CPU, Device
from vera_convert.base.facts import BaseOptions
from vera_convert.conversion.projections import ProjectionSource
from vera_convert.draws.generator import Variant
from vera_convert.dtypes import HEADER_NAMES
from vera_convert.errors import ParameterError, SurroundingsError
from vera_convert.merging.adapters import AdapterSpec, adapter_specs
from vera_convert.text import printable


class Tied(StrEnum):
    """How to merge into an output head that shares a tensor with the embedding."""

    ADD = "add"
    """Change the shared tensor, and so the embedding, as PEFT does."""
    UNTIE = "untie"
    """Give the head a separate tensor, and say so in the config."""


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """The options of a merge.

    An option with named choices takes the member or the string, and `dtype` any usual spelling.

    Attributes:
        weight: the factor of the first adapter's deltas.
        add: further adapters, in the order in which their deltas are added; a text is
            ``ADAPTER`` or ``ADAPTER=WEIGHT``.
        projections: the source of A and B: ``auto``, ``file`` or ``key``.
        generator: the variant that drew A and B, if no fingerprint names the variant.
        dtype: the dtype of all float tensors, such as ``bfloat16``; None keeps each dtype.
        max_shard_size: the most bytes of a shard, or a text such as ``5GB``; None keeps the base's
            shards.
        tied: how to merge into an output head that shares one tensor with the embedding.
        dequantize: make a 16-bit model of a quantized base.
        architecture: the class of the result, if neither base nor adapter names a head's class.
        labels: the names of a classifier's labels, in order.
        device: where products are computed: ``cpu``, or with the extra torch ``cuda`` or
            ``cuda:N``.
        jobs: threads; None for one thread for each core, at most four.
        check: read back every byte, not only sizes and headers, and report on all values.
        checksums: compute the SHA-256 of every file.
        resume: continue a failed run for the same `out`, and keep finished files if this run
            fails.
        dry_run: plan only.
        force: replace a merged model at `out`.

    Example:
        >>> MergeOptions(max_shard_size="5GB", tied="untie").max_shard_size
        5000000000
    """

    weight: float = 1.0
    add: Sequence[AdapterSpec] = ()
    projections: ProjectionSource = ProjectionSource.AUTO
    generator: Variant | None = None
    dtype: str | None = None
    max_shard_size: int | None = None
    tied: Tied | None = None
    dequantize: bool = False
    architecture: str | None = None
    labels: Sequence[str] = ()
    device: Device = CPU
    jobs: int | None = None
    check: bool = False
    checksums: bool = False
    resume: bool = False
    dry_run: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        flags = ("dequantize", "check", "checksums", "resume", "dry_run", "force")
        require_flags(**{name: getattr(self, name) for name in flags})
        set_checked(
            self,
            weight=number("weight", self.weight),
            add=adapter_specs(self.add),
            projections=one_of("projections", ProjectionSource, self.projections),
            generator=optional(one_of, "generator", Variant, self.generator),
            dtype=optional(dtype_name, "dtype", self.dtype),
            max_shard_size=optional(size_in_bytes, "max_shard_size", self.max_shard_size),
            tied=optional(one_of, "tied", Tied, self.tied),
            architecture=optional(_class_name, "architecture", self.architecture),
            labels=_label_names(self.labels),
            device=_device(self.device),
            jobs=optional(whole_number, "jobs", self.jobs),
        )

    @property
    def header_dtype(self) -> str | None:
        """The dtype of all float tensors, in safetensors' names; None keeps each dtype."""
        return None if self.dtype is None else HEADER_NAMES[self.dtype]

    def record(self, base: BaseOptions) -> Mapping[str, object]:
        """Return the options that decide the bytes of the output, as a JSON object.

        Adapters and weights are recorded with the inputs. The number of threads and `resume` do not
        change the output.
        """
        return {
            "projections": self.projections,
            "generator": self.generator,
            "base_dtype": base.dtype,
            "key_map": [f"{old}={new}" for old, new in base.key_map],
            "dtype": self.dtype,
            "max_shard_size": self.max_shard_size,
            "tied": self.tied,
            "dequantize": self.dequantize,
            "architecture": self.architecture,
            "labels": list(self.labels),
            "device": self.device.name,
            "check": self.check,
            "checksums": self.checksums,
        }


def _class_name(name: str, value: object) -> str:
    """Return the name of a class."""
    found = text(name, value)
    if not found.isidentifier():
        raise ParameterError(
            name,
            f"is {printable(found)}: give the name of a class, such as "
            "LlamaForSequenceClassification.",
        )
    return found


def _label_names(labels: object) -> tuple[str, ...]:
    """Return the names of labels, each different from all others."""
    found = texts("labels", labels)
    if len({*found}) < len(found):
        raise ParameterError("labels", "has a name twice: give a name of its own for each label.")
    return found


def _device(device: object) -> Device:
    """Return a device by itself or by its name; a GPU needs the extra torch."""
    if not isinstance(device, str):
        return instance("device", Device, device)
    if device == CPU.name:
        return CPU
    if re.fullmatch(r"cuda(:\d{1,4})?", device, re.ASCII) is None:
        raise ParameterError("device", f'is "{printable(device)}": give cpu, cuda or cuda:N.')
    # Imported by name and only here, because the module needs torch and may import this module.
    try:
        compute = import_module("vera_convert.with_torch.compute")
    except SurroundingsError as error:
        raise SurroundingsError(f"--device {device} needs PyTorch. {error}") from error
    found: Device = compute.on_gpu(device)
    return found
