"""A transformer as loops: one token in, the scores of the next one out.

What `model.TransformerLM` says in layers of tensors is said here once more in numbers, for one token of one
text. Everything a model may do without has a value that changes nothing: a bias of 0, an angle of 0, a
position embedding of 0. So there is one path through the loops, and few questions on it.

Each weight is read once a token, and there is nothing to win by arithmetic:

    tokens per second <= bytes read per second / bytes of all weights

Where memory gives 40 GB in a second, a model of 500 MB writes no more than 80 tokens in it, on any number of
cores; one of 5 MB stays in the cache, which may give twice that, and is held up by the rest as well.
"""

import math
from typing import NamedTuple

import numba
import numpy as np

from llm_basics.fast import machine

# kinds of feed-forward network
SWIGLU, GELU, GELU_TANH, RELU2, SILU = range(5)
FFN = {"swiglu": SWIGLU, "gelu": GELU, "gelu_tanh": GELU_TANH, "relu2": RELU2, "silu": SILU}

ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
ROOT_HALF, TWO_ROOT_2_PI = np.float32(math.sqrt(0.5)), np.float32(2 * math.sqrt(2 / math.pi))

# closer to the highest score than this, another may be its equal once both are probabilities
NEAR = np.float32(1e-5)


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


@machine.summing
def read_token(token: int, position: int, shape: Shape, w: Weights, s: State) -> None:
    """Write the scores of the token that follows `token` to `s.logits`, and its keys and values to `s`."""
    w, s = machine.borrowed(w), machine.borrowed(s)
    x, seen, added = s.x, s.seen, s.added
    for i in range(len(x)):
        x[i] = s.x0[i] = w.token_embeddings[token, i] + w.position_embeddings[position, i]
    for block in range(len(w.ln1)):
        for i in range(len(x)):
            x[i] = w.x0_mix[block, 0] * x[i] + w.x0_mix[block, 1] * s.x0[i]
        prepare(x, w.ln1[block], w.ln1_bias[block], shape, seen)
        attend(block, token, position, shape, w, s)
        add(x, added, w.ln1[block], w.ln1_bias[block], shape)
        prepare(x, w.ln2[block], w.ln2_bias[block], shape, seen)
        think(block, shape, w, s)
        add(x, added, w.ln2[block], w.ln2_bias[block], shape)
    normalize(x, w.ln_final, w.ln_final_bias, shape, seen)
    multiply(w.lm_head[0], seen, w.lm_head_bias, s.logits)


# --------------------------------------------------------------------------------------------------
# In and out of the residual stream


