"""Find the true place of OUT, and refuse a place that overlaps an input."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from vera_convert.errors import SurroundingsError, UsageError
from vera_convert.text import printable

_ADDRESS = re.compile(r"(hf|https?|s3|gs|file):(?=[/\\\\])")
"""The beginning of an address, in which `Path` makes one slash of two."""
_MOUNTS = Path("/proc/self/mountinfo")


def real_place(out: Path) -> Path:
    """Return `out` with the links of the parent resolved, with the last name unchanged.

    Folders above `out` may be missing.

    Raises:
        UsageError: `out` has no name of its own, or is no path, such as an address on the Hub.
        SurroundingsError: the folder of OUT is no folder.
    """
    if out.name in ("", "..") or "\0" in out.name:
        raise UsageError(f"OUT must end in a name of its own; {printable(str(out))} does not.")
    if "\0" in str(out):
        raise UsageError("OUT cannot be a path: a null character stands in it.")
    address = _ADDRESS.match(str(out))
    if address is not None and not os.path.lexists(address[0]):
        shown = printable(str(out))
        raise UsageError(f"OUT {shown} is an address. Give a path on this machine.")
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


def is_mount_point(place: Path) -> bool:
    """Say whether a device or another folder is mounted at a place, which no rename replaces.

    `os.path.ismount` does not see a folder or file of the same device (a bind mount, as containers
    have). Linux lists these mounts, with octal numbers for blanks and backslashes.
    """
    if os.path.ismount(place):
        return True
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:  # another system
        return False
    wanted = os.fsencode(place)
    return any(
        re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), line.split()[4]) == wanted
        for line in lines
    )


def require_movable(place: Path) -> None:
    """Refuse an existing OUT that the system does not let the user replace.

    Raises:
        SurroundingsError: OUT belongs to another user and lies in a sticky folder such as ``/tmp``,
            or OUT is a folder that the user may not write to.
        OSError: OUT or the folder of OUT cannot be read.
    """
    status, around = place.lstat(), place.parent.stat()
    user = os.geteuid() if hasattr(os, "geteuid") else 0
    shown, folder = printable(str(place)), printable(str(place.parent))
    if around.st_mode & stat.S_ISVTX and user not in (0, status.st_uid, around.st_uid):
        raise SurroundingsError(
            f"{shown} belongs to another user, and in {folder}, which is a sticky folder, only the "
            "owner may replace it.",
            "Choose another OUT.",
        )
    if stat.S_ISDIR(status.st_mode) and not os.access(place, os.W_OK):
        raise SurroundingsError(
            f"{shown} may not be replaced, because your user may not write to this folder.",
            "Choose another OUT, or allow writing with `chmod u+w`.",
        )
