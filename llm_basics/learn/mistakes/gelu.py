"""GELU: `x * Phi(x)` with the normal distribution, exactly or by tanh."""

import math

import torch
from torch.nn import functional as tF

from llm_basics.core import functional as F
from llm_basics.learn import probes

step = probes.Step("gelu")
draw = probes.numbers(seed=1)

# without gradients, so that what works in place can be seen to change its input
step.compare(
    "numbers around 0, exactly",
    lambda a, x: a.run_gelu(x),
    lambda x: tF.gelu(x),
    {"x": torch.linspace(-4, 4, 17)},
    axes="entry",
    gradients=False,
)
step.compare(
    "numbers around 0, by tanh",
    lambda a, x: a.run_gelu(x, "tanh"),
    lambda x: tF.gelu(x, approximate="tanh"),
    {"x": torch.linspace(-4, 4, 17)},
    axes="entry",
    gradients=False,
)
step.compare(
    "numbers around 0 exactly, and their gradient",
    lambda a, x: a.run_gelu(x),
    lambda x: tF.gelu(x),
    {"x": 3 * draw(2, 3, 5)},
    axes="batch position feature",
)
step.compare(
    "numbers around 0 by tanh, and their gradient",
    lambda a, x: a.run_gelu(x, "tanh"),
    lambda x: tF.gelu(x, approximate="tanh"),
    {"x": 3 * draw(2, 3, 5)},
    axes="batch position feature",
)
step.compare(
    "large numbers, of both signs",
    lambda a, x: a.run_gelu(x, "tanh"),
    lambda x: tF.gelu(x, approximate="tanh"),
    {"x": torch.tensor([-800.0, -100.0, -50.0, 50.0, 100.0, 800.0])},
    axes="entry",
)
# erf(x / sqrt(2)) is so near -1 here that bfloat16 has nothing in between
step.compare(
    "bfloat16 numbers far below 0",
    lambda a, x: a.run_gelu(x),
    lambda x: tF.gelu(x.double()).bfloat16(),
    {"x": torch.tensor([-4.0, -3.75, -3.5, 2.0]).bfloat16()},
    axes="entry",
    rtol=2e-2,
    atol=1e-8,
    gradients=False,
)


@step.mistake("functional.gelu", source="public solutions of CS336")
def tanh_where_exact_is_asked(x, approximate="none"):
    """The tanh approximation is always used. It differs by up to 5e-4, enough to change the results of
    pretrained models. Without approximate="tanh", use torch.erf."""
    return tF.gelu(x, approximate="tanh")


@step.mistake("functional.gelu", source="written for this catalogue")
def exact_where_tanh_is_asked(x, approximate="none"):
    """The argument is ignored, and erf is always used. GPT-2 was trained with the tanh form, which differs by
    up to 5e-4. Check approximate."""
    return tF.gelu(x)


@step.mistake("functional.gelu", source="written for this catalogue")
def quick_gelu_instead(x, approximate="none"):
    """x * sigmoid(1.702 x) is QuickGELU, which is off by up to 0.02. The exact form is x * Phi(x) with erf,
    and the approximation uses tanh and the cube of x."""
    return x * torch.sigmoid(1.702 * x)


@step.mistake("functional.gelu", source="written for this catalogue")
def silu_instead(x, approximate="none"):
    """This is SiLU, x * sigmoid(x). It has a similar shape, but GELU uses the normal distribution: x *
    Phi(x)."""
    return tF.silu(x)


@step.mistake("functional.gelu", source="written for this catalogue")
def relu_instead(x, approximate="none"):
    """This is ReLU, which is zero below 0. GELU is smooth and dips below 0 for negative x: x * Phi(x)."""
    return torch.relu(x)


def by(phi):
    """GELU with another Phi for the exact form."""
    return lambda x, approximate: (
        tF.gelu(x, approximate=approximate)
        if approximate == "tanh"
        else (x * phi(F.to_float32(x))).to(x.dtype)
    )


def by_tanh(phi):
    return lambda x, approximate: (
        (x * phi(F.to_float32(x))).to(x.dtype)
        if approximate == "tanh"
        else tF.gelu(x, approximate=approximate)
    )


@step.mistake("functional.gelu", source="written for this catalogue")
def erf_without_the_root_of_2(x, approximate="none"):
    """erf(x) belongs to a normal distribution of variance 1/2. For variance 1, x must be divided by sqrt(2):
    0.5 * (1 + erf(x / sqrt(2)))."""
    return by(lambda x: 0.5 * (1 + torch.erf(x)))(x, approximate)


@step.mistake("functional.gelu", source="written for this catalogue")
def erf_divided_by_the_root_of_pi(x, approximate="none"):
    """The argument of erf is x / sqrt(pi). The constants of the two forms are mixed up: erf takes x /
    sqrt(2), tanh takes sqrt(2 / pi) times its polynomial."""
    return by(lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(math.pi))))(x, approximate)


