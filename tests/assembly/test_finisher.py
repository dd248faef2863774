"""Hash, sync and check finished files while other files are computed."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from hashlib import sha256
from pathlib import Path

import pytest

from vera_convert.assembly import finisher
from vera_convert.assembly.finisher import Finisher, Written, digest_of
from vera_convert.assembly.input_files import InputFile
from vera_convert.errors import SurroundingsError
from vera_convert.publish.signals import Interrupted, signals_raise

CONTENT = random.Random(0).randbytes(10_000)
PARTS = [(0, 10), (10, 4000), (4010, 1), (4011, 5989)]


def finished(
    folder: Path, parts: list[Written], *, content: bytes = CONTENT, **kinds: bool
) -> dict[str, str | None]:
    """Finish a file, and return the reported names and hashes."""
    told: dict[str, str | None] = {}
    (folder / "file").write_bytes(content)
    with Finisher(**kinds, on_finished=told.__setitem__) as finisher:
        finisher.begin("file", folder / "file")
        for part in parts:
            finisher.written("file", part)
        finisher.complete("file")
    return told


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
@pytest.mark.parametrize("step", [1, 3000, 1 << 24])
def test_the_hash_does_not_depend_on_the_order_of_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: list[int], step: int
) -> None:
    monkeypatch.setattr(finisher, "_HASH_EVERY", step)
    monkeypatch.setattr(finisher, "_READ_BLOCK", 999)
    told = finished(tmp_path, [Written(*PARTS[n]) for n in order], hashes=True)
    assert told == {"file": sha256(CONTENT).hexdigest()}


def test_a_finished_file_is_reported_without_hashes(tmp_path: Path) -> None:
    assert finished(tmp_path, [Written(*part) for part in PARTS]) == {"file": None}


def test_every_file_is_synced_before_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda _file: events.append("synced"))
    for name in "abc":
        (tmp_path / name).write_bytes(CONTENT)
    with Finisher(on_finished=lambda name, _: events.append(name)) as finisher:
        for name in "abc":
            finisher.begin(name, tmp_path / name)
            finisher.complete(name)
    assert events.count("synced") == 3
    assert {event for event in events if event != "synced"} == {*"abc"}
    assert events[0] == "synced"


@pytest.mark.parametrize("flipped", [None, 0, 4010, 9999])
def test_computed_blocks_are_compared_by_their_digests(tmp_path: Path, flipped: int | None) -> None:
    parts = [Written(at, size, digest_of(CONTENT[at : at + size])) for at, size in PARTS]
    content = bytearray(CONTENT)
    if flipped is None:
        assert finished(tmp_path, parts, compares=True) == {"file": None}
        return
    content[flipped] ^= 1
    with pytest.raises(SurroundingsError, match="reads back with other bytes"):
        finished(tmp_path, parts, content=bytes(content), compares=True)


@pytest.mark.parametrize("flipped", [None, 5000])
def test_copied_ranges_are_compared_with_their_source(tmp_path: Path, flipped: int | None) -> None:
    (tmp_path / "source").write_bytes(b"before" + CONTENT)
    source = InputFile.look(tmp_path / "source", within=tmp_path)
    content = bytearray(CONTENT)
    if flipped is not None:
        content[flipped] ^= 1
    parts = [Written(at, size, source=(source, at + 6)) for at, size in PARTS]
    if flipped is None:
        assert finished(tmp_path, parts, compares=True) == {"file": None}
    else:
        with pytest.raises(SurroundingsError, match=r"bytes 4,011 to 10,000"):
            finished(tmp_path, parts, content=bytes(content), compares=True)


def test_a_failure_is_raised_once_and_its_file_is_not_reported(tmp_path: Path) -> None:
    told: dict[str, str | None] = {}
    finisher = Finisher(on_finished=told.__setitem__)
    for name in ("gone", "there"):
        finisher.begin(name, tmp_path / name)
        finisher.complete(name)
    finisher.close()
    assert not told
    with pytest.raises(FileNotFoundError):
        finisher.raise_failure()


def fail_elsewhere(path: Path, told: dict[str, str | None]) -> None:
    with Finisher(on_finished=told.__setitem__) as finisher:
        finisher.begin("gone", path)
        finisher.complete("gone")
        raise ValueError("elsewhere")


def test_the_failure_of_the_run_takes_precedence(tmp_path: Path) -> None:
    told: dict[str, str | None] = {}
    with pytest.raises(ValueError, match="elsewhere"):
        fail_elsewhere(tmp_path / "gone", told)
    assert not told


def test_a_thread_that_cannot_start_leaves_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    starts, start = iter(range(2)), threading.Thread.start

    def limited(self: threading.Thread) -> None:
        if next(starts) == 1:
            raise RuntimeError("can't start new thread")
        start(self)

    before = threading.active_count()
    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="start new thread"):
        Finisher()
    assert threading.active_count() == before


def finish_four(path: Path, told: dict[str, str | None]) -> None:
    with Finisher(on_finished=told.__setitem__) as finisher:
        for name in ("one", "two", "three", "four"):
            finisher.begin(name, path)
            finisher.complete(name)


@pytest.mark.skipif(os.name == "nt", reason="POSIX only")
def test_a_signal_while_files_are_synced_ends_the_wait_and_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(CONTENT)

    def slow(_file: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)

    monkeypatch.setattr(os, "fsync", slow)
    told: dict[str, str | None] = {}
    before = threading.active_count()
    with pytest.raises(Interrupted), signals_raise():
        finish_four(tmp_path / "file", told)
    assert threading.active_count() == before
    assert len(told) < 4
