"""A walk through a folder has one rule for links and hidden names."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from vera_convert.errors import SurroundingsError, VeraConvertError
from vera_convert.files.walk import DEEPEST, file_sizes, files_and_links, walk


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Make a folder with files, subfolders and hidden names."""
    root = tmp_path / "tree"
    for name in ("b/two.txt", "a/one.txt", "a/.hidden/three.txt", ".git/config", "top.txt"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


def test_a_folder_comes_before_its_subfolders_and_hidden_names_are_left_out(tree: Path) -> None:
    found = {folder.name: [entry.name for entry in folder.entries] for folder in walk(tree)}
    assert found == {"": ["a", "b", "top.txt"], "a": ["one.txt"], "b": ["two.txt"]}
    assert [*found] == ["", "a", "b"]


def test_hidden_names_are_listed_if_asked_for(tree: Path) -> None:
    assert files_and_links(tree) == [
        "top.txt",
        ".git/config",
        "a/one.txt",
        "a/.hidden/three.txt",
        "b/two.txt",
    ]


def test_the_caller_decides_which_subfolders_are_entered(tree: Path) -> None:
    names = []
    for folder in walk(tree):
        names.append(folder.name)
        folder.entries[:] = [entry for entry in folder.entries if entry.name != "a"]
    assert names == ["", "b"]


def test_sizes_are_sorted_by_path(tree: Path) -> None:
    (tree / "a.txt").write_text("")
    assert file_sizes(tree) == {"a.txt": 0, "a/one.txt": 9, "b/two.txt": 9, "top.txt": 7}


@pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")
def test_links_to_files_count_as_files_and_links_to_folders_are_not_entered(tree: Path) -> None:
    (tree / "to_file").symlink_to("a/one.txt")
    (tree / "to_folder").symlink_to("a")
    (tree / "to_nowhere").symlink_to("missing")
    (tree / "circle").symlink_to("circle")
    os.mkfifo(tree / "pipe")
    assert [*file_sizes(tree)] == ["a/one.txt", "b/two.txt", "to_file", "top.txt"]
    assert {"to_file", "to_folder", "to_nowhere", "circle", "pipe"} < {*files_and_links(tree)}
    assert [folder.name for folder in walk(tree)] == ["", "a", "b"]


@pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")
def test_the_name_of_a_weight_file_is_listed_even_if_it_is_no_file(tree: Path) -> None:
    os.mkfifo(tree / "a.safetensors")
    (tree / "b.safetensors").mkdir()
    (tree / "c.safetensors").symlink_to("missing")
    (tree / "d.safetensors.index.json").symlink_to("d.safetensors.index.json")
    assert [name for name, size in file_sizes(tree).items() if not size] == [
        "a.safetensors",
        "b.safetensors",
        "c.safetensors",
        "d.safetensors.index.json",
    ]


def test_a_subfolder_that_is_too_deep_is_an_error_that_a_caller_can_collect(
    tmp_path: Path,
) -> None:
    deepest = tmp_path.joinpath(*["d"] * DEEPEST)
    deepest.mkdir(parents=True)
    assert len([*walk(tmp_path)]) == DEEPEST + 1
    (deepest / "d").mkdir()
    with pytest.raises(SurroundingsError, match=f"more than {DEEPEST} folders deep"):
        [*walk(tmp_path)]
    failed: dict[str, VeraConvertError] = {}
    assert len([*walk(tmp_path, failed=failed)]) == DEEPEST + 1
    assert [*failed] == ["/".join(["d"] * (DEEPEST + 1))]


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() == 0, reason="root may list every folder"
)
def test_a_folder_that_cannot_be_listed_is_named(tree: Path) -> None:
    (tree / "a").chmod(0)
    with pytest.raises(SurroundingsError, match=r"a cannot be read: Permission denied\."):
        [*walk(tree)]
    (tree / "a").chmod(0o700)


def test_a_missing_root_is_always_an_error(tmp_path: Path) -> None:
    with pytest.raises(SurroundingsError, match=r"none cannot be read: No such file"):
        [*walk(tmp_path / "none", failed={})]