@machine.summing
def multiply(matrix: int, x: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    """`out = matrix x + bias`, four rows at a time: each number of `x` is fetched once for them."""
    n_rows, n = len(out), len(x)
    weight = numba.carray(machine.floats_at(matrix), (n_rows, n))
    by_four = n_rows - n_rows % 4
    for row in range(0, by_four, 4):
        a = b = c = d = ZERO
        for i in range(n):
            a += weight[row, i] * x[i]
            b += weight[row + 1, i] * x[i]
            c += weight[row + 2, i] * x[i]
            d += weight[row + 3, i] * x[i]
        out[row], out[row + 1] = a + bias[row], b + bias[row + 1]
        out[row + 2], out[row + 3] = c + bias[row + 2], d + bias[row + 3]
    for row in range(by_four, n_rows):
        a = ZERO
        for i in range(n):
            a += weight[row, i] * x[i]
        out[row] = a + bias[row]


@machine.summing
def normalize(x: np.ndarray, gain: np.ndarray, bias: np.ndarray, shape: Shape, out: np.ndarray) -> None:
    """`(x - mean) / sqrt(mean square + eps) * gain + bias`; for RMSNorm the mean is left where it is."""
    n = np.float32(len(x))
    mean = square = ZERO
    if shape.is_layer_norm:
        for i in range(len(x)):
            mean += x[i]
        mean /= n
    for i in range(len(x)):
        square += (x[i] - mean) * (x[i] - mean)
    scale = ONE / np.float32(math.sqrt(square / n + np.float32(shape.eps)))
    for i in range(len(x)):
        out[i] = (x[i] - mean) * scale * gain[i] + bias[i]


@machine.summing
def prepare(x: np.ndarray, gain: np.ndarray, bias: np.ndarray, shape: Shape, seen: np.ndarray) -> None:
    """What a sublayer sees of the residual stream."""
    if shape.is_post_norm:
        seen[:] = x
    else:
        normalize(x, gain, bias, shape, seen)


@machine.summing
def add(x: np.ndarray, added: np.ndarray, gain: np.ndarray, bias: np.ndarray, shape: Shape) -> None:
    """Add what a sublayer found to the residual stream."""
    for i in range(len(x)):
        x[i] += added[i]
    if shape.is_post_norm:
        normalize(x, gain, bias, shape, x)


# --------------------------------------------------------------------------------------------------
# The sublayers


@machine.summing
def attend(block: int, token: int, position: int, shape: Shape, w: Weights, s: State) -> None:
    """Each head mixes the values of all tokens so far, by how well their keys match its query."""
    w, s = machine.borrowed(w), machine.borrowed(s)
    d_head = s.keys.shape[-1]
    multiply(w.q[block], s.seen, w.q_bias[block], s.q)
    multiply(w.k[block], s.seen, w.k_bias[block], s.k)
    multiply(w.v[block], s.seen, w.v_bias[block], s.v)
    if shape.has_value_embeddings:
        of_tokens = numba.carray(
            machine.floats_at(w.value_embeddings[block]), (len(w.token_embeddings), len(s.v))
        )
        for i in range(len(s.v)):
            s.v[i] += of_tokens[token, i]
    for head in range(shape.n_kv_heads):
        key = s.k[head * d_head : (head + 1) * d_head]
        place(key, w.k_norm[block], w.cos[position], w.sin[position], shape)
        s.keys[block, head, position] = key
        s.values[block, head, position] = s.v[head * d_head : (head + 1) * d_head]
    # neighbouring heads share keys and values
    group = shape.n_heads // shape.n_kv_heads
    for head in range(shape.n_heads):
        query = s.q[head * d_head : (head + 1) * d_head]
        place(query, w.q_norm[block], w.cos[position], w.sin[position], shape)
        keys, values = s.keys[block, head // group], s.values[block, head // group]
        mixed = s.mixed[head * d_head : (head + 1) * d_head]
        mix(query, keys, values, s.scores[: position + 1], mixed)
    multiply(w.output[block], s.mixed, w.output_bias[block], s.added)


@machine.summing
def place(x: np.ndarray, gain: np.ndarray, cos: np.ndarray, sin: np.ndarray, shape: Shape) -> None:
    """Make one head's query or key ready: RMSNorm if the model has that, then turn it to its position."""
    if shape.has_qk_norm:
        square = ZERO
        for i in range(len(x)):
            square += x[i] * x[i]
        scale = ONE / np.float32(math.sqrt(square / np.float32(len(x)) + np.float32(shape.eps)))
        for i in range(len(x)):
            x[i] *= scale * gain[i]
    for pair in range(len(cos)):
        even, odd = x[2 * pair], x[2 * pair + 1]
        x[2 * pair] = even * cos[pair] - odd * sin[pair]
        x[2 * pair + 1] = even * sin[pair] + odd * cos[pair]


@machine.summing
def mix(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scores: np.ndarray, out: np.ndarray) -> None:
    """`softmax(q K^T / sqrt(d_head)) V` over as many tokens as there is room for scores."""
    scale = ONE / np.float32(math.sqrt(len(q)))
    highest = np.float32(-np.inf)
    for token in range(len(scores)):
        score = ZERO
        for i in range(len(q)):
            score += q[i] * keys[token, i]
        scores[token] = score * scale
        highest = max(highest, scores[token])
    total = ZERO
    for token in range(len(scores)):
        scores[token] = math.exp(scores[token] - highest)
        total += scores[token]
    out[:] = ZERO
    for token in range(len(scores)):
        share = scores[token] / total
        for i in range(len(out)):
            out[i] += share * values[token, i]


@machine.summing
def think(block: int, shape: Shape, w: Weights, s: State) -> None:
    """The feed-forward network: up to `d_ff` features, an activation, and down again."""
    w, s = machine.borrowed(w), machine.borrowed(s)
    hidden, gated = s.hidden, s.gated
    multiply(w.up[block], s.seen, w.up_bias[block], hidden)
    if shape.ffn == SWIGLU:
        multiply(w.gated[block], s.seen, w.up_bias[block], gated)
    for i in range(len(hidden)):
        h = hidden[i]
        if shape.ffn == SWIGLU:
            hidden[i] = h * sigmoid(h) * gated[i]
        elif shape.ffn == SILU:
            hidden[i] = h * sigmoid(h)
        elif shape.ffn == RELU2:
            hidden[i] = max(h, ZERO) * max(h, ZERO)
        elif shape.ffn == GELU:
            hidden[i] = h * HALF * (ONE + math.erf(h * ROOT_HALF))
        else:
            # the tanh form: (1 + tanh(u)) / 2 is sigmoid(2 u)
            hidden[i] = h * sigmoid(TWO_ROOT_2_PI * (h + np.float32(0.044715) * h * h * h))
    multiply(w.down[block], hidden, w.down_bias[block], s.added)


@machine.inlined
def sigmoid(x: float) -> float:
    """`1 / (1 + e^-x)`."""
    return ONE / (ONE + math.exp(-x))


# --------------------------------------------------------------------------------------------------
# The next token


@machine.compiled
def likeliest(logits: np.ndarray) -> int:
    """The token of the highest score; -1 if others are so near that rounding decides, or if any is no number.

    >>> likeliest(np.array([1.0, 3.0, 2.0], np.float32)), likeliest(np.ones(2, np.float32))
    (1, -1)
    """
    first = 0
    for token in range(len(logits)):
        if not math.isfinite(logits[token]):
            return -1
        if logits[token] > logits[first]:
            first = token
    for token in range(len(logits)):
        if token != first and logits[first] - logits[token] < NEAR:
            return -1
    return first


@machine.compiled
def write_likeliest(token: int, position: int, shape: Shape, w: Weights, s: State, out: np.ndarray) -> int:
    """Fill `out` with the tokens that follow `token`, each the likeliest; returns how many were certain.

    The scores of the one that was not are in `s.logits`. `shape.vocab_size` scores are of tokens.
    """
    w, s = machine.borrowed(w), machine.borrowed(s)
    for n in range(len(out)):
        read_token(token, position + n, shape, w, s)
        token = likeliest(s.logits[: shape.vocab_size])
        if token == -1:
            return n
        out[n] = token
    return len(out)
