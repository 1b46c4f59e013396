"""Decoding kernels: a transformer's forward pass over a few tokens of one text, with a key-value cache.

A part that a model lacks gets a neutral value (a bias of 0, a rotation by 0). Threads divide the heads and
the rows of each matrix. Decoding token by token is bound by memory bandwidth:

    tokens per second <= bytes read per second / bytes of all weights

Greedy decoding is therefore speculative (arXiv 2211.17192) without a second model: the same model with int8
matrices, a quarter of the bytes, drafts tokens; the exact model verifies them in one pass and keeps them up
to the first that differs.
"""

import math
from typing import NamedTuple

import numpy as np

from llm_basics.fast import numba_jit
from llm_basics.fast.cpu import threads, vectors

# threads get multiples of so many rows, so that each cache line of the output has one writer
ROWS_PER_CACHE_LINE = 16

# the most tokens of one forward pass
AT_A_TIME = 16

# drafted tokens per verification, initially and at most; increased if all were accepted, decreased if some
# were rejected, and by more if all were, which soon disables drafts for a while
MOST_DRAFTED, MORE, FEWER, FAR_FEWER = 7, 2, 1, 4
NEVER = -(1 << 30)


class Shape(NamedTuple):
    """The options of a model's config that are not sizes of its weights."""

    vocab_size: int
    n_heads: int
    n_kv_heads: int
    is_layer_norm: bool
    is_post_norm: bool
    has_qk_norm: bool
    ffn: int
    eps: float


class Weights(NamedTuple):
    """All weights; those of the blocks are stacked, so `w.down[3]` belongs to the fourth block.

    Vectors are arrays. A matrix is a pair of addresses, of its elements and of its rows' scales (0 unless
    int8); the caller keeps the memory alive.
    """

    token_embeddings: np.ndarray
    position_embeddings: np.ndarray
    # (position, pair of features)
    cos: np.ndarray
    sin: np.ndarray
    ln1: np.ndarray
    ln1_bias: np.ndarray
    q: np.ndarray
    q_bias: np.ndarray
    k: np.ndarray
    k_bias: np.ndarray
    v: np.ndarray
    v_bias: np.ndarray
    q_norm: np.ndarray
    k_norm: np.ndarray
    output: np.ndarray
    output_bias: np.ndarray
    ln2: np.ndarray
    ln2_bias: np.ndarray
    up: np.ndarray
    up_bias: np.ndarray
    # SwiGLU's values, multiplied by the gates
    gated: np.ndarray
    down: np.ndarray
    down_bias: np.ndarray
    ln_final: np.ndarray
    ln_final_bias: np.ndarray
    lm_head: np.ndarray
    lm_head_bias: np.ndarray


class State(NamedTuple):
    """The key-value cache of a text, and activations with a row for each token."""

    # (block, head, position, feature)
    keys: np.ndarray
    values: np.ndarray
    # the residual stream, the input of a sublayer and its output
    x: np.ndarray
    normed: np.ndarray
    added: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scores: np.ndarray
    head_output: np.ndarray
    hidden: np.ndarray
    gated: np.ndarray
    logits: np.ndarray
    # the last token and the drafted ones after it
    tokens: np.ndarray


class Member(NamedTuple):
    """One of `size` cooperating threads, and the counter of their `threads.barrier`."""

    number: int
    size: int
    meeting: np.ndarray


@numba_jit.summing
def read_tokens(
    tokens: np.ndarray, position: int, all_scores: bool, shape: Shape, w: Weights, s: State, m: Member
) -> None:
    """Write the logits after each of `tokens`, or after the last alone, to the first rows of `s.logits`.

    Appends their keys and values to the cache from `position`. All members call this with the same tokens.
    """
    w, s = numba_jit.borrowed(w), numba_jit.borrowed(s)
    n = len(tokens)
    for t in range(n):
        for i in range(s.x.shape[1]):
            s.x[t, i] = w.token_embeddings[tokens[t], i] + w.position_embeddings[position + t, i]
    for block in range(len(w.ln1)):
        normalize_input(n, w.ln1[block], w.ln1_bias[block], shape, s)
        attend(block, n, position, shape, w, s, m)
        add_residual(n, w.ln1[block], w.ln1_bias[block], shape, s)
        normalize_input(n, w.ln2[block], w.ln2_bias[block], shape, s)
        feed_forward(block, n, shape, w, s, m)
        add_residual(n, w.ln2[block], w.ln2_bias[block], shape, s)
    n_scored = n if all_scores else 1
    for t in range(n_scored):
        x = s.x[n - n_scored + t]
        vectors.normalize(x, w.ln_final, w.ln_final_bias, shape.eps, shape.is_layer_norm, s.normed[t])
    multiply(w.lm_head[0], s.normed, n_scored, w.lm_head_bias, s.logits, m)
    threads.barrier(m.meeting, m.size)


