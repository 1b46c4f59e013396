"""Vector kernels: products, norms, activations, attention and argmax of one row of float32.

LLVM vectorizes loops without calls whose sums may be reordered (`numba_jit.summing`); hence a custom `exp`.
"""

import math

import numpy as np

from llm_basics.fast import numba_jit

# kinds of feed-forward network, by their names in the config
SWIGLU, GELU, GELU_TANH, RELU2, SILU = range(5)
FFN = {"swiglu": SWIGLU, "gelu": GELU, "gelu_tanh": GELU_TANH, "relu2": RELU2, "silu": SILU}

ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
ROOT_HALF, TWO_ROOT_2_PI = np.float32(math.sqrt(0.5)), np.float32(2 * math.sqrt(2 / math.pi))

# outside this range e^x is not a normal float32; `exp` returns 0 up to the minimum
MIN_EXPONENT, MAX_EXPONENT = np.float32(-88), np.float32(88)
LOG2_E = np.float32(math.log2(math.e))
# ln 2 as a sum whose first term has exact multiples (Cody and Waite 1980)
LN_2_HIGH, LN_2_LOW = np.float32(0.693359375), np.float32(math.log(2) - 0.693359375)
TAYLOR = tuple(np.float32(1 / math.factorial(n)) for n in range(2, 8))

# rows of a matrix whose sums are computed together
ROWS = 4

# a score this close to the maximum may round to the same probability
TIE_TOLERANCE = np.float32(1e-5)

ABS_MASK = np.int32(0x7FFFFFFF)
# the norm of a vector quantized to 16 bits
QUANTIZED_NORM = np.float32(32_000)
BLOCK = 64


@numba_jit.inlined
def exp(x: float) -> float:
    """`e^x = 2^n e^r` with integer n and |r| <= ln 2 / 2: exponent bits times a Taylor polynomial."""
    x = min(max(x, MIN_EXPONENT), MAX_EXPONENT)
    n = np.floor(x * LOG2_E + HALF)
    r = x - n * LN_2_HIGH - n * LN_2_LOW
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
    """`out = matrix x + bias` of the first `n` rows of `x`, for rows `start` to `end` of the matrix.

    `matrix` is the address of the weights and that of the rows' scales (8 bits) or 0. Four rows of `x` share
    each load of the matrix; rows of `out` beyond `n` may be overwritten.
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
    """Four rows at a time, which share each load of `x`.

    The last four may overlap the previous four, so that equal rows have equal sums at any index.
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
    """`multiply` with int8 weights and `x` quantized to int16, four rows at a time.

    `x` is scaled to the norm QUANTIZED_NORM, so that int32 sums cannot overflow (Cauchy-Schwarz).
    """
    square = ZERO
    for i in range(len(x)):
        square += x[i] * x[i]
    unit = np.float32(math.sqrt(square)) / QUANTIZED_NORM
    steps = ONE / unit if unit > ZERO else ZERO
    quantized = np.zeros(padded(len(x)), np.int16)
    for i in range(len(x)):
        quantized[i] = np.int16(np.rint(x[i] * steps))
    stride, scale = len(quantized), numba_jit.array(matrix[1], (len(out),))
    for row in range(start, end, 4):
        rows = matrix[0] + row * stride
        # the last four may exceed the end, where the matrix is padded
        sums = numba_jit.four_sums(rows, stride, quantized.ctypes.data)
        for i in range(min(4, end - row)):
            out[row + i] = np.float32(sums[i]) * (unit * scale[row + i]) + bias[row + i]


@numba_jit.summing
def round_rows(matrix: int, n: int, out: np.ndarray, scale: np.ndarray) -> None:
    """Quantize each row of `n` elements to int8 with one scale, so that the largest is 127 or -127."""
    weight = numba_jit.array(matrix, (len(scale), n))
    for row in range(len(scale)):
        # absolute values are ordered as their bits, and an integer maximum is faster
        bits, max_bits = weight[row].view(np.int32), np.int32(0)
        for i in range(n):
            magnitude = np.int32(bits[i] & ABS_MASK)
            max_bits = magnitude if magnitude > max_bits else max_bits
        largest = np.int32(max_bits).view(np.float32)
        scale[row] = largest / np.float32(127)
        steps = np.float32(127) / largest if largest > ZERO else ZERO
        for i in range(n):
            out[row, i] = np.int8(np.int32(np.rint(weight[row, i] * steps)))


