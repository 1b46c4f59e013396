"""One token through a transformer, in five kernels a block.

A kernel of a CUDA graph that waits for another takes 2 us or more, in which an H200 would read 10 MB. So
everything with one input vector is one kernel:

    project_heads    normalize, project to queries, keys and values, RoPE, store keys and values
    attend           each head over all keys, block by block, by an online softmax
    project          back to the residual stream; also with the norm before and the activation after it

`choose` puts the likeliest token where `embed` reads it, so the next token needs no synchronization.
"""

import math
from typing import NamedTuple

import triton
from jaxtyping import Float, Int
from torch import Tensor

from llm_basics.fast.cuda import decode_kernels as vectors
from llm_basics.fast.cuda import triton_jit

# what is done to the vector that comes in, and to the one that goes out
NORMS = {"none": 0, "rms": 1, "layer": 2}
ACTIVATIONS = {"": 0, "gelu": 1, "gelu_tanh": 2, "relu2": 3, "silu": 4, "swiglu": 5}

# features that a program looks at in one go, and keys; and the weights of a head that it holds
BLOCK, KEYS = 1024, 128
TILE = 16384


class Norm(NamedTuple):
    """What normalizes a vector: a name of `NORMS`, and its parameters, if there are any."""

    kind: str
    weight: Float[Tensor, " d_model"] | None
    bias: Float[Tensor, " d_model"] | None
    eps: float


class Projection(NamedTuple):
    """A matrix and a bias, if there is one."""

    weight: Float[Tensor, "d_out d_in"]
    bias: Float[Tensor, " d_out"] | None


class Heads(NamedTuple):
    """What makes a vector queries, keys and values, and where the latter are kept."""

    norm: Norm
    projections: tuple[Projection, Projection, Projection]
    # the weights that normalize queries and keys
    head_norms: tuple[Float[Tensor, " d_head"], Float[Tensor, " d_head"]] | None
    # cosines and sines of all positions
    turns: tuple[Float[Tensor, "positions half"], Float[Tensor, "positions half"]] | None
    keys: Float[Tensor, "n_kv_heads positions d_head"]
    values: Float[Tensor, "n_kv_heads positions d_head"]


# --------------------------------------------------------------------------------------------------
# What a graph records


def embed(
    token: Int[Tensor, "1"],
    position: Int[Tensor, "1"],
    tokens: Float[Tensor, "vocab d_model"],
    positions: Float[Tensor, "positions d_model"] | None,
    out: Float[Tensor, " d_model"],
) -> None:
    """The vector of a token, and of its position, if positions have vectors."""
    d_model = tokens.shape[1]
    options = {"HAS_POSITIONS": positions is not None, "BLOCK": BLOCK}
    given = token, position, tokens, tokens if positions is None else positions, out
    with triton_jit.on_device_of(out):
        vectors.embed[(triton.cdiv(d_model, BLOCK),)](*given, d_model, **options)


def project_heads(
    x: Float[Tensor, " d_model"],
    position: Int[Tensor, "1"],
    heads: Heads,
    queries: Float[Tensor, " d_model"],
) -> None:
    """Queries of the token at `position`; its keys and values are put to those before."""
    (n_kv_heads, context_length, d_head), norm = heads.keys.shape, heads.norm
    n_heads, half = len(queries) // d_head, triton.next_power_of_2(d_head // 2)
    weights, biases = zip(*heads.projections, strict=True)
    has_bias = biases[0] is not None
    sizes = len(x), n_heads, n_kv_heads, d_head, context_length
    with triton_jit.on_device_of(x):
        vectors.project_heads[(n_heads + 2 * n_kv_heads,)](
            x,
            *_of_norm(norm, x),
            *weights,
            # where nothing is read, anything may stand
            *(biases if has_bias else (x, x, x)),
            *(heads.head_norms or (x, x)),
            *(heads.turns or (x, x)),
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
            HAS_TURNS=heads.turns is not None,
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
    """What the heads find for these queries, before it is projected back."""
    n_kv_heads, context_length, d_head = heads.keys.shape
    n_heads, scale = len(queries) // d_head, 1 / math.sqrt(d_head)
    sizes = context_length, n_heads // n_kv_heads, d_head
    options = {"WIDTH": triton.next_power_of_2(d_head), "KEYS": KEYS, "num_warps": 8}
    given = queries, heads.keys, heads.values, position, out, scale
    with triton_jit.on_device_of(queries):
        vectors.attend[(n_heads,)](*given, *sizes, **options)


def project(
    x: Float[Tensor, " d_in"],
    projection: Projection,
    out: Float[Tensor, " d_out"],
    norm: Norm | None = None,
    activation: str = "",
    gate: Float[Tensor, "d_out d_in"] | None = None,
    is_added: bool = False,
) -> None:
    """`out = activation(W norm(x) + b)`, or added to what is there.

    The activation "swiglu" multiplies `silu(W norm(x))` by what `gate` makes.
    """
    norm = norm or Norm("none", None, None, 0.0)
    weight, bias = projection
    d_out, rows = len(out), 4 if len(out) < 4096 else 16
    with triton_jit.on_device_of(x):
        vectors.project[(triton.cdiv(d_out, rows),)](
            x,
            *_of_norm(norm, x),
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
    written: Int[Tensor, " positions"],
) -> None:
    """Let the likeliest token be the next, at the next position.

    Where others are so near that rounding decides, or a score is no number, -1 is written.
    """
    block = triton_jit.block_size(len(logits), 4096)
    with triton_jit.on_device_of(logits):
        vectors.choose[(1,)](logits, token, position, written, len(logits), BLOCK=block, num_warps=8)


def _of_norm(norm: Norm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias, in whose place anything may stand where they are not read."""
    return x if norm.weight is None else norm.weight, x if norm.bias is None else norm.bias
