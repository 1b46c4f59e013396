"""Preference optimization: losses of pairs, log-probabilities of responses, packed instruction data."""

import json
import tempfile
import types
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as tF

from llm_basics.alignment import dpo, packing, response_log_probs
from llm_basics.learn import probes
from llm_basics.learn.mistakes import response_log_probs as texts

step = probes.Step("dpo")
# the right functions, also where one of them is replaced
right = types.SimpleNamespace(**vars(dpo))
PackedSFTDataset = packing.PackedSFTDataset
draw = probes.numbers(seed=100)

# --------------------------------------------------------------------------------------------------
# The loss of pairs

CHOSEN, REJECTED = -8 * draw(7).abs(), -8 * draw(7).abs()
REF_CHOSEN, REF_REJECTED = CHOSEN + draw(7), REJECTED + draw(7)


def expected(chosen, rejected, ref_chosen, ref_rejected, beta, loss_type="sigmoid", smoothing=0.0):
    """As a classification of the order of each pair."""
    margin = (chosen - rejected) - (ref_chosen - ref_rejected)
    if loss_type == "ipo":
        return (margin - 0.5 / beta) ** 2
    labels = torch.full_like(margin, 1 - smoothing)
    return tF.binary_cross_entropy_with_logits(beta * margin, labels, reduction="none")


def compare_loss(about, *choices, ref=(REF_CHOSEN, REF_REJECTED), chosen=CHOSEN, rejected=REJECTED):
    step.compare(
        about,
        lambda a, chosen, rejected: a.run_dpo_loss(chosen, rejected, *ref, *choices),
        lambda chosen, rejected: expected(chosen, rejected, *ref, *choices),
        {"chosen": chosen, "rejected": rejected},
        axes="pair",
    )


compare_loss("seven pairs, beta 0.5", 0.5)
compare_loss("seven pairs, beta 0.1", 0.1)
compare_loss("policy and reference equal: log 2", 0.3, ref=(CHOSEN, REJECTED))
compare_loss("label smoothing of 0.2", 0.5, "sigmoid", 0.2)
compare_loss("ipo, beta 0.5", 0.5, "ipo")
compare_loss("ipo, beta 0.1", 0.1, "ipo")
compare_loss(
    "margins of 2000 and -2000",
    0.5,
    ref=(torch.zeros(2), torch.zeros(2)),
    chosen=torch.tensor([0.0, -2000.0]),
    rejected=torch.tensor([-2000.0, 0.0]),
)


def unknown_type(a):
    try:
        a.run_dpo_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, 0.5, "hinge")
    except ValueError:
        return "ValueError"
    return "no error"


step.value("an unknown loss_type", unknown_type, "ValueError")

# --------------------------------------------------------------------------------------------------
# Log-probabilities of responses, and the loss of a pair of texts

END = texts.END


class Letters(texts.Words):
    """The sign that an instruction is formatted with is a token as any other."""

    def encode(self, text, add_special_tokens=True, **options):
        return super().encode(text.replace("#", "="), add_special_tokens)


class Model(nn.Module):
    """Logits over 32 tokens from the last one and the mean of all so far."""

    def __init__(self, seed=101):
        super().__init__()
        start = probes.numbers(seed)
        self.table, self.all = nn.Parameter(0.7 * start(32, 32)), nn.Parameter(3 * start(32, 32))

    @property
    def device(self):
        return self.all.device

    def logits(self, input_ids):
        counts = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return self.table[input_ids] + self.all[input_ids].cumsum(1) / counts

    def forward(self, input_ids, attention_mask=None, **options):
        return types.SimpleNamespace(logits=self.logits(input_ids))


class Plain(Model):
    """The same model, which returns logits, as this package's."""

    def forward(self, input_ids):
        return self.logits(input_ids)


def with_table(table, model_class=Model):
    model = model_class()
    del model.table
    model.table = table
    return model


TABLE = Model().table.detach()
BATCH = texts.tokenized(["say red", "hi", "add one"], ["red it is", "hello", "t"])
EMPTY = BATCH | {"response_mask": BATCH["response_mask"] & torch.tensor([[True], [True], [False]])}


def log_prob(model, prompt, response):
    """By hand, without a batch: the sum over the response, each token given all before it."""
    ids = torch.tensor([prompt + response])
    log_probs = torch.log_softmax(model.logits(ids[:, :-1])[0], -1)
    return log_probs[range(ids.shape[1] - 1), ids[0, 1:]][len(prompt) - 1 :].sum()


def right_sequences(tokens):
    def sums(table):
        logits = with_table(table).logits(tokens["input_ids"])
        each = -tF.cross_entropy(logits.mT, tokens["labels"], reduction="none")
        return torch.stack([row[k].sum() for row, k in zip(each, tokens["response_mask"], strict=True)])

    return sums


