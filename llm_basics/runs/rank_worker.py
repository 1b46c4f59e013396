"""A worker process of `rank_pool`: one rank of a gloo process group, with one thread.

The main thread runs the tasks. One thread receives messages, and ends the process when the parent has ended;
one reports, during a task, the idle time of the process and its current position.
"""

import contextlib
import datetime
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# runs a task and returns the kind and the value of its result, which are sent to the parent
Run = Callable[[dict[str, Any]], tuple[str, Any]]

# reporting interval, and the maximum CPU time of an idle process within it
TICK_SECONDS, IDLE_SECONDS = 0.1, 0.005

# timeout of a collective; deadlocks are detected much earlier
GLOO_SECONDS = 120.0


def main(start: dict[str, Any], run: Run, prepare: Callable[[str], None]) -> None:
    """Run a worker or, without a rank, fork a worker for each received rank.

    Before each fork, `prepare` receives a name, to import the modules of the first task.
    """
    torch.set_num_threads(1)
    try:
        channel = connection.Client(start["address"], authkey=bytes.fromhex(start["key"]))
    except OSError:
        os._exit(1)  # the parent has ended
    channel.send((start["rank"], os.getpid()))
    if start["rank"] is not None:
        Worker(channel, start["rank"], run).serve()
    # child processes are reaped by the system
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):
        while True:
            rank, name = channel.recv()
            prepare(name)
            if os.fork() == 0:
                channel.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                main({**start, "rank": rank}, run, prepare)


class Worker:
    """One rank."""

    def __init__(self, channel: Any, rank: int, run: Run) -> None:
        self.channel, self.rank, self.run = channel, rank, run
        self.received: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.is_running = threading.Event()
        self.sending = threading.Lock()
        self.main_thread = threading.get_ident()
        self.store: Any = None
        # number of the current task, and CPU time at its start
        self.number, self.began = -1, 0.0

    def serve(self) -> None:
        """Run tasks until the parent ends."""
        for target in (self._receive, self._report):
            threading.Thread(target=target, daemon=True).start()
        while True:
            task = self.received.get()
            assert task is not None, "the end of a task is followed by another task"
            with self._group(task):
                self.number, self.began = task["number"], time.process_time()
                self.is_running.set()
                self._send(("result", self.run(task)))
                assert self.received.get() is None, "the other ranks have ended too"
            self.is_running.clear()
            self._send(("ready",))

    @contextlib.contextmanager
    def _group(self, task: dict[str, Any]) -> Iterator[None]:
        """A new process group per task, isolated from messages of earlier tasks."""
        if self.store is None:
            # builds for Windows lack libuv
            self.store = dist.TCPStore("127.0.0.1", task["port"], is_master=False, use_libuv=False)
        store = dist.PrefixStore(str(task["number"]), self.store)
        dist.init_process_group(
            "gloo",
            timeout=datetime.timedelta(seconds=GLOO_SECONDS),
            world_size=task["world_size"],
            rank=self.rank,
            store=store,
        )
        try:
            yield
        finally:
            dist.destroy_process_group()

    # -- background threads -----------------------------------------------------------------------

    def _send(self, message: tuple[Any, ...]) -> None:
        with self.sending, contextlib.suppress(OSError):
            self.channel.send(message)

    def _receive(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self.received.put(self.channel.recv())
        os._exit(0)

    def _report(self) -> None:
        """Report idle ticks, the CPU time of the task and its position."""
        while self.is_running.wait():
            number, n_idle, before = self.number, 0, self.began
            while self.is_running.is_set() and self.number == number:
                time.sleep(TICK_SECONDS)
                now = time.process_time()
                n_idle = n_idle + 1 if now - before < IDLE_SECONDS and _others_sleep() else 0
                before = now
                self._send(("tick", number, n_idle, now - self.began, self._position()))

    def _position(self) -> str:
        """The innermost line of the main thread outside of libraries, and the function called there."""
        frame = sys._current_frames().get(self.main_thread)
        called = ""
        while frame is not None and "site-packages" in frame.f_code.co_filename:
            hidden = ("wrapper", "_fn", "inner", "__call__")
            called = called if frame.f_code.co_name in hidden else frame.f_code.co_name
            frame = frame.f_back
        if frame is None:
            return called
        line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        return f"{called or frame.f_code.co_name} ({line})"


def _others_sleep() -> bool:
    """Whether no other thread of this process is ready to run or running.

    Always True on systems other than Linux, where only CPU time is measured.
    """
    tasks = Path("/proc/self/task")
    with contextlib.suppress(OSError):
        others = [task for task in tasks.iterdir() if task.name != str(threading.get_native_id())]
        return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "S" for task in others)
    return True
