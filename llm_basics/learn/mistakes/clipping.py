"""Gradient clipping: all gradients scaled by one factor, so that their global norm is at most max_norm."""

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
# all subsets have different norms, so that it is evident which gradients are omitted
FIVE = [*GRADIENTS, 3 * draw(2, 2), 4 * draw(4)]


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
    contract="clipping",
)
step.value(
    "three gradients of different sizes, with a global norm above the limit",
    clipped(2.0, *GRADIENTS),
    shortened(2.0, *GRADIENTS),
    axes="weight row column",
    contract="clipping",
)
step.value(
    "three gradients, each below the limit, but not their global norm",
    clipped(2.0, *(1.5 * g / g.norm() for g in GRADIENTS)),
    shortened(2.0, *(1.5 * g / g.norm() for g in GRADIENTS)),
    axes="weight row column",
    contract="clipping",
)
step.value(
    "gradients below the limit, which must not change",
    clipped(2.0, *SHORT),
    SHORT,
    axes="weight row column",
    atol=1e-9,
    contract="clipping",
)
step.value(
    "gradients that are all zero",
    clipped(2.0, torch.zeros(4)),
    [torch.zeros(4)],
    axes="weight element",
    contract="clipping",
)
step.value(
    "a weight without a gradient between two that have one",
    clipped(2.0, GRADIENTS[0], None, GRADIENTS[1]),
    shortened(2.0, GRADIENTS[0], None, GRADIENTS[1]),
    axes="weight row column",
    contract="clipping",
)
step.value(
    "no weight with a gradient",
    clipped(2.0, None, None),
    [None, None],
    beyond="with all layers frozen, or before a first backward pass; the public test has five gradients",
)


def given_a_generator(a):
    weights = weights_with(FIVE)
    a.run_gradient_clipping((w for w in weights), 2.0)
    return [w.grad.clone() for w in weights]


step.value(
    "weights from a generator, such as model.parameters()",
    given_a_generator,
    shortened(2.0, *FIVE),
    axes="weight row column",
    contract="clipping",
)


def weights_afterwards(a):
    weights = weights_with(GRADIENTS)
    a.run_gradient_clipping(weights, 2.0)
    return all((w == 0.7).all().item() for w in weights)


def in_place(a):
    weights = weights_with(GRADIENTS)
    gradients_before = [w.grad.detach() for w in weights]
    a.run_gradient_clipping(weights, 2.0)
    return all(torch.equal(w.grad, h) for w, h in zip(weights, gradients_before, strict=True))


step.value(
    "the weights are not modified",
    weights_afterwards,
    True,
    contract="clipping",
    words=lambda right, found: "the weights are modified, not only their gradients",
)

step.value(
    "gradients in place",
    in_place,
    True,
    beyond="a new tensor in .grad is seen by the optimizer, but not by what holds the old one, such as DDP",
    words=lambda right, found: "the gradients are replaced, not modified in place",
)

