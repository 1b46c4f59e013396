"""Cross-entropy: the mean of `-log softmax(logits)[target]`, also where some targets do not count."""

import math

import torch
from torch.nn import functional as tF

from llm_basics.core import functional as F
from llm_basics.learn import grids, probes
from llm_basics.learn.mistakes import softmax

step = probes.Step("cross_entropy")
draw = probes.numbers(seed=1)

TARGETS = torch.tensor([3, 0, 8, 5, 5, 1])
TARGETS_OF_TEXTS = torch.tensor([[3, 0, 8, 5], [5, 1, 2, 7], [6, 3, 4, 0]])


def flattened(logits, targets, ignore_index=-100):
    return tF.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index)


# without gradients, so that what works in place can be seen to change its input
step.compare(
    "six rows of logits",
    lambda a, logits, targets: a.run_cross_entropy(logits, targets),
    flattened,
    {"logits": draw(6, 9), "targets": TARGETS},
    gradients=False,
    contract="cross_entropy",
)
step.compare(
    "six rows of logits, and their gradient",
    lambda a, logits, targets: a.run_cross_entropy(logits, targets),
    flattened,
    {"logits": 2 + draw(6, 9), "targets": TARGETS},
    contract="cross_entropy",
)
step.compare(
    "logits around 1000",
    lambda a, logits, targets: a.run_cross_entropy(logits, targets),
    flattened,
    {"logits": 1000 + draw(6, 9), "targets": TARGETS},
    contract="cross_entropy",
)
step.compare(
    "rows of logits that are far apart",
    lambda a, logits, targets: a.run_cross_entropy(logits, targets),
    flattened,
    {"logits": draw(3, 9) + torch.tensor([[0.0], [-1000.0], [30.0]]), "targets": TARGETS[:3]},
    contract="cross_entropy",
)


def loss_of_a_hopeless_target(run_cross_entropy):
    """In words, since a cap can be at any number: what a logit costs that lies 1000 below the other."""
    loss = run_cross_entropy(torch.tensor([[0.0, -1000.0]]), torch.tensor([1])).item()
    if math.isclose(loss, 1000, rel_tol=1e-4):
        return "1000"
    return "capped" if 5 < loss < 200 else f"{loss:.3g}"


step.value(
    "a target whose logit is 1000 below the other",
    lambda a: loss_of_a_hopeless_target(a.run_cross_entropy),
    "1000",
    contract="cross_entropy",
    words=lambda expected, actual: f"the loss must be 1000, but is {actual}",
)


def outcome(run_cross_entropy, logits, targets):
    """In words, since everybody's error is another."""
    try:
        run_cross_entropy(logits, targets)
    except (IndexError, RuntimeError, ValueError, TypeError):
        return "fails"
    return "works"


step.value(
    "three sequences of four tokens, without an error",
    lambda a: outcome(a.run_cross_entropy, torch.zeros(3, 4, 9), TARGETS_OF_TEXTS),
    "works",
    beyond="a model has logits of (batch, seq, vocab); the public function takes (batch, vocab) alone",
    words=lambda expected, actual: (
        "logits of shape (batch, seq, vocab) and targets of shape (batch, seq) must work"
    ),
)
step.compare(
    "three sequences of four tokens",
    lambda a, logits, targets: a.run_cross_entropy(logits, targets),
    flattened,
    {"logits": draw(3, 4, 9), "targets": TARGETS_OF_TEXTS},
    beyond="a model has logits of (batch, seq, vocab); the public function takes (batch, vocab) alone",
)

# the texts have 1, 4 and 2 targets that count
MASKED = TARGETS_OF_TEXTS.where(
    torch.tensor([[0, 0, 1, 0], [1, 1, 1, 1], [1, 0, 0, 1]]).bool(), torch.tensor(-100)
)

step.compare(
    "targets of -100, which are ignored",
    lambda a, logits, targets: a.run_masked_cross_entropy(logits, targets, -100),
    flattened,
    {"logits": draw(3, 4, 9), "targets": MASKED},
)
step.compare(
    "an ignore_index of 5",
    lambda a, logits, targets: a.run_masked_cross_entropy(logits, targets, 5),
    lambda logits, targets: flattened(logits, targets, 5),
    {"logits": draw(3, 4, 9), "targets": TARGETS_OF_TEXTS},
)
step.compare(
    "all targets ignored",
    lambda a, logits, targets: a.run_masked_cross_entropy(logits, targets, -100),
    lambda logits, targets: (0 * logits).sum(),
    {"logits": draw(3, 9), "targets": torch.full((3,), -100)},
    gradients=False,
)

