"""The learning-rate range test: one short run over all learning rates, which suggests one.

The learning rate increases by a constant factor per step. While it is too small the loss hardly changes, then
it falls, and where it is too large it rises again (arXiv 1506.01186). Good learning rates are somewhat below
the one with the lowest loss: an optimal single step is too large for thousands of steps. The suggestion is
valid for this model, batch and optimizer, within a factor of two or three.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from llm_basics.analysis import figures
from llm_basics.core import config, files, trainer
from llm_basics.runs import run_dir, signals
from llm_basics.training import state

LOWEST, HIGHEST, STEPS = 1e-6, 1.0, 150

# decay of the running mean of the loss
SMOOTHING = 0.9

# the search ends at this multiple of the lowest loss: no larger learning rate is useful
DIVERGED = 4.0

# the suggestion is the learning rate with the lowest loss divided by this. On the bytes of Shakespeare with
# gpt2-nano it is 0.004 for AdamW and 0.01 for Muon; the best of full runs of 600 steps are 0.006 and 0.015
MARGIN = 3.0

STEPS_PER_LINE = 10


def rates(steps: int) -> list[float]:
    """Learning rates from LOWEST to HIGHEST in a geometric sequence.

    >>> [f"{lr:g}" for lr in rates(4)]
    ['1e-06', '0.0001', '0.01', '1']
    """
    return [LOWEST * (HIGHEST / LOWEST) ** (step / (steps - 1)) for step in range(steps)]


def smooth(losses: Sequence[float]) -> list[float]:
    """The exponential moving average of the losses, with bias correction as in AdamW.

    >>> [round(loss, 2) for loss in smooth([4.0, 2.0, 2.0])]
    [4.0, 2.95, 2.6]
    """
    smoothed, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = SMOOTHING * total + loss, SMOOTHING * weight + 1
        smoothed.append(total / weight)
    return smoothed


def propose(tried: Sequence[float], losses: Sequence[float]) -> float | None:
    """A third of the learning rate with the lowest smoothed loss, to one digit; None if the loss never fell.

    >>> propose([1e-4, 1e-3, 1e-2, 1e-1], [5.0, 4.0, 1.0, 9.0])
    0.003
    """
    smoothed = smooth(losses)
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__, default=0)
    return float(f"{tried[lowest] / MARGIN:.0e}") if lowest else None


def at_rate(options: config.TrainConfig, lr: float) -> config.TrainConfig:
    """The options with a constant learning rate."""
    return dataclasses.replace(options, lr=lr, min_lr=lr, warmup_steps=0)


def try_rates(training: state.TrainingState) -> Iterator[dict[str, Any]]:
    """Train one step per learning rate, and yield its metrics, until the loss diverges.

    Polls signals between steps. Raises FloatingPointError for a non-finite loss or gradient norm.
    """
    losses: list[float] = []
    training.model.train()
    for lr in signals.polled(rates(STEPS)):
        step, options = training.step + 1, at_rate(training.options.train, lr)
        batches = training.next_batches()
        result = trainer.train_step(training.model, training.optimizer, batches, step, options)
        trainer.check_finite(step, lr, result.train_loss, result.grad_norm)
        training.advance()
        losses.append(result.train_loss.item())
        smoothed = smooth(losses)
        yield {
            "step": step,
            "lr": lr,
            "train_loss": losses[-1],
            "smoothed_loss": smoothed[-1],
            "grad_norm": result.grad_norm.item(),
        }
        if losses[-1] > DIVERGED * min(smoothed):
            return


def search(training: state.TrainingState, output: run_dir.RunDir) -> float | None:
    """Try all learning rates, record and plot the losses, and suggest one. The weights are not saved."""
    # no checkpoints are written
    output.checkpoints.rmdir()
    output.log(f"\n{'lr':>8}  {'loss':>7}  {'smoothed':>8}")
    tried, reason = [], "the loss diverged"
    try:
        for entry in try_rates(training):
            tried.append(entry)
            output.tried(**entry)
            if entry["step"] % STEPS_PER_LINE == 1:
                output.log(f"{entry['lr']:8.1e}  {entry['train_loss']:7.3f}  {entry['smoothed_loss']:8.3f}")
    except FloatingPointError as error:
        reason = str(error)
    if len(tried) < STEPS:
        output.log(f"stopped after {len(tried)} of {STEPS} learning rates: {reason}")
    proposal = propose([entry["lr"] for entry in tried], [entry["train_loss"] for entry in tried])
    if proposal is None:
        output.log("\nno learning rate reduced the loss; no suggestion")
        return None
    try:
        output.log(f"\nloss by rate      {figures.plot_lr_finder(output.folder, proposal)}")
    except files.WriteError as error:
        output.log(f"warning: {error}")
    output.log(f"suggestion (a third of the learning rate with the lowest loss): --train.lr {proposal:g}")
    return proposal
