"""Decodes one token of a transformer with five Triton kernels per block.

A dependent kernel in a CUDA graph costs 2 us or more, in which an H200 reads 10 MB. So operations on the same
input vector are fused:

    project_heads    norm, projections to queries, keys and values, RoPE, cache update
    attend           each head over all keys, block by block, with an online softmax
    project          linear layer, with an optional norm before it and activation or residual after it

`choose` writes the greedy token to the input of `embed`, so the next step needs no synchronization.
"""

import math
from typing import NamedTuple

import triton
from jaxtyping import Float, Int
from torch import Tensor

from llm_basics.fast.cuda import decode_kernels as vectors
from llm_basics.fast.cuda import triton_jit

# codes of norms (of the input) and of activations (of the output)
NORMS = {"none": 0, "rms": 1, "layer": 2}
ACTIVATIONS = {"": 0, "gelu": 1, "gelu_tanh": 2, "relu2": 3, "silu": 4, "swiglu": 5}

# features and keys per block; weights of a head per tile
BLOCK, KEYS = 1024, 128
TILE = 16384


class Norm(NamedTuple):
    """A norm: a name in `NORMS` and its parameters."""

    kind: str
    weight: Float[Tensor, " d_model"] | None
    bias: Float[Tensor, " d_model"] | None
    eps: float


class Projection(NamedTuple):
    """A weight matrix and an optional bias."""

    weight: Float[Tensor, "d_out d_in"]
    bias: Float[Tensor, " d_out"] | None


class Heads(NamedTuple):
    """Norm, projections and rotations of queries, keys and values, and the key-value cache."""

    norm: Norm
    projections: tuple[Projection, Projection, Projection]
    # RMSNorm weights of queries and keys
    head_norms: tuple[Float[Tensor, " d_head"], Float[Tensor, " d_head"]] | None
    # cosines and sines by position
    rope: tuple[Float[Tensor, "positions half"], Float[Tensor, "positions half"]] | None
    keys: Float[Tensor, "n_kv_heads positions d_head"]
    values: Float[Tensor, "n_kv_heads positions d_head"]


# --------------------------------------------------------------------------------------------------
# Launches, recorded by a graph


def embed(
    token: Int[Tensor, "1"],
    position: Int[Tensor, "1"],
    tokens: Float[Tensor, "vocab d_model"],
    positions: Float[Tensor, "positions d_model"] | None,
    out: Float[Tensor, " d_model"],
) -> None:
    """Token embedding, plus the position embedding if there is one."""
    d_model = tokens.shape[1]
    options = {"HAS_POSITIONS": positions is not None, "BLOCK": BLOCK}
    arguments = token, position, tokens, tokens if positions is None else positions, out
    with triton_jit.on_device_of(out):
        vectors.embed[(triton.cdiv(d_model, BLOCK),)](*arguments, d_model, **options)


def project_heads(
    x: Float[Tensor, " d_model"],
    position: Int[Tensor, "1"],
    heads: Heads,
    queries: Float[Tensor, " d_model"],
) -> None:
    """Write the queries of the token at `position`, and its keys and values to the cache."""
    (n_kv_heads, context_length, d_head), norm = heads.keys.shape, heads.norm
    n_heads, half = len(queries) // d_head, triton.next_power_of_2(d_head // 2)
    weights, biases = zip(*heads.projections, strict=True)
    has_bias = biases[0] is not None
    sizes = len(x), n_heads, n_kv_heads, d_head, context_length
    with triton_jit.on_device_of(x):
        vectors.project_heads[(n_heads + 2 * n_kv_heads,)](
            x,
            *_norm_pointers(norm, x),
            *weights,
            # x as the pointer of absent parameters, which is never read
            *(biases if has_bias else (x, x, x)),
            *(heads.head_norms or (x, x)),
            *(heads.rope or (x, x)),
            position,
            queries,
            heads.keys,
            heads.values,
            *sizes,
            norm.eps,
            NORM=NORMS[norm.kind],
            HAS_NORM_BIAS=norm.bias is not None,
            HAS_BIAS=has_bias,
            HAS_HEAD_NORMS=heads.head_norms is not None,
            HAS_ROPE=heads.rope is not None,
            HALF=half,
            BLOCK=triton_jit.block_size(len(x), min(BLOCK, TILE // half)),
            num_warps=8,
        )


def attend(
    queries: Float[Tensor, " d_model"],
    position: Int[Tensor, "1"],
    heads: Heads,
    out: Float[Tensor, " d_model"],
) -> None:
    """Attention of all heads over the cache, before the output projection."""
    n_kv_heads, context_length, d_head = heads.keys.shape
    n_heads, scale = len(queries) // d_head, 1 / math.sqrt(d_head)
    sizes = context_length, n_heads // n_kv_heads, d_head
    options = {"WIDTH": triton.next_power_of_2(d_head), "KEYS": KEYS, "num_warps": 8}
    arguments = queries, heads.keys, heads.values, position, out, scale
    with triton_jit.on_device_of(queries):
        vectors.attend[(n_heads,)](*arguments, *sizes, **options)


def project(
    x: Float[Tensor, " d_in"],
    projection: Projection,
    out: Float[Tensor, " d_out"],
    norm: Norm | None = None,
    activation: str = "",
    gate: Float[Tensor, "d_out d_in"] | None = None,
    is_added: bool = False,
) -> None:
    """`out = activation(W norm(x) + b)`, or `out +=` if `is_added`.

    "swiglu" is `silu(W norm(x)) * (gate norm(x))`.
    """
    norm = norm or Norm("none", None, None, 0.0)
    weight, bias = projection
    d_out, rows = len(out), 4 if len(out) < 4096 else 16
    with triton_jit.on_device_of(x):
        vectors.project[(triton.cdiv(d_out, rows),)](
            x,
            *_norm_pointers(norm, x),
            weight,
            weight if gate is None else gate,
            x if bias is None else bias,
            out,
            len(x),
            d_out,
            norm.eps,
            NORM=NORMS[norm.kind],
            HAS_NORM_BIAS=norm.bias is not None,
            HAS_BIAS=bias is not None,
            ACTIVATION=ACTIVATIONS[activation],
            IS_ADDED=is_added,
            ROWS=rows,
            BLOCK=triton_jit.block_size(len(x), BLOCK),
        )


def choose(
    logits: Float[Tensor, " vocab"],
    token: Int[Tensor, "1"],
    position: Int[Tensor, "1"],
    generated: Int[Tensor, " positions"],
) -> None:
    """Set token and position to the greedy next ones, and record the token in `generated`.

    Records -1 if rounding could decide between near ties or a logit is not finite.
    """
    block = triton_jit.block_size(len(logits), 4096)
    with triton_jit.on_device_of(logits):
        vectors.choose[(1,)](logits, token, position, generated, len(logits), BLOCK=block, num_warps=8)


def _norm_pointers(norm: Norm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm; `x` as the pointer of an absent one, which is never read."""
    return x if norm.weight is None else norm.weight, x if norm.bias is None else norm.bias
