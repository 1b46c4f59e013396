"""Attention: `softmax(Q K^T / sqrt(d_k)) V`, with a mask of the visible keys of each query."""

import math

import torch
from torch.nn import functional as tF

from llm_basics.core import functional as F
from llm_basics.learn import grids, probes

step = probes.Step("attention")
draw = probes.numbers(seed=11)


def whether_seen(expected, actual):
    """The first query that sees a key wrongly, of outputs that are the weights themselves."""
    if actual.shape != expected.shape:
        return f"the shape must be {tuple(expected.shape)}, got {tuple(actual.shape)}"
    if actual.isnan().any():
        return "the output contains NaN"
    for wrong, text in (
        ((expected == 0) & (actual.abs() > 1e-5), "query {} sees key {}, which it must not"),
        ((expected > 1e-5) & (actual.abs() < 1e-7), "query {} does not see key {}, which it may"),
    ):
        if wrong.any():
            return text.format(*wrong.nonzero()[0][-2:].tolist())
    off = (expected - actual).abs().max().item()
    query, key = ((expected - actual).abs() >= min(1e-4, off)).nonzero()[0][-2:].tolist()
    right, found = (t.reshape(-1, *t.shape[-2:])[:, query, key][0].item() for t in (expected, actual))
    return f"query {query} gives key {key} weight {found:.4g}, expected {right:.4g}"


def compare(about, inputs, right=None, **options):
    step.compare(
        about,
        lambda a, **inputs: a.run_scaled_dot_product_attention(*inputs.values()),
        right or (lambda q, k, v, mask=None: tF.scaled_dot_product_attention(q, k, v, mask)),
        inputs,
        **options,
    )


def once_and_again(a):
    same = torch.linspace(-1, 1, 24).reshape(2, 4, 3)
    seen = torch.ones(2, 4, 4, dtype=torch.bool)
    return torch.equal(
        *(a.run_scaled_dot_product_attention(*(same.clone() for _ in range(3)), seen) for _ in range(2))
    )


def unmasked(*axes):
    """A mask that hides nothing: the public tests always pass one."""
    return {"mask": torch.ones(*axes, dtype=torch.bool)}


# --------------------------------------------------------------------------------------------------
# Nothing masked

QKV = {"q": draw(2, 3, 4, 6), "k": draw(2, 3, 5, 6), "v": draw(2, 3, 5, 7)}

step.value(
    "the same input twice",
    once_and_again,
    True,
    words=lambda expected, actual: "a second call with the same input gives a different output",
    contract="attention",
)
compare(
    "4 queries, 5 keys, values of another width",
    QKV | unmasked(2, 3, 4, 5),
    axes="batch head query feature",
    gradients=False,
    contract="attention",
)
compare(
    "as many queries as keys, with gradients",
    {"q": draw(3, 5, 6), "k": draw(3, 5, 6), "v": draw(3, 5, 7)} | unmasked(3, 5, 5),
    axes="head query feature",
    contract="attention",
)
compare(
    "no mask",
    QKV,
    axes="batch head query feature",
    beyond="a mask is optional by its default, but the public tests always pass one",
)
# scores of up to some hundreds in the first query, small ones in the others
compare(
    "queries of very different sizes",
    {
        "q": draw(2, 4, 6) * torch.tensor([300, 1, 0.1, 1]).reshape(4, 1),
        "k": draw(2, 5, 6),
        "v": draw(2, 5, 7),
    }
    | unmasked(2, 4, 5),
    axes="head query feature",
    gradients=False,
    rtol=1e-3,
    atol=1e-4,
    contract="attention",
)

# --------------------------------------------------------------------------------------------------
# With a mask

MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 0, 0], [1, 0, 1, 1, 1], [0, 0, 1, 0, 1]]).bool()
MASKS = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.5
MASKS[..., 1] = True

