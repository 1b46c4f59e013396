"""FlashAttention: exact attention in tiles, without a matrix of queries x keys (arXiv 2205.14135).

The forward pass is an online softmax over tiles of keys. It saves the output `O` and one number per query,
the log-sum-exp `L` of its scores `S = Q K^T / sqrt(d)`, from which the backward pass recomputes each tile of
probabilities, `P = exp(S - L)`. With `dO` the gradient of the output,

    dV = P^T dO     dP = dO V^T     dS = P (dP - D)     where D = sum of dO O over d_head
    dQ = dS K / sqrt(d)             dK = dS^T Q / sqrt(d)

Memory is linear in queries + keys; the arithmetic is that of attention, with the scores computed twice.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llm_basics.core import functional as F
from llm_basics.systems import online_softmax

# number of queries and of keys per tile
TILE = 32


def tiles(n: int) -> Iterator[slice]:
    """The rows 0 to `n - 1` in tiles, of which the last may be shorter.

    >>> list(tiles(40))
    [slice(0, 32, None), slice(32, 40, None)]
    """
    return (slice(first, min(first + TILE, n)) for first in range(0, n, TILE))


def visible_keys(rows: slice, n_keys: int, is_causal: bool) -> Iterator[slice]:
    """The tiles of keys that the queries `rows` may attend to: none above the diagonal.

    >>> list(visible_keys(slice(0, 32), n_keys=96, is_causal=True))
    [slice(0, 32, None)]
    """
    return tiles(min(rows.stop, n_keys) if is_causal else n_keys)


def tile_scores(
    query: Float[Tensor, "... queries d_head"],
    key: Float[Tensor, "... keys d_head"],
    rows: slice,
    columns: slice,
    is_causal: bool,
) -> Float[Tensor, "... tile_queries tile_keys"]:
    """`Q K^T / sqrt(d)` of one tile, with -inf where a key comes after its query.

    >>> tile_scores(torch.ones(2, 4), torch.ones(2, 4), slice(0, 2), slice(0, 2), is_causal=True)
    tensor([[2., -inf],
            [2., 2.]])
    """
    q, k = F.to_float32(query[..., rows, :]), F.to_float32(key[..., columns, :])
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if not is_causal:
        return scores
    queries = torch.arange(rows.start, rows.stop, device=query.device)
    keys = torch.arange(columns.start, columns.stop, device=query.device)
    return scores.masked_fill(keys > queries[:, None], -math.inf)


class FlashAttention(torch.autograd.Function):
    """`apply(query, key, value, is_causal)`: `softmax(Q K^T / sqrt(d)) V`, tile by tile (arXiv 2307.08691).

    With `is_causal` query i attends to the keys 0 to i, as in `torch.nn.functional`. Half precision is
    computed in float32. Differentiable once.

    >>> q, k = torch.tensor([[[0.0]]]), torch.tensor([[[1.0], [2.0]]])
    >>> FlashAttention.apply(q, k, torch.tensor([[[3.0], [5.0]]]), False)
    tensor([[[4.]]])
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "... queries d_head"],
        key: Float[Tensor, "... keys d_head"],
        value: Float[Tensor, "... keys d_value"],
        is_causal: bool = False,
    ) -> Float[Tensor, "... queries d_value"]:
        """The output. Saves the inputs, the output, and the log-sum-exp of each query."""
        n_queries, n_keys = query.shape[-2], key.shape[-2]
        outputs, log_sums = [], []
        for rows in tiles(n_queries):
            peak, total, output = torch.tensor(-math.inf), torch.tensor(0.0), torch.tensor(0.0)
            for columns in visible_keys(rows, n_keys, is_causal):
                scores = tile_scores(query, key, rows, columns, is_causal)
                peak, correction, weights = online_softmax.rescale(peak, scores)
                total = total * correction + weights.sum(-1)
                output = output * correction[..., None] + weights @ F.to_float32(value[..., columns, :])
            outputs.append((output / total[..., None]).to(value.dtype))
            log_sums.append(peak + total.log())
        output, log_sum = torch.cat(outputs, -2), torch.cat(log_sums, -1)
        ctx.save_for_backward(query, key, value, output, log_sum)
        ctx.is_causal = is_causal
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_output: Float[Tensor, "... queries d_value"]
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """The gradients of query, key and value, from probabilities that are recomputed tile by tile."""
        query, key, value, output, log_sum = ctx.saved_tensors
        inputs = (query, key, value)
        dq, dk, dv = (torch.zeros_like(F.to_float32(tensor)) for tensor in inputs)
        delta = (F.to_float32(grad_output) * F.to_float32(output)).sum(-1)
        scale = 1 / math.sqrt(query.shape[-1])
        for rows in tiles(query.shape[-2]):
            q, do = F.to_float32(query[..., rows, :]), F.to_float32(grad_output[..., rows, :])
            for columns in visible_keys(rows, key.shape[-2], ctx.is_causal):
                k, v = F.to_float32(key[..., columns, :]), F.to_float32(value[..., columns, :])
                scores = tile_scores(query, key, rows, columns, ctx.is_causal)
                p = (scores - log_sum[..., rows, None]).exp()
                ds = p * (do @ v.mT - delta[..., rows, None])
                dq[..., rows, :] += ds @ k * scale
                dk[..., columns, :] += ds.mT @ q * scale
                dv[..., columns, :] += p.mT @ do
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None
