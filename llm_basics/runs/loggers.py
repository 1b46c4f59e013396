"""Loggers of a training run: the terminal and Weights & Biases. A failing logger does not stop the run."""

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

CLOSE_SECONDS = 10.0  # timeout for wandb at the end of a run
QUEUE_LINES = 10_000  # maximum queue length; further lines are dropped


class Logger:
    """Receives the metrics and messages of a run."""

    def metrics(self, values: dict[str, Any]) -> None:
        """Log a line of metrics.jsonl."""

    def message(self, text: str) -> None:
        """Log a message."""

    def close(self, seconds: float | None = None) -> None:
        """Finish within `seconds`; None: the logger's default."""


class ConsoleLogger(Logger):
    """A progress bar on a terminal, plain lines in pipes and files."""

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
        # the bar shows the step and the remaining time itself
        hidden = {"step", "attempt", "nonfinite", "step_seconds"} | (
            {"eta_seconds"} if self.progress else set()
        )
        numbers = " ".join(f"{name}={_short(value)}" for name, value in values.items() if name not in hidden)
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
    """Sends metrics to Weights & Biases from a background thread.

    If the service is unreachable, slow, missing or broken, the run gets one warning and loses at most
    CLOSE_SECONDS.
    """

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()  # None after the last one
        self.dropped = 0
        self.stopped = False
        self.lock = threading.Lock()
        self.unregister_exit_hook: Callable[[], None] = lambda: None
        self.thread = threading.Thread(target=self._send, args=(folder, options), daemon=True, name="wandb")
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
        finally:  # a Ctrl-C interrupts the join, too
            if self.thread.is_alive():
                self._stop("it did not finish in time")
        if self.dropped:
            self._stop("it was too slow")

    def _send(self, folder: Path, options: dict[str, Any]) -> None:
        # network, login or installation errors must not stop the run; Ctrl-C reaches the main thread only,
        # so a KeyboardInterrupt here is wandb's own
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
            silent=True,  # the terminal belongs to the run
            console="off",  # and so do its streams
            init_timeout=20,  # seconds until a server counts as unreachable; wandb adds 10
        )
        # wandb's exit hook waits while its helper process retries the server; without the hook the helper
        # ends by itself some seconds after the run
        service = wandb.setup(settings).ensure_service()
        self.unregister_exit_hook = getattr(service, "_cleanup", None) or self.unregister_exit_hook
        if self.stopped:
            self.unregister_exit_hook()
        has_key = wandb.login(prompt=False, verify=False)
        name = folder.resolve().name
        run = wandb.init(
            project="llm_basics",
            name=name,
            id=re.sub(r"[^\w.-]", "-", name),  # a resumed run continues its curves
            resume="allow",
            dir=folder,
            config=options,
            mode=None if has_key or "WANDB_MODE" in os.environ else "offline",
            settings=settings,
        )
        # after a resume, steps restart from the checkpoint, which wandb's own counter rejects
        run.define_metric("*", step_metric="step")
        return run

    def _stop(self, reason: str) -> None:
        """Stop sending and print one warning with the reason."""
        with self.lock:
            if self.stopped:
                return
            self.stopped = True
        with contextlib.suppress(Exception):
            self.unregister_exit_hook()
        if self.dropped:
            reason += f"; {self.dropped} lines were dropped"
        with contextlib.suppress(OSError):  # standard error is closed
            print(f"warning: wandb logging stopped ({reason})", file=sys.stderr)


def _short(value: Any) -> str:
    if value is None:
        return "nan"
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
