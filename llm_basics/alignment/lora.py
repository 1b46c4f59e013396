"""Low-rank adaptation: fine-tune a matrix by the product of two small ones (LoRA, arXiv 2106.09685).

The pretrained `W` (d_out, d_in) is frozen, and `A` (r, d_in) and `B` (d_out, r) are trained:

    y = x W^T + b + alpha / r (x A^T) B^T

B is initialized to zero, so that training starts from the pretrained model. Because of the factor `alpha / r`
the learning rate need not change with the rank. After training, `W + alpha / r B A` is a plain matrix: a
merged model has no overhead.

    >>> layer = LoRALinear(layers.Linear(64, 64), rank=2, alpha=4.0)
    >>> [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    ['a', 'b']
    >>> trainable_parameters(layer)
    (256, 4352)
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_basics.core import functional as F
from llm_basics.core import layers


class LoRALinear(nn.Module):
    """A frozen linear layer `base`, and trainable matrices `a` and `b`.

    `scale` is alpha / r. `dropout` zeroes elements of the input of `a` in training. `merged`: the product is
    included in the base weight.
    """

    def __init__(self, base: layers.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        d_out, d_in = base.weight.shape
        self.a = nn.Parameter(base.weight.new_empty(rank, d_in))
        self.b = nn.Parameter(base.weight.new_zeros(d_out, rank))
        # as torch initializes a linear layer, and PEFT this matrix: uniform within 1 / sqrt(d_in)
        nn.init.uniform_(self.a, -1 / math.sqrt(d_in), 1 / math.sqrt(d_in))
        self.scale = alpha / rank
        self.dropout = layers.Dropout(dropout)
        self.merged = False

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        if self.merged:
            return self.base(x)
        return self.base(x) + self.scale * F.linear(F.linear(self.dropout(x), self.a), self.b)

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The effective weight, for functions that use the weights of layers."""
        return self.base.weight if self.merged else self.base.weight + lora_delta(self)

    @property
    def bias(self) -> Float[Tensor, " d_out"] | None:
        """The bias of the base."""
        return self.base.bias

    def extra_repr(self) -> str:
        return f"rank {len(self.a)}, scale {self.scale:g}" + (", merged" if self.merged else "")


def lora_delta(layer: LoRALinear) -> Float[Tensor, "d_out d_in"]:
    """The learned change of a weight: `alpha / r B A`, of rank at most r."""
    return layer.scale * (layer.b @ layer.a)


# --------------------------------------------------------------------------------------------------
# Models


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The adapted layers of a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def apply_lora(
    model: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float = 0.0
) -> list[str]:
    """Freeze a model, and replace each layer whose last name is in `targets` by a LoRALinear.

    Returns the full names of these layers. Raises ValueError for a target that no layer has.
    """
    if rank < 1:
        raise ValueError(f"the rank must be at least 1, got {rank}")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, layers.Linear)}
    names = [name for name in linears if name.rpartition(".")[2] in targets]
    if missing := sorted(set(targets) - {name.rpartition(".")[2] for name in names}):
        known = sorted({name.rpartition(".")[2] for name in linears})
        raise ValueError(
            f"each target must be the name of a layer ({', '.join(known)}), got {', '.join(missing)}"
        )
    model.requires_grad_(False)
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoRALinear(linears[name], rank, alpha, dropout))
    return names


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add each product to its base weight in place: `W <- W + alpha / r B A`. Skips merged layers."""
    for _, layer in lora_layers(model):
        if not layer.merged:
            layer.base.weight.add_(lora_delta(layer))
            layer.merged = True


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """Subtract the products, up to the rounding of one addition. Skips layers that are not merged."""
    for _, layer in lora_layers(model):
        if layer.merged:
            layer.base.weight.sub_(lora_delta(layer))
            layer.merged = False


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """The number of trainable weights, and of all weights."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)


# --------------------------------------------------------------------------------------------------
# Adapters alone, without the weights of the base


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """All `a` and `b` of a model by name, as in `q_proj.a`, for saving."""
    return {
        f"{name}.{matrix}": getattr(layer, matrix).detach()
        for name, layer in lora_layers(model)
        for matrix in ("a", "b")
    }


@torch.no_grad()
def load_lora_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the adapters of a model with the same targets and rank.

    Raises ValueError, without changing anything, unless names and shapes are those of `lora_state`.
    """
    own = lora_state(model)
    shapes = [{name: tuple(tensor.shape) for name, tensor in each.items()} for each in (own, tensors)]
    if wrong := sorted(dict(shapes[0].items() ^ shapes[1].items())):
        raise ValueError(
            f"adapters must have the names and shapes of the model's, got another {', '.join(wrong[:3])}; "
            "apply LoRA with the same targets and rank first"
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
