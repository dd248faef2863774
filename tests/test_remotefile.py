from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from vera_convert.errors import SurroundingsError
from vera_convert.hub import remotefile
from vera_convert.hub.remotefile import HEAD_BYTES, Answer, RemoteFile, TryAgainError

CONTENT = bytes(i * 7 % 251 for i in range(3 * HEAD_BYTES))


@dataclass
class Server:
    """Answers as it is told to; `answers` overrides what a faultless one would say, in order."""

    content: bytes = CONTENT
    tag: str = "tag"
    ranges: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    failures: list[Exception] = field(default_factory=list)
    cut: int = 0
    asked: list[tuple[int, int]] = field(default_factory=list)
    sent: int = 0

    @contextmanager
    def ask(self, first: int, last: int) -> Iterator[Answer]:
        self.asked.append((first, last))
        if self.failures:
            raise self.failures.pop(0)
        size = len(self.content)
        last = min(last, size - 1)
        if not self.ranges:
            found = {"content-length": str(size)}
            yield Answer(200, found | self.headers, ("c", self.tag), self._send(self.content))
        elif first >= size:
            found = {"content-range": f"bytes */{size}"}
            yield Answer(416, found | self.headers, ("c", self.tag), iter(()))
        else:
            body = self.content[first : last + 1]
            if self.cut:
                self.cut -= 1
                body = body[:-1]
            found = {"content-range": f"bytes {first}-{last}/{size}"}
            yield Answer(206, found | self.headers, ("c", self.tag), self._send(body))

    def _send(self, body: bytes) -> Iterator[bytes]:
        for start in range(0, len(body), 1000):
            self.sent += len(body[start : start + 1000])
            yield body[start : start + 1000]


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def test_one_request_tells_the_size_and_serves_the_head() -> None:
    server = Server()
    file = RemoteFile("x", server.ask)
    assert file.size == len(CONTENT)
    assert file.read_at(8, 100) == CONTENT[8:108]
    assert file.read_at(0, HEAD_BYTES) == CONTENT[:HEAD_BYTES]
    assert server.asked == [(0, HEAD_BYTES - 1)]


def test_what_lies_behind_the_head_is_asked_for() -> None:
    server = Server()
    with RemoteFile("x", server.ask) as file:
        buffer = memoryview(bytearray(50))
        file.read_into(len(CONTENT) - 50, buffer)
        file.check_unchanged()
    assert buffer.tobytes() == CONTENT[-50:]
    assert server.asked[1:] == [(len(CONTENT) - 50, len(CONTENT) - 1)]


def test_a_range_outside_of_the_file_is_the_callers_fault() -> None:
    file = RemoteFile("x", Server().ask)
    with pytest.raises(ValueError, match="of 196608"):
        file.read_at(len(CONTENT) - 1, 2)


@pytest.mark.parametrize("ranges", [True, False])
def test_an_empty_file_has_size_zero(ranges: bool) -> None:
    file = RemoteFile("x", Server(content=b"", ranges=ranges).ask)
    assert file.size == 0
    assert file.read_at(0, 0) == b""


def test_a_server_without_ranges_sends_no_more_than_is_needed() -> None:
    server = Server(ranges=False)
    file = RemoteFile("x", server.ask)
    assert file.size == len(CONTENT)
    assert server.sent < HEAD_BYTES + 1000
    assert file.read_at(HEAD_BYTES + 5, 10) == CONTENT[HEAD_BYTES + 5 : HEAD_BYTES + 15]
    assert server.sent < 2 * HEAD_BYTES + 2000


def test_a_server_without_ranges_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remotefile, "MOST_WITHOUT_RANGES", HEAD_BYTES)
    server = Server(ranges=False)
    file = RemoteFile("x", server.ask)
    sent = server.sent
    with pytest.raises(SurroundingsError, match="does not answer range requests"):
        file.read_at(HEAD_BYTES, 1)
    assert server.sent == sent


def test_what_passes_is_tried_again(pauses: list[float]) -> None:
    server = Server(failures=[TryAgainError("503"), TryAgainError("429", after=9.0)], cut=1)
    file = RemoteFile("x", server.ask)
    assert file.read_at(0, 10) == CONTENT[:10]
    assert len(server.asked) == 4
    assert pauses == [0.5, 9.0, 2.0]


def test_tries_are_bounded(pauses: list[float]) -> None:
    server = Server(failures=[TryAgainError("the Hub answers 503", after=1e6)] * 99)
    with pytest.raises(SurroundingsError, match="after 5 tries: the Hub answers 503"):
        RemoteFile("x", server.ask)
    assert len(server.asked) == 5
    assert max(pauses) == remotefile.LONGEST_PAUSE


@pytest.mark.parametrize("change", ["tag", "content"])
def test_a_file_that_changed_is_refused(change: str) -> None:
    server = Server()
    file = RemoteFile("x", server.ask)
    setattr(server, change, {"tag": "other", "content": CONTENT + b"!"}[change])
    with pytest.raises(SurroundingsError, match="x changed while it was read"):
        file.read_at(HEAD_BYTES, 10)


@pytest.mark.parametrize(
    "headers",
    [
        {"content-range": "bytes 1-65536/196608"},
        {"content-range": "bytes */196608"},
        {"content-range": "items 0-65535/196608"},
        {"content-range": "bytes 0-65535/*"},
        {"content-encoding": "gzip"},
    ],
)
def test_an_improper_answer_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(SurroundingsError, match="x: the server"):
        RemoteFile("x", Server(headers=headers).ask)


def test_a_whole_file_of_unknown_size_is_refused() -> None:
    server = Server(ranges=False, headers={"content-length": "many"})
    with pytest.raises(SurroundingsError, match="does not say how large"):
        RemoteFile("x", server.ask)
