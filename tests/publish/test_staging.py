"""Staging folders: those of live runs are kept, those of dead runs are removed."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest
from children import finished, next_line, running

from vera_convert.errors import SurroundingsError
from vera_convert.publish import staging as module
from vera_convert.publish.filesystem import remove_tree, try_lock
from vera_convert.publish.staging import Container, sweep_containers


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leave_leftovers(out: Path, *parts: str) -> Path:
    """Leave the container of a killed run for `out`; each part is a folder with a file."""
    staging = Container.beside(out)
    for part in parts:
        folder = staging.new.with_name(part)
        folder.mkdir()
        (folder / "content").write_text(part)
    detached = staging.remove.detach()
    assert detached is not None
    os.close(detached[2][2])
    return staging.new.parent


def no_locks(_fd: int) -> bool:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_a_container_is_hidden_and_empty_and_is_removed_once(out: Path) -> None:
    staging = Container.beside(out)
    (name,) = names(out.parent)
    assert name.startswith(".out.vera-convert-")
    assert names(out.parent / name) == ["lock"]
    staging.new.mkdir()
    staging.remove()
    assert names(out.parent) == []
    staging.remove()


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_other_users_cannot_read_a_container(out: Path) -> None:
    staging = Container.beside(out)
    assert staging.new.parent.stat().st_mode & 0o777 == 0o700
    staging.remove()


def test_a_container_is_removed_with_its_object(out: Path) -> None:
    staging = Container.beside(out)
    staging.new.mkdir()
    del staging
    assert names(out.parent) == []


def test_a_container_is_removed_with_its_process_but_not_with_a_forked_child(out: Path) -> None:
    code = """
staging = staging.Container.beside(out)
if hasattr(os, "fork"):
    if not os.fork():
        sys.exit()
    os.wait()
