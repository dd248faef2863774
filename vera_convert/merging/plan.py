"""Plan the weight files of a merge: the bytes to copy, the tensors to compute, and positions.

This module neither reads nor writes files. A file with the same names, dtypes, shapes and order
keeps the header byte for byte; any other file gets the canonical header.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from vera_convert.assembly.addends import Sum
from vera_convert.assembly.input_files import InputFile
from vera_convert.assembly.writer import Computed, CopiedRange, NewFile, Piece
from vera_convert.base.model import BaseModel
from vera_convert.delta import working_dtype
from vera_convert.files.header import Header, header_bytes, in_order
from vera_convert.files.json_edit import edited_member
from vera_convert.files.shards import INDEX_SUFFIX, SUFFIX, named_weights
from vera_convert.files.tensorfile import NUMPY_DTYPE
from vera_convert.merging.base_files import BaseFiles
from vera_convert.merging.changes import Changes, MergedTensor, merged_tensors
from vera_convert.merging.dequantize import dequantized_metadata
from vera_convert.merging.inputs import MergeInputs


@dataclass(frozen=True, slots=True, eq=False)
class WeightsPlan:
    """The weight files of the output.

    Attributes:
        files: the weight files in order, then the index if there are shards.
        headers: the header of each weight file by name.
        tensors: all tensors, in the order of the files.
    """

    files: tuple[NewFile, ...]
    headers: Mapping[str, bytes]
    tensors: tuple[MergedTensor, ...]


def plan_weights(inputs: MergeInputs, changes: Changes) -> WeightsPlan:
    """Plan the weight files."""
    base, limit = inputs.base.model, inputs.options.max_shard_size
    tensors = _tensors_by_file(inputs, changes)
    shards, index = (
        _kept_shards(base, tensors) if limit is None else _new_shards(base, tensors, limit)
    )
    files, headers = [], {}
    for shard in shards:
        file, headers[shard.name] = _file(shard, inputs.base)
        files.append(file)
    if index is not None:
        text = inputs.base.texts.get(base.index or "")
        files.append(NewFile(index, _index_text(index, shards, text)))
    in_order_of_files = tuple(tensor for shard in shards for tensor in shard.tensors)
    return WeightsPlan(tuple(files), headers, in_order_of_files)


# --- tensors -------------------------------------------------------------------------------------


def _tensors_by_file(inputs: MergeInputs, changes: Changes) -> dict[str, list[MergedTensor]]:
    """Return the tensors for each of the base's files: first the file's own, then new tensors.

    An untied head goes to the file of the embedding, any other new tensor to the last file.
    """
    base = inputs.base.model
    merged = merged_tensors(inputs.base, changes, dtype=inputs.options.header_dtype)
    found: dict[str, list[MergedTensor]] = {file: [] for file in base.files}
    for name, tensor in sorted(base.tensors.items(), key=lambda item: item[1].info.start):
        found[tensor.file].append(merged[name])
    for head, embedding in changes.heads.items():
        found[base.tensors[embedding].file].append(merged[head])
    for name in changes.new:
        found[[*base.files][-1]].append(merged[name])
    return found


def _piece(tensor: MergedTensor, at: int) -> Piece:
    """Return a tensor as a piece of a file that begins at position `at`."""
    source, start, stored = tensor.stored.file, tensor.stored.start, tensor.stored.dtype
    if tensor.is_copied:
        return CopiedRange(source, start, tensor.nbytes, at)
    dtypes = [dtype for term in tensor.terms for dtype in term.dtypes]
    is_matrix = bool(tensor.terms) or tensor.decode is not None
    total = Sum(
        tensor.name,
        tensor.matrix if is_matrix else (tensor.stored.count, 1),
        NUMPY_DTYPE[stored],
        NUMPY_DTYPE[tensor.dtype],
        working_dtype(NUMPY_DTYPE[stored], *dtypes),
        conv1d=tensor.conv1d,
        terms=tensor.terms,
        decode=tensor.decode,
    )
    return Computed(source, start, total, at)


# --- files ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Shard:
    """The tensors of one file, and the base's file with the same tensors if there is one."""

    name: str
    tensors: list[MergedTensor]
    old_name: str | None = None


