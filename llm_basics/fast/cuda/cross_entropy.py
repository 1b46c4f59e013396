"""Cross-entropy and its gradient in one kernel, by an online softmax.

The logits are the largest tensor of a training step: `tokens * vocab` numbers. Step by step,
`functional.cross_entropy` widens them, finds their maximum, subtracts it, exponentiates and sums. In bfloat16
that moves 6 + 4 + 8 + 8 + 4 = 30 bytes a logit. Only 2 are needed, since maximum and sum can be computed in
one pass (online softmax, arXiv 1805.02867): at a higher score, the sum so far is rescaled to the new peak.

    >>> import math
    >>> peak, total = -math.inf, 0.0
    >>> for score in [1.0, 3.0, 2.0]:
    ...     higher = max(peak, score)
    ...     total = total * math.exp(peak - higher) + math.exp(score - higher)
    ...     peak = higher
    >>> math.isclose(peak + math.log(total), math.log(math.e**1 + math.e**3 + math.e**2))
    True

One program does so for one token, a block of the vocabulary at a time. Peak and logarithm of the sum give any
probability by one `exp`. The second pass reads the logits again and overwrites them with their gradient, 4
bytes a logit: `p - 1` for the target, `p` for all others.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from triton import language as tl

from llm_basics.fast.cuda import triton_jit

# logits that a program looks at in one go
BLOCK = 4096
# below any score but -inf: from -inf itself, the way to a first block of nothing but -inf would be 0/0
LOWEST = tl.constexpr(-3.4e38)


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
    # 64 bits: there may be more than 2^31 logits
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * width
    target = tl.load(targets + token).to(tl.int64)
    # before anything is written: threads wait for each other in the sums that follow
    is_id = (target >= 0) & (target < vocab_size)
    chosen = tl.load(row + target, mask=is_id, other=float("nan")).to(tl.float32)
    peak, log_sum = _normalize(row, vocab_size, BLOCK)
    normalizer = peak + log_sum
    # relative to the peak, as in the reference: of logits about 10,000 the difference has no digits left
    loss = log_sum - (chosen - peak) + z_loss * normalizer * normalizer
    counts = target != ignore_index
    tl.store(losses + token, tl.where(counts, loss, 0.0))
    # z * lse^2 has the slope 2 z lse, and lse the gradient p
    by_sum = 1.0 + 2.0 * z_loss * normalizer
    # what was just read is in the cache still
    for first in range(0, width, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        scores = _load_scores(row, first, vocab_size, BLOCK)
        gradient = by_sum * tl.exp(scores - peak - log_sum) - tl.where(ids == target, 1.0, 0.0)
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

    So there is only one tensor of that size. A target that is no id has a loss of NaN, since a kernel cannot
    raise an error.
    """
    losses = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    block = triton_jit.block_size(vocab_size, BLOCK)
    with triton_jit.on_device_of(logits):
        _learn[(len(targets),)](
            *(logits, targets, losses, vocab_size, logits.shape[-1], ignore_index, z_loss),
            BLOCK=block,
            # 16 logits a thread
            num_warps=max(block // 512, 1),
        )
    return losses
