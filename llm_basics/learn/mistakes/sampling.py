"""Sampling: from logits to a distribution (temperature, top-k, top-p), and from a model to a text."""

import math

import torch
from torch.nn import functional as tF

from llm_basics.core import functional as F
from llm_basics.core import generate
from llm_basics.learn import probes

step = probes.Step("sampling")
draw = probes.numbers(seed=5)

# --------------------------------------------------------------------------------------------------
# The distribution, written out row by row


def distribution(logits, temperature=1.0, top_k=None, top_p=None):
    flat = logits.double().reshape(-1, logits.shape[-1])
    rows = [one_row(row.tolist(), temperature, top_k, top_p) for row in flat]
    return torch.tensor(rows, dtype=torch.float32).reshape(logits.shape)


def one_row(scores, temperature, top_k, top_p):
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    if temperature == 0:
        temperature, top_k = 1.0, 1
    raw = {i: math.exp((scores[i] - max(scores)) / temperature) for i in order[:top_k]}
    kept, reached, whole = {}, 0.0, sum(raw.values())
    for i in order[:top_k]:
        kept[i] = raw[i]
        reached += raw[i] / whole
        if top_p is not None and reached >= top_p:
            break
    whole = sum(kept.values())
    return [kept.get(i, 0.0) / whole for i in range(len(scores))]


def check(about, logits, **settings):
    step.compare(
        about,
        lambda a, logits: a.run_next_token_probabilities(logits, **settings),
        lambda logits: distribution(logits, **settings),
        {"logits": logits},
        axes="batch row token"[6 * (logits.dim() < 3) :],
        gradients=False,
    )


LOGITS = 1.5 * draw(2, 3, 9)
# three rows of different certainty
ROWS = draw(3, 8) * torch.tensor([0.5, 2.0, 6.0]).reshape(3, 1)

check("no arguments: softmax", LOGITS)
check("a temperature of 0.6", LOGITS, temperature=0.6)
check("a temperature of 2.5", LOGITS, temperature=2.5)
check("a temperature of 0: greedy", LOGITS, temperature=0.0)
check("large logits and a low temperature", 20 * LOGITS, temperature=0.02)
check("top-k of 3, in rows of different certainty", ROWS, top_k=3)
check("top-k of 1", ROWS, top_k=1)
check("top-k above the size of the vocabulary", ROWS, top_k=50)
check("top-k of 3 with a temperature of 2", ROWS, top_k=3, temperature=2.0)


def n_kept(a):
    """How many of equally likely tokens top-k leaves."""
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.5, 1.0, 1.0], [2.0] * 6])
    probabilities = a.run_next_token_probabilities(logits, top_k=3)
    return {"tokens kept": (probabilities > 0).sum(-1).tolist(), "sum": probabilities.sum(-1)}


step.value("top-k of 3 among equals", n_kept, {"tokens kept": [3, 3], "sum": torch.ones(2)})

# unsorted, with cumulative sums far from all thresholds below
NUCLEUS = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15], [0.02, 0.03, 0.9, 0.01, 0.04]]).log()

check("top-p of 0.6", NUCLEUS, top_p=0.6)
check("top-p of 0.2: below the largest probability", NUCLEUS, top_p=0.2)
check("top-p of 0.92", NUCLEUS, top_p=0.92)
check("top-p of 1: all are kept", NUCLEUS, top_p=1.0)
check("top-p of 0.8 in rows of different certainty", ROWS, top_p=0.8)
check("top-p of 0.6 with a temperature of 3", NUCLEUS, top_p=0.6, temperature=3.0)
check("top-p of 0.55 after a top-k of 2", NUCLEUS, top_k=2, top_p=0.55)
check("top-p of 0.9 and top-k of 1", NUCLEUS, top_k=1, top_p=0.9)

MANY = (3 * draw(2, 1000)).bfloat16()


def share_kept(probabilities):
    """Equal probabilities are at the threshold p, so that rounding determines a few of them."""
    return {"share of tokens kept": (probabilities > 0).float().mean(-1), "dtype": str(probabilities.dtype)}


step.value(
    "top-p of 0.997 over 1,000 tokens in bfloat16",
    lambda a: share_kept(a.run_next_token_probabilities(MANY.clone(), top_p=0.997)),
    share_kept(distribution(MANY, top_p=0.997)),
    rtol=0.0,
    atol=0.01,
)


