"""The sockets of this package: the functions of `adapters.py`, through which every piece is reached.

The file belongs to the tests, where teachers read and copy it. A wheel has a copy of it in this folder.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).resolve().parent


class NotThere(BaseException):
    """An adapters file has no function of this name."""


class Adapters:
    """The functions of an adapters file. What to do about one that it lacks, `missing` says."""

    def __init__(self, module: ModuleType, missing: Callable[[str], Any] | None = None) -> None:
        self._module = module
        self._missing = missing
        self.used: set[str] = set()
        # a foreign one may copy them into layers, and then no gradient reaches them
        path = Path(getattr(module, "__file__", None) or ".").resolve()
        self.takes_weights_as_they_are = path == own_path()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(("run_", "get_")):
            raise AttributeError(name)
        self.used.add(name)
        if not hasattr(self._module, name):
            if self._missing is not None:
                self._missing(name)
            raise NotThere(name)
        return getattr(self._module, name)


def own_path() -> Path:
    """The adapters of this package: beside this file in a wheel, among the tests in a clone."""
    places = (FOLDER / "adapters.py", FOLDER.parents[1] / "tests" / "adapters.py")
    for path in places:
        if path.is_file():
            return path
    raise FileNotFoundError(f"there must be {places[0]} or {places[1]}; install llm_basics again")


@functools.cache
def own() -> Adapters:
    """The adapters of this package."""
    return Adapters(run_file(own_path()))


def run_file(path: Path) -> ModuleType:
    """The module that an adapters file makes."""
    name = f"adapters_{abs(hash(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
