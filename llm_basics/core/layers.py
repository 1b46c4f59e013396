"""The layers of a transformer: the functions of `functional` with their weights.

Weights are `(d_out, d_in)`. Linear is initialized from a normal distribution of variance 2 / (d_in + d_out)
(Glorot and Bengio 2010), Embedding from variance 1, both truncated at three standard deviations.
"""

import math

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_basics.core import functional as F

# --------------------------------------------------------------------------------------------------
# Lookup and projection


def init_truncated_normal_(weight: Tensor, std: float) -> None:
    """Fill `weight` from a normal distribution of mean 0, truncated at three standard deviations."""
    nn.init.trunc_normal_(weight, mean=0.0, std=std, a=-3 * std, b=3 * std)


class Linear(nn.Module):
    """`y = x W^T + b`, by default without `b`, as in Llama."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        init_truncated_normal_(self.weight, std=math.sqrt(2 / (in_features + out_features)))

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        d_out, d_in = self.weight.shape
        return f"{d_in} -> {d_out}" + (", bias" if self.bias is not None else "")


class Embedding(nn.Module):
    """One learned vector for each token id."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype))
        init_truncated_normal_(self.weight, std=1.0)

    def forward(self, token_ids: Int[Tensor, "..."]) -> Float[Tensor, "... d_model"]:
        return F.embedding(token_ids, self.weight)

    def extra_repr(self) -> str:
        return "{} ids -> {}".format(*self.weight.shape)


class Dropout(nn.Module):
    """Zero elements with probability `p` in training; the identity in evaluation."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return F.dropout(x, self.p) if self.training else x

    def extra_repr(self) -> str:
        return f"p={self.p}"


# --------------------------------------------------------------------------------------------------
# Normalization


class RMSNorm(nn.Module):
    """Root mean square normalization with a learned gain, initially 1."""

    def __init__(
        self,
        d_model: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return F.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class LayerNorm(nn.Module):
    """Layer normalization with a learned gain, initially 1, and with `bias` a learned shift, initially 0."""

    def __init__(
        self,
        d_model: int,
        eps: float = 1e-5,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(d_model, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return F.layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}" + (", bias" if self.bias is not None else "")


# --------------------------------------------------------------------------------------------------
# Feed-forward networks


class SwiGLU(nn.Module):
    """The gated feed-forward network `W2 (silu(W1 x) * W3 x)`."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.w1 = Linear(d_model, d_ff, device=device, dtype=dtype)
        self.w2 = Linear(d_ff, d_model, device=device, dtype=dtype)
        self.w3 = Linear(d_model, d_ff, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return F.swiglu(x, self.w1.weight, self.w2.weight, self.w3.weight)


class MLP(nn.Module):
    """The plain feed-forward network `W2 activation(W1 x)`, with gelu, gelu_tanh, relu2 or silu."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: str = "gelu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ("gelu", "gelu_tanh", "relu2", "silu"):
            raise ValueError(f"activation must be gelu, gelu_tanh, relu2 or silu, got {activation!r}")
        self.activation = activation
        self.w1 = Linear(d_model, d_ff, bias, device=device, dtype=dtype)
        self.w2 = Linear(d_ff, d_model, bias, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return self.w2(self._activate(self.w1(x)))

    def _activate(self, x: Float[Tensor, "... d_ff"]) -> Float[Tensor, "... d_ff"]:
        # attribute access at each call, so that a replaced `functional.gelu` takes effect
        match self.activation:
            case "gelu":
                return F.gelu(x)
            case "gelu_tanh":
                return F.gelu(x, approximate="tanh")
            case "relu2":
                return F.relu2(x)
            case _:
                return F.silu(x)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


# --------------------------------------------------------------------------------------------------
# Attention


class RotaryEmbedding(nn.Module):
    """RoPE with precomputed tables, for token positions below `context_length`."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        d_head: int,
        context_length: int,
        theta: float = 10000.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        cos, sin = F.rope_tables(d_head, context_length, theta, device)
        # not persistent: recomputed from the config, so that a state dict has only learned weights
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self, x: Float[Tensor, "... seq d_head"], token_positions: Int[Tensor, "... seq"]
    ) -> Float[Tensor, "... seq d_head"]:
        """Rotate `x` by its token positions, which are of shape (..., seq) or broadcast to it."""
        return F.apply_rope(x, self.cos[token_positions], self.sin[token_positions])

    def extra_repr(self) -> str:
        return "{} positions, {} pairs".format(*self.cos.shape)


