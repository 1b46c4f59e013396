"""FlashAttention in Triton (arXiv 2205.14135, 2307.08691): the scores are never written to memory.

An online softmax processes keys block by block. With the peak `m` and the sum `l` so far, and a block of
scores `s` with values `V`,

    m' = max(m, max s)      l' = l exp(m - m') + sum exp(s - m')
                            o' = o exp(m - m') + exp(s - m') V

and `o / l` is the output, exactly. A program holds a block of queries in registers and loops over the blocks
of keys and values; blocks above the diagonal are skipped.

The backward pass recomputes the probabilities `P = exp(s - L)` from one saved number per query,
`L = m + log l`. With `dO` the gradient of the output,

    dP = dO V^T     dS = P (dP - D)     where D = sum of dO O over d_head
    dV = P^T dO     dQ = dS K scale     dK = dS^T Q scale

dQ sums over keys, dK and dV over queries: one kernel each, in which every program owns its rows. There are no
atomic sums, and results are deterministic.
"""

import math
from typing import Any

import torch
import triton
from jaxtyping import Bool, Float
from torch import Tensor
from triton import language as tl

from llm_basics.core import functional as reference
from llm_basics.fast.cuda import attention_blocks as blocks
from llm_basics.fast.cuda import triton_jit

# for unsupported inputs
reference_attention = reference.scaled_dot_product_attention

# by head width, for forward and backward: rows of a program's block, rows per iteration, num_warps,
# num_stages; limited by registers and by the 99 KB of shared memory of consumer GPUs
HALF_TILES = {
    64: ((128, 64, 8, 3), (128, 64, 8, 3)),
    128: ((128, 64, 8, 2), (64, 64, 8, 2)),
    256: ((64, 32, 4, 2), (32, 32, 8, 1)),
}
# float32 without tensor cores (TF32 would round): each thread holds whole rows of its operands
FLOAT_TILES = {
    64: ((32, 32, 4, 2), (32, 32, 4, 2)),
    128: ((32, 16, 8, 2), (32, 16, 8, 2)),
    256: ((16, 16, 8, 2), (16, 16, 8, 2)),
}
MAX_WIDTH = max(HALF_TILES)
# input_precision="ieee" below prevents rounding float32 to TF32's 11 bits
# the hardware exponential is base 2: e^x = 2^(x log2 e)
LOG2_E = tl.constexpr(math.log2(math.e))


