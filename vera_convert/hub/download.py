"""Download complete files of a repo at one commit into the Hub's cache.

Files are downloaded one after the other, each in one stream that a signal ends at once. For
hundreds of gigabytes, `hf download` is faster and fills the same cache.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from vera_convert.hub.cache import link_blob, snapshot_of, store
from vera_convert.hub.checksum import RepoFile
from vera_convert.hub.client import HubAccess, asking_for
from vera_convert.hub.range_file import HEAD_BYTES, RemoteFile
from vera_convert.text import printable

_SMALL = 4 << 20
"""A file of at most so many bytes takes one request and shows no progress bar."""


def download(
    repo_id: str,
    commit: str,
    names: Sequence[PurePosixPath],
    *,
    listed: Mapping[str, RepoFile],
    access: HubAccess,
) -> Path:
    """Download the files of a repo that the cache lacks, and return the snapshot's folder.

    Args:
        repo_id: the repo.
        commit: the commit.
        names: the files' names in the repo.
        listed: sizes and hashes by name; may lack some files.
        access: the access to the Hub.

    Raises:
        OutOfReachError: no answer.
        SurroundingsError: no such file, or no access; the bytes have another hash than the Hub
            states; the disk is full.
    """
    snapshot = snapshot_of(repo_id, commit, access)
    for name in names:
        known = listed.get(str(name), RepoFile())
        if not (snapshot / name).exists() and not link_blob(
            snapshot, name, known.digest, known.size
        ):
            _download(repo_id, commit, name, known, access)
    return snapshot


def _download(
    repo_id: str, commit: str, name: PurePosixPath, listed: RepoFile, access: HubAccess
) -> None:
    place = f"{repo_id}@{commit}/{printable(str(name))}"
    ask = asking_for(repo_id, str(name), commit=commit, place=place, access=access)
    first = listed.size if 0 < listed.size <= _SMALL else HEAD_BYTES
    remote = RemoteFile(place, ask, listed=listed, first=first)

    def fill(file: BinaryIO) -> str:
        with _bar(name.name, remote.size, access) as drawn:

            def write(data: bytes) -> None:
                file.write(data)
                drawn(len(data))

            return remote.copy_to(write).name

    store(snapshot_of(repo_id, commit, access), name, remote.size, fill)


@contextmanager
def _bar(name: str, size: int, access: HubAccess) -> Iterator[Callable[[int], object]]:
    """Draw a progress bar on a terminal, unless the caller or the environment forbids bars."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if not (access.progress and terminal) or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        yield lambda _count: None
        return
    from tqdm import tqdm

    with tqdm(
        desc=printable(name)[-40:],
        total=size,
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        leave=False,
        disable=size < _SMALL,
    ) as bar:
        yield bar.update
