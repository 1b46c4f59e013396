"""AdamW: the first moment of the gradient over the root of the second, and decoupled weight decay."""

import copy
import math

import torch

# what the first optimizer imports, before the time limit of a probe starts
import torch._dynamo  # noqa: F401
from torch import nn

from llm_basics import swap
from llm_basics.core import optim
from llm_basics.learn import grids, probes
from llm_basics.learn.mistakes import clipping

step = probes.Step("adamw")
draw = probes.numbers(seed=5)
adamw_update = swap.reference("optim.adamw_update")


class AdamW(swap.reference("optim.AdamW")):
    """A right one, one parameter after the other: what the mistakes change."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter, gradient, group):
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        settings = (group["lr"], group["betas"], group["eps"], group["weight_decay"])
        updated, state["exp_avg"], state["exp_avg_sq"] = adamw_update(
            parameter, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"], *settings
        )
        parameter.copy_(updated)


# --------------------------------------------------------------------------------------------------
# Probes: the rule

USUAL = {"lr": 0.02, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
WEIGHT = 2 * draw(6)
# gradients of every size, with changing signs
GRADIENTS = [draw(6) * torch.tensor([1e-2, 0.1, 1, 1, 10, 100]) for _ in range(5)]
ZEROS = [torch.zeros(6)] * 4


def by_hand(weight, gradients, changes=(), **options):
    """The weight after each gradient, in float64; `changes[i]` are settings from step i on."""
    weight, mean, mean_square, count, found = weight.double(), 0, 0, 0, []
    for i, gradient in enumerate(gradients):
        options = options | dict(changes).get(i, {})
        if gradient is not None:
            (beta1, beta2), count, gradient = options["betas"], count + 1, gradient.double()
            mean = beta1 * mean + (1 - beta1) * gradient
            mean_square = beta2 * mean_square + (1 - beta2) * gradient**2
            length = (mean_square / (1 - beta2**count)).sqrt() + options["eps"]
            weight = weight - options["lr"] * options["weight_decay"] * weight
            weight = weight - options["lr"] * mean / (1 - beta1**count) / length
        found.append(weight)
    return torch.stack(found).float()


def train(optimizer, weights, gradients, before_step=lambda i: None):
    """The values of each weight after each step; `gradients` has a list for each weight."""
    found = [[] for _ in weights]
    for i, of_step in enumerate(zip(*gradients, strict=True)):
        before_step(i)
        for weight, gradient in zip(weights, of_step, strict=True):
            weight.grad = None if gradient is None else gradient.clone()
        optimizer.step()
        for values, weight in zip(found, weights, strict=True):
            values.append(weight.detach().clone())
    return [torch.stack(values) for values in found]


def follow(gradients, **options):
    def ours(a):
        weight = nn.Parameter(WEIGHT.clone())
        return train(a.get_adamw_cls()([weight], **options), [weight], [gradients])[0]

    return ours, by_hand(WEIGHT, gradients, **options)


step.value(
    "the first step, of length lr whatever the gradient norm",
    *follow(GRADIENTS[:1], **USUAL),
    axes="step weight",
    contract="adamw",
)
step.value("five steps", *follow(GRADIENTS, **USUAL), axes="step weight", contract="adamw")
step.value(
    "five steps with betas 0.5 and 0.8",
    *follow(GRADIENTS, **USUAL | {"betas": (0.5, 0.8)}),
    axes="step weight",
    contract="adamw",
)
step.value(
    "weight decay alone, all gradients being zero",
    *follow(ZEROS, **USUAL | {"weight_decay": 0.3}),
    axes="step weight",
    rtol=1e-5,
    atol=1e-6,
    contract="adamw",
)
# with the second beta 0 there is nothing to correct, so that where epsilon is corrected plays no part
step.value(
    "epsilon of 0.1 with small gradients",
    *follow(GRADIENTS, **USUAL | {"betas": (0.5, 0.0), "eps": 0.1}),
    axes="step weight",
    contract="adamw",
)

# --------------------------------------------------------------------------------------------------
# Probes: the class


SEVERAL = [draw(2, 3), draw(4)]


def several_weights(a):
    weights = [nn.Parameter(w.clone()) for w in SEVERAL]
    gradients = [[g[: w.numel()].reshape(w.shape) for g in GRADIENTS] for w in SEVERAL]
    found = train(a.get_adamw_cls()(weights, **USUAL), weights, gradients)
    return [values.flatten(1) for values in found]


step.value(
    "two weights of different shapes",
    several_weights,
    [by_hand(w.flatten(), [g[: w.numel()] for g in GRADIENTS], **USUAL) for w in SEVERAL],
    axes="weight step element",
    contract="adamw",
)


def with_a_schedule(a):
    weight = nn.Parameter(WEIGHT.clone())
    optimizer = a.get_adamw_cls()([weight], **USUAL)

    def change(i):
        if i in (2, 4):
            optimizer.param_groups[0]["lr"] = {2: 0.1, 4: 0.01}[i]

    return train(optimizer, [weight], [GRADIENTS], change)[0]


step.value(
    "the learning rate changed by a schedule after two and four steps",
    with_a_schedule,
    by_hand(WEIGHT, GRADIENTS, {2: {"lr": 0.1}, 4: {"lr": 0.01}}, **USUAL),
    axes="step weight",
    contract="optimizer",
)

PLAIN, OTHER, DECAYED = (2 * draw(6) for _ in range(3))
OTHER_OPTIONS = {"lr": 0.2, "betas": (0.6, 0.0), "eps": 0.05}
DECAYED_OPTIONS = {"weight_decay": 0.4}


def with_groups(a):
    plain, other, decayed = (nn.Parameter(w.clone()) for w in (PLAIN, OTHER, DECAYED))
    groups = [
        {"params": [plain]},
        {"params": [other], **OTHER_OPTIONS},
        {"params": [decayed], **DECAYED_OPTIONS},
    ]
    optimizer = a.get_adamw_cls()(groups, **USUAL)
    return train(optimizer, [plain, other, decayed], [GRADIENTS[:1], GRADIENTS[1:2], ZEROS[:1]])


step.value(
    "three parameter groups with different options",
    with_groups,
    [
        by_hand(PLAIN, GRADIENTS[:1], **USUAL),
        by_hand(OTHER, GRADIENTS[1:2], **USUAL | OTHER_OPTIONS),
        by_hand(DECAYED, ZEROS[:1], **USUAL | DECAYED_OPTIONS),
    ],
    axes="group step weight",
    atol=1e-4,
    beyond="norms and biases form a group without weight decay; the public test has one group",
)

# a group of several weights, and a different decay for each group to identify it
FOUR = [[draw(2, 3), draw(4), draw(2, 2), draw(3, 2), draw(6)], [draw(6)], [draw(6)], [draw(6)]]
DECAYS = [0.1, 0.4, 0.2, 0.3]


def with_four_groups(a):
    weights = [[nn.Parameter(w.clone()) for w in group] for group in FOUR]
    groups = [{"params": group, "weight_decay": d} for group, d in zip(weights, DECAYS, strict=True)]
    flat = [w for group in weights for w in group]
    gradients = [[GRADIENTS[2][: w.numel()].reshape(w.shape)] for w in flat]
    return [w.flatten(1) for w in train(a.get_adamw_cls()(groups, **USUAL), flat, gradients)]


step.value(
    "four parameter groups, the first with five weights, each with its weight decay",
    with_four_groups,
    [
        by_hand(w.flatten(), [GRADIENTS[2][: w.numel()]], **USUAL | {"weight_decay": decay})
        for group, decay in zip(FOUR, DECAYS, strict=True)
        for w in group
    ],
    axes="weight step element",
    beyond="norms and biases form a group without weight decay; the public test has one group",
)

NOW_AND_THEN = [GRADIENTS[0], None, None, *GRADIENTS[3:]]


def without_a_gradient(a):
    weights = [nn.Parameter(w.clone()) for w in (PLAIN, OTHER, DECAYED)]
    optimizer = a.get_adamw_cls()(weights, **USUAL | {"weight_decay": 0.01})
    return train(optimizer, weights, [ZEROS + ZEROS[:1], [None] * 5, NOW_AND_THEN])


step.value(
    "one weight without gradients, and one with gradients in some steps",
    without_a_gradient,
    [
        by_hand(PLAIN, ZEROS + ZEROS[:1], **USUAL | {"weight_decay": 0.01}),
        torch.stack([OTHER] * 5),
        by_hand(DECAYED, NOW_AND_THEN, **USUAL | {"weight_decay": 0.01}),
    ],
    axes="weight step element",
    atol=1e-4,
    contract="optimizer",
)


def left_as_they_were(a):
    weight = nn.Parameter(WEIGHT.clone())
    weight.grad = gradient = GRADIENTS[1].clone()
    alias = weight.detach()
    a.get_adamw_cls()([weight], **USUAL | {"weight_decay": 0.1}).step()
    return {
        "the gradient is not modified": weight.grad is gradient and torch.equal(gradient, GRADIENTS[1]),
        "the weight is updated in place, not replaced": torch.equal(alias, weight),
    }


step.value(
    "in-place updates",
    left_as_they_were,
    {"the gradient is not modified": True, "the weight is updated in place, not replaced": True},
    beyond="tied weights and views hold the old tensor; the public test reads the new one",
    words=lambda right, found: "; ".join(f"must hold: {fact}" for fact in right if not found[fact]),
)


def going_on(a):
    cls, weight = a.get_adamw_cls(), nn.Parameter(WEIGHT.clone())
    first = cls([weight], **USUAL)
    train(first, [weight], [GRADIENTS[:3]])
    second = cls([weight], **USUAL)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    return train(second, [weight], [GRADIENTS[3:]])[0]


step.value(
    "resuming from a state_dict after three steps",
    going_on,
    by_hand(WEIGHT, GRADIENTS, **USUAL)[3:],
    axes="step weight",
    contract="optimizer",
)


def loss_of_a_closure(a):
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = a.get_adamw_cls()([weight], lr=0.5, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    return {"loss": None if loss is None else torch.as_tensor(loss).item(), "weight": weight.item()}


step.value(
    "a step that is given a closure",
    loss_of_a_closure,
    {"loss": 4.0, "weight": 1.5},
    beyond="torch.optim.Optimizer.step takes a closure; the training loop passes none",
)

# --------------------------------------------------------------------------------------------------
# Probes: details in which handouts differ from PyTorch

step.value(
    "eps added to the corrected root, not before the correction",
    *follow(GRADIENTS, **USUAL | {"betas": (0.5, 0.9), "eps": 0.1}),
    axes="step weight",
    beyond="the assignment's algorithm adds eps before the correction, torch after it; its test takes both",
)
step.value(
    "the decay applies to the old weight, not to the step",
    *follow(GRADIENTS, **USUAL | {"lr": 0.3, "weight_decay": 0.5}),
    axes="step weight",
    beyond="the assignment's algorithm decays after the step, torch before it; its test takes both",
)

# --------------------------------------------------------------------------------------------------
# Probes: a model's optimizer


class Small(swap.reference("model.TransformerLM")):
    """The kinds of parameters that a transformer has, under the names that it gives them, and no more."""

    def __init__(self):
        nn.Module.__init__(self)
        self.token_embeddings = nn.Embedding(9, 4)
        self.ln1 = nn.LayerNorm(4)
        self.q_proj = nn.Linear(4, 4)
        self.ln_final = nn.RMSNorm(4)
        self.lm_head = nn.Linear(4, 9, bias=False)


DECAY = {
    "token_embeddings.weight": 0.2,
    "ln1.weight": 0.0,
    "ln1.bias": 0.0,
    "q_proj.weight": 0.2,
    "q_proj.bias": 0.0,
    "ln_final.weight": 0.0,
    "lm_head.weight": 0.2,
}
OPTIONS = {"lr": 0.03, "betas": (0.8, 0.7), "eps": 1e-3, "weight_decay": 0.2}


def settings_of(a, *names):
    model = Small()
    optimizer = a.get_optimizer(model, **OPTIONS)
    found = {id(p): [g[name] for name in names] for g in optimizer.param_groups for p in g["params"]}
    return {name: found.get(id(p), "not in the optimizer") for name, p in model.named_parameters()}


def decays(right, found):
    for name in right:
        if right[name] != found[name]:
            if isinstance(found[name], str):
                return f"{name} is not in the optimizer, so it is never trained"
            return f"{name} must have weight decay {right[name][0]}, got {found[name][0]}"
    return ""


step.value(
    "the optimizer of a model: matrices and embeddings decay, norms and biases do not",
    lambda a: settings_of(a, "weight_decay"),
    {name: [decay] for name, decay in DECAY.items()},
    words=decays,
)
step.value(
    "the optimizer of a model: lr, betas and eps",
    lambda a: settings_of(a, "lr", "betas", "eps"),
    dict.fromkeys(DECAY, [0.03, (0.8, 0.7), 1e-3]),
)

# --------------------------------------------------------------------------------------------------
# Mistakes: weight decay


@step.mistake("optim.adamw_update", source="public solutions of CS336")
def decay_as_L2_in_the_gradient(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """Weight decay is added to the gradient, which is L2 regularization as in plain Adam. It is then divided
    by the root of the second moment, so weights with large gradients hardly decay. AdamW decouples it: shrink
    the weight itself, apart from the gradient."""
    gradient = gradient + weight_decay * parameter
    return adamw_update(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, 0.0)


@step.mistake("optim.adamw_update", source="public solutions of CS336")
def decay_without_the_learning_rate(
    parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay
):
    """The weight is multiplied by 1 - weight_decay instead of 1 - lr * weight_decay. With the usual 0.1,
    every weight loses a tenth at each step. Multiply the decay by lr."""
    parameter = parameter * (1 - weight_decay)
    return adamw_update(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, 0.0)


@step.mistake("optim.adamw_update", source="public solutions of CS336")
def decay_with_the_corrected_learning_rate(
    parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay
):
    """The decay uses the learning rate after the bias corrections are folded into it, so the first steps
    decay by a different amount than later ones. Use the plain lr for the decay."""
    corrected = lr * math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)
    parameter = parameter * (1 - corrected * weight_decay)
    return adamw_update(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, 0.0)


@step.mistake("optim.adamw_update", source="written for this catalogue")
def no_weight_decay(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """Weights are never decayed: weight_decay is accepted but not used, which is Adam instead of AdamW.
    Multiply the weight by 1 - lr * weight_decay at every step."""
    return adamw_update(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, 0.0)


@step.mistake("optim.adamw_update", source="public solutions of CS336")
def decay_fixed(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """weight_decay is fixed at 0.01, torch's default, whatever is passed, so norms and biases decay too.
    Store it in the defaults, and read it from the parameter group at each step."""
    return adamw_update(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, 0.01)


@step.mistake("optim.adamw_update", source="written for this catalogue")
def decay_that_grows_the_weights(
    parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay
):
    """The decay has the wrong sign: weights are multiplied by 1 + lr * weight_decay and grow without bound.
    Decay must pull them toward zero."""
    return adamw_update(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, -weight_decay)


@step.mistake("optim.adamw_update", source="the CS336 handout writes it so, PyTorch does not")
def decay_after_the_update(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """The weight is decayed after the update, so the step itself shrinks a little too. Some lecture notes
    write it this way; PyTorch and this package decay first. The difference is small, but results are not
    exactly comparable."""
    moved, *means = adamw_update(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, 0.0)
    return moved * (1 - lr * weight_decay), *means


# --------------------------------------------------------------------------------------------------
# Mistakes: the means and their correction


def moved(parameter, mean, mean_square, lr, eps, weight_decay):
    return parameter * (1 - lr * weight_decay) - lr * mean / (mean_square.sqrt() + eps)


@step.mistake("optim.adamw_update", source="public solutions of CS336")
def no_bias_correction(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """Both moments start at zero and are used without bias correction. With betas 0.9 and 0.999 the first
    step is about three times too long. Divide each moment by 1 - beta**step."""
    exp_avg = exp_avg.lerp(gradient, 1 - betas[0])
    exp_avg_sq = exp_avg_sq.lerp(gradient**2, 1 - betas[1])
    return moved(parameter, exp_avg, exp_avg_sq, lr, eps, weight_decay), exp_avg, exp_avg_sq


@step.mistake("optim.adamw_update", source="public solutions of CS336")
def only_the_mean_corrected(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """Only the first moment is bias-corrected. The second moment, and thus the divisor, is far too small in
    early steps, and the steps are far too long. Divide it by 1 - beta2**step before taking the root."""
    exp_avg = exp_avg.lerp(gradient, 1 - betas[0])
    exp_avg_sq = exp_avg_sq.lerp(gradient**2, 1 - betas[1])
    mean = exp_avg / (1 - betas[0] ** step)
    return moved(parameter, mean, exp_avg_sq, lr, eps, weight_decay), exp_avg, exp_avg_sq


@step.mistake("optim.adamw_update", source="public solutions of CS336")
def only_the_mean_square_corrected(
    parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay
):
    """Only the second moment is bias-corrected. The first moment is far too small in early steps, and so are
    the steps. Divide it by 1 - beta1**step as well."""
    exp_avg = exp_avg.lerp(gradient, 1 - betas[0])
    exp_avg_sq = exp_avg_sq.lerp(gradient**2, 1 - betas[1])
    mean_square = exp_avg_sq / (1 - betas[1] ** step)
    return moved(parameter, exp_avg, mean_square, lr, eps, weight_decay), exp_avg, exp_avg_sq


@step.mistake("optim.adamw_update", source="written for this catalogue")
def corrections_exchanged(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """The first moment is divided by 1 - beta2**step and the second by 1 - beta1**step. Each moment needs the
    correction of its own beta; check which beta is in which denominator."""
    exp_avg = exp_avg.lerp(gradient, 1 - betas[0])
    exp_avg_sq = exp_avg_sq.lerp(gradient**2, 1 - betas[1])
    mean, mean_square = exp_avg / (1 - betas[1] ** step), exp_avg_sq / (1 - betas[0] ** step)
    return moved(parameter, mean, mean_square, lr, eps, weight_decay), exp_avg, exp_avg_sq


@step.mistake("optim.adamw_update", source="written for this catalogue")
def square_root_of_the_correction_forgotten(
    parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay
):
    """The corrections are folded into the learning rate, but without the square root of 1 - beta2**step, so
    the first steps are far too short. It is lr * sqrt(1 - beta2**step) / (1 - beta1**step)."""
    exp_avg = exp_avg.lerp(gradient, 1 - betas[0])
    exp_avg_sq = exp_avg_sq.lerp(gradient**2, 1 - betas[1])
    mean = exp_avg * (1 - betas[1] ** step) / (1 - betas[0] ** step)
    return moved(parameter, mean, exp_avg_sq, lr, eps, weight_decay), exp_avg, exp_avg_sq


@step.mistake("optim.adamw_update", source="written for this catalogue")
def corrected_means_kept(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """The bias-corrected moments are stored and used in the next step, where they are corrected again. Store
    the raw moments, and use the corrected ones for this update only."""
    parameter, exp_avg, exp_avg_sq = adamw_update(
        parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay
    )
    return parameter, exp_avg / (1 - betas[0] ** step), exp_avg_sq / (1 - betas[1] ** step)


@step.mistake("optim.adamw_update", source="public solutions of CS336")
def step_counted_from_0(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """The first step is number 0, so the bias correction 1 - beta**0 is zero, and the weights become NaN.
    Increment the step before using it, so that the first one is 1."""
    return adamw_update(parameter, gradient, exp_avg, exp_avg_sq, step - 1, lr, betas, eps, weight_decay)


@step.mistake("optim.adamw_update", source="written for this catalogue")
def step_counted_from_2(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """The bias correction uses step + 1, although step already counts from 1. The first updates have the
    wrong length; check whether the counter is incremented twice."""
    return adamw_update(parameter, gradient, exp_avg, exp_avg_sq, step + 1, lr, betas, eps, weight_decay)


@step.mistake("optim.adamw_update", source="public solutions of CS336")
def betas_exchanged(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """The betas are swapped: the first is used for the second moment and the second for the first. The
    gradient is then averaged over far too many steps. betas[0] belongs to the mean of the gradient, betas[1]
    to the mean of its square."""
    return adamw_update(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas[::-1], eps, weight_decay)


@step.mistake("optim.adamw_update", source="public solutions of CS336; passes its suite")
def betas_ignored(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """The betas are always 0.9 and 0.999, whatever is passed. Language models are usually trained with 0.9
    and 0.95; read them from the options."""
    return adamw_update(parameter, gradient, exp_avg, exp_avg_sq, step, lr, (0.9, 0.999), eps, weight_decay)


@step.mistake("optim.adamw_update", source="written for this catalogue")
def weights_of_the_means_exchanged(
    parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay
):
    """beta multiplies the new gradient and 1 - beta the old moment, the wrong way round. With beta 0.9 the
    average forgets nearly everything. It is beta * old + (1 - beta) * new."""
    exp_avg = exp_avg.lerp(gradient, betas[0])
    exp_avg_sq = exp_avg_sq.lerp(gradient**2, betas[1])
    mean, mean_square = exp_avg / (1 - betas[0] ** step), exp_avg_sq / (1 - betas[1] ** step)
    return moved(parameter, mean, mean_square, lr, eps, weight_decay), exp_avg, exp_avg_sq


@step.mistake("optim.adamw_update", source="written for this catalogue")
def square_of_the_mean(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """The second moment averages the square of the first moment instead of the square of the gradient, so
    noisy gradients no longer get shorter steps. It is beta2 * exp_avg_sq + (1 - beta2) * gradient**2."""
    exp_avg = exp_avg.lerp(gradient, 1 - betas[0])
    exp_avg_sq = exp_avg_sq.lerp(exp_avg**2, 1 - betas[1])
    mean, mean_square = exp_avg / (1 - betas[0] ** step), exp_avg_sq / (1 - betas[1] ** step)
    return moved(parameter, mean, mean_square, lr, eps, weight_decay), exp_avg, exp_avg_sq


# --------------------------------------------------------------------------------------------------
# Mistakes: the step


@step.mistake("optim.adamw_update", source="written for this catalogue")
def root_forgotten(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """The first moment is divided by the second moment, not by its square root. A gradient of 0.01 then gives
    a step a hundred times too long, one of 100 a step a hundred times too short. Take the root first."""
    _, exp_avg, exp_avg_sq = adamw_update(
        parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay
    )
    mean, mean_square = exp_avg / (1 - betas[0] ** step), exp_avg_sq / (1 - betas[1] ** step)
    return moved(parameter, mean, mean_square**2, lr, eps, weight_decay), exp_avg, exp_avg_sq


@step.mistake("optim.adamw_update", source="written for this catalogue")
def epsilon_inside_the_root(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """eps is added inside the square root, where it acts as its own root: 1e-8 acts like 1e-4. Small
    gradients then move their weights too little. Add it after the root."""
    _, exp_avg, exp_avg_sq = adamw_update(
        parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay
    )
    mean, mean_square = exp_avg / (1 - betas[0] ** step), exp_avg_sq / (1 - betas[1] ** step)
    return moved(parameter, mean, mean_square + eps, lr, 0.0, weight_decay), exp_avg, exp_avg_sq


@step.mistake("optim.adamw_update", source="written for this catalogue")
def no_epsilon(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """Nothing is added to the root. A weight that has only had zero gradients, such as the embedding of a
    token not seen yet, becomes 0 / 0 = NaN. Add eps to the root."""
    return adamw_update(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, 0.0, weight_decay)


@step.mistake("optim.adamw_update", source="written for this catalogue")
def epsilon_ignored(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """eps is always 1e-8, whatever is passed. A larger value, which limits steps where gradients are tiny,
    then has no effect; read it from the options."""
    return adamw_update(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, 1e-8, weight_decay)


@step.mistake("optim.adamw_update", source="the CS336 handout writes it so, PyTorch does not")
def epsilon_before_the_correction(
    parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay
):
    """eps is added to the root before the bias correction of the second moment, so it has more weight in
    early steps than requested. Some lecture notes write it this way; PyTorch and this package correct first.
    With 1e-8 it hardly matters."""
    early = eps / math.sqrt(1 - betas[1] ** step) if betas[1] ** step < 1 else eps
    return adamw_update(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, early, weight_decay)


@step.mistake("optim.adamw_update", source="the CS336 handout writes it so, PyTorch does not")
def epsilon_before_the_correction_and_decay_last(
    parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay
):
    """This is AdamW as some lecture notes write it: the corrections are folded into the learning rate, and
    the weight is decayed after the update. PyTorch and this package correct both moments and decay first. The
    difference is small, but results are not exactly comparable."""
    early = eps / math.sqrt(1 - betas[1] ** step)
    new, *means = adamw_update(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, early, 0.0)
    return new * (1 - lr * weight_decay), *means


@step.mistake("optim.adamw_update", source="written for this catalogue")
def uphill(parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """The update is added instead of subtracted, so the loss rises. The gradient points in the direction of
    increasing loss; move the weight against it."""
    new, mean, mean_square = adamw_update(
        parameter, -gradient, -exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay
    )
    return new, -mean, mean_square


@step.mistake("optim.adamw_update", source="written for this catalogue")
def rate_shrunk_as_in_the_SGD_example(
    parameter, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay
):
    """The learning rate is divided by the square root of the step, as in a common SGD example. AdamW uses lr
    as it is; a schedule changes it from outside."""
    return adamw_update(
        parameter, gradient, exp_avg, exp_avg_sq, step, lr / math.sqrt(step), betas, eps, weight_decay
    )


# --------------------------------------------------------------------------------------------------
# Mistakes: the class


@step.mistake("optim.AdamW", source="public solutions of CS336; passes its suite")
class LearningRateReadOnce(AdamW):
    """The learning rate is stored once, on self or in the defaults, so a schedule that sets it in
    param_groups has no effect. Read group["lr"] at every step."""

    def _update(self, parameter, gradient, group):
        super()._update(parameter, gradient, group | {"lr": self.defaults["lr"]})


@step.mistake("optim.AdamW", source="public solutions of CS336")
class GroupsIgnored(AdamW):
    """All parameters use the options passed to the constructor, so parameter groups, such as norms without
    weight decay, and schedules have no effect. Read lr, betas, eps and weight_decay from the group."""

    def _update(self, parameter, gradient, group):
        super()._update(parameter, gradient, self.defaults)


@step.mistake("optim.AdamW", source="written for this catalogue")
class SettingsOfTheFirstGroup(AdamW):
    """All parameters use the options of param_groups[0]. Schedules work, but other groups with their own
    decay or learning rate are treated like the first. Use the group of the current iteration."""

    def _update(self, parameter, gradient, group):
        super()._update(parameter, gradient, self.param_groups[0])


@step.mistake("optim.AdamW", source="written for this catalogue")
class FirstGroupOnly(AdamW):
    """Only the parameters of param_groups[0] are updated; those of all other groups never learn. Loop over
    the groups, and within each over its parameters."""

    def _update(self, parameter, gradient, group):
        if group is self.param_groups[0]:
            super()._update(parameter, gradient, group)


@step.mistake("optim.AdamW", source="public solutions of CS336; passes its suite")
class NoGradientNotExpected(AdamW):
    """A parameter whose grad is None raises an error. Frozen weights and unused parts of a model have no
    gradient; skip them."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = AdamW.step(self, closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.square()
        return loss


