"""Threads that take jobs in order, stop at the first failure, and never outlive their run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

from threadpoolctl import threadpool_limits

from vera_convert.publish.signals import signals_held

Job = TypeVar("Job")

_LOOK_EVERY = 0.1
"""Seconds between two looks of the waiting thread: a signal is answered, progress is told."""
_MOST_JOBS = 4
"""Threads that are started without being asked for: each needs memory of its own, and the disk
seldom keeps up with more."""


def default_jobs() -> int:
    """Return how many threads this process may keep busy, four at most."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _MOST_JOBS)
    return min(os.cpu_count() or 1, _MOST_JOBS)


def one_blas_thread() -> threadpool_limits:
    """Limit NumPy's BLAS to one thread, until the context that is returned ends.

    A signal waits meanwhile: the search for the loaded libraries calls back from C, where Python
    would print what the signal raises, and drop it.
    """
    with signals_held():
        return threadpool_limits(1, user_api="blas")


class WorkerPool(Generic[Job]):
    """Threads that each prepare once, all together, and then work on whatever jobs come.

    A context manager; when it ends, no thread is left. Jobs are handed out in order. When one
    fails, those before it are finished and those after it are not begun, so the error that `run`
    raises is that of the first job that fails, however many threads there are.
    """

    def __init__(self, size: int, prepare: Callable[[], Callable[[Job], None]]) -> None:
        """Start `size` threads.

        Args:
            size: how many.
            prepare: called once by each thread, by all at the same time; returns what does a job.

        Raises:
            BaseException: what `prepare` raised in one of them.
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
        """Do all jobs; `tell` is called now and then by the calling thread.

        Raises:
            BaseException: the failure of the first job that failed, or what `tell` raised.
        """
        with signals_held(), self._changed:
            self._jobs = iter(enumerate(jobs))
            self._changed.notify_all()
        self._wait(lambda: self._jobs is None and not self._busy, tell)

    def close(self) -> None:
        """Let the threads finish what they have begun, and wait for them."""
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _wait(self, is_over: Callable[[], bool], tell: Callable[[], None] = lambda: None) -> None:
        """Wait in short steps; a signal is held back while the lock is, and raised in between."""
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
        except BaseException as error:  # noqa: BLE001 -- it is raised again by who waits
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
            except BaseException as error:  # noqa: BLE001 -- it is raised again by who waits
                failure = error
            with self._changed:
                self._busy -= 1
                if failure is not None:
                    self._failures[index] = failure
                    self._jobs = None
                if self._jobs is None:  # else nobody waits for this
                    self._changed.notify_all()

    def _take(self) -> tuple[int, Job] | None:
        """Return the next job, once there is one; None when there will be none."""
        with self._changed:
            while not self._closed:
                if self._jobs is None:
                    self._changed.wait()
                    continue
                taken = next(self._jobs, None)
                if taken is not None:
                    self._busy += 1
                    return taken
                self._jobs = None
                self._changed.notify_all()
            return None
