"""Products, norms and activations of one row of numbers, as loops that a compiler vectorizes.

It does so where a loop has no call and its sum may be taken in any order; hence an `exp` of our own.
"""

import math

import numpy as np

from llm_basics.fast import numba_jit

# kinds of feed-forward network, as a model's config has them
SWIGLU, GELU, GELU_TANH, RELU2, SILU = range(5)
FFN = {"swiglu": SWIGLU, "gelu": GELU, "gelu_tanh": GELU_TANH, "relu2": RELU2, "silu": SILU}

ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
ROOT_HALF, TWO_ROOT_2_PI = np.float32(math.sqrt(0.5)), np.float32(2 * math.sqrt(2 / math.pi))

# beyond these, e^x is no ordinary float32; of the lowest, and what is below, `exp` makes 0
LOWEST, HIGHEST = np.float32(-88), np.float32(88)
LOG2_E = np.float32(math.log2(math.e))
# ln 2 in two numbers, the first of so few digits that its multiples are exact (Cody and Waite 1980)
LN_2, REST_OF_LN_2 = np.float32(0.693359375), np.float32(math.log(2) - 0.693359375)
TAYLOR = tuple(np.float32(1 / math.factorial(n)) for n in range(2, 8))

# of a matrix whose sums are taken side by side
ROWS = 4

# closer to the highest score than this, another may be its equal once both are probabilities
NEAR = np.float32(1e-5)

ALL_BUT_SIGN = np.int32(0x7FFFFFFF)
# of a vector rounded to 16 bits
LENGTH = np.float32(32_000)
COMPARED_AT_A_TIME = 64


@numba_jit.inlined
def exp(x: float) -> float:
    """`e^x = 2^n e^r`, n whole and r within ln 2 / 2 of 0: the exponent of a float32, and a short sum."""
    x = min(max(x, LOWEST), HIGHEST)
    n = np.floor(x * LOG2_E + HALF)
    r = x - n * LN_2 - n * REST_OF_LN_2
    a, b, c, d, e, f = TAYLOR
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return power * (ONE + r + r * r * (a + r * (b + r * (c + r * (d + r * (e + r * f))))))


@numba_jit.inlined
def sigmoid(x: float) -> float:
    """`1 / (1 + e^-x)`."""
    return ONE / (ONE + exp(-x))


@numba_jit.summing
def multiply(
    matrix: np.ndarray, x: np.ndarray, n: int, bias: np.ndarray, out: np.ndarray, start: int, end: int
) -> None:
    """`out = matrix x + bias` of the first `n` rows of `x`, for some rows of the matrix.

    `matrix` is its address, and that of its rows' scales or 0. With several `x`, the numbers of the matrix
    are fetched once for four of them; room beyond `n` may be worked on in vain.
    """
    if matrix[1]:
        multiply_bytes(matrix, x[0], bias, out[0], start, end)
    elif n > 1 and end - start >= 4 and x.shape[1] % numba_jit.FLOATS_AT_ONCE == 0:
        multiply_four(matrix[0], x, n, bias, out, start, end)
    else:
        for t in range(n):
            multiply_one(matrix[0], x[t], bias, out[t], start, end)


@numba_jit.summing
def multiply_one(matrix: int, x: np.ndarray, bias: np.ndarray, out: np.ndarray, start: int, end: int) -> None:
    """Four rows at a time: each number of `x` is fetched once for them.

    The last four may be some of those before again: so equal rows have equal sums, wherever they stand.
    """
    n = len(x)
    weight = numba_jit.array(matrix, (len(out), n))
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


@numba_jit.summing
def multiply_four(
    matrix: int, x: np.ndarray, n: int, bias: np.ndarray, out: np.ndarray, start: int, end: int
) -> None:
    """Four rows of the matrix and four of `x` at a time."""
    d_in = x.shape[1]
    for first in range(start, end, 4):
        row = min(first, end - 4)
        for t in range(0, n, 4):
            sums = numba_jit.sixteen_products(matrix + 4 * row * d_in, d_in, x[t:].ctypes.data)
            for i in range(4):
                for j in range(4):
                    out[t + i, row + j] = sums[4 * i + j] + bias[row + j]


