"""SiLU: `x * sigmoid(x)`."""

import torch
from torch.nn import functional as tF

from llm_basics.learn import probes

step = probes.Step("silu")
draw = probes.numbers(seed=1)

# without gradients, so that what works in place can be seen to change its input
step.compare(
    "numbers around 0",
    lambda a, x: a.run_silu(x),
    lambda x: tF.silu(x),
    {"x": torch.linspace(-4, 4, 17)},
    axes="entry",
    gradients=False,
)
step.compare(
    "numbers around 0, and their gradient",
    lambda a, x: a.run_silu(x),
    lambda x: tF.silu(x),
    {"x": 3 * draw(2, 3, 5)},
    axes="batch position feature",
)
# exp(88.8) is more than float32 can hold
step.compare(
    "large numbers, of both signs",
    lambda a, x: a.run_silu(x),
    lambda x: tF.silu(x),
    {"x": torch.tensor([-1e4, -800.0, -100.0, 100.0, 800.0, 1e4])},
    axes="entry",
    gradients=False,
)
step.compare(
    "the gradient of large numbers",
    lambda a, x: a.run_silu(x),
    lambda x: tF.silu(x),
    {"x": torch.tensor([-1e4, -800.0, -100.0, 100.0, 800.0, 1e4])},
    axes="entry",
)
step.compare(
    "bfloat16",
    lambda a, x: a.run_silu(x),
    lambda x: tF.silu(x),
    {"x": torch.linspace(-4, 4, 17).bfloat16()},
    axes="entry",
    rtol=2e-2,
    atol=1e-2,
    gradients=False,
)


@step.mistake("functional.silu", source="public solutions of CS336; passes its suite")
def quotient_of_exponentials(x):
    """x e^x / (1 + e^x) is right on paper, but e^x overflows above 88, and inf / inf is NaN. Use
    torch.sigmoid, which knows both ends."""
    return x * torch.exp(x) / (1 + torch.exp(x))


@step.mistake("functional.silu", source="written for this catalogue")
def sigmoid_written_out(x):
    """x / (1 + e^-x) gives the right output, but e^-x overflows below -88, and its gradient is then 0 * inf,
    which is NaN. One such number ends a training; use torch.sigmoid."""
    return x / (1 + torch.exp(-x))


@step.mistake("functional.silu", source="written for this catalogue")
def sigmoid_alone(x):
    """The factor x is missing: this is the sigmoid, between 0 and 1. SiLU is x * sigmoid(x), which grows like
    x for large x."""
    return torch.sigmoid(x)


@step.mistake("functional.silu", source="written for this catalogue")
def sigmoid_of_minus_x(x):
    """The sign in the exponent is lost: 1 / (1 + e^x) is the sigmoid of -x. Large numbers are then closed off
    and small ones pass; use torch.sigmoid(x)."""
    return x * torch.sigmoid(-x)


@step.mistake("functional.silu", source="written for this catalogue")
def relu_instead(x):
    """This is ReLU, which cuts off at 0. SiLU is smooth and dips below 0 on the left: x * sigmoid(x)."""
    return torch.relu(x)


@step.mistake("functional.silu", source="written for this catalogue")
def gelu_instead(x):
    """This is GELU, x * Phi(x) with the normal distribution. It has a similar shape, but SiLU takes the
    sigmoid: x * sigmoid(x)."""
    return tF.gelu(x)


@step.mistake("functional.silu", source="written for this catalogue")
def quick_gelu_instead(x):
    """x * sigmoid(1.702 x) is the quick approximation of GELU. SiLU has no such factor: x * sigmoid(x)."""
    return x * torch.sigmoid(1.702 * x)


@step.mistake("functional.silu", source="written for this catalogue")
def tanh_for_sigmoid(x):
    """tanh stands where the sigmoid should. It goes from -1 to 1 and makes the result even, so negative
    numbers come out positive; use torch.sigmoid."""
    return x * torch.tanh(x)


@step.mistake("functional.silu", source="written for this catalogue")
def mish_instead(x):
    """x * tanh(softplus(x)) is Mish, a relative with almost the same curve. SiLU is x * sigmoid(x)."""
    return x * torch.tanh(tF.softplus(x))


@step.mistake("functional.silu", source="written for this catalogue")
def hard_swish_instead(x):
    """x * relu6(x + 3) / 6 is hard swish, which replaces the sigmoid by straight lines. Exactly 0 below -3
    and x above 3, it loses the tails; use torch.sigmoid."""
    return tF.hardswish(x)


@step.mistake("functional.silu", source="written for this catalogue")
def sigmoid_detached(x):
    """The output is right, but the sigmoid is a constant to autograd: .detach(), .data or no_grad cut it off.
    The gradient then lacks the term x * sigmoid'(x)."""
    return x * torch.sigmoid(x).detach()


@step.mistake("functional.silu", source="written for this catalogue")
def input_changed_in_place(x):
    """The result is written over the input (mul_ or *=). Whoever uses x again, such as a residual connection,
    gets the wrong numbers. Make a new tensor: x * torch.sigmoid(x)."""
    return x.mul_(torch.sigmoid(x))


@step.mistake("functional.silu", source="written for this catalogue")
def result_left_in_float32(x):
    """The result is float32 whatever came in. A model in half precision then fails at the next layer, or
    quietly runs at twice the size. Convert back to x.dtype at the end."""
    return tF.silu(x.float())
