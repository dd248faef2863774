"""The GitHub action with its installation: from its checkout, by the Python of this machine."""

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


def test_it_installs_its_checkout_and_validates(runner: Runner) -> None:
    adapters(runner.workspace)
    for name in ("venv", "pip", "click", "vera_convert"):
        (runner.workspace / f"{name}.py").write_text("open('MARK', 'w').close()")
    ran = runner.run(adapters="bad\ngood", recursive="true", python=sys.executable)
    assert (ran.status, ran.outputs) == (1, {"status": "1"}), ran.log
    assert re.search(rf"^::error .*{BAD}", ran.log, re.MULTILINE)
    ran = runner.run(adapters="good/adapter one", python=sys.executable)
    assert (ran.status, ran.outputs) == (0, {"status": "0"}), ran.log
    assert [*runner.home.rglob("MARK")] == []


def test_it_does_not_go_on_after_an_installation_that_failed(runner: Runner) -> None:
    """A version that no index can hold."""
    adapters(runner.workspace)
    ran = runner.run(adapters="good/adapter one", python=sys.executable, version="0.dev0+none")
    assert ran.status != 0
    assert ran.outputs == {"status": ""}
    assert "::error" not in ran.log
