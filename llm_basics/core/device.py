"""Devices: selection, precision and random state."""

import contextlib

import torch

# asynchronous devices, whose results are read a step later
ASYNCHRONOUS = {"cuda"}


def choose(name: str) -> torch.device:
    """The device `name`; for "auto" the first available of cuda, mps and cpu.

    Raises ValueError if it is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the device must be available, got {name} ({reason}); try auto") from None
    return torch.device(name)


def is_bfloat16(device: torch.device, dtype: str) -> bool:
    """Whether forward passes run in bfloat16: `dtype` is bfloat16, or auto and CUDA supports it."""
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return dtype == "bfloat16" or (dtype == "auto" and has_bfloat16)


def precision(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """Autocast to bfloat16 if `is_bfloat16`; weights stay float32."""
    if is_bfloat16(device, dtype):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def matmul_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if `device` has matrix multiplication instructions for it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    return torch.float32
