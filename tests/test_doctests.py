"""The examples in the docstrings. Alone: `uv run pytest tests/test_doctests.py`."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import llm_basics

MODULES = [module.name for module in pkgutil.walk_packages(llm_basics.__path__, prefix="llm_basics.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name):
    if "triton" in name or name.endswith(".kernels"):
        pytest.importorskip("triton", reason="Triton is for Linux")
    if name.endswith("lm_harness"):
        pytest.importorskip("lm_eval", reason="uv sync --extra eval")
    module = importlib.import_module(name)
    results = doctest.testmod(module)
    assert results.failed == 0
    assert results.attempted > 0 or ">>> " not in inspect.getsource(module), (
        "no example of the module was found"
    )
