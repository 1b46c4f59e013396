"""Softmax of a row in tiles, without storing the row (arXiv 1805.02867).

Softmax needs the maximum of a row before its first exponential, and the sum of all exponentials before its
first quotient. Both can be updated tile by tile: at a larger maximum, the sum so far is multiplied by
`exp(old maximum - new maximum)`. FlashAttention is this algorithm with a matrix of values.

    >>> scores, values = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([[1.0], [0.0], [0.0]])
    >>> online_weighted_sum(scores.split(2), values.split(2)), torch.softmax(scores, 0)[:1]
    (tensor([0.0900]), tensor([0.0900]))
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from llm_basics.core import functional as F


def online_softmax(
    tiles: Iterable[Float[Tensor, "... _"]],
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """The maximum `m` of a row, and `l = sum_j exp(s_j - m)`, from tiles of its scores `s`.

    `m' = max(m, max s)` and `l' = l exp(m - m') + sum exp(s - m')`; half precision is summed in float32. A
    score of -inf is masked and adds nothing, even if a whole tile is masked.

    >>> online_softmax([torch.tensor([0.0, 0.0]), torch.tensor([math.log(3.0)])])
    (tensor(1.0986), tensor(1.6667))
    """
    peak, total = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in tiles:
        peak, correction, weights = rescale(peak, F.to_float32(tile))
        total = total * correction + weights.sum(-1)
    return peak, total


def rescale(
    peak: Float[Tensor, "..."], scores: Float[Tensor, "... keys"]
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."], Float[Tensor, "... keys"]]:
    """The new maximum, the factor for sums of earlier tiles, and the exponentials of this tile.

    >>> rescale(torch.tensor(0.0), torch.tensor([math.log(2.0), 0.0]))
    (tensor(0.6931), tensor(0.5000), tensor([1.0000, 0.5000]))
    """
    new_peak = torch.maximum(peak, scores.amax(-1))
    # -inf - -inf is NaN: while all scores are masked, the exponentials are taken relative to 0
    shift = torch.where(new_peak == -math.inf, 0.0, new_peak)
    return new_peak, (peak - shift).exp(), (scores - shift[..., None]).exp()


def log_sum_exp(tiles: Iterable[Float[Tensor, "... _"]]) -> Float[Tensor, "..."]:
    """`L = log sum_j exp(s_j) = m + log l`: one number per row, from which softmax can be recomputed.

    `softmax(s)_j = exp(s_j - L)`. It is -inf for a row whose scores are all masked.

    >>> log_sum_exp([torch.tensor([1000.0]), torch.tensor([-1000.0, 0.0])])
    tensor(1000.)
    """
    peak, total = online_softmax(tiles)
    return peak + total.log()


def online_weighted_sum(
    tiles: Iterable[Float[Tensor, "... _"]], values: Iterable[Float[Tensor, "... _ d_head"]]
) -> Float[Tensor, "... d_head"]:
    """`sum_j softmax(s)_j v_j` in one pass over tiles of scores and their values.

    The output so far is rescaled like the sum, `o' = o exp(m - m') + exp(s - m') V`, and divided once, at the
    end: `o / l`. The result has the dtype of the values.

    >>> online_weighted_sum([torch.zeros(1), torch.zeros(1)], [torch.tensor([[4.0]]), torch.tensor([[2.0]])])
    tensor([3.])
    """
    peak, total, output = torch.tensor(-math.inf), torch.tensor(0.0), torch.tensor(0.0)
    for tile, value in zip(tiles, values, strict=True):
        peak, correction, weights = rescale(peak, F.to_float32(tile))
        total = total * correction + weights.sum(-1)
        added = (weights[..., None, :] @ value.to(weights.dtype)).squeeze(-2)
        output = output * correction[..., None] + added
    return (output / total[..., None]).to(value.dtype)
