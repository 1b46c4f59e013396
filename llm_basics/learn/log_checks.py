"""Signs of mistakes without errors in the metrics of a run.

Each check is a bound for all correct runs on ordinary text: a minimum of bits per byte, an initial loss near
that of a uniform guess, a gradient norm well above zero.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_basics.runs import locks, run_dir, tail

# the best text compressors have more than 0.6, small models more than 1
MIN_BITS_PER_BYTE = 0.4

# fractions of ln(vocab_size), the loss of a uniform guess
MAX_FIRST_LOSS, MIN_FIRST_LOSS = 1.35, 0.9

# shorter runs may still be in warmup
MIN_STEPS = 50

# minimum gradient norm of models that learn
TINY_GRAD_NORM = 0.05

# maximum number of events to read
MAX_EVENTS = 5000

Finding = tuple[str, str]


def findings(
    metrics: Sequence[Mapping[str, Any]], vocab_size: int, entropy_rate: float | None = None
) -> Iterator[Finding]:
    """Each sign and its probable cause. `entropy_rate`, if known, is in nats per token."""
    train = [m for m in metrics if m.get("train_loss") is not None]
    if not train:
        yield "no training loss recorded", "the run ended before its first step"
        return
    losses = [m["train_loss"] for m in train]
    norms = [m["grad_norm"] for m in train if m.get("grad_norm") is not None]
    first, last, uniform = losses[0], statistics.median(losses[-5:]), math.log(vocab_size)
    if train[0]["step"] <= 1 and first > MAX_FIRST_LOSS * uniform:
        yield (
            f"the first loss is {first:.2f}; a uniform guess has ln {vocab_size} = {uniform:.2f}",
            "the initial weights are too large: an output projection tied to an embedding of std 1, a "
            "missing final norm, logits multiplied instead of divided",
        )
    if train[0]["step"] <= 1 and first < MIN_FIRST_LOSS * uniform:
        yield (
            f"the first loss is {first:.2f}, below a uniform guess, ln {vocab_size} = {uniform:.2f}",
            "the loss is not the mean of -log softmax(logits)[target] over all targets",
        )
    yield from _leaks(metrics, last, entropy_rate)
    if len(losses) >= 3 and max(losses) - min(losses) < 1e-6:
        yield (
            "the loss never changes",
            "nothing is learned: is lr 0, does the optimizer have the parameters of the model?",
        )
    elif last > 0.95 * first and last > 0.8 * uniform and train[-1]["step"] >= MIN_STEPS:
        small = norms and statistics.median(norms[-5:]) < TINY_GRAD_NORM
        if small:
            yield (
                f"the loss stays near ln(vocab), the gradient norm is {statistics.median(norms[-5:]):.1g}",
                "one softmax too many: the loss gets probabilities instead of logits",
            )
        else:
            yield (
                f"the loss went from {first:.2f} to {last:.2f} and does not fall",
                "gradients accumulate over steps (zero_grad), the update has the wrong sign, or lr is off",
            )
    if len(norms) >= 8 and statistics.median(norms[-3:]) > 8 * statistics.median(norms[:3]):
        yield (
            f"the gradient norm grew from {norms[0]:.2g} to {norms[-1]:.2g}",
            "gradients accumulate over steps (zero_grad), or the learning rate is too high",
        )


def of_events(events: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Findings in the events of a run: a failure, loss spikes, non-finite steps.

    >>> list(of_events([{"step": 7, "event": "failed", "reason": "the loss is nan"}]))
    [('the run failed after step 7', 'the loss is nan')]
    """
    found = {name: [e for e in events if e.get("event") == name] for name in ("failed", "skipped", "spike")}
    if found["failed"] and events[-1] is found["failed"][-1]:
        yield f"the run failed after step {events[-1].get('step')}", str(events[-1].get("reason"))
    if skipped := found["skipped"]:
        first = skipped[0]
        yield (
            f"{_counted(skipped, 'step')} not finite, the first is {first.get('step')}",
            str(first.get("reason")),
        )
    known = [spike for spike in found["spike"] if isinstance(spike.get("loss"), int | float)]
    if known:
        worst = max(known, key=lambda spike: spike["loss"])
        yield (
            f"{_counted(known, 'loss spike')}, the highest {worst['loss']:.4g}, step {worst.get('step')}",
            "a batch of unusual text, or steps that are too large; if they come often, lower lr, lengthen "
            "the warm-up, lower max_grad_norm, or skip such steps (train.on_spike skip)",
        )


def _counted(found: Sequence[Any], noun: str) -> str:
    return f"{len(found)} {noun}{'s' if len(found) > 1 else ''}"


def _leaks(
    metrics: Sequence[Mapping[str, Any]], last: float, entropy_rate: float | None
) -> Iterator[Finding]:
    cause = (
        "the model sees its targets: is the causal mask applied and not off by one, are the targets the next "
        "tokens, is the held-out split excluded from training?"
    )
    bits = [m["bits_per_byte"] for m in metrics if m.get("bits_per_byte") is not None]
    if entropy_rate is not None and last < 0.9 * entropy_rate:
        yield f"the loss is {last:.3f}, below the entropy rate {entropy_rate:.3f}, which is impossible", cause
    elif entropy_rate is None and bits and bits[-1] < MIN_BITS_PER_BYTE:
        yield f"{bits[-1]:.2f} bits per byte on held-out text, better than any compressor", cause
    gaps = [
        m["val_loss"] - m["train_loss"] for m in _merged(metrics) if m.get("val_loss") and m.get("train_loss")
    ]
    if len(gaps) >= 3 and gaps[-1] > 3 * max(gaps[0], 0.3):
        yield (
            f"the validation loss is {gaps[-1]:.2f} above the training loss, and the gap grows",
            "the model overfits: use more text, fewer steps, dropout, or a smaller model",
        )


def _merged(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per step."""
    steps: dict[int, dict[str, Any]] = {}
    for entry in metrics:
        steps.setdefault(entry["step"], {}).update(entry)
    return [steps[step] for step in sorted(steps)]


def of_run(folder: Path) -> list[Finding]:
    """The findings of a run, possibly a running one, from a sample of its metrics without torn lines."""
    known = [entry for entry in tail.sample(folder / run_dir.METRICS, 5000) if type(entry.get("step")) is int]
    events, _ = tail.records(folder / run_dir.EVENTS, 0, MAX_EVENTS)
    if not known and locks.owner(folder) is not None:
        return []  # the run is starting
    try:
        vocab_size = run_dir.read_config(folder)["model"]["vocab_size"]
        rate = run_dir.read_recorded(folder).get(run_dir.BASELINES, {}).get("entropy rate")
        signs = findings(run_dir.deduplicate_steps(known), max(vocab_size, 2), rate)
        return [*of_events(events), *signs]
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        return [("the metrics cannot be read", str(error))]


def main(folder: str) -> int:
    """Print the signs found in a run; exit status 1 if there are any."""
    path = run_dir.resolve(folder)
    vocab_size = run_dir.read_config(path)["model"]["vocab_size"]
    found = [*of_events(run_dir.read_events(path)), *findings(run_dir.read_metrics(path), vocab_size)]
    for seen, cause in found:
        print(f"{path}: {seen}\n  {cause}")
    if not found:
        print(f"{path}: no signs of mistakes")
    return 1 if found else 0
