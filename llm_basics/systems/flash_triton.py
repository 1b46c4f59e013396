"""FlashAttention as Triton kernels: the tiles of `flash_attention` in the registers of a GPU.

Many instances of a kernel, its programs, run at once, each on one tile. The forward kernel and the kernel of
dQ own a tile of queries and loop over tiles of keys; the kernel of dK and dV owns a tile of keys and loops
over tiles of queries. Each result is written by one program, without atomic sums. Fully masked tiles are
never loaded. Triton compiles the kernels for a GPU; with TRITON_INTERPRET=1, set before Triton is imported,
NumPy runs them on a CPU (arXiv 2205.14135, 2307.08691).
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
from jaxtyping import Float
from torch import Tensor
from triton import language as tl

# number of queries and of keys per tile, limited by the 99 KB of shared memory of consumer GPUs with 64
# float32 or 128 bfloat16 numbers per row; benchmarks/flash_attention.py --tune finds the fastest for a GPU
QUERIES, KEYS = 64, 32


def kernel(function: Callable[..., Any]) -> Any:
    """A kernel, or a function called by kernels."""
    # tests wrap functions to check shapes, which Triton cannot compile
    return triton.jit(inspect.unwrap(function))


@kernel
def visible_scores(q, k, queries, keys, n_keys, scale, IS_CAUSAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """`Q K^T / sqrt(d)` of a tile, -inf for keys past the end and keys after their query."""
    # "ieee": float32 without rounding to the 11 bits of TF32
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    visible = keys[None, :] < n_keys
    if IS_CAUSAL:
        visible = visible & (keys[None, :] <= queries[:, None])
    return tl.where(visible, scores, -float("inf"))


@kernel
def load_rows(pointer, rows, n_rows, D_HEAD: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of a matrix of `n_rows x D_HEAD`, with zeros past its ends; WIDTH is a power of two."""
    columns = tl.arange(0, WIDTH)
    inside = (rows < n_rows)[:, None] & (columns < D_HEAD)[None, :]
    return tl.load(pointer + rows[:, None] * D_HEAD + columns[None, :], mask=inside, other=0.0)


@kernel
def store_rows(pointer, rows, n_rows, tile, D_HEAD: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The counterpart of `load_rows`; rounds to the dtype of the matrix."""
    columns = tl.arange(0, WIDTH)
    inside = (rows < n_rows)[:, None] & (columns < D_HEAD)[None, :]
    tl.store(pointer + rows[:, None] * D_HEAD + columns[None, :], tile, mask=inside)


@kernel
def attend(  # type: ignore[no-untyped-def]
    query, key, value, output, log_sum, n_queries, n_keys, scale,
    IS_CAUSAL: tl.constexpr, D_HEAD: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: output and log-sum-exp of a tile of queries of one batch."""
    # 64 bits: all batches together may have more than 2^31 elements
    batch, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * QUERIES
    queries = first + tl.arange(0, QUERIES)
    q = load_rows(query + batch * n_queries * D_HEAD, queries, n_queries, D_HEAD, WIDTH)
    peak = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, WIDTH), tl.float32)
    end = n_keys
    if IS_CAUSAL:
        end = tl.minimum(first + QUERIES, n_keys)
    for first_key in range(0, end, KEYS):
        keys = first_key + tl.arange(0, KEYS)
        k = load_rows(key + batch * n_keys * D_HEAD, keys, n_keys, D_HEAD, WIDTH)
        v = load_rows(value + batch * n_keys * D_HEAD, keys, n_keys, D_HEAD, WIDTH)
        scores = visible_scores(q, k, queries, keys, n_keys, scale, IS_CAUSAL)
        # key 0, in the first tile, is never masked, so the peak is finite
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        correction = tl.exp(peak - new_peak)
        weights = tl.exp(scores - new_peak[:, None])
        total = total * correction + tl.sum(weights, axis=1)
        mixed = mixed * correction[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        peak = new_peak
    store_rows(output + batch * n_queries * D_HEAD, queries, n_queries, mixed / total[:, None], D_HEAD, WIDTH)
    tl.store(log_sum + batch * n_queries + queries, peak + tl.log(total), mask=queries < n_queries)


@kernel
def query_gradient(  # type: ignore[no-untyped-def]
    query, key, value, grad_output, log_sum, delta, dq, n_queries, n_keys, scale,
    IS_CAUSAL: tl.constexpr, D_HEAD: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: dQ of a tile of queries, a sum over tiles of keys."""
    batch, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * QUERIES
    queries = first + tl.arange(0, QUERIES)
    q = load_rows(query + batch * n_queries * D_HEAD, queries, n_queries, D_HEAD, WIDTH)
    do = load_rows(grad_output + batch * n_queries * D_HEAD, queries, n_queries, D_HEAD, WIDTH)
    at = batch * n_queries + queries
    log_sums = tl.load(log_sum + at, mask=queries < n_queries, other=0.0)
    d = tl.load(delta + at, mask=queries < n_queries, other=0.0)
    total = tl.zeros((QUERIES, WIDTH), tl.float32)
    end = n_keys
    if IS_CAUSAL:
        end = tl.minimum(first + QUERIES, n_keys)
    for first_key in range(0, end, KEYS):
        keys = first_key + tl.arange(0, KEYS)
        k = load_rows(key + batch * n_keys * D_HEAD, keys, n_keys, D_HEAD, WIDTH)
        v = load_rows(value + batch * n_keys * D_HEAD, keys, n_keys, D_HEAD, WIDTH)
        p = tl.exp(visible_scores(q, k, queries, keys, n_keys, scale, IS_CAUSAL) - log_sums[:, None])
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - d[:, None])
        total += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    store_rows(dq + batch * n_queries * D_HEAD, queries, n_queries, total * scale, D_HEAD, WIDTH)


@kernel
def key_gradient(  # type: ignore[no-untyped-def]
    query, key, value, grad_output, log_sum, delta, dk, dv, n_queries, n_keys, scale,
    IS_CAUSAL: tl.constexpr, D_HEAD: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of a tile of keys, sums over tiles of queries."""
    batch, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * KEYS
    keys = first + tl.arange(0, KEYS)
    k = load_rows(key + batch * n_keys * D_HEAD, keys, n_keys, D_HEAD, WIDTH)
    v = load_rows(value + batch * n_keys * D_HEAD, keys, n_keys, D_HEAD, WIDTH)
    total_k = tl.zeros((KEYS, WIDTH), tl.float32)
    total_v = tl.zeros((KEYS, WIDTH), tl.float32)
    begin = 0
    if IS_CAUSAL:
        begin = first // QUERIES * QUERIES
    for first_query in range(begin, n_queries, QUERIES):
        queries = first_query + tl.arange(0, QUERIES)
        # rows past the last query are zeros, in dO too, and add nothing
        q = load_rows(query + batch * n_queries * D_HEAD, queries, n_queries, D_HEAD, WIDTH)
        do = load_rows(grad_output + batch * n_queries * D_HEAD, queries, n_queries, D_HEAD, WIDTH)
        at = batch * n_queries + queries
        log_sums = tl.load(log_sum + at, mask=queries < n_queries, other=0.0)
        d = tl.load(delta + at, mask=queries < n_queries, other=0.0)
        p = tl.exp(visible_scores(q, k, queries, keys, n_keys, scale, IS_CAUSAL) - log_sums[:, None])
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - d[:, None])
        total_v += tl.dot(tl.trans(p.to(do.dtype)), do, input_precision="ieee")
        total_k += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision="ieee")
    store_rows(dk + batch * n_keys * D_HEAD, keys, n_keys, total_k * scale, D_HEAD, WIDTH)
    store_rows(dv + batch * n_keys * D_HEAD, keys, n_keys, total_v, D_HEAD, WIDTH)


