"""Tensor parallelism of one MLP: every rank computes with a slice of each matrix, on the whole batch.

The first matrices are split by columns of `x W^T` (each rank has some hidden units), the last by rows (each
rank has the inputs of its hidden units), so the only communication is one all-reduce in forward and one in
backward (Megatron-LM, arXiv 1909.08053).
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from llm_basics.core import functional as F
from llm_basics.core import layers


class CopyToRanks(torch.autograd.Function):
    """Forward: the input, the same on every rank. Backward: the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The input itself."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Sum the contributions to the gradient from the hidden units of all ranks."""
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


class SumOverRanks(torch.autograd.Function):
    """Forward: the sum of the ranks' inputs. Backward: the gradient, the same on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Sum the contributions of the hidden units of all ranks."""
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """The gradient itself, since each contribution occurs once in the sum."""
        return gradient


class ColumnParallelLinear(nn.Module):
    """This rank's rows of the weight (and bias) of a linear layer: some of the outputs."""

    def __init__(self, linear: layers.Linear) -> None:
        super().__init__()
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self.weight = nn.Parameter(linear.weight.detach().tensor_split(world_size)[rank].clone())
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().tensor_split(world_size)[rank].clone())

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out_of_rank"]:
        """The outputs of this rank."""
        return F.linear(CopyToRanks.apply(x), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """This rank's columns of the weight of a linear layer: the contribution of some of the inputs."""

    def __init__(self, linear: layers.Linear) -> None:
        super().__init__()
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self.weight = nn.Parameter(linear.weight.detach().tensor_split(world_size, dim=1)[rank].clone())
        self.bias = nn.Parameter(linear.bias.detach().clone()) if linear.bias is not None else None

    def forward(self, x: Float[Tensor, "... d_in_of_rank"]) -> Float[Tensor, "... d_out"]:
        """The outputs: contributions of all ranks, and the bias once."""
        total = SumOverRanks.apply(F.linear(x, self.weight))
        return total if self.bias is None else total + self.bias


class TensorParallelSwiGLU(nn.Module):
    """A SwiGLU network whose hidden units are divided among the ranks: `W2 (silu(W1 x) * W3 x)`."""

    def __init__(self, ffn: layers.SwiGLU) -> None:
        super().__init__()
        self.w1, self.w3 = ColumnParallelLinear(ffn.w1), ColumnParallelLinear(ffn.w3)
        self.w2 = RowParallelLinear(ffn.w2)

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """The output, the same on every rank."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
