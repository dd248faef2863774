"""Write files from copied byte ranges and computed tensors, with several threads.

    plan: files ── pieces ── blocks ──> pool: read, multiply, add, write ──> finisher: sync, hash

The written bytes, and the error if one is raised, are the same for any number of threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from vera_convert.assembly.addends import Numbers, Sum
from vera_convert.assembly.blocks import CPU, Device, Workspace, buffer_sizes_for
from vera_convert.assembly.copying import OPEN_FLAGS, copy_range, write_at
from vera_convert.assembly.finisher import Finisher, Written, digest_of
from vera_convert.assembly.input_files import InputFile
from vera_convert.assembly.pool import WorkerPool, one_blas_thread
from vera_convert.files.reading import LocalFile

COPY_BLOCK = 1 << 24
"""Bytes that are copied at a time."""
JOB_BYTES = 1 << 22
"""Bytes that a job writes, unless the first block is larger. Opening files takes time too."""


@dataclass(frozen=True, slots=True, eq=False)
class CopiedRange:
    """A byte range that is copied from an input.

    Attributes:
        source: the input.
        start: the offset in the input.
        size: the number of bytes.
        at: the offset in the output.
    """

    source: InputFile
    start: int
    size: int
    at: int


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """A tensor that is computed.

    Attributes:
        source: the input that holds the stored values.
        start: the offset of the stored values in the input.
        tensor: the sum to compute.
        at: the offset of the result in the output.
    """

    source: InputFile
    start: int
    tensor: Sum
    at: int

    @property
    def size(self) -> int:
        """The number of bytes in the output."""
        rows, columns = self.tensor.shape
        return rows * columns * self.tensor.written.itemsize


Piece = CopiedRange | Computed


@dataclass(frozen=True, slots=True, eq=False)
class NewFile:
    """A file to write: `head`, then pieces without a gap.

    Attributes:
        name: the path relative to the output folder, with `/`.
        head: the first bytes; the complete content if there are no pieces.
        pieces: in the order of the file.
    """

    name: str
    head: bytes = b""
    pieces: tuple[Piece, ...] = ()

    @property
    def size(self) -> int:
        """The length in bytes."""
        return len(self.head) + sum(piece.size for piece in self.pieces)


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """Rows of a computed piece, or bytes of a copied range."""

    piece: Piece
    first: int
    last: int

    @property
    def row(self) -> int:
        """The number of bytes in the output for each row, or 1 for a copied range."""
        if isinstance(self.piece, CopiedRange):
            return 1
        return self.piece.tensor.shape[1] * self.piece.tensor.written.itemsize

    @property
    def at(self) -> int:
        """The offset in the output."""
        return self.piece.at + self.first * self.row

    @property
    def size(self) -> int:
        """The number of bytes in the output."""
        return (self.last - self.first) * self.row


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """Consecutive blocks of a file, which one thread writes and reports to the finisher."""

    file: NewFile
    finisher: Finisher
    blocks: tuple[_Block, ...]


def _jobs(file: NewFile, finisher: Finisher) -> Iterator[_Job]:
    """Yield the jobs of a file: each large block alone, small blocks together."""
    gathered: list[_Block] = []
    size = 0
    for block in _blocks(file):
        if gathered and size + block.size > JOB_BYTES:
            yield _Job(file, finisher, tuple(gathered))
            gathered, size = [], 0
        gathered.append(block)
        size += block.size
    if gathered:
        yield _Job(file, finisher, tuple(gathered))


def _blocks(file: NewFile) -> Iterator[_Block]:
    for piece in file.pieces:
        whole, step = piece.size, COPY_BLOCK
        if isinstance(piece, Computed):
            whole, step = piece.tensor.shape[0], piece.tensor.block_rows
        for first in range(0, whole, step):
            yield _Block(piece, first, min(first + step, whole))


@dataclass(frozen=True, slots=True)
class Finished:
    """The outcome of one file.

    Attributes:
        numbers: the statistics of each merged tensor of the file, by name.
        sha256: the file's SHA-256; None if no hashes were requested.
    """

    numbers: Mapping[str, Numbers]
    sha256: str | None = None


class Assembler:
    """Threads that are ready to write files. A context manager, which ends the threads.

    The threads start before the output folder exists, and each computes a product first. If the
    BLAS dies of too little memory, nothing is left behind.
    """

    def __init__(
        self, files: Sequence[NewFile], *, jobs: int, check: bool = False, device: Device = CPU
    ) -> None:
        """Start `jobs` threads that can compute every tensor of `files`.

        Args:
            files: the files to write.
            jobs: the number of threads.
            check: take the statistics of all rows, and compare the written bytes with the disk's.
            device: the device that computes the products.

        Raises:
            MemoryError: the buffers do not fit into memory.
        """
        self._files = files
        self._check = check
        self._device = device
        self._lock = threading.Lock()
        self._done = 0
        self._left: dict[str, int] = {}
        self._numbers: dict[str, dict[str, dict[int, Numbers]]] = {}
        self._folder = Path()
        self._sizes = buffer_sizes_for(
            [piece.tensor for file in files for piece in file.pieces if isinstance(piece, Computed)]
        )
        self._limit = one_blas_thread(jobs)
        try:
            self._pool: WorkerPool[_Job] = WorkerPool(jobs, self._prepare)
        except BaseException:
            self._limit.restore_original_limits()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._pool.close()
        self._limit.restore_original_limits()

    def assemble(
        self,
        folder: Path,
        *,
        finished: Collection[str] = (),
        hashes: bool = False,
        progress: Callable[[int], None] = lambda _done: None,
        on_finished: Callable[[str, Finished], None] = lambda _name, _finished: None,
    ) -> dict[str, Finished]:
        """Write the files into a folder and bring them to the disk.

        Args:
            folder: an existing folder, which has the finished files and no other file to write.
            finished: names of files that an earlier run finished.
            hashes: compute the SHA-256 of each file.
            progress: called about ten times a second with the number of bytes written so far.
            on_finished: called by another thread for each file that is on the disk.

        Returns:
            The outcome of each file that this call wrote, by name.

        Raises:
            NotFiniteError: a result is infinite or NaN.
            SurroundingsError: an input changed or cannot be read, or the disk returned other bytes
                than were written.
            OSError: the system cannot write.
        """
        results: dict[str, Finished] = {}

        def finish(name: str, digest: str | None) -> None:
            blocks_of = self._numbers.pop(name).items()
            totals = {tensor: in_order(blocks) for tensor, blocks in blocks_of}
            results[name] = Finished(totals, digest)
            on_finished(name, results[name])

        self._folder = folder
        todo = [file for file in self._files if file.name not in finished]
        self._done = sum(file.size for file in self._files if file.name in finished)
        with Finisher(hashes=hashes, compares=self._check, on_finished=finish) as finisher:

            def told() -> None:
                finisher.raise_failure()
                progress(self._done)

            try:
                for file in todo:
                    self._begin(file, finisher)
                jobs = (job for file in todo for job in _jobs(file, finisher))
                self._pool.run(jobs, tell=told)
            except BaseException:
                self._pool.close()  # no thread may write to a folder that is removed next
                raise
        progress(self._done)
        return results

    def _prepare(self) -> Callable[[_Job], None]:
        self._device.product()
        return partial(self._work, self._device.workspace(self._sizes, self._check))

    def _begin(self, file: NewFile, finisher: Finisher) -> None:
        """Create a file in full size, so threads can write the blocks in any order."""
        path = self._folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as target:
            target.write(file.head)
            target.truncate(file.size)
        self._left[file.name] = sum(piece.size for piece in file.pieces)
        self._numbers[file.name] = {
            piece.tensor.name: {}
            for piece in file.pieces
            if isinstance(piece, Computed) and piece.tensor.terms
        }
        finisher.begin(file.name, path)
        finisher.written(file.name, Written(0, len(file.head), digest_of(file.head)))
        self._done += len(file.head)
        if not self._left[file.name]:
            finisher.complete(file.name)

    def _work(self, workspace: Workspace, job: _Job) -> None:
        with ExitStack() as stack:
            target = os.open(self._folder / job.file.name, OPEN_FLAGS)
            stack.callback(os.close, target)
            sources: dict[InputFile, LocalFile] = {}
            written = []
            for block in job.blocks:
                piece = block.piece
                if piece.source not in sources:
                    sources[piece.source] = stack.enter_context(piece.source.open())
                source = sources[piece.source]
                if isinstance(piece, CopiedRange):
                    written.append(_copy(piece, block, source, target))
                    continue
                numbers = _compute(piece, block, workspace, source)
                if piece.tensor.terms:
                    with self._lock:
                        self._numbers[job.file.name][piece.tensor.name][block.first] = numbers
                data = workspace.written_bytes(piece.tensor, block.first, block.last)
                write_at(target, block.at, data)
                digest = digest_of(data) if self._check else None
                written.append(Written(block.at, block.size, digest))
        self._account(job, written)

    def _account(self, job: _Job, written: Sequence[Written]) -> None:
        """Tell the finisher which ranges have been written."""
        name, size = job.file.name, sum(part.size for part in written)
        with self._lock:
            for part in written if self._check else [Written(written[0].at, size)]:
                job.finisher.written(name, part)
            self._done += size
            self._left[name] -= size
            if not self._left[name]:
                job.finisher.complete(name)


def in_order(blocks: Mapping[int, Numbers]) -> Numbers:
    """Return the statistics of all blocks, added by the first rows, which decides the last bits."""
    return sum((blocks[first] for first in sorted(blocks)), Numbers())


def _compute(piece: Computed, block: _Block, workspace: Workspace, source: LocalFile) -> Numbers:
    """Read the stored rows of a block and compute the written rows."""
    tensor, first, last = piece.tensor, block.first, block.last
    row = tensor.shape[1] * tensor.stored.itemsize
    if tensor.decode is None:
        source.read_into(piece.start + first * row, workspace.stored_bytes(tensor, first, last))
    return workspace.add(tensor, first, last)


def _copy(piece: CopiedRange, block: _Block, source: LocalFile, target: int) -> Written:
    start = piece.start + block.first
    copy_range(source, target, start=start, at=block.at, size=block.size)
    return Written(block.at, block.size, source=(piece.source, start))
