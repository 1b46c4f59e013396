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


# residuals


@step.mistake("model.TransformerBlock", source="public solutions of CS336")
class NoResidualAroundAttention(Parts):
    """What came in is not added to what attention found, so the block forgets the token itself and deep
    models hardly learn. It is x = x + attn(ln1(x))."""

    def order(self, x):
        x = self.look(self.ln1(x))
        return x + self.think(self.ln2(x))


@step.mistake("model.TransformerBlock", source="public solutions of CS336")
class NoResidualAroundTheFfn(Parts):
    """What attention gave is not added to the result of the feed-forward network. The direct path for
    gradients is cut at each block; it is x = x + ffn(ln2(x))."""

    def order(self, x):
        x = x + self.look(self.ln1(x))
        return self.think(self.ln2(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class NoResiduals(Parts):
    """Neither sublayer's input is added to its result, so each block replaces what it was given. With
    several blocks gradients vanish; both lines need x + in front."""

    def order(self, x):
        return self.think(self.ln2(self.look(self.ln1(x))))


@step.mistake("model.TransformerBlock", source="public solutions of CS336")
class ResidualsFromTheNormalizedInput(Parts):
    """The normalized x is added instead of x itself, often since one variable was overwritten: x = ln1(x),
    then x + attn(x). The residual stream must pass through untouched; use two names."""

    def order(self, x):
        x = self.ln1(x)
        x = x + self.look(x)
        x = self.ln2(x)
        return x + self.think(x)


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class FirstResidualFromTheNormalizedInput(Parts):
    """Around attention the normalized x is added instead of x itself, while the second residual is right.
    Keep the input under a name of its own before you normalize it."""

    def order(self, x):
        x = self.ln1(x)
        x = x + self.look(x)
        return x + self.think(self.ln2(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class SecondResidualFromTheNormalizedInput(Parts):
    """Around the feed-forward network the normalized x is added instead of x itself, while the first
    residual is right. Keep x under a name of its own before you normalize it."""

    def order(self, x):
        x = x + self.look(self.ln1(x))
        x = self.ln2(x)
        return x + self.think(x)


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class SecondResidualFromTheBlocksInput(Parts):
    """The feed-forward result is added to what entered the block, not to what left attention, whose own
    contribution is lost. Look at which x stands in the last line."""

    def order(self, x):
        h = x + self.look(self.ln1(x))
        return x + self.think(self.ln2(h))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class InputAddedTwice(Parts):
    """What entered the block is added again at its end, although the second residual carries it already.
    The stream doubles at each block; each sublayer adds only its own input."""

    def order(self, x):
        h = x + self.look(self.ln1(x))
        return x + h + self.think(self.ln2(h))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class InputChangedInPlace(Parts):
    """`x += ...` writes into the caller's tensor, which the norm needs for its gradient and the caller
    perhaps for more. Write x = x + ..., which makes a new one."""

    def order(self, x):
        x += self.look(self.ln1(x))
        x += self.think(self.ln2(x))
        return x


# norms


@step.mistake("model.TransformerBlock", source="public solutions of CS336")
class PostNorm(Parts):
    """The sums are normalized, ln1(x + attn(x)), as in the first transformer, where pre-norm is required.
    Deep models then need a long warm-up; normalize what a sublayer reads, not the residual stream."""

    def order(self, x):
        x = self.ln1(x + self.look(x))
        return self.ln2(x + self.think(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class NormOfTheSublayersOutput(Parts):
    """The norms are applied after the sublayers, x + ln1(attn(x)), so these read a stream that grows from
    block to block. Put them in front: x + attn(ln1(x))."""

    def order(self, x):
        x = x + self.ln1(self.look(x))
        return x + self.ln2(self.think(x))


@step.mistake("model.TransformerBlock", source="public solutions of CS336")
class NoNormBeforeAttention(Parts):
    """Attention reads x without ln1, whose gain never learns. The stream grows with depth and the softmax
    saturates; it is attn(ln1(x))."""

    def order(self, x):
        x = x + self.look(x)
        return x + self.think(self.ln2(x))


@step.mistake("model.TransformerBlock", source="public solutions of CS336")
class NoNormBeforeTheFfn(Parts):
    """The feed-forward network reads x without ln2, whose gain never learns. What it adds grows with depth;
    it is ffn(ln2(x))."""

    def order(self, x):
        x = x + self.look(self.ln1(x))
        return x + self.think(x)


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class NoNorms(Parts):
    """Neither sublayer's input is normalized, so a deep model soon diverges. Each reads its own normalized
    copy: attn(ln1(x)) and ffn(ln2(x))."""

    def order(self, x):
        x = x + self.look(x)
        return x + self.think(x)


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class FirstNormUsedTwice(Parts):
    """Both sublayers are normalized with ln1, so ln2 is never used and never learns. New gains are all 1,
    which hides it at the start; the second line needs ln2."""

    def order(self, x):
        x = x + self.look(self.ln1(x))
        return x + self.think(self.ln1(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class NormsExchanged(Parts):
    """ln2 stands before attention and ln1 before the feed-forward network. A new model learns all the same,
    but pretrained weights do not fit."""

    def order(self, x):
        x = x + self.look(self.ln2(x))
        return x + self.think(self.ln1(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class AnotherEpsilon(Parts):
    """The norms have another epsilon than 1e-5, perhaps a default of their own. Only inputs near zero show
    it, yet weights that were trained with one do not fit the other; pass the config's on."""

    def order(self, x):
        self.ln1.eps = self.ln2.eps = 1e-8
        return super().order(x)


# order and gradients


@step.mistake("model.TransformerBlock", source="public solutions of CS336")
class Parallel(Parts):
    """Both sublayers read what entered the block, and both results are added. The feed-forward network must
    read what attention has already added: two lines, one after the other."""

    def order(self, x):
        return x + self.look(self.ln1(x)) + self.think(self.ln2(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class FfnBeforeAttention(Parts):
    """The feed-forward network comes first and attention second, each with its own norm. It learns nearly as
    well, so no curve shows it, but pretrained weights do not fit."""

    def order(self, x):
        x = x + self.think(self.ln2(x))
        return x + self.look(self.ln1(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class AttentionSkipped(Parts):
    """Attention is computed but not used, or not called at all, so tokens never hear of each other and the
    model only counts pairs. Add its result to x."""

    def order(self, x):
        return x + self.think(self.ln2(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class FfnSkipped(Parts):
    """The block ends after attention. Two thirds of its weights do nothing, and the model can move
    information but hardly work on it; return x + ffn(ln2(x))."""

    def order(self, x):
        return x + self.look(self.ln1(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class AttentionDetached(Parts):
    """The output is right, but no gradient passes through attention, so its four projections keep their
    initial weights. The loss falls all the same; look for detach, .data or no_grad."""

    def order(self, x):
        x = x + self.look(self.ln1(x)).detach()
        return x + self.think(self.ln2(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class ResidualDetached(Parts):
    """The output is right, but the residual is detached, so gradients reach earlier blocks only through the
    sublayers and fade with depth. Add x itself."""

    def order(self, x):
        x = x.detach() + self.look(self.ln1(x))
        return x + self.think(self.ln2(x))


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class RopeNotHandedOn(Parts):
    """The block is given RoPE but does not hand it to its attention, which then knows no positions. Pass it
    when the attention is made."""

    def order(self, x):
        self.attn.rope = None
        return super().order(x)


@step.mistake("model.TransformerBlock", source="written for this catalogue")
class ResidualsAveraged(Parts):
    """Each sum is divided by 2, or by sqrt(2), to keep its size. What the embedding said then fades with
    each block; the norms take care of the size."""

    def order(self, x):
        x = (x + self.look(self.ln1(x))) / 2
        return (x + self.think(self.ln2(x))) / 2
