"""Weights between our models and a layout of transformers, bit for bit.

Their RoPE turns feature i of a head together with feature i + d_head / 2, ours turns neighbours: the same
pairs in another order, so that rows of the query and key projections change places. Biases that an
architecture cannot do without are 0.
"""

import dataclasses
from collections.abc import Mapping

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from llm_basics.core import config
from llm_basics.core import model as models
from llm_basics.interop import hf_config
from llm_basics.runs import checkpoint

Tensors = dict[str, Tensor]

# what older files hold beside the weights: masks and tables that are made anew
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")

# what float32 holds exactly
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def to_hf(layout: hf_config.Layout, shape: config.ModelConfig, weights: Mapping[str, Tensor]) -> Tensors:
    """The tensors of a model under their names. A tied output projection is not stored."""
    everything = dict(weights)
    if "bias" not in layout.has:
        for name, tensor in _skeleton(dataclasses.replace(shape, bias=True)).items():
            everything.setdefault(name, torch.zeros(tensor.shape))
    named: Tensors = {}
    for theirs, ours, is_transposed in layout.modules(shape):
        for kind in ("weight", "bias"):
            parts = [everything[f"{name}.{kind}"] for name in ours if f"{name}.{kind}" in everything]
            if parts:
                if _turns(ours[0], shape):
                    parts = [_permute_rope(part, shape.d_head) for part in parts]
                rows = torch.cat(parts)
                if ours[0] in ("token_embeddings", "lm_head"):
                    rows = rows[: shape.vocab_size]  # the rest is no token's
                turned = rows.T if is_transposed and rows.dim() == 2 else rows
                named[f"{theirs}.{kind}"] = turned.contiguous()
    return named


def from_hf(
    layout: hf_config.Layout, shape: config.ModelConfig, found: Mapping[str, Tensor], origin: str
) -> Tensors:
    """The weights of our model from theirs. Raises ValueError unless all are there, and nothing else."""
    if shape.n_layers > len(found):  # before as many are made to compare with
        raise ValueError(f"{origin} must hold {shape.n_layers} blocks, got {len(found)} tensors")
    tensors = _tidy(layout, shape, found, origin)
    checkpoint.check_shapes(expected(layout, shape), tensors, f"{origin} is not as its config.json says")
    weights: Tensors = {}
    for theirs, ours, is_transposed in layout.modules(shape):
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in tensors:
                tensor = tensors[f"{theirs}.{kind}"]
                turned = tensor.T if is_transposed and tensor.dim() == 2 else tensor
                for name, rows in zip(ours, turned.chunk(len(ours)), strict=True):
                    rows = _pairs(rows, shape.d_head) if _turns(name, shape) else rows
                    weights[f"{name}.{kind}"] = rows.contiguous()
    if shape.tie_embeddings:
        weights["lm_head.weight"] = weights["token_embeddings.weight"]
    return weights


def expected(layout: hf_config.Layout, shape: config.ModelConfig) -> Tensors:
    """What tensors there must be: their names and shapes, without numbers."""
    return to_hf(layout, shape, _skeleton(shape))


def _tidy(
    layout: hf_config.Layout, shape: config.ModelConfig, found: Mapping[str, Tensor], origin: str
) -> Tensors:
    """The weights alone, under their present names and in float32."""
    tensors = {name: tensor for name, tensor in found.items() if not name.endswith(BUFFERS)}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{origin}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    embeddings, *_ = layout.outside
    prefix = embeddings.partition(".")[0] + "."
    if not any(name.startswith(prefix) for name in tensors):
        tensors = {name if name == "lm_head.weight" else prefix + name: t for name, t in tensors.items()}
    if shape.tie_embeddings and f"{embeddings}.weight" in tensors:
        head = tensors.pop("lm_head.weight", tensors[f"{embeddings}.weight"])
        if not torch.equal(head, tensors[f"{embeddings}.weight"]):
            raise ValueError(
                f"{origin}: lm_head.weight must be {embeddings}.weight, since config.json says "
                "tie_word_embeddings, but differs; set that to false if both are meant"
            )
    return {name: tensor.float() for name, tensor in tensors.items()}


def _skeleton(shape: config.ModelConfig) -> Tensors:
    return models.TransformerLM(shape, device="meta").state_dict()


def _turns(name: str, shape: config.ModelConfig) -> bool:
    """Whether the features that a module of ours makes are turned by RoPE."""
    return shape.position == "rope" and name.endswith(("q_proj", "k_proj", "q_norm", "k_norm"))


def _permute_rope(rows: Float[Tensor, "features ..."], d_head: int) -> Float[Tensor, "features ..."]:
    """The features of each head, the first of all pairs before the second ones."""
    return rearrange(rows, "(heads half pair) ... -> (heads pair half) ...", pair=2, half=d_head // 2)


def _pairs(rows: Float[Tensor, "features ..."], d_head: int) -> Float[Tensor, "features ..."]:
    """The features of each head, pair by pair."""
    return rearrange(rows, "(heads pair half) ... -> (heads half pair) ...", pair=2, half=d_head // 2)
