"""A signal at any moment of the program gives the right status, a true message, and no
traceback.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

import pytest
from adapters import good_adapter
from folders import bytes_by_name
from merges import filled_base

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals")

LIFE = """
import os, signal, sys
from vera_convert.__main__ import main

def life(number, moment):
    # Runs the program, and raises a signal when so many functions were called or have returned.
    # A shell may start the tests with signals ignored, and the program would then ignore them, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    seen = 0
    def count(frame, event, arg):
        nonlocal seen
        seen += 1
        if seen == moment:
            signal.raise_signal(number)
    sys.setprofile(count)
    try:
        main()
    finally:
        sys.setprofile(None)
        if not moment:
            print(seen, file=sys.stderr)
"""
FRESH = f"""{LIFE}
life(int(sys.argv.pop(1)), int(sys.argv.pop(1)))
"""
# Fork a process for each line of stdin; most time of a fresh process goes into imports.
FORKED = f"""{LIFE}
import importlib, json
from pathlib import Path
import vera_convert
package = Path(vera_convert.__path__[0])
for path in package.rglob("*.py"):
    parts = path.relative_to(package.parent).with_suffix("").parts
    if not {{"with_torch", "__main__", "__init__"}} & {{*parts}}:
        importlib.import_module(".".join(parts))
for line in sys.stdin:
    number, moment, stderr, *sys.argv[1:] = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        life(number, moment)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
INTERRUPTED = "error: interrupted; no output is left.\n"

Run = Callable[[int, int, Sequence[object]], tuple[int, str]]
"""Run the program with a signal at a moment, and return the exit status and stderr."""


def fresh(number: int, moment: int, arguments: Sequence[object]) -> tuple[int, str]:
    command = [sys.executable, "-c", FRESH, number, moment, *arguments]
    run = subprocess.run(
        [str(each) for each in command], capture_output=True, text=True, check=False, timeout=120
    )
    return run.returncode, run.stderr


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    stderr = tmp_path_factory.mktemp("forked") / "stderr"
    parent = subprocess.Popen(
        [sys.executable, "-c", FORKED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # a process with threads should not fork
    )

    def run(number: int, moment: int, arguments: Sequence[object]) -> tuple[int, str]:
        assert parent.stdin is not None
        assert parent.stdout is not None
        line = [number, moment, str(stderr), *map(str, arguments)]
        parent.stdin.write(json.dumps(line) + "\n")
        parent.stdin.flush()
        return int(parent.stdout.readline()), stderr.read_text()

    with parent:
        yield run


def length(run: Run, arguments: Sequence[object]) -> int:
    """Return the number of moments in a run without a signal."""
    status, stderr = run(0, 0, arguments)
    assert status == 0, stderr
    return int(stderr.split()[-1])


@pytest.mark.parametrize(
    ("start", "command", "number"),
    [
        ("fresh", "strip", signal.SIGTERM),
        ("fresh", "merge", signal.SIGINT),
        *product(["forked"], ["strip", "merge"], [signal.SIGINT, signal.SIGTERM]),
    ],
)
def test_a_signal_at_any_moment_leaves_a_complete_output_or_none_and_reports_which(
    start: str, command: str, number: int, tmp_path: Path, forked: Run
) -> None:
    run, parts = (fresh, 5) if start == "fresh" else (forked, 16)
    adapter, base = good_adapter(tmp_path / "adapter"), filled_base(tmp_path / "base")
    inputs = [adapter, "--base", base]
    last = length(run, [command, *inputs, tmp_path / "whole"])
    # Spread the moments over the run; forked runs get more moments near the end, when OUT is
    # published.
    spread = {last * part // parts for part in range(1, parts)}
    ends = {last - 4**n for n in range(7)} if start == "forked" else {last - 4}
    statuses = set()
    for moment in sorted(spread | ends):
        out = tmp_path / f"out{moment}"
        status, stderr = run(number, moment, [command, *inputs, out])
        assert "Traceback" not in stderr
        assert status in (0, 128 + number), stderr
        assert out.exists() == (status == 0)
        assert (stderr == INTERRUPTED) == (status != 0)
        if out.exists():
            assert bytes_by_name(out).keys() == bytes_by_name(tmp_path / "whole").keys()
        statuses.add(status)
    assert statuses == {0, 128 + number}, (last, sorted(spread | ends))
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert not left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_command_without_out_gives_the_same_status(
    number: int, tmp_path: Path, forked: Run
) -> None:
    adapter = good_adapter(tmp_path / "adapter")
    last = length(forked, ["info", adapter])
    for moment in (*(last * part // 12 for part in range(1, 12)), last - 4, last - 1):
        status, stderr = forked(number, moment, ["info", adapter])
        assert status in (0, 128 + number)
        assert stderr in ("", "error: interrupted.\n", INTERRUPTED)


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
