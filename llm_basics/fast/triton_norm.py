"""Root mean square normalization in one pass: each vector is read once, and written once.

Step by step, `functional.rms_norm` reads and writes everything six times: widen, square, average, divide,
scale, narrow. In bfloat16 that moves 6 + 8 + 4 + 8 + 8 + 6 = 40 bytes an element. Only 4 of them are needed,
2 to read and 2 to write, since a vector fits into the registers of one program: there it can be squared,
summed and scaled without going anywhere. The arithmetic is too little to matter.

Backward, with `r = 1 / sqrt(mean(x^2) + eps)`, `n = x r` and `g` the gradient of the output,

    dx = r (g w - n mean(g w n))
    dw = sum of g n over all vectors

Nothing but `x` and `w` is kept from the forward pass: `r` costs less to calculate again than to load. The sum
for `dw` would have all programs add to the same numbers; instead each adds up its own rows, and one sum over
the programs follows. So the order of the additions, and with it every bit, is the same in every run.
"""

from typing import Any

import torch
import triton
from jaxtyping import Float
from torch import Tensor
from triton import language as tl

from llm_basics.core import functional as reference
from llm_basics.fast.cuda import triton_jit

# the reference, whose name may come to stand for what is defined here
rms_norm_in_steps = reference.rms_norm

# elements in the tile of one program: several short vectors, or a long one
TILE = 2048
LONGEST = 16384
# programs that share the rows for dw: a few for each of a card's multiprocessors
PROGRAMS = 512


def rms_norm(
    x: Float[Tensor, "... d_model"], weight: Float[Tensor, " d_model"], eps: float = 1e-5
) -> Float[Tensor, "... d_model"]:
    """`functional.rms_norm` in one kernel, and one for its gradients, which have none themselves.

    >>> rms_norm(torch.tensor([3.0, -3.0]), weight=torch.tensor([1.0, 2.0]), eps=0.0)
    tensor([ 1., -2.])
    """
    if not triton_jit.can_take(x, weight) or x.shape[-1] > LONGEST:
        return rms_norm_in_steps(x, weight, eps)
    return _RMSNorm.apply(x, weight, float(eps))


@triton_jit.kernel
def _normalize(
    x: triton_jit.Pointer,
    weight: triton_jit.Pointer,
    out: triton_jit.Pointer,
    n_rows: triton_jit.Number,
    d_model: triton_jit.Number,
    eps: triton_jit.Number,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One program normalizes ROWS vectors."""
    at, inside, scale = _tile(tl.program_id(0) * ROWS, weight, n_rows, d_model, ROWS, COLUMNS)
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    normalized = wide * _inverse_root_mean_square(wide, d_model, eps)
    tl.store(out + at, normalized * scale, mask=inside)


@triton_jit.kernel
def _gradients(
    x: triton_jit.Pointer,
    weight: triton_jit.Pointer,
    grad_out: triton_jit.Pointer,
    grad_x: triton_jit.Pointer,
    grad_weight_parts: triton_jit.Pointer,
    n_rows: triton_jit.Number,
    d_model: triton_jit.Number,
    eps: triton_jit.Number,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One program goes down all rows in steps as long as all programs are together, and keeps its sum."""
    program, step = tl.program_id(0), tl.num_programs(0) * ROWS
    grad_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first_row in range(program * ROWS, n_rows, step):
        at, inside, scale = _tile(first_row, weight, n_rows, d_model, ROWS, COLUMNS)
        wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
        inverse = _inverse_root_mean_square(wide, d_model, eps)
        normalized = wide * inverse
        grad_weight += gradient * normalized
        gradient *= scale
        along = tl.sum(gradient * normalized, axis=1, keep_dims=True) / d_model
        tl.store(grad_x + at, inverse * (gradient - normalized * along), mask=inside)
    columns = tl.arange(0, COLUMNS)
    # program * d_model stays small: there are at most PROGRAMS of them
    mine = grad_weight_parts + program * d_model + columns
    tl.store(mine, tl.sum(grad_weight, axis=0), mask=columns < d_model)


@triton_jit.kernel
def _tile(
    first_row: triton_jit.Number,
    weight: triton_jit.Pointer,
    n_rows: triton_jit.Number,
    d_model: triton_jit.Number,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tuple[triton_jit.Tile, triton_jit.Tile, triton_jit.Tile]:
    """Where a tile's elements are, which of them exist, and the weights of its columns."""
    rows, columns = first_row + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    # 64 bits: there may be more than 2^31 elements
    at = rows.to(tl.int64)[:, None] * d_model + columns[None, :]
    inside = (rows < n_rows)[:, None] & (columns < d_model)[None, :]
    return at, inside, tl.load(weight + columns, mask=columns < d_model, other=0.0).to(tl.float32)[None, :]


@triton_jit.kernel
def _inverse_root_mean_square(
    wide: triton_jit.Tile, d_model: triton_jit.Number, eps: triton_jit.Number
) -> triton_jit.Tile:
    """`1 / sqrt(mean(x^2) + eps)` of each row; the columns beyond d_model are 0 and add nothing."""
    return tl.rsqrt(tl.sum(wide * wide, axis=1, keep_dims=True) / d_model + eps)


class _RMSNorm(torch.autograd.Function):
    """Both kernels, as one operation that has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        out = torch.empty_like(x)
        n_rows, d_model, shape = _layout(x)
        with triton_jit.on_device_of(x):
            grid = (triton.cdiv(n_rows, shape["ROWS"]),)
            _normalize[grid](x, weight, out, n_rows, d_model, eps, **shape)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return out

    @staticmethod
    @triton_jit.differentiable_once
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        n_rows, d_model, shape = _layout(x)
        n_programs = min(triton.cdiv(n_rows, shape["ROWS"]), PROGRAMS)
        parts = x.new_empty(n_programs, d_model, dtype=torch.float32)
        with triton_jit.on_device_of(x):
            _gradients[(n_programs,)](
                x, weight, grad_out.contiguous(), grad_x, parts, n_rows, d_model, ctx.eps, **shape
            )
        return grad_x, parts.sum(0).to(weight.dtype), None


def _layout(x: Tensor) -> tuple[int, int, dict[str, int]]:
    """How many vectors there are, how long they are, and the tile for them."""
    d_model = x.shape[-1]
    n_rows = x.numel() // d_model
    columns = triton_jit.block_size(d_model, LONGEST)
    rows = triton_jit.block_size(n_rows, max(TILE // columns, 1))
    # 16 elements a thread, while there are threads
    num_warps = min(max(rows * columns // 512, 1), 16)
    return n_rows, d_model, {"ROWS": rows, "COLUMNS": columns, "num_warps": num_warps}