def _file(shard: _Shard, base: BaseFiles) -> tuple[NewFile, bytes]:
    """Return a file, and the file's header."""
    headers, tensors = base.model.files, shard.tensors
    old = headers.get(shard.old_name or "")
    metadata = (old or next(iter(headers.values()))).metadata
    if base.packed is not None:
        metadata = dequantized_metadata(metadata, base.packed)
    if old is not None and metadata == old.metadata and _fits(tensors, old):
        head = old.raw
    else:
        tensors = in_order(tensors)
        head = header_bytes(tensors, metadata)
    pieces = _pieces(tensors, len(head))
    if old is not None and head == old.raw:
        source = base.files[shard.old_name or ""]
        if _are_all_of(source, pieces):
            # A file system that shares blocks can do so for a whole file.
            return NewFile(shard.name, pieces=(CopiedRange(source, 0, source.size, 0),)), head
    return NewFile(shard.name, head, tuple(pieces)), head


def _fits(tensors: Sequence[MergedTensor], old: Header) -> bool:
    """Say whether a header still describes the tensors: names, dtypes and shapes."""
    found = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    return found == {name: (info.dtype, info.shape) for name, info in old.tensors.items()}


def _pieces(tensors: Iterable[MergedTensor], at: int) -> list[Piece]:
    """Return the pieces of a file; copied ranges that also follow each other in the source are one.

    Args:
        tensors: the tensors in the order of the file.
        at: the position of the first tensor in the file.
    """
    pieces: list[Piece] = []
    for tensor in tensors:
        piece, last = _piece(tensor, at), pieces[-1] if pieces else None
        if (
            isinstance(piece, CopiedRange)
            and isinstance(last, CopiedRange)
            and last.source is piece.source
            and last.start + last.size == piece.start
        ):
            pieces[-1] = replace(last, size=last.size + piece.size)
        elif piece.size:
            pieces.append(piece)
        at += tensor.nbytes
    return pieces


def _are_all_of(source: InputFile, pieces: Sequence[Piece]) -> bool:
    """Say whether the pieces are the whole file, at the same positions."""
    return not pieces or (
        len(pieces) == 1
        and isinstance(pieces[0], CopiedRange)
        and pieces[0].source is source
        and pieces[0].start == pieces[0].at
    )


# --- shards and index ----------------------------------------------------------------------------


def _kept_shards(
    base: BaseModel, tensors: Mapping[str, list[MergedTensor]]
) -> tuple[list[_Shard], str | None]:
    """Return the base's shards, and the name of the index."""
    kept = {file: each for file, each in tensors.items() if each or not base.files[file].tensors}
    names, index = [*kept], base.index
    if named_weights(base.config) is not None:  # loaders look for the usual names by default
        names = _shard_names(base, len(kept) if index is not None else None)
        index = _index_name(base) if index is not None else None
    shards = [_Shard(new, kept[old], old) for new, old in zip(names, kept, strict=True)]
    return shards, index


def _new_shards(
    base: BaseModel, tensors: Mapping[str, list[MergedTensor]], limit: int
) -> tuple[list[_Shard], str | None]:
    """Distribute all tensors, in the base's order, over shards of at most `limit` bytes."""
    parts: list[list[MergedTensor]] = [[]]
    size = 0
    for tensor in (tensor for each in tensors.values() for tensor in each):
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


def _index_text(name: str, shards: Sequence[_Shard], text: bytes | None) -> bytes:
    """Return the bytes of an index, with as much of the base's index as is still right.

    Args:
        name: the name of the index; shards are named relative to the folder of the index.
        shards: the shards.
        text: the bytes of the base's index; None if the base has no index.
    """
    document = json.loads(text) if text is not None else {}
    found = document.get("metadata")
    metadata = dict(found) if isinstance(found, dict) else {}
    folder = PurePosixPath(name).parent
    weight_map: dict[str, str] = {}
    for shard in shards:
        relative = str(PurePosixPath(shard.name).relative_to(folder))
        weight_map |= dict.fromkeys((tensor.name for tensor in shard.tensors), relative)
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    total = sum(tensor.nbytes for tensor in tensors)
    if text is not None and document.get("weight_map") == weight_map:
        if metadata.get("total_size", total) == total:
            return text
        return edited_member(text, ("metadata", "total_size"), total)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(tensor.stored.count for tensor in tensors)
    metadata["total_size"] = total
    document |= {"metadata": metadata, "weight_map": weight_map}
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
