"""Write a LoRA's files into a staged folder, layer by layer, and read back what was written."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from vera_convert.arguments import Progress
from vera_convert.assembly.direct import DirectFile
from vera_convert.delta import Array
from vera_convert.errors import SurroundingsError
from vera_convert.files.header import header_bytes, in_order, read_header
from vera_convert.files.reading import file_sha256, open_local
from vera_convert.files.tensorfile import TensorData, array_blocks
from vera_convert.lora.forms import FormFiles
from vera_convert.lora.plan import LoraLayer, LoraPlan
from vera_convert.lora.record import metadata_with
from vera_convert.lora.stored import Shared, StoredLayer, stored_layer
from vera_convert.text import printable, read_back_differs


@dataclass(slots=True)
class Measured:
    """The measurements taken while layers were computed.

    Attributes:
        errors: the relative error of each layer's delta, by the adapter's module path.
        vanished: the share of values rounded to 0 by float16, likewise.
    """

    errors: dict[str, float] = field(default_factory=dict)
    vanished: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest relative error of a layer; 0 without layers."""
        return max(self.errors.values(), default=0.0)


class ComputedFactors:
    """Computes the factors of layers; the last layer is kept, because a layer has two tensors.

    Attributes:
        plan: the LoRA.
        measured: errors of the layers so far.
        start: where the first tensor starts in the file; set before the first layer, if at all.
    """

    def __init__(self, plan: LoraPlan) -> None:
        self.measured = Measured()
        self.plan = plan
        self.start = 0
        self._last: tuple[str, StoredLayer] | None = None
        self._shared: Shared | None = None

    def of(self, layer: LoraLayer) -> StoredLayer:
        """Return the factors of a layer.

        Raises:
            CheckpointError: a value is too large for the dtype.
        """
        if self._last is None or self._last[0] != layer.module:
            self._last = None  # two layers would take twice the memory
            self._shared = self._shared or Shared(self.plan, self.start)
            found = stored_layer(layer, self.plan, self._shared)
            if layer.vectors is not None:
                self.measured.errors[layer.module] = found.error
                self.measured.vanished[layer.module] = found.vanished
            self._last = layer.module, found
        return self._last[1]


class Weights(Protocol):
    """The file of a LoRA's weights: safetensors or GGUF.

    The file's beginning states the largest error, which is known last. The length of the beginning
    does not depend on the error, so the beginning is written twice.
    """

    def file_size(self) -> int:
        """Return the bytes of the file, without computing a layer."""

    def write(self, path: Path, progress: Progress, *, check: bool) -> None:
        """Write the file, and read back the header, and with `check` every byte.

        Raises:
            CheckpointError: a value is too large for the dtype.
            SurroundingsError: other bytes came back than were written.
        """


@dataclass(frozen=True, slots=True, eq=False)
class SafetensorsWeights:
    """The weights of a LoRA in a safetensors file.

    Attributes:
        files: the names and the orientation of the factors.
        others: heads and biases.
        record: the LoRA's record, but for its error.
        computed: computes the factors.
    """

    files: FormFiles
    others: Sequence[TensorData]
    record: Mapping[str, object]
    computed: ComputedFactors

    def file_size(self) -> int:
        """Return the bytes of the file, without computing a layer."""
        tensors = self._tensors()
        return len(self._header(tensors, 0.0)) + sum(tensor.nbytes for tensor in tensors)

    def write(self, path: Path, progress: Progress, *, check: bool) -> None:
        """Write the file, and read back the header, and with `check` every byte."""
        tensors, written = self._tensors(), hashlib.sha256()
        header = self._header(tensors, 0.0)
        done, total = len(header), self.file_size()
        self.computed.start = len(header)
        with DirectFile(path, total) as sink:
            sink.write(header)
            for tensor in tensors:
                for block in tensor.blocks():
                    done += sink.write(block)
                    if check:
                        written.update(block)
                progress(done, total)
        header = self._header(tensors, self.computed.measured.worst)
        with path.open("r+b") as beginning:
            beginning.write(header)
        with open_local(path) as source:
            same = source.size == total and source.read_at(0, len(header)) == header
            same = same and read_header(source).data_start == len(header)
            if check and same:
                same = file_sha256(source, len(header)) == written.hexdigest()
        if not same:
            raise SurroundingsError(read_back_differs(path.name))

    def _header(self, tensors: Sequence[TensorData], error: float) -> bytes:
        return header_bytes(tensors, metadata_with(self.record, error, self.files.metadata))

    def _tensors(self) -> list[TensorData]:
        return in_order([*self._factors(), *self.others])

    def _factors(self) -> Iterator[TensorData]:
        """Yield the two tensors of each layer; the factors are computed on writing."""
        plan = self.computed.plan
        for layer in plan.layers:
            named = zip(self.files.names(layer), plan.shapes(layer), strict=True)
            for number, (name, size) in enumerate(named):
                shape = size[::-1] if self.files.transposed else size
                yield TensorData(name, plan.dtype, shape, self._bytes_of(layer, number))

    def _bytes_of(
        self, layer: LoraLayer, number: int
    ) -> Callable[[], Iterator[bytes | memoryview]]:
        def blocks() -> Iterator[bytes | memoryview]:
            found = self.computed.of(layer)
            matrix: Array = (found.lora_A, found.lora_B)[number]
            if self.files.transposed:
                yield from array_blocks(matrix.T)
            else:
                yield matrix.reshape(-1).view(np.uint8).data

        return blocks


def require_space(needed: int, folder: Path, out: Path) -> None:
    """Raise `SurroundingsError` if the output needs more space than a folder's disk has."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SurroundingsError(
            f"the LoRA takes {needed:,} bytes, and {free:,} are free where {printable(str(out))} "
            "is to appear. Free some space there, choose an OUT on another disk, or give "
            "--dtype bfloat16 or a lower --rank."
        )
