"""Whether Triton can compile for a device: it is not available for every system and every GPU."""

import functools
import sys

import torch


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether a Triton kernel gives the right result on `device`; if not, prints the reason, once."""
    try:
        from llm_basics.fast.cuda import triton_jit

        triton_jit.try_out(device)
    except ModuleNotFoundError:
        return False
    except Exception as error:
        # a missing compiler, or any error of the many tools that it calls
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        print(
            f"Triton cannot be used on {device} ({reason}); PyTorch kernels are used instead", file=sys.stderr
        )
        return False
    return True
