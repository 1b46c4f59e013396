"""One token through a model, in tensors whose shapes never change: what a CUDA graph can hold.

On a GPU a small model's time goes into starting kernels, some twenty for each block. A graph starts all of
them at once; but it does again exactly what was recorded. So the position is a number on the device,
and attention looks at the whole cache through a mask.
"""

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from llm_basics import functional as F
from llm_basics import layers
from llm_basics import model as models


class StaticStep:
    """Reads a text token by token, on CUDA by replaying a graph of the first token's work."""

    def __init__(self, model: models.TransformerLM) -> None:
        self.model = model
        self.caches = model.new_caches(batch=1)
        self.device = model.lm_head.weight.device
        self.token = torch.zeros(1, dtype=torch.long, device=self.device)
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def read_prompt(self, tokens: Tensor) -> Float[Tensor, " vocab"]:
        """The scores of the token that follows a whole prompt."""
        return self.model(tokens[None], caches=self.caches)[0, -1]

    @torch.no_grad()
    def read_token(self, token: int, position: int) -> Float[Tensor, " vocab"]:
        """The scores of the token that follows `token`, in memory that the next call writes to again."""
        self.token.fill_(token)
        self.position.fill_(position)
        if self.device.type != "cuda":
            return self.step()
        if self.graph is None:
            self._record()
        assert self.graph is not None
        self.graph.replay()
        return self.logits

    def _record(self) -> None:
        # libraries make their choices in the first calls, on a stream of their own as torch's manual asks;
        # each writes the same keys and values to the same position
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.step()

    def step(self) -> Float[Tensor, " vocab"]:
        """`model.forward` for the one token at the one position."""
        model = self.model
        x = model.token_embeddings(self.token)
        if model.position_embeddings is not None:
            x = x + model.position_embeddings(self.position)
        x0 = x
        is_past = torch.arange(model.config.context_length, device=self.device) <= self.position
        for i, (block, cache) in enumerate(zip(model.layers, self.caches, strict=True)):
            assert isinstance(block, models.TransformerBlock)
            if block.x0_mix is not None:
                x = block.x0_mix[0] * x + block.x0_mix[1] * x0
            values = model.value_embeddings[i](self.token) if model.config.value_embeddings else 0.0
            if block.norm_placement == "pre":
                x = x + self.attend(block.attn, block.ln1(x), cache, is_past, values)
                x = x + block.ffn(block.ln2(x))
            else:
                x = block.ln1(x + self.attend(block.attn, x, cache, is_past, values))
                x = block.ln2(x + block.ffn(x))
        return model.logits(model.ln_final(x))[0]

    def attend(
        self,
        attn: layers.MultiHeadSelfAttention,
        x: Float[Tensor, "1 d_model"],
        cache: layers.KVCache,
        is_past: Bool[Tensor, " keys"],
        values: Float[Tensor, "1 d_kv"] | float,
    ) -> Float[Tensor, "1 d_model"]:
        """`attn.forward` over the whole cache, of which only the past counts."""
        q, k, v = (
            rearrange(projected, "seq (heads d_head) -> heads seq d_head", d_head=attn.d_head)
            for projected in (attn.q_proj(x), attn.k_proj(x), attn.v_proj(x) + values)
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
