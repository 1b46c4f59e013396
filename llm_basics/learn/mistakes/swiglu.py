"""SwiGLU: `W2 (silu(W1 x) * W3 x)`, the gated feed-forward network."""

import torch
from torch.nn import functional as tF

from llm_basics.core import functional as F
from llm_basics.learn import probes

step = probes.Step("swiglu")
draw = probes.numbers(seed=7)


def by_hand(x, w1, w2, w3):
    return tF.linear(tF.silu(tF.linear(x, w1)) * tF.linear(x, w3), w2)


step.compare(
    "a hidden layer wider than the model",
    lambda a, x, w1, w2, w3: a.run_swiglu(4, 6, w1, w2, w3, x),
    by_hand,
    {"x": draw(2, 3, 5, 4)},
    {"w1": draw(6, 4), "w2": draw(4, 6), "w3": draw(6, 4)},
    axes="batch group position feature",
)

# with square weights what is exchanged or transposed runs, and shows what it is
step.compare(
    "a hidden layer as wide as the model",
    lambda a, x, w1, w2, w3: a.run_swiglu(4, 4, w1, w2, w3, x),
    by_hand,
    {"x": draw(3, 4)},
    {"w1": draw(4, 4), "w2": draw(4, 4), "w3": draw(4, 4)},
    axes="position feature",
)

# exp(88.8) is more than float32 can hold
step.compare(
    "gates of 100 and more, positive and negative",
    lambda a, x, w1, w2, w3: a.run_swiglu(4, 6, w1, w2, w3, x),
    by_hand,
    {"x": torch.tensor([[1.0, 0.5, -0.5, 0.25], [-1.0, 2.0, 0.5, 1.0]])},
    {"w1": 200 * draw(6, 4), "w2": draw(4, 6), "w3": draw(6, 4)},
    axes="position feature",
    rtol=1e-3,
    atol=1e-2,
)


@step.mistake("functional.swiglu", source="public solutions of CS336")
def w1_and_w3_exchanged(x, w1, w2, w3):
    """W3 makes the gate and W1 the values. Trained from scratch this works, but pretrained weights do not
    fit; silu belongs around W1 x."""
    return F.linear(F.silu(F.linear(x, w3)) * F.linear(x, w1), w2)


@step.mistake("functional.swiglu", source="public solutions of CS336")
def no_gate(x, w1, w2, w3):
    """W3 is never used, which leaves a plain network with SiLU. The hidden layer is a product of two
    projections of x: silu(W1 x) * (W3 x)."""
    return F.linear(F.silu(F.linear(x, w1)), w2)


@step.mistake("functional.swiglu", source="public solutions of CS336")
def gate_through_sigmoid(x, w1, w2, w3):
    """The gate is sigmoid(W1 x), which is the older GLU. SwiGLU takes silu, which is z * sigmoid(z) with
    z = W1 x: the factor z is missing."""
    return F.linear(torch.sigmoid(F.linear(x, w1)) * F.linear(x, w3), w2)


@step.mistake("functional.swiglu", source="written for this catalogue")
def no_activation(x, w1, w2, w3):
    """The two projections are multiplied, but neither goes through silu. Put silu around W1 x before the
    product."""
    return F.linear(F.linear(x, w1) * F.linear(x, w3), w2)


@step.mistake("functional.swiglu", source="written for this catalogue")
def product_activated(x, w1, w2, w3):
    """silu is applied to the product of both projections. It belongs around W1 x alone, so that W3 x passes
    the gate unchanged; look at where its parenthesis closes."""
    return F.linear(F.silu(F.linear(x, w1) * F.linear(x, w3)), w2)


@step.mistake("functional.swiglu", source="written for this catalogue")
def both_branches_activated(x, w1, w2, w3):
    """silu is applied to W3 x as well. Only the gate W1 x goes through it; the values W3 x stay linear, so
    that they can be negative."""
    return F.linear(F.silu(F.linear(x, w1)) * F.silu(F.linear(x, w3)), w2)


@step.mistake("functional.swiglu", source="written for this catalogue")
def activated_at_the_end(x, w1, w2, w3):
    """silu comes last, after W2. The output then can hardly be negative, and the residual stream only
    grows; silu belongs around W1 x, inside the product."""
    return F.silu(F.linear(F.linear(x, w1) * F.linear(x, w3), w2))


