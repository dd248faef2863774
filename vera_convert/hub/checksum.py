"""What the Hub states about a file, and whether the bytes that came are these.

The Hub states a SHA-256 for every large file, and for small ones the hash of git's blob. A mirror
may state a plain SHA-1, or nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RepoFile:
    """One file of a repo as the Hub lists it.

    Attributes:
        size: its length in bytes; -1 if the Hub does not tell.
        digest: the SHA-256 of its content, or the hash of git's blob; empty if not told.
    """

    size: int = -1
    digest: str = ""


def digest_of(tag: object) -> str:
    """Return the digest that an entity tag or a field of a listing holds; empty if it is none."""
    text = tag.removeprefix("W/").strip('"').removeprefix("sha256:") if isinstance(tag, str) else ""
    return text if _DIGEST.fullmatch(text) else ""


class Checksum:
    """Compares the bytes of a file, as they come, with every digest that is stated for it.

    A SHA-256 decides alone if there is one: for a large file, git's blob is only a pointer.
    """

    def __init__(self, stated: Iterable[str], size: int) -> None:
        digests = {digest for digest in stated if digest}
        large = {digest for digest in digests if len(digest) == 64}
        self.stated = frozenset(large or digests)
        self._running = [hashlib.sha256()]
        if self.stated and not large:
            self._running = [
                hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False),
                hashlib.sha1(usedforsecurity=False),
            ]

    def update(self, data: bytes) -> None:
        """Take the next bytes of the file."""
        for running in self._running:
            running.update(data)

    def matches(self) -> bool:
        """Say whether the bytes so far are the file that is stated; true if nothing is stated."""
        return all(
            any(running.hexdigest() == digest for running in self._running)
            for digest in self.stated
        )

    @property
    def name(self) -> str:
        """What the Hub's cache calls the content: the stated digest, else its SHA-256."""
        return min(self.stated, default=self._running[0].hexdigest())
