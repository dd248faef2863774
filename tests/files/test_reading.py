from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from refusals import codes

from vera_convert.errors import CheckpointError, SurroundingsError
from vera_convert.files import reading as files
from vera_convert.files.reading import LocalFile, open_local

posix = pytest.mark.skipif(os.name != "posix", reason="needs pipes or links")


# --- reading by position -------------------------------------------------------------------------


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    path = tmp_path / "letters"
    path.write_bytes(b"abcdefghij")
    return path


def test_a_range_of_bytes_is_read(letters: Path) -> None:
    with open_local(letters) as file:
        assert (file.size, file.place) == (10, str(letters))
        assert file.read_at(3, 4) == b"defg"
        assert file.read_at(10, 0) == b""
        buffer = bytearray(b"--------")
        file.read_into(8, memoryview(buffer)[2:4])
        file.read_into(10, memoryview(buffer)[4:4])
        assert buffer == b"--ij----"
        file.check_unchanged()


def test_a_range_is_read_in_pieces_if_the_system_returns_few_bytes(
    letters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_LARGEST_READ", 3)
    with open_local(letters) as file:
        assert file.read_at(1, 8) == b"bcdefghi"


def test_a_range_is_read_on_systems_without_positioned_reads(
    letters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv", raising=False)
    with open_local(letters) as file:
        assert file.read_at(1, 8) == b"bcdefghi"
        assert file.read_at(0, 2) == b"ab"


@pytest.mark.parametrize(("offset", "length"), [(0, 11), (11, 0), (-1, 2), (4, -1), (5, 1 << 62)])
def test_a_range_outside_of_the_file_is_refused_before_memory_is_taken(
    letters: Path, offset: int, length: int
) -> None:
    with open_local(letters) as file, pytest.raises(ValueError, match="of 10"):
        file.read_at(offset, length)


def test_a_file_that_shrinks_is_noticed(letters: Path) -> None:
    with open_local(letters) as file:
        os.truncate(letters, 5)
        with pytest.raises(SurroundingsError, match=r"letters changed .*: the file shrank"):
            file.read_at(3, 4)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, 5),
        lambda path: os.truncate(path, 11),
        lambda path: path.write_bytes(b"ABCDEFGHIJ"),
        lambda path: os.utime(path, ns=(0, 0)),
    ],
)
def test_a_file_that_changes_is_noticed(letters: Path, change: Callable[[Path], object]) -> None:
    os.utime(letters, ns=(10**18, 10**18))
    with open_local(letters) as file:
        file.read_at(0, 10)
        file.check_unchanged()
        change(letters)
        with pytest.raises(SurroundingsError, match="changed while it was read"):
            file.check_unchanged()


@posix
def test_a_file_that_is_replaced_is_noticed(letters: Path) -> None:
    twin = letters.with_name("twin")
    twin.write_bytes(letters.read_bytes())
    with open_local(letters) as file:
        twin.replace(letters)
        with pytest.raises(SurroundingsError, match="changed while it was read"):
            file.check_unchanged()


def test_a_file_is_closed_once_and_when_it_is_deleted(letters: Path) -> None:
    file = open_local(letters)
    descriptor = file._fd
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    again = open_local(letters)
    again.close()
    again.close()


# --- opening -------------------------------------------------------------------------------------


def codes_in_time(call: Callable[[], object]) -> list[str]:
    """Return the codes of a refusal; fail if the call still blocks after ten seconds."""
    found: list[str] = []
    calling = threading.Thread(target=lambda: found.extend(codes(call)), daemon=True)
    calling.start()
    calling.join(timeout=10)
    return found


