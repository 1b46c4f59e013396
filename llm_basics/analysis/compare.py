"""Compare training runs: results, options that differ, samples.

uv run python -m llm_basics.compare runs/one runs/two
uv run python -m llm_basics.compare runs/* --out report.html
"""

import base64
import html
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box, console, table, text

from llm_basics.analysis import figures, run_data
from llm_basics.cli import commands, nested, parse
from llm_basics.core import files

# characters per line without a terminal, and of samples side by side
PIPE_WIDTH = 200
PAGE_WIDTH = 160
SAMPLE_WIDTH = 36

# maximum number of characters of a sample
SAMPLE_LETTERS = 600

# options that identify a run and do not affect results
UNCOMPARED = ("config", "run_dir", "resume")

# options that determine the held-out text and the tokenizer of a run that did not record them
DATA_OPTIONS = ("data", "val_fraction", "max_tokens")
TOKENIZER_OPTIONS = ("tokenizer", "model.vocab_size")

# keys of Record.summary and the titles of their columns
COLUMNS = {
    "val_loss": "val loss",
    "best_val_loss": "best",
    "best_step": "at step",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy",
    "parameters": "parameters",
    "steps": "steps",
    "tokens": "tokens",
    "seconds": "seconds",
    "tokens_per_second": "tokens/s",
}

# names of runs and samples are untrusted text: in addition to escaping, the page cannot load or run anything
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = "body { font-family: sans-serif; margin: 2rem } pre { overflow-x: auto } img { max-width: 100% }"


