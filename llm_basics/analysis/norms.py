"""Norms of the weights, activations and gradients of a model on a text, by layer."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_basics.analysis import inspection
from llm_basics.core import config, trainer
from llm_basics.core import model as models


@dataclass(frozen=True)
class LayerNorms:
    """Root mean squares of a block: its weights, its outputs added to the residual stream, and the sum."""

    layer: int
    """-1 for weights outside of the blocks, where the activation is the input of the first block."""
    weights: Mapping[str, float | None]
    attention: float | None
    """RMS of the output of attention; None outside of the blocks."""
    ffn: float | None
    """RMS of the output of the feed-forward network."""
    activation: float | None
    """RMS of the residual stream after the block."""


@dataclass(frozen=True)
class Norms:
    """Root mean squares by layer."""

    layers: list[LayerNorms]


@dataclass(frozen=True)
class LayerGradients:
    """Norms of the gradients of a block: each weight, all weights, and the residual stream."""

    layer: int
    """-1 for weights outside of the blocks, as in `LayerNorms`."""
    weights: Mapping[str, float | None]
    total: float | None
    activation: float | None
    """Norm for the residual stream after the block, over all positions."""


@dataclass(frozen=True)
class Gradients:
    """Gradients of the loss of a text, before clipping."""

    loss: float | None
    """Mean cross-entropy of its tokens but the first, in nats."""
    total: float | None
    """Norm of the gradient of all weights."""
    layers: list[LayerGradients]


@torch.no_grad()
def norms(loaded: inspection.LoadedModel, ids: list[int]) -> Norms:
    """The root mean square of each weight, and of the activations of a text, by layer."""
    lm = loaded.lm
    inspection.check_length(loaded, ids)
    with inspection.residual_streams(lm) as streams, _outputs(lm) as outputs:
        lm(loaded.tensor(ids)[None])
    weights = _by_layer(lm, {name: _rms(parameter) for name, parameter in lm.named_parameters()})
    return Norms(
        [
            LayerNorms(
                layer=layer,
                weights=weights[layer],
                attention=_rms(outputs["attn"][layer]) if layer >= 0 else None,
                ffn=_rms(outputs["ffn"][layer]) if layer >= 0 else None,
                activation=_rms(stream),
            )
            # streams[0] is the input of the first block
            for layer, stream in enumerate(streams, start=-1)
        ]
    )


def gradients(loaded: inspection.LoadedModel, ids: list[int]) -> Gradients:
    """The norms of the gradients of the loss of a text, by layer."""
    lm = loaded.lm
    inspection.check_length(loaded, ids)
    if len(ids) < 2:
        raise ValueError(
            "the text must have at least two tokens, got one; the loss is that of the next token"
        )
    tokens = loaded.tensor(ids)[None]
    with torch.enable_grad(), _trainable(lm), inspection.residual_streams(lm) as streams:
        loss = trainer.compute_loss(lm(tokens[:, :-1]), tokens[:, 1:])
        parameters = dict(lm.named_parameters())
        found = torch.autograd.grad(loss, [*parameters.values(), *streams])
    squares = [float(gradient.double().square().sum()) for gradient in found]
    of_weights = dict(zip(parameters, squares, strict=False))
    weights = _by_layer(lm, of_weights)
    return Gradients(
        loss=loss.item(),
        total=sum(of_weights.values()) ** 0.5,
        layers=[
            LayerGradients(
                layer=layer,
                weights={name: square**0.5 for name, square in weights[layer].items()},
                total=sum(weights[layer].values()) ** 0.5,
                activation=square**0.5,
            )
            for layer, square in enumerate(squares[len(parameters) :], start=-1)
        ],
    )


def parameters_by_part(shape: config.ModelConfig) -> dict[str, int]:
    """Number of weights by component, computed without a model; a tied matrix is an embedding.

    >>> parameters_by_part(config.ModelConfig(vocab_size=100, d_model=8, n_layers=1, n_heads=2, d_ff=16))
    {'embeddings': 800, 'attention': 256, 'feed-forward': 384, 'norms': 24, 'output': 800}
    """
    d_model, matrix = shape.d_model, shape.d_model * shape.padded_vocab_size
    norm = {"rms": 1, "layer": 1 + shape.bias, "none": 0}[shape.norm] * d_model
    attention = 2 * (d_model + shape.bias) * (d_model + shape.d_kv) + 2 * shape.d_head * shape.qk_norm
    ffn = (3 if shape.ffn == "swiglu" else 2) * d_model * shape.d_hidden + (
        shape.d_hidden + d_model
    ) * shape.bias
    return {
        "embeddings": matrix + d_model * shape.context_length * (shape.position == "learned"),
        "attention": shape.n_layers * attention,
        "feed-forward": shape.n_layers * ffn,
        "norms": (2 * shape.n_layers + 1) * norm,
        "output": 0 if shape.tie_embeddings else matrix,
    }


def _by_layer(lm: models.TransformerLM, values: Mapping[str, float]) -> dict[int, dict[str, float]]:
    """Values of parameters by layer and by name in the layer; -1 for those outside of the blocks."""
    layers: dict[int, dict[str, float]] = {layer: {} for layer in range(-1, lm.config.n_layers)}
    for name, value in values.items():
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            layers[int(layer)][rest] = value
        else:
            layers[-1][name] = value
    return layers


@contextlib.contextmanager
def _outputs(lm: models.TransformerLM) -> Iterator[dict[str, list[Tensor]]]:
    """Record the outputs of attention and feed-forward network of each block within the context."""
    found: dict[str, list[Tensor]] = {"attn": [], "ffn": []}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: found[name].append(output)

    blocks: Any = lm.layers
    handles = [
        block.get_submodule(name).register_forward_hook(keep(name)) for block in blocks for name in found
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _trainable(lm: nn.Module) -> Iterator[None]:
    """Enable gradients of a model loaded for inspection within the context."""
    lm.requires_grad_(True)
    try:
        yield
    finally:
        lm.requires_grad_(False)


def _rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())
