"""Our models as transformers has them: which architecture can be which model, and what it calls its parts.

A layout is a table that is read in both directions: its options here, its tensors in `transplant`. Dropout
is for training alone, and left out. Checked against transformers 4.57 and 5.24.

    >>> find(config.ModelConfig(qk_norm=True)).architecture
    'Qwen3ForCausalLM'
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llm_basics.core import config, presets

# our activations by their names; of two that are the same, the first is written
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu2": "relu2",
    "silu": "silu",
}

# what all architectures are like
EVERYWHERE = {"norm_placement": "pre"}


@dataclass(frozen=True)
class Layout:
    """An architecture of transformers."""

    model_type: str
    """What config.json calls it."""
    architecture: str
    """The class that `AutoModelForCausalLM` makes of it."""
    has: dict[str, Any]
    """Options of ours that must have this value; a missing `bias` means that it has biases everywhere."""
    sizes: dict[str, str]
    """Options of theirs, and ours that say the same."""
    outside: dict[str, str]
    """Modules of theirs outside the blocks, and ours."""
    block: str
    """What stands before the names of a block's modules, `{i}` being its number."""
    inside: dict[str, str]
    """Modules of a block; several of ours are rows of one of theirs, in this order."""
    activation: str | None = None
    """The option that names the activation of a plain feed-forward network."""
    transposed: tuple[str, ...] = ()
    """Modules of a block whose matrices are (d_in, d_out): transformers' Conv1D."""
    must: dict[str, Any] = field(default_factory=dict)
    """Options of theirs at which it is what our model can be."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """What options mean that config.json may leave out."""
    extras: dict[str, Any] = field(default_factory=dict)
    """Options that are written and not read."""

    def modules(self, shape: config.ModelConfig) -> Iterator[tuple[str, list[str], bool]]:
        """Each module of theirs, the modules of ours that it holds, and whether it is transposed."""
        for theirs, name in self.outside.items():
            if not (theirs == "lm_head" and shape.tie_embeddings):
                yield theirs, [name], False
        for i in range(shape.n_layers):
            for theirs, names in self.inside.items():
                ours = [f"layers.{i}.{name}" for name in names.split()]
                yield self.block.format(i=i) + theirs, ours, theirs in self.transposed


# --------------------------------------------------------------------------------------------------
# The tables

GPT2 = Layout(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    has={"norm": "layer", "position": "learned", "qk_norm": False},
    sizes={
        "vocab_size": "vocab_size",
        "n_positions": "context_length",
        "n_embd": "d_model",
        "n_layer": "n_layers",
        "n_head": "n_heads",
        "n_inner": "d_ff",
        "layer_norm_epsilon": "norm_eps",
        "tie_word_embeddings": "tie_embeddings",
    },
    outside={
        "transformer.wte": "token_embeddings",
        "transformer.wpe": "position_embeddings",
        "transformer.ln_f": "ln_final",
        "lm_head": "lm_head",
    },
    block="transformer.h.{i}.",
    inside={
        "ln_1": "ln1",
        "attn.c_attn": "attn.q_proj attn.k_proj attn.v_proj",
        "attn.c_proj": "attn.output_proj",
        "ln_2": "ln2",
        "mlp.c_fc": "ffn.w1",
        "mlp.c_proj": "ffn.w2",
    },
    transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    activation="activation_function",
    must={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    defaults={
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "activation_function": "gelu_new",
    },
    extras={"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
)

# of the architectures of Llama's family
SIZES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "d_ff",
    "tie_word_embeddings": "tie_embeddings",
}
NORMS = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
ATTENTION = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
}
QK_NORMS = {"self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm"}
GATED = {"mlp.gate_proj": "ffn.w1", "mlp.up_proj": "ffn.w3", "mlp.down_proj": "ffn.w2"}
PLAIN = {"mlp.up_proj": "ffn.w1", "mlp.down_proj": "ffn.w2"}

LLAMA = Layout(
    model_type="llama",
    architecture="LlamaForCausalLM",
    has={"norm": "rms", "position": "rope", "qk_norm": False, "ffn": "swiglu", "bias": False},
    sizes=SIZES | {"rms_norm_eps": "norm_eps"},
    outside={
        "model.embed_tokens": "token_embeddings",
        "model.norm": "ln_final",
        "lm_head": "lm_head",
    },
    block="model.layers.{i}.",
    inside=NORMS | ATTENTION | GATED,
    must={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    defaults={"num_key_value_heads": None, "tie_word_embeddings": False, "rope_theta": 10000.0},
)

# Llama under another name, if its attention sees the whole context
MISTRAL = dataclasses.replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    must={"hidden_act": "silu", "sliding_window": None},
    defaults=LLAMA.defaults | {"sliding_window": 4096},
)

# normalizes queries and keys head by head, before RoPE
QWEN3 = dataclasses.replace(
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    has=LLAMA.has | {"qk_norm": True},
    inside=NORMS | ATTENTION | QK_NORMS | GATED,
    must={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
)

# Llama with a plain feed-forward network
ARCEE = dataclasses.replace(
    LLAMA,
    model_type="arcee",
    architecture="ArceeForCausalLM",
    has={"norm": "rms", "position": "rope", "qk_norm": False, "bias": False},
    inside=NORMS | ATTENTION | PLAIN,
    activation="hidden_act",
    must={"attention_bias": False, "mlp_bias": False},
    defaults=LLAMA.defaults | {"hidden_act": "relu2"},
)

# both
APERTUS = dataclasses.replace(
    ARCEE,
    model_type="apertus",
    architecture="ApertusForCausalLM",
    has=ARCEE.has | {"qk_norm": True},
    inside={"attention_layernorm": "ln1", "feedforward_layernorm": "ln2"} | ATTENTION | QK_NORMS | PLAIN,
    must={"attention_bias": False},
    defaults={"num_key_value_heads": None, "tie_word_embeddings": False},
    # an older transformers would scale RoPE otherwise
    extras={"rope_scaling": None},
)

# GPT-2 with RoPE, and with groups of heads that share keys and values
STARCODER2 = dataclasses.replace(
    LLAMA,
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    has={"norm": "layer", "position": "rope", "qk_norm": False},
    sizes=SIZES | {"norm_epsilon": "norm_eps"},
    inside=NORMS | ATTENTION | {"mlp.c_fc": "ffn.w1", "mlp.c_proj": "ffn.w2"},
    activation="hidden_act",
    must={"use_bias": True, "sliding_window": None},
    defaults=LLAMA.defaults | {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
)

# of two that can be the same model, the first is written
LAYOUTS = (GPT2, LLAMA, QWEN3, ARCEE, APERTUS, STARCODER2, MISTRAL)

# --------------------------------------------------------------------------------------------------
# Options


def find(shape: config.ModelConfig) -> Layout:
    """The layout of a model. Raises ValueError if there is none, with what stands in the way."""
    layout, reasons = min(((each, _misfits(each, shape)) for each in LAYOUTS), key=lambda pair: len(pair[1]))
    if reasons:
        raise ValueError(
            f"transformers must have a layout for the model, but the nearest, {layout.model_type}, must have "
            f"{' and '.join(reasons)}; train with that to export"
        )
    return layout


def _misfits(layout: Layout, shape: config.ModelConfig) -> list[str]:
    reasons = [
        f"model.{option} {value}, got {getattr(shape, option)}"
        for option, value in (EVERYWHERE | layout.has).items()
        if getattr(shape, option) != value
    ]
    if layout.activation and shape.ffn == "swiglu":
        reasons.append("model.ffn gelu_tanh, gelu, relu2 or silu, got swiglu")
    if "n_kv_heads" not in layout.sizes.values() and shape.d_kv != shape.d_model:
        reasons.append(f"model.n_kv_heads as n_heads, got {shape.n_kv_heads}")
    return reasons


def write_options(layout: Layout, shape: config.ModelConfig) -> dict[str, Any]:
    """What config.json says of a model."""
    resolved = dataclasses.replace(shape, n_kv_heads=shape.n_kv_heads or shape.n_heads, d_ff=shape.d_hidden)
    options: dict[str, Any] = {"architectures": [layout.architecture], "model_type": layout.model_type}
    options |= {theirs: getattr(resolved, ours) for theirs, ours in layout.sizes.items()}
    options |= layout.must | layout.extras
    if layout.activation:
        options[layout.activation] = next(name for name, ours in ACTIVATIONS.items() if ours == shape.ffn)
    if shape.position == "rope":
        # as transformers has it since version 5, and as it was before
        options["rope_parameters"] = {"rope_type": "default", "rope_theta": shape.rope_theta}
        options |= {"rope_theta": shape.rope_theta, "head_dim": shape.d_head}
    return options


def read_options(options: Mapping[str, Any], origin: str) -> tuple[Layout, config.ModelConfig]:
    """The layout that config.json names, and the model. Raises ValueError for what ours can not be."""
    known = {layout.model_type: layout for layout in LAYOUTS}
    layout = known.get(str(options.get("model_type")))
    if layout is None:
        raise ValueError(
            f"{origin}: model_type must be {', '.join(known)}, got {options.get('model_type')!r}"
        )
    if "quantization_config" in options:
        raise ValueError(f"{origin}: the weights must be plain numbers, but they are quantized")
    options = layout.defaults | dict(options)
    for name, value in layout.must.items():
        if options.get(name, value) != value:
            raise ValueError(
                f"{origin}: {name} must be {value}, got {options[name]!r}: ours has no such model"
            )
    values = {"bias": True} | layout.has
    for theirs, ours in layout.sizes.items():
        if theirs not in options:
            raise ValueError(f"{origin} must say {theirs}, which is missing")
        values[ours] = options[theirs]
    if layout.activation:
        named = options.get(layout.activation)
        if named not in ACTIVATIONS:
            raise ValueError(f"{origin}: {layout.activation} must be {', '.join(ACTIVATIONS)}, got {named!r}")
        values["ffn"] = ACTIVATIONS[named]
    if values["position"] == "rope":
        values["rope_theta"] = _rope_theta(options, origin)
    try:
        shape = presets.update(config.ModelConfig(), values, "in our words", "model.")
    except ValueError as error:
        raise ValueError(f"{origin} must describe a model that ours can be; {error}") from None
    if options.get("head_dim") not in (None, shape.d_head):
        raise ValueError(
            f"{origin}: head_dim must be hidden_size / num_attention_heads, {shape.d_head}, got "
            f"{options['head_dim']}: heads of ours have no other width"
        )
    return layout, shape


def _rope_theta(options: Mapping[str, Any], origin: str) -> Any:
    """The base of the wavelengths; raises ValueError for all kinds of RoPE but the plain one."""
    rope = options.get("rope_parameters") or options.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default" or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{origin}: rope_scaling must be off (rope_type default), got {rope}")
    share = rope.get("partial_rotary_factor", options.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise ValueError(f"{origin}: partial_rotary_factor must be 1, got {share}")
    theta = rope.get("rope_theta", options.get("rope_theta"))
    if theta is None:
        raise ValueError(f"{origin} must say rope_theta, which is missing")
    return theta
