"""Write a large new file straight to the disk, past the system's cache of files.

The cache costs a copy of every byte, and memory for every page. A large output gains nothing for
this price, because the output is synced before it is published. On ext4 and a fast disk, a file of
768 MiB takes 0.4 s, and 0.6 s or more with the cache and the sync.

Only Linux has such direct writes (O_DIRECT), and only some file systems take them. Elsewhere the
file is written through the cache. The bytes are the same.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

if sys.platform == "linux":
    import fcntl

LEAST_BYTES = 1 << 26
"""The size of the smallest file that is written directly."""
_BLOCK = 1 << 20
"""The bytes of a write."""
_PAGE = 1 << 12
"""A direct write starts at a multiple of this size, in the file and in memory."""


def memory_for(position: int, size: int) -> NDArray[np.uint8]:
    """Return memory (size,) from which `DirectFile` writes to a position without a copy.

    Args:
        position: the position in the file, in bytes.
        size: the number of bytes.
    """
    memory = np.empty(size + _PAGE, np.uint8)
    skipped = (position - memory.ctypes.data) % _PAGE
    return memory[skipped : skipped + size]


class DirectFile:
    """A new file that is written from the beginning to the end."""

    def __init__(self, path: Path, size: int) -> None:
        """Create the file.

        Args:
            path: the path.
            size: the bytes that the file will have.

        Raises:
            FileExistsError: there is a file at `path` already.
            OSError: the system cannot create the file.
        """
        self._file = path.open("xb", buffering=0)
        self._buffer = memoryview(mmap.mmap(-1, _BLOCK))  # mmap's memory starts at a page
        self._used = 0
        self._direct = size >= LEAST_BYTES and self._set_direct(wanted=True)

    def write(self, data: bytes | memoryview) -> int:
        """Add data to the file, and return the number of bytes; the last are written on leaving.

        Raises:
            OSError: the system cannot write.
        """
        rest = memoryview(data)
        to_page = -self._used % _PAGE
        if self._direct and len(rest) >= _BLOCK and (_address(rest) + to_page) % _PAGE == 0:
            self._gather(rest[:to_page])
            self._flush()
            whole = (len(rest) - to_page) // _PAGE * _PAGE
            self._put(rest[to_page : to_page + whole])
            rest = rest[to_page + whole :]
        self._gather(rest)
        return len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Write the rest, unless the block failed, and close the file."""
        with self._file:
            if kind is None:
                self._leave_direct()
                self._flush()

    def _gather(self, rest: memoryview) -> None:
        """Collect bytes, and write them block by block."""
        while rest:
            taken = rest[: _BLOCK - self._used]
            self._buffer[self._used : self._used + len(taken)] = taken
            self._used += len(taken)
            rest = rest[len(taken) :]
            if self._used == _BLOCK:
                self._flush()

    def _flush(self) -> None:
        self._put(self._buffer[: self._used])
        self._used = 0

    def _put(self, rest: memoryview) -> None:
        """Write bytes; for a direct write, the position and the memory are at a page."""
        while rest:
            try:
                done = os.write(self._file.fileno(), rest[:_BLOCK])
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                done = 0  # some file systems accept the flag, and then refuse the write
            if done % _PAGE or not done:
                self._leave_direct()
            rest = rest[done:]

    def _leave_direct(self) -> None:
        if self._direct:
            self._direct = False
            self._set_direct(wanted=False)

    def _set_direct(self, *, wanted: bool) -> bool:
        """Turn direct writes on or off, and say whether the system did so."""
        if sys.platform != "linux":
            return False
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        flags = flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT
        try:
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags)
        except OSError:  # a file system without direct writes
            return False
        return True


def _address(data: memoryview) -> int:
    return int(np.frombuffer(data, np.uint8).ctypes.data)