# values that are the identity make the output the weights themselves
compare(
    "which keys a mask lets each query see",
    {"q": draw(1, 4, 6), "k": draw(1, 5, 6), "v": torch.eye(5)[None], "mask": MASK[None]},
    axes="batch query key",
    gradients=False,
    words=whether_seen,
    contract="attention",
)
compare(
    "one mask for all heads",
    QKV | {"mask": MASK},
    axes="batch head query feature",
    beyond="a causal mask is the same for all heads; the public tests have one for each",
)
compare("a mask for each head", QKV | {"mask": MASKS}, axes="batch head query feature", contract="attention")
compare(
    "a mask, and scores far below zero",
    {
        "q": -20 * torch.ones(1, 4, 6),
        "k": 1 + draw(1, 5, 6).abs(),
        "v": draw(1, 5, 7),
        "mask": MASK[None],
    },
    axes="batch query feature",
    gradients=False,
    rtol=1e-3,
    atol=1e-4,
    contract="attention",
)
# scores below -1e5: sums of small integers, which are exact in any order
FAR_BELOW = torch.tensor([-30_000.0, 1, 1, 1]).repeat(1, 4, 1)
SMALL = torch.tensor([[10.0, 1, 0, -1], [10, 2, 1, 0], [10, 0, -1, 0], [10, 1, 1, 1], [10, -2, 0, 1]])
compare(
    "a mask, and scores of -150,000",
    {"q": FAR_BELOW, "k": SMALL[None], "v": torch.eye(5)[None], "mask": MASK[None]},
    axes="batch query key",
    gradients=False,
    words=whether_seen,
    contract="attention",
)
compare(
    "float16 numbers with a mask",
    {name: tensor.half() for name, tensor in QKV.items()} | {"mask": MASK},
    lambda q, k, v, mask: tF.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask).half(),
    axes="batch head query feature",
    gradients=False,
    rtol=2e-2,
    atol=2e-2,
    beyond="the public tests have float32 alone; a mask of -1e9 is no float16",
)

# --------------------------------------------------------------------------------------------------
# Causal

step.compare(
    "causal: which keys each query sees",
    lambda a, q, k, v: a.run_causal_attention(q, k, v),
    lambda q, k, v: tF.scaled_dot_product_attention(q, k, v, is_causal=True),
    {"q": draw(5, 6), "k": draw(5, 6), "v": torch.eye(5)},
    axes="query key",
    gradients=False,
    words=whether_seen,
)
step.compare(
    "causal: fewer queries than keys, counted from the first",
    lambda a, q, k, v: a.run_causal_attention(q, k, v),
    lambda q, k, v: tF.scaled_dot_product_attention(q, k, v, is_causal=True),
    {"q": draw(2, 3, 6), "k": draw(2, 5, 6), "v": torch.eye(5).expand(2, 5, 5)},
    axes="head query key",
    gradients=False,
    words=whether_seen,
)

# --------------------------------------------------------------------------------------------------
# A query that may see nothing

UNSEEING = MASK.clone()
UNSEEING[2] = False


def zeros_for_the_unseeing(q, k, v, mask):
    return tF.scaled_dot_product_attention(q, k, v, MASK).masked_fill(~mask.any(-1, keepdim=True), 0.0)


compare(
    "a fully masked row gives zeros",
    {"q": draw(2, 4, 6), "k": draw(2, 5, 6), "v": draw(2, 5, 7), "mask": UNSEEING},
    zeros_for_the_unseeing,
    axes="head query feature",
    beyond="a query that sees nothing is 0/0, and its NaN reaches every weight through the gradient",
)

# a scale that is right for one width only shows here
compare(
    "keys of 16 features instead of 6",
    {"q": draw(2, 4, 16), "k": draw(2, 5, 16), "v": draw(2, 5, 7)} | unmasked(2, 4, 5),
    axes="head query feature",
    gradients=False,
    contract="attention",
)


# --------------------------------------------------------------------------------------------------
# Mistakes: the scores


def scores_of(query, key):
    return query @ key.mT / math.sqrt(query.shape[-1])


