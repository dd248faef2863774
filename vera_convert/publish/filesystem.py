"""System calls for publishing: safe renames, exchange, locks, sync and removal.

Each function has the same effect on Linux, macOS and Windows, if the system has such a call.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
import time
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
    import shutil
else:
    import fcntl

NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR}


def move(source: Path, target: Path) -> None:
    """Rename; raise `FileExistsError` if anything is at `target`, even an empty folder."""
    try:
        _rename_at_once(source, target, exchange=False)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _move_with_a_look(source, target)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return False, with no change, if the system cannot."""
    try:
        _rename_at_once(one, other, exchange=True)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def _move_with_a_look(source: Path, target: Path) -> None:
    """Do the same as `move`, on a system without such a rename.

    The rename of POSIX replaces files and empty folders, and refuses to replace a full folder. For
    a file, a hard link also refuses to replace. For a folder, the target is checked just before.
    """
    taken = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    if os.path.lexists(target):
        raise taken
    if not source.is_dir() and _linked(source, target):
        return
    try:
        _rename(source, target)
    except OSError as error:
        if error.errno in _TAKEN and os.path.lexists(target):
            raise taken from error
        raise


def _linked(source: Path, target: Path) -> bool:
    """Give a file a second name and remove the first; return False without hard links."""
    try:
        target.hardlink_to(source)
    except FileExistsError:
        raise
    except OSError:
        return False
    with suppress(OSError):  # the new name exists; the old name goes with the container
        source.unlink()
    return True


if sys.platform == "win32":

    def _rename_at_once(source: Path, target: Path, *, exchange: bool) -> None:  # noqa: ARG001
        """Report that there is no such call; the plain rename already refuses to replace."""
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def _rename(source: Path, target: Path) -> None:
        """Rename; wait for virus scanners, which open new files and block their folder."""
        for pause in (0.05, 0.1, 0.2, 0.4, 0.8):
            try:
                source.rename(target)
            except PermissionError:
                time.sleep(pause)
            else:
                return
        source.rename(target)

    def try_lock(fd: int) -> bool:
        """Lock the open file until it is closed; return False if another process has the lock."""
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True

    def remove_tree(path: Path) -> None:
        """Remove a file, or a folder with its content. Links are removed and not followed."""
        if not os.path.lexists(path):
            return
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

    def is_read_only(path: Path) -> bool:  # noqa: ARG001
        """Return False: Windows has no such flag of a file system."""
        return False

    def sync_folder(path: Path) -> None:
        """Return at once: NTFS keeps a journal of folders, and Windows has no sync of a folder."""

else:

    def _rename_at_once(source: Path, target: Path, *, exchange: bool) -> None:
        """Rename without replacing, or exchange; raise an OSError if impossible."""
        one, other = os.fsencode(source), os.fsencode(target)
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            call = getattr(library, "renamex_np", None)
            arguments: tuple[bytes | int, ...] = (one, other, 2 if exchange else 4)
        else:
            call = getattr(library, "renameat2", None)
            here = -100  # AT_FDCWD
            arguments = (here, one, here, other, 2 if exchange else 1)
        if call is None:  # an old C library, or another system
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        if call(*arguments) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(source), None, str(target))

    def _rename(source: Path, target: Path) -> None:
        source.rename(target)

    def try_lock(fd: int) -> bool:
        """Lock the open file until it is closed; return False if another process has the lock.

        Raises:
            OSError: this file system has no locks.
        """
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def remove_tree(path: Path) -> None:
        """Remove a file, or a folder with its content. Links are removed and not followed."""
        _remove(str(path), None)

    def _remove(name: str, folder: int | None) -> None:
        """Descend through open folders, so a link that is swapped in leads nowhere else."""
        try:
            mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(mode):
            os.unlink(name, dir_fd=folder)
            return
        opened = os.open(name, os.O_RDONLY | os.O_DIRECTORY | NO_FOLLOW, dir_fd=folder)
        try:
            if mode & 0o700 != 0o700:
                os.fchmod(opened, 0o700)  # an old output may be write-protected
            for inner in os.listdir(opened):  # noqa: PTH208 -- a Path has no open folder
                _remove(inner, opened)
        finally:
            os.close(opened)
        os.rmdir(name, dir_fd=folder)

    def is_read_only(path: Path) -> bool:
        """Return whether the file system of a path is mounted read-only."""
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)

    def sync_folder(path: Path) -> None:
        """Sync the list of names of a folder."""
        try:
            _sync(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            # Some network and FUSE file systems cannot sync folders; a power cut can
            # undo the rename there.
            if error.errno not in (errno.EINVAL, errno.EBADF):
                raise


def is_empty(folder: Path) -> bool:
    """Return whether a folder has no entry, so that a replacement loses nothing."""
    return next(folder.iterdir(), None) is None


def sync_tree(path: Path, *, synced: AbstractSet[Path] = frozenset()) -> None:
    """Sync every file at or below `path`, then every folder, innermost first.

    Args:
        path: a file or folder.
        synced: files that are synced already.
    """
    if path in synced:
        return
    if not stat.S_ISDIR(path.lstat().st_mode):
        # Windows syncs only files that are open for writing.
        _sync(path, (os.O_RDWR if sys.platform == "win32" else os.O_RDONLY) | NO_FOLLOW)
        return
    for inner in path.iterdir():
        sync_tree(inner, synced=synced)
    sync_folder(path)


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
