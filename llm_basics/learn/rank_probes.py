"""The worker of probes on several ranks: sets up the pieces of the parent and runs a probe's function."""

import contextlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_basics import swap
from llm_basics.learn import checks, judge, messages, probes, sockets
from llm_basics.runs import rank_worker

# by path: modification time, and the loaded object
_LOADED: dict[str, tuple[int, Any]] = {}


def main(start: dict[str, Any]) -> None:
    """Run a worker of a `rank_pool.Pool`."""
    rank_worker.main(start, run, prepare)


def prepare(step: str) -> None:
    """Import the catalogue of a step and the adapters, before workers are forked."""
    # imported by the first optimizer, in a second or more
    import torch._dynamo  # noqa: F401

    sockets.own()
    if step in judge.STEPS:
        judge.load(step)


def run(task: dict[str, Any]) -> tuple[str, Any]:
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


@contextlib.contextmanager
def _pieces(task: dict[str, Any]) -> Iterator[None]:
    """Use the pieces of the parent within the context: from files, and mistakes by step and name."""
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
    """The function of a probe of a step, or of a Python file."""
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
    """The object loaded from a file, cached until the file changes."""
    changed = Path(path).stat().st_mtime_ns
    if path not in _LOADED or _LOADED[path][0] != changed:
        _LOADED[path] = (changed, load(path))
    return _LOADED[path][1]


def to_arrays(value: Any) -> Any:
    """`value` with tensors converted to arrays, which are sent as copies, not as shared memory."""
    if isinstance(value, Tensor):
        return value.detach().numpy().copy()
    if isinstance(value, dict):
        return {key: to_arrays(each) for key, each in value.items()}
    return type(value)(map(to_arrays, value)) if isinstance(value, list | tuple) else value
