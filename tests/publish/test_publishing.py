"""Output appears completely or not at all, despite failures, other writers, and kills."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from children import finished, next_line, running, send_line
from systemcalls import intercept

from vera_convert.errors import SurroundingsError, UsageError
from vera_convert.publish import filesystem, place, staging
from vera_convert.publish import publishing as publish
from vera_convert.publish.publishing import Output, updated_folder
from vera_convert.publish.signals import Interrupted
from vera_convert.publish.staging import sweep_containers

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX only")
SUPPORT = Path(__file__).parents[1] / "support"

Content = str | Mapping[str, str] | None
OLD: Content = {"a": "old", "extra": "old"}
NEW: Content = {"a": "new", "b/c": "new"}


def own(path: Path) -> bool:
    """Say whether a command that writes the contents of these tests could have written the path."""
    return path.is_file() or (path / "a").exists()


def fill(path: Path, content: Content) -> None:
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        for name, text in content.items():
            if not (path / name).parent.is_dir():
                (path / name).parent.mkdir(parents=True)
            (path / name).write_text(text)


def content_of(path: Path) -> Content:
    if not os.path.lexists(path):
        return None
    if path.is_symlink():
        return path.readlink().as_posix()
    if not path.is_dir():
        return path.read_text()
    files = (file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): file.read_text() for file in files}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(out: Path, content: Content = NEW, *, force: bool = False) -> None:
    output = Output(out, own, force=force, is_folder=not isinstance(content, str))
    with output.staged() as new:
        fill(new, content)


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Return a path for the output; at the end, its folder must hold nothing except the output."""
    folder = tmp_path / "parent"
    folder.mkdir()
    yield folder / "out"
    assert set(names(folder)) <= {"out"}


