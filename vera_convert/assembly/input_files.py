"""Input files that are opened for one block at a time and must not change during a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from vera_convert.dtypes import BITS
from vera_convert.errors import SurroundingsError
from vera_convert.files.header import Header, TensorInfo
from vera_convert.files.reading import LocalFile, open_local, same_bytes
from vera_convert.files.tensorfile import NUMPY_DTYPE

_BLOCK_VALUES = 1 << 18


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of which any thread can read blocks at any time.

    The file does not stay open, because a model can have more shards than a process may open files.
    Opening a file takes microseconds, a block takes milliseconds.

    Attributes:
        path: the path.
        within: the folder that no link in the path may lead out of.
        identity: device, inode, size and times at the first look.
    """

    path: Path
    within: Path
    identity: tuple[int, int, int, int, int]

    @classmethod
    def look(cls, path: Path, *, within: Path, header: Header | None = None) -> Self:
        """Take a first look at a file.

        Args:
            path: the path.
            within: the folder that no link in the path may lead out of.
            header: the file's header, if an earlier step has read the header.

        Raises:
            CheckpointError: the file is not regular, or a link leads out of the folder.
            SurroundingsError: the file cannot be opened, or no longer has this header.
        """
        with open_local(path, within=within) as file:
            if header is not None and not _has(file, header):
                raise SurroundingsError(
                    f"{file.place} changed while it was read. Try again when nothing writes to it."
                )
            return cls(path, within, file.identity)

    @property
    def size(self) -> int:
        """The length in bytes."""
        return self.identity[2]

    def open(self) -> LocalFile:
        """Open the file; a context manager.

        Raises:
            SurroundingsError: the file cannot be opened, or has changed since the first look.
        """
        file = open_local(self.path, within=self.within)
        file.identity = self.identity
        file.check_unchanged()
        return file

    def check_unchanged(self) -> None:
        """Raise `SurroundingsError` if the file has changed since the first look."""
        self.open().close()

    def same_bytes(self, other: InputFile, size: int) -> bool:
        """Return whether this file and another begin with the same `size` bytes."""
        with self.open() as first, other.open() as second:
            return same_bytes(first, 0, second, 0, size)


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor in an input file.

    Attributes:
        file: the file.
        start: the position of the first byte in the file.
        dtype: the dtype, in safetensors' names.
        shape: the shape.
    """

    file: InputFile
    start: int
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, file: InputFile, header: Header, info: TensorInfo) -> Self:
        """Return the place of a tensor in a file of tensors."""
        return cls(file, header.data_start + info.start, info.dtype, info.shape)

    @property
    def count(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.count * BITS[self.dtype] // 8

    def read(
        self, first: int, last: int, buffer: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Return the bytes `first` to `last` (exclusive), in the memory of a buffer or in new."""
        found = np.empty(last - first, np.uint8) if buffer is None else buffer[: last - first]
        with self.file.open() as source:
            source.read_into(self.start + first, found.data)
        return found

    def blocks(self, count: int | None = None) -> Iterator[NDArray[Any]]:
        """Yield all values, or the first `count` values, in blocks of bounded size."""
        end = self.count if count is None else count
        for first in range(0, end, _BLOCK_VALUES):
            yield self.rows(first, min(first + _BLOCK_VALUES, end), 1).reshape(-1)

    def rows(self, first: int, last: int, columns: int | None = None) -> NDArray[Any]:
        """Return the rows `first` to `last` (exclusive).

        Args:
            first: the number of the first row.
            last: the number of the row after the last.
            columns: the values of a row; None for the columns of a matrix, and for 1 in a tensor
                of another shape.
        """
        dtype = NUMPY_DTYPE[self.dtype]
        if columns is None:
            columns = self.shape[1] if len(self.shape) == 2 else 1
        row = columns * dtype.itemsize
        return self.read(first * row, last * row).view(dtype).reshape(last - first, columns)

    def is_copied_by(self, copy: StoredTensor) -> bool:
        """Say whether the values of a copy, rounded to this tensor's dtype, are this tensor's.

        If the number of rows differs, the rows of the shorter tensor are compared.
        """
        dtype, count = NUMPY_DTYPE[self.dtype], min(copy.count, self.count)
        return all(
            theirs.astype(dtype).tobytes() == ours.tobytes()
            for theirs, ours in zip(copy.blocks(count), self.blocks(count), strict=True)
        )


def _has(file: LocalFile, header: Header) -> bool:
    """Return whether a file still has this header, and the size that the header implies."""
    return file.size == header.file_size and file.read_at(0, header.data_start) == header.raw
