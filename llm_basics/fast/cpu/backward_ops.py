"""`vectors` for the rows of many tokens, with derivatives.

A function that ends in `_back` turns `dy`, the gradient with respect to its output, into `dx`, that of its
input. Gradients of parameters are added to what is there. Arrays are passed as addresses, since a function of
forty arrays takes long to compile.
"""

import math

import numpy as np

from llm_basics.fast import numba_jit
from llm_basics.fast.cpu import matmul, vectors

ZERO, HALF, ONE, TWO = vectors.ZERO, vectors.HALF, vectors.ONE, np.float32(2)
TWO_ROOT_2_PI, HIGHEST_DENSITY = vectors.TWO_ROOT_2_PI, np.float32(1 / math.sqrt(2 * math.pi))
# numbers that the nearest cache still holds when they are worked on
COPIED_AT_A_TIME = 1024

CUBIC, THREE_CUBIC = np.float32(0.044715), np.float32(3 * 0.044715)


# --------------------------------------------------------------------------------------------------
# Lookup and sums


@numba_jit.jit
def embed(tokens: np.ndarray, weight: int, positions: int, seq: int, d: int, out: int) -> None:
    """The rows of some tokens, and of the positions that they have in texts of `seq` tokens."""
    for t in range(len(tokens)):
        of_token, of_position = numba_jit.row(weight, tokens[t], d), numba_jit.row(positions, t % seq, d)
        row = numba_jit.row(out, t, d)
        for i in range(d):
            row[i] = of_token[i] + of_position[i]


@numba_jit.jit
def add_to_rows(tokens: np.ndarray, rows: int, d: int, out: int) -> None:
    """Add each row to the row of its token: what `rows` had of a table that was looked up."""
    for t in range(len(tokens)):
        row, of_token = numba_jit.row(rows, t, d), numba_jit.row(out, tokens[t], d)
        for i in range(d):
            of_token[i] += row[i]


@numba_jit.jit
def add_rows(rows: int, n: int, d: int, period: int, out: int) -> None:
    """Add up the rows that are `period` apart: what they had in common has the sum of their gradients."""
    for t in range(n):
        row, total = numba_jit.row(rows, t, d), numba_jit.row(out, t % period, d)
        for i in range(d):
            total[i] += row[i]


@numba_jit.jit
def add_bias(x: int, bias: int, n: int, d: int, out: int) -> None:
    """`out = x + bias` of each row."""
    more = numba_jit.array(bias, (d,))
    for t in range(n):
        row, to = numba_jit.row(x, t, d), numba_jit.row(out, t, d)
        for i in range(d):
            to[i] = row[i] + more[i]


# --------------------------------------------------------------------------------------------------
# Normalization


@numba_jit.summing
def normalize(
    x: int, gain: int, bias: int, eps: float, is_layer_norm: bool, n: int, d: int, out: int
) -> None:
    """`vectors.normalize` of each row."""
    gains, biases = numba_jit.array(gain, (d,)), numba_jit.array(bias, (d,))
    for t in range(n):
        row, to = numba_jit.row(x, t, d), numba_jit.row(out, t, d)
        vectors.normalize(row, gains, biases, eps, is_layer_norm, to)


@numba_jit.summing
def normalize_back(
    x: int,
    gain: int,
    eps: float,
    is_layer_norm: bool,
    n: int,
    d: int,
    dy: int,
    dgain: int,
    dbias: int,
    dx: int,
) -> None:
    """Add to `dx` what the rows of `normalize` had of `x`, and to `dgain` and `dbias` what they had of these.

    A normalized row has length sqrt(d) whatever the length of x, and for LayerNorm no mean whatever the mean
    of x: what of the gradient is along these directions is lost.
    """
    gains, width = numba_jit.array(gain, (d,)), np.float32(d)
    dgains, dbiases = numba_jit.array(dgain, (d,)), numba_jit.array(dbias, (d,))
    for t in range(n):
        row, change, to = numba_jit.row(x, t, d), numba_jit.row(dy, t, d), numba_jit.row(dx, t, d)
        mean = square = along = total = ZERO
        if is_layer_norm:
            for i in range(d):
                mean += row[i]
            mean /= width
        for i in range(d):
            centered, scaled = row[i] - mean, change[i] * gains[i]
            square += centered * centered
            along += scaled * centered
            total += scaled
        scale = ONE / np.float32(math.sqrt(square / width + np.float32(eps)))
        along *= scale * scale / width
        total = total / width if is_layer_norm else ZERO
        for i in range(d):
            centered = row[i] - mean
            dgains[i] += change[i] * centered * scale
            dbiases[i] += change[i]
            to[i] += (change[i] * gains[i] - total - centered * along) * scale


