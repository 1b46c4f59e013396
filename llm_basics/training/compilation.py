"""Applies activation checkpointing and torch.compile to a model."""

import torch
from torch import nn

from llm_basics import swap
from llm_basics.core import config
from llm_basics.core import model as models
from llm_basics.training import activation_checkpointing

# maximum FLOPs of a step that is bound by kernel launches, so that CUDA graphs help: at 1.2 * 10^12 FLOPs, a
# step on an H200 took 8 to 11 ms with graphs, 17 to 20 ms without
MAX_GRAPH_FLOPS = 2e12


def mode(requested: str, device: torch.device, n_flops: int, can_be_graph: bool) -> str:
    """Resolve `train.compile` for `device` and steps of `n_flops`: off, on or graphs.

    Raises ValueError for graphs on a device without them.
    """
    if requested == "graphs" and device.type != "cuda":
        raise ValueError(f"train.compile graphs needs CUDA, got the device {device}; try on or auto")
    if requested != "auto":
        return requested
    if device.type != "cuda":
        return "off"
    return "graphs" if can_be_graph and n_flops <= MAX_GRAPH_FLOPS else "on"


def apply(
    model: nn.Module, options: config.Config, device: torch.device, of_one_shape: bool, by_block: bool
) -> str:
    """Apply activation checkpointing and compilation by `options`. Returns the resolved compile mode.

    `of_one_shape`: whether all batches have the same shape.
    """
    train, shape = options.train, options.model
    if train.activation_checkpointing:
        activation_checkpointing.apply(model)
    # a CUDA graph requires static shapes, and no reads of values on the host, as in user code
    can_be_graph = train.grad_accumulation_steps == 1 and of_one_shape and not swap.user_pieces()
    n_flops = shape.flops_per_token * train.batch_size * shape.context_length
    resolved = mode(train.compile, device, n_flops, can_be_graph)
    if resolved != "off":
        compile_model(model, resolved == "graphs", by_block)
    return resolved


def compile_model(model: nn.Module, is_graph: bool, by_block: bool) -> None:
    """Compile a model at its first step: whole, or block by block if weights are gathered per block."""
    if by_block:
        for block in _blocks(model):
            block.compile(dynamic=False)
        return
    # user models need not have hidden_states
    part = "forward" if "model.TransformerLM" in swap.user_pieces() else "hidden_states"
    mode = "reduce-overhead" if is_graph else None
    vars(model)[part] = torch.compile(getattr(model, part), dynamic=False, mode=mode)


def uncompile_model(model: nn.Module) -> None:
    """Undo `compile_model`."""
    for part in ("forward", "hidden_states"):
        vars(model).pop(part, None)
    for block in _blocks(model):
        block._compiled_call_impl = None


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [block for block in model.modules() if isinstance(block, models.TransformerBlock)]
