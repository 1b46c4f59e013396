"""Fast implementations of `core.trainer`: chunked loss, CPU training kernels, asynchronous GPU steps.

Logits are the largest tensor of a step: GPT-2 has 50,257 per token, 64 times the hidden state. Large batches
therefore run the output projection and the loss forward and backward chunk by chunk, and only the gradient of
the hidden states is kept.

On a GPU a Triton kernel overwrites logits with their gradient (`cuda.cross_entropy`): two reads and one write
of one bfloat16 tensor, a third of torch's passes. A GPU step returns before its metrics are computed.

On a CPU, torch's overhead dominates small models; `cpu.trainer` computes loss and gradients without torch.
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

# logits per chunk: the size of a CPU's cache, or 1 GB on a GPU. MIN_ROWS: adding a chunk to the gradient of
# the output projection costs as much as a product with some hundred rows
MAX_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 28}
MIN_ROWS = 512

# chunks are larger by this factor where a kernel overwrites logits with gradients: 2 GB in bfloat16
KERNEL_LOGITS_FACTOR = 4


def prepare_model(model: nn.Module, batch_size: int, seq: int) -> None:
    """Compile the CPU kernels of training steps and wait for them, if the model uses them."""
    tokens = torch.zeros(batch_size, seq, dtype=torch.long)
    if isinstance(model, models.TransformerLM) and not cpu_trainer.unsupported(model, tokens):
        kernel_cache.start_compiling("training")
        kernel_cache.wait("training")


class _CPULoss(torch.autograd.Function):
    """Mean loss by the CPU training kernels, which compute the gradients in the forward pass."""

    @staticmethod
    def forward(ctx, kernels, inputs, targets, z_loss, *parameters):  # type: ignore[no-untyped-def]
        loss, ctx.gradients = kernels.learn(inputs, targets, z_loss)
        return torch.tensor(loss, dtype=torch.float32)

    @staticmethod
    def backward(ctx, dloss):  # type: ignore[no-untyped-def]
        # dropping the reference lets autograd use each tensor as `.grad` without a copy
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("backward must be called once for each loss; compute the loss again")
        if dloss != 1:
            torch._foreach_mul_(gradients, dloss)
        return None, None, None, None, *gradients


class _ChunkedLoss(torch.autograd.Function):
    """Mean loss of `model.logits(hidden)`; the gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx, model, hidden, targets, z_loss, *parameters):  # type: ignore[no-untyped-def]
        rows, flat_targets = hidden.flatten(0, -2), targets.flatten()
        kernels = kernels_for(model, rows)
        n_rows = rows_per_chunk(hidden.device, model.config.padded_vocab_size) * (
            1 if kernels is None else KERNEL_LOGITS_FACTOR
        )
        dhidden = torch.empty_like(rows)
        dparameters = [torch.zeros_like(parameter) for parameter in parameters]
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(rows), n_rows):
            chunk = slice(start, start + n_rows)
            if kernels is None:
                loss, dchunk, *dchunk_parameters = _chunk_by_autograd(
                    model, rows[chunk], flat_targets[chunk], z_loss, parameters
                )
            else:
                loss, dchunk, *dchunk_parameters = _chunk_by_kernels(
                    kernels, model, rows[chunk], flat_targets[chunk], z_loss
                )
            dhidden[chunk] = dchunk
            if dparameters:  # models with adapters freeze the output projection
                torch._foreach_add_(dparameters, dchunk_parameters)
            total += loss
        ctx.gradients = [dhidden.view(hidden.shape), *dparameters]
        ctx.n_targets = (flat_targets != dataloader.IGNORE_INDEX).sum().clamp(min=1)
        return total / ctx.n_targets

    @staticmethod
    def backward(ctx, dloss):  # type: ignore[no-untyped-def]
        dhidden, *dparameters = [gradient * (dloss / ctx.n_targets) for gradient in ctx.gradients]
        return None, dhidden, None, None, *dparameters


def _chunk_by_autograd(
    model: models.TransformerLM,
    rows: Float[Tensor, "tokens d_model"],
    flat_targets: Int[Tensor, " tokens"],
    z_loss: float,
    parameters: Sequence[Tensor],
) -> list[Tensor]:
    """The summed loss and its gradients with respect to `rows` and `parameters`."""
    with torch.enable_grad():
        rows = rows.detach().requires_grad_()
        logits = F.to_float32(model.logits(rows))
        loss = F.cross_entropy(logits, flat_targets, z_loss=z_loss, reduction="sum")
    return [loss.detach(), *torch.autograd.grad(loss, [rows, *parameters])]


