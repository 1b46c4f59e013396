"""What else can be done to the scores of the next token, before temperature, top-k and top-p.

`generate.generate` is given a function of the text so far and of the scores that follow it. This is one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# of the ids of the text so far, and the scores of the next one: the scores to use
Adjust = Callable[[Int[Tensor, " seq"], Float[Tensor, " vocab"]], Float[Tensor, " vocab"]]


def penalize_repetition(
    logits: Float[Tensor, " vocab"], ids: Int[Tensor, " seq"], penalty: float
) -> Float[Tensor, " vocab"]:
    """Make what stands in the text less likely: scores of its ids are divided by `penalty` where they are
    above 0 and multiplied with it where they are below (arXiv 1909.05858).

    >>> penalize_repetition(torch.tensor([3.0, -1.0, 2.0]), torch.tensor([0, 1, 0]), 2.0)
    tensor([ 1.5000, -2.0000,  2.0000])
    """
    if not 0 < penalty < math.inf:
        raise ValueError(f"repetition_penalty must be above 0, got {penalty}")
    seen = logits[ids]
    return logits.index_put((ids,), torch.where(seen < 0, seen * penalty, seen / penalty))


def keep_likely(
    logits: Float[Tensor, " vocab"], min_p: float, temperature: float = 1.0
) -> Float[Tensor, " vocab"]:
    """Keep the tokens that have at least `min_p` times the probability of the likeliest at this temperature;
    the scores of the others become -inf (arXiv 2407.01082).

    >>> keep_likely(torch.tensor([0.6, 0.1, 0.3]).log(), min_p=0.5)
    tensor([-0.5108,    -inf, -1.2040])
    """
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be from 0 to 1, got {min_p}")
    if min_p == 0:
        return logits
    return logits.masked_fill(logits < logits.max() + temperature * math.log(min_p), -math.inf)


@dataclass(frozen=True)
class Adjustment:
    """What `generate` can do to scores before temperature, `top_k` and `top_p`: to be its `adjust`."""

    temperature: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __call__(self, ids: Int[Tensor, " seq"], logits: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
        """The scores with what was said already penalized, and without what `min_p` leaves out."""
        logits = penalize_repetition(logits, ids, self.repetition_penalty)
        return keep_likely(logits, self.min_p, self.temperature)


def adjustment(temperature: float, min_p: float | None, repetition_penalty: float) -> Adjustment | None:
    """The `Adjustment` of these settings; None if they change nothing, which is quickest."""
    if not min_p and repetition_penalty == 1:
        return None
    return Adjustment(temperature, min_p or 0.0, repetition_penalty)
