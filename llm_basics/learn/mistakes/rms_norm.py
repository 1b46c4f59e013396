"""RMSNorm: `x / sqrt(mean(x^2) + eps) * weight` over the last axis."""

import torch
from torch.nn import functional as tF

from llm_basics.core import functional as F
from llm_basics.learn import grids, probes

step = probes.Step("rms_norm")
draw = probes.numbers(seed=1)

# away from mean 0
ROWS = 0.5 + draw(2, 4, 7)

step.compare(
    "rows of ordinary scale",
    lambda a, x, weight: a.run_rmsnorm(7, 1e-2, weight, x),
    lambda x, weight: tF.rms_norm(x, (7,), weight, eps=1e-2),
    {"x": ROWS},
    {"weight": draw(7)},
    axes="batch row feature",
    gradients=False,
    contract="rms_norm",
)

# ordinary rows, large ones, small ones, and tiny ones below sqrt(eps)
step.compare(
    "rows of very different scale",
    lambda a, x, weight: a.run_rmsnorm(7, 1e-2, weight, x),
    lambda x, weight: tF.rms_norm(x, (7,), weight, eps=1e-2),
    {"x": ROWS * torch.tensor([1, 50, 0.1, 3e-3]).reshape(4, 1)},
    {"weight": draw(7)},
    axes="batch row feature",
    contract="rms_norm",
)

step.compare(
    "a row of zeros",
    lambda a, x, weight: a.run_rmsnorm(7, 1e-2, weight, x),
    lambda x, weight: tF.rms_norm(x, (7,), weight, eps=1e-2),
    {"x": torch.zeros(1, 1, 7)},
    {"weight": draw(7)},
    axes="batch row feature",
    contract="rms_norm",
)

# the square of 256 is more than float16 can hold
step.compare(
    "float16 numbers of 300 and more",
    lambda a, x, weight: a.run_rmsnorm(64, 1e-5, weight, x),
    lambda x, weight: tF.rms_norm(x.float(), (64,), weight.float(), eps=1e-5).half(),
    {"x": (300 * (1 + draw(3, 64).abs())).half()},
    {"weight": (1 + 0.1 * draw(64)).half()},
    axes="row feature",
    rtol=4e-3,
    atol=1e-3,
    gradients=False,
    beyond="the public test has float32 alone; in float16 the square of 256 is inf",
)


step.weight_gradients(
    "the gradient of the gain",
    lambda a, x, weight: a.run_rmsnorm(7, 1e-2, weight, x),
    lambda x, weight: tF.rms_norm(x, (7,), weight, eps=1e-2),
    {"x": ROWS},
    {"weight": draw(7)},
)


def normalized(x, eps):
    wide = F.to_float32(x)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


@step.mistake("functional.rms_norm", source="public solutions of CS336")
def epsilon_outside_the_root(x, weight, eps=1e-5):
    """eps is added to the root instead of to the mean square inside it. Rows near zero then differ from what
    pretrained weights expect; check where the sqrt closes its parenthesis."""
    wide = F.to_float32(x)
    return (wide / (wide.square().mean(-1, keepdim=True).sqrt() + eps) * weight).to(x.dtype)


@step.mistake("functional.rms_norm", source="public solutions of CS336")
def no_epsilon(x, weight, eps=1e-5):
    """eps is not used, so a row of zeros gives 0/0 = NaN, and tiny rows are blown up. Add eps to the mean
    square, inside the root."""
    return (normalized(x, 0.0) * weight).to(x.dtype)


@step.mistake("functional.rms_norm", source="written for this catalogue")
def epsilon_fixed(x, weight, eps=1e-5):
    """eps is fixed at 1e-5, whatever is passed. Models use 1e-5 or 1e-6; use the argument, and check that the
    layer stores it as self.eps."""
    return (normalized(x, 1e-5) * weight).to(x.dtype)


@step.mistake("functional.rms_norm", source="written for this catalogue")
def larger_of_root_and_epsilon(x, weight, eps=1e-5):
    """eps is used as a lower bound of the root, as in torch's normalize. RMSNorm adds eps to the mean square,
    which also scales small rows down."""
    wide = F.to_float32(x)
    return (wide / wide.square().mean(-1, keepdim=True).sqrt().clamp(min=eps) * weight).to(x.dtype)


