"""The steps of a model's forward and backward pass, and the interpreter that runs them.

A step is an operation and the addresses of what it reads and writes; `program` lists the steps of a model
once. A list instead of one large function is for the compiler, which then compiles each operation once.
"""

from typing import NamedTuple

import numpy as np

from llm_basics.fast import numba_jit
from llm_basics.fast.cpu import attention, backward_ops, matmul, vectors

# operations, and what each is given: addresses, then sizes. A name with a d is what the loss changes by
(
    EMBED,  # weight, positions, out
    EMBED_BACK,  # dx, dweight, dpositions
    NORMALIZE,  # x, gain, bias, out
    NORMALIZE_BACK,  # x, gain, dy, dgain, dbias, dx: added to
    PROJECT,  # x, packed weight, bias or what is in out already, out, d_in, d_out
    PROJECT_BACK,  # dy, weight, zeros or what is in dx already, dx, d_in, d_out
    LEARN,  # dy, x, dweight, dbias or 0, d_in, d_out
    ADD_BIAS,  # x, bias, out
    PLACE,  # x, gain, out, n_heads
    PLACE_BACK,  # x, gain, dy: becomes dx, dgain, n_heads
    ATTEND,  # q, k, v, sizes, out
    ATTEND_BACK,  # q, k, v, sizes, out, dout, dq, dk, dv
    ACTIVATE,  # hidden, gated, out
    ACTIVATE_BACK,  # hidden, gated, dout: becomes dhidden, dgated, out
    SCORE,  # x, packed weight, weight, logits, dx, dweight
) = range(15)

# an operation with all that it is given
LONGEST = 10

# of a target that does not count
IGNORED = -100

# tokens whose scores exist at a time
SCORED = 128


class Task(NamedTuple):
    """What all steps are told."""

    # tokens of a text
    seq: int
    d_model: int
    d_hidden: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    vocab_size: int
    # rows of the output projection
    n_rows: int
    is_layer_norm: bool
    has_qk_norm: bool
    ffn: int
    eps: float
    z_loss: float
    # how much a loss counts for the gradients
    share: float


class Workspace(NamedTuple):
    """Addresses of what several steps use."""

    turned: int
    zeros: int
    cos: int
    sin: int


@numba_jit.summing
def learn(
    program: np.ndarray,
    tokens: np.ndarray,
    targets: np.ndarray,
    at_a_time: int,
    task: Task,
    room: Workspace,
    of_heads: attention.Workspace,
) -> float:
    """Take all steps of a program, for some tokens at a time, and add up their loss.

    `at_a_time` is a multiple of `task.seq`. Gradients are added to what is there.
    """
    total = 0.0
    for first in range(0, len(tokens), at_a_time):
        some, answers = tokens[first : first + at_a_time], targets[first : first + at_a_time]
        for number in range(len(program)):
            step = program[number]
            if step[0] == SCORE:
                total += score(step, answers, task, room)
            elif step[0] in (ATTEND, ATTEND_BACK, PLACE, PLACE_BACK):
                attend(step, len(some), task, room, of_heads)
            elif step[0] in (PROJECT, PROJECT_BACK, LEARN):
                project(step, len(some), room)
            else:
                refine(step, some, task)
    return total


@numba_jit.inlined
def refine(step: np.ndarray, tokens: np.ndarray, task: Task) -> None:
    """One of the steps that take rows as they are, each for itself."""
    n, d_model, is_layer_norm = len(tokens), task.d_model, task.is_layer_norm
    a, b, c, d, e, f = step[1], step[2], step[3], step[4], step[5], step[6]
    if step[0] == NORMALIZE:
        backward_ops.normalize(a, b, c, task.eps, is_layer_norm, n, d_model, d)
    elif step[0] == NORMALIZE_BACK:
        backward_ops.normalize_back(a, b, task.eps, is_layer_norm, n, d_model, c, d, e, f)
    elif step[0] == ACTIVATE:
        backward_ops.activate(task.ffn, a, b, n * task.d_hidden, c)
    elif step[0] == ACTIVATE_BACK:
        backward_ops.activate_back(task.ffn, a, b, n * task.d_hidden, c, d, e)
    elif step[0] == ADD_BIAS:
        backward_ops.add_bias(a, b, n, d_model, c)
    elif step[0] == EMBED:
        backward_ops.embed(tokens, a, b, task.seq, d_model, c)
    elif step[0] == EMBED_BACK:
        backward_ops.add_to_rows(tokens, a, d_model, b)
        backward_ops.add_rows(a, n, d_model, task.seq, c)


