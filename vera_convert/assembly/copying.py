"""Ranges of bytes on their way to a new file: copied by the system where it can, sent off early."""

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
OPEN_FLAGS = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def write_at(target: int, at: int, data: memoryview) -> None:
    """Write all of `data` at a position of an open file."""
    done = 0
    while done < len(data):
        if hasattr(os, "pwrite"):
            done += os.pwrite(target, data[done:], at + done)
        else:  # Windows; each thread has opened the file for itself, so its position is its own
            os.lseek(target, at + done, os.SEEK_SET)
            done += os.write(target, data[done:])


def copy_range(source: LocalFile, target: int, *, start: int, at: int, size: int) -> None:
    """Copy `size` bytes of a file from `start` to a position of another that is open for writing.

    In the kernel where it can do so, and without any copy where the file system shares blocks.
    """
    done = _copied_by_the_kernel(source, target, start, at, size)
    buffer = memoryview(bytearray(min(_FALLBACK_BLOCK, size - done)))
    while done < size:
        block = buffer[: min(len(buffer), size - done)]
        source.read_into(start + done, block)
        write_at(target, at + done, block)
        done += len(block)


def _copied_by_the_kernel(source: LocalFile, target: int, start: int, at: int, size: int) -> int:
    """Return how many bytes the kernel copied: all of them, or as many as it could."""
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
        if count == 0:  # the end of the file, or a file system that says so
            return done
        done += count
    return done


def start_writing_back(target: int, at: int, size: int) -> None:
    """Let the system begin to bring a written range to the disk, so that a sync finds less to do.

    Linux does so when told that a range is not needed any more; what is not on the disk yet stays
    in memory all the same.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(target, at, size, os.POSIX_FADV_DONTNEED)


def forget(target: int) -> None:
    """Drop a synced file from memory, so that it is read back from the disk."""
    start_writing_back(target, 0, 0)
