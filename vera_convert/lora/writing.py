"""Write the weights of a LoRA layer by layer, and read the file back; or tell the size alone."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from vera_convert.adapter.adapter import Adapter
from vera_convert.adapter.fingerprint import NO_SHA256
from vera_convert.arguments import Progress
from vera_convert.assembly.direct import DirectFile
from vera_convert.base.facts import BaseFacts, BaseOptions
from vera_convert.conversion.projections import ProjectionSource, draw_on_base
from vera_convert.delta import Array
from vera_convert.errors import SurroundingsError
from vera_convert.files.header import header_bytes, in_order, read_header
from vera_convert.files.reading import file_sha256, open_local
from vera_convert.files.tensorfile import TensorData, array_blocks
from vera_convert.hub.lookup import Location
from vera_convert.lora.forms import FormFiles, extras_of, files_of
from vera_convert.lora.options import LoraOptions
from vera_convert.lora.plan import LoraLayer, LoraPlan, plan_lora
from vera_convert.lora.record import LoraSource, metadata_with, record_of
from vera_convert.lora.stored import ComputedFactors, Measured
from vera_convert.merging.in_effect import InEffect, Origin
from vera_convert.text import printable, read_back_differs


@dataclass(frozen=True, slots=True, eq=False)
class SafetensorsWeights:
    """The weights of a LoRA in a safetensors file.

    The file's beginning states the largest error, which is known last. The length of the beginning
    does not depend on the error, so the beginning is written twice.

    Attributes:
        files: the names and the orientation of the factors.
        others: heads and biases.
        record: the LoRA's record, but for its error.
        plan: the LoRA.
    """

    files: FormFiles
    others: Sequence[TensorData]
    record: Mapping[str, object]
    plan: LoraPlan

    def file_size(self) -> int:
        """Return the bytes of the file, without computing a layer."""
        others = sum(tensor.nbytes for tensor in self.others)
        return len(self._header(0.0)) + self.plan.nbytes + others

    def write(self, path: Path, progress: Progress, *, check: bool) -> Measured:
        """Write the file, read back the header, and with `check` every byte; return the errors.

        Raises:
            CheckpointError: a value is too large for the dtype.
            SurroundingsError: other bytes came back than were written.
        """
        header, written = self._header(0.0), hashlib.sha256()
        computed = ComputedFactors(self.plan, start=len(header))
        done, total = len(header), self.file_size()
        with DirectFile(path, total) as sink:
            sink.write(header)
            for tensor in self._tensors(computed):
                for block in tensor.blocks():
                    done += sink.write(block)
                    if check:
                        written.update(block)
                progress(done, total)
        header = self._header(computed.measured.worst)
        with path.open("r+b") as beginning:
            beginning.write(header)
        with open_local(path) as source:
            same = source.size == total and source.read_at(0, len(header)) == header
            same = same and read_header(source).data_start == len(header)
            if check and same:
                same = file_sha256(source, len(header)) == written.hexdigest()
        if not same:
            raise SurroundingsError(read_back_differs(path.name))
        return computed.measured

    def _header(self, error: float) -> bytes:
        tensors = self._tensors(ComputedFactors(self.plan))
        return header_bytes(tensors, metadata_with(self.record, error, self.files.metadata))

    def _tensors(self, computed: ComputedFactors) -> list[TensorData]:
        """Return all tensors in the file's order; a factor is computed when its bytes are read."""
        factors = [
            TensorData(
                name,
                self.plan.dtype,
                size[::-1] if self.files.transposed else size,
                partial(self._blocks, computed, layer, number),
            )
            for layer in self.plan.layers
            for number, (name, size) in enumerate(
                zip(self.files.names(layer), self.plan.shapes(layer), strict=True)
            )
        ]
        return in_order([*factors, *self.others])

    def _blocks(
        self, computed: ComputedFactors, layer: LoraLayer, number: int
    ) -> Iterator[bytes | memoryview]:
        found = computed.of(layer)
        matrix: Array = (found.lora_A, found.lora_B)[number]
        if self.files.transposed:
            yield from array_blocks(matrix.T)
        else:
            yield matrix.reshape(-1).view(np.uint8).data


def require_space(needed: int, folder: Path, out: Path) -> None:
    """Raise `SurroundingsError` if the output needs more space than a folder's disk has."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SurroundingsError(
            f"the LoRA takes {needed:,} bytes, and {free:,} are free where {printable(str(out))} "
            "is to appear. Free some space there, choose an OUT on another disk, or give "
            "--dtype bfloat16 or a lower --rank."
        )


# --- the size alone ------------------------------------------------------------------------------


def lora_size(
    adapter: Adapter,
    location: Location,
    base_facts: BaseFacts,
    base_options: BaseOptions,
    projections: ProjectionSource,
) -> int | None:
    """Return the bytes of the weights that `to-lora` writes for PEFT, exact and in float32.

    Args:
        adapter: the adapter.
        location: where the adapter lies.
        base_facts: the facts of the base.
        base_options: the caller's options for the base, which the file records.
        projections: the source of A and B: ``auto``, ``file`` or ``key``.

    Returns:
        The bytes; None if the sizes of the layers or the rounding of A and B are not known.
    """
    pair = _pair(adapter, base_facts, projections)
    if pair is None or not adapter.layers.keys() <= base_facts.layers.keys():
        return None
    options = LoraOptions(projections=projections)
    plan, extras = plan_lora(adapter, base_facts, pair, options), extras_of(adapter)
    files = files_of(options.target, adapter.config, plan, extras, base_facts)
    source = LoraSource(location, adapter, pair, options, base_options)
    record = record_of(source, plan, source_sha256=NO_SHA256)
    return SafetensorsWeights(files, extras.stored, record, plan).file_size()


def _pair(
    adapter: Adapter, base_facts: BaseFacts, projections: ProjectionSource
) -> InEffect | None:
    """Return the origin of the A and B in effect, with a matrix of the right rank and no values."""
    nothing = np.empty((adapter.config.r, 0), np.float32)
    found = InEffect(nothing, nothing.T, Origin.KEY)
    if projections is not ProjectionSource.KEY:
        if adapter.projections is not None:
            return replace(found, origin=Origin.FILE)
        if adapter.fingerprint is not None:
            return replace(found, origin=Origin.FINGERPRINT, draw=adapter.fingerprint.draw)
    draw = draw_on_base(adapter.config, base_facts)
    return None if draw is None else replace(found, draw=draw)