def refused(a):
    """Which settings that mean nothing are refused."""
    wrong = [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
    seen = {}
    for settings in wrong:
        try:
            a.run_next_token_probabilities(ROWS.clone(), **settings)
            seen[str(settings)] = "accepted"
        except (ValueError, AssertionError):
            seen[str(settings)] = "refused"
    return seen


step.value(
    "invalid arguments raise ValueError",
    refused,
    {
        "{'temperature': -1.0}": "refused",
        "{'top_k': 0}": "refused",
        "{'top_p': 0.0}": "refused",
        "{'top_p': 1.5}": "refused",
    },
)

# --------------------------------------------------------------------------------------------------
# Texts of a model, written out without a cache

SHAPE = {"vocab_size": 23, "context_length": 9, "d_model": 24, "num_layers": 2, "num_heads": 3, "d_ff": 40}
THETA = 50.0


def make_weights(d_model, num_layers, d_ff, vocab_size, draw, **_):
    sizes = {"attn.q_proj": (d_model, d_model), "attn.k_proj": (d_model, d_model)}
    sizes |= {"attn.v_proj": (d_model, d_model), "attn.output_proj": (d_model, d_model)}
    sizes |= {"ffn.w1": (d_ff, d_model), "ffn.w2": (d_model, d_ff), "ffn.w3": (d_ff, d_model)}
    found = {"token_embeddings.weight": draw(vocab_size, d_model), "ln_final.weight": 1 + 0.2 * draw(d_model)}
    found["lm_head.weight"] = 0.6 * draw(vocab_size, d_model)
    for i in range(num_layers):
        found |= {f"layers.{i}.{name}.weight": 0.5 * draw(*size) for name, size in sizes.items()}
        found |= {f"layers.{i}.{name}.weight": 1 + 0.2 * draw(d_model) for name in ("ln1", "ln2")}
    return found


WEIGHTS = make_weights(**SHAPE, draw=draw)


def rope(x):
    """Neighboring features rotated by their position, as complex numbers."""
    frequencies = THETA ** -(torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = torch.outer(torch.arange(x.shape[-2]), frequencies)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def last_logits(tokens):
    """The logits after the last of `tokens`, which must fit into the context."""
    x = WEIGHTS["token_embeddings.weight"][tokens]
    for i in range(SHAPE["num_layers"]):
        w = {name.split(".")[-2]: v for name, v in WEIGHTS.items() if name.startswith(f"layers.{i}.")}
        y = tF.rms_norm(x, x.shape[-1:], w["ln1"], 1e-5)
        q, k, v = (
            (y @ w[f"{name}_proj"].T).unflatten(-1, (SHAPE["num_heads"], -1)).transpose(0, 1)
            for name in "qkv"
        )
        mixed = tF.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True)
        x = x + mixed.transpose(0, 1).flatten(1) @ w["output_proj"].T
        y = tF.rms_norm(x, x.shape[-1:], w["ln2"], 1e-5)
        x = x + (tF.silu(y @ w["w1"].T) * (y @ w["w3"].T)) @ w["w2"].T
    return tF.rms_norm(x[-1], x.shape[-1:], WEIGHTS["ln_final.weight"], 1e-5) @ WEIGHTS["lm_head.weight"].T


def likeliest(prompt, n):
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(last_logits(torch.tensor(tokens[-SHAPE["context_length"] :])).argmax().item())
    return tokens[len(prompt) :]


def write(a, prompt, n, weights=WEIGHTS, **settings):
    found = a.run_generate(
        **SHAPE, rope_theta=THETA, weights=weights, prompt=torch.tensor(prompt), max_new_tokens=n, **settings
    )
    return [int(token) for token in found]


def check_text(about, prompt, n, **settings):
    step.value(about, lambda a: write(a, prompt, n, **settings), likeliest(prompt, n), axes="new token")


check_text("the likeliest token after a prompt of 4", [5, 1, 17, 2], 1, top_k=1)
check_text("four likeliest tokens, within the context of 9", [5, 1, 17, 2], 4, top_k=1)
check_text("after a prompt of one token", [8], 5, top_k=1)
check_text("twelve tokens, past the context", [3, 14, 7, 20, 11], 12, top_k=1)
check_text("after a prompt as long as the context", [4, 8, 2, 19, 6, 6, 0, 13, 22], 6, top_k=1)
check_text("after a prompt longer than the context", [*range(22, 8, -1)], 6, top_k=1)
check_text("a temperature of 0", [9, 21, 3], 9, temperature=0.0)
check_text("top-p of nearly 0", [12, 5, 16], 9, top_p=1e-6)
step.value("no new tokens requested", lambda a: write(a, [5, 1], 0), [])


SMALL = {"vocab_size": 23, "context_length": 9, "d_model": 2, "num_layers": 1, "num_heads": 1, "d_ff": 2}


def write_evenly(a, likely, n, **settings):
    """A text by weights that give the same logits after any text: `likely` the first tokens, no
    others."""
    even = {k: torch.zeros_like(w) for k, w in make_weights(**SMALL, draw=probes.numbers(seed=0)).items()}
    even["token_embeddings.weight"] += 1
    even["ln_final.weight"] += 1
    logits = torch.full((SMALL["vocab_size"],), -200.0)
    logits[: len(likely)] = torch.tensor(likely).log()
    even["lm_head.weight"] = (logits / SMALL["d_model"]).repeat(SMALL["d_model"], 1).T.contiguous()
    prompt = torch.tensor([1])
    settings = {"rope_theta": THETA, "weights": even, "prompt": prompt, "max_new_tokens": n} | settings
    return [int(token) for token in a.run_generate(**SMALL, **settings)]


def check_shares(about, likely, expected, **settings):
    """How often each of the first tokens is drawn, of 60, to within three and a half standard
    deviations."""

    def shares(a):
        generator = torch.Generator().manual_seed(4)
        text = write_evenly(a, likely, 60, generator=generator, **settings)
        return [text.count(token) / 60 for token in range(len(likely))]

    step.value(about, shares, expected, axes="token", rtol=0.0, atol=0.22)


def tempered_shares(likely, temperature):
    raw = [p ** (1 / temperature) for p in likely]
    return [p / sum(raw) for p in raw]


check_shares("how often each token is drawn", [0.6, 0.02, 0.38], [0.6, 0.02, 0.38])
check_shares(
    "how often at a temperature of 4",
    [0.97, 0.02, 0.01],
    tempered_shares([0.97, 0.02, 0.01], 4.0),
    temperature=4.0,
)


def seeds(a):
    def text(seed, elsewhere):
        torch.manual_seed(elsewhere)
        return write_evenly(a, [0.1] * 10, 9, generator=torch.Generator().manual_seed(seed))

    first, again, other = text(1, elsewhere=5), text(1, elsewhere=6), text(2, elsewhere=5)
    return {
        "the same seed gives the same text": first == again,
        "another seed gives another text": first != other,
        "each token is drawn anew": len(set(first)) > 2,
    }


step.value(
    "the generator determines the samples",
    seeds,
    {
        "the same seed gives the same text": True,
        "another seed gives another text": True,
        "each token is drawn anew": True,
    },
)


def goes_on(a):
    generator = torch.Generator().manual_seed(1)
    texts = [write_evenly(a, [0.1] * 10, 9, generator=generator) for _ in range(2)]
    return texts[0] != texts[1]


step.value("a generator continues where the last text ended", goes_on, True)

# --------------------------------------------------------------------------------------------------
# What the wrong versions have right


def check_settings(temperature, top_k, top_p):
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError("temperature must be at least 0, top_k at least 1, top_p above 0 and at most 1")


def right(logits, temperature=1.0, top_k=None, top_p=None):
    """The distribution as it should be, in other words than the reference's."""
    check_settings(temperature, top_k, top_p)
    probabilities, ids = tempered(logits, temperature).sort(descending=True, stable=True)
    probabilities = nucleus(first(probabilities, top_k), top_p)
    return torch.zeros_like(probabilities).scatter(-1, ids, probabilities)


def tempered(logits, temperature):
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros(logits.shape).scatter(-1, best, 1.0)
    return F.softmax((logits.float() - logits.float().amax(-1, keepdim=True)) / temperature)


def first(probabilities, top_k):
    """Of sorted probabilities the first k, as a distribution."""
    if top_k is None:
        return probabilities
    return normal(probabilities.masked_fill(torch.arange(probabilities.shape[-1]) >= top_k, 0.0))


def nucleus(probabilities, top_p):
    """Of sorted probabilities those that reach `top_p`, as a distribution."""
    if top_p is None:
        return probabilities
    return normal(probabilities.masked_fill(probabilities.cumsum(-1) - probabilities >= top_p, 0.0))


def normal(probabilities):
    return probabilities / probabilities.sum(-1, keepdim=True)


def with_top_k(top_k_of, logits, temperature, top_k, top_p):
    """Right but for top-k, which is a function of unsorted probabilities."""
    check_settings(temperature, top_k, top_p)
    probabilities = tempered(logits, temperature)
    if top_k is not None and temperature > 0:
        probabilities = top_k_of(probabilities, min(top_k, logits.shape[-1]))
    return right(probabilities.log(), 1.0, None, top_p)


def with_top_p(top_p_of, logits, temperature, top_k, top_p):
    """Right but for top-p, which is a function of sorted probabilities."""
    check_settings(temperature, top_k, top_p)
    probabilities, ids = right(logits, temperature, top_k).sort(descending=True, stable=True)
    if top_p is not None and temperature > 0:
        probabilities = top_p_of(probabilities, top_p)
    return torch.zeros_like(probabilities).scatter(-1, ids, probabilities)


# --------------------------------------------------------------------------------------------------
# Temperature

PROBABILITIES = "generate.next_token_probabilities"


@step.mistake(PROBABILITIES, source="public solutions of CS336")
def temperature_after_the_softmax(logits, temperature=1.0, top_k=None, top_p=None):
    """The probabilities instead of the logits are divided by the temperature, which cancels when they are
    renormalized. Divide the logits, then apply the softmax."""
    check_settings(temperature, top_k, top_p)
    return right(logits, 1.0 if temperature > 0 else 0.0, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def softmax_of_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """Softmax is applied twice: the temperature divides probabilities, which then go through softmax again.
    All tokens become almost equally likely; remove the second softmax."""
    check_settings(temperature, top_k, top_p)
    return right(F.softmax(logits.float()), temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def temperature_multiplied(logits, temperature=1.0, top_k=None, top_p=None):
    """The logits are multiplied by the temperature, so a low one makes the text more random and a high one
    less. Divide by it."""
    check_settings(temperature, top_k, top_p)
    return right(logits, 1 / temperature if temperature > 0 else 0.0, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def division_by_a_temperature_of_zero(logits, temperature=1.0, top_k=None, top_p=None):
    """At temperature 0 the logits are divided by 0, which gives NaN. In the limit all probability goes to the
    most likely token; handle 0 separately."""
    check_settings(temperature, top_k, top_p)
    if temperature == 0:
        return F.softmax(logits.float() / temperature)
    return right(logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def temperature_of_zero_taken_for_one(logits, temperature=1.0, top_k=None, top_p=None):
    """`temperature or 1.0` turns a temperature of 0 into 1, so tokens are sampled instead of decoded
    greedily. Compare with None, or with 0."""
    return right(logits, temperature or 1.0, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def exponential_overflows(logits, temperature=1.0, top_k=None, top_p=None):
    """exp is computed without subtracting the maximum. Large logits or a low temperature give inf, and
    inf/inf is NaN. Subtract the maximum of the row first."""
    if temperature == 0:
        return right(logits, temperature, top_k, top_p)
    exponentials = (logits.float() / temperature).exp()
    return right((exponentials / exponentials.sum(-1, keepdim=True)).log(), 1.0, top_k, top_p)


# --------------------------------------------------------------------------------------------------
# Top-k


@step.mistake(PROBABILITIES, source="public solutions of CS336")
def top_k_keeps_ties(logits, temperature=1.0, top_k=None, top_p=None):
    """All tokens as likely as the k-th are kept, so with ties more than k remain. Select by the indices that
    topk returns, not by comparing with a threshold."""

    def of(p, k):
        return normal(p.masked_fill(p < p.topk(k).values[..., -1:], 0.0))

    return with_top_k(of, logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="public solutions of CS336")
def top_k_discarded(logits, temperature=1.0, top_k=None, top_p=None):
    """masked_fill returns a new tensor, which is discarded, so top-k has no effect. Assign the result, or use
    masked_fill_ on a copy."""
    check_settings(temperature, top_k, top_p)
    return right(logits, temperature, None, top_p)


@step.mistake(PROBABILITIES, source="public solutions of CS336")
def top_k_not_renormalized(logits, temperature=1.0, top_k=None, top_p=None):
    """The tokens outside the top k are set to 0, but the others are not renormalized. Divide by the sum of
    what is kept."""
    probabilities = right(logits, temperature, top_k, top_p)
    if top_k is None or top_p is not None or temperature == 0:
        return probabilities
    return tempered(logits, temperature).masked_fill(probabilities == 0, 0.0)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_k_masked_with_zero(logits, temperature=1.0, top_k=None, top_p=None):
    """The logits outside the top k are set to 0, which is an ordinary logit: exp(0) is 1. Set them to -inf,
    so that the softmax gives them probability 0."""
    if top_k is None or temperature == 0:
        return right(logits, temperature, top_k, top_p)
    kept = right(logits, temperature, top_k) > 0
    return right(logits.float().masked_fill(~kept, 0.0), temperature, None, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_k_loses_the_last(logits, temperature=1.0, top_k=None, top_p=None):
    """The k-th token itself is removed, by <= instead of <. Only k - 1 tokens remain, and none for k = 1."""

    def of(p, k):
        return normal(p.masked_fill(p <= p.topk(k).values[..., -1:], 0.0))

    return with_top_k(of, logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_k_keeps_one_too_many(logits, temperature=1.0, top_k=None, top_p=None):
    """k + 1 tokens are kept: sorted[k] is the first to remove, not the last to keep. The threshold is
    sorted[k - 1]."""
    check_settings(temperature, top_k, top_p)
    return right(logits, temperature, top_k and top_k + 1, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_k_of_the_whole_batch(logits, temperature=1.0, top_k=None, top_p=None):
    """The threshold of one row is used for all rows of the batch, which keeps too many or too few tokens in
    the others. Compute a threshold per row, with keepdim."""

    def of(p, k):
        rows = p.flatten(0, -2)
        return normal(p.masked_fill(p < rows[0].topk(k).values[-1], 0.0))

    if logits.dim() == 1:
        return right(logits, temperature, top_k, top_p)
    return with_top_k(of, logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_k_above_the_vocabulary_fails(logits, temperature=1.0, top_k=None, top_p=None):
    """topk fails if k exceeds the vocabulary size, which happens with small models. Use min(k, vocab_size),
    which keeps all tokens."""
    if top_k is not None:
        logits.topk(top_k)
    return right(logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_k_keeps_the_unlikeliest(logits, temperature=1.0, top_k=None, top_p=None):
    """The tokens are sorted in ascending order, so the first k are the least likely. Sort with
    descending=True."""

    def of(p, k):
        worst = p.topk(k, largest=False)
        return normal(torch.zeros_like(p).scatter(-1, worst.indices, worst.values))

    return with_top_k(of, logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def probabilities_left_sorted(logits, temperature=1.0, top_k=None, top_p=None):
    """The probabilities are returned in sorted order, so the most likely is always token 0. Scatter them back
    by the ids that sort or topk returned."""
    probabilities = right(logits, temperature, top_k, top_p)
    if top_k is None and top_p is None:
        return probabilities
    return probabilities.sort(descending=True).values


# --------------------------------------------------------------------------------------------------
# Top-p


@step.mistake(PROBABILITIES, source="public solutions of CS336")
def top_p_drops_the_token_that_crosses(logits, temperature=1.0, top_k=None, top_p=None):
    """Only tokens whose cumulative sum stays below p are kept, without the one that crosses the threshold. If
    the first alone exceeds p, none is left and everything is NaN. Test the sum before each token."""

    def of(p, limit):
        return normal(p.masked_fill(p.cumsum(-1) > limit + 1e-6, 0.0))

    return with_top_p(of, logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="public solutions of CS336")
def top_p_one_too_few(logits, temperature=1.0, top_k=None, top_p=None):
    """The token that crosses p is removed, except if it is the first, so the kept tokens sum to less than p.
    They must reach p."""

    def of(p, limit):
        keep = p.cumsum(-1) <= limit + 1e-6
        keep[..., 0] = True
        return normal(p.masked_fill(~keep, 0.0))

    return with_top_p(of, logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_p_one_too_many(logits, temperature=1.0, top_k=None, top_p=None):
    """One more token is kept than is needed to reach p: the mask is shifted by one although it already keeps
    the token that crosses. Shift only a mask of cumsum > p."""

    def of(p, limit):
        out = (p.cumsum(-1) - p >= limit).roll(1, -1)
        out[..., 0] = False
        return normal(p.masked_fill(out, 0.0))

    return with_top_p(of, logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="public solutions of CS336")
def top_p_not_renormalized(logits, temperature=1.0, top_k=None, top_p=None):
    """The tokens outside the nucleus are set to 0, but the others are not renormalized. Divide by the sum of
    what is kept."""

    def of(p, limit):
        return p.masked_fill(p.cumsum(-1) - p >= limit, 0.0)

    return with_top_p(of, logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_p_discarded(logits, temperature=1.0, top_k=None, top_p=None):
    """The mask of the nucleus is computed, but the result of masked_fill is discarded, so top-p has no
    effect. Assign the result."""
    check_settings(temperature, top_k, top_p)
    return right(logits, temperature, top_k)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_p_without_sorting(logits, temperature=1.0, top_k=None, top_p=None):
    """The cumulative sum follows the order of the vocabulary, so the nucleus consists of low ids instead of
    likely tokens. Sort in descending order before cumsum."""
    check_settings(temperature, top_k, top_p)
    return nucleus(right(logits, temperature, top_k), top_p if temperature > 0 else None)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_p_mask_in_sorted_order(logits, temperature=1.0, top_k=None, top_p=None):
    """The mask is in sorted order but is applied to the unsorted tokens, so it removes the wrong ones.
    Scatter it back by the ids of the sort."""
    check_settings(temperature, top_k, top_p)
    probabilities = right(logits, temperature, top_k)
    if top_p is None or temperature == 0:
        return probabilities
    ordered = probabilities.sort(descending=True).values
    return normal(probabilities.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0))


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_p_sorted_upwards(logits, temperature=1.0, top_k=None, top_p=None):
    """The cumulative sum starts from the least likely token, so the nucleus is the tail of the distribution,
    and likely tokens are removed. Sort with descending=True."""

    def of(p, limit):
        return nucleus(p.flip(-1), limit).flip(-1)

    return with_top_p(of, logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_p_as_a_least_probability(logits, temperature=1.0, top_k=None, top_p=None):
    """Each token's probability is compared with p. Top-p is a bound on the cumulative sum of the most likely
    tokens; a bound per token is similar to min-p. Use cumsum."""

    def of(p, limit):
        return normal(p.masked_fill(p < limit * p[..., :1], 0.0))

    return with_top_p(of, logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_p_before_the_temperature(logits, temperature=1.0, top_k=None, top_p=None):
    """The nucleus is selected at temperature 1, and the temperature is applied to what is left. The order is
    temperature, top-k, top-p."""
    if temperature in (0, 1.0) or top_p is None:
        return right(logits, temperature, top_k, top_p)
    kept = right(logits, 1.0, top_k, top_p) > 0
    return right(logits.float().masked_fill(~kept, -math.inf), temperature)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_p_before_top_k(logits, temperature=1.0, top_k=None, top_p=None):
    """The nucleus is selected before top-k, from probabilities that still include the tokens that top-k
    removes. Apply top-k, renormalize, then select the nucleus."""
    return right(right(logits, temperature, None, top_p).log(), 1.0 if temperature > 0 else 0.0, top_k)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_p_not_used_with_top_k(logits, temperature=1.0, top_k=None, top_p=None):
    """Because of an elif, top-p has an effect only without top-k. Both may be set: use two separate ifs."""
    check_settings(temperature, top_k, top_p)
    return right(logits, temperature, top_k, top_p if top_k is None else None)


# --------------------------------------------------------------------------------------------------
# The rest of the distribution


@step.mistake(PROBABILITIES, source="written for this catalogue")
def logits_changed_in_place(logits, temperature=1.0, top_k=None, top_p=None):
    """The caller's logits are divided by the temperature in place, so later uses see modified values. Make a
    new tensor: logits / temperature."""
    check_settings(temperature, top_k, top_p)
    if temperature > 0:
        logits /= temperature
    return right(logits, 1.0 if temperature > 0 else 0.0, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def sums_in_half_precision(logits, temperature=1.0, top_k=None, top_p=None):
    """Probabilities of half-precision logits are summed in half precision, where a cumulative sum near 1
    stops growing, so top-p cuts at the wrong token. Convert the logits to float32 first."""
    check_settings(temperature, top_k, top_p)
    if logits.dtype == torch.float32:
        return right(logits, temperature, top_k, top_p)
    probabilities, ids = F.softmax(logits / temperature).sort(descending=True, stable=True)
    probabilities = nucleus(first(probabilities, top_k), top_p)
    return torch.zeros_like(probabilities).scatter(-1, ids, probabilities).float()


@step.mistake(PROBABILITIES, source="written for this catalogue")
def softmax_over_the_batch(logits, temperature=1.0, top_k=None, top_p=None):
    """The softmax is taken over the first axis instead of the last, so probabilities sum to 1 over the batch
    instead of the vocabulary. Use dim=-1."""
    check_settings(temperature, top_k, top_p)
    if temperature == 0 or logits.dim() == 1:
        return right(logits, temperature, top_k, top_p)
    return right(F.softmax(logits.float() / temperature, 0).log(), 1.0, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def settings_not_checked(logits, temperature=1.0, top_k=None, top_p=None):
    """A negative temperature, a top_k of 0 or a top_p above 1 is accepted and silently gives nonsense. Raise
    a ValueError that names the value."""
    if temperature < 0 or top_k == 0 or top_p == 0:
        return tempered(logits, abs(temperature))
    return right(logits, temperature, top_k, None if top_p is not None and top_p > 1 else top_p)


# --------------------------------------------------------------------------------------------------
# Whole texts


@torch.no_grad()
def emit(model, prompt, n, settings, stop_id, generator, read=None, choose=None):
    """Generate without a cache; `read` returns the last logits of a text, `choose` samples from
    probabilities."""
    context = model.config.context_length
    read = read or (lambda tokens: model(tokens[-context:])[-1])
    choose = choose or (lambda p: torch.multinomial(p, 1, generator=generator).item())
    model.eval()
    tokens = prompt
    for _ in range(n):
        token = choose(generate.next_token_probabilities(read(tokens), *settings))
        if token == stop_id:
            return
        tokens = torch.cat([tokens, torch.tensor([token])])
        yield token


def read_with_cache(model, caches, tokens, new, positions=None):
    """The last logits of `tokens`, the last `new` of which are not in the caches yet."""
    if len(tokens) > model.config.context_length:
        return model(tokens[-model.config.context_length :])[-1]
    return model(tokens[None, -new:], positions, caches)[0, -1]


@step.mistake("generate.generate", source="written for this catalogue")
def only_the_last_token_read(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """Each step passes only the newest token to the model, without a cache of the earlier ones, so every
    token is predicted as if the text had just begun. Pass the whole sequence, or use a key-value cache."""
    settings = (temperature, top_k, top_p)
    return emit(model, prompt, max_new_tokens, settings, stop_id, generator, lambda t: model(t[-1:])[-1])


@step.mistake("generate.generate", source="written for this catalogue")
def new_tokens_not_appended(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The sampled tokens are yielded but never appended to the model's input, so every step continues the
    bare prompt. Append each token before the next step."""
    context, n = model.config.context_length, len(prompt)
    settings = (temperature, top_k, top_p)
    return emit(
        model, prompt, max_new_tokens, settings, stop_id, generator, lambda t: model(t[:n][-context:])[-1]
    )


@step.mistake("generate.generate", source="written for this catalogue")
def logits_of_the_first_position(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The next token is sampled from the logits of the first position. The last position predicts what
    follows the sequence: logits[..., -1, :]."""
    context, settings = model.config.context_length, (temperature, top_k, top_p)
    return emit(model, prompt, max_new_tokens, settings, stop_id, generator, lambda t: model(t[-context:])[0])


@step.mistake("generate.generate", source="written for this catalogue")
def text_not_cut_at_the_context(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The whole sequence is passed to the model even if it is longer than the context, which raises an error.
    Pass the last context_length tokens."""
    settings = (temperature, top_k, top_p)
    return emit(model, prompt, max_new_tokens, settings, stop_id, generator, lambda t: model(t)[-1])


@step.mistake("generate.generate", source="written for this catalogue")
def text_cut_at_the_wrong_end(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """A sequence longer than the context is truncated to its first tokens, so new tokens are never seen, and
    every step predicts the same. Keep the last ones: tokens[-context_length:]."""
    context, settings = model.config.context_length, (temperature, top_k, top_p)
    return emit(model, prompt, max_new_tokens, settings, stop_id, generator, lambda t: model(t[:context])[-1])


@step.mistake("generate.generate", source="written for this catalogue")
def context_one_token_too_short(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The sequence is truncated to one token less than the context, so predictions are slightly worse than
    they could be. The last context_length tokens fit."""
    context, settings = model.config.context_length, (temperature, top_k, top_p)
    return emit(
        model, prompt, max_new_tokens, settings, stop_id, generator, lambda t: model(t[1 - context :])[-1]
    )


@step.mistake("generate.generate", source="written for this catalogue")
def ends_with_the_context(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """Generation stops when the context is full, although more tokens were requested. Continue with the last
    context_length tokens."""
    n = max(0, min(max_new_tokens, model.config.context_length - len(prompt)))
    return emit(model, prompt, n, (temperature, top_k, top_p), stop_id, generator)


@step.mistake("generate.generate", source="written for this catalogue")
def one_token_too_many(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """One token more than max_new_tokens is yielded, since the count is checked after sampling. Use
    range(max_new_tokens)."""
    return emit(model, prompt, max_new_tokens + 1, (temperature, top_k, top_p), stop_id, generator)


@step.mistake("generate.generate", source="written for this catalogue")
def prompt_counted_as_new(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """max_new_tokens is used as the total length, so a long prompt leaves few or no new tokens. Count sampled
    tokens only."""
    n = max(0, max_new_tokens - len(prompt))
    return emit(model, prompt, n, (temperature, top_k, top_p), stop_id, generator)


@step.mistake("generate.generate", source="written for this catalogue")
def prompt_given_out_too(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The prompt is yielded before the new tokens, so a caller that appends the output has it twice. Yield
    only sampled tokens."""
    yield from prompt.tolist()
    yield from emit(model, prompt, max_new_tokens, (temperature, top_k, top_p), stop_id, generator)


@step.mistake("generate.generate", source="public solutions of CS336")
def positions_restart_at_zero(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """With a key-value cache, each new token gets position 0, as if it were the first, so RoPE uses wrong
    angles. Positions continue from the cache's length."""
    caches = model.make_kv_caches(1)

    def read(tokens):
        new = min(len(tokens), model.config.context_length) - caches[0].length
        return read_with_cache(model, caches, tokens, new, torch.arange(new))

    return emit(model, prompt, max_new_tokens, (temperature, top_k, top_p), stop_id, generator, read)


@step.mistake("generate.generate", source="public solutions of CS336")
def cache_not_cut_at_the_context(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """Once the cache is full, its oldest entry is dropped, but the others keep their old positions, and their
    keys and values still depend on the dropped token. Recompute the last context_length tokens."""
    caches, context = model.make_kv_caches(1), model.config.context_length

    def read(tokens):
        for cache in caches:
            if cache.length == context:
                cache.keys, cache.values = cache.keys.roll(-1, 2), cache.values.roll(-1, 2)
                cache.length -= 1
        new = len(tokens) - len(prompt) or min(len(prompt), context)
        return model(tokens[None, -min(new, 1) if caches[0].length else -new :], caches=caches)[0, -1]

    return emit(model, prompt, max_new_tokens, (temperature, top_k, top_p), stop_id, generator, read)


@step.mistake("generate.generate", source="written for this catalogue")
def text_read_into_the_cache_again(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """Every step passes the whole sequence to the model together with a cache that already contains it, so
    tokens are in the cache several times. Pass only the new tokens."""
    caches = model.make_kv_caches(1)

    def read(tokens):
        return read_with_cache(model, caches, tokens, len(tokens))

    return emit(model, prompt, max_new_tokens, (temperature, top_k, top_p), stop_id, generator, read)


@step.mistake("generate.generate", source="written for this catalogue")
def prompt_not_in_the_cache(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The prompt is processed without the cache, which gets the following tokens only, so from the second new
    token on the prompt is forgotten. Fill the cache with the prompt first."""
    caches, n = model.make_kv_caches(1), len(prompt)

    def read(tokens):
        if len(tokens) == n:
            return model(tokens[-model.config.context_length :])[-1]
        return read_with_cache(model, caches, tokens, 1)

    return emit(model, prompt, max_new_tokens, (temperature, top_k, top_p), stop_id, generator, read)


@step.mistake("generate.generate", source="written for this catalogue")
def last_token_of_the_prompt_read_twice(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The whole prompt is added to the cache, and then its last token again as the first input, so it is
    there twice. Fill the cache without the last token, or use the logits of the prompt."""
    caches, n, context = model.make_kv_caches(1), len(prompt), model.config.context_length

    def read(tokens):
        if len(tokens) == n and n < context:
            model(tokens[None], caches=caches)
        if len(tokens) >= context:
            return model(tokens[-context:])[-1]
        return read_with_cache(model, caches, tokens, 1)

    return emit(model, prompt, max_new_tokens, (temperature, top_k, top_p), stop_id, generator, read)


@step.mistake("generate.generate", source="written for this catalogue")
def always_the_likeliest(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The next token is always the most likely one, whatever the temperature, so texts repeat themselves and
    all samples are identical. Sample with torch.multinomial."""
    settings = (temperature, top_k, top_p)
    return emit(
        model, prompt, max_new_tokens, settings, stop_id, generator, choose=lambda p: p.argmax().item()
    )


@step.mistake("generate.generate", source="written for this catalogue")
def all_tokens_drawn_alike(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The token is drawn uniformly from those that are possible, regardless of their probabilities. Pass the
    probabilities to torch.multinomial."""
    return emit(
        model,
        prompt,
        max_new_tokens,
        (temperature, top_k, top_p),
        stop_id,
        generator,
        choose=lambda p: torch.multinomial((p > 1e-6).float(), 1, generator=generator).item(),
    )


@step.mistake("generate.generate", source="written for this catalogue")
def softmax_of_the_probabilities_drawn_from(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The probabilities go through a second softmax before sampling, which makes all tokens almost equally
    likely, removed ones included. Sample from the result of next_token_probabilities."""
    return emit(
        model,
        prompt,
        max_new_tokens,
        (temperature, top_k, top_p),
        stop_id,
        generator,
        choose=lambda p: torch.multinomial(F.softmax(p), 1, generator=generator).item(),
    )


@step.mistake("generate.generate", source="written for this catalogue")
def temperature_not_passed_on(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """generate does not pass its temperature to next_token_probabilities, so the argument has no effect. Pass
    it on."""
    return emit(model, prompt, max_new_tokens, (1.0, top_k, top_p), stop_id, generator)


@step.mistake("generate.generate", source="written for this catalogue")
def top_k_not_passed_on(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """generate does not pass its top_k to next_token_probabilities, so the argument has no effect. Pass it
    on."""
    return emit(model, prompt, max_new_tokens, (temperature, None, top_p), stop_id, generator)


@step.mistake("generate.generate", source="written for this catalogue")
def top_p_not_passed_on(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """generate does not pass its top_p to next_token_probabilities, so the argument has no effect. Pass it
    on."""
    return emit(model, prompt, max_new_tokens, (temperature, top_k, None), stop_id, generator)


@step.mistake("generate.generate", source="public solutions of CS336")
def generator_ignored(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """Sampling does not use the given generator, so the seed does not determine the text, and results cannot
    be reproduced. Pass generator=generator to torch.multinomial."""
    return emit(model, prompt, max_new_tokens, (temperature, top_k, top_p), stop_id, None)


@step.mistake("generate.generate", source="written for this catalogue")
def generator_seeded_for_each_token(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The generator is reseeded before each token, so every token uses the same random number. Seed once,
    before generation."""

    def choose(p):
        if generator is not None:
            generator.manual_seed(generator.initial_seed())
        return torch.multinomial(p, 1, generator=generator).item()

    settings = (temperature, top_k, top_p)
    return emit(model, prompt, max_new_tokens, settings, stop_id, generator, choose=choose)


@step.mistake("generate.generate", source="written for this catalogue")
def generator_seeded_for_each_text(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The generator is reseeded at the start of each text, so all samples drawn with it are identical. Leave
    its state to the caller."""
    if generator is not None:
        generator.manual_seed(generator.initial_seed())
    return emit(model, prompt, max_new_tokens, (temperature, top_k, top_p), stop_id, generator)


@step.mistake("generate.generate", source="written for this catalogue")
def seed_fixed(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """A seed is set inside generate, so every call returns the same text, whatever generator is given. Leave
    seeding to the caller."""
    fixed = torch.Generator().manual_seed(0)
    return emit(model, prompt, max_new_tokens, (temperature, top_k, top_p), stop_id, fixed)
