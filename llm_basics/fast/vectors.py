"""Rows of numbers as loops that a processor does eight or sixteen at a time: products, norms, activations.

A compiler finds the wide instructions by itself where a loop has no call in it and its sum may be taken in
any order; the C library's `exp`, one number a call, would take longer than all products of a small model.
"""

import math

import numba
import numpy as np

from llm_basics.fast import machine

# kinds of feed-forward network
SWIGLU, GELU, GELU_TANH, RELU2, SILU = range(5)

ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
ROOT_HALF, TWO_ROOT_2_PI = np.float32(math.sqrt(0.5)), np.float32(2 * math.sqrt(2 / math.pi))

# beyond these, e^x is no ordinary float32
LOWEST, HIGHEST = np.float32(-87), np.float32(88)
LOG2_E = np.float32(math.log2(math.e))
# ln 2 in two numbers, the first of so few digits that its multiples are exact (Cody and Waite 1980)
LN_2, REST_OF_LN_2 = np.float32(0.693359375), np.float32(math.log(2) - 0.693359375)
TAYLOR = tuple(np.float32(1 / math.factorial(n)) for n in range(2, 8))

# closer to the highest score than this, another may be its equal once both are probabilities
NEAR = np.float32(1e-5)


@machine.inlined
def exp(x: float) -> float:
    """`e^x = 2^n e^r`, n whole and r within ln 2 / 2 of 0: the exponent of a float32, and a short sum."""
    x = min(max(x, LOWEST), HIGHEST)
    n = math.floor(x * LOG2_E + HALF)
    r = x - np.float32(n) * LN_2 - np.float32(n) * REST_OF_LN_2
    a, b, c, d, e, f = TAYLOR
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return power * (ONE + r + r * r * (a + r * (b + r * (c + r * (d + r * (e + r * f))))))


@machine.inlined
def sigmoid(x: float) -> float:
    """`1 / (1 + e^-x)`."""
    return ONE / (ONE + exp(-x))


@machine.summing
def multiply(matrix: int, x: np.ndarray, bias: np.ndarray, out: np.ndarray, start: int, end: int) -> None:
    """`out = matrix x + bias` for some rows, four at a time: each number of `x` is fetched once for them.

    The last four may be some of those before again: so equal rows have equal sums, wherever they stand.
    """
    n = len(x)
    weight = numba.carray(machine.floats_at(matrix), (len(out), n))
    for first in range(start, end if end - start >= 4 else start, 4):
        row = min(first, end - 4)
        a = b = c = d = ZERO
        for i in range(n):
            a += weight[row, i] * x[i]
            b += weight[row + 1, i] * x[i]
            c += weight[row + 2, i] * x[i]
            d += weight[row + 3, i] * x[i]
        out[row], out[row + 1] = a + bias[row], b + bias[row + 1]
        out[row + 2], out[row + 3] = c + bias[row + 2], d + bias[row + 3]
    for row in range(start if end - start < 4 else end, end):
        a = ZERO
        for i in range(n):
            a += weight[row, i] * x[i]
        out[row] = a + bias[row]


@machine.summing
def normalize(
    x: np.ndarray, gain: np.ndarray, bias: np.ndarray, eps: float, is_layer_norm: bool, out: np.ndarray
) -> None:
    """`(x - mean) / sqrt(mean square + eps) * gain + bias`; for RMSNorm the mean is left where it is."""
    n = np.float32(len(x))
    mean = square = ZERO
    if is_layer_norm:
        for i in range(len(x)):
            mean += x[i]
        mean /= n
    for i in range(len(x)):
        square += (x[i] - mean) * (x[i] - mean)
    scale = ONE / np.float32(math.sqrt(square / n + np.float32(eps)))
    for i in range(len(x)):
        out[i] = (x[i] - mean) * scale * gain[i] + bias[i]


@machine.summing
def activate(kind: int, hidden: np.ndarray, gated: np.ndarray) -> None:
    """Apply a feed-forward network's activation in place; swiglu's gates let `gated` through."""
    if kind == SWIGLU:
        for i in range(len(hidden)):
            hidden[i] *= sigmoid(hidden[i]) * gated[i]
    elif kind == SILU:
        for i in range(len(hidden)):
            hidden[i] *= sigmoid(hidden[i])
    elif kind == RELU2:
        for i in range(len(hidden)):
            hidden[i] = max(hidden[i], ZERO) * max(hidden[i], ZERO)
    elif kind == GELU:
        for i in range(len(hidden)):
            hidden[i] *= HALF * (ONE + math.erf(hidden[i] * ROOT_HALF))
    else:
        # the tanh form: (1 + tanh(u)) / 2 is sigmoid(2 u)
        for i in range(len(hidden)):
            h = hidden[i]
            hidden[i] = h * sigmoid(TWO_ROOT_2_PI * (h + np.float32(0.044715) * h * h * h))


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
        scores[token] = exp(scores[token] - highest)
        total += scores[token]
    out[:] = ZERO
    for token in range(len(scores)):
        share = scores[token] / total
        for i in range(len(out)):
            out[i] += share * values[token, i]


@machine.summing
def likeliest(logits: np.ndarray) -> int:
    """The token of the highest score; -1 if others are so near that rounding decides, or if any is no number.

    >>> likeliest(np.array([1.0, 3.0, 2.0], np.float32)), likeliest(np.ones(2, np.float32))
    (1, -1)
    """
    highest, first = np.float32(-np.inf), -1
    for token in range(len(logits)):
        if logits[token] > highest:
            highest, first = logits[token], token
    n_near, nothing = 0, ZERO
    for token in range(len(logits)):
        n_near += highest - logits[token] < NEAR
        nothing += logits[token] * ZERO
    return first if n_near == 1 and nothing == ZERO else -1
