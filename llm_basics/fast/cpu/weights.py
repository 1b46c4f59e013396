"""A model's weights as arrays for `decode`, and the check that the kernels support the model.

Models with an unknown module, parameter or option fall back to the reference.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llm_basics import user_code
from llm_basics.core import functional as F
from llm_basics.core import layers
from llm_basics.core import model as models
from llm_basics.fast import layers as fast_layers
from llm_basics.fast.cpu import decode, vectors
from llm_basics.systems import quantization

# options of the model's config; all others must be unset (None, False, 0, "")
SUPPORTED_OPTIONS = set(
    "vocab_size context_length d_model n_layers n_heads n_kv_heads d_ff norm norm_eps norm_placement "
    "position rope_theta ffn qk_norm tie_embeddings bias dropout init zero_init vocab_multiple".split()
)
SUPPORTED_VALUES = {"norm": ["rms", "layer"], "norm_placement": ["pre", "post"], "ffn": list(vectors.FFN)}

# parameters and buffers; in blocks, without the prefix `layers.N.`
SUPPORTED_NAMES = set(
    "token_embeddings.weight position_embeddings.weight lm_head.weight lm_head.bias ln_final.weight "
    "ln_final.bias ln1.weight ln1.bias ln2.weight ln2.bias attn.q_proj.weight attn.q_proj.bias "
    "attn.k_proj.weight attn.k_proj.bias attn.v_proj.weight attn.v_proj.bias attn.output_proj.weight "
    "attn.output_proj.bias attn.q_norm.weight attn.k_norm.weight attn.rope.cos attn.rope.sin "
    "ffn.w1.weight ffn.w1.bias ffn.w2.weight ffn.w2.bias ffn.w3.weight".split()
)

# modules with supported layers; fast layers have the same parameters as the reference
FAST_PACKAGE = fast_layers.__name__.removesuffix("layers")
LAYER_MODULES = {models.__name__, layers.__name__, fast_layers.__name__, quantization.__name__}

# functions that a model calls and the kernels replace
FUNCTIONS = (
    "linear embedding softmax silu gelu relu2 swiglu rms_norm layer_norm rope_tables apply_rope "
    "causal_mask scaled_dot_product_attention"
).split()


def unsupported_part(model: models.TransformerLM) -> str:
    """The first part of a model that is user code or unsupported; "" if there is none."""
    if "make_kv_caches" in vars(model):
        return "the KV cache is quantized"
    for name, module in model.named_modules():
        kind = type(module)
        if isinstance(module, quantization.QuantizedLinear):
            if module.bits != 8 or module.group_size is not None or module.numbers.is_cuda:
                return f"kernels read int8 rows on a CPU, and {name} is {module.extra_repr()}"
        if kind is not nn.ModuleList and kind.__module__ not in LAYER_MODULES:
            return f"{name or 'the model'} is a {kind.__name__} of {user_code.origin(kind)}"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name or 'the model'} has hooks or an instance attribute `forward`"
    for name in FUNCTIONS:
        module = getattr(F, name).__module__
        if module != F.__name__ and not module.startswith(FAST_PACKAGE):
            return f"{name} is of {user_code.origin(getattr(F, name))}"
    for option, value in vars(model.config).items():
        if (option not in SUPPORTED_OPTIONS and value) or value not in SUPPORTED_VALUES.get(option, [value]):
            return f"the model's {option} is {value}"
    return ""


def supports(model: models.TransformerLM, in_bfloat16: bool = False) -> str:
    """The reason why neither the CPU kernels nor the CUDA graph support a model; "" if one of them does.

    `in_bfloat16`: whether the kernels multiply in bfloat16, so that autocast is no reason.
    """
    if reason := unsupported_part(model):
        return reason
    # one walk over modules: named_parameters and named_buffers would take longer than decoding a token
    for name, tensor in [
        (f"{module_name}.{name}", tensor)
        for module_name, module in model.named_modules()
        for name, tensor in (module._parameters | module._buffers).items()
        if tensor is not None
    ]:
        if not _is_supported(name.replace(".numbers", ".weight").replace(".scales", ".weight")):
            return f"the model has {name}"
        if tensor.device.type == "cuda" or name.endswith((".numbers", ".scales")):
            continue
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
        if not tensor.is_contiguous():
            return f"{name} is not contiguous"
    return "autocast is enabled" if torch.is_autocast_enabled("cpu") and not in_bfloat16 else ""


@functools.cache
def _is_supported(name: str) -> bool:
    """Whether a parameter or buffer of this name is supported."""
    block_name = name.split(".", 2)[2] if name.startswith("layers.") else name
    return block_name in SUPPORTED_NAMES


def shape_of(model: models.TransformerLM) -> decode.Shape:
    """The sizes and options of the model's config."""
    c = model.config
    return decode.Shape(
        vocab_size=c.vocab_size,
        n_heads=c.n_heads,
        n_kv_heads=c.n_kv_heads or c.n_heads,
        is_layer_norm=c.norm == "layer",
        is_post_norm=c.norm_placement == "post",
        has_qk_norm=c.qk_norm,
        ffn=vectors.FFN[c.ffn],
        eps=c.norm_eps,
    )


