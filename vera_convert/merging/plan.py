"""Plan the weight files of a merge: the bytes to copy, the tensors to compute, and positions.

This module neither reads nor writes files. A file with the same names, dtypes, shapes and order
keeps the header byte for byte; any other file gets the canonical header.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from vera_convert.assembly.addends import Sum
from vera_convert.assembly.input_files import InputFile
from vera_convert.assembly.writer import Computed, CopiedRange, NewFile, Piece
from vera_convert.base.model import BaseModel
from vera_convert.base.quantized.recognize import quantized_tensors
from vera_convert.delta import working_dtype
from vera_convert.dtypes import BITS, FLOATS
from vera_convert.files.header import Header, TensorInfo, header_bytes, in_order
from vera_convert.files.json_edit import edited_member
from vera_convert.files.shards import INDEX_SUFFIX, SUFFIX, named_weights
from vera_convert.files.tensorfile import NUMPY_DTYPE
from vera_convert.merging.changes import Changes, Replacement
from vera_convert.merging.dequantize import Decoder, Dequantization, dequantized_metadata


@dataclass(frozen=True, slots=True, eq=False)
class PlannedTensor:
    """One tensor of the output, and the source of the bytes.

    Attributes:
        name: the tensor's name.
        dtype: the dtype in the output.
        shape: the tensor's shape.
        source: the file that stores the tensor.
        start: the position of the first byte in `source`.
        total: the sum to compute; None if the bytes are copied.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: InputFile
    start: int
    total: Sum | None

    @property
    def nbytes(self) -> int:
        """The tensor's size in the output, in bytes."""
        return math.prod(self.shape) * BITS[self.dtype] // 8

    def piece(self, at: int) -> Piece:
        """Return the tensor as a piece of a file that begins at position `at`."""
        if self.total is None:
            return CopiedRange(self.source, self.start, self.nbytes, at)
        return Computed(self.source, self.start, self.total, at)


@dataclass(frozen=True, slots=True, eq=False)
class WeightsPlan:
    """The weight files of the output.

    Attributes:
        files: the files in order; the head of each file is the complete header.
        index: name and bytes of the index, if there are shards.
        headers: the header of each file by name.
        tensors: all tensors, in the order of the files.
        component: the folder of the pipeline's component that is merged; empty outside a pipeline.
    """

    files: tuple[NewFile, ...]
    index: tuple[str, bytes] | None
    headers: Mapping[str, bytes]
    tensors: tuple[PlannedTensor, ...]
    component: str = ""


def plan_weights(
    base: BaseModel,
    files: Mapping[str, InputFile],
    changes: Changes,
    *,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    dequantization: Dequantization | None = None,
    index_text: bytes | None = None,
) -> WeightsPlan:
    """Plan the weight files.

    Args:
        base: the base; if it is dequantized, its view.
        files: the base's weight files by name.
        changes: the changes to the base.
        dtype: the dtype of all float tensors, in safetensors' names; None keeps each dtype.
        max_shard_size: the most bytes of a shard, except for a larger tensor; None keeps the
            shards.
        dequantization: how the base becomes a 16-bit model; None if no tensor is dequantized.
        index_text: the bytes of the base's index, if there is one.
    """
    planner = _Planner(base, files, changes, dtype, dequantization)
    if max_shard_size is None:
        shards, index_name = _kept_shards(base, planner)
    else:
        shards, index_name = _new_shards(base, planner, max_shard_size)
    made, headers, placed = list[NewFile](), dict[str, bytes](), dict[PlannedTensor, str]()
    for shard in shards:
        file, headers[shard.name] = _file(shard, planner)
        made.append(file)
        placed.update(dict.fromkeys(shard.tensors, shard.name))
    index = None
    if index_name is not None:
        index = index_name, _index_text(index_name, placed, index_text)
    return WeightsPlan(tuple(made), index, headers, tuple(placed), base.prefix)


@dataclass(frozen=True, slots=True)
class _Shard:
    """The tensors of one file, and the base's file with the same tensors if there is one."""

    name: str
    tensors: list[PlannedTensor]
    old_name: str | None = None


