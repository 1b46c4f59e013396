"""A model's forward and backward pass as a list of steps for `gradient`, with the gradients by hand.

A part that a model lacks has a value that changes nothing, a bias of 0 or an angle of 0, and a gradient that
is written to unused memory.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llm_basics.core import model as models
from llm_basics.fast.cpu import attention, interpreter, matmul, vectors


def named(model: models.TransformerLM) -> dict[str, Tensor]:
    """The parameters by name; one that is tied has both of its names."""
    return {**dict(model.named_parameters()), "lm_head.weight": model.lm_head.weight}


def task_of(model: models.TransformerLM) -> interpreter.Task:
    """What a model's config decides for all steps; the length of texts, say, is for others to fill in."""
    c = model.config
    return interpreter.Task(
        seq=1,
        d_model=c.d_model,
        d_hidden=c.d_hidden,
        n_heads=c.n_heads,
        n_kv_heads=c.n_kv_heads or c.n_heads,
        d_head=c.d_head,
        vocab_size=c.vocab_size,
        n_rows=c.padded_vocab_size,
        is_layer_norm=c.norm == "layer",
        has_qk_norm=c.qk_norm,
        ffn=vectors.FFN[c.ffn],
        eps=c.norm_eps,
        z_loss=0.0,
        share=1.0,
    )


