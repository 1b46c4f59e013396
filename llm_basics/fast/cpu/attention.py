"""Attention of many texts with its gradient: blocks of queries of a head, against all keys.

Of the scores only the logarithm of each row's sum is kept; the backward pass computes them again
(FlashAttention, arXiv 2205.14135).
"""

import math
from typing import NamedTuple

import numpy as np

from llm_basics.fast import numba_jit
from llm_basics.fast.cpu import matmul, vectors

# queries of a head that are matched at a time
QUERIES = 32

ZERO, ONE = vectors.ZERO, vectors.ONE

# a score that no softmax sees
NOTHING = np.float32(-1e30)


class Heads(NamedTuple):
    """How many texts, tokens of each, and heads there are; neighbouring heads share keys and values."""

    n_texts: int
    seq: int
    n_heads: int
    n_kv_heads: int
    d_head: int


class Workspace(NamedTuple):
    """Addresses of room to work in; keys and values are there as `tiles.pack` has them."""

    scores: int
    dscores: int
    keys: int
    values: int
    zeros: int


@numba_jit.summing
def apply_rope(
    x: int, gain: int, eps: float, has_norm: bool, cos: int, sin: int, shape: Heads, n_heads: int, out: int
) -> None:
    """Make the queries or keys of `n_heads` heads ready: RMSNorm if asked, then turned by position."""
    d_head = shape.d_head
    half, gains = d_head // 2, numba_jit.array(gain, (d_head,))
    for t in range(shape.n_texts * shape.seq):
        turn_cos = numba_jit.row(cos, (t % shape.seq), half)
        turn_sin = numba_jit.row(sin, (t % shape.seq), half)
        for head in range(n_heads):
            start = 4 * (t * n_heads + head) * d_head
            row, to = numba_jit.array(x + start, (d_head,)), numba_jit.array(out + start, (d_head,))
            scale = _scale_of(row, eps) if has_norm else ONE
            for i in range(d_head):
                to[i] = row[i] * scale * gains[i]
            for pair in range(half):
                even, odd = to[2 * pair], to[2 * pair + 1]
                to[2 * pair] = even * turn_cos[pair] - odd * turn_sin[pair]
                to[2 * pair + 1] = even * turn_sin[pair] + odd * turn_cos[pair]


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
    """Turn `dy`, of what `place` made of `x`, into what the loss changes by with `x`."""
    d_head = shape.d_head
    half, gains, dgains = d_head // 2, numba_jit.array(gain, (d_head,)), numba_jit.array(dgain, (d_head,))
    for t in range(shape.n_texts * shape.seq):
        turn_cos = numba_jit.row(cos, (t % shape.seq), half)
        turn_sin = numba_jit.row(sin, (t % shape.seq), half)
        for head in range(n_heads):
            start = 4 * (t * n_heads + head) * d_head
            row, d = numba_jit.array(x + start, (d_head,)), numba_jit.array(dy + start, (d_head,))
            for pair in range(half):
                even, odd = d[2 * pair], d[2 * pair + 1]
                d[2 * pair] = even * turn_cos[pair] + odd * turn_sin[pair]
                d[2 * pair + 1] = odd * turn_cos[pair] - even * turn_sin[pair]
            if has_norm:
                scale, along = _scale_of(row, eps), ZERO
                for i in range(d_head):
                    along += d[i] * gains[i] * row[i]
                along *= scale * scale / np.float32(d_head)
                for i in range(d_head):
                    dgains[i] += d[i] * row[i] * scale
                    d[i] = (d[i] * gains[i] - row[i] * along) * scale


@numba_jit.inlined
def _scale_of(x: np.ndarray, eps: float) -> float:
    square = ZERO
    for i in range(len(x)):
        square += x[i] * x[i]
    return ONE / np.float32(math.sqrt(square / np.float32(len(x)) + np.float32(eps)))


@numba_jit.summing
def attend(q: int, k: int, v: int, sizes: int, shape: Heads, room: Workspace, out: int) -> None:
    """`out = softmax(q k^T / sqrt(d_head)) v` of each head, where no query sees keys after its own.

    `sizes` are the highest score of each row and 1 / the sum of the exponentials: (text, head, 2, token).
    """
    seq, d_head = shape.seq, shape.d_head
    scale, width = ONE / np.float32(math.sqrt(d_head)), matmul.padded(seq)
    scores = numba_jit.array(room.scores, (QUERIES, width))
    d_q, d_kv = shape.n_heads * d_head, shape.n_kv_heads * d_head
    for head in range(shape.n_texts * shape.n_heads):
        of_q, of_k = _starts(head, shape)
        tops, shares = numba_jit.row(sizes, 2 * head, seq), numba_jit.row(sizes, 2 * head + 1, seq)
        matmul.pack(k + of_k, d_kv, seq, d_head, room.keys)
        for first in range(0, seq, QUERIES):
            end = min(first + QUERIES, seq)
            _match(q + of_q + 4 * first * d_q, d_q, room.keys, end - first, end, width, d_head, room)
            # all rows at a time: what is done to one need not wait for what is done to the one before
            for t in range(first, end):
                _hide(room, t - first, t, width)
                tops[t] = matmul.highest(room.scores + 4 * (t - first) * width, matmul.padded(t + 1)) * scale
            for t in range(first, end):
                row, top = t - first, tops[t]
                for i in range(matmul.padded(t + 1)):
                    scores[row, i] = vectors.exp(scores[row, i] * scale - top)
            for t in range(first, end):
                row, total = t - first, ZERO
                for i in range(matmul.padded(t + 1)):
                    total += scores[row, i]
                shares[t] = ONE / total
                for i in range(matmul.padded(t + 1), matmul.padded(end)):
                    scores[row, i] = ZERO
            to = matmul.rows_at(out + of_q + 4 * first * d_q, d_q)
            weights, values = matmul.rows_at(room.scores, width), matmul.columns_at(v + of_k, d_kv)
            matmul.product(weights, values, matmul.repeated_at(room.zeros), to, end - first, d_head, end)
            for t in range(first, end):
                mixed = numba_jit.array(out + of_q + 4 * t * d_q, (d_head,))
                for i in range(d_head):
                    mixed[i] *= shares[t]


