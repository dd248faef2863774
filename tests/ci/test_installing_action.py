"""The GitHub action installs vera-convert from the action's checkout, with this machine's
Python.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from ci.samples import BAD, adapters
from runner import Runner


@pytest.fixture
def runner(tree: Path, tmp_path: Path) -> Runner:
    return Runner(tmp_path / "a runner", tree, {})


def test_the_action_installs_its_checkout_and_validates(runner: Runner) -> None:
    adapters(runner.workspace)
    for name in ("venv", "pip", "click", "vera_convert"):
        (runner.workspace / f"{name}.py").write_text("open('MARK', 'w').close()")
    ran = runner.run(adapters="bad\ngood", recursive="true", python=sys.executable)
    assert (ran.status, ran.outputs) == (1, {"status": "1"}), ran.log
    assert re.search(rf"^::error .*{BAD}", ran.log, re.MULTILINE)
    ran = runner.run(adapters="good/adapter one", python=sys.executable)
    assert (ran.status, ran.outputs) == (0, {"status": "0"}), ran.log
    assert [*runner.home.rglob("MARK")] == []


def test_the_action_stops_after_a_failed_installation(runner: Runner) -> None:
    """An impossible version, which no index can hold, makes the installation fail."""
    adapters(runner.workspace)
    ran = runner.run(adapters="good/adapter one", python=sys.executable, version="0.dev0+none")
    assert ran.status != 0
    assert ran.outputs == {"status": ""}
    assert "::error" not in ran.log
