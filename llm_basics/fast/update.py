"""The pieces of `update`: a loss that never holds the logits of a whole batch, and one by loops.

Logits are the largest tensor of all: GPT-2 makes 50,257 numbers of each token, 64 times as many as a hidden
state has. So the end of the model runs forward and backward for a few rows at a time, and what is kept is
the gradient of the hidden states alone.

On a CPU, what torch does for a small model takes as long as what it is for: `learning` does all of it
without torch, both ways at once.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_basics import data, optim
from llm_basics import functional as F
from llm_basics import model as models
from llm_basics.fast import directions, learning, machine

# logits that exist at a time: on a CPU few enough for its cache, on a GPU a GB; but each piece is added to
# the gradient of the whole output projection, which takes as long as to multiply that by some hundred rows
MOST_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 28}
LEAST_ROWS = 512


def make_ready(model: nn.Module, n_texts: int, seq: int) -> None:
    """Compile the loops that steps need, if this machine never did."""
    if machine.used_before("gradient"):
        return
    tokens = torch.zeros(n_texts, seq, dtype=torch.long)
    if learner := learning.learner_for(model, tokens, tokens):
        learner.learn(tokens, tokens, 0.0)
        nothing = np.empty((0, 3), np.int64)
        directions.update(nothing, 0, 0, 0.0, 0.0, 0.0, optim.NEWTON_SCHULZ, 0)


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
        n_rows = rows_at_a_time(hidden.device, model.config.n_rows)
        dhidden = torch.empty_like(rows)
        dparameters = [torch.zeros_like(parameter) for parameter in parameters]
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(rows), n_rows):
            piece = slice(start, start + n_rows)
            with torch.enable_grad():
                part = rows[piece].detach().requires_grad_()
                logits = F.widen(model.logits(part))
                loss = F.cross_entropy(logits, answers[piece], z_loss=z_loss, reduction="sum")
            dpart, *more = torch.autograd.grad(loss, [part, *parameters])
            dhidden[piece] = dpart
            torch._foreach_add_(dparameters, more)
            total += loss.detach()
        ctx.gradients = [dhidden.view(hidden.shape), *dparameters]
        ctx.n_targets = (answers != data.IGNORED).sum().clamp(min=1)
        return total / ctx.n_targets

    @staticmethod
    def backward(ctx, dloss):  # type: ignore[no-untyped-def]
        dhidden, *dparameters = [gradient * (dloss / ctx.n_targets) for gradient in ctx.gradients]
        return None, dhidden, None, None, *dparameters


def rows_at_a_time(device: torch.device, n_logits: int) -> int:
    """How many tokens of `n_logits` each have theirs at a time."""
    return max(LEAST_ROWS, MOST_LOGITS.get(device.type, MOST_LOGITS["cpu"]) // n_logits)


def batch_loss(
    model: nn.Module, inputs: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"], z_loss: float
) -> Float[Tensor, ""]:
    """`update.batch_loss` by loops on a CPU; else a piece of the batch at a time if its logits are many."""
    if torch.is_grad_enabled() and (learner := learning.learner_for(model, inputs, targets)):
        return _LossByLoops.apply(learner, inputs, targets, z_loss, *learner.parameters)
    # a model of somebody else's need not be made of hidden states and logits
    if isinstance(model, models.TransformerLM) and type(model).__module__ == models.__name__:
        if targets.numel() > rows_at_a_time(targets.device, model.config.n_rows):
            hidden = model.hidden_states(inputs)
            return _LossInPieces.apply(model, hidden, targets, z_loss, *model.lm_head.parameters())
    return F.cross_entropy(F.widen(model(inputs)), targets, z_loss=z_loss)
