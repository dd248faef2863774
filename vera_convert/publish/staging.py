"""The hidden folder beside OUT in which one run stages what it writes.

    .OUT.vera-convert-0123456789abcdef/
        lock    open and locked as long as the run lives
        new     what is to become OUT
        old     what OUT was, for a moment, where the system cannot exchange two names
        dead    what a sweeper found in `new`
        journal what a run that can be continued has finished so far

Whoever can lock a container knows that its run is dead, and removes it: a killed run's leftovers go
with the next run for the same OUT, a living run's stay. OUT itself never carries a lock. A run does
not touch a container of another user, or one that others may read or write: in a folder that
several people share, anybody could have put it there. A run on a host that a network file system's
locks do not reach may be taken for dead; it then fails and publishes nothing.
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
from contextlib import suppress
from pathlib import Path

from vera_convert.errors import SurroundingsError
from vera_convert.publish.filesystem import NO_FOLLOW, move, remove_tree, sync_folder, try_lock
from vera_convert.text import printable

logger = logging.getLogger(__name__)

TAG = ".vera-convert-"
_LONGEST_STEM = 100
"""Bytes of OUT's name that the container's may repeat; encrypted folders end at 143 in all."""
_TRIES = 16
"""Rounds against sweepers before giving up; one is nearly always enough."""


class Container:
    """The staging folder of one living run.

    Attributes:
        new: what is to become OUT; nothing is there at first.
        old: a place for what OUT was.
        journal: a place for what a later run needs to continue this one.
        remove: removes the folder with all in it; works once. Called too when the object dies or
            Python exits, since an interrupt may come where no `finally` is in force yet.
    """

    def __init__(self, path: Path, out: Path, lock: int) -> None:
        self.new = path / "new"
        self.old = path / "old"
        self.journal = path / "journal"
        self._lock = lock
        self.remove = weakref.finalize(self, _remove, path, out, lock, owner=os.getpid())

    def keep(self) -> None:
        """Leave the folder to a later run that adopts it; instead of `remove`."""
        if self.remove.detach() is not None:
            with suppress(OSError):
                os.close(self._lock)

    @classmethod
    def beside(cls, out: Path) -> Container:
        """Make one for `out`, whose parent's links are resolved."""
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
        """Make one and move into it what a dead run for `out` left to be continued, if one did.

        All others of dead runs are removed. It is moved, so that a run that lives after all, on a
        host that its lock does not reach, finds nothing to publish and fails.
        """
        made = cls.beside(out)
        for path in sorted(_containers(out)):
            if path == made.new.parent:
                continue
            lock = _lock_of_the_dead(path)
            if lock is None:
                continue
            if (path / "journal").is_file() and not made.new.is_dir():
                with suppress(OSError):
                    _put_back(path, out)
                    (path / "new").rename(made.new)
                    (path / "journal").rename(made.journal)
            _remove(path, out, lock, owner=os.getpid(), foreign=True)
        return made


def bytes_of_the_dead(out: Path) -> int:
    """Return how many bytes the containers of dead runs for `out` hold; nothing is removed."""
    found = 0
    for path in _containers(out):
        lock = _lock_of_the_dead(path)
        if lock is not None:
            found += sum(each.lstat().st_size for each in path.rglob("*") if each.is_file())
            os.close(lock)
    return found


def sweep_containers(out: Path) -> None:
    """Remove the containers of all dead runs for `out`; put back what one had moved away.

    What cannot be removed, or not be proven dead, stays: that is no reason to fail.
    """
    for path in _containers(out):
        _sweep_one(path, out)


def _containers(out: Path) -> list[Path]:
    """Return the containers of all runs for `out`, by their names."""
    pattern = re.compile(re.escape(_stem(out)) + r"[0-9a-f]{16}")
    try:
        names = os.listdir(out.parent)  # noqa: PTH208 -- only names; a parent may hold many
    except OSError:
        return []
    return [out.with_name(name) for name in names if pattern.fullmatch(name)]


def _stem(out: Path) -> str:
    """Return how the names of all containers for `out`, and of no other, begin."""
    name = os.fsencode(out.name)
    if len(name) > _LONGEST_STEM:
        return f".{hashlib.sha256(name).hexdigest()}{TAG}"
    return f".{out.name}{TAG}"


def _new_lock(path: Path) -> int | None:
    """Create and lock a new container's lock file; None if a sweeper was faster and removes it."""
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
        ours = True  # no locks on this file system: then nobody can prove this run dead either
    if ours and _is_at(lock, name):
        return lock
    os.close(lock)
    return None


def _is_at(fd: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _sweep_one(path: Path, out: Path) -> None:
    """Remove the container at `path` if its run is dead."""
    lock = _lock_of_the_dead(path)
    if lock is not None:
        _remove(path, out, lock, owner=os.getpid(), foreign=True)


def _lock_of_the_dead(path: Path) -> int | None:
    """Return the lock of a container, held, if its run is dead; None if that is not proven."""
    name = path / "lock"
    try:
        if not _is_ours(path.lstat()):
            return None
        lock = os.open(name, os.O_RDWR | NO_FOLLOW)
    except FileNotFoundError:
        with suppress(OSError):
            path.rmdir()  # killed before it had a lock or when it had no more: empty
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
    """Say whether this user made a container, and nobody else can have written into it."""
    if sys.platform == "win32":
        return stat.S_ISDIR(found.st_mode)
    is_private = stat.S_IMODE(found.st_mode) & 0o077 == 0
    return stat.S_ISDIR(found.st_mode) and is_private and found.st_uid == os.geteuid()


def _remove(path: Path, out: Path, lock: int, *, owner: int, foreign: bool = False) -> None:
    """Remove a container whose lock is held; what cannot be removed is left, unlocked."""
    if os.getpid() != owner:
        return  # a forked child ends, not the run
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
    """Move `old` back to OUT if the run ended between its two renames, before `new` came there."""
    old = path / "old"
    if os.path.lexists(old) and os.path.lexists(path / "new"):
        with suppress(FileExistsError):
            move(old, out)
            sync_folder(out.parent)


def _take_away(path: Path) -> None:
    """Move `new` away in one step before it is deleted.

    Should its run live after all, on a host that its lock does not reach, it finds nothing to
    publish and fails, instead of publishing what is left.
    """
    dead = path / "dead"
    remove_tree(dead)
    with suppress(FileNotFoundError):
        (path / "new").rename(dead)