@step.mistake("optim.AdamW", source="written for this catalogue")
class StopsAtTheFirstWithoutGradient(AdamW):
    """The loop ends at the first parameter without a gradient, so those after it are not updated. Use
    continue instead of break or return."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    break
                self._update(parameter, parameter.grad, group)
        return loss


@step.mistake("optim.AdamW", source="written for this catalogue")
class MissingGradientTakenForZero(AdamW):
    """A parameter whose grad is None is treated as if its gradient were zero: it decays, and keeps moving
    along its past gradients. Frozen weights would shrink; skip such parameters."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                self._update(p, torch.zeros_like(p) if p.grad is None else p.grad, group)
        return loss


@step.mistake("optim.AdamW", source="written for this catalogue")
class OneStepCountForAll(AdamW):
    """There is one step counter for the whole optimizer. A parameter that had no gradient in some steps then
    gets the wrong bias correction. Keep a counter in each parameter's state."""

    @torch.no_grad()
    def step(self, closure=None):
        self.count = getattr(self, "count", 0) + 1
        return super().step(closure)

    def _update(self, parameter, gradient, group):
        if not self.state[parameter]:
            zeros = torch.zeros_like(parameter)
            self.state[parameter] |= {"exp_avg": zeros, "exp_avg_sq": zeros}
        self.state[parameter]["step"] = self.count - 1
        super()._update(parameter, gradient, group)


