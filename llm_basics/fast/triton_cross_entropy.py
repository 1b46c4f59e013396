"""Cross-entropy in one pass over the logits, by a softmax that does not wait for its maximum.

The logits are the largest tensor of a training step: `tokens * vocab` numbers. Step by step,
`functional.cross_entropy` widens them, finds their maximum, subtracts it, exponentiates and sums. In bfloat16
that moves 6 + 4 + 8 + 8 + 4 = 30 bytes a logit. Only 2 are needed, since the maximum and the sum can be had
together (online softmax, arXiv 1805.02867). When a higher score comes along, what was summed relative to the
old peak is brought down to the new one:

    >>> import math
    >>> peak, total = -math.inf, 0.0
    >>> for score in [1.0, 3.0, 2.0]:
    ...     higher = max(peak, score)
    ...     total = total * math.exp(peak - higher) + math.exp(score - higher)
    ...     peak = higher
    >>> math.isclose(peak + math.log(total), math.log(math.e**1 + math.e**3 + math.e**2))
    True

A program does so for one token, a block of the vocabulary at a time. It keeps two numbers, the peak and the
logarithm of the sum, from which any probability is one `exp` away. So the backward pass reads the logits once
more and writes their gradient, 4 bytes a logit: `p - 1` for the target, `p` for all others.
"""

from typing import Any

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor
from triton import language as tl

from llm_basics import functional as reference
from llm_basics.fast import kernels

# the reference, whose name may come to stand for what is defined here
cross_entropy_in_steps = reference.cross_entropy

# logits that a program looks at in one go
BLOCK = 4096
# below any score but -inf: from -inf itself, the way to a first block of nothing but -inf would be 0/0
LOWEST = tl.constexpr(-3.4e38)


def cross_entropy(
    logits: Float[Tensor, "... vocab"],
    targets: Int[Tensor, "..."],
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    """`functional.cross_entropy` in one kernel, and one for its gradient, which has none itself.

    A target that is no id gets a loss of NaN, since a kernel cannot raise an error.

    >>> cross_entropy(torch.zeros(3, 4), torch.tensor([0, 3, -100]))  # log 4
    tensor(1.3863)
    """
    if (
        not kernels.can_take(logits)
        or targets.device != logits.device
        or reduction not in ("mean", "sum", "none")
    ):
        return cross_entropy_in_steps(logits, targets, ignore_index, z_loss, reduction)
    losses = _CrossEntropy.apply(logits, targets, ignore_index, float(z_loss))
    if reduction == "mean":
        losses = losses.sum() / (targets != ignore_index).sum().clamp(min=1)
    elif reduction == "sum":
        losses = losses.sum()
    return losses.to(logits.dtype)


@kernels.kernel
def _measure(
    logits: kernels.Pointer,
    targets: kernels.Pointer,
    losses: kernels.Pointer,
    peaks: kernels.Pointer,
    log_sums: kernels.Pointer,
    vocab_size: kernels.Number,
    ignore_index: kernels.Number,
    z_loss: kernels.Number,
    BLOCK: tl.constexpr,
) -> None:
    """One program measures the loss of one token: `log sum_j exp(x_j) - x_target`, and the z-loss."""
    # 64 bits: there may be more than 2^31 logits
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * vocab_size
    peak, total = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32)
    for first in range(0, vocab_size, BLOCK):
        scores = _load_scores(row, first, vocab_size, BLOCK)
        higher = tl.maximum(peak, tl.max(scores, axis=0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(scores - higher), axis=0)
        peak = higher
    log_sum = tl.log(total)
    tl.store(peaks + token, peak)
    tl.store(log_sums + token, log_sum)

    target = tl.load(targets + token).to(tl.int64)
    is_id = (target >= 0) & (target < vocab_size)
    chosen = tl.load(row + target, mask=is_id, other=float("nan")).to(tl.float32)
    # relative to the peak, as in the reference: of logits about 10,000 the difference has no digits left
    loss = log_sum - (chosen - peak)
    normalizer = peak + log_sum
    loss += z_loss * normalizer * normalizer
    tl.store(losses + token, tl.where(target == ignore_index, 0.0, loss))


@kernels.kernel
def _differentiate(
    logits: kernels.Pointer,
    targets: kernels.Pointer,
    peaks: kernels.Pointer,
    log_sums: kernels.Pointer,
    grad_losses: kernels.Pointer,
    grad_logits: kernels.Pointer,
    vocab_size: kernels.Number,
    ignore_index: kernels.Number,
    z_loss: kernels.Number,
    BLOCK: tl.constexpr,
) -> None:
    """One program writes the gradient of one block of the logits of one token."""
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    ids = first + tl.arange(0, BLOCK)
    target = tl.load(targets + token)
    peak, log_sum = tl.load(peaks + token), tl.load(log_sums + token)
    slope = tl.where(target == ignore_index, 0.0, tl.load(grad_losses + token))

    scores = _load_scores(logits + token * vocab_size, first, vocab_size, BLOCK)
    probabilities = tl.exp(scores - peak - log_sum)
    # z * lse^2 has the slope 2 z lse, and lse the gradient p
    by_sum = 1.0 + 2.0 * z_loss * (peak + log_sum)
    gradient = slope * (by_sum * probabilities - tl.where(ids == target, 1.0, 0.0))
    tl.store(grad_logits + token * vocab_size + ids, gradient, mask=ids < vocab_size)


@kernels.kernel
def _load_scores(
    row: kernels.Pointer, first: kernels.Number, vocab_size: kernels.Number, BLOCK: tl.constexpr
) -> kernels.Tile:
    """A block of logits in float32; beyond the vocabulary -inf, whose exponential is 0."""
    ids = first + tl.arange(0, BLOCK)
    return tl.load(row + ids, mask=ids < vocab_size, other=-float("inf")).to(tl.float32)


class _CrossEntropy(torch.autograd.Function):
    """Both kernels, as one operation that has a gradient: a loss in float32 for each token."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int, z_loss: float) -> Tensor:
        logits, targets = logits.contiguous(), targets.contiguous()
        losses, peaks, log_sums = (
            torch.empty(targets.shape, dtype=torch.float32, device=logits.device) for _ in range(3)
        )
        vocab_size = logits.shape[-1]
        block = kernels.block_size(vocab_size, BLOCK)
        # 16 logits a thread
        options = {"ignore_index": ignore_index, "z_loss": z_loss, "BLOCK": block}
        options |= {"vocab_size": vocab_size, "num_warps": max(block // 512, 1)}
        with kernels.on_device_of(logits):
            _measure[(targets.numel(),)](logits, targets, losses, peaks, log_sums, **options)
        ctx.save_for_backward(logits, targets, peaks, log_sums)
        ctx.options = options
        return losses

    @staticmethod
    @kernels.differentiable_once
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, peaks, log_sums = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        grid = (targets.numel(), triton.cdiv(logits.shape[-1], ctx.options["BLOCK"]))
        with kernels.on_device_of(logits):
            _differentiate[grid](
                logits, targets, peaks, log_sums, grad_losses.contiguous(), grad_logits, **ctx.options
            )
        return grad_logits, None, None, None
