"""Runs a model's forward and backward pass from a tape: a table of operations and addresses.

A row of the table is an operation code, the addresses of its arrays, and sizes; `tape.Program` writes it once
per model. Numba compiles each operation once, where one function for a whole model would take long.
"""

from typing import NamedTuple

import numpy as np

from llm_basics.fast import numba_jit
from llm_basics.fast.cpu import amx, attention, backward_ops, matmul, vectors

Matrix = matmul.Matrix

# operation codes and their arguments: addresses, then sizes; dx is the gradient of x; is_rounded: in bfloat16
(
    EMBED,  # weight, positions, out
    EMBED_BACKWARD,  # dx, dweight, dpositions
    NORMALIZE,  # x, gain, bias, out
    NORMALIZE_BACKWARD,  # x, gain, dy, dgain, dbias, dx (accumulated)
    PROJECT,  # x, packed weight, bias (or out: accumulate), out, d_in, d_out, is_rounded
    PROJECT_BACKWARD,  # dy, weight, zeros (or dx: accumulate), dx, d_in, d_out, is_rounded
    WEIGHT_GRADIENT,  # dy, x, dweight, dbias or 0, d_in, d_out, is_rounded
    ADD_BIAS,  # x, bias, out
    ROPE,  # x, gain, out, n_heads
    ROPE_BACKWARD,  # x, gain, dy (becomes dx), dgain, n_heads
    ATTEND,  # q, k, v, sizes, out
    ATTEND_BACKWARD,  # q, k, v, sizes, out, dout, dq, dk, dv
    ACTIVATE,  # hidden, gated, out
    ACTIVATE_BACKWARD,  # hidden, gated, dout (becomes dhidden), dgated, out
    LOSS,  # x, packed weight, weight, logits, dx, dweight, is_rounded
    EVALUATE,  # x, packed weight, n_correct (a float), logits, 0, 0, is_rounded
) = range(16)

# columns of the table: an operation and its arguments
STEP_LENGTH = 10

# the target of tokens without a loss
IGNORE_INDEX = -100

# tokens whose logits exist at a time
LOSS_TOKENS = 128


class Task(NamedTuple):
    """Sizes and options shared by all operations."""

    # tokens per text
    seq: int
    d_model: int
    d_hidden: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    vocab_size: int
    # rows of the output projection: the padded vocabulary
    n_rows: int
    is_layer_norm: bool
    has_qk_norm: bool
    ffn: int
    eps: float
    z_loss: float
    # the factor of each token's loss in the gradients
    share: float


class Projection(NamedTuple):
    """The sizes of a projection of `n` rows, and whether its operands are rounded to bfloat16."""

    n: int
    d_in: int
    d_out: int
    is_rounded: int


class Workspace(NamedTuple):
    """Addresses of arrays shared by several operations."""

    transposed: int
    zeros: int
    cos: int
    sin: int
    # operands of products in bfloat16, and the sizes of the tile registers
    left: int
    right: int
    tiles: int


@numba_jit.summing
def learn(
    program: np.ndarray,
    tokens: np.ndarray,
    targets: np.ndarray,
    chunk_size: int,
    task: Task,
    workspace: Workspace,
    attention_workspace: attention.Workspace,
) -> float:
    """Run a program on `chunk_size` tokens at a time (a multiple of `task.seq`); returns the summed loss.

    Gradients, or the number of correct predictions, are accumulated.
    """
    total = 0.0
    for first in range(0, len(tokens), chunk_size):
        chunk, chunk_targets = tokens[first : first + chunk_size], targets[first : first + chunk_size]
        for index in range(len(program)):
            step = program[index]
            if step[0] in (LOSS, EVALUATE):
                total += loss(step, chunk_targets, task, workspace)
            elif step[0] in (ATTEND, ATTEND_BACKWARD, ROPE, ROPE_BACKWARD):
                attend(step, len(chunk), task, workspace, attention_workspace)
            elif step[0] in (PROJECT, PROJECT_BACKWARD, WEIGHT_GRADIENT):
                run_projection(step, len(chunk), workspace)
            else:
                run_row_op(step, chunk, task)
    return total


