"""The journal of a merge that can be continued: the finished files and the identity of the inputs.

The first line is a JSON object with the identity of inputs and options. Each further line describes
a file that is on the disk. An incomplete last line is ignored. A file counts as finished only if
the bytes still have the SHA-256 in the journal, because the disk may have lost bytes, or somebody
may have changed the file.
"""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

from vera_convert.assembly.addends import Numbers
from vera_convert.assembly.writer import Finished
from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.files.reading import file_sha256, open_local

_STATISTICS = {field.name for field in fields(Numbers)}
_LARGEST = 1 << 30
"""The most bytes of a journal; each merged tensor takes 150."""


class Journal:
    """A journal that is being written. Threads may share the journal."""

    def __init__(
        self, path: Path, folder: Path, identity: str, finished: Mapping[str, Finished]
    ) -> None:
        """Start a new journal.

        Args:
            path: the journal's path.
            folder: the folder of the finished files.
            identity: a text that is the same only for the same inputs and options.
            finished: the files that an earlier run finished.
        """
        self._path = path
        self._folder = folder
        self._lock = threading.Lock()
        records = [self._record(name, each) for name, each in finished.items()]
        self._write("wb", {"identity": identity}, *records)

    def add(self, name: str, finished: Finished) -> None:
        """Record a finished file."""
        with self._lock:
            self._write("ab", self._record(name, finished))

    def _record(self, name: str, finished: Finished) -> dict[str, object]:
        found = (self._folder / name).stat()
        return {
            "name": name,
            "size": found.st_size,
            "mtime": found.st_mtime_ns,
            "sha256": finished.sha256,
            "numbers": {tensor: asdict(each) for tensor, each in finished.numbers.items()},
        }

    def _write(self, mode: Literal["wb", "ab"], *lines: Mapping[str, object]) -> None:
        with self._path.open(mode) as file:
            file.write("".join(f"{json.dumps(line)}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())


def finished_files(path: Path, folder: Path, identity: str) -> dict[str, Finished]:
    """Return the finished files of a journal that are still unchanged.

    The result is empty if there is no journal, or if the journal has another identity.
    """
    try:
        with open_local(path, limit=_LARGEST) as file:
            text = file.read_at(0, file.size).decode("ascii")
        first, *lines = text.splitlines(keepends=True)
    except (CheckpointError, SurroundingsError, ValueError):
        return {}
    if _parsed(first) != {"identity": identity}:
        return {}
    finished = {}
    for line in lines:
        record = _parsed(line)
        numbers = None if record is None else _numbers(record.get("numbers"))
        if record is not None and numbers is not None and _is_as_recorded(folder, record):
            finished[record["name"]] = Finished(numbers, record["sha256"])
    return finished


def _numbers(value: object) -> dict[str, Numbers] | None:
    """Return the statistics of a line; None if a damaged disk left another value."""
    tensors = value.values() if isinstance(value, dict) else (None,)
    for each in tensors:
        if not isinstance(each, dict) or each.keys() != _STATISTICS:
            return None
        if not all(type(number) in (int, float) for number in each.values()):
            return None
    return {name: Numbers(**each) for name, each in dict(value).items()}  # type: ignore[call-overload]


def _parsed(line: str) -> dict[str, Any] | None:
    """Return the object of a line; None if the line is incomplete."""
    try:
        found = json.loads(line) if line.endswith("\n") else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_as_recorded(folder: Path, record: Mapping[str, Any]) -> bool:
    try:
        path = folder / record["name"]
        found = path.lstat()
        same = (found.st_size, found.st_mtime_ns) == (record.get("size"), record.get("mtime"))
        if not (same and stat.S_ISREG(found.st_mode)):
            return False
        with open_local(path) as file:
            return bool(record.get("sha256") == file_sha256(file))
    except (OSError, SurroundingsError, KeyError, TypeError, ValueError):
        return False  # another file than recorded, or no record of a file
