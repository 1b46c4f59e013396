"""The normal band of the training loss. Alone: uv run pytest tests/test_normal_loss.py"""

import dataclasses
import json
import math
import random

import pytest

from llm_basics.analysis import normal_loss
from llm_basics.cli import nested
from llm_basics.core import presets


def options(**changes):
    """The options of a default run, as config.json has them."""
    chosen = dataclasses.asdict(presets.load("tiny")) | {"data": "stdlib"}
    return json.loads(json.dumps(nested.flat(chosen))) | changes


def test_a_band_holds_its_share_of_the_losses():
    rng = random.Random(0)
    runs = [[5 - step / 200 + rng.gauss(0, 0.1) for step in range(400)] for _ in range(20)]
    found = normal_loss.of_losses(runs)
    assert found["steps"][:3] == [1, 2, 3] and found["steps"][-1] == 400
    inside = [
        low <= run[step - 1] <= high
        for step, low, high in zip(found["steps"], found["low"], found["high"], strict=True)
        for run in runs
    ]
    assert 0.92 < sum(inside) / len(inside) < 0.98
    assert found["median"][-1] == pytest.approx(3.0, abs=0.1)


def test_runs_of_different_lengths_count_up_to_the_shortest():
    assert normal_loss.of_losses([[3.0, 2.0], [3.0, 2.0, 1.0]])["steps"] == [1, 2]


def test_the_default_run_has_a_measured_band():
    band = normal_loss.of_run(options())
    assert band is not None and len(band.seeds) >= 5 and band.steps[-1] >= 300
    # a uniform guess at first, and less at the end
    assert abs(band.median[0] - math.log(2048)) < 0.1 and band.high[-1] < 5
    for low, median, high in zip(band.low, band.median, band.high, strict=True):
        assert low <= median <= high


@pytest.mark.parametrize(
    "free", [{"train.seed": 7}, {"train.log_every": 1}, {"train.device": "cpu"}, {"run_dir": "x"}]
)
def test_options_that_change_no_loss_leave_the_band(free):
    assert normal_loss.of_run(options(**free)) is not None


@pytest.mark.parametrize(
    "other",
    [
        {"train.lr": 0.01},
        {"data": "book.txt"},
        {"model.n_layers": 5},
        {"train.steps": 500},
        {"tokenizer": "bytes"},
    ],
)
def test_a_run_with_other_options_has_none(other):
    assert normal_loss.of_run(options(**other)) is None
    assert normal_loss.of_run({}) is None
