"""Run directories as data. Alone: uv run pytest tests/test_run_data.py"""

import json
import math

import numpy as np
import pytest
import recorded

from llm_basics.analysis import run_data
from llm_basics.runs import run_dir


def test_a_run_is_found_by_folder_by_name_and_as_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = recorded.record(run_dir.RUNS / "first", [3.0, 2.0])
    for name in (str(folder), "first", "newest"):
        assert run_data.read(name).name == "first"
    with pytest.raises(ValueError, match="got frist; the closest is first"):
        run_data.read("frist")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a run must be a folder with config.json"):
        run_data.read("empty")


def test_runs_of_the_same_name_are_named_by_folder(tmp_path):
    names = [str(recorded.record(tmp_path / outer / "run", [3.0])) for outer in ("a", "b")]
    other = str(recorded.record(tmp_path / "c", [3.0]))
    assert [record.name for record in run_data.read_all([*names, other])] == [*names, "c"]


def test_axes_are_steps_tokens_and_seconds(tmp_path):
    """16 x 2 windows of 64 tokens a step; at 1,000 tokens per second, 20.48 s for ten steps."""
    record = run_data.read(str(recorded.record(tmp_path, [3.0, 2.0, 1.0], train__grad_accumulation_steps=2)))
    assert record.tokens_per_step == 2048
    for x, unit in (("step", 1.0), ("tokens", 2048.0), ("time", 2.048)):
        at, losses = record.curve("train_loss", x)
        np.testing.assert_allclose(at, np.array([10, 20, 30]) * unit)
        np.testing.assert_allclose(losses, [3, 2, 1])
    np.testing.assert_allclose(record.position(np.array([15.0]), "time"), 30.72)


def test_time_adds_up_what_each_stretch_took(tmp_path):
    output = run_dir.RunDir(recorded.record(tmp_path, []))
    for step, speed in ((1, 100.0), (11, 1000.0), (21, 2000.0)):
        output.metrics(step, train_loss=1.0, tokens_per_second=speed)
    output.metrics(21, val_loss=1.0)
    record = run_data.read(str(tmp_path))
    at, _ = record.curve("train_loss", "time")
    np.testing.assert_allclose(at, np.cumsum([1024 / 100, 10240 / 1000, 10240 / 2000]))
    assert record.curve("val_loss", "time")[0][-1] == pytest.approx(at[-1])


def test_batches_that_differ_in_size_count_as_what_they_were(tmp_path):
    """Steps 1 to 10 took 0.1 s each for 50 tokens, 11 to 20 took 0.2 s each for 200."""
    output = run_dir.RunDir(recorded.record(tmp_path, []))
    for step, seconds, speed in ((10, 0.1, 500.0), (20, 0.2, 1000.0)):
        output.metrics(step, train_loss=1.0, step_seconds=seconds, tokens_per_second=speed)
    output.close()
    record = run_data.read(str(tmp_path))
    np.testing.assert_allclose(record.curve("train_loss", "time")[0], [1.0, 3.0])
    np.testing.assert_allclose(record.curve("train_loss", "tokens")[0], [500.0, 2500.0])


def test_without_a_speed_there_is_no_time(tmp_path):
    run_dir.RunDir(recorded.record(tmp_path, [])).metrics(1, train_loss=1.0)
    with pytest.raises(ValueError, match="x=time needs tokens_per_second"):
        run_data.read(str(tmp_path)).curve("train_loss", "time")


def test_summary(tmp_path):
    output = run_dir.RunDir(recorded.record(tmp_path, [3.0, 2.0, 1.9]))
    output.metrics(20, val_loss=1.25)
    found = run_data.read(str(tmp_path)).summary()
    assert (found["val_loss"], found["best_val_loss"], found["best_step"]) == (2.4, 1.25, 20)
    assert (found["bits_per_byte"], found["accuracy"], found["train_loss"]) == (2.5, 0.25, 1.9)
    assert (found["steps"], found["tokens"]) == (30, 30 * 1024)
    assert found["seconds"] == pytest.approx(30.72) and found["tokens_per_second"] == pytest.approx(1000)


def test_what_is_not_finite_is_told_and_never_the_best(tmp_path):
    output = run_dir.RunDir(recorded.record(tmp_path, [3.0, math.nan, math.inf]))
    output.metrics(40, val_loss=math.nan)
    record = run_data.read(str(tmp_path))
    assert np.isnan(record.curve("train_loss")[1]).tolist() == [False, True, True]
    found = record.summary()
    assert math.isnan(found["val_loss"]) and "best_val_loss" not in found


def test_a_run_that_measured_nothing_and_one_with_a_torn_line(tmp_path):
    record = run_data.read(str(recorded.record(tmp_path / "none", [])))
    assert record.summary()["steps"] == 0 and "val_loss" not in record.summary()
    folder = recorded.record(tmp_path / "torn", [3.0, 2.0], samples=[("a", "b")])
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(folder / name, "a") as file:
            file.write('{"step": 99, "tr')
    record = run_data.read(str(folder))
    assert record.last_step == 20 and record.last_sample() == "prompt 'a':\nb"


def test_a_config_of_another_program_costs_numbers_and_no_more(tmp_path):
    folder = recorded.record(tmp_path, [3.0])
    (folder / "config.json").write_text(json.dumps({"lr": 1, "model": {"depth": 3}}))
    found = run_data.read(str(folder)).summary()
    assert found["val_loss"] == 3.5 and not {"parameters", "tokens", "seconds"} & set(found)
