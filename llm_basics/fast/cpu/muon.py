"""Muon's update (`optim.muon_step_`) in machine code, one matrix at a time.

Orthogonalization is fifteen matrix products that fit a core's cache, so each thread processes whole matrices.
"""

import math

import numpy as np

from llm_basics.fast import numba_jit
from llm_basics.fast.cpu import matmul, vectors

# avoids division by zero for a matrix of zeros
EPS = np.float32(1e-7)
STEPS = 5


@numba_jit.jit
def workspace_size(rows: int, cols: int) -> int:
    """The number of float32 elements in the workspace of `update`."""
    small, large = min(rows, cols), max(rows, cols)
    return 2 * small * large + 2 * small * small + matmul.packed_size(small, large) + large


@numba_jit.summing
def update(
    addresses: np.ndarray,
    rows: int,
    cols: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    factors: tuple[float, float, float],
    workspace: int,
) -> None:
    """`optim.muon_update` in place; a row of `addresses` is a parameter, its gradient and its momentum.

    `rows` and `cols` are multiples of `matmul.VECTOR`; `factors` are the Newton-Schulz coefficients.
    """
    is_tall, size = rows > cols, rows * cols
    decay, step_size = np.float32(1 - lr * weight_decay), np.float32(lr * 0.2 * math.sqrt(max(rows, cols)))
    for number in range(len(addresses)):
        parameter, gradient, buffer = addresses[number]
        momenta, gradients = numba_jit.array(buffer, (size,)), numba_jit.array(gradient, (size,))
        direction = workspace + 4 * size if is_tall else workspace
        nesterov, blend = numba_jit.array(direction, (size,)), np.float32(1 - momentum)
        for i in range(size):
            momenta[i] += blend * (gradients[i] - momenta[i])
            nesterov[i] = momenta[i] + blend * (gradients[i] - momenta[i])
        if is_tall:
            transpose(direction, rows, cols, workspace)
        orthogonalize(workspace, min(rows, cols), max(rows, cols), factors, workspace + 4 * size)
        if is_tall:
            transpose(workspace, cols, rows, direction)
        weights = numba_jit.array(parameter, (size,))
        for i in range(size):
            weights[i] = decay * weights[i] - step_size * nesterov[i]


@numba_jit.jit
def transpose(x: int, rows: int, cols: int, out: int) -> None:
    """`out = x^T`."""
    source, target = numba_jit.array(x, (rows, cols)), numba_jit.array(out, (cols, rows))
    for column in range(cols):
        for row in range(rows):
            target[column, row] = source[row, column]


@numba_jit.summing
def orthogonalize(x: int, rows: int, cols: int, factors: tuple[float, float, float], workspace: int) -> None:
    """`optim.orthogonalize` in place, for a matrix X with at most as many rows as columns.

    An iteration is `X <- (a I + b X X^T + c (X X^T)^2) X`.
    """
    size, (a, b, c) = rows * cols, factors
    gram = workspace + 4 * size
    square = gram + 4 * rows * rows
    packed = square + 4 * rows * rows
    zero_row = packed + 4 * matmul.packed_size(rows, cols)
    numba_jit.array(zero_row, (cols,))[:] = vectors.ZERO
    zeros = matmul.broadcast_at(zero_row)
    _divide_by_norm(numba_jit.array(x, (size,)))
    current, following = x, workspace
    for _ in range(STEPS):
        current_rows, following_rows = matmul.rows_at(current, cols), matmul.rows_at(following, cols)
        gram_rows, square_rows = matmul.rows_at(gram, rows), matmul.rows_at(square, rows)
        matmul.pack(current, cols, rows, cols, packed)
        matmul.product(current_rows, matmul.packed(packed, cols), zeros, gram_rows, rows, rows, cols)
        matmul.product(gram_rows, matmul.columns_at(gram, rows), zeros, square_rows, rows, rows, rows)
        _combine(numba_jit.array(gram, (rows, rows)), numba_jit.array(square, (rows, rows)), a, b, c)
        matmul.product(square_rows, matmul.columns_at(current, cols), zeros, following_rows, rows, cols, rows)
        current, following = following, current
    if current != x:
        numba_jit.array(x, (size,))[:] = numba_jit.array(current, (size,))


@numba_jit.summing
def _divide_by_norm(x: np.ndarray) -> None:
    square = vectors.ZERO
    for i in range(len(x)):
        square += x[i] * x[i]
    scale = vectors.ONE / (np.float32(math.sqrt(square)) + EPS)
    for i in range(len(x)):
        x[i] *= scale


@numba_jit.summing
def _combine(gram: np.ndarray, square: np.ndarray, a: float, b: float, c: float) -> None:
    """`square <- a I + b gram + c square`."""
    a_f32, b_f32, c_f32 = np.float32(a), np.float32(b), np.float32(c)
    for row in range(len(gram)):
        for column in range(len(gram)):
            square[row, column] = b_f32 * gram[row, column] + c_f32 * square[row, column]
        square[row, row] += a_f32
