"""LayerNorm: `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last axis."""

import torch
from torch.nn import functional as tF

from llm_basics.core import functional as F
from llm_basics.learn import grids, probes

step = probes.Step("layer_norm")
draw = probes.numbers(seed=3)

# away from mean 0
ROWS = 0.5 + draw(2, 4, 7)


def by_torch(x, weight, bias):
    return tF.layer_norm(x, (7,), weight, bias, eps=1e-2)


step.compare(
    "rows of ordinary scale",
    lambda a, x, weight, bias: a.run_layernorm(7, 1e-2, weight, bias, x),
    by_torch,
    {"x": ROWS},
    {"weight": draw(7), "bias": draw(7)},
    axes="batch row feature",
    gradients=False,
)

# ordinary rows, large ones, small ones, and tiny ones below sqrt(eps)
step.compare(
    "rows of very different scale",
    lambda a, x, weight, bias: a.run_layernorm(7, 1e-2, weight, bias, x),
    by_torch,
    {"x": ROWS * torch.tensor([1, 50, 0.1, 3e-3]).reshape(4, 1)},
    {"weight": draw(7), "bias": draw(7)},
    axes="batch row feature",
)

step.compare(
    "a constant row",
    lambda a, x, weight, bias: a.run_layernorm(8, 1e-2, weight, bias, x),
    lambda x, weight, bias: bias.expand(1, 8).clone(),
    {"x": torch.full((1, 8), 3.0)},
    {"weight": draw(8), "bias": draw(8)},
    axes="row feature",
    gradients=False,
)

# in float32 the squares of these numbers keep nothing of what is added to 2^14, in whatever order they are
# summed, while their mean is exact
step.compare(
    "numbers close together and far from zero",
    lambda a, x, weight, bias: a.run_layernorm(8, 1e-5, weight, bias, x),
    lambda x, weight, bias: tF.layer_norm(x.double(), (8,), weight.double(), bias.double(), eps=1e-5).to(
        x.dtype
    ),
    {"x": 2.0**14 + torch.tensor([[1.0, -1, 2, -2, 1, 1, -1, -1], [2, 2, -2, -1, -1, 1, 1, -2]])},
    {"weight": draw(8), "bias": draw(8)},
    axes="row feature",
    rtol=1e-3,
    atol=1e-3,
    gradients=False,
)

# the square of 256 is more than float16 can hold
step.compare(
    "float16 numbers of 300 and more",
    lambda a, x, weight, bias: a.run_layernorm(64, 1e-5, weight, bias, x),
    lambda x, weight, bias: tF.layer_norm(x.float(), (64,), weight.float(), bias.float(), eps=1e-5).half(),
    {"x": (300 * draw(3, 64)).half()},
    {"weight": (1 + 0.1 * draw(64)).half(), "bias": draw(64).half()},
    axes="row feature",
    rtol=4e-3,
    atol=4e-3,
    gradients=False,
)


def centered(x):
    wide = F.to_float32(x)
    return wide - wide.mean(-1, keepdim=True)


def divisor(x, eps):
    return torch.sqrt(centered(x).square().mean(-1, keepdim=True) + eps)


@step.mistake("functional.layer_norm", source="written for this catalogue")
def variance_divided_by_one_less(x, weight, bias=None, eps=1e-5):
    """x.var() and x.std() divide by d_model - 1 by default. LayerNorm divides by d_model: pass correction=0
    (or unbiased=False)."""
    root = torch.sqrt(F.to_float32(x).var(-1, keepdim=True) + eps)
    return (centered(x) / root * weight + bias).to(x.dtype)


@step.mistake("functional.layer_norm", source="The Annotated Transformer (Harvard NLP, 2018)")
def standard_deviation_plus_epsilon(x, weight, bias=None, eps=1e-5):
    """The divisor is x.std() + eps, which is wrong twice: x.std() divides by d_model - 1, and eps belongs
    inside the root, added to the variance."""
    return (centered(x) / (F.to_float32(x).std(-1, keepdim=True) + eps) * weight + bias).to(x.dtype)


@step.mistake("functional.layer_norm", source="public solutions of CS336")
def epsilon_outside_the_root(x, weight, bias=None, eps=1e-5):
    """eps is added to the root instead of to the variance inside it, which changes the result for rows with
    little variance. Check where the sqrt closes its parenthesis."""
    return (centered(x) / (divisor(x, 0.0) + eps) * weight + bias).to(x.dtype)


@step.mistake("functional.layer_norm", source="public solutions of CS336")
def no_epsilon(x, weight, bias=None, eps=1e-5):
    """eps is not used, so a constant row gives 0/0 = NaN, and rows with little variance are blown up. Add eps
    to the variance, inside the root."""
    return (centered(x) / divisor(x, 0.0) * weight + bias).to(x.dtype)


