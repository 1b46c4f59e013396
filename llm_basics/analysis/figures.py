"""Figures of training runs.

uv run python -m llm_basics.plot newest
uv run python -m llm_basics.plot runs/one runs/two --x time --smooth 20 --out both.png
uv run python -m llm_basics.plot runs/one runs/two --y train_loss,grad_norm --log
"""

import io
import itertools
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import figure

from llm_basics.analysis import run_data
from llm_basics.cli import commands, parse
from llm_basics.core import files
from llm_basics.runs import run_dir

# colorblind-safe (Okabe and Ito 2008), in an order for lines on white
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GRAY, PALE = "#8a8a8a", "#d0d0d0"

# evaluations on held-out text: drawn as points and never smoothed
EVALUATED = ("val_loss", "perplexity", "bits_per_byte", "accuracy")

AXIS_LABELS = {
    "step": "step",
    "tokens": "training tokens",
    "time": "seconds of training",
    "train_loss": "training",
    "val_loss": "validation",
    "loss": "loss (nats per token)",
    "lr": "learning rate",
    "bits_per_byte": "bits per byte",
    "accuracy": "next-token accuracy",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}

# maximum number of characters of a run's name in a figure
NAME_LENGTH = 34


# --------------------------------------------------------------------------------------------------
# Curves


def draw(
    runs: Sequence[run_data.Record],
    path: Path,
    x: str = "step",
    ys: Sequence[str] = ("train_loss", "val_loss"),
    log: bool = False,
    smooth: int = 1,
    levels: Mapping[str, float] | None = None,
) -> Path:
    """Draw the metrics of `runs` in the same axes, and return the path of the figure.

    Losses share a panel, with the `levels` as horizontal lines. With more runs than colors, the best runs are
    colored and the others gray.
    """
    panels: dict[str, list[str]] = {}
    for y in ys:
        panels.setdefault("loss" if y.endswith("loss") else y, []).append(y)
    measured = {name for record in runs for entry in record.metrics for name in entry}
    if missing := [y for y in ys if y not in measured]:
        known = ", ".join(sorted(measured - {"step", "attempt", "nonfinite"})) or "none yet"
        raise ValueError(f"y must be a metric of the runs ({known}), got {', '.join(missing)}")
    canvas, all_axes = new_figure(len(panels))
    for axes, (panel, names) in zip(all_axes, panels.items(), strict=True):
        _draw_panel(axes, runs, x, names, smooth)
        axes.set(ylabel=axis_label(panel), yscale="log" if log else "linear")
        axes.margins(x=0.01)
        for label, level in (levels or {}).items() if panel == "loss" else ():
            axes.axhline(level, color=GRAY, ls=(0, (4, 3)), lw=1, zorder=1, label=label)
        if panel == "loss" and not log:
            leave_out_beginning(axes)
        if len(runs) == 1 or axes is all_axes[0]:
            add_legend(axes, outside=len(runs) > 1)
    set_title(all_axes[0], readable(runs[0].name) if len(runs) == 1 else _title(runs, panels.get("loss", [])))
    all_axes[-1].set_xlabel(axis_label(x))
    all_axes[-1].xaxis.set_major_formatter(lambda value, _: short(value) if value >= 10_000 else f"{value:g}")
    return save(canvas, path)


def _title(runs: Sequence[run_data.Record], losses: Sequence[str]) -> str:
    """The number of runs, and the losses drawn as lines and as points."""
    marks = [f"{axis_label(y)} ({'points' if y in EVALUATED else 'line'})" for y in losses]
    return f"{len(runs)} runs" + (f": {', '.join(marks)}" if len(marks) > 1 else "")