# --------------------------------------------------------------------------------------------------
# Activations


@numba_jit.summing
def activate(kind: int, hidden: int, gated: int, n: int, out: int) -> None:
    """`vectors.activate` of `n` numbers, which stay as they are."""
    for start in range(0, n, COPIED_AT_A_TIME):
        size, place = min(COPIED_AT_A_TIME, n - start), 4 * start
        to = numba_jit.array(out + place, (size,))
        to[:] = numba_jit.array(hidden + place, (size,))
        vectors.activate(kind, to, numba_jit.array(gated + place, (size,)))


@numba_jit.summing
def activate_back(kind: int, hidden: int, gated: int, n: int, dy: int, dgated: int, out: int) -> None:
    """Turn `dy` into what changes with `hidden`, and write the activation itself to `out` once more.

    Both are made of the same exponential, so to keep the activation would save little, and take memory.
    """
    x, d, to = numba_jit.array(hidden, (n,)), numba_jit.array(dy, (n,)), numba_jit.array(out, (n,))
    if kind == vectors.SWIGLU:
        let, dlet = numba_jit.array(gated, (n,)), numba_jit.array(dgated, (n,))
        for i in range(n):
            share = vectors.sigmoid(x[i])
            silu = x[i] * share
            to[i] = silu * let[i]
            dlet[i] = d[i] * silu
            d[i] *= let[i] * (share + silu * (ONE - share))
    elif kind == vectors.SILU:
        for i in range(n):
            share = vectors.sigmoid(x[i])
            to[i] = x[i] * share
            d[i] *= share + to[i] * (ONE - share)
    elif kind == vectors.RELU2:
        for i in range(n):
            rectified = max(x[i], ZERO)
            to[i] = rectified * rectified
            d[i] *= TWO * rectified
    elif kind == vectors.GELU:
        # the distribution function of the normal distribution, and its density
        for i in range(n):
            share = HALF * (ONE + math.erf(x[i] * vectors.ROOT_HALF))
            to[i] = x[i] * share
            d[i] *= share + x[i] * HIGHEST_DENSITY * vectors.exp(-HALF * x[i] * x[i])
    else:
        for i in range(n):
            h = x[i]
            share = vectors.sigmoid(TWO_ROOT_2_PI * (h + CUBIC * h * h * h))
            to[i] = h * share
            d[i] *= share + to[i] * (ONE - share) * TWO_ROOT_2_PI * (ONE + THREE_CUBIC * h * h)


# --------------------------------------------------------------------------------------------------
# The objective


@numba_jit.summing
def score(logits: np.ndarray, n: int, target: int, z_loss: float, share: float) -> float:
    """The loss of one token of `n` that are possible; `logits` become `share` times what it changes by.

    That is the probabilities, minus 1 at the target: what is too likely is pushed down, and the target up.
    """
    total, part = ZERO, np.float32(share)
    n_whole = n - n % matmul.VECTOR
    top = matmul.highest(logits.ctypes.data, n_whole)
    for i in range(n_whole, n):
        top = max(top, logits[i])
    for i in range(n):
        total += vectors.exp(logits[i] - top)
    size, at_target = top + np.float32(math.log(total)), logits[target]
    for_all = (ONE + TWO * np.float32(z_loss) * size) * part
    for i in range(n):
        logits[i] = for_all * vectors.exp(logits[i] - size)
    logits[target] -= part
    return size - at_target + np.float32(z_loss) * size * size
