"""Embedding, normalization, activation and loss over the rows of many tokens, with their gradients.

A function that ends in `_backward` takes `dy`, the gradient of its output, and computes `dx`, that of its
input. Gradients of parameters are accumulated. Arrays are (token, feature) in float32 and passed as
addresses, since Numba compiles functions of many arrays slowly.
"""

import math

import numpy as np

from llm_basics.fast import numba_jit
from llm_basics.fast.cpu import matmul, vectors

ZERO, HALF, ONE, TWO = vectors.ZERO, vectors.HALF, vectors.ONE, np.float32(2)
TWO_ROOT_2_PI, INV_SQRT_2_PI = vectors.TWO_ROOT_2_PI, np.float32(1 / math.sqrt(2 * math.pi))
# elements copied and then activated while they are in the L1 cache
BLOCK = 1024

CUBIC, THREE_CUBIC = np.float32(0.044715), np.float32(3 * 0.044715)


# --------------------------------------------------------------------------------------------------
# Embedding and sums


@numba_jit.jit
def embed(tokens: np.ndarray, weight: int, positions: int, seq: int, d: int, out: int) -> None:
    """Token plus position embeddings of texts of `seq` tokens."""
    for t in range(len(tokens)):
        token_row, position_row = numba_jit.row(weight, tokens[t], d), numba_jit.row(positions, t % seq, d)
        row = numba_jit.row(out, t, d)
        for i in range(d):
            row[i] = token_row[i] + position_row[i]


@numba_jit.jit
def add_to_rows(tokens: np.ndarray, rows: int, d: int, out: int) -> None:
    """The gradient of an embedding table: add each row to the row of its token."""
    for t in range(len(tokens)):
        row, token_row = numba_jit.row(rows, t, d), numba_jit.row(out, tokens[t], d)
        for i in range(d):
            token_row[i] += row[i]


@numba_jit.jit
def add_rows(rows: int, n: int, d: int, period: int, out: int) -> None:
    """Add row t to row `t % period` of `out`: the gradient of a broadcast."""
    for t in range(n):
        row, total = numba_jit.row(rows, t, d), numba_jit.row(out, t % period, d)
        for i in range(d):
            total[i] += row[i]


@numba_jit.jit
def add_bias(x: int, bias: int, n: int, d: int, out: int) -> None:
    """`out = x + bias` for each row."""
    biases = numba_jit.array(bias, (d,))
    for t in range(n):
        row, out_row = numba_jit.row(x, t, d), numba_jit.row(out, t, d)
        for i in range(d):
            out_row[i] = row[i] + biases[i]


# --------------------------------------------------------------------------------------------------
# Normalization


@numba_jit.summing
def normalize(
    x: int, gain: int, bias: int, eps: float, is_layer_norm: bool, n: int, d: int, out: int
) -> None:
    """`vectors.normalize` for each row."""
    gains, biases = numba_jit.array(gain, (d,)), numba_jit.array(bias, (d,))
    for t in range(n):
        row, out_row = numba_jit.row(x, t, d), numba_jit.row(out, t, d)
        vectors.normalize(row, gains, biases, eps, is_layer_norm, out_row)


