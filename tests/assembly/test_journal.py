"""The journal of a merge that can be continued."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import pytest

from vera_convert.assembly.addends import Numbers
from vera_convert.assembly.journal import Journal, finished_files
from vera_convert.assembly.writer import Finished

FINISHED = {
    "a.safetensors": Finished(
        {"w": Numbers(3, 2, 0.1, 1e-300, 1 / 3)}, sha256(b"a.safetensors").hexdigest()
    ),
    "b/c.safetensors": Finished({}, sha256(b"b/c.safetensors").hexdigest()),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "new" / "b").mkdir(parents=True)
    for name in FINISHED:
        (tmp_path / "new" / name).write_text(name)
    return tmp_path / "new"


@pytest.fixture
def path(folder: Path) -> Path:
    """Write a journal of both files."""
    found = folder.parent / "journal"
    journal = Journal(found, folder, "same", {})
    for name, each in FINISHED.items():
        journal.add(name, each)
    return found


def test_a_journal_lists_the_finished_files(path: Path, folder: Path) -> None:
    assert finished_files(path, folder, "same") == FINISHED


def test_a_journal_can_begin_with_files_finished_before(path: Path, folder: Path) -> None:
    Journal(path, folder, "same", FINISHED)
    assert finished_files(path, folder, "same") == FINISHED


def test_with_another_identity_or_without_a_journal_no_file_is_finished(
    path: Path, folder: Path
) -> None:
    assert not finished_files(path, folder, "other")
    path.unlink()
    assert not finished_files(path, folder, "same")


@pytest.mark.parametrize("length", [0, 1, 10, 20])
def test_with_a_cut_first_line_no_file_is_finished(path: Path, folder: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    assert not finished_files(path, folder, "same")


def test_a_cut_last_line_is_ignored(path: Path, folder: Path) -> None:
    content = path.read_bytes()
    for length in (1, 2, 50):
        path.write_bytes(content[:-length])
        assert finished_files(path, folder, "same").keys() == {"a.safetensors"}


def test_a_changed_file_is_not_finished(path: Path, folder: Path) -> None:
    os.utime(folder / "a.safetensors", ns=(0, 0))
    assert finished_files(path, folder, "same").keys() == {"b/c.safetensors"}
    (folder / "b/c.safetensors").unlink()
    assert not finished_files(path, folder, "same")


def test_a_file_with_other_bytes_and_the_same_times_is_not_finished(
    path: Path, folder: Path
) -> None:
    file = folder / "a.safetensors"
    times = file.stat()
    file.write_text("b.safetensors")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert finished_files(path, folder, "same").keys() == {"b/c.safetensors"}


def test_a_file_without_a_hash_or_behind_a_link_is_not_finished(path: Path, folder: Path) -> None:
    (folder / "b/c.safetensors").rename(folder / "d")
    (folder / "b/c.safetensors").symlink_to(folder / "d")
    without = {"a.safetensors": Finished({}, None), "b/c.safetensors": FINISHED["b/c.safetensors"]}
    Journal(path, folder, "same", without)
    assert not finished_files(path, folder, "same")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"name": "a.safetensors"', b'"nam": "a.safetensors"'),
        (b'"name": "a.safetensors"', b'"name": 5'),
        (b'"name": "a.safetensors"', rb'"name": "a\u0000"'),
        (b'"size": 13', b'"siz": 13'),
        (b'"sha256": "', b'"sha25": "'),
        (b'"numbers": {"w": {', b'"numbers": [], "other": {"w": {'),
        (b'"numbers": {"w": {', b'"numbers": {"v": 5, "w": {'),
        (b'"values": 3', b'"value": 3'),
        (b'"values": 3', b'"values": "3"'),
        (b'{"name": "a.safetensors"', b"[" * 200_000),
    ],
)
def test_a_line_of_another_form_is_no_record(
    path: Path, folder: Path, before: bytes, after: bytes
) -> None:
    content = path.read_bytes()
    assert before in content
    path.write_bytes(content.replace(before, after, 1))
    assert finished_files(path, folder, "same").keys() == {"b/c.safetensors"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_a_pipe_is_no_journal(path: Path, folder: Path) -> None:
    path.unlink()
    os.mkfifo(path)
    assert not finished_files(path, folder, "same")


def test_with_a_malformed_journal_no_file_is_finished(path: Path, folder: Path) -> None:
    for content in (b"\xff\xfe", b"[]\n", b"{}\n{}\n", b'{"identity": 1}\n'):
        path.write_bytes(content)
        assert not finished_files(path, folder, "same")
