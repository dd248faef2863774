"""Copy byte ranges into a new file, in the kernel if possible, and start the write-back early."""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from vera_convert.files.reading import LocalFile

_UNSUPPORTED = {
    errno.EBADF,  # some network file systems
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EPERM,  # some containers
    errno.EXDEV,
}
_FALLBACK_BLOCK = 1 << 20
_WRITE_BLOCK = 1 << 18
"""Bytes that are written at a time: Linux takes longer for writes of several megabytes."""
OPEN_FLAGS = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def write_at(target: int, at: int, data: memoryview) -> None:
    """Write all of `data` at a position of an open file."""
    done = 0
    while done < len(data):
        if hasattr(os, "pwrite"):
            done += os.pwrite(target, data[done : done + _WRITE_BLOCK], at + done)
        else:  # Windows; each thread opens the file, so each thread has a separate position
            os.lseek(target, at + done, os.SEEK_SET)
            done += os.write(target, data[done:])


def copy_range(source: LocalFile, target: int, *, start: int, at: int, size: int) -> None:
    """Copy a byte range of a file into an open file.

    The kernel copies if possible. File systems that share blocks then copy nothing.

    Args:
        source: the file.
        target: the descriptor of the open file.
        start: the offset in the file.
        at: the offset in the open file.
        size: the number of bytes.

    Raises:
        SurroundingsError: the file cannot be read, or shrank.
        OSError: the system cannot write.
    """
    done = _copied_by_the_kernel(source, target, start, at, size)
    buffer = memoryview(bytearray(min(_FALLBACK_BLOCK, size - done)))
    while done < size:
        block = buffer[: min(len(buffer), size - done)]
        source.read_into(start + done, block)
        write_at(target, at + done, block)
        done += len(block)


def _copied_by_the_kernel(source: LocalFile, target: int, start: int, at: int, size: int) -> int:
    """Let the kernel copy, and return the number of copied bytes."""
    done = 0
    if not hasattr(os, "copy_file_range"):
        return done
    while done < size:
        try:
            count = os.copy_file_range(
                source.fileno(), target, size - done, start + done, at + done
            )
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            return done
        if count == 0:  # the end of the file, or a file system that reports one
            return done
        done += count
    return done


def start_writing_back(target: int, at: int, size: int) -> None:
    """Let the system start to write a range to the disk, so a later sync takes less time.

    Linux starts the write-back when a program declares a range as no longer needed. Bytes that are
    not on the disk yet stay in memory.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(target, at, size, os.POSIX_FADV_DONTNEED)


def forget(target: int) -> None:
    """Drop a synced file from memory, so the next read comes from the disk."""
    start_writing_back(target, 0, 0)