def compare_sequences(about, tokens, model_class=Model):
    step.compare(
        about,
        lambda a, table: a.run_sequence_log_probs(
            with_table(table, model_class), {name: tensor.clone() for name, tensor in tokens.items()}
        ),
        right_sequences(tokens),
        {"table": TABLE},
        axes="row",
    )


compare_sequences("three responses of different lengths", BATCH)
compare_sequences("an empty response", EMPTY)
compare_sequences("a model that returns logits", BATCH, Plain)

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n"
)
PAIR = ("say red", "red", "it is blue or so")


def right_pair(beta, ref_seed=102, prompt=PAIR[0], chosen=PAIR[1], rejected=PAIR[2]):
    def loss(table):
        encode = Letters().encode
        before = encode(ALPACA + prompt + "\n\n### Response:\n")
        model, ref = with_table(table), Model(ref_seed)
        policy = [log_prob(model, before, encode(text) + [END]) for text in (chosen, rejected)]
        fixed = [log_prob(ref, before, encode(text) + [END]).detach() for text in (chosen, rejected)]
        return -tF.logsigmoid(beta * ((policy[0] - fixed[0]) - (policy[1] - fixed[1])))

    return loss


def compare_pair(about, beta, pair=PAIR, ref_seed=102, model_class=Model, **ground):
    step.compare(
        about,
        lambda a, table: a.run_compute_per_instance_dpo_loss(
            with_table(table, model_class), model_class(ref_seed), Letters(), beta, *pair
        ),
        right_pair(beta, ref_seed, *pair),
        {"table": TABLE},
        **(ground or {"contract": "per_instance_dpo_loss"}),
    )


compare_pair("a pair of texts, beta 0.5", 0.5)
compare_pair("a pair of texts, beta 0.02", 0.02)
compare_pair("the longer response preferred", 0.1, ("add one and two", "three it is", "no"))
compare_pair("policy and reference equal", 0.5, ref_seed=101)
compare_pair(
    "models that return logits",
    0.1,
    model_class=Plain,
    beyond="the assignment has Hugging Face's models alone; this package's return logits",
)


def gradients_of_the_reference(a):
    model, ref = Model(), Model(102)
    a.run_compute_per_instance_dpo_loss(model, ref, Letters(), 0.5, *PAIR).backward()
    return [name for name, p in ref.named_parameters() if p.grad is not None]


step.value(
    "weights of the reference with a gradient",
    gradients_of_the_reference,
    [],
    beyond="its graph takes as much memory as that of the policy; shared weights are pulled both ways",
)

# --------------------------------------------------------------------------------------------------
# Packed instruction data

LINES = [("say red", "red"), ("hi", "hello"), ("add one and two", "three it is"), ("say {x}", "x")]
MANY = [(f"say {'a' * i}", "b" * (i % 3 + 1)) for i in range(10)]


def stream(pairs):
    """All documents, one after the other."""
    encode = Letters().encode
    return [
        token
        for prompt, response in pairs
        for token in [*encode(ALPACA + prompt + "\n\n### Response:\n" + response), END]
    ]


def packed(a, pairs, seq_length, shuffle=False, blank=False):
    lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in pairs]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        path.write_text(("\n\n" if blank else "\n").join(lines) + "\n\n" * blank)
        dataset = a.get_packed_sft_dataset(Letters(), str(path), seq_length, shuffle)
        items = [dataset[i] for i in range(len(dataset))]
        return dataset, {name: [item[name] for item in items] for name in ("input_ids", "labels")}


def right_packed(pairs, seq_length):
    tokens = torch.tensor(stream(pairs))
    starts = range(0, len(tokens) - seq_length, seq_length)
    return {
        "input_ids": [tokens[i : i + seq_length] for i in starts],
        "labels": [tokens[i + 1 : i + seq_length + 1] for i in starts],
    }


def check_packed(about, seq_length, pairs=LINES, blank=False, **ground):
    step.value(
        about,
        lambda a: packed(a, pairs, seq_length, blank=blank)[1],
        right_packed(pairs, seq_length),
        axes="position",
        **(ground or {"contract": "packed_sft_dataset"}),
    )


check_packed("four documents in sequences of 50", 50)
check_packed("sequences longer than a document", 199)
EDGE = "where the last label is the last token of all, one sequence more or less is easily lost"


def document_of(n):
    """One document of n tokens."""
    return [("hi", "a" * (n - len(stream([("hi", "")]))))]


check_packed("the last label is the last token", 60, document_of(181), beyond=EDGE)
check_packed("the last token has no label", 60, document_of(180), beyond=EDGE)
check_packed(
    "blank lines in the file",
    50,
    blank=True,
    beyond="files that were joined or edited by hand have blank lines",
)


def shuffled(a):
    """With sequences of one token, the tokens are those of all documents but for the last one."""
    _, found = packed(a, MANY, 1, shuffle=True)
    tokens = [int(item) for item in found["input_ids"]] + [int(found["labels"][-1])]
    documents, current = [], []
    for token in tokens:
        current.append(token)
        if token == END:
            documents.append(current)
            current = []
    in_order = [stream([pair]) for pair in MANY]
    return {"documents": sorted(documents), "in another order": documents != in_order}


