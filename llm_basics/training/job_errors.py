"""Error handling for jobs of several processes: if one fails, all end, and the first error is printed last.

A process that fails claims the first error in the shared store, prints it and exits; torchrun then ends the
others, which print nothing. A lost process closes its connections, which is an error in the others. If a
process hangs, the others end the job when a collective exceeds `train.timeout_seconds`, and the process that
hangs prints its stack.
"""

import contextlib
import io
import os
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator

import torch.distributed as dist

from llm_basics.training import distributed

# exit status of a process that ends because another one has failed
OTHER_FAILED = 6

# head start of the main process in printing an error common to all processes
PRECEDENCE_SECONDS = 1.0

# polling interval for the end of the job; grace periods for hanging processes to print, and for torchrun
POLL_SECONDS, PRINT_SECONDS, EXIT_SECONDS = 0.25, 1.0, 3.0

CLAIM, OVER = "llm_basics/first_error", "llm_basics/over"

TOO_LATE = (
    "a process has waited for another one longer than train.timeout_seconds; the other one prints its stack, "
    "unless it was stopped. If it is only slow, raise --train.timeout_seconds"
)
ENDED = "another process of the job has ended; it was killed, or has printed its own error"

# modules whose functions wait for other processes
WAITING = (os.path.join("torch", "distributed"), os.path.join("torch", "autograd"))


def run(work: Callable[[], int]) -> int:
    """Run `work` in each process of a job, and return its exit status.

    Only the main process writes to the terminal, unless another one is the first to fail.
    """
    if distributed.size() == 1:
        return work()
    terminal = _Terminal()
    error: BaseException | None = None
    with main_writes(terminal), _watching():
        try:
            status = work()
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else 1
        except Exception as exception:
            status, error = 1, exception
    if status and status < 128:
        status = _fail(status, terminal, error)
    return status


def _fail(status: int, terminal: "_Terminal", error: BaseException | None) -> int:
    """Print the error if it is the first of the job; if not, wait for torchrun to end this process."""
    reason = _reason(error)
    if not distributed.is_main() and not reason:
        time.sleep(PRECEDENCE_SECONDS)
    if not _claim():
        _wait_for_torchrun()
        return OTHER_FAILED
    message = terminal.error
    if error is not None:
        message = f"error: {reason}" if reason else "".join(traceback.format_exception(error)).rstrip()
    if error is not None or not distributed.is_main():
        print(message, file=sys.stderr, flush=True)
    if reason == ENDED:
        # torchrun must first detect and report the end of the other process
        _wait_for_torchrun()
        return OTHER_FAILED
    from torch.distributed.elastic.multiprocessing import errors

    try:
        raise RuntimeError(message) if error is None or reason else error
    except Exception as recorded:
        # torchrun prints it at the end
        errors.get_error_handler().record_exception(recorded)
    if reason == TOO_LATE:
        _end_all()
        os._exit(OTHER_FAILED)  # the shutdown of an interpreter takes seconds on a busy machine
    return status


def _wait_for_torchrun() -> None:
    """Wait for torchrun to end this process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(EXIT_SECONDS)


def _claim() -> bool:
    """Whether this process is the first of the job to fail."""
    try:
        return _store().add(CLAIM, 1) == 1
    except RuntimeError:
        return False  # the process that hosts the store has ended


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _reason(error: BaseException | None) -> str:
    """The reason if an error is that of a collective with a late or lost process; else ""."""
    text = str(error).lower()
    if not isinstance(error, RuntimeError):
        return ""
    if any(word in text for word in distributed.LATE):
        return TOO_LATE
    return ENDED if any(word in text for word in distributed.LOST) else ""


# --------------------------------------------------------------------------------------------------
# Processes that hang


@contextlib.contextmanager
def _watching() -> Iterator[None]:
    """Within the context a thread ends this process when the job is over, with its stack if it hangs."""
    main, done = threading.main_thread().ident, threading.Event()
    terminal = sys.__stderr__

    def watch() -> None:
        while not done.wait(POLL_SECONDS):
            try:
                is_over = _store().check([OVER])
            except RuntimeError:
                return  # the process that hosts the store has ended: the connections of this one close
            if is_over:
                frame = sys._current_frames().get(main or 0)
                if frame is not None and terminal is not None and not _is_waiting(frame):
                    rank = distributed.world().rank
                    stack = "".join(traceback.format_stack(frame))
                    terminal.write(f"rank {rank} hangs here:\n{stack}")
                    terminal.flush()
                os._exit(OTHER_FAILED)

    thread = threading.Thread(target=watch, daemon=True, name="job watch")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _is_waiting(frame: types.FrameType) -> bool:
    return any(part in frame.f_code.co_filename for part in WAITING)


def _end_all() -> None:
    """End the other processes; those on this machine are killed if they do not exit in time."""
    with contextlib.suppress(RuntimeError):
        _store().set(OVER, "1")
    time.sleep(PRINT_SECONDS)
    for pid in distributed.local_pids():
        if pid != os.getpid():
            with contextlib.suppress(OSError):
                os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))


# --------------------------------------------------------------------------------------------------
# The terminal


class _Terminal(io.TextIOBase):
    """Standard error of a process of a job: only the main process writes; the last error is recorded."""

    def __init__(self) -> None:
        self.stream = sys.stderr
        self.error = ""

    def write(self, text: str) -> int:
        if text.startswith("error:"):
            self.error = ""
        self.error = (self.error + text).lstrip()
        if distributed.is_main():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()


class _NullStream(io.TextIOBase):
    """Discards all text."""

    def write(self, text: str) -> int:
        return len(text)


@contextlib.contextmanager
def main_writes(terminal: io.TextIOBase | None = None) -> Iterator[None]:
    """Within the context only the main process writes to the terminal; `terminal` replaces standard error."""
    with contextlib.ExitStack() as stack:
        if terminal is not None or not distributed.is_main():
            stack.enter_context(contextlib.redirect_stderr(terminal or _NullStream()))
        if not distributed.is_main():
            stack.enter_context(contextlib.redirect_stdout(_NullStream()))
        yield
