"""Linear: `x W^T` over the last axis, and the weights that it starts with."""

import math

import torch
from torch import nn
from torch.nn import functional as tF

from llm_basics.core import layers
from llm_basics.learn import grids, probes

step = probes.Step("linear")
draw = probes.numbers(seed=1)


def compare(about, x, weight, axes, **more):
    step.compare(
        about,
        lambda a, x, weight: a.run_linear(*reversed(weight.shape), weight, x),
        lambda x, weight: tF.linear(x, weight),
        {"x": x},
        {"weight": weight},
        axes=axes,
        **more,
    )


# a square matrix accepts a missing transposition, whose result can then be identified
compare("5 features in, 5 out", draw(2, 3, 5), draw(5, 5), "batch row feature", contract="linear")
compare("6 features in, 4 out", draw(2, 7, 6), draw(4, 6), "batch row feature", contract="linear")
compare(
    "several leading dimensions",
    draw(2, 3, 5, 6),
    draw(4, 6),
    "batch head position feature",
    beyond="a layer is called with as many leading axes as the model needs; the public test has two",
)
compare(
    "a single vector",
    draw(6),
    draw(4, 6),
    "feature",
    beyond="a vector without leading axes is the smallest input; the public test has two",
)
# float16 ends at 65,504 and has 11 bits, bfloat16 has 8
compare(
    "large numbers, and numbers of many digits",
    torch.tensor([[[70_000.0, 1.0], [1001.25, 3.0]]]),
    torch.eye(2),
    "batch row feature",
    rtol=1e-6,
    gradients=False,
    contract="linear",
)


step.weight_gradients(
    "the gradient of the weight",
    lambda a, x, weight: a.run_linear(6, 4, weight, x),
    lambda x, weight: tF.linear(x, weight),
    {"x": draw(2, 7, 6)},
    {"weight": draw(4, 6)},
)


def parameters(module):
    return {
        name: tuple(parameter.shape)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def differ_in_parameters(expected, actual):
    return f"the layer must have the learned parameters {expected}, but has {actual}"


step.value(
    "parameters of the layer",
    lambda a: parameters(a.get_linear(6, 4)),
    {"weight": (4, 6)},
    words=differ_in_parameters,
)


def initial_weights(weight, std):
    """Statistics of the weights; a largest of 3.5 means no truncation, since the largest is then above it."""
    own = weight.detach().float()
    return {
        "mean": round((own.mean() / own.std()).item(), 1),
        "standard deviation": own.std().item() / std,
        "largest": min((own.abs().max() / own.std()).item(), 3.5),
    }


# what is left of a normal distribution between -3 and 3 times its standard deviation
KEPT = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))


def differ_in_spread(expected, actual, configured="as configured", unit=" times that"):
    mean, std, largest = actual.values()
    if std == 0:
        return "the weights must be random, but all are the same"
    if mean:
        return f"the mean of the weights must be 0, but is {mean} standard deviations"
    if not math.isclose(std, KEPT, rel_tol=0.05):
        return f"the standard deviation of the weights must be {configured}, but is {std:.2g}{unit}"
    end = "not truncated" if largest >= 3.5 else f"truncated at {largest:.1f}"
    return f"the weights must be normal, truncated at 3.0 standard deviations, but are {end}"


step.value(
    "initial weights",
    lambda a: initial_weights(a.get_linear(150, 400).weight, math.sqrt(2 / 550)),
    {"mean": 0.0, "standard deviation": KEPT, "largest": 3 / KEPT},
    rtol=0.05,
    words=differ_in_spread,
)


def as_bfloat16(layer, *inputs):
    result = layer.to(torch.bfloat16)(*inputs)
    return str(result.dtype).removeprefix("torch.")


step.value(
    "a layer converted to bfloat16",
    lambda a: as_bfloat16(a.get_linear(6, 4), torch.ones(3, 6, dtype=torch.bfloat16)),
    "bfloat16",
)


@step.mistake("functional.linear", source="public solutions of CS336")
def weight_not_transposed(x, weight, bias=None):
    """The weight is used without a transpose, but it has one row per output feature: (d_out, d_in). A square
    weight raises no error and gives a wrong result. Use x @ weight.T, or an einsum with named axes."""
    y = x @ weight
    return y if bias is None else y + bias


