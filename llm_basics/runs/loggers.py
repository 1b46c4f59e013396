"""Who is told of a training run as it goes on: people at a terminal, Weights & Biases.

They may fail without harm to the run.
"""

import contextlib
import os
import queue
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_basics.runs import console

CLOSE_SECONDS = 10.0  # that wandb may take at the end of a run
QUEUE_LINES = 10_000  # that may wait for wandb; more are dropped


class Logger:
    """What is told of a run as it goes on."""

    def metrics(self, values: dict[str, Any]) -> None:
        """Numbers were measured; `values` is a line of metrics.jsonl."""

    def message(self, text: str) -> None:
        """Something was said."""

    def close(self, seconds: float | None = None) -> None:
        """The run has ended, and waits no longer than `seconds`; None means as long as is usual."""


class ConsoleLogger(Logger):
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
        left_out = {"step", "attempt", "nonfinite", "step_seconds"} | (
            {"eta_seconds"} if self.progress else set()
        )
        numbers = " ".join(
            f"{name}={_short(value)}" for name, value in values.items() if name not in left_out
        )
        if self.progress is None:
            console.print_line(f"step={values['step']}/{self.total_steps} {numbers}")
        elif "train_loss" in values:
            self.progress.start()
            self.progress.update(self.task, completed=values["step"], numbers=numbers)
        else:
            self.progress.console.print(f"step {values['step']}: {numbers}", highlight=False, soft_wrap=True)

    def message(self, text: str) -> None:
        if self.progress is None:
            console.print_line(text)
        else:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self, seconds: float | None = None) -> None:
        if self.progress is not None:
            self.progress.stop()


class WandbLogger(Logger):
    """Weights & Biases as a second reader of the metrics, on a thread of its own.

    A service that is down, slow, missing or broken costs the run one warning, and no time but CLOSE_SECONDS.
    """

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()  # None after the last one
        self.dropped = 0
        self.stopped = False
        self.lock = threading.Lock()
        self.forget_exit_hook: Callable[[], None] = lambda: None
        self.thread = threading.Thread(target=self._follow, args=(folder, options), daemon=True, name="wandb")
        self.thread.start()

    def metrics(self, values: dict[str, Any]) -> None:
        if self.lines.qsize() < QUEUE_LINES:
            self.lines.put(values)
        else:
            self.dropped += 1

    def close(self, seconds: float | None = None) -> None:
        self.lines.put(None)
        try:
            self.thread.join(CLOSE_SECONDS if seconds is None else seconds)
        finally:  # a Ctrl-C ends the waiting, too
            if self.thread.is_alive():
                self._stop("it did not finish in time")
        if self.dropped:
            self._stop("it was too slow")

    def _follow(self, folder: Path, options: dict[str, Any]) -> None:
        # whatever a foreign service throws, from network to login to a bad install, the run goes on;
        # no Ctrl-C comes to this thread: one raised here would be wandb's own
        try:
            run = self._start(folder, options)
            while (values := self.lines.get()) is not None:
                if self.stopped:
                    return
                run.log(values)
            run.finish()
        except BaseException as error:
            reason = str(error).split("\n")[0]
            self._stop(f"{type(error).__name__}: {reason}")

    def _start(self, folder: Path, options: dict[str, Any]) -> Any:
        import wandb

        settings = wandb.Settings(
            silent=True,  # the terminal is the run's
            console="off",  # and so are its streams
            init_timeout=20,  # seconds that an unreachable server may take; wandb adds 10
        )
        # at the interpreter's exit wandb waits for its helper process, for as long as that tries its server;
        # forgotten, the helper ends by itself some seconds after the run
        service = wandb.setup(settings).ensure_service()
        self.forget_exit_hook = getattr(service, "_cleanup", None) or self.forget_exit_hook
        if self.stopped:
            self.forget_exit_hook()
        has_key = wandb.login(prompt=False, verify=False)
        name = folder.resolve().name
        run = wandb.init(
            project="llm_basics",
            name=name,
            id=re.sub(r"[^\w.-]", "-", name),  # a resumed run goes on with its curves
            resume="allow",
            dir=folder,
            config=options,
            mode=None if has_key or "WANDB_MODE" in os.environ else "offline",
            settings=settings,
        )
        # a resumed run counts steps again from its checkpoint, which wandb's own counter forbids
        run.define_metric("*", step_metric="step")
        return run

    def _stop(self, reason: str) -> None:
        """Follow no more, and say why, once."""
        with self.lock:
            if self.stopped:
                return
            self.stopped = True
        with contextlib.suppress(Exception):
            self.forget_exit_hook()
        if self.dropped:
            reason += f"; it missed {self.dropped} lines"
        with contextlib.suppress(OSError):  # nobody reads the warnings
            print(f"warning: wandb stopped following ({reason})", file=sys.stderr)


def _short(value: Any) -> str:
    if value is None:
        return "nan"
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
