"""Layouts: the names of the options and modules of our models in transformers, and matching architectures.

A layout is a table used for export and import: options in this file, tensors in `hf_weights`. Dropout only
affects training and is omitted. Checked against transformers 4.57 and 5.24.

    >>> find(config.ModelConfig(qk_norm=True)).architecture
    'Qwen3ForCausalLM'
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llm_basics.core import config, presets

# transformers activation: ours; the first name of an activation is exported
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu2": "relu2",
    "silu": "silu",
}

# options required by every layout
REQUIRED = {"norm_placement": "pre"}


@dataclass(frozen=True)
class Layout:
    """An architecture of transformers."""

    model_type: str
    """`model_type` in config.json."""
    architecture: str
    """Class that `AutoModelForCausalLM` loads."""
    model_options: dict[str, Any]
    """Values required of our model options; without `bias`, the architecture always has biases."""
    option_names: dict[str, str]
    """Option of transformers: our model option of the same meaning."""
    model_modules: dict[str, str]
    """Module of transformers outside the blocks: our module."""
    block_prefix: str
    """Prefix of the modules of block `{i}`."""
    block_modules: dict[str, str]
    """Module of transformers in a block: our modules; several are concatenated as rows, in this order."""
    activation: str | None = None
    """Option that names the activation of a feed-forward network without a gate."""
    transposed: tuple[str, ...] = ()
    """Modules of a block whose weights are (d_in, d_out): transformers' Conv1D."""
    hf_options: dict[str, Any] = field(default_factory=dict)
    """Values required of options of transformers."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Default values of options that config.json may omit."""
    export_only: dict[str, Any] = field(default_factory=dict)
    """Options written to config.json and ignored on import."""

    def modules(self, shape: config.ModelConfig) -> Iterator[tuple[str, list[str], bool]]:
        """Yields module of transformers, our modules in it, and whether its weight is transposed."""
        for hf_name, name in self.model_modules.items():
            if not (hf_name == "lm_head" and shape.tie_embeddings):
                yield hf_name, [name], False
        for i in range(shape.n_layers):
            for hf_name, names in self.block_modules.items():
                full_names = [f"layers.{i}.{name}" for name in names.split()]
                yield self.block_prefix.format(i=i) + hf_name, full_names, hf_name in self.transposed


# --------------------------------------------------------------------------------------------------
# The tables

