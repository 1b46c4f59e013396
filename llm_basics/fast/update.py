"""The pieces of `update`: a loss in pieces, one by loops, and steps that are begun ahead.

Logits are the largest tensor of all: GPT-2 makes 50,257 numbers of each token, 64 times as many as a hidden
state has. So where they are many the end of the model runs forward and backward for some rows at a time, and
what is kept is the gradient of the hidden states alone.

On a GPU a kernel writes the gradient of logits over them: they are read twice and written once, and there
is one tensor of that size, in bfloat16. What torch does takes three times as many passes.

And nobody waits for a GPU to say whether its step was fit to be learned from: the next is begun before that
is known, and leaves the weights as they are if it was not.

On a CPU, what torch does for a small model takes as long as what it is for: `learning` does all of it
without torch, both ways at once.
"""

import types
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_basics import config, data, device, layers, optim, update
from llm_basics import functional as F
from llm_basics import model as models
from llm_basics.fast import cards, learning, machine
from llm_basics.fast import optim as fast_optim

# the reference, whose name comes to stand for what is defined here
queue_of_reference = update.queue_step

# logits that exist at a time: on a CPU few enough for its cache, on a GPU a GB; but each piece is added to
# the gradient of the whole output projection, which takes as long as to multiply that by some hundred rows
MOST_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 28}
LEAST_ROWS = 512

# times as many where a kernel writes gradients over them: 2 GB in bfloat16
BY_KERNELS = 4

Batch = tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]

# devices that say late what came of a step
LATE = ["cuda"]


def make_ready(model: nn.Module, n_texts: int, seq: int) -> None:
    """Compile the loops that steps need, if this machine never did."""
    if machine.used_before("gradient"):
        return
    tokens = torch.zeros(n_texts, seq, dtype=torch.long)
    if learning.learner_for(model, tokens, tokens):
        learning.compile_apart()


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
        n_rows = rows_at_a_time(hidden.device, model.config.n_rows) * (1 if kernels is None else BY_KERNELS)
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
        ctx.n_targets = (answers != data.IGNORED).sum().clamp(min=1)
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
        logits = F.widen(model.logits(rows))
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
    losses = kernels.replace_by_gradient_(logits, answers, model.config.vocab_size, data.IGNORED, z_loss)
    return [losses.sum(), logits @ weight, logits.T @ rows]


def kernels_for(
    model: models.TransformerLM, rows: Float[Tensor, "tokens d_model"]
) -> types.ModuleType | None:
    """The kernels that can do the end of the model; None where that is for autograd to do."""
    if not rows.is_cuda or not ends_plainly(model):
        return None
    return cards.kernels("triton_cross_entropy", rows.device)


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
    if torch.is_grad_enabled() and (learner := learning.learner_for(model, inputs, targets)):
        return _LossByLoops.apply(learner, inputs, targets, z_loss, *learner.parameters)
    # a model of somebody else's need not be made of hidden states and logits
    if isinstance(model, models.TransformerLM) and type(model).__module__ == models.__name__:
        if targets.numel() > rows_at_a_time(targets.device, model.config.n_rows):
            hidden = model.hidden_states(inputs)
            return _LossInPieces.apply(model, hidden, targets, z_loss, *model.lm_head.parameters())
    return F.cross_entropy(F.widen(model(inputs)), targets, z_loss=z_loss)


# --------------------------------------------------------------------------------------------------
# Steps that nobody waits for


class _Queue:
    """The steps of an optimizer that have begun, and whether there is one from which nothing may be learned.

    That is a number on the device, and the optimizer heeds it.
    """

    def __init__(self, device: torch.device) -> None:
        self.held = torch.zeros((), device=device)
        self.steps: list[_QueuedStep] = []


class _QueuedStep:
    """A step whose numbers are on their way; call it to have them."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Sequence[Batch],
        step: int,
        options: config.TrainConfig,
        accepts: Callable[[float], bool],
    ) -> None:
        self.arguments = model, optimizer, batches, step, options
        self.accepts = accepts
        self.device = batches[0][0].device
        self.random_state = device.random_state(self.device)
        # the optimizer's own, which goes when it goes
        if "_queue" not in vars(optimizer):
            vars(optimizer)["_queue"] = _Queue(self.device)
        self.queue: _Queue = vars(optimizer)["_queue"]
        lr = update.set_learning_rate(optimizer, step, options)
        optimizer.zero_grad(set_to_none=True)
        train_loss = update.add_gradients(model, batches, options)
        grad_norm = optim.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        # somebody's own may be a number elsewhere
        grad_norm = grad_norm.reshape(()).to(self.device)
        self.queue.held.copy_((self.queue.held > 0) | ~(train_loss.isfinite() & grad_norm.isfinite()))
        with fast_optim.held_by(self.queue.held):
            optimizer.step()
        self.queue.steps.append(self)
        # whose count of steps is one higher now
        groups = optimizer.param_groups
        self.stepped = [p for group in groups for p in group["params"] if p.grad is not None]
        # on the device, where somebody may use it without waiting
        self.result = update.StepResult(train_loss, grad_norm, lr)
        self.read = _send(torch.stack([train_loss, grad_norm, self.queue.held]))

    def __call__(self) -> update.StepResult:
        train_loss, grad_norm, is_held = self.read()
        if is_held:
            self._undo()
            device.set_random_state(self.random_state, self.device)
            # which finds where it began
            again = update.find_gradients(*self.arguments)
            raise FloatingPointError(
                f"step {self.arguments[3]}: loss {train_loss:g}, lr {again.lr:g}, the gradient norm is "
                f"{grad_norm:g}; done again, loss {again.train_loss:g} and norm {again.grad_norm:g}"
            )
        self.queue.steps.remove(self)
        self.accepts(train_loss)
        # as numbers that nobody has to wait for any more
        return update.StepResult(torch.tensor(train_loss), torch.tensor(grad_norm), self.result.lr)

    def _undo(self) -> None:
        """Let it be as if neither this step nor those that began after it had been."""
        _, optimizer, *_ = self.arguments
        for parameter in (parameter for step in self.queue.steps for parameter in step.stepped):
            if "step" in optimizer.state[parameter]:
                optimizer.state[parameter]["step"] -= 1
        self.queue.steps.clear()
        self.queue.held.zero_()


def _send(numbers: Float[Tensor, " n"]) -> Callable[[], list[float]]:
    """Let numbers come from a GPU, and return what waits for them."""
    if not numbers.is_cuda:
        return numbers.tolist
    arrived, there = torch.cuda.Event(), torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    there.copy_(numbers, non_blocking=True)
    arrived.record(torch.cuda.current_stream(numbers.device))

    def read() -> list[float]:
        arrived.synchronize()
        return there.tolist()

    return read


def queue_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    step: int,
    options: config.TrainConfig,
    accepts: Callable[[float], bool] = lambda loss: True,
) -> update.StepResult | Callable[[], update.StepResult]:
    """`update.queue_step`, which a GPU is not waited for; a CPU has nothing to do meanwhile."""
    arguments = model, optimizer, batches, step, options, accepts
    can_wait = batches[0][0].device.type in LATE and fast_optim.can_be_held(optimizer)
    # a loss that may be refused must be known before the step
    if not can_wait or options.on_spike == "skip":
        return queue_of_reference(*arguments)
    return _QueuedStep(*arguments)
