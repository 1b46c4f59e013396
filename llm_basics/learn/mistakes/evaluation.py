"""Evaluation: loss, perplexity, bits per byte and accuracy, over all tokens of all batches."""

import math

import torch
from torch import nn
from torch.nn import functional as tF

from llm_basics.core import functional as F
from llm_basics.learn import probes

step = probes.Step("evaluation")

# --------------------------------------------------------------------------------------------------
# A model that is a table of logits, and its measures written out


class Bigrams(nn.Module):
    """The logits of the next token, by the token before."""

    def __init__(self, scale=1.0, dropout=0.0, dtype=torch.float32):
        super().__init__()
        logits = 2 * probes.numbers(seed=11)(7, 7)
        self.logits = nn.Parameter((scale * logits).to(dtype))
        self.dropout = nn.Dropout(dropout)
        self.notes = []

    def forward(self, tokens):
        self.notes.append({"training": self.training, "gradients recorded": torch.is_grad_enabled()})
        return self.dropout(self.logits[tokens])


def batch(rows, length, seed):
    tokens = torch.randint(7, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


BYTES = torch.tensor([1.0, 4.0, 2.0, 0.0, 7.0, 3.0, 1.0])
ONE = [batch(3, 5, seed=1)]
UNEQUAL = [batch(4, 6, seed=1), batch(1, 2, seed=2), batch(2, 9, seed=3)]


def right(model, batches, token_bytes):
    inputs = torch.cat([inputs.flatten() for inputs, _ in batches])
    targets = torch.cat([targets.flatten() for _, targets in batches])
    logits = model.logits.detach().double()[inputs]
    mean = tF.cross_entropy(logits, targets).item()
    return {
        "val_loss": mean,
        "perplexity": math.exp(mean),
        "bits_per_byte": mean * len(targets) / math.log(2) / token_bytes.double()[targets].sum().item(),
        "accuracy": (logits.argmax(-1) == targets).double().mean().item(),
    }


def measured(a, model, batches, token_bytes):
    # they come from a stream, which has no length and can be read once
    found = a.run_evaluate(model, iter(batches), token_bytes)
    return {name: float(found[name]) for name in ("val_loss", "perplexity", "bits_per_byte", "accuracy")}


# --------------------------------------------------------------------------------------------------
# Probes

step.value(
    "one batch, one byte per token",
    lambda a: measured(a, Bigrams(), ONE, torch.ones(7)),
    right(Bigrams(), ONE, torch.ones(7)),
)
step.value(
    "one batch, tokens of 0 to 7 bytes",
    lambda a: measured(a, Bigrams(), ONE, BYTES),
    right(Bigrams(), ONE, BYTES),
)
step.value(
    "three batches of unequal size",
    lambda a: measured(a, Bigrams(), UNEQUAL, BYTES),
    right(Bigrams(), UNEQUAL, BYTES),
)
step.value(
    "a model with dropout",
    lambda a: measured(a, Bigrams(dropout=0.5).train(), UNEQUAL, BYTES),
    right(Bigrams(), UNEQUAL, BYTES),
)


def circumstances(a, training):
    model = Bigrams().train(training)
    a.run_evaluate(model, iter(UNEQUAL), BYTES)
    return model.notes[0] | {"training mode afterwards": model.training}


step.value(
    "a model in training mode: eval mode without gradients, then restored",
    lambda a: circumstances(a, training=True),
    {"training": False, "gradients recorded": False, "training mode afterwards": True},
)
step.value(
    "a model in eval mode stays in it",
    lambda a: circumstances(a, training=False),
    {"training": False, "gradients recorded": False, "training mode afterwards": False},
)


def weights_afterwards(a):
    model = Bigrams()
    model.logits.grad = torch.ones(7, 7)
    a.run_evaluate(model, iter(UNEQUAL), BYTES)
    same = torch.equal(model.logits, Bigrams().logits)
    return {"weights as before": same, "gradient as before": model.logits.grad.eq(1).all().item()}


step.value(
    "weights and their gradients do not change",
    weights_afterwards,
    {"weights as before": True, "gradient as before": True},
)


def lost(a):
    """The perplexity of a loss in the thousands is more than a float can hold: a huge number or infinity."""
    found = measured(a, Bigrams(scale=3000.0), UNEQUAL, BYTES)
    return found | {"perplexity": found["perplexity"] > 1e300}


def right_lost():
    inputs = torch.cat([inputs.flatten() for inputs, _ in UNEQUAL])
    targets = torch.cat([targets.flatten() for _, targets in UNEQUAL])
    logits = Bigrams(scale=3000.0).logits.detach().double()[inputs]
    mean = tF.cross_entropy(logits, targets).item()
    return {
        "val_loss": mean,
        "perplexity": True,
        "bits_per_byte": mean * len(targets) / math.log(2) / BYTES.double()[targets].sum().item(),
        "accuracy": (logits.argmax(-1) == targets).double().mean().item(),
    }


step.value("a loss in the thousands", lost, right_lost())
step.value(
    "logits in bfloat16",
    lambda a: measured(a, Bigrams(dtype=torch.bfloat16), UNEQUAL, BYTES),
    right(Bigrams(dtype=torch.bfloat16), UNEQUAL, BYTES),
)

# --------------------------------------------------------------------------------------------------
# What the wrong versions have right


def summed(logits, targets):
    return F.cross_entropy(F.to_float32(logits), targets, reduction="sum").item()


def add_up(model, batches, token_bytes, **instead):
    """The sums of each batch, in the model's current mode; `instead` replaces some of the functions."""
    functions = {
        "loss": lambda logits, inputs, targets: summed(logits, targets),
        "tokens": lambda logits, inputs, targets: targets.numel(),
        "n_bytes": lambda logits, inputs, targets: token_bytes[targets].sum().item(),
        "hits": lambda logits, inputs, targets: (logits.argmax(-1) == targets).sum().item(),
    } | instead
    for inputs, targets in batches:
        logits = model(inputs)
        yield {name: function(logits, inputs, targets) for name, function in functions.items()}


@torch.no_grad()
def by_batch(model, batches, token_bytes, **instead):
    """The same in evaluation mode."""
    was_training = model.training
    model.eval()
    found = list(add_up(model, batches, token_bytes, **instead))
    model.train(was_training)
    return found


def total(parts):
    parts = list(parts)
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def sums(model, batches, token_bytes, **instead):
    return total(by_batch(model, batches, token_bytes, **instead))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def results(sums, **wrong):
    """The four measures from sums over all tokens, but for those in `wrong`."""
    measures = {
        "val_loss": sums["loss"] / sums["tokens"],
        "perplexity": math.exp(min(sums["loss"] / sums["tokens"], 700.0)),
        "bits_per_byte": sums["loss"] / math.log(2) / sums["n_bytes"],
        "accuracy": sums["hits"] / sums["tokens"],
    }
    return measures | wrong


# --------------------------------------------------------------------------------------------------
# The model


@step.mistake("evaluate.evaluate", source="public solutions of CS336")
@torch.no_grad()
def dropout_left_on(model, batches, token_bytes):
    """The model is evaluated in training mode, with dropout active, so the loss is too high and differs each
    time. Call model.eval() first."""
    return results(total(add_up(model, batches, token_bytes)))


@step.mistake("evaluate.evaluate", source="public solutions of CS336")
@torch.no_grad()
def model_left_in_evaluation_mode(model, batches, token_bytes):
    """The model is switched to eval mode and never back, so all training after the first evaluation runs
    without dropout. Restore the mode at the end."""
    model.eval()
    return results(total(add_up(model, batches, token_bytes)))


@step.mistake("evaluate.evaluate", source="written for this catalogue")
@torch.no_grad()
def always_in_training_mode_afterwards(model, batches, token_bytes):
    """The model is in training mode afterwards, whatever its mode was before. A model that is only evaluated
    then has dropout active. Restore the earlier mode."""
    model.eval()
    found = results(total(add_up(model, batches, token_bytes)))
    model.train()
    return found


@step.mistake("evaluate.evaluate", source="public solutions of CS336")
def gradients_recorded(model, batches, token_bytes):
    """The forward passes are recorded for a backward pass that never comes, which uses as much memory as
    training. Evaluate under torch.no_grad()."""
    was_training = model.training
    model.eval()
    found = results(total(add_up(model, batches, token_bytes)))
    model.train(was_training)
    return found


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def gradients_cleared(model, batches, token_bytes):
    """Evaluation clears the model's gradients. Between two micro-batches of a training step that loses what
    was accumulated. Evaluation must change nothing."""
    model.zero_grad()
    return results(sums(model, batches, token_bytes))


@step.mistake("evaluate.evaluate", source="public solutions of CS336")
def trained_on_the_validation_data(model, batches, token_bytes):
    """Evaluation also calls backward, so gradients of held-out text are left in the model and join the next
    update. Held-out data must not be trained on; do not call backward."""

    def backward_too(logits, inputs, targets):
        loss = F.cross_entropy(F.to_float32(logits), targets, reduction="sum")
        loss.backward()
        return loss.item()

    was_training = model.training
    model.eval()
    found = total(add_up(model, batches, token_bytes, loss=backward_too))
    model.train(was_training)
    return results(found)


# --------------------------------------------------------------------------------------------------
# The loss


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def mean_of_batch_means(model, batches, token_bytes):
    """The means of the batches are averaged as if all had the same size, so tokens of a short last batch
    weigh more. Sum the losses, and divide by the total number of tokens."""
    parts = by_batch(model, batches, token_bytes)
    loss = mean(part["loss"] / part["tokens"] for part in parts)
    return results(total(parts), val_loss=loss, perplexity=math.exp(min(loss, 700.0)))


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def everything_averaged_over_batches(model, batches, token_bytes):
    """Loss, bits per byte and accuracy are computed per batch and averaged, so batches of different sizes get
    equal weight. Sum over all tokens, and divide once."""
    parts = [results(part) for part in by_batch(model, batches, token_bytes)]
    found = {name: mean(part[name] for part in parts) for name in parts[0]}
    return found | {"perplexity": math.exp(min(found["val_loss"], 700.0))}


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def only_the_first_batch(model, batches, token_bytes):
    """The function returns or breaks inside the loop, so only the first batch is evaluated. The result is far
    noisier than the number of batches suggests."""
    return results(by_batch(model, batches, token_bytes)[0])


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def only_the_last_batch(model, batches, token_bytes):
    """Each batch overwrites the sums of the one before, so only the last batch counts. Accumulate with +=,
    from zeros set before the loop."""
    return results(by_batch(model, batches, token_bytes)[-1])


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def loss_not_divided(model, batches, token_bytes):
    """The loss is the sum over all tokens, so it grows with the amount of text, and perplexity explodes.
    Divide by the number of targets."""
    found = sums(model, batches, token_bytes)
    return results(found, val_loss=found["loss"], perplexity=math.exp(min(found["loss"], 700.0)))


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def divided_by_rows(model, batches, token_bytes):
    """The sum of the losses is divided by the number of sequences instead of tokens, so loss and accuracy are
    too large by the sequence length. Count targets.numel()."""
    return results(sums(model, batches, token_bytes, tokens=lambda logits, inputs, targets: len(targets)))


@step.mistake("evaluate.evaluate", source="public solutions of CS336")
def softmax_before_the_loss(model, batches, token_bytes):
    """cross_entropy gets probabilities and applies softmax to them again, so the loss stays above ln V - 1
    however good the model is. Pass it the logits."""

    def loss(logits, inputs, targets):
        return summed(F.softmax(F.to_float32(logits)), targets)

    return results(sums(model, batches, token_bytes, loss=loss))


@step.mistake("evaluate.evaluate", source="public solutions of CS336")
def loss_against_the_inputs(model, batches, token_bytes):
    """The predictions are compared with the input tokens instead of the tokens that follow. Compare the
    logits with the targets."""
    return results(
        sums(model, batches, token_bytes, loss=lambda logits, inputs, targets: summed(logits, inputs))
    )


@step.mistake("evaluate.evaluate", source="public solutions of CS336")
def targets_shifted_twice(model, batches, token_bytes):
    """logits[:, :-1] are compared with targets[:, 1:], although targets are already shifted by one. That
    evaluates the prediction of the token after the next."""

    batches = [(inputs[:, :-1], targets[:, 1:]) for inputs, targets in batches]
    return results(sums(model, batches, token_bytes))


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def loss_in_half_precision(model, batches, token_bytes):
    """The loss of a half-precision model is computed and summed in half precision, which keeps fewer than
    three digits. Convert the logits to float32 first."""

    def loss(logits, inputs, targets):
        return F.cross_entropy(logits, targets, reduction="sum").item()

    return results(sums(model, batches, token_bytes, loss=loss))


# --------------------------------------------------------------------------------------------------
# Perplexity


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def perplexity_to_base_two(model, batches, token_bytes):
    """Perplexity is computed as 2 to the power of a loss in nats, which is too small. The base must be that
    of the logarithm: math.exp."""
    found = sums(model, batches, token_bytes)
    return results(found, perplexity=2.0 ** min(found["loss"] / found["tokens"], 1020.0))


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def mean_of_perplexities(model, batches, token_bytes):
    """The perplexities of the batches are averaged, so one hard batch dominates, and the result no longer
    matches the loss. Take the exponential of the mean loss."""
    parts = by_batch(model, batches, token_bytes)
    perplexity = mean(results(part)["perplexity"] for part in parts)
    return results(total(parts), perplexity=perplexity)


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def perplexity_overflows(model, batches, token_bytes):
    """math.exp of a loss above 709 raises OverflowError, so a diverged run crashes in evaluation, which hides
    the cause. Cap the exponent."""
    found = sums(model, batches, token_bytes)
    return results(found, perplexity=math.exp(found["loss"] / found["tokens"]))


# --------------------------------------------------------------------------------------------------
# Bits per byte


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def bits_per_token(model, batches, token_bytes):
    """The bits are divided by the number of tokens instead of bytes, so models with different tokenizers
    cannot be compared. Sum token_bytes over the targets."""
    found = sums(model, batches, token_bytes)
    return results(found, bits_per_byte=found["loss"] / math.log(2) / found["tokens"])


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def nats_per_byte(model, batches, token_bytes):
    """The loss is divided by the number of bytes but stays in nats. One bit is ln 2 nats; divide by
    math.log(2)."""
    found = sums(model, batches, token_bytes)
    return results(found, bits_per_byte=found["loss"] / found["n_bytes"])


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def bits_multiplied_by_ln_two(model, batches, token_bytes):
    """Nats are converted to bits by multiplying by ln 2. A bit is smaller than a nat, so the number of bits
    must be larger; divide by math.log(2)."""
    found = sums(model, batches, token_bytes)
    return results(found, bits_per_byte=found["loss"] * math.log(2) / found["n_bytes"])


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def bytes_of_the_inputs(model, batches, token_bytes):
    """The bytes are counted for the inputs, but the loss is that of the targets, so the first token counts
    and the last does not. Use token_bytes[targets]."""

    def n_bytes(logits, inputs, targets):
        return token_bytes[inputs].sum().item()

    return results(sums(model, batches, token_bytes, n_bytes=n_bytes))


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def mean_bytes_of_the_vocabulary(model, batches, token_bytes):
    """The loss per token is divided by the mean length of the vocabulary's entries, but some tokens occur far
    more often than others. Count the bytes of the actual targets."""
    found = sums(model, batches, token_bytes)
    nats = found["loss"] / found["tokens"]
    return results(found, bits_per_byte=nats / math.log(2) / token_bytes.mean().item())


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def tokens_without_bytes_counted_as_one(model, batches, token_bytes):
    """Special tokens, which stand for no text, are counted as one byte each, so bits per byte are too low. A
    length of 0 is intended."""
    return results(sums(model, batches, token_bytes.clamp(min=1)))


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def loss_of_tokens_without_bytes_left_out(model, batches, token_bytes):
    """The loss at special tokens is excluded from bits per byte because they have no bytes. Predicting where
    a text ends is part of the model's task; include their loss."""

    def loss_of_text(logits, inputs, targets):
        return summed(logits, targets.masked_fill(token_bytes[targets] == 0, -100))

    found = sums(model, batches, token_bytes, of_text=loss_of_text)
    return results(found, bits_per_byte=found["of_text"] / math.log(2) / found["n_bytes"])


# --------------------------------------------------------------------------------------------------
# Accuracy


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def accuracy_against_the_inputs(model, batches, token_bytes):
    """The most likely token is compared with the input token instead of the next one. Compare
    logits.argmax(-1) with the targets."""

    def hits(logits, inputs, targets):
        return (logits.argmax(-1) == inputs).sum().item()

    return results(sums(model, batches, token_bytes, hits=hits))


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def accuracy_averaged_over_batches(model, batches, token_bytes):
    """The accuracies of the batches are averaged as if all had the same size. Count correct predictions, and
    divide once by the total number of targets."""
    parts = by_batch(model, batches, token_bytes)
    return results(total(parts), accuracy=mean(part["hits"] / part["tokens"] for part in parts))


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def accuracy_in_percent(model, batches, token_bytes):
    """Accuracy is returned in percent instead of as a fraction from 0 to 1. A caller that formats it as a
    percentage prints 100 times too much; remove the factor."""
    found = sums(model, batches, token_bytes)
    return results(found, accuracy=100 * found["hits"] / found["tokens"])


@step.mistake("evaluate.evaluate", source="written for this catalogue")
def accuracy_of_the_last_position(model, batches, token_bytes):
    """Accuracy is computed at the last position of each sequence only, a small sample that is not
    representative, since it has the most context. Compare at all positions."""

    def last(logits, inputs, targets):
        return (logits[:, -1].argmax(-1) == targets[:, -1]).sum().item()

    found = sums(model, batches, token_bytes, last=last, rows=lambda logits, inputs, targets: len(targets))
    return results(found, accuracy=found["last"] / found["rows"])
