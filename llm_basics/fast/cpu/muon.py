"""A step of Muon in machine code: `optim.muon_step_`, one matrix after the other.

To orthogonalize a matrix takes fifteen products that fit into a core's cache, so each thread has its own.
"""

import math

import numpy as np

from llm_basics.fast import numba_jit
from llm_basics.fast.cpu import matmul, vectors

# what keeps a matrix of zeros from being divided by 0
EPS = np.float32(1e-7)
STEPS = 5


@numba_jit.jit
def room_for(rows: int, cols: int) -> int:
    """How many numbers `update` works on beside a matrix of that shape."""
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
    room: int,
) -> None:
    """`optim.muon_update` of matrices: the addresses of each, of its gradient, and of its running mean.

    `rows` and `cols` are multiples of `tiles.VECTOR`; `factors` those of Newton's and Schulz' polynomial.
    """
    is_tall, size = rows > cols, rows * cols
    kept, length = np.float32(1 - lr * weight_decay), np.float32(lr * 0.2 * math.sqrt(max(rows, cols)))
    for number in range(len(addresses)):
        parameter, gradient, buffer = addresses[number]
        means, gradients = numba_jit.array(buffer, (size,)), numba_jit.array(gradient, (size,))
        direction = room + 4 * size if is_tall else room
        ahead, share = numba_jit.array(direction, (size,)), np.float32(1 - momentum)
        for i in range(size):
            means[i] += share * (gradients[i] - means[i])
            ahead[i] = means[i] + share * (gradients[i] - means[i])
        if is_tall:
            turn(direction, rows, cols, room)
        orthogonalize(room, min(rows, cols), max(rows, cols), factors, room + 4 * size)
        if is_tall:
            turn(room, cols, rows, direction)
        weights = numba_jit.array(parameter, (size,))
        for i in range(size):
            weights[i] = kept * weights[i] - length * ahead[i]


@numba_jit.jit
def turn(x: int, rows: int, cols: int, out: int) -> None:
    """Columns become rows."""
    before, after = numba_jit.array(x, (rows, cols)), numba_jit.array(out, (cols, rows))
    for column in range(cols):
        for row in range(rows):
            after[column, row] = before[row, column]


@numba_jit.summing
def orthogonalize(x: int, rows: int, cols: int, factors: tuple[float, float, float], room: int) -> None:
    """`optim.orthogonalize` of a matrix X that has no more rows than columns, in its place.

    The three terms of a step are one product, `(a I + b X X^T + c (X X^T)^2) X`.
    """
    size, (a, b, c) = rows * cols, factors
    gram = room + 4 * size
    square = gram + 4 * rows * rows
    packed = square + 4 * rows * rows
    nothing = packed + 4 * matmul.packed_size(rows, cols)
    numba_jit.array(nothing, (cols,))[:] = vectors.ZERO
    zeros = matmul.repeated_at(nothing)
    _divide_by_norm(numba_jit.array(x, (size,)))
    here, there = x, room
    for _ in range(STEPS):
        of_x, of_next = matmul.rows_at(here, cols), matmul.rows_at(there, cols)
        of_gram, of_square = matmul.rows_at(gram, rows), matmul.rows_at(square, rows)
        matmul.pack(here, cols, rows, cols, packed)
        matmul.product(of_x, matmul.packed(packed, cols), zeros, of_gram, rows, rows, cols)
        matmul.product(of_gram, matmul.columns_at(gram, rows), zeros, of_square, rows, rows, rows)
        _combine(numba_jit.array(gram, (rows, rows)), numba_jit.array(square, (rows, rows)), a, b, c)
        matmul.product(of_square, matmul.columns_at(here, cols), zeros, of_next, rows, cols, rows)
        here, there = there, here
    if here != x:
        numba_jit.array(x, (size,))[:] = numba_jit.array(here, (size,))


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
    """`a I + b gram + c square`, in place of `square`."""
    of_identity, of_gram, of_square = np.float32(a), np.float32(b), np.float32(c)
    for row in range(len(gram)):
        for column in range(len(gram)):
            square[row, column] = of_gram * gram[row, column] + of_square * square[row, column]
        square[row, row] += of_identity
