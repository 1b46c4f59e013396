"""What of a model is recomputed in the backward pass, and what torch.compile compiles."""

import torch
from torch import nn

from llm_basics import swap
from llm_basics.core import config
from llm_basics.core import model as models
from llm_basics.training import activation_checkpointing

# most floating-point operations of a step for which launching kernels dominates, so that CUDA graphs help: at
# 1.2 * 10^12 a step took an H200 8 to 11 ms with graphs, 17 to 20 ms without
MAX_GRAPH_FLOPS = 2e12


def mode(how: str, device: torch.device, n_flops: int, can_be_graph: bool) -> str:
    """Resolve `train.compile` for `device` and steps of `n_flops`: off, on or graphs.

    Raises ValueError for graphs on a device without them.
    """
    if how == "graphs" and device.type != "cuda":
        raise ValueError(f"train.compile graphs needs CUDA, got the device {device}; try on or auto")
    if how != "auto":
        return how
    if device.type != "cuda":
        return "off"
    return "graphs" if can_be_graph and n_flops <= MAX_GRAPH_FLOPS else "on"


def apply(
    model: nn.Module, options: config.Config, device: torch.device, of_one_shape: bool, by_block: bool
) -> str:
    """Let a model recompute activations and compile as `options` ask for. Returns the resolved mode.

    `of_one_shape`: whether all batches have one shape.
    """
    train, shape = options.train, options.model
    if train.activation_checkpointing:
        activation_checkpointing.apply(model)
    # a CUDA graph needs batches of one shape, and cannot read a value on the host as user code may
    can_be_graph = train.grad_accumulation_steps == 1 and of_one_shape and not swap.user_pieces()
    n_flops = shape.flops_per_token * train.batch_size * shape.context_length
    how = mode(train.compile, device, n_flops, can_be_graph)
    if how != "off":
        compile_model(model, how == "graphs", by_block)
    return how


def compile_model(model: nn.Module, is_graph: bool, by_block: bool) -> None:
    """Let a model compile in its first step: whole, or block by block, if weights are gathered between."""
    if by_block:
        for block in _blocks(model):
            block.compile(dynamic=False)
        return
    # a user's model need not have hidden_states
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
