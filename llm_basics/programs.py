"""The programs around training: their options, with defaults and meanings."""

from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass(frozen=True)
class GenerateConfig:
    """Let a trained model write."""

    run_dir: tyro.conf.Positional[str] = "newest"
    """The folder of a run; newest is the one under runs/ that was written to last."""
    checkpoint: str = "latest"
    """latest, best (the lowest validation loss), or a number of steps."""
    prompt: str = ""
    """Text to continue. Empty: begin a new document."""
    max_new_tokens: int = 200
    """The most tokens to write; the end of the document stops earlier."""
    temperature: float = 0.8
    """0: always the likeliest token; 1: as the model has learned; above: more surprising."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 0
    """The same seed writes the same text."""
    samples: int = 1
    """How many texts to write, with seeds counting up."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first of these that is there."""
    fast: Literal["on", "off"] = "on"
    """Use the fast twins of the pieces where there are some; off: the readable reference alone."""
    mine: str | None = None
    """A Python file with pieces of your own, which are used in the place of the reference's."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.max_new_tokens < 0 or self.samples < 1:
            raise ValueError(f"nothing to write: got {self.max_new_tokens} tokens in {self.samples} samples")


@dataclass(frozen=True)
class PlotConfig:
    """Draw what training runs measured, one over the other."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ("newest",)
    """Folders of runs, their names under runs/, newest, or wandb:ENTITY/PROJECT/RUN."""
    x: Literal["step", "tokens", "time"] = "step"
    """What to draw over: steps, tokens, or seconds of training, without evaluations and saving."""
    y: str = "train_loss,val_loss"
    """What to draw, names from metrics.jsonl separated by commas; losses share a panel."""
    log: bool = False
    """A logarithmic y axis."""
    smooth: int = 1
    """Draw the mean of so many measurements of training, those themselves faintly behind."""
    out: str = "runs.png"
    """The picture to write; its ending (.png, .svg, .pdf) says of which kind."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("there must be a run to draw, got none")
        if self.smooth < 1:
            raise ValueError(f"smooth must be at least 1, got {self.smooth}")
        if not self.out.endswith((".png", ".svg", ".pdf")):
            raise ValueError(f"out must end in .png, .svg or .pdf, got {self.out}")


@dataclass(frozen=True)
class CompareConfig:
    """Compare training runs: what came out, what was different, what they write."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ("newest",)
    """Folders of runs, their names under runs/, newest, or wandb:ENTITY/PROJECT/RUN."""
    x: Literal["step", "tokens", "time"] = "step"
    """What the curves of the report are drawn over."""
    out: str | None = None
    """A page to write, report.html, which needs no other file; and its curves, report.png."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("there must be a run to look at, got none")
        if self.out is not None and not self.out.endswith(".html"):
            raise ValueError(f"out must end in .html, got {self.out}")


@dataclass(frozen=True)
class SweepConfig:
    """Train with many settings, and compare what comes out. Interrupted, the same command goes on."""

    sweep: tyro.conf.Positional[str] = "lr"
    """A preset (lr, batch, ablations, scaling) or a YAML file with base, grid, random, variants, seeds."""
    jobs: int = 1
    """Training runs at the same time, among which the processor's cores are divided."""
    out: str | None = None
    """Folder for the runs and their comparison. None: runs/ and the name of the sweep."""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {self.jobs}")