@step.mistake("functional.gelu", source="written for this catalogue")
def half_forgotten(x, approximate="none"):
    """The factor 0.5 is missing, so the result is twice too large. 1 + erf goes from 0 to 2; Phi, a
    probability, goes from 0 to 1."""
    return 2 * tF.gelu(x, approximate=approximate)


@step.mistake("functional.gelu", source="written for this catalogue")
def one_forgotten(x, approximate="none"):
    """The 1 is missing: 0.5 * erf goes from -0.5 to 0.5, and negative numbers come out positive. Phi is 0.5 *
    (1 + erf(x / sqrt(2)))."""
    return tF.gelu(x, approximate=approximate) - 0.5 * x


@step.mistake("functional.gelu", source="written for this catalogue")
def probability_alone(x, approximate="none"):
    """The factor x is missing: this is Phi(x), between 0 and 1. GELU is x * Phi(x), which grows like x for
    large x."""
    return torch.where(x == 0, 0.5, tF.gelu(x, approximate=approximate) / x)


@step.mistake("functional.gelu", source="written for this catalogue")
def density_for_distribution(x, approximate="none"):
    """Phi is computed as the density of the normal distribution, the bell curve. It must be the cumulative
    distribution, 0.5 * (1 + erf(x / sqrt(2))), which rises from 0 to 1."""
    return by(lambda x: torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi))(x, approximate)


@step.mistake("functional.gelu", source="written for this catalogue")
def no_root_of_2_over_pi(x, approximate="none"):
    """The tanh form has 2 / pi instead of its square root. It is tanh(sqrt(2 / pi) * (x + 0.044715 x^3))."""
    return by_tanh(lambda x: 0.5 * (1 + torch.tanh(2 / math.pi * (x + 0.044715 * x**3))))(x, approximate)


@step.mistake("functional.gelu", source="written for this catalogue")
def cube_outside_the_parenthesis(x, approximate="none"):
    """In the tanh form, sqrt(2 / pi) multiplies x but not the cube. It multiplies the whole sum: tanh(sqrt(2
    / pi) * (x + 0.044715 x^3))."""
    return by_tanh(lambda x: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * x + 0.044715 * x**3)))(
        x, approximate
    )


@step.mistake("functional.gelu", source="written for this catalogue")
def square_for_cube(x, approximate="none"):
    """The tanh form has x^2 instead of x^3. With the square, the argument is no longer odd, and positive and
    negative numbers are treated differently."""
    return by_tanh(lambda x: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**2))))(
        x, approximate
    )


@step.mistake("functional.gelu", source="written for this catalogue")
def coefficient_ten_times_too_large(x, approximate="none"):
    """The tanh form has 0.44715 instead of 0.044715: a zero is missing. Compare with tanh(sqrt(2 / pi) * (x +
    0.044715 x^3))."""
    return by_tanh(lambda x: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.44715 * x**3))))(
        x, approximate
    )


@step.mistake("functional.gelu", source="written for this catalogue")
def cube_forgotten(x, approximate="none"):
    """The tanh form lacks the cubic term, without which it is off by up to 0.03. It is tanh(sqrt(2 / pi) * (x
    + 0.044715 x^3))."""
    return by_tanh(lambda x: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * x)))(x, approximate)


@step.mistake("functional.gelu", source="written for this catalogue")
def tanh_by_exponentials(x, approximate="none"):
    """tanh is computed as (e^u - e^-u) / (e^u + e^-u), which is inf / inf = NaN as soon as e^u overflows. Use
    torch.tanh, which is stable on both sides."""

    def phi(x):
        u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return 0.5 * (1 + (u.exp() - (-u).exp()) / (u.exp() + (-u).exp()))

    return by_tanh(phi)(x, approximate)


@step.mistake("functional.gelu", source="written for this catalogue")
def computed_in_half_precision(x, approximate="none"):
    """In bfloat16, 1 + erf loses nearly all digits where erf is near -1, so the left tail becomes steps or
    zeros. Convert to float32 first, and back at the end."""
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


@step.mistake("functional.gelu", source="written for this catalogue")
def result_left_in_float32(x, approximate="none"):
    """The result is float32 whatever the dtype of the input. A half-precision model then fails at the next
    layer, or uses twice the memory. Convert back to x.dtype at the end."""
    return tF.gelu(x.float(), approximate=approximate)


@step.mistake("functional.gelu", source="written for this catalogue")
def probability_detached(x, approximate="none"):
    """The output is correct, but Phi(x) is detached by .detach(), .data or no_grad, so the gradient lacks the
    term x * Phi'(x)."""
    with torch.no_grad():
        phi = torch.where(x == 0, 0.5, tF.gelu(F.to_float32(x), approximate=approximate) / x)
    return (x * phi).to(x.dtype)


@step.mistake("functional.gelu", source="written for this catalogue")
def input_changed_in_place(x, approximate="none"):
    """The result overwrites the input (mul_ or *=). Code that uses x again, such as a residual connection,
    gets wrong values. Make a new tensor."""
    return x.copy_(tF.gelu(x, approximate=approximate))


step.factor("functional.gelu")