@numba_jit.inlined
def run_row_op(step: np.ndarray, tokens: np.ndarray, task: Task) -> None:
    """Run a row-wise operation."""
    n, d_model, is_layer_norm = len(tokens), task.d_model, task.is_layer_norm
    a, b, c, d, e, f = step[1], step[2], step[3], step[4], step[5], step[6]
    if step[0] == NORMALIZE:
        backward_ops.normalize(a, b, c, task.eps, is_layer_norm, n, d_model, d)
    elif step[0] == NORMALIZE_BACKWARD:
        backward_ops.normalize_backward(a, b, task.eps, is_layer_norm, n, d_model, c, d, e, f)
    elif step[0] == ACTIVATE:
        backward_ops.activate(task.ffn, a, b, n * task.d_hidden, c)
    elif step[0] == ACTIVATE_BACKWARD:
        backward_ops.activate_backward(task.ffn, a, b, n * task.d_hidden, c, d, e)
    elif step[0] == ADD_BIAS:
        backward_ops.add_bias(a, b, n, d_model, c)
    elif step[0] == EMBED:
        backward_ops.embed(tokens, a, b, task.seq, d_model, c)
    elif step[0] == EMBED_BACKWARD:
        backward_ops.add_to_rows(tokens, a, d_model, b)
        backward_ops.add_rows(a, n, d_model, task.seq, c)


@numba_jit.inlined
def run_projection(step: np.ndarray, n: int, workspace: Workspace) -> None:
    """Run a projection of `n` rows, or one of its gradients."""
    a, b, c, d, shape = step[1], step[2], step[3], step[4], Projection(n, step[5], step[6], step[7])
    if step[0] == PROJECT:
        start, out = matmul.start_at(c, d, shape.d_out), matmul.rows_at(d, shape.d_out)
        project(a, b, start, out, shape, workspace)
    elif step[0] == PROJECT_BACKWARD:
        start, out = matmul.start_at(c, d, shape.d_in), matmul.rows_at(d, shape.d_in)
        project_backward(matmul.rows_at(a, shape.d_out), b, start, out, shape, workspace)
    elif step[0] == WEIGHT_GRADIENT:
        weight_gradient(matmul.rows_at(a, shape.d_out), b, c, shape, workspace)
        if d:
            backward_ops.add_rows(a, n, shape.d_out, 1, d)


