"""Clipping: all gradients shortened by one factor, so that together they are at most so long."""

import torch
from torch import nn

from llm_basics import swap
from llm_basics.learn import probes

step = probes.Step("clipping")
draw = probes.numbers(seed=6)
clip_grad_norm_ = swap.reference("optim.clip_grad_norm_")

# --------------------------------------------------------------------------------------------------
# Probes

# of three shapes and sizes; together 14.7 long, the longest alone 13.9
GRADIENTS = [draw(3, 4), 6 * draw(5), 0.1 * draw(2, 3)]
SHORT = [0.01 * g for g in GRADIENTS]


def weights_with(gradients):
    weights = [
        nn.Parameter(0.7 * torch.ones(3, 2) if g is None else 0.7 * torch.ones_like(g)) for g in gradients
    ]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = None if gradient is None else gradient.clone()
    return weights


def clipped(max_norm, *gradients):
    def ours(a):
        weights = weights_with(gradients)
        a.run_gradient_clipping(weights, max_norm)
        return [None if w.grad is None else w.grad.clone() for w in weights]

    return ours


def shortened(max_norm, *gradients):
    """The right gradients, from a norm taken in float64 over all of them laid end to end."""
    norm = torch.cat([g.flatten().double() for g in gradients if g is not None]).norm().item()
    return [g if g is None else g * min(1.0, max_norm / norm) for g in gradients]


step.value(
    "one gradient, [3, 4], clipped to norm 0.5",
    clipped(0.5, torch.tensor([3.0, 4.0])),
    [torch.tensor([0.3, 0.4])],
    axes="weight element",
)
step.value(
    "three gradients of different sizes, with a global norm above the limit",
    clipped(2.0, *GRADIENTS),
    shortened(2.0, *GRADIENTS),
    axes="weight row column",
)
step.value(
    "three gradients, each below the limit, but not their global norm",
    clipped(2.0, *(1.5 * g / g.norm() for g in GRADIENTS)),
    shortened(2.0, *(1.5 * g / g.norm() for g in GRADIENTS)),
    axes="weight row column",
)
step.value(
    "gradients below the limit, which must not change",
    clipped(2.0, *SHORT),
    SHORT,
    axes="weight row column",
    atol=1e-9,
)
step.value(
    "gradients that are all zero",
    clipped(2.0, torch.zeros(4)),
    [torch.zeros(4)],
    axes="weight element",
)
step.value(
    "a weight without a gradient between two that have one",
    clipped(2.0, GRADIENTS[0], None, GRADIENTS[1]),
    shortened(2.0, GRADIENTS[0], None, GRADIENTS[1]),
    axes="weight row column",
)
step.value("no weight with a gradient", clipped(2.0, None, None), [None, None])


def given_a_generator(a):
    weights = weights_with(GRADIENTS)
    a.run_gradient_clipping((w for w in weights), 2.0)
    return [w.grad.clone() for w in weights]


step.value(
    "weights from a generator, such as model.parameters()",
    given_a_generator,
    shortened(2.0, *GRADIENTS),
    axes="weight row column",
)


def left_as_they_were(a):
    weights = weights_with(GRADIENTS)
    held = [w.grad.detach() for w in weights]
    a.run_gradient_clipping(weights, 2.0)
    return {
        "gradients are changed where they are, not replaced": all(
            torch.equal(w.grad, h) for w, h in zip(weights, held, strict=True)
        ),
        "weights are left as they were": all((w == 0.7).all().item() for w in weights),
    }


step.value(
    "in-place updates",
    left_as_they_were,
    {"gradients are changed where they are, not replaced": True, "weights are left as they were": True},
    words=lambda right, found: "; ".join(f"not so: {fact}" for fact in right if not found[fact]),
)

# the square of 300 is more than float16 can hold
step.value(
    "float16 gradients of 300",
    clipped(1.0, torch.full((4,), 300.0).half()),
    [torch.full((4,), 0.5).half()],
    axes="weight element",
    rtol=4e-3,
    beyond=True,
)

# --------------------------------------------------------------------------------------------------
# Mistakes


def norm_of(gradients):
    return torch.cat([g.flatten() for g in gradients]).norm() if gradients else torch.tensor(0.0)


def gradients_of(parameters):
    return [p.grad for p in parameters if p.grad is not None]


def scale_all(gradients, norm, max_norm):
    """Finish the work with a norm that may be wrong."""
    for gradient in gradients:
        gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0).to(gradient.dtype))
    return norm


