"""Triton compiles Python functions to GPU kernels.

Many instances of a kernel, its programs, run at once; each loads tiles of tensors into registers, computes,
and stores the result. Memory bandwidth is the bottleneck: an H200 loads about 5 TB/s and computes about 800
TFLOP/s, 160 operations per byte. The kernels here therefore save memory traffic; unsupported inputs use the
reference. With TRITON_INTERPRET=1, set before Triton is imported, NumPy runs the programs without a GPU.
"""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import triton
from torch import Tensor
from triton import language as tl

# whether kernels are interpreted with NumPy, which Triton decides when they are defined
INTERPRETED = bool(triton.knobs.runtime.interpret)

# annotations of kernel arguments for readers; Triton infers the types
Pointer: TypeAlias = Any
Number: TypeAlias = Any
Tile: TypeAlias = Any


def kernel(function: Callable[..., Any]) -> Any:
    """A kernel, or a function called by kernels; compiled at the first launch with each argument type."""
    # tests wrap functions to check shapes, which Triton cannot compile
    return triton.jit(inspect.unwrap(function))


def check_device(device: torch.device) -> None:
    """Compile and run a kernel on `device`; raises Triton's error, or RuntimeError for a wrong result."""
    result = torch.zeros(1, device=device)
    with on_device_of(result):
        _add_one[(1,)](result)
    if result.item() != 1:
        raise RuntimeError(f"a kernel that adds 1 to 0 must give 1, got {result.item()}")


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch kernels on the GPU of `tensor`, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# not annotated: Triton cannot resolve this file's names in annotations
@kernel
def _add_one(number):  # type: ignore[no-untyped-def]
    tl.store(number, tl.load(number) + 1)


def block_size(n: int, most: int) -> int:
    """The next power of two of `n`, at most `most`: the side of a tile.

    >>> block_size(1, 64), block_size(17, 64), block_size(100, 64)
    (1, 32, 64)
    """
    return min(triton.next_power_of_2(n), most)
