"""A run directory as data: options, curves, samples and a summary, of a finished or a running run."""

import contextlib
import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_basics.cli import nested
from llm_basics.core import config, presets
from llm_basics.runs import run_dir


@dataclass(frozen=True)
class Record:
    """Options, metrics and samples of a run."""

    name: str
    options: dict[str, Any]
    """Options by their names on the command line, as in `train.lr`."""
    metrics: list[dict[str, Any]]
    """The lines of metrics.jsonl, each step once."""
    samples: list[dict[str, Any]]
    held_out: dict[str, str] | None = None
    """Hashes of the held-out `text` and of the `tokenizer`; None: not recorded."""

    def curve(self, y: str, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
        """Positions on the axis `x` (step, tokens or time) and values of `y`; NaN for non-finite values."""
        found = [(m["step"], m[y]) for m in self.metrics if y in m]
        steps = np.array([step for step, _ in found], dtype=float)
        values = np.array([math.nan if value is None else value for _, value in found], dtype=float)
        return self.position(steps, x), values

    def position(self, steps: np.ndarray, x: str) -> np.ndarray:
        """Steps in the unit of an axis: step, tokens, or time in seconds without evaluation and saving."""
        if x == "step":
            return steps
        at, speed = self.curve("tokens_per_second")
        at, speed = at[speed > 0], speed[speed > 0]
        if x == "tokens" and not len(at):
            return steps * self.tokens_per_step
        if not len(at):
            raise ValueError(
                f"x=time needs tokens_per_second in metrics.jsonl, got none (run {self.name}); "
                "use x=step or x=tokens"
            )
        # both are means since the previous line; batches of conversations vary in size, those of text do not
        _, seconds = self.curve("step_seconds")
        seconds = seconds if len(seconds) == len(at) else self.tokens_per_step / speed
        each = seconds if x == "time" else seconds * speed
        return np.interp(steps, [0, *at], [0, *np.cumsum(np.diff(at, prepend=0) * each)])

    @property
    def tokens_per_step(self) -> int:
        """Tokens in the batches of one optimizer step."""
        names = ("train.batch_size", "train.grad_accumulation_steps", "model.context_length")
        if missing := [name for name in names if not isinstance(self.options.get(name), int)]:
            raise ValueError(f"config.json must have {', '.join(missing)} (run {self.name}); use x=step")
        return math.prod(self.options[name] for name in names)

    @property
    def shape(self) -> config.ModelConfig | None:
        """The model config, or None if config.json has none."""
        known = {field.name for field in dataclasses.fields(config.ModelConfig)}
        parts = {name.removeprefix("model."): value for name, value in self.options.items()}
        parts = {name: value for name, value in parts.items() if name in known}
        if "d_model" not in parts:
            return None
        return presets.update(config.ModelConfig(), parts, f"{self.name}/config.json", "model.")

    @property
    def last_step(self) -> int:
        """The last step with metrics."""
        return max((m["step"] for m in self.metrics), default=0)

    def summary(self) -> dict[str, int | float]:
        """Final and best results; NaN for non-finite values, no entry for unknown ones."""
        found: dict[str, int | float] = {}
        for name in ("val_loss", "perplexity", "bits_per_byte", "accuracy", "train_loss"):
            _, values = self.curve(name)
            if len(values):
                found[name] = float(values[-1])
        steps, losses = self.curve("val_loss")
        if np.isfinite(losses).any():
            best = int(np.nanargmin(np.where(np.isfinite(losses), losses, np.nan)))
            found |= {"best_val_loss": float(losses[best]), "best_step": int(steps[best])}
        if self.shape is not None:
            found["parameters"] = self.shape.n_parameters
        found["steps"] = self.last_step
        last = np.array([self.last_step], dtype=float)
        # a config of another program, or a run without speeds or with huge ones, lacks these two entries
        with contextlib.suppress(ValueError, OverflowError):
            found["tokens"] = round(self.position(last, "tokens")[0])
            found["seconds"] = float(self.position(last, "time")[0])
        if found.get("seconds"):
            found["tokens_per_second"] = found["tokens"] / found["seconds"]
        return found

    def last_sample(self) -> str:
        """The last sample, as in the log: its prompt, quoted, in the heading; "" without samples."""
        if not self.samples:
            return ""
        last = self.samples[-1]
        return f"prompt {last.get('prompt', '')!r}:\n{last.get('text', '')}"


# --------------------------------------------------------------------------------------------------
# Run directories


def read_all(names: Sequence[str]) -> list[Record]:
    """The runs of the given names or folders; runs with the same name are shown by their folders."""
    records = [read(name) for name in names]
    taken = [record.name for record in records]
    return [
        dataclasses.replace(record, name=name) if taken.count(record.name) > 1 else record
        for record, name in zip(records, names, strict=True)
    ]


def read(name: str) -> Record:
    """A run by its folder, by its name under runs/, or `newest`."""
    folder = find(name)
    options = nested.flat(run_dir.read_config(folder))
    return Record(
        folder.resolve().name,
        options,
        run_dir.read_metrics(folder),
        run_dir.read_samples(folder),
        run_dir.read_held_out(folder),
    )


def find(name: str) -> Path:
    """The folder of the run `name`. Raises ValueError with the closest known name."""
    for folder in (run_dir.resolve(name), run_dir.RUNS / name):
        if (folder / "config.json").is_file():
            return folder
    known = [path.parent.name for path in run_dir.RUNS.glob("*/config.json")]
    near = difflib.get_close_matches(Path(name).name, known, n=1, cutoff=0.5)
    raise ValueError(
        f"a run must be a folder with config.json, one under {run_dir.RUNS}/, or newest, got {name}"
        + (f"; the closest is {near[0]}" if near else "")
    )