def format_number(name: str, value: int | float | None) -> str:
    """A number in the format of its column; "-" for None.

    >>> format_number("val_loss", 1.83259), format_number("steps", 2500), format_number("accuracy", 0.331)
    ('1.8326', '2,500', '33.1%')
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "not finite"
    if name == "accuracy":
        return f"{value:.1%}"
    if name.endswith("loss"):
        return f"{value:.4f}"
    if value >= 1000 or name in ("parameters", "steps", "tokens", "best_step"):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 100 or name == "seconds" else f"{value:.3f}"


@dataclass(frozen=True)
class Group:
    """Runs whose results can be compared: on the same held-out text."""

    text: str
    """The option `data`."""
    runs: list[run_data.Record]
    by: str
    """The metric that ranks them: the loss, or bits per byte if their tokenizers differ."""

    @property
    def title(self) -> str:
        """The heading of the table."""
        n_runs = f"{len(self.runs)} run{'s' * (len(self.runs) > 1)}"
        line = f"held-out text of {self.text}: {n_runs}"
        if self.by == "bits_per_byte":
            line += ", ranked by bits per byte: losses per token of different tokenizers are not comparable"
        return line


def groups(runs: Sequence[run_data.Record]) -> list[Group]:
    """The runs by their held-out text: its recorded hash, or the data options of runs without one."""
    recorded = all(record.held_out for record in runs)
    found: dict[Any, list[tuple[run_data.Record, Any]]] = {}
    for record in runs:
        known, options = record.held_out or {}, record.options
        text = known["text"] if recorded else repr([options.get(name) for name in DATA_OPTIONS])
        tokenizer = known["tokenizer"] if recorded else repr([options.get(n) for n in TOKENIZER_OPTIONS])
        found.setdefault(text, []).append((record, tokenizer))
    return [
        Group(
            str(pairs[0][0].options.get("data")),
            [record for record, _ in pairs],
            "val_loss" if len({tokenizer for _, tokenizer in pairs}) == 1 else "bits_per_byte",
        )
        for pairs in found.values()
    ]


def results(group: Group) -> tuple[list[str], list[list[str]]]:
    """Titles and a row for each run, the best first."""

    def rank(pair: tuple[run_data.Record, dict[str, int | float]]) -> float:
        value = pair[1].get(group.by, math.nan)
        return value if math.isfinite(value) else math.inf

    summaries = sorted(((record, record.summary()) for record in group.runs), key=rank)
    shown = [name for name in COLUMNS if any(name in summary for _, summary in summaries)]
    rows = [
        [record.name, *(format_number(name, summary.get(name)) for name in shown)]
        for record, summary in summaries
    ]
    return ["run", *(COLUMNS[name] for name in shown)], rows


def options_that_differ(runs: Sequence[run_data.Record]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of the options that differ, with the longer side of the table as rows."""
    found = nested.differences(*(record.options for record in runs))
    found = {name: values for name, values in found.items() if name not in UNCOMPARED}
    by_option = [[name, *map(_shown, values)] for name, values in found.items()]
    names = [record.name for record in runs]
    if len(found) >= len(runs):
        return ["option", *names], by_option
    by_run = [[name, *(_shown(values[i]) for values in found.values())] for i, name in enumerate(names)]
    return ["run", *found], by_run


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def print_report(runs: Sequence[run_data.Record], screen: console.Console) -> None:
    """Print results, options that differ and last samples."""
    found = groups(runs)
    print_groups(screen, found, [results(group) for group in found])
    titles, rows = options_that_differ(runs)
    if len(titles) > 1 and rows:
        screen.print("options that differ")
        print_table(screen, titles, rows)
    samples = [(record.name, record.last_sample()[:SAMPLE_LETTERS]) for record in runs]
    samples = [(name, sample) for name, sample in samples if sample]
    per_row = max(1, screen.width // SAMPLE_WIDTH)
    for first in range(0, len(samples), per_row):
        names, texts = zip(*samples[first : first + per_row], strict=True)
        shown = table.Table(box=box.SIMPLE)
        for name in names:
            width = max(SAMPLE_WIDTH, screen.width // per_row - 4)
            shown.add_column(plain_text(name), overflow="fold", max_width=width)
        shown.add_row(*map(plain_text, texts))
        screen.print(shown)


def print_groups(
    screen: console.Console, found: Sequence[Group], tables: Sequence[tuple[list[str], list[list[str]]]]
) -> None:
    """Print a table per group, with notes on results that are not comparable."""
    for group, (titles, rows) in zip(found, tables, strict=True):
        if len(found) > 1 or group.by != "val_loss":
            screen.print(plain_text(group.title))
        print_table(screen, titles, rows)
    if len(found) > 1:
        screen.print(f"{len(found)} held-out texts: results of different tables are not comparable")


def print_table(screen: console.Console, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column is text and whose others are numbers."""
    shown = table.Table(box=box.SIMPLE)
    for i, title in enumerate(titles):
        shown.add_column(plain_text(title), justify="right" if i else "left", overflow="fold")
    for row in rows:
        shown.add_row(*map(plain_text, row))
    screen.print(shown)


def plain_text(content: str) -> text.Text:
    """Text without markup, control characters and marks of bidirectional text."""
    return text.Text(
        "".join(c if c.isprintable() or c == "\n" else "    " if c == "\t" else "\ufffd" for c in content)
    )


# --------------------------------------------------------------------------------------------------
# The page


def new_screen() -> console.Console:
    """A console that prints to the terminal, or long lines to a pipe."""
    return console.Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def recording_screen() -> console.Console:
    """A console that prints nothing and records the text for `write_page`."""
    return console.Console(record=True, file=io.StringIO(), width=PAGE_WIDTH, highlight=False)


def write_page(path: Path, title: str, screen: console.Console, pictures: Sequence[Path]) -> None:
    """Write a recorded screen and PNG pictures as an HTML page without scripts or other files."""
    encoded = [base64.b64encode(picture.read_bytes()).decode() for picture in pictures]
    images = "".join(f'<p><img alt="figure" src="data:image/png;base64,{data}"></p>\n' for data in encoded)
    content = screen.export_html(inline_styles=True, code_format="{code}")
    heading = html.escape(plain_text(title).plain)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{heading}</title>
<meta http-equiv="Content-Security-Policy" content="{POLICY}"><style>{STYLE}</style>
</head><body><h1>{heading}</h1>
{images}<pre>{content}</pre></body></html>
"""
    files.write(path, page)


def write_report(runs: Sequence[run_data.Record], path: Path, x: str) -> list[Path]:
    """Write the comparison as the page `path`, and a picture per group beside it. Returns all paths."""
    pictures = []
    for number, group in enumerate(groups(runs), start=1):
        losses = ("train_loss", "val_loss") if group.by == "val_loss" else (group.by,)
        ys = [y for y in losses if any(len(record.curve(y)[0]) for record in group.runs)]
        if ys:
            picture = path.with_name(f"{path.stem}{f'-{number}' if number > 1 else ''}.png")
            pictures.append(figures.draw(group.runs, picture, x, ys))
    screen = recording_screen()
    print_report(runs, screen)
    names = ", ".join(record.name for record in runs[:3]) + (", ..." if len(runs) > 3 else "")
    write_page(path, f"{len(runs)} runs: {names}" if len(runs) > 1 else names, screen, pictures)
    return [path, *pictures]


def main(options: commands.CompareConfig) -> int:
    """Print the comparison and write the report. Returns the exit status."""
    with parse.exit_on_error():
        runs = run_data.read_all(options.runs)
        print_report(runs, new_screen())
        if options.out is not None:
            print(*write_report(runs, Path(options.out), options.x), sep="\n")
    return 0