def _draw_panel(
    axes: mpl_axes.Axes, runs: Sequence[run_data.Record], x: str, names: Sequence[str], smooth: int
) -> None:
    """Draw the curves: one color per metric of a single run, else one color per run."""
    if len(runs) == 1:
        for name, color in zip(names, itertools.cycle(COLORS)):
            axes.plot([], [], color=color, label=axis_label(name))
            _draw_curve(axes, runs[0].curve(name, x), name, color, smooth)
        return
    ends = [_end(record, names) for record in runs]
    sign = -1 if names[-1] == "accuracy" else 1
    best_first = sorted(range(len(runs)), key=lambda i: (math.isnan(ends[i]), sign * ends[i]))
    colored = sorted(best_first[: len(COLORS)])
    for i, color in zip(colored, COLORS, strict=False):
        axes.plot([], [], color=color, label=readable(runs[i].name))
    if len(colored) < len(runs):
        axes.plot([], [], color=PALE, label=f"{len(runs) - len(colored)} more runs")
    for i, record in reversed(list(enumerate(runs))):
        color = COLORS[colored.index(i)] if i in colored else PALE
        for name in names:
            _draw_curve(axes, record.curve(name, x), name, color, smooth)


def _draw_curve(
    axes: mpl_axes.Axes, points: tuple[np.ndarray, np.ndarray], name: str, color: str, smooth: int
) -> None:
    """Draw evaluations as points, other metrics as a line, or as a smooth line over a faint one."""
    at, values = points
    style: dict[str, Any] = {"color": color, "lw": 1.1, "alpha": 0.6, "zorder": 2 if color == PALE else 3}
    if name in EVALUATED:
        is_many = len(at) > 60 or color == PALE
        style |= {"lw": 1.6, "alpha": 1.0, "marker": "" if is_many else "o", "ms": 3.5}
    elif smooth > 1 and name != "lr":
        axes.plot(at, values, color=color, lw=0.7, alpha=0.2, zorder=2)
        values, style = smoothed(values, smooth), style | {"lw": 1.6, "alpha": 0.9}
    if len(at):
        axes.plot(at, values, **style)


def _end(record: run_data.Record, names: Sequence[str]) -> float:
    """The last finite value of the last metric of `names` that a run has; NaN if it has none."""
    for name in reversed(names):
        _, values = record.curve(name)
        if np.isfinite(values).any():
            return float(values[np.isfinite(values)][-1])
    return math.nan


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The moving average over `window` values, ignoring non-finite values.

    >>> smoothed(np.array([1.0, 2.0, np.nan, 4.0]), 3).tolist()
    [1.5, 1.5, 3.0, 4.0]
    """
    ones = np.ones(min(window, len(values)))
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0.0), ones, "same")
    counts = np.convolve(finite.astype(float), ones, "same")
    return np.where(counts > 0.5, sums / np.maximum(counts, 0.5), np.nan)


# --------------------------------------------------------------------------------------------------
# Parts of all figures


def new_figure(panels: int = 1, height: float = 4.6) -> tuple[figure.Figure, list[mpl_axes.Axes]]:
    """A figure of stacked panels over the same x; the first panel is the highest."""
    ratios = [1.0] + [0.45] * (panels - 1)
    canvas = figure.Figure(figsize=(9, height * sum(ratios)), layout="constrained")
    all_axes = canvas.subplots(panels, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for axes in all_axes:
        dress(axes)
    return canvas, list(all_axes)


def dress(axes: mpl_axes.Axes) -> None:
    """Set a light grid, and only the left and bottom spines."""
    axes.grid(alpha=0.25, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def add_legend(axes: mpl_axes.Axes, outside: bool = False) -> None:
    """Add a legend, inside or to the right, for two or more labels, as text without mathtext."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        position: dict[str, Any] = (
            {"loc": "upper left", "bbox_to_anchor": (1, 1)} if outside else {"loc": "upper right"}
        )
        for text in axes.legend(handles, labels, frameon=False, fontsize=9, **position).get_texts():
            text.set_parse_math(False)