@numba_jit.summing
def attend_backward(
    q: int,
    k: int,
    v: int,
    sizes: int,
    out: int,
    dout: int,
    shape: Heads,
    room: Workspace,
    dq: int,
    dk: int,
    dv: int,
) -> None:
    """Write `dq`, and add to `dk` and `dv`, of what `attend` made of `q`, `k` and `v`.

    A row of probabilities adds up to 1: what of their gradient is common to all of them is lost. It is the
    product of the row's output with its gradient.
    """
    seq, d_head = shape.seq, shape.d_head
    scale, width = ONE / np.float32(math.sqrt(d_head)), matmul.padded(seq)
    scores = numba_jit.array(room.scores, (QUERIES, width))
    dscores = numba_jit.array(room.dscores, (QUERIES, width))
    d_q, d_kv = shape.n_heads * d_head, shape.n_kv_heads * d_head
    for head in range(shape.n_texts * shape.n_heads):
        of_q, of_k = _starts(head, shape)
        tops, shares = numba_jit.row(sizes, 2 * head, seq), numba_jit.row(sizes, 2 * head + 1, seq)
        matmul.pack(k + of_k, d_kv, seq, d_head, room.keys)
        matmul.pack(v + of_k, d_kv, seq, d_head, room.values)
        for first in range(0, seq, QUERIES):
            end = min(first + QUERIES, seq)
            n, start = end - first, of_q + 4 * first * d_q
            _match(q + start, d_q, room.keys, n, end, width, d_head, room)
            to, packed = matmul.rows_at(room.dscores, width), matmul.packed(room.values, d_head)
            zeros = matmul.repeated_at(room.zeros)
            matmul.product(matmul.rows_at(dout + start, d_q), packed, zeros, to, n, end, d_head)
            for t in range(first, end):
                row, common, top, share = t - first, ZERO, tops[t], shares[t]
                of_row = of_q + 4 * t * d_q
                mixed = numba_jit.array(out + of_row, (d_head,))
                dmixed = numba_jit.array(dout + of_row, (d_head,))
                for i in range(d_head):
                    common += mixed[i] * dmixed[i]
                _hide(room, row, t, width)
                for i in range(matmul.padded(t + 1)):
                    weight = vectors.exp(scores[row, i] * scale - top) * share
                    scores[row, i] = weight
                    dscores[row, i] = weight * (dscores[row, i] - common) * scale
                for i in range(matmul.padded(t + 1), matmul.padded(end)):
                    scores[row, i] = dscores[row, i] = ZERO
            _collect(room.scores, width, dout + start, d_q, n, end, d_head, room, dv + of_k, d_kv)
            _collect(room.dscores, width, q + start, d_q, n, end, d_head, room, dk + of_k, d_kv)
            weights, keys = matmul.rows_at(room.dscores, width), matmul.columns_at(k + of_k, d_kv)
            matmul.product(weights, keys, zeros, matmul.rows_at(dq + start, d_q), n, d_head, end)


@numba_jit.inlined
def _hide(room: Workspace, row: int, t: int, width: int) -> None:
    """Make scores of keys after token `t` nothing, in the last vector of those that it sees."""
    start = t - t % matmul.VECTOR
    last = numba_jit.array(room.scores + 4 * (row * width + start), (matmul.VECTOR,))
    for i in range(matmul.VECTOR):
        last[i] = last[i] if start + i <= t else NOTHING


@numba_jit.inlined
def _starts(number: int, shape: Heads) -> tuple[int, int]:
    """Where the queries, and where the keys of a head begin: in bytes."""
    text, head = number // shape.n_heads, number % shape.n_heads
    row, shared = text * shape.seq, head * shape.n_kv_heads // shape.n_heads
    of_q = 4 * (row * shape.n_heads + head) * shape.d_head
    return of_q, 4 * (row * shape.n_kv_heads + shared) * shape.d_head


@numba_jit.inlined
def _match(
    q: int, d_q: int, keys: int, n: int, n_keys: int, width: int, d_head: int, room: Workspace
) -> None:
    """The products of some queries with all keys so far."""
    start, out = matmul.repeated_at(room.zeros), matmul.rows_at(room.scores, width)
    matmul.product(matmul.rows_at(q, d_q), matmul.packed(keys, d_head), start, out, n, n_keys, d_head)


@numba_jit.inlined
def _collect(
    weights: int,
    width: int,
    rows: int,
    d_rows: int,
    n: int,
    n_keys: int,
    d_head: int,
    room: Workspace,
    out: int,
    d_out: int,
) -> None:
    """Add to the row of each key all `rows`, each with its weight for it."""
    to, columns = matmul.rows_at(out, d_out), matmul.turned_at(weights, width)
    matmul.product(columns, matmul.columns_at(rows, d_rows), to, to, n_keys, d_head, n)
