"""Whether Triton works on a device; it does not support every system and GPU."""

import functools
import sys

import torch


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether a Triton kernel runs correctly on `device`; if not, prints the reason once."""
    try:
        from llm_basics.fast.cuda import triton_jit

        triton_jit.check_device(device)
    except ModuleNotFoundError:
        return False
    except Exception as error:
        # a missing compiler, or any error of the toolchain
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        line = f"Triton cannot be used on {device} ({reason}); PyTorch kernels are used instead"
        print(line, file=sys.stderr)
        return False
    return True