@step.mistake("functional.rms_norm", source="written for this catalogue")
def root_forgotten(x, weight, eps=1e-5):
    """The divisor is the mean square instead of its root. An input twice as large must give the same output,
    but gives half of it. Take the sqrt, or use rsqrt."""
    wide = F.to_float32(x)
    return (wide / (wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


@step.mistake("functional.rms_norm", source="public solutions of CS336")
def sum_instead_of_mean(x, weight, eps=1e-5):
    """The squares are summed, as in a vector's norm, so the output is too small by a factor of sqrt(d_model).
    The mean square divides the sum by d_model."""
    wide = F.to_float32(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps) * weight).to(x.dtype)


@step.mistake("functional.rms_norm", source="written for this catalogue")
def mean_square_over_one_less(x, weight, eps=1e-5):
    """The sum of the squares is divided by d_model - 1, as in x.var() and x.std() by default. RMSNorm takes
    their mean, over all d_model of them: x.square().mean(-1, keepdim=True)."""
    wide = F.to_float32(x)
    squares = wide.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)
    return (wide * torch.rsqrt(squares + eps) * weight).to(x.dtype)


@step.mistake("functional.rms_norm", source="written for this catalogue")
def axes_of_size_1_removed(x, weight, eps=1e-5):
    """squeeze() without an axis removes every axis of size 1, so a batch of one or a single token has another
    shape than any other. Take the mean with keepdim=True, and drop the squeeze."""
    return (normalized(x, eps) * weight).to(x.dtype).squeeze()


