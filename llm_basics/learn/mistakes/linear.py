"""Linear: `x W^T` over the last axis, and the weights that it starts with."""

import math

import torch
from torch import nn
from torch.nn import functional as tF

from llm_basics.core import layers
from llm_basics.learn import probes

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


# a square matrix lets a forgotten transposition through, which then gives numbers that can be told
compare("5 features in, 5 out", draw(3, 5), draw(5, 5), "row feature")
compare("6 features in, 4 out", draw(7, 6), draw(4, 6), "row feature")
compare("several leading dimensions", draw(2, 3, 5, 6), draw(4, 6), "batch head position feature")
compare("a single vector", draw(6), draw(4, 6), "feature")
# float16 ends at 65,504 and has 11 bits, bfloat16 has 8
compare(
    "large numbers, and numbers of many digits",
    torch.tensor([[70_000.0, 1.0], [1001.25, 3.0]]),
    torch.eye(2),
    "row feature",
    rtol=1e-6,
    gradients=False,
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
    """How they are spread; 3.5 stands for no cut-off, since the largest of so many is then past it."""
    own = weight.detach().float()
    return {
        "mean": round((own.mean() / own.std()).item(), 1),
        "standard deviation": own.std().item() / std,
        "largest": min((own.abs().max() / own.std()).item(), 3.5),
    }


# what is left of a normal distribution between -3 and 3 times its standard deviation
KEPT = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))


def differ_in_spread(expected, actual, asked="as configured", unit=" times that"):
    mean, std, largest = actual.values()
    if std == 0:
        return "the weights must be random, but all are the same"
    if mean:
        return f"the weights must be spread around 0, but are {mean} standard deviations off"
    if not math.isclose(std, KEPT, rel_tol=0.05):
        return f"the standard deviation of the weights must be {asked}, but is {std:.2g}{unit}"
    end = "without an end" if largest >= 3.5 else f"up to {largest:.1f}"
    return f"the weights must be normal up to 3.0 standard deviations, but are spread {end}"


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
    """The weight is used as it is, but it has one row per output feature: (d_out, d_in). Square sizes hide
    it, and the result is then that of another layer. Use x @ weight.T, or einsum with both axes named."""
    y = x @ weight
    return y if bias is None else y + bias


@step.mistake("functional.linear", source="written for this catalogue")
def result_transposed(x, weight, bias=None):
    """The product is taken as weight @ x and left standing on its side: output features come before the rows.
    Features must stay on the last axis; compute x @ weight.T instead."""
    y = weight @ (x.mT if x.ndim > 1 else x)
    return y if bias is None else y + bias.unsqueeze(-1)


@step.mistake("functional.linear", source="written for this catalogue")
def leading_dimensions_lost(x, weight, bias=None):
    """The input is flattened to rows, and the result is never given its batch and position axes back. `@`
    takes any number of leading axes by itself, so there is no need to reshape."""
    return tF.linear(x.reshape(-1, x.shape[-1]), weight, bias)


@step.mistake("functional.linear", source="written for this catalogue")
def rows_added_up(x, weight, bias=None):
    """The rows are summed too: an einsum whose output leaves out an axis sums over that axis. All axes of the
    input but the last must be in the output; write it with `...` on both sides of the arrow."""
    return tF.linear(x.sum(-2, keepdim=True).expand_as(x) if x.ndim > 1 else x, weight, bias)


@step.mistake("functional.linear", source="public solutions of CS336")
def computed_in_float16(x, weight, bias=None):
    """The product is computed in float16 and converted back. Three digits are left, and numbers past 65,504
    become infinite. Compute in the dtype that you were given."""
    y = (x.half() @ weight.half().T).to(x.dtype)
    return y if bias is None else y + bias


@step.mistake("functional.linear", source="public solutions of CS336")
def computed_in_bfloat16(x, weight, bias=None):
    """The product is computed in bfloat16 and converted back, which leaves two to three digits. Compute in
    the dtype that you were given; autocast is there for who wants speed."""
    y = (x.bfloat16() @ weight.bfloat16().T).to(x.dtype)
    return y if bias is None else y + bias


@step.mistake("functional.linear", source="written for this catalogue")
def result_always_float32(x, weight, bias=None):
    """The result is float32 whatever came in. A model in half precision then fails at the next layer, or
    quietly runs at twice the size. Leave the dtype as it is."""
    y = x.float() @ weight.float().T
    return y if bias is None else y + bias


