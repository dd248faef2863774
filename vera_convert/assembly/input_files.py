"""Input files that are opened for one block at a time and must stay what they were at first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from vera_convert.errors import SurroundingsError
from vera_convert.files.header import Header
from vera_convert.files.reading import LocalFile, open_local


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of which blocks are read, by any thread and at any time; it is not kept open.

    A model can have more shards than a process may open files. Opening one costs microseconds, a
    block milliseconds.

    Attributes:
        path: where it is.
        within: the folder that no link of it may lead out of.
        identity: device, inode, size and times when it was looked at first.
    """

    path: Path
    within: Path
    identity: tuple[int, int, int, int, int]

    @classmethod
    def look(cls, path: Path, *, within: Path, header: Header | None = None) -> Self:
        """Take a first look at a file.

        Args:
            path: where it is.
            within: the folder that no link of it may lead out of.
            header: what it begins with, if that has been read before.

        Raises:
            CheckpointError: it is no regular file, or leads out of its folder.
            SurroundingsError: it cannot be opened, or is not what its header says any more.
        """
        with open_local(path, within=within) as file:
            if header is not None and not _has(file, header):
                raise SurroundingsError(
                    f"{file.place} changed while it was read. Try again when nothing writes to it."
                )
            return cls(path, within, file.identity)

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return self.identity[2]

    def open(self) -> LocalFile:
        """Open it; a context manager.

        Raises:
            SurroundingsError: it cannot be opened, or is not what it was.
        """
        file = open_local(self.path, within=self.within)
        file.identity = self.identity
        file.check_unchanged()
        return file

    def check_unchanged(self) -> None:
        """Raise `SurroundingsError` if it is not what it was at the first look."""
        self.open().close()


def _has(file: LocalFile, header: Header) -> bool:
    """Say whether a file still has this header, and the size that goes with it."""
    end = header.data_start + max((info.end for info in header.tensors.values()), default=0)
    return file.size == end and file.read_at(0, header.data_start) == header.raw
