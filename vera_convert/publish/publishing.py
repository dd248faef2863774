"""Output appears whole or not at all. Nothing but this renames or deletes.

A run stages what it writes in a hidden folder beside OUT (see `container`), syncs it, and moves it
to OUT in one rename, or exchanges the two. `filesystem` knows how each system does that,
`interrupts` when a signal may come.

Not promised: durability on a disk that lies about fsync; and, where the system has no rename that
refuses to replace (NFS), that an *empty* folder made at OUT in the very moment of publishing is
noticed.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vera_convert.errors import SurroundingsError, UsageError, is_resumable, mark_resumable
from vera_convert.files.walk import files_and_links
from vera_convert.publish.filesystem import exchange, move, remove_tree, sync_folder, sync_tree
from vera_convert.publish.signals import signals_done, signals_held, signals_raise
from vera_convert.publish.staging import TAG, Container, bytes_of_the_dead, sweep_containers
from vera_convert.text import listed, printable

Strangers = Callable[[Path], Collection[str]]
"""Gives the files of a folder at OUT that a run would not write, relative to the folder."""

logger = logging.getLogger(__name__)

_MOST_NAMED = 10
_TRIES = 16
"""Rounds against other runs for the same OUT before giving up; one is nearly always enough."""


@contextmanager
def staged_folder(
    out: Path,
    *,
    force: bool = False,
    inputs: Sequence[Path] = (),
    is_own: Callable[[Path], bool],
    strangers: Strangers = lambda _: (),
) -> Iterator[Path]:
    """Give an empty folder that becomes `out` when the block ends well, and vanishes when not.

    Everything in it is synced, then it is published by one rename that never replaces what it may
    not, and the parent is synced. SIGINT, SIGTERM and SIGHUP leave nothing behind; one that comes
    during the rename or later is dropped, because the output is there. Modes follow the umask.
    Threads and processes that write into the folder must have ended when the block does.

    Args:
        out: where the folder is to appear.
        force: replace an existing folder for which `is_own` holds.
        inputs: what is read; `out` must not be, contain or lie inside any of it.
        is_own: whether a path is of the kind that this command writes.
        strangers: files of an existing folder that keep it from being replaced.

    Raises:
        UsageError: `out` exists and may not be replaced, overlaps an input, or has no name.
        SurroundingsError: the system refused (also for an `OSError` of the block itself).
        Interrupted: a signal came; nothing is left.
    """
    replacing = _Replacing(force, is_own, folder=True, strangers=strangers)
    with _staged(out, inputs, replacing) as staged:
        yield staged.folder


@contextmanager
def staged_file(
    out: Path,
    *,
    force: bool = False,
    inputs: Sequence[Path] = (),
    is_own: Callable[[Path], bool],
) -> Iterator[Path]:
    """Give a path at which nothing is yet; the file written there becomes `out`.

    Otherwise as `staged_folder`, for one file.
    """
    replacing = _Replacing(force, is_own, folder=False)
    with _staged(out, inputs, replacing) as staged:
        yield staged.folder


@contextmanager
def updated_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder whose files then replace those of the same names in `out`.

    Each file is replaced in one rename, all others of `out` stay, and `out` is made if it is
    missing. A failure of the block changes nothing.

    Raises:
        UsageError: `out` has no name.
        SurroundingsError: the system refused (also for an `OSError` of the block itself).
        Interrupted: a signal came.
    """
    container = None
    with signals_raise(), explained(out):
        place = _real_place(out)
        with signals_held():
            sweep_containers(place)
        try:
            with signals_held():
                container = Container.beside(place)
            container.new.mkdir()
            yield container.new
            sync_tree(container.new)
            with signals_held():
                place.mkdir(exist_ok=True)
                for path in sorted(container.new.iterdir()):
                    path.replace(place / path.name)
                sync_folder(place)
                signals_done()
                container.remove()
        finally:
            if container is not None:
                with signals_held():
                    container.remove()


class Staged:
    """What a run stages, and what of it an earlier run left.

    Attributes:
        folder: what is to become OUT; for a file, a path at which nothing is yet.
        journal: a file of the run's own, beside the folder; what is in it survives with the folder.
        synced: files that the run has brought to the disk itself, and not touched since.
        worth_keeping: whether a failure leaves folder and journal for a later run; set by the run.
    """

    def __init__(self, folder: Path, journal: Path) -> None:
        self.folder = folder
        self.journal = journal
        self.synced: set[Path] = set()
        self.worth_keeping = False

    def keep_only(self, names: Collection[str]) -> None:
        """Remove every file of the folder but those named, relative to it and with `/`."""
        for name in files_but(self.folder, names):
            remove_tree(self.folder / name)