class _Planner:
    """Plans the tensors of the base and the new tensors."""

    def __init__(
        self,
        base: BaseModel,
        files: Mapping[str, InputFile],
        changes: Changes,
        dtype: str | None,
        dequantization: Dequantization | None,
    ) -> None:
        self.base = base
        self.files = files
        self.changes = changes
        self.dtype = dtype
        self.dequantization = dequantization
        self._of_files: dict[str, list[TensorInfo]] = {}
        for tensor in base.tensors.values():
            self._of_files.setdefault(tensor.file, []).append(tensor.info)
        # A quantized tensor has no meaning in another dtype, so the tensor keeps the dtype.
        stay = dtype is not None and dequantization is None
        self.kept = quantized_tensors(base) if stay else frozenset[str]()

    def of_file(self, name: str) -> list[PlannedTensor]:
        """Return the tensors of one of the base's files, in the order of their bytes."""
        infos = sorted(self._of_files.get(name, ()), key=lambda info: info.start)
        return [self._of_base(info.name) for info in infos]

    def additions(self) -> dict[str, list[PlannedTensor]]:
        """Return the tensors that the base lacks, by the file to write.

        An untied head goes to the file of the embedding, any other new tensor to the last file.
        """
        found: dict[str, list[PlannedTensor]] = {}
        for name, embedding in self.changes.heads.items():
            file = self.base.tensors[embedding].file
            found.setdefault(file, []).append(self._of_base(embedding, name))
        last = [*self.base.files][-1]
        for name, replacement in self.changes.new.items():
            found.setdefault(last, []).append(
                self._of_adapter(name, replacement, replacement.info.dtype)
            )
        return found

    def _of_base(self, stored_name: str, name: str | None = None) -> PlannedTensor:
        """Return a tensor of the base, under another name if given, or the adapter's instead."""
        name = name or stored_name
        replacement = self.changes.replaced.get(name)
        tensor = self.base.tensors[stored_name]
        info = tensor.info
        if replacement is not None:
            return self._of_adapter(name, replacement, info.dtype)
        written = info.dtype if stored_name in self.kept else self._written(info.dtype)
        plan = self.dequantization
        decode = None if plan is None else plan.decoder(stored_name, self.files)
        start = self.base.files[tensor.file].data_start + info.start
        total = self._sum(name, info, written, decode)
        return PlannedTensor(name, written, info.shape, self.files[tensor.file], start, total)

    def _of_adapter(self, name: str, replacement: Replacement, dtype: str) -> PlannedTensor:
        """Return a tensor of an adapter, in the dtype of the replaced tensor."""
        info, source = replacement.info, replacement.owner.weights
        written = self._written(dtype)
        total = self._sum(name, info, written, None)
        return PlannedTensor(name, written, info.shape, source, replacement.start, total)

    def _written(self, dtype: str) -> str:
        return self.dtype if self.dtype is not None and dtype in FLOATS else dtype

    def _sum(self, name: str, info: TensorInfo, written: str, decode: Decoder | None) -> Sum | None:
        """Return the sum to compute for a tensor; None if the bytes stay as they are stored."""
        terms = self.changes.terms.get(name, ())
        if not terms and written == info.dtype and decode is None:
            return None
        stored = NUMPY_DTYPE[info.dtype]
        count = math.prod(info.shape)
        rows, columns = info.shape if terms else (count, 1)
        if decode is not None:
            rows, columns = decode.weight.matrix
        dtypes = [dtype for term in terms for dtype in term.dtypes]
        return Sum(
            name,
            (rows, columns),
            stored,
            NUMPY_DTYPE[written],
            working_dtype(stored, *dtypes),
            conv1d=name in self.changes.conv1d,
            terms=terms,
            decode=decode,
        )


def _file(shard: _Shard, planner: _Planner) -> tuple[NewFile, bytes]:
    """Return a file, and the file's header."""
    base, tensors, dequantization = planner.base, shard.tensors, planner.dequantization
    old = base.files.get(shard.old_name or "")
    metadata = (old or next(iter(base.files.values()))).metadata
    if dequantization is not None:
        metadata = dequantized_metadata(metadata, dequantization.base)
    if old is not None and _fits(tensors, old) and metadata == old.metadata:
        head = old.raw
    else:
        tensors = in_order(tensors)
        head = header_bytes(tensors, metadata)
    pieces = _joined(_placed(tensors, len(head)))
    if old is not None and head == old.raw:
        source = planner.files[shard.old_name or ""]
        if _are_all_of(source, pieces):
            # A file system that shares blocks can do so for a whole file.
            return NewFile(shard.name, pieces=(CopiedRange(source, 0, source.size, 0),)), head
    return NewFile(shard.name, head, tuple(pieces)), head


def _are_all_of(source: InputFile, pieces: Sequence[Piece]) -> bool:
    """Say whether the pieces are the whole file, at the same positions."""
    return not pieces or (
        len(pieces) == 1
        and isinstance(pieces[0], CopiedRange)
        and pieces[0].source is source
        and pieces[0].start == pieces[0].at
    )


