"""Linear layers by the faster of MKL and oneDNN, and several projections of one input as one product."""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as tF
from jaxtyping import Float
from torch import Tensor

# merging copies the weights, at about the cost of a product with a few rows
MIN_ROWS = 64


@functools.cache
def prefers_onednn() -> bool:
    """Whether oneDNN multiplies float32 matrices with wider instructions than MKL, torch's default.

    MKL uses AVX-512 only on Intel: one core of an AMD EPYC (2024) reaches 100 GFLOP/s with MKL, 230 with
    oneDNN. Two cores of an Intel Xeon (2023) reach 330 with both, but 140 with oneDNN for weight gradients.
    """
    has_avx512 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_avx512 and not is_intel()


def is_intel() -> bool:
    """Whether the CPU's vendor is Intel; False if unknown."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _product(
    x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None
) -> Float[Tensor, "... d_out"]:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    """`x W^T + b` by oneDNN, as are its gradients."""

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
    """`x W^T + b`, by oneDNN where it is faster."""
    if (
        # inductor selects its own kernels
        not torch.compiler.is_compiling()
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.dim() > 1
        and x.numel() > 0
        and prefers_onednn()
        and not torch.is_autocast_enabled("cpu")
    ):
        return _OneDNNLinear.apply(x, weight, bias)
    return tF.linear(x, weight, bias)


def should_merge(x: Float[Tensor, "... d_in"]) -> bool:
    """Whether `x` has enough rows for a merged product to outweigh copying the weights."""
    return x.shape[:-1].numel() >= MIN_ROWS


def merged(
    x: Float[Tensor, "... d_in"],
    weights: Sequence[Float[Tensor, "_ d_in"]],
    biases: Sequence[Float[Tensor, " _"] | None],
) -> tuple[Float[Tensor, "... _"], ...]:
    """`x W^T + b` for several weights and biases in one product, which reads `x` once."""
    present = [bias for bias in biases if bias is not None]
    assert len(present) in (0, len(weights)), "either all projections must have a bias or none"
    merged_output = linear(x, torch.cat(list(weights)), torch.cat(present) if present else None)
    return merged_output.split([len(weight) for weight in weights], dim=-1)
