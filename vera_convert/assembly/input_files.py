"""Input files that are opened for one block at a time and must not change during a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from vera_convert.errors import SurroundingsError
from vera_convert.files.header import Header
from vera_convert.files.reading import LocalFile, open_local


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
            header: the file's header, if it has been read before.

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


def _has(file: LocalFile, header: Header) -> bool:
    """Return whether a file still has this header, and the size that the header implies."""
    end = header.data_start + max((info.end for info in header.tensors.values()), default=0)
    return file.size == end and file.read_at(0, header.data_start) == header.raw
