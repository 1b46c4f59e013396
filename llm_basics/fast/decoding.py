"""A transformer as loops: one token in, the scores of the next one out.

What `model.TransformerLM` says in layers of tensors is said here once more in numbers, for one token of one
text. Everything a model may do without has a value that changes nothing: a bias of 0, an angle of 0, a
position embedding of 0. So there is one path through the loops, and few questions on it.

Each weight is read once a token, and there is little to win by arithmetic:

    tokens per second <= bytes read per second / bytes of all weights

Where memory gives 40 GB in a second, a model of 500 MB writes no more than 80 tokens in it; one of 5 MB stays
in the cache, which gives more. Two cores read more than one, so several threads may share the work: each
has some of the heads and some of the rows of each matrix, and all meet where one needs what others have made.
What is small each does for itself.
"""

import math
from typing import NamedTuple

import numba
import numpy as np

from llm_basics.fast import machine, vectors

# rows of a matrix go to threads by so many: a cache line of what comes out is written by one thread
ROWS_OF_A_LINE = 16


class Shape(NamedTuple):
    """What a model's config decides beside the sizes of its weights."""

    vocab_size: int
    n_heads: int
    n_kv_heads: int
    is_layer_norm: bool
    is_post_norm: bool
    has_qk_norm: bool
    has_value_embeddings: bool
    ffn: int
    eps: float


class Weights(NamedTuple):
    """All weights; of what every block has, `w.down[3]` is the fourth block's.

    Vectors are there themselves, stacked. Of matrices it is the address, so that none is copied; whoever
    calls keeps them alive.
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
    value_embeddings: np.ndarray
    # how much each block takes of the residual stream, and of the embedded token
    x0_mix: np.ndarray
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
    """The keys and values of the text so far, and room for what is worked on."""

    # of each block: (block, head, position, feature)
    keys: np.ndarray
    values: np.ndarray
    # the residual stream, what a sublayer sees of it and what it adds to it
    x: np.ndarray
    x0: np.ndarray
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


class Member(NamedTuple):
    """One of `size` threads that read a token together, and where they meet: `machine.meet`."""

    number: int
    size: int
    meeting: np.ndarray


@machine.summing
def read_token(token: int, position: int, shape: Shape, w: Weights, s: State, m: Member) -> None:
    """Write the scores of the token that follows `token` to `s.logits`, and its keys and values to `s`.

    Each member of a team calls this with the same token.
    """
    w, s = machine.borrowed(w), machine.borrowed(s)
    x, seen = s.x, s.seen
    for i in range(len(x)):
        x[i] = s.x0[i] = w.token_embeddings[token, i] + w.position_embeddings[position, i]
    for block in range(len(w.ln1)):
        for i in range(len(x)):
            x[i] = w.x0_mix[block, 0] * x[i] + w.x0_mix[block, 1] * s.x0[i]
        prepare(x, w.ln1[block], w.ln1_bias[block], shape, seen)
        attend(block, token, position, shape, w, s, m)
        add(x, s.added, w.ln1[block], w.ln1_bias[block], shape)
        prepare(x, w.ln2[block], w.ln2_bias[block], shape, seen)
        think(block, shape, w, s, m)
        add(x, s.added, w.ln2[block], w.ln2_bias[block], shape)
    vectors.normalize(x, w.ln_final, w.ln_final_bias, shape.eps, shape.is_layer_norm, seen)
    multiply(w.lm_head[0], seen, w.lm_head_bias, s.logits, m)
    machine.meet(m.meeting, m.size)


# --------------------------------------------------------------------------------------------------
# In and out of the residual stream


@machine.compiled
def rows_of(n_rows: int, number: int, size: int) -> tuple[int, int]:
    """Where the rows of a member begin and end.

    >>> rows_of(100, 0, 2), rows_of(100, 1, 2)
    ((0, 64), (64, 100))
    """
    rows = -(-n_rows // (size * ROWS_OF_A_LINE)) * ROWS_OF_A_LINE
    return min(number * rows, n_rows), min((number + 1) * rows, n_rows)


@machine.summing
def multiply(matrix: int, x: np.ndarray, bias: np.ndarray, out: np.ndarray, m: Member) -> None:
    """The rows of `out = matrix x + bias` that are this member's."""
    start, end = rows_of(len(out), m.number, m.size)
    vectors.multiply(matrix, x, bias, out, start, end)


