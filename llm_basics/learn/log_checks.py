"""What the log of a run tells of mistakes that raise no error.

Every sign here is a comparison with a floor or a bound that no right run on ordinary text crosses: no model
guesses the next token better than so many bits, no random weights are much worse than guessing evenly, and
a gradient that is nearly zero teaches nothing.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llm_basics.runs import run_dir

# what the best compressors need for a byte of text is still above 0.6; small models need 1 and more
LEAST_BITS_PER_BYTE = 0.4

# in shares of ln V, what guessing evenly would lose
HIGHEST_FIRST_LOSS, LOWEST_FIRST_LOSS = 1.35, 0.9

# before that a run is still warming up
FEWEST_STEPS = 50

# below this a gradient of the usual loss, clipped at 1, is not that of a model which learns
TINY_GRAD_NORM = 0.05

Finding = tuple[str, str]


def findings(
    metrics: Sequence[Mapping[str, Any]], vocab_size: int, entropy_rate: float | None = None
) -> Iterator[Finding]:
    """What is seen, and what it may come from. `entropy_rate`, where it is known, is in nats per token."""
    train = [m for m in metrics if m.get("train_loss") is not None]
    if not train:
        yield "no training loss was recorded", "the run ended before its first step"
        return
    losses = [m["train_loss"] for m in train]
    norms = [m["grad_norm"] for m in train if m.get("grad_norm") is not None]
    first, last, even = losses[0], statistics.median(losses[-5:]), math.log(vocab_size)
    if train[0]["step"] <= 1 and first > HIGHEST_FIRST_LOSS * even:
        yield (
            f"the first loss is {first:.2f}, but guessing evenly would lose ln {vocab_size} = {even:.2f}",
            "the first weights are too large: an output projection tied to an embedding of std 1, a missing "
            "last norm, logits that are multiplied instead of divided",
        )
    if train[0]["step"] <= 1 and first < LOWEST_FIRST_LOSS * even:
        yield (
            f"the first loss is {first:.2f}, but knowing nothing loses ln {vocab_size} = {even:.2f}",
            "the loss is not the mean of -log softmax(logits)[target] over all targets",
        )
    yield from _leaks(metrics, last, entropy_rate)
    if len(losses) >= 3 and max(losses) - min(losses) < 1e-6:
        yield (
            "the loss never changes",
            "nothing is learned: is lr 0, are the weights those the optimizer has?",
        )
    elif last > 0.95 * first and last > 0.8 * even and train[-1]["step"] >= FEWEST_STEPS:
        small = norms and statistics.median(norms[-5:]) < TINY_GRAD_NORM
        if small:
            yield (
                f"the loss stays near ln V, and the gradient norm is {statistics.median(norms[-5:]):.1g}",
                "a softmax too many: the loss is given probabilities, which hardly differ, instead of logits",
            )
        else:
            yield (
                f"the loss went from {first:.2f} to {last:.2f}: it does not fall",
                "gradients add up over steps (zero_grad), the update goes the wrong way, or lr is far off",
            )
    if len(norms) >= 8 and statistics.median(norms[-3:]) > 8 * statistics.median(norms[:3]):
        yield (
            f"the gradient norm grew from {norms[0]:.2g} to {norms[-1]:.2g}",
            "old gradients are added to new ones (zero_grad), or the learning rate is too high",
        )


def _leaks(
    metrics: Sequence[Mapping[str, Any]], last: float, entropy_rate: float | None
) -> Iterator[Finding]:
    cause = (
        "the model sees its answers: is the causal mask there and not one too far, are the targets the next "
        "tokens, is held-out text kept out of training?"
    )
    bits = [m["bits_per_byte"] for m in metrics if m.get("bits_per_byte") is not None]
    if entropy_rate is not None and last < 0.9 * entropy_rate:
        yield f"the loss is {last:.3f}, below the entropy rate {entropy_rate:.3f}: impossible", cause
    elif entropy_rate is None and bits and bits[-1] < LEAST_BITS_PER_BYTE:
        yield f"{bits[-1]:.2f} bits per byte on held-out text: better than any compressor", cause
    gaps = [
        m["val_loss"] - m["train_loss"] for m in _merged(metrics) if m.get("val_loss") and m.get("train_loss")
    ]
    if len(gaps) >= 3 and gaps[-1] > 3 * max(gaps[0], 0.3):
        yield (
            f"the validation loss is {gaps[-1]:.2f} above the training loss, and the gap grows",
            "the model learns its text by heart: more text, fewer steps, dropout, or a smaller model",
        )


def _merged(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry a step."""
    steps: dict[int, dict[str, Any]] = {}
    for entry in metrics:
        steps.setdefault(entry["step"], {}).update(entry)
    return [steps[step] for step in sorted(steps)]


def main(folder: str) -> int:
    """Print what is found in a run; the exit status is 1 if something is."""
    path = run_dir.resolve(folder)
    vocab_size = run_dir.read_config(path)["model"]["vocab_size"]
    found = list(findings(run_dir.read_metrics(path), vocab_size))
    for seen, cause in found:
        print(f"{path}: {seen}\n  {cause}")
    if not found:
        print(f"{path}: nothing strange in the log")
    return 1 if found else 0
