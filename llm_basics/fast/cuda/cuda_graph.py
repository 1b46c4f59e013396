"""Decodes one token with static shapes, recorded as a CUDA graph.

A small model on a GPU is bound by kernel launches. A graph launches all of them at once but only replays, so
the position is a tensor on the device. Most models use five Triton kernels per block (`cuda.decode`), which
also choose the greedy token; others use their modules, with masked attention over the whole cache.
"""

import itertools
import types
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from llm_basics.core import functional as F
from llm_basics.core import layers
from llm_basics.core import model as models
from llm_basics.fast.cuda import availability

# greedy tokens decoded per synchronization
TOKENS_PER_SYNC = 16


class StaticStep:
    """Decodes a text token by token, on CUDA by replaying a graph recorded at the first token."""

    def __init__(self, model: models.TransformerLM) -> None:
        self.model = model
        self.caches = model.make_kv_caches(batch=1)
        self.device = model.lm_head.weight.device
        self.token = torch.zeros(1, dtype=torch.long, device=self.device)
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        c = model.config
        self.kernels = kernels_for(model)
        # activations of the kernels, and the greedy tokens by position
        self.x, self.queries, self.head_outputs = (
            torch.empty(c.d_model, device=self.device) for _ in range(3)
        )
        self.hidden = torch.empty(c.d_hidden, device=self.device)
        self.logits = torch.empty(c.vocab_size, device=self.device)
        self.generated = torch.full((c.context_length + 1,), -1, device=self.device)

    @torch.no_grad()
    def read_prompt(self, tokens: Tensor) -> Float[Tensor, " vocab"]:
        """The logits after a prompt."""
        return self.model(tokens[None], caches=self.caches)[0, -1]

    @torch.no_grad()
    def read_token(self, token: int, position: int) -> Float[Tensor, " vocab"]:
        """The logits after `token`, in a buffer that the next call overwrites."""
        self.token.fill_(token)
        self.position.fill_(position)
        self._run()
        return self.logits

    @torch.no_grad()
    def greedy_tokens(self, token: int, position: int, n: int) -> list[int]:
        """Up to `n` greedy tokens after `token`, before any near tie; none without Triton kernels."""
        if self.kernels is None:
            return []
        n = min(n, TOKENS_PER_SYNC)
        self.token.fill_(token)
        self.position.fill_(position)
        for _ in range(n):
            self._run()
        tokens = self.generated[position + 1 : position + 1 + n].tolist()
        return list(itertools.takewhile(lambda token: token >= 0, tokens))

    def close(self) -> None:
        """Nothing is kept."""

    def _run(self) -> None:
        """Decode `self.token`, and write the next token's logits to `self.logits`."""
        if self.device.type != "cuda":
            self.logits = self.step()
            return
        # the model's device need not be the current one
        with torch.cuda.device(self.device):
            if self.graph is None:
                self._record()
            assert self.graph is not None
            self.graph.replay()

    def _record(self) -> None:
        # each step overwrites token and position
        token, position = self.token.clone(), self.position.clone()
        # warmup on a side stream, as torch's documentation requires: libraries select algorithms; each step
        # writes the same keys and values to the same position
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
                self.token.copy_(token)
                self.position.copy_(position)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.step()

    def step(self) -> Float[Tensor, " vocab"]:
        """The logits after `self.token` at `self.position`; kernels then replace both by the greedy next."""
        return self._step_by_modules() if self.kernels is None else self._step_by_kernels(self.kernels)

    # -- Triton kernels ---------------------------------------------------------------------------

    def _step_by_kernels(self, kernels: types.ModuleType) -> Float[Tensor, " vocab"]:
        model, x, eps = self.model, self.x, self.model.config.norm_eps
        positions_module = model.position_embeddings
        positions = None if positions_module is None else positions_module.weight
        kernels.embed(self.token, self.position, model.token_embeddings.weight, positions, x)
        blocks: Any = model.layers
        for block, cache in zip(blocks, self.caches, strict=True):
            attn, ffn, norm = block.attn, block.ffn, kernel_norm(kernels, block.ln2, eps)
            heads = kernels.Heads(
                kernel_norm(kernels, block.ln1, eps),
                tuple(kernels.Projection(p.weight, p.bias) for p in (attn.q_proj, attn.k_proj, attn.v_proj)),
                None if attn.q_norm is None else (attn.q_norm.weight, attn.k_norm.weight),
                None if attn.rope is None else (attn.rope.cos, attn.rope.sin),
                cache.keys[0],
                cache.values[0],
            )
            kernels.project_heads(x, self.position, heads, self.queries)
            kernels.attend(self.queries, self.position, heads, self.head_outputs)
            down = kernels.Projection(attn.output_proj.weight, attn.output_proj.bias)
            kernels.project(self.head_outputs, down, x, is_added=True)
            into, down = (kernels.Projection(p.weight, p.bias) for p in (ffn.w1, ffn.w2))
            if isinstance(ffn, layers.SwiGLU):
                kernels.project(x, into, self.hidden, norm, "swiglu", gate=ffn.w3.weight)
            else:
                kernels.project(x, into, self.hidden, norm, ffn.activation)
            kernels.project(self.hidden, down, x, is_added=True)
        head = kernels.Projection(model.lm_head.weight, model.lm_head.bias)
        kernels.project(x, head, self.logits, kernel_norm(kernels, model.ln_final, eps))
        kernels.choose(self.logits, self.token, self.position, self.generated)
        return self.logits

    # -- the model's modules ----------------------------------------------------------------------

    def _step_by_modules(self) -> Float[Tensor, " vocab"]:
        model = self.model
        x = model.token_embeddings(self.token)
        if model.position_embeddings is not None:
            x = x + model.position_embeddings(self.position)
        is_past = torch.arange(model.config.context_length, device=self.device) <= self.position
        for block, cache in zip(model.layers, self.caches, strict=True):
            assert isinstance(block, models.TransformerBlock)
            if block.norm_placement == "pre":
                x = x + self.attend(block.attn, block.ln1(x), cache, is_past)
                x = x + block.ffn(block.ln2(x))
            else:
                x = block.ln1(x + self.attend(block.attn, x, cache, is_past))
                x = block.ln2(x + block.ffn(x))
        return model.logits(model.ln_final(x))[0]

    def attend(
        self,
        attn: layers.MultiHeadSelfAttention,
        x: Float[Tensor, "1 d_model"],
        cache: layers.KVCache,
        is_past: Bool[Tensor, " keys"],
    ) -> Float[Tensor, "1 d_model"]:
        """`attn.forward` over the whole cache, masked to the past."""
        q, k, v = (
            rearrange(projected, "seq (heads d_head) -> heads seq d_head", d_head=attn.d_head)
            for projected in (attn.q_proj(x), attn.k_proj(x), attn.v_proj(x))
        )
        if attn.q_norm is not None and attn.k_norm is not None:
            q, k = attn.q_norm(q), attn.k_norm(k)
        if attn.rope is not None:
            q, k = attn.rope(q, self.position), attn.rope(k, self.position)
        cache.keys[0].index_copy_(1, self.position, k)
        cache.values[0].index_copy_(1, self.position, v)
        group = attn.n_heads // attn.n_kv_heads
        all_keys = repeat(cache.keys[0], "heads keys d_head -> (heads group) keys d_head", group=group)
        all_values = repeat(cache.values[0], "heads keys d_head -> (heads group) keys d_head", group=group)
        head_outputs = F.scaled_dot_product_attention(q, all_keys, all_values, is_past[None])
        return attn.output_proj(rearrange(head_outputs, "heads seq d_head -> seq (heads d_head)"))


