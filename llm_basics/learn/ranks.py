"""Probes on several ranks: gloo processes with one thread each, started with the first probe and reused.

A probe runs the same function on every rank, with the pieces that are in use here, and observes what each
returns. Workers are sent a description (paths of files, mistakes by name), not code. If every rank that has
not ended waits without using CPU time, the ranks wait for each other and never end: the observation is the
error "hangs", with the lines at which they wait, and the workers are replaced. A busy machine is no hang: a
process that waits for a processor reports no idle time either.
"""

import atexit
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from llm_basics import swap
from llm_basics.learn import judge, mistakes, probes, sockets

# idle reports (rank_worker.TICK_SECONDS) after which ranks hang: all of them, or the others when some ended
ALL_IDLE, OTHERS_IDLE = 10, 5

# what a worker process runs; one line of input describes it
PROGRAM = (
    "import json, sys; start = json.loads(sys.stdin.readline()); sys.path[:] = start['path']; "
    "from llm_basics.learn import rank_worker; rank_worker.main(start)"
)
HIDDEN = {"TORCH_CPP_LOG_LEVEL": "ERROR", "TORCH_DISTRIBUTED_DEBUG": "OFF"}
LOOPBACK = {"linux": "lo", "darwin": "lo0"}


def probe(
    step: probes.Step,
    about: str,
    function: Callable[[Any], probes.Observation],
    expected: Callable[[int], probes.Observation],
    needs: str,
    world_size: int = 2,
    rtol: float = 1e-4,
    atol: float = 1e-6,
    **ground: Any,
) -> None:
    """Check that `function(adapters)` gives `expected(rank)` on every rank.

    `needs` names the adapters that it calls; `ground` is `contract` or `beyond`, as for other probes.
    """

    def observe(adapters: Any) -> probes.Observation:
        for name in needs.split():
            getattr(adapters, name)  # raises MissingAdapter
        return pool().observe((step.name, about), adapters, world_size)

    def right() -> probes.Observation:
        return by_rank([expected(rank) for rank in range(world_size)])

    step.probes.append(probes.Probe(about, observe, right, rtol, atol, on_rank=function, **ground))


def by_rank(seen: list[probes.Observation]) -> probes.Observation:
    """The observations of all ranks as one."""
    return {f"{facet}, rank {rank}": value for rank, each in enumerate(seen) for facet, value in each.items()}


@functools.cache
def _pool_of(process: int) -> "Pool":
    made = Pool()
    atexit.register(made.close)
    return made


def pool() -> "Pool":
    """The workers of this process; one that was forked has its own."""
    return _pool_of(os.getpid())


