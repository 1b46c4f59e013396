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


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimedOut in the block after `seconds`, repeatedly until the block ends.

    Signals, where the platform has them, also interrupt a sleep or a wait; elsewhere the exception is raised
    at the next line of Python. If the block still runs after a grace period, the process exits.
    """
    over = threading.Event()
    thread, is_main = threading.get_ident(), threading.current_thread() is threading.main_thread()
    by_signal = is_main and hasattr(signal, "setitimer")

    def raise_it(*_: Any) -> None:
        raise TimedOut

    def watch() -> None:
        waited = over.wait(seconds)
        while not waited and not by_signal and not (waited := over.wait(0.2)):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TimedOut))
        if not waited and not over.wait(GRACE_SECONDS):
            print(f"error: code exceeded {seconds:.0f} s and cannot be stopped", file=sys.stderr, flush=True)
            os._exit(1)

    if by_signal:
        started, handler = time.monotonic(), signal.signal(signal.SIGALRM, raise_it)
        left, _ = signal.setitimer(signal.ITIMER_REAL, seconds, 0.2)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()
        if by_signal:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            if left:  # the timer of an enclosing block
                signal.setitimer(signal.ITIMER_REAL, max(left - time.monotonic() + started, 0.01), 0.2)


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
