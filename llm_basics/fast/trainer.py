"""The pieces of `update`: a loss in pieces, one by loops, and steps that do not wait for a GPU.

Logits are the largest tensor of all: GPT-2 makes 50,257 numbers of each token, 64 times as many as a hidden
state has. So where they are many the end of the model runs forward and backward for some rows at a time, and
what is kept is the gradient of the hidden states alone.

On a GPU a kernel writes the gradient of logits over them: they are read twice and written once, and there
is one tensor of that size, in bfloat16. What torch does takes three times as many passes.

A step on a GPU returns before its numbers are there: the next one is started before they are read.

On a CPU, what torch does for a small model takes as long as what it is for: `learning` does all of it
without torch, both ways at once.
"""

import types
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_basics.core import config, dataloader, device, layers, optim, trainer
from llm_basics.core import functional as F
from llm_basics.core import model as models
from llm_basics.fast import kernel_cache
from llm_basics.fast import optim as fast_optim
from llm_basics.fast.cpu import trainer as cpu_trainer
from llm_basics.fast.cuda import availability

# logits that exist at a time: on a CPU few enough for its cache, on a GPU a GB; but each piece is added to
# the gradient of the whole output projection, which takes as long as to multiply that by some hundred rows
MOST_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 28}
LEAST_ROWS = 512

# times as many where a kernel writes gradients over them: 2 GB in bfloat16
BY_KERNELS = 4


def prepare_model(model: nn.Module, batch_size: int, seq: int) -> None:
    """Compile the CPU kernels of training steps, unless they are in the cache, or wait for them."""
    tokens = torch.zeros(batch_size, seq, dtype=torch.long)
    if isinstance(model, models.TransformerLM) and not cpu_trainer.unsupported(model, tokens):
        kernel_cache.start_compiling("training")
        kernel_cache.wait("training")


class _LossByLoops(torch.autograd.Function):
    """The mean loss of a model, and its gradients, which are there already when autograd asks for them."""

    @staticmethod
    def forward(ctx, learner, inputs, targets, z_loss, *parameters):  # type: ignore[no-untyped-def]
        loss, ctx.gradients = learner.learn(inputs, targets, z_loss)
        return torch.tensor(loss, dtype=torch.float32)

    @staticmethod
    def backward(ctx, dloss):  # type: ignore[no-untyped-def]
        # given away, not kept: so each becomes the gradient of its parameter without a copy
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("backward must be called once for each loss; make the loss anew")
        if dloss != 1:
            torch._foreach_mul_(gradients, dloss)
        return None, None, None, None, *gradients


class _LossInPieces(torch.autograd.Function):
    """The mean loss of `model.logits(hidden)`, and its gradients, computed on the way forward."""

    @staticmethod
    def forward(ctx, model, hidden, targets, z_loss, *parameters):  # type: ignore[no-untyped-def]
        rows, answers = hidden.flatten(0, -2), targets.flatten()
        kernels = kernels_for(model, rows)
        n_rows = rows_at_a_time(hidden.device, model.config.padded_vocab_size) * (
            1 if kernels is None else BY_KERNELS
        )
        dhidden = torch.empty_like(rows)
        dparameters = [torch.zeros_like(parameter) for parameter in parameters]
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(rows), n_rows):
            piece = slice(start, start + n_rows)
            if kernels is None:
                loss, dpart, *more = _by_autograd(model, rows[piece], answers[piece], z_loss, parameters)
            else:
                loss, dpart, *more = _by_kernels(kernels, model, rows[piece], answers[piece], z_loss)
            dhidden[piece] = dpart
            torch._foreach_add_(dparameters, more)
            total += loss
        ctx.gradients = [dhidden.view(hidden.shape), *dparameters]
        ctx.n_targets = (answers != dataloader.IGNORE_INDEX).sum().clamp(min=1)
        return total / ctx.n_targets

    @staticmethod
    def backward(ctx, dloss):  # type: ignore[no-untyped-def]
        dhidden, *dparameters = [gradient * (dloss / ctx.n_targets) for gradient in ctx.gradients]
        return None, dhidden, None, None, *dparameters


