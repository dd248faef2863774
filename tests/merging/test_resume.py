"""A run that is stopped keeps finished files for a later run, or keeps no files."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from vera_convert.errors import UsageError
from vera_convert.publish import filesystem
from vera_convert.publish.publishing import Output, Staged
from vera_convert.publish.staging import Container


class StopError(Exception):
    """The error that stops a run."""


def own(path: Path) -> bool:
    return (path / "a").exists()


def run(out: Path, *, keep: bool, continues: bool = True, stop: bool = True) -> dict[str, str]:
    """Stage a file, and return the names of the files that were already there."""
    with suppress(StopError), Output(out, is_own=own).staged_run(continues=continues) as staged:
        found = {path.name: path.read_text() for path in staged.folder.iterdir()}
        if staged.journal.exists():
            found["journal"] = staged.journal.read_text()
        (staged.folder / f"{len(found)}").write_text("part")
        (staged.folder / "a").write_text("a")
        staged.journal.write_text(f"after {len(found)}")
        staged.worth_keeping = keep
        if stop:
            raise StopError
    return found


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def test_kept_files_are_there_for_the_next_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(out, keep=True) == {}
    assert len(hidden(tmp_path)) == 1
    assert run(out, keep=True) == {"0": "part", "a": "a", "journal": "after 0"}
    assert len(hidden(tmp_path)) == 1
    run(out, keep=True, stop=False)
    assert sorted(path.name for path in out.iterdir()) == ["0", "3", "4", "a"]
    assert not hidden(tmp_path)


def test_files_that_are_not_kept_are_removed(tmp_path: Path) -> None:
    run(tmp_path / "out", keep=False)
    assert not [*tmp_path.iterdir()]


def test_a_run_that_does_not_continue_finds_no_files_and_leaves_no_files(tmp_path: Path) -> None:
    run(tmp_path / "out", keep=True)
    assert run(tmp_path / "out", keep=False, continues=False) == {}
    assert not hidden(tmp_path)


def test_plain_staging_removes_kept_files(tmp_path: Path) -> None:
    run(tmp_path / "out", keep=True)
    with Output(tmp_path / "out", is_own=own).staged() as folder:
        assert not [*folder.iterdir()]
    assert not hidden(tmp_path)


def test_kept_files_of_another_output_are_not_touched(tmp_path: Path) -> None:
    run(tmp_path / "other", keep=True)
    assert run(tmp_path / "out", keep=False) == {}
    assert len(hidden(tmp_path)) == 1
    assert run(tmp_path / "other", keep=False).keys() == {"0", "a", "journal"}


def test_the_run_continues_one_of_several_containers_and_removes_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(3):
        container = Container.beside(out)
        container.new.mkdir()
        container.journal.write_text("journal")
        container.keep()
    assert len(hidden(tmp_path)) == 3
    assert run(out, keep=False) == {"journal": "journal"}
    assert not hidden(tmp_path)


def test_the_container_of_a_live_run_is_not_touched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    living = Container.beside(out)
    living.new.mkdir()
    living.journal.write_text("its own")
    assert run(out, keep=False) == {}
    assert living.journal.read_text() == "its own"
    living.remove()


@pytest.mark.parametrize("lacks", ["new", "journal"])
def test_an_incomplete_container_is_not_continued(tmp_path: Path, lacks: str) -> None:
    out = tmp_path / "out"
    container = Container.beside(out)
    if lacks != "new":
        container.new.mkdir()
        (container.new / "x").write_text("x")
    if lacks != "journal":
        container.journal.write_text("journal")
    container.keep()
    assert run(out, keep=False) == {}
    assert not hidden(tmp_path)


def test_an_output_that_was_moved_aside_is_put_back_first(tmp_path: Path) -> None:
    out = tmp_path / "out"
    container = Container.beside(out)
    container.new.mkdir()
    container.journal.write_text("journal")
    container.old.mkdir()
    (container.old / "a").write_text("the old output")
    container.keep()
    with suppress(StopError), Output(out, force=True, is_own=own).staged_run(continues=True):
        assert (out / "a").read_text() == "the old output"
        raise StopError
    assert (out / "a").read_text() == "the old output"
    assert not hidden(tmp_path)


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists"):
        run(tmp_path / "out", keep=True)
    assert not hidden(tmp_path)


def test_keeping_after_the_end_does_nothing(tmp_path: Path) -> None:
    container = Container.beside(tmp_path / "out")
    container.remove()
    container.keep()
    assert not [*tmp_path.iterdir()]


def test_only_named_files_are_kept(tmp_path: Path) -> None:
    staged = Staged(tmp_path, tmp_path / "journal")
    (tmp_path / "b/c").mkdir(parents=True)
    for name in ("a", "b/x", "b/c/y", "z"):
        (tmp_path / name).write_text(name)
    if os.name != "nt":
        (tmp_path / "link").symlink_to(tmp_path / "b")
    staged.keep_only({"a", "b/c/y"})
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert {name for name in left if not (tmp_path / name).is_dir()} == {"a", "b/c/y"}
    assert "link" not in left


def test_files_that_the_run_synced_are_not_synced_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, synced = filesystem._sync, list[str]()

    def noted(path: Path, flags: int) -> None:
        synced.append(path.name)
        real(path, flags)

    monkeypatch.setattr(filesystem, "_sync", noted)
    with Output(tmp_path / "out", is_own=own).staged_run(continues=False) as staged:
        for name in ("a", "b"):
            (staged.folder / name).write_text(name)
        staged.synced.add(staged.folder / "a")
    assert "a" not in synced
    assert "b" in synced
