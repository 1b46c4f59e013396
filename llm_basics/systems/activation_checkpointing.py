"""Activation checkpointing: trades computation for memory (arXiv 1604.06174).

Normally a layer saves its activations for the backward pass. `checkpoint` saves only its arguments: it runs
the layer without a graph, and again with one in the backward pass. The second run must repeat the first, so
the random state is restored for it: otherwise dropout would zero other units. But: it does not restore
autocast, as `torch.utils.checkpoint` does.

    >>> x = torch.tensor([3.0], requires_grad=True)
    >>> checkpoint(torch.square, x).backward()
    >>> x.grad
    tensor([6.])
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def random_states() -> list[Tensor]:
    """The states of the generators: of the CPU, and of each GPU in use.

    >>> before = random_states()
    >>> first = torch.rand(2)
    >>> with restored_random_states(before):
    ...     torch.equal(torch.rand(2), first)
    True
    """
    states = [torch.get_rng_state()]
    return states + (torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])


@contextlib.contextmanager
def restored_random_states(states: list[Tensor]) -> Iterator[None]:
    """Set the random states within the context; then restore the previous ones."""
    before = random_states()

    def restore(target: list[Tensor]) -> None:
        torch.set_rng_state(target[0])
        for device, state in enumerate(target[1:]):
            torch.cuda.set_rng_state(state, device)

    restore(states)
    try:
        yield
    finally:
        restore(before)


class Checkpoint(torch.autograd.Function):
    """Runs `function(*args)` without a graph, and again with one in the backward pass."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """The output. Saves only the arguments and the random states."""
        ctx.function, ctx.random_states = function, random_states()
        # save_for_backward detects tensors that are modified in place
        ctx.others = [None if isinstance(arg, Tensor) else arg for arg in args]
        ctx.is_tensor = [isinstance(arg, Tensor) for arg in args]
        ctx.save_for_backward(*(arg for arg in args if isinstance(arg, Tensor)))
        return function(*args)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        """Recomputes the function with the same random states, and runs its backward pass."""
        saved, args = iter(ctx.saved_tensors), list(ctx.others)
        for i, is_tensor in enumerate(ctx.is_tensor):
            if is_tensor:
                tensor = next(saved)
                args[i] = tensor.detach().requires_grad_(tensor.requires_grad)
        with torch.enable_grad(), restored_random_states(ctx.random_states):
            output = ctx.function(*args)
        # not autograd.grad, since gradients also accumulate in the function's parameters
        torch.autograd.backward(output, grad_output)
        return (None, *(arg.grad if isinstance(arg, Tensor) else None for arg in args))


def checkpoint(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)`, with only the arguments saved for the backward pass, not the activations.

    Gradients of the arguments and of the function's parameters are unchanged. Raises ValueError if no
    argument requires a gradient, since the output and the parameters would then have none.

    >>> x = torch.ones(2, requires_grad=True)
    >>> checkpoint(lambda x, factor: (factor * x).exp().sum(), x, 2.0).backward()
    >>> x.grad
    tensor([14.7781, 14.7781])
    """
    needs_gradient = any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
    if torch.is_grad_enabled() and not needs_gradient:
        raise ValueError(
            f"an argument must require a gradient, got none among {len(args)} (checkpoint); call "
            "requires_grad_() on one, or the function without checkpoint"
        )
    return Checkpoint.apply(function, *args)