@numba_jit.summing
def multiply_bytes(
    matrix: np.ndarray, x: np.ndarray, bias: np.ndarray, out: np.ndarray, start: int, end: int
) -> None:
    """Sums of whole numbers, four rows at a time, then scaled: `x` is rounded too, to 16 bits.

    Its length becomes LENGTH, so that no product with a row is beyond 32 bits (Cauchy and Schwarz).
    """
    square = ZERO
    for i in range(len(x)):
        square += x[i] * x[i]
    unit = np.float32(math.sqrt(square)) / LENGTH
    steps = ONE / unit if unit > ZERO else ZERO
    whole = np.zeros(padded(len(x)), np.int16)
    for i in range(len(x)):
        whole[i] = np.int16(np.rint(x[i] * steps))
    stride, scale = len(whole), numba_jit.array(matrix[1], (len(out),))
    for row in range(start, end, 4):
        rows = matrix[0] + row * stride
        # the last four may go beyond the end: there is room for them
        sums = numba_jit.four_sums(rows, stride, whole.ctypes.data)
        for i in range(min(4, end - row)):
            out[row + i] = np.float32(sums[i]) * (unit * scale[row + i]) + bias[row + i]


@numba_jit.summing
def round_rows(matrix: int, n: int, out: np.ndarray, scale: np.ndarray) -> None:
    """Each row of `n` numbers as a scale and whole numbers of 8 bits, the largest 127 or -127."""
    weight = numba_jit.array(matrix, (len(scale), n))
    for row in range(len(scale)):
        # of numbers without their sign, the order is that of their bits; a maximum of those is found sooner
        bits, most = weight[row].view(np.int32), np.int32(0)
        for i in range(n):
            size = np.int32(bits[i] & ALL_BUT_SIGN)
            most = size if size > most else most
        largest = np.int32(most).view(np.float32)
        scale[row] = largest / np.float32(127)
        steps = np.float32(127) / largest if largest > ZERO else ZERO
        for i in range(n):
            out[row, i] = np.int8(np.int32(np.rint(weight[row, i] * steps)))


@numba_jit.jit
def padded(n: int) -> int:
    """The next multiple of how many numbers `machine.four_sums` takes at a time."""
    return -(-n // numba_jit.BYTES_AT_ONCE) * numba_jit.BYTES_AT_ONCE


@numba_jit.summing
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


@numba_jit.summing
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


@numba_jit.summing
def highest(logits: np.ndarray) -> int:
    """The token of the highest score, the first of equals; 0 where there is none.

    A few at a time are compared with the highest before, side by side; one by one only where one is higher.

    >>> highest(np.array([1.0, 3.0, 3.0], np.float32))
    1
    """
    top, first = np.float32(-np.inf), 0
    for start in range(0, len(logits), COMPARED_AT_A_TIME):
        some = logits[start : start + COMPARED_AT_A_TIME]
        n_higher = 0
        for i in range(len(some)):
            n_higher += some[i] > top
        if n_higher:
            for i in range(len(some)):
                if some[i] > top:
                    top, first = some[i], start + i
    return first


@numba_jit.summing
def weighted_sum(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, scores: np.ndarray, out: np.ndarray
) -> None:
    """`softmax(q K^T / sqrt(d_head)) V` over as many tokens as there is room for scores."""
    # whole vectors of four tokens at once, then what is left
    n, width, top, total = len(scores), len(q), np.float32(-np.inf), ZERO
    n_whole = n - n % 4 if width % numba_jit.FLOATS_AT_ONCE == 0 else 0
    for token in range(0, n_whole, 4):
        four = numba_jit.four_products(keys[token].ctypes.data, width, q.ctypes.data)
        top = max(top, max(max(four[0], four[1]), max(four[2], four[3])))
        for i in range(4):
            scores[token + i] = four[i]
    for token in range(n_whole, n):
        a = ZERO
        for i in range(width):
            a += q[i] * keys[token, i]
        scores[token] = a
        top = max(top, a)
    scale = ONE / np.float32(math.sqrt(width))
    for token in range(n):
        scores[token] = exp((scores[token] - top) * scale)
        total += scores[token]
    out[:] = ZERO
    for start in range(0, width if n_whole else 0, numba_jit.FLOATS_AT_ONCE):
        some = numba_jit.weighted_sum(values[0, start:].ctypes.data, width, n_whole, scores.ctypes.data)
        for i in range(numba_jit.FLOATS_AT_ONCE):
            out[start + i] = some[i]
    for token in range(n_whole, n):
        for i in range(width):
            out[i] += scores[token] * values[token, i]
    for i in range(width):
        out[i] /= total


@numba_jit.summing
def likeliest(logits: np.ndarray) -> int:
    """The token of the highest score; -1 if others are so near that rounding decides, or if any is no number.

    >>> likeliest(np.array([1.0, 3.0, 2.0], np.float32)), likeliest(np.ones(2, np.float32))
    (1, -1)
    """
    first = highest(logits)
    n_near, nothing = 0, ZERO
    for token in range(len(logits)):
        n_near += logits[first] - logits[token] < NEAR
        nothing += logits[token] * ZERO
    return first if n_near == 1 and nothing == ZERO else -1
