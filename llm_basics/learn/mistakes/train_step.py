"""One training step: all batches of the step, one gradient, one update with the learning rate of the step."""

import math
import weakref

import torch

# what the first optimizer imports, before the time limit of a probe starts
import torch._dynamo  # noqa: F401
from torch import nn
from torch.nn import functional as tF

from llm_basics.core import device, optim, trainer
from llm_basics.core import functional as F
from llm_basics.learn import probes

step = probes.Step("train_step")

# --------------------------------------------------------------------------------------------------
# A small model, small batches, and the same steps written with torch's own pieces


class Tiny(nn.Module):
    """Logits over 11 tokens from all tokens so far: matrices and vectors, no random numbers."""

    def __init__(self):
        super().__init__()
        draw = probes.numbers(seed=7)
        self.table = nn.Parameter(draw(11, 6))
        self.gain = nn.Parameter(1 + 0.3 * draw(6))
        self.head = nn.Parameter(0.7 * draw(11, 6))
        self.bias = nn.Parameter(0.5 * draw(11))

    def forward(self, tokens):
        x = self.table[tokens]
        x = torch.tanh(x + 0.5 * x.cumsum(1)) * self.gain
        return tF.linear(x, self.head, self.bias)


def batch(rows, length, seed):
    tokens = torch.randint(11, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def sgd(model):
    # with a rate that no schedule here gives
    return torch.optim.SGD(
        [{"params": [model.table, model.head]}, {"params": [model.gain, model.bias]}], lr=0.9
    )


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.9, betas=(0.8, 0.9), weight_decay=0.3)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def trained(a, make_optimizer, data, **options):
    """What `run_train_step` measures in each step, and the weights afterwards."""
    model = Tiny()
    optimizer = make_optimizer(model)
    seen = {}
    for it, batches in enumerate(data, start=1):
        measured = a.run_train_step(model, optimizer, batches, it, **options)
        seen[f"step {it}"] = {key: float(measured[key]) for key in ("train_loss", "grad_norm", "lr")}
    return seen | {"weights": weights(model)}


def rate(it, lr, least, warmup, steps):
    if it < warmup:
        return lr * it / warmup
    share = min(1.0, (it - warmup) / (steps - warmup))
    return least + (lr - least) * (1 + math.cos(math.pi * share)) / 2


def right(make_optimizer, data, lr, warmup_steps, max_grad_norm=1e9, z_loss=0.0, **options):
    model = Tiny()
    optimizer = make_optimizer(model)
    seen = {}
    for it, batches in enumerate(data, start=1):
        least = options["min_lr"] if "min_lr" in options else lr / 10
        now = rate(it, lr, least, warmup_steps, options["steps"])
        model.zero_grad()
        total = count = 0
        for inputs, targets in batches:
            logits = model(inputs).flatten(0, 1)
            total = total + tF.cross_entropy(logits, targets.flatten(), reduction="sum")
            total = total + z_loss * logits.logsumexp(-1).square().sum()
            count += targets.numel()
        loss = total / count
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = now
        optimizer.step()
        seen[f"step {it}"] = {"train_loss": loss.item(), "grad_norm": norm.item(), "lr": now}
    return seen | {"weights": weights(model)}


def check(about, make_optimizer, data, max_grad_norm=1e9, **options):
    options = {"lr": 0.4, "warmup_steps": 2, "steps": 8, "max_grad_norm": max_grad_norm} | options
    step.value(
        about,
        lambda a: trained(a, make_optimizer, data, **options),
        right(make_optimizer, data, **options),
    )


# --------------------------------------------------------------------------------------------------
# Probes

check("one step on one batch", sgd, [[batch(3, 5, seed=1)]])
check("three steps on different batches", sgd, [[batch(3, 5, seed)] for seed in (1, 2, 3)])


def rates(a, **options):
    """The learning rate of every step: as reported, and as the optimizer had it at the update."""
    model = Tiny()
    optimizer = sgd(model)
    used, seen = [], {}
    optimizer.register_step_pre_hook(lambda o, *_: used.append([group["lr"] for group in o.param_groups]))
    for it in range(1, options["steps"] + 3):
        batches = [batch(1, 3, it), batch(1, 3, it + 20)]
        reported = a.run_train_step(model, optimizer, batches, it, **options)["lr"]
        seen[f"step {it}"] = {"used": used[-1] if used else "no update", "reported": float(reported)}
    return seen


def right_rates(lr, least, warmup, steps):
    expected = {it: rate(it, lr, least, warmup, steps) for it in range(1, steps + 3)}
    return {f"step {it}": {"used": [lr, lr], "reported": lr} for it, lr in expected.items()}


step.value(
    "the learning rate of each step, to a tenth of the peak",
    lambda a: rates(a, lr=0.05, warmup_steps=3, steps=7),
    right_rates(0.05, 0.005, 3, 7),
)
step.value(
    "the learning rate of each step, to a given min_lr",
    lambda a: rates(a, lr=0.05, min_lr=0.02, warmup_steps=2, steps=5),
    right_rates(0.05, 0.02, 2, 5),
)

check("a gradient norm above max_grad_norm", sgd, [[batch(3, 5, 1)], [batch(3, 5, 2)]], max_grad_norm=0.2)


def lengths(a):
    """How long the gradient is when the weights are updated; afterwards it may be cleared."""

    def length():
        return math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))

    model, at_update = Tiny(), []
    optimizer = sgd(model)
    optimizer.register_step_pre_hook(lambda *_: at_update.append(length()))
    a.run_train_step(model, optimizer, [batch(3, 5, 1)], 3, lr=0.1, max_grad_norm=0.2)
    # after clearing, late clipping is indistinguishable from none
    cleared = at_update[0] > 0.21 and length() == 0
    return {
        "norm at the update": at_update[0],
        "longer afterwards": "cleared" if cleared else length() > 0.21,
    }