def _chunk_by_kernels(
    kernels: types.ModuleType,
    model: models.TransformerLM,
    rows: Float[Tensor, "tokens d_model"],
    flat_targets: Int[Tensor, " tokens"],
    z_loss: float,
) -> list[Tensor]:
    """The summed loss and its gradients with respect to `rows` and the output projection."""
    weight, device_type = model.lm_head.weight, rows.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        weight, rows = weight.to(dtype), rows.to(dtype)
    logits = rows @ weight.T
    losses = kernels.replace_by_gradient_(
        logits, flat_targets, model.config.vocab_size, dataloader.IGNORE_INDEX, z_loss
    )
    return [losses.sum(), logits @ weight, logits.T @ rows]


def kernels_for(
    model: models.TransformerLM, rows: Float[Tensor, "tokens d_model"]
) -> types.ModuleType | None:
    """The loss kernels for this model; None if its output projection requires autograd."""
    if not rows.is_cuda or not has_plain_head(model) or not availability.has_triton(rows.device):
        return None
    from llm_basics.fast.cuda import cross_entropy  # only where Triton is installed

    return cross_entropy


def has_plain_head(model: models.TransformerLM) -> bool:
    """Whether the output projection is a built-in, trainable linear layer."""
    is_reference = type(model.lm_head).__module__ == layers.__name__ and model.lm_head.weight.requires_grad
    return is_reference and F.linear.__module__.startswith("llm_basics.")


def rows_per_chunk(device: torch.device, n_logits: int) -> int:
    """Tokens per chunk for `n_logits` logits per token."""
    return max(MIN_ROWS, MAX_LOGITS.get(device.type, MAX_LOGITS["cpu"]) // n_logits)


def batch_loss(
    model: nn.Module, inputs: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"], z_loss: float
) -> Float[Tensor, ""]:
    """`trainer.batch_loss` by the CPU training kernels, else in chunks for large logits."""
    if torch.is_grad_enabled() and (kernels := cpu_trainer.learner_for(model, inputs, targets)):
        return _CPULoss.apply(kernels, inputs, targets, z_loss, *kernels.parameters)
    # user models need not have hidden_states and logits
    if isinstance(model, models.TransformerLM) and type(model).__module__ == models.__name__:
        if targets.numel() > rows_per_chunk(targets.device, model.config.padded_vocab_size):
            hidden = model.hidden_states(inputs)
            trained = [parameter for parameter in model.lm_head.parameters() if parameter.requires_grad]
            return _ChunkedLoss.apply(model, hidden, targets, z_loss, *trained)
    return trainer.compute_loss(model(inputs), targets, z_loss)


# --------------------------------------------------------------------------------------------------
# Asynchronous GPU steps


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[dataloader.Batch],
    step: int,
    options: config.TrainConfig,
    accept: Callable[[float], bool] | None = None,
) -> trainer.StepResult:
    """`trainer.train_step`; on a GPU it returns before the metrics are computed and never raises.

    A non-finite step leaves the weights unchanged (AdamW counts it); `check_finite` of the result reports it.
    """
    lr = trainer.learning_rate(step, options)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    train_loss = trainer.accumulate_gradients(model, batches, options)
    grad_norm = optim.clip_grad_norm_(model.parameters(), options.max_grad_norm)
    is_asynchronous = accept is None and train_loss.device.type in device.ASYNCHRONOUS
    if is_asynchronous and fast_optim.supports_skip(optimizer):
        # user code may return the norm as a number, or on another device
        grad_norm = torch.as_tensor(grad_norm, device=train_loss.device).reshape(())
        with fast_optim.skip_if((~(train_loss.isfinite() & grad_norm.isfinite())).float()):
            optimizer.step()
        return trainer.StepResult(train_loss, grad_norm, lr)
    trainer.check_finite(step, lr, train_loss, grad_norm)
    updated = accept is None or accept(train_loss.item())
    if updated:
        optimizer.step()
    return trainer.StepResult(train_loss, grad_norm, lr, updated)