step.value(
    "ten documents, shuffled",
    shuffled,
    {"documents": sorted(stream([pair]) for pair in MANY), "in another order": True},
    contract="packed_sft_dataset",
)


def beyond_the_end(a):
    dataset, _ = packed(a, LINES, 50)
    try:
        dataset[len(dataset)]
    except IndexError:
        return "IndexError"
    return "no error"


step.value(
    "an item after the last one",
    beyond_the_end,
    "IndexError",
    beyond="a for loop over a dataset ends by IndexError, without which it has items that are too short",
)


def items(n):
    return [{"input_ids": torch.arange(3) + 10 * i, "labels": torch.arange(1, 4) + 10 * i} for i in range(n)]


def batches(a, n, batch_size):
    found = list(a.run_iterate_batches(items(n), batch_size, False))
    return [{name: batch[name] for name in ("input_ids", "labels")} for batch in found]


def right_batches(n, batch_size):
    parts = [items(n)[i : i + batch_size] for i in range(0, n, batch_size)]
    return [{name: torch.stack([item[name] for item in part]) for name in part[0]} for part in parts]


step.value(
    "six items in batches of two", lambda a: batches(a, 6, 2), right_batches(6, 2), contract="batches_of_sft"
)
step.value(
    "seven items in batches of three",
    lambda a: batches(a, 7, 3),
    right_batches(7, 3),
    contract="batches_of_sft",
)


def shuffled_batches(a):
    found = list(a.run_iterate_batches(items(20), 4, True))
    firsts = [int(row[0]) for batch in found for row in batch["input_ids"]]
    pairs = [bool((batch["labels"] == batch["input_ids"] + 1).all()) for batch in found]
    return {"items": sorted(firsts), "in another order": firsts != sorted(firsts), "labels fit": all(pairs)}


step.value(
    "twenty items, shuffled",
    shuffled_batches,
    {"items": [10 * i for i in range(20)], "in another order": True, "labels fit": True},
    contract="batches_of_sft",
)


# --------------------------------------------------------------------------------------------------
# Mistakes of the loss


def register(piece, name, function, explanation, source="written for this catalogue", same_as=None):
    function.__name__, function.__doc__ = name, explanation
    step.mistake(piece, source=source, same_as=same_as)(function)


def soft(x):
    return torch.logaddexp(-x, torch.zeros_like(x))


def smoothed(x, smoothing):
    return (1 - smoothing) * soft(x) + smoothing * soft(-x)


def margin_of(chosen, rejected, ref_chosen, ref_rejected):
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def loss_with(
    margin=margin_of,
    sigmoid=lambda h, beta, e: smoothed(beta * h, e),
    ipo=lambda h, beta: (h - 0.5 / beta).square(),
    types_=("sigmoid", "ipo"),
    result=lambda loss: loss,
):
    """The loss with something wrong in it."""

    def loss(
        policy_chosen,
        policy_rejected,
        ref_chosen,
        ref_rejected,
        beta,
        loss_type="sigmoid",
        label_smoothing=0.0,
    ):
        h = margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
        if types_ and loss_type not in types_:
            raise ValueError(f"loss_type must be one of {types_}, got {loss_type!r}")
        return result(ipo(h, beta) if loss_type == "ipo" else sigmoid(h, beta, label_smoothing))

    return loss


def loss_mistake(name, explanation, source="written for this catalogue", same_as=None, **changes):
    register("dpo.dpo_loss", name, loss_with(**changes), explanation, source, same_as)