step.value(
    "the norm of the gradient that updates the weights",
    lengths,
    {"norm at the update": 0.2, "longer afterwards": False},
)
check("four micro-batches of one size", sgd, [[batch(2, 5, seed) for seed in (1, 2, 3, 4)]])
check("micro-batches with unequal numbers of rows", sgd, [[batch(rows, 5, rows) for rows in (4, 1, 2)]])
check("micro-batches of unequal length", sgd, [[batch(2, length, length) for length in (7, 2, 4)]])
check(
    "a large gradient from unequal micro-batches, clipped",
    sgd,
    [[batch(4, 5, 1), batch(1, 3, 2), batch(2, 6, 3)]],
    max_grad_norm=0.25,
)


class Note(torch.autograd.Function):
    """The identity; records when the backward pass runs, and the graphs that are still in memory."""

    class Kept:
        pass

    @staticmethod
    def forward(ctx, x, notes, kept):
        ctx.notes, ctx.kept = notes, Note.Kept()
        # that of the micro-batch before may still be there
        notes.append("forward" if len(kept) < 2 else "forward, while earlier graphs are kept")
        kept.add(ctx.kept)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.notes.append("backward")
        return gradient, None, None


class Noting(Tiny):
    def __init__(self):
        super().__init__()
        self.notes, self.kept, self.modes = [], weakref.WeakSet(), []

    def forward(self, tokens):
        self.modes.append("training" if self.training else "evaluation")
        return Note.apply(super().forward(tokens), self.notes, self.kept)


def course(a):
    model = Noting()
    optimizer = sgd(model)
    optimizer.register_step_post_hook(lambda *_: model.notes.append("update"))
    a.run_train_step(model, optimizer, [batch(1, 3, seed) for seed in range(4)], 3, lr=0.1)
    return model.notes


def modes(a):
    model = Noting()
    a.run_train_step(model, sgd(model), [batch(1, 3, 1)], 3, lr=0.1)
    return {"in the forward pass": model.modes[0], "afterwards": model.training}


step.value(
    "the order of a step: forward and backward per micro-batch, then one update",
    course,
    ["forward", "backward"] * 4 + ["update"],
)
step.value("the model is in training mode", modes, {"in the forward pass": "training", "afterwards": True})

check("a z-loss", sgd, [[batch(3, 5, 1)]], z_loss=0.1)
check("a z-loss over unequal micro-batches", sgd, [[batch(4, 5, 1), batch(1, 3, 2)]], z_loss=0.1)


def refused(a, model):
    """How a step ends in which not all is finite."""
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.9)
    try:
        a.run_train_step(model, optimizer, [batch(2, 4, 1), batch(1, 3, 2)], 3, lr=0.1)
        raised = "no error"
    except (FloatingPointError, RuntimeError, ValueError) as error:
        raised = type(error).__name__
    changed = [
        n for n, w in weights(model).items() if not torch.equal(w.nan_to_num(), before[n].nan_to_num())
    ]
    return {"raised": raised, "weights changed": changed}


class Broken(Tiny):
    def __init__(self):
        super().__init__()
        self.head.data[4, 2] = math.inf


class Steep(Tiny):
    """The derivative of the root at 0 is infinite, its value is not."""

    def __init__(self):
        super().__init__()
        self.squares = nn.Parameter(torch.zeros(11))

    def forward(self, tokens):
        return super().forward(tokens) + self.squares.sqrt()


class Forbidding(Tiny):
    """Token 3 has probability 0, which is no gradient for anything."""

    def forward(self, tokens):
        return super().forward(tokens).masked_fill(torch.arange(11) == 3, -math.inf)


AS_BEFORE = {"raised": "FloatingPointError", "weights changed": []}
step.value(
    "a loss that is NaN: FloatingPointError, nothing changed", lambda a: refused(a, Broken()), AS_BEFORE
)
step.value(
    "a finite loss, but a gradient that is not: FloatingPointError", lambda a: refused(a, Steep()), AS_BEFORE
)
step.value(
    "an infinite loss with a finite gradient: FloatingPointError",
    lambda a: refused(a, Forbidding()),
    AS_BEFORE,
)


class Quarters(nn.Module):
    """Weights whose products and sums bfloat16 holds exactly, so that every machine gives one loss."""

    def __init__(self):
        super().__init__()
        whole = torch.Generator().manual_seed(3)
        self.table = nn.Parameter(torch.randint(-3, 4, (11, 5), generator=whole) / 4)
        self.head = nn.Parameter(torch.randint(-3, 4, (11, 5), generator=whole) / 2)
        self.dtypes = []

    def forward(self, tokens):
        logits = tF.linear(self.table[tokens], self.head)
        self.dtypes.append(str(logits.dtype))
        return logits


def in_bfloat16(a):
    model = Quarters()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.9)
    measured = a.run_train_step(model, optimizer, [batch(3, 5, 1)], 3, lr=0.1, dtype="bfloat16")
    return {
        "multiplied in": model.dtypes[0],
        "weights in": str(model.head.dtype),
        "train_loss": float(measured["train_loss"]),
    }


def right_in_bfloat16():
    inputs, targets = batch(3, 5, 1)
    loss = tF.cross_entropy(Quarters()(inputs).double().flatten(0, 1), targets.flatten())
    return {"multiplied in": "torch.bfloat16", "weights in": "torch.float32", "train_loss": loss.item()}


step.value(
    'dtype="bfloat16": used for matrix products, not for weights and loss', in_bfloat16, right_in_bfloat16()
)

