"""Child processes for tests that kill a process or run several processes at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "vera_convert"

# `vera_convert/__init__.py` loads much. A stand-in for the package starts in a tenth of a second.
PRELUDE = f"""
import os, signal, sys, time, types
package = types.ModuleType("vera_convert")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["vera_convert"] = package
from pathlib import Path
from vera_convert import errors
from vera_convert.publish import staging
from vera_convert.publish import filesystem
from vera_convert.publish import signals
from vera_convert.publish import publishing as publish
from vera_convert.publish.publishing import Output

out = Path(sys.argv[1])

def own(path):
    return True

def fill(folder, text):
    # Every file says the same, so a mixture of two outputs would show.
    for name in ("a", "b/c"):
        if not (folder / name).parent.is_dir():
            (folder / name).parent.mkdir()
        (folder / name).write_text(text)
"""


@contextmanager
def running(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run `code` after `PRELUDE` in a fresh Python; kill a process that still runs at the end.

    The code may read and write the standard streams.
    """
    child = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            yield child
        finally:
            child.kill()


def next_line(child: subprocess.Popen[str]) -> str:
    """Wait for the child's next line, and return the line."""
    assert child.stdout is not None
    return child.stdout.readline().rstrip("\n")


def finished(child: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait until the child ends, and return the exit status and stderr."""
    _, complaint = child.communicate(timeout=60)
    return child.returncode, complaint


def send_line(child: subprocess.Popen[str]) -> None:
    """Send a line to a child that waits for a line."""
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()
