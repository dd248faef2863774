"""Write a LoRA's files into a staged folder, layer by layer, and read back what was written."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vera_convert.errors import SurroundingsError
from vera_convert.files.header import header_bytes, in_order, read_header
from vera_convert.files.reading import open_local
from vera_convert.files.tensorfile import (
    Array,
    TensorData,
    from_array,
)
from vera_convert.lora.forms import FormFiles
from vera_convert.lora.plan import LoraLayer, LoraPlan
from vera_convert.lora.record import metadata_with
from vera_convert.lora.stored import StoredLayer, stored_layer
from vera_convert.publish.publishing import sha256_of
from vera_convert.text import printable, read_back_differs

Progress = Callable[[int, int], None]
"""Told now and then how many bytes are written, and of how many."""


@dataclass(slots=True)
class Measured:
    """What was measured while layers were computed.

    Attributes:
        errors: the relative error of each layer's delta, by the adapter's module path.
        vanished: the share of values that float16 rounds to 0, likewise.
    """

    errors: dict[str, float] = field(default_factory=dict)
    vanished: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest relative error of a layer; 0 without layers."""
        return max(self.errors.values(), default=0.0)


class Computed:
    """Computes the factors of layers; the layer computed last is kept, because it has two tensors.

    Attributes:
        plan: the LoRA.
        measured: errors of the layers so far.
    """

    def __init__(self, plan: LoraPlan) -> None:
        self.measured = Measured()
        self.plan = plan
        self._last: tuple[str, StoredLayer] | None = None

    def of(self, layer: LoraLayer) -> StoredLayer:
        """Return the factors of a layer.

        Raises:
            CheckpointError: a value is too large for the dtype.
        """
        if self._last is None or self._last[0] != layer.module:
            self._last = None  # two layers would take twice the memory
            found = stored_layer(layer, self.plan)
            if layer.vectors is not None:
                self.measured.errors[layer.module] = found.error
                self.measured.vanished[layer.module] = found.vanished
            self._last = layer.module, found
        return self._last[1]


def lora_tensors(plan: LoraPlan, files: FormFiles, computed: Computed) -> Iterator[TensorData]:
    """Yield the two tensors of each layer; they are computed when their bytes are asked for."""
    for layer in plan.layers:
        names, shape = files.names(layer), layer.shape
        shapes = (plan.rank, shape.in_features), (shape.out_features, plan.rank)
        for number, (name, size) in enumerate(zip(names, shapes, strict=True)):
            blocks = _bytes_of(layer, number, files, computed)
            yield TensorData(name, plan.dtype, size[::-1] if files.transposed else size, blocks)


def _bytes_of(
    layer: LoraLayer, number: int, files: FormFiles, computed: Computed
) -> Callable[[], Iterator[bytes | memoryview]]:
    def blocks() -> Iterator[bytes | memoryview]:
        found = computed.of(layer)
        matrix: Array = (found.lora_A, found.lora_B)[number]
        yield from from_array("", matrix.T if files.transposed else matrix).blocks()

    return blocks


def write_weights(
    path: Path,
    tensors: Sequence[TensorData],
    record: Mapping[str, object],
    computed: Computed,
    progress: Progress,
    *,
    metadata: Mapping[str, str],
    check: bool,
) -> None:
    """Write the weights, and read back the header, or every byte if `check` says so.

    The header comes first in the file and states the error, which is known last. The length of the
    header does not depend on the error, so the header is written again at the end.

    Raises:
        CheckpointError: a value is too large for the dtype.
        SurroundingsError: other bytes came back than were written.
    """
    ordered = in_order(tensors)
    total = sum(tensor.nbytes for tensor in ordered)
    data, done = hashlib.sha256(), 0
    header = header_bytes(ordered, metadata_with(record, 0.0, metadata))
    with path.open("xb") as sink:
        sink.write(header)
        for tensor in ordered:
            for block in tensor.blocks():
                sink.write(block)
                done += memoryview(block).nbytes
                if check:
                    data.update(block)
            progress(done, total)
        header = header_bytes(ordered, metadata_with(record, computed.measured.worst, metadata))
        sink.seek(0)
        sink.write(header)
    with open_local(path) as source:
        same = source.size == len(header) + total and read_header(source).data_start == len(header)
        same = same and source.read_at(0, len(header)) == header
        if check and same:
            digest = hashlib.sha256()
            for start in range(len(header), source.size, 1 << 20):
                digest.update(source.read_at(start, min(1 << 20, source.size - start)))
            same = digest.digest() == data.digest()
    if not same:
        raise SurroundingsError(read_back_differs(path.name))


def copy_side_files(folder: Path, names: Sequence[str], staged: Path) -> None:
    """Copy files of the adapter's folder byte for byte, and read them back.

    Raises:
        CheckpointError: a file leads out of the folder.
        SurroundingsError: a file changed while it was read, or came back otherwise.
    """
    for name in names:
        target = staged / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_local(folder / name, within=folder) as source:
            digest = hashlib.sha256()
            with target.open("xb") as sink:
                for start in range(0, source.size, 1 << 20):
                    block = source.read_at(start, min(1 << 20, source.size - start))
                    digest.update(block)
                    sink.write(block)
            source.check_unchanged()
        if sha256_of(target) != digest.hexdigest():
            raise SurroundingsError(read_back_differs(name))


def require_space(needed: int, folder: Path, out: Path) -> None:
    """Raise `SurroundingsError` if the output needs more space than a folder's disk has."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SurroundingsError(
            f"the LoRA takes {needed:,} bytes, and {free:,} are free where {printable(str(out))} "
            "is to appear. Free some space there, choose an OUT on another disk, or give "
            "--dtype bfloat16 or a lower --rank."
        )
