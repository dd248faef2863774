"""Report the progress of work on a large pair or file to a watcher.

The functions that draw A and B, write a file or hash a file count bytes here. A count costs nothing
while nobody watches. Imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Watch = Callable[[str], Callable[[int, int], None]]
"""Takes the title of a work that begins; returns a function of the bytes done and of all bytes."""

_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Tell the progress of all work of the block to a watch; work in other threads is not told."""
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)


def counter(title: str, total: int) -> Callable[[int], None]:
    """Begin a work of `total` bytes; return a function to call with the size of each part done."""
    watch = _WATCH.get()
    if watch is None:
        return lambda _size: None
    tell, done = watch(title), 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        tell(done, total)

    return count