class KVCache:
    """Keys and values of one attention layer for the tokens so far, in preallocated memory."""

    def __init__(
        self,
        batch: int,
        n_kv_heads: int,
        context_length: int,
        d_head: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (batch, n_kv_heads, context_length, d_head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(
        self, key: Float[Tensor, "batch heads new d_head"], value: Float[Tensor, "batch heads new d_head"]
    ) -> tuple[Float[Tensor, "batch heads keys d_head"], Float[Tensor, "batch heads keys d_head"]]:
        """Append keys and values of new tokens; returns those of all tokens."""
        end = self.length + key.shape[-2]
        if end > self.keys.shape[-2]:
            raise ValueError(f"the KV cache holds {self.keys.shape[-2]} tokens, got token {end}")
        self.keys[:, :, self.length : end] = key
        self.values[:, :, self.length : end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def select(self, texts: Int[Tensor, " kept"]) -> None:
        """Keep only these sequences of the batch."""
        self.keys, self.values = self.keys[texts], self.values[texts]


class MultiHeadSelfAttention(nn.Module):
    """Causal multi-head self-attention (arXiv 1706.03762); `rope` rotates queries and keys.

    With fewer `n_kv_heads` than `n_heads`, groups of neighboring query heads share one key and value head
    (grouped-query attention, arXiv 2305.13245). `qk_norm` normalizes queries and keys before RoPE (arXiv
    2010.04245).
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        rope: RotaryEmbedding | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads or n_heads
        if d_model % n_heads:
            raise ValueError(f"d_model must be divisible by n_heads, got {d_model} and {n_heads}")
        if n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads must be divisible by n_kv_heads, got {n_heads} and {n_kv_heads}")
        self.d_head = d_model // n_heads
        self.rope = rope
        self.dropout = dropout
        d_kv = self.n_kv_heads * self.d_head
        self.q_proj = Linear(d_model, d_model, bias, device=device, dtype=dtype)
        self.k_proj = Linear(d_model, d_kv, bias, device=device, dtype=dtype)
        self.v_proj = Linear(d_model, d_kv, bias, device=device, dtype=dtype)
        self.output_proj = Linear(d_model, d_model, bias, device=device, dtype=dtype)
        self.q_norm = RMSNorm(self.d_head, norm_eps, device, dtype) if qk_norm else None
        self.k_norm = RMSNorm(self.d_head, norm_eps, device, dtype) if qk_norm else None

    def forward(
        self,
        x: Float[Tensor, "... seq d_model"],
        token_positions: Int[Tensor, "... seq"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "... seq d_model"]:
        """Attend along `seq`.

        With a `cache`, `x` continues the cached tokens.
        """
        q, k, v = self.project(x)
        q = rearrange(q, "... seq (heads d_head) -> ... heads seq d_head", heads=self.n_heads)
        k = rearrange(k, "... seq (heads d_head) -> ... heads seq d_head", heads=self.n_kv_heads)
        v = rearrange(v, "... seq (heads d_head) -> ... heads seq d_head", heads=self.n_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        start = cache.length if cache is not None else 0
        if self.rope is not None:
            if token_positions is None:
                token_positions = torch.arange(start, start + x.shape[-2], device=x.device)
            positions = rearrange(token_positions, "... seq -> ... 1 seq")
            q, k = self.rope(q, positions), self.rope(k, positions)
        mask = None
        if cache is not None:
            k, v = cache.append(k, v)
            mask = F.causal_mask(q.shape[-2], k.shape[-2], offset=start, device=x.device)
        group = self.n_heads // self.n_kv_heads
        if group > 1:
            k = repeat(k, "... heads keys d_head -> ... (heads group) keys d_head", group=group)
            v = repeat(v, "... heads keys d_head -> ... (heads group) keys d_head", group=group)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, dropout_p=dropout)
        return self.output_proj(rearrange(mixed, "... heads seq d_head -> ... seq (heads d_head)"))

    def project(
        self, x: Float[Tensor, "... seq d_model"]
    ) -> tuple[
        Float[Tensor, "... seq d_model"], Float[Tensor, "... seq d_kv"], Float[Tensor, "... seq d_kv"]
    ]:
        """Queries, keys and values of all heads."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def extra_repr(self) -> str:
        return f"{self.n_heads} heads, {self.n_kv_heads} key/value heads, d_head={self.d_head}"
