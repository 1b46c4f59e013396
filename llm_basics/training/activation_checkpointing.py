"""Activation checkpointing: save only the input of each block, and recompute its activations in the backward
pass (arXiv 1604.06174).

Losses and gradients are unchanged. A step takes about a third more operations.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import checkpoint

from llm_basics.core import model as models


def apply(model: nn.Module) -> None:
    """Recompute each block of `model` in the backward pass.

    The wrapper is an instance attribute `forward`: names of modules and weights do not change, and kernels
    that would bypass the blocks are disabled. Raises ValueError for a user model that does not call them.
    """
    blocks = list(getattr(model, "layers", []))
    if type(model).__module__ != models.__name__ and not (blocks and _is_called(blocks[0], model)):
        raise ValueError(
            "train.activation_checkpointing must be off for a model that does not call the blocks in its "
            f"`layers`, got {type(model).__name__} of {type(model).__module__}; call each as block(x, ...)"
        )
    for block in blocks:
        vars(block)["forward"] = functools.partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`forward`, recomputed in the backward pass with the same random state of torch."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _is_called(block: nn.Module, model: nn.Module) -> bool:
    """Whether `model` runs the forward method of `block`, tested with an identity in its place."""
    calls: list[Any] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append((*args, *kwargs.values())[0])
        return calls[0]

    vars(block)["forward"] = forward
    tokens = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(tokens)
    finally:
        del vars(block)["forward"]
    return bool(calls)