def mask_of(query, key, mask, is_causal):
    """The effective mask, or None."""
    return F.causal_mask(query.shape[-2], key.shape[-2], device=query.device) if is_causal else mask


def weigh(scores, value, mask, dim=-1):
    """The correct computation after the scores."""
    if mask is None:
        return F.softmax(scores, dim) @ value
    unmatched = ~mask.any(-1, keepdim=True)
    masked = scores.masked_fill(~mask, -math.inf).masked_fill(unmatched, 0.0)
    return F.softmax(masked, dim).masked_fill(unmatched, 0.0) @ value


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def no_scale(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The scores are not divided by sqrt(d_k). They then grow with the width of the head, softmax saturates
    on nearly a single key, and learning is slow."""
    return weigh(query @ key.mT, value, mask_of(query, key, mask, is_causal))


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def scale_without_root(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The scores are divided by d_k instead of its square root, so all keys get nearly the same weight.
    Divide by math.sqrt(d_k)."""
    return weigh(query @ key.mT / query.shape[-1], value, mask_of(query, key, mask, is_causal))


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def multiplied_with_the_scale(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The scores are multiplied by sqrt(d_k) instead of divided by it. Look for * instead of /, or for a
    missing minus in d_k ** -0.5."""
    return weigh(query @ key.mT * math.sqrt(query.shape[-1]), value, mask_of(query, key, mask, is_causal))


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def scale_of_the_values(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The scores are divided by sqrt(d_v). They are sums over the d_k features of queries and keys, so the
    width of the query matters; that of the value may differ."""
    return weigh(query @ key.mT / math.sqrt(value.shape[-1]), value, mask_of(query, key, mask, is_causal))


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def scale_of_the_sequence(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The scores are divided by the root of the number of keys. d_k is the last axis of the queries,
    query.shape[-1], not the sequence length."""
    return weigh(query @ key.mT / math.sqrt(key.shape[-2]), value, mask_of(query, key, mask, is_causal))


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def scaled_after_the_softmax(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The weights are divided by sqrt(d_k) after the softmax, so they do not sum to 1. Scale the scores,
    before the softmax."""
    mixed = weigh(query @ key.mT, value, mask_of(query, key, mask, is_causal))
    return mixed / math.sqrt(query.shape[-1])


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def keys_reshaped_instead_of_transposed(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The keys are transposed with view or reshape, which keeps the order in memory and thus mixes numbers of
    different keys. Swap the last two axes: key.transpose(-2, -1)."""
    turned = key.reshape(*key.shape[:-2], key.shape[-1], key.shape[-2])
    return weigh(query @ turned / math.sqrt(query.shape[-1]), value, mask_of(query, key, mask, is_causal))


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def query_and_key_exchanged(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The scores are K Q^T, which has a row per key. Use Q K^T, which has a row per query; the softmax
    normalizes each row."""
    return weigh(scores_of(key, query), value, mask_of(query, key, mask, is_causal))


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def keys_mixed_instead_of_values(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The weights are multiplied by the keys instead of the values. Keys only determine the weights; the
    result is a weighted mean of the values."""
    return weigh(scores_of(query, key), key, mask_of(query, key, mask, is_causal))


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def query_scaled_in_place(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The caller's queries are divided in place, so a second call divides them again. Write query = query /
    sqrt(d_k) instead of query /= sqrt(d_k), or scale the scores."""
    query /= math.sqrt(query.shape[-1])
    return weigh(query @ key.mT, value, mask_of(query, key, mask, is_causal))


# --------------------------------------------------------------------------------------------------
# Mistakes: the softmax


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def softmax_over_queries(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The softmax is taken over the queries, so the weights of one query do not sum to 1. Take it over the
    keys, the last axis of the scores: dim=-1."""
    return weigh(scores_of(query, key), value, mask_of(query, key, mask, is_causal), dim=-2)


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def softmax_over_axis_1(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The softmax is taken over axis 1, which is the heads axis if there are four axes. Count from the end,
    so that any leading axes work: dim=-1."""
    return weigh(scores_of(query, key), value, mask_of(query, key, mask, is_causal), dim=1)


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def softmax_over_axis_0(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The softmax is taken over axis 0, which is the batch, so the weights of one query do not sum to 1.
    Count from the end, so that any leading axes work: dim=-1."""
    return weigh(scores_of(query, key), value, mask_of(query, key, mask, is_causal), dim=0)


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def no_softmax(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The raw scores are used as weights. Softmax must turn them into weights that are positive and sum to 1
    for each query."""
    mask = mask_of(query, key, mask, is_causal)
    scores = scores_of(query, key)
    return (scores if mask is None else scores.masked_fill(~mask, 0.0)) @ value


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def no_maximum_subtracted(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The softmax takes exp of the raw scores, which overflows above 88, and inf / inf = NaN. Subtract the
    largest score of each query first; it cancels."""
    mask = mask_of(query, key, mask, is_causal)
    scores = scores_of(query, key)
    powers = (scores if mask is None else scores.masked_fill(~mask, -math.inf)).exp()
    return powers / powers.sum(-1, keepdim=True) @ value


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336; passes its suite")
def one_maximum_for_all(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """A single maximum is subtracted from all scores. For queries whose scores are all far below it, the
    result is 0/0 = NaN. Subtract each query's own maximum: amax(-1, keepdim=True)."""
    mask = mask_of(query, key, mask, is_causal)
    scores = scores_of(query, key)
    scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    powers = (scores - scores.max()).exp()
    return powers / powers.sum(-1, keepdim=True) @ value


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336; passes its suite")
def weights_detached(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The output is correct, but no gradient passes through the attention weights, so queries and keys never
    learn. Look for .detach(), .data, .item() or torch.no_grad() around scores and softmax."""
    scores = scores_of(query, key).detach()
    return weigh(scores, value, mask_of(query, key, mask, is_causal))


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def dropout_always(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """Some weights are dropped although dropout is off. torch's functional dropout is active unless
    training=False is passed; make it depend on self.training and on dropout_p."""
    mask, keys = mask_of(query, key, mask, is_causal), torch.eye(key.shape[-2]).to(value)
    return tF.dropout(weigh(scores_of(query, key), keys, mask), 0.1) @ value


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def result_left_in_float32(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """Half-precision inputs are converted to float32 for the softmax, which is right, but the result stays in
    float32, and the next layer fails. Convert it back to the dtype of the query."""
    scores = scores_of(F.to_float32(query), F.to_float32(key))
    return weigh(scores, F.to_float32(value), mask_of(query, key, mask, is_causal))


# --------------------------------------------------------------------------------------------------
# Mistakes: the mask


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def mask_inverted(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """Each query sees exactly the keys that it must not see. The mask is True where a query may attend, so
    fill the scores with -inf where it is False: masked_fill(~mask, -inf)."""
    mask = mask_of(query, key, mask, is_causal)
    return weigh(scores_of(query, key), value, mask if mask is None else ~mask)


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def mask_ignored(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The mask has no effect, so every query sees every key. masked_fill returns a new tensor, whose result
    must be assigned: scores = scores.masked_fill(...)."""
    return weigh(scores_of(query, key), value, mask_of(query, key, None, is_causal))


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def masked_after_the_softmax(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The weights are set to 0 after the softmax, so they sum to less than 1, and masked keys still count in
    the denominator. Fill the scores with -inf before the softmax."""
    mask = mask_of(query, key, mask, is_causal)
    weights = F.softmax(scores_of(query, key))
    return (weights if mask is None else weights.masked_fill(~mask, 0.0)) @ value


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def masked_with_zero(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """Masked scores are set to 0, but exp(0) is 1, so masked keys are still attended to. Only -inf gives a
    weight of 0. Multiplying scores by the mask is the same mistake."""
    mask = mask_of(query, key, mask, is_causal)
    scores = scores_of(query, key)
    return F.softmax(scores if mask is None else scores.masked_fill(~mask, 0.0)) @ value


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def mask_added_as_numbers(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The boolean mask is added to the scores as 1 and 0, which masks nothing. An additive mask has 0 where a
    query may attend and -inf elsewhere."""
    mask = mask_of(query, key, mask, is_causal)
    scores = scores_of(query, key)
    return F.softmax(scores if mask is None else scores + mask) @ value


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def infinity_times_zero(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The mask is multiplied by -inf and added, but 0 * -inf = NaN, which spreads to all results. Use
    masked_fill or torch.where."""
    mask = mask_of(query, key, mask, is_causal)
    scores = scores_of(query, key)
    return F.softmax(scores if mask is None else scores + ~mask * -math.inf) @ value


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def masked_with_minus_10(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """Masked scores are set to a finite number that is not low enough. If the unmasked scores are far below
    zero too, masked keys win. Only -inf is below every score."""
    mask = mask_of(query, key, mask, is_causal)
    scores = scores_of(query, key)
    return F.softmax(scores if mask is None else scores.masked_fill(~mask, -10.0)) @ value


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def masked_with_minus_100(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """Masked scores are set to a number that is usually low enough, such as -100 or -10,000. Scores of a
    trained model can be lower, and then masked keys win. Only -inf is below every score."""
    mask = mask_of(query, key, mask, is_causal)
    scores = scores_of(query, key)
    return F.softmax(scores if mask is None else scores.masked_fill(~mask, -1e4)) @ value


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def axes_of_size_1_removed(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """squeeze() without an axis removes every axis of size 1, so a batch of one or a single head has another
    shape than any other. The result must have the leading axes of the query."""
    return weigh(scores_of(query, key), value, mask_of(query, key, mask, is_causal)).squeeze()


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def first_mask_for_all(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """All sequences and heads use the mask of the first one. A mask may have leading axes of its own, as
    padding masks do; let it broadcast to the scores."""
    mask = mask_of(query, key, mask, is_causal)
    while mask is not None and mask.dim() > 2:
        mask = mask[0]
    return weigh(scores_of(query, key), value, mask)


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def always_causal(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """A causal mask is applied although none was requested. Only the mask argument decides which keys a query
    sees; the caller makes the causal mask."""
    causal = F.causal_mask(query.shape[-2], key.shape[-2], device=query.device)
    return weigh(scores_of(query, key), value, causal if mask is None else mask & causal)


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def causal_without_a_mask(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """If no mask is given, a causal one is applied. Without a mask every query sees every key; causal
    attention must be requested with is_causal."""
    return weigh(scores_of(query, key), value, mask_of(query, key, mask, mask is None))


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def never_causal(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """is_causal has no effect, so each query sees later keys. A model trained this way copies the next token:
    its loss falls to nearly 0, and its samples are nonsense."""
    return weigh(scores_of(query, key), value, mask)


@step.mistake("functional.causal_mask", source="public solutions of CS336")
def sees_the_next_key_too(queries, keys, offset=0, device=None):
    """The causal mask is one too wide, so each query also sees the next key, which is the token that the
    model has to predict. Keep the diagonal and no more: tril(), or triu(1) for what is masked."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(offset + 1)


@step.mistake("functional.causal_mask", source="public solutions of CS336")
def does_not_see_itself(queries, keys, offset=0, device=None):
    """The causal mask is one too narrow: a query does not see its own key, and the first query sees nothing.
    Include the diagonal: tril() for what is visible, triu(1) for what is masked."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(offset - 1)


@step.mistake("functional.causal_mask", source="written for this catalogue")
def sees_only_what_is_later(queries, keys, offset=0, device=None):
    """The causal mask is the upper triangle instead of the lower one: each query sees itself and later keys.
    Rows are queries and columns are keys; use tril."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).triu(offset)


@step.mistake("functional.causal_mask", source="written for this catalogue")
def counted_from_the_last_key(queries, keys, offset=0, device=None):
    """With fewer queries than keys, the causal mask is aligned at the bottom right, as if the queries were
    the last ones. Here query 0 is aligned with key 0, as in torch; queries after cached keys need the
    offset."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(offset + keys - queries)


# --------------------------------------------------------------------------------------------------
# Mistakes: nothing to see


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def masked_with_minus_1e9(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """Masked scores are set to -1e9. float16 ends at -65,504 and cannot represent it, and a fully masked row
    gets the mean of all values. Use -inf, and zeros for fully masked rows."""
    mask = mask_of(query, key, mask, is_causal)
    scores = scores_of(query, key)
    return F.softmax(scores if mask is None else scores.masked_fill(~mask, -1e9)) @ value


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def unseeing_query_gets_the_mean(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """Masked scores are set to the most negative finite number, so a fully masked row gets the mean of all
    values, masked ones included. Set its weights to 0 after the softmax."""
    mask = mask_of(query, key, mask, is_causal)
    scores = scores_of(query, key)
    smallest = torch.finfo(scores.dtype).min
    return F.softmax(scores if mask is None else scores.masked_fill(~mask, smallest)) @ value


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def unseeing_query_gets_nan(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """In a fully masked row all scores are -inf, and the softmax gives 0/0 = NaN, which spreads to all
    weights. Set its scores to 0 before the softmax, and its weights to 0 after it."""
    mask = mask_of(query, key, mask, is_causal)
    scores = scores_of(query, key)
    return F.softmax(scores if mask is None else scores.masked_fill(~mask, -math.inf)) @ value


# --------------------------------------------------------------------------------------------------
# Mistakes with a parameter that is found from the observations


@step.family("functional.scaled_dot_product_attention", [i / 8 for i in range(-8, 17)])
def exponent_of_the_scale(value):
    """The scores are divided by d_k to the power of {value}. The exponent must be 0.5, the square root, which
    gives scores of the same size for every d_k: query @ key.mT / sqrt(d_k)."""

    def wrong(query, key, value_, mask=None, is_causal=False, dropout_p=0.0):
        scores = query @ key.mT / query.shape[-1] ** value
        return weigh(scores, value_, mask_of(query, key, mask, is_causal))

    return wrong


@step.family("functional.scaled_dot_product_attention", grids.powers(1e-3, 1e2))
def scale_fixed_at_a_number(value):
    """The scores are multiplied by {value}, whatever the width of the keys. Divide them by sqrt(d_k), where
    d_k is the last axis of the query: query.shape[-1]."""

    def wrong(query, key, value_, mask=None, is_causal=False, dropout_p=0.0):
        return weigh(query @ key.mT * value, value_, mask_of(query, key, mask, is_causal))

    return wrong


def filled(value, is_zero_without_keys):
    def wrong(query, key, value_, mask=None, is_causal=False, dropout_p=0.0):
        mask, scores = mask_of(query, key, mask, is_causal), scores_of(query, key)
        mixed = F.softmax(scores if mask is None else scores.masked_fill(~mask, value)) @ value_
        empty = None if mask is None or not is_zero_without_keys else ~mask.any(-1, keepdim=True)
        return mixed if empty is None else mixed.masked_fill(empty, 0.0)

    return wrong


MASK_VALUES = [-x for x in grids.powers(1e-2, 1e10)]


@step.family("functional.scaled_dot_product_attention", MASK_VALUES)
def masked_with_a_number(value):
    """Masked scores are set to {value}. Scores below it lose to masked keys, and a fully masked row gets the
    mean of all values. Use -inf, and zeros for fully masked rows."""
    return filled(value, False)


@step.family("functional.scaled_dot_product_attention", MASK_VALUES)
def masked_with_a_number_but_rows_of_zeros(value):
    """Masked scores are set to {value}. Fully masked rows are zeros, as they must be, but scores below the
    number lose to masked keys. Use -inf, which is below every score."""
    return filled(value, True)


step.factor("functional.scaled_dot_product_attention")
