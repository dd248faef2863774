"""Limits of the time and memory that a command may take on a hostile file."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

LIMIT_SECONDS = 30
"""Far more than any case takes: the limit is there for those that would never end."""
MOST_MEMORY = 400 << 20
"""The limit of memory for reading a hostile file."""


class TooLongError(BaseException):
    """A command did not end in time; nothing in the package catches it."""


@contextmanager
def in_time() -> Iterator[None]:
    """Stop what does not end, where the system has an alarm."""
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
    """Return a field of this process in bytes, where the system tells; else 0."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text("ascii"), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) << 10 if found else 0


@contextmanager
def in_memory() -> Iterator[None]:
    """Demand that no more memory is taken than is reasonable, where the system tells."""
    try:
        _RESET.write_text("5")  # the peak is counted anew
    except OSError:
        yield
        return
    before = memory("VmRSS")
    yield
    assert memory("VmHWM") - before < MOST_MEMORY
