"""Attention: `softmax(Q K^T / sqrt(d_k)) V`, where a mask says which query may see which key."""

import math

import torch
from torch.nn import functional as tF

from llm_basics.core import functional as F
from llm_basics.learn import probes

step = probes.Step("attention")
draw = probes.numbers(seed=11)


def whether_seen(expected, actual):
    """The first query that sees a key wrongly, of outputs that are the weights themselves."""
    if actual.shape != expected.shape:
        return f"the shape must be {tuple(expected.shape)}, got {tuple(actual.shape)}"
    if actual.isnan().any():
        return "it has NaN (not a number) in it"
    for wrong, text in (
        ((expected == 0) & (actual.abs() > 1e-5), "query {} sees key {}, which it must not"),
        ((expected > 1e-5) & (actual.abs() < 1e-7), "query {} does not see key {}, which it may"),
    ):
        if wrong.any():
            return text.format(*wrong.nonzero()[0][-2:].tolist())
    off = (expected - actual).abs().max().item()
    query, key = ((expected - actual).abs() >= min(1e-4, off)).nonzero()[0][-2:].tolist()
    right, found = (t.reshape(-1, *t.shape[-2:])[:, query, key][0].item() for t in (expected, actual))
    return f"query {query} weighs key {key} with {found:.4g}, not {right:.4g}"


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
    return torch.equal(
        *(a.run_scaled_dot_product_attention(*(same.clone() for _ in range(3))) for _ in range(2))
    )


# --------------------------------------------------------------------------------------------------
# Without a mask

QKV = {"q": draw(2, 3, 4, 6), "k": draw(2, 3, 5, 6), "v": draw(2, 3, 5, 7)}

step.value(
    "the same input twice",
    once_and_again,
    True,
    words=lambda expected, actual: "the same input gives another output when it is called again",
)
compare("4 queries, 5 keys, values of another size", QKV, axes="batch head query feature", gradients=False)
compare(
    "as many queries as keys, with gradients",
    {"q": draw(3, 5, 6), "k": draw(3, 5, 6), "v": draw(3, 5, 7)},
    axes="head query feature",
)
# scores of up to some hundreds in the first query, small ones in the others
compare(
    "queries of very different sizes",
    {
        "q": draw(2, 4, 6) * torch.tensor([300, 1, 0.1, 1]).reshape(4, 1),
        "k": draw(2, 5, 6),
        "v": draw(2, 5, 7),
    },
    axes="head query feature",
    gradients=False,
    rtol=1e-3,
    atol=1e-4,
)

# --------------------------------------------------------------------------------------------------
# With a mask

MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 0, 0], [1, 0, 1, 1, 1], [0, 0, 1, 0, 1]]).bool()
MASKS = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.5
MASKS[..., 1] = True

# values that are the identity make the output the weights themselves
compare(
    "which keys a mask lets each query see",
    {"q": draw(4, 6), "k": draw(5, 6), "v": torch.eye(5), "mask": MASK},
    axes="query key",
    gradients=False,
    words=whether_seen,
)
compare("one mask for all heads", QKV | {"mask": MASK}, axes="batch head query feature")
compare("a mask for each head", QKV | {"mask": MASKS}, axes="batch head query feature")
compare(
    "a mask, and scores far below zero",
    {"q": -20 * torch.ones(4, 6), "k": 1 + draw(5, 6).abs(), "v": draw(5, 7), "mask": MASK},
    axes="query feature",
    gradients=False,
    rtol=1e-3,
    atol=1e-4,
)
compare(
    "float16 numbers with a mask",
    {name: tensor.half() for name, tensor in QKV.items()} | {"mask": MASK},
    lambda q, k, v, mask: tF.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask).half(),
    axes="batch head query feature",
    gradients=False,
    rtol=2e-2,
    atol=2e-2,
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
    beyond=True,
)


# --------------------------------------------------------------------------------------------------
# Mistakes: the scores


def scores_of(query, key):
    return query @ key.mT / math.sqrt(query.shape[-1])


def mask_of(query, key, mask, is_causal):
    """The mask that is meant, or None."""
    return F.causal_mask(query.shape[-2], key.shape[-2], device=query.device) if is_causal else mask


