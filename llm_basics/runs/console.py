"""Progress bars and lines on the terminal."""

import contextlib
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

LINE_SECONDS = 10.0  # between progress lines without a terminal

# maximum line widths of prose and of numbers, which are hard to read when wrapped
PROSE, NUMBERS = 100, 114


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


def wrap(text: str) -> str:
    """Wrap the lines of `text` to the terminal, after joining paragraphs that are wrapped to `PROSE`.

    Commands stay in one line, so that they can be copied.
    """
    columns = shutil.get_terminal_size((NUMBERS, 24)).columns
    lines: list[str] = []
    length = 0
    for line in text.splitlines():
        word = line.strip().partition(" ")[0]
        if lines and line.startswith("    ") and length + 1 + len(word) > PROSE:
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
        length = len(line)
    wrapped = []
    for line in lines:
        is_indented = line.startswith("  ")
        limit = NUMBERS if is_indented and not line.startswith("    ") else PROSE
        indent = "    " if is_indented else ""
        parts = textwrap.wrap(line, min(columns, limit), subsequent_indent=indent, break_long_words=False)
        wrapped += parts if parts and "uv run" not in line else [line]
    return "\n".join(wrapped)
