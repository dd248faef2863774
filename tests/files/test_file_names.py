"""File names of other people: a name that could lead out of the folder is refused."""

from __future__ import annotations

import os
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import codes

from vera_convert.errors import CheckpointError
from vera_convert.files.file_names import clean_name, is_pickle


@pytest.mark.parametrize(
    "name", ["a", "a/b.safetensors", "...", "a..b/..c", "~", "con ", "ä/é", "-"]
)
def test_plain_names_are_accepted(name: str) -> None:
    assert clean_name(name, place="index") == PurePosixPath(name)


@pytest.mark.parametrize(
    "name",
    [
        *["", "/", "/a", "//a/b", "a/", "a//b", ".", "./a", "a/.", "..", "../a", "a/../b", "a/.."],
        *["\\", "a\\b", "..\\a", "\\\\host\\share", "C:", "c:a", "C:\\a", "a:b", "\\\\?\\C:\\a"],
        *["a\0", "a\nb", "\x1b[2J", "a\x7f", "a\x85", "\udc80"],
    ],
)
def test_names_that_could_lead_out_of_the_folder_are_refused(name: str) -> None:
    assert codes(lambda: clean_name(name, place="index")) == ["V005"]


@given(st.text())
def test_an_accepted_name_stays_in_its_folder_on_every_system(name: str) -> None:
    try:
        path = clean_name(name, place="index")
    except CheckpointError:
        return
    below = PurePosixPath("/folder") / path
    assert os.path.normpath(below) == str(below)
    assert below.is_relative_to("/folder")
    assert str(path) == name


@pytest.mark.parametrize(
    ("name", "pickled"),
    [
        ("adapter_model.bin", True),
        ("A.PT", True),
        ("x/consolidated.00.pth", True),
        ("last.ckpt", True),
        ("a.pkl", True),
        ("adapter_model.safetensors", False),
        ("bin", False),
        (".bin", False),
        ("model.bin.json", False),
    ],
)
def test_pickles_are_known_by_their_ending(name: str, *, pickled: bool) -> None:
    assert is_pickle(name) is pickled
