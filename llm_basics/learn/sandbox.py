"""Isolation of user code: a time limit, and torch settings that are restored afterwards."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jaxtyping
import torch

# from the limit until the whole process exits
GRACE_SECONDS = 5.0


class TimedOut(BaseException):
    """Raised in a block that exceeds its time limit."""


def slowdown() -> float:
    """Wall time of a busy loop over its CPU time: 1 on a quiet machine, 2 beside a program on its core."""
    wall, cpu = time.perf_counter(), time.thread_time()
    while time.thread_time() - cpu < 0.05:
        pass
    return max(1.0, (time.perf_counter() - wall) / 0.05)


# of the blocks with a limit in the main thread, the innermost last: whether it is exceeded
_EXPIRED: list[threading.Event] = []


def _on_alarm(*_: Any) -> None:
    if _EXPIRED and _EXPIRED[-1].is_set():
        raise TimedOut


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimedOut in the block after `seconds` of CPU time, repeatedly until the block ends.

    A block may wait for `seconds` besides on a quiet machine, and longer by the `slowdown` of a busy one.
    Signals, where the platform has them, also interrupt a sleep; elsewhere the exception is raised at the
    next line of Python. If the block still runs after a grace period, the process exits.
    """
    over, expired, thread = threading.Event(), threading.Event(), threading.get_ident()
    by_signal = threading.current_thread() is threading.main_thread() and hasattr(signal, "pthread_kill")

    def watch() -> None:
        # of waiting, what passed while this thread ran: a stopped process does not wait
        waited, factor, before = 0.0, 0.0, time.process_time()
        while (cpu := time.process_time() - before) < seconds and not over.wait(0.05):
            waited += 0.05
            if waited >= max(factor, 1.0) * (seconds + cpu):
                if factor:
                    break
                factor = slowdown()
        if over.is_set():
            return
        expired.set()
        for _ in range(round(GRACE_SECONDS / 0.2)):
            if by_signal:
                signal.pthread_kill(thread, signal.SIGALRM)
            else:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TimedOut))
            if over.wait(0.2):
                return
        print(f"error: code exceeded {seconds:.0f} s and cannot be stopped", file=sys.stderr, flush=True)
        os._exit(1)

    if by_signal:
        # it stays: a late signal would end the process if the default handler were back
        signal.signal(signal.SIGALRM, _on_alarm)
        _EXPIRED.append(expired)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        try:
            over.set()
        finally:
            _EXPIRED[:] = [each for each in _EXPIRED if each is not expired]


def interpret_triton() -> None:
    """Let NumPy run Triton's kernels where there is no GPU. Triton reads this when it is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@contextlib.contextmanager
def unchanged_state() -> Iterator[None]:
    """Use torch's default dtype and gradient mode in the block, and restore both afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def unchecked_shapes() -> Iterator[None]:
    """Disable shape checks, which would stop a mistake early, and in tests only."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
