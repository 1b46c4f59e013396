"""Progress bars and lines on the terminal."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

LINE_SECONDS = 10.0  # between progress lines without a terminal


@contextlib.contextmanager
def progress_bar(unit: str = "") -> Iterator[Callable[[str, int, int], None]]:
    """A callback for progress: stage, amount done, total (0: unknown). Drawn as bars on a terminal.

    With unit "bytes" the speed is shown too, and without a terminal a line every LINE_SECONDS is printed.
    """
    if not sys.stdout.isatty():
        yield _ProgressLines() if unit == "bytes" else lambda stage, done, total: None
        return
    from rich import progress

    columns = [
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        *([progress.TransferSpeedColumn()] if unit == "bytes" else []),
        progress.TimeRemainingColumn(),
    ]
    with progress.Progress(*columns, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=None)
            bars.update(tasks[stage], completed=done, total=total or None)

        yield report


class _ProgressLines:
    """Prints the progress of work on bytes as lines."""

    def __init__(self) -> None:
        self.began = self.last_printed = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last_printed >= LINE_SECONDS and done:
            self.last_printed = now
            speed = done / (now - self.began)
            left = f", about {(total - done) / speed:.0f} s left" if total else ""
            print_line(f"{stage} {done / 1e6:,.0f} MB, {speed / 1e6:.1f} MB/s{left}")


def print_line(text: str) -> None:
    """Print a line; a closed pipe (`| head`) or a lost terminal does not end the run."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