@step.mistake("functional.linear", source="written for this catalogue")
def result_transposed(x, weight, bias=None):
    """The product is weight @ x, whose result is transposed: output features are the first axis instead of
    the last. Compute x @ weight.T instead."""
    y = weight @ (x.mT if x.ndim > 1 else x)
    return y if bias is None else y + bias.unsqueeze(-1)


@step.mistake("functional.linear", source="written for this catalogue")
def leading_dimensions_lost(x, weight, bias=None):
    """The input is flattened to rows, and the result is not reshaped back. `@` accepts any number of leading
    axes, so there is no need to reshape."""
    return tF.linear(x.reshape(-1, x.shape[-1]), weight, bias)


@step.mistake("functional.linear", source="written for this catalogue")
def axes_of_size_1_removed(x, weight, bias=None):
    """squeeze() without an axis removes every axis of size 1, so a batch of one or a single token has another
    shape than any other. The result must have the leading axes of x."""
    return tF.linear(x, weight, bias).squeeze()


@step.mistake("functional.linear", source="written for this catalogue")
def rows_added_up(x, weight, bias=None):
    """The rows are summed: an einsum sums over every axis that is missing in its output. All axes of the
    input except the last must be in the output; use `...` on both sides of the arrow."""
    return tF.linear(x.sum(-2, keepdim=True).expand_as(x) if x.ndim > 1 else x, weight, bias)


@step.mistake("functional.linear", source="public solutions of CS336")
def computed_in_float16(x, weight, bias=None):
    """The product is computed in float16 and converted back, which keeps three digits and overflows above
    65,504. Compute in the dtype of the input."""
    y = (x.half() @ weight.half().T).to(x.dtype)
    return y if bias is None else y + bias


@step.mistake("functional.linear", source="public solutions of CS336")
def computed_in_bfloat16(x, weight, bias=None):
    """The product is computed in bfloat16 and converted back, which keeps two to three digits. Compute in the
    dtype of the input; lower precision is up to autocast."""
    y = (x.bfloat16() @ weight.bfloat16().T).to(x.dtype)
    return y if bias is None else y + bias


@step.mistake("functional.linear", source="written for this catalogue")
def result_always_float32(x, weight, bias=None):
    """The result is float32 whatever the dtype of the input. A half-precision model then fails at the next
    layer, or uses twice the memory. Keep the dtype of the input."""
    y = x.float() @ weight.float().T
    return y if bias is None else y + bias


@step.mistake("functional.linear", source="public solutions of CS336; passes its suite")
def weight_detached(x, weight, bias=None):
    """The output is correct, but no gradient reaches the weight, because .data, .detach() or a copy broke the
    graph. The layer never learns, without an error. Use the parameter itself in the product."""
    return tF.linear(x, weight.detach(), bias)


@step.mistake("functional.linear", source="written for this catalogue")
def weight_gradient_doubled(x, weight, bias=None):
    """The output is correct, but the gradient of the weight is twice what it must be, as if the weight were
    used twice. Look for a hook, a custom backward pass, or a second product in the graph."""
    return tF.linear(x, 2 * weight - weight.detach(), bias)


@step.mistake("functional.linear", source="written for this catalogue")
def input_detached(x, weight, bias=None):
    """The output is correct, but no gradient reaches the input, so earlier layers never learn. Look for
    .data, .detach(), or a new tensor made from x."""
    return tF.linear(x.detach(), weight, bias)


def weight_is_no_parameter(layer):
    class WeightIsNoParameter(layer):
        """The weight is a plain tensor. The optimizer does not find it, it does not move to the GPU, and it
        is not in the checkpoint. Wrap it in nn.Parameter."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            weight = self.weight.detach()
            del self.weight
            self.weight = weight

    return WeightIsNoParameter


def weight_does_not_learn(layer):
    class WeightDoesNotLearn(layer):
        """The weight is a buffer, or a parameter with requires_grad=False. It is saved and moved to devices,
        but gets no gradient, so it stays random. Make it an nn.Parameter with default options."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.weight.requires_grad_(False)

    return WeightDoesNotLearn


for made in (weight_is_no_parameter, weight_does_not_learn):
    step.mistake("layers.Linear", source="written for this catalogue")(made(layers.Linear))


