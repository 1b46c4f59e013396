"""Kernels for a graphics card, where there are any: Triton is not there for every system and every card."""

import functools
import importlib
import sys
import types

import torch


@functools.cache
def kernels(name: str, device: torch.device) -> types.ModuleType | None:
    """The module of kernels `fast/NAME.py`; None where Triton cannot compile for `device`."""
    return importlib.import_module(f"llm_basics.fast.{name}") if _works(device) else None


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether a kernel of Triton does what it says there; if not, that is said."""
    try:
        importlib.import_module("llm_basics.fast.kernels").try_out(device)
    except ModuleNotFoundError:
        return False
    except Exception as error:
        # a compiler that is not there, or one of the many that it calls
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        print(f"Triton cannot be used on {device} ({reason}); torch does its work", file=sys.stderr)
        return False
    return True