loss_mistake(
    "sign_of_the_loss",
    """The minus is missing: log sigmoid is minimized, so the rejected responses become likelier. The loss is
    -log sigmoid, at least 0, and log 2 at the start.""",
    source="the usual first version",
    sigmoid=lambda h, beta, e: -smoothed(beta * h, e),
)
loss_mistake(
    "chosen_and_rejected_exchanged",
    """The margin is that of the rejected response over the chosen one. The model learns the opposite of the
    preferences, and its loss falls as it should. Chosen minus rejected.""",
    margin=lambda c, r, rc, rr: margin_of(r, c, rr, rc),
)
loss_mistake(
    "policy_and_reference_exchanged",
    """The reference is the minuend: log p_ref - log p. The margin has the opposite sign, so the rejected
    responses become likelier. The policy comes first.""",
    same_as="chosen_and_rejected_exchanged",
    margin=lambda c, r, rc, rr: (rc - c) - (rr - r),
)
loss_mistake(
    "references_exchanged",
    """The log-probabilities of the reference are exchanged: those of the rejected response are subtracted
    from the chosen one. At the start the margin is then not 0. Compare each response with itself.""",
    margin=lambda c, r, rc, rr: margin_of(c, r, rr, rc),
)
loss_mistake(
    "reference_added",
    """The margin of the reference is added, not subtracted, so a pair that the reference orders well counts
    as learned from the start. Subtract log p_ref from log p.""",
    same_as="references_exchanged",
    margin=lambda c, r, rc, rr: (c + rc) - (r + rr),
)
loss_mistake(
    "no_reference",
    """The reference is left out. Nothing holds the policy near the model that it started from, and the
    margin depends on the lengths of the responses. Subtract log p_ref of each.""",
    margin=lambda c, r, rc, rr: c - r,
)
loss_mistake(
    "rejected_detached",
    """The rejected response has no gradient, so that only the chosen one is learned, as in SFT. Half of DPO
    is to make the other one less likely. Detach the reference alone.""",
    margin=lambda c, r, rc, rr: margin_of(c, r.detach(), rc, rr),
)
loss_mistake(
    "beta_outside_the_sigmoid",
    """Beta multiplies the loss, not the margin. It is then a mere learning rate, and does not decide how far
    the policy may go from the reference. It belongs inside: -log sigmoid(beta h).""",
    source="public issues: beta outside the sigmoid",
    sigmoid=lambda h, beta, e: beta * smoothed(h, e),
)
loss_mistake(
    "beta_forgotten",
    """The margin is not multiplied by beta, which is then always 1: a difference of a few nats saturates the
    loss, and the policy stays almost where it is. Use beta h.""",
    sigmoid=lambda h, beta, e: smoothed(h, e),
)
loss_mistake(
    "divided_by_beta",
    """The margin is divided by beta, as logits are by a temperature. Beta multiplies: a large one keeps the
    policy near the reference.""",
    sigmoid=lambda h, beta, e: smoothed(h / beta, e),
)
loss_mistake(
    "smoothing_on_the_wrong_side",
    """The two terms of label smoothing are exchanged: the flipped pair has the weight 1 - e. With e = 0 the
    model learns the opposite. The order as given has 1 - e.""",
    sigmoid=lambda h, beta, e: smoothed(beta * h, 1 - e),
)
loss_mistake(
    "smoothing_ignored",
    """Label smoothing is not used. Pairs that are labeled wrong then pull as hard as the others, and the
    margin grows without end. Mix in e times the loss of the flipped pair.""",
    sigmoid=lambda h, beta, e: soft(beta * h),
)
loss_mistake(
    "smoothing_only_scales",
    """The second term of label smoothing is missing, so that it only scales the loss by 1 - e. It is the
    term of the flipped pair, -e log sigmoid(-beta h), that stops the margin.""",
    sigmoid=lambda h, beta, e: (1 - e) * soft(beta * h),
)
loss_mistake(
    "robust_loss_for_smoothing",
    """The term of the flipped pair is subtracted, and the whole divided by 1 - 2 e. That is robust DPO,
    another loss, which is not bounded below. Smoothing adds the term.""",
    source="robust DPO (arXiv 2403.00409), taken for label smoothing",
    sigmoid=lambda h, beta, e: ((1 - e) * soft(beta * h) - e * soft(-beta * h)) / (1 - 2 * e),
)
loss_mistake(
    "sigmoid_without_the_logarithm",
    """The loss is -sigmoid(beta h), without the logarithm. Pairs that are wrong by far have hardly a
    gradient then, and are never corrected. Take -log sigmoid.""",
    sigmoid=lambda h, beta, e: -((1 - e) * torch.sigmoid(beta * h) + e * torch.sigmoid(-beta * h)),
)
loss_mistake(
    "hinge_for_sigmoid",
    """The loss is max(0, 1 - beta h), the hinge of SLiC. It is 1 where the policy equals the reference, and
    has no gradient beyond the margin. The sigmoid loss is log 2 there.""",
    source="SLiC-HF (arXiv 2305.10425), taken for DPO",
    sigmoid=lambda h, beta, e: (1 - e) * (1 - beta * h).relu() + e * (1 + beta * h).relu(),
)
loss_mistake(
    "logarithm_of_zero",
    """log(sigmoid(x)) is computed in two steps. For a margin of -2000 the sigmoid rounds to 0, the loss is
    infinite and its gradient NaN. Use one stable function, such as logaddexp(-x, 0).""",
    sigmoid=lambda h, beta, e: (
        -(1 - e) * torch.sigmoid(beta * h).log() - (e * torch.sigmoid(-beta * h).log() if e else 0.0)
    ),
)
loss_mistake(
    "exponential_overflows",
    """log(1 + exp(-x)) overflows: for a margin of -2000 the loss is infinite and the gradient NaN. Use
    logaddexp(-x, 0), or a softplus.""",
    same_as="logarithm_of_zero",
    sigmoid=lambda h, beta, e: (
        (1 - e) * (1 + (-beta * h).exp()).log() + (e * (1 + (beta * h).exp()).log() if e else 0.0)
    ),
)
loss_mistake(
    "loss_clamped_at_the_start",
    """-log sigmoid is written with clamp and abs: max(-x, 0) + log1p(exp(-|x|)). At x = 0, where every pair
    starts, the parts have the slopes of a corner, and their sum is not -1/2. Use logaddexp.""",
    sigmoid=lambda h, beta, e: (1 - e) * _cornered(beta * h) + e * _cornered(-beta * h),
)
loss_mistake(
    "mean_over_the_pairs",
    """The losses are averaged over the pairs. This function returns one loss for each pair, since a caller
    may weight them or inspect the largest; the caller averages.""",
    result=lambda loss: loss.mean(),
)
loss_mistake(
    "ipo_without_the_square",
    """The distance from the target is not squared in IPO, so the loss falls without end: the larger the
    negative margin, the better. Square it.""",
    ipo=lambda h, beta: h - 0.5 / beta,
)
loss_mistake(
    "ipo_with_the_absolute_value",
    """IPO has the square of the distance from the target, here it is the absolute value. Its gradient is the
    same however far the pair is, and jumps at the target.""",
    ipo=lambda h, beta: (h - 0.5 / beta).abs(),
)
loss_mistake(
    "ipo_target_without_the_half",
    """The target of IPO is 1 / beta, without the half: the margin is twice as large as that of beta. It is
    1 / (2 beta).""",
    ipo=lambda h, beta: (h - 1 / beta).square(),
)
loss_mistake(
    "ipo_target_upside_down",
    """The target of IPO is beta / 2. A large beta is to keep the policy near the reference, and here drives
    it away. It is 1 / (2 beta).""",
    ipo=lambda h, beta: (h - beta / 2).square(),
)
loss_mistake(
    "ipo_of_the_scaled_margin",
    """IPO is computed from beta h with the target 1/2: that is beta^2 times the loss, and for beta = 0.1 a
    hundredth of its gradient. Use h and 1 / (2 beta).""",
    ipo=lambda h, beta: (beta * h - 0.5).square(),
)
loss_mistake(
    "ipo_not_implemented",
    """loss_type is ignored, and the loss is always that of the sigmoid. A run with ipo reports numbers of
    another method. Select by loss_type.""",
    ipo=lambda h, beta: soft(beta * h),
    types_=(),
)
loss_mistake(
    "unknown_type_is_sigmoid",
    """A loss_type that is not known falls back to sigmoid, without an error. A misspelled option then
    changes the method without a message. Raise ValueError.""",
    types_=(),
)


