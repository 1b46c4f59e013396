"""RMSNorm: `x / sqrt(mean(x^2) + eps) * weight` over the last axis."""

import torch
from mistakes import Step, numbers
from torch.nn import functional as tF

from llm_basics import functional as F

step = Step("rms_norm")
draw = numbers(seed=1)

# ordinary rows away from mean 0, large ones, tiny ones below sqrt(eps), and zeros
ROWS = (0.5 + draw(2, 4, 7)) * torch.tensor([1, 50, 3e-3, 0]).reshape(4, 1)

step.compare(
    "rows of all sizes",
    lambda a, x, weight: a.run_rmsnorm(7, 1e-2, weight, x),
    lambda x, weight: tF.rms_norm(x, (7,), weight, eps=1e-2),
    {"x": ROWS},
    {"weight": draw(7)},
    axes="batch row feature",
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
)


@step.mistake("functional.rms_norm", source="public solutions of CS336")
def epsilon_outside_the_root(x, weight, eps=1e-5):
    """Epsilon is added to the root instead of to the mean square inside it. Rows near zero then come out
    different from what everybody's weights expect; look at where your sqrt closes its parenthesis."""
    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * weight


@step.mistake("functional.rms_norm", source="public solutions of CS336; passes its suite")
def result_left_in_float32(x, weight, eps=1e-5):
    """The mean is rightly taken in float32, but the result stays there. The rest of a half-precision model
    then runs in float32 or fails; convert back to x.dtype at the end."""
    wide = F.widen(x)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * F.widen(weight)
