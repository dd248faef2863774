"""Threads take jobs in order, fail alike for every number of threads, and all end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from vera_convert.assembly.pool import WorkerPool, default_jobs
from vera_convert.publish.signals import Interrupted, signals_raise

SIZES = [1, 2, 5]


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("size", SIZES)
def test_every_job_is_done_once(size: int) -> None:
    done: list[int] = []
    with WorkerPool(size, lambda: done.append) as pool:
        pool.run(range(100))
    assert sorted(done) == [*range(100)]


def test_a_single_thread_does_jobs_in_order() -> None:
    done: list[int] = []
    with WorkerPool(1, lambda: done.append) as pool:
        pool.run(range(10))
        pool.run(range(10, 20))
    assert done == [*range(20)]


@pytest.mark.parametrize("size", SIZES)
def test_the_error_of_the_first_failing_job_is_raised(size: int) -> None:
    begun: list[int] = []

    def work(job: int) -> None:
        begun.append(job)
        time.sleep(0.001 * (40 - job))  # earlier jobs take longer, so later jobs fail first
        if job % 10 == 7:
            raise ValueError(job)

    with pytest.raises(ValueError, match=r"^7$"), WorkerPool(size, lambda: work) as pool:
        pool.run(range(40))
    assert sorted(begun) == [*range(len(begun))], "nothing before a failure is left out"
    assert len(begun) < 40, "a failure ends the rest"


@pytest.mark.parametrize("size", SIZES)
def test_an_iterator_of_jobs_that_fails_ends_the_run_after_the_jobs_before(size: int) -> None:
    done: list[int] = []

    def jobs() -> Iterator[int]:
        yield from range(5)
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"), WorkerPool(size, lambda: done.append) as pool:
        pool.run(jobs())
    assert sorted(done) == [*range(5)]


def test_the_error_of_a_job_takes_precedence_over_its_iterator_s() -> None:
    def work(job: int) -> None:
        time.sleep(0.01)
        raise ValueError(job)

    def jobs() -> Iterator[int]:
        yield 0
        raise OSError("no more")

    with pytest.raises(ValueError, match=r"^0$"), WorkerPool(2, lambda: work) as pool:
        pool.run(jobs())


def test_all_threads_prepare_at_the_same_time() -> None:
    together = threading.Barrier(4)

    def prepare() -> Callable[[int], None]:
        together.wait(timeout=10)
        return lambda _job: None

    with WorkerPool(4, prepare) as pool:
        pool.run(range(4))


def test_a_thread_that_cannot_prepare_ends_all_threads() -> None:
    turns = iter(range(3))

    def prepare() -> Callable[[int], None]:
        if next(turns) == 1:
            raise MemoryError
        return lambda _job: None

    with pytest.raises(MemoryError):
        WorkerPool(3, prepare)


def test_a_thread_that_cannot_start_ends_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = iter(range(3))
    start = threading.Thread.start

    def limited(self: threading.Thread) -> None:
        if next(starts) == 2:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="start new thread"):
        WorkerPool[int](3, lambda: lambda _job: None)


def test_a_callback_is_called_regularly_and_may_stop_the_run() -> None:
    told: list[int] = []

    def tell() -> None:
        told.append(1)
        if len(told) == 3:
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"), WorkerPool(2, lambda: time.sleep) as pool:
        pool.run((0.02 for _ in range(100000)), tell=tell)
    assert len(told) == 3


@pytest.mark.skipif(os.name == "nt", reason="POSIX only")
def test_a_signal_stops_the_run_after_the_started_jobs() -> None:
    done: list[int] = []

    def work(job: int) -> None:
        if job == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        done.append(job)

    with pytest.raises(Interrupted), signals_raise(), WorkerPool(2, lambda: work) as pool:
        pool.run(range(100000))
    assert 3 in done
    assert len(done) < 1000


def test_by_default_there_are_a_few_threads() -> None:
    assert 1 <= default_jobs() <= 4


def test_without_affinity_the_number_of_cores_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert default_jobs() == 3


def run_with_little_memory(code: str) -> subprocess.CompletedProcess[str]:
    """Run code that may call `allow(spare)`, which limits further memory to this number of
    bytes.
    """
    before = """
import re, resource
from pathlib import Path
import numpy as np
from vera_convert.assembly.pool import one_blas_thread
def allow(spare):
    size = re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())
    resource.setrlimit(resource.RLIMIT_AS, (int(size[1]) * 1024 + spare,) * 2)
"""
    return subprocess.run(
        [sys.executable, "-c", before + code], capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit addresses")
def test_the_blas_has_its_buffer_before_the_first_product_of_a_command() -> None:
    run = run_with_little_memory("""
with one_blas_thread():
    allow(16 << 20)
    square = np.ones((512, 512), np.float32)
    print((square @ square)[0, 0])
""")
    assert (run.returncode, run.stdout) == (0, "512.0\n"), run.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit addresses")
@pytest.mark.parametrize(("callers", "spare"), [(1, 16 << 20), (8, 128 << 20)])
def test_too_little_memory_for_the_blas_is_an_error(callers: int, spare: int) -> None:
    run = run_with_little_memory(f"""
allow({spare})
try:
    one_blas_thread({callers})
except MemoryError:
    print("refused")
""")
    assert (run.returncode, run.stdout) == (0, "refused\n"), run.stderr
