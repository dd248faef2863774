"""A signal at any moment of the program's life: the right status, a true sentence, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from adapters import good_adapter
from folders import everything
from merges import filled_base

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals")

# Runs the program and raises a signal when so many functions have been called or have returned.
PROGRAM = """
import signal, sys
number, moment, seen = int(sys.argv.pop(1)), int(sys.argv.pop(1)), 0

def count(frame, event, arg):
    global seen
    seen += 1
    if seen == moment:
        signal.raise_signal(number)

from vera_convert.__main__ import main
sys.setprofile(count)
try:
    main()
finally:
    sys.setprofile(None)
    if not moment:
        print(seen, file=sys.stderr)
"""
INTERRUPTED = "error: interrupted; no output is left.\n"


def ended(
    number: int, moment: int, arguments: Sequence[object]
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, number, moment, *arguments]
    return subprocess.run(
        [str(each) for each in command], capture_output=True, text=True, check=False, timeout=120
    )


def moments(last: int) -> list[int]:
    """Return moments all over a life, and more towards the end, where OUT is published."""
    return sorted({*(last * part // 12 for part in range(1, 12)), *(last - 4**n for n in range(7))})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["strip", "merge"])
def test_a_signal_at_any_moment_leaves_all_or_nothing_and_says_which(
    command: str, number: int, tmp_path: Path
) -> None:
    adapter, base = good_adapter(tmp_path / "adapter"), filled_base(tmp_path / "base")
    inputs = [adapter, "--base", base]
    whole = ended(number, 0, [command, *inputs, tmp_path / "whole"])
    assert whole.returncode == 0, whole.stderr
    kinds = set()
    for moment in moments(int(whole.stderr.split()[-1])):
        out = tmp_path / f"out{moment}"
        run = ended(number, moment, [command, *inputs, out])
        assert "Traceback" not in run.stderr
        assert run.returncode in (0, 128 + number), run.stderr
        assert out.exists() == (run.returncode == 0)
        assert (run.stderr == INTERRUPTED) == (run.returncode != 0)
        if out.exists():
            assert everything(out).keys() == everything(tmp_path / "whole").keys()
        kinds.add(run.returncode)
    assert kinds == {0, 128 + number}
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert not left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_without_an_out_ends_alike(number: int, tmp_path: Path) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    last = int(ended(number, 0, ["info", adapter]).stderr.split()[-1])
    for moment in moments(last)[1::4]:
        run = ended(number, moment, ["info", adapter])
        assert run.returncode in (0, 128 + number)
        assert run.stderr in ("", "error: interrupted.\n", INTERRUPTED)


def test_a_signal_while_python_ends_does_not_undo_success(tmp_path: Path) -> None:
    code = """
import atexit, signal, sys
from vera_convert.__main__ import main
class Last:
    def __del__(self, kill=signal.raise_signal, number=signal.SIGTERM):
        kill(number)
keep = Last()
atexit.register(signal.raise_signal, signal.SIGINT)
main()
"""
    adapter = good_adapter(tmp_path / "adapter")
    run = subprocess.run(
        [sys.executable, "-c", code, "strip", adapter, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out").is_dir()
