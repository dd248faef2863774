"""The commands on the pages of docs/ give the output that the pages show."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from commandline import Run

ROOT = Path(__file__).parent.parent
OF_THE_MACHINE = re.compile(r"^(time|rounding error) .*\n( .*\n)*", re.MULTILINE)
"""Lines that depend on the clock, or on the order in which a BLAS adds."""


def sessions(page: str) -> list[tuple[str, str]]:
    """Return the commands of a page, each with the output below the command."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [
        (command, output)
        for block in blocks
        for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    ]


def words(output: str) -> list[str]:
    """Return the words of an output, which does not depend on the width of the window."""
    return OF_THE_MACHINE.sub("", output).split()


@pytest.fixture
def demo(minilm: Path, minilm_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with the inputs of the pages."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(minilm / "save_projection_true", "ADAPTER")
    shutil.copytree(minilm_model, "MODEL")
    shutil.copy(ROOT / "tests" / "data" / "configs" / "llama-7b.json", "config.json")


@pytest.mark.usefixtures("demo")
@pytest.mark.parametrize(
    ("page", "commands"), [("inspect.md", 2), ("convert.md", 2), ("merge.md", 1)]
)
def test_a_page_shows_the_output_of_its_commands(page: str, commands: int, run: Run) -> None:
    shown = sessions(page)
    assert len(shown) == commands
    for command, output in shown:
        name, *arguments = shlex.split(command)
        assert name == "vera-convert"
        ended = run(*arguments)
        assert ended.status == 0, ended.err
        assert words(output) == words(ended.out)