UNEQUAL = [[batch(3, 5, seed), batch(1, 4, seed + 10), batch(2, 6, seed + 20)] for seed in (1, 2, 3, 4)]
check("four steps of AdamW, all together", adamw, UNEQUAL, lr=0.05, min_lr=0.01, steps=5, max_grad_norm=0.3)


def make_transformer(a, **choices):
    return a.get_transformer_lm(11, 8, 12, 1, 2, 16, 10000.0, **choices)


def decayed(a):
    """All weights 1, the same gradients everywhere: what does the optimizer make of them?"""
    model = make_transformer(a, norm="layer", ffn="gelu", bias=True, position="learned")
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    optimizer = a.get_optimizer(model, lr=0.1, weight_decay=0.5, betas=(0.6, 0.7), eps=0.2)
    for gradient in (1.0, -0.5, 0.25):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    kinds = {"matrices": [], "vectors": []}
    for parameter in model.parameters():
        kinds["vectors" if parameter.dim() == 1 else "matrices"] += parameter.detach().flatten().tolist()
    return {kind: {"least": min(found), "most": max(found)} for kind, found in kinds.items()}


def right_decayed():
    matrix, vector = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    groups = [{"params": [matrix], "weight_decay": 0.5}, {"params": [vector], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.6, 0.7), eps=0.2)
    for gradient in (1.0, -0.5, 0.25):
        matrix.grad, vector.grad = torch.tensor([gradient]), torch.tensor([gradient])
        optimizer.step()
    kinds = {"matrices": matrix.item(), "vectors": vector.item()}
    return {kind: {"least": value, "most": value} for kind, value in kinds.items()}


step.value("the optimizer: weight decay for matrices and embeddings alone", decayed, right_decayed())


def falls(a):
    """Train a transformer on a text of period 3, which a few steps suffice for."""
    model = make_transformer(a)
    optimizer = a.get_optimizer(model, lr=0.03)
    tokens = (torch.arange(9) % 3).repeat(4, 1)
    batches = [(tokens[:3, :-1].contiguous(), tokens[:3, 1:].contiguous())]
    batches.append((tokens[3:, :-1].contiguous(), tokens[3:, 1:].contiguous()))
    options = {"lr": 0.03, "warmup_steps": 2, "steps": 20}
    losses = [a.run_train_step(model, optimizer, batches, it, **options)["train_loss"] for it in range(1, 21)]
    return {"the first loss is about ln 11": 1.5 < losses[0] < 4, "the last is below 0.2": losses[-1] < 0.2}


step.value(
    "a transformer learns a repetitive text",
    falls,
    {"the first loss is about ln 11": True, "the last is below 0.2": True},
)

# --------------------------------------------------------------------------------------------------
# What the wrong versions have right


def begin(optimizer, it, options):
    """Set the learning rate of the step and clear the gradients."""
    lr = optim.cosine_schedule(it, options.lr, options.final_lr, options.warmup_steps, options.steps)
    set_lr(optimizer, lr)
    optimizer.zero_grad()
    return lr


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def mean_loss(model, batch, options):
    inputs, targets = batch
    with device.precision(inputs.device, options.dtype):
        return F.cross_entropy(F.to_float32(model(inputs)), targets, z_loss=options.z_loss)


def shares(batches):
    """Each batch, and its share of all targets."""
    total = sum(targets.numel() for _, targets in batches)
    return [(batch, batch[1].numel() / total) for batch in batches]


def gather(model, batches, options, loss_of=mean_loss):
    """Add up the gradients of all batches; the mean loss."""
    total = torch.zeros(())
    for batch, share in shares(batches):
        loss = loss_of(model, batch, options) * share
        loss.backward()
        total += loss.detach()
    return total


def clip(model, options):
    return nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)


def refuse_nonfinite(*numbers):
    if not all(torch.isfinite(number) for number in numbers):
        raise FloatingPointError("loss or gradient is not finite")


def finish(model, optimizer, loss, lr, options, accept):
    """Clip, check, update."""
    norm = clip(model, options)
    refuse_nonfinite(loss, norm)
    return conclude(optimizer, loss, norm, lr, accept)


def conclude(optimizer, loss, norm, lr, accept):
    updated = accept is None or accept(loss.item())
    if updated:
        optimizer.step()
    return trainer.StepResult(loss, norm, lr, updated)


def with_loss(loss_of, model, optimizer, batches, it, options, accept):
    """A step that is right but for the loss."""
    lr = begin(optimizer, it, options)
    loss = gather(model, batches, options, loss_of)
    return finish(model, optimizer, loss, lr, options, accept)


def with_lr(lr, model, optimizer, batches, options, accept):
    """A step that is right but for the learning rate."""
    optimizer.zero_grad()
    set_lr(optimizer, lr)
    return finish(model, optimizer, gather(model, batches, options), lr, options, accept)


# --------------------------------------------------------------------------------------------------
# The gradient: cleared once, added up once


