"""Squared ReLU: `max(x, 0)^2`."""

import torch
from torch.nn import functional as tF

from llm_basics.learn import probes

step = probes.Step("relu2")
draw = probes.numbers(seed=1)

# without gradients, so that what works in place can be seen to change its input
step.compare(
    "numbers around 0",
    lambda a, x: a.run_relu2(x),
    lambda x: tF.relu(x).square(),
    {"x": torch.linspace(-4, 4, 17)},
    axes="entry",
    gradients=False,
)
step.compare(
    "numbers around 0, and their gradient",
    lambda a, x: a.run_relu2(x),
    lambda x: tF.relu(x).square(),
    {"x": 3 * draw(2, 3, 5)},
    axes="batch position feature",
)
# the square of -1e20 is more than float32 can hold
step.compare(
    "large numbers, of both signs, and their gradient",
    lambda a, x: a.run_relu2(x),
    lambda x: tF.relu(x).square(),
    {"x": torch.tensor([-1e20, -800.0, -10.0, 10.0, 800.0, 1e15])},
    axes="entry",
)
step.compare(
    "bfloat16",
    lambda a, x: a.run_relu2(x),
    lambda x: tF.relu(x).square(),
    {"x": torch.linspace(-4, 4, 17).bfloat16()},
    axes="entry",
    rtol=2e-2,
    atol=1e-2,
    gradients=False,
)


@step.mistake("functional.relu2", source="written for this catalogue")
def relu_alone(x):
    """The square is missing: this is ReLU, max(x, 0), whose slope jumps from 0 to 1. Square the rectified
    numbers: max(x, 0)^2."""
    return torch.relu(x)


@step.mistake("functional.relu2", source="written for this catalogue")
def square_alone(x):
    """Negative numbers are squared as well, so x and -x give the same result. Either the rectifier is
    missing, or it is applied to the square, which is never negative. Rectify first: max(x, 0)^2."""
    return torch.relu(x**2)


@step.mistake("functional.relu2", source="written for this catalogue")
def twice_relu(x):
    """The 2 of relu2 is taken for a factor: this is 2 max(x, 0), which is linear above 0. It is an exponent:
    max(x, 0)^2."""
    return 2 * torch.relu(x)


@step.mistake("functional.relu2", source="written for this catalogue")
def sign_kept(x):
    """x |x| squares each number and keeps its sign, so negative numbers pass. Squared ReLU is 0 below 0:
    max(x, 0)^2."""
    return x * x.abs()


@step.mistake("functional.relu2", source="written for this catalogue")
def wrong_side_rectified(x):
    """Positive numbers are set to 0, and negative ones are squared, as with clamp(max=0) for clamp(min=0).
    Set the negative numbers to 0: max(x, 0)^2."""
    return x.clamp(max=0) ** 2


@step.mistake("functional.relu2", source="written for this catalogue")
def leaky_relu_squared(x):
    """Negative numbers are scaled by 0.01 (leaky ReLU) before the square, so they give small positive results
    and a gradient. Squared ReLU is exactly 0 below 0: max(x, 0)^2."""
    return tF.leaky_relu(x) ** 2


@step.mistake("functional.relu2", source="written for this catalogue")
def mask_times_square(x):
    """(x > 0) * x^2 is right for most numbers, but the square of a large negative number is infinite, and inf
    * 0 is NaN. Rectify before squaring: max(x, 0)^2 is 0 there."""
    return (x > 0) * x**2


@step.mistake("functional.relu2", source="written for this catalogue")
def one_factor_detached(x):
    """The output is correct, but one of the two factors is detached by .detach(), .data or no_grad, so the
    gradient is max(x, 0), half of the right 2 max(x, 0)."""
    return torch.relu(x) * torch.relu(x).detach()


@step.mistake("functional.relu2", source="written for this catalogue")
def input_changed_in_place(x):
    """The input is rectified in place (clamp_ or relu_). Code that uses x again, such as a residual
    connection, gets wrong values. Make a new tensor: x.clamp(min=0)."""
    return x.clamp_(min=0) ** 2


@step.mistake("functional.relu2", source="written for this catalogue")
def result_left_in_float32(x):
    """The result is float32 whatever the dtype of the input. A half-precision model then fails at the next
    layer, or uses twice the memory. Convert back to x.dtype at the end."""
    return torch.relu(x.float()) ** 2


step.factor("functional.relu2")
