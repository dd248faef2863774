"""Turn SIGINT, SIGTERM and SIGHUP into one exception, raised once and at a harmless moment.

A program's life has four parts. While the program starts (`exit_on_signals`), a signal ends the
process at once, before any output. While a command runs (`signals_raise`), a signal
raises `Interrupted`, and clean-up follows; within `signals_held`, and during an import, the signal
waits. After OUT is published (`signals_done`) and while Python ends
(`ignore_signals`), a signal has no effect: the command has succeeded.
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
    """A signal arrived. For SIGINT, the error is also a `KeyboardInterrupt`.

    Attributes:
        number: the signal's number.
        status: the command's exit status: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number
        self.status = 128 + number


class _KeyboardInterrupted(Interrupted, KeyboardInterrupt):
    pass


class _Delivery:
    """The state of the handling of signals.

    Attributes:
        active: whether `signals_raise` is in force.
        held: how many `signals_held` are in force.
        waiting: a signal that arrived while signals were held.
        raised: the error of the first signal; later signals are dropped.
        done: whether the output is published; signals are then dropped.
    """

    active = False
    held = 0
    waiting: int | None = None
    raised: Interrupted | None = None
    done = False


_AGAIN = 0.02
"""Seconds after which a signal that arrived during an import or a destructor is raised again."""


def exit_on_signals() -> None:
    """End the process at once on SIGINT, SIGTERM or SIGHUP; for a program's first lines.

    `signals_raise` replaces the handlers. After `signals_done`, or after a raised signal, further
    signals are dropped: the program is about to end with the right status.
    """
    for number in _ours():
        signal.signal(number, _exit_at_once)


def ignore_signals() -> None:
    """Ignore SIGINT, SIGTERM and SIGHUP from now on, while Python ends; for a program's end.

    Python restores the system's handlers at the end, so only an ignored signal is harmless.
    """
    for number in _ours():
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP inside the block into `Interrupted`.

    Later signals are dropped, so the clean-up is safe. Signals with a handler of other code, and
    ignored signals (nohup), keep the handler. A nested call, or a call outside the main thread, has
    no effect.
    """
    if not _in_main_thread() or _Delivery.active:
        yield
        return
    before = {number: signal.getsignal(number) for number in _ours()}
    hook = sys.unraisablehook

    def unraisable(found: sys.UnraisableHookArgs) -> None:
        """Raise a signal again whose error Python dropped, because a destructor was running."""
        if isinstance(found.exc_value, Interrupted):
            _Delivery.raised = None
            _thread.start_new_thread(_try_again, (found.exc_value.number,))
        else:
            hook(found)

    _Delivery.active, _Delivery.raised, _Delivery.done = True, None, False
    try:
        for number in before:
            signal.signal(number, _on_signal)
        sys.unraisablehook = unraisable
        yield
    finally:
        _Delivery.held += 1
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
        _Delivery.active, _Delivery.held, _Delivery.waiting = False, 0, None


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold the signals of `signals_raise` back, and raise a waiting signal at the end.

    After `signals_done`, a waiting signal is dropped, because the work is done.
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
    """Drop the waiting and all later signals of the present `signals_raise`: the work is done."""
    if _in_main_thread():
        _Delivery.waiting, _Delivery.done = None, True


def interruption() -> Interrupted | None:
    """Return the error that a signal raised in the present `signals_raise`, even if caught."""
    return _Delivery.raised


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _ours() -> list[int]:
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # some systems lack the last two
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    free = (signal.SIG_DFL, signal.default_int_handler, _exit_at_once)
    return [number for number in numbers if signal.getsignal(number) in free]


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _Delivery.done or _Delivery.raised is not None:
        return
    if _Delivery.held:
        _Delivery.waiting = _Delivery.waiting or number
    elif _is_importing(frame or sys._getframe()):  # noqa: SLF001
        _thread.start_new_thread(_try_again, (number,))  # `threading` may hold a lock here
    else:
        kind = _KeyboardInterrupted if number == signal.SIGINT else Interrupted
        _Delivery.raised = kind(number)
        raise _Delivery.raised


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether a module is being imported; NumPy and others catch errors of an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _try_again(number: int) -> None:
    time.sleep(_AGAIN)
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, number)  # also wakes a system call of the main thread
    else:
        signal.raise_signal(number)


def _exit_at_once(number: int, _frame: FrameType | None) -> None:
    if _Delivery.done or _Delivery.raised is not None:
        return
    with suppress(OSError):
        os.write(2, b"error: interrupted; no output is left.\n")
    os._exit(128 + number)
