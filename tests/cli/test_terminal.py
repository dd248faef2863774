"""Help, completion, colors and widths on a terminal."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from adapters import good_adapter
from commandline import COMMANDS, Run

from vera_convert.cli.app import program
from vera_convert.cli.options import TITLES, CommonOptions
from vera_convert.cli.output import fitted, progress_bar
from vera_convert.cli.values import name_of

WITH_OPTIONS = [name for name in COMMANDS if name != "completion"]


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_fits_the_window_and_cuts_no_text(
    command: str | None, columns: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    ended = run(*([command] if command else []), "--help")
    assert ended.status == 0
    assert "..." not in re.sub(r"\[ARGS\]\.\.\.|ADAPTER\.\.\.|A,B,\.\.\.", "", ended.out)
    text = ended.out.partition("Examples:")[0]
    assert max(map(len, text.splitlines())) <= columns
    assert ("org/name[" in text) == ("org/name[@revision][/subfolder]" in text)


def test_each_command_has_one_line_in_the_help(run: Run) -> None:
    lines = run("--help").out.splitlines()
    for name, command in COMMANDS.items():
        (line,) = (line for line in lines if line.startswith(f"  {name} "))
        assert line.split(None, 1)[1] == command.short_help


@pytest.mark.parametrize("command", WITH_OPTIONS)
def test_help_groups_options_and_ends_with_examples_and_exit_statuses(
    command: str, run: Run
) -> None:
    text = run(command, "--help").out
    headings = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert [each for each in headings if each in TITLES] == sorted(
        (each for each in TITLES if each in headings), key=TITLES.index
    )
    assert {"Input options", "Hub options", "Display options"} - {*headings} <= {"Input options"}
    assert headings[-2:] == ["Examples", "Exit status"]
    assert len(headings) == len({*headings})
    assert re.findall(r"^  (\d[\d, ]*?)  +\S", text.partition("Exit status:")[2], re.MULTILINE) == [
        *("0", "1", "2", "3", "130, 143")
    ]


@pytest.mark.parametrize("command", WITH_OPTIONS)
def test_the_examples_of_a_help_can_be_parsed(command: str) -> None:
    for example in COMMANDS[command].examples:  # type: ignore[attr-defined]
        words = example.split()
        assert words[:2] == ["vera-convert", command]
        with click.Context(program) as above:
            COMMANDS[command].make_context(command, words[2:], parent=above)


@pytest.mark.parametrize("command", WITH_OPTIONS)
def test_every_option_explains_itself(command: str) -> None:
    for parameter in COMMANDS[command].params:
        assert getattr(parameter, "help", "").endswith((".", "?"))


# --- short options and mistyped words ------------------------------------------------------------


def test_the_usual_short_options_are_known(run: Run, tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    assert run("-V").out == run("--version").out
    assert run("info", adapter, "-q").out == ""
    told = run("info", adapter, "-v")
    assert f"reading {adapter / 'adapter_config.json'}" in told.err
    assert "reading" not in run("info", adapter).err
    written = run("migrate", adapter, tmp_path / "out", "--to", "asis", "--verbose")
    assert f"wrote {tmp_path / 'out'}\n" in written.err
    assert f"reading {tmp_path / 'out' / 'adapter_config.json'} " in written.err
    assert ".vera-convert-" not in written.err


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["inof", "x"], "info"),
        (["info", "x", "--bsae", "y"], "--base"),
        (["merge", "x", "y", "--bse", "z"], "--base"),
        (["embed", "x", "y", "--generator", "float32-fusd"], "float32-fused"),
        (["migrate", "x", "y", "--to", "striped"], "stripped"),
        (["validate", "x", "--format", "serif"], "sarif"),
        (["completion", "bsh"], "bash"),
        (["count", "--rank", "4", "--revision", "main"], "--base-revision"),
    ],
)
def test_the_nearest_name_is_proposed(words: list[str], near: str, run: Run) -> None:
    ended = run(*words)
    assert ended.status == 2
    assert re.search(rf"[Dd]id you mean '?{near}'?\?", ended.err), ended.err


def test_no_name_is_proposed_if_no_name_is_near(run: Run) -> None:
    assert "mean" not in run("migrate", "x", "y", "--to", "zzz").err


@pytest.mark.parametrize("size", ["5GB", "5G", "0.5GB", "500mb", "1GiB"])
def test_sizes_can_have_units(size: str, run: Run) -> None:
    ended = run("merge", "./gone", "./out", "--max-shard-size", size)
    assert ended.status == 3


# --- empty values --------------------------------------------------------------------------------


def takers_of_text() -> list[tuple[str, str]]:
    """Return every argument and every option with a value, with the command."""
    return [
        (command, name_of(parameter))
        for command, made in COMMANDS.items()
        for parameter in made.params
        if not getattr(parameter, "is_flag", False)
    ]


@pytest.mark.parametrize(("command", "name"), takers_of_text())
def test_an_empty_value_is_refused_by_the_name_that_a_user_types(
    command: str, name: str, run: Run
) -> None:
    arguments = [each for each in COMMANDS[command].params if isinstance(each, click.Argument)]
    words = ["" if name_of(each) == name else "x" for each in arguments]
    words += [name, ""] if name.startswith("--") else []
    ended = run(command, *words)
    assert ended.status == 2
    assert ended.err == f"error: {name} is empty: give a value.\n"


@pytest.mark.parametrize(
    "words",
    [
        ["validate", "x", "--select", ","],
        ["validate", "x", "--ignore", " , "],
        ["validate", "--explain", ","],
        ["count", "--base", "x", "--rank", "4", "--target", ","],
        ["merge", "x", "y", "--labels", ","],
    ],
)
def test_a_list_without_a_name_is_empty(words: list[str], run: Run) -> None:
    assert run(*words)[1:] == ("", f"error: {words[-2]} is empty: give a value.\n")


# --- completion ----------------------------------------------------------------------------------


def completed(words: str, shell: str = "bash") -> str:
    environment = {
        **os.environ,
        "_VERA_CONVERT_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    return subprocess.run(
        [sys.executable, "-m", "vera_convert"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_commands_options_and_values_are_completed() -> None:
    assert "plain,merge" in completed("vera-convert m")
    assert "plain,--base-dtype" in completed("vera-convert info x --base-d")
    assert "plain,stripped" in completed("vera-convert migrate x y --to s")
    assert "file," in completed("vera-convert info ./ad")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script(shell: str, run: Run) -> None:
    ended = run("completion", shell)
    assert ended.status == 0
    assert "_VERA_CONVERT_COMPLETE" in ended.out
    assert shell in run("completion", "--help").out


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_script_of_bash_completes(tmp_path: Path) -> None:
    program = tmp_path / "vera-convert"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vera_convert "$@"\n')
    program.chmod(0o755)
    script = """