@numba_jit.inlined
def project(step: np.ndarray, n: int, room: Workspace) -> None:
    """One of the steps that multiply `n` rows by a matrix, or learn it."""
    a, b, c, d, d_in, d_out = step[1], step[2], step[3], step[4], step[5], step[6]
    if step[0] == PROJECT:
        start, out = matmul.start_at(c, d, d_out), matmul.rows_at(d, d_out)
        matmul.product(matmul.rows_at(a, d_in), matmul.packed(b, d_in), start, out, n, d_out, d_in)
    elif step[0] == PROJECT_BACK:
        start, out = matmul.start_at(c, d, d_in), matmul.rows_at(d, d_in)
        matmul.product(matmul.rows_at(a, d_out), matmul.columns_at(b, d_in), start, out, n, d_in, d_out)
    elif step[0] == LEARN:
        matmul.turn(a, d_out, n, d_out, room.turned)
        turned, out = matmul.turned(room.turned, n), matmul.rows_at(c, d_in)
        matmul.product(turned, matmul.columns_at(b, d_in), out, out, d_out, d_in, n)
        if d:
            backward_ops.add_rows(a, n, d_out, 1, d)


@numba_jit.inlined
def attend(step: np.ndarray, n: int, task: Task, room: Workspace, of_heads: attention.Workspace) -> None:
    """One of the steps of attention among `n` tokens."""
    shape = attention.Heads(n // task.seq, task.seq, task.n_heads, task.n_kv_heads, task.d_head)
    a, b, c, d, e, f = step[1], step[2], step[3], step[4], step[5], step[6]
    if step[0] == ATTEND:
        attention.attend(a, b, c, d, shape, of_heads, e)
    elif step[0] == ATTEND_BACK:
        numba_jit.array(step[8], (n * task.n_kv_heads * task.d_head,))[:] = vectors.ZERO
        numba_jit.array(step[9], (n * task.n_kv_heads * task.d_head,))[:] = vectors.ZERO
        attention.attend_backward(a, b, c, d, e, f, shape, of_heads, step[7], step[8], step[9])
    elif step[0] == PLACE:
        attention.apply_rope(a, b, task.eps, task.has_qk_norm, room.cos, room.sin, shape, d, c)
    elif step[0] == PLACE_BACK:
        attention.apply_rope_backward(a, b, task.eps, task.has_qk_norm, room.cos, room.sin, shape, e, c, d)


@numba_jit.summing
def score(step: np.ndarray, targets: np.ndarray, task: Task, room: Workspace) -> float:
    """The loss of hidden states, and what it changes by with them and with the output projection."""
    x, packed, weight, logits, dx, dweight = step[1], step[2], step[3], step[4], step[5], step[6]
    total, d, n_rows, width = 0.0, task.d_model, task.n_rows, matmul.padded(task.n_rows)
    zeros, scores = matmul.repeated_at(room.zeros), matmul.rows_at(logits, width)
    for first in range(0, len(targets), SCORED):
        n, start = min(SCORED, len(targets) - first), 4 * first * d
        matmul.product(matmul.rows_at(x + start, d), matmul.packed(packed, d), zeros, scores, n, n_rows, d)
        for t in range(n):
            row, target = numba_jit.row(logits, t, width), targets[first + t]
            if target == IGNORED:
                row[:] = vectors.ZERO
            else:
                total += backward_ops.score(row, task.vocab_size, target, task.z_loss, task.share)
                row[task.vocab_size :] = vectors.ZERO
        to, out = matmul.rows_at(dx + start, d), matmul.rows_at(dweight, d)
        matmul.product(scores, matmul.columns_at(weight, d), zeros, to, n, d, n_rows)
        matmul.turn(logits, width, n, n_rows, room.turned)
        matmul.product(matmul.turned(room.turned, n), matmul.columns_at(x + start, d), out, out, n_rows, d, n)
    return total