@step.mistake("functional.linear", source="public solutions of CS336; passes its suite")
def weight_detached(x, weight, bias=None):
    """The output is right, but no gradient reaches the weight: .data, .detach() or a copy cut it off. The
    layer never learns, and nothing fails. Use the parameter itself in the product."""
    return tF.linear(x, weight.detach(), bias)


@step.mistake("functional.linear", source="written for this catalogue")
def input_detached(x, weight, bias=None):
    """The output is right, but no gradient passes through to the input, so all layers before this one never
    learn. Look for .data, .detach(), or a new tensor made from x."""
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
        """The weight is a buffer, or a parameter with requires_grad=False. It is saved and moved, but never
        gets a gradient, so it stays random. Make it an nn.Parameter as it comes."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.weight.requires_grad_(False)

    return WeightDoesNotLearn


for made in (weight_is_no_parameter, weight_does_not_learn):
    step.mistake("layers.Linear", source="written for this catalogue")(made(layers.Linear))


@step.mistake("layers.Linear", source="written for this catalogue")
class BiasByDefault(layers.Linear):
    """The layer has a bias by default. The projections of a Llama have none, and pretrained checkpoints do
    not load. A bias must be off unless bias=True."""

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__(in_features, out_features, True, device, dtype)


@step.mistake("layers.Linear", source="written for this catalogue")
class StartsWithStdOne(layers.Linear):
    """The weights start with standard deviation 1. Each layer then makes its input about sqrt(d_in) times
    larger, and the first loss is huge. The deviation must be sqrt(2 / (d_in + d_out))."""

    std = staticmethod(lambda d_in, d_out: 1.0)

    def __init__(self, in_features, out_features, bias=False, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        layers.init_truncated_normal_(self.weight, self.std(in_features, out_features))


@step.mistake("layers.Linear", source="written for this catalogue")
class StartsWithTheVariance(StartsWithStdOne):
    """2 / (d_in + d_out) is the variance, but was passed as the standard deviation. All signals start far too
    small and training creeps; take its square root."""

    std = staticmethod(lambda d_in, d_out: 2 / (d_in + d_out))


@step.mistake("layers.Linear", source="written for this catalogue")
class StartsWithInputsOnly(StartsWithStdOne):
    """The weights start with deviation 1 / sqrt(d_in), which looks at the inputs alone. Here the gradient
    that flows back counts as well: sqrt(2 / (d_in + d_out))."""

    std = staticmethod(lambda d_in, d_out: d_in**-0.5)


@step.mistake("layers.Linear", source="written for this catalogue")
class StartsAsForRelu(StartsWithStdOne):
    """The weights start with deviation sqrt(2 / d_in), which is made for layers followed by a ReLU. Here it
    must be sqrt(2 / (d_in + d_out)); look at the denominator."""

    std = staticmethod(lambda d_in, d_out: math.sqrt(2 / d_in))


@step.mistake("layers.Linear", source="written for this catalogue")
class StartsWithAFixedStd(StartsWithStdOne):
    """The weights start with deviation 0.02 whatever the size, as GPT-2 has it for its own widths. Narrow
    layers then start far too small. The deviation must be sqrt(2 / (d_in + d_out))."""

    std = staticmethod(lambda d_in, d_out: 0.02)


@step.mistake("layers.Linear", source="written for this catalogue")
class StartsAtZero(StartsWithStdOne):
    """The weights start at zero: the output is zero, no gradient goes back through it, and all features of a
    layer stay alike. Draw them at random."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        nn.init.zeros_(self.weight)


@step.mistake("layers.Linear", source="written for this catalogue")
class StartsUniform(layers.Linear):
    """The weights are drawn evenly from -1/sqrt(d_in) to 1/sqrt(d_in), the default of nn.Linear. It must be a
    normal distribution, cut off at three standard deviations: nn.init.trunc_normal_."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))


@step.mistake("layers.Linear", source="written for this catalogue")
class NoCutOff(layers.Linear):
    """The normal distribution of the first weights is not cut off at three standard deviations. Mind that the
    a and b of trunc_normal_ are plain numbers: a=-3 with a small std cuts nothing; it must be -3 * std."""

    def __init__(self, in_features, out_features, bias=False, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        nn.init.trunc_normal_(self.weight, std=math.sqrt(2 / (in_features + out_features)), a=-3, b=3)


@step.mistake("layers.Linear", source="written for this catalogue")
class CutOffAtTwo(layers.Linear):
    """The normal distribution of the first weights is cut off at two standard deviations instead of three, so
    they are spread less than they should be. Look at a and b of trunc_normal_."""

    def __init__(self, in_features, out_features, bias=False, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        std = math.sqrt(2 / (in_features + out_features))
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
