"""Causal attention of a batch and its gradient: a block of one head's queries against all keys.

Queries, keys and values are (text, token, head, d_head). Only two numbers per row of scores are kept, and the
backward pass recomputes the scores (FlashAttention, arXiv 2205.14135).
"""

import math
from typing import NamedTuple

import numpy as np

from llm_basics.fast import numba_jit
from llm_basics.fast.cpu import matmul, vectors

# queries of a head per block
QUERIES = 32

ZERO, ONE = vectors.ZERO, vectors.ONE

# the score of masked keys: its exponential is 0
MASKED = np.float32(-1e30)


class Heads(NamedTuple):
    """The shape of a batch; `n_heads / n_kv_heads` neighboring heads share keys and values."""

    n_texts: int
    seq: int
    n_heads: int
    n_kv_heads: int
    d_head: int


class Workspace(NamedTuple):
    """Addresses of temporary arrays; keys and values in the layout of `matmul.pack`."""

    scores: int
    dscores: int
    keys: int
    values: int
    zeros: int


@numba_jit.summing
def apply_rope(
    x: int, gain: int, eps: float, has_norm: bool, cos: int, sin: int, shape: Heads, n_heads: int, out: int
) -> None:
    """Apply RMSNorm (if `has_norm`) and RoPE to the queries or keys of `n_heads` heads."""
    d_head = shape.d_head
    half, gains = d_head // 2, numba_jit.array(gain, (d_head,))
    for t in range(shape.n_texts * shape.seq):
        row_cos = numba_jit.row(cos, (t % shape.seq), half)
        row_sin = numba_jit.row(sin, (t % shape.seq), half)
        for head in range(n_heads):
            start = 4 * (t * n_heads + head) * d_head
            row, to = numba_jit.array(x + start, (d_head,)), numba_jit.array(out + start, (d_head,))
            scale = _scale_of(row, eps) if has_norm else ONE
            for i in range(d_head):
                to[i] = row[i] * scale * gains[i]
            for pair in range(half):
                even, odd = to[2 * pair], to[2 * pair + 1]
                to[2 * pair] = even * row_cos[pair] - odd * row_sin[pair]
                to[2 * pair + 1] = even * row_sin[pair] + odd * row_cos[pair]


@numba_jit.summing
def apply_rope_backward(
    x: int,
    gain: int,
    eps: float,
    has_norm: bool,
    cos: int,
    sin: int,
    shape: Heads,
    n_heads: int,
    dy: int,
    dgain: int,
) -> None:
    """The gradient of `apply_rope`: replaces `dy` by `dx`, and adds to `dgain`."""
    d_head = shape.d_head
    half, gains, dgains = d_head // 2, numba_jit.array(gain, (d_head,)), numba_jit.array(dgain, (d_head,))
    for t in range(shape.n_texts * shape.seq):
        row_cos = numba_jit.row(cos, (t % shape.seq), half)
        row_sin = numba_jit.row(sin, (t % shape.seq), half)
        for head in range(n_heads):
            start = 4 * (t * n_heads + head) * d_head
            row, d = numba_jit.array(x + start, (d_head,)), numba_jit.array(dy + start, (d_head,))
            for pair in range(half):
                even, odd = d[2 * pair], d[2 * pair + 1]
                d[2 * pair] = even * row_cos[pair] + odd * row_sin[pair]
                d[2 * pair + 1] = odd * row_cos[pair] - even * row_sin[pair]
            if has_norm:
                scale, dot = _scale_of(row, eps), ZERO
                for i in range(d_head):
                    dot += d[i] * gains[i] * row[i]
                dot *= scale * scale / np.float32(d_head)
                for i in range(d_head):
                    dgains[i] += d[i] * row[i] * scale
                    d[i] = (d[i] * gains[i] - row[i] * dot) * scale


@numba_jit.inlined
def _scale_of(x: np.ndarray, eps: float) -> float:
    square = ZERO
    for i in range(len(x)):
        square += x[i] * x[i]
    return ONE / np.float32(math.sqrt(square / np.float32(len(x)) + np.float32(eps)))


