"""Repeat failing requests: up to five tries, with at most a minute of pauses in total.

Every request to the Hub uses this module, so every request survives the same faults.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

from vera_convert.hub.refusals import TryAgainError, gave_up

Result = TypeVar("Result")

PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further try, unless the server asks for a longer pause."""
LONGEST_PAUSE = 30.0
"""The most seconds before a further try, even if the server asks for a longer pause."""
LONGEST_WAIT = 60.0
"""The most seconds of all pauses of one request."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's answer to a request for some bytes.

    Attributes:
        status: 200 (the complete file), 206 (a part) or 416 (no such part).
        headers: the headers of the last server, with names in lower case.
        identity: the commit and the entity tag, which must be the same in all answers.
        blocks: the body in blocks; a block is transferred when the caller takes the block.
    """

    status: int
    headers: Mapping[str, str]
    identity: tuple[str | None, str | None]
    blocks: Iterator[bytes]


Ask = Callable[[int, int], AbstractContextManager[Answer]]
"""Request the bytes from the first to the last, both included.

Raises `TryAgainError` for a temporary failure and `SurroundingsError` for a lasting failure, also
while the body is read.
"""


class Patience:
    """Counts the tries of one request, and waits before the next try."""

    def __init__(self, what: str) -> None:
        """Start to count the tries; `what` is the repo or file, for messages."""
        self._what = what
        self._tries = 0
        self._waited = 0.0

    def wait(self, error: TryAgainError) -> None:
        """Wait before the next try.

        Raises:
            OutOfReachError: no further try is allowed.
        """
        self._tries += 1
        if self._tries > len(PAUSES) or self._waited >= LONGEST_WAIT:
            raise gave_up(self._what, self._tries, error) from error
        pause = max(PAUSES[self._tries - 1], error.after)
        pause = min(pause, LONGEST_PAUSE, LONGEST_WAIT - self._waited)
        self._waited += pause
        time.sleep(pause)

    def renew(self) -> None:
        """Restart the count, because much was transferred since the last failure."""
        self._tries, self._waited = 0, 0.0


def until_answered(attempt: Callable[[], Result], *, what: str) -> Result:
    """Return the result of `attempt`, repeated while it raises `TryAgainError`.

    Args:
        attempt: the function to try.
        what: the repo or file, for messages.

    Raises:
        OutOfReachError: every try has failed.
    """
    patience = Patience(what)
    while True:
        try:
            return attempt()
        except TryAgainError as error:
            patience.wait(error)