@step.mistake("trainer.train_step", source="public solutions of CS336")
def gradients_never_cleared(model, optimizer, batches, step, options, accept=None):
    """zero_grad is never called, so each step adds its gradient to those of all earlier steps, and the
    gradient norm keeps growing. Call it before the first backward of a step."""
    lr = optim.cosine_schedule(step, options.lr, options.final_lr, options.warmup_steps, options.steps)
    set_lr(optimizer, lr)
    return finish(model, optimizer, gather(model, batches, options), lr, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def gradients_cleared_after_backward(model, optimizer, batches, step, options, accept=None):
    """zero_grad is called between backward and optimizer.step, so the optimizer sees no gradients, and
    nothing is learned. Call it before the first backward, or after the update."""
    lr = begin(optimizer, step, options)
    loss = gather(model, batches, options)
    optimizer.zero_grad()
    return finish(model, optimizer, loss, lr, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def gradients_cleared_for_each_micro_batch(model, optimizer, batches, step, options, accept=None):
    """zero_grad is called inside the loop over micro-batches, so only the gradient of the last one is left at
    the update, while the loss is that of all. Call it once per step, before the loop."""
    lr, total = begin(optimizer, step, options), torch.zeros(())
    for batch, share in shares(batches):
        optimizer.zero_grad()
        loss = mean_loss(model, batch, options) * share
        loss.backward()
        total += loss.detach()
    return finish(model, optimizer, total, lr, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def only_the_last_micro_batch_counted(model, optimizer, batches, step, options, accept=None):
    """backward is called after the loop over micro-batches, on the last loss only, so the work on the others
    is wasted. Call backward inside the loop."""
    lr = begin(optimizer, step, options)
    for batch in batches:
        loss = mean_loss(model, batch, options)
    loss.backward()
    return finish(model, optimizer, loss.detach(), lr, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def only_the_first_micro_batch_counted(model, optimizer, batches, step, options, accept=None):
    """Only batches[0] is used, a part of the data of the step. The gradient must come from all batches."""
    lr = begin(optimizer, step, options)
    loss = gather(model, batches[:1], options)
    return finish(model, optimizer, loss, lr, options, accept)


@step.mistake("trainer.train_step", source="public solutions of CS336")
def accumulation_not_divided(model, optimizer, batches, step, options, accept=None):
    """The gradients of the micro-batches are accumulated without dividing, although the loss is divided, so
    the gradient norm is too large by the number of micro-batches. Weight each loss before its backward."""
    lr, total = begin(optimizer, step, options), torch.zeros(())
    for batch, share in shares(batches):
        loss = mean_loss(model, batch, options)
        loss.backward()
        total += loss.detach() * share
    return finish(model, optimizer, total, lr, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def neither_loss_nor_gradient_divided(model, optimizer, batches, step, options, accept=None):
    """The mean losses of the micro-batches are summed and never divided, so loss and gradient grow with the
    number of micro-batches. Weight each by its share of the targets."""
    lr, total = begin(optimizer, step, options), torch.zeros(())
    for batch in batches:
        loss = mean_loss(model, batch, options)
        loss.backward()
        total += loss.detach()
    return finish(model, optimizer, total, lr, options, accept)


@step.mistake("trainer.train_step", source="public solutions of CS336")
def mean_over_unequal_micro_batches(model, optimizer, batches, step, options, accept=None):
    """Each micro-batch is divided by their number, as if all had the same size, so tokens in a small one
    weigh more. Weight by the share of the targets."""
    lr, total = begin(optimizer, step, options), torch.zeros(())
    for batch in batches:
        loss = mean_loss(model, batch, options) / len(batches)
        loss.backward()
        total += loss.detach()
    return finish(model, optimizer, total, lr, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def micro_batches_weighed_by_rows(model, optimizer, batches, step, options, accept=None):
    """Each micro-batch is weighted by its number of rows instead of targets, so tokens of short sequences
    weigh more. Use targets.numel()."""
    lr, total = begin(optimizer, step, options), torch.zeros(())
    rows = sum(len(targets) for _, targets in batches)
    for batch in batches:
        loss = mean_loss(model, batch, options) * len(batch[1]) / rows
        loss.backward()
        total += loss.detach()
    return finish(model, optimizer, total, lr, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def update_after_each_micro_batch(model, optimizer, batches, step, options, accept=None):
    """optimizer.step is called inside the loop over micro-batches, whose gradients belong to a single update.
    Update once, after the loop."""
    lr, total, norm = begin(optimizer, step, options), torch.zeros(()), torch.zeros(())
    for batch, share in shares(batches):
        optimizer.zero_grad()
        loss = mean_loss(model, batch, options)
        loss.backward()
        total += loss.detach() * share
        norm = finish(model, optimizer, loss.detach(), lr, options, accept).grad_norm
    return trainer.StepResult(total, norm, lr)


@step.mistake("trainer.train_step", source="written for this catalogue")
def all_graphs_kept_until_one_backward(model, optimizer, batches, step, options, accept=None):
    """The losses are summed first, and backward is called once. The result is right, but the activations of
    all micro-batches are in memory at the same time, which accumulation is meant to avoid. Call backward for
    each."""
    lr = begin(optimizer, step, options)
    loss = sum(mean_loss(model, batch, options) * share for batch, share in shares(batches))
    loss.backward()
    return finish(model, optimizer, loss.detach(), lr, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def loss_kept_with_its_graph(model, optimizer, batches, step, options, accept=None):
    """The reported loss is accumulated with its graph attached, so memory grows with every micro-batch, and
    with every step if losses are collected. Add loss.detach() or loss.item()."""
    lr, total = begin(optimizer, step, options), 0
    for batch, share in shares(batches):
        loss = mean_loss(model, batch, options) * share
        loss.backward()
        total = total + loss
    return finish(model, optimizer, total, lr, options, accept)


# --------------------------------------------------------------------------------------------------
# What is reported


@step.mistake("trainer.train_step", source="written for this catalogue")
def loss_of_the_last_micro_batch_reported(model, optimizer, batches, step, options, accept=None):
    """The step learns from all micro-batches, but reports the loss of the last one only, which makes the
    curve noisier. Accumulate the losses like the gradients."""
    lr = begin(optimizer, step, options)
    for batch, share in shares(batches):
        loss = mean_loss(model, batch, options)
        (loss * share).backward()
    return finish(model, optimizer, loss.detach(), lr, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def scaled_loss_of_the_last_micro_batch_reported(model, optimizer, batches, step, options, accept=None):
    """The reported loss is that of the last micro-batch after it was scaled down for accumulation, which is
    far too low. Sum the scaled losses of all micro-batches."""
    lr = begin(optimizer, step, options)
    for batch, share in shares(batches):
        loss = mean_loss(model, batch, options) * share
        loss.backward()
    return finish(model, optimizer, loss.detach(), lr, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def mean_of_mean_losses_reported(model, optimizer, batches, step, options, accept=None):
    """The gradient weights micro-batches by their targets, but the reported loss is the plain mean of their
    means, so the two do not match. Weight both the same way."""
    lr, total = begin(optimizer, step, options), torch.zeros(())
    for batch, share in shares(batches):
        loss = mean_loss(model, batch, options)
        (loss * share).backward()
        total += loss.detach() / len(batches)
    return finish(model, optimizer, total, lr, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def loss_after_the_update_reported(model, optimizer, batches, step, options, accept=None):
    """The loss is computed again after the update, on the batch that was just trained on. It looks too good
    and costs a second pass. Report the loss that was differentiated."""
    lr = begin(optimizer, step, options)
    result = finish(model, optimizer, gather(model, batches, options), lr, options, accept)
    with torch.no_grad():
        loss = sum(mean_loss(model, batch, options) * share for batch, share in shares(batches))
    return trainer.StepResult(loss, result.grad_norm, lr, result.updated)


@step.mistake("trainer.train_step", source="written for this catalogue")
def norm_after_clipping_reported(model, optimizer, batches, step, options, accept=None):
    """The gradient norm is measured after clipping, so it never exceeds max_grad_norm and hides spikes.
    Report what clip_grad_norm_ returns: the norm before clipping."""
    lr = begin(optimizer, step, options)
    loss = gather(model, batches, options)
    clip(model, options)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    refuse_nonfinite(loss, norm)
    return conclude(optimizer, loss, norm, lr, accept)


# --------------------------------------------------------------------------------------------------
# The learning rate


@step.mistake("trainer.train_step", source="written for this catalogue")
def learning_rate_never_set(model, optimizer, batches, step, options, accept=None):
    """The learning rate is computed and reported, but never set in the optimizer, which keeps its initial
    one. Set it in every group of optimizer.param_groups."""
    lr = optim.cosine_schedule(step, options.lr, options.final_lr, options.warmup_steps, options.steps)
    optimizer.zero_grad()
    return finish(model, optimizer, gather(model, batches, options), lr, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def learning_rate_set_for_the_first_group_only(model, optimizer, batches, step, options, accept=None):
    """The learning rate of the step is set in param_groups[0] only. Other groups, such as norms and biases
    without decay, keep their initial one. Loop over all groups."""
    lr = optim.cosine_schedule(step, options.lr, options.final_lr, options.warmup_steps, options.steps)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    return finish(model, optimizer, gather(model, batches, options), lr, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def learning_rate_set_after_the_update(model, optimizer, batches, step, options, accept=None):
    """The learning rate is set after optimizer.step, so each update uses the previous one, and the first
    update the initial one. Set it before optimizer.step."""
    lr = optim.cosine_schedule(step, options.lr, options.final_lr, options.warmup_steps, options.steps)
    optimizer.zero_grad()
    result = finish(model, optimizer, gather(model, batches, options), lr, options, accept)
    set_lr(optimizer, lr)
    return result


@step.mistake("trainer.train_step", source="written for this catalogue")
def learning_rate_of_the_previous_step(model, optimizer, batches, step, options, accept=None):
    """The schedule is called with step - 1, as if steps counted from 0. The first update then has learning
    rate 0 and is wasted, and the end of the cosine is missed by one."""
    lr = optim.cosine_schedule(step - 1, options.lr, options.final_lr, options.warmup_steps, options.steps)
    return with_lr(lr, model, optimizer, batches, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def learning_rate_of_the_next_step(model, optimizer, batches, step, options, accept=None):
    """The schedule is called with step + 1, although steps already count from 1, so warmup and decay come one
    step early. Pass step itself."""
    lr = optim.cosine_schedule(step + 1, options.lr, options.final_lr, options.warmup_steps, options.steps)
    return with_lr(lr, model, optimizer, batches, options, accept)


@step.mistake("trainer.train_step", source="public solutions of CS336")
def schedule_stepped_per_micro_batch(model, optimizer, batches, step, options, accept=None):
    """The schedule advances with each micro-batch, so warmup and decay are faster by the number of
    micro-batches. It must count updates."""
    at = step * len(batches)
    lr = optim.cosine_schedule(at, options.lr, options.final_lr, options.warmup_steps, options.steps)
    return with_lr(lr, model, optimizer, batches, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def no_schedule(model, optimizer, batches, step, options, accept=None):
    """Every step uses the peak learning rate. Without warmup the first updates are too large, and without
    decay the last ones. Call cosine_schedule for the rate of the step."""
    return with_lr(options.lr, model, optimizer, batches, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def decay_to_zero_where_no_floor_is_given(model, optimizer, batches, step, options, accept=None):
    """A min_lr of None is treated as 0, so the last steps have almost no effect. None means a tenth of the
    peak: use options.final_lr."""
    lr = optim.cosine_schedule(step, options.lr, options.min_lr or 0.0, options.warmup_steps, options.steps)
    return with_lr(lr, model, optimizer, batches, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def floor_always_a_tenth(model, optimizer, batches, step, options, accept=None):
    """The learning rate decays to a tenth of the peak even if min_lr is set, so the option has no effect. Use
    options.final_lr."""
    lr = optim.cosine_schedule(step, options.lr, options.lr / 10, options.warmup_steps, options.steps)
    return with_lr(lr, model, optimizer, batches, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def warm_up_added_to_the_length(model, optimizer, batches, step, options, accept=None):
    """The warmup is added to the total passed to the schedule, so the cosine has not reached its minimum when
    the run ends. options.steps counts all steps, warmup included."""
    total = options.steps + options.warmup_steps
    lr = optim.cosine_schedule(step, options.lr, options.final_lr, options.warmup_steps, total)
    return with_lr(lr, model, optimizer, batches, options, accept)


# --------------------------------------------------------------------------------------------------
# Clipping


@step.mistake("trainer.train_step", source="public solutions of CS336")
def no_clipping(model, optimizer, batches, step, options, accept=None):
    """The gradient norm is measured, but gradients are never clipped, so one bad batch can throw the weights
    far off. Clip to options.max_grad_norm before the update."""
    lr = begin(optimizer, step, options)
    loss = gather(model, batches, options)
    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    refuse_nonfinite(loss, norm)
    return conclude(optimizer, loss, norm, lr, accept)


@step.mistake("trainer.train_step", source="public solutions of CS336")
def clipping_after_the_update(model, optimizer, batches, step, options, accept=None):
    """Gradients are clipped after optimizer.step, which has already used them unclipped. The order is
    backward, clip, step."""
    lr = begin(optimizer, step, options)
    loss = gather(model, batches, options)
    refuse_nonfinite(loss, nn.utils.clip_grad_norm_(model.parameters(), math.inf))
    result = conclude(optimizer, loss, torch.zeros(()), lr, accept)
    return trainer.StepResult(loss, clip(model, options), lr, result.updated)


@step.mistake("trainer.train_step", source="written for this catalogue")
def clipping_after_each_micro_batch(model, optimizer, batches, step, options, accept=None):
    """The accumulated gradient is clipped after each backward instead of once at the end, so early
    micro-batches are scaled down repeatedly. Clip the sum of all."""
    lr, total = begin(optimizer, step, options), torch.zeros(())
    for batch, share in shares(batches):
        loss = mean_loss(model, batch, options) * share
        loss.backward()
        norm = clip(model, options)
        total += loss.detach()
    refuse_nonfinite(total, norm)
    return conclude(optimizer, total, norm, lr, accept)


@step.mistake("trainer.train_step", source="public solutions of CS336")
def clipping_before_unscaling(model, optimizer, batches, step, options, accept=None):
    """The summed gradient of the micro-batches is clipped before it is divided by their number, so it ends up
    smaller than max_grad_norm allows. Divide first, then clip."""
    lr, total = begin(optimizer, step, options), torch.zeros(())
    for batch, share in shares(batches):
        loss = mean_loss(model, batch, options) * share * len(batches)
        loss.backward()
        total += loss.detach() / len(batches)
    norm = clip(model, options)
    refuse_nonfinite(total, norm)
    for p in model.parameters():
        p.grad = p.grad / len(batches)
    return conclude(optimizer, total, norm / len(batches), lr, accept)


@step.mistake("trainer.train_step", source="public solutions of CS336")
def clipping_per_parameter(model, optimizer, batches, step, options, accept=None):
    """Each parameter's gradient is clipped separately, which changes the direction of the gradient. Pass all
    parameters to clip_grad_norm_ in one call."""
    lr = begin(optimizer, step, options)
    loss = gather(model, batches, options)
    norms = [nn.utils.clip_grad_norm_([p], options.max_grad_norm) for p in model.parameters()]
    norm = torch.stack(norms).norm()
    refuse_nonfinite(loss, norm)
    return conclude(optimizer, loss, norm, lr, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def limit_of_the_norm_ignored(model, optimizer, batches, step, options, accept=None):
    """The gradient is always clipped to the same norm, whatever max_grad_norm is, so the option has no
    effect. Pass options.max_grad_norm."""
    lr = begin(optimizer, step, options)
    loss = gather(model, batches, options)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    refuse_nonfinite(loss, norm)
    return conclude(optimizer, loss, norm, lr, accept)


@step.mistake("trainer.train_step", source="public solutions of CS336")
def values_clamped(model, optimizer, batches, step, options, accept=None):
    """Elements of the gradient are clamped to max_grad_norm, which is a limit for the global norm. Use
    clip_grad_norm_, not clip_grad_value_."""
    lr = begin(optimizer, step, options)
    loss = gather(model, batches, options)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    refuse_nonfinite(loss, norm)
    nn.utils.clip_grad_value_(model.parameters(), options.max_grad_norm)
    return conclude(optimizer, loss, norm, lr, accept)


# --------------------------------------------------------------------------------------------------
# The loss


@step.mistake("trainer.train_step", source="public solutions of CS336")
def softmax_before_the_loss(model, optimizer, batches, step, options, accept=None):
    """cross_entropy gets probabilities and applies softmax to them again, so the loss cannot fall below about
    ln V - 1, and gradients are tiny. Pass it the logits."""

    def loss_of(model, batch, options):
        probabilities = F.softmax(F.to_float32(model(batch[0])))
        return F.cross_entropy(probabilities, batch[1], z_loss=options.z_loss)

    return with_loss(loss_of, model, optimizer, batches, step, options, accept)


@step.mistake("trainer.train_step", source="public solutions of CS336")
def inputs_as_targets(model, optimizer, batches, step, options, accept=None):
    """The inputs are used as targets. The loss falls to nearly 0, and samples repeat one token. Use the
    targets, which are shifted by one token."""

    def loss_of(model, batch, options):
        return mean_loss(model, (batch[0], batch[0]), options)

    return with_loss(loss_of, model, optimizer, batches, step, options, accept)


@step.mistake("trainer.train_step", source="public solutions of CS336")
def targets_shifted_twice(model, optimizer, batches, step, options, accept=None):
    """logits[:, :-1] are compared with targets[:, 1:], although targets are already shifted, so the model
    learns to predict the token after the next. Use both in full."""

    def loss_of(model, batch, options):
        with device.precision(batch[0].device, options.dtype):
            logits = F.to_float32(model(batch[0]))[:, :-1]
            return F.cross_entropy(logits, batch[1][:, 1:], z_loss=options.z_loss)

    return with_loss(loss_of, model, optimizer, batches, step, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def only_the_last_position_counted(model, optimizer, batches, step, options, accept=None):
    """Only the logits of the last position are compared with a target. A sequence of n tokens contains n
    training examples at the cost of one; use all positions."""

    def loss_of(model, batch, options):
        with device.precision(batch[0].device, options.dtype):
            logits = F.to_float32(model(batch[0]))[:, -1]
            return F.cross_entropy(logits, batch[1][:, -1], z_loss=options.z_loss)

    return with_loss(loss_of, model, optimizer, batches, step, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def logits_viewed_instead_of_transposed(model, optimizer, batches, step, options, accept=None):
    """To move the vocabulary to axis 1, the logits are reshaped, which mixes different positions. Flatten the
    leading axes, or use transpose(1, 2)."""

    def loss_of(model, batch, options):
        with device.precision(batch[0].device, options.dtype):
            logits = F.to_float32(model(batch[0]))
            logits = logits.reshape(logits.shape[0], logits.shape[2], logits.shape[1]).transpose(1, 2)
            return F.cross_entropy(logits, batch[1], z_loss=options.z_loss)

    return with_loss(loss_of, model, optimizer, batches, step, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def loss_summed(model, optimizer, batches, step, options, accept=None):
    """The losses of the targets are summed instead of averaged, so the gradient grows with the batch size and
    is clipped at every step. Use the mean."""
    lr, total = begin(optimizer, step, options), torch.zeros(())
    for batch in batches:
        loss = mean_loss(model, batch, options) * batch[1].numel()
        loss.backward()
        total += loss.detach()
    return finish(model, optimizer, total, lr, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def z_loss_ignored(model, optimizer, batches, step, options, accept=None):
    """options.z_loss is not passed to cross_entropy, so the logits can drift although the option is set. Pass
    z_loss=options.z_loss."""

    def loss_of(model, batch, options):
        with device.precision(batch[0].device, options.dtype):
            return F.cross_entropy(F.to_float32(model(batch[0])), batch[1])

    return with_loss(loss_of, model, optimizer, batches, step, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def z_loss_not_shared_out(model, optimizer, batches, step, options, accept=None):
    """Each micro-batch adds its full z-loss, although its cross-entropy is scaled by its share, so with many
    micro-batches the z-loss is too strong. Scale the sum of both."""
    lr, total = begin(optimizer, step, options), torch.zeros(())
    for (inputs, targets), share in shares(batches):
        with device.precision(inputs.device, options.dtype):
            logits = F.to_float32(model(inputs))
            loss = F.cross_entropy(logits, targets) * share
            loss = loss + options.z_loss * logits.logsumexp(-1).square().mean()
        loss.backward()
        total += loss.detach()
    return finish(model, optimizer, total, lr, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def z_loss_not_squared(model, optimizer, batches, step, options, accept=None):
    """The z-loss adds log Z instead of its square, which pushes the logits down without bound instead of
    pulling log Z toward 0. Square it."""

    def loss_of(model, batch, options):
        with device.precision(batch[0].device, options.dtype):
            logits = F.to_float32(model(batch[0]))
            return F.cross_entropy(logits, batch[1]) + options.z_loss * logits.logsumexp(-1).mean()

    return with_loss(loss_of, model, optimizer, batches, step, options, accept)


# --------------------------------------------------------------------------------------------------
# Modes and precision


@step.mistake("trainer.train_step", source="public solutions of CS336")
def model_left_in_evaluation_mode(model, optimizer, batches, step, options, accept=None):
    """The model is switched to eval mode for training, so dropout has no effect. Call model.train() after
    each evaluation; a training step does not need eval()."""
    model.eval()
    return with_loss(mean_loss, model, optimizer, batches, step, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def dtype_ignored(model, optimizer, batches, step, options, accept=None):
    """options.dtype is ignored, and everything is computed in float32, which is several times slower on a
    GPU. Run the forward pass under device.precision."""

    def loss_of(model, batch, options):
        return F.cross_entropy(F.to_float32(model(batch[0])), batch[1], z_loss=options.z_loss)

    return with_loss(loss_of, model, optimizer, batches, step, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def loss_in_bfloat16(model, optimizer, batches, step, options, accept=None):
    """The loss is computed from bfloat16 logits and has fewer than three digits, which hides small progress.
    Convert the logits to float32 before cross_entropy."""

    def loss_of(model, batch, options):
        with device.precision(batch[0].device, options.dtype):
            return F.cross_entropy(model(batch[0]), batch[1], z_loss=options.z_loss)

    return with_loss(loss_of, model, optimizer, batches, step, options, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def weights_made_bfloat16(model, optimizer, batches, step, options, accept=None):
    """The model itself is converted to bfloat16. Updates smaller than about 1/256 of a weight are then
    rounded away, and learning stalls. Keep float32 weights, and use autocast."""
    if options.dtype == "bfloat16":
        model.to(torch.bfloat16)
    return with_loss(mean_loss, model, optimizer, batches, step, options, accept)


# --------------------------------------------------------------------------------------------------
# What is not finite


@step.mistake("trainer.train_step", source="written for this catalogue")
def nonfinite_gradient_applied(model, optimizer, batches, step, options, accept=None):
    """Loss and gradient are not checked. A single NaN then reaches all weights, and the run is lost. Check
    before the update."""
    lr = begin(optimizer, step, options)
    loss = gather(model, batches, options)
    return conclude(optimizer, loss, clip(model, options), lr, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def nonfinite_step_skipped_in_silence(model, optimizer, batches, step, options, accept=None):
    """If loss or gradient is not finite, the step is silently skipped, so the user does not see why nothing
    is learned. Raise FloatingPointError."""
    lr = begin(optimizer, step, options)
    loss, norm = gather(model, batches, options), clip(model, options)
    if not (loss.isfinite() and norm.isfinite()):
        return trainer.StepResult(loss, norm, lr, False)
    return conclude(optimizer, loss, norm, lr, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def nonfinite_found_after_the_update(model, optimizer, batches, step, options, accept=None):
    """Loss and gradient are checked only after optimizer.step, when the weights are already NaN. Check
    between clipping and the update."""
    lr = begin(optimizer, step, options)
    loss = gather(model, batches, options)
    result = conclude(optimizer, loss, clip(model, options), lr, accept)
    refuse_nonfinite(loss, result.grad_norm)
    return result


@step.mistake("trainer.train_step", source="written for this catalogue")
def only_the_loss_checked(model, optimizer, batches, step, options, accept=None):
    """Only the loss is checked for NaN and infinity. The gradient can be infinite even if the loss is finite,
    such as that of a square root at 0. Check the gradient norm too."""
    lr = begin(optimizer, step, options)
    loss = gather(model, batches, options)
    refuse_nonfinite(loss)
    return conclude(optimizer, loss, clip(model, options), lr, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def only_the_gradient_checked(model, optimizer, batches, step, options, accept=None):
    """Only the gradient norm is checked. The loss can be infinite even if the gradient is finite, such as for
    a target whose probability is 0 because it is masked. Check the loss too."""
    lr = begin(optimizer, step, options)
    loss, norm = gather(model, batches, options), clip(model, options)
    refuse_nonfinite(norm)
    return conclude(optimizer, loss, norm, lr, accept)


@step.mistake("trainer.train_step", source="written for this catalogue")
def nonfinite_gradient_set_to_zero(model, optimizer, batches, step, options, accept=None):
    """nan_to_num replaces a non-finite gradient by finite numbers, and the update uses them. The cause stays
    hidden, and weights move arbitrarily. Raise FloatingPointError instead."""
    lr = begin(optimizer, step, options)
    loss = gather(model, batches, options)
    for p in model.parameters():
        p.grad = p.grad.nan_to_num(0.0, 0.0, 0.0)
    return conclude(optimizer, loss, clip(model, options), lr, accept)


# --------------------------------------------------------------------------------------------------
# The optimizer


def grouped(decaying, others, options, **settings):
    groups = [
        {"params": decaying, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return optim.AdamW(groups, **{"lr": options.lr, "betas": options.betas, "eps": options.eps} | settings)


@step.mistake("trainer.make_optimizer", source="public solutions of CS336")
def decay_of_norms_and_biases_too(model, options):
    """All parameters are decayed, including gains of norms, which belong near 1, and biases. Put them into a
    group with weight_decay=0."""
    return grouped(list(model.parameters()), [], options)


@step.mistake("trainer.make_optimizer", source="written for this catalogue")
def no_weight_decay(model, options):
    """options.weight_decay is not applied to any parameter, so weights can grow without bound. Put matrices
    and embeddings into a group with weight decay."""
    return grouped([], list(model.parameters()), options)


@step.mistake("trainer.make_optimizer", source="written for this catalogue")
def decay_of_the_wrong_group(model, options):
    """The two groups are swapped: norms and biases are decayed, matrices are not. Parameters with at least
    two axes are decayed."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    return grouped([p for p in model.parameters() if p.dim() < 2], matrices, options)


@step.mistake("trainer.make_optimizer", source="written for this catalogue")
def only_biases_without_decay(model, options):
    """Parameters without decay are selected by `bias` in their name, so gains of norms are decayed toward 0,
    although they belong near 1. Select by the number of axes."""
    named = list(model.named_parameters())
    biases = [p for name, p in named if "bias" in name]
    return grouped([p for name, p in named if "bias" not in name], biases, options)


@step.mistake("trainer.make_optimizer", source="written for this catalogue")
def embeddings_without_decay(model, options):
    """Embeddings are excluded from weight decay together with norms and biases. Some models do that, but here
    all parameters with two axes are decayed."""
    named = list(model.named_parameters())
    kept = [p for name, p in named if p.dim() < 2 or "embedding" in name]
    return grouped([p for name, p in named if p.dim() >= 2 and "embedding" not in name], kept, options)


@step.mistake("trainer.make_optimizer", source="written for this catalogue")
def vectors_not_trained(model, options):
    """Parameters without decay are in no group, so norms and biases keep their initial values. Put them into
    a group of their own."""
    return grouped([p for p in model.parameters() if p.dim() >= 2], [], options)


@step.mistake("trainer.make_optimizer", source="written for this catalogue")
def betas_of_the_config_ignored(model, options):
    """The optimizer does not get the betas of the config, so the option has no effect. Pass options.betas."""
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return grouped([p for p in model.parameters() if p.dim() >= 2], vectors, options, betas=(0.9, 0.95))


@step.mistake("trainer.make_optimizer", source="written for this catalogue")
def epsilon_of_the_config_ignored(model, options):
    """The optimizer does not get the eps of the config, so the option has no effect. Pass options.eps."""
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return grouped([p for p in model.parameters() if p.dim() >= 2], vectors, options, eps=1e-8)