print(staging.new.parent.exists())
"""
    with running(code, out) as child:
        assert next_line(child) == "True"
        assert finished(child) == (0, "")
    assert names(out.parent) == []


def test_a_container_of_a_live_run_is_not_swept(out: Path) -> None:
    staging = Container.beside(out)
    code = "staging = staging.Container.beside(out); print(staging.new, flush=True); input()"
    with running(code, out) as child:
        theirs = Path(next_line(child))
        for _ in range(2):
            sweep_containers(out)
            assert staging.new.parent.exists()
            assert theirs.parent.exists()
    sweep_containers(out)
    assert staging.new.parent.exists()
    assert not theirs.parent.exists()
    staging.remove()


@pytest.mark.parametrize("parts", [(), ("new",), ("old",), ("dead",), ("dead", "new")])
def test_a_container_of_a_dead_run_is_swept(parts: tuple[str, ...], out: Path) -> None:
    leave_leftovers(out, *parts)
    leave_leftovers(out, *parts)
    sweep_containers(out)
    assert names(out.parent) == []


def test_a_container_of_a_run_killed_before_its_lock_is_swept(out: Path) -> None:
    (leave_leftovers(out) / "lock").unlink()
    sweep_containers(out)
    assert names(out.parent) == []


def test_an_output_that_was_moved_aside_is_put_back(out: Path) -> None:
    leave_leftovers(out, "new", "old")
    sweep_containers(out)
    assert names(out.parent) == ["out"]
    assert (out / "content").read_text() == "old"


def test_an_output_that_was_moved_aside_does_not_replace_a_newer_output(out: Path) -> None:
    leave_leftovers(out, "new", "old")
    out.mkdir()
    sweep_containers(out)
    assert names(out.parent) == ["out"]
    assert names(out) == []


def test_an_output_that_cannot_be_put_back_is_kept(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = leave_leftovers(out, "new", "old")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(module, "move", fail)
        sweep_containers(out)
    assert (staging / "old" / "content").read_text() == "old"
    sweep_containers(out)
    assert (out / "content").read_text() == "old"


LONG = "n" * 250
TAIL = ".vera-convert-0123456789abcdef"


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("out", "out2"),
        ("out", "Xout"),
        ("o.t", "oot"),
        ("out", f"out{TAIL}"),
        ("out", f".out{TAIL}"),
        (LONG, LONG[:-1] + "m"),
        (LONG, LONG[:-1]),
        ("ü" * 60, "ü" * 61),
    ],
)
def test_only_the_leftovers_of_the_same_name_are_swept(
    name: str, other: str, tmp_path: Path
) -> None:
    ours, theirs = leave_leftovers(tmp_path / name, "new"), leave_leftovers(tmp_path / other, "new")
    sweep_containers(tmp_path / name)
    assert not ours.exists()
    assert (theirs / "new").exists()
    sweep_containers(tmp_path / other)
    assert names(tmp_path) == []


def test_files_that_only_look_like_leftovers_are_kept(out: Path) -> None:
    target = leave_leftovers(out.with_name("other"), "new")
    lookalikes = [f".out{TAIL}0", f".out{TAIL[:-1]}g", f"out{TAIL}", f".out{TAIL}.bak"]
    for name in lookalikes:
        out.with_name(name).mkdir()
    out.with_name(f".out{TAIL}").write_text("a file")
    if os.name != "nt":
        out.with_name(f".out{TAIL[:-1]}0").symlink_to(target)
    before = names(out.parent)
    sweep_containers(out)
    assert names(out.parent) == before
    assert (target / "new").exists()


def test_no_container_is_swept_on_a_disk_without_locks(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "try_lock", no_locks)
    staging = Container.beside(out)
    leftover = leave_leftovers(out, "new")
    sweep_containers(out)
    assert staging.new.parent.exists()
    assert leftover.exists()
    staging.remove()
    assert not staging.new.parent.exists()


def test_a_container_that_is_swept_before_its_lock_is_made_again(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweeper runs before the lock file exists, then before the file is locked, then not
    again.
    """
    real_open = os.open
    moments = ["open", "lock"]

    def slow_open(path: Path, flags: int, mode: int = 0o777, **keywords: int) -> int:
        if flags & os.O_CREAT and "open" in moments:
            moments.remove("open")
            sweep_containers(out)
        return real_open(path, flags, mode, **keywords)

    def slow_lock(fd: int) -> bool:
        if "open" not in moments and "lock" in moments:
            moments.remove("lock")
            sweep_containers(out)
        return try_lock(fd)

    monkeypatch.setattr(os, "open", slow_open)
    monkeypatch.setattr(module, "try_lock", slow_lock)
    staging = Container.beside(out)
    sweep_containers(out)
    assert not moments
    assert names(out.parent) == [staging.new.parent.name]
    staging.new.mkdir()
    staging.remove()
    assert names(out.parent) == []


def test_a_container_that_is_always_swept_before_its_lock_is_an_error(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "try_lock", lambda _fd: False)
    with pytest.raises(SurroundingsError, match="kept removing"):
        Container.beside(out)


def test_a_leftover_that_cannot_be_removed_is_logged_and_swept_next_time(
    out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_path: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    staging = Container.beside(out)
    staging.new.mkdir()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(module, "remove_tree", fail)
        staging.remove()
    assert "could not be removed (Operation not permitted)" in caplog.text
    assert len(names(out.parent)) == 1
    sweep_containers(out)
    assert names(out.parent) == []


def test_a_live_run_that_is_swept_loses_all_staged_files_in_one_step(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks may not reach another host; then the live run's staged files disappear in one step."""
    new = leave_leftovers(out, "new") / "new"
    removed = []

    def watch(path: Path) -> None:
        if path.exists():
            removed.append(path.name)
            assert not new.exists()
        remove_tree(path)

    monkeypatch.setattr(module, "remove_tree", watch)
    sweep_containers(out)
    assert removed == ["dead"]
