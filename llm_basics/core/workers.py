"""Worker processes that end with this one on a signal, without printing tracebacks."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

R = TypeVar("R")


@contextlib.contextmanager
def mapped(work: Callable[[Any], R], items: Sequence[Any], n_workers: int) -> Iterator[Iterator[R]]:
    """The results of `work` on each item, in order, computed by `n_workers` processes.

    An exception in the block ends the processes. Programs that use this need an
    `if __name__ == "__main__"` guard.
    """
    others = multiprocessing.active_children()
    # fork would copy the locks of torch's threads in an undefined state
    with ProcessPoolExecutor(n_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            with _interrupts_blocked():
                results = pool.map(work, items)
            yield results
        except BaseException:
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()
            raise


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block Ctrl-C, which a terminal sends to all processes, in processes started within the context."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