@step.mistake("layers.Linear", source="written for this catalogue")
class BiasByDefault(layers.Linear):
    """The layer has a bias by default. Llama's projections have none, and pretrained checkpoints do not load.
    A bias must be off unless bias=True."""

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__(in_features, out_features, True, device, dtype)


@step.mistake("layers.Linear", source="written for this catalogue")
class StartsWithStdOne(layers.Linear):
    """The weights are initialized with std 1. Each layer then scales its input up by about sqrt(d_in), and
    the first loss is huge. The std must be sqrt(2 / (d_in + d_out))."""

    std = staticmethod(lambda d_in, d_out: 1.0)

    def __init__(self, in_features, out_features, bias=False, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        layers.init_truncated_normal_(self.weight, self.std(in_features, out_features))


@step.mistake("layers.Linear", source="written for this catalogue")
class StartsWithTheVariance(StartsWithStdOne):
    """The variance 2 / (d_in + d_out) is passed as the standard deviation. Activations start far too small,
    and training is slow. Take the square root."""

    std = staticmethod(lambda d_in, d_out: 2 / (d_in + d_out))


@step.mistake("layers.Linear", source="written for this catalogue")
class StartsWithInputsOnly(StartsWithStdOne):
    """The weights are initialized with std 1 / sqrt(d_in), which considers the forward pass only. Here the
    backward pass counts as well: sqrt(2 / (d_in + d_out))."""

    std = staticmethod(lambda d_in, d_out: d_in**-0.5)


@step.mistake("layers.Linear", source="written for this catalogue")
class StartsAsForRelu(StartsWithStdOne):
    """The weights are initialized with std sqrt(2 / d_in), which is meant for layers followed by a ReLU. Here
    it must be sqrt(2 / (d_in + d_out)); check the denominator."""

    std = staticmethod(lambda d_in, d_out: math.sqrt(2 / d_in))


@step.mistake("layers.Linear", source="written for this catalogue")
class StartsWithAFixedStd(StartsWithStdOne):
    """The weights are initialized with std 0.02 whatever the size, as in GPT-2, whose layers are wide. Narrow
    layers then start far too small. The std must be sqrt(2 / (d_in + d_out))."""

    std = staticmethod(lambda d_in, d_out: 0.02)


@step.mistake("layers.Linear", source="written for this catalogue")
class StartsAtZero(StartsWithStdOne):
    """The weights are initialized to zero: the output is zero, no gradient reaches earlier layers, and all
    features of the layer stay identical. Draw them at random."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        nn.init.zeros_(self.weight)


@step.mistake("layers.Linear", source="written for this catalogue")
class StartsUniform(layers.Linear):
    """The weights are initialized uniformly between -1/sqrt(d_in) and 1/sqrt(d_in), the default of nn.Linear.
    They must be normal, truncated at three standard deviations: nn.init.trunc_normal_."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))


@step.mistake("layers.Linear", source="written for this catalogue")
class NoCutOff(layers.Linear):
    """The initial normal distribution is not truncated at three standard deviations. The arguments a and b of
    trunc_normal_ are absolute: a=-3 with a small std truncates nothing; use -3 * std."""

    def __init__(self, in_features, out_features, bias=False, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        nn.init.trunc_normal_(self.weight, std=math.sqrt(2 / (in_features + out_features)), a=-3, b=3)


@step.mistake("layers.Linear", source="written for this catalogue")
class CutOffAtTwo(layers.Linear):
    """The initial normal distribution is truncated at two standard deviations instead of three, which makes
    the std too small. Check a and b of trunc_normal_."""

    def __init__(self, in_features, out_features, bias=False, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        std = math.sqrt(2 / (in_features + out_features))
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)


step.factor("functional.linear")


# --------------------------------------------------------------------------------------------------
# Mistakes with a parameter that is found from the observations


@step.family("functional.linear", grids.DTYPES, unknown="a dtype of fewer bits")
def weight_in_another_dtype(value):
    """The weight is rounded to {value}, which keeps three digits or fewer, although the layer is float32.
    Keep the dtype of the weight; lower precision is up to autocast."""
    return lambda x, weight, bias=None: tF.linear(x, weight.to(value).to(weight.dtype), bias)
