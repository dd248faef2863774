"""Find the true place of OUT, and refuse a place that overlaps an input."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vera_convert.errors import SurroundingsError, UsageError
from vera_convert.text import printable


def real_place(out: Path) -> Path:
    """Return `out` with the links of the parent resolved, with the last name unchanged.

    Folders above `out` may be missing.

    Raises:
        UsageError: `out` has no name of its own, or is no path.
        SurroundingsError: the folder of OUT is no folder.
    """
    if out.name in ("", "..") or "\0" in out.name:
        raise UsageError(f"OUT must end in a name of its own; {printable(str(out))} does not.")
    if "\0" in str(out):
        raise UsageError("OUT cannot be a path: a null character stands in it.")
    there, missing = nearest_folder(out.parent)
    shown = printable(str(there))
    if ".." in missing:
        raise UsageError(
            f"OUT leads through the folder {shown}/{printable(missing[0])}, which does not exist, "
            "and out of it again. Write OUT without the two dots."
        )
    try:
        parent = Path(os.path.realpath(there, strict=True))
        if not parent.is_dir():
            raise SurroundingsError(
                f"{shown}, in which OUT is to appear, is not a folder. Choose another OUT."
            )
    except FileNotFoundError as error:
        raise SurroundingsError(
            f"{shown}, the folder of OUT, is a link that leads nowhere, or a removed folder. "
            "Choose another OUT."
        ) from error
    return parent.joinpath(*missing, out.name)


def nearest_folder(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the nearest existing path, and the missing names below."""
    missing: list[str] = []
    while not os.path.lexists(folder) and folder != folder.parent:
        missing.insert(0, folder.name)
        folder = folder.parent
    return folder, tuple(missing)


def _identity(path: Path) -> tuple[int, int] | None:
    """Return device and inode of a file or folder; None if there is nothing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def refuse_overlap(out: Path, inputs: Sequence[Path]) -> None:
    """Refuse an OUT that is, contains or lies inside an input, with all links resolved.

    Raises:
        UsageError: OUT overlaps an input.
    """
    real_out = Path(os.path.realpath(out))
    out_itself = _identity(real_out)
    around_out = [_identity(folder) for folder in real_out.parents]
    for given in inputs:
        real_input = Path(os.path.realpath(given))
        itself = _identity(real_input)
        if itself is None:
            continue  # the reader of this input reports this
        if itself == out_itself:
            relation = "is"
        elif itself in around_out:
            relation = "lies inside"
        elif out_itself and out_itself in map(_identity, real_input.parents):
            relation = "contains"
        else:
            continue
        raise UsageError(
            f"OUT {printable(str(out))} {relation} the input {printable(str(given))}, "
            "which is never written to. Choose another OUT."
        )
