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
    contract="silu",
)
step.compare(
    "numbers around 0, and their gradient",
    lambda a, x: a.run_silu(x),
    lambda x: tF.silu(x),
    {"x": 3 * draw(2, 3, 5)},
    axes="batch position feature",
    contract="silu",
)
# exp(88.8) is more than float32 can hold
step.compare(
    "large numbers, of both signs",
    lambda a, x: a.run_silu(x),
    lambda x: tF.silu(x),
    {"x": torch.tensor([-1e4, -800.0, -100.0, 100.0, 800.0, 1e4])},
    axes="entry",
    gradients=False,
    contract="silu",
)
step.compare(
    "the gradient of large numbers",
    lambda a, x: a.run_silu(x),
    lambda x: tF.silu(x),
    {"x": torch.tensor([-1e4, -800.0, -100.0, 100.0, 800.0, 1e4])},
    axes="entry",
    beyond="x / (1 + exp(-x)) is right for large numbers, but its gradient is NaN below -88",
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
    beyond="the public tests have float32 alone; models of half precision need its dtype",
)


@step.mistake("functional.silu", source="public solutions of CS336; passes its suite")
def quotient_of_exponentials(x):
    """x e^x / (1 + e^x) is right on paper, but e^x overflows above 88, and inf / inf is NaN. Use
    torch.sigmoid, which is stable on both sides."""
    return x * torch.exp(x) / (1 + torch.exp(x))


@step.mistake("functional.silu", source="written for this catalogue")
def sigmoid_written_out(x):
    """x / (1 + e^-x) gives the right output, but e^-x overflows below -88, where the gradient is 0 * inf =
    NaN. A single such number ruins a training run. Use torch.sigmoid."""
    return x / (1 + torch.exp(-x))


@step.mistake("functional.silu", source="written for this catalogue")
def sigmoid_alone(x):
    """The factor x is missing: this is the sigmoid, between 0 and 1. SiLU is x * sigmoid(x), which grows like
    x for large x."""
    return torch.sigmoid(x)


@step.mistake("functional.silu", source="written for this catalogue")
def sigmoid_of_minus_x(x):
    """The sign of the exponent is wrong: 1 / (1 + e^x) is the sigmoid of -x, so large numbers are suppressed
    and very negative ones pass. Use torch.sigmoid(x)."""
    return x * torch.sigmoid(-x)


@step.mistake("functional.silu", source="written for this catalogue")
def relu_instead(x):
    """This is ReLU, which is zero below 0. SiLU is smooth and dips below 0 for negative x: x * sigmoid(x)."""
    return torch.relu(x)


@step.mistake("functional.silu", source="written for this catalogue")
def gelu_instead(x):
    """This is GELU, x * Phi(x) with the normal distribution. It has a similar shape, but SiLU uses the
    sigmoid: x * sigmoid(x)."""
    return tF.gelu(x)


@step.mistake("functional.silu", source="written for this catalogue")
def quick_gelu_instead(x):
    """x * sigmoid(1.702 x) is QuickGELU, an approximation of GELU. SiLU has no such factor: x *
    sigmoid(x)."""
    return x * torch.sigmoid(1.702 * x)


@step.mistake("functional.silu", source="written for this catalogue")
def tanh_for_sigmoid(x):
    """tanh is used instead of the sigmoid. It goes from -1 to 1, which makes the function even, so negative
    numbers come out positive. Use torch.sigmoid."""
    return x * torch.tanh(x)


@step.mistake("functional.silu", source="written for this catalogue")
def mish_instead(x):
    """x * tanh(softplus(x)) is Mish, a related function with almost the same curve. SiLU is x *
    sigmoid(x)."""
    return x * torch.tanh(tF.softplus(x))


@step.mistake("functional.silu", source="written for this catalogue")
def hard_swish_instead(x):
    """x * relu6(x + 3) / 6 is hard swish, which replaces the sigmoid by straight lines: exactly 0 below -3,
    exactly x above 3. Use torch.sigmoid."""
    return tF.hardswish(x)


@step.mistake("functional.silu", source="written for this catalogue")
def sigmoid_detached(x):
    """The output is correct, but the sigmoid is detached by .detach(), .data or no_grad, so the gradient
    lacks the term x * sigmoid'(x)."""
    return x * torch.sigmoid(x).detach()


@step.mistake("functional.silu", source="written for this catalogue")
def input_changed_in_place(x):
    """The result overwrites the input (mul_ or *=). Code that uses x again, such as a residual connection,
    gets wrong values. Make a new tensor: x * torch.sigmoid(x)."""
    return x.mul_(torch.sigmoid(x))


@step.mistake("functional.silu", source="written for this catalogue")
def result_left_in_float32(x):
    """The result is float32 whatever the dtype of the input. A half-precision model then fails at the next
    layer, or uses twice the memory. Convert back to x.dtype at the end."""
    return tF.silu(x.float())


step.factor("functional.silu")
