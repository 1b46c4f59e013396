"""Probes on several ranks: each runs the same function, and all are observed.

Workers (`rank_pool`) receive a description of the pieces in use (paths of files, mistakes by name), not code.
A deadlock of ranks is the error "hangs", with the lines at which they wait.
"""

import atexit
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from llm_basics import swap
from llm_basics.learn import judge, mistakes, probes, sockets
from llm_basics.runs import rank_pool

PROGRAM = "from llm_basics.learn import rank_probes; rank_probes.main(start)"


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
    """Check that `function(adapters)` returns `expected(rank)` on every rank.

    `needs` are the adapters that it calls; `ground` is `contract` or `beyond`, as in other probes.
    """

    def seen(adapters: Any) -> probes.Observation:
        for name in needs.split():
            getattr(adapters, name)  # raises MissingAdapter
        return observe((step.name, about), adapters, world_size)

    def right() -> probes.Observation:
        return by_rank([expected(rank) for rank in range(world_size)])

    step.probes.append(probes.Probe(about, seen, right, rtol, atol, on_rank=function, **ground))


def by_rank(seen: list[probes.Observation]) -> probes.Observation:
    """Merge the observations of all ranks."""
    return {f"{facet}, rank {rank}": value for rank, each in enumerate(seen) for facet, value in each.items()}


@functools.cache
def _pool_of(process: int) -> rank_pool.Pool:
    made = rank_pool.Pool(PROGRAM)
    atexit.register(made.close)
    return made


def pool() -> rank_pool.Pool:
    """The workers of this process; forked processes have their own."""
    return _pool_of(os.getpid())


def observe(function: tuple[str, str], adapters: Any, world_size: int = 2) -> probes.Observation:
    """The observation of a function on all ranks, including errors.

    `function` is a step and its probe, or the path of a Python file and the name of a function in it.
    """
    task = describe(adapters) | {"function": function}
    return _concluded(pool().run(task, world_size, function[0], probes.LIMIT_SECONDS))


def _concluded(results: list[Any]) -> probes.Observation:
    """One observation from the result of each rank."""
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
        stopped = [f"{probes.TIMEOUT} {text}" for text in of_kind.get("stopped", [])]
        return {"error": [*errors, *stopped][0]}
    if of_gloo or "crashed" in of_kind:
        # gloo ends the process if a message has an unexpected size
        text = [*of_kind.get("hangs", []), *of_kind.get("crashed", []), *of_gloo][0]
        return {"error": f"mismatch: ranks call different collectives, or with different sizes; {text}"}
    if "hangs" in of_kind:
        return {"error": f"hangs: {'; '.join(of_kind['hangs'])}"}
    return by_rank([_to_tensors(value) for _, value in results])


# --------------------------------------------------------------------------------------------------
# Pieces in use


def describe(adapters: Any) -> dict[str, Any]:
    """A description of the adapters and the pieces in use, for a worker to set up the same ones."""
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
    """Step and name of a mistake of the catalogue, or of the two mistakes that are bases of a class."""
    for step in judge.STEPS:
        if f"{mistakes.__name__}.{step}" in sys.modules:
            for mistake in judge.load(step).mistakes:
                if mistake.wrong is wrong:
                    return [(step, mistake.name)]
    if isinstance(wrong, type) and wrong.__name__ == "Both":
        return [name for base in wrong.__bases__ for name in _names_of(base)]
    raise ValueError(f"pieces on several ranks must be from a file or the catalogue, got {wrong!r}")


def _to_tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {key: _to_tensors(each) for key, each in value.items()}
    return type(value)(map(_to_tensors, value)) if isinstance(value, list | tuple) else value