def _cornered(x):
    return (-x).clamp(min=0.0) + torch.log1p((-x.abs()).exp())


# --------------------------------------------------------------------------------------------------
# Mistakes of the log-probabilities


def sequences_with(labels="labels", mask=lambda mask: mask, reduce="sum", score=None):
    """The log-probabilities of responses with something wrong in them."""

    def sequence_log_probs(model, tokens):
        output = model(tokens["input_ids"])
        logits = getattr(output, "logits", output)
        log_probs = torch.log_softmax(logits, -1) if score is None else score(logits)
        each = log_probs.gather(-1, tokens[labels][..., None])[..., 0]
        kept = mask(tokens["response_mask"])
        total = each.masked_fill(~kept, 0.0)
        if reduce == "batch":
            return total.sum()
        return total.sum(1) / (kept.sum(1).clamp(min=1) if reduce == "mean" else 1)

    return sequence_log_probs


def shifted_right(mask):
    return torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], 1) & mask


def shifted_left(mask):
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1) & mask


for name, explanation, changes in (
    (
        "mean_instead_of_sum",
        """The log-probabilities are averaged over the response. That is the loss of another method, with a
        beta of another size; the probability of a response is the product over its tokens. Sum them.""",
        {"reduce": "mean"},
    ),
    (
        "prompt_inside_the_sum",
        """The mask is not used: prompt and padding are inside the sum. The padding of the shorter response
        then decides about the margin. Sum where response_mask is True.""",
        {"mask": torch.ones_like},
    ),
    (
        "log_probabilities_shifted_by_one",
        """The log-probability is that of the input token itself, not of the next one: gather uses input_ids.
        A model is trained to repeat its input. Gather the labels.""",
        {"labels": "input_ids"},
    ),
    (
        "first_token_missing",
        """The sum begins with the second token of the response: the mask is shifted once too often. The
        first token often decides. The mask of the labels is aligned already.""",
        {"mask": shifted_right},
    ),
    (
        "last_token_missing",
        """The last token of the response is not in the sum. It is the end token, and a model that does not
        learn it never stops. Sum over the whole mask.""",
        {"mask": shifted_left},
    ),
    (
        "logits_not_normalized",
        """The logits of the labels are summed without a log-softmax. They are no log-probabilities: adding a
        number to all logits changes the loss.""",
        {"score": lambda logits: logits},
    ),
    (
        "probabilities_summed",
        """Probabilities are summed, not their logarithms. The sum of probabilities is not the probability of
        the response. Use log-softmax.""",
        {"score": lambda logits: logits.softmax(-1)},
    ),
    (
        "sum_over_the_batch",
        """The log-probabilities of all sequences are summed into one number. Each response needs its own, to
        be compared with another. Sum along the last axis.""",
        {"reduce": "batch"},
    ),
):
    register("dpo.sequence_log_probs", name, sequences_with(**changes), explanation)

