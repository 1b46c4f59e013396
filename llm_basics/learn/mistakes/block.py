"""The transformer block: `x + attn(ln1(x))`, then `x + ffn(ln2(x))`."""

import math

import torch
from torch.nn import functional as tF

from llm_basics.core import model
from llm_basics.learn import probes
from llm_basics.learn.mistakes import multi_head

step = probes.Step("block")
draw = probes.numbers(seed=1)

D_MODEL, N_HEADS, D_FF, SEQ = 12, 3, 20, 5
CONTEXT, THETA, EPS = 16, 500.0, 1e-5


# --------------------------------------------------------------------------------------------------
# What is right


def block(x, n_heads=N_HEADS, theta=THETA, positions=None, **weights):
    """A pre-norm block by torch; `weights` as in a state dict below `layers.N.`."""
    normed = tF.rms_norm(x, x.shape[-1:], weights["ln1.weight"], EPS)
    q, k, v, o = (weights[f"attn.{name}_proj.weight"] for name in ("q", "k", "v", "output"))
    x = x + multi_head.attention(normed, q, k, v, o, n_heads, theta, positions)
    normed = tF.rms_norm(x, x.shape[-1:], weights["ln2.weight"], EPS)
    w1, w2, w3 = (weights[f"ffn.w{i}.weight"] for i in (1, 2, 3))
    return x + tF.linear(tF.silu(tF.linear(normed, w1)) * tF.linear(normed, w3), w2)


def weights(draw=draw, d_model=D_MODEL, d_ff=D_FF):
    shapes = {f"attn.{name}_proj": (d_model, d_model) for name in ("q", "k", "v", "output")}
    shapes |= {"ffn.w1": (d_ff, d_model), "ffn.w2": (d_model, d_ff), "ffn.w3": (d_ff, d_model)}
    drawn = {f"{name}.weight": 1.2 * draw(*shape) / math.sqrt(shape[1]) for name, shape in shapes.items()}
    return drawn | {f"ln{i}.weight": 1 + 0.3 * draw(d_model) for i in (1, 2)}


# --------------------------------------------------------------------------------------------------
# Probes


def run(a, x, **weights):
    return a.run_transformer_block(D_MODEL, N_HEADS, D_FF, CONTEXT, THETA, weights, x)


def without(*names):
    """Weights of which these are 0."""
    drawn = weights()
    return {name: weight * (name not in names) for name, weight in drawn.items()}


# plus 1, so that no norm leaves it as it is; rows of different scale
INPUT = (1 + draw(2, SEQ, D_MODEL)) * torch.tensor([1, 0.5, 3, 0.7, 2]).reshape(SEQ, 1)

step.compare(
    "both sublayers add zero, so the output equals the input",
    run,
    lambda x, **weights: x * 1,
    {"x": INPUT},
    without("attn.output_proj.weight", "ffn.w2.weight"),
    axes="batch position feature",
    gradients=False,
    contract="block",
)

step.compare(
    "only attention adds something",
    run,
    block,
    {"x": INPUT},
    without("ffn.w2.weight"),
    axes="batch position feature",
    rtol=1e-3,
    atol=1e-4,
    gradients=False,
    contract="block",
)

step.compare(
    "only the feed-forward network adds something",
    run,
    block,
    {"x": INPUT},
    without("attn.output_proj.weight"),
    axes="batch position feature",
    rtol=1e-3,
    atol=1e-4,
    gradients=False,
    contract="block",
)

step.compare(
    "both sublayers",
    run,
    block,
    {"x": INPUT},
    weights(),
    axes="batch position feature",
    rtol=1e-3,
    atol=2e-4,
    contract="block",
)

# mean squares of 5e-5: an epsilon of 1e-5 counts, one of 1e-6 or less hardly does
step.compare(
    "tiny inputs, where the eps of the norms matters",
    run,
    block,
    {"x": 7e-3 * tF.rms_norm(INPUT, (D_MODEL,))},
    without("attn.output_proj.weight"),
    axes="batch position feature",
    rtol=0.06,
    atol=0.02,
    gradients=False,
    beyond="the eps of the norms is no parameter of the public function; pretrained weights have 1e-5",
)

step.compare(
    "a batch of one sequence of one token",
    run,
    block,
    {"x": 1 + draw(1, 1, D_MODEL)},
    weights(),
    axes="batch position feature",
    rtol=1e-3,
    atol=2e-4,
    gradients=False,
    contract="block",
)


