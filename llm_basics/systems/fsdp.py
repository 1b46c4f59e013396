"""Fully sharded data parallelism: weights, gradients and optimizer state are sharded over the ranks.

Each rank stores a `world`-th of every weight. Reading a weight gathers it from all ranks, while a layer
computes with it; backward gathers it again, and reduce-scatters its gradient to the shards (ZeRO stage 3,
arXiv 1910.02054; FSDP, arXiv 2304.11277). A weight is a property that gathers, as in SimpleFSDP (arXiv
2411.00284), so the code of the module is unchanged.
"""

import math
import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn


def shard(tensor: Float[Tensor, "..."]) -> Float[Tensor, " shard"]:
    """This rank's part of a tensor: flat, padded with zeros to a multiple of the number of ranks."""
    world_size = dist.get_world_size()
    size = -(-tensor.numel() // world_size)
    padded = torch.zeros(size * world_size, dtype=tensor.dtype, device=tensor.device)
    padded[: tensor.numel()] = tensor.flatten()
    return padded.view(world_size, size)[dist.get_rank()].clone()


def unshard(part: Float[Tensor, " shard"], shape: torch.Size) -> Float[Tensor, "..."]:
    """The full tensor, gathered from the shards of all ranks, without padding."""
    full = torch.empty(len(part) * dist.get_world_size(), dtype=part.dtype, device=part.device)
    dist.all_gather_into_tensor(full, part)
    return full[: math.prod(shape)].view(shape)


class GatherWeight(torch.autograd.Function):
    """Forward: gather a weight in the compute dtype. Backward: the mean gradient of this rank's shard.

    Gradients are reduced in the dtype of the shard (float32), so that sums do not lose small ones.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Gather the shards of all ranks; half precision halves the bytes that are sent."""
        ctx.dtype = part.dtype
        return unshard(part.to(dtype), shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Reduce-scatter the gradient, padded as the weight is."""
        world_size, n = dist.get_world_size(), gradient.numel()
        size = -(-n // world_size)
        padded = torch.zeros(size * world_size, dtype=ctx.dtype, device=gradient.device)
        padded[:n] = gradient.flatten()
        own = padded.new_empty(size)
        dist.reduce_scatter_tensor(own, padded)
        return own / world_size, None, None


class SavedWeight(NamedTuple):
    """A view of a gathered weight as saved by autograd: the shard to gather it from, and the view."""

    part: Tensor
    shape: torch.Size
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class FullyShardedDataParallel(nn.Module):
    """Wrap a module so that each rank stores a shard of every weight and trains on its part of the batch.

    The parameters become flat float32 shards, as does the optimizer state. With `compute_dtype`, weights and
    floating-point inputs are converted to it, while shards and the reduction of gradients stay in float32.
    `module` is changed in place; every rank starts with the weights of rank 0.
    """

    def __init__(self, module: nn.Module, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.module = module
        self.compute_dtype = compute_dtype
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, src=0)
        self._shapes: dict[nn.Parameter, torch.Size] = {}
        # live gathered weights by the address of their memory
        self._gathered: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._parts: dict[int, nn.Parameter] = {}
        # a tied weight has one shard
        shards: dict[nn.Parameter, nn.Parameter] = {}
        for owner in list(module.modules()):
            own = {name: weight for name, weight in owner._parameters.items() if weight is not None}
            for name, weight in own.items():
                if weight not in shards:
                    part = nn.Parameter(shard(weight.detach().float()), weight.requires_grad)
                    shards[weight], self._shapes[part] = part, weight.shape
                owner._parameters[name] = shards[weight]
            properties: dict[str, Any] = {name: self._weight(name) for name in own}
            if own:
                owner.__class__ = type(f"Sharded{type(owner).__name__}", (type(owner),), properties)

    def _weight(self, name: str) -> property:
        """The property that replaces a weight by the gathered one."""
        return property(lambda owner: self._gather(owner._parameters[name]))

    def _gather(self, part: nn.Parameter) -> Tensor:
        weight = GatherWeight.apply(part, self._shapes[part], self.compute_dtype or part.dtype)
        address = weight.untyped_storage().data_ptr()
        self._gathered[address], self._parts[address] = weight, part
        return weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; autograd saves references to shards instead of gathered weights."""
        if self.compute_dtype is not None:
            args = tuple(self._converted(value) for value in args)
            kwargs = {name: self._converted(value) for name, value in kwargs.items()}
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return self.module(*args, **kwargs)

    def _converted(self, value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.compute_dtype) if is_float else value

    def _pack(self, tensor: Tensor) -> Tensor | SavedWeight:
        address = tensor.untyped_storage().data_ptr()
        if self._gathered.get(address) is None:
            return tensor
        part = self._parts[address]
        view = tensor.size(), tensor.stride(), int(tensor.storage_offset())
        return SavedWeight(part, self._shapes[part], tensor.dtype, *view)

    def _unpack(self, saved: Tensor | SavedWeight) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        full = unshard(saved.part.detach().to(saved.dtype), saved.shape)
        return full.as_strided(saved.size, saved.stride, saved.offset)

    @torch.no_grad()
    def gather_full_params(self) -> dict[str, Tensor]:
        """Every weight in float32 by its name in the module; a tied one under its first name."""
        named = self.module.named_parameters()
        return {name: unshard(part.detach(), self._shapes[part]) for name, part in named}
