"""Persistent benchmark processes that measure one block per request."""

import contextlib
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from llm_basics.runs import process

# the only key of a result if the process ran out of memory
FAILED = "failed"


class Worker:
    """A process that sends the next item of `measure(*arguments)` per request, and sleeps in between.

    `environment` is added to its environment variables.
    """

    def __init__(
        self,
        measure: Callable[..., Iterator[dict[str, float]]],
        arguments: Sequence[Any],
        environment: Mapping[str, str],
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, measure, *arguments), name=str(arguments[0])
        )
        with mock.patch.dict(os.environ, environment):
            self.process.start()
        theirs.close()
        # libraries are loaded before any measurement
        self._receive()

    def request(self) -> dict[str, float]:
        """The next result (blocks)."""
        self.connection.send(None)
        return self._receive()

    def _receive(self) -> dict[str, float]:
        try:
            return self.connection.recv()
        except EOFError:
            raise RuntimeError(f"{self.process.name} exited without a result; see its output above") from None

    def close(self) -> None:
        self.connection.close()
        self.process.join(timeout=10)
        self.process.kill()


def _serve(
    connection: Connection, measure: Callable[..., Iterator[dict[str, float]]], *arguments: Any
) -> None:
    """Serve requests until the connection is closed."""
    with contextlib.suppress(EOFError, BrokenPipeError):
        results = None
        connection.send({})
        while True:
            connection.recv()
            try:
                results = results or measure(*arguments)
                connection.send(next(results))
            except (RuntimeError, MemoryError) as error:
                if not process.is_out_of_memory(error):
                    raise
                connection.send({FAILED: 1.0})
                return


def synchronize(chosen: torch.device) -> None:
    """Wait for queued GPU work."""
    if chosen.type == "cuda":
        torch.cuda.synchronize(chosen)


def empty_cache(chosen: torch.device) -> None:
    """Release cached GPU memory to the other processes."""
    if chosen.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory(chosen: torch.device) -> float:
    """Peak bytes of tensors on a GPU, else of this process; 0 if unknown."""
    if chosen.type == "cuda":
        return torch.cuda.max_memory_allocated(chosen)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * float(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0.0)


def rates_of_products(chosen: torch.device, dtypes: Sequence[str]) -> Iterator[dict[str, float]]:
    """FLOP/s of large matrix products, by dtype and engine."""
    size, n_times = (8192, 20) if chosen.type == "cuda" else (2048, 3)
    pairs = {
        name: [torch.randn(size, size, device=chosen, dtype=getattr(torch, name)) for _ in range(2)]
        for name in dtypes
    }
    engines: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"torch.mm": torch.mm}
    if chosen.type == "cpu" and torch.backends.mkldnn.is_available():
        engines["oneDNN"] = lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    while True:
        rates = {}
        for (dtype, pair), (engine, product) in itertools.product(pairs.items(), engines.items()):
            product(*pair)
            seconds = []
            for _ in range(3):
                synchronize(chosen)
                start = time.perf_counter()
                for _ in range(n_times):
                    product(*pair)
                synchronize(chosen)
                seconds.append((time.perf_counter() - start) / n_times)
            rates[f"{dtype} {engine}"] = 2 * size**3 / min(seconds)
        yield rates