step.compare(
    "from 9 features to 9 tokens",
    lambda a, x, weight, targets: a.run_linear_cross_entropy(x, weight, targets),
    lambda x, weight, targets: flattened(x @ weight.T, targets),
    {"x": draw(3, 4, 9), "targets": TARGETS_OF_TEXTS},
    {"weight": draw(9, 9)},
)
step.compare(
    "from 5 features to 9 tokens",
    lambda a, x, weight, targets: a.run_linear_cross_entropy(x, weight, targets),
    lambda x, weight, targets: flattened(x @ weight.T, targets),
    {"x": draw(3, 4, 5), "targets": TARGETS_OF_TEXTS},
    {"weight": draw(9, 5)},
)
step.compare(
    "from 5 features to 9 tokens, with ignored targets",
    lambda a, x, weight, targets: a.run_linear_cross_entropy(x, weight, targets),
    lambda x, weight, targets: flattened(x @ weight.T, targets),
    {"x": draw(3, 4, 5), "targets": MASKED},
    {"weight": draw(9, 5)},
)
# float16 ends at 65,504
step.compare(
    "a vocabulary of 70,000 in float16",
    lambda a, logits, targets: a.run_cross_entropy(logits, targets),
    lambda logits, targets: tF.cross_entropy(logits.float(), targets).half(),
    {"logits": torch.zeros(1, 70_000, dtype=torch.float16), "targets": torch.tensor([2])},
    rtol=1e-2,
    gradients=False,
    beyond="the public tests have no float16, whose sums end at 65,504; models of half precision do",
)


# What the mistakes do right. They leave out z_loss, which no probe can see.


def of_targets(values, targets, ignore_index):
    """The value at each target, something where it does not count."""
    safe = targets.masked_fill(targets == ignore_index, 0)
    return values.gather(-1, safe.unsqueeze(-1)).squeeze(-1)


def losses_of(logits, targets, ignore_index):
    return -of_targets(F.to_float32(logits).log_softmax(-1), targets, ignore_index)


