"""A queue of computations: one thread advances the requests in turn, by a token each.

The thread has low priority (niceness), so that generating text does not slow down a training run.
"""

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

MAX_JOBS = 16
MAX_SECONDS = 120.0
NICENESS = 10


class Busy(Exception):
    """The queue is full."""


class Job:
    """A request in the queue: an iterator whose items arrive in `results`."""

    def __init__(self, items: Iterator[Any]) -> None:
        self.items = items
        self.results: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.is_cancelled = False
        self.began: float | None = None

    def advance(self) -> bool:
        """Compute the next item; False after the last."""
        self.began = self.began or time.monotonic()
        try:
            if self.is_cancelled:
                return False
            if time.monotonic() - self.began > MAX_SECONDS:
                raise TimeoutError(f"a request may compute for {MAX_SECONDS:.0f} s at most")
            self.results.put(("item", next(self.items)))
            return True
        except StopIteration:
            self.results.put(("end", None))
        except Exception as error:
            self.results.put(("error", error))
        return False

    def close(self) -> None:
        """Close the iterator."""
        with contextlib.suppress(Exception):
            self.items.close()  # type: ignore[attr-defined]


class Worker:
    """Runs jobs in a thread, which is started with the first job."""

    def __init__(self, max_jobs: int = MAX_JOBS) -> None:
        self.max_jobs = max_jobs
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def n_jobs(self) -> int:
        """Number of waiting and running jobs."""
        return len(self._jobs)

    def stream(self, items: Iterator[T]) -> Iterator[T]:
        """Compute an iterator in the queue, and yield its items; closing the result cancels it.

        Raises Busy if the queue is full, and exceptions of `items`.
        """
        return self._results(self._put(Job(items)))

    def call(self, compute: Callable[[], T]) -> T:
        """The result of `compute`, called in the queue."""

        def single() -> Iterator[T]:
            yield compute()

        (result,) = self.stream(single())
        return result

    def _put(self, job: Job) -> Job:
        with self._changed:
            if len(self._jobs) >= self.max_jobs:
                raise Busy(f"the queue is full ({self.max_jobs} requests); try again later")
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True, name="lab worker")
                self._thread.start()
            self._changed.notify()
        return job

    def _results(self, job: Job) -> Iterator[Any]:
        try:
            while True:
                kind, value = job.results.get()
                if kind == "error":
                    raise value
                if kind == "end":
                    return
                yield value
        finally:
            job.is_cancelled = True

    def _work(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            # on Linux niceness can be set for this thread alone, not for the training runs that it starts
            if os.uname().sysname == "Linux":
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._jobs))
                job = self._jobs[0]
            is_unfinished = job.advance()
            if not is_unfinished:
                job.close()
            with self._changed:
                self._jobs.popleft()
                if is_unfinished:
                    self._jobs.append(job)
