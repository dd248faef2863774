"""Limit the time and memory of a command on a hostile file."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

LIMIT_SECONDS = 30
"""Far more seconds than any case takes; the limit ends cases that would run forever."""
MOST_MEMORY = 400 << 20
"""The most bytes that a command may allocate while reading a hostile file."""


class TooLongError(BaseException):
    """A command did not end in time; no code in the package catches this exception."""


@contextmanager
def in_time() -> Iterator[None]:
    """Stop the code in the context after `LIMIT_SECONDS`, on systems with an alarm."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory(field: str) -> int:
    """Return a field of this process's status in bytes; 0 on systems without /proc."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text("ascii"), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) << 10 if found else 0


@contextmanager
def in_memory() -> Iterator[None]:
    """Check that the code in the context allocates less than `MOST_MEMORY`, where /proc exists."""
    try:
        _RESET.write_text("5")  # the kernel starts to measure the peak again
    except OSError:
        yield
        return
    before = memory("VmRSS")
    yield
    assert memory("VmHWM") - before < MOST_MEMORY
