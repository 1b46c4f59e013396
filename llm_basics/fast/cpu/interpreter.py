"""Runs a model's forward and backward pass from a tape: a table of operations and addresses.

A row of the table is an operation code, the addresses of its arrays, and sizes; `tape.Program` writes it once
per model. Numba compiles each operation once, where one function for a whole model would take long.
"""

from typing import NamedTuple

import numpy as np

from llm_basics.fast import numba_jit
from llm_basics.fast.cpu import attention, backward_ops, matmul, vectors

# operation codes and their arguments: addresses, then sizes; dx is the gradient of x
(
    EMBED,  # weight, positions, out
    EMBED_BACKWARD,  # dx, dweight, dpositions
    NORMALIZE,  # x, gain, bias, out
    NORMALIZE_BACKWARD,  # x, gain, dy, dgain, dbias, dx (accumulated)
    PROJECT,  # x, packed weight, bias (or out: accumulate), out, d_in, d_out
    PROJECT_BACKWARD,  # dy, weight, zeros (or dx: accumulate), dx, d_in, d_out
    WEIGHT_GRADIENT,  # dy, x, dweight, dbias or 0, d_in, d_out
    ADD_BIAS,  # x, bias, out
    ROPE,  # x, gain, out, n_heads
    ROPE_BACKWARD,  # x, gain, dy (becomes dx), dgain, n_heads
    ATTEND,  # q, k, v, sizes, out
    ATTEND_BACKWARD,  # q, k, v, sizes, out, dout, dq, dk, dv
    ACTIVATE,  # hidden, gated, out
    ACTIVATE_BACKWARD,  # hidden, gated, dout (becomes dhidden), dgated, out
    LOSS,  # x, packed weight, weight, logits, dx, dweight
    EVALUATE,  # x, packed weight, logits, n_correct (a float)
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


class Workspace(NamedTuple):
    """Addresses of arrays shared by several operations."""

    transposed: int
    zeros: int
    cos: int
    sin: int


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
            if step[0] == LOSS:
                total += loss(step, chunk_targets, task, workspace)
            elif step[0] == EVALUATE:
                total += evaluate(step, chunk_targets, task, workspace)
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
    a, b, c, d, d_in, d_out = step[1], step[2], step[3], step[4], step[5], step[6]
    if step[0] == PROJECT:
        start, out = matmul.start_at(c, d, d_out), matmul.rows_at(d, d_out)
        matmul.product(matmul.rows_at(a, d_in), matmul.packed(b, d_in), start, out, n, d_out, d_in)
    elif step[0] == PROJECT_BACKWARD:
        start, out = matmul.start_at(c, d, d_in), matmul.rows_at(d, d_in)
        matmul.product(matmul.rows_at(a, d_out), matmul.columns_at(b, d_in), start, out, n, d_in, d_out)
    elif step[0] == WEIGHT_GRADIENT:
        matmul.transpose(a, d_out, n, d_out, workspace.transposed)
        transposed, out = matmul.transposed(workspace.transposed, n), matmul.rows_at(c, d_in)
        matmul.product(transposed, matmul.columns_at(b, d_in), out, out, d_out, d_in, n)
        if d:
            backward_ops.add_rows(a, n, d_out, 1, d)


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
    """The summed loss of hidden states; writes their gradient and adds to the output projection's."""
    x, packed, weight, logits, dx, dweight = step[1], step[2], step[3], step[4], step[5], step[6]
    total, d, n_rows, width = 0.0, task.d_model, task.n_rows, matmul.padded(task.n_rows)
    zeros, logits_matrix = matmul.broadcast_at(workspace.zeros), matmul.rows_at(logits, width)
    for first in range(0, len(targets), LOSS_TOKENS):
        n, start = min(LOSS_TOKENS, len(targets) - first), 4 * first * d
        matmul.product(
            matmul.rows_at(x + start, d), matmul.packed(packed, d), zeros, logits_matrix, n, n_rows, d
        )
        for t in range(n):
            row, target = numba_jit.row(logits, t, width), targets[first + t]
            if target == IGNORE_INDEX:
                row[:] = vectors.ZERO
            else:
                total += backward_ops.cross_entropy(row, task.vocab_size, target, task.z_loss, task.share)
                row[task.vocab_size :] = vectors.ZERO
        to, out = matmul.rows_at(dx + start, d), matmul.rows_at(dweight, d)
        matmul.product(logits_matrix, matmul.columns_at(weight, d), zeros, to, n, d, n_rows)
        matmul.transpose(logits, width, n, n_rows, workspace.transposed)
        matmul.product(
            matmul.transposed(workspace.transposed, n),
            matmul.columns_at(x + start, d),
            out,
            out,
            n_rows,
            d,
            n,
        )
    return total


@numba_jit.summing
def evaluate(step: np.ndarray, targets: np.ndarray, task: Task, workspace: Workspace) -> float:
    """The summed loss of hidden states; counts the targets with the highest logit."""
    x, packed, logits, n_correct = step[1], step[2], step[3], numba_jit.array(step[4], (1,))
    total, d, width = 0.0, task.d_model, matmul.padded(task.n_rows)
    zeros, logits_matrix = matmul.broadcast_at(workspace.zeros), matmul.rows_at(logits, width)
    for first in range(0, len(targets), LOSS_TOKENS):
        n, rows = min(LOSS_TOKENS, len(targets) - first), matmul.rows_at(x + 4 * first * d, d)
        matmul.product(rows, matmul.packed(packed, d), zeros, logits_matrix, n, task.n_rows, d)
        for t in range(n):
            row, target = numba_jit.row(logits, t, width)[: task.vocab_size], targets[first + t]
            if target != IGNORE_INDEX:
                total += backward_ops.log_sum_exp(row, task.vocab_size) - row[target]
                n_correct[0] += np.float32(vectors.highest(row) == target)
    return total
