"""One step of training: from batches to weights that are a little better."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_basics import config, data, device, optim, session, watch
from llm_basics import functional as F


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step measured: the loss before the update, the norm of the gradient before clipping, and
    whether there was an update."""

    train_loss: Float[Tensor, ""]
    grad_norm: Float[Tensor, ""]
    lr: float
    updated: bool = True


def learning_rate(step: int, options: config.TrainConfig) -> float:
    """What `step`, counted from 1, is scaled by."""
    ends = options.lr, options.final_lr, options.warmup_steps, options.steps
    if options.schedule == "cosine":
        return optim.cosine_schedule(step, *ends)
    return optim.wsd_schedule(step, *ends, decay_steps=round(options.decay_fraction * options.steps))


def batch_loss(
    model: nn.Module, inputs: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"], z_loss: float
) -> Float[Tensor, ""]:
    """The mean loss over the targets that count; 0 where none does."""
    return F.cross_entropy(F.widen(model(inputs)), targets, z_loss=z_loss)


def make_ready(model: nn.Module, n_texts: int, seq: int) -> None:
    """Do now what the first step alone would take time for, of `n_texts` texts of `seq` tokens.

    The reference has nothing like it.
    """


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[session.Batch],
    step: int,
    options: config.TrainConfig,
    accepts: Callable[[float], bool] = lambda loss: True,
) -> StepResult:
    """Update the weights once, on the mean loss over all targets of all `batches` but those that are
    `data.IGNORED`; `step` counts from 1.

    A step whose loss `accepts` refuses leaves the weights as they were. Raises FloatingPointError, with the
    weights unchanged, where loss or gradient is not finite.
    """
    result = find_gradients(model, optimizer, batches, step, options)
    if not accepts(result.train_loss.item()):
        return dataclasses.replace(result, updated=False)
    optimizer.step()
    return result


def queue_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[session.Batch],
    step: int,
    options: config.TrainConfig,
    accepts: Callable[[float], bool] = lambda loss: True,
) -> StepResult | Callable[[], StepResult]:
    """`train_step`; or its beginning, and a function that waits for its end.

    Such a step leaves the weights as they are where it has to, which it says at its end, with the same
    errors; and so does each that began meanwhile, of which nothing is left. The reference waits at once.
    """
    return train_step(model, optimizer, batches, step, options, accepts)


# --------------------------------------------------------------------------------------------------
# The parts of a step


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, options: config.TrainConfig) -> float:
    """Let `optimizer` take steps of the rate that `step` has."""
    lr = learning_rate(step, options)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def add_gradients(
    model: nn.Module, batches: Sequence[session.Batch], options: config.TrainConfig
) -> Float[Tensor, ""]:
    """Add to each gradient that of the mean loss over all targets of all `batches`; returns this loss."""
    train_loss = torch.zeros((), device=batches[0][0].device)
    for loss in shares(model, batches, options):
        loss.backward()
        train_loss += loss.detach()
    return train_loss


def shares(
    model: nn.Module, batches: Sequence[session.Batch], options: config.TrainConfig
) -> Iterator[Float[Tensor, ""]]:
    """What each batch contributes to the mean loss: a mean of means would favor targets of short batches."""
    # numbers on the device, which nobody waits for
    counts = [(targets != data.IGNORED).sum() for _, targets in batches]
    n_targets = torch.stack(counts).sum().clamp(min=1)
    for (inputs, targets), count in zip(batches, counts, strict=True):
        with device.precision(inputs.device, options.dtype):
            loss = batch_loss(model, inputs, targets, options.z_loss)
            share = loss * (count.to(loss.dtype) / n_targets)
        yield share


def find_gradients(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[session.Batch],
    step: int,
    options: config.TrainConfig,
) -> StepResult:
    """All of a step but the update. Raises FloatingPointError, and says where it began, where loss or
    gradient is not finite."""
    lr = set_learning_rate(optimizer, step, options)
    optimizer.zero_grad(set_to_none=True)
    train_loss = add_gradients(model, batches, options)
    try:
        grad_norm = optim.clip_grad_norm_(model.parameters(), options.max_grad_norm, error_if_nonfinite=True)
        reason = "" if torch.isfinite(train_loss) else "the gradient is finite"
    except RuntimeError as error:
        reason = str(error)
    if reason:
        origin = watch.find_nonfinite(model, lambda: torch.stack(list(shares(model, batches, options))))
        raise FloatingPointError(f"step {step}: loss {train_loss.item():g}, lr {lr:g}, {reason}; {origin}")
    return StepResult(train_loss, grad_norm, lr)
