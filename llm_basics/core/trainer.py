"""One optimizer step, `train_step`, and the class `Trainer`, which runs such steps on your batches.

A step is: learning rate, zero_grad, forward, loss, backward, clip, optimizer step.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_basics.core import config, dataloader, device, optim, presets
from llm_basics.core import functional as F


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Metrics of one step: the loss before the update, the gradient norm before clipping, the learning rate,
    and whether the weights were updated."""

    train_loss: Float[Tensor, ""]
    grad_norm: Float[Tensor, ""]
    lr: float
    updated: bool = True


# --------------------------------------------------------------------------------------------------
# The parts of a step


def learning_rate(step: int, options: config.TrainConfig) -> float:
    """The learning rate of `step`, counted from 1, by the schedule of `options`."""
    ends = options.lr, options.final_lr, options.warmup_steps, options.steps
    if options.schedule == "cosine":
        return optim.cosine_schedule(step, *ends)
    return optim.wsd_schedule(step, *ends, decay_steps=round(options.decay_fraction * options.steps))


def make_optimizer(model: nn.Module, options: config.TrainConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices and embeddings, not on norms and biases.

    For `options.optimizer` muon: Muon for the matrices of the blocks, AdamW for the rest.
    """
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    by_muon = {name for name, p in names.items() if name.startswith("layers.") and p.dim() == 2}
    rest = [p for name, p in names.items() if options.optimizer == "adamw" or name not in by_muon]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    settings = (options.lr, options.betas, options.eps, options.weight_decay)
    if options.optimizer == "adamw":
        return optim.AdamW(groups, *settings)
    groups.append(
        {"params": [names[name] for name in names if name in by_muon], "momentum": options.momentum}
    )
    dtype = device.matmul_dtype(next(model.parameters()).device)
    return optim.Muon(groups, *settings, dtype=dtype)


def compute_loss(
    logits: Float[Tensor, "... vocab"], targets: Int[Tensor, "..."], z_loss: float = 0.0
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats over all targets but `dataloader.IGNORE_INDEX`, in float32; 0 without any.

    Raises ValueError if shapes do not match, and on a CPU, where the check needs no synchronization, for a
    target outside the vocabulary.

    >>> compute_loss(torch.zeros(1, 3, 4), torch.tensor([[0, 3, -100]]))  # log 4
    tensor(1.3863)
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            "logits must have the shape of targets and one more axis, the vocabulary, got logits "
            f"{tuple(logits.shape)} and targets {tuple(targets.shape)}; give one target for each position"
        )
    vocab_size = logits.shape[-1]
    if targets.device.type == "cpu":
        wrong = (targets != dataloader.IGNORE_INDEX) & ((targets < 0) | (targets >= vocab_size))
        if wrong.any():
            index = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(
                f"targets must be from 0 to {vocab_size - 1} ({dataloader.IGNORE_INDEX} is ignored), got "
                f"{targets[index].item()} at {index}; check the tokenizer and the vocabulary size"
            )
    return F.cross_entropy(F.to_float32(logits), targets, z_loss=z_loss)


def batch_loss(
    model: nn.Module, inputs: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"], z_loss: float
) -> Float[Tensor, ""]:
    """`compute_loss` of the model's logits for `inputs`."""
    return compute_loss(model(inputs), targets, z_loss)


def accumulate_gradients(
    model: nn.Module, batches: Sequence[dataloader.Batch], options: config.TrainConfig
) -> Float[Tensor, ""]:
    """Accumulate gradients of the mean loss over all targets of all `batches`; returns this loss.

    Each batch is weighted by its number of targets: a mean of means would favor targets of short batches.
    """
    # stay on the device: reading them would synchronize
    counts = [(targets != dataloader.IGNORE_INDEX).sum() for _, targets in batches]
    n_targets = torch.stack(counts).sum().clamp(min=1)
    train_loss = torch.zeros((), device=batches[0][0].device)
    for (inputs, targets), count in zip(batches, counts, strict=True):
        with device.precision(inputs.device, options.dtype):
            loss = batch_loss(model, inputs, targets, options.z_loss)
            share = loss * (count.to(loss.dtype) / n_targets)
        share.backward()
        train_loss += share.detach()
    return train_loss


def check_finite(step: int, lr: float, train_loss: Tensor | float, grad_norm: Tensor | float) -> None:
    """Raise FloatingPointError unless the loss and the gradient norm of a step are finite.

    >>> check_finite(7, 0.5, float("nan"), 1.0)
    Traceback (most recent call last):
    FloatingPointError: step 7: loss nan, lr 0.5, gradient norm 1; loss and gradient norm must be finite
    """
    loss, norm = float(train_loss), float(grad_norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(
            f"step {step}: loss {loss:g}, lr {lr:g}, gradient norm {norm:g}; loss and gradient norm must be "
            "finite"
        )


# --------------------------------------------------------------------------------------------------
# The step


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[dataloader.Batch],
    step: int,
    options: config.TrainConfig,
    accept: Callable[[float], bool] | None = None,
) -> StepResult:
    """One optimizer step on the mean loss over all targets of all `batches`; `step` counts from 1.

    If `accept` is given and false for the loss, the weights are not updated. Raises FloatingPointError, with
    the weights unchanged, if the loss or the gradient norm is not finite.
    """
    lr = learning_rate(step, options)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    train_loss = accumulate_gradients(model, batches, options)  # forward, compute_loss, backward
    grad_norm = optim.clip_grad_norm_(model.parameters(), options.max_grad_norm)
    check_finite(step, lr, train_loss, grad_norm)
    if accept is None or accept(train_loss.item()):
        optimizer.step()
        return StepResult(train_loss, grad_norm, lr)
    return StepResult(train_loss, grad_norm, lr, updated=False)


class Trainer:
    """Trains a model on one batch at a time. `step` is the number of steps, `losses` the loss of each.

    `config` is a `config.TrainConfig`, or a preset or YAML file, whose `train` options are used. Without it
    the learning rate is constant, that of `optimizer`. The default optimizer is AdamW.

    >>> model = torch.nn.Sequential(torch.nn.Embedding(5, 8), torch.nn.Linear(8, 5))
    >>> trainer = Trainer(model, config.TrainConfig(steps=3, lr=0.1, warmup_steps=0))
    >>> inputs, targets = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[1, 2, 3, 4]])
    >>> for _ in range(3):
    ...     result = trainer.training_step((inputs, targets))
    >>> trainer.step, trainer.losses[0] > trainer.losses[2]
    (3, True)
    """

    def __init__(
        self,
        model: nn.Module,
        config: config.TrainConfig | str | os.PathLike[str] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if isinstance(config, str | os.PathLike):
            config = presets.load(os.fspath(config)).train
        if optimizer is None and config is not None:
            optimizer = make_optimizer(model, config)
        elif optimizer is None:
            optimizer = optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, betas=(0.9, 0.95))
        self.model, self.optimizer = model, optimizer
        self.config = config or constant_rate(optimizer)
        self.step = 0
        self.losses: list[float] = []

    def training_step(self, batch: Sequence[Tensor] | Sequence[dataloader.Batch]) -> StepResult:
        """`train_step` on one batch, inputs and targets, or on several together."""
        batches: Any = [tuple(batch)] if isinstance(batch[0], Tensor) else batch
        step = self.step + 1
        result = train_step(self.model, self.optimizer, batches, step, self.config)
        # on a GPU, an implementation of `train_step` may require this check from its caller
        check_finite(step, result.lr, result.train_loss, result.grad_norm)
        self.step = step
        self.losses.append(float(result.train_loss))
        return result


def constant_rate(optimizer: torch.optim.Optimizer) -> config.TrainConfig:
    """Options with the current learning rate of `optimizer` for every step."""
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    if len(rates) > 1:
        raise ValueError(
            f"all groups of the optimizer must have one learning rate, got {sorted(rates)}; without a config "
            "the rate is constant, and a config sets it for all groups"
        )
    (lr,) = rates
    return config.TrainConfig(lr=lr, min_lr=lr, warmup_steps=0)
