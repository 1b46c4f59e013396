"""LoRA models, of which only adapters are trained: low-rank products beside the projections of a base model.

A checkpoint contains the adapters and the rows of new tokens, and identifies the weights of the base by path
and SHA-256. For inference the products are merged into a plain model.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_basics.alignment import lora
from llm_basics.core import config, layers
from llm_basics.core import functional as F
from llm_basics.core import model as models
from llm_basics.runs import process

# the projections of a block
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3")


class NewRows(nn.Module):
    """An embedding or output projection that is frozen except for the rows of new tokens.

    A chat model has tokens that its base lacks. With the same frozen row for all of them, the model could not
    distinguish them or end a reply.
    """

    def __init__(self, base: layers.Linear | layers.Embedding, n_known: int) -> None:
        super().__init__()
        self.base, self.n_known = base, n_known
        self.rows = nn.Parameter(base.weight.detach()[n_known:].clone())

    @property
    def weight(self) -> Float[Tensor, "vocab d_model"]:
        """All rows."""
        return torch.cat([self.base.weight[: self.n_known], self.rows])

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings of token ids, or logits of hidden states; tied weights are used for both."""
        return F.linear(x, self.weight) if x.is_floating_point() else F.embedding(x, self.weight)


class Trained:
    """The trained weights of an adapted model, as `checkpoint` saves and loads them, and its base."""

    def __init__(self, model: models.TransformerLM, base: Mapping[str, Any]) -> None:
        self.model, self.base = model, base

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights by name."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Copy `weights` into the model."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(weights[name])

    def merged(self) -> models.TransformerLM:
        """`merged` of the model."""
        return merged(self.model)

    def describe(self, options: config.LoRAConfig) -> str:
        """Rank, scale and number of the trained weights."""
        n_trained, n_all = lora.trainable_parameters(self.model)
        scale = f"rank {options.rank}, alpha {options.alpha:g}"
        return f"{scale}: {n_trained:,} of {n_all:,} parameters trained"


def apply(model: models.TransformerLM, options: config.LoRAConfig, n_known: int) -> None:
    """Freeze a model, and add trainable adapters by `options` and rows of tokens from id `n_known`."""
    assert options.rank is not None, "checked by the caller"
    found = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in PROJECTIONS if name in found]
    if options.targets != "all":
        targets = options.targets.split(",")
    if unknown := sorted(set(targets) - found.intersection(PROJECTIONS)):
        known = ",".join(name for name in PROJECTIONS if name in found)
        raise ValueError(f"lora.targets must be all or of {known}, got {','.join(unknown)}")
    lora.apply_lora(model, targets, options.rank, options.alpha)
    if n_known < model.config.padded_vocab_size:
        head = NewRows(model.lm_head, n_known)
        is_tied = model.config.tie_embeddings
        model.add_module("lm_head", head)
        model.add_module("token_embeddings", head if is_tied else NewRows(model.token_embeddings, n_known))


def merged(model: models.TransformerLM) -> models.TransformerLM:
    """A plain model with the same outputs, with the adapters merged into the weights of the base."""
    chosen = model.lm_head.weight.device
    random = process.random_state(chosen)
    plain = models.TransformerLM(model.config, device=chosen)
    process.set_random_state(random, chosen)
    weights = {
        name: getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]).detach()
        for name in plain.state_dict()
    }
    plain.load_state_dict(weights)
    return plain.train(model.training)


def with_rows(known: Float[Tensor, "known d"], n_rows: int) -> Float[Tensor, "rows d"]:
    """Append rows that are the mean of the known ones.

    >>> with_rows(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), 3)
    tensor([[1., 2.],
            [3., 6.],
            [2., 4.]])
    """
    return torch.cat([known, known.mean(0, keepdim=True).expand(n_rows - len(known), -1)])