class Program:
    """The steps of one thread, and what they work on: room for `n` tokens at a time, and sums of gradients.

    `packed` are the weights of projections by name, as `tiles.pack` has them.
    """

    def __init__(self, model: models.TransformerLM, packed: Mapping[str, Tensor], n: int) -> None:
        self.shape, self.packed, self.n = model.config, packed, n
        self.parameters, own = named(model), dict(model.named_parameters())
        # all gradients in one row, in the order of the parameters
        self.row: Float[Tensor, " _"] = torch.empty(sum(p.numel() for p in own.values()))
        parts = self.row.split([p.numel() for p in own.values()])
        self.gradients = dict(zip(own, parts, strict=True))
        if self.shape.tie_embeddings:
            self.gradients["lm_head.weight"] = self.gradients["token_embeddings.weight"]
        # the steps hold addresses, which keep nothing alive
        self.held: list[Tensor] = list(packed.values())
        self.steps: list[tuple[int, ...]] = []
        self._make_room(model)
        self._write_forward()
        self._write_backward()
        self.table = np.zeros((len(self.steps), interpreter.LONGEST), np.int64)
        for row, step in zip(self.table, self.steps, strict=True):
            row[: len(step)] = step

    def _make_room(self, model: models.TransformerLM) -> None:
        c, n = self.shape, self.n
        blocks, d, d_kv, d_hidden = c.n_layers, c.d_model, c.d_kv, c.d_hidden
        is_gated = c.ffn == "swiglu"
        # what the way back needs of the way forward, of each block; the residual stream before it and inside
        self.x, self.middle = self._room(blocks + 1, n, d), self._room(blocks, n, d)
        self.q, self.mixed = self._room(blocks, n, d), self._room(blocks, n, d)
        self.k, self.v = self._room(blocks, n, d_kv), self._room(blocks, n, d_kv)
        self.sizes = self._room(blocks, 2 * n * c.n_heads)
        self.hidden, self.gated = self._room(blocks, n, d_hidden), self._room(blocks, n, d_hidden * is_gated)
        # what all blocks use: what a projection sees, queries and keys as they meet, what is active
        self.seen, self.active = self._room(n, d), self._room(n, d_hidden)
        self.placed_q, self.placed_k = self._room(n, d), self._room(n, d_kv)
        self.logits = self._room(interpreter.SCORED, matmul.padded(c.padded_vocab_size))
        # gradients
        self.dx, self.dseen, self.dq = self._room(n, d), self._room(n, d), self._room(n, d)
        self.dk, self.dv = self._room(n, d_kv), self._room(n, d_kv)
        self.dhidden, self.dgated = self._room(n, d_hidden), self._room(n, d_hidden)
        # in place of what the model does without; and where its gradient goes
        length = max(c.context_length * d, d_hidden, matmul.padded(c.padded_vocab_size), n * d)
        self.zeros, self.nowhere = self._room(length).zero_(), self._room(length)
        self.ones = self._room(c.d_head).fill_(1)
        # a ModuleList does not say of what
        block: Any = model.layers[0]
        rope, angles = block.attn.rope, (c.context_length, c.d_head // 2)
        cos = self._room(*angles).fill_(1) if rope is None else rope.cos
        sin = self._room(*angles).zero_() if rope is None else rope.sin
        self.held += [cos, sin]
        widest, of_scores = matmul.whole_tiles(max(d, d_hidden)), matmul.whole_tiles(c.padded_vocab_size)
        turned = self._room(max(n * widest, interpreter.SCORED * of_scores))
        self.common = interpreter.Workspace(*map(_address, (turned, self.zeros, cos, sin)))
        scores = attention.QUERIES * matmul.padded(c.context_length)
        packed = matmul.packed_size(c.context_length, c.d_head)
        rooms = [self._room(size) for size in (scores, scores, packed, packed)]
        self.of_heads = attention.Workspace(*map(_address, (*rooms, self.zeros)))

    def _room(self, *shape: int) -> Tensor:
        self.held.append(torch.empty(shape))
        return self.held[-1]

    # ----------------------------------------------------------------------------------------------
    # The model

    def _write_forward(self) -> None:
        """From tokens to the residual stream after the last block."""
        embeddings = self._given("token_embeddings.weight"), self._given("position_embeddings.weight")
        self._add(interpreter.EMBED, *embeddings, self.x[0])
        for i in range(self.shape.n_layers):
            block = f"layers.{i}"
            self._normalize(self.x[i], f"{block}.ln1")
            for name, out in (("q", self.q), ("k", self.k), ("v", self.v)):
                self._project(self.seen, f"{block}.attn.{name}_proj", out[i])
            q, k = self._place(i)
            self._add(interpreter.ATTEND, q, k, self.v[i], self.sizes[i], self.mixed[i])
            self._add_projected(self.mixed[i], f"{block}.attn.output_proj", self.x[i], self.middle[i])
            self._normalize(self.middle[i], f"{block}.ln2")
            self._project(self.seen, f"{block}.ffn.w1", self.hidden[i])
            if self.shape.ffn == "swiglu":
                self._project(self.seen, f"{block}.ffn.w3", self.gated[i])
            self._add(interpreter.ACTIVATE, self.hidden[i], self.gated[i], self.active)
            self._add_projected(self.active, f"{block}.ffn.w2", self.middle[i], self.x[i + 1])

    def _write_backward(self) -> None:
        """From the loss to all weights."""
        last = self.x[self.shape.n_layers]
        self._normalize(last, "ln_final")
        packed, weight, dweight = (
            of["lm_head.weight"] for of in (self.packed, self.parameters, self.gradients)
        )
        self._add(interpreter.SCORE, self.seen, packed, weight, self.logits, self.dseen, dweight)
        # no gradient of the residual stream before this one
        self._add(interpreter.ADD_BIAS, self.zeros, self.zeros, self.dx)
        self._normalize_back(last, "ln_final")
        for i in reversed(range(self.shape.n_layers)):
            self._write_ffn_back(i)
            self._write_attention_back(i)
        embeddings = self._gradient("token_embeddings.weight"), self._gradient("position_embeddings.weight")
        self._add(interpreter.EMBED_BACK, self.dx, *embeddings)

    def _write_ffn_back(self, i: int) -> None:
        ffn = f"layers.{i}.ffn"
        self._project_back(self.dx, f"{ffn}.w2", self.dhidden)
        kept = self.hidden[i], self.gated[i]
        self._add(interpreter.ACTIVATE_BACK, *kept, self.dhidden, self.dgated, self.active)
        self._learn(self.dx, self.active, f"{ffn}.w2")
        self._normalize(self.middle[i], f"layers.{i}.ln2")
        self._learn(self.dhidden, self.seen, f"{ffn}.w1")
        self._project_back(self.dhidden, f"{ffn}.w1", self.dseen)
        if self.shape.ffn == "swiglu":
            self._learn(self.dgated, self.seen, f"{ffn}.w3")
            self._project_back(self.dgated, f"{ffn}.w3", self.dseen, adds=True)
        self._normalize_back(self.middle[i], f"layers.{i}.ln2")

    def _write_attention_back(self, i: int) -> None:
        attn, places = f"layers.{i}.attn", (("q", self.q, self.dq), ("k", self.k, self.dk))
        self._learn(self.dx, self.mixed[i], f"{attn}.output_proj")
        self._project_back(self.dx, f"{attn}.output_proj", self.dseen)
        q, k = self._place(i)
        kept = q, k, self.v[i], self.sizes[i], self.mixed[i]
        self._add(interpreter.ATTEND_BACK, *kept, self.dseen, self.dq, self.dk, self.dv)
        for name, rows, drows in places if self._has_places else ():
            norm = f"{attn}.{name}_norm.weight"
            gain, dgain = self.parameters.get(norm, self.ones), self._gradient(norm)
            self._add(interpreter.PLACE_BACK, rows[i], gain, drows, dgain, self._n_heads(name))
        self._normalize(self.x[i], f"layers.{i}.ln1")
        for name, drows in (("q", self.dq), ("k", self.dk), ("v", self.dv)):
            self._learn(drows, self.seen, f"{attn}.{name}_proj")
            self._project_back(drows, f"{attn}.{name}_proj", self.dseen, adds=name != "q")
        self._normalize_back(self.x[i], f"layers.{i}.ln1")

    @property
    def _has_places(self) -> bool:
        """Whether queries and keys meet as something else than the projections."""
        return self.shape.position == "rope" or self.shape.qk_norm

    def _n_heads(self, name: str) -> int:
        return self.shape.n_heads if name == "q" else self.shape.d_kv // self.shape.d_head

    def _place(self, i: int) -> tuple[Tensor, Tensor]:
        """Queries and keys of a block as they meet."""
        if not self._has_places:
            return self.q[i], self.k[i]
        for name, rows, out in (("q", self.q, self.placed_q), ("k", self.k, self.placed_k)):
            gain = self.parameters.get(f"layers.{i}.attn.{name}_norm.weight", self.ones)
            self._add(interpreter.PLACE, rows[i], gain, out, self._n_heads(name))
        return self.placed_q, self.placed_k

    # ----------------------------------------------------------------------------------------------
    # Layers

    def _normalize(self, x: Tensor, name: str) -> None:
        of_norm = self._given(f"{name}.weight"), self._given(f"{name}.bias")
        self._add(interpreter.NORMALIZE, x, *of_norm, self.seen)

    def _normalize_back(self, x: Tensor, name: str) -> None:
        """From what changes with `seen` to what, more than before, changes with `x`."""
        learned = self._gradient(f"{name}.weight"), self._gradient(f"{name}.bias")
        self._add(interpreter.NORMALIZE_BACK, x, self._given(f"{name}.weight"), self.dseen, *learned, self.dx)

    def _project(self, x: Tensor, name: str, out: Tensor) -> None:
        of_linear = self.packed[f"{name}.weight"], self._given(f"{name}.bias")
        self._add(interpreter.PROJECT, x, *of_linear, out, *self._sizes(name))

    def _add_projected(self, x: Tensor, name: str, start: Tensor, out: Tensor) -> None:
        self._add(interpreter.ADD_BIAS, start, self._given(f"{name}.bias"), out)
        self._add(interpreter.PROJECT, x, self.packed[f"{name}.weight"], out, out, *self._sizes(name))

    def _project_back(self, dy: Tensor, name: str, dx: Tensor, adds: bool = False) -> None:
        start, weight = dx if adds else self.zeros, self._given(f"{name}.weight")
        self._add(interpreter.PROJECT_BACK, dy, weight, start, dx, *self._sizes(name))

    def _learn(self, dy: Tensor, x: Tensor, name: str) -> None:
        learned = self.gradients[f"{name}.weight"], self.gradients.get(f"{name}.bias", 0)
        self._add(interpreter.LEARN, dy, x, *learned, *self._sizes(name))

    def _sizes(self, name: str) -> tuple[int, int]:
        """How many numbers a projection takes, and how many it makes."""
        d_out, d_in = self.parameters[f"{name}.weight"].shape
        return d_in, d_out

    def _given(self, name: str) -> Tensor:
        return self.parameters.get(name, self.zeros)

    def _gradient(self, name: str) -> Tensor:
        return self.gradients.get(name, self.nowhere)

    def _add(self, step: int, *arguments: Any) -> None:
        self.steps.append((step, *map(_address, arguments)))


def _address(x: Tensor | int) -> int:
    return x if isinstance(x, int) else x.data_ptr()
