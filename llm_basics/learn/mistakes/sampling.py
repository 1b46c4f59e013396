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

# in no order, and sums that no threshold below comes near
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
    """Equals stand where the sum crosses p, so that rounding decides about a few of them."""
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
    """The probabilities, not the logits, are divided by the temperature, and once they sum to 1 again
    it has done nothing. Divide the logits, then take the softmax."""
    check_settings(temperature, top_k, top_p)
    return right(logits, 1.0 if temperature > 0 else 0.0, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def softmax_of_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """The softmax is taken twice: the temperature divides probabilities, which then go through softmax
    again. All tokens come out almost equally likely; the second softmax must go."""
    check_settings(temperature, top_k, top_p)
    return right(F.softmax(logits.float()), temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def temperature_multiplied(logits, temperature=1.0, top_k=None, top_p=None):
    """The logits are multiplied by the temperature. A low one then makes the text wilder and a high one
    tamer; divide."""
    check_settings(temperature, top_k, top_p)
    return right(logits, 1 / temperature if temperature > 0 else 0.0, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def division_by_a_temperature_of_zero(logits, temperature=1.0, top_k=None, top_p=None):
    """At temperature 0 the logits are divided by 0, which gives nan. In the limit only the likeliest
    token is left; treat 0 as a case of its own."""
    check_settings(temperature, top_k, top_p)
    if temperature == 0:
        return F.softmax(logits.float() / temperature)
    return right(logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def temperature_of_zero_taken_for_one(logits, temperature=1.0, top_k=None, top_p=None):
    """`temperature or 1.0` makes 1 of a temperature of 0, so that what should be the likeliest token
    alone is drawn at random. Compare with None, or with 0."""
    return right(logits, temperature or 1.0, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def exponential_overflows(logits, temperature=1.0, top_k=None, top_p=None):
    """The exponentials are taken without subtracting the maximum. Large logits or a low temperature
    give inf, and inf/inf is nan; subtract the maximum of the row first."""
    if temperature == 0:
        return right(logits, temperature, top_k, top_p)
    exponentials = (logits.float() / temperature).exp()
    return right((exponentials / exponentials.sum(-1, keepdim=True)).log(), 1.0, top_k, top_p)


# --------------------------------------------------------------------------------------------------
# Top-k


@step.mistake(PROBABILITIES, source="public solutions of CS336")
def top_k_keeps_ties(logits, temperature=1.0, top_k=None, top_p=None):
    """All tokens are kept that are as likely as the k-th, so ties make more than k of them. Choose by
    the indices that topk gives, not by comparing with a threshold."""

    def of(p, k):
        return normal(p.masked_fill(p < p.topk(k).values[..., -1:], 0.0))

    return with_top_k(of, logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="public solutions of CS336")
def top_k_discarded(logits, temperature=1.0, top_k=None, top_p=None):
    """masked_fill returns a new tensor, which is discarded here, so top-k does nothing. Assign the result, or
    use masked_fill_ on a copy."""
    check_settings(temperature, top_k, top_p)
    return right(logits, temperature, None, top_p)


@step.mistake(PROBABILITIES, source="public solutions of CS336")
def top_k_not_renormalized(logits, temperature=1.0, top_k=None, top_p=None):
    """The tokens outside of the top k are set to 0, but the others are not made to sum to 1 again.
    Divide by the sum of what is left."""
    probabilities = right(logits, temperature, top_k, top_p)
    if top_k is None or top_p is not None or temperature == 0:
        return probabilities
    return tempered(logits, temperature).masked_fill(probabilities == 0, 0.0)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_k_masked_with_zero(logits, temperature=1.0, top_k=None, top_p=None):
    """The logits outside of the top k are set to 0, which is a score like any other: exp(0) is 1. Set
    them to -inf, so that the softmax gives them 0."""
    if top_k is None or temperature == 0:
        return right(logits, temperature, top_k, top_p)
    kept = right(logits, temperature, top_k) > 0
    return right(logits.float().masked_fill(~kept, 0.0), temperature, None, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_k_loses_the_last(logits, temperature=1.0, top_k=None, top_p=None):
    """The k-th token itself is cut off, since <= stands where < belongs. Only k - 1 tokens are left,
    and with a k of 1 none at all."""

    def of(p, k):
        return normal(p.masked_fill(p <= p.topk(k).values[..., -1:], 0.0))

    return with_top_k(of, logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_k_keeps_one_too_many(logits, temperature=1.0, top_k=None, top_p=None):
    """k + 1 tokens are kept: sorted[k] is the first that must go, not the last that stays. The
    threshold is sorted[k - 1]."""
    check_settings(temperature, top_k, top_p)
    return right(logits, temperature, top_k and top_k + 1, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_k_of_the_whole_batch(logits, temperature=1.0, top_k=None, top_p=None):
    """The threshold of one row is used for all rows of the batch. Rows with other logits keep too many
    tokens or too few; keep the last axis, with keepdim, for a threshold a row."""

    def of(p, k):
        rows = p.flatten(0, -2)
        return normal(p.masked_fill(p < rows[0].topk(k).values[-1], 0.0))

    if logits.dim() == 1:
        return right(logits, temperature, top_k, top_p)
    return with_top_k(of, logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_k_above_the_vocabulary_fails(logits, temperature=1.0, top_k=None, top_p=None):
    """topk fails where k is larger than the vocabulary, which happens with small models. Keep min(k,
    size), so all tokens."""
    if top_k is not None:
        logits.topk(top_k)
    return right(logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_k_keeps_the_unlikeliest(logits, temperature=1.0, top_k=None, top_p=None):
    """The tokens are sorted upwards, so the first k are the least likely ones. Sort with
    descending=True."""

    def of(p, k):
        worst = p.topk(k, largest=False)
        return normal(torch.zeros_like(p).scatter(-1, worst.indices, worst.values))

    return with_top_k(of, logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def probabilities_left_sorted(logits, temperature=1.0, top_k=None, top_p=None):
    """The probabilities come back in sorted order, so the likeliest is always token 0. Scatter them
    back to the ids that sort or topk gave along with them."""
    probabilities = right(logits, temperature, top_k, top_p)
    if top_k is None and top_p is None:
        return probabilities
    return probabilities.sort(descending=True).values


# --------------------------------------------------------------------------------------------------
# Top-p


@step.mistake(PROBABILITIES, source="public solutions of CS336")
def top_p_drops_the_token_that_crosses(logits, temperature=1.0, top_k=None, top_p=None):
    """Kept are the tokens whose sum is below p, without the one that crosses it. Where the first is
    above p alone, none is left and all is nan; look at the sum before each token."""

    def of(p, limit):
        return normal(p.masked_fill(p.cumsum(-1) > limit + 1e-6, 0.0))

    return with_top_p(of, logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="public solutions of CS336")
def top_p_one_too_few(logits, temperature=1.0, top_k=None, top_p=None):
    """The token that crosses p is dropped, except where it is the first. What is left has less than p
    together; the set must reach p."""

    def of(p, limit):
        keep = p.cumsum(-1) <= limit + 1e-6
        keep[..., 0] = True
        return normal(p.masked_fill(~keep, 0.0))

    return with_top_p(of, logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_p_one_too_many(logits, temperature=1.0, top_k=None, top_p=None):
    """One token more is kept than is needed to reach p: the mask was shifted by one place although it
    already kept the one that crosses. Shift only a mask of cumsum > p."""

    def of(p, limit):
        out = (p.cumsum(-1) - p >= limit).roll(1, -1)
        out[..., 0] = False
        return normal(p.masked_fill(out, 0.0))

    return with_top_p(of, logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="public solutions of CS336")
def top_p_not_renormalized(logits, temperature=1.0, top_k=None, top_p=None):
    """The tokens outside of the nucleus are set to 0, but the others are not made to sum to 1 again.
    Divide by the sum of what is left."""

    def of(p, limit):
        return p.masked_fill(p.cumsum(-1) - p >= limit, 0.0)

    return with_top_p(of, logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_p_discarded(logits, temperature=1.0, top_k=None, top_p=None):
    """The mask of the nucleus is computed, but what masked_fill returns is not kept, so top-p does
    nothing. Assign the result."""
    check_settings(temperature, top_k, top_p)
    return right(logits, temperature, top_k)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_p_without_sorting(logits, temperature=1.0, top_k=None, top_p=None):
    """The probabilities are added up in the order of the vocabulary, so the nucleus consists of low
    ids, not of likely tokens. Sort downwards before cumsum."""
    check_settings(temperature, top_k, top_p)
    return nucleus(right(logits, temperature, top_k), top_p if temperature > 0 else None)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_p_mask_in_sorted_order(logits, temperature=1.0, top_k=None, top_p=None):
    """The mask belongs to the sorted tokens but is applied to the unsorted ones, so it removes whatever
    stands in those places. Scatter it back with the ids of the sort."""
    check_settings(temperature, top_k, top_p)
    probabilities = right(logits, temperature, top_k)
    if top_p is None or temperature == 0:
        return probabilities
    ordered = probabilities.sort(descending=True).values
    return normal(probabilities.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0))


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_p_sorted_upwards(logits, temperature=1.0, top_k=None, top_p=None):
    """The probabilities are added up from the smallest, so the nucleus is the tail of the distribution
    and the likely tokens are cut off. Sort with descending=True."""

    def of(p, limit):
        return nucleus(p.flip(-1), limit).flip(-1)

    return with_top_p(of, logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_p_as_a_least_probability(logits, temperature=1.0, top_k=None, top_p=None):
    """Each token is compared with p by itself. Top-p is about the sum of the likeliest; a limit for
    single tokens is another method, min-p. Use cumsum."""

    def of(p, limit):
        return normal(p.masked_fill(p < limit * p[..., :1], 0.0))

    return with_top_p(of, logits, temperature, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_p_before_the_temperature(logits, temperature=1.0, top_k=None, top_p=None):
    """The nucleus is chosen from the probabilities at temperature 1, and the temperature is applied to
    what is left. Apply it first, as all three settings are meant in this order."""
    if temperature in (0, 1.0) or top_p is None:
        return right(logits, temperature, top_k, top_p)
    kept = right(logits, 1.0, top_k, top_p) > 0
    return right(logits.float().masked_fill(~kept, -math.inf), temperature)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_p_before_top_k(logits, temperature=1.0, top_k=None, top_p=None):
    """The nucleus is chosen before top-k, from probabilities that still count the tokens which top-k
    removes. Cut to k first, let the rest sum to 1, then choose the nucleus."""
    return right(right(logits, temperature, None, top_p).log(), 1.0 if temperature > 0 else 0.0, top_k)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def top_p_not_used_with_top_k(logits, temperature=1.0, top_k=None, top_p=None):
    """An elif lets top-p work only where top-k is not given. Both may be set: use two separate ifs."""
    check_settings(temperature, top_k, top_p)
    return right(logits, temperature, top_k, top_p if top_k is None else None)


# --------------------------------------------------------------------------------------------------
# The rest of the distribution


@step.mistake(PROBABILITIES, source="written for this catalogue")
def logits_changed_in_place(logits, temperature=1.0, top_k=None, top_p=None):
    """The caller's logits are divided by the temperature in place. Whoever uses them again has other
    ones; make a new tensor: logits / temperature."""
    check_settings(temperature, top_k, top_p)
    if temperature > 0:
        logits /= temperature
    return right(logits, 1.0 if temperature > 0 else 0.0, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def sums_in_half_precision(logits, temperature=1.0, top_k=None, top_p=None):
    """Probabilities of half-precision logits are added up in half precision. A running sum near 1 then
    no longer moves, and top-p cuts in the wrong place; convert the logits to float32 first."""
    check_settings(temperature, top_k, top_p)
    if logits.dtype == torch.float32:
        return right(logits, temperature, top_k, top_p)
    probabilities, ids = F.softmax(logits / temperature).sort(descending=True, stable=True)
    probabilities = nucleus(first(probabilities, top_k), top_p)
    return torch.zeros_like(probabilities).scatter(-1, ids, probabilities).float()


@step.mistake(PROBABILITIES, source="written for this catalogue")
def softmax_over_the_batch(logits, temperature=1.0, top_k=None, top_p=None):
    """The softmax runs over the first axis instead of the last, so the probabilities of a token sum to
    1 over the batch. Use dim=-1."""
    check_settings(temperature, top_k, top_p)
    if temperature == 0 or logits.dim() == 1:
        return right(logits, temperature, top_k, top_p)
    return right(F.softmax(logits.float() / temperature, 0).log(), 1.0, top_k, top_p)


@step.mistake(PROBABILITIES, source="written for this catalogue")
def settings_not_checked(logits, temperature=1.0, top_k=None, top_p=None):
    """A negative temperature, a k of 0 or a p above 1 are accepted and give nonsense without a word.
    Raise a ValueError that says what was given."""
    if temperature < 0 or top_k == 0 or top_p == 0:
        return tempered(logits, abs(temperature))
    return right(logits, temperature, top_k, None if top_p is not None and top_p > 1 else top_p)


# --------------------------------------------------------------------------------------------------
# Whole texts


@torch.no_grad()
def tell(model, prompt, n, settings, stop_id, generator, read=None, choose=None):
    """Generate without a cache; `read` gives the last logits of a text, `choose` draws from
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
    """Each step shows the model the newest token alone, with no cache of the ones before. It then
    writes as if every text had just begun; give it the whole text, or keep keys and values."""
    settings = (temperature, top_k, top_p)
    return tell(model, prompt, max_new_tokens, settings, stop_id, generator, lambda t: model(t[-1:])[-1])


@step.mistake("generate.generate", source="written for this catalogue")
def new_tokens_not_appended(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The sampled tokens are yielded but never fed to the model, which continues the bare prompt each time.
    Append each one before the next step."""
    context, n = model.config.context_length, len(prompt)
    settings = (temperature, top_k, top_p)
    return tell(
        model, prompt, max_new_tokens, settings, stop_id, generator, lambda t: model(t[:n][-context:])[-1]
    )


@step.mistake("generate.generate", source="written for this catalogue")
def logits_of_the_first_position(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The next token is drawn from the logits of the first position. What follows the text is said by
    the last one: logits[..., -1, :]."""
    context, settings = model.config.context_length, (temperature, top_k, top_p)
    return tell(model, prompt, max_new_tokens, settings, stop_id, generator, lambda t: model(t[-context:])[0])


@step.mistake("generate.generate", source="written for this catalogue")
def text_not_cut_at_the_context(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The whole text is given to the model even where it is longer than the context, and the model
    refuses. Give it the last context_length tokens."""
    settings = (temperature, top_k, top_p)
    return tell(model, prompt, max_new_tokens, settings, stop_id, generator, lambda t: model(t)[-1])


@step.mistake("generate.generate", source="written for this catalogue")
def text_cut_at_the_wrong_end(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """A text longer than the context is cut to its first tokens, so the newest ones are never seen and
    the same token comes again and again. Keep the last: tokens[-context_length:]."""
    context, settings = model.config.context_length, (temperature, top_k, top_p)
    return tell(model, prompt, max_new_tokens, settings, stop_id, generator, lambda t: model(t[:context])[-1])


@step.mistake("generate.generate", source="written for this catalogue")
def context_one_token_too_short(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The text is cut to one token less than the model can see. It writes a little worse than it could;
    the last context_length tokens fit."""
    context, settings = model.config.context_length, (temperature, top_k, top_p)
    return tell(
        model, prompt, max_new_tokens, settings, stop_id, generator, lambda t: model(t[1 - context :])[-1]
    )


@step.mistake("generate.generate", source="written for this catalogue")
def ends_with_the_context(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The text ends when the context is full, though more tokens were requested. Continue with the last
    context_length tokens."""
    n = max(0, min(max_new_tokens, model.config.context_length - len(prompt)))
    return tell(model, prompt, n, (temperature, top_k, top_p), stop_id, generator)


@step.mistake("generate.generate", source="written for this catalogue")
def one_token_too_many(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """One token more than max_new_tokens is yielded: the count is checked after sampling. Use
    range(max_new_tokens)."""
    return tell(model, prompt, max_new_tokens + 1, (temperature, top_k, top_p), stop_id, generator)


@step.mistake("generate.generate", source="written for this catalogue")
def prompt_counted_as_new(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """max_new_tokens is taken for the length of the whole text, so a long prompt leaves little or
    nothing to write. Count only the tokens that are drawn."""
    n = max(0, max_new_tokens - len(prompt))
    return tell(model, prompt, n, (temperature, top_k, top_p), stop_id, generator)


@step.mistake("generate.generate", source="written for this catalogue")
def prompt_given_out_too(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The prompt stands before the new tokens in the output, so a caller that appends the output has it
    twice. Yield only what was drawn."""
    yield from prompt.tolist()
    yield from tell(model, prompt, max_new_tokens, (temperature, top_k, top_p), stop_id, generator)


@step.mistake("generate.generate", source="public solutions of CS336")
def positions_restart_at_zero(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """With keys and values cached, each new token is given position 0, as if it stood at the beginning.
    Rotary angles are then wrong; positions continue at the cache's length."""
    caches = model.make_kv_caches(1)

    def read(tokens):
        new = min(len(tokens), model.config.context_length) - caches[0].length
        return read_with_cache(model, caches, tokens, new, torch.arange(new))

    return tell(model, prompt, max_new_tokens, (temperature, top_k, top_p), stop_id, generator, read)


@step.mistake("generate.generate", source="public solutions of CS336")
def cache_not_cut_at_the_context(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """Once the cache is full, its oldest entry is dropped but the others keep the positions that they
    had and what they knew of it. Read the last context_length tokens anew."""
    caches, context = model.make_kv_caches(1), model.config.context_length

    def read(tokens):
        for cache in caches:
            if cache.length == context:
                cache.keys, cache.values = cache.keys.roll(-1, 2), cache.values.roll(-1, 2)
                cache.length -= 1
        new = len(tokens) - len(prompt) or min(len(prompt), context)
        return model(tokens[None, -min(new, 1) if caches[0].length else -new :], caches=caches)[0, -1]

    return tell(model, prompt, max_new_tokens, (temperature, top_k, top_p), stop_id, generator, read)


@step.mistake("generate.generate", source="written for this catalogue")
def text_read_into_the_cache_again(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The whole text goes to the model in each step along with a cache that holds it already.
    Everything is then there several times; give it only the tokens that are new."""
    caches = model.make_kv_caches(1)

    def read(tokens):
        return read_with_cache(model, caches, tokens, len(tokens))

    return tell(model, prompt, max_new_tokens, (temperature, top_k, top_p), stop_id, generator, read)


@step.mistake("generate.generate", source="written for this catalogue")
def prompt_not_in_the_cache(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The prompt is read without the cache, and only what follows goes into it. From the second new
    token on the prompt is forgotten; fill the cache with the prompt first."""
    caches, n = model.make_kv_caches(1), len(prompt)

    def read(tokens):
        if len(tokens) == n:
            return model(tokens[-model.config.context_length :])[-1]
        return read_with_cache(model, caches, tokens, 1)

    return tell(model, prompt, max_new_tokens, (temperature, top_k, top_p), stop_id, generator, read)


@step.mistake("generate.generate", source="written for this catalogue")
def last_token_of_the_prompt_read_twice(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The whole prompt goes into the cache, and its last token then once more as the first to continue
    from. It stands there twice; fill the cache up to the last token, or use the logits you have."""
    caches, n, context = model.make_kv_caches(1), len(prompt), model.config.context_length

    def read(tokens):
        if len(tokens) == n and n < context:
            model(tokens[None], caches=caches)
        if len(tokens) >= context:
            return model(tokens[-context:])[-1]
        return read_with_cache(model, caches, tokens, 1)

    return tell(model, prompt, max_new_tokens, (temperature, top_k, top_p), stop_id, generator, read)


@step.mistake("generate.generate", source="written for this catalogue")
def always_the_likeliest(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The next token is always the likeliest, whatever the temperature. Texts then repeat themselves
    and all samples are the same; draw with torch.multinomial."""
    settings = (temperature, top_k, top_p)
    return tell(
        model, prompt, max_new_tokens, settings, stop_id, generator, choose=lambda p: p.argmax().item()
    )


@step.mistake("generate.generate", source="written for this catalogue")
def all_tokens_drawn_alike(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The token is drawn evenly from those that are possible, without regard to how likely each is.
    Pass the probabilities to torch.multinomial."""
    return tell(
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
    """The probabilities go through a second softmax before the draw, which makes all tokens almost
    equally likely, the excluded ones too. Draw from what next_token_probabilities gives."""
    return tell(
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
    """generate takes a temperature but does not give it to next_token_probabilities. A setting that
    does nothing misleads; pass it on."""
    return tell(model, prompt, max_new_tokens, (1.0, top_k, top_p), stop_id, generator)


@step.mistake("generate.generate", source="written for this catalogue")
def top_k_not_passed_on(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """generate takes a top_k but does not give it to next_token_probabilities. A setting that does
    nothing misleads; pass it on."""
    return tell(model, prompt, max_new_tokens, (temperature, None, top_p), stop_id, generator)


@step.mistake("generate.generate", source="written for this catalogue")
def top_p_not_passed_on(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """generate takes a top_p but does not give it to next_token_probabilities. A setting that does
    nothing misleads; pass it on."""
    return tell(model, prompt, max_new_tokens, (temperature, top_k, None), stop_id, generator)


@step.mistake("generate.generate", source="public solutions of CS336")
def generator_ignored(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The draw does not use the generator that is given, so a seed does not decide the text and no run can
    repeat it. Pass generator=generator to torch.multinomial."""
    return tell(model, prompt, max_new_tokens, (temperature, top_k, top_p), stop_id, None)


@step.mistake("generate.generate", source="written for this catalogue")
def generator_seeded_for_each_token(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The generator is set back to its seed before each draw, so every token gets the same random
    number. Seed once, before the text."""

    def choose(p):
        if generator is not None:
            generator.manual_seed(generator.initial_seed())
        return torch.multinomial(p, 1, generator=generator).item()

    settings = (temperature, top_k, top_p)
    return tell(model, prompt, max_new_tokens, settings, stop_id, generator, choose=choose)


@step.mistake("generate.generate", source="written for this catalogue")
def generator_seeded_for_each_text(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """The generator is set back to its seed at the start of each text, so that several samples from it
    are all the same. Leave its state to the caller."""
    if generator is not None:
        generator.manual_seed(generator.initial_seed())
    return tell(model, prompt, max_new_tokens, (temperature, top_k, top_p), stop_id, generator)


@step.mistake("generate.generate", source="written for this catalogue")
def seed_fixed(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, generator=None
):
    """A seed is set inside of generate, so every call writes the same text whatever generator is given.
    Leave seeds to the caller."""
    fixed = torch.Generator().manual_seed(0)
    return tell(model, prompt, max_new_tokens, (temperature, top_k, top_p), stop_id, fixed)
