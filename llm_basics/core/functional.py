"""The mathematics of a language model, as pure functions of tensors.

Functions use only tensor arithmetic and autograd, ordered so that each builds on those before it. They
are stateless and do not modify their inputs. Operations that would lose precision in float16 and bfloat16
(softmax, norms, GELU, cross-entropy) compute in float32 and return the input's dtype.

    >>> softmax(torch.tensor([0.0, math.log(3.0)]), dim=0)
    tensor([0.2500, 0.7500])
"""

import math

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor


def to_float32(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Cast half precision to float32: float16 overflows at 65,504, and bfloat16 has 8 bits of precision.

    >>> to_float32(torch.ones(1, dtype=torch.bfloat16)), to_float32(torch.ones(1, dtype=torch.float64))
    (tensor([1.]), tensor([1.], dtype=torch.float64))
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# --------------------------------------------------------------------------------------------------
# Lookup and projection


def linear(
    x: Float[Tensor, "... d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None = None,
) -> Float[Tensor, "... d_out"]:
    """Project the last axis: `y = x W^T + b`. Each row of `weight` makes one output feature.

    >>> linear(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    tensor([1., 2., 3.])
    """
    y = x @ weight.T
    return y if bias is None else y + bias


def embedding(
    token_ids: Int[Tensor, "..."], weight: Float[Tensor, "vocab d_model"]
) -> Float[Tensor, "... d_model"]:
    """Look up one row of `weight` for each id. Raises IndexError for an id outside 0 to `vocab - 1`.

    >>> embedding(torch.tensor([2, 0]), torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]))
    tensor([[4., 5.],
            [0., 1.]])
    """
    # plain indexing would accept -1, the last row
    rows = weight.index_select(0, token_ids.flatten())
    return rows.reshape(*token_ids.shape, weight.shape[-1])


# --------------------------------------------------------------------------------------------------
# From scores to probabilities


def softmax(x: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
    """Turn scores into probabilities along `dim`: `exp(x_i) / sum_j exp(x_j)`.

    Subtracting the maximum of each row leaves the quotient unchanged and keeps `exp` finite.

    >>> softmax(torch.tensor([1000.0, 1000.0]))
    tensor([0.5000, 0.5000])
    """
    scores = to_float32(x)
    exponentials = (scores - scores.amax(dim, keepdim=True).detach()).exp()
    return (exponentials / exponentials.sum(dim, keepdim=True)).to(x.dtype)


def log_softmax(x: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
    """The logarithm of softmax, without the logarithm of probabilities that underflow to 0.

    `log softmax(x)_i = x_i - log sum_j exp(x_j)`

    >>> log_softmax(torch.tensor([0.0, 1000.0]))
    tensor([-1000.,     0.])
    """
    shifted, log_sum = _shifted_and_log_sum(to_float32(x), dim)
    return (shifted - log_sum).to(x.dtype)


def _shifted_and_log_sum(
    x: Float[Tensor, "..."], dim: int
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """`x - max(x)` along `dim`, and `log sum_j exp` of it: small values, which preserve precision."""
    shifted = x - x.amax(dim, keepdim=True).detach()
    return shifted, shifted.exp().sum(dim, keepdim=True).log()


# --------------------------------------------------------------------------------------------------
# Activations


def silu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The sigmoid linear unit `x * sigmoid(x)`, also called swish (arXiv 1702.03118).

    >>> silu(torch.tensor([-1.0, 0.0, 100.0]))
    tensor([ -0.2689,   0.0000, 100.0000])
    """
    return x * torch.sigmoid(x)


def gelu(x: Float[Tensor, "..."], approximate: str = "none") -> Float[Tensor, "..."]:
    """The Gaussian error linear unit `x * Phi(x)`, Phi the normal distribution (arXiv 1606.08415).

    `approximate="tanh"` is the cheaper form used by GPT-2; the two differ by up to 5e-4.

    >>> gelu(torch.tensor([1.0])), gelu(torch.tensor([1.0]), approximate="tanh")
    (tensor([0.8413]), tensor([0.8412]))
    """
    wide = to_float32(x)
    if approximate == "none":
        phi = 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
    elif approximate == "tanh":
        phi = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    else:
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    return (wide * phi).to(x.dtype)


def relu2(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The squared rectifier `max(x, 0)^2` (arXiv 2109.08668).

    >>> relu2(torch.tensor([-1.0, 3.0]))
    tensor([0., 9.])
    """
    return x.clamp(min=0) ** 2


def swiglu(
    x: Float[Tensor, "... d_model"],
    w1: Float[Tensor, "d_ff d_model"],
    w2: Float[Tensor, "d_model d_ff"],
    w3: Float[Tensor, "d_ff d_model"],
) -> Float[Tensor, "... d_model"]:
    """The gated feed-forward network of Llama: `W2 (silu(W1 x) * W3 x)` (arXiv 2002.05202).

    W1 computes the gate, W3 the values that it scales, W2 projects back to the residual stream.

    >>> one = torch.ones(1, 1)
    >>> swiglu(torch.tensor([2.0]), w1=one, w2=one, w3=3 * one)  # silu(2) * 6
    tensor([10.5696])
    """
    return linear(silu(linear(x, w1)) * linear(x, w3), w2)


def dropout(x: Float[Tensor, "..."], p: float) -> Float[Tensor, "..."]:
    """Zero each element with probability `p` and scale the others by `1 / (1 - p)` (arXiv 1207.0580).

    The expectation is unchanged. `p = 0` returns `x` itself.

    >>> dropout(torch.ones(3), p=0.0)
    tensor([1., 1., 1.])
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {p}")
    if p == 0:
        return x
    return x * torch.empty_like(x).bernoulli_(1 - p) / (1 - p)


# --------------------------------------------------------------------------------------------------
# Normalization


def rms_norm(
    x: Float[Tensor, "... d_model"], weight: Float[Tensor, " d_model"], eps: float = 1e-5
) -> Float[Tensor, "... d_model"]:
    """Divide each vector by its root mean square, then scale: `x / sqrt(mean(x^2) + eps) * weight`.

    Root mean square layer normalization, arXiv 1910.07467.

    >>> rms_norm(torch.tensor([3.0, -3.0]), weight=torch.tensor([1.0, 2.0]), eps=0.0)
    tensor([ 1., -2.])
    """
    wide = to_float32(x)
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normalized * weight).to(x.dtype)


def layer_norm(
    x: Float[Tensor, "... d_model"],
    weight: Float[Tensor, " d_model"],
    bias: Float[Tensor, " d_model"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "... d_model"]:
    """Normalize each vector to mean 0 and variance 1, then scale and shift (arXiv 1607.06450).

    `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`, the variance divided by d_model.

    >>> layer_norm(torch.tensor([1.0, 3.0]), weight=torch.ones(2), bias=torch.tensor([0.0, 1.0]), eps=0.0)
    tensor([-1.,  2.])
    """
    wide = to_float32(x)
    centered = wide - wide.mean(-1, keepdim=True)
    normalized = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    scaled = normalized * weight
    return (scaled if bias is None else scaled + bias).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# Positions


def rope_tables(
    d_head: int, context_length: int, theta: float = 10000.0, device: torch.device | str | None = None
) -> tuple[Float[Tensor, "context half"], Float[Tensor, "context half"]]:
    """The cosine and sine of each angle of `apply_rope`: `position * theta^(-2i / d_head)`.

    Pair 0 rotates fastest, one radian per position; the last pair slowest (arXiv 2104.09864).

    >>> cos, sin = rope_tables(d_head=4, context_length=2, theta=100.0)
    >>> sin[1]  # sin(1), sin(1 / 10)
    tensor([0.8415, 0.0998])
    """
    if d_head % 2:
        raise ValueError(f"d_head must be even, since RoPE rotates pairs of features, got {d_head}")
    # angles are computed in float64: a float32 angle of 10,000 radians is off by up to 5e-4
    exponents = torch.arange(0, d_head, 2, dtype=torch.float64, device="cpu") / d_head
    positions = torch.arange(context_length, dtype=torch.float64, device="cpu")
    angles = torch.outer(positions, theta**-exponents)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def apply_rope(
    x: Float[Tensor, "... seq d_head"],
    cos: Float[Tensor, "... seq half"],
    sin: Float[Tensor, "... seq half"],
) -> Float[Tensor, "... seq d_head"]:
    """Rotate each pair of neighboring features (2i, 2i+1) by its angle (RoPE, arXiv 2104.09864).

    Dot products of queries and keys rotated this way depend only on the distance of their positions.

    >>> quarter_turn = torch.tensor([[0.0]]), torch.tensor([[1.0]])
    >>> apply_rope(torch.tensor([[2.0, 5.0]]), *quarter_turn)
    tensor([[-5.,  2.]])
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rearrange(rotated, "... half pair -> ... (half pair)")


# --------------------------------------------------------------------------------------------------
# Attention


def causal_mask(
    queries: int, keys: int, offset: int = 0, device: torch.device | None = None
) -> Bool[Tensor, "queries keys"]:
    """True where a query may attend: to the keys up to its own position, `offset` plus its row.

    >>> causal_mask(2, 3)
    tensor([[ True, False, False],
            [ True,  True, False]])
    """
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(offset)


def scaled_dot_product_attention(
    query: Float[Tensor, "... queries d_k"],
    key: Float[Tensor, "... keys d_k"],
    value: Float[Tensor, "... keys d_v"],
    mask: Bool[Tensor, "... queries keys"] | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> Float[Tensor, "... queries d_v"]:
    """For each query, the mean of the values weighted by the similarity of their keys to it.

    `softmax(Q K^T / sqrt(d_k)) V` (arXiv 1706.03762). `mask` is True where a query may attend; the output of
    a query without any key is zero and has no gradient. With `is_causal`, query i attends to the keys 0 to i,
    as in `torch.nn.functional`.

    >>> q, k = torch.tensor([[0.0]]), torch.tensor([[1.0], [2.0]])
    >>> scaled_dot_product_attention(q, k, value=torch.tensor([[3.0], [5.0]]))
    tensor([[4.]])
    """
    if is_causal and mask is not None:
        raise ValueError("give attention either a mask or is_causal=True, got both; combine them in the mask")
    if is_causal:
        mask = causal_mask(query.shape[-2], key.shape[-2], device=query.device)
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if mask is None:
        probabilities = softmax(scores)
    else:
        # softmax of a row of -inf is 0/0: set the scores of a query without keys to 0, then its probabilities
        unmatched = ~mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~mask, -math.inf).masked_fill(unmatched, 0.0)
        probabilities = softmax(scores).masked_fill(unmatched, 0.0)
    return dropout(probabilities, dropout_p) @ value


# --------------------------------------------------------------------------------------------------
# The objective


def cross_entropy(
    logits: Float[Tensor, "... vocab"],
    targets: Int[Tensor, "..."],
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    """Cross-entropy of the targets under the model, in nats: `-log softmax(logits)[target]`.

    Targets equal to `ignore_index` are excluded from sum and mean, which are 0 without any other target.
    `z_loss` adds `z_loss * logsumexp(logits)^2`, which keeps logits from drifting (arXiv 2204.02311).
    `reduction` is "mean" or "sum" over all targets, or "none" for one loss per target.

    >>> cross_entropy(torch.zeros(3, 4), torch.tensor([0, 3, -100]))  # log 4
    tensor(1.3863)
    """
    wide = to_float32(logits)
    counted = targets != ignore_index
    shifted, log_sum = _shifted_and_log_sum(wide, dim=-1)
    safe_targets = targets.masked_fill(~counted, 0).long().unsqueeze(-1)
    losses = (log_sum - shifted.gather(-1, safe_targets)).squeeze(-1)
    if z_loss:
        normalizer = log_sum + wide.amax(-1, keepdim=True).detach()
        losses = losses + z_loss * normalizer.square().squeeze(-1)
    losses = losses.masked_fill(~counted, 0.0)
    if reduction == "none":
        return losses.to(logits.dtype)
    if reduction == "sum":
        return losses.sum().to(logits.dtype)
    if reduction == "mean":
        return (losses.sum() / counted.sum().clamp(min=1)).to(logits.dtype)
    raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def linear_cross_entropy(
    x: Float[Tensor, "... d_model"],
    weight: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, "..."],
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Float[Tensor, ""]:
    """The mean cross-entropy of hidden states projected to the vocabulary by `weight`.

    >>> linear_cross_entropy(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([1, 2]))
    tensor(1.3863)
    """
    return cross_entropy(linear(x, weight), targets, ignore_index, z_loss)