@step.mistake("functional.layer_norm", source="written for this catalogue")
def epsilon_fixed(x, weight, bias=None, eps=1e-5):
    """eps is fixed at 1e-5, whatever is passed. Models differ in it; use the argument, and check that the
    layer stores it as self.eps."""
    return (centered(x) / divisor(x, 1e-5) * weight + bias).to(x.dtype)


@step.mistake("functional.layer_norm", source="written for this catalogue")
def root_forgotten(x, weight, bias=None, eps=1e-5):
    """The divisor is the variance instead of its root. An input twice as large must give the same output, but
    gives half of it. Take the sqrt, or use rsqrt."""
    return (centered(x) / divisor(x, eps).square() * weight + bias).to(x.dtype)


@step.mistake("functional.layer_norm", source="public solutions of CS336")
def sum_instead_of_mean(x, weight, bias=None, eps=1e-5):
    """The squared deviations are summed without dividing by d_model, so the output is too small by a factor
    of sqrt(d_model). The variance is their mean."""
    root = torch.sqrt(centered(x).square().sum(-1, keepdim=True) + eps)
    return (centered(x) / root * weight + bias).to(x.dtype)


@step.mistake("functional.layer_norm", source="written for this catalogue")
def axes_of_size_1_removed(x, weight, bias=None, eps=1e-5):
    """squeeze() without an axis removes every axis of size 1, so a batch of one or a single token has another
    shape than any other. Take mean and variance with keepdim=True, and drop the squeeze."""
    return (centered(x) / divisor(x, eps) * weight + bias).to(x.dtype).squeeze()


@step.mistake("functional.layer_norm", source="written for this catalogue")
def mean_not_subtracted(x, weight, bias=None, eps=1e-5):
    """The variance is right, but the mean is not subtracted from the result. Subtract it from x before
    dividing, as in the variance."""
    return (F.to_float32(x) / divisor(x, eps) * weight + bias).to(x.dtype)


@step.mistake("functional.layer_norm", source="written for this catalogue")
def no_mean_at_all(x, weight, bias=None, eps=1e-5):
    """This is RMSNorm with a bias: the mean is not subtracted, neither from x nor in the variance. LayerNorm
    does both."""
    wide = F.to_float32(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight + bias).to(x.dtype)


@step.mistake("functional.layer_norm", source="written for this catalogue")
def mean_missing_in_the_variance(x, weight, bias=None, eps=1e-5):
    """The mean is subtracted from x, but the variance is computed as the mean of x squared. Square the
    deviations from the mean instead."""
    root = torch.sqrt(F.to_float32(x).square().mean(-1, keepdim=True) + eps)
    return (centered(x) / root * weight + bias).to(x.dtype)


@step.mistake("functional.layer_norm", source="public solutions of CS336")
def mean_over_the_sequence_too(x, weight, bias=None, eps=1e-5):
    """Mean and variance are taken over all positions of a sequence, so each position depends on later ones.
    Take them over the last axis only, with keepdim."""
    wide = F.to_float32(x)
    rest = wide - wide.mean((-2, -1), keepdim=True)
    root = torch.sqrt(rest.square().mean((-2, -1), keepdim=True) + eps)
    return (rest / root * weight + bias).to(x.dtype)


@step.mistake("functional.layer_norm", source="written for this catalogue")
def mean_over_the_batch(x, weight, bias=None, eps=1e-5):
    """Mean and variance are taken over the first axis, which is batch normalization. LayerNorm normalizes
    each vector separately: use the last axis."""
    wide = F.to_float32(x)
    rest = wide - wide.mean(0)
    return (rest / torch.sqrt(rest.square().mean(0) + eps) * weight + bias).to(x.dtype)


@step.mistake("functional.layer_norm", source="public solutions of CS336")
def gain_forgotten(x, weight, bias=None, eps=1e-5):
    """The result is not multiplied by the learned weight. Weights are 1 at initialization, so this only shows
    after training, or with pretrained weights."""
    return (centered(x) / divisor(x, eps) + bias).to(x.dtype)


@step.mistake("functional.layer_norm", source="public solutions of CS336")
def one_added_to_the_gain(x, weight, bias=None, eps=1e-5):
    """The result is multiplied by 1 + weight, which is for weights that start at 0. Here they start at 1;
    multiply by the weight itself."""
    return (centered(x) / divisor(x, eps) * (1 + weight) + bias).to(x.dtype)


@step.mistake("functional.layer_norm", source="public solutions of CS336")
def bias_forgotten(x, weight, bias=None, eps=1e-5):
    """The learned bias is not added. It is 0 at initialization, so this only shows after training, or with
    pretrained weights."""
    return (centered(x) / divisor(x, eps) * weight).to(x.dtype)


