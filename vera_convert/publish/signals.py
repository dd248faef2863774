"""SIGINT, SIGTERM and SIGHUP as one exception that comes once, and not where it would do harm.

A program's life has four parts. While the program starts (`exit_on_signals`), a signal ends the
process at once, because nothing is written yet. While a command runs (`signals_raise`), a signal
raises `Interrupted`, and clean-up follows; within `signals_held`, and during an import, the signal
waits. When OUT is there (`signals_done`), a signal changes nothing: the command has succeeded.
While Python ends (`ignore_signals`), a signal changes nothing either.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    """Where signals go.

    Attributes:
        active: `signals_raise` is in force.
        held: how many `signals_held` are in force.
        waiting: a signal that came while signals were held.
        raised: what a signal raised; later ones are dropped.
        done: the output is there; signals are dropped.
    """

    active = False
    held = 0
    waiting: int | None = None
    raised: Interrupted | None = None
    done = False


_IMPORT_TIME = 0.02
"""Seconds after which a signal that came during an import is tried again."""


def exit_on_signals() -> None:
    """End the process at once on SIGINT, SIGTERM or SIGHUP; for a program's first lines.

    `signals_raise` takes the signals over. After `signals_done`, or after a signal that raised,
    these signals do nothing: the program is about to end with the right status.
    """
    for number in _ours():
        signal.signal(number, _exit_at_once)


def ignore_signals() -> None:
    """Ignore SIGINT, SIGTERM and SIGHUP from here on, while Python ends; for a program's end.

    Python puts the system's handlers back when it ends, so only an ignored signal does no harm.
    """
    for number in _ours():
        signal.signal(number, signal.SIG_IGN)


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
    _Delivery.active, _Delivery.raised, _Delivery.done = True, None, False
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

    Unless `signals_done` was called: then the signal has nothing left to stop.
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


def signals_done() -> None:
    """Drop the signals that wait and all that follow in this `signals_raise`: the work is done."""
    if _in_main_thread():
        _Delivery.waiting, _Delivery.done = None, True


def interruption() -> Interrupted | None:
    """Return what a signal raised in this `signals_raise`, even if it was caught and hidden."""
    return _Delivery.raised


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _ours() -> list[int]:
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # the last two are not known everywhere
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    free = (signal.SIG_DFL, signal.default_int_handler, _exit_at_once)
    return [number for number in numbers if signal.getsignal(number) in free]


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _Delivery.done or _Delivery.raised is not None:
        return
    if _Delivery.held:
        _Delivery.waiting = _Delivery.waiting or number
    elif _is_importing(frame or sys._getframe()):  # noqa: SLF001
        _thread.start_new_thread(_try_again, (number,))  # `threading` may hold its lock here
    else:
        kind = _KeyboardInterrupted if number == signal.SIGINT else Interrupted
        _Delivery.raised = kind(number)
        raise _Delivery.raised


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported; some catch what is raised there, NumPy among them."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _try_again(number: int) -> None:
    time.sleep(_IMPORT_TIME)
    signal.raise_signal(number)


def _exit_at_once(number: int, _frame: FrameType | None) -> None:
    if _Delivery.done or _Delivery.raised is not None:
        return
    with suppress(OSError):
        os.write(2, b"error: interrupted; no output is left.\n")
    os._exit(128 + number)
