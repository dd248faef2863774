"""Keep the first bytes of a repo's files between runs, so a base's headers are fetched once.

The files of a commit never change, so one request is enough. The first bytes lie in the repo's
folder of the Hub's cache and are removed with the folder. A stranger published these bytes, so
reading is bounded; damaged bytes are ignored.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from vera_convert.errors import VeraConvertError
from vera_convert.files.reading import open_local

MOST_KEPT = 16 << 20
"""The most first bytes of a file that are held in memory, and kept for the next run."""
MOST_OF_A_REPO = 64 << 20
"""The most kept bytes of a repo; the oldest are removed first."""
_LONGEST_LINE = 1000

Identity = tuple[str | None, str | None]
"""The commit and the entity tag of a file, as a server states them."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """The first bytes of a file at a commit, with the file's size and identity."""

    size: int
    identity: Identity
    data: bytes


@dataclass(frozen=True, slots=True)
class HeaderCache:
    """The place of the first bytes of one file at one commit."""

    path: Path

    def load(self) -> Beginning | None:
        """Return the kept bytes; None if the bytes are missing or damaged."""
        try:
            limit = MOST_KEPT + _LONGEST_LINE
            with open_local(self.path, within=self.path.parent, limit=limit) as file:
                line, _, data = file.read_at(0, file.size).partition(b"\n")
            known = json.loads(line[:_LONGEST_LINE])
            size, tag, commit = known["size"], known["tag"], known["commit"]
            whole = sha256(data).hexdigest() == known["sha256"]
        except (VeraConvertError, ValueError, TypeError, LookupError, RecursionError):
            return None
        if not whole or type(size) is not int or not len(data) <= size:
            return None
        if not isinstance(commit, str | None) or not isinstance(tag, str | None):
            return None
        return Beginning(size, (commit, tag), data)

    def save(self, beginning: Beginning) -> None:
        """Keep the first bytes, if possible; otherwise the next run takes longer."""
        if len(beginning.data) > MOST_KEPT:
            return
        commit, tag = beginning.identity
        digest = sha256(beginning.data).hexdigest()
        known = {"size": beginning.size, "tag": tag, "commit": commit, "sha256": digest}
        line = json.dumps(known).encode()
        if len(line) > _LONGEST_LINE:
            return
        with contextlib.suppress(OSError):
            # without this folder, huggingface_hub reports a damaged cache
            (self.path.parent.parent / "snapshots").mkdir(parents=True, exist_ok=True)
            replace_file(self.path, line + b"\n" + beginning.data)
            self._remove_oldest()

    def _remove_oldest(self) -> None:
        """Remove the oldest bytes of the repo until the others fit the bound."""
        found = [(path.stat(), path) for path in self.path.parent.iterdir()]
        left = MOST_OF_A_REPO - self.path.stat().st_size
        for status, path in sorted(found, key=lambda each: each[0].st_mtime_ns, reverse=True):
            if path != self.path:
                left -= status.st_size
                if left < 0:
                    path.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """Write a small file of the cache in a single step, with the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.parent / f"{uuid.uuid4().hex}.incomplete"
    try:
        written.write_bytes(data)
        written.replace(path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise
