"""List the files below a folder: one rule for links, hidden names and depth.

Links are listed and never entered, because a link can lead out of the folder or into a circle.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vera_convert.errors import SurroundingsError, VeraConvertError
from vera_convert.files.reading import unreadable
from vera_convert.text import printable

DEEPEST = 100
"""The most levels of subfolders; a checkpoint has two or three."""

_WEIGHTS = (".safetensors", ".safetensors.index.json")

Failed = dict[str, VeraConvertError] | None


class Folder(NamedTuple):
    """One folder of a walk.

    Attributes:
        name: the path relative to the root of the walk, with `/`; empty for the root.
        entries: files, subfolders and links, sorted by name. If the caller removes a subfolder, the
            walk does not enter the subfolder.
    """

    name: str
    entries: list[os.DirEntry[str]]

    def path_of(self, entry: os.DirEntry[str]) -> str:
        """Return the path of an entry relative to the root, with `/`."""
        return f"{self.name}/{entry.name}" if self.name else entry.name


def walk(
    root: Path, name: str = "", *, hidden: bool = False, failed: Failed = None
) -> Iterator[Folder]:
    """Yield a folder, then each subfolder in sorted order, each with the folders below.

    Args:
        root: the folder.
        name: a folder to start in, relative to the root.
        hidden: list and enter hidden names too, which begin with a dot.
        failed: receives an error for each unreadable subfolder, by relative path. If None, the
            first error is raised.

    Raises:
        SurroundingsError: the root cannot be listed; a subfolder cannot, or lies too deep.
    """
    try:
        if name.count("/") + 1 > DEEPEST:
            shown = printable(f"…/{'/'.join(Path(root, name).parts[-3:])}")
            raise SurroundingsError(
                f"{shown} lies more than {DEEPEST} folders deep; deeper folders are not searched."
            )
        folder = Folder(name, _listed(root / name, hidden=hidden))
    except SurroundingsError as error:
        if failed is None or not name:
            raise
        failed[name] = error
        return
    yield folder
    for entry in folder.entries:
        if entry.is_dir(follow_symlinks=False):
            yield from walk(root, folder.path_of(entry), hidden=hidden, failed=failed)


def _listed(folder: Path, *, hidden: bool) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if hidden or not entry.name.startswith(".")]
    except OSError as error:
        raise unreadable(printable(str(folder)), error) from error
    return sorted(entries, key=lambda entry: entry.name)


def is_regular(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a regular file, or a link that leads to a regular file.

    Raises:
        SurroundingsError: the system cannot tell.
    """
    try:
        return stat.S_ISREG(entry.stat().st_mode)
    except OSError as error:
        if entry.is_symlink():
            return False  # the link leads nowhere, or in a circle
        raise unreadable(printable(entry.path), error) from error


def file_sizes(root: Path) -> dict[str, int]:
    """Return the size of each regular file below a folder, by relative path in sorted order.

    Links to files are included, hidden files are not. A pipe, a folder or a dead link that has the
    name of a weight file is listed with size 0: an attempt to open the file gives the reason.

    Raises:
        SurroundingsError: a folder cannot be listed, or lies too deep.
    """
    found = {
        folder.path_of(entry): entry.stat().st_size if regular else 0
        for folder in walk(root)
        for entry in folder.entries
        if (regular := is_regular(entry)) or entry.name.endswith(_WEIGHTS)
    }
    return dict(sorted(found.items()))


def files_and_links(root: Path, *, failed: Failed = None) -> list[str]:
    """Return each file and link below a folder, hidden ones included, by relative path.

    Args:
        root: the folder.
        failed: as for `walk`.

    Raises:
        SurroundingsError: as for `walk`.
    """
    return [
        folder.path_of(entry)
        for folder in walk(root, hidden=True, failed=failed)
        for entry in folder.entries
        if not entry.is_dir(follow_symlinks=False)
    ]
