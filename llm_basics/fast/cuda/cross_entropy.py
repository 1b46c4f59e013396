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
more and writes their gradient, 4 bytes a logit: `p - 1` for the target, `p` for all others. Where loss and
gradient are wanted at once, a third kernel does both, and the gradient takes the place of the logits.
"""

from typing import Any

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor
from triton import language as tl

from llm_basics.core import functional as reference
from llm_basics.fast.cuda import triton_jit

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
        not triton_jit.can_take(logits)
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


@triton_jit.kernel
def _measure(
    logits: triton_jit.Pointer,
    targets: triton_jit.Pointer,
    losses: triton_jit.Pointer,
    peaks: triton_jit.Pointer,
    log_sums: triton_jit.Pointer,
    vocab_size: triton_jit.Number,
    ignore_index: triton_jit.Number,
    z_loss: triton_jit.Number,
    BLOCK: tl.constexpr,
) -> None:
    """One program measures the loss of one token: `log sum_j exp(x_j) - x_target`, and the z-loss."""
    # 64 bits: there may be more than 2^31 logits
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * vocab_size
    target = tl.load(targets + token).to(tl.int64)
    chosen = _load_chosen(row, target, vocab_size)
    peak, log_sum = _normalize(row, vocab_size, BLOCK)
    tl.store(peaks + token, peak)
    tl.store(log_sums + token, log_sum)
    loss = _loss(chosen, peak, log_sum, z_loss)
    tl.store(losses + token, tl.where(target == ignore_index, 0.0, loss))


@triton_jit.kernel
def _differentiate(
    logits: triton_jit.Pointer,
    targets: triton_jit.Pointer,
    peaks: triton_jit.Pointer,
    log_sums: triton_jit.Pointer,
    grad_losses: triton_jit.Pointer,
    grad_logits: triton_jit.Pointer,
    vocab_size: triton_jit.Number,
    ignore_index: triton_jit.Number,
    z_loss: triton_jit.Number,
    BLOCK: tl.constexpr,
) -> None:
    """One program writes the gradient of one block of the logits of one token."""
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    ids = first + tl.arange(0, BLOCK)
    target = tl.load(targets + token)
    slope = tl.where(target == ignore_index, 0.0, tl.load(grad_losses + token))
    scores = _load_scores(logits + token * vocab_size, first, vocab_size, BLOCK)
    peak, log_sum = tl.load(peaks + token), tl.load(log_sums + token)
    gradient = slope * _gradient(scores, ids == target, peak, log_sum, z_loss)
    tl.store(grad_logits + token * vocab_size + ids, gradient, mask=ids < vocab_size)


@triton_jit.kernel
def _learn(
    logits: triton_jit.Pointer,
    targets: triton_jit.Pointer,
    losses: triton_jit.Pointer,
    vocab_size: triton_jit.Number,
    width: triton_jit.Number,
    ignore_index: triton_jit.Number,
    z_loss: triton_jit.Number,
    BLOCK: tl.constexpr,
) -> None:
    """One program measures the loss of one token, and writes the gradient over its logits.

    There are `width` of them, of which those from `vocab_size` on are no token's and get a gradient of 0.
    """
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * width
    target = tl.load(targets + token).to(tl.int64)
    # before anything is written: threads wait for each other in the sums that follow
    chosen = _load_chosen(row, target, vocab_size)
    peak, log_sum = _normalize(row, vocab_size, BLOCK)
    loss = _loss(chosen, peak, log_sum, z_loss)
    counts = target != ignore_index
    tl.store(losses + token, tl.where(counts, loss, 0.0))
    # what was just read is in the cache still
    for first in range(0, width, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        scores = _load_scores(row, first, vocab_size, BLOCK)
        gradient = _gradient(scores, ids == target, peak, log_sum, z_loss)
        tl.store(row + ids, tl.where(counts, gradient, 0.0), mask=ids < width)


@triton_jit.kernel
def _normalize(
    row: triton_jit.Pointer, vocab_size: triton_jit.Number, BLOCK: tl.constexpr
) -> tuple[triton_jit.Number, triton_jit.Number]:
    """The peak of the logits of a token, and the logarithm of the sum of exponentials relative to it."""
    peak, total = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32)
    for first in range(0, vocab_size, BLOCK):
        scores = _load_scores(row, first, vocab_size, BLOCK)
        higher = tl.maximum(peak, tl.max(scores, axis=0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(scores - higher), axis=0)
        peak = higher
    return peak, tl.log(total)


@triton_jit.kernel
def _load_chosen(
    row: triton_jit.Pointer, target: triton_jit.Number, vocab_size: triton_jit.Number
) -> triton_jit.Number:
    """The logit of the target; NaN if that is no id."""
    is_id = (target >= 0) & (target < vocab_size)
    return tl.load(row + target, mask=is_id, other=float("nan")).to(tl.float32)


@triton_jit.kernel
def _loss(
    chosen: triton_jit.Number, peak: triton_jit.Number, log_sum: triton_jit.Number, z_loss: triton_jit.Number
) -> triton_jit.Number:
    """The loss of one token, as a number."""
    normalizer = peak + log_sum
    # relative to the peak, as in the reference: of logits about 10,000 the difference has no digits left
    return log_sum - (chosen - peak) + z_loss * normalizer * normalizer


@triton_jit.kernel
def _gradient(
    scores: triton_jit.Tile,
    is_target: triton_jit.Tile,
    peak: triton_jit.Number,
    log_sum: triton_jit.Number,
    z_loss: triton_jit.Number,
) -> triton_jit.Tile:
    """The gradient of a loss with respect to a block of logits."""
    # z * lse^2 has the slope 2 z lse, and lse the gradient p
    by_sum = 1.0 + 2.0 * z_loss * (peak + log_sum)
    return by_sum * tl.exp(scores - peak - log_sum) - tl.where(is_target, 1.0, 0.0)


@triton_jit.kernel
def _load_scores(
    row: triton_jit.Pointer, first: triton_jit.Number, vocab_size: triton_jit.Number, BLOCK: tl.constexpr
) -> triton_jit.Tile:
    """A block of logits in float32; beyond the vocabulary -inf, whose exponential is 0."""
    ids = first + tl.arange(0, BLOCK)
    return tl.load(row + ids, mask=ids < vocab_size, other=-float("inf")).to(tl.float32)


def replace_by_gradient_(
    logits: Float[Tensor, "tokens width"],
    targets: Int[Tensor, " tokens"],
    vocab_size: int,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Float[Tensor, " tokens"]:
    """The losses in float32 by the first `vocab_size` logits of each token; in the place of the logits then
    stand the gradients of the sum of these losses.

    Where both are wanted there need not be two tensors of that size.
    """
    losses = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    options = _options(vocab_size, ignore_index, z_loss)
    with triton_jit.on_device_of(logits):
        _learn[(len(targets),)](logits, targets, losses, width=logits.shape[-1], **options)
    return losses


def _options(vocab_size: int, ignore_index: int, z_loss: float) -> dict[str, Any]:
    """What kernels are told, with 16 logits a thread."""
    block = triton_jit.block_size(vocab_size, BLOCK)
    options = {"vocab_size": vocab_size, "ignore_index": ignore_index, "z_loss": z_loss}
    return options | {"BLOCK": block, "num_warps": max(block // 512, 1)}


class _CrossEntropy(torch.autograd.Function):
    """Both kernels, as one operation that has a gradient: a loss in float32 for each token."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int, z_loss: float) -> Tensor:
        logits, targets = logits.contiguous(), targets.contiguous()
        losses, peaks, log_sums = (
            torch.empty(targets.shape, dtype=torch.float32, device=logits.device) for _ in range(3)
        )
        options = _options(logits.shape[-1], ignore_index, z_loss)
        with triton_jit.on_device_of(logits):
            _measure[(targets.numel(),)](logits, targets, losses, peaks, log_sums, **options)
        ctx.save_for_backward(logits, targets, peaks, log_sums)
        ctx.options = options
        return losses

    @staticmethod
    @triton_jit.differentiable_once
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, peaks, log_sums = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        grid = (targets.numel(), triton.cdiv(logits.shape[-1], ctx.options["BLOCK"]))
        with triton_jit.on_device_of(logits):
            _differentiate[grid](
                logits, targets, peaks, log_sums, grad_losses.contiguous(), grad_logits, **ctx.options
            )
        return grad_logits, None, None, None