@step.mistake("functional.layer_norm", source="written for this catalogue")
def bias_added_before_the_gain(x, weight, bias=None, eps=1e-5):
    """The bias is added before the multiplication by the weight, and thus scaled too. Scale first, then
    shift: normalized * weight + bias."""
    return ((centered(x) / divisor(x, eps) + bias) * weight).to(x.dtype)


@step.mistake("functional.layer_norm", source="written for this catalogue")
def gain_and_bias_exchanged(x, weight, bias=None, eps=1e-5):
    """Weight and bias are swapped: the bias multiplies and the weight is added. Check the order in which the
    layer passes or assigns them."""
    return (centered(x) / divisor(x, eps) * bias + weight).to(x.dtype)


@step.mistake("functional.layer_norm", source="public solutions of CS336")
def input_changed_in_place(x, weight, bias=None, eps=1e-5):
    """The caller's tensor is modified in place, and with it the residual stream that is added later. Look for
    -=, /= or a method with a trailing underscore, and make a new tensor."""
    root = divisor(x, eps)
    x -= F.to_float32(x).mean(-1, keepdim=True).to(x.dtype)
    return (F.to_float32(x) / root * weight + bias).to(x.dtype)


@step.mistake("functional.layer_norm", source="public solutions of CS336; passes its suite")
def no_float32_for_the_squares(x, weight, bias=None, eps=1e-5):
    """The squares are computed in the dtype of the input. In float16 the square of 256 overflows to inf, and
    the whole row is lost. Convert x to float32 first."""
    rest = x - x.mean(-1, keepdim=True)
    return rest * torch.rsqrt(rest.square().mean(-1, keepdim=True) + eps) * weight + bias


@step.mistake("functional.layer_norm", source="public solutions of CS336; passes its suite")
def result_left_in_float32(x, weight, bias=None, eps=1e-5):
    """Mean and variance are computed in float32, which is right, but the result stays in it. A half-precision
    model then continues in float32 or fails. Convert back to x.dtype at the end."""
    return centered(x) / divisor(x, eps) * weight + bias


@step.mistake("functional.layer_norm", source="written for this catalogue")
def mean_square_minus_squared_mean(x, weight, bias=None, eps=1e-5):
    """The variance is computed as mean(x^2) - mean(x)^2, a difference of two large, nearly equal numbers that
    cancels most digits of float32. Subtract the mean from x first, then square."""
    wide = F.to_float32(x)
    variance = wide.square().mean(-1, keepdim=True) - wide.mean(-1, keepdim=True).square()
    return (centered(x) * torch.rsqrt(variance + eps) * weight + bias).to(x.dtype)


@step.mistake("functional.layer_norm", source="written for this catalogue")
def mean_and_variance_detached(x, weight, bias=None, eps=1e-5):
    """The output is correct, but mean and variance are constants in the gradient. Both depend on x; look for
    .detach(), .item() or torch.no_grad() around them."""
    wide = F.to_float32(x)
    root = divisor(x, eps).detach()
    return ((wide - wide.mean(-1, keepdim=True).detach()) / root * weight + bias).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# Mistakes with a parameter that is found from the observations


@step.family("functional.layer_norm", grids.powers(1e-12, 10))
def epsilon_fixed_at_a_number(value):
    """Your epsilon is {value} where 0.01 is passed. Models differ in it; use the argument, and check that the
    layer stores it as self.eps."""
    return lambda x, weight, bias=None, eps=1e-5: (centered(x) / divisor(x, value) * weight + bias).to(
        x.dtype
    )


def over(mean_axis, variance_axis):
    def wrong(x, weight, bias=None, eps=1e-5):
        wide = F.to_float32(x)
        rest = wide - wide.mean(mean_axis, keepdim=True)
        root = torch.sqrt(wide.var(variance_axis, correction=0, keepdim=True) + eps)
        return (rest / root * weight + bias).to(x.dtype)

    return wrong


@step.family("functional.layer_norm", grids.AXES, unknown="another axis")
def mean_and_variance_over_another_axis(value):
    """Mean and variance are taken over {value} instead of the last axis, so vectors of different tokens
    change each other. Each vector is normalized by itself: take both over axis -1, with keepdim."""
    return over(value, value)


@step.family("functional.layer_norm", grids.AXES, unknown="another axis")
def variance_over_another_axis(value):
    """The variance is taken over {value}, the mean over the last axis, as it must be. Each vector is
    normalized by itself: take both over axis -1, with keepdim."""
    return over(-1, value)


@step.family("functional.layer_norm", grids.AXES, unknown="another axis")
def mean_over_another_axis(value):
    """The mean is taken over {value}, the variance over the last axis, as it must be. Each vector is
    normalized by itself: take both over axis -1, with keepdim."""
    return over(value, -1)


step.factor("functional.layer_norm")