# --------------------------------------------------------------------------------------------------
# Mistakes of the pair of texts


def pair_with(
    format_=packing.format_instruction,
    end=packing.end_token,
    responses=lambda chosen, rejected: (chosen, rejected),
    models=lambda lm, lm_ref: (lm, lm_ref),
    policy_grad=True,
    ref_grad=False,
    beta_of=lambda beta: beta,
    mask=lambda tokens: tokens,
    alone=False,
):
    """The loss of a pair with something wrong in it."""

    def loss(lm, lm_ref, tokenizer, beta, prompt, response_chosen, response_rejected):
        texts_ = [text + end(tokenizer) for text in responses(response_chosen, response_rejected)]
        tokens = response_log_probs.tokenize_prompt_and_output([format_(prompt)] * 2, texts_, tokenizer)
        tokens = mask(tokens)
        model, ref = models(lm, lm_ref)
        with torch.set_grad_enabled(policy_grad):
            policy = dpo.sequence_log_probs(model, tokens)
        with torch.set_grad_enabled(ref_grad):
            fixed = dpo.sequence_log_probs(ref, tokens)
        return dpo.dpo_loss(policy[0], policy[1], fixed[0], fixed[1], beta_of(beta))

    return loss


def pair_mistake(name, explanation, source="written for this catalogue", **changes):
    register("dpo.compute_per_instance_dpo_loss", name, pair_with(**changes), explanation, source)


pair_mistake(
    "reference_under_grad",
    """The reference is evaluated with gradients. Its graph takes as much memory as that of the policy, and
    if they share weights, as with an adapter, the loss pulls both. Use torch.no_grad().""",
    source="public issues: reference model under grad",
    ref_grad=True,
)
pair_mistake(
    "policy_without_gradient",
    """The policy is evaluated under no_grad as well, so the loss has no gradient and nothing is learned.
    Only the reference is fixed.""",
    policy_grad=False,
)
pair_mistake(
    "models_exchanged",
    """The reference is trained and the policy is the fixed one: lm and lm_ref are exchanged. The margin has
    the opposite sign, and no gradient reaches lm.""",
    models=lambda lm, lm_ref: (lm_ref, lm),
)
pair_mistake(
    "policy_as_its_own_reference",
    """The reference is the policy itself, so the margin is always 0 and the loss log 2, with the gradient of
    the first step. Evaluate lm_ref.""",
    models=lambda lm, lm_ref: (lm, lm),
)
pair_mistake(
    "responses_exchanged",
    """The rejected response is passed as the chosen one. The loss falls while the model learns the opposite
    of the preferences. The order is chosen, rejected.""",
    responses=lambda chosen, rejected: (rejected, chosen),
)
pair_mistake(
    "template_missing",
    """The prompt is used as it is, not as an instruction. The model was fine-tuned on the format with
    Instruction and Response, and is compared on text of another kind. Format it first.""",
    source="public solutions of the assignment",
    format_=lambda prompt: prompt,
)
pair_mistake(
    "introduction_missing",
    """The instruction lacks its first sentence ("Below is an instruction ..."). The log-probabilities differ
    a little for every token. Use the format of the fine-tuning to the letter.""",
    format_=lambda prompt: f"### Instruction:\n{prompt}\n\n### Response:\n",
)
pair_mistake(
    "end_token_missing",
    """The end token is not added to the responses. A model that prefers shorter answers cannot learn it,
    since where they end is not part of the sum. Append the end token.""",
    source="public solutions of the assignment",
    end=lambda tokenizer: "",
)
pair_mistake(
    "end_token_of_the_prompt",
    """There is an end token between prompt and response, too. The model has learned that the text after it
    is unrelated to the text before it. Only the response ends with it.""",
    format_=lambda prompt: packing.format_instruction(prompt) + texts.Words.eos_token,
)
pair_mistake(
    "beta_fixed",
    """Beta is fixed at 0.1, the usual value, and the argument is not used. A run with another beta then
    reports results of 0.1. Pass beta on.""",
    beta_of=lambda beta: 0.1,
)
pair_mistake(
    "padding_counted",
    """The padding of the shorter response is in its sum, since the mask ends with the batch. Its probability
    is that of tokens which are not there. End the mask with the response.""",
    mask=lambda tokens: tokens | {"response_mask": tokens["response_mask"].int().cumsum(1) > 0},
)
pair_mistake(
    "only_the_end_compared",
    """Only the last token of each response is compared, as for a classifier with one label. The response is
    the product of all its tokens. Sum over the mask.""",
    mask=lambda tokens: (
        tokens
        | {
            "response_mask": tokens["response_mask"]
            & (tokens["response_mask"].int().flip(1).cumsum(1).flip(1) == 1)
        }
    ),
)