@step.mistake("functional.swiglu", source="written for this catalogue")
def gate_added(x, w1, w2, w3):
    """silu(W1 x) and W3 x are added. A gate opens and closes because it is multiplied with the values:
    use * between the two, element by element."""
    return F.linear(F.silu(F.linear(x, w1)) + F.linear(x, w3), w2)


@step.mistake("functional.swiglu", source="written for this catalogue")
def gelu_in_the_gate(x, w1, w2, w3):
    """The gate goes through GELU, which makes GEGLU, a sibling from the same paper. SwiGLU takes
    silu(z) = z * sigmoid(z)."""
    return F.linear(tF.gelu(F.linear(x, w1)) * F.linear(x, w3), w2)


@step.mistake("functional.swiglu", source="written for this catalogue")
def relu_in_the_gate(x, w1, w2, w3):
    """The gate goes through ReLU, which makes ReGLU. SwiGLU takes silu(z) = z * sigmoid(z), which is smooth
    and lets a little through below zero."""
    return F.linear(F.linear(x, w1).clamp(min=0) * F.linear(x, w3), w2)


@step.mistake("functional.swiglu", source="written for this catalogue")
def sigmoid_of_1702_times_the_gate(x, w1, w2, w3):
    """The factor 1.702 belongs to a quick approximation of GELU. SiLU has no factor: z * sigmoid(z)."""
    gate = F.linear(x, w1)
    return F.linear(gate * torch.sigmoid(1.702 * gate) * F.linear(x, w3), w2)


@step.mistake("functional.swiglu", source="written for this catalogue")
def w2_and_w3_exchanged(x, w1, w2, w3):
    """W3 leads back to the model's width and W2 makes the values. In this naming W1 and W3 are both
    (d_ff, d_model) and W2 is (d_model, d_ff), the way down."""
    return F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w2), w3)


@step.mistake("functional.swiglu", source="written for this catalogue")
def weights_not_transposed(x, w1, w2, w3):
    """It computes x @ W, but weights are (d_out, d_in), so it has to be x @ W.T. With d_ff = d_model this
    runs without an error and is wrong."""
    return (F.silu(x @ w1) * (x @ w3)) @ w2


@step.mistake("functional.swiglu", source="written for this catalogue")
def no_way_back(x, w1, w2, w3):
    """W2 is not applied, so the result has the width d_ff. Lead it back with W2, or it cannot be added to
    the residual stream."""
    return F.silu(F.linear(x, w1)) * F.linear(x, w3)


@step.mistake("functional.swiglu", source="written for this catalogue")
def input_added(x, w1, w2, w3):
    """The input is added to the result in here. The residual connection belongs to the block, which would
    now add x twice."""
    return x + by_hand(x, w1, w2, w3)


@step.mistake("functional.swiglu", source="written for this catalogue")
def gate_detached(x, w1, w2, w3):
    """The output is right, but no gradient passes the gate, so W1 never learns. Look for .detach(), .data,
    .item() or torch.no_grad() around W1 x."""
    return F.linear(F.silu(F.linear(x, w1)).detach() * F.linear(x, w3), w2)


@step.mistake("functional.swiglu", source="written for this catalogue")
def weights_read_through_data(x, w1, w2, w3):
    """The output is right, but the weights are read as .data or a copy, so that they get no gradient and
    never learn. Use the parameters themselves."""
    return by_hand(x, w1.data, w2.data, w3.data)


@step.mistake("functional.swiglu", source="public solutions of CS336; passes its suite")
def silu_of_large_gates_is_nan(x, w1, w2, w3):
    """SiLU written as z e^z / (1 + e^z) is inf / inf = NaN for z above 88. Use z * torch.sigmoid(z), which
    never overflows."""
    gate = F.linear(x, w1)
    return F.linear(gate * gate.exp() / (1 + gate.exp()) * F.linear(x, w3), w2)


@step.mistake("functional.swiglu", source="written for this catalogue")
def gradient_of_closed_gates_is_nan(x, w1, w2, w3):
    """The output is right, but sigmoid written as 1 / (1 + exp(-z)) has the gradient 0 * inf = NaN for z
    below -88, and one NaN spoils all weights. Use torch.sigmoid."""
    gate = F.linear(x, w1)
    return F.linear(gate / (1 + (-gate).exp()) * F.linear(x, w3), w2)
