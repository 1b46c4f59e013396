"""Who is told of a training run as it goes on: people at a terminal, Weights & Biases.

They may fail without harm to the run.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Follower:
    """What is told of a run as it goes on."""

    def metrics(self, values: dict[str, Any]) -> None:
        """Numbers were measured; `values` is a line of metrics.jsonl."""

    def message(self, text: str) -> None:
        """Something was said."""

    def close(self) -> None:
        """The run has ended."""


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A function to tell a stage, what is done and what there is to do; shown on a terminal, nowhere else."""
    if not sys.stdout.isatty():
        yield lambda stage, done, total: None
        return
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


class Terminal(Follower):
    """A progress bar for people, plain lines for pipes and files."""

    def __init__(self, total_steps: int, step: int = 0) -> None:
        self.total_steps = total_steps
        self.progress: Any = None
        if sys.stdout.isatty():
            from rich import progress

            columns = [
                progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                progress.BarColumn(bar_width=None),
                progress.TextColumn("{task.fields[numbers]}"),
                progress.TimeRemainingColumn(),
            ]
            self.progress = progress.Progress(*columns, expand=True, refresh_per_second=2)
            self.task = self.progress.add_task("training", total=total_steps, completed=step, numbers="")

    def metrics(self, values: dict[str, Any]) -> None:
        # the bar shows the step and the time that is left by itself
        left_out = {"step", "nonfinite"} if self.progress is None else {"step", "nonfinite", "eta_seconds"}
        numbers = " ".join(
            f"{name}={_short(value)}" for name, value in values.items() if name not in left_out
        )
        if self.progress is None:
            _print(f"step={values['step']}/{self.total_steps} {numbers}")
        elif "train_loss" in values:
            self.progress.start()
            self.progress.update(self.task, completed=values["step"], numbers=numbers)
        else:
            self.progress.console.print(f"step {values['step']}: {numbers}", highlight=False, soft_wrap=True)

    def message(self, text: str) -> None:
        if self.progress is None:
            _print(text)
        else:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


class WandbFollower(Follower):
    """Weights & Biases as a second reader of the metrics. Its failures end its following, not the run."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.run: Any = None
        self._attempt(self._start, folder, options)

    def _start(self, folder: Path, options: dict[str, Any]) -> None:
        import wandb

        has_key = wandb.login(prompt=False, verify=False)
        self.run = wandb.init(
            project="llm_basics",
            name=folder.name,
            dir=folder,
            config=options,
            mode=None if has_key or "WANDB_MODE" in os.environ else "offline",
            settings=wandb.Settings(init_timeout=20),  # seconds that an unreachable server may take
        )
        # a resumed run counts steps again from its checkpoint, which wandb's own counter forbids
        self.run.define_metric("*", step_metric="step")

    def metrics(self, values: dict[str, Any]) -> None:
        if self.run is not None:
            self._attempt(self.run.log, values)

    def close(self) -> None:
        if self.run is not None:
            self._attempt(self.run.finish)

    def _attempt(self, action: Any, *arguments: Any) -> None:
        # whatever a foreign service throws, from network to login to a bad install, the run goes on
        try:
            action(*arguments)
        except Exception as error:
            self.run = None
            reason = str(error).split("\n")[0]
            print(f"warning: wandb stopped following ({type(error).__name__}: {reason})", file=sys.stderr)


def _print(text: str) -> None:
    """Print, as long as somebody reads: a closed pipe (`| head`) does not end the run."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _short(value: Any) -> str:
    if value is None:
        return "nan"
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
