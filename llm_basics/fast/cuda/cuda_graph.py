"""One token through a model in tensors of fixed shapes, which a CUDA graph can record.

A small model on a GPU spends its time starting kernels; a graph starts all of them at once, but repeats what
was recorded. So the position is a number on the device. Most models are read by five kernels a block
(`triton_decoding`), which choose the likeliest token too; others as written, with attention to the whole
cache through a mask.
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

# tokens that are asked for at once
AT_ONCE = 16


class StaticStep:
    """Reads a text token by token, on CUDA by replaying a graph of the first token's work."""

    def __init__(self, model: models.TransformerLM) -> None:
        self.model = model
        self.caches = model.make_kv_caches(batch=1)
        self.device = model.lm_head.weight.device
        self.token = torch.zeros(1, dtype=torch.long, device=self.device)
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        c = model.config
        self.kernels = kernels_for(model)
        # what kernels leave for each other, and the tokens that they choose, by position
        self.x, self.queries, self.mixed = (torch.empty(c.d_model, device=self.device) for _ in range(3))
        self.hidden = torch.empty(c.d_hidden, device=self.device)
        self.logits = torch.empty(c.vocab_size, device=self.device)
        self.written = torch.full((c.context_length + 1,), -1, device=self.device)

    @torch.no_grad()
    def read_prompt(self, tokens: Tensor) -> Float[Tensor, " vocab"]:
        """The scores of the token that follows a whole prompt."""
        return self.model(tokens[None], caches=self.caches)[0, -1]

    @torch.no_grad()
    def read_token(self, token: int, position: int) -> Float[Tensor, " vocab"]:
        """The scores of the token that follows `token`, in memory that the next call writes to again."""
        self.token.fill_(token)
        self.position.fill_(position)
        self._run()
        return self.logits

    @torch.no_grad()
    def likeliest_after(self, token: int, position: int, n: int) -> list[int]:
        """Up to `n` tokens that follow `token`, each the likeliest; none where kernels do not choose."""
        if self.kernels is None:
            return []
        n = min(n, AT_ONCE)
        self.token.fill_(token)
        self.position.fill_(position)
        for _ in range(n):
            self._run()
        found = self.written[position + 1 : position + 1 + n].tolist()
        return list(itertools.takewhile(lambda token: token >= 0, found))

    def _run(self) -> None:
        """Read the token, and leave the scores of the next in `self.logits`."""
        if self.device.type != "cuda":
            self.logits = self.step()
            return
        # which need not be the current one
        with torch.cuda.device(self.device):
            if self.graph is None:
                self._record()
            assert self.graph is not None
            self.graph.replay()

    def _record(self) -> None:
        # a step by kernels puts the next token in the place of this one
        token, position = self.token.clone(), self.position.clone()
        # libraries make their choices in the first calls, on a stream of their own as torch's manual asks;
        # each writes the same keys and values to the same position
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
        """`model.forward` for the one token at the one position; by kernels, the likeliest of the next tokens
        then stands in the place of this one, and in `self.written`."""
        return self._as_written() if self.kernels is None else self._by_kernels(self.kernels)

    # -- by kernels -------------------------------------------------------------------------------

    def _by_kernels(self, kernels: types.ModuleType) -> Float[Tensor, " vocab"]:
        model, x, eps = self.model, self.x, self.model.config.norm_eps
        learned = model.position_embeddings
        positions = None if learned is None else learned.weight
        kernels.embed(self.token, self.position, model.token_embeddings.weight, positions, x)
        blocks: Any = model.layers
        for block, cache in zip(blocks, self.caches, strict=True):
            attn, ffn, norm = block.attn, block.ffn, norm_of(kernels, block.ln2, eps)
            heads = kernels.Heads(
                norm_of(kernels, block.ln1, eps),
                tuple(kernels.Projection(p.weight, p.bias) for p in (attn.q_proj, attn.k_proj, attn.v_proj)),
                None if attn.q_norm is None else (attn.q_norm.weight, attn.k_norm.weight),
                None if attn.rope is None else (attn.rope.cos, attn.rope.sin),
                cache.keys[0],
                cache.values[0],
            )
            kernels.project_heads(x, self.position, heads, self.queries)
            kernels.attend(self.queries, self.position, heads, self.mixed)
            back = kernels.Projection(attn.output_proj.weight, attn.output_proj.bias)
            kernels.project(self.mixed, back, x, is_added=True)
            into, back = (kernels.Projection(p.weight, p.bias) for p in (ffn.w1, ffn.w2))
            if isinstance(ffn, layers.SwiGLU):
                kernels.project(x, into, self.hidden, norm, "swiglu", gate=ffn.w3.weight)
            else:
                kernels.project(x, into, self.hidden, norm, ffn.activation)
            kernels.project(self.hidden, back, x, is_added=True)
        head = kernels.Projection(model.lm_head.weight, model.lm_head.bias)
        kernels.project(x, head, self.logits, norm_of(kernels, model.ln_final, eps))
        kernels.choose(self.logits, self.token, self.position, self.written)
        return self.logits

    # -- as written -------------------------------------------------------------------------------

    def _as_written(self) -> Float[Tensor, " vocab"]:
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
        """`attn.forward` over the whole cache, of which only the past counts."""
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
        mixed = F.scaled_dot_product_attention(q, all_keys, all_values, is_past[None])
        return attn.output_proj(rearrange(mixed, "heads seq d_head -> seq (heads d_head)"))


def kernels_for(model: models.TransformerLM) -> types.ModuleType | None:
    """The kernels that can read a model that `weights` knows; None if there are none."""
    device = model.lm_head.weight.device
    if device.type != "cuda" or not has_kernels(model) or not availability.has_triton(device):
        return None
    from llm_basics.fast.cuda import decode  # only where Triton is installed

    return decode


def has_kernels(model: models.TransformerLM) -> bool:
    """Whether there are kernels for all that the model does, and for what its weights are."""
    c, parameters = model.config, list(model.parameters())
    is_plain = c.norm_placement == "pre" and c.d_head % 2 == 0
    are_plain = all(p.dtype == torch.float32 and p.is_contiguous() for p in parameters)
    return is_plain and are_plain and len({p.device for p in parameters}) == 1


def norm_of(kernels: types.ModuleType, norm: nn.Module, eps: float) -> tuple:
    """What kernels are told of a norm; `eps` is for the heads where there is none."""
    if isinstance(norm, nn.Identity):
        return kernels.Norm("none", None, None, eps)
    assert isinstance(norm, layers.RMSNorm | layers.LayerNorm), f"the norm is a {type(norm)}"
    kind, bias = ("layer", norm.bias) if isinstance(norm, layers.LayerNorm) else ("rms", None)
    return kernels.Norm(kind, norm.weight, bias, norm.eps)
