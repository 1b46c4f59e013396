"""Triton: a Python function as a kernel, many copies of which run at once on a graphics card.

Each copy, a program, knows its number, loads tiles of tensors into registers, calculates there and stores
what comes out. The narrow place is between the card's memory and its arithmetic: an H200 loads some 5 TB a
second and does some 800 * 10^12 operations, 160 for each byte. So the kernels here are about what need not be
moved; what they cannot take, the references calculate. Without a card, TRITON_INTERPRET=1, set before Triton
is imported, lets NumPy run the programs one after the other.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import triton
from torch import Tensor
from triton import language as tl

# whether kernels become Python that calls NumPy: Triton decides that for each when it is defined
INTERPRETED = bool(triton.knobs.runtime.interpret)

# what the arguments of kernels are, for who reads them; Triton finds out for itself
Pointer: TypeAlias = Any
Number: TypeAlias = Any
Tile: TypeAlias = Any


def kernel(function: Callable[..., Any]) -> Any:
    """`function` as a kernel, or a part of kernels; compiled at the first call with each kind of argument."""
    # tests wrap functions to check their annotations; Triton has no use for that
    return triton.jit(inspect.unwrap(function))


def try_out(device: torch.device) -> None:
    """Compile a kernel for a card and run it. Raises what Triton does, and RuntimeError if it is wrong."""
    found = torch.zeros(1, device=device)
    with on_device_of(found):
        _add_one[(1,)](found)
    if found.item() != 1:
        raise RuntimeError(f"a kernel that adds 1 to 0 must give 1, got {found.item()}")


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass whose results have no gradients themselves: refuse where some are asked for.

    Torch's decorator of that name lets them be 0 where the gradient that comes in is a constant.
    """

    @functools.wraps(backward)
    def checked(*args: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "create_graph must be False where a Triton kernel was called, got True: its gradients have "
                "none themselves; call functional.scaled_dot_product_attention instead"
            )
        return backward(*args)

    return checked


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch kernels on the card that `tensor` is on, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# without annotations: Triton does not look up names of this file in them
@kernel
def _add_one(number):  # type: ignore[no-untyped-def]
    tl.store(number, tl.load(number) + 1)


def block_size(n: int, most: int) -> int:
    """The power of two that holds `n`, but `most` at most: the side of a tile.

    >>> block_size(1, 64), block_size(17, 64), block_size(100, 64)
    (1, 32, 64)
    """
    return min(triton.next_power_of_2(n), most)