def leave_out_beginning(axes: mpl_axes.Axes) -> None:
    """Set y limits without the first 5% of each curve, whose steep descent would flatten the rest."""
    drawn = [np.asarray(line.get_ydata(), dtype=float) for line in axes.lines]
    values = np.concatenate([np.empty(0), *(values[len(values) // 20 :] for values in drawn)])
    values = values[np.isfinite(values)]
    if len(values) and (span := np.ptp(values)) > 0:
        axes.set_ylim(values.min() - 0.06 * span, values.max() + 0.06 * span)


def set_title(axes: mpl_axes.Axes, title: str) -> None:
    """Set a left-aligned title, as text without mathtext."""
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", parse_math=False)


def axis_label(name: str) -> str:
    """The label of an axis or curve."""
    return AXIS_LABELS.get(name, name)


def short(count: int | float) -> str:
    """A number in thousands or millions.

    >>> short(51_200), short(1_600_000), short(820)
    ('51k', '1.6M', '820')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.2g}{letter}" if count < 100 * size else f"{count / size:.0f}{letter}"
    return f"{count:g}"


def readable(name: str) -> str:
    """A name on one line, shortened to fit a legend."""
    clean = "".join(letter if letter.isprintable() else "?" for letter in name)
    # a legend omits labels that start with an underscore
    clean = f" {clean}" if clean.startswith("_") else clean
    return clean if len(clean) <= NAME_LENGTH else f"{clean[: NAME_LENGTH - 11]}...{clean[-8:]}"


def save(canvas: figure.Figure, path: Path) -> Path:
    """Write a figure atomically."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        # a character missing from the font is drawn as a box
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        with matplotlib.rc_context({"agg.path.chunksize": 10_000}):
            canvas.savefig(content, dpi=150, format=path.suffix[1:])
    files.write(path, content.getvalue())
    return path


# --------------------------------------------------------------------------------------------------
# Figures of programs


def plot_loss(folder: str | os.PathLike[str], unigram_entropy: float | None = None) -> Path:
    """Draw training and validation loss over the steps of a run to `loss.png`, and return its path.

    The baseline `unigram_entropy`, in nats, is drawn as a horizontal line.
    """
    record = run_data.Record(Path(folder).name, {}, run_dir.read_metrics(folder), [])
    ys = [y for y in ("train_loss", "val_loss") if len(record.curve(y)[0])]
    levels = {} if unigram_entropy is None else {"unigram entropy": unigram_entropy}
    return draw([record], Path(folder) / "loss.png", ys=ys, levels=levels)


def plot_lr_finder(folder: str | os.PathLike[str], proposal: float) -> Path:
    """Draw the loss over the learning rates of a range test, and the proposed rate, to `lr_finder.png`."""
    tried = run_dir.read_tried(folder)
    canvas, (axes,) = new_figure()
    lrs = [entry["lr"] for entry in tried]
    losses, smooth = ([entry[name] for entry in tried] for name in ("train_loss", "smoothed_loss"))
    axes.plot(lrs, losses, color=COLORS[0], alpha=0.4, lw=1, label="training")
    axes.plot(lrs, smooth, color=COLORS[0], lw=1.8, label="smoothed")
    axes.axvline(proposal, color=COLORS[1], ls=(0, (4, 3)), lw=1.2, label=f"proposed: {proposal:g}")
    # a diverging loss would flatten the rest
    axes.set_ylim(0.9 * min(smooth), 1.1 * smooth[0])
    axes.set(xscale="log", xlabel=axis_label("lr"), ylabel=axis_label("loss"))
    set_title(axes, readable(Path(folder).name))
    axes.legend(frameon=False)
    return save(canvas, Path(folder) / "lr_finder.png")


def plot_runs(folders: Mapping[str, Path], path: Path) -> Path:
    """Draw the training and validation losses of named runs over their steps."""
    return draw(
        [run_data.Record(name, {}, run_dir.read_metrics(folder), []) for name, folder in folders.items()],
        path,
    )


def main(options: commands.PlotConfig) -> int:
    """Draw the figure. Returns the exit status."""
    with parse.exit_on_error():
        runs = run_data.read_all(options.runs)
        ys = [y.strip() for y in options.y.split(",")]
        print(draw(runs, Path(options.out), options.x, ys, options.log, options.smooth))
    return 0