def kernels_for(model: models.TransformerLM) -> types.ModuleType | None:
    """The Triton kernels for a model that `weights.supports`; None if they do not support it."""
    device = model.lm_head.weight.device
    if device.type != "cuda" or not is_supported(model) or not availability.has_triton(device):
        return None
    from llm_basics.fast.cuda import decode  # only where Triton is installed

    return decode


def is_supported(model: models.TransformerLM) -> bool:
    """Whether the kernels support the model's config and weights."""
    c, parameters = model.config, list(model.parameters())
    has_supported_config = c.norm_placement == "pre" and c.d_head % 2 == 0
    has_supported_weights = all(p.dtype == torch.float32 and p.is_contiguous() for p in parameters)
    return has_supported_config and has_supported_weights and len({p.device for p in parameters}) == 1


def kernel_norm(kernels: types.ModuleType, norm: nn.Module, eps: float) -> tuple:
    """A norm as the kernels' `Norm`; `eps` is that of the heads if the norm is nn.Identity."""
    if isinstance(norm, nn.Identity):
        return kernels.Norm("none", None, None, eps)
    assert isinstance(norm, layers.RMSNorm | layers.LayerNorm), f"the norm is a {type(norm)}"
    kind, bias = ("layer", norm.bias) if isinstance(norm, layers.LayerNorm) else ("rms", None)
    return kernels.Norm(kind, norm.weight, bias, norm.eps)
