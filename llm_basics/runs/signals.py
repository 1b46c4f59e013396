"""Being asked to stop: Ctrl-C, SIGTERM (a scheduler's last call), SIGUSR1 (its early warning), SIGHUP.

A signal only sets a flag. Where nothing is half done, `poll` turns it into `Stopped`; so a run ends with a
checkpoint, and with 128 plus the signal's number as its exit status. A second Ctrl-C ends it at once.

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
    """Somebody asked the program to stop. No Exception: what handles errors must not swallow it."""

    def __init__(self, number: int) -> None:
        self.name = signal.Signals(number).name
        self.status = 128 + number
        super().__init__(self.name)


class _State:
    """The first signal that came, and whether the next may interrupt whatever is going on."""

    number: int | None = None
    anywhere = False


def install() -> dict[int, Any]:
    """Set the handlers, and return those that were there; none in a thread, where Python allows none."""
    before = {}
    with contextlib.suppress(ValueError):
        for number in SIGNALS:
            # nohup has a lost terminal ignored, and so it stays
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _receive)
    return before


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Inside, signals set the flag; afterwards they mean what they meant before."""
    before = install()
    try:
        yield
    finally:
        _State.number = None
        for number, handler in before.items():
            signal.signal(number, signal.default_int_handler if handler is _receive else handler)


def came() -> bool:
    """Whether a signal has come that `poll` would answer."""
    return _State.number is not None


def poll() -> None:
    """Raise `Stopped` if a signal has come."""
    if _State.number is not None:
        raise Stopped(_State.number)


def polled(items: Iterable[T]) -> Iterator[T]:
    """The items, with a `poll` before each."""
    for item in items:
        poll()
        yield item


@contextlib.contextmanager
def anywhere() -> Iterator[None]:
    """Inside, a signal raises `Stopped` at once: for long work that leaves nothing half done."""
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
    # no print: it might be what was interrupted
    with contextlib.suppress(OSError):
        os.write(2, b"\nstopping as soon as all is saved; Ctrl-C leaves at once\n")
