"""Adapters: the functions of `adapters.py`, by which checks call every piece.

The file is in `tests/`, for reading and copying by teachers; a wheel has a copy in this folder.
"""

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from llm_basics import swap, user_code

FOLDER = Path(__file__).resolve().parent

# prefixes of the names of adapters
PREFIXES = ("run_", "get_", "ddp_", "fsdp_")


class MissingAdapter(BaseException):
    """Raised if an adapters file lacks a function."""


class Adapters:
    """The functions of an adapters file."""

    # foreign adapters may copy weights into layers, so that the given ones have no gradients
    is_foreign = False

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self.used: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(PREFIXES):
            raise AttributeError(name)
        self.used.add(name)
        if not hasattr(self._module, name) or (not self.is_foreign and _is_later(name)):
            raise MissingAdapter(name)
        return getattr(self._module, name)


def _is_later(adapter: str) -> bool:
    """Whether an adapter needs the second stage of a step, but the piece in use is of the first."""
    own = swap.current("layers.MultiHeadSelfAttention")
    return adapter == "run_grouped_query_attention" and "n_kv_heads" not in user_code.parameters(own)


def own_path() -> Path:
    """Path of the adapters of this package: beside this file in a wheel, in `tests/` in a clone."""
    paths = (FOLDER / "adapters.py", FOLDER.parents[1] / "tests" / "adapters.py")
    for path in paths:
        if path.is_file():
            return path
    raise FileNotFoundError(f"neither {paths[0]} nor {paths[1]} exists; reinstall llm_basics")


@functools.cache
def own() -> Adapters:
    """The adapters of this package."""
    return Adapters(run_file(own_path()))


def run_file(path: Path, name: str = "own_adapters") -> ModuleType:
    """Execute an adapters file as a module of this name, and return it."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
