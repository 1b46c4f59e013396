"""Measures training time to a validation loss.

uv run python benchmarks/time_to_loss.py --data tinyshakespeare.txt
uv run python benchmarks/time_to_loss.py --data tinyshakespeare.txt --recipes plain best --steps best=230
uv run python benchmarks/time_to_loss.py --data tinyshakespeare.txt --recipes gpu --context_length 256 \
    --target 1.4697

A recipe is a list of options of `python -m llm_basics.train`, run in a separate process; recipes take turns,
with one seed per round. All share the text, the split, the context length and the held-out windows.

Times are of training alone: without data loading, evaluation and checkpoints, and without the excess of the
first step, which compiles with empty caches. The time to the target is interpolated linearly between two
evaluations; that of the later one is listed too. A recipe with learning rate decay reaches its loss only at
its last step, so give it the number of steps in which it reaches the target (`--steps`).
"""

import dataclasses
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro

from llm_basics.cli import parse
from llm_basics.core import config
from llm_basics.data import prepare
from llm_basics.runs import run_dir

RECIPES = {
    "plain": "--config gpt2-nano --tokenizer bytes --fast off",
    "fast": "--config gpt2-nano --tokenizer bytes --fast on",
    "fast compiled": "--config gpt2-nano --tokenizer bytes --fast on --train.compile on",
    "best": "--config shakespeare --tokenizer bytes --fast on",
    "best compiled": "--config shakespeare --tokenizer bytes --fast on --train.compile on",
    "gpu": "--config shakespeare-gpu --tokenizer bytes --fast on --train.compile graphs",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure training time to a validation loss."""

    data: str = "stdlib"
    """A UTF-8 text file, a folder or a quoted glob of them; or stdlib, the source of Python's own library."""
    target: float = 1.886
    """The validation loss to reach, in nats per token."""
    recipes: tuple[str, ...] = ("plain", "fast", "best")
    """The recipes to run."""
    steps: tuple[str, ...] = ()
    """Override the steps of a recipe, e.g. best=230."""
    rounds: int = 3
    """Runs per recipe, in turns; each round has its own seed."""
    context_length: int = 64
    """Context length of all recipes."""
    eval_every: int = 50
    """Steps between evaluations."""
    eval_windows: int = 2304
    """Held-out windows per evaluation, about evenly spaced; at most all."""

    def __post_init__(self) -> None:
        if unknown := set(self.recipes) - RECIPES.keys():
            raise ValueError(f"recipes must be of {', '.join(RECIPES)}; got {', '.join(unknown)}")
        for given in self.steps:
            name, _, number = given.partition("=")
            if name not in self.recipes or not number.isdecimal():
                raise ValueError(
                    f"steps must be as in {self.recipes[0]}=230, of a recipe that is run; got {given}"
                )


@dataclasses.dataclass(frozen=True)
class Result:
    """The measurements of one run; inf if the target was not reached."""

    interpolated: float
    """Seconds of training to the target, interpolated."""
    sure: float
    """Seconds of training to the first evaluation at or below the target."""
    loss: float
    """Final validation loss."""
    seconds: float
    """Seconds of training in total."""
    compiling: float
    """Excess seconds of the first step."""
    starting: float
    """Seconds before training, including imports."""
    wall: float
    """Seconds of the process."""


def main(options: Options) -> None:
    """Run all recipes and print a table."""
    results: dict[str, list[Result]] = {name: [] for name in options.recipes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = {recipe: arguments_of(recipe, options, folder) for recipe in options.recipes}
        # validate the options, and tokenize the text before the first run
        configs = {recipe: parse.train_options(given) for recipe, given in arguments.items()}
        for settings in configs.values():
            prepare.prepare(dataclasses.replace(settings, fast="on"), log=lambda line: None)
        for number, recipe in itertools.product(range(options.rounds), options.recipes):
            given = [*arguments[recipe], "--train.seed", str(number)]
            results[recipe].append(measure(given, configs[recipe], folder / f"{number}-{recipe}", options))
            print(f"{recipe}, round {number + 1}: {results[recipe][-1]}", file=sys.stderr)
        report(results, {recipe: settings.train.steps for recipe, settings in configs.items()}, options)


def arguments_of(recipe: str, options: Options, folder: Path) -> list[str]:
    """The command line of a recipe without seed and run directory."""
    given = RECIPES[recipe].split()
    own_steps = dict(item.split("=") for item in options.steps)
    given += ["--train.steps", own_steps[recipe]] if recipe in own_steps else []
    given += ["--data", options.data, "--data_dir", str(folder / "data")]
    given += ["--model.context_length", str(options.context_length)]
    batch_size = parse.train_options(given).train.batch_size
    return [
        *given,
        *("--train.eval_every", str(options.eval_every)),
        *("--train.eval_batches", str(math.ceil(options.eval_windows / batch_size))),
        *("--train.log_every", "10", "--train.sample_every", "0", "--train.checkpoint_every", "0"),
        *("--train.sample_tokens", "1"),
    ]


def measure(given: Sequence[str], settings: config.Config, folder: Path, options: Options) -> Result:
    """Train in a separate process, and read its metrics."""
    command = [sys.executable, "-m", "llm_basics.train", *given, "--run_dir", str(folder)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}-compiled"}
    began, start = time.time(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    wall = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}\n{done.stdout}{done.stderr}")
    metrics = run_dir.read_metrics(folder)
    train = settings.train
    n_tokens = train.batch_size * train.grad_accumulation_steps * settings.model.context_length
    steps, seconds, compiling = training_seconds(metrics, n_tokens)
    evaluated = [(m["step"], m["val_loss"]) for m in metrics if "val_loss" in m]
    times = np.interp([step for step, _ in evaluated], steps, seconds)
    losses = [loss for _, loss in evaluated]
    interpolated, sure = time_to(options.target, times.tolist(), losses)
    # written just before the first step
    starting = (folder / "config.json").stat().st_mtime - began
    return Result(interpolated, sure, losses[-1], seconds[-1], compiling, starting, wall)


def training_seconds(metrics: Sequence[dict], n_tokens: int) -> tuple[list[int], list[float], float]:
    """Steps, the training seconds after each, and the excess of the first step.

    A line of metrics has the tokens per second since the previous line, without interruptions; the first
    covers one step.

    >>> lines = [{"step": 1, "tokens_per_second": 10}, {"step": 3, "tokens_per_second": 200}]
    >>> training_seconds(lines, n_tokens=100)
    ([0, 1, 3], [0.0, 0.5, 1.5], 9.5)
    """
    lines = [(m["step"], n_tokens / m["tokens_per_second"]) for m in metrics if "tokens_per_second" in m]
    usual = statistics.median(per_step for _, per_step in lines[1:])
    compiling = lines[0][1] - usual
    steps, seconds = [0, 1], [0.0, usual]
    for (before, _), (step, per_step) in itertools.pairwise(lines):
        steps.append(step)
        seconds.append(seconds[-1] + (step - before) * per_step)
    return steps, seconds, compiling


def time_to(target: float, times: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """The time of `target`, interpolated between evaluations, and that of the first evaluation below it.

    >>> time_to(2.0, times=[10.0, 20.0, 30.0], losses=[3.0, 2.5, 1.5])
    (25.0, 30.0)
    """
    first = next((i for i, loss in enumerate(losses) if loss <= target), None)
    if first is None:
        return math.inf, math.inf
    if first == 0:
        return times[0], times[0]
    (before, now), (above, below) = times[first - 1 : first + 1], losses[first - 1 : first + 1]
    return before + (now - before) * (above - target) / (above - below), now


def report(results: dict[str, list[Result]], steps: dict[str, int], options: Options) -> None:
    """Print a table of medians, with all rounds of the time to the target (inf: not reached)."""
    print(f"{options.data}: seconds of training to a validation loss of {options.target}")
    for recipe, runs in results.items():
        print(f"{recipe}: {RECIPES[recipe]} --train.steps {steps[recipe]}; losses {[r.loss for r in runs]}")
    print(
        "\n| recipe | steps | seconds to the target (all rounds) | times as fast | with compilation "
        "| first evaluation there | final loss | training | start | whole process |"
        "\n|---|---|---|---|---|---|---|---|---|---|"
    )
    base: tuple[float, float] | None = None
    for recipe, runs in results.items():
        mine = (
            statistics.median(r.interpolated for r in runs),
            statistics.median(r.interpolated + r.compiling for r in runs),
        )
        base = base or mine
        sure, loss, training, starting, wall = (
            statistics.median(getattr(r, name) for r in runs)
            for name in ("sure", "loss", "seconds", "starting", "wall")
        )
        every = " ".join(f"{seconds:.1f}" for seconds in sorted(r.interpolated for r in runs))
        # no ratio to a run that missed the target
        faster, faster_whole = (
            f"{theirs / ours:.2f}" if math.isfinite(theirs / ours) else "-"
            for theirs, ours in zip(base, mine, strict=True)
        )
        print(
            f"| {recipe} | {steps[recipe]} | {mine[0]:.1f} ({every}) | {faster} "
            f"| {mine[1]:.1f} s, {faster_whole} times | {sure:.1f} s | {loss:.3f} "
            f"| {training:.1f} s | {starting:.1f} s | {wall:.1f} s |"
        )


if __name__ == "__main__":
    with parse.exit_on_error():
        main(tyro.cli(Options, description=__doc__))