def weights_of(model: models.TransformerLM) -> decode.Weights:
    """Addresses of the matrices, and copies of the vectors; identity values for absent parameters."""
    c = model.config
    # a ModuleList is not generic
    blocks: list[Any] = list(model.layers)
    attention, ffn = [block.attn for block in blocks], [block.ffn for block in blocks]
    positions = (c.context_length, c.d_head // 2)
    d_kv, rope = c.d_head * (c.n_kv_heads or c.n_heads), attention[0].rope
    values = [f.w3 for f in ffn] if c.ffn == "swiglu" else []
    return decode.Weights(
        token_embeddings=_array(model.token_embeddings.weight),
        position_embeddings=(
            np.zeros((c.context_length, c.d_model), np.float32)
            if model.position_embeddings is None
            else _array(model.position_embeddings.weight)
        ),
        cos=np.ones(positions, np.float32) if rope is None else _array(rope.cos),
        sin=np.zeros(positions, np.float32) if rope is None else _array(rope.sin),
        ln1=np.stack([_array(block.ln1.weight) for block in blocks]),
        ln1_bias=_biases([block.ln1 for block in blocks]),
        q=_matrices([a.q_proj for a in attention], c.d_model, c.d_model),
        q_bias=_biases([a.q_proj for a in attention]),
        k=_matrices([a.k_proj for a in attention], d_kv, c.d_model),
        k_bias=_biases([a.k_proj for a in attention]),
        v=_matrices([a.v_proj for a in attention], d_kv, c.d_model),
        v_bias=_biases([a.v_proj for a in attention]),
        q_norm=_head_norms([a.q_norm for a in attention], c.d_head),
        k_norm=_head_norms([a.k_norm for a in attention], c.d_head),
        output=_matrices([a.output_proj for a in attention], c.d_model, c.d_model),
        output_bias=_biases([a.output_proj for a in attention]),
        ln2=np.stack([_array(block.ln2.weight) for block in blocks]),
        ln2_bias=_biases([block.ln2 for block in blocks]),
        up=_matrices([f.w1 for f in ffn], c.d_hidden, c.d_model),
        up_bias=_biases([f.w1 for f in ffn]),
        gated=_matrices(values, c.d_hidden, c.d_model),
        down=_matrices([f.w2 for f in ffn], c.d_model, c.d_hidden),
        down_bias=_biases([f.w2 for f in ffn]),
        ln_final=model.ln_final.get_parameter("weight").detach().numpy(),
        ln_final_bias=_bias(model.ln_final),
        lm_head=_matrices([model.lm_head], _d_out(model.lm_head), c.d_model),
        lm_head_bias=_bias(model.lm_head),
    )


def states_for(w: decode.Weights, keys: np.ndarray, values: np.ndarray, n_threads: int) -> list[decode.State]:
    """A State for each thread; `keys` and `values` are (block, head, position, feature).

    Arrays of which each thread writes a slice are shared, the others private.
    """
    d_model, q, k, v, d_hidden = w.ln_final, w.q_bias[0], w.k_bias[0], w.v_bias[0], w.up_bias[0]
    shared_like = {"added": d_model, "q": q, "k": k, "v": v, "head_output": q}
    shared_like |= {"hidden": d_hidden, "gated": d_hidden, "logits": w.lm_head_bias}
    shared = {name: _buffer(like) for name, like in shared_like.items()}
    return [
        decode.State(
            keys,
            values,
            **shared,
            x=_buffer(d_model),
            normed=_buffer(d_model),
            scores=np.zeros(keys.shape[2], np.float32),
            tokens=np.zeros(decode.AT_A_TIME, np.int64),
        )
        for _ in range(n_threads)
    ]


def _buffer(like: np.ndarray) -> np.ndarray:
    return np.zeros((decode.AT_A_TIME, len(like)), np.float32)


def rounded(w: decode.Weights) -> tuple[decode.Weights, list[np.ndarray]]:
    """The weights with int8 matrices, and the arrays to keep alive."""
    buffers = []

    def quantized(matrices: np.ndarray, d_out: int, d_in: int) -> np.ndarray:
        addresses = np.empty_like(matrices)
        for i, (address, _) in enumerate(matrices):
            # rows padded to a multiple of four
            numbers = np.zeros((-(-d_out // 4) * 4, vectors.padded(d_in)), np.int8)
            scales = np.empty(d_out, np.float32)
            vectors.round_rows(address, d_in, numbers, scales)
            buffers.extend([numbers, scales])
            addresses[i] = numbers.ctypes.data, scales.ctypes.data
        return addresses

    d_model, d_hidden, d_kv = len(w.ln_final), len(w.up_bias[0]), len(w.k_bias[0])
    square, narrow, wide = (d_model, d_model), (d_kv, d_model), (d_hidden, d_model)
    sizes = {"q": square, "k": narrow, "v": narrow, "output": square, "up": wide, "gated": wide}
    sizes |= {"down": wide[::-1], "lm_head": (len(w.lm_head_bias), d_model)}
    matrices = {name: quantized(getattr(w, name), *size) for name, size in sizes.items()}
    return w._replace(**matrices), buffers


def _array(tensor: Tensor) -> np.ndarray:
    """A NumPy view of a tensor."""
    return tensor.detach().numpy()


def _matrices(linears: Sequence[Any], d_out: int, d_in: int) -> np.ndarray:
    """Addresses of float32 weights, or of int8 weights and scales; checks their shapes."""
    addresses = []
    for linear in linears:
        if isinstance(linear, quantization.QuantizedLinear):
            assert linear.numbers.shape == (d_out, d_in), (linear, d_out, d_in)
            _pad_rows_(linear)
            addresses.append((linear.numbers.data_ptr(), linear.scales.data_ptr()))
        else:
            assert linear.weight.shape == (d_out, d_in), (linear, d_out, d_in)
            addresses.append((linear.weight.data_ptr(), 0))
    return np.array(addresses, np.int64).reshape(-1, 2)


def _pad_rows_(linear: quantization.QuantizedLinear) -> None:
    """Move int8 weights, once, to memory padded as in `rounded`; the layer keeps a view of it."""
    (d_out, d_in), stride = linear.numbers.shape, vectors.padded(linear.in_features)
    size = -(-d_out // 4) * 4 * stride
    if linear.numbers.stride(0) != stride or linear.numbers.untyped_storage().nbytes() < size:
        linear.numbers = linear.numbers.new_zeros(size).view(-1, stride)[:d_out, :d_in].copy_(linear.numbers)


def _d_out(linear: Any) -> int:
    is_quantized = isinstance(linear, quantization.QuantizedLinear)
    return linear.out_features if is_quantized else len(linear.weight)


def _bias(module: Any) -> np.ndarray:
    bias = getattr(module, "bias", None)
    return np.zeros(_d_out(module), np.float32) if bias is None else _array(bias)


def _biases(modules: Sequence[Any]) -> np.ndarray:
    return np.stack([_bias(module) for module in modules])


def _head_norms(norms: Sequence[layers.RMSNorm | None], d_head: int) -> np.ndarray:
    ones = np.ones(d_head, np.float32)
    return np.stack([ones if norm is None else _array(norm.weight) for norm in norms])