# --------------------------------------------------------------------------------------------------
# Mistakes of packing


def packed_mistake(name, explanation, **body):
    body["__doc__"] = explanation
    wrong = type("".join(part.capitalize() for part in name.split("_")), (PackedSFTDataset,), body)
    wrong.__name__ = name
    step.mistake("packing.PackedSFTDataset", source=body.pop("source", "written for this catalogue"))(wrong)


def filled(make_text, shuffle_lines=lambda pairs, shuffle: right_order(pairs, shuffle), skip_blank=True):
    """An __init__ that makes the tokens from `make_text(tokenizer, pair)`."""

    def __init__(self, tokenizer, dataset_path, seq_length, shuffle):
        lines = Path(dataset_path).read_text().splitlines()
        pairs = [json.loads(line) for line in lines if line.strip() or not skip_blank]
        texts_ = [make_text(tokenizer, pair) for pair in shuffle_lines(pairs, shuffle)]
        tokens = [token for text in texts_ for token in response_log_probs.encode(tokenizer, text)]
        self.tokens, self.seq_length = torch.tensor(tokens), seq_length

    return __init__


def right_order(pairs, shuffle):
    return [pairs[i] for i in torch.randperm(len(pairs))] if shuffle else pairs


def document(tokenizer, pair, end=True):
    text = packing.format_instruction(pair["prompt"]) + pair["response"]
    return text + packing.end_token(tokenizer) * end


def item(inputs, labels, stride=lambda n: n):
    """A __getitem__ of these two parts of the tokens from where the sequence begins."""

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = self.tokens[index * stride(self.seq_length) :][: self.seq_length + 1]
        return {"input_ids": inputs(part), "labels": labels(part)}

    return __getitem__


