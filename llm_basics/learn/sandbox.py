"""What keeps an implementation from disturbing the rest: a time limit, and torch's settings set back."""

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

# seconds beyond the limit, before the whole program is ended
PATIENCE = 5.0


class TookTooLong(BaseException):
    """Raised inside of what runs longer than it may."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TookTooLong in the block when the time is over, and again and again until the block ends.

    Where there are signals, they end a sleep or a wait too; elsewhere it takes a next line of Python. What
    does not end even so ends the program.
    """
    over = threading.Event()
    thread, is_main = threading.get_ident(), threading.current_thread() is threading.main_thread()
    by_signal = is_main and hasattr(signal, "setitimer")

    def raise_it(*_: Any) -> None:
        raise TookTooLong

    def watch() -> None:
        waited = over.wait(seconds)
        while not waited and not by_signal and not (waited := over.wait(0.2)):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TookTooLong))
        if not waited and not over.wait(PATIENCE):
            print(
                f"error: what runs longer than {seconds:.0f} s cannot be stopped", file=sys.stderr, flush=True
            )
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
            if left:  # that of a block around this one
                signal.setitimer(signal.ITIMER_REAL, max(left - time.monotonic() + started, 0.01), 0.2)


@contextlib.contextmanager
def unchanged_state() -> Iterator[None]:
    """What code can change for all that runs after it is as usual in the block, and as before behind it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def unchecked_shapes() -> Iterator[None]:
    """Let a mistake go as far as it goes: that shapes are checked would stop it early, and in tests alone."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
