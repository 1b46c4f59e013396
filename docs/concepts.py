"""Draws the figures of the pages on concepts, each light and dark, to docs/concepts/.

uv run python docs/concepts.py RUN

RUN is a finished default run. Merges, attention weights and next-token probabilities are those of its
tokenizer and model, losses those of its metrics. Rotations, masks and schedules are computed by functions of
the package.
"""

import argparse
import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import axes as mpl_axes
from matplotlib import colors, figure, patches
from PIL import Image

from llm_basics.analysis import figures, inspection, run_data, tokenization
from llm_basics.core import config, generate, presets, trainer
from llm_basics.core import functional as F
from llm_basics.inference import engine
from llm_basics.runs import run_dir

FOLDER = Path(__file__).parent / "concepts"

# bytes of a PNG file from which its colors are reduced, and to how many
LARGE, PALETTE = 50_000, 160


@dataclass(frozen=True)
class Theme:
    """The colors of a figure, those of docs/first_run.py."""

    suffix: str
    background: str
    text: str
    faint: str
    first: str
    second: str
    third: str

    def settings(self) -> dict[str, Any]:
        """Matplotlib's parameters."""
        lines = {"axes.edgecolor": self.faint, "grid.color": self.faint}
        ticks = {f"{axis}tick.{part}": self.faint for axis in "xy" for part in ("color", "labelcolor")}
        texts = {"text.color": self.text, "axes.labelcolor": self.text, "legend.labelcolor": self.text}
        faces = {"figure.facecolor": self.background, "axes.facecolor": self.background}
        return {**lines, **ticks, **texts, **faces, "xtick.labelsize": 9, "ytick.labelsize": 9}

    def shades(self, color: str) -> colors.LinearSegmentedColormap:
        """A color map from the background to `color`."""
        return colors.LinearSegmentedColormap.from_list("shades", [self.background, color])


THEMES = (
    Theme("", "#fffefa", "#1f1e1a", "#8a857a", "#c2410c", "#1e5a9c", "#2f7d4f"),
    Theme("-dark", "#14130f", "#efece4", "#8f8a7e", "#f08a5d", "#7fb2e5", "#86c79a"),
)


@contextlib.contextmanager
def drawn(name: str, theme: Theme, height: float) -> Iterator[figure.Figure]:
    """A figure to draw in; it is written at the end."""
    with matplotlib.rc_context(theme.settings()):
        canvas = figure.Figure(figsize=(8, height))
        yield canvas
        path = figures.save(canvas, FOLDER / f"{name}{theme.suffix}.png")
    if path.stat().st_size > LARGE:
        with Image.open(path) as picture:
            reduced = picture.convert("RGB").quantize(PALETTE, dither=Image.Dither.NONE)
        reduced.save(path, optimize=True)


def dressed(canvas: figure.Figure, place: Sequence[float], title: str) -> mpl_axes.Axes:
    """Axes with a title at a place of the figure: left, bottom, width, height."""
    axes = canvas.add_axes(tuple(place))
    figures.dress(axes)
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    return axes


def visible(token: str) -> str:
    """A token with its spaces and line ends as signs."""
    return token.replace(" ", "\u00b7").replace("\n", "\u21b5")


# --------------------------------------------------------------------------------------------------
# Tokens

SENTENCE = "The tokenizer returns a list of integers for every string."
WORDS = (" tokenizer", " integers")