@step.mistake("optim.AdamW", source="written for this catalogue")
class StepCountedAtEachParameter(AdamW):
    """One counter for the whole optimizer is incremented at every parameter instead of every step, so all but
    the first parameter get the bias correction of a later step. Keep a counter in each parameter's state."""

    def _update(self, parameter, gradient, group):
        self.count = getattr(self, "count", 0) + 1
        if not self.state[parameter]:
            zeros = torch.zeros_like(parameter)
            self.state[parameter] |= {"exp_avg": zeros, "exp_avg_sq": zeros}
        self.state[parameter]["step"] = self.count - 1
        super()._update(parameter, gradient, group)


@step.mistake("optim.AdamW", source="written for this catalogue")
class MeansStartAnewInEachStep(AdamW):
    """The state is reinitialized at every step, so nothing is ever averaged. Initialize it only if the
    parameter has none yet."""

    def _update(self, parameter, gradient, group):
        self.state[parameter].clear()
        super()._update(parameter, gradient, group)


@step.mistake("optim.AdamW", source="written for this catalogue")
class StepNeverCounted(AdamW):
    """The step is read from the state but never written back, so every step is corrected like the first.
    Store the incremented value in the parameter's state."""

    def _update(self, parameter, gradient, group):
        super()._update(parameter, gradient, group)
        self.state[parameter]["step"] = 0


