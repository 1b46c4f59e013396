"""Adapters: the functions of `adapters.py`, through which checks call every piece.

The file is in `tests/`, where teachers read and copy it; a wheel has a copy of it in this folder.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from llm_basics import swap, user_code

FOLDER = Path(__file__).resolve().parent


class MissingAdapter(BaseException):
    """An adapters file has no function of this name."""


class Adapters:
    """The functions of an adapters file. `missing` is called with the name of one that it lacks."""

    def __init__(self, module: ModuleType, missing: Callable[[str], Any] | None = None) -> None:
        self._module = module
        self._missing = missing
        self.used: set[str] = set()
        # foreign adapters may copy weights into layers, and then no gradient reaches them
        path = Path(getattr(module, "__file__", None) or ".").resolve()
        self.keeps_weights = path == own_path()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(("run_", "get_")):
            raise AttributeError(name)
        self.used.add(name)
        if not hasattr(self._module, name) or (self.keeps_weights and _is_later(name)):
            if self._missing is not None:
                self._missing(name)
            raise MissingAdapter(name)
        return getattr(self._module, name)


def _is_later(adapter: str) -> bool:
    """Whether an adapter needs the second stage of a step, and the piece in use is of the first."""
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


def run_file(path: Path) -> ModuleType:
    """Execute an adapters file and return its module."""
    name = f"adapters_{abs(hash(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