def draw_merges(loaded: inspection.LoadedModel, theme: Theme) -> None:
    """The tokens of a sentence, and the merges of two of its words."""
    pieces = tokenization.tokenize(loaded, SENTENCE).tokens
    merges = {each.text: each for each in tokenization.merges(loaded, SENTENCE).pretokens}
    n_rows = max(len(merges[word].steps) for word in WORDS)
    with drawn("merges", theme, height=1.7 + 0.3 * n_rows) as canvas:
        scale = canvas.get_figheight()
        axes = canvas.add_axes((0.02, 1 - 1.1 / scale, 0.96, 0.6 / scale))
        title = f"{len(SENTENCE.encode())} bytes become {len(pieces)} tokens"
        axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
        shades = [theme.first if i % 2 else theme.second for i in range(len(pieces))]
        ends = draw_boxes(axes, [piece.token for piece in pieces], 0, shades)
        for piece, center in zip(pieces, ends, strict=True):
            axes.text(center, -0.62, str(piece.id), ha="center", va="top", fontsize=7, color=theme.faint)
        axes.set(xlim=(-0.3, len(SENTENCE) + 0.3), ylim=(-1.2, 0.5))
        axes.axis("off")
        for number, word in enumerate(WORDS):
            found, height = merges[word], 0.3 * n_rows
            place = (0.02 + 0.5 * number, 0.1 / scale, 0.46, height / scale)
            axes = canvas.add_axes(place)
            axes.set_title(f"the merges of {visible(word)!r}", loc="left", fontsize=10.5, fontweight="bold")
            for row, parts in enumerate(found.steps):
                made = [row > 0 and part not in found.steps[row - 1] for part in parts]
                shades = [theme.first if new else theme.faint for new in made]
                draw_boxes(axes, parts, -row, shades, unit=1.6)
                note = (
                    f"merge {found.ranks[row - 1]:,} of {len(loaded.tokenizer.merges):,}" if row else "bytes"
                )
                axes.text(1.6 * len(word) + 0.8, -row, note, va="center", fontsize=8, color=theme.faint)
            axes.set(xlim=(-0.2, 30), ylim=(0.5 - n_rows, 0.5))
            axes.axis("off")


def draw_boxes(
    axes: mpl_axes.Axes, parts: Sequence[str], y: float, shades: Sequence[str], unit: float = 1.0
) -> list[float]:
    """Draw tokens in boxes of their numbers of characters, side by side; returns the middle of each."""
    left, middles = 0.0, []
    for part, shade in zip(parts, shades, strict=True):
        width = unit * len(part)
        box = {"facecolor": colors.to_rgba(shade, 0.2), "edgecolor": shade, "linewidth": 0.8}
        axes.add_patch(patches.Rectangle((left + 0.06, y - 0.4), width - 0.12, 0.8, **box))
        middles.append(left + width / 2)
        axes.text(middles[-1], y - 0.02, visible(part), ha="center", va="center", family="monospace", size=9)
        left += width
    return middles


# --------------------------------------------------------------------------------------------------
# Attention

CODE = "def scale(width, factor):\n    return width *"
HEADS = ((1, 2), (3, 2))
"""Layer and head."""


def draw_attention(loaded: inspection.LoadedModel, theme: Theme) -> None:
    """The causal mask, and the attention weights of two heads."""
    ids = loaded.encode(CODE)
    tokens, n = [visible(loaded.show(id)) for id in ids], len(ids)
    panels = [("the causal mask", F.causal_mask(n, n).float().numpy(), theme.faint)]
    shape = loaded.lm.config
    for (layer, head), color in zip(HEADS, (theme.first, theme.second), strict=True):
        layer, head = min(layer, shape.n_layers - 1), min(head, shape.n_heads - 1)
        (rows,) = inspection.attention(loaded, ids, layer, head).weights
        weights = np.array([row + [0.0] * (n - len(row)) for row in rows])
        panels.append((f"layer {layer}, head {head}", weights, color))
    with drawn("attention", theme, height=3.35) as canvas:
        for number, (title, weights, color) in enumerate(panels):
            axes = canvas.add_axes((0.105 + 0.305 * number, 0.02, 0.27, 0.725))
            axes.imshow(weights, cmap=theme.shades(color), vmin=0, vmax=1, aspect="auto")
            axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", pad=6)
            axes.xaxis.set_ticks_position("top")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_ticks(range(n), tokens if axis is axes.xaxis or not number else [""] * n)
            style = {"length": 0, "labelsize": 7, "labelfontfamily": "monospace", "labelcolor": theme.text}
            axes.tick_params(**style)
            axes.tick_params(axis="x", rotation=90)
            axes.set_xticks(np.arange(n + 1) - 0.5, minor=True)
            axes.set_yticks(np.arange(n + 1) - 0.5, minor=True)
            axes.grid(which="minor", color=theme.faint, alpha=0.25, linewidth=0.5)
            axes.tick_params(which="minor", length=0)
            axes.spines[:].set_color(theme.faint)


# --------------------------------------------------------------------------------------------------
# Positions

