"""The language model: maps token ids to a score for every possible next token.

One class is both Llama (RMSNorm, RoPE, SwiGLU) and GPT-2 (LayerNorm, learned positions, GELU, biases): the
config selects which. A decoder-only transformer, arXiv 1706.03762 as changed by GPT-2 (Radford et al. 2019)
and Llama (arXiv 2302.13971).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_basics.core import config, layers


class TransformerBlock(nn.Module):
    """Self-attention, then a feed-forward network, each added to the residual stream.

    Pre-norm (Llama, GPT-2): `x + attn(ln1(x))`, then `x + ffn(ln2(x))`.

    Post-norm (`norm_placement`, the original transformer): `ln1(x + attn(x))`, then `ln2(x + ffn(x))`.
    """

    def __init__(
        self,
        config: config.ModelConfig,
        rope: layers.RotaryEmbedding | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm_placement = config.norm_placement
        self.ln1 = make_norm(config, device, dtype)
        self.attn = layers.MultiHeadSelfAttention(
            config.d_model,
            config.n_heads,
            config.n_kv_heads,
            rope,
            config.bias,
            config.qk_norm,
            config.norm_eps,
            config.dropout,
            device=device,
            dtype=dtype,
        )
        self.ln2 = make_norm(config, device, dtype)
        self.ffn = make_ffn(config, device, dtype)
        self.dropout = layers.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "... seq d_model"],
        token_positions: Int[Tensor, "... seq"] | None = None,
        cache: layers.KVCache | None = None,
    ) -> Float[Tensor, "... seq d_model"]:
        """Apply both sublayers to the residual stream `x`."""
        if self.norm_placement == "pre":
            x = x + self.dropout(self.attn(self.ln1(x), token_positions, cache))
            return x + self.dropout(self.ffn(self.ln2(x)))
        x = self.ln1(x + self.dropout(self.attn(x, token_positions, cache)))
        return self.ln2(x + self.dropout(self.ffn(x)))


class TransformerLM(nn.Module):
    """Embed the tokens, apply all blocks, and score the vocabulary at each position.

    >>> tiny = config.ModelConfig(vocab_size=50, context_length=8, d_model=16, n_layers=1, n_heads=2)
    >>> TransformerLM(tiny)(torch.tensor([[3, 1, 4]])).shape
    torch.Size([1, 3, 50])
    """

    def __init__(
        self,
        config: config.ModelConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.token_embeddings = layers.Embedding(config.padded_vocab_size, config.d_model, device, dtype)
        self.position_embeddings = (
            layers.Embedding(config.context_length, config.d_model, device, dtype)
            if config.position == "learned"
            else None
        )
        # one table for all blocks
        rope = (
            layers.RotaryEmbedding(config.d_head, config.context_length, config.rope_theta, device)
            if config.position == "rope"
            else None
        )
        self.dropout = layers.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            TransformerBlock(config, rope, device, dtype) for _ in range(config.n_layers)
        )
        self.ln_final = make_norm(config, device, dtype)
        self.lm_head = layers.Linear(config.d_model, config.padded_vocab_size, device=device, dtype=dtype)
        if config.tie_embeddings:
            # initialized as an output projection: with std 1 the initial loss would be far above ln V
            self.token_embeddings.weight = self.lm_head.weight
        if config.init == "gpt2":
            init_gpt2_(self)
        if config.zero_init:
            init_zero_(self)

    def forward(
        self,
        tokens: Int[Tensor, "... seq"],
        token_positions: Int[Tensor, "... seq"] | None = None,
        caches: list[layers.KVCache] | None = None,
    ) -> Float[Tensor, "... seq vocab"]:
        """The logits of the next token at each position.

        Positions count from 0, or continue after `caches` (one per block, see `make_kv_caches`).
        """
        return self.logits(self.hidden_states(tokens, token_positions, caches))

    def hidden_states(
        self,
        tokens: Int[Tensor, "... seq"],
        token_positions: Int[Tensor, "... seq"] | None = None,
        caches: list[layers.KVCache] | None = None,
    ) -> Float[Tensor, "... seq d_model"]:
        """The input of the output projection: `forward` up to the logits."""
        start = caches[0].length if caches else 0
        end = start + tokens.shape[-1]
        if token_positions is None:
            if end > self.config.context_length:
                raise ValueError(f"the model sees {self.config.context_length} tokens at most, got {end}")
            token_positions = torch.arange(start, end, device=tokens.device)
        x = self.token_embeddings(tokens)
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(token_positions)
        x = self.dropout(x)
        for i, block in enumerate(self.layers):
            x = block(x, token_positions, caches[i] if caches else None)
        return self.ln_final(x)

    def logits(self, hidden: Float[Tensor, "... seq d_model"]) -> Float[Tensor, "... seq vocab"]:
        """A score for every possible next token, from hidden states."""
        return self.postprocess_logits(self.lm_head(hidden))

    def postprocess_logits(self, logits: Float[Tensor, "... rows"]) -> Float[Tensor, "... vocab"]:
        """Logits without the padding rows of the vocabulary."""
        vocab_size = self.config.vocab_size
        return logits[..., :vocab_size] if self.config.padded_vocab_size > vocab_size else logits

    def make_kv_caches(self, batch: int) -> list[layers.KVCache]:
        """Empty key-value caches for `batch` sequences, one per block."""
        n_kv_heads = self.config.n_kv_heads or self.config.n_heads
        weight = self.lm_head.weight
        return [
            layers.KVCache(
                batch, n_kv_heads, self.config.context_length, self.config.d_head, weight.device, weight.dtype
            )
            for _ in self.layers
        ]

    def n_parameters(self) -> int:
        """Number of weights; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token of a full context (`config.ModelConfig`)."""
        return self.config.flops_per_token

    def extra_repr(self) -> str:
        return (
            f"{self.n_parameters():,} parameters, {self.flops_per_token():,} FLOPs per token in training\n"
            f"{self.config.n_layers} layers, d_model={self.config.d_model}, "
            f"context_length={self.config.context_length}"
        )


# --------------------------------------------------------------------------------------------------
# Choices of the config


def make_norm(
    config: config.ModelConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """The normalization layer of `config.norm`."""
    if config.norm == "none":
        return nn.Identity()
    if config.norm == "rms":
        return layers.RMSNorm(config.d_model, config.norm_eps, device, dtype)
    return layers.LayerNorm(config.d_model, config.norm_eps, config.bias, device, dtype)


def make_ffn(
    config: config.ModelConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """The feed-forward network of `config.ffn`."""
    if config.ffn == "swiglu":
        return layers.SwiGLU(config.d_model, config.d_hidden, device, dtype)
    return layers.MLP(config.d_model, config.d_hidden, config.ffn, config.bias, device, dtype)


@torch.no_grad()
def init_gpt2_(model: TransformerLM) -> None:
    """Initialize as GPT-2: normal of std 0.02, biases 0.

    Projections back to the residual stream are scaled by `1 / sqrt(2 n_layers)`, since it is the sum of
    `2 n_layers` contributions (Radford et al. 2019, section 2.3).
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("attn.output_proj.weight", "ffn.w2.weight")):
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * model.config.n_layers))
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)


@torch.no_grad()
def init_zero_(model: TransformerLM) -> None:
    """Initialize the projections back to the residual stream to zero.

    Each block starts as the identity, at any depth (as in Fixup, arXiv 1901.09321).
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("attn.output_proj.weight", "ffn.w2.weight")):
            nn.init.zeros_(parameter)
