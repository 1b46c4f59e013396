"""The normal band of the training loss: the range of most runs of a preset, by step.

The bands in normal_loss.json were measured by benchmarks/normal_loss.py, on several seeds each.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_basics.cli import nested
from llm_basics.core import files, presets

BANDS = Path(__file__).with_suffix(".json")

# share of the losses within the band
SHARE = 0.95

# losses of nearby steps are included for each step, since one per seed is too few to estimate the spread
WINDOW = 0.06

# steps of a band: every step at first, then increasingly sparse
GROWTH = 1.04

# options that do not affect the losses of steps, or only as another seed does
_FREE = "seed sample_every sample_tokens sample_prompt checkpoint_every keep_checkpoints log_every eval_every"
FREE = {f"train.{name}" for name in f"{_FREE} eval_batches on_save_error on_spike on_nonfinite".split()}
FREE |= {"train.device", "train.compile"}


@dataclass(frozen=True)
class Band:
    """`low` and `high` contain a fraction SHARE of the losses at each of `steps`."""

    preset: str
    data: str
    seeds: list[int]
    python: str
    """Version of Python, whose standard library is the text of stdlib."""
    steps: list[int]
    low: list[float]
    median: list[float]
    high: list[float]


def of_losses(losses: Sequence[Sequence[float]]) -> dict[str, list[Any]]:
    """Steps, low, median and high of the losses of several runs from step 1.

    >>> of_losses([[4, 3, 2], [5, 4, 3]])["median"]
    [4.5, 3.5, 2.5]
    """
    n_steps = min(map(len, losses))
    each = np.array([run[:n_steps] for run in losses], dtype=float)
    steps = [1]
    while steps[-1] < n_steps:
        steps.append(min(n_steps, max(steps[-1] + 1, round(steps[-1] * GROWTH))))
    found: dict[str, list[Any]] = {"steps": steps, "low": [], "median": [], "high": []}
    for step in steps:
        half = int(step * WINDOW)
        near = each[:, max(0, step - 1 - half) : step + half]
        values = np.quantile(near, [(1 - SHARE) / 2, 0.5, (1 + SHARE) / 2])
        for name, value in zip(("low", "median", "high"), values.tolist(), strict=True):
            found[name].append(round(value, 4))
    return found


def bands() -> list[Band]:
    """The measured bands."""
    return [Band(**each) for each in files.read_json(BANDS)]


def of_run(options: Mapping[str, Any]) -> Band | None:
    """The band for a run by its options (`train.lr`): that of runs with the same model, training and data."""
    return next((band for band in bands() if is_of(band, options)), None)


def is_of(band: Band, options: Mapping[str, Any]) -> bool:
    """Whether a run has the options of the band's runs, except for those that do not affect losses."""
    expected = nested.flat(dataclasses.asdict(presets.load(band.preset)))
    parts = {name for name in expected if name.startswith(("model.", "train."))} - FREE
    # a model's vocab_size is that of its tokenizer, which may have fewer tokens than requested
    parts -= {"model.vocab_size"}
    names = (*sorted(parts), "tokenizer", "val_fraction", "max_tokens")
    return options.get("data") == band.data and all(
        name in options and _plain(options[name]) == _plain(expected[name]) for name in names
    )


def _plain(value: Any) -> Any:
    """`value` with tuples converted to lists, as by JSON."""
    return list(value) if isinstance(value, tuple) else value