@numba_jit.summing
def attend(q: int, k: int, v: int, statistics: int, shape: Heads, workspace: Workspace, out: int) -> None:
    """`out = softmax(q k^T / sqrt(d_head)) v` of each head, with a causal mask.

    Writes each row's maximum and 1 / sum of exponentials to `statistics`: (text, head, 2, token).
    """
    seq, d_head = shape.seq, shape.d_head
    scale, width = ONE / np.float32(math.sqrt(d_head)), matmul.padded(seq)
    scores = numba_jit.array(workspace.scores, (QUERIES, width))
    d_q, d_kv = shape.n_heads * d_head, shape.n_kv_heads * d_head
    for head in range(shape.n_texts * shape.n_heads):
        q_offset, k_offset = _head_offsets(head, shape)
        maxima, inverse_sums = (
            numba_jit.row(statistics, 2 * head, seq),
            numba_jit.row(statistics, 2 * head + 1, seq),
        )
        matmul.pack(k + k_offset, d_kv, seq, d_head, workspace.keys)
        for first in range(0, seq, QUERIES):
            end = min(first + QUERIES, seq)
            _compute_scores(
                q + q_offset + 4 * first * d_q,
                d_q,
                workspace.keys,
                end - first,
                end,
                width,
                d_head,
                workspace,
            )
            # one loop over rows per operation: independent rows overlap in the pipeline
            for t in range(first, end):
                _mask_row(workspace, t - first, t, width)
                maxima[t] = (
                    matmul.maximum(workspace.scores + 4 * (t - first) * width, matmul.padded(t + 1)) * scale
                )
            for t in range(first, end):
                row, maximum = t - first, maxima[t]
                for i in range(matmul.padded(t + 1)):
                    scores[row, i] = vectors.exp(scores[row, i] * scale - maximum)
            for t in range(first, end):
                row, total = t - first, ZERO
                for i in range(matmul.padded(t + 1)):
                    total += scores[row, i]
                inverse_sums[t] = ONE / total
                for i in range(matmul.padded(t + 1), matmul.padded(end)):
                    scores[row, i] = ZERO
            to = matmul.rows_at(out + q_offset + 4 * first * d_q, d_q)
            weights, values = matmul.rows_at(workspace.scores, width), matmul.columns_at(v + k_offset, d_kv)
            matmul.product(
                weights, values, matmul.broadcast_at(workspace.zeros), to, end - first, d_head, end
            )
            for t in range(first, end):
                output = numba_jit.array(out + q_offset + 4 * t * d_q, (d_head,))
                for i in range(d_head):
                    output[i] *= inverse_sums[t]


