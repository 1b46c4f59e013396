"""A run directory -> figures."""

import os
from collections.abc import Mapping
from pathlib import Path

from matplotlib import figure

from llm_basics import run


def plot_loss(folder: str | os.PathLike[str], unigram_entropy: float | None = None) -> Path:
    """Draw training and validation loss over the steps of a run to `loss.png`, and return its path.

    `unigram_entropy`, in nats, is drawn as a line: a model that only counts tokens stays above it.
    """
    metrics = run.read_metrics(folder)
    canvas = figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = canvas.subplots()
    for name, style in (("train_loss", {"alpha": 0.6, "lw": 1}), ("val_loss", {"marker": "o", "ms": 4})):
        points = [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
        axes.plot([step for step, _ in points], [loss for _, loss in points], label=name, **style)
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="gray", ls="--", lw=1, label="unigram entropy")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=Path(folder).name)
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(folder) / "loss.png"
    canvas.savefig(path, dpi=120)
    return path


def plot_lr_finder(folder: str | os.PathLike[str], proposal: float) -> Path:
    """Draw the loss over the rates that a search tried, and the proposed one, to `lr_finder.png`."""
    tried = run.read_tried(folder)
    canvas = figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = canvas.subplots()
    lrs = [entry["lr"] for entry in tried]
    axes.plot(lrs, [entry["train_loss"] for entry in tried], label="train_loss", alpha=0.4, lw=1)
    axes.plot(lrs, smoothed := [entry["smoothed_loss"] for entry in tried], label="smoothed")
    axes.axvline(proposal, color="gray", ls="--", lw=1, label=f"proposed: {proposal:g}")
    # where the loss leaps, the rest would be a flat line
    axes.set_ylim(0.9 * min(smoothed), 1.1 * smoothed[0])
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss (nats per token)", title=Path(folder).name)
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(folder) / "lr_finder.png"
    canvas.savefig(path, dpi=120)
    return path


def plot_runs(folders: Mapping[str, Path], path: Path) -> Path:
    """Draw the training and validation losses of several runs, named, over their steps."""
    canvas = figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = canvas.subplots()
    for number, (label, folder) in enumerate(folders.items()):
        metrics = run.read_metrics(folder)
        # the first is drawn wide, so that a second on top of it is seen
        width, color = 4 / (number + 1), f"C{number}"
        for name, style in (("train_loss", "-"), ("val_loss", "o")):
            points = [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
            axes.plot(*zip(*points, strict=True), style, color=color, lw=width, ms=3 + width, alpha=0.7)
        axes.plot([], [], color=color, lw=width, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="training (line) and validation (points)")
    axes.grid(alpha=0.3)
    axes.legend()
    canvas.savefig(path, dpi=120)
    return path
