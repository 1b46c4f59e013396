"""Convert weights to and from a layout of transformers, bit for bit.

The RoPE of transformers rotates feature i of a head with feature i + d_head / 2, ours rotates neighboring
features: the same pairs in another order, so the rows of query and key projections are permuted. Biases that
an architecture requires and the model lacks are 0.
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

# buffers in older files, which are recomputed
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")

# exactly representable in float32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def to_hf(layout: hf_config.Layout, shape: config.ModelConfig, weights: Mapping[str, Tensor]) -> Tensors:
    """Tensors with the names of transformers. A tied output projection is not stored."""
    tensors = dict(weights)
    if "bias" not in layout.model_options:
        for name, tensor in _skeleton(dataclasses.replace(shape, bias=True)).items():
            tensors.setdefault(name, torch.zeros(tensor.shape))
    renamed: Tensors = {}
    for hf_name, names, is_transposed in layout.modules(shape):
        for kind in ("weight", "bias"):
            parts = [tensors[f"{name}.{kind}"] for name in names if f"{name}.{kind}" in tensors]
            if parts:
                if is_rotated(names[0], shape):
                    parts = [permute_rope(part, shape.d_head) for part in parts]
                rows = torch.cat(parts)
                if names[0] in ("token_embeddings", "lm_head"):
                    rows = rows[: shape.vocab_size]  # without padding rows
                oriented = rows.T if is_transposed and rows.dim() == 2 else rows
                renamed[f"{hf_name}.{kind}"] = oriented.contiguous()
    return renamed


def from_hf(
    layout: hf_config.Layout, shape: config.ModelConfig, found: Mapping[str, Tensor], origin: str
) -> Tensors:
    """Our weights from those of transformers. Raises ValueError for missing and unexpected tensors."""
    if shape.n_layers > len(found):  # before as many expected tensors are created
        raise ValueError(
            f"{origin} must hold {shape.n_layers} blocks (config.json), got {len(found)} tensors"
        )
    tensors = _normalize(layout, shape, found, origin)
    checkpoint.check_shapes(
        expected(layout, shape), tensors, f"the weights in {origin} do not match its config.json"
    )
    weights: Tensors = {}
    for hf_name, names, is_transposed in layout.modules(shape):
        for kind in ("weight", "bias"):
            if f"{hf_name}.{kind}" in tensors:
                tensor = tensors[f"{hf_name}.{kind}"]
                oriented = tensor.T if is_transposed and tensor.dim() == 2 else tensor
                for name, rows in zip(names, oriented.chunk(len(names)), strict=True):
                    rows = _unpermute_rope(rows, shape.d_head) if is_rotated(name, shape) else rows
                    weights[f"{name}.{kind}"] = rows.contiguous()
    if shape.tie_embeddings:
        weights["lm_head.weight"] = weights["token_embeddings.weight"]
    return weights


def expected(layout: hf_config.Layout, shape: config.ModelConfig) -> Tensors:
    """Names and shapes of the tensors of a layout, on the meta device."""
    return to_hf(layout, shape, _skeleton(shape))


def _normalize(
    layout: hf_config.Layout, shape: config.ModelConfig, found: Mapping[str, Tensor], origin: str
) -> Tensors:
    """Weights without buffers, with current names, in float32."""
    tensors = {name: tensor for name, tensor in found.items() if not name.endswith(BUFFERS)}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{origin}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}")
        if n_bad := int((~tensor.isfinite()).sum()):
            raise ValueError(
                f"{origin}: {name} must be finite, but {n_bad:,} of its {tensor.numel():,} weights are not"
            )
    embeddings, *_ = layout.model_modules
    prefix = embeddings.partition(".")[0] + "."
    if not any(name.startswith(prefix) for name in tensors):
        tensors = {name if name == "lm_head.weight" else prefix + name: t for name, t in tensors.items()}
    if shape.tie_embeddings and f"{embeddings}.weight" in tensors:
        head = tensors.pop("lm_head.weight", tensors[f"{embeddings}.weight"])
        if not torch.equal(head, tensors[f"{embeddings}.weight"]):
            raise ValueError(
                f"{origin}: lm_head.weight must equal {embeddings}.weight, because config.json has "
                "tie_word_embeddings true, got another matrix; set it to false to keep both"
            )
    return {name: tensor.float() for name, tensor in tensors.items()}


def _skeleton(shape: config.ModelConfig) -> Tensors:
    return models.TransformerLM(shape, device="meta").state_dict()


def is_rotated(name: str, shape: config.ModelConfig) -> bool:
    """Whether RoPE rotates the output features of a module."""
    return shape.position == "rope" and name.endswith(("q_proj", "k_proj", "q_norm", "k_norm"))


def permute_rope(rows: Float[Tensor, "features ..."], d_head: int) -> Float[Tensor, "features ..."]:
    """Reorder the features of each head from pairs (0, 1), (2, 3), ... to halves, as in transformers."""
    return rearrange(rows, "(heads half pair) ... -> (heads pair half) ...", pair=2, half=d_head // 2)


def _unpermute_rope(rows: Float[Tensor, "features ..."], d_head: int) -> Float[Tensor, "features ..."]:
    """Reorder the features of each head from halves to pairs: the inverse of `permute_rope`."""
    return rearrange(rows, "(heads pair half) ... -> (heads half pair) ...", pair=2, half=d_head // 2)
