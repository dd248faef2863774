"""A request to a server: its answer, and how often a failing request is repeated.

Every request to the Hub takes this way, so all of them survive the same faults within the same
bounds: up to five tries, and no more than a minute of waiting in all.
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
"""Seconds to wait before each further try, if the server does not ask for more."""
LONGEST_PAUSE = 30.0
"""The most seconds to wait before a further try, however long the server asks to wait."""
LONGEST_WAIT = 60.0
"""The most seconds to wait in all, between the tries of one request."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered to the request for some bytes.

    Attributes:
        status: 200 (the whole file), 206 (a part of it) or 416 (it has no such part).
        headers: of the last server that was asked, names in lower case.
        identity: what must not change between answers: the commit and the entity tag.
        blocks: the body, piece by piece; nothing is transferred that is not asked for.
    """

    status: int
    headers: Mapping[str, str]
    identity: tuple[str | None, str | None]
    blocks: Iterator[bytes]


Ask = Callable[[int, int], AbstractContextManager[Answer]]
"""Ask for the bytes from the first to the last, both included.

Raises `TryAgainError` for what passes and `SurroundingsError` for what does not, in the body too.
"""


class Patience:
    """Decides whether one request is tried again, and waits before the next try."""

    def __init__(self, what: str) -> None:
        """Begin to count; `what` is how messages call the repo or file."""
        self._what = what
        self._tries = 0
        self._waited = 0.0

    def wait(self, error: TryAgainError) -> None:
        """Wait before the next try.

        Raises:
            OutOfReachError: there were enough tries.
        """
        self._tries += 1
        if self._tries > len(PAUSES) or self._waited >= LONGEST_WAIT:
            raise gave_up(self._what, self._tries, error) from error
        pause = max(PAUSES[self._tries - 1], error.after)
        pause = min(pause, LONGEST_PAUSE, LONGEST_WAIT - self._waited)
        self._waited += pause
        time.sleep(pause)

    def renew(self) -> None:
        """Begin to count anew, because much was transferred since the last failure."""
        self._tries, self._waited = 0, 0.0


def until_answered(attempt: Callable[[], Result], *, what: str) -> Result:
    """Return the result of `attempt`, repeated while it raises `TryAgainError`.

    Args:
        attempt: what is tried.
        what: how messages call the repo or file.

    Raises:
        OutOfReachError: every try has failed.
    """
    patience = Patience(what)
    while True:
        try:
            return attempt()
        except TryAgainError as error:
            patience.wait(error)
