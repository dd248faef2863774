"""The hidden folder beside OUT (the container) in which a run stages the output.

    .OUT.vera-convert-0123456789abcdef/
        lock    open and locked while the run lives
        new     the future OUT
        old     the former OUT, for a moment, if the system cannot exchange two names
        dead    the `new` of a dead run, before its removal
        journal the finished files of a run that can be continued

A lock is free only if the container's run is dead. The next run for the same OUT takes the lock and
removes the leftovers of a killed run, and leaves the containers of living runs. OUT has no lock. A
run touches only private containers of the same user: in a shared folder, anybody could have created
another container. If the locks of a network file system stop at a host, a run there may count as
dead; the run then fails without output.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import stat
import sys
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from vera_convert.errors import SurroundingsError
from vera_convert.publish.filesystem import NO_FOLLOW, move, remove_tree, sync_folder, try_lock
from vera_convert.text import printable

logger = logging.getLogger(__name__)

TAG = ".vera-convert-"
_LONGEST_STEM = 100
"""The most bytes of OUT's name in the container's name; encrypted folders allow 143 in total."""
_TRIES = 16
"""The most tries against other runs' removals; the first try is nearly always enough."""


class Container:
    """The staging folder of one living run.

    Attributes:
        new: the path of the future OUT; nothing is there at first.
        old: the path for the former OUT.
        journal: the path of the journal, with which a later run can continue this run.
        remove: removes the folder with all content; works once. Python also calls `remove` when the
            object dies or the process exits, because a signal may arrive before a ``finally`` is in
            force.
    """

    def __init__(self, path: Path, out: Path, lock: int) -> None:
        self.new = path / "new"
        self.old = path / "old"
        self.journal = path / "journal"
        self._lock = lock
        self.remove = weakref.finalize(self, _remove, path, out, lock, owner=os.getpid())

    def keep(self) -> None:
        """Leave the folder to a later run, instead of `remove`."""
        if self.remove.detach() is not None:
            with suppress(OSError):
                os.close(self._lock)

    @classmethod
    def beside(cls, out: Path) -> Container:
        """Create a container for `out`; all links in the parent are resolved.

        Raises:
            SurroundingsError: other runs removed each container before it had a lock.
            OSError: the system cannot create the folder.
        """
        for _ in range(_TRIES):
            path = out.with_name(_stem(out) + secrets.token_hex(8))
            if sys.platform == "win32":
                path.mkdir()  # 0o700 would mean access rights that the output inherits
            else:
                path.mkdir(0o700)
            lock = _new_lock(path)
            if lock is not None:
                return cls(path, out, lock)
        raise SurroundingsError(
            f"other runs for {printable(str(out))} kept removing this one's staging folder. "
            "Wait for them, or choose another OUT."
        )

    @classmethod
    def continuing(cls, out: Path) -> Container:
        """Create a container with the output that a dead run for `out` left, if there is any.

        Other containers of dead runs are removed. The output is moved: a run that lives after all,
        on a host beyond the lock's reach, then lacks the output and fails.
        """
        left = _containers(out)
        made = cls.beside(out)
        for path, lock in _dead(left):
            if (path / "journal").is_file() and not made.new.is_dir():
                with suppress(OSError):
                    _put_back(path, out)
                    (path / "new").rename(made.new)
                    (path / "journal").rename(made.journal)
            _remove(path, out, lock, owner=os.getpid(), foreign=True)
        return made


def bytes_of_the_dead(out: Path) -> int:
    """Return the bytes in the containers of dead runs for `out`, without removing any."""
    found = 0
    for path, lock in _dead(_containers(out)):
        found += sum(each.lstat().st_size for each in path.rglob("*") if each.is_file())
        os.close(lock)
    return found


def sweep_containers(out: Path) -> None:
    """Remove the containers of all dead runs for `out`; restore an `out` that a run moved away.

    A container stays without an error if the removal fails, or if the run may be alive.
    """
    for path, lock in _dead(_containers(out)):
        _remove(path, out, lock, owner=os.getpid(), foreign=True)