@machine.summing
def prepare(x: np.ndarray, gain: np.ndarray, bias: np.ndarray, shape: Shape, seen: np.ndarray) -> None:
    """What a sublayer sees of the residual stream."""
    if shape.is_post_norm:
        seen[:] = x
    else:
        vectors.normalize(x, gain, bias, shape.eps, shape.is_layer_norm, seen)


@machine.summing
def add(x: np.ndarray, added: np.ndarray, gain: np.ndarray, bias: np.ndarray, shape: Shape) -> None:
    """Add what a sublayer found to the residual stream."""
    for i in range(len(x)):
        x[i] += added[i]
    if shape.is_post_norm:
        vectors.normalize(x, gain, bias, shape.eps, shape.is_layer_norm, x)


# --------------------------------------------------------------------------------------------------
# The sublayers


@machine.summing
def attend(block: int, token: int, position: int, shape: Shape, w: Weights, s: State, m: Member) -> None:
    """Each head mixes the values of all tokens so far, by how well their keys match its query."""
    w, s = machine.borrowed(w), machine.borrowed(s)
    d_head = s.keys.shape[-1]
    # neighbouring heads share keys and values
    group = shape.n_heads // shape.n_kv_heads
    first, end = m.number * shape.n_kv_heads // m.size, (m.number + 1) * shape.n_kv_heads // m.size
    vectors.multiply(w.q[block], s.seen, w.q_bias[block], s.q, first * group * d_head, end * group * d_head)
    vectors.multiply(w.k[block], s.seen, w.k_bias[block], s.k, first * d_head, end * d_head)
    vectors.multiply(w.v[block], s.seen, w.v_bias[block], s.v, first * d_head, end * d_head)
    if shape.has_value_embeddings:
        of_tokens = numba.carray(
            machine.floats_at(w.value_embeddings[block]), (len(w.token_embeddings), len(s.v))
        )
        for i in range(first * d_head, end * d_head):
            s.v[i] += of_tokens[token, i]
    for head in range(first, end):
        key = s.k[head * d_head : (head + 1) * d_head]
        place(key, w.k_norm[block], w.cos[position], w.sin[position], shape)
        s.keys[block, head, position] = key
        s.values[block, head, position] = s.v[head * d_head : (head + 1) * d_head]
    for head in range(first * group, end * group):
        query = s.q[head * d_head : (head + 1) * d_head]
        place(query, w.q_norm[block], w.cos[position], w.sin[position], shape)
        keys, values = s.keys[block, head // group], s.values[block, head // group]
        mixed = s.mixed[head * d_head : (head + 1) * d_head]
        vectors.mix(query, keys, values, s.scores[: position + 1], mixed)
    machine.meet(m.meeting, m.size)
    multiply(w.output[block], s.mixed, w.output_bias[block], s.added, m)
    machine.meet(m.meeting, m.size)


@machine.summing
def place(x: np.ndarray, gain: np.ndarray, cos: np.ndarray, sin: np.ndarray, shape: Shape) -> None:
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


@machine.summing
def think(block: int, shape: Shape, w: Weights, s: State, m: Member) -> None:
    """The feed-forward network: up to `d_ff` features, an activation, and down again."""
    w, s = machine.borrowed(w), machine.borrowed(s)
    start, end = rows_of(len(s.hidden), m.number, m.size)
    vectors.multiply(w.up[block], s.seen, w.up_bias[block], s.hidden, start, end)
    if shape.ffn == vectors.SWIGLU:
        vectors.multiply(w.gated[block], s.seen, w.up_bias[block], s.gated, start, end)
    vectors.activate(shape.ffn, s.hidden[start:end], s.gated[start:end])
    machine.meet(m.meeting, m.size)
    multiply(w.down[block], s.hidden, w.down_bias[block], s.added, m)
    machine.meet(m.meeting, m.size)


# --------------------------------------------------------------------------------------------------
# The next tokens


@machine.compiled
def write_likeliest(
    token: int, position: int, shape: Shape, w: Weights, s: State, m: Member, out: np.ndarray
) -> int:
    """Fill `out` with the tokens that follow `token`, each the likeliest; returns how many were certain.

    The scores of the one that was not are in `s.logits`. `shape.vocab_size` scores are of tokens. Each member
    of a team finds the same tokens.
    """
    w, s = machine.borrowed(w), machine.borrowed(s)
    for n in range(len(out)):
        read_token(token, position + n, shape, w, s, m)
        token = vectors.likeliest(s.logits[: shape.vocab_size])
        if token == -1:
            return n
        out[n] = token
    return len(out)
