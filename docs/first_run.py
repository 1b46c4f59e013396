"""Draws docs/first_run.png, light and dark: the loss of the default run, and what the model writes.

uv run python docs/first_run.py RUN 0=FILE 271=FILE 1150=FILE

RUN is a finished default run. FILE is what a checkpoint writes, prompt and continuation:

uv run python -m llm_basics.generate RUN --prompt "    def read(self" --max_new_tokens 60 --fast off

that of step 0 by a run with --train.steps 1 --train.warmup_steps 0 --train.lr 1e-9.
"""

import json
import sys
from pathlib import Path

from matplotlib import pyplot as plt

HERE = Path(__file__).parent
MOST_LINES, MOST_LETTERS = 6, 70

# background, text, faint, training, validation: the colors of the lab
THEMES = {
    "first_run.png": ("#fffefa", "#1f1e1a", "#8a857a", "#c2410c", "#1e5a9c"),
    "first_run-dark.png": ("#14130f", "#efece4", "#8f8a7e", "#f08a5d", "#7fb2e5"),
}


def excerpt(text: str) -> str:
    """The first lines of a text, wrapped to the width of a panel; control characters as dots."""
    lines = []
    for line in filter(str.strip, text.strip("\n").splitlines()):
        shown = "".join(c if c.isprintable() else "." for c in line)
        lines += [shown[start : start + MOST_LETTERS] for start in range(0, len(shown), MOST_LETTERS)]
    return "\n".join(lines[:MOST_LINES])


def draw(run: Path, samples: dict[int, str], name: str) -> None:
    """Write one picture."""
    background, text, faint, training, validation = THEMES[name]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [(line["step"], line["train_loss"]) for line in lines if "train_loss" in line]
    evaluations = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    baseline = json.loads((run / "config.json").read_text(encoding="utf-8"))["baselines"]["unigram entropy"]
    figure = plt.figure(figsize=(10, 4), dpi=160, facecolor=background)
    axes = figure.add_axes((0.055, 0.13, 0.40, 0.77), facecolor=background)
    axes.axhline(baseline, color=faint, linestyle="--", linewidth=1)
    axes.text(
        1150,
        baseline + 0.08,
        "unigram entropy, which counting tokens reaches",
        color=faint,
        ha="right",
        fontsize=8,
    )
    axes.plot(*zip(*steps, strict=True), color=training, linewidth=1.2, label="training")
    axes.plot(*zip(*evaluations, strict=True), color=validation, marker="o", markersize=3, label="validation")
    axes.set_title("loss, nats per token", color=text, fontsize=10, loc="left")
    axes.set_xlabel("step", color=text, fontsize=9)
    axes.tick_params(colors=faint, labelsize=8)
    axes.legend(frameon=False, labelcolor=text, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(faint)
    for place, (step, sample) in enumerate(samples.items()):
        top = 0.93 - 0.32 * place
        figure.text(0.49, top, f"step {step:,} writes", color=training, fontsize=9, va="top", weight="bold")
        options = {"family": "monospace", "fontsize": 8, "va": "top", "linespacing": 1.25}
        figure.text(0.49, top - 0.055, excerpt(sample), color=text, parse_math=False, **options)
    figure.savefig(HERE / name, facecolor=background)
    plt.close(figure)


def main() -> None:
    """Draw both pictures."""
    run, *given = sys.argv[1:]
    named = [argument.partition("=") for argument in given]
    samples = {int(step): Path(file).read_text(encoding="utf-8") for step, _, file in named}
    for name in THEMES:
        draw(Path(run), samples, name)


if __name__ == "__main__":
    main()