@step.mistake("optim.AdamW", source="written for this catalogue")
class MeansNotStored(AdamW):
    """The new moments are used once and not written back to the state, so every step starts from moments of
    zero. Store exp_avg and exp_avg_sq after the update."""

    def _update(self, parameter, gradient, group):
        super()._update(parameter, gradient, group)
        self.state[parameter] |= dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros_like(parameter))


@step.mistake("optim.AdamW", source="written for this catalogue")
class OneStateForAllParameters(AdamW):
    """All parameters share the same moments, which mixes their gradients and fails where shapes differ. The
    state has one entry per parameter: self.state[parameter]."""

    def _update(self, parameter, gradient, group):
        self.state[parameter] = self.state[self.param_groups[0]["params"][0]]
        super()._update(parameter, gradient, group)


@step.mistake("optim.AdamW", source="written for this catalogue")
class StateKeptOutside(AdamW):
    """The moments are stored in a separate dict instead of self.state, so state_dict does not contain them,
    and a run resumed from a checkpoint starts them at zero. Store them in self.state[parameter]."""

    def state_dict(self):
        return super().state_dict() | {"state": {}}


@step.mistake("optim.AdamW", source="written for this catalogue")
class UpdateThrownAway(AdamW):
    """The new weight is only bound to a local name, as in `p = p - step`, so the model never changes. Write
    into the parameter: p.copy_(...), p.sub_(...) or p.data -= ..."""

    def _update(self, parameter, gradient, group):
        before = parameter.clone()
        super()._update(parameter, gradient, group)
        parameter.copy_(before)


