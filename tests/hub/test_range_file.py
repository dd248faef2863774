from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from pathlib import Path

import pytest

from vera_convert.errors import SurroundingsError
from vera_convert.hub import range_file, retry
from vera_convert.hub.checksum import RepoFile
from vera_convert.hub.header_cache import Beginning, HeaderCache
from vera_convert.hub.range_file import HEAD_BYTES, Answer, RemoteFile
from vera_convert.hub.refusals import OutOfReachError, TryAgainError

CONTENT = bytes(i * 7 % 251 for i in range(6 * HEAD_BYTES))


@dataclass
class Server:
    """A server whose faults and answers the test sets;

    `answers` replaces the right answers, in order.
    """

    content: bytes = CONTENT
    tag: str = "tag"
    ranges: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    failures: list[Exception] = field(default_factory=list)
    cut: int = 0
    asked: list[tuple[int, int]] = field(default_factory=list)

    def ask(self, first: int, last: int) -> Answer:
        self.asked.append((first, last))
        if self.failures:
            raise self.failures.pop(0)
        size = len(self.content)
        body = self.content[first : last + 1]
        status, found = 206, {"content-range": f"bytes {first}-{first + len(body) - 1}/{size}"}
        if not self.ranges:
            status, found = 200, {"content-length": str(size)}
            body = self.content[: last + 1]
        elif first >= size:
            status, found = 416, {"content-range": f"bytes */{size}"}
        if self.cut:
            self.cut -= 1
            body = body[: len(body) // 2]
        return Answer(status, found | self.headers, ("c", self.tag), body)


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def test_the_first_request_gives_the_size_and_the_head() -> None:
    server = Server()
    file = RemoteFile("x", server.ask)
    assert file.size == len(CONTENT)
    assert file.read_at(8, 100) == CONTENT[8:108]
    assert file.read_at(0, HEAD_BYTES) == CONTENT[:HEAD_BYTES]
    assert server.asked == [(0, HEAD_BYTES - 1)]


def test_bytes_after_the_head_are_requested() -> None:
    server = Server()
    with RemoteFile("x", server.ask) as file:
        buffer = memoryview(bytearray(50))
        file.read_into(len(CONTENT) - 50, buffer)
        file.check_unchanged()
    assert buffer.tobytes() == CONTENT[-50:]
    assert server.asked[1:] == [(len(CONTENT) - 50, len(CONTENT) - 1)]


def test_a_range_outside_of_the_file_is_a_bug_of_the_caller() -> None:
    file = RemoteFile("x", Server().ask)
    with pytest.raises(ValueError, match="of 196608"):
        file.read_at(len(CONTENT) - 1, 2)


@pytest.mark.parametrize("ranges", [True, False])
def test_an_empty_file_has_size_zero(ranges: bool) -> None:
    file = RemoteFile("x", Server(content=b"", ranges=ranges).ask)
    assert file.size == 0
    assert file.read_at(0, 0) == b""


def test_a_server_without_ranges_is_read_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(ranges=False)
    file = RemoteFile("x", server.ask)
    assert file.size == len(CONTENT)
    assert file.read_at(HEAD_BYTES + 5, 10) == CONTENT[HEAD_BYTES + 5 : HEAD_BYTES + 15]
    monkeypatch.setattr(range_file, "MOST_WITHOUT_RANGES", 2 * HEAD_BYTES)
    with pytest.raises(SurroundingsError, match="does not answer range requests"):
        file.read_at(2 * HEAD_BYTES, 1)


def test_a_short_failure_is_retried(pauses: list[float]) -> None:
    server = Server(failures=[TryAgainError("503"), TryAgainError("429", after=9.0)], cut=1)
    file = RemoteFile("x", server.ask)
    assert file.read_at(0, 10) == CONTENT[:10]
    assert len(server.asked) == 4
    assert pauses == [0.5, 9.0, 2.0]


def test_the_number_of_tries_is_limited(pauses: list[float]) -> None:
    server = Server(failures=[TryAgainError("the Hub answers 503")] * 99)
    with pytest.raises(
        OutOfReachError, match=r"x could not be read .* in 5 tries: the Hub answers"
    ):
        RemoteFile("x", server.ask)
    assert len(server.asked) == 5
    assert pauses == list(retry.PAUSES)


def test_a_server_that_asks_for_days_gets_a_pause_of_at_most_a_minute(
    pauses: list[float],
) -> None:
    server = Server(failures=[TryAgainError("the Hub answers 503", after=1e6)] * 99)
    with pytest.raises(OutOfReachError, match="the Hub answers 503"):
        RemoteFile("x", server.ask)
    assert max(pauses) == retry.LONGEST_PAUSE
    assert sum(pauses) == retry.LONGEST_WAIT


def test_a_header_longer_than_the_first_request_takes_one_more_request() -> None:
    server = Server()
    file = RemoteFile("x", server.ask)
    assert file.read_at(8, 2 * HEAD_BYTES) == CONTENT[8 : 8 + 2 * HEAD_BYTES]
    assert file.read_at(HEAD_BYTES, HEAD_BYTES) == CONTENT[HEAD_BYTES : 2 * HEAD_BYTES]
    assert server.asked == [(0, HEAD_BYTES - 1), (HEAD_BYTES, 2 * HEAD_BYTES + 7)]


# --- stated hashes and sizes ---------------------------------------------------------------------

SMALL = b"{}"
GIT_BLOB = sha1(b"blob 2\0{}", usedforsecurity=False).hexdigest()


@pytest.mark.parametrize(
    "digest", [sha256(SMALL).hexdigest(), GIT_BLOB, sha1(SMALL, usedforsecurity=False).hexdigest()]
)
def test_the_hash_of_a_completely_read_file_is_compared(digest: str) -> None:
    for server, listed in (
        (Server(content=SMALL), RepoFile(2, digest)),
        (Server(content=SMALL, tag=f'"{digest}"'), None),
        (Server(content=SMALL, tag=f'W/"{digest}"'), RepoFile(2)),
    ):
        assert RemoteFile("x", server.ask, listed=listed).read_at(0, 2) == SMALL
        server.content = b"[]"
        with pytest.raises(SurroundingsError, match="x: the downloaded bytes have another hash"):
            RemoteFile("x", server.ask, listed=listed)


def test_the_hash_of_a_longer_file_is_compared_after_the_last_range() -> None:
    server = Server(tag=f'"{sha256(CONTENT).hexdigest()}"')
    assert RemoteFile("x", server.ask).read_at(0, len(CONTENT)) == CONTENT
    server.content = CONTENT[:-1] + b"!"
    with pytest.raises(SurroundingsError, match="have another hash"):
        RemoteFile("x", server.ask).read_at(0, len(CONTENT))


def test_two_different_hashes_fit_no_file() -> None:
    server = Server(content=SMALL, tag=sha256(SMALL).hexdigest())
    with pytest.raises(SurroundingsError, match="have another hash"):
        RemoteFile("x", server.ask, listed=RepoFile(2, sha256(b"other").hexdigest()))


def test_the_hash_of_a_large_file_s_git_pointer_is_not_compared() -> None:
    server = Server(content=SMALL, tag=sha256(SMALL).hexdigest())
    listed = RepoFile(2, sha1(b"pointer", usedforsecurity=False).hexdigest())
    assert RemoteFile("x", server.ask, listed=listed).size == 2


def test_a_file_of_another_size_than_listed_is_refused() -> None:
    with pytest.raises(SurroundingsError, match="has 2 bytes, but the Hub lists 3"):
        RemoteFile("x", Server(content=SMALL).ask, listed=RepoFile(3))


@pytest.fixture
def kept(tmp_path: Path) -> HeaderCache:
    return HeaderCache(tmp_path / "repo" / "vera-convert" / "name")


def test_a_cached_head_is_not_requested(kept: HeaderCache) -> None:
    server = Server()
    RemoteFile("x", server.ask, kept=kept).read_at(0, HEAD_BYTES + 1)
    server.asked.clear()
    file = RemoteFile("x", server.ask, kept=kept)
    assert file.read_at(5, HEAD_BYTES - 4) == CONTENT[5 : HEAD_BYTES + 1]
    assert (file.size, file.bytes_read, server.asked) == (len(CONTENT), 0, [])
    server.tag = "other"
    with pytest.raises(SurroundingsError, match="changed while it was read"):
        file.read_at(HEAD_BYTES + 1, 1)


def test_a_cached_head_of_another_file_is_not_used(kept: HeaderCache) -> None:
    server = Server(content=SMALL)
    for listed in (RepoFile(2, sha256(SMALL).hexdigest()), RepoFile(3)):
        kept.save(Beginning(2, ("c", sha256(b"[]").hexdigest()), b"[]"))
        with suppress(SurroundingsError):
            assert RemoteFile("x", server.ask, listed=listed, kept=kept).read_at(0, 2) == SMALL
    assert len(server.asked) == 2


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
        {"content-range": "bytes 1-32768/196608"},
        {"content-range": "bytes */196608"},
        {"content-range": "items 0-32767/196608"},
        {"content-range": "bytes 0-32767/*"},
        {"content-encoding": "gzip"},
    ],
)
def test_an_improper_answer_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(SurroundingsError, match="x: the server"):
        RemoteFile("x", Server(headers=headers).ask)


def test_a_complete_file_of_unknown_size_is_refused() -> None:
    server = Server(ranges=False, headers={"content-length": "many"})
    with pytest.raises(SurroundingsError, match="does not state the size"):
        RemoteFile("x", server.ask)
