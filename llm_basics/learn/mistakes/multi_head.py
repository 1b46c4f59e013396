"""Multi-head self-attention: split into heads, attend causally in each, merge and project."""

import math

import torch
from einops import rearrange, repeat
from torch.nn import functional as tF

from llm_basics.core import functional as F
from llm_basics.core import layers
from llm_basics.learn import probes

step = probes.Step("multi_head")
draw = probes.numbers(seed=1)

D_MODEL, N_HEADS, SEQ = 12, 3, 5
CONTEXT, THETA = 32, 500.0


# --------------------------------------------------------------------------------------------------
# What is right


def rotated(x, positions, theta):
    """RoPE: each pair (2i, 2i+1) as a complex number, rotated by its angle."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    angles = positions[..., None] * theta ** -(torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def attention(x, q, k, v, o, n_heads=N_HEADS, theta=None, positions=None):
    """Causal attention of several heads, by torch; keys and values may have fewer heads."""
    d_head = q.shape[0] // n_heads
    q, k, v = (tF.linear(x, w).unflatten(-1, (-1, d_head)).transpose(-3, -2) for w in (q, k, v))
    if theta is not None:
        positions = torch.arange(x.shape[-2]) if positions is None else positions[:, None]
        q, k = rotated(q, positions, theta), rotated(k, positions, theta)
    k, v = (t.repeat_interleave(n_heads // t.shape[-3], -3) for t in (k, v))
    mixed = tF.scaled_dot_product_attention(q, k, v, is_causal=True)
    return tF.linear(mixed.transpose(-3, -2).flatten(-2), o)


def weights(d_model=D_MODEL, d_kv=None):
    d_kv = d_kv or d_model
    rows = {"q": d_model, "k": d_kv, "v": d_kv, "o": d_model}
    return {name: draw(n, d_model) * 1.7 / math.sqrt(d_model) for name, n in rows.items()}


def visibility_difference(expected, actual):
    """The first difference of two visibility tables [query, key], as a sentence."""
    if actual.shape != expected.shape:
        return f"expected results for {len(expected)} positions, got {len(actual)}"
    query, key = (expected != actual).nonzero()[0].tolist()
    if expected[query, key]:
        return f"position {query} does not see {'itself' if query == key else f'position {key}'}"
    return f"position {query} sees position {key}, which is in its future"


# --------------------------------------------------------------------------------------------------
# Probes


def seen(function, x):
    """Which positions of the output, rows, change with which of the input `x`, columns."""
    changed = x + torch.eye(len(x))[..., None] * CHANGE
    outputs = function(torch.cat([x[None], changed])).detach()
    return ((outputs[1:] - outputs[0]).abs().amax(-1) > 1e-4).T


CHANGE = 1 + draw(D_MODEL).abs()
SIGHT_INPUT = draw(8, D_MODEL)
SIGHT_WEIGHTS = {name: 0.5 * weight for name, weight in weights().items()}

step.value(
    "which position sees which: itself and all earlier ones",
    lambda a: seen(
        lambda x: a.run_multihead_self_attention(D_MODEL, N_HEADS, *SIGHT_WEIGHTS.values(), x), SIGHT_INPUT
    ),
    torch.ones(8, 8, dtype=torch.bool).tril(),
    axes="position seen",
    words=visibility_difference,
    contract="multi_head",
)

step.compare(
    "several heads",
    lambda a, x, q, k, v, o: a.run_multihead_self_attention(D_MODEL, N_HEADS, q, k, v, o, x),
    attention,
    {"x": draw(2, SEQ, D_MODEL)},
    weights(),
    atol=5e-5,
    axes="batch position feature",
    contract="multi_head",
)

step.compare(
    "several leading dimensions",
    lambda a, x, q, k, v, o: a.run_multihead_self_attention(D_MODEL, N_HEADS, q, k, v, o, x),
    attention,
    {"x": draw(2, 4, SEQ, D_MODEL)},
    weights(),
    atol=5e-5,
    axes="batch group position feature",
    beyond="a layer is called with as many leading axes as the model needs; the public test has one",
)

# as long as the context, so that the last position is the last there is
FILLED = {"x": draw(2, SEQ, D_MODEL)}
FILLED_WEIGHTS = weights()
step.compare(
    "RoPE, positions from 0, a sequence that fills the context",
    lambda a, x, positions, q, k, v, o: a.run_multihead_self_attention_with_rope(
        D_MODEL, N_HEADS, SEQ, THETA, q, k, v, o, x, positions
    ),
    lambda x, positions, q, k, v, o: attention(x, q, k, v, o, theta=THETA),
    FILLED | {"positions": torch.arange(SEQ)[None]},
    FILLED_WEIGHTS,
    axes="batch position feature",
    atol=5e-5,
    contract="multi_head_rope",
)

step.compare(
    "RoPE, positions not given: from 0",
    lambda a, x, q, k, v, o: a.run_multihead_self_attention_with_rope(
        D_MODEL, N_HEADS, SEQ, THETA, q, k, v, o, x
    ),
    lambda x, q, k, v, o: attention(x, q, k, v, o, theta=THETA),
    FILLED,
    FILLED_WEIGHTS,
    axes="batch position feature",
    atol=5e-5,
    beyond="positions are optional by their default, but the public test always passes them",
)

step.compare(
    "RoPE, given positions with gaps",
    lambda a, x, positions, q, k, v, o: a.run_multihead_self_attention_with_rope(
        D_MODEL, N_HEADS, CONTEXT, THETA, q, k, v, o, x, positions
    ),
    lambda x, positions, q, k, v, o: attention(x, q, k, v, o, theta=THETA, positions=positions),
    {"x": draw(2, SEQ, D_MODEL), "positions": torch.tensor([[3, 4, 9, 11, 30]])},
    weights(),
    axes="batch position feature",
    atol=5e-5,
    contract="multi_head_rope",
)

# as many texts as heads, so that positions without an axis for the heads broadcast to the wrong one
step.compare(
    "RoPE, positions for each sequence",
    lambda a, x, positions, q, k, v, o: a.run_multihead_self_attention_with_rope(
        D_MODEL, N_HEADS, CONTEXT, THETA, q, k, v, o, x, positions
    ),
    lambda x, positions, q, k, v, o: attention(x, q, k, v, o, theta=THETA, positions=positions),
    {
        "x": draw(3, SEQ, D_MODEL),
        "positions": torch.tensor([[3, 4, 9, 11, 30], [0, 7, 8, 20, 31], [1, 2, 3, 4, 8]]),
    },
    weights(),
    axes="batch position feature",
    atol=5e-5,
    beyond="packed sequences have positions of their own; the public test has the same for all",
)

step.compare(
    "6 query heads that share 2 key and value heads",
    lambda a, x, q, k, v, o: a.run_grouped_query_attention(24, 6, 2, q, k, v, o, x),
    lambda x, q, k, v, o: attention(x, q, k, v, o, n_heads=6),
    {"x": draw(2, SEQ, 24)},
    weights(24, d_kv=8),
    axes="batch position feature",
)

step.compare(
    "a text in chunks of 3, 1 and 3 tokens, with a cache",
    lambda a, x, q, k, v, o: a.run_cached_attention(
        D_MODEL, N_HEADS, 7, THETA, q, k, v, o, list(x.split([3, 1, 3], dim=1))
    ),
    lambda x, q, k, v, o: attention(x, q, k, v, o, theta=THETA),
    {"x": draw(2, 7, D_MODEL)},
    weights(),
    axes="batch position feature",
    atol=5e-5,
    gradients=False,
)

step.compare(
    "a batch of one sequence of one token",
    lambda a, x, q, k, v, o: a.run_multihead_self_attention(D_MODEL, N_HEADS, q, k, v, o, x),
    attention,
    {"x": draw(1, 1, D_MODEL)},
    weights(),
    atol=5e-5,
    axes="batch position feature",
    gradients=False,
    contract="multi_head",
)


# the first feature of each head is 1 at every position, and makes all scores -80,000
LOW = draw(1, SEQ, D_MODEL)
LOW[..., :: D_MODEL // N_HEADS] = 1
FIRST_FEATURES = torch.diag((torch.arange(D_MODEL) % (D_MODEL // N_HEADS) == 0).float())
step.compare(
    "scores of -80,000",
    lambda a, x, q, k, v, o: a.run_multihead_self_attention(D_MODEL, N_HEADS, q, k, v, o, x),
    attention,
    {"x": LOW},
    weights() | {"q": -400 * FIRST_FEATURES, "k": 400 * FIRST_FEATURES},
    atol=1e-4,
    axes="batch position feature",
    gradients=False,
    contract="multi_head",
)


# --------------------------------------------------------------------------------------------------
# Mistakes


class InParts(layers.MultiHeadSelfAttention):
    """The right attention in parts, of which each mistake replaces one."""

    def forward(self, x, token_positions=None, cache=None):
        q, k, v = self.project(x)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        start = cache.length if cache is not None else 0
        if self.rope is not None:
            q, k, v = self.rotate(q, k, v, self.positions(x, token_positions, start))
        if cache is not None:
            k, v = cache.append(k, v)
        mask = self.mask(q.shape[-2], k.shape[-2], start)
        return self.finish(self.attend(q, self.share(k), self.share(v), mask), x)

    def project(self, x):
        return self.split(self.q_proj(x)), self.split(self.k_proj(x)), self.split(self.v_proj(x))

    def split(self, x):
        return rearrange(x, "... seq (heads d) -> ... heads seq d", d=self.d_head)

    def positions(self, x, given, start):
        given = torch.arange(start, start + x.shape[-2]) if given is None else given
        return rearrange(given, "... seq -> ... 1 seq")

    def rotate(self, q, k, v, positions):
        return self.rope(q, positions), self.rope(k, positions), v

    def mask(self, queries, keys, start):
        return torch.ones(queries, keys, dtype=torch.bool).tril(start)

    def share(self, x):
        return repeat(x, "... heads seq d -> ... (heads group) seq d", group=self.n_heads // x.shape[-3])

    def attend(self, q, k, v, mask):
        return self.probabilities(self.scores(q, k), mask) @ v

    def scores(self, q, k):
        return q @ k.mT / math.sqrt(self.d_head)

    def probabilities(self, scores, mask):
        probabilities = tF.softmax(scores.masked_fill(~mask, -math.inf), dim=-1)
        return tF.dropout(probabilities, self.dropout, self.training)

    def finish(self, mixed, x):
        return self.output_proj(self.merge(mixed))

    def merge(self, mixed):
        return rearrange(mixed, "... heads seq d -> ... seq (heads d)")

    def theta(self):
        """Read from the tables: the second pair rotates by theta^(-2 / d_head) per position."""
        return math.asin(self.rope.sin[1, 1]) ** -(self.d_head / 2)


# causal masks


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336")
class NoCausalMask(InParts):
    """Every position sees the whole sequence, including the token that it must predict. The loss falls to
    nearly 0, while samples are nonsense, since in generation there is no future to copy. Mask later keys with
    a lower triangle."""

    def mask(self, queries, keys, start):
        return torch.ones(queries, keys, dtype=torch.bool)


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336")
class MaskOneTooFar(InParts):
    """Each position also sees the next one, the very token that it must predict: the loss falls to nearly 0,
    and samples are nonsense. The visible triangle ends on the diagonal: tril(0), or triu(1) for what is
    masked."""

    def mask(self, queries, keys, start):
        return torch.ones(queries, keys, dtype=torch.bool).tril(start + 1)


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336")
class MaskOneTooShort(InParts):
    """A position does not see itself, and the first one sees nothing: the softmax of a row of -inf is 0/0 =
    NaN. Mask what is above the diagonal, not the diagonal: triu(diagonal=1)."""

    def mask(self, queries, keys, start):
        return torch.ones(queries, keys, dtype=torch.bool).tril(start - 1)


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class MaskOneTooShortWithoutNan(MaskOneTooShort):
    """A position does not see itself, and the first one, which sees nothing, gets zeros. There is no error
    and no NaN. The visible triangle must include the diagonal."""

    def probabilities(self, scores, mask):
        return super().probabilities(scores, mask).nan_to_num(0.0)


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class MaskUpsideDown(InParts):
    """Each position sees itself and later positions instead of earlier ones: triu is used instead of tril, or
    True means masked in one place and visible in another. Print the mask for 3 tokens."""

    def mask(self, queries, keys, start):
        return torch.ones(queries, keys, dtype=torch.bool).triu(start)


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class OnlyItselfIsSeen(InParts):
    """Each position attends to itself only, so no information moves between positions, and the model can only
    learn bigrams. The mask must be a full lower triangle, not the diagonal."""

    def mask(self, queries, keys, start):
        return torch.eye(queries, keys, dtype=torch.bool)


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class OnlyOnePositionBack(InParts):
    """Each position sees itself and the previous one only: the mask is a band instead of a triangle. Text is
    plausible over short distances only; remove the second bound of the mask."""

    def mask(self, queries, keys, start):
        return torch.ones(queries, keys, dtype=torch.bool).tril(start).triu(start - 1)


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336")
class MaskedAfterTheSoftmax(InParts):
    """Later positions are zeroed after the softmax, so they still count in the denominator: rows do not sum
    to 1, and the future leaks through it. Fill the scores with -inf before the softmax."""

    def probabilities(self, scores, mask):
        return tF.softmax(scores, dim=-1) * mask


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336")
class MaskedWithZero(InParts):
    """The scores of later positions are set to 0, which is an ordinary score with e^0 = 1 in the softmax, so
    the future is still visible. Set them to -inf."""

    def probabilities(self, scores, mask):
        return tF.softmax(scores.masked_fill(~mask, 0.0), dim=-1)


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class MaskedWithMinus100(InParts):
    """The scores of later positions are set to a number that is usually low enough, such as -100 or -10,000.
    Scores of a trained model can be lower, and then the future is visible. Only -inf is below every score."""

    def probabilities(self, scores, mask):
        return tF.softmax(scores.masked_fill(~mask, -1e4), dim=-1)


# heads


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336")
class HeadsSplitByView(InParts):
    """The projections are viewed directly as (heads, seq, d_head), which splits the sequence instead of the
    features. The shape is right, the content is not. View as (seq, heads, d_head), then transpose heads and
    seq."""

    def split(self, x):
        return x.reshape(*x.shape[:-2], x.shape[-1] // self.d_head, x.shape[-2], self.d_head)


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336")
class HeadsMergedWithoutTranspose(InParts):
    """The outputs of the heads are reshaped from (heads, seq, d_head) directly to (seq, d_model), which mixes
    positions. Transpose heads and seq back before the reshape."""

    def merge(self, mixed):
        return mixed.reshape(*mixed.shape[:-3], mixed.shape[-2], -1)


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class HeadsSplitAndMergedByView(HeadsSplitByView):
    """Heads are split and merged by a view without a transpose. There is no error, but each head attends
    within its own part of the sequence. Transpose heads and seq after the split, and back before the
    merge."""

    def merge(self, mixed):
        return mixed.reshape(*mixed.shape[:-3], mixed.shape[-2], -1)


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class HeadsAttendToEachOther(InParts):
    """The heads axis was not moved before the sequence axis, so the heads of one token attend to each other,
    and tokens never do. The last two axes of q, k and v must be (seq, d_head)."""

    def attend(self, q, k, v, mask):
        q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
        return super().attend(q, k, v, torch.ones(q.shape[-2], k.shape[-2]).tril() > 0).transpose(-3, -2)


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class HeadsInterleaved(InParts):
    """A head takes every n_heads-th feature instead of d_head adjacent ones. A model can learn this way, but
    pretrained weights do not fit. The feature axis is (heads d_head), heads first."""

    def split(self, x):
        return rearrange(x, "... seq (d heads) -> ... heads seq d", d=self.d_head)

    def merge(self, mixed):
        return rearrange(mixed, "... heads seq d -> ... seq (d heads)")


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class OneLargeHead(InParts):
    """All features form a single head, so there is one attention distribution instead of n_heads. Check that
    the scores have shape (batch, heads, queries, keys)."""

    def attend(self, q, k, v, mask):
        scores = self.merge(q) @ self.merge(k).mT / math.sqrt(self.d_head * self.n_heads)
        return self.probabilities(scores, mask).unsqueeze(-3) @ v


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class SoftmaxOverTheHeads(InParts):
    """The softmax is taken over the heads axis, so heads compete with each other instead of keys. The weights
    of one query must sum to 1 over the keys: dim=-1."""

    def probabilities(self, scores, mask):
        return tF.softmax(scores, dim=-3).masked_fill(~mask, 0.0)


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class SoftmaxOverTheBatch(InParts):
    """The softmax is taken over axis 0, the batch, so sequences compete with each other instead of keys. The
    weights of one query must sum to 1 over the keys: dim=-1."""

    def probabilities(self, scores, mask):
        return tF.softmax(scores, dim=0).masked_fill(~mask, 0.0)


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336")
class OnlyOneBatchAxis(InParts):
    """`batch, seq, d_model = x.shape` fails for inputs with more leading axes, or with none. Use the last two
    axes and keep all others: x.shape[:-2], or ... in einops."""

    def forward(self, x, token_positions=None, cache=None):
        _batch, _seq, _d_model = x.shape
        return super().forward(x, token_positions, cache)


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class AxesOfSize1Removed(InParts):
    """squeeze() without an axis removes every axis of size 1, so a batch of one or a single token has another
    shape than any other. Drop the squeeze, or name its axis."""

    def finish(self, mixed, x):
        return super().finish(mixed, x).squeeze()


# scale


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336")
class ScaleOfTheModel(InParts):
    """The scores are divided by sqrt(d_model) instead of sqrt(d_head): too small by a factor of
    sqrt(n_heads), so attention is too flat. Use the width of one head."""

    def scores(self, q, k):
        return q @ k.mT / math.sqrt(self.n_heads * self.d_head)


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336")
class NoScale(InParts):
    """The scores are not divided by sqrt(d_head). They grow with the width of the head, the softmax
    saturates, and gradients are small. The model still learns, so no loss curve shows it."""

    def scores(self, q, k):
        return q @ k.mT


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class ScaledTwice(InParts):
    """Queries are divided by sqrt(d_head) before an attention function that divides by it as well, so
    attention is too flat. Scale in one of the two places only."""

    def scores(self, q, k):
        return (q / math.sqrt(self.d_head)) @ k.mT / math.sqrt(self.d_head)


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class ScaleByTheNumberOfHeads(InParts):
    """The scores are divided by sqrt(n_heads): the size was read from the heads axis instead of d_head. Check
    the order of the axes of q where its size is read."""

    def scores(self, q, k):
        return q @ k.mT / math.sqrt(self.n_heads)


# projections


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336")
class NoOutputProjection(InParts):
    """The merged heads are returned without the output projection, so the results of the heads are not mixed,
    and output_proj never learns. Apply it at the end."""

    def finish(self, mixed, x):
        return self.merge(mixed)


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class OutputProjectionUntransposed(InParts):
    """The output weight is used as `x @ W` instead of `x @ W.T`; it is square, so there is no error. Weights
    are stored as (d_out, d_in)."""

    def finish(self, mixed, x):
        return tF.linear(self.merge(mixed), self.output_proj.weight.mT, self.output_proj.bias)


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336")
class KeysAndValuesExchanged(InParts):
    """Keys come from the value projection and values from the key projection. A new model learns just as
    well, but pretrained weights do not fit. Compare the order of the arguments with that of the
    parameters."""

    def project(self, x):
        q, k, v = super().project(x)
        return q, v, k


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class QueriesAndKeysExchanged(InParts):
    """Queries come from the key projection and keys from the query projection. A new model learns just as
    well, but pretrained weights do not fit, and grouped-query attention fails. Check where q and k are
    unpacked."""

    def project(self, x):
        return self.split(self.k_proj(x)), self.split(self.q_proj(x)), self.split(self.v_proj(x))


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class KeysFromTheQueryProjection(InParts):
    """The keys are computed with the query projection, perhaps a copied line. k_proj is never used and never
    learns."""

    def project(self, x):
        return self.split(self.q_proj(x)), self.split(self.q_proj(x)), self.split(self.v_proj(x))


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class ValuesFromTheKeyProjection(InParts):
    """The values are computed with the key projection, perhaps a copied line. v_proj is never used and never
    learns."""

    def project(self, x):
        return self.split(self.q_proj(x)), self.split(self.k_proj(x)), self.split(self.k_proj(x))


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class ValuesAreTheInput(InParts):
    """The input itself is used as values instead of its value projection, so v_proj never learns. Attention
    needs three projections of x: queries, keys and values."""

    def project(self, x):
        values = x[..., : self.n_kv_heads * self.d_head]
        return self.split(self.q_proj(x)), self.split(self.k_proj(x)), self.split(values)


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class ResidualInside(InParts):
    """The input is added to the result inside attention. The block adds it as well, so it counts twice; leave
    the residual connection to the block."""

    def finish(self, mixed, x):
        return x + super().finish(mixed, x)


# gradients


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336; passes its suite")
class ProbabilitiesDetached(InParts):
    """The output is correct, but no gradient passes through the attention weights, so q_proj and k_proj never
    learn, while the loss still falls. Look for detach, .data, no_grad or a numpy copy."""

    def probabilities(self, scores, mask):
        return super().probabilities(scores, mask).detach()


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class KeysAndValuesDetached(InParts):
    """Keys and values are detached, as for a cache, in training too: the output is correct, but k_proj and
    v_proj never learn. Detach only in generation."""

    def project(self, x):
        q, k, v = super().project(x)
        return q, k.detach(), v.detach()


# RoPE


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class RopeForgotten(InParts):
    """RoPE is passed but never applied, so attention has no positions except those implied by the mask.
    Rotate queries and keys before their dot product."""

    def rotate(self, q, k, v, positions):
        return q, k, v


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336")
class RopeOnValuesToo(InParts):
    """Values are rotated as well as queries and keys. A rotation cancels only in the dot product of two
    rotated vectors; rotated values stay rotated."""

    def rotate(self, q, k, v, positions):
        return self.rope(q, positions), self.rope(k, positions), self.rope(v, positions)


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336")
class RopeOnQueriesOnly(InParts):
    """Queries are rotated, keys are not, so the scores depend on the absolute position of the query instead
    of the distance. Rotate both by their positions."""

    def rotate(self, q, k, v, positions):
        return self.rope(q, positions), k, v


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336")
class RopeBeforeTheSplit(InParts):
    """RoPE is applied to all d_model features at once, so each head gets different frequencies, and the last
    head hardly rotates. Split into heads first; each head uses all frequencies, from 1 radian down."""

    def rotate(self, q, k, v, positions):
        positions = positions.squeeze(-2)
        return self.split(self.whole(q, positions)), self.split(self.whole(k, positions)), v

    def whole(self, x, positions):
        x = self.merge(x)
        cos, sin = F.rope_tables(x.shape[-1], len(self.rope.cos), self.theta())
        return F.apply_rope(x, cos[positions], sin[positions])


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336; passes its suite")
class GivenPositionsIgnored(InParts):
    """token_positions is ignored, and positions are always 0, 1, 2, ... With gaps, padding or a cache the
    angles are wrong. Index the tables of cosine and sine with the given positions."""

    def positions(self, x, given, start):
        return super().positions(x, None, start)


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336")
class PositionsFromOne(InParts):
    """Positions count from 1. RoPE depends on distances only, so nothing shows until a sequence fills the
    context, whose last position is then beyond the tables. Count from 0."""

    def positions(self, x, given, start):
        return super().positions(x, given, start) + (given is None)


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class PositionsOfTheFirstText(InParts):
    """All sequences of the batch use the positions of the first one. Those that start elsewhere come out
    wrong; keep the batch axis of token_positions."""

    def positions(self, x, given, start):
        return super().positions(x, given[0] if given is not None and given.ndim > 1 else given, start)


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class PositionsWithoutHeadAxis(InParts):
    """Positions of shape (batch, seq) are combined with queries of shape (batch, heads, seq, d_head): batch
    broadcasts against heads. It fails, or is silently wrong if both have the same size. Unsqueeze at dim
    -2."""

    def positions(self, x, given, start):
        return super().positions(x, given, start).squeeze(-2)


# grouped heads


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336")
class SharedHeadsTiled(InParts):
    """Key and value heads are repeated as 0 1 0 1 instead of 0 0 1 1, so queries use the heads of another
    group. Use repeat_interleave instead of repeat along the heads axis."""

    def share(self, x):
        return repeat(x, "... heads seq d -> ... (group heads) seq d", group=self.n_heads // x.shape[-3])


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336")
class KvHeadsIgnored(InParts):
    """n_kv_heads has no effect: keys and values always have n_heads heads. k_proj and v_proj must
    have n_kv_heads * d_head rows and be split into n_kv_heads heads, each repeated for its group of query
    heads."""

    def split(self, x):
        return x.view(*x.shape[:-1], self.n_heads, self.d_head).transpose(-3, -2)


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class FirstSharedHeadForAll(InParts):
    """All query heads use the first key and value head; the others are computed and not used. Repeat each
    head for its group of query heads."""

    def share(self, x):
        return super().share(x) if x.shape[-3] == self.n_heads else super().share(x[..., :1, :, :])


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class ValuesSharedInAnotherOrder(InParts):
    """Keys are repeated as 0 0 1 1 but values as 0 1 0 1, so a query mixes values of another head than that
    of its keys. Use the same repeat_interleave for both."""

    def attend(self, q, k, v, mask):
        groups = self.n_heads // self.n_kv_heads
        return super().attend(q, k, rearrange(v, "... (h g) s d -> ... (g h) s d", g=groups), mask)


# cache


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336")
class CachedPositionsRestart(InParts):
    """The positions of each chunk start at 0 again, although the cache holds earlier tokens, so all chunks
    but the first are rotated by wrong angles. Continue from cache.length."""

    def positions(self, x, given, start):
        return super().positions(x, given, 0)


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class CachedMaskWithoutOffset(InParts):
    """The mask counts queries from 0, although they follow the cached tokens, so a new token sees only the
    first tokens of the sequence. Shift the triangle by the number of cached tokens."""

    def mask(self, queries, keys, start):
        return super().mask(queries, keys, 0)


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class NoMaskWithACache(InParts):
    """With a cache there is no mask at all. That is right for a single new token, but in a longer chunk each
    token sees the later ones. Mask within the chunk."""

    def mask(self, queries, keys, start):
        return super().mask(queries, keys, start) if not start else super().mask(queries, keys, keys)


@step.mistake("layers.MultiHeadSelfAttention", source="public solutions of CS336")
class CachedMaskOneTooShort(InParts):
    """With cached tokens the mask is one too short, so a new token does not see itself. The offset is the
    number of cached tokens before this chunk was appended."""

    def mask(self, queries, keys, start):
        return super().mask(queries, keys, max(start - 1, 0))


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class CacheIgnored(InParts):
    """The cache is accepted but neither filled nor read, so each chunk sees only itself. Append the new keys
    and values, and attend to all that append returns."""

    def forward(self, x, token_positions=None, cache=None):
        return super().forward(x, token_positions)


@step.mistake("layers.MultiHeadSelfAttention", source="written for this catalogue")
class CachedQueriesStartAtZero(InParts):
    """The keys of a chunk are rotated by their positions in the whole sequence, but its queries from 0 again,
    so distances are wrong after the first chunk. Both continue from cache.length."""

    def positions(self, x, given, start):
        self.start = start
        return super().positions(x, given, start)

    def rotate(self, q, k, v, positions):
        return self.rope(q, positions - self.start), self.rope(k, positions), v
