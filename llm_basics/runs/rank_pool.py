"""A pool of reused gloo processes with one thread each, and detection of deadlocks.

Every rank runs the same task. If all unfinished ranks are idle, without CPU time and without a thread that is
ready to run, they are deadlocked: the result is the position of each, and the workers are replaced. On a busy
machine, a process that waits for a processor does not count as idle.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import threading
from multiprocessing import connection
from typing import Any

import torch.distributed as dist

# idle reports (rank_worker.TICK_SECONDS) of a deadlock: of all ranks, or of the others after some have ended
ALL_IDLE, OTHERS_IDLE = 10, 5

# on other systems, libraries start threads that a fork would lose
FORKS = sys.platform == "linux"

# the start of a worker's program, which reads its parameters from one line of input
START = "import json, sys; start = json.loads(sys.stdin.readline()); sys.path[:] = start['path']; "
HIDDEN = {"TORCH_CPP_LOG_LEVEL": "ERROR", "TORCH_DISTRIBUTED_DEBUG": "OFF"}
LOOPBACK = {"linux": "lo", "darwin": "lo0"}


class Pool:
    """Worker processes, as many as the largest number of ranks so far."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._key = secrets.token_bytes(32)
        self._listener = connection.Listener(authkey=self._key)
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=False)
        self._numbers = itertools.count()
        self._channels: list[Any] = []
        self._pids: list[int] = []
        # a process that forks workers, to import torch only once
        self._nursery: Any = None
        self._processes: list[subprocess.Popen[bytes]] = []

    def run(self, task: dict[str, Any], world_size: int, name: str, cpu_seconds: float) -> list[Any]:
        """Kind and value of each rank's result for a task; the kinds hangs, stopped and crashed are failures.

        Starts missing workers, which prepare for `name`.
        """
        while len(self._channels) < world_size:
            self._start(len(self._channels), name)
        number = next(self._numbers)
        task = task | {"world_size": world_size, "number": number, "port": self._store.port}
        try:
            for channel in self._channels[:world_size]:
                channel.send(task)
            return self._results(number, world_size, cpu_seconds)
        except BaseException:
            self.stop()
            raise

    def _results(self, number: int, world_size: int, limit_seconds: float) -> list[Any]:
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
                        if cpu_seconds > limit_seconds and results[rank] is None:
                            results[rank] = ("stopped", f"{cpu_seconds:.0f} s of CPU time")
                            return self._ended(results, positions)
            waiting = [rank for rank in range(world_size) if None in results and results[rank] is None]
            waiting = waiting or [rank for rank in range(world_size) if not ready[rank]]
            limit = ALL_IDLE if len(waiting) == world_size else OTHERS_IDLE
            if waiting and min(idle[rank] for rank in waiting) >= limit:
                return self._ended(results, positions)
        return results

    def _ended(self, results: list[Any], positions: list[str]) -> list[Any]:
        """The results if some ranks did not finish; the workers are replaced."""
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

    def _start(self, rank: int, name: str) -> None:
        """Start the worker of a rank, forked from a process that has imported torch if possible."""
        if FORKS:
            if self._nursery is None:
                self._nursery, _ = self._launch(None)
            self._nursery.send((rank, name))
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
        # a new session: Ctrl-C ends only this process, and workers exit with it
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", START + self._program],
            stdin=subprocess.PIPE,
            # gloo prints a message when it ends a process
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
        """The connection of the starting worker, and its process id."""
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
        """End the workers; the next task starts new ones."""
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
