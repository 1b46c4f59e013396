"""A worker process of `ranks`: one rank, which runs the probes it is sent with the pieces of its parent.

The main thread computes. One thread receives messages, and ends the process when the parent is gone; one
reports, during a probe, for how long the process has used no CPU time and what it waits for.
"""

import contextlib
import datetime
import os
import queue
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from llm_basics import swap
from llm_basics.learn import checks, judge, messages, probes, sockets

# between two reports, and the CPU time below which a process has waited
TICK_SECONDS, IDLE_SECONDS = 0.1, 0.005

# after which a collective raises; a hang is found much earlier
GLOO_SECONDS = 120.0

# by path: modification time, and what was loaded
_LOADED: dict[str, tuple[int, Any]] = {}


def main(start: dict[str, Any]) -> None:
    """Serve as a rank or, without one, fork a rank for each number that is received."""
    torch.set_num_threads(1)
    try:
        channel = connection.Client(start["address"], authkey=bytes.fromhex(start["key"]))
    except OSError:
        os._exit(1)  # the parent is gone
    channel.send((start["rank"], os.getpid()))
    if start["rank"] is not None:
        Worker(channel, start["rank"]).serve()
    # children are not waited for
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):
        while True:
            rank, step = channel.recv()
            if step in judge.STEPS:
                judge.load(step)
            if os.fork() == 0:
                channel.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                main({**start, "rank": rank})


class Worker:
    """One rank."""

    def __init__(self, channel: Any, rank: int) -> None:
        self.channel, self.rank = channel, rank
        self.received: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.is_running = threading.Event()
        self.sending = threading.Lock()
        self.main_thread = threading.get_ident()
        self.store: Any = None
        # of the task that is running, and its CPU time at the start
        self.number, self.began = -1, 0.0

    def serve(self) -> None:
        """Run probes until the parent is gone."""
        for target in (self._receive, self._report):
            threading.Thread(target=target, daemon=True).start()
        while True:
            task = self.received.get()
            assert task is not None, "a task follows the end of another"
            with self._group(task):
                self.number, self.began = task["number"], time.process_time()
                self.is_running.set()
                self._send(("result", self._result(task)))
                assert self.received.get() is None, "the other ranks have ended too"
            self.is_running.clear()
            self._send(("ready",))

    @contextlib.contextmanager
    def _group(self, task: dict[str, Any]) -> Iterator[None]:
        """A process group of its own, so that no message of an earlier probe arrives in this one."""
        if self.store is None:
            # libuv is missing in builds for Windows
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

    def _result(self, task: dict[str, Any]) -> tuple[str, Any]:
        """The kind of the result, and an observation, a text or a name."""
        sys.path[:] = task["path"]
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        function = _function(*task["function"])
        try:
            with _pieces(task), contextlib.chdir(task["folder"]):
                return "seen", to_arrays(function(_adapters(task["adapters"])))
        except NotImplementedError as error:
            kind = "stub" if probes.is_stub(error) else "error"
            return kind, str(error) if kind == "stub" else f"NotImplementedError: {messages.reason(error)}"
        except sockets.MissingAdapter as name:
            return "missing", str(name)
        except (Exception, SystemExit) as error:
            return "error", f"{type(error).__name__}: {messages.reason(error)}"

    # -- the other threads ------------------------------------------------------------------------

    def _send(self, message: tuple[Any, ...]) -> None:
        with self.sending, contextlib.suppress(OSError):
            self.channel.send(message)

    def _receive(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self.received.put(self.channel.recv())
        os._exit(0)

    def _report(self) -> None:
        """Report idle ticks, the CPU time of the probe and where it waits."""
        while self.is_running.wait():
            number, n_idle, before = self.number, 0, self.began
            while self.is_running.is_set() and self.number == number:
                time.sleep(TICK_SECONDS)
                now = time.process_time()
                n_idle = n_idle + 1 if now - before < IDLE_SECONDS and _others_sleep() else 0
                before = now
                self._send(("tick", number, n_idle, now - self.began, self._position()))

    def _position(self) -> str:
        """The innermost line of the main thread outside of libraries, and the name of what it calls."""
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
    """Whether no other thread of this process is ready to run; on a busy machine it may wait for long.

    Known on Linux alone; elsewhere CPU time has to tell.
    """
    tasks = Path("/proc/self/task")
    with contextlib.suppress(OSError):
        others = [task for task in tasks.iterdir() if task.name != str(threading.get_native_id())]
        return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "S" for task in others)
    return True


@contextlib.contextmanager
def _pieces(task: dict[str, Any]) -> Iterator[None]:
    """Put the pieces of the parent in place: of files, and mistakes by step and name."""
    pieces: dict[str, Any] = {}
    for path, names in task["files"].items():
        found = _cached(path, _pieces_of_file)
        pieces |= {name: found[name] for name in names}
    for piece, known in task["mistakes"].items():
        wrong = [next(m.wrong for m in judge.load(step).mistakes if m.name == name) for step, name in known]
        pieces[piece] = wrong[0] if len(wrong) == 1 else type("Both", tuple(wrong), {})
    with swap.reference_only(), swap.replaced(pieces):
        yield


def _pieces_of_file(path: str) -> dict[str, Any]:
    with swap.restored():
        swap.use(path, lambda line: None, checks.check_shapes)
        return {piece: swap.current(piece) for piece in swap.user_pieces()}


def _function(step: str, name: str) -> Any:
    """What a probe of a step runs, or a function of a Python file."""
    if step not in judge.STEPS:
        return getattr(_cached(step, lambda path: sockets.run_file(Path(path), Path(path).stem)), name)
    return next(probe.on_rank for probe in judge.load(step).probes if probe.about == name)


def _adapters(path: str) -> sockets.Adapters:
    return sockets.own() if Path(path) == sockets.own_path() else _cached(path, _foreign_adapters)


def _foreign_adapters(path: str) -> sockets.Adapters:
    adapters = sockets.Adapters(sockets.run_file(Path(path), f"{Path(path).parent.name}.{Path(path).stem}"))
    adapters.is_foreign = True
    return adapters


def _cached(path: str, load: Any) -> Any:
    """What was loaded from a file, until the file changes."""
    changed = Path(path).stat().st_mtime_ns
    if path not in _LOADED or _LOADED[path][0] != changed:
        _LOADED[path] = (changed, load(path))
    return _LOADED[path][1]


def to_arrays(value: Any) -> Any:
    """`value` with arrays in the place of tensors, which are sent as copies, not as shared memory."""
    if isinstance(value, Tensor):
        return value.detach().numpy().copy()
    if isinstance(value, dict):
        return {key: to_arrays(each) for key, each in value.items()}
    return type(value)(map(to_arrays, value)) if isinstance(value, list | tuple) else value