@step.mistake("optim.clip_grad_norm_", source="public solutions of CS336")
def each_gradient_by_itself(parameters, max_norm, error_if_nonfinite=False):
    """Each gradient is clipped by its own norm, which changes the direction of the step. Take one norm over
    the gradients of all parameters, and scale all by the same factor."""
    for gradient in gradients_of(parameters):
        scale_all([gradient], gradient.float().norm(), max_norm)


@step.mistake("optim.clip_grad_norm_", source="public solutions of CS336")
def values_clamped(parameters, max_norm, error_if_nonfinite=False):
    """Each number is clamped to -max_norm..max_norm. That is clipping by value: it changes the direction and
    does not bound the length; scale all gradients by max_norm / norm."""
    for gradient in gradients_of(parameters):
        gradient.clamp_(-max_norm, max_norm)


@step.mistake("optim.clip_grad_norm_", source="public solutions of CS336")
def norms_added_up(parameters, max_norm, error_if_nonfinite=False):
    """The norms of the gradients are added up, which is more than their norm together, so all are shortened
    too much. Add up the squares, and take one root."""
    gradients = gradients_of(parameters)
    return scale_all(gradients, torch.as_tensor(sum(g.float().norm() for g in gradients)), max_norm)


@step.mistake("optim.clip_grad_norm_", source="public solutions of CS336")
def norm_without_the_root(parameters, max_norm, error_if_nonfinite=False):
    """The sum of squares is compared and divided by, without its root. Long gradients are then shortened
    far too much; take the square root of the total."""
    gradients = gradients_of(parameters)
    norm = norm_of([g.float() for g in gradients])
    return scale_all(gradients, norm**2, max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def sum_of_absolute_values(parameters, max_norm, error_if_nonfinite=False):
    """The length is taken as the sum of absolute values, the L1 norm, which is larger than the L2 norm that
    is meant. Square the numbers, add them up, and take the root."""
    gradients = gradients_of(parameters)
    return scale_all(gradients, torch.as_tensor(sum(g.float().abs().sum() for g in gradients)), max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def root_mean_square(parameters, max_norm, error_if_nonfinite=False):
    """The squares are averaged instead of added up, so the limit grows with the size of the model and
    hardly ever acts. Use the sum of squares."""
    gradients = gradients_of(parameters)
    count = max(1, sum(g.numel() for g in gradients))
    return scale_all(gradients, norm_of([g.float() for g in gradients]) / count**0.5, max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def longest_gradient_only(parameters, max_norm, error_if_nonfinite=False):
    """The length of the longest gradient is taken for the length of all together, so the others are not
    counted. Add up the squares of all norms, and take the root."""
    gradients = gradients_of(parameters)
    return scale_all(gradients, torch.as_tensor(max([0, *(g.float().norm() for g in gradients)])), max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def last_gradient_only(parameters, max_norm, error_if_nonfinite=False):
    """The norm is overwritten for each parameter instead of added to, so only the last one counts. Look for
    an = in the loop where += belongs."""
    gradients = gradients_of(parameters)
    return scale_all(gradients, norm_of([g.float() for g in gradients[-1:]]), max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def scaled_before_all_are_counted(parameters, max_norm, error_if_nonfinite=False):
    """Each gradient is scaled in the same loop that adds up the norm, by what was seen so far. Each then
    gets a factor of its own; finish the norm first, and scale in a second loop."""
    total = torch.tensor(0.0)
    for gradient in gradients_of(parameters):
        total = (total**2 + gradient.float().square().sum()).sqrt()
        scale_all([gradient], total, max_norm)
    return total


@step.mistake("optim.clip_grad_norm_", source="public solutions of CS336; passes its suite")
def always_scaled(parameters, max_norm, error_if_nonfinite=False):
    """All gradients are brought to max_norm, short ones too. Near a minimum, where they should fade, steps
    stay long; scale only where the norm is above the limit."""
    gradients = gradients_of(parameters)
    norm = norm_of([g.float() for g in gradients])
    for gradient in gradients:
        gradient.mul_((max_norm / (norm + 1e-6)).to(gradient.dtype))
    return norm


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def only_short_ones_scaled(parameters, max_norm, error_if_nonfinite=False):
    """The comparison is the wrong way round: gradients below the limit are made longer, those above it
    stay. It must scale where the norm is greater than max_norm."""
    gradients = gradients_of(parameters)
    norm = norm_of([g.float() for g in gradients])
    for gradient in gradients:
        gradient.mul_((max_norm / (norm + 1e-6)).clamp(min=1.0).to(gradient.dtype))
    return norm


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def factor_upside_down(parameters, max_norm, error_if_nonfinite=False):
    """Gradients above the limit are multiplied by norm / max_norm, so that they get longer still. The
    factor is max_norm / norm, which is below 1."""
    gradients = gradients_of(parameters)
    norm = norm_of([g.float() for g in gradients])
    for gradient in gradients:
        gradient.mul_((norm / max_norm).clamp(min=1.0).to(gradient.dtype))
    return norm


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def shortened_to_length_1(parameters, max_norm, error_if_nonfinite=False):
    """Gradients above the limit are divided by their norm, so they end up 1 long whatever the limit. Multiply
    by max_norm as well."""
    gradients = gradients_of(parameters)
    norm = norm_of([g.float() for g in gradients])
    return scale_all(gradients, norm, 1.0) if norm > max_norm else norm


@step.mistake("optim.clip_grad_norm_", source="public solutions of CS336")
def gradients_replaced(parameters, max_norm, error_if_nonfinite=False):
    """Each parameter gets a new gradient tensor instead of new values in the one that it has. Whoever holds
    the old ones, such as a fused optimizer, sees them unclipped; use mul_."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.grad = None if parameter.grad is None else parameter.grad.clone()
    return clip_grad_norm_(parameters, max_norm)


@step.mistake("optim.clip_grad_norm_", source="public solutions of CS336")
def result_thrown_away(parameters, max_norm, error_if_nonfinite=False):
    """The scaled gradients are bound to a local name, as in `g = g * scale`, and the parameters keep the
    old ones. Change them in place: g.mul_(scale)."""
    return norm_of(gradients_of(parameters))


@step.mistake("optim.clip_grad_norm_", source="public solutions of CS336")
def missing_gradient_not_expected(parameters, max_norm, error_if_nonfinite=False):
    """A parameter whose grad is None stops it with an error. Frozen weights and unused parts of a model
    have no gradient; pass them over."""
    gradients = [p.grad for p in parameters]
    return scale_all(gradients, norm_of([g.float() for g in gradients]), max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def stops_at_the_first_without_gradient(parameters, max_norm, error_if_nonfinite=False):
    """A parameter without a gradient ends the loop, so that those after it are neither counted nor clipped.
    Use continue, where break or return stands."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            break
        gradients.append(parameter.grad)
    return scale_all(gradients, norm_of([g.float() for g in gradients]), max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def no_gradient_at_all_not_expected(parameters, max_norm, error_if_nonfinite=False):
    """With no gradient anywhere there is nothing to stack, and it fails. Return a norm of 0 before that, so
    that a frozen model can go through the same loop."""
    gradients = gradients_of(parameters)
    norm = torch.stack([g.float().norm() for g in gradients]).norm()
    return scale_all(gradients, norm, max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def generator_used_up(parameters, max_norm, error_if_nonfinite=False):
    """It loops over the parameters twice, but model.parameters() is a generator, which is empty the second
    time: nothing is scaled. Make a list of them first."""
    norm = norm_of([g.float() for g in gradients_of(parameters)])
    return scale_all(gradients_of(parameters), norm, max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def weights_clipped(parameters, max_norm, error_if_nonfinite=False):
    """The weights themselves are measured and scaled, not their gradients. The model shrinks at every step,
    and long gradients go through; use p.grad, not p."""
    weights = [p.data for p in parameters]
    return scale_all(weights, norm_of([w.float() for w in weights]), max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def norm_of_the_weights(parameters, max_norm, error_if_nonfinite=False):
    """The gradients are scaled by the norm of the weights, so the limit has nothing to do with how long
    they are. Measure p.grad, not p."""
    parameters = list(parameters)
    return scale_all(gradients_of(parameters), norm_of([p.detach().float() for p in parameters]), max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def zero_norm_divided_by(parameters, max_norm, error_if_nonfinite=False):
    """The gradients are divided by their norm even when it is zero: 0 / 0 = NaN, and so becomes the model.
    Add 1e-6 to the norm, or scale only where it is above the limit."""
    gradients = gradients_of(parameters)
    norm = norm_of([g.float() for g in gradients])
    for gradient in gradients:
        gradient.copy_(gradient / norm * min(norm, max_norm))
    return norm


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def squares_in_half_precision(parameters, max_norm, error_if_nonfinite=False):
    """The squares are added up in the gradients' own precision. In float16 the square of 256 is already
    infinite, and all gradients become 0; convert to float32 for the norm."""
    gradients = gradients_of(parameters)
    total = sum((g * g).sum() for g in gradients)
    return scale_all(gradients, torch.as_tensor(total).sqrt(), max_norm)
