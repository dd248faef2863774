"""Read the tensors of a safetensors file on demand, or write a file block by block."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vera_convert import rules
from vera_convert.delta import Array
from vera_convert.dtypes import BITS, NAMES
from vera_convert.errors import CheckpointError
from vera_convert.files.file_names import WEIGHTS_NAME, is_pickle
from vera_convert.files.header import header_bytes, in_order, read_header
from vera_convert.files.reading import ByteSource, sha256_of
from vera_convert.progress import counter
from vera_convert.rules import Finding
from vera_convert.text import printable

_BLOCK = 1 << 22
_ARRAY_BLOCK = 1 << 18
"""Bytes of an array that are written at a time. A copy of so many stays in a core's cache, and
Linux takes much longer for writes of several megabytes."""


NUMPY_DTYPE: Mapping[str, np.dtype[Any]] = {
    header: np.dtype(getattr(ml_dtypes, name, name)).newbyteorder("<")
    for header, name in NAMES.items()
    if hasattr(ml_dtypes, name) or name in np.sctypeDict  # ml_dtypes 0.5 brought F8_E8M0
}
"""NumPy's dtype by safetensors dtype; F4 and F6 have none and pass through as bytes."""
_SAFETENSORS_DTYPE = {dtype: name for name, dtype in NUMPY_DTYPE.items()}


# --- reading tensors -----------------------------------------------------------------------------


class TensorFile:
    """A safetensors file whose tensors are read on demand."""

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self.header = read_header(source)

    def blocks(self, name: str, size: int = _BLOCK) -> Iterator[memoryview]:
        """Yield a tensor's bytes in blocks of `size`; each block overwrites the block before.

        Raises:
            KeyError: the file has no tensor of this name.
            SurroundingsError: the file cannot be read, or has changed.
        """
        info = self.header.tensors[name]
        buffer = memoryview(bytearray(min(size, info.nbytes)))
        for start in range(0, info.nbytes, size):
            block = buffer[: min(size, info.nbytes - start)]
            self.source.read_into(self.header.data_start + info.start + start, block)
            yield block
        self.source.check_unchanged()


def pickled_weights(folder: Path) -> Finding | None:
    """Return the finding about pickled adapter weights in a folder; None if there are none."""
    names = [path.name for path in folder.glob("adapter_model.*") if is_pickle(path.name)]
    if not names:
        return None
    beside = (folder / WEIGHTS_NAME).exists()
    found, place = f"there is {printable(min(names))}", printable(str(folder))
    if beside:
        return rules.BOTH_KINDS.at(place, f"{found}, which is not used.")
    return rules.PICKLE_ONLY.at(place, f"{found}, and no {WEIGHTS_NAME}.")


# --- writing -------------------------------------------------------------------------------------


def _closed() -> Iterator[bytes]:
    raise ValueError("the file of this tensor is closed")


class TensorData(NamedTuple):
    """A tensor to write: name, dtype, shape, and bytes on demand.

    Attributes:
        name: the name in the file.
        dtype: the safetensors dtype.
        shape: the shape.
        blocks: yields the bytes in order; a block can overwrite the last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[bytes | memoryview]]

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return math.prod(self.shape) * BITS[self.dtype] // 8

    def __reduce__(self) -> tuple[type[TensorData], tuple[object, ...]]:
        """Let a result be pickled and copied: name, dtype and shape, without the open file."""
        return TensorData, (self.name, self.dtype, self.shape, _closed)

    def sha256(self) -> str:
        """Return the SHA-256 of the bytes, as hex."""
        return sha256_of(self.blocks())

    def array(self) -> Array:
        """Return the values as a new array of the tensor's dtype.

        Raises:
            CheckpointError: NumPy has no such dtype.
        """
        dtype = NUMPY_DTYPE.get(self.dtype)
        if dtype is None:
            reason = f"its dtype is {self.dtype}, which NumPy lacks."
            raise CheckpointError(rules.TENSOR_DTYPE.at(f'tensor "{printable(self.name)}"', reason))
        raw = bytearray()
        for block in self.blocks():
            raw += block
        return np.frombuffer(raw, dtype).reshape(self.shape)


def from_array(name: str, array: Array, dtype: str | None = None) -> TensorData:
    """Return an array as a tensor to write.

    Args:
        name: the name in the file.
        array: of any dtype of safetensors; the file gets C order, little-endian.
        dtype: the safetensors dtype to store; values are cast as NumPy casts.
    """
    kind = array.dtype.newbyteorder("<") if array.dtype.byteorder == ">" else array.dtype
    name_of_kind = _SAFETENSORS_DTYPE[kind] if dtype is None else dtype
    stored = np.asarray(array, NUMPY_DTYPE[name_of_kind])
    return TensorData(name, name_of_kind, array.shape, partial(array_blocks, stored))


def array_blocks(array: Array) -> Iterator[memoryview]:
    """Yield the bytes of an array in C order, a few rows at a time."""
    rows = np.atleast_1d(array)
    step = max(1, _ARRAY_BLOCK * len(rows) // max(1, rows.nbytes))
    for first in range(0, len(rows), step):
        block = np.ascontiguousarray(rows[first : first + step])
        yield block.reshape(-1).view(np.uint8).data


def from_file(file: TensorFile, name: str) -> TensorData:
    """Return a tensor of an open file as a tensor to write."""
    info = file.header.tensors[name]
    return TensorData(name, info.dtype, info.shape, partial(file.blocks, name))


def write_tensors(path: Path, tensors: Iterable[TensorData], metadata: Mapping[str, str]) -> str:
    """Write a new safetensors file block by block and return the SHA-256 of its bytes, as hex.

    Raises:
        ValueError: a tensor yields more or fewer bytes than its shape and dtype need.
        FileExistsError: there is a file at `path` already.
        OSError: the system cannot write the file.
    """
    ordered = in_order(tensors)
    digest = hashlib.sha256()
    header = header_bytes(ordered, metadata)
    count = counter("written", len(header) + sum(tensor.nbytes for tensor in ordered))
    with path.open("xb") as sink:
        for block in itertools.chain([header], _all_blocks(ordered)):
            digest.update(block)
            sink.write(block)
            count(memoryview(block).nbytes)
    return digest.hexdigest()


def _all_blocks(tensors: Iterable[TensorData]) -> Iterator[bytes | memoryview]:
    for tensor in tensors:
        left = tensor.nbytes
        for block in tensor.blocks():
            left -= memoryview(block).nbytes
            yield block
        if left:
            raise ValueError(f"{tensor.name} gave {tensor.nbytes - left} of {tensor.nbytes} bytes")