@numba_jit.jit
def padded(n: int) -> int:
    """The next multiple of BYTES_AT_ONCE, as `numba_jit.four_sums` requires."""
    return -(-n // numba_jit.BYTES_AT_ONCE) * numba_jit.BYTES_AT_ONCE


@numba_jit.summing
def normalize(
    x: np.ndarray, gain: np.ndarray, bias: np.ndarray, eps: float, is_layer_norm: bool, out: np.ndarray
) -> None:
    """`(x - mean) / sqrt(variance + eps) * gain + bias`, with mean = 0 for RMSNorm."""
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
    """Apply a feed-forward network's activation to `hidden` in place; SwiGLU multiplies by `gated`."""
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
        # tanh form: (1 + tanh(u)) / 2 = sigmoid(2 u)
        for i in range(len(hidden)):
            h = hidden[i]
            hidden[i] = h * sigmoid(TWO_ROOT_2_PI * (h + np.float32(0.044715) * h * h * h))


@numba_jit.summing
def highest(logits: np.ndarray) -> int:
    """The index of the first maximum; 0 if there is none.

    A block is compared with the maximum so far in vectors, and element by element only if one is higher.

    >>> highest(np.array([1.0, 3.0, 3.0], np.float32))
    1
    """
    maximum, first = np.float32(-np.inf), 0
    for start in range(0, len(logits), BLOCK):
        block = logits[start : start + BLOCK]
        n_higher = 0
        for i in range(len(block)):
            n_higher += block[i] > maximum
        if n_higher:
            for i in range(len(block)):
                if block[i] > maximum:
                    maximum, first = block[i], start + i
    return first


@numba_jit.summing
def weighted_sum(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, scores: np.ndarray, out: np.ndarray
) -> None:
    """`softmax(q K^T / sqrt(d_head)) V` over the first `len(scores)` tokens."""
    # four tokens at once, then the rest
    n, width, maximum, total = len(scores), len(q), np.float32(-np.inf), ZERO
    n_whole = n - n % 4 if width % numba_jit.FLOATS_AT_ONCE == 0 else 0
    for token in range(0, n_whole, 4):
        four = numba_jit.four_products(keys[token].ctypes.data, width, q.ctypes.data)
        maximum = max(maximum, max(max(four[0], four[1]), max(four[2], four[3])))
        for i in range(4):
            scores[token + i] = four[i]
    for token in range(n_whole, n):
        a = ZERO
        for i in range(width):
            a += q[i] * keys[token, i]
        scores[token] = a
        maximum = max(maximum, a)
    scale = ONE / np.float32(math.sqrt(width))
    for token in range(n):
        scores[token] = exp((scores[token] - maximum) * scale)
        total += scores[token]
    out[:] = ZERO
    for start in range(0, width if n_whole else 0, numba_jit.FLOATS_AT_ONCE):
        block = numba_jit.weighted_sum(values[0, start:].ctypes.data, width, n_whole, scores.ctypes.data)
        for i in range(numba_jit.FLOATS_AT_ONCE):
            out[start + i] = block[i]
    for token in range(n_whole, n):
        for i in range(width):
            out[i] += scores[token] * values[token, i]
    for i in range(width):
        out[i] /= total


@numba_jit.summing
def likeliest(logits: np.ndarray) -> int:
    """The index of the maximum; -1 for near ties within rounding, or if any score is not finite.

    >>> likeliest(np.array([1.0, 3.0, 2.0], np.float32)), likeliest(np.ones(2, np.float32))
    (1, -1)
    """
    first = highest(logits)
    n_tied, nan_check = 0, ZERO
    for token in range(len(logits)):
        n_tied += logits[first] - logits[token] < TIE_TOLERANCE
        nan_check += logits[token] * ZERO
    return first if n_tied == 1 and nan_check == ZERO else -1