@posix
@pytest.mark.parametrize("within", [True, False])
def test_a_pipe_never_blocks(tmp_path: Path, *, within: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    folder = tmp_path if within else None
    assert codes_in_time(lambda: open_local(tmp_path / "pipe", within=folder)) == ["V001"]


@posix
def test_a_pipe_that_replaces_the_file_never_blocks(
    letters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = letters.stat()
    letters.unlink()
    os.mkfifo(letters)
    monkeypatch.setattr(Path, "stat", lambda _self, **_options: seen)
    assert codes_in_time(lambda: open_local(letters)) == ["V001"]


@posix
@pytest.mark.parametrize(
    ("path", "kind"), [("/dev/zero", "is a device"), ("/", "is a folder")], ids=["device", "folder"]
)
def test_a_path_that_is_no_file_is_refused_with_its_kind(path: str, kind: str) -> None:
    with pytest.raises(CheckpointError, match=kind):
        open_local(Path(path))


def test_a_missing_file_is_no_fault_of_the_checkpoint(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "file"
    with pytest.raises(SurroundingsError, match="there is no such file"):
        open_local(missing)
    with pytest.raises(SurroundingsError, match="there is no such file"):
        open_local(missing, within=tmp_path / "no")


def test_a_file_in_place_of_a_folder_is_missing(letters: Path) -> None:
    with pytest.raises(SurroundingsError, match="there is no such file"):
        open_local(letters / "x")


@posix
@pytest.mark.parametrize("target", ["gone\x1b", "link\x1b"])
def test_the_refusal_of_a_dead_link_names_the_target(tmp_path: Path, target: str) -> None:
    (tmp_path / "link\x1b").symlink_to(target)
    for within in (None, tmp_path):
        with pytest.raises(SurroundingsError, match=r"a link to (gone|link)\\x1b, which leads now"):
            open_local(tmp_path / "link\x1b", within=within)


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_an_impossible_path_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(SurroundingsError):
        open_local(tmp_path / path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_an_error_of_the_system_is_no_fault_of_the_checkpoint(
    letters: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    message = f"letters cannot be read: {os.strerror(number)}"
    with open_local(letters) as file:
        monkeypatch.setattr(LocalFile, "_read_some", fail)
        with pytest.raises(SurroundingsError, match=message):
            file.read_at(0, 1)
        monkeypatch.setattr(LocalFile, "_look", fail)
        with pytest.raises(SurroundingsError, match=message):
            file.check_unchanged()
    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(SurroundingsError, match=message):
        open_local(letters)


def test_a_file_with_more_bytes_than_the_limit_is_refused(letters: Path) -> None:
    open_local(letters, limit=10).close()
    assert codes(lambda: open_local(letters, limit=9)) == ["V003"]


# --- links ---------------------------------------------------------------------------------------


@posix
def test_links_inside_of_the_folder_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_bytes(b"x")
    (folder / "relative").symlink_to("deep/../deep/file")
    (folder / "absolute").symlink_to(folder / "deep" / "file")
    (tmp_path / "entrance").symlink_to(folder)
    for name in ("relative", "absolute", "deep/file"):
        for entrance in (folder, tmp_path / "entrance"):
            with open_local(entrance / name, within=entrance) as file:
                assert file.read_at(0, 1) == b"x"


@posix
@pytest.mark.parametrize("target", ["../secret", "deep/../../secret", "{}/secret", "out/secret"])
def test_links_out_of_the_folder_are_not_followed(tmp_path: Path, target: str) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"x")
    (folder / "out").symlink_to("..")
    (folder / "link").symlink_to(target.format(tmp_path))
    assert codes(lambda: open_local(folder / "link", within=folder)) == ["V002"]
    with open_local(folder / "link") as file:  # a caller that names no folder asks for the target
        assert file.size == 1


def test_a_folder_whose_name_begins_with_the_folder_s_name_is_outside(tmp_path: Path) -> None:
    for name in ("folder", "folder-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"x")
    sibling = tmp_path / "folder" / ".." / "folder-2" / "file"
    assert codes(lambda: open_local(sibling, within=tmp_path / "folder")) == ["V002"]


XET = "ab" + "0" * 62


def cached(root: Path, *, absolute: bool = False, shared: bool = False) -> Path:
    """Write a Hub cache with the file ``sub/file`` in a snapshot, and return the snapshot."""
    repo = root / "hub" / "models--org--name"
    blob = repo / "blobs" / "e7a9"
    snapshot = repo / "snapshots" / "0123abcd"
    (snapshot / "sub").mkdir(parents=True)
    blob.parent.mkdir()
    if shared:
        store = root / "hub" / "blobs" / XET[:2] / XET
        store.parent.mkdir(parents=True)
        store.write_bytes(b"x")
        blob.symlink_to(Path("..", "..", "blobs", XET[:2], XET))
    else:
        blob.write_bytes(b"x")
    link = snapshot / "sub" / "file"
    link.symlink_to(blob if absolute else Path("..", "..", "..", "blobs", "e7a9"))
    return snapshot


@posix
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_files_in_the_cache_of_the_hub_are_opened(
    tmp_path: Path, *, absolute: bool, shared: bool
) -> None:
    snapshot = cached(tmp_path, absolute=absolute, shared=shared)
    (tmp_path / "adapter").symlink_to(snapshot / "sub")
    (tmp_path / "moved").symlink_to(tmp_path / "hub")
    through = tmp_path / "moved" / "models--org--name" / "snapshots" / "0123abcd"
    for folder in (snapshot, snapshot / "sub", tmp_path / "adapter", through):
        path = folder / "sub" / "file" if (folder / "sub").exists() else folder / "file"
        with open_local(path, within=folder) as file:
            assert file.read_at(0, 1) == b"x"


@posix
@pytest.mark.parametrize(
    "target",
    [
        "hub/models--org--other/blobs/e7a9",
        "hub/models--org--name/refs/main",
        "hub/models--org--name/blobs/deep/e7a9",
        "hub/models--org--name/snapshots/4567/file",
        "hub/blobs/e7a9",
        "hub/blobs/cd/" + XET,
        "hub/secret",
    ],
)
def test_a_link_in_the_cache_may_lead_only_to_the_repo_s_blobs(tmp_path: Path, target: str) -> None:
    snapshot = cached(tmp_path)
    path = tmp_path / target
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    (snapshot / "link").symlink_to(path)
    assert codes(lambda: open_local(snapshot / "link", within=snapshot)) == ["V002"]


@posix
@pytest.mark.parametrize("link", ["models--org--name/blobs", "blobs"])
def test_a_folder_whose_blobs_are_a_link_is_no_cache(tmp_path: Path, link: str) -> None:
    snapshot = cached(tmp_path, shared=link == "blobs")
    blobs = tmp_path / "hub" / link
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    assert codes(lambda: open_local(snapshot / "sub" / "file", within=snapshot)) == ["V002"]


@posix
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_link_that_is_swapped_in_after_the_path_was_resolved_does_not_lead_out(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    for each in (outside, folder / "sub"):
        each.mkdir(parents=True)
        (each / "a").write_text(each.name)
    resolve = files._resolved_inside

    def swapped(*given: Any) -> tuple[Path, Path]:
        found = resolve(*given)
        if what == "file":
            (folder / "sub/a").unlink()
            (folder / "sub/a").symlink_to(outside / "a")
        else:
            (folder / "sub").rename(folder / "moved")
            (folder / "sub").symlink_to(outside)
        return found

    with open_local(folder / "sub/a", within=folder) as file:
        assert file.read_at(0, 3) == b"sub"
    monkeypatch.setattr(files, "_resolved_inside", swapped)
    with pytest.raises(SurroundingsError, match="changed while it was opened"):
        open_local(folder / "sub/a", within=folder)


@posix
def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "a/b/file").write_text("x")
    before = len([*Path("/dev/fd").iterdir()])
    for name in ("a/b/file", "a/b/c", "a/b/nothing", "a"):
        with suppress(CheckpointError, SurroundingsError):
            open_local(tmp_path / name, within=tmp_path).close()
    assert len([*Path("/dev/fd").iterdir()]) == before


def test_a_failed_close_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"data")
    source, closed, close = open_local(tmp_path / "file"), list[int](), os.close

    def failing(number: int) -> None:
        closed.append(number)
        close(number)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", failing)
    with pytest.raises(OSError, match="Input/output error"):
        source.close()
    source.close()
    monkeypatch.undo()
    assert len(closed) == 1
