"""Open and read files from strangers by position: local files, and files on a server.

A local file must be regular. The opening never blocks. Reading is by position, because a mapped
file can shrink. The size is compared before memory is allocated; changes are detected afterwards.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Protocol, Self

from vera_convert import rules
from vera_convert.errors import READING_REMEDY, CheckpointError, SurroundingsError
from vera_convert.rules import Finding
from vera_convert.text import printable

logger = logging.getLogger(__name__)


class ByteSource(Protocol):
    """A file to read by position: a local file, or a file on the Hub by range request."""

    @property
    def place(self) -> str:
        """The name for messages; printable."""

    @property
    def size(self) -> int:
        """The length in bytes at the time of opening."""

    def read_at(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes; raise `SurroundingsError` if reading fails."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a writable buffer of bytes; raise `SurroundingsError` if reading fails."""

    def check_unchanged(self) -> None:
        """Raise `SurroundingsError` if the file changed since the opening."""


_OPEN_FLAGS = os.O_RDONLY
for _flag in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY", "O_NOINHERIT"):
    _OPEN_FLAGS |= getattr(os, _flag, 0)
_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_BLOCK = 1 << 20
_LARGEST_READ = 1 << 30  # macOS refuses more than 2 GiB at once, Linux reads less


class LocalFile:
    """A regular file, open for reading by position. Threads may share the file.

    `open_local` returns a LocalFile. A context manager; the file also closes with its last
    reference.
    """

    def __init__(self, fd: int, place: str) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self.place = place
        self.identity = self._look()
        self.size = self.identity[2]

    def _look(self) -> tuple[int, int, int, int, int]:
        found = os.fstat(self._fd)
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def fileno(self) -> int:
        """Return the descriptor, for system calls on ranges of the file."""
        return self._fd

    def read_at(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`.

        Raises:
            ValueError: the range lies outside the file.
            SurroundingsError: the file shrank, or the system cannot read it.
        """
        self._check_range(offset, length)
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; raise the errors of `read_at`."""
        view = buffer.cast("B") if buffer.nbytes else buffer
        self._check_range(offset, buffer.nbytes)
        done = 0
        while done < buffer.nbytes:
            try:
                count = self._read_some(offset + done, view[done : done + _LARGEST_READ])
            except OSError as error:
                raise unreadable(self.place, error) from error
            if not count:
                raise SurroundingsError(f"{self.place} changed while it was read: the file shrank.")
            done += count

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"bytes {offset} to {offset + length} of {self.size}")

    def _read_some(self, offset: int, view: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [view], offset)
        with self._lock:  # Windows has no positioned read
            os.lseek(self._fd, offset, os.SEEK_SET)
            data = os.read(self._fd, len(view))
        view[: len(data)] = data
        return len(data)

    def check_unchanged(self) -> None:
        """Raise `SurroundingsError` if size, times or identity have changed."""
        try:
            found = self._look()
        except OSError as error:
            raise unreadable(self.place, error) from error
        if found != self.identity:
            raise SurroundingsError(
                f"{self.place} changed while it was read. "
                "Try again after all writing to the file has ended."
            )

    def close(self) -> None:
        """Close the file; a second call has no effect."""
        if self._fd >= 0:
            closing, self._fd = self._fd, -1  # a failed close also frees the number for other files
            os.close(closing)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()


def blocks(source: ByteSource, start: int = 0) -> Iterator[bytes]:
    """Yield the bytes of a file from `start` on, in blocks of a MiB."""
    for place in range(start, source.size, _BLOCK):
        yield source.read_at(place, min(_BLOCK, source.size - place))


def file_sha256(source: ByteSource, start: int = 0) -> str:
    """Return the SHA-256 of a file from a byte on, as hex."""
    return sha256_of(blocks(source, start))


def sha256_of(content: Iterable[bytes | memoryview]) -> str:
    """Return the SHA-256 of blocks of bytes, as hex."""
    digest = sha256()
    for block in content:
        digest.update(block)
    return digest.hexdigest()


def same_bytes(first: ByteSource, at: int, second: ByteSource, start: int, size: int) -> bool:
    """Return whether bytes of two files are equal.

    Args:
        first: a file.
        at: the offset in the first file.
        second: another file.
        start: the offset in the second file.
        size: the number of bytes.
    """
    return all(
        first.read_at(at + done, min(_BLOCK, size - done))
        == second.read_at(start + done, min(_BLOCK, size - done))
        for done in range(0, size, _BLOCK)
    )


def open_local(path: Path, *, within: Path | None = None, limit: int | None = None) -> LocalFile:
    """Open a regular file; refuse anything else without blocking.

    Args:
        path: the file.
        within: with links resolved, the file must lie inside this folder, or among the blobs of the
            Hub cache to which the folder belongs as a snapshot.
        limit: the most bytes of the file.

    Raises:
        CheckpointError: not regular, outside the folder, or too large.
        SurroundingsError: the file is missing, or the system cannot open the file.
    """
    place = printable(str(path))
    try:
        file = _opened(path, place) if within is None else _opened_inside(path, within, place)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _NOWHERE:
            raise _missing(path, place) from error
        raise unreadable(place, error) from error
    if limit is not None and file.size > limit:
        raise CheckpointError(too_large(file, limit))
    logger.info("reading %s (%s bytes)", path, f"{file.size:,}")
    return file


def _opened(
    path: Path | str, place: str, *, folder: int | None = None, flags: int = 0
) -> LocalFile:
    """Open a regular file, and check the opened file too, because the path may have changed."""
    found = os.stat(path, dir_fd=folder, follow_symlinks=not flags)
    if stat.S_ISLNK(found.st_mode):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    _require_regular(found, place)  # the opening of some devices has effects
    file = LocalFile(os.open(path, _OPEN_FLAGS | flags, dir_fd=folder), place)
    _require_regular(os.fstat(file.fileno()), place)
    return file


_NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
_SEARCHED = _NO_FOLLOW | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_PATH", os.O_RDONLY)


def _opened_inside(path: Path, within: Path, place: str) -> LocalFile:
    """Open a file whose path, with every link resolved, lies inside a folder.

    The path below the folder is opened name by name without following links, so a link created
    after the resolution stays harmless. On Windows, which lacks such calls, the path is
    resolved once more.
    """
    target, folder = _resolved_inside(path, within, place)
    if not _NO_FOLLOW or os.open not in os.supports_dir_fd:
        file = _opened(target, place)
        if _resolved_inside(path, within, place)[0] != target:
            file.close()
            raise _swapped(place)
        return file
    *parents, name = target.relative_to(folder).parts
    opened = [os.open(folder, _SEARCHED & ~_NO_FOLLOW)]
    try:
        for parent in parents:
            opened.append(os.open(parent, _SEARCHED, dir_fd=opened[-1]))
        return _opened(name, place, folder=opened[-1], flags=_NO_FOLLOW)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise _swapped(place) from error
        raise
    finally:
        for each in opened:
            os.close(each)


def _swapped(place: str) -> SurroundingsError:
    return SurroundingsError(
        f"{place} changed while it was opened. Try again after all writing to the file has ended."
    )


def too_large(source: ByteSource, limit: int) -> Finding:
    """Return the finding that a source has more than `limit` bytes."""
    return rules.FILE_TOO_LARGE.in_file(
        source.place, f"has {source.size:,} bytes; the limit is {limit:,}."
    )


def unreadable(place: str, error: OSError | ValueError) -> SurroundingsError:
    """Return the error for a file if the system refuses to open or read the file."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    remedy = READING_REMEDY if isinstance(error, PermissionError) else ""
    return SurroundingsError(f"{place} cannot be read: {printable(reason)}.", remedy)


def _missing(path: Path, place: str) -> SurroundingsError:
    reason = "there is no such file."
    if path.is_symlink():
        target = printable(str(path.readlink()))
        reason = f"is a link to {target}, which leads nowhere. Replace the link with the file."
    return SurroundingsError(f"{place}: {reason}")


def _require_regular(found: os.stat_result, place: str) -> None:
    if stat.S_ISREG(found.st_mode):
        return
    kinds: dict[Callable[[int], bool], str] = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a named pipe",
        stat.S_ISSOCK: "a socket",
    }
    kind = next((name for test, name in kinds.items() if test(found.st_mode)), "a device")
    raise CheckpointError(rules.NOT_REGULAR.in_file(place, f"is {kind}."))


def _resolved_inside(path: Path, within: Path, place: str) -> tuple[Path, Path]:
    """Return `path` with every link resolved, and a trusted folder that contains the result.

    Raises:
        CheckpointError: the path leads out of `within`.
    """
    folder = Path(os.path.realpath(within, strict=True))
    target = Path(os.path.realpath(path, strict=True))
    if target == folder:  # the path is the folder itself
        return target, target.parent
    if target.is_relative_to(folder):
        return target, folder
    blobs = _cached_blobs(target, folder)
    if blobs is not None:
        return target, blobs
    raise CheckpointError(rules.LINK_OUTSIDE.in_file(place, f"leads to {printable(str(target))}."))


def _cached_blobs(target: Path, folder: Path) -> Path | None:
    """Return the folder of blobs of a Hub cache, if `folder` lies in a snapshot of the cache.

    A cache holds ``models--org--name/snapshots/COMMIT/…``, which are links to
    ``models--org--name/blobs/…``. These can be links to ``blobs/xx/xx…``, which all repos share.

    Returns:
        None if `target` is not a blob of the cache.
    """
    for snapshot in (folder, *folder.parents):
        repo = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repo.name.startswith("models--"):
            if target.parent == repo / "blobs":
                return target.parent
            shared = repo.parent / "blobs"
            is_shared = re.fullmatch("[0-9a-f]{64}", target.name)
            return shared if is_shared and target.parent == shared / target.name[:2] else None
    return None
