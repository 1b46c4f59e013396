"""Graceful shutdown on SIGINT (Ctrl-C), SIGTERM, SIGUSR1 (a scheduler's early warning) and SIGHUP.

A signal only sets a flag, which `poll` raises as `Stopped` at safe points. A stopped run saves a checkpoint
and exits with 128 plus the signal number. A second Ctrl-C ends the process immediately.

    with listening():
        for batch in polled(batches):
            ...
"""

import contextlib
import os
import signal
import types
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, n)]


class Stopped(BaseException):
    """Raised by `poll` after a signal. A BaseException, so that error handlers do not swallow it."""

    def __init__(self, number: int) -> None:
        self.name = signal.Signals(number).name
        self.status = 128 + number
        super().__init__(self.name)


class _State:
    """The first signal received, and whether a signal raises immediately."""

    number: int | None = None
    anywhere = False


def install() -> dict[int, Any]:
    """Install the handlers and return the previous ones; outside the main thread Python allows none."""
    before = {}
    with contextlib.suppress(ValueError):
        for number in SIGNALS:
            # nohup ignores SIGHUP; keep it ignored
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _receive)
    return before


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Signals set the flag inside the block; the previous handlers are restored after it."""
    before = install()
    try:
        yield
    finally:
        _State.number = None
        for number, handler in before.items():
            signal.signal(number, signal.default_int_handler if handler is _receive else handler)


def poll() -> None:
    """Raise `Stopped` if a signal is pending."""
    if _State.number is not None:
        raise Stopped(_State.number)


def polled(items: Iterable[T]) -> Iterator[T]:
    """Yield the items, with a `poll` before each."""
    for item in items:
        poll()
        yield item


@contextlib.contextmanager
def anywhere() -> Iterator[None]:
    """Signals raise `Stopped` immediately inside the block, for long work without partial results."""
    _State.anywhere = True
    try:
        poll()
        yield
    finally:
        _State.anywhere = False


def _receive(number: int, frame: types.FrameType | None) -> None:
    if number == signal.SIGINT and _State.number is not None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    _State.number = _State.number or number
    if _State.anywhere:
        _State.anywhere = False
        raise Stopped(number)
    # no print: the signal may have interrupted one
    with contextlib.suppress(OSError):
        os.write(2, b"\nstopping after the next save; press Ctrl-C again to exit immediately\n")
