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
    {"x": draw(2, 5, 4)},
    {"w1": draw(6, 4), "w2": draw(4, 6), "w3": draw(6, 4)},
    axes="batch position feature",
    contract="swiglu",
)

# with square weights what is exchanged or transposed runs, and shows what it is
step.compare(
    "a hidden layer as wide as the model",
    lambda a, x, w1, w2, w3: a.run_swiglu(4, 4, w1, w2, w3, x),
    by_hand,
    {"x": draw(1, 3, 4)},
    {"w1": draw(4, 4), "w2": draw(4, 4), "w3": draw(4, 4)},
    axes="batch position feature",
    contract="swiglu",
)

# exp(88.8) is more than float32 can hold
FAR = torch.tensor([[[1.0, 0.5, -0.5, 0.25], [-1.0, 2.0, 0.5, 1.0]]])
FAR_WEIGHTS = {"w1": 200 * draw(6, 4), "w2": draw(4, 6), "w3": draw(6, 4)}

for about, ground in (
    ("gates of 100 and more, positive and negative", {"gradients": False, "contract": "swiglu"}),
    (
        "the gradient of gates of 100 and more",
        {"beyond": "x / (1 + exp(-x)) is right for large numbers, but its gradient is NaN below -88"},
    ),
):
    step.compare(
        about,
        lambda a, x, w1, w2, w3: a.run_swiglu(4, 6, w1, w2, w3, x),
        by_hand,
        {"x": FAR},
        FAR_WEIGHTS,
        axes="batch position feature",
        rtol=1e-3,
        atol=1e-2,
        **ground,
    )

step.weight_gradients(
    "the gradients of the three weights",
    lambda a, x, w1, w2, w3: a.run_swiglu(4, 6, w1, w2, w3, x),
    by_hand,
    {"x": draw(2, 5, 4)},
    {"w1": draw(6, 4), "w2": draw(4, 6), "w3": draw(6, 4)},
)

step.compare(
    "several leading dimensions",
    lambda a, x, w1, w2, w3: a.run_swiglu(4, 6, w1, w2, w3, x),
    by_hand,
    {"x": draw(2, 3, 5, 4)},
    {"w1": draw(6, 4), "w2": draw(4, 6), "w3": draw(6, 4)},
    axes="batch group position feature",
    beyond="a layer is called with as many leading axes as the model needs; the public test has two",
)


@step.mistake("functional.swiglu", source="public solutions of CS336")
def w1_and_w3_exchanged(x, w1, w2, w3):
    """W3 computes the gate and W1 the values. A new model learns just as well, but pretrained weights do not
    fit. silu is applied to W1 x."""
    return F.linear(F.silu(F.linear(x, w3)) * F.linear(x, w1), w2)


@step.mistake("functional.swiglu", source="public solutions of CS336")
def no_gate(x, w1, w2, w3):
    """W3 is never used, which leaves a plain network with SiLU. The hidden layer is a product of two
    projections of x: silu(W1 x) * (W3 x)."""
    return F.linear(F.silu(F.linear(x, w1)), w2)


@step.mistake("functional.swiglu", source="public solutions of CS336")
def gate_through_sigmoid(x, w1, w2, w3):
    """The gate is sigmoid(W1 x), which is the original GLU. SwiGLU uses silu, z * sigmoid(z) with z = W1 x:
    the factor z is missing."""
    return F.linear(torch.sigmoid(F.linear(x, w1)) * F.linear(x, w3), w2)


@step.mistake("functional.swiglu", source="written for this catalogue")
def no_activation(x, w1, w2, w3):
    """The two projections are multiplied, but neither goes through silu. Apply silu to W1 x before the
    product."""
    return F.linear(F.linear(x, w1) * F.linear(x, w3), w2)


@step.mistake("functional.swiglu", source="written for this catalogue")
def product_activated(x, w1, w2, w3):
    """silu is applied to the product of both projections. It must be applied to W1 x alone, while W3 x stays
    linear; check where its parenthesis closes."""
    return F.linear(F.silu(F.linear(x, w1) * F.linear(x, w3)), w2)


@step.mistake("functional.swiglu", source="written for this catalogue")
def both_branches_activated(x, w1, w2, w3):
    """silu is applied to W3 x as well. Only the gate W1 x goes through it; the values W3 x stay linear, so
    that they can be negative."""
    return F.linear(F.silu(F.linear(x, w1)) * F.silu(F.linear(x, w3)), w2)


@step.mistake("functional.swiglu", source="written for this catalogue")
def activated_at_the_end(x, w1, w2, w3):
    """silu is applied last, after W2. The output can then hardly be negative, and the residual stream only
    grows. silu is applied to W1 x, inside the product."""
    return F.silu(F.linear(F.linear(x, w1) * F.linear(x, w3), w2))


@step.mistake("functional.swiglu", source="written for this catalogue")
def gate_added(x, w1, w2, w3):
    """silu(W1 x) and W3 x are added instead of multiplied. A gate scales the values: use * between the two,
    element by element."""
    return F.linear(F.silu(F.linear(x, w1)) + F.linear(x, w3), w2)


