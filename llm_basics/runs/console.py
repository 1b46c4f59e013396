"""The terminal: progress bars and lines."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

LINE_SECONDS = 10.0  # between lines of progress where there is no bar


@contextlib.contextmanager
def progress_bar(unit: str = "") -> Iterator[Callable[[str, int, int], None]]:
    """A function to tell a stage, what is done and what there is to do (0: unknown); shown on a terminal.

    Where the unit is bytes, their speed is shown too; and elsewhere than on a terminal, a line now and then.
    """
    if not sys.stdout.isatty():
        yield _Lines() if unit == "bytes" else lambda stage, done, total: None
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


class _Lines:
    """Tells of work on bytes in lines."""

    def __init__(self) -> None:
        self.began = self.told = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.told >= LINE_SECONDS and done:
            self.told = now
            speed = done / (now - self.began)
            left = f", about {(total - done) / speed:.0f} s left" if total else ""
            print_line(f"{stage} {done / 1e6:,.0f} MB, {speed / 1e6:.1f} MB/s{left}")


def print_line(text: str) -> None:
    """Print, as long as somebody reads: a closed pipe (`| head`) or a lost terminal does not end the run."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