def scaled_dot_product_attention(
    query: Float[Tensor, "... queries d_k"],
    key: Float[Tensor, "... keys d_k"],
    value: Float[Tensor, "... keys d_v"],
    mask: Bool[Tensor, "... queries keys"] | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> Float[Tensor, "... queries d_v"]:
    """`functional.scaled_dot_product_attention` without storing scores; differentiable once.

    Masks, dropout, broadcast axes and autocast of float32 inputs fall back to the reference.

    >>> q, k = torch.tensor([[0.0]]), torch.tensor([[1.0], [2.0]])
    >>> scaled_dot_product_attention(q, k, value=torch.tensor([[3.0], [5.0]]))
    tensor([[4.]])
    """
    if mask is not None or dropout_p != 0 or not _is_supported(query, key, value):
        return reference_attention(query, key, value, mask, is_causal, dropout_p)
    return _Attention.apply(query, key, value, is_causal)


def _is_supported(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernels support the inputs: non-empty, 16 or 32 bits, one device, dtype and width."""
    device = query.device
    # Triton reads TRITON_INTERPRET again at each launch
    interpreted = device.type == "cpu" and triton_jit.INTERPRETED and triton.knobs.runtime.interpret
    is_autocast = query.dtype == torch.float32 and torch.is_autocast_enabled(device.type)
    return (
        (device.type == "cuda" or interpreted)
        and not is_autocast
        and query.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and all(t.device == device and t.numel() > 0 for t in (query, key, value))
        and query.dtype == key.dtype == value.dtype
        and key.shape == value.shape == (*query.shape[:-2], key.shape[-2], query.shape[-1])
        and query.shape[-1] <= MAX_WIDTH
    )


# --------------------------------------------------------------------------------------------------
# Forward


@triton_jit.kernel
def _attend(
    query: triton_jit.Pointer,
    key: triton_jit.Pointer,
    value: triton_jit.Pointer,
    out: triton_jit.Pointer,
    log_sums: triton_jit.Pointer,
    n_queries: triton_jit.Number,
    n_keys: triton_jit.Number,
    scale: triton_jit.Number,
    IS_CAUSAL: tl.constexpr,
    D_HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """One program computes the outputs of a block of one head's queries."""
    head, first_query = blocks.last_block_first(n_queries, QUERIES)
    queries, query_at, is_query = blocks.rows(first_query, n_queries, D_HEAD, QUERIES, WIDTH)
    query_at += head * n_queries * D_HEAD
    key_head = head * n_keys * D_HEAD
    q = tl.load(query + query_at, mask=is_query, other=0.0)

    peak = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    output = tl.zeros((QUERIES, WIDTH), tl.float32)
    # unrolled twice: full blocks without a mask, then diagonal blocks with one
    for ON_EDGE in tl.static_range(2):
        begin, end = blocks.key_range(first_query, n_keys, ON_EDGE, IS_CAUSAL, QUERIES, KEYS)
        for first_key in range(begin, end, KEYS):
            keys, key_at, is_key = blocks.rows(first_key, n_keys, D_HEAD, KEYS, WIDTH)
            k = tl.load(key + key_head + key_at, mask=is_key, other=0.0)
            v = tl.load(value + key_head + key_at, mask=is_key, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
            if ON_EDGE:
                seen = blocks.sees(queries[:, None], keys[None, :], n_keys, IS_CAUSAL)
                scores = tl.where(seen, scores, -float("inf"))
            # every query sees key 0, in the first block, so the peak is finite
            new_peak = tl.maximum(peak, tl.max(scores, axis=1))
            correction = tl.exp2(peak - new_peak)
            weights = tl.exp2(scores - new_peak[:, None])
            total = total * correction + tl.sum(weights, axis=1)
            output = output * correction[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            peak = new_peak

    tl.store(out + query_at, output / total[:, None], mask=is_query)
    tl.store(log_sums + head * n_queries + queries, peak + tl.log2(total), mask=queries < n_queries)


# --------------------------------------------------------------------------------------------------
# Backward


@triton_jit.kernel
def _query_gradient(
    query: triton_jit.Pointer,
    key: triton_jit.Pointer,
    value: triton_jit.Pointer,
    out: triton_jit.Pointer,
    grad_out: triton_jit.Pointer,
    log_sums: triton_jit.Pointer,
    deltas: triton_jit.Pointer,
    grad_query: triton_jit.Pointer,
    n_queries: triton_jit.Number,
    n_keys: triton_jit.Number,
    scale: triton_jit.Number,
    IS_CAUSAL: tl.constexpr,
    D_HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """One program sums dQ of a block of queries over the keys, and writes D for `_key_gradient`."""
    head, first_query = blocks.last_block_first(n_queries, QUERIES)
    queries, query_at, is_query = blocks.rows(first_query, n_queries, D_HEAD, QUERIES, WIDTH)
    query_at += head * n_queries * D_HEAD
    key_head = head * n_keys * D_HEAD
    q = tl.load(query + query_at, mask=is_query, other=0.0)
    o = tl.load(out + query_at, mask=is_query, other=0.0)
    do = tl.load(grad_out + query_at, mask=is_query, other=0.0)
    query_index = head * n_queries + queries
    log_sum = tl.load(log_sums + query_index, mask=queries < n_queries, other=0.0)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
    tl.store(deltas + query_index, delta, mask=queries < n_queries)

    dq = tl.zeros((QUERIES, WIDTH), tl.float32)
    for ON_EDGE in tl.static_range(2):
        begin, end = blocks.key_range(first_query, n_keys, ON_EDGE, IS_CAUSAL, QUERIES, KEYS)
        for first_key in range(begin, end, KEYS):
            keys, key_at, is_key = blocks.rows(first_key, n_keys, D_HEAD, KEYS, WIDTH)
            k = tl.load(key + key_head + key_at, mask=is_key, other=0.0)
            v = tl.load(value + key_head + key_at, mask=is_key, other=0.0)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E) - log_sum[:, None])
            if ON_EDGE:
                p = tl.where(blocks.sees(queries[:, None], keys[None, :], n_keys, IS_CAUSAL), p, 0.0)
            ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
            dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    tl.store(grad_query + query_at, dq * scale, mask=is_query)


@triton_jit.kernel
def _key_gradient(
    query: triton_jit.Pointer,
    key: triton_jit.Pointer,
    value: triton_jit.Pointer,
    grad_out: triton_jit.Pointer,
    log_sums: triton_jit.Pointer,
    deltas: triton_jit.Pointer,
    grad_key: triton_jit.Pointer,
    grad_value: triton_jit.Pointer,
    n_queries: triton_jit.Number,
    n_keys: triton_jit.Number,
    scale: triton_jit.Number,
    IS_CAUSAL: tl.constexpr,
    D_HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """One program sums dK and dV of a block of keys over the queries, with transposed tiles."""
    head, first_key = blocks.first_block_first(n_keys, KEYS)
    keys, key_at, is_key = blocks.rows(first_key, n_keys, D_HEAD, KEYS, WIDTH)
    key_at += head * n_keys * D_HEAD
    query_head = head * n_queries * D_HEAD
    k = tl.load(key + key_at, mask=is_key, other=0.0)
    v = tl.load(value + key_at, mask=is_key, other=0.0)

    dk = tl.zeros((KEYS, WIDTH), tl.float32)
    dv = tl.zeros((KEYS, WIDTH), tl.float32)
    for ON_EDGE in tl.static_range(2):
        begin, end = blocks.query_range(first_key, n_queries, ON_EDGE, IS_CAUSAL, QUERIES, KEYS)
        for first_query in range(begin, end, QUERIES):
            queries, query_at, is_query = blocks.rows(first_query, n_queries, D_HEAD, QUERIES, WIDTH)
            query_index = head * n_queries + queries
            # rows past the last query load zeros, in dO too, and add nothing
            q = tl.load(query + query_head + query_at, mask=is_query, other=0.0)
            do = tl.load(grad_out + query_head + query_at, mask=is_query, other=0.0)
            log_sum = tl.load(log_sums + query_index, mask=queries < n_queries, other=0.0)
            delta = tl.load(deltas + query_index, mask=queries < n_queries, other=0.0)
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2_E) - log_sum[None, :])
            if ON_EDGE:
                p = tl.where(blocks.sees(queries[None, :], keys[:, None], n_keys, IS_CAUSAL), p, 0.0)
            ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
            dv += tl.dot(p.to(do.dtype), do, input_precision="ieee")
            dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    tl.store(grad_key + key_at, dk * scale, mask=is_key)
    tl.store(grad_value + key_at, dv, mask=is_key)


# --------------------------------------------------------------------------------------------------
# Autograd


class _Attention(torch.autograd.Function):
    """The three kernels as an autograd function."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        out = torch.empty_like(query)
        log_sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        options = _options(query, key, is_causal)
        block, step, tuning = _tile(query, backward=False)
        with triton_jit.on_device_of(query):
            _attend[_programs(query, block)](
                query, key, value, out, log_sums, **options, QUERIES=block, KEYS=step, **tuning
            )
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.options = options
        return out

    @staticmethod
    @triton_jit.differentiable_once
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, log_sums = ctx.saved_tensors
        inputs = query, key, value
        grad_out = grad_out.contiguous()
        deltas = torch.empty_like(log_sums)
        dq, dk, dv = (torch.empty_like(t) for t in inputs)
        block, step, tuning = _tile(query, backward=True)
        tuning |= ctx.options
        with triton_jit.on_device_of(query):
            _query_gradient[_programs(query, block)](
                *inputs, out, grad_out, log_sums, deltas, dq, QUERIES=block, KEYS=step, **tuning
            )
            _key_gradient[_programs(key, block)](
                *inputs, grad_out, log_sums, deltas, dk, dv, KEYS=block, QUERIES=step, **tuning
            )
        return dq, dk, dv, None


def _options(query: Tensor, key: Tensor, is_causal: bool) -> dict[str, int | float]:
    """Arguments common to the three kernels."""
    d_head = query.shape[-1]
    return {
        "n_queries": query.shape[-2],
        "n_keys": key.shape[-2],
        "scale": 1 / math.sqrt(d_head),
        "IS_CAUSAL": is_causal,
        "D_HEAD": d_head,
        # tl.dot needs at least 16
        "WIDTH": max(triton_jit.block_size(d_head, MAX_WIDTH), 16),
    }


def _tile(query: Tensor, backward: bool) -> tuple[int, int, dict[str, int]]:
    """Rows of a program's block, rows per iteration, and launch options."""
    tiles = FLOAT_TILES if query.dtype == torch.float32 else HALF_TILES
    width = min(width for width in tiles if width >= query.shape[-1])
    block, step, num_warps, num_stages = tiles[width][backward]
    return block, step, {"num_warps": num_warps, "num_stages": num_stages}


def _programs(rows: Tensor, block: int) -> tuple[int]:
    """The launch grid: one program per block of rows of one head."""
    return (rows.shape[:-2].numel() * triton.cdiv(rows.shape[-2], block),)
