"""The beginnings of a repo's files, kept between runs: a base's headers are fetched once.

A commit never changes, so what was read of its files never has to be read again. The beginnings lie
in the repo's own folder of the Hub's cache, and go when that is removed. They hold what a stranger
published, as the cache does, and are read with the same care; a damaged one counts as none.
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
"""The most bytes of beginnings that are kept of one repo; the oldest go first."""
_LONGEST_LINE = 1000


@dataclass(frozen=True, slots=True)
class KeptBeginning:
    """Where the beginning of one file at one commit is kept."""

    path: Path

    def load(self) -> Beginning | None:
        """Return what was kept; None if nothing was, or if it is damaged."""
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
        """Keep a beginning, if that can be done; a cache that cannot be written costs time only."""
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
            # huggingface_hub takes a repo's folder without this one for a damaged cache
            (self.path.parent.parent / "snapshots").mkdir(exist_ok=True)
            with replacing(self.path) as file:
                file.write(line + b"\n" + beginning.data)
            _prune(self.path)


def kept_beginning(repo_id: str, commit: str, filename: str, access: HubAccess) -> KeptBeginning:
    """Return where the beginning of a file is kept; another Hub's file is another one."""
    key = sha256(f"{endpoint()}\0{commit}\0{filename}".encode("utf-8", "surrogatepass"))
    return KeptBeginning(cache_of_repo(repo_id, access) / "vera-convert" / key.hexdigest())


def _prune(newest: Path) -> None:
    """Remove the oldest beginnings of a repo, so that the others keep within the bound."""
    found = [(path.stat(), path) for path in newest.parent.iterdir()]
    left = MOST_OF_A_REPO - newest.stat().st_size
    for status, path in sorted(found, key=lambda each: each[0].st_mtime_ns, reverse=True):
        if path != newest:
            left -= status.st_size
            if left < 0:
                path.unlink(missing_ok=True)