def _by_autograd(
    model: models.TransformerLM,
    rows: Float[Tensor, "tokens d_model"],
    answers: Int[Tensor, " tokens"],
    z_loss: float,
    parameters: Sequence[Tensor],
) -> list[Tensor]:
    """The sum of the losses, and its gradients: of `rows`, and of `parameters`."""
    with torch.enable_grad():
        rows = rows.detach().requires_grad_()
        logits = F.to_float32(model.logits(rows))
        loss = F.cross_entropy(logits, answers, z_loss=z_loss, reduction="sum")
    return [loss.detach(), *torch.autograd.grad(loss, [rows, *parameters])]


def _by_kernels(
    kernels: types.ModuleType,
    model: models.TransformerLM,
    rows: Float[Tensor, "tokens d_model"],
    answers: Int[Tensor, " tokens"],
    z_loss: float,
) -> list[Tensor]:
    """The same, of the output projection."""
    weight, place = model.lm_head.weight, rows.device.type
    if torch.is_autocast_enabled(place):
        dtype = torch.get_autocast_dtype(place)
        weight, rows = weight.to(dtype), rows.to(dtype)
    logits = rows @ weight.T
    losses = kernels.replace_by_gradient_(
        logits, answers, model.config.vocab_size, dataloader.IGNORE_INDEX, z_loss
    )
    return [losses.sum(), logits @ weight, logits.T @ rows]


def kernels_for(
    model: models.TransformerLM, rows: Float[Tensor, "tokens d_model"]
) -> types.ModuleType | None:
    """The kernels that can do the end of the model; None where that is for autograd to do."""
    if not rows.is_cuda or not ends_plainly(model) or not availability.has_triton(rows.device):
        return None
    from llm_basics.fast.cuda import cross_entropy  # only where Triton is installed

    return cross_entropy


def ends_plainly(model: models.TransformerLM) -> bool:
    """Whether logits are a product and nothing else, by pieces of ours."""
    is_ours = type(model.lm_head).__module__ == layers.__name__
    return is_ours and F.linear.__module__.startswith("llm_basics.")


def rows_at_a_time(place: torch.device, n_logits: int) -> int:
    """How many tokens of `n_logits` each have theirs at a time."""
    return max(LEAST_ROWS, MOST_LOGITS.get(place.type, MOST_LOGITS["cpu"]) // n_logits)


def batch_loss(
    model: nn.Module, inputs: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"], z_loss: float
) -> Float[Tensor, ""]:
    """`update.batch_loss` by loops on a CPU; else a piece of the batch at a time if its logits are many."""
    if torch.is_grad_enabled() and (learner := cpu_trainer.learner_for(model, inputs, targets)):
        return _LossByLoops.apply(learner, inputs, targets, z_loss, *learner.parameters)
    # a model of somebody else's need not be made of hidden states and logits
    if isinstance(model, models.TransformerLM) and type(model).__module__ == models.__name__:
        if targets.numel() > rows_at_a_time(targets.device, model.config.padded_vocab_size):
            hidden = model.hidden_states(inputs)
            return _LossInPieces.apply(model, hidden, targets, z_loss, *model.lm_head.parameters())
    return trainer.compute_loss(model(inputs), targets, z_loss)


# --------------------------------------------------------------------------------------------------
# Steps that do not wait for a GPU


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[dataloader.Batch],
    step: int,
    options: config.TrainConfig,
    accept: Callable[[float], bool] | None = None,
) -> trainer.StepResult:
    """`update.train_step`; on a GPU it returns before the numbers are there, and raises nothing.

    The GPU itself leaves the weights as they are where loss or gradient norm is not finite, which
    `check_finite` of the result shows; AdamW counts such a step. With `accept`, the loss is waited for.
    """
    lr = trainer.learning_rate(step, options)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    train_loss = trainer.accumulate_gradients(model, batches, options)
    grad_norm = optim.clip_grad_norm_(model.parameters(), options.max_grad_norm)
    if accept is None and train_loss.device.type in device.ASYNCHRONOUS and fast_optim.can_be_held(optimizer):
        # a user's own function may return a number elsewhere
        grad_norm = torch.as_tensor(grad_norm, device=train_loss.device).reshape(())
        is_finite = train_loss.isfinite() & grad_norm.isfinite()
        with fast_optim.held_by((~is_finite).float()):
            optimizer.step()
        return trainer.StepResult(train_loss, grad_norm, lr)
    trainer.check_finite(step, lr, train_loss, grad_norm)
    updated = accept is None or accept(train_loss.item())
    if updated:
        optimizer.step()
    return trainer.StepResult(train_loss, grad_norm, lr, updated)
