"""The Hub's cache on this machine: where files lie, and downloads of files at one commit.

models--org--name/
    refs/main            the commit of a branch or tag at the last request
    blobs/DIGEST         the content of files
    snapshots/COMMIT/    the files of a commit by name: links to blobs
    vera-convert/        headers of files (`header_cache`), and which blobs were hashed

huggingface_hub downloads the files, by Xet if possible. Whether huggingface_hub or another program
stored a file, the hash is compared before the file is used. A large file is hashed once (about a
second for each gigabyte); the cache remembers size and time of the hashed file.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from vera_convert.errors import SurroundingsError
from vera_convert.hub.checksum import RepoFile, digest_of, has_digests
from vera_convert.hub.client import asking_for, cache_root, download_file
from vera_convert.hub.header_cache import replace_file
from vera_convert.hub.location import HubAccess
from vera_convert.hub.range_file import Ask, damaged
from vera_convert.hub.refusals import TooSlowError, TryAgainError, gave_up
from vera_convert.hub.repo_name import COMMIT, RepoName
from vera_convert.hub.retry import at_least_slowly, until_answered
from vera_convert.text import printable

_REMEMBERED = 16 << 20
"""A file of at least so many bytes is hashed once; a smaller file in every run."""
_BLOCK = 1 << 20


def cache_of_repo(repo_id: str, access: HubAccess) -> Path:
    """Return the cache's folder for a model repo."""
    return cache_root(access) / f"models--{repo_id.replace('/', '--')}"


def snapshot_of(repo_id: str, commit: str, access: HubAccess) -> Path:
    """Return the cache's folder for a repo at a commit."""
    return cache_of_repo(repo_id, access) / "snapshots" / commit


def cached_commit(name: RepoName, access: HubAccess) -> str | None:
    """Return the cached commit of a revision; None if the cache lacks the commit."""
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
            replace_file(ref, commit.encode())


# --- downloads -----------------------------------------------------------------------------------


def download(
    repo_id: str,
    commit: str,
    names: Sequence[PurePosixPath],
    *,
    listed: Mapping[str, RepoFile],
    access: HubAccess,
) -> None:
    """Download files of a repo, and remove a file again that differs from the listed file.

    Args:
        repo_id: the repo.
        commit: the commit.
        names: the files' names in the repo; the cache lacks these files.
        listed: sizes and hashes by name; may lack some files.
        access: the access to the Hub.

    Raises:
        OutOfReachError: no answer.
        SurroundingsError: the file is missing, or access is denied; the bytes have another hash
            than the Hub states; the disk is full.
    """
    repo = cache_of_repo(repo_id, access)
    known = [listed.get(str(name), RepoFile()) for name in names]
    _require_space(repo, sum(max(0, file.size) for file in known))
    for name, file in zip(names, known, strict=True):
        place = f"{repo_id}@{commit}/{printable(str(name))}"
        once = partial(download_file, repo_id, str(name), commit=commit, place=place, access=access)
        attempt = partial(at_least_slowly, once, partial(_stored, repo), what=place)
        ask = asking_for(repo_id, str(name), commit=commit, place=place, access=access)
        with _without_remains(repo), _with_reason(ask, place):
            until_answered(attempt, what=place)
        path = snapshot_of(repo_id, commit, access) / name
        if not is_sound(path, repo, file):
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise damaged(place)


def is_sound(path: Path, repo: Path, listed: RepoFile | None = None) -> bool:
    """Return whether a file of the cache has the listed size, and the hashes that the Hub states.

    Args:
        path: the file in a snapshot. If the file is a link, the hash names the blob.
        repo: the cache's folder for the repo.
        listed: size and hash in the Hub's list of files.
    """
    listed = listed or RepoFile()
    blob = digest_of(path.readlink().name) if path.is_symlink() else ""
    found = path.stat()
    mark = repo / "vera-convert" / f"hashed-{blob}"
    state = f"{found.st_size} {found.st_mtime_ns}".encode()
    large = blob != "" and found.st_size >= _REMEMBERED
    with contextlib.suppress(OSError):
        if large and mark.read_bytes() == state:
            return True
    if listed.size not in (-1, found.st_size):
        return False
    sound = has_digests(_blocks(path), found.st_size, (listed.digest, blob))
    with contextlib.suppress(OSError):  # a read-only cache serves too
        if large and sound:
            replace_file(mark, state)
    return sound


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


@contextlib.contextmanager
def _with_reason(ask: Ask, place: str) -> Iterator[None]:
    """Ask the Hub for the reason if a download takes too long.

    huggingface_hub waits as long as the Hub asks, even for hours, before it tries again.
    """
    try:
        yield
    except TooSlowError as error:
        try:
            ask(0, 0)
        except TryAgainError as found:
            raise gave_up(place, 1, found) from error
        raise


def _stored(repo: Path) -> int:
    """Return the bytes that downloads of a repo have stored so far."""
    total = 0
    for path in (repo / "blobs").glob("*"):
        with contextlib.suppress(OSError):
            found = path.stat()
            total += max(found.st_size, getattr(found, "st_blocks", 0) * 512)
    return total


@contextlib.contextmanager
def _without_remains(repo: Path) -> Iterator[None]:
    """Remove what a failed download leaves behind, unless a later download continues the file.

    The thread of an abandoned download leaves the file in place.
    """
    unfinished = "*.*.incomplete"  # a name that is used once, unlike DIGEST.incomplete
    before = set((repo / "blobs").glob(unfinished))
    try:
        yield
    except BaseException:
        for path in set((repo / "blobs").glob(unfinished)) - before:
            with contextlib.suppress(OSError):
                path.unlink()
        raise


def _require_space(repo: Path, size: int) -> None:
    """Refuse a download that is larger than the free space of the cache."""
    folder = next(parent for parent in (repo, *repo.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise SurroundingsError(
            f"the Hub's cache {printable(str(repo.parent))} has {free:,} bytes free, and the files "
            f"to download take {size:,}. Free some space, or name another folder with --cache-dir."
        )