@contextmanager
def staged_run(
    out: Path,
    *,
    continues: bool,
    force: bool = False,
    inputs: Sequence[Path] = (),
    is_own: Callable[[Path], bool],
    strangers: Strangers = lambda _: (),
) -> Iterator[Staged]:
    """Do as `staged_folder`, for a run that syncs files itself, and may be continued by another.

    If the block fails or is stopped and found its work worth keeping, the hidden folder stays. A
    later run for the same `out` that `continues` gets it; one that does not removes it.
    """
    replacing = _Replacing(force, is_own, folder=True, strangers=strangers)
    with _staged(out, inputs, replacing, continues=continues) as staged:
        yield staged


def check_out(
    out: Path,
    *,
    inputs: Sequence[Path],
    force: bool,
    is_own: Callable[[Path], bool],
    folder: bool = True,
    strangers: Strangers = lambda _: (),
) -> None:
    """Refuse an `out` that could not be published, before any work; `staged_*` do so themselves.

    Raises:
        UsageError: `out` overlaps an input (links resolved, whatever `force` says); it exists
            without `force`; it is a link, of another kind, or not the command's own; it holds
            files that the command would not write.
        SurroundingsError: its parent is no folder, or cannot be looked into.
    """
    with explained(out):
        place = _real_place(out)
        _refuse_overlap(place, inputs)
        _Replacing(force, is_own, folder=folder, strangers=strangers).check(place)


def free_space(out: Path) -> int:
    """Return how many bytes are free for `out`, counting what killed runs for it left there.

    Raises:
        SurroundingsError: the folder where it goes cannot be looked at.
    """
    with explained(out):
        place = _real_place(out)
        there, _ = nearest_folder(place.parent)
        return shutil.disk_usage(there).free + bytes_of_the_dead(place)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal digits, for reading back."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Checks before work -------------------------------------------------------------------------------


def _real_place(out: Path) -> Path:
    """Return `out` with the links of its parent resolved and its own name as it is.

    Folders above `out` may be missing: `_staged` makes them.
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
            f"{shown}, in which OUT is to appear, is a link that leads nowhere. Choose another OUT."
        ) from error
    return parent.joinpath(*missing, out.name)


def nearest_folder(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the nearest path above that exists, and the names below it that do not."""
    missing: list[str] = []
    while not os.path.lexists(folder) and folder != folder.parent:
        missing.insert(0, folder.name)
        folder = folder.parent
    return folder, tuple(missing)


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file or folder from all others by whatever name; None if it is absent."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _refuse_overlap(out: Path, inputs: Sequence[Path]) -> None:
    real_out = Path(os.path.realpath(out))
    out_itself = _identity(real_out)
    around_out = [_identity(folder) for folder in real_out.parents]
    for given in inputs:
        real_input = Path(os.path.realpath(given))
        itself = _identity(real_input)
        if itself is None:
            continue  # whoever reads it will say so
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


@dataclass(frozen=True, slots=True)
class _Replacing:
    """What a run may replace: nothing, or what its command writes."""

    allowed: bool
    is_own: Callable[[Path], bool]
    folder: bool
    strangers: Strangers = lambda _: ()

    def check(self, out: Path) -> None:
        """Refuse an existing `out` that this run may not replace."""
        try:
            mode = out.lstat().st_mode
        except FileNotFoundError:
            return
        shown = printable(str(out))
        if not self.allowed:
            raise UsageError(f"{shown} exists. Choose another OUT, or replace it with --force.")
        if stat.S_ISLNK(mode):
            raise UsageError(f"{shown} is a link; --force replaces none. Give what it leads to.")
        fits = stat.S_ISDIR(mode) if self.folder else stat.S_ISREG(mode)
        if not fits or not self.is_own(out):
            raise UsageError(
                f"{shown} is not what this command writes, so --force does not replace it. "
                "Choose another OUT, or move it away."
            )
        if self.folder:
            _refuse_strangers(shown, self.strangers(out))


def _refuse_strangers(shown: str, names: Collection[str]) -> None:
    """Refuse to replace a folder with files that the run would not write."""
    if names:
        raise UsageError(
            f"{shown} holds files that this command does not write, which --force would delete: "
            f"{listed(sorted(names), _MOST_NAMED)}. Move them away, or choose another OUT."
        )