# --------------------------------------------------------------------------------------------------
# The residual stream


@numba_jit.jit
def rows_of(n_rows: int, number: int, size: int) -> tuple[int, int]:
    """The range of a member's rows.

    >>> rows_of(100, 0, 2), rows_of(100, 1, 2)
    ((0, 64), (64, 100))
    """
    rows = -(-n_rows // (size * ROWS_PER_CACHE_LINE)) * ROWS_PER_CACHE_LINE
    start, end = min(number * rows, n_rows), min((number + 1) * rows, n_rows)
    # fewer than vectors.ROWS rows would be summed in another order; the member before takes them too
    if number > 0 and n_rows - start < vectors.ROWS:
        start = n_rows
    if n_rows - end < vectors.ROWS:
        end = n_rows
    return start, end


@numba_jit.summing
def multiply(matrix: np.ndarray, x: np.ndarray, n: int, bias: np.ndarray, out: np.ndarray, m: Member) -> None:
    """`out = matrix x + bias` of `n` tokens, for this member's rows of the matrix."""
    start, end = rows_of(out.shape[1], m.number, m.size)
    vectors.multiply(matrix, x, n, bias, out, start, end)


@numba_jit.summing
def normalize_input(n: int, gain: np.ndarray, bias: np.ndarray, shape: Shape, s: State) -> None:
    """Write a sublayer's input: the residual stream of `n` tokens, normalized if pre-norm."""
    for t in range(n):
        if shape.is_post_norm:
            s.normed[t] = s.x[t]
        else:
            vectors.normalize(s.x[t], gain, bias, shape.eps, shape.is_layer_norm, s.normed[t])


@numba_jit.summing
def add_residual(n: int, gain: np.ndarray, bias: np.ndarray, shape: Shape, s: State) -> None:
    """Add a sublayer's output to the residual stream, which is then normalized if post-norm."""
    for t in range(n):
        for i in range(s.x.shape[1]):
            s.x[t, i] += s.added[t, i]
        if shape.is_post_norm:
            vectors.normalize(s.x[t], gain, bias, shape.eps, shape.is_layer_norm, s.x[t])


# --------------------------------------------------------------------------------------------------
# The sublayers


@numba_jit.summing
def attend(block: int, n: int, position: int, shape: Shape, w: Weights, s: State, m: Member) -> None:
    """Causal self-attention of `n` tokens over the key-value cache."""
    w, s = numba_jit.borrowed(w), numba_jit.borrowed(s)
    d_head = s.keys.shape[-1]
    # neighboring heads share keys and values
    group = shape.n_heads // shape.n_kv_heads
    first, end = m.number * shape.n_kv_heads // m.size, (m.number + 1) * shape.n_kv_heads // m.size
    queries = first * group * d_head, end * group * d_head
    features = first * d_head, end * d_head
    vectors.multiply(w.q[block], s.normed, n, w.q_bias[block], s.q, *queries)
    vectors.multiply(w.k[block], s.normed, n, w.k_bias[block], s.k, *features)
    vectors.multiply(w.v[block], s.normed, n, w.v_bias[block], s.v, *features)
    for t in range(n):
        for head in range(first, end):
            key = s.k[t, head * d_head : (head + 1) * d_head]
            apply_rope(key, w.k_norm[block], w.cos[position + t], w.sin[position + t], shape)
            s.keys[block, head, position + t] = key
            s.values[block, head, position + t] = s.v[t, head * d_head : (head + 1) * d_head]
        for head in range(first * group, end * group):
            query = s.q[t, head * d_head : (head + 1) * d_head]
            apply_rope(query, w.q_norm[block], w.cos[position + t], w.sin[position + t], shape)
            keys, values = s.keys[block, head // group], s.values[block, head // group]
            head_output = s.head_output[t, head * d_head : (head + 1) * d_head]
            vectors.weighted_sum(query, keys, values, s.scores[: position + t + 1], head_output)
    threads.barrier(m.meeting, m.size)
    multiply(w.output[block], s.head_output, n, w.output_bias[block], s.added, m)
    threads.barrier(m.meeting, m.size)


@numba_jit.summing
def apply_rope(x: np.ndarray, gain: np.ndarray, cos: np.ndarray, sin: np.ndarray, shape: Shape) -> None:
    """Apply RMSNorm (with qk_norm) and RoPE to one head's query or key, in place."""
    if shape.has_qk_norm:
        square = vectors.ZERO
        for i in range(len(x)):
            square += x[i] * x[i]
        scale = vectors.ONE / np.float32(math.sqrt(square / np.float32(len(x)) + np.float32(shape.eps)))
        for i in range(len(x)):
            x[i] *= scale * gain[i]
    for pair in range(len(cos)):
        even, odd = x[2 * pair], x[2 * pair + 1]
        x[2 * pair] = even * cos[pair] - odd * sin[pair]
        x[2 * pair + 1] = even * sin[pair] + odd * cos[pair]


@numba_jit.summing
def feed_forward(block: int, n: int, shape: Shape, w: Weights, s: State, m: Member) -> None:
    """The feed-forward network: up-projection, activation, down-projection."""
    w, s = numba_jit.borrowed(w), numba_jit.borrowed(s)
    start, end = rows_of(s.hidden.shape[1], m.number, m.size)
    vectors.multiply(w.up[block], s.normed, n, w.up_bias[block], s.hidden, start, end)
    if shape.ffn == vectors.SWIGLU:
        vectors.multiply(w.gated[block], s.normed, n, w.up_bias[block], s.gated, start, end)
    for t in range(n):
        vectors.activate(shape.ffn, s.hidden[t, start:end], s.gated[t, start:end])
    threads.barrier(m.meeting, m.size)
    multiply(w.down[block], s.hidden, n, w.down_bias[block], s.added, m)
    threads.barrier(m.meeting, m.size)


# --------------------------------------------------------------------------------------------------
# Greedy decoding


@numba_jit.jit
def write_likeliest(
    token: int,
    position: int,
    shape: Shape,
    w: Weights,
    rounded: Weights,
    s: State,
    m: Member,
    n_next: np.ndarray,
    out: np.ndarray,
) -> int:
    """Decode greedily after `token` into `out`; returns the number of tokens before a near tie.

    `rounded` are the int8 weights for drafts; `n_next[0]` is the number of tokens to draft next. All members
    compute the same tokens.
    """
    w, rounded, s = numba_jit.borrowed(w), numba_jit.borrowed(rounded), numba_jit.borrowed(s)
    n, vocab_size = 0, shape.vocab_size
    while n < len(out):
        # the exact model yields one token more than it verifies
        n_wanted = max(0, n_next[0])
        n_drafted = min(n_wanted, len(out) - n - 1)
        s.tokens[0] = token
        for i in range(n_drafted + 1):
            # one call site, compiled once: a draft token each time, and finally the exact model on all
            if i < n_drafted:
                tokens, start, weights = s.tokens[i : i + 1], position + n + i, rounded
            else:
                tokens, start, weights = s.tokens[: i + 1], position + n, w
            read_tokens(tokens, start, i == n_drafted, shape, weights, s, m)
            if i < n_drafted:
                s.tokens[i + 1] = vectors.highest(s.logits[0, :vocab_size])
        n_right = 0
        for i in range(n_drafted + 1):
            token = vectors.likeliest(s.logits[i, :vocab_size])
            if token == -1:
                return n
            out[n] = token
            n += 1
            if i == n_drafted or token != s.tokens[i + 1]:
                break
            n_right += 1
        if n_right < n_drafted:
            n_next[0] -= FEWER if n_right else FAR_FEWER
        elif n_drafted == n_wanted:
            n_next[0] = min(n_next[0] + MORE, MOST_DRAFTED)
    return n
