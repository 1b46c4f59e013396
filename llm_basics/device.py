"""Where to compute, and how precisely."""

import contextlib

import torch


def choose(name: str) -> torch.device:
    """The device called `name`; for "auto" the first of cuda, mps and cpu that is there.

    Raises ValueError if it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the device must be there and usable, got {name} ({reason}); try auto") from None
    return torch.device(name)


def precision(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """Inside, multiply in bfloat16 if `dtype` says so, or is "auto" and CUDA can; weights stay float32."""
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" or (dtype == "auto" and has_bfloat16):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
