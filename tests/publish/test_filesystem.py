"""Renames that never replace a file, with and without a system call for them; removal; sync."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vera_convert.publish import filesystem
from vera_convert.publish.filesystem import (
    exchange,
    move,
    remove_tree,
    sync_folder,
    sync_tree,
    try_lock,
)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def cannot(*_: object, **__: object) -> None:
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


@pytest.fixture(params=["at once", "with a look"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rename in both ways: with the system call, and after a check without the system call."""
    if request.param == "with a look":
        monkeypatch.setattr(filesystem, "_rename_at_once", cannot)
    return str(request.param)


def a_file(path: Path) -> None:
    path.write_text("file")


def an_empty_folder(path: Path) -> None:
    path.mkdir()


def a_full_folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("folder")


def a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


KINDS = [a_file, an_empty_folder, a_full_folder, a_dangling_link]
Make = Callable[[Path], None]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("make", KINDS)
def test_move_renames(make: Make, tmp_path: Path) -> None:
    make(tmp_path / "from")
    before = os.lstat(tmp_path / "from")
    move(tmp_path / "from", tmp_path / "to")
    assert names(tmp_path) == ["to"]
    assert os.path.samestat(os.lstat(tmp_path / "to"), before)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("make", [a_file, a_full_folder])
@pytest.mark.parametrize("make_other", KINDS)
def test_move_replaces_nothing(make: Make, make_other: Make, tmp_path: Path) -> None:
    make(tmp_path / "from")
    make_other(tmp_path / "to")
    before = os.lstat(tmp_path / "to")
    with pytest.raises(FileExistsError):
        move(tmp_path / "from", tmp_path / "to")
    assert os.path.lexists(tmp_path / "from")
    assert os.path.samestat(os.lstat(tmp_path / "to"), before)


@pytest.mark.parametrize("make", [a_file, a_full_folder])
@pytest.mark.parametrize("make_other", [a_file, a_full_folder])
def test_move_without_the_system_call_replaces_nothing_that_appears_after_the_check(
    make: Make, make_other: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "_rename_at_once", cannot)
    make(tmp_path / "from")
    looks = []

    def look(path: Path) -> bool:
        looks.append(path)
        if len(looks) == 1:
            make_other(tmp_path / "to")
            return False
        return True

    monkeypatch.setattr(os.path, "lexists", look)
    with pytest.raises(FileExistsError):
        move(tmp_path / "from", tmp_path / "to")
    assert (tmp_path / "from").exists()


def test_a_file_is_moved_on_systems_without_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "_rename_at_once", cannot)
    monkeypatch.setattr(os, "link", cannot)
    a_file(tmp_path / "from")
    move(tmp_path / "from", tmp_path / "to")
    assert names(tmp_path) == ["to"]


@pytest.mark.usefixtures("way")
def test_move_raises_other_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        move(tmp_path / "from", tmp_path / "to")
    a_full_folder(tmp_path / "from")
    with pytest.raises(FileNotFoundError):
        move(tmp_path / "from", tmp_path / "missing" / "to")


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("make_other", KINDS)
def test_exchange_exchanges_both_names_or_returns_false(
    make: Make, make_other: Make, way: str, tmp_path: Path
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    make(one)
    make_other(other)
    before = os.lstat(one), os.lstat(other)
    done = exchange(one, other)
    after = (os.lstat(other), os.lstat(one)) if done else (os.lstat(one), os.lstat(other))
    assert all(map(os.path.samestat, before, after))
    assert not (done and way == "with a look")


def test_exchange_raises_other_errors(tmp_path: Path) -> None:
    a_file(tmp_path / "one")
    if exchange(tmp_path / "one", tmp_path / "one"):  # only on systems with an exchange
        with pytest.raises(FileNotFoundError):
            exchange(tmp_path / "one", tmp_path / "missing")


def test_remove_tree_removes_links_and_not_their_targets(tmp_path: Path) -> None:
    a_full_folder(tmp_path / "kept")
    tree = tmp_path / "tree"
    (tree / "deep" / "deeper").mkdir(parents=True)
    (tree / "deep" / "file").write_text("")
    (tree / "deep" / "deeper" / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("tree", "link", "missing"):
        remove_tree(tmp_path / name)
    assert names(tmp_path) == ["kept"]
    assert (tmp_path / "kept" / "inside").read_text() == "folder"


def test_remove_tree_removes_a_write_protected_folder(tmp_path: Path) -> None:
    a_full_folder(tmp_path / "tree")
    (tmp_path / "tree").chmod(0o555)
    remove_tree(tmp_path / "tree")
    assert names(tmp_path) == []


def test_sync_tree_syncs_everything_and_folders_after_their_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.name == "nt":
        pytest.skip("folders are not synced there")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    for name in ("a", "deep/b", "deep/c"):
        (tree / name).write_text(name)
    sync_tree(tree)
    places = {
        name: synced.index((tree / name).stat().st_ino)
        for name in (".", "a", "deep", "deep/b", "deep/c")
    }
    assert places["."] == 4
    assert places["deep"] > max(places["deep/b"], places["deep/c"])


@pytest.mark.skipif(os.name == "nt", reason="folders are not synced there")
def test_only_a_folder_may_fail_to_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", cannot)
    sync_folder(tmp_path)
    a_file(tmp_path / "file")
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        sync_tree(tmp_path / "file")


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_sync_tree_follows_no_link(tmp_path: Path) -> None:
    a_dangling_link(tmp_path / "link")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        sync_tree(tmp_path)


def test_a_lock_is_held_until_the_file_is_closed(tmp_path: Path) -> None:
    a_file(tmp_path / "lock")
    one, other = (os.open(tmp_path / "lock", os.O_RDWR) for _ in range(2))
    assert try_lock(one)
    assert not try_lock(other)
    os.close(one)
    assert try_lock(other)
    os.close(other)
