"""Read a file on a server by range requests: a header costs kilobytes instead of gigabytes.

The caller passes the function that sends a request, so this module is independent of the Hub. The
size, the commit and the entity tag must be the same in every answer. If a file is read completely,
the hash is compared with the Hub's; for a part of a file, the Hub states no hash.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

from vera_convert.errors import SurroundingsError
from vera_convert.hub.checksum import RepoFile, digest_of, has_digests
from vera_convert.hub.header_cache import MOST_KEPT, Beginning, HeaderCache, Identity
from vera_convert.hub.refusals import TryAgainError
from vera_convert.hub.retry import until_answered

HEAD_BYTES = 32 << 10
"""The bytes of the first request: nearly always a complete header, or a complete small file."""
MOST_WITHOUT_RANGES = 128 << 20
"""The most bytes to read from a server without ranges; more than the largest allowed header."""

_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's answer to a request for some bytes.

    Attributes:
        status: 200 (the complete file), 206 (a part) or 416 (a part beyond the end).
        headers: the headers of the last server, with names in lower case.
        identity: the commit and the entity tag, which must be the same in all answers.
        data: the body: for status 200, from the first byte of the file; may be cut off.
    """

    status: int
    headers: Mapping[str, str]
    identity: Identity
    data: bytes


Ask = Callable[[int, int], Answer]
"""Request the bytes from the first to the last, both included.

Raises `TryAgainError` for a temporary failure and `SurroundingsError` for a lasting failure.
"""


class RemoteFile:
    """A file on a server as a `ByteSource`. A context manager, which threads may share.

    Attributes:
        place: the name for messages.
        size: the length in bytes.
        bytes_read: the number of bytes transferred so far.
    """

    def __init__(
        self,
        place: str,
        ask: Ask,
        *,
        listed: RepoFile | None = None,
        kept: HeaderCache | None = None,
    ) -> None:
        """Request the first bytes and the size of the file, unless an earlier run kept both.

        Args:
            place: the name for messages.
            ask: requests bytes.
            listed: size and hash in the Hub's list of files.
            kept: keeps the first bytes between runs.

        Raises:
            SurroundingsError: the file is unreadable, or differs from the listed file.
        """
        self.place = place
        self._ask = ask
        self._listed = listed or RepoFile()
        self._kept = kept
        self._identity: Identity | None = None
        self.size = -1
        self.bytes_read = 0
        self._head = b""
        earlier = kept.load() if kept is not None else None
        if earlier is not None and self._is_listed(earlier):
            self._identity, self.size, self._head = earlier.identity, earlier.size, earlier.data
        else:
            self._set_head(self._read(0, HEAD_BYTES))

    def read_at(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`.

        Raises:
            ValueError: the range lies outside the file.
            SurroundingsError: the bytes are unreadable, or the file changed.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"bytes {offset} to {offset + length} of {self.size}")
        head, end = self._head, offset + length
        if end <= len(head):
            return head[offset:end]
        if offset > len(head) or end > MOST_KEPT:
            return self._read(offset, length)
        head += self._read(len(head), end - len(head))
        self._set_head(head)
        return head[offset:end]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; raise the errors of `read_at`."""
        buffer.cast("B")[:] = self.read_at(offset, buffer.nbytes)

    def check_unchanged(self) -> None:
        """Do nothing, because every answer was compared with the first answer."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        """Do nothing, because no connection stays open between requests."""

    def _set_head(self, head: bytes) -> None:
        """Set the first bytes, compare the hash if the file is complete, and keep the bytes."""
        assert self._identity is not None  # noqa: S101 -- the first answer set it
        stated = (self._listed.digest, digest_of(self._identity[1]))
        if len(head) == self.size and not has_digests([head], self.size, stated):
            raise damaged(self.place)
        self._head = head
        if self._kept is not None:
            self._kept.save(Beginning(self.size, self._identity, head))

    def _is_listed(self, kept: Beginning) -> bool:
        """Return whether the kept bytes belong to the file that the Hub lists now."""
        digest = digest_of(kept.identity[1])
        listed = self._listed
        same = not digest or len(digest) != len(listed.digest) or digest == listed.digest
        return same and listed.size in (-1, kept.size)

    def _read(self, offset: int, length: int) -> bytes:
        return until_answered(lambda: self._try_to_read(offset, length), what=self.place)

    def _try_to_read(self, offset: int, length: int) -> bytes:
        """Send one request, and return up to `length` bytes from `offset`; fewer only at the end.

        Raises:
            TryAgainError: a temporary failure, or the answer was cut off.
            SurroundingsError: a lasting failure, or the answer is improper.
        """
        answer = self._ask(offset, offset + length - 1)
        self.bytes_read += len(answer.data)
        size = self._size_in(answer, offset)
        self._check_same(answer, size)
        if answer.status == 200 and offset + length > MOST_WITHOUT_RANGES:
            raise SurroundingsError(
                f"{self.place}: the server does not answer range requests, and the bytes from "
                f"{offset:,} on are too far into the file. Download it first: `hf download`."
            )
        start = offset if answer.status == 200 else 0
        data = answer.data[start : start + length]
        if len(data) < min(length, size - offset):
            raise TryAgainError("the answer was cut off")
        return data

    def _size_in(self, answer: Answer, offset: int) -> int:
        """Return the size of the complete file that an answer states."""
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise SurroundingsError(f"{self.place}: the server sends the file compressed, unasked.")
        if answer.status == 200:
            length = answer.headers.get("content-length", "")
            if not re.fullmatch(r"\d{1,18}", length, re.ASCII):
                raise SurroundingsError(
                    f"{self.place}: the server does not state the size of the file."
                )
            return int(length)
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
        if found is None or (found[1] is None) != (answer.status == 416):
            raise SurroundingsError(f"{self.place}: the server's answer has no proper range.")
        if found[1] is not None and int(found[1]) != offset:
            raise SurroundingsError(f"{self.place}: the server sent other bytes than asked for.")
        return int(found[3])

    def _check_same(self, answer: Answer, size: int) -> None:
        if self._identity is None:
            if self._listed.size not in (-1, size):
                raise other_size(self.place, size, self._listed.size)
            self._identity, self.size = answer.identity, size
        elif self._identity != answer.identity or self.size != size:
            raise SurroundingsError(f"{self.place} changed while it was read. Try again.")


def damaged(place: str) -> SurroundingsError:
    """Return the error for downloaded bytes with another hash than the Hub states."""
    return SurroundingsError(
        f"{place}: the downloaded bytes have another hash than the Hub states, so the file was "
        "damaged on its way. The bytes were not used. Run the command again; if the message comes "
        "back, a proxy or mirror alters the file."
    )


def other_size(place: str, size: int, listed: int) -> SurroundingsError:
    """Return the error for a file with another size than the Hub lists."""
    return SurroundingsError(
        f"{place}: the server's file has {size:,} bytes, but the Hub lists {listed:,}. Try again; "
        "a proxy or mirror may hold an old file."
    )
