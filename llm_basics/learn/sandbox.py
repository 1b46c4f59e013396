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

# time from the limit until the whole process exits
GRACE_SECONDS = 5.0


class TimedOut(BaseException):
    """Raised in code that exceeds its time limit."""


def slowdown() -> float:
    """Wall time divided by CPU time of a busy loop: 1 on an idle machine, 2 with a program on its core."""
    wall, cpu = time.perf_counter(), time.thread_time()
    while time.thread_time() - cpu < 0.05:
        pass
    return max(1.0, (time.perf_counter() - wall) / 0.05)


# whether the limit is exceeded, for each active context in the main thread, the innermost last
_EXPIRED: list[threading.Event] = []


def _on_alarm(*_: Any) -> None:
    if _EXPIRED and _EXPIRED[-1].is_set():
        raise TimedOut


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimedOut within the context after `seconds` of CPU time, repeatedly until the context ends.

    Waiting is limited to another `seconds` on an idle machine, multiplied by the `slowdown` of a busy one.
    Signals, if available, also interrupt a sleep; otherwise the exception is raised at the next line of
    Python. If the code still runs after a grace period, the process exits.
    """
    over, expired, thread = threading.Event(), threading.Event(), threading.get_ident()
    by_signal = threading.current_thread() is threading.main_thread() and hasattr(signal, "pthread_kill")

    def watch() -> None:
        # waiting is counted only while this thread runs: a stopped process does not wait
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
        # not restored afterwards: with the default handler, a late signal would end the process
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
    """Interpret Triton's kernels with NumPy if there is no GPU. Must be called before Triton is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@contextlib.contextmanager
def unchanged_state() -> Iterator[None]:
    """Use torch's default dtype and gradient mode within the context, and restore both afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def unchecked_shapes() -> Iterator[None]:
    """Disable shape checks, which would detect mistakes early, but only in tests."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
