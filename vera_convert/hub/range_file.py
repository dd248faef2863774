"""Read a file on a server by range requests: a header costs kilobytes instead of gigabytes.

The caller passes the function that sends a request, so this module does not depend on the Hub. The
size, the commit and the entity tag must be the same in every answer. If a file is read completely,
the hash is compared with the Hub's; for a part of a file, the Hub states no hash.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, Self

from vera_convert.errors import SurroundingsError
from vera_convert.hub.checksum import Checksum, RepoFile, digest_of
from vera_convert.hub.refusals import TryAgainError
from vera_convert.hub.retry import Answer, Ask, Patience

HEAD_BYTES = 32 << 10
"""The bytes of the first request: nearly always a complete header, or a complete small file."""
MOST_KEPT = 16 << 20
"""The most first bytes of a file that are held in memory, and kept for the next run."""
MOST_WITHOUT_RANGES = 128 << 20
"""The most bytes to read from a server without ranges; more than the largest allowed header."""
PROGRESS = 1 << 20
"""The bytes of progress after which a broken request no longer counts as a failed try."""

_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Beginning:
    """The first bytes of a file at a commit, with the file's size and identity."""

    size: int
    identity: tuple[str | None, str | None]
    data: bytes


class Keeper(Protocol):
    """Keeps the first bytes of one file between runs."""

    def load(self) -> Beginning | None:
        """Return the kept bytes; None if nothing was kept."""

    def save(self, beginning: Beginning) -> None:
        """Keep these bytes for the next run, if possible."""


