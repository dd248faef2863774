"""A pool of threads that take jobs in order and stop at the first failure."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
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
        self._prepare = prepare
        self._changed = threading.Condition()
        self._together = threading.Barrier(size)
        self._jobs: Iterator[tuple[int, Job]] | None = None
        self._ready = 0
        self._busy = 0
        self._closed = False
        self._failures: dict[int, BaseException] = {}
        self._threads = [threading.Thread(target=self._live, daemon=True) for _ in range(size)]
        try:
            for thread in self._threads:
                thread.start()
            self._wait(lambda: self._ready == size)
        except BaseException:
            self.close()
            raise

    def run(self, jobs: Iterable[Job], *, tell: Callable[[], None] = lambda: None) -> None:
        """Do all jobs. The calling thread calls `tell` about ten times a second.

        Raises:
            BaseException: the error of the first job that failed, else the error of the iterator
                that yields the jobs, or an error of `tell`.
        """
        with signals_held(), self._changed:
            self._jobs = iter(enumerate(jobs))
            self._changed.notify_all()
        self._wait(lambda: self._jobs is None and not self._busy, tell)

    def close(self) -> None:
        """Wait until each thread has finished the present job, and end the threads."""
        with signals_held():
            with self._changed:
                self._closed = True
                self._jobs = None
                self._together.abort()
                self._changed.notify_all()
            for thread in self._threads:
                if thread.ident is not None:
                    thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _wait(self, is_over: Callable[[], bool], tell: Callable[[], None] = lambda: None) -> None:
        """Wait in short steps. A signal is held back while this thread holds the lock."""
        over = False
        while not over:
            with signals_held(), self._changed:
                if not is_over() and not self._has_failed():
                    self._changed.wait(_LOOK_EVERY)
                over = is_over() or self._has_failed()
            tell()
        if self._failures:
            raise self._failures[min(self._failures)]

    def _has_failed(self) -> bool:
        return bool(self._failures) and not self._busy

    def _live(self) -> None:
        try:
            self._together.wait()
            work = self._prepare()
        except threading.BrokenBarrierError:
            return
        except BaseException as error:  # noqa: BLE001 -- the waiting thread raises it
            with self._changed:
                self._failures[-1] = error
                self._changed.notify_all()
            return
        with self._changed:
            self._ready += 1
            self._changed.notify_all()
        while (taken := self._take()) is not None:
            index, job = taken
            failure = None
            try:
                work(job)
            except BaseException as error:  # noqa: BLE001 -- the waiting thread raises it
                failure = error
            with self._changed:
                self._busy -= 1
                if failure is not None:
                    self._failures[index] = failure
                    self._jobs = None
                if self._jobs is None:  # else nobody waits for the end of this job
                    self._changed.notify_all()

    def _take(self) -> tuple[int, Job] | None:
        """Return the next job as soon as there is one; None after the pool is closed."""
        with self._changed:
            while not self._closed:
                if self._jobs is None:
                    self._changed.wait()
                    continue
                try:
                    taken = next(self._jobs, None)
                except BaseException as error:  # noqa: BLE001 -- the waiting thread raises it
                    taken = None
                    self._failures[_AFTER_ALL] = error
                if taken is not None:
                    self._busy += 1
                    return taken
                self._jobs = None
                self._changed.notify_all()
            return None
