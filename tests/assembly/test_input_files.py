"""Open an input file for each block."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vera_convert.assembly.input_files import InputFile
from vera_convert.errors import CheckpointError, SurroundingsError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"content")
    return tmp_path / "file"


def test_an_input_can_be_read_several_times(path: Path) -> None:
    file = InputFile.look(path, within=path.parent)
    assert file.size == 7
    for _ in range(3):
        with file.open() as source:
            assert source.read_at(2, 3) == b"nte"
    file.check_unchanged()


def replaced(path: Path) -> None:
    path.with_name("new").write_bytes(b"changed")
    path.with_name("new").replace(path)


def touched(path: Path) -> None:
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize(
    "change",
    [Path.unlink, replaced, touched, lambda path: os.truncate(path, 3)],
    ids=["removed", "replaced", "touched", "cut"],
)
def test_an_input_that_changes_is_refused(path: Path, change: Callable[[Path], object]) -> None:
    file = InputFile.look(path, within=path.parent)
    change(path)
    with pytest.raises(SurroundingsError):
        file.open()
    with pytest.raises(SurroundingsError):
        file.check_unchanged()


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_does_not_lead_out_of_the_folder(path: Path) -> None:
    (path.parent / "folder").mkdir()
    (path.parent / "folder" / "link").symlink_to(path)
    with pytest.raises(CheckpointError):
        InputFile.look(path.parent / "folder" / "link", within=path.parent / "folder")