def weigh(scores, value, mask, dim=-1):
    """All that comes after the scores, as it should be."""
    if mask is None:
        return F.softmax(scores, dim) @ value
    unmatched = ~mask.any(-1, keepdim=True)
    masked = scores.masked_fill(~mask, -math.inf).masked_fill(unmatched, 0.0)
    return F.softmax(masked, dim).masked_fill(unmatched, 0.0) @ value


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def no_scale(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The scores are not divided by sqrt(d_k). They then grow with the size of the heads, softmax picks
    nearly a single key, and learning gets slow."""
    return weigh(query @ key.mT, value, mask_of(query, key, mask, is_causal))


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def scale_without_root(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The scores are divided by d_k instead of by its root, so all keys get nearly the same weight. Divide
    by math.sqrt(d_k)."""
    return weigh(query @ key.mT / query.shape[-1], value, mask_of(query, key, mask, is_causal))


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def multiplied_with_the_scale(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The scores are multiplied with sqrt(d_k), not divided by it. Look for * in the place of /, or for a
    missing minus in d_k ** -0.5."""
    return weigh(query @ key.mT * math.sqrt(query.shape[-1]), value, mask_of(query, key, mask, is_causal))


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def scale_of_the_values(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The scores are divided by sqrt(d_v). They are sums over the d_k features of queries and keys, so it
    is the size of the query that counts, which may differ from that of the value."""
    return weigh(query @ key.mT / math.sqrt(value.shape[-1]), value, mask_of(query, key, mask, is_causal))


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def scale_of_the_sequence(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The scores are divided by the root of the number of keys. d_k is the last axis of the queries,
    query.shape[-1], not the length of the text."""
    return weigh(query @ key.mT / math.sqrt(key.shape[-2]), value, mask_of(query, key, mask, is_causal))


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def scaled_after_the_softmax(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The weights are divided by sqrt(d_k) after the softmax, so they do not sum to 1. The scale belongs to
    the scores, before the softmax."""
    mixed = weigh(query @ key.mT, value, mask_of(query, key, mask, is_causal))
    return mixed / math.sqrt(query.shape[-1])


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def keys_reshaped_instead_of_transposed(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The keys are brought into shape by view or reshape, which keeps the numbers in order and mixes up
    which belongs to which key. Exchange the last two axes: key.transpose(-2, -1)."""
    turned = key.reshape(*key.shape[:-2], key.shape[-1], key.shape[-2])
    return weigh(query @ turned / math.sqrt(query.shape[-1]), value, mask_of(query, key, mask, is_causal))


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def query_and_key_exchanged(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The scores are K Q^T, in which a row belongs to a key. It must be Q K^T, with a row for each query,
    over which the softmax goes."""
    return weigh(scores_of(key, query), value, mask_of(query, key, mask, is_causal))


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def keys_mixed_instead_of_values(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The weights are multiplied with the keys, not with the values. Keys only decide how much each
    position counts; what is mixed are the values."""
    return weigh(scores_of(query, key), key, mask_of(query, key, mask, is_causal))


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def query_scaled_in_place(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The caller's queries are divided in place, so a second call divides them again. Write
    query = query / sqrt(d_k) for query /= sqrt(d_k), or scale the scores."""
    query /= math.sqrt(query.shape[-1])
    return weigh(query @ key.mT, value, mask_of(query, key, mask, is_causal))


# --------------------------------------------------------------------------------------------------
# Mistakes: the softmax


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def softmax_over_queries(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The softmax goes along the queries, so the weights of one query do not sum to 1. It goes along the
    keys, the last axis of the scores: dim=-1."""
    return weigh(scores_of(query, key), value, mask_of(query, key, mask, is_causal), dim=-2)


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def softmax_over_axis_1(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The softmax goes along axis 1, which is the heads if there are four axes. Count from the end, so that
    any leading axes may be there: dim=-1."""
    return weigh(scores_of(query, key), value, mask_of(query, key, mask, is_causal), dim=1)


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def no_softmax(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The scores themselves weigh the values. Softmax must make weights of them that are positive and sum
    to 1 for each query."""
    mask = mask_of(query, key, mask, is_causal)
    scores = scores_of(query, key)
    return (scores if mask is None else scores.masked_fill(~mask, 0.0)) @ value


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def no_maximum_subtracted(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The softmax takes exp of the scores as they are, which is inf above 88, and then inf / inf = NaN.
    Subtract the largest score of each query first; it cancels out."""
    mask = mask_of(query, key, mask, is_causal)
    scores = scores_of(query, key)
    powers = (scores if mask is None else scores.masked_fill(~mask, -math.inf)).exp()
    return powers / powers.sum(-1, keepdim=True) @ value


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336; passes its suite")
def one_maximum_for_all(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """One maximum is subtracted from all scores. Queries whose scores are all far below it get 0/0 = NaN;
    each query needs its own maximum: amax(-1, keepdim=True)."""
    mask = mask_of(query, key, mask, is_causal)
    scores = scores_of(query, key)
    scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    powers = (scores - scores.max()).exp()
    return powers / powers.sum(-1, keepdim=True) @ value


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336; passes its suite")
def weights_detached(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The output is right, but no gradient passes the weights, so queries and keys never learn. Look for
    .detach(), .data, .item() or torch.no_grad() around scores and softmax."""
    scores = scores_of(query, key).detach()
    return weigh(scores, value, mask_of(query, key, mask, is_causal))


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def dropout_always(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """Some weights are dropped at random though it is not requested. torch's functional dropout drops unless
    training=False is passed; tie it to self.training, and to the given share."""
    mask, keys = mask_of(query, key, mask, is_causal), torch.eye(key.shape[-2]).to(value)
    return tF.dropout(weigh(scores_of(query, key), keys, mask), 0.1) @ value


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def result_left_in_float32(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """Half-precision inputs are rightly widened for the softmax, but the result stays in float32, and the
    next layer fails. Convert back to the dtype of the query."""
    scores = scores_of(F.to_float32(query), F.to_float32(key))
    return weigh(scores, F.to_float32(value), mask_of(query, key, mask, is_causal))


# --------------------------------------------------------------------------------------------------
# Mistakes: the mask


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def mask_inverted(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """Each query sees exactly the keys that it must not see. The mask is True where a query may look, so
    fill the scores with -inf where it is False: masked_fill(~mask, -inf)."""
    mask = mask_of(query, key, mask, is_causal)
    return weigh(scores_of(query, key), value, mask if mask is None else ~mask)


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def mask_ignored(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """A mask that is passed has no effect, so every query sees every key. masked_fill returns a new tensor:
    its result must be kept, scores = scores.masked_fill(...)."""
    return weigh(scores_of(query, key), value, mask_of(query, key, None, is_causal))


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def masked_after_the_softmax(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The weights are set to 0 after the softmax, so the rest sums to less than 1, and masked keys still
    count in the softmax. Fill the scores with -inf before it."""
    mask = mask_of(query, key, mask, is_causal)
    weights = F.softmax(scores_of(query, key))
    return (weights if mask is None else weights.masked_fill(~mask, 0.0)) @ value


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def masked_with_zero(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """Masked scores are set to 0, but exp(0) is 1, so masked keys are seen all the same. Only -inf becomes
    a weight of 0. Multiplying scores with the mask does the same."""
    mask = mask_of(query, key, mask, is_causal)
    scores = scores_of(query, key)
    return F.softmax(scores if mask is None else scores.masked_fill(~mask, 0.0)) @ value


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def mask_added_as_numbers(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The True and False of the mask are added to the scores as 1 and 0, which hides nothing. An additive
    mask has 0 where a query may look and -inf where it may not."""
    mask = mask_of(query, key, mask, is_causal)
    scores = scores_of(query, key)
    return F.softmax(scores if mask is None else scores + mask) @ value


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def infinity_times_zero(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """The mask is multiplied with -inf and added, but where it is 0 that is 0 * -inf = NaN, which spoils
    everything. Use masked_fill or torch.where."""
    mask = mask_of(query, key, mask, is_causal)
    scores = scores_of(query, key)
    return F.softmax(scores if mask is None else scores + ~mask * -math.inf) @ value


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def masked_with_minus_10(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """Masked scores are set to a number that is not small enough. If the scores of the others are far below
    zero too, masked keys win. Only -inf is below all of them."""
    mask = mask_of(query, key, mask, is_causal)
    scores = scores_of(query, key)
    return F.softmax(scores if mask is None else scores.masked_fill(~mask, -10.0)) @ value


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def first_mask_for_all(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """All texts and heads get the first one's mask. A mask can have leading axes of its own, as padding
    needs it; let broadcasting fit it to the scores."""
    mask = mask_of(query, key, mask, is_causal)
    while mask is not None and mask.dim() > 2:
        mask = mask[0]
    return weigh(scores_of(query, key), value, mask)


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def always_causal(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """Later keys are hidden though it is not requested. The mask alone decides which keys a query sees; the
    caller makes the causal mask."""
    causal = F.causal_mask(query.shape[-2], key.shape[-2], device=query.device)
    return weigh(scores_of(query, key), value, causal if mask is None else mask & causal)


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def causal_without_a_mask(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """Where no mask is given, a causal one is used. No mask means that every query sees every key; the causal
    mask must be requested."""
    return weigh(scores_of(query, key), value, mask_of(query, key, mask, mask is None))


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def never_causal(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """is_causal has no effect, so each query sees what comes after it. A model trained this way reads off
    the next token: its loss falls to nearly 0, and its samples are nonsense."""
    return weigh(scores_of(query, key), value, mask)


@step.mistake("functional.causal_mask", source="public solutions of CS336")
def sees_the_next_key_too(queries, keys, offset=0, device=None):
    """The causal mask is one too wide, so each query sees the key after it, which is what the model has to
    predict. Keep the diagonal, no more: tril(), or triu(1) for what is hidden."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(offset + 1)


@step.mistake("functional.causal_mask", source="public solutions of CS336")
def does_not_see_itself(queries, keys, offset=0, device=None):
    """The causal mask is one too narrow: a query does not see its own key, and the first sees nothing. The
    diagonal belongs to what may be seen: tril(), or triu(1) for what is hidden."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(offset - 1)


@step.mistake("functional.causal_mask", source="written for this catalogue")
def sees_only_what_is_later(queries, keys, offset=0, device=None):
    """The causal mask is the upper triangle where it should be the lower one: each query sees itself and
    what comes later. Rows are queries, columns are keys: use tril."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).triu(offset)


@step.mistake("functional.causal_mask", source="written for this catalogue")
def counted_from_the_last_key(queries, keys, offset=0, device=None):
    """With fewer queries than keys the mask is aligned at the end, as if the queries were the last ones. Here
    query 0 stands at key 0, as in torch; later ones need the offset."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(offset + keys - queries)


# --------------------------------------------------------------------------------------------------
# Mistakes: nothing to see


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def masked_with_minus_1e9(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """Masked scores are set to -1e9. float16 ends at -65,504 and refuses it, and a query that may see
    nothing gets the mean of all values. Use -inf, and zeros for such a query."""
    mask = mask_of(query, key, mask, is_causal)
    scores = scores_of(query, key)
    return F.softmax(scores if mask is None else scores.masked_fill(~mask, -1e9)) @ value


@step.mistake("functional.scaled_dot_product_attention", source="written for this catalogue")
def unseeing_query_gets_the_mean(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """Masked scores are set to the smallest number, so a query that may see nothing gets the mean of all
    values, hidden ones included. Set its weights to 0 after the softmax."""
    mask = mask_of(query, key, mask, is_causal)
    scores = scores_of(query, key)
    smallest = torch.finfo(scores.dtype).min
    return F.softmax(scores if mask is None else scores.masked_fill(~mask, smallest)) @ value


@step.mistake("functional.scaled_dot_product_attention", source="public solutions of CS336")
def unseeing_query_gets_nan(query, key, value, mask=None, is_causal=False, dropout_p=0.0):
    """A query that may see nothing has only -inf as scores, and the softmax makes 0/0 = NaN of them, which
    spreads to all weights. Set its scores to 0, and its weights to 0 after the softmax."""
    mask = mask_of(query, key, mask, is_causal)
    scores = scores_of(query, key)
    return F.softmax(scores if mask is None else scores.masked_fill(~mask, -math.inf)) @ value