@step.mistake("optim.AdamW", source="written for this catalogue")
class WeightReplaced(AdamW):
    """The parameter gets new memory, as in `p.data = p.data - step`, instead of being updated in place. Views
    of it become stale, and memory for a second copy is needed. Use an in-place operation."""

    def _update(self, parameter, gradient, group):
        parameter.data = parameter.data.clone()
        super()._update(parameter, gradient, group)


@step.mistake("optim.AdamW", source="written for this catalogue")
class GradientChangedInPlace(AdamW):
    """The update is computed in place in the gradient, by grad.mul_ or similar. Code that logs or clips the
    gradient afterwards sees other values; work on new tensors."""

    def _update(self, parameter, gradient, group):
        super()._update(parameter, gradient, group)
        gradient.mul_(1 - group["betas"][0])


@step.mistake("optim.AdamW", source="written for this catalogue")
class GradientsRecorded(AdamW):
    """The step runs with autograd enabled, which does not allow in-place changes of a leaf that requires a
    gradient. Put @torch.no_grad() above step, or work on p.data."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])


@step.mistake("optim.AdamW", source="written for this catalogue")
class ClosureIgnored(AdamW):
    """The closure passed to step is not called. It recomputes loss and gradients, and its return value must
    be returned. Call it first, with gradients enabled."""

    def step(self, closure=None):
        return super().step()


@step.mistake("optim.AdamW", source="written for this catalogue")
class LossOfTheClosureNotReturned(AdamW):
    """The closure is called, but its loss is not returned. Callers of torch optimizers, such as training
    frameworks, rely on it; end step with `return loss`."""

    def step(self, closure=None):
        super().step(closure)


# --------------------------------------------------------------------------------------------------
# Mistakes: a model's optimizer


def grouped(model, options, decays, rest_trains=True, **changes):
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [p for name, p in parameters.items() if decays(name, p)]},
        {
            "params": [p for name, p in parameters.items() if rest_trains and not decays(name, p)],
            "weight_decay": 0.0,
        },
    ]
    names = ("lr", "betas", "eps", "weight_decay")
    return optim.AdamW(groups, **{name: getattr(options, name) for name in names} | changes)


@step.mistake("trainer.make_optimizer", source="public solutions of CS336")
def norms_and_biases_decay(model, options):
    """All parameters are decayed, including norms and biases. Pulling a gain toward 0 works against the norm.
    Put parameters with fewer than two dimensions into a group with weight_decay 0."""
    return grouped(model, options, lambda name, p: True)


@step.mistake("trainer.make_optimizer", source="written for this catalogue")
def nothing_decays(model, options):
    """No parameter is decayed: the weight_decay of the options does not reach any group. Set it in the group
    of matrices and embeddings."""
    return grouped(model, options, lambda name, p: False)


@step.mistake("trainer.make_optimizer", source="written for this catalogue")
def decaying_groups_exchanged(model, options):
    """Norms and biases are decayed, matrices and embeddings are not: the groups are swapped. Parameters with
    two or more dimensions are decayed."""
    return grouped(model, options, lambda name, p: p.dim() < 2)


@step.mistake("trainer.make_optimizer", source="written for this catalogue")
def norms_decay(model, options):
    """Biases are excluded from weight decay, but gains of norms are not, since the test is for `bias` in the
    name. Decide by the number of dimensions: fewer than two means no decay."""
    return grouped(model, options, lambda name, p: "bias" not in name)


@step.mistake("trainer.make_optimizer", source="written for this catalogue")
def biases_decay(model, options):
    """Norms are excluded from weight decay, but biases of projections are not. A bias has one dimension, like
    a gain; decide by the number of dimensions."""
    return grouped(model, options, lambda name, p: "ln" not in name)


@step.mistake("trainer.make_optimizer", source="written for this catalogue")
def embeddings_do_not_decay(model, options):
    """Token embeddings are excluded from weight decay together with norms and biases. Here all matrices are
    decayed, embeddings included; only parameters with fewer than two dimensions are not."""
    return grouped(model, options, lambda name, p: p.dim() >= 2 and "embed" not in name)


@step.mistake("trainer.make_optimizer", source="written for this catalogue")
def norms_and_biases_not_trained(model, options):
    """Norms and biases are removed from the decayed group, but not added to another, so they are never
    trained. Give them their own group with weight_decay 0."""
    return grouped(model, options, lambda name, p: p.dim() >= 2, rest_trains=False)


@step.mistake("trainer.make_optimizer", source="written for this catalogue")
def betas_and_epsilon_left_at_their_defaults(model, options):
    """lr and weight_decay of the options reach the optimizer, but betas and eps do not, so changing them has
    no effect. Pass options.betas and options.eps too."""
    return grouped(model, options, lambda name, p: p.dim() >= 2, betas=(0.9, 0.95), eps=1e-8)


@step.mistake("trainer.make_optimizer", source="written for this catalogue")
def learning_rate_left_at_its_default(model, options):
    """The learning rate of the options does not reach the optimizer, which keeps its default. Pass
    options.lr."""
    return grouped(model, options, lambda name, p: p.dim() >= 2, lr=3e-4)


# --------------------------------------------------------------------------------------------------
# Mistakes with a parameter that is found from the observations


@step.family("optim.adamw_update", grids.powers(1e-12, 10))
def epsilon_fixed_at_a_number(value):
    """Your epsilon is {value} where 0.1 is passed. A larger value limits steps where gradients are tiny; read
    it from the options of the group."""
    return lambda parameter, gradient, mean, square, step, lr, betas, eps, weight_decay: adamw_update(
        parameter, gradient, mean, square, step, lr, betas, value, weight_decay
    )


@step.family("optim.adamw_update", grids.powers(1e-5, 10))
def weight_decay_fixed_at_a_number(value):
    """Your weight decay is {value}, whatever is passed, so norms and biases decay too, and no run is without
    decay. Read it from the options of the group."""
    return lambda parameter, gradient, mean, square, step, lr, betas, eps, weight_decay: adamw_update(
        parameter, gradient, mean, square, step, lr, betas, eps, value
    )


# by the index of a parameter group, and the number of groups
GROUPS = {
    "the first parameter group": lambda i, n: i == 0,
    "the second parameter group": lambda i, n: i == 1,
    "the last parameter group": lambda i, n: i == n - 1,
    "all parameter groups but the first": lambda i, n: i > 0,
    "all parameter groups but the second": lambda i, n: i != 1,
    "all parameter groups but the last": lambda i, n: i < n - 1,
}


def index_of(group, groups):
    return next(i for i, each in enumerate(groups) if each is group)


@step.family("optim.AdamW", GROUPS, unknown="some parameter groups")
def groups_not_updated(value):
    """The step does not update {value}, so these parameters never learn. Loop over all of self.param_groups,
    and within each group over its parameters."""

    class Wrong(AdamW):
        def _update(self, parameter, gradient, group):
            if not value(index_of(group, self.param_groups), len(self.param_groups)):
                super()._update(parameter, gradient, group)

    return Wrong


@step.family("optim.AdamW", GROUPS, unknown="some parameter groups")
def groups_that_do_not_decay(value):
    """The weight decay does not reach {value}, whatever these options are. Apply it to every parameter, with
    the weight_decay of its own group, which may be 0."""

    class Wrong(AdamW):
        def _update(self, parameter, gradient, group):
            is_missed = value(index_of(group, self.param_groups), len(self.param_groups))
            super()._update(parameter, gradient, group | {"weight_decay": 0.0} if is_missed else group)

    return Wrong


@step.family("optim.AdamW", {f"param_groups[{i}]": i for i in (-2, -1, 1, 2)}, unknown="one group")
def settings_of_another_group(value):
    """All parameters use the options of {value}. Schedules may work, but groups with their own decay or
    learning rate are treated alike. Use the group of the current iteration."""

    class Wrong(AdamW):
        def _update(self, parameter, gradient, group):
            super()._update(parameter, gradient, self.param_groups[value])

    return Wrong


@step.family("optim.AdamW", clipping.PARAMETERS, unknown="some parameters")
def parameters_not_updated(value):
    """In each group, the step does not update {value}. Loop over all of group["params"]; look for a slice, a
    condition or an early end of the loop."""

    class Wrong(AdamW):
        def _update(self, parameter, gradient, group):
            if not value(index_of(parameter, group["params"]), len(group["params"]), parameter):
                super()._update(parameter, gradient, group)

    return Wrong
