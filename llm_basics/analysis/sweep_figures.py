"""Figures of a sweep: loss over the changed options, and scaling laws."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import colormaps, colors, figure, ticker

from llm_basics.analysis import figures

# minimum ratio of the largest to the smallest value for a logarithmic axis
LOG_SCALE_RATIO = 20

# labels of the metrics that rank settings
MEASURES = {"val_loss": "validation loss (nats per token)", "bits_per_byte": "bits per byte"}

# maximum number of values used as ticks of an axis
MOST_TICKS = 8


@dataclass(frozen=True)
class Outcome:
    """The results of a setting over its seeds."""

    setting: dict[str, Any]
    losses: list[float]
    """Final values of `metric`, one per finished seed."""
    weights: int
    """Weights in matrix products, without embeddings."""
    tokens: int
    flops: float
    """Floating-point operations of the whole training."""
    metric: str = "val_loss"
    """The validation loss, or bits per byte if the settings have different tokenizers."""

    @property
    def measure(self) -> str:
        """The name of the metric, without its unit."""
        return MEASURES[self.metric].partition(" (")[0]

    @property
    def mean(self) -> float:
        """The mean loss; NaN without losses."""
        return float(np.mean(self.losses)) if self.losses else math.nan

    @property
    def spread(self) -> float:
        """The sample standard deviation over seeds; NaN for a single seed."""
        return float(np.std(self.losses, ddof=1)) if len(self.losses) > 1 else math.nan

    def without(self, name: str) -> str:
        """The label of the setting without one option."""
        return label({key: value for key, value in self.setting.items() if key != name})


def label(setting: dict[str, Any]) -> str:
    """A setting as text.

    >>> label({"train.lr": 0.001, "variant": "post-norm"})
    'lr 0.001, post-norm'
    """
    return ", ".join(str(v) if k == "variant" else f"{k.rpartition('.')[2]} {v}" for k, v in setting.items())


def draw_options(outcomes: Sequence[Outcome], path: Path) -> Path:
    """Draw the loss over the changed options: lines over a numeric option, else bars."""
    found = [outcome for outcome in outcomes if outcome.losses]
    if not found:
        raise ValueError("the sweep must have a finished run to draw, got none")
    numeric = [name for name in found[0].setting if _is_numeric(found, name)]
    return _draw_lines(found, numeric[0], path) if numeric else _draw_bars(found, path)


def _is_numeric(outcomes: Sequence[Outcome], name: str) -> bool:
    values = {outcome.setting[name] for outcome in outcomes}
    return len(values) > 1 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _draw_lines(outcomes: Sequence[Outcome], name: str, path: Path) -> Path:
    canvas, (axes,) = figures.new_figure()
    best = min(outcomes, key=lambda outcome: outcome.mean)
    for i, rest in enumerate(dict.fromkeys(outcome.without(name) for outcome in outcomes)):
        line = sorted((o for o in outcomes if o.without(name) == rest), key=lambda o: o.setting[name])
        color = figures.COLORS[i % len(figures.COLORS)]
        xs, means = [o.setting[name] for o in line], [o.mean for o in line]
        axes.plot(xs, means, color=color, lw=1.8, marker="o", ms=4, label=figures.readable(rest))
        for outcome in line:
            seeds = outcome.losses if len(outcome.losses) > 1 else []
            axes.plot([outcome.setting[name]] * len(seeds), seeds, ".", color=color, ms=4, alpha=0.4)
    axes.plot([best.setting[name]], [best.mean], "o", mfc="none", mec="black", ms=11, mew=1.4)
    _scale(axes, [o.setting[name] for o in outcomes])
    _cut_off(axes, [o.mean for o in outcomes])
    axes.set(xlabel=figures.axis_label(name.rpartition(".")[2]), ylabel=MEASURES[best.metric])
    figures.set_title(axes, f"Lowest {best.measure}: {best.mean:.3f} at {label(best.setting)}")
    figures.add_legend(axes, outside=True)
    return figures.save(canvas, path)


def _draw_bars(outcomes: Sequence[Outcome], path: Path) -> Path:
    """Draw bars of differences from the first setting, since bars of losses would be indistinguishable."""
    canvas, (axes,) = figures.new_figure(height=1.4 + 0.45 * len(outcomes))
    first, ordered = outcomes[0], sorted(outcomes, key=lambda outcome: -outcome.mean)
    beside = [outcome.mean - first.mean for outcome in ordered]
    rows = range(len(ordered))
    axes.barh(rows, beside, color=[figures.COLORS[value > 0] for value in beside], height=0.62)
    span = max(map(abs, beside), default=0) or 1
    for row, outcome, value in zip(rows, ordered, beside, strict=True):
        seeds = [loss - first.mean for loss in outcome.losses]
        axes.plot(seeds, [row] * len(seeds), ".", color="black", ms=5, alpha=0.6)
        words = f"{outcome.mean:.3f}" + (f"  ({value:+.3f})" if outcome is not first else "")
        axes.text(max([0.0, value, *seeds]) + 0.015 * span, row, words, va="center", fontsize=9)
    axes.set_yticks(rows, [figures.readable(label(outcome.setting)) for outcome in ordered])
    for tick in axes.get_yticklabels():
        tick.set_parse_math(False)
    axes.axvline(0, color="black", lw=0.8)
    axes.margins(x=0.2)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"difference in {MEASURES[first.metric]}; points are seeds")
    figures.set_title(axes, f"{first.measure.capitalize()} relative to: {label(first.setting)}")
    return figures.save(canvas, path)


def _scale(axes: mpl_axes.Axes, values: Sequence[int | float]) -> None:
    """Set a logarithmic axis if values are far apart, with the values as ticks if they are few."""
    if min(values) > 0 and max(values) / min(values) >= LOG_SCALE_RATIO:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    if len(distinct := sorted(set(values))) <= MOST_TICKS:
        axes.set_xticks(distinct, [f"{value:g}" for value in distinct])


def _cut_off(axes: mpl_axes.Axes, losses: Sequence[float]) -> None:
    """Set y limits without losses far above the others."""
    low, middle = min(losses), float(np.median(losses))
    within = [loss for loss in losses if loss <= middle + 3 * (middle - low)]
    span = max(within) - low
    if span > 0:
        axes.set_ylim(low - 0.08 * span, max(within) + 0.08 * span)


# --------------------------------------------------------------------------------------------------
# Scaling


@dataclass(frozen=True)
class PowerLaw:
    """`y = factor * x ** exponent`."""

    factor: float
    exponent: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.factor * x**self.exponent


def fit_power_law(x: Sequence[int | float], y: Sequence[int | float]) -> PowerLaw:
    """A least-squares fit of a line to the logarithms.

    >>> law = fit_power_law([1, 10, 100], [8, 4, 2])
    >>> round(law.factor, 3), round(law.exponent, 3)
    (8.0, -0.301)
    """
    exponent, level = np.polyfit(np.log(x), np.log(y), 1)
    return PowerLaw(float(np.exp(level)), float(exponent))


def frontier(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The Pareto frontier of loss over compute, in increasing order of compute."""
    kept: list[Outcome] = []
    for outcome in sorted((o for o in outcomes if o.losses), key=lambda o: (o.flops, o.mean)):
        if not kept or outcome.mean < kept[-1].mean:
            kept.append(outcome)
    return kept


