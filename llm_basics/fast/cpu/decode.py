"""A transformer as machine code: some tokens of one text in, the logits of the next tokens out.

A part that a model lacks has a value that changes nothing: a bias of 0, an angle of 0. Several threads share
the work: each has some of the heads and some rows of each matrix. Writing token by token is bound by memory:

    tokens per second <= bytes read per second / bytes of all weights

So the likeliest text is first drafted by the same model with matrices of 8 bits, a quarter of the bytes. The
exact model then reads the draft in one pass and keeps it up to the first token that differs: speculative
decoding (arXiv 2211.17192) without a second model.
"""

import math
from typing import NamedTuple

import numpy as np

from llm_basics.fast import numba_jit
from llm_basics.fast.cpu import threads, vectors

# rows of a matrix go to threads by so many: a cache line of what comes out is written by one thread
ROWS_OF_A_LINE = 16

# tokens that are read in one pass at most
AT_A_TIME = 16

# tokens that are drafted before they are verified, at first and at most. Each time more where all were right,
# fewer where not, and if already the first was wrong, soon none for a while
MOST_DRAFTED, MORE, FEWER, FAR_FEWER = 7, 2, 1, 4
NEVER = -(1 << 30)


class Shape(NamedTuple):
    """What a model's config decides beside the sizes of its weights."""

    vocab_size: int
    n_heads: int
    n_kv_heads: int
    is_layer_norm: bool
    is_post_norm: bool
    has_qk_norm: bool
    ffn: int
    eps: float


class Weights(NamedTuple):
    """All weights; of what every block has, `w.down[3]` is the fourth block's.

    Vectors are there themselves, stacked. Of matrices it is the address, so that none is copied, and the
    address of the scales of its rows where these are whole numbers of 8 bits, else 0; whoever calls keeps
    them alive.
    """

    token_embeddings: np.ndarray
    position_embeddings: np.ndarray
    # of every position, by pairs of features
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
    # swiglu's values, which its gates let through
    gated: np.ndarray
    down: np.ndarray
    down_bias: np.ndarray
    ln_final: np.ndarray
    ln_final_bias: np.ndarray
    lm_head: np.ndarray
    lm_head_bias: np.ndarray


class State(NamedTuple):
    """The keys and values of the text so far, and room for what is worked on, a row for each token."""

    # of each block: (block, head, position, feature)
    keys: np.ndarray
    values: np.ndarray
    # the residual stream, what a sublayer sees of it and what it adds to it
    x: np.ndarray
    seen: np.ndarray
    added: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scores: np.ndarray
    mixed: np.ndarray
    hidden: np.ndarray
    gated: np.ndarray
    logits: np.ndarray
    # what was read last, and what is drafted to follow it
    tokens: np.ndarray


class Member(NamedTuple):
    """One of `size` threads that read tokens together, and where they meet: `threads.meet`."""

    number: int
    size: int
    meeting: np.ndarray


@numba_jit.summing
def read_tokens(
    tokens: np.ndarray, position: int, all_scores: bool, shape: Shape, w: Weights, s: State, m: Member
) -> None:
    """Write the scores of what follows each of `tokens`, or the last alone, to the first rows of `s.logits`,
    and their keys and values to `s`.

    The first of them stands at `position`. Each member of a team calls this with the same tokens.
    """
    w, s = numba_jit.borrowed(w), numba_jit.borrowed(s)
    n = len(tokens)
    for t in range(n):
        for i in range(s.x.shape[1]):
            s.x[t, i] = w.token_embeddings[tokens[t], i] + w.position_embeddings[position + t, i]
    for block in range(len(w.ln1)):
        prepare(n, w.ln1[block], w.ln1_bias[block], shape, s)
        attend(block, n, position, shape, w, s, m)
        add(n, w.ln1[block], w.ln1_bias[block], shape, s)
        prepare(n, w.ln2[block], w.ln2_bias[block], shape, s)
        feed_forward(block, n, shape, w, s, m)
        add(n, w.ln2[block], w.ln2_bias[block], shape, s)
    n_scored = n if all_scores else 1
    for t in range(n_scored):
        x = s.x[n - n_scored + t]
        vectors.normalize(x, w.ln_final, w.ln_final_bias, shape.eps, shape.is_layer_norm, s.seen[t])
    multiply(w.lm_head[0], s.seen, n_scored, w.lm_head_bias, s.logits, m)
    threads.barrier(m.meeting, m.size)


# --------------------------------------------------------------------------------------------------
# In and out of the residual stream