class FlashAttentionTriton(torch.autograd.Function):
    """`apply(query, key, value, is_causal)`: `softmax(Q K^T / sqrt(d)) V` by three kernels.

    As `flash_attention.FlashAttention`, for one batch axis, float32, float16 and bfloat16. Differentiable
    once. Raises ValueError for other shapes and dtypes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "batch queries d_head"],
        key: Float[Tensor, "batch keys d_head"],
        value: Float[Tensor, "batch keys d_head"],
        is_causal: bool = False,
    ) -> Float[Tensor, "batch queries d_head"]:
        """The output. Saves the inputs, the output, and the log-sum-exp of each query."""
        if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"query must be float32, float16 or bfloat16, got {query.dtype}; convert it")
        if key.shape != value.shape or query.shape[::2] != key.shape[::2]:
            raise ValueError(
                "query must be (batch, queries, d_head), key and value (batch, keys, d_head), got "
                f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
            )
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        output = torch.empty_like(query)
        log_sum = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.options = launch_options(query, key, is_causal)
        attend[grid(query, QUERIES)](query, key, value, output, log_sum, **ctx.options)
        ctx.save_for_backward(query, key, value, output, log_sum)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_output: Float[Tensor, "batch queries d_head"]
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """The gradients of query, key and value, by one kernel for queries and one for keys."""
        query, key, value, output, log_sum = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        delta = (grad_output.float() * output.float()).sum(-1)
        dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        inputs = query, key, value, grad_output, log_sum, delta
        query_gradient[grid(query, ctx.options["QUERIES"])](*inputs, dq, **ctx.options)
        key_gradient[grid(key, ctx.options["KEYS"])](*inputs, dk, dv, **ctx.options)
        return dq, dk, dv, None


def launch_options(query: Tensor, key: Tensor, is_causal: bool) -> dict[str, Any]:
    """Arguments that the three kernels share."""
    d_head = query.shape[-1]
    # tl.dot needs at least 16 columns, and tiles are powers of two
    options = {"D_HEAD": d_head, "WIDTH": max(triton.next_power_of_2(d_head), 16)}
    options |= {"n_queries": query.shape[1], "n_keys": key.shape[1], "scale": 1 / math.sqrt(d_head)}
    return {**options, "IS_CAUSAL": is_causal, "QUERIES": QUERIES, "KEYS": KEYS}


def grid(rows: Tensor, tile: int) -> tuple[int, int]:
    """One program for each tile of rows of each batch.

    >>> grid(torch.zeros(3, 100, 8), 64)
    (2, 3)
    """
    return triton.cdiv(rows.shape[1], tile), rows.shape[0]
