"""Files written around the system's cache hold the given bytes on every disk."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vera_convert.assembly import direct
from vera_convert.assembly.direct import DirectFile, memory_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has O_DIRECT")

PAGE = 4096
HEAD = b"header" * 20
SIZES = [3 << 20, 5, 1 << 20, (1 << 20) + 3, 2 << 20, 0, 1 << 16, 77]


def blocks(start: int) -> list[memoryview]:
    """Return random blocks, each aligned in memory for its position in the file."""
    random, found = np.random.default_rng(1), []
    for size in SIZES:
        memory = memory_for(start, size)
        memory[:] = random.integers(0, 256, size, np.uint8)
        found.append(memory.data)
        start += size
    return found


def written(path: Path, parts: list[memoryview]) -> None:
    """Write a header and blocks, and check the bytes of the file."""
    expected = b"".join([HEAD, *parts])
    with DirectFile(path, len(expected)) as sink:
        assert sink.write(HEAD) == len(HEAD)
        assert [sink.write(part) for part in parts] == SIZES
    assert path.read_bytes() == expected


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write small files directly, too."""
    monkeypatch.setattr(direct, "LEAST_BYTES", 1)


def is_direct(file: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT)


def watched(
    monkeypatch: pytest.MonkeyPatch, write: Callable[[int, memoryview], int]
) -> list[tuple[bool, int, int]]:
    """Replace `os.write` by a function that records the flag, the address and the size of each
    call.
    """
    calls = []

    def listed(file: int, data: memoryview) -> int:
        address = np.frombuffer(data, np.uint8).ctypes.data
        calls.append((is_direct(file), int(address), len(data)))
        return write(file, data)

    monkeypatch.setattr(os, "write", listed)
    return calls


def test_aligned_blocks_are_written_without_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = blocks(len(HEAD))
    calls = watched(monkeypatch, os.write)
    written(tmp_path / "file", parts)
    if not calls[0][0]:
        pytest.skip("the file system of the temporary folder has no direct writes")
    *straight, last = calls
    assert not last[0]  # the end is not a full page
    assert all(each[0] and each[1] % PAGE == each[2] % PAGE == 0 for each in straight)
    first = np.frombuffer(parts[0], np.uint8).ctypes.data
    own = [size for _, address, size in straight if first <= address < first + len(parts[0])]
    assert sum(own) > len(parts[0]) - 2 * PAGE


def test_unaligned_blocks_give_the_same_file(tmp_path: Path) -> None:
    written(tmp_path / "file", blocks(len(HEAD) + 1))


def test_a_refused_direct_write_goes_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def refusing(file: int, data: memoryview) -> int:
        if is_direct(file):
            raise OSError(errno.EINVAL, "no direct writes")
        return write(file, data)

    calls = watched(monkeypatch, refusing)
    written(tmp_path / "file", blocks(len(HEAD)))
    assert not any(flag for flag, _, _ in calls[1:])


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    watched(monkeypatch, lambda file, data: write(file, bytes(data[: max(1, len(data) // 2 - 5)])))
    monkeypatch.setattr(DirectFile, "_set_direct", lambda *_, wanted: wanted)
    written(tmp_path / "file", blocks(len(HEAD)))


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="full"):
        written(tmp_path / "file", blocks(len(HEAD)))


def test_a_small_file_is_written_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "LEAST_BYTES", 1 << 30)
    calls = watched(monkeypatch, os.write)
    written(tmp_path / "file", blocks(len(HEAD)))
    assert not any(flag for flag, _, _ in calls)
