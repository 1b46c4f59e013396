"""Products of matrices: by the library that is faster here, and several of one input as one."""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as tF
from jaxtyping import Float
from torch import Tensor

# to put weights side by side is to copy them, which takes about as long as to multiply them by a few rows
LEAST_ROWS = 64


@functools.cache
def onednn_is_wider() -> bool:
    """Whether oneDNN multiplies float32 matrices by wider instructions here than MKL, which torch calls.

    MKL uses AVX-512 on Intel alone: one core of an AMD EPYC of 2024 reached 100 GFLOP/s by it, 230 by oneDNN.
    Two cores of an Intel of 2023 reach 330 by both, and 140 by oneDNN for the gradients of weights.
    """
    has_avx512 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_avx512 and not is_of_intel()


def is_of_intel() -> bool:
    """Whether the processor says that Intel made it; where nobody can ask, no."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _product(
    x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None
) -> Float[Tensor, "... d_out"]:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _WideLinear(torch.autograd.Function):
    """`x W^T + b` by oneDNN; the gradients are two more products of that form."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _product(dy, weight.T, None) if needs_x else None,
            _product(rows.T, x.flatten(0, -2).T, None) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def linear(
    x: Float[Tensor, "... d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None = None,
) -> Float[Tensor, "... d_out"]:
    """`x W^T + b`, by oneDNN where that is faster."""
    if (
        # a compiler has products of its own
        not torch.compiler.is_compiling()
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.dim() > 1
        and x.numel() > 0
        and onednn_is_wider()
        and not torch.is_autocast_enabled("cpu")
    ):
        return _WideLinear.apply(x, weight, bias)
    return tF.linear(x, weight, bias)


def pays_to_merge(x: Float[Tensor, "... d_in"]) -> bool:
    """Whether `x` has so many rows that one large product is faster than several, with the copy it needs."""
    return x.shape[:-1].numel() >= LEAST_ROWS


def merged(
    x: Float[Tensor, "... d_in"],
    weights: Sequence[Float[Tensor, "_ d_in"]],
    biases: Sequence[Float[Tensor, " _"] | None],
) -> tuple[Float[Tensor, "... _"], ...]:
    """`x W^T + b` of several weights and biases, in one product: one kernel, and `x` is read once."""
    given = [bias for bias in biases if bias is not None]
    assert len(given) in (0, len(weights)), "all projections have a bias, or none"
    together = linear(x, torch.cat(list(weights)), torch.cat(given) if given else None)
    return together.split([len(weight) for weight in weights], dim=-1)