PAIRS, POSITIONS, DISTANCES = (0, 2, 4), 10, 120


def draw_rope(shape: config.ModelConfig, theme: Theme) -> None:
    """Three pairs of features at ten positions, and a score by distance at two positions."""
    tables = F.rope_tables(shape.d_head, 2 * DISTANCES, shape.rope_theta)
    pointing = torch.tensor([1.0, 0.0]).repeat(shape.d_head // 2)
    turned = F.apply_rope(pointing.expand(2 * DISTANCES, -1), *tables)
    rotated = F.apply_rope(torch.ones(2 * DISTANCES, shape.d_head), *tables)
    with drawn("rope", theme, height=2.75) as canvas:
        canvas.text(0.015, 0.91, "the vector (1, 0) at positions 0 to 9", size=10.5, weight="bold")
        for number, pair in enumerate(PAIRS):
            axes = canvas.add_axes((0.005 + 0.205 * number, 0.02, 0.2, 0.7))
            draw_rotation(axes, turned[:POSITIONS, 2 * pair : 2 * pair + 2].tolist(), theme)
            angle = shape.rope_theta ** (-2 * pair / shape.d_head)
            axes.set_title(f"pair {pair}: {angle:.2g} rad a position", fontsize=8.5, color=theme.text)
        axes = dressed(canvas, (0.665, 0.185, 0.325, 0.665), "query times key, by distance")
        for start, color, style, width in ((0, theme.second, "-", 5), (100, theme.first, "--", 1.4)):
            scores = rotated[start : start + DISTANCES] @ rotated[start] / shape.d_head
            shade = colors.to_rgba(color, 0.5 if width > 2 else 1)
            axes.plot(scores.numpy(), style, color=shade, lw=width, label=f"key at position {start}")
        axes.set_xlabel("positions between query and key")
        axes.legend(frameon=False, fontsize=8.5)


def draw_rotation(axes: mpl_axes.Axes, points: list[list[float]], theme: Theme) -> None:
    """Draw vectors of length 1 in a circle, later ones darker, with their numbers."""
    axes.add_patch(patches.Circle((0, 0), 1, fill=False, edgecolor=theme.faint, linewidth=0.8))
    is_crowded = math.dist(points[0], points[1]) < 0.2
    for number, (x, y) in enumerate(points):
        depth = 0.25 + 0.75 * number / (len(points) - 1)
        axes.plot([0, x], [0, y], color=theme.first, alpha=depth, linewidth=1.2)
        axes.plot(x, y, "o", color=theme.first, alpha=depth, markersize=4)
        if not is_crowded or number in (0, len(points) - 1):
            axes.text(1.2 * x, 1.2 * y, str(number), ha="center", va="center", fontsize=7.5)
    axes.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal")
    axes.axis("off")


# --------------------------------------------------------------------------------------------------
# Training


def draw_schedule(theme: Theme) -> None:
    """Three schedules of the learning rate."""
    plain, default = config.TrainConfig(), presets.load("tiny").train
    wsd = config.TrainConfig(schedule="wsd")
    shown = (
        ("cosine", plain, theme.first, "-", (0.53, 0.64)),
        ("wsd: constant, then a line", wsd, theme.second, "-", (0.47, 1.03)),
        ("the default run: a line to 0", default, theme.third, "--", (0.13, 0.5)),
    )
    with drawn("schedule", theme, height=2.9) as canvas:
        axes = dressed(canvas, (0.055, 0.17, 0.905, 0.7), "learning rate, as a share of the peak")
        for label, options, color, style, at in shown:
            steps = range(options.steps + 1)
            rates = [trainer.learning_rate(step, options) / options.lr for step in steps]
            axes.plot(np.array(steps) / options.steps, rates, style, color=color, linewidth=2)
            axes.text(*at, label, color=color, fontsize=9.5)
        axes.set_xlabel("share of the steps")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set(xlim=(0, 1), ylim=(0, 1.12))


def draw_loss(record: run_data.Record, baselines: dict[str, float], theme: Theme) -> None:
    """The losses of a run by step, and what a model without knowledge and one without context reach."""
    levels = {
        "uniform guess, ln(vocabulary)": math.log(record.options["model.vocab_size"]),
        "unigram entropy: token frequencies, no context": baselines["unigram entropy"],
    }
    with drawn("loss", theme, height=3.3) as canvas:
        axes = dressed(canvas, (0.06, 0.155, 0.92, 0.74), "loss of the default run, nats per token")
        steps, losses = record.curve("train_loss")
        # a mean over a range of steps would hide the steep beginning
        smooth = np.where(steps < 100, losses, figures.smoothed(losses, 7))
        axes.plot(steps, losses, color=theme.first, linewidth=1, alpha=0.4)
        axes.plot(
            steps, smooth, color=theme.first, linewidth=1.8, label="training, smoothed from step 100 on"
        )
        axes.plot(*record.curve("val_loss"), "o-", color=theme.second, ms=4.5, lw=1.2, label="validation")
        for label, level in levels.items():
            axes.axhline(level, color=theme.faint, linestyle=(0, (4, 3)), linewidth=1.1)
            axes.text(steps[-1], level + 0.1, f"{label}: {level:.2f}", color=theme.faint, ha="right", size=9)
        axes.set(xscale="log", xlabel="step", xlim=(1, 1.05 * steps[-1]), ylim=(2.4, 8.3))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.legend(frameon=False, loc="lower left", fontsize=9)


# --------------------------------------------------------------------------------------------------
# Sampling

PROMPT, SHOWN = "    if value is", 8
SAMPLING: tuple[tuple[str, dict[str, float]], ...] = (
    ("temperature 0.5", {"temperature": 0.5}),
    ("temperature 1", {"temperature": 1.0}),
    ("temperature 1.5", {"temperature": 1.5}),
    ("temperature 1, top_p 0.8", {"temperature": 1.0, "top_p": 0.8}),
)


@torch.no_grad()
def draw_sampling(loaded: inspection.LoadedModel, theme: Theme) -> None:
    """The likeliest next tokens of a prompt, by temperature and with top-p."""
    logits = loaded.lm(loaded.tensor(loaded.encode(PROMPT))[None])[0, -1]
    shown = logits.topk(SHOWN).indices
    labels = [visible(loaded.show(id)) for id in shown.tolist()] + ["all others"]
    with drawn("sampling", theme, height=2.9) as canvas:
        title = f"next-token probabilities after {PROMPT.strip()!r}"
        canvas.text(0.015, 0.92, title, fontsize=10.5, weight="bold")
        for number, (name, options) in enumerate(SAMPLING):
            probabilities = generate.next_token_probabilities(logits, **options)
            values = probabilities[shown].tolist()
            values.append(1 - sum(values))
            axes = canvas.add_axes((0.105 + 0.225 * number, 0.04, 0.2, 0.76))
            shades = [theme.first] * SHOWN + [theme.faint]
            axes.barh(range(SHOWN + 1), values, color=shades, height=0.7)
            for row, value in enumerate(values):
                note = f"{value:.1%}" if value > 1e-6 else "0"
                color = theme.text if value > 1e-6 else theme.faint
                axes.text(max(value, 0) + 0.015, row, note, va="center", fontsize=8, color=color)
            axes.set_title(name, loc="left", fontsize=9.5, color=theme.text)
            axes.set_yticks(range(SHOWN + 1), labels if not number else [""] * (SHOWN + 1))
            axes.tick_params(length=0, labelfontfamily="monospace", labelcolor=theme.text)
            axes.set(xlim=(0, 1.02), ylim=(SHOWN + 0.6, -0.6), xticks=[])
            axes.spines[["top", "right", "bottom"]].set_visible(False)


def main() -> None:
    """Draw all figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a finished default run: its folder, or newest")
    folder = run_data.find(parser.parse_args().run)
    FOLDER.mkdir(exist_ok=True)
    loaded = inspection.LoadedModel(*engine.load_run(folder))
    loaded.lm.eval()
    baselines = run_dir.read_recorded(folder)["baselines"]
    for theme in THEMES:
        draw_merges(loaded, theme)
        draw_attention(loaded, theme)
        draw_rope(loaded.lm.config, theme)
        draw_schedule(theme)
        draw_loss(run_data.read(str(folder)), baselines, theme)
        draw_sampling(loaded, theme)


if __name__ == "__main__":
    main()
