"""Publish output completely or not at all. Only this folder renames or deletes files.

A run writes the output into a hidden folder beside OUT (see `staging`), syncs the output, and then
moves the output to OUT in one rename, or exchanges the output with OUT. `filesystem` holds the
system calls, `signals` decides when a signal may interrupt.

There are two limits. A disk with a false fsync may lose output. If the system lacks a rename that
refuses to replace (NFS), a run may replace an *empty* folder, created at OUT during the rename.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from vera_convert.arguments import require_flags
from vera_convert.errors import SurroundingsError, UsageError, is_resumable, mark_resumable
from vera_convert.files import reading
from vera_convert.files.walk import files_and_links
from vera_convert.publish.filesystem import (
    exchange,
    is_empty,
    is_read_only,
    move,
    remove_tree,
    sync_folder,
    sync_tree,
)
from vera_convert.publish.place import (
    is_mount_point,
    nearest_folder,
    real_place,
    refuse_overlap,
    require_movable,
)
from vera_convert.publish.signals import signals_done, signals_held, signals_raise
from vera_convert.publish.staging import TAG, Container, bytes_of_the_dead, sweep_containers
from vera_convert.text import listed, printable

Strangers = Callable[[Path], Collection[str]]
"""Returns the files of a folder at OUT that a run would not write, by relative path."""

logger = logging.getLogger(__name__)

_MOST_NAMED = 10
_TRIES = 16
"""The most tries against other runs for the same OUT; the first try is nearly always enough."""


@dataclass(frozen=True, slots=True)
class Output:
    """The folder or the file that a command writes, called OUT in messages.

    Attributes:
        path: the path of OUT.
        is_own: returns whether this command writes folders, or files, like the given one.
        force: replace an existing OUT that is an empty folder, or for which `is_own` returns True.
        inputs: paths that the run reads; OUT must not be, contain or lie inside an input.
        strangers: returns the files that forbid the replacement of an existing folder.
        is_folder: whether OUT is a folder; else a file.
        updates: whether OUT is a folder whose other files stay, see `updated_folder`; nothing else
            counts then.
    """

    path: Path
    is_own: Callable[[Path], bool]
    force: bool = False
    inputs: Sequence[Path] = ()
    strangers: Strangers = lambda _: ()
    is_folder: bool = True
    updates: bool = False

    def __post_init__(self) -> None:
        require_flags(force=self.force)

    def check(self) -> None:
        """Refuse an OUT before any work that a run would refuse later; `staged` checks OUT too.

        Raises:
            UsageError: OUT overlaps an input (with links resolved, even with `force`); OUT exists
                without `force`; OUT is a link, is of another kind, or is neither empty nor an
                output of this command; OUT holds files that the command would not write.
            SurroundingsError: the parent is not a folder, or cannot be read or written to.
        """
        with explained(self.path):
            place = real_place(self.path)
            refuse_overlap(place, self.inputs)
            self.require_replaceable(place)
            there, _ = nearest_folder(place.parent)
            as_effective_user = os.access in os.supports_effective_ids
            if not os.access(there, os.W_OK | os.X_OK, effective_ids=as_effective_user):
                code = errno.EROFS if is_read_only(there) else errno.EACCES
                raise OSError(code, os.strerror(code), str(there))

    @property
    def free_space(self) -> int:
        """The free bytes for OUT, including the leftovers of killed runs for OUT.

        Raises:
            SurroundingsError: the folder of OUT cannot be read.
        """
        with explained(self.path):
            place = real_place(self.path)
            there, _ = nearest_folder(place.parent)
            return shutil.disk_usage(there).free + bytes_of_the_dead(place)

    @contextmanager
    def staged(self, *, is_wanted: Callable[[], bool] = lambda: True) -> Iterator[Path]:
        """Yield an empty folder, or a free path for a file, and publish the content as OUT.

        After the block, all files are synced, the content becomes OUT in one rename, and the parent
        is synced. If the block fails, OUT does not change. SIGINT, SIGTERM and SIGHUP leave nothing
        behind. A signal during the rename or later is dropped, because the output is complete.
        Modes follow the umask. Writing threads and processes must end before the block ends.

        Args:
            is_wanted: called after the block; if False is returned, the content is removed.

        Raises:
            UsageError: OUT exists and may not be replaced, overlaps an input, or has no name.
            SurroundingsError: the system refused an operation, also inside the block.
            Interrupted: a signal arrived; nothing is left behind.
        """
        with self.staged_run(is_wanted=is_wanted) as staged:
            yield staged.folder

    @contextmanager
    def staged_run(
        self, *, continues: bool = False, is_wanted: Callable[[], bool] = lambda: True
    ) -> Iterator[Staged]:
        """Do the same as `staged`, for a run that another run can continue.

        If the block sets `worth_keeping` and then fails or is interrupted, the hidden folder stays.
        A later run for the same OUT receives the folder if `continues` is True; any other later run
        removes the folder.
        """
        container, staged = None, None
        with signals_raise(), explained(self.path):
            place = real_place(self.path)
            refuse_overlap(place, self.inputs)  # first, so that nothing is removed inside an input
            if not continues:
                with signals_held():
                    sweep_containers(place)
            self.require_replaceable(place)
            made: list[Path] = []
            try:
                with signals_held():
                    _make_folders(place.parent, made)
                    make = Container.continuing if continues else Container.beside
                    container = make(place)
                staged = Staged(container.new, container.journal)
                if self.is_folder:
                    container.new.mkdir(exist_ok=True)  # a continued run has left the folder
                with _out_in_messages(container.new, self.path):
                    yield staged
                if not is_wanted():
                    return
                sync_tree(container.new, synced=staged.synced)
                with signals_held():
                    if self.updates:
                        _update(container.new, place)
                    else:
                        _publish(container, place, self)
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

    def require_replaceable(self, place: Path) -> None:
        """Refuse an existing OUT, unless this run may replace OUT.

        Args:
            place: the path of OUT with the links of the parent resolved.

        Raises:
            UsageError: OUT is a mount point, or exists without `force`. With `force`: OUT is a
                link, of another kind, a full folder of another command, or holds foreign files.
            SurroundingsError: OUT cannot be read, or the system forbids the user to replace OUT.
        """
        if self.updates:
            return
        try:
            mode = place.lstat().st_mode
        except FileNotFoundError:
            return
        shown = printable(str(place))
        if is_mount_point(place):
            inside = f", such as {shown}/NAME" if self.is_folder else ""
            raise UsageError(f"{shown} is a mount point. Choose another OUT{inside}.")
        fits = stat.S_ISDIR(mode) if self.is_folder else stat.S_ISREG(mode)
        fits = fits and ((self.is_folder and is_empty(place)) or self.is_own(place))
        if not self.force:
            remedy = ", or replace it with --force" if fits else ""
            raise UsageError(f"{shown} exists. Choose another OUT{remedy}.")
        if stat.S_ISLNK(mode):
            raise UsageError(
                f"{shown} is a link, and --force replaces no link. Give the link's target."
            )
        if not fits:
            raise UsageError(
                f"{shown} is no output of this command, so --force does not replace it. "
                "Choose another OUT, or move the old one away."
            )
        strangers = self.strangers(place) if self.is_folder else ()
        if strangers:
            raise UsageError(
                f"{shown} holds files that this command does not write, which --force would "
                f"delete: {listed(sorted(strangers), _MOST_NAMED)}. Move them away, or choose "
                "another OUT."
            )
        require_movable(place)


def updated_folder(out: Path) -> AbstractContextManager[Path]:
    """Yield an empty folder whose files then replace the files of the same names in `out`.

    Each file is replaced in one rename. Other files of `out` stay. A missing `out` is created. If
    the block fails, `out` does not change.

    Raises:
        UsageError: `out` has no name.
        SurroundingsError: the system refused an operation, also inside the block.
        Interrupted: a signal arrived.
    """
    return Output(out, lambda _: True, updates=True).staged()


@dataclass(slots=True)
class Staged:
    """The staged output of a run, perhaps with files of an earlier run.

    Attributes:
        folder: the future OUT; for a file, a free path.
        journal: the path of the run's journal, beside the folder; kept with the folder.
        synced: files that the run itself has synced and not changed since.
        worth_keeping: whether a failure leaves folder and journal for a later run; set by the run.
    """

    folder: Path
    journal: Path
    synced: set[Path] = field(default_factory=set)
    worth_keeping: bool = False

    def keep_only(self, names: Collection[str]) -> None:
        """Remove all files of the folder except those named, by relative path with `/`."""
        for name in files_but(self.folder, names):
            remove_tree(self.folder / name)


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
    **dict.fromkeys((errno.ENOENT, errno.ENAMETOOLONG, errno.EINVAL), "Choose another OUT."),
    errno.EXDEV: "It belongs to another file system or an image's layer. Choose another OUT.",
}

_TWINS = (
    "Two files have this name, in upper and in lower case, and the file system of OUT keeps one "
    "alone. Rename one, or choose an OUT on another disk."
)


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
        remedy = _REMEDIES.get(error.errno, "")
        if error.errno == errno.EEXIST and TAG in name:  # each file is written under a new name
            where, remedy = f" ({printable(Path(name).name)})", _TWINS
        found = SurroundingsError(
            f"{printable(str(out))} could not be written: "
            f"{error.strerror}{where}. {remedy}".rstrip()
        )
        if is_resumable(error):
            mark_resumable(found)
        raise found from error


# Publishing ---------------------------------------------------------------------------------------


@contextmanager
def _out_in_messages(staged: Path, out: Path) -> Iterator[None]:
    """Name OUT in messages and log lines about staged files, which are gone when a user reads."""

    def renamed(record: logging.LogRecord) -> bool:
        record.msg, record.args = record.getMessage().replace(str(staged), str(out)), ()
        return True

    reading.logger.addFilter(renamed)
    try:
        yield
    except SurroundingsError as error:
        text = str(error).replace(printable(str(staged)), printable(str(out)))
        error.args = (text, *error.args[1:])
        raise
    finally:
        reading.logger.removeFilter(renamed)


def _make_folders(folder: Path, made: list[Path]) -> None:
    """Create the missing folders above OUT, and add each to `made`, outermost first."""
    there, missing = nearest_folder(folder)
    for name in missing:
        there /= name
        with suppress(FileExistsError):  # another run was faster
            there.mkdir()
            made.append(there)


def _publish(container: Container, out: Path, output: Output) -> None:
    """Move `new` to `out` in one step and sync the parent; undo the move if the sync fails."""
    undo = _put_in_place(container, out, output)
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


def _put_in_place(container: Container, out: Path, output: Output) -> Callable[[], object]:
    """Give `out` the new content, and return a function for the way back."""
    for _ in range(_TRIES):
        try:
            move(container.new, out)
        except FileExistsError:
            output.require_replaceable(out)
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