# the square of 300 is more than float16 can hold
step.value(
    "float16 gradients of 300",
    clipped(1.0, torch.full((4,), 300.0).half()),
    [torch.full((4,), 0.5).half()],
    axes="weight element",
    rtol=4e-3,
    beyond="the public test has float32 alone; in float16 the square of 300 is inf",
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
    """Each gradient is clipped by its own norm, which changes the direction of the step. Compute one norm
    over the gradients of all parameters, and scale all of them by the same factor."""
    for gradient in gradients_of(parameters):
        scale_all([gradient], gradient.float().norm(), max_norm)


@step.mistake("optim.clip_grad_norm_", source="public solutions of CS336")
def values_clamped(parameters, max_norm, error_if_nonfinite=False):
    """Every element is clamped to -max_norm..max_norm. That is clipping by value: it changes the direction
    and does not bound the norm. Scale all gradients by max_norm / norm."""
    for gradient in gradients_of(parameters):
        gradient.clamp_(-max_norm, max_norm)


@step.mistake("optim.clip_grad_norm_", source="public solutions of CS336")
def norms_added_up(parameters, max_norm, error_if_nonfinite=False):
    """The norms of the gradients are summed, which exceeds the global norm, so gradients are clipped too
    much. Sum the squares, and take one root."""
    gradients = gradients_of(parameters)
    return scale_all(gradients, torch.as_tensor(sum(g.float().norm() for g in gradients)), max_norm)


@step.mistake("optim.clip_grad_norm_", source="public solutions of CS336")
def norm_without_the_root(parameters, max_norm, error_if_nonfinite=False):
    """The sum of squares is used as the norm, without its square root. Large gradients are then scaled down
    far too much; take the root of the total."""
    gradients = gradients_of(parameters)
    norm = norm_of([g.float() for g in gradients])
    return scale_all(gradients, norm**2, max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def sum_of_absolute_values(parameters, max_norm, error_if_nonfinite=False):
    """The norm is the sum of absolute values (L1), which is larger than the L2 norm that is required. Sum the
    squares, and take the root."""
    gradients = gradients_of(parameters)
    return scale_all(gradients, torch.as_tensor(sum(g.float().abs().sum() for g in gradients)), max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def root_mean_square(parameters, max_norm, error_if_nonfinite=False):
    """The squares are averaged instead of summed, so the threshold effectively grows with the size of the
    model and hardly ever applies. Use the sum of squares."""
    gradients = gradients_of(parameters)
    count = max(1, sum(g.numel() for g in gradients))
    return scale_all(gradients, norm_of([g.float() for g in gradients]) / count**0.5, max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def longest_gradient_only(parameters, max_norm, error_if_nonfinite=False):
    """The largest norm of a single gradient is used as the global norm, so the others do not count. Sum the
    squares of all norms, and take the root."""
    gradients = gradients_of(parameters)
    return scale_all(gradients, torch.as_tensor(max([0, *(g.float().norm() for g in gradients)])), max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def last_gradient_only(parameters, max_norm, error_if_nonfinite=False):
    """The total is overwritten for each parameter instead of accumulated, so only the last one counts. Look
    for = in the loop where += is meant."""
    gradients = gradients_of(parameters)
    return scale_all(gradients, norm_of([g.float() for g in gradients[-1:]]), max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def scaled_before_all_are_counted(parameters, max_norm, error_if_nonfinite=False):
    """Each gradient is scaled in the same loop that accumulates the norm, using only the part seen so far, so
    each gets a different factor. Finish the norm first, and scale in a second loop."""
    total = torch.tensor(0.0)
    for gradient in gradients_of(parameters):
        total = (total**2 + gradient.float().square().sum()).sqrt()
        scale_all([gradient], total, max_norm)
    return total


@step.mistake("optim.clip_grad_norm_", source="public solutions of CS336; passes its suite")
def always_scaled(parameters, max_norm, error_if_nonfinite=False):
    """All gradients are scaled to max_norm, including smaller ones. Near a minimum, where gradients should
    shrink, steps stay long. Scale only if the norm exceeds max_norm."""
    gradients = gradients_of(parameters)
    norm = norm_of([g.float() for g in gradients])
    for gradient in gradients:
        gradient.mul_((max_norm / (norm + 1e-6)).to(gradient.dtype))
    return norm


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def only_short_ones_scaled(parameters, max_norm, error_if_nonfinite=False):
    """The comparison is the wrong way round: gradients below max_norm are scaled up, those above it stay.
    Scale only if the norm exceeds max_norm."""
    gradients = gradients_of(parameters)
    norm = norm_of([g.float() for g in gradients])
    for gradient in gradients:
        gradient.mul_((max_norm / (norm + 1e-6)).clamp(min=1.0).to(gradient.dtype))
    return norm


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def factor_upside_down(parameters, max_norm, error_if_nonfinite=False):
    """Gradients above the threshold are multiplied by norm / max_norm, which makes them even larger. The
    factor is max_norm / norm, which is below 1."""
    gradients = gradients_of(parameters)
    norm = norm_of([g.float() for g in gradients])
    for gradient in gradients:
        gradient.mul_((norm / max_norm).clamp(min=1.0).to(gradient.dtype))
    return norm


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def shortened_to_length_1(parameters, max_norm, error_if_nonfinite=False):
    """Gradients above the threshold are divided by their norm, so their norm becomes 1 whatever max_norm is.
    Multiply by max_norm as well."""
    gradients = gradients_of(parameters)
    norm = norm_of([g.float() for g in gradients])
    return scale_all(gradients, norm, 1.0) if norm > max_norm else norm


@step.mistake("optim.clip_grad_norm_", source="public solutions of CS336")
def gradients_replaced(parameters, max_norm, error_if_nonfinite=False):
    """Each parameter gets a new gradient tensor instead of new values in the existing one. Code that holds a
    reference to the old one, such as a fused optimizer, sees it unclipped; use mul_."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.grad = None if parameter.grad is None else parameter.grad.clone()
    return clip_grad_norm_(parameters, max_norm)


@step.mistake("optim.clip_grad_norm_", source="public solutions of CS336")
def result_thrown_away(parameters, max_norm, error_if_nonfinite=False):
    """The scaled gradients are only bound to a local name, as in `g = g * scale`, and the parameters keep the
    old ones. Modify them in place: g.mul_(scale)."""
    return norm_of(gradients_of(parameters))


@step.mistake("optim.clip_grad_norm_", source="public solutions of CS336")
def missing_gradient_not_expected(parameters, max_norm, error_if_nonfinite=False):
    """A parameter whose grad is None raises an error. Frozen weights and unused parts of a model have no
    gradient; skip them."""
    gradients = [p.grad for p in parameters]
    return scale_all(gradients, norm_of([g.float() for g in gradients]), max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def stops_at_the_first_without_gradient(parameters, max_norm, error_if_nonfinite=False):
    """The loop ends at the first parameter without a gradient, so those after it are neither counted nor
    clipped. Use continue instead of break or return."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            break
        gradients.append(parameter.grad)
    return scale_all(gradients, norm_of([g.float() for g in gradients]), max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def no_gradient_at_all_not_expected(parameters, max_norm, error_if_nonfinite=False):
    """If no parameter has a gradient, there is nothing to stack, which raises an error. Return a norm of 0 in
    that case, so that a frozen model can use the same loop."""
    gradients = gradients_of(parameters)
    norm = torch.stack([g.float().norm() for g in gradients]).norm()
    return scale_all(gradients, norm, max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def generator_used_up(parameters, max_norm, error_if_nonfinite=False):
    """The function iterates over the parameters twice, but model.parameters() is a generator, which is
    exhausted the second time, so nothing is scaled. Make a list first."""
    norm = norm_of([g.float() for g in gradients_of(parameters)])
    return scale_all(gradients_of(parameters), norm, max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def weights_clipped(parameters, max_norm, error_if_nonfinite=False):
    """The norm and the scaling are applied to the weights instead of their gradients. The model shrinks at
    every step, and large gradients pass unchanged. Use p.grad, not p."""
    weights = [p.data for p in parameters]
    return scale_all(weights, norm_of([w.float() for w in weights]), max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def norm_of_the_weights(parameters, max_norm, error_if_nonfinite=False):
    """The gradients are scaled by the norm of the weights, so clipping does not depend on their own norm.
    Compute the norm of p.grad, not of p."""
    parameters = list(parameters)
    return scale_all(gradients_of(parameters), norm_of([p.detach().float() for p in parameters]), max_norm)


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def zero_norm_divided_by(parameters, max_norm, error_if_nonfinite=False):
    """The gradients are divided by their norm even if it is zero: 0 / 0 = NaN, which then reaches the
    weights. Add 1e-6 to the norm, or scale only above the threshold."""
    gradients = gradients_of(parameters)
    norm = norm_of([g.float() for g in gradients])
    for gradient in gradients:
        gradient.copy_(gradient / norm * min(norm, max_norm))
    return norm


@step.mistake("optim.clip_grad_norm_", source="written for this catalogue")
def squares_in_half_precision(parameters, max_norm, error_if_nonfinite=False):
    """The squares are summed in the dtype of the gradients. In float16 the square of 256 already overflows,
    and all gradients become 0. Convert to float32 for the norm."""
    gradients = gradients_of(parameters)
    total = sum((g * g).sum() for g in gradients)
    return scale_all(gradients, torch.as_tensor(total).sqrt(), max_norm)


# --------------------------------------------------------------------------------------------------
# Mistakes with a parameter that is found from the observations

# by the index of a parameter, the number of parameters, and the parameter
PARAMETERS = {
    "the first parameter": lambda i, n, p: i == 0,
    "the second parameter": lambda i, n, p: i == 1,
    "the last parameter": lambda i, n, p: i == n - 1,
    "all parameters but the first": lambda i, n, p: i > 0,
    "all parameters but the last": lambda i, n, p: i < n - 1,
    "every second parameter": lambda i, n, p: i % 2 == 1,
    "parameters with fewer than two dimensions": lambda i, n, p: p.dim() < 2,
    "parameters with two or more dimensions": lambda i, n, p: p.dim() >= 2,
}


def missing(is_missed, of_norm, of_scaling):
    def wrong(parameters, max_norm, error_if_nonfinite=False):
        parameters = list(parameters)
        n, every = len(parameters), gradients_of(parameters)
        kept = gradients_of([p for i, p in enumerate(parameters) if not is_missed(i, n, p)])
        norm = norm_of([g.float() for g in (kept if of_norm else every)])
        return scale_all(kept if of_scaling else every, norm, max_norm)

    return wrong


@step.family("optim.clip_grad_norm_", PARAMETERS, unknown="some parameters")
def parameters_left_out(value):
    """Neither the norm nor the scaling includes {value}. Count the gradients of all parameters in one norm,
    and multiply all of them by the same factor; look for a slice, a condition or an early return."""
    return missing(value, of_norm=True, of_scaling=True)


@step.family("optim.clip_grad_norm_", PARAMETERS, unknown="some parameters")
def parameters_not_counted(value):
    """The norm does not include {value}, although all gradients are scaled. Count the gradients of all
    parameters; look for a slice, a condition or an early end of the first loop."""
    return missing(value, of_norm=True, of_scaling=False)


@step.family("optim.clip_grad_norm_", PARAMETERS, unknown="some parameters")
def parameters_not_scaled(value):
    """The norm is right, but the scaling does not reach {value}, so the direction of the step changes.
    Multiply all gradients by the same factor; look at what the second loop runs over."""
    return missing(value, of_norm=False, of_scaling=True)