def files_but(folder: Path, names: Collection[str]) -> list[str]:
    """Return the files and links below a folder that are not among `names`, with `/`.

    Raises:
        SurroundingsError: the folder cannot be listed, or is too deep.
    """
    return [name for name in files_and_links(folder) if name not in names]


_REMEDIES = {
    errno.ENOSPC: "Free some space there, or choose an OUT on another disk.",
    errno.EDQUOT: "Free some of your quota there, or choose an OUT on another disk.",
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f), or choose another file system.",
    errno.EACCES: "Choose an OUT in a folder that you may write to.",
    errno.EPERM: "Choose an OUT in a folder that you may write to.",
    errno.EROFS: "Choose an OUT in a folder that can be written to.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n).",
    errno.EIO: "The disk is faulty or gone; the system's log may say more.",
    errno.EBUSY: "It is in use, perhaps as a mount point. Choose another OUT.",
    errno.EXDEV: "It belongs to another file system or an image's layer. Choose another OUT.",
}


@contextmanager
def explained(out: Path) -> Iterator[None]:
    """Turn an `OSError` of the system (not of a connection) into a `SurroundingsError`."""
    try:
        yield
    except ConnectionError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        where = "" if not name or TAG in name else f" ({printable(name)})"
        explained = SurroundingsError(
            f"{printable(str(out))} could not be written: {error.strerror}{where}. "
            f"{_REMEDIES.get(error.errno, '')}".rstrip()
        )
        if is_resumable(error):
            mark_resumable(explained)
        raise explained from error


# Publishing ---------------------------------------------------------------------------------------


@contextmanager
def _staged(
    out: Path, inputs: Sequence[Path], replacing: _Replacing, *, continues: bool = False
) -> Iterator[Staged]:
    container, staged = None, None
    with signals_raise(), explained(out):
        place = _real_place(out)
        _refuse_overlap(place, inputs)  # before sweeping: nothing is removed inside an input
        if not continues:
            with signals_held():
                sweep_containers(place)
        replacing.check(place)
        made: list[Path] = []
        try:
            with signals_held():
                _make_folders(place.parent, made)
                make = Container.continuing if continues else Container.beside
                container = make(place)
            staged = Staged(container.new, container.journal)
            if replacing.folder and not container.new.is_dir():
                container.new.mkdir()
            yield staged
            sync_tree(container.new, synced=staged.synced)
            with signals_held():
                _publish(container, place, replacing)
                signals_done()  # the output is there, so the run has succeeded
                container.remove()
        finally:
            if container is not None:
                with signals_held():
                    keep = staged is not None and staged.worth_keeping
                    container.keep() if keep else container.remove()
            for folder in reversed(made):  # those that hold OUT, or what was kept, stay
                with suppress(OSError):
                    folder.rmdir()


def _make_folders(folder: Path, made: list[Path]) -> None:
    """Make the folders that OUT is to lie in, and add each to `made` from the top."""
    there, missing = nearest_folder(folder)
    for name in missing:
        there /= name
        with suppress(FileExistsError):  # another run was faster
            there.mkdir()
            made.append(there)


def _publish(container: Container, out: Path, replacing: _Replacing) -> None:
    """Move `new` to `out` in one step and sync the parent; undo it if that fails."""
    undo = _put_in_place(container, out, replacing)
    try:
        sync_folder(out.parent)
    except OSError:
        with suppress(OSError):  # the first error is the one to tell
            undo()
        raise
    logger.info("wrote %s", out)


def _put_in_place(container: Container, out: Path, replacing: _Replacing) -> Callable[[], object]:
    """Give `out` its new content and return how to take it back."""
    for _ in range(_TRIES):
        try:
            move(container.new, out)
        except FileExistsError:
            replacing.check(out)
        else:
            return lambda: out.rename(container.new)
        try:
            return _replace(container, out)
        except (FileExistsError, FileNotFoundError):
            if not os.path.lexists(container.new):
                raise
            # Another run put its output there, or took it away: look again.
    raise SurroundingsError(f"{printable(str(out))} kept changing while it was to be replaced.")


def _replace(container: Container, out: Path) -> Callable[[], object]:
    """Put `new` where `out` exists: by an exchange, else by two renames.

    Should the run end between the two, whoever removes the container puts `old` back first.
    """
    new, old = container.new, container.old
    if exchange(new, out):
        return lambda: exchange(new, out)
    remove_tree(old)  # there is one if another run was faster in the last round
    out.rename(old)
    move(new, out)
    return lambda: out.rename(new)
