"""Cross-entropy and its gradient in one kernel, by an online softmax.

Logits (token, vocab) are the largest tensor of a training step. `functional.cross_entropy` converts them to
float32, finds the maximum, subtracts it, exponentiates and sums: from bfloat16 that moves 6 + 4 + 8 + 8 + 4 =
30 bytes per logit. Two suffice, since an online softmax (arXiv 1805.02867) computes maximum and sum in one
pass: at a higher score, the sum so far is rescaled to the new peak.

    >>> import math
    >>> peak, total = -math.inf, 0.0
    >>> for score in [1.0, 3.0, 2.0]:
    ...     higher = max(peak, score)
    ...     total = total * math.exp(peak - higher) + math.exp(score - higher)
    ...     peak = higher
    >>> math.isclose(peak + math.log(total), math.log(math.e**1 + math.e**3 + math.e**2))
    True

One program handles one token, block by block of the vocabulary. A second pass, 4 bytes per logit, overwrites
the logits with their gradient: `p - 1` at the target, `p` elsewhere, where p is one `exp` of the logit minus
the log-sum-exp.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from triton import language as tl

from llm_basics.fast.cuda import triton_jit

# logits per block
BLOCK = 4096
# the initial peak; -inf would give NaN if the first block is all -inf
MIN_SCORE = tl.constexpr(-3.4e38)


@triton_jit.kernel
def _loss_and_gradient(
    logits: triton_jit.Pointer,
    targets: triton_jit.Pointer,
    losses: triton_jit.Pointer,
    vocab_size: triton_jit.Number,
    width: triton_jit.Number,
    ignore_index: triton_jit.Number,
    z_loss: triton_jit.Number,
    BLOCK: tl.constexpr,
) -> None:
    """Write one token's loss, and overwrite its logits with their gradient.

    Of `width` logits, those from `vocab_size` are padding and get a gradient of 0.
    """
    # 64 bits: there may be more than 2^31 logits
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * width
    target = tl.load(targets + token).to(tl.int64)
    # read before the row is overwritten: the reductions below synchronize the threads
    is_id = (target >= 0) & (target < vocab_size)
    target_logit = tl.load(row + target, mask=is_id, other=float("nan")).to(tl.float32)
    peak, log_sum = _normalize(row, vocab_size, BLOCK)
    normalizer = peak + log_sum
    # relative to the peak, as in the reference: large logits would lose their digits
    loss = log_sum - (target_logit - peak) + z_loss * normalizer * normalizer
    counts = target != ignore_index
    tl.store(losses + token, tl.where(counts, loss, 0.0))
    # d/dx (lse + z lse^2) = (1 + 2 z lse) p
    slope = 1.0 + 2.0 * z_loss * normalizer
    # the row is still in the cache
    for first in range(0, width, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        scores = _load_scores(row, first, vocab_size, BLOCK)
        gradient = slope * tl.exp(scores - peak - log_sum) - tl.where(ids == target, 1.0, 0.0)
        tl.store(row + ids, tl.where(counts, gradient, 0.0), mask=ids < width)


@triton_jit.kernel
def _normalize(
    row: triton_jit.Pointer, vocab_size: triton_jit.Number, BLOCK: tl.constexpr
) -> tuple[triton_jit.Number, triton_jit.Number]:
    """The peak of a token's logits, and the log of the sum of exponentials relative to it."""
    peak, total = tl.full((), MIN_SCORE, tl.float32), tl.full((), 0.0, tl.float32)
    for first in range(0, vocab_size, BLOCK):
        scores = _load_scores(row, first, vocab_size, BLOCK)
        new_peak = tl.maximum(peak, tl.max(scores, axis=0))
        total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(scores - new_peak), axis=0)
        peak = new_peak
    return peak, tl.log(total)


@triton_jit.kernel
def _load_scores(
    row: triton_jit.Pointer, first: triton_jit.Number, vocab_size: triton_jit.Number, BLOCK: tl.constexpr
) -> triton_jit.Tile:
    """A block of logits in float32, -inf past the vocabulary."""
    ids = first + tl.arange(0, BLOCK)
    return tl.load(row + ids, mask=ids < vocab_size, other=-float("inf")).to(tl.float32)


def replace_by_gradient_(
    logits: Float[Tensor, "tokens width"],
    targets: Int[Tensor, " tokens"],
    vocab_size: int,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Float[Tensor, " tokens"]:
    """Return each token's float32 loss over its first `vocab_size` logits; replace `logits` by the gradient.

    The gradient is that of the summed losses; no second tensor of this size is allocated. The loss of an
    invalid target is NaN, since a kernel cannot raise an error.
    """
    losses = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    block = triton_jit.block_size(vocab_size, BLOCK)
    with triton_jit.on_device_of(logits):
        _loss_and_gradient[(len(targets),)](
            *(logits, targets, losses, vocab_size, logits.shape[-1], ignore_index, z_loss),
            BLOCK=block,
            # 16 logits per thread
            num_warps=max(block // 512, 1),
        )
    return losses
