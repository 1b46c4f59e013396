"""`core.functional` by torch's fused kernels, which read and write each tensor once."""

import torch
import torch.nn.functional as tF
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_basics.core import functional as reference
from llm_basics.fast.cpu import linear as cpu_linear

# bound here because `swap` replaces the name in the reference module
reference_apply_rope = reference.apply_rope

# --------------------------------------------------------------------------------------------------
# Lookup and projection


def linear(
    x: Float[Tensor, "... d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None = None,
) -> Float[Tensor, "... d_out"]:
    """`functional.linear` by oneDNN where it is faster than MKL."""
    return cpu_linear.linear(x, weight, bias)


def embedding(
    token_ids: Int[Tensor, "..."], weight: Float[Tensor, "vocab d_model"]
) -> Float[Tensor, "... d_model"]:
    """`functional.embedding`."""
    return tF.embedding(token_ids, weight)


# --------------------------------------------------------------------------------------------------
# Activations


def gelu(x: Float[Tensor, "..."], approximate: str = "none") -> Float[Tensor, "..."]:
    """`functional.gelu` in one pass."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    return tF.gelu(x, approximate=approximate)


def silu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`functional.silu` in one pass."""
    return tF.silu(x)


def swiglu(
    x: Float[Tensor, "... d_model"],
    w1: Float[Tensor, "d_ff d_model"],
    w2: Float[Tensor, "d_model d_ff"],
    w3: Float[Tensor, "d_ff d_model"],
) -> Float[Tensor, "... d_model"]:
    """`functional.swiglu`; on a GPU, gates and values are one product (no gain on a CPU)."""
    if x.is_cuda and cpu_linear.should_merge(x):
        gates, values = cpu_linear.merged(x, [w1, w3], [None, None])
    else:
        gates, values = linear(x, w1), linear(x, w3)
    return linear(silu(gates) * values, w2)


def relu2(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`functional.relu2` as a product, whose derivative is cheaper than a power's."""
    rectified = tF.relu(x)
    return rectified * rectified


# --------------------------------------------------------------------------------------------------
# Normalization


class _RMSNorm(torch.autograd.Function):
    """`x / sqrt(mean(x^2) + eps) * weight`; saves `x` and one scale per row for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[no-untyped-def]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = (norm.square() / x.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, weight, scale = ctx.saved_tensors
        normalized = x * scale
        dweight = (dy * normalized).flatten(0, -2).sum(0)
        dy = dy * weight
        # normalization is invariant to the length of x: the gradient component along x vanishes
        along = (dy * normalized).mean(-1, keepdim=True)
        return dy.sub_(normalized.mul_(along)).mul_(scale), dweight, None


def rms_norm(
    x: Float[Tensor, "... d_model"], weight: Float[Tensor, " d_model"], eps: float = 1e-5
) -> Float[Tensor, "... d_model"]:
    """`functional.rms_norm` with a hand-written gradient."""
    if x.dtype == weight.dtype == torch.float32 and x.dim() > 1 and not torch.compiler.is_compiling():
        return _RMSNorm.apply(x, weight, eps)
    return tF.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


def layer_norm(
    x: Float[Tensor, "... d_model"],
    weight: Float[Tensor, " d_model"],
    bias: Float[Tensor, " d_model"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "... d_model"]:
    """`functional.layer_norm` in one pass."""
    return tF.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# Positions and attention


def apply_rope(
    x: Float[Tensor, "... seq d_head"],
    cos: Float[Tensor, "... seq half"],
    sin: Float[Tensor, "... seq half"],
) -> Float[Tensor, "... seq d_head"]:
    """`functional.apply_rope` as one product of complex numbers, a pair of features each."""
    if torch.compiler.is_compiling():
        # inductor does not compile complex numbers
        return reference_apply_rope(x, cos, sin)
    wide = reference.to_float32(x)
    pairs = wide.unflatten(-1, (-1, 2))
    # view_as_complex needs the two numbers of a pair adjacent, at an even offset
    if pairs.stride(-1) != 1 or any(stride % 2 for stride in (*pairs.stride()[:-1], pairs.storage_offset())):
        pairs = pairs.clone(memory_format=torch.contiguous_format)
    rotations = torch.complex(cos.to(wide.dtype), sin.to(wide.dtype))
    return torch.view_as_real(torch.view_as_complex(pairs) * rotations).flatten(-2).to(x.dtype)


def scaled_dot_product_attention(
    query: Float[Tensor, "... queries d_k"],
    key: Float[Tensor, "... keys d_k"],
    value: Float[Tensor, "... keys d_v"],
    mask: Bool[Tensor, "... queries keys"] | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> Float[Tensor, "... queries d_v"]:
    """`functional.scaled_dot_product_attention` by torch's fused kernels, which never store the scores."""
    if is_causal and mask is not None:
        raise ValueError("give attention either a mask or is_causal=True, got both; combine them in the mask")
    return tF.scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal)


# --------------------------------------------------------------------------------------------------
# The objective


def cross_entropy(
    logits: Float[Tensor, "... vocab"],
    targets: Int[Tensor, "..."],
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    """`functional.cross_entropy` in two passes."""
    wide, flat = reference.to_float32(logits).reshape(-1, logits.shape[-1]), targets.flatten().long()
    counted = flat != ignore_index
    losses = tF.cross_entropy(wide, flat, ignore_index=ignore_index, reduction="none")
    if z_loss:
        losses = losses + z_loss * wide.logsumexp(-1).square() * counted
    if reduction == "none":
        return losses.view(targets.shape).to(logits.dtype)
    if reduction == "sum":
        return losses.sum().to(logits.dtype)
    if reduction == "mean":
        return (losses.sum() / counted.sum().clamp(min=1)).to(logits.dtype)
    raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
