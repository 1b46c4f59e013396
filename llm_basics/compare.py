"""Compare training runs: what came out, what was different, what they write.

uv run python -m llm_basics.compare runs/one runs/two
uv run python -m llm_basics.compare runs/* --out report.html
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box, console, table, text

from llm_basics import command_line, plot, programs, records, report

# letters across where nobody looks at a terminal, and those that a text needs beside others
PIPE_WIDTH = 200
SAMPLE_WIDTH = 36

# of a sample that is shown
SAMPLE_LETTERS = 600


def results(runs: Sequence[records.Record]) -> tuple[list[str], list[list[str]]]:
    """What came out, best first: titles, and a row for each run."""
    summaries = [(record, record.summary()) for record in runs]
    summaries.sort(key=lambda pair: pair[1].get("val_loss", math.inf) if _has_loss(pair[1]) else math.inf)
    shown = [name for name in report.COLUMNS if any(name in summary for _, summary in summaries)]
    rows = [
        [record.name, *(report.number(name, summary.get(name)) for name in shown)]
        for record, summary in summaries
    ]
    return ["run", *(report.COLUMNS[name] for name in shown)], rows


def _has_loss(summary: dict[str, int | float]) -> bool:
    return math.isfinite(summary.get("val_loss", math.nan))


def options_that_differ(runs: Sequence[records.Record]) -> tuple[list[str], list[list[str]]]:
    """The options that are not the same in all runs, in a table that has fewer columns than rows."""
    found = records.differences(runs)
    by_option = [[name, *map(_shown, values)] for name, values in found.items()]
    names = [record.name for record in runs]
    if len(found) >= len(runs):
        return ["option", *names], by_option
    by_run = [[name, *(_shown(values[i]) for values in found.values())] for i, name in enumerate(names)]
    return ["run", *found], by_run


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def tell(runs: Sequence[records.Record], screen: console.Console) -> None:
    """Print the comparison."""
    print_table(screen, *results(runs))
    titles, rows = options_that_differ(runs)
    if len(titles) > 1 and rows:
        screen.print("options that differ")
        print_table(screen, titles, rows)
    samples = [(record.name, record.last_sample()[:SAMPLE_LETTERS]) for record in runs]
    samples = [(name, sample) for name, sample in samples if sample]
    abreast = max(1, screen.width // SAMPLE_WIDTH)
    for first in range(0, len(samples), abreast):
        beside = table.Table(box=box.SIMPLE, expand=False)
        for name, _ in samples[first : first + abreast]:
            beside.add_column(
                text.Text(name), overflow="fold", max_width=max(SAMPLE_WIDTH, screen.width // abreast - 4)
            )
        beside.add_row(*(text.Text(report.visible(sample)) for _, sample in samples[first : first + abreast]))
        screen.print(beside)


def print_table(screen: console.Console, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column is words and whose others are numbers."""
    shown = table.Table(box=box.SIMPLE)
    for i, title in enumerate(titles):
        shown.add_column(text.Text(report.visible(title)), justify="right" if i else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(text.Text(report.visible(cell)) for cell in row))
    screen.print(shown)


def new_screen() -> console.Console:
    """The terminal; or a pipe, where lines may be long."""
    return console.Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def write(runs: Sequence[records.Record], path: Path, x: str) -> list[Path]:
    """Write the page `path` and beside it the picture of the curves that is in it."""
    ys = [y for y in ("train_loss", "val_loss") if any(len(record.curve(y)[0]) for record in runs)]
    pictures = [plot.draw(runs, path.with_suffix(".png"), x, ys)] if ys else []
    sections = [
        report.heading("What came out"),
        report.table(*results(runs), best_first=True),
        *(part for picture in pictures for part in (report.heading("Curves"), report.picture(picture))),
    ]
    titles, rows = options_that_differ(runs)
    if len(titles) > 1 and rows:
        sections += [report.heading("Options that differ"), report.table(titles, rows)]
    samples = [(record.name, record.last_sample()) for record in runs]
    if any(sample for _, sample in samples):
        sections += [report.heading("What they write"), report.samples(samples)]
    names = ", ".join(record.name for record in runs[:3]) + (", ..." if len(runs) > 3 else "")
    report.write(path, f"{len(runs)} runs: {names}" if len(runs) > 1 else names, sections)
    return [path, *pictures]


def main(options: programs.CompareConfig) -> int:
    """Compare what `options` name. Returns the exit status."""
    with command_line.exit_on_mistake():
        runs = records.read_all(options.runs)
        tell(runs, new_screen())
        if options.out is not None:
            print("\n".join(map(str, write(runs, Path(options.out), options.x))))
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # samples may hold any character
    sys.exit(
        main(
            command_line.program_options(
                programs.CompareConfig(), sys.argv[1:], "python -m llm_basics.compare"
            )
        )
    )