GPT2 = Layout(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    model_options={"norm": "layer", "position": "learned", "qk_norm": False},
    option_names={
        "vocab_size": "vocab_size",
        "n_positions": "context_length",
        "n_embd": "d_model",
        "n_layer": "n_layers",
        "n_head": "n_heads",
        "n_inner": "d_ff",
        "layer_norm_epsilon": "norm_eps",
        "tie_word_embeddings": "tie_embeddings",
    },
    model_modules={
        "transformer.wte": "token_embeddings",
        "transformer.wpe": "position_embeddings",
        "transformer.ln_f": "ln_final",
        "lm_head": "lm_head",
    },
    block_prefix="transformer.h.{i}.",
    block_modules={
        "ln_1": "ln1",
        "attn.c_attn": "attn.q_proj attn.k_proj attn.v_proj",
        "attn.c_proj": "attn.output_proj",
        "ln_2": "ln2",
        "mlp.c_fc": "ffn.w1",
        "mlp.c_proj": "ffn.w2",
    },
    transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    activation="activation_function",
    hf_options={
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
    export_only={"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
)

# shared by the Llama family
OPTION_NAMES = {
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
    model_options={"norm": "rms", "position": "rope", "qk_norm": False, "ffn": "swiglu", "bias": False},
    option_names=OPTION_NAMES | {"rms_norm_eps": "norm_eps"},
    model_modules={
        "model.embed_tokens": "token_embeddings",
        "model.norm": "ln_final",
        "lm_head": "lm_head",
    },
    block_prefix="model.layers.{i}.",
    block_modules=NORMS | ATTENTION | GATED,
    hf_options={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    defaults={"num_key_value_heads": None, "tie_word_embeddings": False, "rope_theta": 10000.0},
)

# equals Llama if attention covers the whole context
MISTRAL = dataclasses.replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    hf_options={"hidden_act": "silu", "sliding_window": None},
    defaults=LLAMA.defaults | {"sliding_window": 4096},
)

# Llama with RMSNorm of the queries and keys of each head, before RoPE
QWEN3 = dataclasses.replace(
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    model_options=LLAMA.model_options | {"qk_norm": True},
    block_modules=NORMS | ATTENTION | QK_NORMS | GATED,
    hf_options={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
)

# Llama with a feed-forward network without a gate
ARCEE = dataclasses.replace(
    LLAMA,
    model_type="arcee",
    architecture="ArceeForCausalLM",
    model_options={"norm": "rms", "position": "rope", "qk_norm": False, "bias": False},
    block_modules=NORMS | ATTENTION | PLAIN,
    activation="hidden_act",
    hf_options={"attention_bias": False, "mlp_bias": False},
    defaults=LLAMA.defaults | {"hidden_act": "relu2"},
)

# Arcee with RMSNorm of queries and keys
APERTUS = dataclasses.replace(
    ARCEE,
    model_type="apertus",
    architecture="ApertusForCausalLM",
    model_options=ARCEE.model_options | {"qk_norm": True},
    block_modules={"attention_layernorm": "ln1", "feedforward_layernorm": "ln2"}
    | ATTENTION
    | QK_NORMS
    | PLAIN,
    hf_options={"attention_bias": False},
    defaults={"num_key_value_heads": None, "tie_word_embeddings": False},
    # transformers 4 scales RoPE by default
    export_only={"rope_scaling": None},
)

# GPT-2 with RoPE and grouped-query attention
STARCODER2 = dataclasses.replace(
    LLAMA,
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    model_options={"norm": "layer", "position": "rope", "qk_norm": False},
    option_names=OPTION_NAMES | {"norm_epsilon": "norm_eps"},
    block_modules=NORMS | ATTENTION | {"mlp.c_fc": "ffn.w1", "mlp.c_proj": "ffn.w2"},
    activation="hidden_act",
    hf_options={"use_bias": True, "sliding_window": None},
    defaults=LLAMA.defaults | {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
)

# the first layout that fits is exported
LAYOUTS = (GPT2, LLAMA, QWEN3, ARCEE, APERTUS, STARCODER2, MISTRAL)

# --------------------------------------------------------------------------------------------------
# Options


def find(shape: config.ModelConfig) -> Layout:
    """The layout that matches a model. Raises ValueError with the differences to the nearest layout."""
    layout, reasons = min(((each, _misfits(each, shape)) for each in LAYOUTS), key=lambda pair: len(pair[1]))
    if reasons:
        raise ValueError(
            f"no architecture of transformers fits the model; the nearest, {layout.model_type}, needs "
            f"{' and '.join(reasons)}; train with these options to export"
        )
    return layout


def _misfits(layout: Layout, shape: config.ModelConfig) -> list[str]:
    reasons = [
        f"model.{option} {value}, got {getattr(shape, option)}"
        for option, value in (REQUIRED | layout.model_options).items()
        if getattr(shape, option) != value
    ]
    if layout.activation and shape.ffn == "swiglu":
        reasons.append("model.ffn gelu_tanh, gelu, relu2 or silu, got swiglu")
    if "n_kv_heads" not in layout.option_names.values() and shape.d_kv != shape.d_model:
        reasons.append(f"model.n_kv_heads equal to n_heads, got {shape.n_kv_heads}")
    return reasons


def write_options(layout: Layout, shape: config.ModelConfig) -> dict[str, Any]:
    """The content of config.json for a model."""
    resolved = dataclasses.replace(shape, n_kv_heads=shape.n_kv_heads or shape.n_heads, d_ff=shape.d_hidden)
    options: dict[str, Any] = {"architectures": [layout.architecture], "model_type": layout.model_type}
    options |= {hf_name: getattr(resolved, name) for hf_name, name in layout.option_names.items()}
    options |= layout.hf_options | layout.export_only
    if layout.activation:
        options[layout.activation] = next(name for name, ffn in ACTIVATIONS.items() if ffn == shape.ffn)
    if shape.position == "rope":
        # of transformers 5, and of older versions
        options["rope_parameters"] = {"rope_type": "default", "rope_theta": shape.rope_theta}
        options |= {"rope_theta": shape.rope_theta, "head_dim": shape.d_head}
    return options


def read_options(options: Mapping[str, Any], origin: str) -> tuple[Layout, config.ModelConfig]:
    """The layout and model config of a config.json. Raises ValueError for a model that is not supported."""
    known = {layout.model_type: layout for layout in LAYOUTS}
    layout = known.get(str(options.get("model_type")))
    if layout is None:
        raise ValueError(
            f"{origin}: model_type must be {', '.join(known)}, got {options.get('model_type')!r}"
        )
    if "quantization_config" in options:
        raise ValueError(f"{origin}: quantized weights are not supported; import the original model")
    options = layout.defaults | dict(options)
    for name, value in layout.hf_options.items():
        if options.get(name, value) != value:
            raise ValueError(
                f"{origin}: {name} must be {value}, got {options[name]!r}; other values are not supported"
            )
    values = {"bias": True} | layout.model_options
    for hf_name, name in layout.option_names.items():
        if hf_name not in options:
            raise ValueError(f"{origin} must have {hf_name}, which is missing")
        values[name] = options[hf_name]
    if layout.activation:
        named = options.get(layout.activation)
        if named not in ACTIVATIONS:
            raise ValueError(f"{origin}: {layout.activation} must be {', '.join(ACTIVATIONS)}, got {named!r}")
        values["ffn"] = ACTIVATIONS[named]
    if values["position"] == "rope":
        values["rope_theta"] = _rope_theta(options, origin)
    try:
        shape = presets.update(config.ModelConfig(), values, "converted", "model.")
    except ValueError as error:
        raise ValueError(f"{origin} must describe a supported model; {error}") from None
    if options.get("head_dim") not in (None, shape.d_head):
        raise ValueError(
            f"{origin}: head_dim must be hidden_size / num_attention_heads = {shape.d_head}, got "
            f"{options['head_dim']}; other widths are not supported"
        )
    return layout, shape


def _rope_theta(options: Mapping[str, Any], origin: str) -> Any:
    """The base of RoPE. Raises ValueError for scaled or partial RoPE."""
    rope = options.get("rope_parameters") or options.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default" or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{origin}: rope_type must be default (RoPE without scaling), got {rope}")
    share = rope.get("partial_rotary_factor", options.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise ValueError(f"{origin}: partial_rotary_factor must be 1, got {share}")
    theta = rope.get("rope_theta", options.get("rope_theta"))
    if theta is None:
        raise ValueError(f"{origin} must have rope_theta, which is missing")
    return theta
