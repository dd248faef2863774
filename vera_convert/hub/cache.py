"""The Hub's cache on this machine, laid out as huggingface_hub lays it out.

models--org--name/
    refs/main            the commit of a branch or tag at the last request
    blobs/DIGEST         the content of files
    snapshots/COMMIT/    the files of a commit by name: links to blobs
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from vera_convert.errors import SurroundingsError
from vera_convert.hub.client import HubAccess, cache_root
from vera_convert.hub.repo_name import COMMIT, RepoName
from vera_convert.text import printable

_SUFFIX = ".vera-convert.incomplete"
_ABANDONED = 24 * 3600.0
"""Seconds after which an unfinished download counts as killed."""


def cache_of_repo(repo_id: str, access: HubAccess) -> Path:
    """Return the cache's folder for a model repo."""
    return cache_root(access) / f"models--{repo_id.replace('/', '--')}"


def snapshot_of(repo_id: str, commit: str, access: HubAccess) -> Path:
    """Return the cache's folder for a repo at a commit."""
    return cache_of_repo(repo_id, access) / "snapshots" / commit


def cached_commit(name: RepoName, access: HubAccess) -> str | None:
    """Return the cached commit of a revision; None if the cache holds no file of the commit."""
    commit = name.revision or "main"
    if not COMMIT.fullmatch(commit):
        ref = cache_of_repo(name.repo_id, access).joinpath("refs", *commit.split("/"))
        try:
            commit = ref.read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
    known = COMMIT.fullmatch(commit) and snapshot_of(name.repo_id, commit, access).is_dir()
    return commit if known else None


def remember_commit(repo_id: str, revision: str, commit: str, access: HubAccess) -> None:
    """Record the commit of a branch or tag in the cache, for later offline runs."""
    if COMMIT.fullmatch(revision):
        return
    ref = cache_of_repo(repo_id, access).joinpath("refs", *revision.split("/"))
    with contextlib.suppress(OSError, ValueError):  # a read-only cache serves too
        if not ref.exists() or ref.read_text(encoding="ascii") != commit:
            ref.parent.mkdir(parents=True, exist_ok=True)
            with replacing(ref) as file:
                file.write(commit.encode())


def link_blob(snapshot: Path, name: PurePosixPath, digest: str, size: int) -> bool:
    """Link a cached blob as a file of a snapshot; return False if the blob is not cached."""
    blob = snapshot.parent.parent / "blobs" / digest
    try:
        held = bool(digest) and blob.is_file() and size in (-1, blob.stat().st_size)
    except OSError:
        return False
    if held:
        _link(snapshot / name, blob)
    return held


def store(snapshot: Path, name: PurePosixPath, size: int, fill: Callable[[BinaryIO], str]) -> None:
    """Add a file to a snapshot, completely or not at all.

    Args:
        snapshot: the cache's folder for the commit.
        name: the file's name in the repo.
        size: the file's length in bytes.
        fill: writes the content, verifies the content, and returns its digest.

    Raises:
        SurroundingsError: the disk is full, or the cache cannot be written.
    """
    blobs = snapshot.parent.parent / "blobs"
    with _writing(blobs):
        blobs.mkdir(parents=True, exist_ok=True)
        _sweep(blobs)
        free = shutil.disk_usage(blobs).free
        if free < size:
            raise SurroundingsError(
                f"the Hub's cache {printable(str(blobs.parent.parent))} has {free:,} bytes free, "
                f"and {printable(str(name))} takes {size:,}. Free some space, or name another "
                "folder with --cache-dir."
            )
        written = _unfinished(blobs)
        try:
            with written.open("xb") as file:
                digest = fill(file)
            written.replace(blobs / digest)
        except BaseException:
            written.unlink(missing_ok=True)
            raise
    _link(snapshot / name, blobs / digest)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Replace a small file in one step."""
    written = _unfinished(path.parent)
    try:
        with written.open("xb") as file:
            yield file
        written.replace(path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise


def _unfinished(folder: Path) -> Path:
    """Return a new name for an unfinished file; no other process uses this name."""
    return folder / f"{uuid.uuid4().hex}{_SUFFIX}"


def _link(pointer: Path, blob: Path) -> None:
    """Link a name in a snapshot to a blob; if links are not allowed, move the blob."""
    with _writing(pointer):
        pointer.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process was faster
            try:
                pointer.symlink_to(os.path.relpath(blob, pointer.parent))
            except FileExistsError:
                if not pointer.exists():  # a link to a blob that was removed
                    pointer.unlink()
                    pointer.symlink_to(os.path.relpath(blob, pointer.parent))
            except (OSError, NotImplementedError):
                shutil.move(blob, pointer)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SurroundingsError(
            f"the Hub's cache cannot be written: {printable(str(path))}: "
            f"{printable(error.strerror or str(error))}. Name another folder with --cache-dir."
        ) from error


def _sweep(blobs: Path) -> None:
    """Remove the unfinished downloads of runs that were killed."""
    for path in blobs.glob(f"*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()
