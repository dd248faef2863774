"""One file on a server, read by range requests: a header costs kilobytes, not gigabytes.

How to ask is handed in, so nothing here knows the Hub. Every answer is held against the first: the
size, the commit and the entity tag have to stay what they were.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from vera_convert.errors import SurroundingsError

HEAD_BYTES = 64 << 10
"""What the first request takes: nearly always a whole header, or a whole small file."""
MOST_WITHOUT_RANGES = 128 << 20
"""How far into a file to read where the server has no ranges; above the largest header allowed."""
PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds to wait before each further try."""
LONGEST_PAUSE = 30.0

_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")


class TryAgainError(Exception):
    """A request failed in a way that passes: the text says how, `after` is how long to wait."""

    def __init__(self, reason: str, *, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered to the question for some bytes.

    Attributes:
        status: 200 (the whole file), 206 (a part of it) or 416 (it has no such part).
        headers: of the last server that was asked, names in lower case.
        identity: what must not change between answers: the commit and the entity tag.
        blocks: the body, piece by piece; nothing is transferred that is not asked for.
    """

    status: int
    headers: Mapping[str, str]
    identity: tuple[str | None, str | None]
    blocks: Iterator[bytes]


Ask = Callable[[int, int], AbstractContextManager[Answer]]
"""Ask for the bytes from the first to the last, both included.

Raises `TryAgainError` for what passes and `SurroundingsError` for what does not, in the body too.
"""


class RemoteFile:
    """A file on a server as a `ByteSource`; safe to share between threads. A context manager.

    Attributes:
        place: how messages call it.
        size: its length in bytes.
        bytes_read: how many bytes were transferred so far.
    """

    def __init__(self, place: str, ask: Ask) -> None:
        """Ask for the head of the file, and so for its size.

        Raises:
            SurroundingsError: it cannot be had.
        """
        self.place = place
        self._ask = ask
        self._identity: tuple[str | None, str | None] | None = None
        self.size = -1
        self.bytes_read = 0
        self._head = b""
        self._head = self._read(0, HEAD_BYTES)

    def read_at(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`.

        Raises:
            ValueError: the range lies outside of the file.
            SurroundingsError: the bytes cannot be had, or the file changed.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"bytes {offset} to {offset + length} of {self.size}")
        if offset + length <= len(self._head):
            return self._head[offset : offset + length]
        return self._read(offset, length)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; raises as `read_at` does."""
        buffer.cast("B")[:] = self.read_at(offset, buffer.nbytes)

    def check_unchanged(self) -> None:
        """Do nothing: every answer was held against the first when it came."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Do nothing: no connection is held between requests."""

    def _read(self, offset: int, length: int) -> bytes:
        for pause in (*PAUSES, None):
            try:
                return self._read_once(offset, length)
            except TryAgainError as error:
                if pause is None:
                    raise SurroundingsError(
                        f"{self.place} cannot be read after {len(PAUSES) + 1} tries: {error}."
                    ) from error
                time.sleep(min(max(pause, error.after), LONGEST_PAUSE))
        raise AssertionError  # the last round returns or raises

    def _read_once(self, offset: int, length: int) -> bytes:
        with self._ask(offset, offset + length - 1) as answer:
            skip, size = self._start(answer, offset)
            self._check_same(answer, size)
            wanted = min(length, size - offset)
            if skip + wanted > MOST_WITHOUT_RANGES and answer.status == 200:
                raise SurroundingsError(
                    f"{self.place}: the server does not answer range requests, and the bytes from "
                    f"{offset:,} on are too far into the file. Download it first: `hf download`."
                )
            data = _take(answer.blocks, skip, wanted)
            self.bytes_read += skip + len(data)
        if len(data) != wanted:
            raise TryAgainError("the answer was cut off")
        return data

    def _start(self, answer: Answer, offset: int) -> tuple[int, int]:
        """Return how much of the body lies before `offset`, and the size of the whole file."""
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise SurroundingsError(f"{self.place}: the server sends it compressed, unasked.")
        if answer.status == 200:
            length = answer.headers.get("content-length", "")
            if not re.fullmatch(r"\d{1,18}", length, re.ASCII):
                raise SurroundingsError(f"{self.place}: the server does not say how large it is.")
            return offset, int(length)
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
        if found is None or (found[1] is None) != (answer.status == 416):
            raise SurroundingsError(f"{self.place}: the server's answer has no proper range.")
        if found[1] is not None and int(found[1]) != offset:
            raise SurroundingsError(f"{self.place}: the server sent other bytes than asked for.")
        return 0, int(found[3])

    def _check_same(self, answer: Answer, size: int) -> None:
        if self._identity is None:
            self._identity, self.size = answer.identity, size
        elif self._identity != answer.identity or self.size != size:
            raise SurroundingsError(f"{self.place} changed while it was read. Try again.")


def _take(blocks: Iterator[bytes], skip: int, wanted: int) -> bytes:
    """Return up to `wanted` bytes after the first `skip`, asking for no block beyond."""
    data = bytearray()
    if wanted <= 0:
        return b""
    for block in blocks:
        data += block[skip:] if skip < len(block) else b""
        skip = max(0, skip - len(block))
        if len(data) >= wanted:
            break
    return bytes(data[:wanted])