@step.mistake("functional.swiglu", source="written for this catalogue")
def gelu_in_the_gate(x, w1, w2, w3):
    """The gate uses GELU, which makes it GEGLU, a variant from the same paper. SwiGLU uses silu(z) = z *
    sigmoid(z)."""
    return F.linear(tF.gelu(F.linear(x, w1)) * F.linear(x, w3), w2)


@step.mistake("functional.swiglu", source="written for this catalogue")
def relu_in_the_gate(x, w1, w2, w3):
    """The gate uses ReLU, which makes it ReGLU. SwiGLU uses silu(z) = z * sigmoid(z), which is smooth and has
    a gradient below zero."""
    return F.linear(F.linear(x, w1).clamp(min=0) * F.linear(x, w3), w2)


@step.mistake("functional.swiglu", source="written for this catalogue")
def sigmoid_of_1702_times_the_gate(x, w1, w2, w3):
    """The factor 1.702 belongs to QuickGELU, an approximation of GELU. SiLU has no factor: z * sigmoid(z)."""
    gate = F.linear(x, w1)
    return F.linear(gate * torch.sigmoid(1.702 * gate) * F.linear(x, w3), w2)


@step.mistake("functional.swiglu", source="written for this catalogue")
def w2_and_w3_exchanged(x, w1, w2, w3):
    """W2 and W3 are swapped: W3 is used as the down-projection and W2 for the values. W1 and W3 are both
    (d_ff, d_model), and W2 is (d_model, d_ff), the down-projection."""
    return F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w2), w3)


@step.mistake("functional.swiglu", source="written for this catalogue")
def weights_not_transposed(x, w1, w2, w3):
    """The products are x @ W, but weights are (d_out, d_in), so they must be x @ W.T. With d_ff = d_model
    there is no error, but a wrong result."""
    return (F.silu(x @ w1) * (x @ w3)) @ w2


@step.mistake("functional.swiglu", source="written for this catalogue")
def axes_of_size_1_removed(x, w1, w2, w3):
    """squeeze() without an axis removes every axis of size 1, so a batch of one or a single token has another
    shape than any other. The result must have the shape of x."""
    return by_hand(x, w1, w2, w3).squeeze()


@step.mistake("functional.swiglu", source="written for this catalogue")
def no_way_back(x, w1, w2, w3):
    """W2 is not applied, so the result has width d_ff and cannot be added to the residual stream. Project it
    back with W2."""
    return F.silu(F.linear(x, w1)) * F.linear(x, w3)


@step.mistake("functional.swiglu", source="written for this catalogue")
def input_added(x, w1, w2, w3):
    """The input is added to the result here. The residual connection belongs to the block, which would now
    add x twice."""
    return x + by_hand(x, w1, w2, w3)


@step.mistake("functional.swiglu", source="written for this catalogue")
def gate_detached(x, w1, w2, w3):
    """The output is correct, but no gradient passes through the gate, so W1 never learns. Look for .detach(),
    .data, .item() or torch.no_grad() around W1 x."""
    return F.linear(F.silu(F.linear(x, w1)).detach() * F.linear(x, w3), w2)


@step.mistake("functional.swiglu", source="written for this catalogue")
def weights_read_through_data(x, w1, w2, w3):
    """The output is correct, but the weights are read as .data or a copy, so they get no gradient and never
    learn. Use the parameters themselves."""
    return by_hand(x, w1.data, w2.data, w3.data)


@step.mistake("functional.swiglu", source="written for this catalogue")
def gradient_of_the_gate_doubled(x, w1, w2, w3):
    """The output is correct, but the gradient of w1 is twice what it must be. Look for a hook, a custom
    backward pass, or a second use of w1 in the graph."""
    return by_hand(x, 2 * w1 - w1.detach(), w2, w3)


@step.mistake("functional.swiglu", source="written for this catalogue")
def only_w1_read_through_data(x, w1, w2, w3):
    """The output is correct, but w1 is read as .data or a copy, so the gate never learns, while the rest of
    the network does. Use the parameter itself."""
    return by_hand(x, w1.data, w2, w3)


@step.mistake("functional.swiglu", source="public solutions of CS336; passes its suite")
def silu_of_large_gates_is_nan(x, w1, w2, w3):
    """SiLU computed as z e^z / (1 + e^z) is inf / inf = NaN for z above 88. Use z * torch.sigmoid(z), which
    never overflows."""
    gate = F.linear(x, w1)
    return F.linear(gate * gate.exp() / (1 + gate.exp()) * F.linear(x, w3), w2)


@step.mistake("functional.swiglu", source="written for this catalogue")
def gradient_of_closed_gates_is_nan(x, w1, w2, w3):
    """The output is correct, but for sigmoid computed as 1 / (1 + exp(-z)) the gradient is 0 * inf = NaN if z
    is below -88, and one NaN ruins all weights. Use torch.sigmoid."""
    gate = F.linear(x, w1)
    return F.linear(gate / (1 + (-gate).exp()) * F.linear(x, w3), w2)


step.factor("functional.swiglu")