@pytest.fixture
def in_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a system that cannot exchange names or rename without replacing."""

    def cannot(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(filesystem, "_rename_at_once", cannot)


@pytest.fixture(params=["at once", "in two steps"])
def way(request: pytest.FixtureRequest) -> None:
    """Publish in both ways."""
    if request.param == "in two steps":
        request.getfixturevalue("in_two_steps")


# Success ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("old", "new"), [(None, NEW), (OLD, NEW), (None, "new"), ("old", "new")])
def test_output_appears_only_at_the_end_and_without_other_files(
    old: Content, new: Content, out: Path
) -> None:
    fill(out, old)
    output = Output(out, own, force=old is not None, is_folder=not isinstance(new, str))
    with output.staged() as staging:
        assert staging.exists() == (new == NEW)
        fill(staging, new)
        assert content_of(out) == old
        assert {name for name in names(out.parent) if not name.startswith(".")} <= {"out"}
    assert content_of(out) == new


@posix
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes_follow_the_umask(umask: int, out: Path) -> None:
    before = os.umask(umask)
    try:
        write(out)
        write(out.with_name("file"), "new")
    finally:
        os.umask(before)
    file = out.with_name("file").rename(out / "file")
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.stat().st_mode & 0o777 for path in (file, out / "a")} == {0o666 & ~umask}


@posix
@pytest.mark.parametrize("force", [False, True])
def test_all_files_are_synced_before_the_output_appears_and_the_name_before_the_end(
    force: bool, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[object] = []
    real = filesystem._rename_at_once

    def rename(source: Path, target: Path, *, exchange: bool) -> None:
        real(source, target, exchange=exchange)
        events.append("appeared")

    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.fstat(fd).st_ino))
    monkeypatch.setattr(filesystem, "_rename_at_once", rename)
    fill(out, OLD if force else None)
    write(out, force=force)
    wanted = {path.stat().st_ino for path in (out, *out.rglob("*"))}
    moment = events.index("appeared")
    assert set(events[:moment]) == wanted
    assert events[moment:] == ["appeared", out.parent.stat().st_ino]


def test_a_relative_out_does_not_follow_the_working_directory(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out.parent)
    with Output(Path("out"), is_own=own).staged() as new:
        fill(new, NEW)
        monkeypatch.chdir(out.parent.parent)
    assert content_of(out) == NEW


@posix
@pytest.mark.parametrize("name", ["-rf", "a b\n\\x1b[0m", "*", "[a", "n" * 255, "ü" * 127])
def test_an_output_can_have_any_name(name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    write(tmp_path / name, force=True)
    assert names(tmp_path) == [name]


def test_a_message_about_a_staged_file_names_out(out: Path) -> None:
    with pytest.raises(SurroundingsError) as caught, Output(out, own).staged() as new:  # noqa: PT012
        fill(new, NEW)
        raise SurroundingsError(f"{new / 'a'} cannot be read: Input/output error.", "Try again.")
    assert str(caught.value) == f"{out / 'a'} cannot be read: Input/output error. Try again."
    assert names(out.parent) == []


# Refusals -----------------------------------------------------------------------------------------


def a_file(path: Path) -> None:
    path.write_text("theirs")


def an_empty_folder(path: Path) -> None:
    path.mkdir()


def a_full_folder(path: Path) -> None:
    fill(path, {"theirs": "theirs"})


def a_link(path: Path) -> None:
    path.symlink_to(path.parent.parent)


def a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


Make = Callable[[Path], None]
in_the_way = pytest.mark.parametrize(
    "make", [a_file, an_empty_folder, a_full_folder, a_link, a_dangling_link]
)


def refused(out: Path, content: Content = NEW, *, force: bool = False) -> str:
    """Check that publishing is refused and changes nothing; return the reason."""
    before = os.lstat(out)
    with pytest.raises(UsageError) as caught:
        write(out, content, force=force)
    assert os.path.samestat(os.lstat(out), before)
    return str(caught.value)


@in_the_way
@pytest.mark.parametrize("new", [NEW, "new"])
def test_an_existing_out_is_refused(make: Make, new: Content, out: Path) -> None:
    make(out)
    assert "exists. Choose another OUT" in refused(out, new)
    with pytest.raises(UsageError, match="exists"):
        Output(out, is_own=own).check()


def test_force_is_named_only_if_it_replaces_the_existing_out(out: Path) -> None:
    out.mkdir()
    (out / "adapter_config.json").write_text("{}", encoding="utf-8")
    for is_own, remedy in (
        (True, "Choose another OUT, or replace it with --force."),
        (False, "OUT."),
    ):
        with pytest.raises(UsageError, match=f"{remedy}$") as caught:
            Output(out, is_own={out: is_own}.__getitem__).check()
        assert ("--force" in str(caught.value)) == is_own


@in_the_way
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("new", [NEW, "new"])
def test_an_out_that_appears_while_the_run_works_is_refused(
    make: Make, new: Content, out: Path
) -> None:
    output = Output(out, own, is_folder=not isinstance(new, str))
    with ExitStack() as stack:
        fill(stack.enter_context(output.staged()), new)
        make(out)
        before = os.lstat(out)
        with pytest.raises(UsageError, match="exists"):
            stack.close()
    assert os.path.samestat(os.lstat(out), before)


@posix
@in_the_way
@pytest.mark.parametrize("new", [NEW, "new"])
def test_an_out_that_appears_at_the_last_moment_is_refused(
    make: Make, new: Content, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """POSIX's own rename would silently replace a file, a link and an empty folder."""
    real = filesystem._rename_at_once

    def rename(source: Path, target: Path, *, exchange: bool) -> None:
        make(out)
        real(source, target, exchange=exchange)

    monkeypatch.setattr(filesystem, "_rename_at_once", rename)
    with pytest.raises(UsageError, match="exists"):
        write(out, new)
    assert content_of(out) != new


@pytest.mark.parametrize(
    ("make", "new", "why"),
    [
        (a_file, NEW, "is no output of this command"),
        (a_full_folder, NEW, "is no output of this command"),
        (a_full_folder, "new", "is no output of this command"),
        (an_empty_folder, "new", "is no output of this command"),
        (a_link, NEW, "is a link"),
        (a_link, "new", "is a link"),
        (a_dangling_link, NEW, "is a link"),
    ],
)
def test_force_replaces_only_what_the_command_writes(
    make: Make, new: Content, why: str, out: Path
) -> None:
    make(out)
    assert why in refused(out, new, force=True)


@pytest.mark.usefixtures("way")
def test_force_replaces_an_empty_folder(out: Path) -> None:
    an_empty_folder(out)
    assert refused(out).endswith("exists. Choose another OUT, or replace it with --force.")
    write(out, force=True)
    assert content_of(out) == NEW


