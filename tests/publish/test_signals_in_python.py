"""A signal raises exactly one exception, and waits during clean-up and imports."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from vera_convert.publish.signals import Interrupted, signals_done, signals_held, signals_raise

NUMBERS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):
    NUMBERS.append(signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    before = [signal.getsignal(number) for number in NUMBERS]
    yield
    assert [signal.getsignal(number) for number in NUMBERS] == before


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_raises_an_error_with_the_status_of_a_shell(number: signal.Signals) -> None:
    with pytest.raises(Interrupted, match=number.name) as caught, signals_raise():
        signal.raise_signal(number)
    assert caught.value.status == 128 + number
    assert isinstance(caught.value, KeyboardInterrupt) == (number == signal.SIGINT)


def test_a_second_signal_does_not_interrupt_the_clean_up() -> None:
    cleaned = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGINT)
            with signals_held():
                signal.raise_signal(signal.SIGTERM)
            cleaned.append(1)

    with pytest.raises(Interrupted, match="SIGTERM"), signals_raise():
        work()
    assert cleaned


def test_a_held_signal_is_raised_at_the_end_of_the_outermost_block() -> None:
    reached = []

    def work() -> None:
        with signals_held():
            with signals_held():
                signal.raise_signal(signal.SIGTERM)
            reached.append("inner")
        reached.append("outer")

    with pytest.raises(Interrupted, match="SIGTERM"), signals_raise():
        work()
    assert reached == ["inner"]


def test_after_the_work_is_done_no_held_or_later_signal_is_raised() -> None:
    with signals_raise():
        with signals_held():
            signal.raise_signal(signal.SIGTERM)
            signals_done()
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(Interrupted, match="SIGTERM"), signals_raise():
        signal.raise_signal(signal.SIGTERM)  # the next work has not ended


def test_a_signal_during_an_import_is_raised_after_the_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "module_that_hides_what_is_raised_in_it"
    (tmp_path / f"{name}.py").write_text(
        "import signal\n"
        "try:\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "except BaseException:\n"
        "    raise ImportError from None\n"
        "whole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    modules = []

    def work() -> None:
        modules.append(import_module(name))
        time.sleep(60)

    with pytest.raises(Interrupted, match="SIGTERM"), signals_raise():
        work()
    assert modules[0].whole


def test_a_nested_block_does_not_end_the_outer_block() -> None:
    def work() -> None:
        with signals_raise():
            pass
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted), signals_raise():
        work()


def test_a_second_block_raises_a_signal_again() -> None:
    for _ in range(2):
        with pytest.raises(Interrupted), signals_raise():
            signal.raise_signal(signal.SIGTERM)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with signals_raise():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_leave_signals_alone() -> None:
    seen = []

    def work() -> None:
        with signals_raise(), signals_held():
            signals_done()
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_inside_a_destructor_is_not_lost(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    class Last:
        def __del__(self) -> None:
            signal.raise_signal(number)

    def work() -> None:
        Last()
        end = time.monotonic() + 10
        while time.monotonic() < end:
            pass

    with pytest.raises(Interrupted), signals_raise():
        work()
    assert capsys.readouterr().err == ""
