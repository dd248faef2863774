"""A pool of threads that take jobs in order and stop at the first failure."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, Self, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from vera_convert.publish.signals import signals_held

Job = TypeVar("Job")

_LOOK_EVERY = 0.1
"""Seconds after which the waiting thread wakes, answers a signal and reports progress."""
_MOST_JOBS = 4
"""The most threads by default. Each thread needs separate buffers, and few disks keep up with more
threads."""
_BLAS_BUFFER = 33 << 20
"""The bytes of a buffer of OpenBLAS as NumPy builds it (32 MiB), and a margin for alignment."""
_AFTER_ALL = sys.maxsize
"""The place of a failure of the jobs' iterator, after all jobs that were handed out."""


def default_jobs() -> int:
    """Return the default number of threads: one for each CPU of this process, at most four."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _MOST_JOBS)
    return min(os.cpu_count() or 1, _MOST_JOBS)


def one_blas_thread(callers: int = 1) -> threadpool_limits:
    """Limit NumPy's BLAS to one thread until the returned context ends.

    A signal waits until the limit is set. The search for the loaded libraries calls back from C,
    and Python would print and drop an exception that a signal raises there.

    The first product of a thread makes the BLAS allocate a buffer, which the BLAS keeps. OpenBLAS
    ends the process if the buffer does not fit into memory, so the calling thread computes a first
    product here, before a command writes anything.

    Args:
        callers: the number of threads that then compute products at the same time.

    Raises:
        MemoryError: the buffers do not fit into memory.
    """
    np.empty(callers * _BLAS_BUFFER, np.uint8)  # too large for the heap, so freed again at once
    with signals_held():
        limit = threadpool_limits(1, user_api="blas")
    square = np.ones((256, 256), np.float32)  # OpenBLAS computes smaller products without a buffer
    np.matmul(square, square)
    return limit


def wait_for(futures: Sequence[Future[None]], tell: Callable[[], None] = lambda: None) -> None:
    """Wait until all are done, in short steps; call `tell` after each step.

    A signal is held back while this thread holds the locks of the futures.
    """
    over = False
    while not over:
        with signals_held():
            over = not wait(futures, timeout=_LOOK_EVERY).not_done
        tell()


class WorkerPool(Generic[Job]):
    """Threads that prepare once, all at the same time, and then do jobs.

    The pool is a context manager. When the context ends, no thread is left. The pool hands jobs out
    in order. If a job fails, the pool finishes all earlier jobs and begins no later job.
    `run` thus raises the error of the first job that fails for any number of threads.
    """

    def __init__(self, size: int, prepare: Callable[[], Callable[[Job], None]]) -> None:
        """Start `size` threads.

        Args:
            size: the number of threads.
            prepare: called once by each thread, by all threads at the same time; returns the
                function that does a job.

        Raises:
            BaseException: an error that `prepare` raised in a thread.
        """
        self._size = size
        self._closed = False
        self._own = threading.local()
        self._threads = ThreadPoolExecutor(size)
        together = threading.Barrier(size)

        def start() -> None:
            together.wait()
            self._own.work = prepare()

        try:
            with signals_held():  # a signal in between would leave a thread that nobody joins
                started = [self._threads.submit(start) for _ in range(size)]
            wait_for(started)
            for each in started:
                each.result()
        except BaseException:
            together.abort()
            self.close()
            raise

    def run(self, jobs: Iterable[Job], *, tell: Callable[[], None] = lambda: None) -> None:
        """Do all jobs. The calling thread calls `tell` about ten times a second.

        Raises:
            BaseException: the error of the first job that failed, else the error of the iterator
                that yields the jobs, or an error of `tell`.
        """
        left, lock, failures = iter(enumerate(jobs)), threading.Lock(), dict[int, BaseException]()

        def take() -> tuple[int, Job] | None:
            """Return the next job; None if no job is left, or a job has failed."""
            with lock:
                return None if failures or self._closed else next(left, None)

        def work() -> None:
            index = _AFTER_ALL
            try:
                while (taken := take()) is not None:
                    index, job = taken
                    self._own.work(job)
                    index = _AFTER_ALL
            except BaseException as error:  # noqa: BLE001 -- the waiting thread raises it
                with lock:
                    failures[index] = error

        done = [self._threads.submit(work) for _ in range(self._size)]
        wait_for(done, tell)
        if failures:
            raise failures[min(failures)]
        for each in done:
            each.result()  # raises an error outside the jobs, such as no memory for `failures`

    def close(self) -> None:
        """Wait until each thread has finished the present job, and end the threads."""
        with signals_held():
            self._closed = True
            self._threads.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