def scaling_laws(outcomes: Sequence[Outcome]) -> dict[str, PowerLaw]:
    """Power laws of the loss: in weights at the most tokens, in tokens at the most weights, in compute.

    The law in compute is fitted to the Pareto frontier. A law needs three points.
    """
    found = [outcome for outcome in outcomes if outcome.losses]
    most_tokens, most_weights = (
        max((getattr(o, n) for o in found), default=0) for n in ("tokens", "weights")
    )
    lines = {
        "weights": [o for o in found if o.tokens == most_tokens],
        "tokens": [o for o in found if o.weights == most_weights],
        "flops": frontier(found),
    }
    return {
        name: fit_power_law([getattr(o, name) for o in line], [o.mean for o in line])
        for name, line in lines.items()
        if len({getattr(o, name) for o in line}) >= 3
    }


def draw_scaling(outcomes: Sequence[Outcome], path: Path) -> Path:
    """Draw the loss over weights and over compute, on logarithmic axes, with fitted power laws."""
    found = [dataclasses.replace(o, losses=[o.mean]) for o in outcomes if o.losses]
    if not found:
        raise ValueError("the sweep must have a finished run to draw, got none")
    laws = scaling_laws(found)
    canvas = figure.Figure(figsize=(12, 4.9), layout="constrained")
    left, right = canvas.subplots(1, 2, sharey=True)
    _draw_family(left, found, "weights", "tokens", "tokens")
    _draw_family(right, found, "flops", "weights", "weights")
    sizes = sorted({outcome.weights for outcome in found})
    if len(sizes) <= MOST_TICKS:
        left.set_xticks(sizes, [figures.short(size) for size in sizes])
    best = frontier(found)
    longest = [outcome for outcome in found if outcome.tokens == max(other.tokens for other in found)]
    for axes, name, law_of, symbol in ((left, "weights", longest, "N"), (right, "flops", best, "C")):
        if name in laws:
            xs = np.array(
                [min(getattr(o, name) for o in law_of), max(getattr(o, name) for o in law_of)], float
            )
            law = laws[name]
            formula = f"$L = {law.factor:.3g}\\,{symbol}^{{{law.exponent:.3f}}}$"
            axes.plot(xs, law(xs), color="black", ls=(0, (4, 3)), lw=1.3, zorder=4, label=formula)
        axes.legend(frameon=False, loc="upper right")
    left.set(xlabel="weights N without embeddings", ylabel=MEASURES[found[0].metric])
    right.set(xlabel="training compute C (FLOPs)")
    figures.set_title(left, "Model size at fixed tokens")
    figures.set_title(right, "Compute, spent on size or on tokens")
    return figures.save(canvas, path)


def _draw_family(axes: mpl_axes.Axes, outcomes: Sequence[Outcome], x: str, family: str, unit: str) -> None:
    """Draw a line for each value of `family`, from light to dark."""
    figures.dress(axes)
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    values = sorted({getattr(outcome, family) for outcome in outcomes})
    for value, color in zip(values, shades(len(values)), strict=True):
        line = sorted((o for o in outcomes if getattr(o, family) == value), key=lambda o: getattr(o, x))
        xs, means = [getattr(o, x) for o in line], [o.mean for o in line]
        size = f"{figures.short(value)} {unit}"
        axes.plot(xs, means, color=color, lw=1.8, marker="o", ms=5, label=size)
    for which in ("major", "minor"):
        getattr(axes.yaxis, f"set_{which}_formatter")(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(1.5, 2, 2.5, 3, 4, 5, 7)))
    axes.grid(which="minor", axis="y", alpha=0.12, lw=0.6)


def shades(n: int) -> list[str]:
    """Colors from light to dark, in a perceptually uniform order."""
    return [colors.to_hex(colormaps["viridis"](0.85 - 0.8 * i / max(1, n - 1))) for i in range(n)]