class Pool:
    """Worker processes, as many as the largest number of ranks so far."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._listener = connection.Listener(authkey=self._key)
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=False)
        self._numbers = itertools.count()
        self._channels: list[Any] = []
        self._pids: list[int] = []
        # forks workers, so that each need not import torch
        self._nursery: Any = None
        self._processes: list[subprocess.Popen[bytes]] = []

    def observe(self, function: tuple[str, str], adapters: Any, world_size: int = 2) -> probes.Observation:
        """What a function gives on all ranks; errors are part of it.

        The function is given by a step and its probe, or by the path of a Python file and a name in it.
        """
        while len(self._channels) < world_size:
            self._start(len(self._channels), function[0])
        task = describe(adapters) | {
            "function": function,
            "world_size": world_size,
            "number": next(self._numbers),
            "port": self._store.port,
        }
        try:
            for channel in self._channels[:world_size]:
                channel.send(task)
            results = self._results(task["number"], world_size)
        except BaseException:
            self.stop()
            raise
        return self._concluded(results, adapters)

    def _concluded(self, results: list[Any], adapters: Any) -> probes.Observation:
        """One observation from the result of each rank; None for one that is gone."""
        of_kind: dict[str, list[Any]] = {}
        for kind, value in results:
            of_kind.setdefault(kind, []).append(value)
        if "missing" in of_kind:
            raise sockets.MissingAdapter(of_kind["missing"][0])
        if "stub" in of_kind:
            message = of_kind["stub"][0]
            raise NotImplementedError(message)
        of_gloo = [text for text in of_kind.get("error", []) if "gloo" in text]
        errors = [text for text in of_kind.get("error", []) if text not in of_gloo]
        if errors or "stopped" in of_kind:
            return {"error": [*errors, *of_kind.get("stopped", [])][0]}
        if of_gloo or "crashed" in of_kind:
            # gloo ends the process for a message of another size than expected
            text = [*of_kind.get("hangs", []), *of_kind.get("crashed", []), *of_gloo][0]
            return {"error": f"mismatch: ranks call different collectives, or with different sizes; {text}"}
        if "hangs" in of_kind:
            return {"error": f"hangs: {'; '.join(of_kind['hangs'])}"}
        return by_rank([_to_tensors(value) for _, value in results])

    def _results(self, number: int, world_size: int) -> list[Any]:
        """Kind and value of each rank's result. Afterwards all workers are ready, or replaced."""
        channels = self._channels[:world_size]
        results: list[Any] = [None] * world_size
        idle, ready = [0] * world_size, [False] * world_size
        positions = [""] * world_size
        while not all(ready):
            active = connection.wait(channels)
            for rank in [i for i, channel in enumerate(channels) if channel in active]:
                try:
                    message = channels[rank].recv()
                except (EOFError, OSError):
                    results[rank] = ("crashed", f"the process of rank {rank} ended")
                    return self._ended(results, positions)
                match message:
                    case ("result", result):
                        results[rank] = result
                        if None not in results:
                            for each in channels:
                                each.send(None)
                            idle = [0] * world_size
                    case ("ready",):
                        ready[rank] = True
                    case ("tick", of_task, n_idle, cpu_seconds, position) if of_task == number:
                        idle[rank], positions[rank] = n_idle, position
                        if cpu_seconds > probes.LIMIT_SECONDS and results[rank] is None:
                            results[rank] = ("stopped", f"{probes.TIMEOUT} {cpu_seconds:.0f} s of CPU time")
                            return self._ended(results, positions)
            waiting = [rank for rank in range(world_size) if None in results and results[rank] is None]
            waiting = waiting or [rank for rank in range(world_size) if not ready[rank]]
            limit = ALL_IDLE if len(waiting) == world_size else OTHERS_IDLE
            if waiting and min(idle[rank] for rank in waiting) >= limit:
                return self._ended(results, positions)
        return results

    def _ended(self, results: list[Any], positions: list[str]) -> list[Any]:
        """The results when some ranks do not end; the workers are replaced."""
        self.stop()
        missing = [rank for rank, result in enumerate(results) if result is None]
        ended = [rank for rank in range(len(results)) if rank not in missing]
        for rank in missing:
            text = f"rank {rank} waits in {positions[rank]}"
            if ended:
                text += f", rank {ended[0]} has ended"
            results[rank] = ("hangs", text)
        return results

    # -- processes --------------------------------------------------------------------------------

    def _start(self, rank: int, step: str) -> None:
        """Start the worker of a rank: forked from a process that has imported torch, or a new one."""
        if hasattr(os, "fork") and sys.platform == "linux":
            if self._nursery is None:
                self._nursery, _ = self._launch(None)
            self._nursery.send((rank, step))
            channel, pid = self._accept(self._processes[0])
        else:
            channel, pid = self._launch(rank)
        self._channels.append(channel)
        self._pids.append(pid)

    def _launch(self, rank: int | None) -> tuple[Any, int]:
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        loopback = LOOPBACK.get(sys.platform)
        environment = os.environ | threads | HIDDEN
        if loopback:
            environment["GLOO_SOCKET_IFNAME"] = loopback
        # a session of its own: Ctrl-C ends this process, and workers end with it
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            # gloo ends a process with a message to it
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        assert process.stdin is not None, "it is a pipe"
        start = {"address": self._listener.address, "key": self._key.hex(), "rank": rank, "path": sys.path}
        process.stdin.write(json.dumps(start).encode() + b"\n")
        process.stdin.close()
        self._processes.append(process)
        return self._accept(process)

    def _accept(self, process: "subprocess.Popen[bytes]") -> tuple[Any, int]:
        """The connection of the worker that is starting, and its process id."""
        found: list[Any] = []

        def accept() -> None:
            with contextlib.suppress(OSError, EOFError, multiprocessing.AuthenticationError):
                found.append(self._listener.accept())

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            if process.poll() is not None:
                raise RuntimeError(f"a worker process ended with status {process.returncode} at its start")
        if not found:
            raise RuntimeError("a worker process could not connect")
        _, pid = found[0].recv()
        return found[0], pid

    def stop(self) -> None:
        """End the workers; the next probe starts others."""
        for channel, pid in zip(self._channels, self._pids, strict=True):
            channel.close()
            with contextlib.suppress(OSError):
                os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))
        self._channels, self._pids = [], []

    def close(self) -> None:
        """End all processes."""
        self.stop()
        if self._nursery is not None:
            self._nursery.close()
        for process in self._processes:
            process.kill()
            process.wait()
        self._listener.close()


# --------------------------------------------------------------------------------------------------
# What is in use


def describe(adapters: Any) -> dict[str, Any]:
    """The adapters and the pieces in use, as what a worker needs to have the same ones."""
    files: dict[str, list[str]] = {}
    wrong: dict[str, list[tuple[str, str]]] = {}
    for piece, origin in swap.origins().items():
        current = swap.current(piece)
        if current is swap.reference(piece) or piece in swap.fast_pieces():
            continue
        if piece in swap.user_pieces():
            path = sys.modules[current.__module__].__file__
            assert path is not None, origin
            files.setdefault(path, []).append(piece)
        else:
            wrong[piece] = _names_of(current)
    file = adapters._module.__file__
    return {"adapters": file, "files": files, "mistakes": wrong, "path": sys.path, "folder": os.getcwd()}


def _names_of(wrong: Any) -> list[tuple[str, str]]:
    """Step and name of a mistake of the catalogue, or of the two that a class derives from."""
    for step in judge.STEPS:
        if f"{mistakes.__name__}.{step}" in sys.modules:
            for mistake in judge.load(step).mistakes:
                if mistake.wrong is wrong:
                    return [(step, mistake.name)]
    if isinstance(wrong, type) and wrong.__name__ == "Both":
        return [name for base in wrong.__bases__ for name in _names_of(base)]
    raise ValueError(f"ranks must know where a piece comes from: a file or the catalogue, got {wrong!r}")


def _to_tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {key: _to_tensors(each) for key, each in value.items()}
    return type(value)(map(_to_tensors, value)) if isinstance(value, list | tuple) else value
