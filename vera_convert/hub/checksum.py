"""The size and hash that the Hub states for a file, and a comparison of bytes with the hash.

The Hub states a SHA-256 for each large file, and the hash of git's blob for each small file. A
mirror may state a plain SHA-1, or no hash.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RepoFile:
    """A file in the Hub's list of a repo.

    Attributes:
        size: the length in bytes; -1 if the Hub omits the length.
        digest: the SHA-256 of the content, or the hash of git's blob; empty if the Hub omits both.
    """

    size: int = -1
    digest: str = ""


def digest_of(tag: object) -> str:
    """Return the digest in an entity tag or a field of a listing; empty if absent."""
    text = tag.removeprefix("W/").strip('"').removeprefix("sha256:") if isinstance(tag, str) else ""
    return text if _DIGEST.fullmatch(text) else ""


def has_digests(blocks: Iterable[bytes], size: int, stated: Iterable[str]) -> bool:
    """Return whether the bytes of a file have the stated digests; True if none is stated.

    If a SHA-256 is stated, only the SHA-256 counts: for a large file, git's blob is a pointer.
    """
    digests = {digest for digest in stated if digest}
    large = {digest for digest in digests if len(digest) == 64}
    if not digests:
        return True
    running = [hashlib.sha256()]
    if not large:
        git = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
        running = [git, hashlib.sha1(usedforsecurity=False)]
    for block in blocks:
        for each in running:
            each.update(block)
    return (large or digests) <= {each.hexdigest() for each in running}