@numba_jit.jit
def rows_of(n_rows: int, number: int, size: int) -> tuple[int, int]:
    """Where the rows of a member begin and end.

    >>> rows_of(100, 0, 2), rows_of(100, 1, 2)
    ((0, 64), (64, 100))
    """
    rows = -(-n_rows // (size * ROWS_OF_A_LINE)) * ROWS_OF_A_LINE
    start, end = min(number * rows, n_rows), min((number + 1) * rows, n_rows)
    # fewer than are summed side by side would be summed in another order: who comes before takes them too
    if number > 0 and n_rows - start < vectors.ROWS:
        start = n_rows
    if n_rows - end < vectors.ROWS:
        end = n_rows
    return start, end


@numba_jit.summing
def multiply(matrix: np.ndarray, x: np.ndarray, n: int, bias: np.ndarray, out: np.ndarray, m: Member) -> None:
    """`out = matrix x + bias` of `n` tokens, in the rows of the matrix that are this member's."""
    start, end = rows_of(out.shape[1], m.number, m.size)
    vectors.multiply(matrix, x, n, bias, out, start, end)


@numba_jit.summing
def prepare(n: int, gain: np.ndarray, bias: np.ndarray, shape: Shape, s: State) -> None:
    """What a sublayer sees of the residual stream of `n` tokens."""
    for t in range(n):
        if shape.is_post_norm:
            s.seen[t] = s.x[t]
        else:
            vectors.normalize(s.x[t], gain, bias, shape.eps, shape.is_layer_norm, s.seen[t])


@numba_jit.summing
def add(n: int, gain: np.ndarray, bias: np.ndarray, shape: Shape, s: State) -> None:
    """Add what a sublayer found to the residual stream."""
    for t in range(n):
        for i in range(s.x.shape[1]):
            s.x[t, i] += s.added[t, i]
        if shape.is_post_norm:
            vectors.normalize(s.x[t], gain, bias, shape.eps, shape.is_layer_norm, s.x[t])


# --------------------------------------------------------------------------------------------------
# The sublayers


@numba_jit.summing
def attend(block: int, n: int, position: int, shape: Shape, w: Weights, s: State, m: Member) -> None:
    """Each head mixes the values of all tokens so far, by how well their keys match its query."""
    w, s = numba_jit.borrowed(w), numba_jit.borrowed(s)
    d_head = s.keys.shape[-1]
    # neighbouring heads share keys and values
    group = shape.n_heads // shape.n_kv_heads
    first, end = m.number * shape.n_kv_heads // m.size, (m.number + 1) * shape.n_kv_heads // m.size
    queries = first * group * d_head, end * group * d_head
    features = first * d_head, end * d_head
    vectors.multiply(w.q[block], s.seen, n, w.q_bias[block], s.q, *queries)
    vectors.multiply(w.k[block], s.seen, n, w.k_bias[block], s.k, *features)
    vectors.multiply(w.v[block], s.seen, n, w.v_bias[block], s.v, *features)
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
            mixed = s.mixed[t, head * d_head : (head + 1) * d_head]
            vectors.weighted_sum(query, keys, values, s.scores[: position + t + 1], mixed)
    threads.barrier(m.meeting, m.size)
    multiply(w.output[block], s.mixed, n, w.output_bias[block], s.added, m)
    threads.barrier(m.meeting, m.size)


@numba_jit.summing
def apply_rope(x: np.ndarray, gain: np.ndarray, cos: np.ndarray, sin: np.ndarray, shape: Shape) -> None:
    """Make one head's query or key ready: RMSNorm if the model has that, then turn it to its position."""
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
    """The feed-forward network: up to `d_ff` features, an activation, and down again."""
    w, s = numba_jit.borrowed(w), numba_jit.borrowed(s)
    start, end = rows_of(s.hidden.shape[1], m.number, m.size)
    vectors.multiply(w.up[block], s.seen, n, w.up_bias[block], s.hidden, start, end)
    if shape.ffn == vectors.SWIGLU:
        vectors.multiply(w.gated[block], s.seen, n, w.up_bias[block], s.gated, start, end)
    for t in range(n):
        vectors.activate(shape.ffn, s.hidden[t, start:end], s.gated[t, start:end])
    threads.barrier(m.meeting, m.size)
    multiply(w.down[block], s.hidden, n, w.down_bias[block], s.added, m)
    threads.barrier(m.meeting, m.size)


# --------------------------------------------------------------------------------------------------
# The next tokens


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
    """Fill `out` with the tokens that follow `token`, each the likeliest; returns how many were certain.

    `rounded` are the weights of the draft, and `n_next` holds how many tokens are drafted next.
    `shape.vocab_size` scores are of tokens. Each member of a team finds the same tokens.
    """
    w, rounded, s = numba_jit.borrowed(w), numba_jit.borrowed(rounded), numba_jit.borrowed(s)
    n, vocab_size = 0, shape.vocab_size
    while n < len(out):
        # the exact model gives one token more than it is given
        n_wanted = max(0, n_next[0])
        n_drafted = min(n_wanted, len(out) - n - 1)
        s.tokens[0] = token
        for i in range(n_drafted + 1):
            # one call, compiled once: for the next token of the draft, and at last for all by the exact model
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
