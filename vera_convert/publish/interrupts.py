"""SIGINT, SIGTERM and SIGHUP as one exception that comes once, and not where it would do harm."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """A signal came. If it was SIGINT, this is a `KeyboardInterrupt` too.

    Attributes:
        number: the signal's number.
        status: what the command exits with: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number
        self.status = 128 + number


class _KeyboardInterrupted(Interrupted, KeyboardInterrupt):
    pass


class _Delivery:
    """Whether `signals_raise` is in force, how often signals are held back, and one that waits."""

    active = False
    held = 0
    waiting: int | None = None


@contextmanager
def signals_raise() -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP inside into `Interrupted`; drop those after it.

    So clean-up is never interrupted itself. Signals that someone else handles or ignores (nohup)
    are left to them. Nested, or outside the main thread, this does nothing.
    """
    if not _in_main_thread() or _Delivery.active:
        yield
        return
    before = {number: signal.getsignal(number) for number in _ours()}
    _Delivery.active = True
    try:
        for number in before:
            signal.signal(number, _on_signal)
        yield
    finally:
        _Delivery.held += 1
        for number, handler in before.items():
            signal.signal(number, handler)
        _Delivery.active, _Delivery.held, _Delivery.waiting = False, 0, None


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold the signals of `signals_raise` back; one that came is raised at the end.

    Unless `drop_signal` was called: then what it would have stopped was finished.
    """
    if not _in_main_thread():
        yield
        return
    _Delivery.held += 1
    try:
        yield
    finally:
        _Delivery.held -= 1
        if _Delivery.waiting is not None and not _Delivery.held:
            number, _Delivery.waiting = _Delivery.waiting, None
            _on_signal(number, None)


def drop_signal() -> None:
    """Forget a signal that was held back."""
    if _in_main_thread():
        _Delivery.waiting = None


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _ours() -> list[int]:
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # the last two are not known everywhere
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    free = (signal.SIG_DFL, signal.default_int_handler)
    return [number for number in numbers if signal.getsignal(number) in free]


def _on_signal(number: int, _frame: FrameType | None) -> None:
    if _Delivery.held:
        _Delivery.waiting = _Delivery.waiting or number
    else:
        _Delivery.held = 1  # until `signals_raise` ends
        kind = _KeyboardInterrupted if number == signal.SIGINT else Interrupted
        raise kind(number)
