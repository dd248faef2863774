"""Copy ranges of bytes into a new file on every kind of system."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vera_convert.assembly import copying
from vera_convert.assembly.copying import (
    OPEN_FLAGS,
    copy_range,
    forget,
    start_writing_back,
    write_at,
)
from vera_convert.errors import SurroundingsError
from vera_convert.files.reading import LocalFile, open_local

CONTENT = bytes(range(256)) * 1000
in_kernel = pytest.mark.skipif(
    not hasattr(os, "copy_file_range"), reason="this system copies nothing in its kernel"
)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[LocalFile]:
    (tmp_path / "source").write_bytes(CONTENT)
    with open_local(tmp_path / "source") as file:
        yield file


@pytest.fixture
def target(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "target").write_bytes(bytes(len(CONTENT)))
    opened = os.open(tmp_path / "target", OPEN_FLAGS)
    yield opened
    os.close(opened)


def failing(code: int) -> Callable[..., int]:
    def fail(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    return fail


def expected(start: int, at: int, size: int) -> bytes:
    return bytes(at) + CONTENT[start : start + size] + bytes(len(CONTENT) - at - size)


@pytest.mark.parametrize("where", [(0, 0, len(CONTENT)), (10, 7, 5000), (3, 9, 0)])
def test_a_range_is_copied(
    source: LocalFile, target: int, tmp_path: Path, where: tuple[int, int, int]
) -> None:
    start, at, size = where
    copy_range(source, target, start=start, at=at, size=size)
    assert (tmp_path / "target").read_bytes() == expected(*where)


@in_kernel
@pytest.mark.parametrize(
    "call",
    [
        failing(errno.EXDEV),
        failing(errno.ENOSYS),
        failing(errno.EOPNOTSUPP),
        failing(errno.EINVAL),
        lambda *_: 0,
    ],
    ids=["other device", "no such call", "not supported", "not here", "says it is at the end"],
)
def test_a_range_that_the_kernel_cannot_copy_is_read_and_written(
    source: LocalFile,
    target: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., int],
) -> None:
    monkeypatch.setattr(os, "copy_file_range", call)
    monkeypatch.setattr(copying, "_FALLBACK_BLOCK", 1000)
    copy_range(source, target, start=10, at=7, size=5500)
    assert (tmp_path / "target").read_bytes() == expected(10, 7, 5500)


@in_kernel
def test_a_range_that_the_kernel_copies_partly_is_completed(
    source: LocalFile, target: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.copy_file_range, iter(range(10))

    def some(source: int, target: int, count: int, start: int, at: int) -> int:
        if next(calls) == 2:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return real(source, target, min(count, 1000), start, at)

    monkeypatch.setattr(os, "copy_file_range", some)
    copy_range(source, target, start=10, at=7, size=5500)
    assert (tmp_path / "target").read_bytes() == expected(10, 7, 5500)


@in_kernel
def test_a_full_disk_is_an_error_without_a_second_try(
    source: LocalFile, target: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", failing(errno.ENOSPC))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        copy_range(source, target, start=0, at=0, size=10)


def test_a_source_that_shrank_is_an_error(source: LocalFile, target: int, tmp_path: Path) -> None:
    os.truncate(tmp_path / "source", 100)
    with pytest.raises(SurroundingsError, match="shrank"):
        copy_range(source, target, start=0, at=0, size=len(CONTENT))


def test_a_range_is_copied_on_windows_without_positioned_writes(
    target: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pwrite", raising=False)
    write_at(target, 5, memoryview(b"there"))
    write_at(target, 0, memoryview(b"here"))
    assert (tmp_path / "target").read_bytes()[:10] == b"here\0there"


def test_a_short_write_is_continued(
    target: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if hasattr(os, "pwrite"):
        real = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, data[:3], at))
    write_at(target, 2, memoryview(b"all of it"))
    assert (tmp_path / "target").read_bytes()[:11] == b"\0\0all of it"


@pytest.mark.parametrize("has_advice", [True, False])
def test_advice_to_the_system_does_not_change_the_bytes(
    target: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_advice: bool
) -> None:
    if not has_advice:
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
    write_at(target, 0, memoryview(CONTENT))
    start_writing_back(target, 100, 5000)
    forget(target)
    assert (tmp_path / "target").read_bytes() == CONTENT
