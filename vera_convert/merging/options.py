"""How a merge is to be done, as its caller says it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vera_convert.assembly.blocks import CPU, Device
from vera_convert.base.onbase import BaseWish
from vera_convert.conversion.projections import Meant
from vera_convert.draws.generator import Variant
from vera_convert.errors import UsageError
from vera_convert.files.reading import printable
from vera_convert.merging.inputs import AdapterWish
from vera_convert.merging.parts import Tied

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""What `dtype` can be, with safetensors' names."""


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How to merge.

    Attributes:
        weight: the factor of the first adapter's deltas.
        add: further adapters, in the order in which their deltas are added.
        projections: which A and B are meant.
        generator: how they were drawn, where no fingerprint says it.
        dtype: what float tensors become, such as ``bfloat16``; None keeps each.
        max_shard_size: the most bytes of a shard; None keeps the base's shards.
        tied: what becomes of an output head that shares its tensor with the embedding.
        dequantize: make a base whose weights are fp8 a 16-bit model.
        device: what does the products; `with_torch.compute.on_gpu` makes a GPU's.
        jobs: threads; None for one for each core, four at most.
        check: look at all values, and compare what was written with what comes back.
        checksums: take the SHA-256 of every file.
        resume: continue where an earlier run for the same `out` failed, and leave what is finished
            to a later one if this one fails.
        dry_run: plan only.
        force: replace a merged model that lies at `out`.
    """

    weight: float = 1.0
    add: Sequence[AdapterWish] = ()
    projections: Meant = Meant.AUTO
    generator: Variant | None = None
    dtype: str | None = None
    max_shard_size: int | None = None
    tied: Tied | None = None
    dequantize: bool = False
    device: Device = CPU
    jobs: int | None = None
    check: bool = False
    checksums: bool = False
    resume: bool = False
    dry_run: bool = False
    force: bool = False

    def validate(self) -> None:
        """Raise `UsageError` for an option that makes no sense."""
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"--dtype {printable(self.dtype)}: give one of {', '.join(DTYPES)}.")
        for weight in (self.weight, *(each.weight for each in self.add)):
            if not math.isfinite(weight):
                raise UsageError(f"the weight of an adapter is a finite number, not {weight}.")
        if self.max_shard_size is not None and self.max_shard_size < 1:
            raise UsageError("--max-shard-size is a positive number of bytes.")
        if self.jobs is not None and self.jobs < 1:
            raise UsageError("--jobs is a positive number of threads.")

    def record(self, base: BaseWish) -> Mapping[str, object]:
        """Return what decides the bytes of the output, as a JSON object.

        The adapters and their weights are recorded with the inputs. How many threads there are,
        and whether the merge was continued, changes nothing.
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
            "device": self.device.name,
            "check": self.check,
            "checksums": self.checksums,
        }