packed_mistake(
    "labels_not_shifted",
    """The labels are the inputs themselves. A model learns to copy the token that it sees, with a loss near
    0. They are the same tokens, one later.""",
    __getitem__=item(lambda part: part[:-1], lambda part: part[:-1]),
)
packed_mistake(
    "labels_shifted_the_other_way",
    """The labels are one token earlier than the inputs, so that the model learns to remember, not to
    predict. Inputs are all but the last token, labels all but the first.""",
    __getitem__=item(lambda part: part[1:], lambda part: part[:-1]),
)
packed_mistake(
    "token_lost_between_sequences",
    """A sequence begins seq_length + 1 tokens after the one before it. Its first token is then never a
    label. Sequences overlap by the one token that is the last label and the first input.""",
    __getitem__=item(lambda part: part[:-1], lambda part: part[1:], lambda n: n + 1),
    __len__=lambda self: len(self.tokens) // (self.seq_length + 1),
)
packed_mistake(
    "one_sequence_too_many",
    """The length is the number of tokens over seq_length. If that divides, the last sequence has no last
    label and is too short. The last label is one token further: (tokens - 1) // seq_length.""",
    __len__=lambda self: len(self.tokens) // self.seq_length,
)
packed_mistake(
    "one_sequence_too_few",
    """The last whole sequence is dropped: where its last label is the last token of all, it is complete.
    There are (tokens - 1) // seq_length of them.""",
    __len__=lambda self: max(0, len(self.tokens) - 2) // self.seq_length,
)
packed_mistake(
    "rest_kept_short",
    """What is left at the end becomes a sequence of its own, shorter than the others, which cannot be
    stacked with them. Drop it.""",
    __len__=lambda self: -(-(len(self.tokens) - 1) // self.seq_length),
)
packed_mistake(
    "no_end_between_documents",
    """There is no end token between the documents. The model learns to continue an answer with another
    instruction, and never to stop. Append it to each.""",
    __init__=filled(lambda tokenizer, pair: document(tokenizer, pair, end=False)),
)
packed_mistake(
    "prompt_without_the_template",
    """Prompt and response are joined as they are, not as an instruction. The model cannot learn where the
    response begins. Use the Alpaca format.""",
    __init__=filled(
        lambda tokenizer, pair: pair["prompt"] + "\n" + pair["response"] + packing.end_token(tokenizer)
    ),
)
packed_mistake(
    "responses_alone",
    """The documents are the responses, without their prompts. That is language modeling on answers without
    the questions. Format the prompt before each.""",
    __init__=filled(lambda tokenizer, pair: pair["response"] + packing.end_token(tokenizer)),
)
packed_mistake(
    "newline_after_each_document",
    """A newline of the file follows each response, since the line was not stripped or the template ends with
    one. The model learns to end every answer with it. The end token directly follows the response.""",
    __init__=filled(
        lambda tokenizer, pair: document(tokenizer, pair, end=False) + "\n" + packing.end_token(tokenizer)
    ),
)
packed_mistake(
    "documents_never_shuffled",
    """shuffle is not used, so that the documents stay in the order of the file. Files are often sorted by
    source, and a model forgets the first ones. Permute the documents before packing.""",
    __init__=filled(document, lambda pairs, shuffle: pairs),
)
packed_mistake(
    "documents_always_shuffled",
    """The documents are always shuffled, without regard to `shuffle`. An evaluation in the order of the file
    is then not repeatable.""",
    __init__=filled(document, lambda pairs, shuffle: right_order(pairs, True)),
)
packed_mistake(
    "blank_line_is_an_error",
    """A blank line of the file is parsed as JSON, which fails. Files that were joined or edited have some:
    skip lines without text.""",
    __init__=filled(document, skip_blank=False),
)


def _tokens_shuffled(self, tokenizer, dataset_path, seq_length, shuffle):
    PackedSFTDataset.__init__(self, tokenizer, dataset_path, seq_length, False)
    if shuffle:
        starts = torch.randperm(len(self))[:, None] * seq_length
        places = (starts + torch.arange(seq_length)).flatten()
        self.tokens = torch.cat([self.tokens[places], self.tokens[len(places) :]])


packed_mistake(
    "sequences_shuffled_for_documents",
    """What is shuffled is the packed sequences, not the documents: each then ends with a label that belongs
    to another one. Permute the lines before they are joined.""",
    __init__=_tokens_shuffled,
)


def _unbounded(self, index):
    part = self.tokens[index * self.seq_length :][: self.seq_length + 1]
    return {"input_ids": part[:-1], "labels": part[1:]}


packed_mistake(
    "no_index_error",
    """An index after the last item gives a short or empty one, not IndexError. A for loop over the dataset
    then never ends, or ends in an error elsewhere. Check the index.""",
    __getitem__=_unbounded,
)


class Padded(PackedSFTDataset):
    """Each document begins a new sequence, padded at the end. Most of each sequence is then padding, which
    packing is there to avoid. Join all documents, and cut without regard to them."""

    def __init__(self, tokenizer, dataset_path, seq_length, shuffle):
        lines = [line for line in Path(dataset_path).read_text().splitlines() if line.strip()]
        self.items = []
        for pair in right_order([json.loads(line) for line in lines], shuffle):
            tokens = response_log_probs.encode(tokenizer, document(tokenizer, pair))[: seq_length + 1]
            tokens = torch.tensor(tokens + [tokenizer.pad_token_id] * (seq_length + 1 - len(tokens)))
            self.items.append({"input_ids": tokens[:-1], "labels": tokens[1:]})

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


Padded.__name__ = "documents_padded"
step.mistake("packing.PackedSFTDataset", source="the usual first version")(Padded)


# --------------------------------------------------------------------------------------------------
# Mistakes of the batches


def stacked(items_):
    return {name: torch.stack([each[name] for each in items_]) for name in items_[0]}


def batches_with(order=None, keep_last=True, stack=stacked):
    """One epoch of batches with something wrong in it."""

    def iterate_batches(dataset, batch_size, shuffle):
        n = len(dataset)
        right_one = torch.randperm(n) if shuffle else torch.arange(n)
        parts = (right_one if order is None else order(n, shuffle)).split(batch_size)
        parts = [part for part in parts if keep_last or len(part) == batch_size]
        return [stack([dataset[int(i)] for i in part]) for part in parts]

    return iterate_batches


for name, explanation, changes in (
    (
        "last_batch_dropped",
        """The last batch is dropped if it is smaller. One epoch is each item once; in a small dataset the
        rest is a large part. Keep it.""",
        {"keep_last": False},
    ),
    (
        "items_not_shuffled",
        """shuffle is not used: the batches are the same in every epoch, in the order of the file. Permute
        the indices.""",
        {"order": lambda n, shuffle: torch.arange(n)},
    ),
    (
        "items_always_shuffled",
        """The items are always shuffled, without regard to `shuffle`, so an evaluation is not in the order of
        the dataset.""",
        {"order": lambda n, shuffle: torch.randperm(n)},
    ),
    (
        "drawn_with_replacement",
        """The indices are drawn with replacement. Some items come twice in an epoch, a third of them never.
        Use a permutation.""",
        {"order": lambda n, shuffle: torch.randint(n, (n,)) if shuffle else torch.arange(n)},
    ),
    (
        "first_item_missing",
        """The indices begin at 1, so the first item is never in a batch. One epoch is each item once.""",
        {"order": lambda n, shuffle: torch.randperm(n)[1:] if shuffle else torch.arange(1, n)},
    ),
    (
        "items_concatenated",
        """The items are concatenated along their own axis, not stacked: a batch is one long sequence, in
        which they see each other. Use torch.stack.""",
        {"stack": lambda items_: {k: torch.cat([each[k] for each in items_]) for k in items_[0]}},
    ),
    (
        "items_in_lists",
        """A batch is a list of tensors, not one tensor, and no model can take it. Stack the items of each
        name.""",
        {"stack": lambda items_: {k: [each[k] for each in items_] for k in items_[0]}},
    ),
):
    register("packing.iterate_batches", name, batches_with(**changes), explanation)