@pytest.mark.parametrize("force", [False, True])
def test_a_mount_point_is_refused_before_the_work(
    force: bool, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    an_empty_folder(out)
    monkeypatch.setattr(os.path, "ismount", out.__eq__)
    with pytest.raises(UsageError, match=r"is a mount point\. Choose .*/NAME\.$"):
        Output(out, force=force, is_own=own).check()


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_bind_mount_is_refused_before_the_work(
    is_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bind mount lies on the same device as the folder around it, so only Linux's list tells."""
    out = tmp_path / "two words"
    out.mkdir() if is_folder else out.write_text("x")
    mounts = tmp_path / "mountinfo"
    real = str(tmp_path.resolve() / out.name).replace(" ", "\\040")
    mounts.write_text(
        f"36 35 98:0 / / rw - ext4 /dev/root rw\n37 36 98:0 /x {real} rw - ext4 a rw\n"
    )
    monkeypatch.setattr(place, "_MOUNTS", mounts)
    with pytest.raises(UsageError, match=r"two words is a mount point\. Choose another OUT"):
        Output(out, force=True, is_own=own, is_folder=is_folder).check()
    Output(tmp_path / "two", force=True, is_own=own, is_folder=is_folder).check()


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system has no numbers of users")
def test_the_folder_of_another_user_in_a_sticky_folder_is_refused_before_the_work(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    an_empty_folder(out)
    out.chmod(0o777)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    Output(out, force=True, is_own=own).check()
    out.parent.chmod(0o1777)
    with pytest.raises(SurroundingsError, match=r"belongs to another user.* Choose another OUT\.$"):
        Output(out, force=True, is_own=own).check()
    monkeypatch.undo()
    Output(out, force=True, is_own=own).check()


def test_a_folder_that_may_not_be_moved_is_refused_before_the_work(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exchange with OUT writes to OUT itself, whose entry `..` changes."""
    an_empty_folder(out)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda at, *more, **_: at != out and allowed(at, *more))
    with pytest.raises(SurroundingsError, match=r"may not write to this folder\."):
        Output(out, force=True, is_own=own).check()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("make", [a_file, a_full_folder, a_dangling_link])
def test_force_replaces_no_foreign_files_that_appear_while_the_run_works(
    make: Make, out: Path
) -> None:
    with ExitStack() as stack:
        fill(stack.enter_context(Output(out, force=True, is_own=own).staged()), NEW)
        make(out)
        with pytest.raises(UsageError, match="force"):
            stack.close()
    assert content_of(out) != NEW


@pytest.mark.usefixtures("way")
def test_force_replaces_an_out_that_appears_and_disappears(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_move, real_exchange = publish.move, publish.exchange  # type: ignore[attr-defined]
    disturbances = iter([True, True, True])

    def move(source: Path, target: Path) -> None:
        if target == out and next(disturbances, False):
            fill(out, OLD)
        real_move(source, target)

    def exchange(one: Path, other: Path) -> bool:
        if next(disturbances, False):
            filesystem.remove_tree(out)
        return bool(real_exchange(one, other))

    monkeypatch.setattr(publish, "move", move)
    monkeypatch.setattr(publish, "exchange", exchange)
    write(out, force=True)
    assert content_of(out) == NEW
    assert next(disturbances, None) is None


def test_an_out_that_keeps_changing_is_an_error(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def move(_source: Path, _target: Path) -> None:
        raise FileExistsError

    monkeypatch.setattr(publish, "move", move)
    with pytest.raises(SurroundingsError, match="kept changing"):
        write(out, force=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("given", "target", "relation"),
    [
        ("in", "in", "is"),
        ("in", "link", "is"),
        ("link", "in", "is"),
        ("in", "in/new", "lies inside"),
        ("in", "in/sub/new", "lies inside"),
        ("in", "link/new", "lies inside"),
        ("link", "in/new", "lies inside"),
        ("in", "sublink/new", "lies inside"),
        ("sublink", "in", "contains"),
        ("in/sub", "in", "contains"),
        ("in/sub/file", "in", "contains"),
        ("in/sub/file", "in/sub/file", "is"),
        ("filelink", "in/sub/file", "is"),
        ("filelink", "in", "contains"),
        ("in", "elsewhere/../in/new", "lies inside"),
    ],
)
def test_an_out_that_overlaps_an_input_is_refused(
    given: str, target: str, relation: str, force: bool, tmp_path: Path
) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "sub" / "file").write_text("in")
    (tmp_path / "link").symlink_to("in", target_is_directory=True)
    (tmp_path / "sublink").symlink_to(Path("in", "sub"), target_is_directory=True)
    (tmp_path / "filelink").symlink_to(Path("in", "sub", "file"))
    inputs = [tmp_path / "missing", tmp_path / given]
    before = names(tmp_path), content_of(tmp_path / "in")
    for is_folder in (True, False):
        output = Output(tmp_path / target, lambda _: True, force, inputs, is_folder=is_folder)
        with pytest.raises(UsageError, match=f"{relation} the input"), output.staged():
            pytest.fail("the block was entered")
        with pytest.raises(UsageError, match=f"{relation} the input"):
            output.check()
    assert (names(tmp_path), content_of(tmp_path / "in")) == before


def test_an_out_next_to_its_input_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with Output(tmp_path / "in2", inputs=[tmp_path / "in"], is_own=own).staged() as new:
        fill(new, NEW)
    assert names(tmp_path) == ["in", "in2"]


@pytest.mark.parametrize(
    ("target", "error", "why"),
    [
        ("missing/../out", UsageError, "missing, which does not exist"),
        ("file/sub/out", SurroundingsError, "is not a folder"),
        ("file/out", SurroundingsError, "is not a folder"),
        ("..", UsageError, "a name of its own"),
        ("nul\0", UsageError, "a name of its own"),
        ("nul\0/out", UsageError, "null"),
    ],
)
def test_an_impossible_out_is_refused_before_the_work(
    target: str, error: type[Exception], why: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(error, match=why),
        Output(tmp_path / target, force=True, is_own=own).staged(),
    ):
        pytest.fail("the block was entered")
    assert names(tmp_path) == ["file"]


def break_off(folder: Path) -> None:
    """Write a file and fail, as a run does."""
    fill(folder, NEW)
    raise OSError("broken")


def test_missing_folders_above_an_out_are_created(tmp_path: Path) -> None:
    with Output(tmp_path / "a" / "b" / "out", is_own=own).staged() as new:
        fill(new, NEW)
    assert content_of(tmp_path / "a" / "b" / "out") == NEW
    assert names(tmp_path / "a" / "b") == ["out"]


def test_a_failure_removes_only_the_created_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with (
        pytest.raises(OSError, match="broken"),
        Output(tmp_path / "a" / "b" / "c" / "out", is_own=own).staged() as new,
    ):
        break_off(new)
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == []


def test_a_created_folder_that_another_run_uses_is_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="broken"),
        Output(tmp_path / "a" / "b" / "out", is_own=own).staged(),
    ):
        break_off(tmp_path / "a")
    assert names(tmp_path / "a") == ["a", "b"]


def test_checking_an_out_makes_no_folder(tmp_path: Path) -> None:
    Output(tmp_path / "a" / "out", is_own=own).check()
    assert names(tmp_path) == []


@posix
def test_a_folder_above_that_is_a_dangling_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(SurroundingsError, match="a link that leads nowhere"):
        Output(tmp_path / "link" / "out", is_own=own).check()


@posix
def test_a_name_that_is_too_long_is_refused_before_work(out: Path) -> None:
    with (
        pytest.raises(SurroundingsError, match="too long"),
        Output(out.with_name("n" * 256), is_own=own).staged(),
    ):
        pytest.fail("the block was entered")


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() == 0,
    reason="root writes everywhere, Windows has no such mode",
)
def test_a_read_only_parent_is_refused_before_work(out: Path) -> None:
    out.parent.chmod(0o555)
    with (
        pytest.raises(SurroundingsError, match=r"denied.* that you may write to"),
        Output(out, is_own=own).staged(),
    ):
        pytest.fail("the block was entered")
    with pytest.raises(SurroundingsError, match=r"denied.* that you may write to"):
        Output(out, is_own=own).check()
    out.parent.chmod(0o755)


# Failures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [None, OLD])
@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(5)])
def test_an_exception_of_the_block_is_raised_and_leaves_no_file(
    error: BaseException, old: Content, out: Path
) -> None:
    def work() -> None:
        with Output(out, force=True, is_own=own).staged() as new:
            fill(new, NEW)
            raise error

    fill(out, old)
    with pytest.raises(type(error)) as caught:
        work()
    assert caught.value is error
    assert content_of(out) == old


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EROFS, "can be written to"),
        (errno.EIO, "faulty"),
        (errno.ENAMETOOLONG, "Choose another OUT."),
        (errno.ENOENT, "Choose another OUT."),
    ],
)
def test_a_system_error_of_the_block_is_explained(code: int, remedy: str, out: Path) -> None:
    with pytest.raises(SurroundingsError) as caught, Output(out, is_own=own).staged() as new:
        raise OSError(code, os.strerror(code), str(new / "a"))
    message = str(caught.value)
    assert message.startswith(f"{out} could not be written: {os.strerror(code)}.")
    assert remedy in message
    assert "vera-convert-" not in message


@pytest.mark.parametrize(("read_only", "code"), [(True, errno.EROFS), (False, errno.EACCES)])
def test_a_read_only_disk_and_a_folder_of_another_user_have_different_messages(
    read_only: bool, code: int, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    monkeypatch.setattr(publish, "is_read_only", lambda _: read_only)
    with pytest.raises(SurroundingsError, match=re.escape(os.strerror(code))):
        Output(out, is_own=own).check()


def test_a_system_error_elsewhere_is_reported_with_its_place(out: Path) -> None:
    with (
        pytest.raises(SurroundingsError, match=r"denied \(/else.where\)\."),
        Output(out, is_own=own).staged(),
    ):
        raise PermissionError(errno.EACCES, "Permission denied", "/else/where")


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError("odd")])
def test_an_error_that_is_not_about_writing_is_raised(error: OSError, out: Path) -> None:
    with pytest.raises(type(error)) as caught, Output(out, is_own=own).staged():
        raise error
    assert caught.value is error


def test_a_block_that_writes_no_file_publishes_nothing(out: Path) -> None:
    output = Output(out, own, is_folder=False)
    with pytest.raises(SurroundingsError, match="No such file"), output.staged():
        pass
    assert content_of(out) is None


scenarios = pytest.mark.parametrize(
    ("old", "new"), [(None, NEW), (OLD, NEW), (None, "new"), ("old", "new")]
)
MAY_FAIL = ("removing: ", "unlink", "rmdir", "close", "try_lock", "link")
"""Calls whose failure may leave the run successful."""


@scenarios
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_any_system_call_may_fail(
    code: int, old: Content, new: Content, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)
    failed_at: list[str] = []
    for number in range(1, 100):
        fill(out, old)
        hit = ""

        def act(now: int, name: str, done: bool, number: int = number) -> None:
            nonlocal hit
            # before the call; a close fails after the call, or the file would stay open
            if now == number and done == name.endswith("close"):
                hit = name
                raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            intercept(patch.setattr, act)
            try:
                write(out, new, force=old is not None)
            except SurroundingsError as error:
                complaint = str(error)
            else:
                complaint = ""
        if complaint:
            failed_at.append(hit)
            assert os.strerror(code) in complaint
            assert content_of(out) == old
        else:
            assert content_of(out) == new
            assert not hit or hit.startswith(MAY_FAIL)
        if not hit.startswith(("removing: ", "unlink", "rmdir")):
            assert set(names(out.parent)) <= {"out"}, hit
        write(out, new, force=True)
        assert names(out.parent) == ["out"]
        filesystem.remove_tree(out)
        if not hit:
            break
    assert not hit
    assert {"mkdir", "open", "_rename_at_once"} <= set(failed_at)
    assert os.name == "nt" or failed_at.count("fsync") == (2 if new == "new" else 5)


@scenarios
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("signals", "done"), [((signal.SIGTERM,), True), ((signal.SIGINT, signal.SIGTERM), False)]
)
def test_a_signal_may_come_at_any_system_call(  # noqa: PLR0917
    signals: tuple[int, ...],
    done: bool,
    old: Content,
    new: Content,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)
    outcomes = []
    for number in range(1, 100):
        fill(out, old)
        hit = False

        def act(now: int, _name: str, now_done: bool, number: int = number) -> None:
            nonlocal hit
            if (now, now_done) == (number, done):
                hit = True
                for one in signals:
                    signal.raise_signal(one)

        with monkeypatch.context() as patch:
            intercept(patch.setattr, act)
            try:
                write(out, new, force=old is not None)
            except Interrupted as interruption:
                outcomes.append(interruption.number)
            else:
                outcomes.append(0)
        assert content_of(out) == (old if outcomes[-1] else new)
        assert set(names(out.parent)) <= {"out"}
        filesystem.remove_tree(out)
        if not hit:
            break
    assert not hit
    # A signal before some call interrupts the run; from that call on, the output is there.
    assert outcomes == sorted(outcomes, reverse=True)
    assert set(outcomes) == {0, signals[0]}
    assert min(map(outcomes.count, outcomes)) > 2


def test_an_old_output_that_cannot_be_removed_is_only_logged(
    out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_path: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    fill(out, OLD)
    with monkeypatch.context() as patch:
        patch.setattr(staging, "remove_tree", fail)
        write(out, force=True)
    assert content_of(out) == NEW
    assert len(names(out.parent)) == 2
    assert "could not be removed" in caplog.text
    with suppress(UsageError):
        write(out)  # also a refused run removes leftovers
    assert names(out.parent) == ["out"]


# Kills --------------------------------------------------------------------------------------------

KILLED_ANYWHERE = f"""
sys.path.insert(0, {str(SUPPORT)!r})
from systemcalls import intercept
old, step = sys.argv[2] == "old", sys.argv[3] == "in two steps"
os.fsync = lambda fd: None

def cannot(*_, **__):
    raise OSError(38, "cannot")

if step:
    filesystem._rename_at_once = cannot

def texts(path):
    return {{file.read_text() for file in path.rglob("*") if file.is_file()}}

def write(force):
    with Output(out, force=force, is_own=own).staged() as new:
        fill(new, "new")

for number in range(1, 100):
    filesystem.remove_tree(out)
    if old:
        out.mkdir()
        fill(out, "old")
    child = os.fork()
    if not child:
        def act(now, name, done):
            if done and now == number:
                os.kill(os.getpid(), signal.SIGKILL)
        intercept(setattr, act)
        write(old)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if old and step and not out.exists():
        staging.sweep_containers(out)
        assert texts(out) == {{"old"}}, number
    assert texts(out) in ([{{"old"}}, {{"new"}}] if old else [set(), {{"new"}}]), number
    try:
        write(old)
    except errors.UsageError:
        assert not old, number
    assert texts(out) == {{"new"}}, number
    assert os.listdir(out.parent) == ["out"], number
    if not status:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
print(number)
"""


@posix
@pytest.mark.parametrize("old", ["old", "no old"])
@pytest.mark.parametrize("step", ["at once", "in two steps"])
def test_the_next_run_removes_the_leftovers_of_a_run_killed_at_any_system_call(
    old: str, step: str, out: Path
) -> None:
    with running(KILLED_ANYWHERE, out, old, step) as child:
        calls = next_line(child)
        assert finished(child) == (0, "")
    assert 20 < int(calls) < 99


WRITES_FOR_EVER = """
number = 0
while True:
    number += 1
    with Output(out, force=True, is_own=own).staged() as new:
        fill(new, str(number))
    print(flush=True)
"""


def test_the_next_run_removes_the_leftovers_of_a_run_killed_at_a_random_moment(out: Path) -> None:
    chance = random.Random(0)
    for _ in range(4):
        with running(WRITES_FOR_EVER, out) as child:
            next_line(child)
            time.sleep(chance.uniform(0, 0.03))
        if exchanges(out.parent):
            content = content_of(out)
            assert isinstance(content, dict)
            assert set(content) == {"a", "b/c"}
            assert len(set(content.values())) == 1
        write(out, force=True)
        assert content_of(out) == NEW
        assert names(out.parent) == ["out"]


def exchanges(folder: Path) -> bool:
    """Say whether the system can exchange two names in the folder."""
    for name in "12":
        (folder / name).write_text("")
    try:
        return filesystem.exchange(folder / "1", folder / "2")
    finally:
        for name in "12":
            (folder / name).unlink()


@posix
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_no_file(number: int, status: int, out: Path) -> None:
    code = """
try:
    with Output(out, is_own=own).staged() as new:
        fill(new, "new")
        print(flush=True)
        time.sleep(60)
except signals.Interrupted as interruption:
    sys.exit(interruption.status)
"""
    with running(code, out) as child:
        next_line(child)
        assert len(names(out.parent)) == 1
        child.send_signal(number)
        assert finished(child) == (status, "")
    assert names(out.parent) == []


def test_a_process_that_ends_inside_the_block_leaves_no_file(out: Path) -> None:
    """An interrupt may come when Python is about to enter or leave the block's clean-up."""
    code = """
staging = Output(out, is_own=own).staged()
fill(staging.__enter__(), "new")
sys.exit(7)
"""
    with running(code, out) as child:
        assert finished(child) == (7, "")
    assert names(out.parent) == []


# Other writers ------------------------------------------------------------------------------------

ONE_OF_MANY = """
print(flush=True)
input()
try:
    for _ in range(int(sys.argv[3])):
        with Output(out, force=sys.argv[2] == "force", is_own=own).staged() as new:
            fill(new, str(os.getpid()))
except errors.UsageError:
    sys.exit(2)
"""


def run_together(out: Path, *arguments: object) -> list[int]:
    with ExitStack() as stack:
        children = [stack.enter_context(running(ONE_OF_MANY, out, *arguments)) for _ in range(4)]
        for child in children:
            next_line(child)
        for child in children:
            send_line(child)
        while any(child.poll() is None for child in children):
            assert names_while_exchanged(out) in (None, ["a", "b"])
        return [finished(child)[0] for child in children]


def names_while_exchanged(out: Path) -> list[str] | None:
    """Return the names in an output that other runs may replace and then empty at any time."""
    while True:
        try:
            before = out.stat()
            found = names(out)
            if os.path.samestat(out.stat(), before):
                return found
        except FileNotFoundError:
            return None


@posix
def test_exactly_one_of_many_runs_without_force_succeeds(out: Path) -> None:
    assert sorted(run_together(out, "no force", 1)) == [0, 2, 2, 2]
    content = content_of(out)
    assert isinstance(content, dict)
    assert len(set(content.values())) == 1


@posix
def test_many_runs_with_force_all_succeed_and_the_output_is_of_one_run(out: Path) -> None:
    assert run_together(out, "force", 10) == [0, 0, 0, 0]
    content = content_of(out)
    assert isinstance(content, dict)
    assert set(content) == {"a", "b/c"}
    assert len(set(content.values())) == 1


def test_a_run_does_not_remove_the_files_of_a_live_run(out: Path) -> None:
    code = """
with Output(out, force=True, is_own=own).staged() as new:
    fill(new, "theirs")
    print(flush=True)
    input()
"""
    with running(code, out) as child:
        next_line(child)
        write(out)
        sweep_containers(out)
        assert len(names(out.parent)) == 2
        assert content_of(out) == NEW
        send_line(child)
        assert finished(child) == (0, "")
    assert content_of(out) == {"a": "theirs", "b/c": "theirs"}


def test_free_space_is_read_from_the_nearest_existing_folder(tmp_path: Path) -> None:
    assert Output(tmp_path / "a" / "b" / "out", is_own=own).free_space > 0
    assert names(tmp_path) == []


@pytest.mark.parametrize("exists", [True, False])
def test_an_update_replaces_files_of_the_same_names_only(tmp_path: Path, *, exists: bool) -> None:
    out = tmp_path / "out"
    before = {"kept": "1", "replaced": "2"} if exists else {}
    for name, text in before.items():
        out.mkdir(exist_ok=True)
        (out / name).write_text(text)
    with updated_folder(out) as staging:
        (staging / "replaced").write_text("3")
        (staging / "added").write_text("4")
    found = {path.name: path.read_text() for path in out.iterdir()}
    assert found == before | {"replaced": "3", "added": "4"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_update_that_fails_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").write_text("1")
    with suppress(ZeroDivisionError), updated_folder(out) as staging:
        (staging / "kept").write_text("2")
        raise ZeroDivisionError
    assert (out / "kept").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
