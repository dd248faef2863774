"""The Hub's cache on this machine, which huggingface_hub fills.

models--org--name/
    refs/main            the commit of a branch or tag at the last request
    blobs/DIGEST         the content of files
    snapshots/COMMIT/    the files of a commit by name: links to blobs
    vera-convert/        headers of files (`header_cache`), and which blobs were hashed (`download`)
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from vera_convert.hub.client import cache_root
from vera_convert.hub.header_cache import replace_file
from vera_convert.hub.location import HubAccess
from vera_convert.hub.repo_name import COMMIT, RepoName


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
