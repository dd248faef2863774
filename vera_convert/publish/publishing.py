"""Publish output completely or not at all. Only this folder renames or deletes files.

A run writes the output into a hidden folder beside OUT (see `staging`), syncs the output, and then
moves the output to OUT in one rename, or exchanges the output with OUT. `filesystem` holds the
system calls, `signals` decides when a signal may interrupt.

There are two limits. A disk with a false fsync may lose output. If the system lacks a rename that
refuses to replace (NFS), a run may replace an *empty* folder, created at OUT during the rename.
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
"""Returns the files of a folder at OUT that a run would not write, by relative path."""

logger = logging.getLogger(__name__)

_MOST_NAMED = 10
_TRIES = 16
"""The most tries against other runs for the same OUT; the first try is nearly always enough."""


@contextmanager
def staged_folder(
    out: Path,
    *,
    force: bool = False,
    inputs: Sequence[Path] = (),
    is_own: Callable[[Path], bool],
    strangers: Strangers = lambda _: (),
    is_wanted: Callable[[], bool] = lambda: True,
) -> Iterator[Path]:
    """Yield an empty folder, which becomes `out` if the block succeeds and else is removed.

    After the block, the function syncs all files, publishes the folder in one rename, and syncs the
    parent. SIGINT, SIGTERM and SIGHUP leave nothing behind. A signal during the rename or later is
    dropped, because the output is complete. Modes follow the umask. Writing threads and processes
    must end before the block ends.

    Args:
        out: the path of the new folder.
        force: replace an existing folder for which `is_own` returns True.
        inputs: paths that the run reads; `out` must not be, contain or lie inside an input.
        is_own: whether this command writes folders like the given folder.
        strangers: returns the files that forbid the replacement of an existing folder.
        is_wanted: called after the block; if False is returned, the new folder is removed.

    Raises:
        UsageError: `out` exists and may not be replaced, overlaps an input, or has no name.
        SurroundingsError: the system refused an operation, also inside the block.
        Interrupted: a signal arrived; nothing is left behind.
    """
    replacing = _Replacing(force, is_own, folder=True, strangers=strangers)
    with _staged(out, inputs, replacing, is_wanted=is_wanted) as staged:
        yield staged.folder


@contextmanager
def staged_file(
    out: Path,
    *,
    force: bool = False,
    inputs: Sequence[Path] = (),
    is_own: Callable[[Path], bool],
) -> Iterator[Path]:
    """Yield a free path; the file that the block writes there becomes `out`.

    Otherwise like `staged_folder`, for one file.
    """
    replacing = _Replacing(force, is_own, folder=False)
    with _staged(out, inputs, replacing) as staged:
        yield staged.folder


@contextmanager
def updated_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder whose files then replace the files of the same names in `out`.

    Each file is replaced in one rename. Other files of `out` stay. A missing `out` is created. If
    the block fails, `out` does not change.

    Raises:
        UsageError: `out` has no name.
        SurroundingsError: the system refused an operation, also inside the block.
        Interrupted: a signal arrived.
    """
    with _staged(out, (), None) as staged:
        yield staged.folder


class Staged:
    """The staged output of a run, perhaps with files of an earlier run.

    Attributes:
        folder: the future OUT; for a file, a free path.
        journal: the path of the run's journal, beside the folder; kept with the folder.
        synced: files that the run itself has synced and not changed since.
        worth_keeping: whether a failure leaves folder and journal for a later run; set by the run.
    """

    def __init__(self, folder: Path, journal: Path) -> None:
        self.folder = folder
        self.journal = journal
        self.synced: set[Path] = set()
        self.worth_keeping = False

    def keep_only(self, names: Collection[str]) -> None:
        """Remove all files of the folder except those named, by relative path with `/`."""
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
    """Do the same as `staged_folder`, for a run with a possible continuation by another run.

    If the block fails or is interrupted after it set `worth_keeping`, the hidden folder stays. A
    later run for the same `out` receives the folder if `continues` is True, and else removes it.
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
    """Refuse an `out` before any work that a run would refuse later; `staged_*` check `out` too.

    Raises:
        UsageError: `out` overlaps an input (with links resolved, even with `force`); `out` exists
            without `force`; `out` is a link, is of another kind, or is no output of this
            command; `out` holds files that the command would not write.
        SurroundingsError: the parent is not a folder, or cannot be read.
    """
    with explained(out):
        place = _real_place(out)
        _refuse_overlap(place, inputs)
        _Replacing(force, is_own, folder=folder, strangers=strangers).check(place)


def free_space(out: Path) -> int:
    """Return the free bytes for `out`, including the leftovers of killed runs for `out`.

    Raises:
        SurroundingsError: the folder of `out` cannot be read.
    """
    with explained(out):
        place = _real_place(out)
        there, _ = nearest_folder(place.parent)
        return shutil.disk_usage(there).free + bytes_of_the_dead(place)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Checks before work -------------------------------------------------------------------------------


def _real_place(out: Path) -> Path:
    """Return `out` with the links of the parent resolved, with the last name unchanged.

    Folders above `out` may be missing; `_staged` creates them.
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