class RemoteFile:
    """A file on a server as a `ByteSource`. A context manager, which threads may share.

    Attributes:
        place: the name for messages.
        size: the length in bytes.
        ranges: whether the server answers a request for a part with only this part.
        bytes_read: the number of bytes transferred so far.
    """

    def __init__(
        self,
        place: str,
        ask: Ask,
        *,
        listed: RepoFile | None = None,
        keeper: Keeper | None = None,
        first: int = HEAD_BYTES,
    ) -> None:
        """Request the first bytes and the size of the file, unless an earlier run kept both.

        Args:
            place: the name for messages.
            ask: requests bytes.
            listed: size and hash in the Hub's list of files.
            keeper: keeps the first bytes between runs.
            first: the number of bytes of the first request.

        Raises:
            SurroundingsError: the file cannot be read, or is not the listed file.
        """
        self.place = place
        self._ask = ask
        self._listed = listed or RepoFile()
        self._keeper = keeper
        self._identity: tuple[str | None, str | None] | None = None
        self.size = -1
        self.ranges = True
        self.bytes_read = 0
        self._head = b""
        kept = keeper.load() if keeper is not None else None
        if kept is not None and self._is_listed(kept):
            self._identity, self.size, self._head = kept.identity, kept.size, kept.data
        else:
            self._set_head(self._read(0, first))

    def read_at(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`.

        Raises:
            ValueError: the range lies outside the file.
            SurroundingsError: the bytes cannot be read, or the file changed.
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

    def copy_to(self, write: Callable[[bytes], object]) -> Checksum:
        """Pass the complete file to `write`, and compare the hash.

        Returns:
            The checksum, which matches.

        Raises:
            SurroundingsError: the file cannot be read, or has another hash than stated.
        """
        checksum = self._checksum()

        def take(data: bytes) -> None:
            checksum.update(data)
            write(data)

        head = self._head
        take(head)
        self._transfer(len(head), self.size - len(head), take, far=True)
        self._require_match(checksum)
        return checksum

    def check_unchanged(self) -> None:
        """Do nothing, because every answer was compared with the first answer."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        """Do nothing, because no connection stays open between requests."""

    # --- the first bytes, and the stated hash ---

    def _set_head(self, head: bytes) -> None:
        """Set the first bytes, compare the hash if the file is complete, and keep the bytes."""
        if len(head) == self.size:
            checksum = self._checksum()
            checksum.update(head)
            self._require_match(checksum)
        self._head = head
        if self._keeper is not None and self._identity is not None:
            self._keeper.save(Beginning(self.size, self._identity, head))

    def _checksum(self) -> Checksum:
        tag = self._identity[1] if self._identity else None
        return Checksum((self._listed.digest, digest_of(tag)), self.size)

    def _require_match(self, checksum: Checksum) -> None:
        if not checksum.matches():
            raise SurroundingsError(
                f"{self.place}: the downloaded bytes do not have the hash that the Hub states, so "
                "the file was damaged on its way. The bytes were not used. Run the command again; "
                "if the message comes back, a proxy or mirror alters the file."
            )

    def _is_listed(self, kept: Beginning) -> bool:
        """Return whether the kept bytes belong to the file that the Hub lists now."""
        digest = digest_of(kept.identity[1])
        listed = self._listed
        same = not digest or len(digest) != len(listed.digest) or digest == listed.digest
        return same and listed.size in (-1, kept.size)

    # --- requests ---

    def _read(self, offset: int, length: int) -> bytes:
        data = bytearray()
        self._transfer(offset, length, data.extend)
        return bytes(data)

    def _transfer(
        self, offset: int, length: int, take: Callable[[bytes], object], *, far: bool = False
    ) -> None:
        """Pass `length` bytes from `offset` to `take`; request the rest of a broken answer again.

        Args:
            offset: the first byte.
            length: the number of bytes.
            take: receives the bytes as they arrive.
            far: read also from a server without ranges that sends gigabytes before these bytes.
        """
        patience = Patience(self.place)
        done = 0
        while done < length or self.size < 0:
            before = done
            try:
                with closing(self._blocks(offset + done, length - done, far=far)) as blocks:
                    for block in blocks:
                        done += len(block)
                        take(block)
                if done < min(length, self.size - offset):
                    raise TryAgainError("the answer was cut off")
                return
            except TryAgainError as error:
                if done - before >= PROGRESS:
                    patience.renew()
                patience.wait(error)

    def _blocks(self, offset: int, length: int, *, far: bool) -> Generator[bytes, None, None]:
        """Send one request, and yield up to `length` bytes from `offset` as they arrive."""
        with self._ask(offset, offset + length - 1) as answer:
            skip, size = self._start(answer, offset)
            self._check_same(answer, size)
            left = min(length, size - offset)
            if skip + left > MOST_WITHOUT_RANGES and answer.status == 200 and not far:
                raise SurroundingsError(
                    f"{self.place}: the server does not answer range requests, and the bytes from "
                    f"{offset:,} on are too far into the file. Download it first: `hf download`."
                )
            if left <= 0:
                return
            for block in answer.blocks:
                self.bytes_read += len(block)
                wanted = block[skip : skip + left]
                skip = max(0, skip - len(block))
                if wanted:
                    left -= len(wanted)
                    yield wanted
                if not left:
                    break

    def _start(self, answer: Answer, offset: int) -> tuple[int, int]:
        """Return the number of body bytes before `offset`, and the size of the complete file."""
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise SurroundingsError(f"{self.place}: the server sends the file compressed, unasked.")
        if answer.status == 200:
            length = answer.headers.get("content-length", "")
            if not re.fullmatch(r"\d{1,18}", length, re.ASCII):
                raise SurroundingsError(
                    f"{self.place}: the server does not state the size of the file."
                )
            self.ranges = False
            return offset, int(length)
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
        if found is None or (found[1] is None) != (answer.status == 416):
            raise SurroundingsError(f"{self.place}: the server's answer has no proper range.")
        if found[1] is not None and int(found[1]) != offset:
            raise SurroundingsError(f"{self.place}: the server sent other bytes than asked for.")
        return 0, int(found[3])

    def _check_same(self, answer: Answer, size: int) -> None:
        if self._identity is None:
            if self._listed.size not in (-1, size):
                raise SurroundingsError(
                    f"{self.place}: the server's file has {size:,} bytes, but the Hub lists "
                    f"{self._listed.size:,}. Try again; a proxy or mirror may hold an old file."
                )
            self._identity, self.size = answer.identity, size
        elif self._identity != answer.identity or self.size != size:
            raise SurroundingsError(f"{self.place} changed while it was read. Try again.")
