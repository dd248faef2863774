"""Keep the first bytes of a repo's files between runs, so a base's headers are fetched once.

A commit never changes, so its files need no second request. The first bytes lie in the repo's
folder of the Hub's cache and are removed with the folder. A stranger published these bytes, so they
are read within bounds; damaged bytes are ignored.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.files.reading import open_local
from vera_convert.hub.cache import cache_of_repo, replacing
from vera_convert.hub.client import HubAccess, endpoint
from vera_convert.hub.range_file import MOST_KEPT, Beginning

MOST_OF_A_REPO = 64 << 20
"""The most bytes that are kept of one repo; the oldest are removed first."""
_LONGEST_LINE = 1000


@dataclass(frozen=True, slots=True)
class KeptBeginning:
    """The place of the first bytes of one file at one commit."""

    path: Path

    def load(self) -> Beginning | None:
        """Return the kept bytes; None if nothing was kept, or if the bytes are damaged."""
        try:
            limit = MOST_KEPT + _LONGEST_LINE
            with open_local(self.path, within=self.path.parent, limit=limit) as file:
                line, _, data = file.read_at(0, file.size).partition(b"\n")
            known = json.loads(line[:_LONGEST_LINE])
            size, tag, commit = known["size"], known["tag"], known["commit"]
            whole = sha256(data).hexdigest() == known["sha256"]
        except (
            CheckpointError,
            SurroundingsError,
            ValueError,
            TypeError,
            KeyError,
            RecursionError,
        ):
            return None
        if not whole or type(size) is not int or not len(data) <= size:
            return None
        if not isinstance(commit, str) or not isinstance(tag, str | None):
            return None
        return Beginning(size, (commit, tag), data)

    def save(self, beginning: Beginning) -> None:
        """Keep the first bytes, if possible; without them the next run only takes longer."""
        if len(beginning.data) > MOST_KEPT:
            return
        commit, tag = beginning.identity
        digest = sha256(beginning.data).hexdigest()
        known = {"size": beginning.size, "tag": tag, "commit": commit, "sha256": digest}
        line = json.dumps(known).encode()
        if len(line) > _LONGEST_LINE:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # without this folder, huggingface_hub reports a damaged cache
            (self.path.parent.parent / "snapshots").mkdir(exist_ok=True)
            with replacing(self.path) as file:
                file.write(line + b"\n" + beginning.data)
            _prune(self.path)


def kept_beginning(repo_id: str, commit: str, filename: str, access: HubAccess) -> KeptBeginning:
    """Return the place of the first bytes of a file, separate for each Hub."""
    key = sha256(f"{endpoint()}\0{commit}\0{filename}".encode("utf-8", "surrogatepass"))
    return KeptBeginning(cache_of_repo(repo_id, access) / "vera-convert" / key.hexdigest())


def _prune(newest: Path) -> None:
    """Remove the oldest bytes of a repo until the others fit the bound."""
    found = [(path.stat(), path) for path in newest.parent.iterdir()]
    left = MOST_OF_A_REPO - newest.stat().st_size
    for status, path in sorted(found, key=lambda each: each[0].st_mtime_ns, reverse=True):
        if path != newest:
            left -= status.st_size
            if left < 0:
                path.unlink(missing_ok=True)