# --------------------------------------------------------------------------------------------------
# Mistakes


class Parts(model.TransformerBlock):
    """The block with its two sublayers as one method each, so that a mistake is its order alone."""

    def forward(self, x, token_positions=None, cache=None):
        self.look = lambda h: self.dropout(self.attn(h, token_positions, cache))
        self.think = lambda h: self.dropout(self.ffn(h))
        return self.order(x)

    def order(self, x):
        x = x + self.look(self.ln1(x))
        return x + self.think(self.ln2(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class AxesOfSize1Removed(Parts):
    """squeeze() without an axis removes every axis of size 1, so a batch of one or a single token has another
    shape than any other. The result must have the shape of x."""

    def order(self, x):
        return super().order(x).squeeze()


# residuals


@step.mistake("model.TransformerBlock", source="public solutions of CS336")
class NoResidualAroundAttention(Parts):
    """The residual connection around attention is missing, so the block discards its input, and deep models
    hardly learn. It is x = x + attn(ln1(x))."""

    def order(self, x):
        x = self.look(self.ln1(x))
        return x + self.think(self.ln2(x))


@step.mistake("model.TransformerBlock", source="public solutions of CS336")
class NoResidualAroundTheFfn(Parts):
    """The residual connection around the feed-forward network is missing, which breaks the direct path of
    gradients in each block. It is x = x + ffn(ln2(x))."""

    def order(self, x):
        x = x + self.look(self.ln1(x))
        return self.think(self.ln2(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class NoResiduals(Parts):
    """Both residual connections are missing, so each block replaces its input. With several blocks gradients
    vanish; add x in both lines."""

    def order(self, x):
        return self.think(self.ln2(self.look(self.ln1(x))))


@step.mistake("model.TransformerBlock", source="public solutions of CS336")
class ResidualsFromTheNormalizedInput(Parts):
    """The normalized x is added instead of x itself, often because a variable is reused: x = ln1(x), then x +
    attn(x). The residual stream must pass through unchanged; use two names."""

    def order(self, x):
        x = self.ln1(x)
        x = x + self.look(x)
        x = self.ln2(x)
        return x + self.think(x)


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class FirstResidualFromTheNormalizedInput(Parts):
    """Around attention the normalized x is added instead of x itself; the second residual is right. Give the
    normalized tensor a name of its own."""

    def order(self, x):
        x = self.ln1(x)
        x = x + self.look(x)
        return x + self.think(self.ln2(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class SecondResidualFromTheNormalizedInput(Parts):
    """Around the feed-forward network the normalized x is added instead of x itself; the first residual is
    right. Give the normalized tensor a name of its own."""

    def order(self, x):
        x = x + self.look(self.ln1(x))
        x = self.ln2(x)
        return x + self.think(x)


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class SecondResidualFromTheBlocksInput(Parts):
    """The output of the feed-forward network is added to the input of the block instead of the sum after
    attention, so attention's contribution is lost. Check which x is in the last line."""

    def order(self, x):
        h = x + self.look(self.ln1(x))
        return x + self.think(self.ln2(h))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class InputAddedTwice(Parts):
    """The input of the block is added once more at the end, although the second residual already contains it,
    so the residual stream doubles in each block. Each sublayer adds only its own input."""

    def order(self, x):
        h = x + self.look(self.ln1(x))
        return x + h + self.think(self.ln2(h))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class InputChangedInPlace(Parts):
    """`x += ...` modifies the caller's tensor, which the norm needs for its gradient and the caller may use
    again. Write x = x + ..., which makes a new tensor."""

    def order(self, x):
        x += self.look(self.ln1(x))
        x += self.think(self.ln2(x))
        return x


# norms


@step.mistake("model.TransformerBlock", source="public solutions of CS336")
class PostNorm(Parts):
    """The sums are normalized, ln1(x + attn(x)), as in the original transformer; pre-norm is required. Deep
    post-norm models need a long warmup. Normalize the input of each sublayer, not the residual stream."""

    def order(self, x):
        x = self.ln1(x + self.look(x))
        return self.ln2(x + self.think(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class NormOfTheSublayersOutput(Parts):
    """The norms are applied to the outputs of the sublayers, x + ln1(attn(x)), so their inputs grow from
    block to block. Apply them before: x + attn(ln1(x))."""

    def order(self, x):
        x = x + self.ln1(self.look(x))
        return x + self.ln2(self.think(x))


@step.mistake("model.TransformerBlock", source="public solutions of CS336")
class NoNormBeforeAttention(Parts):
    """Attention reads x without ln1, whose gain never learns. The residual stream grows with depth, and the
    softmax saturates. It is attn(ln1(x))."""

    def order(self, x):
        x = x + self.look(x)
        return x + self.think(self.ln2(x))


@step.mistake("model.TransformerBlock", source="public solutions of CS336")
class NoNormBeforeTheFfn(Parts):
    """The feed-forward network reads x without ln2, whose gain never learns, and its output grows with depth.
    It is ffn(ln2(x))."""

    def order(self, x):
        x = x + self.look(self.ln1(x))
        return x + self.think(x)


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class NoNorms(Parts):
    """Neither sublayer's input is normalized, so a deep model soon diverges. Each sublayer reads the
    normalized x: attn(ln1(x)) and ffn(ln2(x))."""

    def order(self, x):
        x = x + self.look(x)
        return x + self.think(x)


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class FirstNormUsedTwice(Parts):
    """Both sublayers use ln1, so ln2 is never used and never learns. Gains are all 1 at initialization, which
    hides it at first. The second line needs ln2."""

    def order(self, x):
        x = x + self.look(self.ln1(x))
        return x + self.think(self.ln1(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class NormsExchanged(Parts):
    """ln2 is applied before attention and ln1 before the feed-forward network. A new model learns just as
    well, but pretrained weights do not fit."""

    def order(self, x):
        x = x + self.look(self.ln2(x))
        return x + self.think(self.ln1(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class AnotherEpsilon(Parts):
    """The norms use another eps than 1e-5, perhaps the default of another library. Only inputs near zero show
    it, but weights trained with one eps do not fit another. Pass config.norm_eps."""

    def order(self, x):
        self.ln1.eps = self.ln2.eps = 1e-8
        return super().order(x)


# order and gradients


@step.mistake("model.TransformerBlock", source="public solutions of CS336")
class Parallel(Parts):
    """Both sublayers read the input of the block, and both outputs are added to it. The feed-forward network
    must read the sum after attention: two lines, one after the other."""

    def order(self, x):
        return x + self.look(self.ln1(x)) + self.think(self.ln2(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class FfnBeforeAttention(Parts):
    """The feed-forward network comes before attention, each with its own norm. A model learns nearly as well
    this way, so no loss curve shows it, but pretrained weights do not fit."""

    def order(self, x):
        x = x + self.think(self.ln2(x))
        return x + self.look(self.ln1(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class AttentionSkipped(Parts):
    """Attention is not called, or its output is not used, so no information moves between tokens, and the
    model can only learn bigrams. Add its output to x."""

    def order(self, x):
        return x + self.think(self.ln2(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class FfnSkipped(Parts):
    """The block ends after attention, so the feed-forward network, two thirds of its weights, does nothing:
    information moves between tokens but is hardly processed. Return x + ffn(ln2(x))."""

    def order(self, x):
        return x + self.look(self.ln1(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class AttentionDetached(Parts):
    """The output is correct, but no gradient passes through attention, so its four projections keep their
    initial weights, while the loss still falls. Look for detach, .data or no_grad."""

    def order(self, x):
        x = x + self.look(self.ln1(x)).detach()
        return x + self.think(self.ln2(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class ResidualDetached(Parts):
    """The output is correct, but the residual is detached, so gradients reach earlier blocks through the
    sublayers only and vanish with depth. Add x itself."""

    def order(self, x):
        x = x.detach() + self.look(self.ln1(x))
        return x + self.think(self.ln2(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class RopeNotHandedOn(Parts):
    """The block gets a rope but does not pass it to its attention, which then has no positions. Pass it to
    the constructor of the attention."""

    def order(self, x):
        self.attn.rope = None
        return super().order(x)


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class ResidualsAveraged(Parts):
    """Each sum is divided by 2, or by sqrt(2), to keep its scale, so the contribution of the embedding decays
    with depth. The norms take care of the scale."""

    def order(self, x):
        x = (x + self.look(self.ln1(x))) / 2
        return (x + self.think(self.ln2(x))) / 2