@numba_jit.summing
def attend_backward(
    q: int,
    k: int,
    v: int,
    statistics: int,
    out: int,
    dout: int,
    shape: Heads,
    workspace: Workspace,
    dq: int,
    dk: int,
    dv: int,
) -> None:
    """The gradients of `attend`: writes `dq`, adds to `dk` and `dv`.

    `dscores = p * (dp - output . doutput)`: the rows of p sum to 1, so a gradient common to a row vanishes.
    """
    seq, d_head = shape.seq, shape.d_head
    scale, width = ONE / np.float32(math.sqrt(d_head)), matmul.padded(seq)
    scores = numba_jit.array(workspace.scores, (QUERIES, width))
    dscores = numba_jit.array(workspace.dscores, (QUERIES, width))
    d_q, d_kv = shape.n_heads * d_head, shape.n_kv_heads * d_head
    for head in range(shape.n_texts * shape.n_heads):
        q_offset, k_offset = _head_offsets(head, shape)
        maxima, inverse_sums = (
            numba_jit.row(statistics, 2 * head, seq),
            numba_jit.row(statistics, 2 * head + 1, seq),
        )
        matmul.pack(k + k_offset, d_kv, seq, d_head, workspace.keys)
        matmul.pack(v + k_offset, d_kv, seq, d_head, workspace.values)
        for first in range(0, seq, QUERIES):
            end = min(first + QUERIES, seq)
            n, start = end - first, q_offset + 4 * first * d_q
            _compute_scores(q + start, d_q, workspace.keys, n, end, width, d_head, workspace)
            to, packed = matmul.rows_at(workspace.dscores, width), matmul.packed(workspace.values, d_head)
            zeros = matmul.broadcast_at(workspace.zeros)
            matmul.product(matmul.rows_at(dout + start, d_q), packed, zeros, to, n, end, d_head)
            for t in range(first, end):
                row, row_dot, maximum, inverse_sum = t - first, ZERO, maxima[t], inverse_sums[t]
                row_offset = q_offset + 4 * t * d_q
                output = numba_jit.array(out + row_offset, (d_head,))
                doutput = numba_jit.array(dout + row_offset, (d_head,))
                for i in range(d_head):
                    row_dot += output[i] * doutput[i]
                _mask_row(workspace, row, t, width)
                for i in range(matmul.padded(t + 1)):
                    weight = vectors.exp(scores[row, i] * scale - maximum) * inverse_sum
                    scores[row, i] = weight
                    dscores[row, i] = weight * (dscores[row, i] - row_dot) * scale
                for i in range(matmul.padded(t + 1), matmul.padded(end)):
                    scores[row, i] = dscores[row, i] = ZERO
            _accumulate_grads(
                workspace.scores, width, dout + start, d_q, n, end, d_head, workspace, dv + k_offset, d_kv
            )
            _accumulate_grads(
                workspace.dscores, width, q + start, d_q, n, end, d_head, workspace, dk + k_offset, d_kv
            )
            weights, keys = matmul.rows_at(workspace.dscores, width), matmul.columns_at(k + k_offset, d_kv)
            matmul.product(weights, keys, zeros, matmul.rows_at(dq + start, d_q), n, d_head, end)


@numba_jit.inlined
def _mask_row(workspace: Workspace, row: int, t: int, width: int) -> None:
    """Mask the scores of keys after token `t` in the last vector with a visible key."""
    start = t - t % matmul.VECTOR
    last = numba_jit.array(workspace.scores + 4 * (row * width + start), (matmul.VECTOR,))
    for i in range(matmul.VECTOR):
        last[i] = last[i] if start + i <= t else MASKED


@numba_jit.inlined
def _head_offsets(number: int, shape: Heads) -> tuple[int, int]:
    """The byte offsets of a head's queries and of its keys."""
    text, head = number // shape.n_heads, number % shape.n_heads
    row, shared = text * shape.seq, head * shape.n_kv_heads // shape.n_heads
    q_offset = 4 * (row * shape.n_heads + head) * shape.d_head
    return q_offset, 4 * (row * shape.n_kv_heads + shared) * shape.d_head


@numba_jit.inlined
def _compute_scores(
    q: int, d_q: int, keys: int, n: int, n_keys: int, width: int, d_head: int, workspace: Workspace
) -> None:
    """The scores of a block of queries against all keys up to its last."""
    start, out = matmul.broadcast_at(workspace.zeros), matmul.rows_at(workspace.scores, width)
    matmul.product(matmul.rows_at(q, d_q), matmul.packed(keys, d_head), start, out, n, n_keys, d_head)


@numba_jit.inlined
def _accumulate_grads(
    weights: int,
    width: int,
    rows: int,
    d_rows: int,
    n: int,
    n_keys: int,
    d_head: int,
    workspace: Workspace,
    out: int,
    d_out: int,
) -> None:
    """`out += weights^T rows`: accumulate a key gradient over a block of queries."""
    to, columns = matmul.rows_at(out, d_out), matmul.transposed_at(weights, width)
    matmul.product(columns, matmul.columns_at(rows, d_rows), to, to, n_keys, d_head, n)