@step.mistake("functional.rms_norm", source="written for this catalogue")
def absolute_values_instead_of_squares(x, weight, eps=1e-5):
    """The divisor is the mean of absolute values. The root mean square is the root of the mean of the
    squares."""
    wide = F.to_float32(x)
    return (wide / (wide.abs().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


@step.mistake("functional.rms_norm", source="public solutions of CS336")
def mean_over_the_sequence_too(x, weight, eps=1e-5):
    """One mean is taken over all positions of a sequence, so each position depends on later ones. Take the
    mean over the last axis only, with keepdim."""
    wide = F.to_float32(x)
    return (wide * torch.rsqrt(wide.square().mean((-2, -1), keepdim=True) + eps) * weight).to(x.dtype)


@step.mistake("functional.rms_norm", source="written for this catalogue")
def one_mean_for_all(x, weight, eps=1e-5):
    """The mean is taken over all axes, which gives one number for the whole batch, so sequences influence
    each other. Take it over the last axis: mean(-1, keepdim=True)."""
    wide = F.to_float32(x)
    return (wide * torch.rsqrt(wide.square().mean() + eps) * weight).to(x.dtype)


@step.mistake("functional.rms_norm", source="written for this catalogue")
def mean_over_the_batch(x, weight, eps=1e-5):
    """The mean is taken over the first axis, as in batch normalization. Each vector is normalized separately:
    mean(-1, keepdim=True)."""
    wide = F.to_float32(x)
    return (wide * torch.rsqrt(wide.square().mean(0, keepdim=True) + eps) * weight).to(x.dtype)


@step.mistake("functional.rms_norm", source="public solutions of CS336")
def mean_subtracted(x, weight, eps=1e-5):
    """The mean is subtracted first, which makes it LayerNorm. RMSNorm does not subtract the mean and only
    divides by the root mean square."""
    wide = F.to_float32(x)
    return (normalized(wide - wide.mean(-1, keepdim=True), eps) * weight).to(x.dtype)


@step.mistake("functional.rms_norm", source="written for this catalogue")
def divided_by_the_standard_deviation(x, weight, eps=1e-5):
    """The divisor is the standard deviation, in which the mean is subtracted. The root mean square is that of
    x itself: use x.square().mean(), not x.var() or x.std()."""
    wide = F.to_float32(x)
    return (wide * torch.rsqrt(wide.var(-1, keepdim=True) + eps) * weight).to(x.dtype)


@step.mistake("functional.rms_norm", source="public solutions of CS336")
def gain_forgotten(x, weight, eps=1e-5):
    """The result is not multiplied by the learned weight. Weights are 1 at initialization, so this only shows
    after training, or with pretrained weights."""
    return normalized(x, eps).to(x.dtype)


@step.mistake("functional.rms_norm", source="public solutions of CS336")
def one_added_to_the_gain(x, weight, eps=1e-5):
    """The result is multiplied by 1 + weight, as in Gemma, whose weights start at 0. Here they start at 1;
    multiply by the weight itself."""
    return (normalized(x, eps) * (1 + weight)).to(x.dtype)


@step.mistake("functional.rms_norm", source="written for this catalogue")
def gain_before_the_mean(x, weight, eps=1e-5):
    """x is multiplied by the gain before the root mean square is taken, which normalizes most of it away.
    Normalize first, then multiply by the weight."""
    return normalized(F.to_float32(x) * weight, eps).to(x.dtype)


@step.mistake("functional.rms_norm", source="public solutions of CS336")
def input_changed_in_place(x, weight, eps=1e-5):
    """The caller's tensor is modified in place, and with it the residual stream that is added later. Look for
    *=, /= or a method with a trailing underscore, and make a new tensor."""
    x *= torch.rsqrt(F.to_float32(x).square().mean(-1, keepdim=True) + eps).to(x.dtype)
    return x * weight


@step.mistake("functional.rms_norm", source="public solutions of CS336; passes its suite")
def no_float32_for_the_squares(x, weight, eps=1e-5):
    """The squares are computed in the dtype of the input. In float16 the square of 256 overflows to inf, and
    the whole row becomes 0. Convert x to float32 before squaring."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@step.mistake("functional.rms_norm", source="public solutions of CS336; passes its suite")
def result_left_in_float32(x, weight, eps=1e-5):
    """The mean is computed in float32, which is right, but the result stays in it. A half-precision model
    then continues in float32 or fails. Convert back to x.dtype at the end."""
    return normalized(x, eps) * F.to_float32(weight)


@step.mistake("functional.rms_norm", source="written for this catalogue")
def root_detached(x, weight, eps=1e-5):
    """The output is correct, but the root mean square is a constant in the gradient. It depends on x; look
    for .detach(), .item() or torch.no_grad() around it."""
    wide = F.to_float32(x)
    root = torch.sqrt(wide.square().mean(-1, keepdim=True) + eps).detach()
    return (wide / root * weight).to(x.dtype)


@step.mistake("functional.rms_norm", source="written for this catalogue")
def gain_read_through_data(x, weight, eps=1e-5):
    """The output is correct, but the gain is read as .data or a copy, so it gets no gradient and stays at 1.
    Use the parameter itself."""
    return (normalized(x, eps) * weight.data).to(x.dtype)


@step.mistake("functional.rms_norm", source="written for this catalogue")
def gradient_of_the_gain_doubled(x, weight, eps=1e-5):
    """The output is correct, but the gradient of the gain is twice what it must be. Look for a hook, a custom
    backward pass, or a second use of the gain in the graph."""
    return (normalized(x, eps) * (2 * weight - weight.detach())).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# Mistakes with a parameter that is found from the observations


@step.family("functional.rms_norm", grids.powers(1e-12, 10))
def epsilon_fixed_at_a_number(value):
    """Your epsilon is {value} where 0.01 is passed. Models use 1e-5 or 1e-6; use the argument, and check that
    the layer stores it as self.eps."""
    return lambda x, weight, eps=1e-5: (normalized(x, value) * weight).to(x.dtype)


@step.family("functional.rms_norm", grids.AXES, unknown="another axis")
def mean_over_another_axis(value):
    """The mean square is taken over {value} instead of the last axis, so vectors of different tokens change
    each other. Each vector is normalized by itself: mean(-1, keepdim=True)."""

    def wrong(x, weight, eps=1e-5):
        wide = F.to_float32(x)
        return (wide * torch.rsqrt(wide.square().mean(value, keepdim=True) + eps) * weight).to(x.dtype)

    return wrong


step.factor("functional.rms_norm")
