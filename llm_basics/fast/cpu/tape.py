"""Writes a model's forward and backward pass as a program for `interpreter`, with hand-derived gradients.

A part that a model lacks gets a neutral value (a bias of 0, a rotation by 0), and its gradient goes to unused
memory. Activations are (token, feature), weights as in the model or packed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_basics.core import model as models
from llm_basics.fast.cpu import amx, attention, interpreter, matmul, vectors


def named(model: models.TransformerLM) -> dict[str, Tensor]:
    """The parameters by name; a tied parameter has both names."""
    return {**dict(model.named_parameters()), "lm_head.weight": model.lm_head.weight}


def task_of(model: models.TransformerLM) -> interpreter.Task:
    """The model's sizes and options; `seq`, `z_loss` and `share` are set for each batch."""
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
    """One thread's operations, with buffers for `n` tokens (a multiple of `amx.TILE`) and for gradients.

    `packed` holds the weights of projections by name, in the layout of `matmul.pack`. Those in `paired` are
    multiplied in bfloat16: `packed` is in the layout of `amx.pack`, `paired` in that of `amx.pair_rows`.
    """

    def __init__(
        self, model: models.TransformerLM, packed: Mapping[str, Tensor], paired: Mapping[str, Tensor], n: int
    ) -> None:
        self.shape, self.packed, self.paired, self.n = model.config, packed, paired, n
        self.parameters, parameters = named(model), dict(model.named_parameters())
        # one flat tensor of all gradients, in the order of the parameters
        self.row: Float[Tensor, " _"] = torch.empty(sum(p.numel() for p in parameters.values()))
        parts = self.row.split([p.numel() for p in parameters.values()])
        self.gradients = dict(zip(parameters, parts, strict=True))
        if self.shape.tie_embeddings:
            self.gradients["lm_head.weight"] = self.gradients["token_embeddings.weight"]
        # keeps tensors alive whose addresses the program holds
        self.kept_alive: list[Tensor] = [*packed.values(), *paired.values()]
        self.steps: list[tuple[int, ...]] = []
        self.n_correct = torch.zeros(1)
        self._allocate(model)
        self._write_forward()
        # of the backward pass, the final norm
        n_forward = len(self.steps) + 1
        self._write_backward()
        self.table = _table(self.steps)
        head = self.normed, packed["lm_head.weight"], self.n_correct, self.logits
        evaluation = (interpreter.EVALUATE, *map(address, head), 0, 0, "lm_head.weight" in paired)
        self.evaluation = _table([*self.steps[:n_forward], evaluation])

    def _allocate(self, model: models.TransformerLM) -> None:
        c, n = self.shape, self.n
        blocks, d, d_kv, d_hidden = c.n_layers, c.d_model, c.d_kv, c.d_hidden
        # activations of each block saved for the backward pass; x and x_mid are the residual stream
        self.x, self.x_mid = self._buffer(blocks + 1, n, d), self._buffer(blocks, n, d)
        self.q, self.mixed = self._buffer(blocks, n, d), self._buffer(blocks, n, d)
        self.k, self.v = self._buffer(blocks, n, d_kv), self._buffer(blocks, n, d_kv)
        self.statistics = self._buffer(blocks, 2 * n * c.n_heads)
        self.hidden = self._buffer(blocks, n, d_hidden)
        self.gated = self._buffer(blocks, n, d_hidden * (c.ffn == "swiglu"))
        # temporaries of all blocks
        self.normed, self.activated = self._buffer(n, d), self._buffer(n, d_hidden)
        self.rotated_q, self.rotated_k = self._buffer(n, d), self._buffer(n, d_kv)
        self.logits = self._buffer(interpreter.LOSS_TOKENS, matmul.padded(c.padded_vocab_size))
        # gradients
        self.dx, self.dnormed, self.dq = self._buffer(n, d), self._buffer(n, d), self._buffer(n, d)
        self.dk, self.dv = self._buffer(n, d_kv), self._buffer(n, d_kv)
        self.dhidden, self.dgated = self._buffer(n, d_hidden), self._buffer(n, d_hidden)
        # neutral values of absent parts, and the target of their gradients
        length = max(c.context_length * d, d_hidden, matmul.padded(c.padded_vocab_size), n * d)
        self.zeros, self.unused = self._buffer(length).zero_(), self._buffer(length)
        self.ones = self._buffer(c.d_head).fill_(1)
        # a ModuleList is not generic
        block: Any = model.layers[0]
        rope, angles = block.attn.rope, (c.context_length, c.d_head // 2)
        cos = self._buffer(*angles).fill_(1) if rope is None else rope.cos
        sin = self._buffer(*angles).zero_() if rope is None else rope.sin
        self.kept_alive += [cos, sin]
        widest, padded_vocab = matmul.whole_tiles(max(d, d_hidden)), matmul.whole_tiles(c.padded_vocab_size)
        transposed = self._buffer(max(n * widest, interpreter.LOSS_TOKENS * padded_vocab))
        left = self._buffer(len(transposed) // 2 if self.paired else 1)
        right = self._buffer(n * max(d, d_hidden) // 2 if self.paired else 1)
        places = (transposed, self.zeros, cos, sin, left, right, amx.CONFIGURATION.ctypes.data)
        self.common = interpreter.Workspace(*map(address, places))
        scores = attention.QUERIES * matmul.padded(c.context_length)
        packed = matmul.packed_size(c.context_length, c.d_head)
        buffers = [self._buffer(size) for size in (scores, scores, packed, packed)]
        self.of_heads = attention.Workspace(*map(address, (*buffers, self.zeros)))

    def _buffer(self, *shape: int) -> Tensor:
        self.kept_alive.append(torch.empty(shape))
        return self.kept_alive[-1]

    # ----------------------------------------------------------------------------------------------
    # Model

    def _write_forward(self) -> None:
        """From tokens to the residual stream after the last block."""
        names = "token_embeddings.weight", "position_embeddings.weight"
        self._add(interpreter.EMBED, *map(self._parameter_or_zeros, names), self.x[0])
        for i in range(self.shape.n_layers):
            block = f"layers.{i}"
            self._normalize(self.x[i], f"{block}.ln1")
            for name, out in (("q", self.q), ("k", self.k), ("v", self.v)):
                self._project(self.normed, f"{block}.attn.{name}_proj", out[i])
            q, k = self._apply_rope(i)
            self._add(interpreter.ATTEND, q, k, self.v[i], self.statistics[i], self.mixed[i])
            self._add_projected(self.mixed[i], f"{block}.attn.output_proj", self.x[i], self.x_mid[i])
            self._normalize(self.x_mid[i], f"{block}.ln2")
            self._project(self.normed, f"{block}.ffn.w1", self.hidden[i])
            if self.shape.ffn == "swiglu":
                self._project(self.normed, f"{block}.ffn.w3", self.gated[i])
            self._add(interpreter.ACTIVATE, self.hidden[i], self.gated[i], self.activated)
            self._add_projected(self.activated, f"{block}.ffn.w2", self.x_mid[i], self.x[i + 1])

    def _write_backward(self) -> None:
        """From the loss to all weights."""
        last = self.x[self.shape.n_layers]
        self._normalize(last, "ln_final")
        name = "lm_head.weight"
        operands = self.normed, self.packed[name], self._right_operand(name), self.logits
        self._add(interpreter.LOSS, *operands, self.dnormed, self.gradients[name], name in self.paired)
        # dx = 0
        self._add(interpreter.ADD_BIAS, self.zeros, self.zeros, self.dx)
        self._normalize_backward(last, "ln_final")
        for i in reversed(range(self.shape.n_layers)):
            self._write_ffn_backward(i)
            self._write_attention_backward(i)
        embeddings = self._gradient("token_embeddings.weight"), self._gradient("position_embeddings.weight")
        self._add(interpreter.EMBED_BACKWARD, self.dx, *embeddings)

    def _write_ffn_backward(self, i: int) -> None:
        ffn = f"layers.{i}.ffn"
        self._project_backward(self.dx, f"{ffn}.w2", self.dhidden)
        saved = self.hidden[i], self.gated[i]
        self._add(interpreter.ACTIVATE_BACKWARD, *saved, self.dhidden, self.dgated, self.activated)
        self._weight_gradient(self.dx, self.activated, f"{ffn}.w2")
        self._normalize(self.x_mid[i], f"layers.{i}.ln2")
        self._weight_gradient(self.dhidden, self.normed, f"{ffn}.w1")
        self._project_backward(self.dhidden, f"{ffn}.w1", self.dnormed)
        if self.shape.ffn == "swiglu":
            self._weight_gradient(self.dgated, self.normed, f"{ffn}.w3")
            self._project_backward(self.dgated, f"{ffn}.w3", self.dnormed, accumulate=True)
        self._normalize_backward(self.x_mid[i], f"layers.{i}.ln2")

    def _write_attention_backward(self, i: int) -> None:
        attn, projections = f"layers.{i}.attn", (("q", self.q, self.dq), ("k", self.k, self.dk))
        self._weight_gradient(self.dx, self.mixed[i], f"{attn}.output_proj")
        self._project_backward(self.dx, f"{attn}.output_proj", self.dnormed)
        q, k = self._apply_rope(i)
        saved = q, k, self.v[i], self.statistics[i], self.mixed[i]
        self._add(interpreter.ATTEND_BACKWARD, *saved, self.dnormed, self.dq, self.dk, self.dv)
        for name, rows, drows in projections if self._transforms_heads else ():
            norm = f"{attn}.{name}_norm.weight"
            gain, dgain = self.parameters.get(norm, self.ones), self._gradient(norm)
            self._add(interpreter.ROPE_BACKWARD, rows[i], gain, drows, dgain, self._n_heads(name))
        self._normalize(self.x[i], f"layers.{i}.ln1")
        for name, drows in (("q", self.dq), ("k", self.dk), ("v", self.dv)):
            self._weight_gradient(drows, self.normed, f"{attn}.{name}_proj")
            self._project_backward(drows, f"{attn}.{name}_proj", self.dnormed, accumulate=name != "q")
        self._normalize_backward(self.x[i], f"layers.{i}.ln1")

    @property
    def _transforms_heads(self) -> bool:
        """Whether queries and keys are normalized or rotated after their projections."""
        return self.shape.position == "rope" or self.shape.qk_norm

    def _n_heads(self, name: str) -> int:
        return self.shape.n_heads if name == "q" else self.shape.d_kv // self.shape.d_head

    def _apply_rope(self, i: int) -> tuple[Tensor, Tensor]:
        """Queries and keys of a block as attention reads them."""
        if not self._transforms_heads:
            return self.q[i], self.k[i]
        for name, rows, out in (("q", self.q, self.rotated_q), ("k", self.k, self.rotated_k)):
            gain = self.parameters.get(f"layers.{i}.attn.{name}_norm.weight", self.ones)
            self._add(interpreter.ROPE, rows[i], gain, out, self._n_heads(name))
        return self.rotated_q, self.rotated_k

    # ----------------------------------------------------------------------------------------------
    # Layers

    def _normalize(self, x: Tensor, name: str) -> None:
        norm_inputs = self._parameter_or_zeros(f"{name}.weight"), self._parameter_or_zeros(f"{name}.bias")
        self._add(interpreter.NORMALIZE, x, *norm_inputs, self.normed)

    def _normalize_backward(self, x: Tensor, name: str) -> None:
        """From `dnormed`, add to `dx` and to the norm's gradients."""
        gradients = self._gradient(f"{name}.weight"), self._gradient(f"{name}.bias")
        self._add(
            interpreter.NORMALIZE_BACKWARD,
            x,
            self._parameter_or_zeros(f"{name}.weight"),
            self.dnormed,
            *gradients,
            self.dx,
        )

    def _project(self, x: Tensor, name: str, out: Tensor) -> None:
        linear_inputs = self.packed[f"{name}.weight"], self._parameter_or_zeros(f"{name}.bias")
        self._add(interpreter.PROJECT, x, *linear_inputs, out, *self._sizes(name))

    def _add_projected(self, x: Tensor, name: str, start: Tensor, out: Tensor) -> None:
        self._add(interpreter.ADD_BIAS, start, self._parameter_or_zeros(f"{name}.bias"), out)
        self._add(interpreter.PROJECT, x, self.packed[f"{name}.weight"], out, out, *self._sizes(name))

    def _project_backward(self, dy: Tensor, name: str, dx: Tensor, accumulate: bool = False) -> None:
        start, weight = dx if accumulate else self.zeros, self._right_operand(f"{name}.weight")
        self._add(interpreter.PROJECT_BACKWARD, dy, weight, start, dx, *self._sizes(name))

    def _weight_gradient(self, dy: Tensor, x: Tensor, name: str) -> None:
        gradients = self.gradients[f"{name}.weight"], self.gradients.get(f"{name}.bias", 0)
        self._add(interpreter.WEIGHT_GRADIENT, dy, x, *gradients, *self._sizes(name))

    def _sizes(self, name: str) -> tuple[int, int, int]:
        """d_in and d_out of a projection, and whether it is multiplied in bfloat16."""
        d_out, d_in = self.parameters[f"{name}.weight"].shape
        return d_in, d_out, f"{name}.weight" in self.paired

    def _right_operand(self, name: str) -> Tensor:
        """The weights of a projection for its backward pass."""
        return self.paired.get(name, self.parameters[name])

    def _parameter_or_zeros(self, name: str) -> Tensor:
        return self.parameters.get(name, self.zeros)

    def _gradient(self, name: str) -> Tensor:
        return self.gradients.get(name, self.unused)

    def _add(self, step: int, *arguments: Any) -> None:
        self.steps.append((step, *map(address, arguments)))


def _table(steps: Sequence[tuple[int, ...]]) -> np.ndarray:
    table = np.zeros((len(steps), interpreter.STEP_LENGTH), np.int64)
    for row, step in zip(table, steps, strict=True):
        row[: len(step)] = step
    return table


def has_data(tensor: Tensor) -> bool:
    """Whether kernels can read a tensor; a fake one, with which memory is estimated, has no data."""
    return type(tensor) in (Tensor, nn.Parameter)


def address(x: Tensor | int) -> int:
    """Where the numbers of a tensor begin; 0 for one without data. Whole numbers stay as they are."""
    if isinstance(x, int):
        return x
    return x.data_ptr() if has_data(x) else 0