@numba_jit.summing
def normalize_backward(
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
    """The gradients of `normalize`, added to `dx`, `dgain` and `dbias`.

    The output is invariant to the length of x and, for LayerNorm, to its mean: the gradient components along
    these directions vanish.
    """
    gains, width = numba_jit.array(gain, (d,)), np.float32(d)
    dgains, dbiases = numba_jit.array(dgain, (d,)), numba_jit.array(dbias, (d,))
    for t in range(n):
        row, dy_row, out_row = numba_jit.row(x, t, d), numba_jit.row(dy, t, d), numba_jit.row(dx, t, d)
        mean = square = dot = total = ZERO
        if is_layer_norm:
            for i in range(d):
                mean += row[i]
            mean /= width
        for i in range(d):
            centered, scaled = row[i] - mean, dy_row[i] * gains[i]
            square += centered * centered
            dot += scaled * centered
            total += scaled
        scale = ONE / np.float32(math.sqrt(square / width + np.float32(eps)))
        dot *= scale * scale / width
        total = total / width if is_layer_norm else ZERO
        for i in range(d):
            centered = row[i] - mean
            dgains[i] += dy_row[i] * centered * scale
            dbiases[i] += dy_row[i]
            out_row[i] += (dy_row[i] * gains[i] - total - centered * dot) * scale


# --------------------------------------------------------------------------------------------------
# Activations


@numba_jit.summing
def activate(kind: int, hidden: int, gated: int, n: int, out: int) -> None:
    """`vectors.activate` of `n` elements, out of place."""
    for start in range(0, n, BLOCK):
        size, offset = min(BLOCK, n - start), 4 * start
        out_row = numba_jit.array(out + offset, (size,))
        out_row[:] = numba_jit.array(hidden + offset, (size,))
        vectors.activate(kind, out_row, numba_jit.array(gated + offset, (size,)))


@numba_jit.summing
def activate_backward(kind: int, hidden: int, gated: int, n: int, dy: int, dgated: int, out: int) -> None:
    """Replace `dy` by the gradient of `hidden`, write `dgated`, and recompute the activation into `out`.

    Both use the same exponential, so storing the activation would cost memory and save little time.
    """
    x, d, out_row = numba_jit.array(hidden, (n,)), numba_jit.array(dy, (n,)), numba_jit.array(out, (n,))
    if kind == vectors.SWIGLU:
        up, d_up = numba_jit.array(gated, (n,)), numba_jit.array(dgated, (n,))
        for i in range(n):
            gate = vectors.sigmoid(x[i])
            silu = x[i] * gate
            out_row[i] = silu * up[i]
            d_up[i] = d[i] * silu
            d[i] *= up[i] * (gate + silu * (ONE - gate))
    elif kind == vectors.SILU:
        for i in range(n):
            gate = vectors.sigmoid(x[i])
            out_row[i] = x[i] * gate
            d[i] *= gate + out_row[i] * (ONE - gate)
    elif kind == vectors.RELU2:
        for i in range(n):
            rectified = max(x[i], ZERO)
            out_row[i] = rectified * rectified
            d[i] *= TWO * rectified
    elif kind == vectors.GELU:
        # the cumulative distribution function of the standard normal distribution, and its density
        for i in range(n):
            cdf = HALF * (ONE + math.erf(x[i] * vectors.ROOT_HALF))
            out_row[i] = x[i] * cdf
            d[i] *= cdf + x[i] * INV_SQRT_2_PI * vectors.exp(-HALF * x[i] * x[i])
    else:
        for i in range(n):
            h = x[i]
            gate = vectors.sigmoid(TWO_ROOT_2_PI * (h + CUBIC * h * h * h))
            out_row[i] = h * gate
            d[i] *= gate + out_row[i] * (ONE - gate) * TWO_ROOT_2_PI * (ONE + THREE_CUBIC * h * h)


# --------------------------------------------------------------------------------------------------
# Loss


@numba_jit.summing
def log_sum_exp(logits: np.ndarray, n: int) -> np.float32:
    """`log sum exp` of `n` logits."""
    total, n_whole = ZERO, n - n % matmul.VECTOR
    maximum = matmul.maximum(logits.ctypes.data, n_whole)
    for i in range(n_whole, n):
        maximum = max(maximum, logits[i])
    for i in range(n):
        total += vectors.exp(logits[i] - maximum)
    return maximum + np.float32(math.log(total))


@numba_jit.summing
def cross_entropy(logits: np.ndarray, n: int, target: int, z_loss: float, weight: float) -> float:
    """Cross-entropy with z-loss of one token over `n` logits, which are replaced by `weight` x gradient.

    The gradient is `softmax(logits) - one_hot(target)`, scaled by the slope of the z-loss.
    """
    weight_f32 = np.float32(weight)
    size, target_logit = log_sum_exp(logits, n), logits[target]
    scale_all = (ONE + TWO * np.float32(z_loss) * size) * weight_f32
    for i in range(n):
        logits[i] = scale_all * vectors.exp(logits[i] - size)
    logits[target] -= weight_f32
    return size - target_logit + np.float32(z_loss) * size * size
