"""A trained model with quantized weights or an int8 key-value cache, for text generation and evaluation.

Linear layers are quantized (`systems.quantization`), the output projection to int8 in both widths: in int4 it
increases perplexity as much as all blocks. Embeddings, norms and biases stay float32. The cache is quantized
as tokens are appended.
"""

from typing import Any

from torch import Tensor, nn

from llm_basics.core import model as models
from llm_basics.systems import quantization

# names of the linear layers of a block
BLOCK_LINEARS = {"q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3"}

# bits and group size: one scale per row is accurate enough for int8, and supported by the CPU kernels
WIDTHS: dict[str, tuple[int, int | None]] = {"int8": (8, None), "int4": (4, 32)}
HEAD, HEAD_WIDTH = "lm_head", WIDTHS["int8"]


def quantize_(model: models.TransformerLM, quantize: str = "none", kv_cache: str = "float32") -> None:
    """Quantize the weights to `int8` or `int4`, and the KV caches to `int8`.

    Raises ValueError for weights that are not finite.
    """
    if quantize != "none":
        for name in quantized_names(model):
            parent, _, last = name.rpartition(".")
            linear: Any = model.get_submodule(name)
            width = HEAD_WIDTH if name == HEAD else WIDTHS[quantize]
            try:
                layer = quantization.QuantizedLinear(linear.weight, linear.bias, *width)
            except ValueError as error:
                raise ValueError(f"{error} (from {name}.weight)") from None
            setattr(model.get_submodule(parent), last, layer)
    if kv_cache == "int8":
        # an instance attribute has precedence over the method of the class
        setattr(model, "make_kv_caches", lambda batch: make_int8_caches(model, batch))  # noqa: B010


def quantized_names(model: models.TransformerLM) -> list[str]:
    """The layers to quantize, without a tied output projection: embeddings need its matrix in float32."""
    found = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in BLOCK_LINEARS]
    return found if model.config.tie_embeddings else [*found, HEAD]


def make_int8_caches(model: models.TransformerLM, batch: int) -> list[quantization.QuantizedKVCache]:
    """`TransformerLM.make_kv_caches` in int8."""
    c, device = model.config, model.token_embeddings.weight.device
    n_kv_heads = c.n_kv_heads or c.n_heads
    return [
        quantization.QuantizedKVCache(batch, n_kv_heads, c.context_length, c.d_head, device)
        for _ in range(c.n_layers)
    ]


def has_int8_cache(model: nn.Module) -> bool:
    """Whether the caches of a model are in int8."""
    return "make_kv_caches" in vars(model)


# --------------------------------------------------------------------------------------------------
# Memory


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, with the scales of quantized ones; a tied matrix counts once.

    >>> import torch
    >>> linear = quantization.QuantizedLinear(torch.ones(3, 8), bits=4, group_size=4)
    >>> weight_bytes(linear)  # 3 rows of 4 bytes and 2 scales
    36
    """
    tensors: list[Tensor] = list(model.parameters())
    for module in model.modules():
        if isinstance(module, quantization.QuantizedLinear):
            tensors += [module.numbers, module.scales]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def cache_bytes_per_token(model: models.TransformerLM) -> int:
    """Bytes of the key-value caches of all blocks for one token."""
    c = model.config
    n_rows = 2 * c.n_layers * (c.n_kv_heads or c.n_heads)
    if has_int8_cache(model):
        return n_rows * (c.d_head + 4)
    return n_rows * c.d_head * model.token_embeddings.weight.element_size()


def describe(model: models.TransformerLM) -> str:
    """The memory of a model in one line."""
    before = 4 * model.config.n_parameters
    cache = "int8" if has_int8_cache(model) else "float32"
    return (
        f"weights {weight_bytes(model) / 1e6:,.2f} MB (float32: {before / 1e6:,.2f} MB), KV cache "
        f"{cache_bytes_per_token(model):,} bytes per token ({cache})"
    )