def _refuse_overlap(out: Path, inputs: Sequence[Path]) -> None:
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


@dataclass(frozen=True, slots=True)
class _Replacing:
    """Whether a run may replace an existing OUT."""

    allowed: bool
    is_own: Callable[[Path], bool]
    folder: bool
    strangers: Strangers = lambda _: ()

    def check(self, out: Path) -> None:
        """Refuse an existing `out`, unless this run may replace `out`."""
        try:
            mode = out.lstat().st_mode
        except FileNotFoundError:
            return
        shown = printable(str(out))
        fits = stat.S_ISDIR(mode) if self.folder else stat.S_ISREG(mode)
        if not self.allowed:
            remedy = ", or replace it with --force" if fits and self.is_own(out) else ""
            raise UsageError(f"{shown} exists. Choose another OUT{remedy}.")
        if stat.S_ISLNK(mode):
            raise UsageError(
                f"{shown} is a link, and --force replaces no link. Give the link's target."
            )
        if not fits or not self.is_own(out):
            raise UsageError(
                f"{shown} is no output of this command, so --force does not replace it. "
                "Choose another OUT, or move the old one away."
            )
        if self.folder:
            _refuse_strangers(shown, self.strangers(out))


def _refuse_strangers(shown: str, names: Collection[str]) -> None:
    """Refuse to replace a folder with files that the run would delete for good."""
    if names:
        raise UsageError(
            f"{shown} holds files that this command does not write, which --force would delete: "
            f"{listed(sorted(names), _MOST_NAMED)}. Move them away, or choose another OUT."
        )


def files_but(folder: Path, names: Collection[str]) -> list[str]:
    """Return the files and links below a folder that are not in `names`, with `/`.

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
    out: Path,
    inputs: Sequence[Path],
    replacing: _Replacing | None,
    *,
    continues: bool = False,
    is_wanted: Callable[[], bool] = lambda: True,
) -> Iterator[Staged]:
    """Stage and publish an output. Without `replacing`, OUT is a folder that keeps other files."""
    container, staged = None, None
    with signals_raise(), explained(out):
        place = _real_place(out)
        _refuse_overlap(place, inputs)  # before sweeping: nothing is removed inside an input
        if not continues:
            with signals_held():
                sweep_containers(place)
        if replacing is not None:
            replacing.check(place)
        made: list[Path] = []
        try:
            with signals_held():
                _make_folders(place.parent, made)
                make = Container.continuing if continues else Container.beside
                container = make(place)
            staged = Staged(container.new, container.journal)
            if replacing is None or replacing.folder:
                container.new.mkdir(exist_ok=True)  # a continued run has left the folder
            yield staged
            if not is_wanted():
                return
            sync_tree(container.new, synced=staged.synced)
            with signals_held():
                if replacing is None:
                    _update(container.new, place)
                else:
                    _publish(container, place, replacing)
                signals_done()  # the output is there, so the run has succeeded
                container.remove()
        finally:
            if container is not None:
                with signals_held():
                    keep = staged is not None and staged.worth_keeping
                    container.keep() if keep else container.remove()
            for folder in reversed(made):  # folders with OUT or a kept run stay
                with suppress(OSError):
                    folder.rmdir()


def _make_folders(folder: Path, made: list[Path]) -> None:
    """Create the missing folders above OUT, and add each to `made`, outermost first."""
    there, missing = nearest_folder(folder)
    for name in missing:
        there /= name
        with suppress(FileExistsError):  # another run was faster
            there.mkdir()
            made.append(there)


def _publish(container: Container, out: Path, replacing: _Replacing) -> None:
    """Move `new` to `out` in one step and sync the parent; undo the move if the sync fails."""
    undo = _put_in_place(container, out, replacing)
    try:
        sync_folder(out.parent)
    except OSError:
        with suppress(OSError):  # the first error is reported
            undo()
        raise
    logger.info("wrote %s", out)


def _update(new: Path, out: Path) -> None:
    """Move each file of `new` into the folder `out`, and sync `out`."""
    out.mkdir(exist_ok=True)
    for path in sorted(new.iterdir()):
        path.replace(out / path.name)
    sync_folder(out)


def _put_in_place(container: Container, out: Path, replacing: _Replacing) -> Callable[[], object]:
    """Give `out` the new content, and return a function for the way back."""
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
            # Another run put output there, or removed OUT: try again.
    raise SurroundingsError(f"{printable(str(out))} kept changing while it was to be replaced.")


def _replace(container: Container, out: Path) -> Callable[[], object]:
    """Replace an existing `out` with `new`: by an exchange, else by two renames.

    If a run ends between the two renames, the removal of the container restores `old` first.
    """
    new, old = container.new, container.old
    if exchange(new, out):
        return lambda: exchange(new, out)
    remove_tree(old)  # exists if another run was faster in the last try
    out.rename(old)
    move(new, out)
    return lambda: out.rename(new)