def _containers(out: Path) -> list[Path]:
    """Return the containers of all runs for `out`."""
    pattern = re.compile(re.escape(_stem(out)) + r"[0-9a-f]{16}")
    try:
        names = os.listdir(out.parent)  # noqa: PTH208 -- only names; a parent may hold many
    except OSError:
        return []
    return [out.with_name(name) for name in sorted(names) if pattern.fullmatch(name)]


def _dead(containers: list[Path]) -> Iterator[tuple[Path, int]]:
    """Yield each container whose run is dead, with the held lock."""
    for path in containers:
        lock = _lock_of_the_dead(path)
        if lock is not None:
            yield path, lock


def _stem(out: Path) -> str:
    """Return the beginning of the names of all containers for `out`, and of no others."""
    name = os.fsencode(out.name)
    if len(name) > _LONGEST_STEM:
        return f".{hashlib.sha256(name).hexdigest()}{TAG}"
    return f".{out.name}{TAG}"


def _new_lock(path: Path) -> int | None:
    """Create and lock the lock file of a container; None if another run removes the container."""
    name = path / "lock"
    try:
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o600)
    except FileNotFoundError:
        return None
    except OSError:
        with suppress(OSError):
            path.rmdir()
        raise
    try:
        ours = try_lock(lock)
    except OSError:
        ours = True  # no locks on this file system, so no other run can call this run dead
    if ours and _is_at(lock, name):
        return lock
    os.close(lock)
    return None


def _is_at(fd: int, path: Path) -> bool:
    """Return whether the open file still has the name."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _lock_of_the_dead(path: Path) -> int | None:
    """Return the held lock of a container whose run is dead; None if the run may be alive."""
    name = path / "lock"
    try:
        if not _is_ours(path.lstat()):
            return None
        lock = os.open(name, os.O_RDWR | NO_FOLLOW)
    except FileNotFoundError:
        with suppress(OSError):
            path.rmdir()  # empty: killed before it had a lock, or after
        return None
    except OSError:
        return None
    try:
        if try_lock(lock) and _is_at(lock, name):
            return lock
    except OSError:
        pass  # no locks on this file system
    with suppress(OSError):
        os.close(lock)
    return None


def _is_ours(found: os.stat_result) -> bool:
    """Return whether the present user created a container for this user alone."""
    if sys.platform == "win32":
        return stat.S_ISDIR(found.st_mode)
    is_private = stat.S_IMODE(found.st_mode) & 0o077 == 0
    return stat.S_ISDIR(found.st_mode) and is_private and found.st_uid == os.geteuid()


def _remove(path: Path, out: Path, lock: int, *, owner: int, foreign: bool = False) -> None:
    """Remove a container with a held lock; leave an unlocked rest if the removal fails."""
    if os.getpid() != owner:
        return  # a forked child ends; the run goes on
    try:
        _put_back(path, out)
        if foreign:
            _take_away(path)
        for name in ("new", "old", "dead", "journal"):
            remove_tree(path / name)
        if sys.platform != "win32":
            (path / "lock").unlink()  # while it is held, so that nobody locks a name that goes
    except OSError as error:
        logger.warning(
            "the hidden folder %s could not be removed (%s); the next run for the same OUT will.",
            printable(str(path)),
            error.strerror,
        )
    with suppress(OSError):
        os.close(lock)
    with suppress(OSError):
        if sys.platform == "win32" and [inner.name for inner in path.iterdir()] == ["lock"]:
            (path / "lock").unlink()  # there, an open file cannot be removed
        path.rmdir()


def _put_back(path: Path, out: Path) -> None:
    """Move `old` back to OUT if the run ended between its two renames."""
    old = path / "old"
    if os.path.lexists(old) and os.path.lexists(path / "new"):
        with suppress(FileExistsError):
            move(old, out)
            sync_folder(out.parent)


def _take_away(path: Path) -> None:
    """Move `new` away in one step before the deletion.

    A run that lives after all, on a host beyond the lock's reach, then lacks the output and fails,
    instead of publishing a part.
    """
    dead = path / "dead"
    remove_tree(dead)
    with suppress(FileNotFoundError):
        (path / "new").rename(dead)