def reduced(losses, targets, ignore_index, reduction):
    counted = targets != ignore_index
    losses = losses.masked_fill(~counted, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum().clamp(min=1)


@step.mistake("functional.cross_entropy", source="public solutions of CS336")
def logarithm_of_the_softmax(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """The log is taken of the finished softmax. A small probability underflows to 0 first, and the loss is
    infinite. Use log_softmax, or logsumexp(logits) - logits[target]."""
    losses = -of_targets(F.to_float32(logits).softmax(-1), targets, ignore_index).log()
    return reduced(losses, targets, ignore_index, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="public solutions of CS336")
def logarithm_of_the_softmax_plus_a_constant(
    logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"
):
    """log(p + 1e-8) caps the loss at 18.4, and the most wrong predictions get no gradient. Use log_softmax,
    or logsumexp(logits) - logits[target], without a constant."""
    losses = -(of_targets(F.to_float32(logits).softmax(-1), targets, ignore_index) + 1e-8).log()
    return reduced(losses, targets, ignore_index, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def maximum_not_subtracted(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """log(sum(exp(logits))) is right on paper, but exp overflows above 88, and for very negative logits the
    sum is 0. Subtract the maximum of each row first, and add it back after the logarithm."""
    wide = F.to_float32(logits)
    losses = wide.exp().sum(-1).log() - of_targets(wide, targets, ignore_index)
    return reduced(losses, targets, ignore_index, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def maximum_not_added_back(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """The maximum is subtracted inside the logsumexp, but the target's logit is taken without it. The loss is
    too small by the maximum, and often negative. Take the target from the shifted logits."""
    wide = F.to_float32(logits)
    log_sum = (wide - wide.amax(-1, keepdim=True)).exp().sum(-1).log()
    losses = log_sum - of_targets(wide, targets, ignore_index)
    return reduced(losses, targets, ignore_index, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def one_maximum_for_all_rows(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """A single maximum is subtracted from all rows. In a row far below it all exponentials underflow to 0,
    and the logarithm of their sum is -inf. Use each row's own: amax(-1, keepdim=True)."""
    wide = F.to_float32(logits) - logits.max()
    losses = wide.exp().sum(-1).log() - of_targets(wide, targets, ignore_index)
    return reduced(losses, targets, ignore_index, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def logit_alone(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """The loss is the negative logit of the target, without normalization. It can fall forever by making all
    logits larger. Add the logsumexp of the row."""
    losses = -of_targets(F.to_float32(logits), targets, ignore_index)
    return reduced(losses, targets, ignore_index, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="public solutions of CS336")
def sum_instead_of_mean(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """The losses are summed instead of averaged. Loss and gradient then grow with the batch size, and a
    learning rate suits one batch size only. Divide by the number of targets."""
    losses = losses_of(logits, targets, ignore_index)
    return reduced(losses, targets, ignore_index, "sum" if reduction == "mean" else reduction).to(
        logits.dtype
    )


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def averaged_over_the_vocabulary_too(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """The mean is taken over one number per vocabulary entry, nearly all of them 0, so the loss is too small
    by a factor of the vocabulary size. Divide by the number of targets."""
    losses = losses_of(logits, targets, ignore_index)
    return reduced(losses, targets, ignore_index, reduction).to(logits.dtype) / logits.shape[-1]


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def divided_by_the_rows_only(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """The sum is divided by the length of the first axis, the batch, but not by that of the sequence. With
    sequences of 256 tokens the loss is 256 times too large. Divide by targets.numel()."""
    losses = losses_of(logits, targets, ignore_index)
    if reduction != "mean":
        return reduced(losses, targets, ignore_index, reduction).to(logits.dtype)
    return reduced(losses, targets, ignore_index, "sum").to(logits.dtype) / len(targets)


@step.mistake("functional.cross_entropy", source="public solutions of CS336")
def targets_of_texts_mishandled(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """logits[arange(n), targets] selects the targets of a matrix, but logits of shape (batch, seq, vocab)
    have one more axis. Flatten both first, or use gather along the last axis."""
    losses = -F.to_float32(logits).log_softmax(-1)[torch.arange(len(targets)), targets.clamp(min=0)]
    return reduced(losses, targets, ignore_index, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def normalized_over_axis_1(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """The softmax is taken over axis 1. That is the vocabulary in a matrix, but the sequence in (batch, seq,
    vocab), where positions then compete with each other. Use the last axis, -1."""
    losses = -of_targets(F.to_float32(logits).log_softmax(1), targets, ignore_index)
    return reduced(losses, targets, ignore_index, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def normalized_over_the_batch(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """The softmax is taken over the first axis, so the rows of the batch compete with each other instead of
    the entries of the vocabulary. Use the last axis, -1."""
    losses = -of_targets(F.to_float32(logits).log_softmax(0), targets, ignore_index)
    return reduced(losses, targets, ignore_index, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="public solutions of CS336")
def softmax_applied_twice(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """Softmax is applied before the loss, which applies it again. Probabilities are between 0 and 1, so as
    logits they keep the loss above about ln V - 1. Pass raw logits to the loss."""
    losses = losses_of(F.to_float32(logits).softmax(-1), targets, ignore_index)
    return reduced(losses, targets, ignore_index, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="public solutions of CS336; passes its suite")
def logits_detached(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """The loss is correct, but has no gradient: .data, .detach(), .item() or a new tensor broke the graph,
    and the model does not learn. Compute the loss from the logits themselves."""
    losses = losses_of(logits.detach(), targets, ignore_index)
    return reduced(losses, targets, ignore_index, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def normalizer_detached(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """The loss is correct, but the logsumexp is detached, so the gradient only pushes targets up and nothing
    down. Only the maximum may be detached, since it cancels."""
    wide = F.to_float32(logits)
    losses = wide.logsumexp(-1).detach() - of_targets(wide, targets, ignore_index)
    return reduced(losses, targets, ignore_index, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def sign_forgotten(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """The minus sign is missing: this is the mean log-probability, which is negative. Minimizing it makes
    correct answers less likely. The loss is -log p."""
    losses = -losses_of(logits, targets, ignore_index)
    return reduced(losses, targets, ignore_index, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def bits_instead_of_nats(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """The logarithm is to base 2, so the loss is 1.44 times too large, and exp of it is not the perplexity.
    Use the natural logarithm, torch.log."""
    losses = losses_of(logits, targets, ignore_index) / math.log(2)
    return reduced(losses, targets, ignore_index, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def perplexity_returned(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """This is the perplexity, the exponential of the loss. It is useful to report, but its gradient is
    dominated by the worst batches. Return the mean of -log p."""
    losses = losses_of(logits, targets, ignore_index)
    return reduced(losses, targets, ignore_index, reduction).exp().to(logits.dtype)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def logarithm_of_the_mean(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """The probabilities are averaged before the logarithm, so one confident correct prediction hides all
    wrong ones. Take the logarithm of each, then the mean."""
    log_p = -losses_of(logits, targets, ignore_index)
    if reduction != "mean":
        return reduced(-log_p, targets, ignore_index, reduction).to(logits.dtype)
    counted = log_p[targets != ignore_index]
    return (math.log(max(len(counted), 1)) - counted.logsumexp(0)).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def other_answers_punished_too(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """This is the binary cross-entropy, which adds -log(1 - p) for every other entry. Softmax already makes
    the entries compete, so only the target's -log p counts."""
    log_p = F.to_float32(logits).log_softmax(-1)
    others = torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))
    losses = -of_targets(log_p - others, targets, ignore_index) - others.sum(-1)
    return reduced(losses, targets, ignore_index, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def shifted_inside_the_loss(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """Logits and targets are shifted against each other inside the loss, as in Hugging Face's models. The
    batches already have shifted targets, so the model learns to predict the token after the next."""
    if targets.ndim > 1:
        logits, targets = logits[..., :-1, :], targets[..., 1:]
    losses = losses_of(logits, targets, ignore_index)
    return reduced(losses, targets, ignore_index, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def last_position_only(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """Only the last position of each sequence counts, as in generation. A transformer predicts at all
    positions at once, and using one of them wastes the others. Average over all."""
    if targets.ndim > 1:
        logits, targets = logits[..., -1, :], targets[..., -1]
    losses = losses_of(logits, targets, ignore_index)
    return reduced(losses, targets, ignore_index, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def logits_changed_in_place(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """The maximum is subtracted in place from the caller's logits (-=, sub_), so later uses of them see
    modified values. Write logits = logits - ..., which makes a new tensor."""
    logits -= logits.max(-1, keepdim=True).values
    losses = losses_of(logits, targets, ignore_index)
    return reduced(losses, targets, ignore_index, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def targets_changed_in_place(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """Ignored targets are overwritten in the caller's tensor, so they count the next time the batch is used.
    Use masked_fill without the underscore, or torch.where."""
    counted = targets != ignore_index
    targets[~counted] = 0
    losses = losses_of(logits, targets, -1)
    return reduced(losses, targets.masked_fill(~counted, -1), -1, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def computed_in_half_precision(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """Half-precision logits are summed in half precision: float16 ends at 65,504, and bfloat16 has 8
    significant bits. Convert to float32 first, and back at the end."""
    shifted = logits - logits.amax(-1, keepdim=True)
    losses = shifted.exp().sum(-1).log() - of_targets(shifted, targets, ignore_index)
    return reduced(losses, targets, ignore_index, reduction)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def result_left_in_float32(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """The loss is computed in float32, which is right, but stays in it. The result must have the dtype of the
    logits, as in PyTorch; convert it at the end."""
    return reduced(losses_of(logits, targets, ignore_index), targets, ignore_index, reduction)


@step.mistake("functional.cross_entropy", source="public solutions of CS336")
def ignored_targets_counted_in_the_mean(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """Ignored targets are excluded from the sum, but not from the count that it is divided by, so the loss
    looks smaller the more is masked. Divide by the number of counted targets."""
    ignored = targets == ignore_index
    losses = losses_of(logits, targets, ignore_index).masked_fill(ignored, 0.0)
    return reduced(losses, targets.masked_fill(ignored, 0), -1, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="public solutions of CS336")
def mean_of_the_rows_means(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """The loss is averaged per sequence, and then over sequences, so a sequence with one counted target
    weighs as much as one with a thousand. Divide the total sum by the total count."""
    losses = losses_of(logits, targets, ignore_index)
    if reduction != "mean" or targets.ndim < 2:
        return reduced(losses, targets, ignore_index, reduction).to(logits.dtype)
    rows = [reduced(*row, ignore_index, "mean") for row in zip(losses, targets, strict=True)]
    return torch.stack(rows).mean().to(logits.dtype)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def ignored_targets_taken_for_token_0(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """Ignored targets are replaced by 0 so that gather does not fail, but their losses are kept, so the model
    learns to predict token 0 there. Set these losses to 0."""
    losses = losses_of(logits, targets, ignore_index)
    return reduced(losses, targets.masked_fill(targets == ignore_index, 0), -1, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def ignore_index_without_effect(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """ignore_index has no effect. A target of -100 fails in the lookup or selects an entry from the end, and
    any other value counts as a token. Exclude such targets from the sum and the count."""
    losses = -F.to_float32(logits).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return reduced(losses, targets, -1, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def ignore_index_always_minus_100(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """-100 is hard-coded, and the argument is ignored, so code that masks with another id, such as that of
    padding, trains on it. Compare the targets with ignore_index."""
    losses = losses_of(logits, targets, -100)
    return reduced(losses, targets, -100, reduction).to(logits.dtype)


@step.mistake("functional.cross_entropy", source="written for this catalogue")
def nan_where_nothing_counts(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
    """The loss of ignored targets is right, but if all are ignored it is 0 / 0 = NaN, which ends the
    training. Divide by at least 1."""
    losses = losses_of(logits, targets, ignore_index)
    if reduction != "mean":
        return reduced(losses, targets, ignore_index, reduction).to(logits.dtype)
    return losses[targets != ignore_index].mean().to(logits.dtype)


@step.mistake("functional.linear_cross_entropy", source="public solutions of CS336")
def weight_not_transposed(x, weight, targets, ignore_index=-100, z_loss=0.0):
    """The weight of the output projection is used without a transpose, but it has one row per token: (vocab,
    d_model). Use x @ weight.T."""
    return F.cross_entropy(x @ weight, targets, ignore_index, z_loss)


@step.mistake("functional.linear_cross_entropy", source="written for this catalogue")
def weight_detached(x, weight, targets, ignore_index=-100, z_loss=0.0):
    """The loss is correct, but no gradient reaches the weight of the output projection, because .data,
    .detach() or a copy broke the graph, so it stays random. Use the parameter itself."""
    return F.cross_entropy(tF.linear(x, weight.detach()), targets, ignore_index, z_loss)


@step.mistake("functional.linear_cross_entropy", source="written for this catalogue")
def hidden_states_detached(x, weight, targets, ignore_index=-100, z_loss=0.0):
    """The loss is correct, but no gradient reaches the hidden states, so only the output projection learns
    and the rest of the model does not. Look for .data, .detach() or a copy of x."""
    return F.cross_entropy(tF.linear(x.detach(), weight), targets, ignore_index, z_loss)


@step.mistake("functional.linear_cross_entropy", source="written for this catalogue")
def mean_of_the_chunks_means(x, weight, targets, ignore_index=-100, z_loss=0.0):
    """The loss is computed in chunks to save memory, and their means are averaged, so chunks with few counted
    targets weigh as much as full ones. Add up the sums, and divide once by the total count."""
    chunks = zip(x, targets, strict=True)
    return torch.stack([F.cross_entropy(tF.linear(h, weight), t, ignore_index) for h, t in chunks]).mean()


@step.mistake("functional.linear_cross_entropy", source="written for this catalogue")
def logits_scaled_by_the_root_of_d_model(x, weight, targets, ignore_index=-100, z_loss=0.0):
    """The logits are divided by sqrt(d_model). That scale belongs to attention scores; the output projection
    is a plain linear layer."""
    return F.cross_entropy(tF.linear(x, weight) / math.sqrt(x.shape[-1]), targets, ignore_index, z_loss)


# --------------------------------------------------------------------------------------------------
# Mistakes with a parameter that is found from the observations


@step.family("functional.cross_entropy", grids.AXES, unknown="another axis")
def normalized_over_another_axis(value):
    """The softmax is taken over {value}, so the entries of the vocabulary do not compete with each other
    alone. Use the last axis, -1, which is the vocabulary in logits of any shape."""

    def wrong(logits, targets, ignore_index=-100, z_loss=0.0, reduction="mean"):
        log_p = softmax.log_p(logits, value)
        return reduced(-of_targets(log_p, targets, ignore_index), targets, ignore_index, reduction).to(
            logits.dtype
        )

    return wrong


step.factor("functional.cross_entropy")
