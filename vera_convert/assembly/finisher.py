"""Finish output files: start the write-back early, sync, hash, and read back.

Own threads do this while other threads still compute, so little is left at the end.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, Self

from vera_convert.assembly.copying import OPEN_FLAGS, forget, start_writing_back
from vera_convert.assembly.input_files import InputFile
from vera_convert.assembly.pool import wait_for
from vera_convert.errors import SurroundingsError
from vera_convert.files.reading import open_local, same_bytes
from vera_convert.publish.signals import signals_held
from vera_convert.text import read_back_differs

_READ_BLOCK = 1 << 20
_HASH_EVERY = 1 << 24
"""The least number of consecutive bytes to hash at a time."""
_THREADS = 2


@dataclass(frozen=True, slots=True, order=True)
class Written:
    """A range of an output file that has been written.

    Attributes:
        at: the offset.
        size: the number of bytes.
        digest: the digest of a computed range, if the range is read back and compared.
        source: the input and the offset that a copied range came from; None if computed.
    """

    at: int
    size: int
    digest: bytes | None = field(default=None, compare=False)
    source: tuple[InputFile, int] | None = field(default=None, compare=False)


def digest_of(data: Any) -> bytes:  # noqa: ANN401 -- anything with a buffer
    """Return the digest of a block, for a comparison when the block is read back."""
    return blake2b(data, digest_size=16).digest()


@dataclass(slots=True)
class _PartialFile:
    """The progress of a file: the ranges left to hash, and all ranges if the file is compared."""

    path: Path
    worker: ThreadPoolExecutor
    hashed: int = 0
    digest: Any = field(default_factory=sha256)
    waiting: list[Written] = field(default_factory=list)
    ranges: list[Written] = field(default_factory=list)


class Finisher:
    """Threads that finish output files. A context manager, which waits for the threads.

    One thread does all tasks of a file, in order.
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
            hashes: compute the SHA-256 of each file while the file is written.
            compares: read each file back from the disk and compare the bytes.
            on_finished: called for each file that is on the disk, with the name and the SHA-256.
        """
        self._hashes = hashes
        self._compares = compares
        self._on_finished = on_finished
        self._failure: BaseException | None = None
        self._files: dict[str, _PartialFile] = {}
        self._workers: list[ThreadPoolExecutor] = []
        try:
            for _ in range(_THREADS):
                self._workers.append(ThreadPoolExecutor(1))
                with signals_held():  # a signal in between would leave a thread that nobody joins
                    self._workers[-1].submit(lambda: None)  # starts the thread
        except BaseException as error:
            self.stop(error)
            raise

    def begin(self, name: str, path: Path) -> None:
        """Announce a file, before the first range."""
        self._files[name] = _PartialFile(path, self._workers[len(self._files) % _THREADS])

    def written(self, name: str, part: Written) -> None:
        """Report that a range of a file has been written."""
        file = self._files[name]
        file.worker.submit(self._do, lambda: self._take(file, part))

    def complete(self, name: str) -> None:
        """Report that all ranges of a file have been written."""
        file = self._files[name]
        file.worker.submit(self._do, lambda: self._finish(name, file))

    def raise_failure(self) -> None:
        """Raise the first error of a thread, if there is one."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Wait until all tasks are done. A signal can interrupt the waiting."""
        wait_for([worker.submit(lambda: None) for worker in self._workers])
        self._end_threads()

    def stop(self, error: BaseException | None) -> None:
        """Drop the tasks that have not begun, and wait for the others. Signals are held back."""
        if self._failure is None:
            self._failure = error
        self._end_threads()

    def _end_threads(self) -> None:
        with signals_held():
            for worker in self._workers:
                worker.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:
            self.stop(error)
            return
        try:
            self.close()
        except BaseException as interruption:
            self.stop(interruption)
            raise
        self.raise_failure()

    def _do(self, task: Callable[[], None]) -> None:
        """Do a task, unless an earlier task failed."""
        if self._failure is None:
            try:
                task()
            except BaseException as error:  # noqa: BLE001 -- the waiting thread raises it
                self._failure = error

    def _take(self, file: _PartialFile, part: Written) -> None:
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

    def _hash(self, file: _PartialFile, *, at_least: int) -> None:
        """Hash the consecutive bytes written so far, if there are `at_least` so many."""
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

    def _finish(self, name: str, file: _PartialFile) -> None:
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


def _compare(name: str, file: _PartialFile) -> None:
    """Read a file back, and compare every range with the digest or the source."""
    with open_local(file.path) as target:
        for part in sorted(file.ranges):
            if part.source is not None:
                source, start = part.source
                with source.open() as original:
                    same = same_bytes(target, part.at, original, start, part.size)
            else:
                same = digest_of(target.read_at(part.at, part.size)) == part.digest
            if not same:
                where = f" (bytes {part.at:,} to {part.at + part.size:,})"
                raise SurroundingsError(read_back_differs(name, where))
