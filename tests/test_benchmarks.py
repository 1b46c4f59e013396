"""The benchmarks of training run. Alone: `uv run pytest -m "slow or not slow" tests/test_benchmarks.py`."""

import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def time_to_loss(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("time_to_loss")


def said(*command):
    """What a benchmark prints: its lines that are rows of a table, cut into cells."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=BENCHMARKS,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    return done.stdout, rows


def test_seconds_of_training_are_those_between_lines(time_to_loss):
    lines = [
        {"step": 1, "tokens_per_second": 10},
        {"step": 2, "val_loss": 3.0},
        {"step": 3, "tokens_per_second": 200},
        {"step": 4, "tokens_per_second": 100},
    ]
    steps, seconds, compiling = time_to_loss.training_seconds(lines, n_tokens=100)
    assert steps == [0, 1, 3, 4]
    assert seconds == [0, 0.75, 1.75, 2.75] and compiling == 9.25


def test_a_target_is_reached_between_evaluations_or_never(time_to_loss):
    times, losses = [10.0, 20.0, 30.0], [3.0, 2.5, 1.5]
    assert time_to_loss.time_to(2.0, times, losses) == (25.0, 30.0)
    assert time_to_loss.time_to(2.5, times, losses) == (20.0, 20.0)
    assert time_to_loss.time_to(3.5, times, losses) == (10.0, 10.0)
    assert time_to_loss.time_to(1.0, times, losses) == (math.inf, math.inf)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["cpu", "llama"])
def test_training_is_compared_with_transformers(shape):
    pytest.importorskip("transformers")
    contenders = ["reference", "fast", "transformers eager"]
    few = "--rounds 1 --steps 2 --warmup 1 --batch-size 2 --device cpu --threads 1".split()
    text, rows = said("train.py", "--shape", shape, *few, "--only", *contenders)
    assert "first losses: from 5." in text
    assert [row[0] for row in rows[1:]] == contenders
    for row in rows[1:]:
        assert float(row[2].split()[0]) > 0 and re.fullmatch(r"\d+\.\d%", row[5])


@pytest.mark.slow
def test_recipes_are_compared(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("So shaken as we are, so wan with care, find we a time for frighted peace. " * 200)
    few = "--rounds 1 --steps plain=20 fast=20 --eval-every 10 --eval-windows 24 --target 5.4".split()
    _, rows = said("time_to_loss.py", "--data", str(text), "--recipes", "plain", "fast", *few)
    assert [row[:2] for row in rows[1:]] == [["plain", "20"], ["fast", "20"]]
    for row in rows[1:]:
        assert 0 < float(row[2].split()[0]) < math.inf
