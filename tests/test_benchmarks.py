"""The benchmarks of training run. Alone: `uv run pytest -m "slow or not slow" tests/test_benchmarks.py`."""

import argparse
import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llm_basics import swap
from llm_basics.cli import parse
from llm_basics.fast import generate as fast_generate
from llm_basics.inference import engine
from llm_basics.runs import process

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


def test_encoding_is_left_out_without_gpt2(monkeypatch, capsys, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module("tokenizer")

    def fails(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", fails)
    text = tmp_path / "text.txt"
    text.write_text("a few words")
    monkeypatch.setattr(sys, "argv", ["tokenizer.py", "--data", str(text), "--only", "encode"])
    benchmark.main()
    _, line = capsys.readouterr().out.splitlines()
    assert line.startswith("no rows of encoding: ") and "(ConnectionError)" in line


def test_the_lab_is_measured():
    pytest.importorskip("fastapi")
    printed, rows = said("lab.py", "--points", "3000", "--runs", "2", "--updates", "2")
    assert [row[0] for row in rows if "lines" in row[0] or "listed" in row[0]] == [
        "first buckets of 3,000 lines",
        *("until all lines are read", "2 runs listed, first", "2 runs listed, again"),
    ]
    assert re.search(r"update latency over 2 lines: median \d\.\d\d s", printed)


@pytest.fixture
def decode(monkeypatch):
    """`benchmarks/decode.py` as a module; pieces that it replaces are restored afterwards."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(process, "tune_allocator", lambda: None)
    monkeypatch.setattr(fast_generate, "DRAFTS", fast_generate.DRAFTS)
    return importlib.import_module("decode")


def test_a_run_writes_the_same_with_and_without_drafts(decode, untrained_run, monkeypatch):
    monkeypatch.setattr(decode, "MIN_SECONDS", 1e-9)
    options = argparse.Namespace(run=[str(untrained_run("run"))], device="cpu", tokens=5, prompt="abcd")
    found = {}
    for name in ("reference", "ours", "ours, drafts", "ours, no drafts", "ours, 8 texts"):
        with swap.restored():
            found[name] = decode.measured(name, options)
    assert len({result["text"] for result in found.values()}) == 1
    assert all(result["per_second"] > 0 for result in found.values())
    lm, _ = engine.load_run(options.run[0])
    assert decode.measured("read", options)["bytes"] == 4 * lm.config.n_matmul_params
    options.tokens = 1000
    with pytest.raises(ValueError, match="--tokens must be at most .* after the prompt, got 1000"):
        decode.measured("reference", options)


def test_models_are_trained_once(decode, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    commands = []
    monkeypatch.setattr(decode.subprocess, "run", lambda command, **_: commands.append(command))
    folder = decode.trained("4x128")
    assert "training runs/decode-4x128 for 600 steps" in capsys.readouterr().out
    options = parse.train_options(commands[0][3:])
    assert (options.run_dir, options.train.steps, options.model.d_model) == (str(folder), 600, 128)
    path = decode.run_dir.checkpoint_path(folder, 200)
    path.parent.mkdir(parents=True)
    path.touch()
    decode.trained("4x128")
    assert commands[1][-2:] == ["--resume", str(folder)]
    decode.run_dir.checkpoint_path(folder, 600).touch()
    assert decode.trained("4x128") == folder and len(commands) == 2


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
        found = dict(zip(rows[0], row, strict=True))
        assert float(row[2].split()[0]) > 0 and re.fullmatch(r"\d+\.\d%", found["utilization"])


@pytest.mark.slow
def test_recipes_are_compared(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("So shaken as we are, so wan with care, find we a time for frighted peace. " * 200)
    few = "--rounds 1 --steps plain=20 fast=20 --eval-every 10 --eval-windows 24 --target 5.4".split()
    _, rows = said("time_to_loss.py", "--data", str(text), "--recipes", "plain", "fast", *few)
    assert [row[:2] for row in rows[1:]] == [["plain", "20"], ["fast", "20"]]
    for row in rows[1:]:
        assert 0 < float(row[2].split()[0]) < math.inf