def _fits(tensors: Sequence[PlannedTensor], old: Header) -> bool:
    """Say whether a header still describes the tensors: names, dtypes and shapes."""
    return len(tensors) == len(old.tensors) and all(
        info is not None and (tensor.dtype, tensor.shape) == (info.dtype, info.shape)
        for tensor in tensors
        for info in (old.tensors.get(tensor.name),)
    )


def _placed(tensors: Iterable[PlannedTensor], at: int) -> Iterator[Piece]:
    for tensor in tensors:
        if tensor.nbytes:
            yield tensor.piece(at)
        at += tensor.nbytes


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Join copied ranges that also follow each other in the source."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if (
            isinstance(piece, CopiedRange)
            and isinstance(last, CopiedRange)
            and last.source is piece.source
            and last.start + last.size == piece.start
        ):
            joined[-1] = CopiedRange(last.source, last.start, last.size + piece.size, last.at)
        else:
            joined.append(piece)
    return joined


# --- shards and index ----------------------------------------------------------------------------


def _kept_shards(base: BaseModel, planner: _Planner) -> tuple[list[_Shard], str | None]:
    """Return the base's shards with their additions, and the name of the index."""
    additions = planner.additions()
    tensors = {file: [*planner.of_file(file), *additions.get(file, ())] for file in base.files}
    kept = {file: each for file, each in tensors.items() if each or not base.files[file].tensors}
    names, index = [*kept], base.index
    if named_weights(base.config) is not None:  # loaders look for the usual names by default
        names = _shard_names(base, len(kept) if index is not None else None)
        index = _index_name(base) if index is not None else None
    shards = [_Shard(new, kept[old], old) for new, old in zip(names, kept, strict=True)]
    return shards, index


def _new_shards(base: BaseModel, planner: _Planner, limit: int) -> tuple[list[_Shard], str | None]:
    """Distribute all tensors, in the base's order, over shards of at most `limit` bytes."""
    additions = planner.additions()
    parts: list[list[PlannedTensor]] = [[]]
    size = 0
    for file in base.files:
        for tensor in (*planner.of_file(file), *additions.get(file, ())):
            if parts[-1] and size + tensor.nbytes > limit:
                parts.append([])
                size = 0
            parts[-1].append(tensor)
            size += tensor.nbytes
    several = len(parts) > 1
    names = _shard_names(base, len(parts) if several else None)
    shards = [
        _Shard(name, part, name if name in base.files else None)
        for name, part in zip(names, parts, strict=True)
    ]
    return shards, _index_name(base) if several else None


def _shard_names(base: BaseModel, count: int | None) -> list[str]:
    """Return the usual names of `count` shards; None is for a single file without an index."""
    stem = base.prefix + _stem(base)
    if count is None:
        return [f"{stem}{SUFFIX}"]
    return [f"{stem}-{number:05}-of-{count:05}{SUFFIX}" for number in range(1, count + 1)]


def _index_name(base: BaseModel) -> str:
    return f"{base.prefix}{_stem(base)}{INDEX_SUFFIX}"


def _stem(base: BaseModel) -> str:
    """Return the beginning of the names of weight files that loaders expect for this model."""
    if base.index is not None and named_weights(base.config) is None:
        return PurePosixPath(base.index).name.removesuffix(INDEX_SUFFIX)
    is_diffusers = "_class_name" in base.config
    return "diffusion_pytorch_model" if is_diffusers else "model"


def _index_text(name: str, placed: Mapping[PlannedTensor, str], text: bytes | None) -> bytes:
    """Return the bytes of an index, with as much of the base's index as is still right.

    Args:
        name: the name of the index; shards are named relative to the folder of the index.
        placed: the file of each tensor.
        text: the bytes of the base's index.
    """
    document = json.loads(text) if text is not None else {}
    found = document.get("metadata")
    metadata = dict(found) if isinstance(found, dict) else {}
    folder = PurePosixPath(name).parent
    relative = {file: str(PurePosixPath(file).relative_to(folder)) for file in {*placed.values()}}
    weight_map = {tensor.name: relative[file] for tensor, file in placed.items()}
    total = sum(tensor.nbytes for tensor in placed)
    if text is not None and document.get("weight_map") == weight_map:
        if metadata.get("total_size", total) == total:
            return text
        return edited_member(text, ("metadata", "total_size"), total)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(tensor.shape) for tensor in placed)
    metadata["total_size"] = total
    document |= {"metadata": metadata, "weight_map": weight_map}
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
