"""FlashAttention in Triton: the mistakes of kernels, with the results that they give.

The wrong versions compute in PyTorch what a kernel with the mistake computes, which takes a hundredth of the
time of Triton's interpreter.
"""

import dataclasses

import torch

from llm_basics.learn import probes
from llm_basics.learn.mistakes import flash_attention as flash

step = probes.Step("flash_triton")

flash.register(
    step,
    lambda a: a.get_flashattention_autograd_function_triton(),
    "flash_triton",
    "flash_triton_log_sum_exp",
    (37, 70),
    batch=1,
    device=flash.DEVICE,
    # Triton's interpreter multiplies matrices of bfloat16 as if they were whole numbers
    half=torch.float16,
)

# without tensors they are not repeated in float64, which kernels need not have
step.probes[:] = [dataclasses.replace(probe, tensors={}) for probe in step.probes]

mistake = flash.mistake_of(step, "flash_triton.FlashAttentionTriton", 64)


@mistake("public implementations of FlashAttention", by_tile=True)
class KeysPastTheEndCount(flash.KeysPastTheEndCount):
    """tl.load gives zeros past the last key, whose score of 0 counts in the softmax. Set those scores to
    -inf: tl.where(keys < n_keys, scores, -float("inf"))."""


@mistake(by_tile=True)
class LastKeysDropped(flash.LastKeysDropped):
    """The loop has n_keys // KEYS iterations, so keys after the last full tile are never seen. Loop over
    range(0, n_keys, KEYS), or use tl.cdiv, and mask the last tile."""


@mistake()
class ScoresNotScaled(flash.ScoresNotScaled):
    """The kernels compute Q K^T without the factor 1 / sqrt(d). Pass it as an argument, and multiply the
    scores in all three kernels."""


@mistake("public implementations of FlashAttention", by_tile=True)
class OutputNotRescaled(flash.OutputNotRescaled):
    """The accumulator is not multiplied by exp(old maximum - new maximum) before the tile is added, only the
    sum is. Rescale both: mixed * correction[:, None]."""


@mistake()
class NeverDivided(flash.NeverDivided):
    """The accumulator is stored as it is, not divided by the sum of the exponentials. Divide it once, after
    the loop: mixed / total[:, None]."""


@mistake()
class CausalIgnored(flash.CausalIgnored):
    """The kernel does not use IS_CAUSAL, so every query attends to all keys. Compare the positions of keys
    and queries, and end the loop at the diagonal."""


@mistake(by_tile=True)
class MaskByPositionsInTheTile(flash.MaskByPositionsInTheTile):
    """The mask compares tl.arange of queries and keys without the offsets of the tiles, so each tile is
    masked like the first one. Add first_query and first_key."""


@mistake("public implementations of FlashAttention", by_tile=True)
class DiagonalTileSkipped(flash.DiagonalTileSkipped):
    """With IS_CAUSAL the loop ends at the first query of the tile, so the tile on the diagonal is never
    loaded. It ends after the last one: tl.minimum(first + QUERIES, n_keys)."""


@mistake("public implementations of FlashAttention")
class LogSumExpToBase2(flash.LogSumExpInUnitsOfBase2):
    """The kernels work with tl.exp2 and tl.log2, and the stored log-sum-exp is in units of base 2. Forward
    and backward agree, but readers expect natural units: divide by log2(e)."""


@mistake()
class NoDTerm(flash.NoDTerm):
    """The backward kernels compute dS = P dP, without the D term: dS = P (dP - D). Compute D = sum of dO O
    over d once, before the kernels, and load it with the rows."""


@mistake()
class GradientOfKNotScaled(flash.GradientOfKNotScaled):
    """The kernel of dK and dV stores dS^T Q without the factor 1 / sqrt(d). Multiply when it is stored, as
    for dQ."""


@mistake("kernels that add to memory without tl.atomic_add", by_tile=True)
class GradientOfQFromTheLastTile(flash.GradientOfQFromTheLastTile):
    """Programs of different tiles of keys store to the same rows of dQ, and the last one wins. Let one
    program own the rows and loop over the keys, or use tl.atomic_add."""
