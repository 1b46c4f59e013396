"""Processes that stay, and measure something each time that they are asked."""

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

from llm_basics.core import device

# the only number of an answer where memory was not enough
FAILED = "failed"


class Worker:
    """A process with `environment` added, which gives the next of `make_answers(*arguments)` when asked.

    In between it sleeps.
    """

    def __init__(
        self,
        make_answers: Callable[..., Iterator[dict[str, float]]],
        arguments: Sequence[Any],
        environment: Mapping[str, str],
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, make_answers, *arguments), name=str(arguments[0])
        )
        with mock.patch.dict(os.environ, environment):
            self.process.start()
        theirs.close()
        # libraries are loaded before anybody measures
        self._hear()

    def ask(self) -> dict[str, float]:
        """Its next answer, when it comes."""
        self.connection.send(None)
        return self._hear()

    def _hear(self) -> dict[str, float]:
        try:
            return self.connection.recv()
        except EOFError:
            raise RuntimeError(f"{self.process.name} ended without an answer; see above for why") from None

    def close(self) -> None:
        self.connection.close()
        self.process.join(timeout=10)
        self.process.kill()


def _serve(
    connection: Connection, make_answers: Callable[..., Iterator[dict[str, float]]], *arguments: Any
) -> None:
    """Answer until nobody is there to ask."""
    with contextlib.suppress(EOFError, BrokenPipeError):
        answers = None
        connection.send({})
        while True:
            connection.recv()
            try:
                answers = answers or make_answers(*arguments)
                connection.send(next(answers))
            except (RuntimeError, MemoryError) as error:
                if not device.is_out_of_memory(error):
                    raise
                connection.send({FAILED: 1.0})
                return


def wait(chosen: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if chosen.type == "cuda":
        torch.cuda.synchronize(chosen)


def let_go(chosen: torch.device) -> None:
    """Leave to others the memory that a sleeper does not need."""
    if chosen.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory(chosen: torch.device) -> float:
    """The most bytes that were in use, on a GPU by tensors, else by this process; 0 where nobody says."""
    if chosen.type == "cuda":
        return torch.cuda.max_memory_allocated(chosen)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * float(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0.0)


def rates_of_products(chosen: torch.device, dtypes: Sequence[str]) -> Iterator[dict[str, float]]:
    """Floating-point operations a second in products of large matrices, by dtype and engine."""
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
                wait(chosen)
                start = time.perf_counter()
                for _ in range(n_times):
                    product(*pair)
                wait(chosen)
                seconds.append((time.perf_counter() - start) / n_times)
            rates[f"{dtype} {engine}"] = 2 * size**3 / min(seconds)
        yield rates
