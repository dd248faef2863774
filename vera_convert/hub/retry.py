"""Repeat failing requests, and stop slow ones: every request to the Hub ends in bounded time.

A temporary failure is tried up to five times, with at most a minute of pauses in total. A server
that answers too slowly is given up at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from vera_convert.hub.refusals import TooSlowError, TryAgainError, gave_up

Result = TypeVar("Result")

PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further try, unless the server asks for a longer pause."""
LONGEST_PAUSE = 30.0
"""The most seconds before a further try, even if the server asks for a longer pause."""
LONGEST_WAIT = 60.0
"""The most seconds of all pauses of one request."""

WINDOW = 60.0
"""The seconds in which a request must end, or transfer `LEAST` bytes more."""
LEAST = 256 << 10
"""The fewest bytes in each window: about 4 KiB per second."""


def until_answered(attempt: Callable[[], Result], *, what: str) -> Result:
    """Return the result of `attempt`, repeated while `attempt` raises `TryAgainError`.

    Args:
        attempt: the function to try.
        what: the repo or file in messages.

    Raises:
        OutOfReachError: every try has failed.
    """
    waited = 0.0
    for tries, least in enumerate((*PAUSES, None), start=1):
        try:
            return attempt()
        except TryAgainError as error:
            if least is None or waited >= LONGEST_WAIT:
                raise gave_up(what, tries, error) from error
            pause = min(max(least, error.after), LONGEST_PAUSE, LONGEST_WAIT - waited)
        waited += pause
        time.sleep(pause)
    raise AssertionError  # the last try returns or raises


def at_least_slowly(
    work: Callable[[], Result], transferred: Callable[[], int], *, what: str
) -> Result:
    """Return the result of `work`, run in a separate thread; stop waiting for a slow server.

    A signal ends the wait at once, even if the thread goes on. The program can end while the thread
    runs.

    Args:
        work: sends one or more requests.
        transferred: returns the number of bytes so far; any thread may call it.
        what: the repo or file in messages.

    Raises:
        TooSlowError: fewer than `LEAST` bytes were transferred in `WINDOW` seconds.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 -- raised again where the result is taken
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    before = transferred()
    while wait([future], timeout=WINDOW).not_done:
        now = transferred()
        if now - before < LEAST:
            raise TooSlowError(
                f"{what} could not be read from the Hub: the server sent less than {LEAST:,} bytes "
                f"in {WINDOW:.0f} seconds. Check the connection, or try again later."
            )
        before = now
    return future.result()