eval "$(vera-convert completion bash)"
COMP_WORDS=(vera-convert val); COMP_CWORD=1
_vera_convert_completion vera-convert val vera-convert
echo "${COMPREPLY[@]}"
"""
    ended = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.split() == ["validate"]


# --- color and width -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "is_terminal", "colored"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"NO_COLOR": "1"}, True, False),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": "0"}, False, False),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_color_is_used_on_terminals_and_on_request(
    environment: dict[str, str],
    is_terminal: bool,
    colored: bool,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    assert ("\x1b[" in run("--help").out) is colored
    assert ("\x1b[" in run("info", "./gone").err) is colored
    assert "\x1b[" not in run("validate", "./gone", "--format", "json").out


def test_a_result_is_wrapped_to_the_window_below_its_value(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    lines = run("info", adapter).out.splitlines()
    assert [line for line in lines if len(line) > 50 and "/" not in line] == []


def test_a_message_is_wrapped_to_the_window_and_is_one_line_elsewhere(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good_adapter(tmp_path / "adapter", peft_type="LORA")
    monkeypatch.chdir(tmp_path)  # a long path has a line of its own
    monkeypatch.setenv("COLUMNS", "50")
    piped = run("info", "adapter").err
    assert piped.count("\n") == 1
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    shown = run("info", "adapter").err
    assert shown.startswith("error: V101 ")
    assert [line for line in shown.splitlines() if len(line) > 50 and "`" not in line] == []
    assert " ".join(shown.split()) == piped.strip()


@pytest.mark.parametrize("words", [["info"], ["validate"], ["validate", "--explain", "V"]])
def test_text_is_wrapped_only_on_a_terminal(
    words: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words += [] if "--explain" in words else [str(good_adapter(tmp_path / "adapter", unknown=1))]
    piped = run(*words).out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    shown = run(*words).out
    assert piped.count("\n") < shown.count("\n")
    assert " ".join(piped.split()) == " ".join(shown.split())


def test_a_wrapped_line_continues_below_its_value() -> None:
    text = "label    one two three four five six\nshort    x\n         eight nine ten eleven twelve"
    assert fitted(text, 30).splitlines() == [
        "label    one two three four",
        "         five six",
        "short    x",
        "         eight nine ten eleven",
        "         twelve",
    ]
    assert fitted("a very long label    one two three", 24).splitlines() == [
        "a very long label    one",
        "    two three",
    ]
    assert fitted("a     trainable  bytes", 12) == "a     trainable  bytes"


def test_a_bar_shows_the_rate_and_the_time_that_remains(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress_bar(CommonOptions(progress=True, quiet=False), "merged") as report:
        for done in (0, 500, 900):
            report(done, 1000)
            time.sleep(0.15)
    assert re.search(r"merged: +90%.*<00:00, [\d.]+kB/s\]", capsys.readouterr().err)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with progress_bar(CommonOptions(progress=None, quiet=False), "merged") as report:
        report(1, 2)
    assert capsys.readouterr().err == ""


def test_a_bar_waits_until_work_is_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for delay, expected in ((60, ""), (0, "merged")):
        monkeypatch.setattr("vera_convert.cli.output.DELAY", delay)
        with progress_bar(CommonOptions(progress=None, quiet=False), "merged") as report:
            report(1, 2)
        assert capsys.readouterr().err.strip("\r").partition(":")[0] == expected


@pytest.mark.parametrize(
    ("words", "titles"),
    [
        (["strip", "embedded", "out"], {"regenerated", "written"}),
        (["embed", "stripped", "out"], {"regenerated", "written"}),
        (["migrate", "stripped", "out", "--to", "embedded"], {"regenerated", "written"}),
        (["regenerate", "out.safetensors", "--for", "stripped"], {"regenerated", "written"}),
        (["validate", "embedded"], {"regenerated"}),
    ],
)
def test_commands_that_regenerate_or_write_show_progress(
    words: list[str], titles: set[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vera_convert.draws.generator.BLOCK", 16)
    good_adapter(tmp_path / "embedded")
    assert run("strip", "embedded", "stripped").status == 0
    ended = run(*words, "--progress")
    assert {*re.findall(r"(\w+): +\d+%", ended.err)} == titles
