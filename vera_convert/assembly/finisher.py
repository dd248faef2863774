"""What is done for an output file beside writing it: early write-back, sync, hash, reading back.

It happens in threads of its own, while others still compute, so that at the end little is left.
"""

from __future__ import annotations

import heapq
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vera_convert.assembly.copying import OPEN_FLAGS, forget, start_writing_back
from vera_convert.assembly.input_files import InputFile
from vera_convert.errors import SurroundingsError
from vera_convert.files.reading import LocalFile, open_local
from vera_convert.publish.signals import signals_held
from vera_convert.text import read_back_differs

_READ_BLOCK = 1 << 20
_HASH_EVERY = 1 << 24
"""Bytes that must have been written in a row before they are hashed."""
_THREADS = 2
_LOOK_EVERY = 0.1


@dataclass(frozen=True, slots=True, order=True)
class Written:
    """A range of an output file that has been written.

    Attributes:
        at: where it begins.
        size: its length.
        digest: of its bytes, where it was computed and is to be compared.
        source: where its bytes were copied from, and from which position on; else None.
    """

    at: int
    size: int
    digest: bytes | None = field(default=None, compare=False)
    source: tuple[InputFile, int] | None = field(default=None, compare=False)


def digest_of(data: Any) -> bytes:  # noqa: ANN401 -- anything with a buffer
    """Return the digest by which a block is compared when it is read back."""
    return blake2b(data, digest_size=16).digest()


_Tasks = queue.SimpleQueue[Callable[[], None] | None]


@dataclass(slots=True)
class _Progress:
    """How far a file is: ranges that are not hashed yet, and all of them if they are compared."""

    path: Path
    tasks: _Tasks
    hashed: int = 0
    digest: Any = field(default_factory=sha256)
    waiting: list[Written] = field(default_factory=list)
    ranges: list[Written] = field(default_factory=list)


class Finisher:
    """Threads that finish output files; a context manager that waits for them.

    Each file belongs to one of the threads, so what comes first for it is done first.
    """

    def __init__(
        self,
        *,
        hashes: bool = False,
        compares: bool = False,
        on_finished: Callable[[str, str | None], None] = lambda _name, _sha256: None,
    ) -> None:
        """Start the threads.

        Args:
            hashes: take the SHA-256 of each file while it is written.
            compares: read each file back from the disk and compare it with what was meant.
            on_finished: called for each file that is on the disk, with its name and SHA-256.
        """
        self._hashes = hashes
        self._compares = compares
        self._on_finished = on_finished
        self._failure: BaseException | None = None
        self._queues: list[_Tasks] = [queue.SimpleQueue() for _ in range(_THREADS)]
        self._files: dict[str, _Progress] = {}
        self._ended = [threading.Event() for _ in self._queues]
        self._threads = [
            threading.Thread(target=self._live, args=both, daemon=True)
            for both in zip(self._queues, self._ended, strict=True)
        ]
        try:
            for thread in self._threads:
                thread.start()
        except BaseException as error:
            self.stop(error)
            raise

    def begin(self, name: str, path: Path) -> None:
        """Say that a file is going to be written; before all else that concerns it."""
        self._files[name] = _Progress(path, self._queues[len(self._files) % _THREADS])

    def written(self, name: str, part: Written) -> None:
        """Say that a range of a file has been written."""
        file = self._files[name]
        file.tasks.put(lambda: self._take(file, part))

    def complete(self, name: str) -> None:
        """Say that all ranges of a file have been written."""
        file = self._files[name]
        file.tasks.put(lambda: self._finish(name, file))

    def raise_failure(self) -> None:
        """Raise what went wrong, if anything did."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Wait until all is done that was asked for; a signal comes through.

        Not by joining: a `join` that a signal leaves takes the thread for ended when it is not.
        """
        self._end()
        for each in self._ended:
            while not each.wait(_LOOK_EVERY):
                pass
        with signals_held():
            for thread in self._threads:
                thread.join()

    def stop(self, error: BaseException | None) -> None:
        """Drop what has not begun, and wait for the rest; signals are held back."""
        if self._failure is None:
            self._failure = error
        with signals_held():
            self._end()
            for thread in self._threads:
                if thread.ident is not None:
                    thread.join()

    def _end(self) -> None:
        for each in self._queues:
            each.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.stop(error)
            return
        try:
            self.close()
        except BaseException as interruption:
            self.stop(interruption)
            raise
        self.raise_failure()

    def _live(self, tasks: _Tasks, ended: threading.Event) -> None:
        while (task := tasks.get()) is not None:
            if self._failure is not None:
                continue
            try:
                task()
            except BaseException as error:  # noqa: BLE001 -- it is raised again by who waits
                self._failure = error
        ended.set()

    def _take(self, file: _Progress, part: Written) -> None:
        target = os.open(file.path, OPEN_FLAGS)
        try:
            start_writing_back(target, part.at, part.size)
        finally:
            os.close(target)
        if self._compares:
            file.ranges.append(part)
        if self._hashes:
            heapq.heappush(file.waiting, part)
            self._hash(file, at_least=_HASH_EVERY)

    def _hash(self, file: _Progress, *, at_least: int) -> None:
        """Hash what has been written in a row, if that is enough to be worth opening the file."""
        end, parts = file.hashed, list(file.waiting)
        while parts and parts[0].at == end:
            end += heapq.heappop(parts).size
        if end - file.hashed < at_least:
            return
        file.waiting = parts
        with open_local(file.path) as source:
            while file.hashed < end:
                size = min(_READ_BLOCK, end - file.hashed)
                file.digest.update(source.read_at(file.hashed, size))
                file.hashed += size

    def _finish(self, name: str, file: _Progress) -> None:
        if self._hashes:
            self._hash(file, at_least=0)
        target = os.open(file.path, OPEN_FLAGS)
        try:
            os.fsync(target)
            if self._compares:
                forget(target)
        finally:
            os.close(target)
        if self._compares:
            _compare(name, file)
        self._on_finished(name, file.digest.hexdigest() if self._hashes else None)


def _compare(name: str, file: _Progress) -> None:
    """Read a file back and hold every range against its digest or its source."""
    with open_local(file.path) as target:
        for part in sorted(file.ranges):
            if part.source is not None:
                source, start = part.source
                with source.open() as original:
                    same = _same(target, part.at, original, start, part.size)
            else:
                same = digest_of(target.read_at(part.at, part.size)) == part.digest
            if not same:
                where = f" (bytes {part.at:,} to {part.at + part.size:,})"
                raise SurroundingsError(read_back_differs(name, where))


def _same(one: LocalFile, at: int, other: LocalFile, start: int, size: int) -> bool:
    return all(
        one.read_at(at + done, min(_READ_BLOCK, size - done))
        == other.read_at(start + done, min(_READ_BLOCK, size - done))
        for done in range(0, size, _READ_BLOCK)
    )
