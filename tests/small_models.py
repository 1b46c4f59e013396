"""Small models of every layout of transformers, with random weights."""

import torch
from torch import Tensor, nn

from llm_basics.core import config
from llm_basics.core import model as models
from llm_basics.core import tokenizer as tokenizers

GPT2 = {"norm": "layer", "position": "learned", "ffn": "gelu_tanh"}
STARCODER2 = {"norm": "layer", "ffn": "gelu_tanh"}

# values that differ from the defaults of every layout
NOT_DEFAULT = {"rope_theta": 500.0, "norm_eps": 1e-3}

# layout and model options; in "no-biases" the biases of the layout are 0
SHAPES = {
    "gpt2": ("gpt2", {**GPT2, "bias": True, "tie_embeddings": True}),
    "gpt2-untied": ("gpt2", {**GPT2, "bias": True, "ffn": "gelu", "norm_eps": 1e-3}),
    "gpt2-no-biases": ("gpt2", {**GPT2, "ffn": "relu2", "d_ff": 40}),
    "gpt2-padded": ("gpt2", {**GPT2, "ffn": "silu", "tie_embeddings": True, "vocab_multiple": 64}),
    "llama": ("llama", {}),
    "llama-grouped": ("llama", {"n_kv_heads": 2, **NOT_DEFAULT}),
    "llama-tied-padded": ("llama", {"n_kv_heads": 1, "tie_embeddings": True, "vocab_multiple": 64}),
    "qwen3": ("qwen3", {"qk_norm": True, "zero_init": True}),
    "qwen3-grouped-tied": (
        "qwen3",
        {"qk_norm": True, "n_kv_heads": 2, "tie_embeddings": True, **NOT_DEFAULT},
    ),
    "arcee": ("arcee", {"ffn": "relu2", "n_kv_heads": 2, **NOT_DEFAULT}),
    "arcee-silu": ("arcee", {"ffn": "silu", "vocab_multiple": 64}),
    "apertus": ("apertus", {"ffn": "gelu_tanh", "qk_norm": True, "n_kv_heads": 2, **NOT_DEFAULT}),
    "starcoder2": ("starcoder2", {**STARCODER2, "bias": True, "n_kv_heads": 2, "tie_embeddings": True}),
    "starcoder2-no-biases": ("starcoder2", {**STARCODER2, "ffn": "gelu", **NOT_DEFAULT}),
}

MERGES = [(b"t", b"h"), (b"th", b"e"), (b" ", b"the"), (b"i", b"n"), (b"\xc3", b"\xa9"), (b"1", b"2")]


def tokenizer(special_tokens: tuple[str, ...] = (tokenizers.END_OF_TEXT,)) -> tokenizers.Tokenizer:
    vocab = {b: bytes([b]) for b in range(256)}
    vocab |= {256 + i: left + right for i, (left, right) in enumerate(MERGES)}
    return tokenizers.Tokenizer(vocab, MERGES, special_tokens)


def shape(vocab_size: int = tokenizer().vocab_size, **settings) -> config.ModelConfig:
    sizes = {"context_length": 80, "d_model": 32, "n_layers": 2, "n_heads": 4}
    return config.ModelConfig(vocab_size, **(sizes | settings))


def randomize_(network: nn.Module) -> nn.Module:
    """Set random weights, so that no two parameters are equal."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            is_gain = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (1.0 if is_gain else 0.0))
    return network.eval()


def model(**settings) -> models.TransformerLM:
    return randomize_(models.TransformerLM(shape(**settings)))


def greedy(lm: models.TransformerLM, prompt: Tensor, n: int) -> list[int]:
    """Greedy decoding without a cache."""
    tokens = prompt
    for _ in range(n):
        tokens = torch.cat([tokens, lm(tokens)[-1].argmax()[None]])
    return tokens[len(prompt) :].tolist()