@numba_jit.jit
def project(x: int, packed: int, start: Matrix, out: Matrix, shape: Projection, workspace: Workspace) -> None:
    """`out = start + x weight^T`."""
    n, d_in, d_out, is_rounded = shape
    if is_rounded:
        amx.round_rows(x, n * d_in, workspace.left)
        left, right = matmul.rows_at(workspace.left, d_in // 2), matmul.packed(packed, d_in // 2)
        amx.product(left, right, start, out, n, d_out, d_in, workspace.tiles)
    else:
        matmul.product(matmul.rows_at(x, d_in), matmul.packed(packed, d_in), start, out, n, d_out, d_in)


@numba_jit.jit
def project_backward(
    dy: Matrix, weight: int, start: Matrix, dx: Matrix, shape: Projection, workspace: Workspace
) -> None:
    """`dx = start + dy weight`."""
    n, d_in, d_out, is_rounded = shape
    right = matmul.columns_at(weight, d_in)
    if is_rounded:
        amx.round_rows(dy.address, n * d_out, workspace.left)
        left = matmul.rows_at(workspace.left, d_out // 2)
        amx.product(left, right, start, dx, n, d_in, d_out, workspace.tiles)
    else:
        matmul.product(dy, right, start, dx, n, d_in, d_out)


@numba_jit.jit
def weight_gradient(dy: Matrix, x: int, dweight: int, shape: Projection, workspace: Workspace) -> None:
    """`dweight += dy^T x`."""
    n, d_in, d_out, is_rounded = shape
    out, width = matmul.rows_at(dweight, d_in), amx.padded(n)
    if is_rounded:
        amx.pair_rows(dy.address, n, d_out, workspace.transposed)
        amx.transpose(workspace.transposed, n, d_out, workspace.left)
        amx.pair_rows(x, n, d_in, workspace.right)
        left, right = matmul.rows_at(workspace.left, width // 2), matmul.columns_at(workspace.right, d_in)
        amx.product(left, right, out, out, d_out, d_in, width, workspace.tiles)
    else:
        matmul.transpose(dy.address, dy.row, n, d_out, workspace.transposed)
        left, right = matmul.transposed(workspace.transposed, n), matmul.columns_at(x, d_in)
        matmul.product(left, right, out, out, d_out, d_in, n)


@numba_jit.inlined
def attend(
    step: np.ndarray, n: int, task: Task, workspace: Workspace, attention_workspace: attention.Workspace
) -> None:
    """Run an operation of attention on `n` tokens."""
    shape = attention.Heads(n // task.seq, task.seq, task.n_heads, task.n_kv_heads, task.d_head)
    a, b, c, d, e, f = step[1], step[2], step[3], step[4], step[5], step[6]
    if step[0] == ATTEND:
        attention.attend(a, b, c, d, shape, attention_workspace, e)
    elif step[0] == ATTEND_BACKWARD:
        numba_jit.array(step[8], (n * task.n_kv_heads * task.d_head,))[:] = vectors.ZERO
        numba_jit.array(step[9], (n * task.n_kv_heads * task.d_head,))[:] = vectors.ZERO
        attention.attend_backward(a, b, c, d, e, f, shape, attention_workspace, step[7], step[8], step[9])
    elif step[0] == ROPE:
        attention.apply_rope(a, b, task.eps, task.has_qk_norm, workspace.cos, workspace.sin, shape, d, c)
    elif step[0] == ROPE_BACKWARD:
        attention.apply_rope_backward(
            a, b, task.eps, task.has_qk_norm, workspace.cos, workspace.sin, shape, e, c, d
        )


@numba_jit.summing
def loss(step: np.ndarray, targets: np.ndarray, task: Task, workspace: Workspace) -> float:
    """The summed loss of hidden states.

    LOSS writes their gradient and adds to the output projection's; EVALUATE counts the targets with the
    highest logit.
    """
    x, packed, weight, logits, dx, dweight = step[1], step[2], step[3], step[4], step[5], step[6]
    total, d, n_rows, width, is_loss = (
        0.0,
        task.d_model,
        task.n_rows,
        matmul.padded(task.n_rows),
        step[0] == LOSS,
    )
    zeros, logits_matrix = matmul.broadcast_at(workspace.zeros), matmul.rows_at(logits, width)
    n_correct = numba_jit.array(weight, (1,))
    for first in range(0, len(targets), LOSS_TOKENS):
        n, start = min(LOSS_TOKENS, len(targets) - first), 4 * first * d
        shape = Projection(n, d, n_rows, step[7])
        project(x + start, packed, zeros, logits_matrix, shape, workspace)
        for t in range(n):
            row, target = numba_jit.row(logits, t, width), targets[first + t]
            if target == IGNORE_INDEX:
                row[:] = vectors.ZERO
            elif is_loss:
                total += backward_ops.cross_entropy(row, task.vocab_size, target, task.z_loss, task.share)
                row[task.vocab_size :] = vectors.ZERO
            else:
                total += backward_ops.log_sum_exp(row, task.vocab_size) - row[target]
                n_correct[0] += np.float32(vectors.highest(row[: task.vocab_size]) == target)
        if is_loss:
            project_backward(logits_matrix, weight, zeros, matmul.rows_at(dx + start, d), shape, workspace)
            weight_gradient(logits_matrix, x + start, dweight, shape, workspace)
    return total
