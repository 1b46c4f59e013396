"""Handling of SIGINT (Ctrl-C), SIGTERM, SIGUSR1 (a scheduler's early warning) and SIGHUP.

Every command calls `end_at_once` before its imports and runs its program by `run`: a signal then ends it with
a message of one line and the exit status 128 plus the signal number. Training must not lose its weights, so
within `listening` a signal only sets a flag, which `poll` raises as `Stopped` at safe points. A second Ctrl-C
ends the process immediately.

    with listening():
        for batch in polled(batches):
            ...
"""

import contextlib
import enum
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, n)]

# torchrun repeats a SIGINT that the terminal has sent to all processes; repeats within this time are ignored
LAUNCHER_SECONDS = 0.5


class Stopped(BaseException):
    """Raised after a signal. A BaseException, so that error handlers do not swallow it."""

    def __init__(self, number: int) -> None:
        self.name = signal.Signals(number).name
        self.status = 128 + number
        super().__init__(self.name)

    def __reduce__(self) -> tuple[type["Stopped"], tuple[int]]:
        # by default an exception is pickled with its message only
        return Stopped, (self.status - 128,)


class Response(enum.Enum):
    """The effect of a signal."""

    EXIT = enum.auto()
    """End the process, without cleanup."""
    RAISE = enum.auto()
    """Raise `Stopped` immediately."""
    FLAG = enum.auto()
    """Set the flag for `poll`."""
    NONE = enum.auto()
    """Ignore the signal: `Stopped` was raised, and its cleanup must not be interrupted."""


class _State:
    """The first signal and its time, the response to the next one, and the reduction of `shared`."""

    number: int | None = None
    seconds = 0.0
    response = Response.FLAG
    is_launched = False
    agree: Callable[[int], int] | None = None


# --------------------------------------------------------------------------------------------------
# Commands


def end_at_once() -> None:
    """End the process on a signal, with a message of one line, until `run`: importing torch takes seconds."""
    _install()
    _State.response = Response.EXIT


def run(main: Callable[[T], int | None], options: T) -> NoReturn:
    """Exit with the status of `main(options)`, or after a signal, with a message and 128 plus its number."""
    status = None
    with _handling(), _responding(Response.RAISE):
        try:
            poll()
            status = main(options)
            _State.response = Response.NONE
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):  # raised by a library
                _State.number = signal.SIGINT
            # after a signal, any other error is its consequence
            if _State.number is None:
                raise
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        if _State.number is not None and status != 128 + _State.number:
            _print_stopped(_State.number)
            status = 128 + _State.number
    sys.exit(status)


@contextlib.contextmanager
def interactive() -> Iterator[None]:
    """Raise KeyboardInterrupt at each Ctrl-C within the context."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# --------------------------------------------------------------------------------------------------
# Training


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Within the context signals set the flag of `poll`; then restores the previous handlers and response."""
    with _handling(), _responding(Response.FLAG):
        yield


def request_stop() -> None:
    """Set the flag for `poll` as SIGTERM does."""
    _State.number = _State.number or signal.SIGTERM


def poll() -> None:
    """Raise `Stopped` if a signal is pending."""
    if _State.agree is not None:
        _State.number = _State.agree(_State.number or 0) or None
    if _State.number is not None:
        raise Stopped(_State.number)


@contextlib.contextmanager
def shared(agree: Callable[[int], int] | None) -> Iterator[None]:
    """Within the context `poll` raises for the signal number `agree(pending)`; 0 is no signal.

    `agree` is a collective reduction over several processes, so that all stop at the same poll.
    """
    before, _State.agree = _State.agree, agree
    try:
        yield
    finally:
        _State.agree = before


def expect_launcher() -> None:
    """Set that a launcher has started this process, and forwards signals."""
    _State.is_launched = True


def unshared() -> contextlib.AbstractContextManager[None]:
    """Within the context `poll` raises only for signals to this process."""
    return shared(None)


def polled(items: Iterable[T]) -> Iterator[T]:
    """Yield the items, with a `poll` before each."""
    for item in items:
        poll()
        yield item


@contextlib.contextmanager
def anywhere() -> Iterator[None]:
    """Within the context signals raise `Stopped` immediately, for long work without partial results."""
    with _responding(Response.RAISE):
        poll()
        yield


# --------------------------------------------------------------------------------------------------
# Handlers


def _install() -> dict[int, Any]:
    """Install the handlers and return the previous ones; none outside of the main thread."""
    before = {}
    with contextlib.suppress(ValueError):
        for number in SIGNALS:
            # nohup ignores SIGHUP; keep it ignored
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _receive)
    return before


@contextlib.contextmanager
def _handling() -> Iterator[None]:
    """Install the handlers within the context; then clear any pending signal."""
    before = _install()
    try:
        yield
    finally:
        _State.number = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _responding(response: Response) -> Iterator[None]:
    before, _State.response = _State.response, response
    try:
        yield
    finally:
        _State.response = before


def _receive(number: int, frame: types.FrameType | None) -> None:
    now = time.monotonic()
    is_repeated = _State.is_launched and now < _State.seconds + LAUNCHER_SECONDS
    if number == signal.SIGINT and _State.number is not None and not is_repeated:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    if _State.number is None:
        _State.number, _State.seconds = number, now
    if _State.response is Response.EXIT:
        _print_stopped(number)
        os._exit(128 + number)
    if _State.response is Response.RAISE:
        _State.response = Response.NONE
        raise Stopped(number)
    # after one process of a job fails, a launcher ends the others by SIGTERM; the error must be printed last
    if _State.response is Response.FLAG and not (_State.is_launched and number == signal.SIGTERM):
        _write("stopping after the next save; press Ctrl-C again to exit immediately")


def _print_stopped(number: int) -> None:
    _write(f"stopped by {signal.Signals(number).name}")


def _write(line: str) -> None:
    """Write a line to standard error, after a terminal's ^C; os.write, since a signal may interrupt print."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode() if os.isatty(2) else f"{line}\n".encode())
