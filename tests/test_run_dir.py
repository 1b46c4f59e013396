"""The run directory and the figure. Alone: uv run pytest tests/test_run_dir.py"""

import json
from pathlib import Path

import pytest

from llm_basics.analysis import figures
from llm_basics.core import files
from llm_basics.runs import loggers, run_dir, stopwatch


def test_metrics_are_flat_json_lines_and_nan_is_null(tmp_path):
    output = run_dir.RunDir(tmp_path)
    output.metrics(1, train_loss=2.5, lr=0.1)
    output.metrics(2, train_loss=float("nan"), lr=float("inf"))
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").open()]
    assert lines[0] == {"step": 1, "attempt": 1, "train_loss": 2.5, "lr": 0.1}
    assert lines[1] == {
        "step": 2,
        "attempt": 1,
        "train_loss": None,
        "lr": None,
        "nonfinite": ["train_loss", "lr"],
    }


def test_after_a_resume_each_step_is_read_once_and_the_last_attempt_counts(tmp_path):
    for resumed, steps in [(0, [1, 2, 3, 4, 5]), (3, [4]), (2, [3])]:
        output = run_dir.RunDir(tmp_path)
        if resumed:
            output.resumed(resumed)
        for step in steps:
            output.metrics(step, train_loss=step + output.attempt / 10)
        output.metrics(steps[-1], val_loss=9.0)
        output.close()
    read = run_dir.read_metrics(tmp_path)
    assert [(m["step"], m["attempt"], m.get("train_loss"), m.get("val_loss")) for m in read] == [
        (1, 1, 1.1, None),
        (2, 1, 2.1, None),
        (3, 3, 3.3, None),
        (3, 3, None, 9.0),
    ]


def test_samples_and_messages_are_kept(tmp_path, capsys):
    output = run_dir.RunDir(tmp_path, [loggers.ConsoleLogger(total_steps=5)])
    output.sample(3, "def ", "f():\n    pass")
    output.log("done")
    assert json.loads((tmp_path / "samples.jsonl").read_text()) == {
        "step": 3,
        "attempt": 1,
        "prompt": "def ",
        "text": "f():\n    pass",
    }
    shown = "sample after step 3, prompt 'def ':\n    f():\n        pass\ndone\n"
    assert (tmp_path / "log.txt").read_text() == shown
    assert shown in capsys.readouterr().out


def test_folders_get_new_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {run_dir.make_folder("tiny") for _ in range(4)}
    assert len(folders) == 4 and all(folder.is_dir() and "-tiny" in folder.name for folder in folders)


def test_a_torn_last_line_loses_at_most_itself(tmp_path, capsys):
    run_dir.RunDir(tmp_path).metrics(1, train_loss=2.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "tr')
    assert [m["step"] for m in run_dir.read_metrics(tmp_path)] == [1]
    run_dir.RunDir(tmp_path).metrics(3, train_loss=1.0)
    assert [m["step"] for m in run_dir.read_metrics(tmp_path)] == [1, 3]
    assert capsys.readouterr().err == ""


def test_a_broken_line_elsewhere_is_left_out_with_one_warning(tmp_path, capsys):
    output = run_dir.RunDir(tmp_path)
    for step in (1, 2, 3):
        output.metrics(step, train_loss=2.0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"step": 2', "\n{step: 2"))
    for _ in range(2):
        assert [m["step"] for m in run_dir.read_metrics(tmp_path)] == [1, 3]
    assert capsys.readouterr().err == f"warning: {path}:3 is not JSON and is skipped\n"


def test_a_log_that_cannot_be_written_is_a_warning_if_tolerant(tmp_path, capsys):
    output = run_dir.RunDir(tmp_path, [loggers.ConsoleLogger(total_steps=5)], tolerant=True)
    output.metrics(1, train_loss=2.0)
    (tmp_path / "metrics.jsonl").rename(tmp_path / "kept")
    (tmp_path / "metrics.jsonl").mkdir()
    output.metrics(2, train_loss=1.0)
    assert "warning" in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").rmdir()
    (tmp_path / "kept").rename(tmp_path / "metrics.jsonl")
    output.metrics(3, train_loss=0.5)
    assert [m["step"] for m in run_dir.read_metrics(tmp_path)] == [1, 3]
    output.tolerant = False
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(OSError):
        output.log("lost")


def test_a_line_torn_by_a_full_disk_is_ended_by_the_next(tmp_path, monkeypatch):
    output = run_dir.RunDir(tmp_path, tolerant=True)
    output.metrics(1, train_loss=2.0)

    def full(path, mode):
        path.write_text(path.read_text() + '{"step": 2, "tr')
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "open_output", full)
        output.metrics(2, train_loss=1.0)
    output.metrics(3, train_loss=0.5)
    assert [m["step"] for m in run_dir.read_metrics(tmp_path)] == [1, 3]


def test_newest_folder_is_the_last_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="train one first"):
        run_dir.newest_folder()
    for name in ("b", "a", "without checkpoint"):
        output = run_dir.RunDir(run_dir.RUNS / name)
        output.write_config({"name": name})
        if len(name) == 1:
            output.checkpoint_path(1).touch()
        output.close()
    for name in ("b", "without checkpoint"):
        run_dir.RunDir(run_dir.RUNS / name).metrics(1, train_loss=1.0)
    assert run_dir.newest_folder().name == run_dir.resolve("newest").name == "b"
    assert run_dir.resolve("runs/a") == Path("runs/a")
    assert run_dir.read_config(run_dir.RUNS / "a") == {"name": "a"}


def test_checkpoints_are_listed_newest_first(tmp_path):
    output = run_dir.RunDir(tmp_path)
    for step in (9, 10, 100_000_000):
        output.checkpoint_path(step).touch()
    assert run_dir.checkpoints(tmp_path) == [output.checkpoint_path(step) for step in (100_000_000, 10, 9)]


def test_stopwatch_leaves_out_pauses(monkeypatch):
    now = iter([0.0, 1.0, 5.0, 6.0, 7.0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(now))
    watch = stopwatch.Stopwatch()
    with watch.paused():
        pass
    assert watch.lap() == 2.0
    assert watch.total() == 7.0


@pytest.mark.whole_run
def test_loss_curve_is_drawn(tmp_path):
    output = run_dir.RunDir(tmp_path)
    for step in range(1, 9):
        output.metrics(step, train_loss=5 / step if step != 3 else float("nan"))
    output.metrics(8, val_loss=1.0)
    path = figures.plot_loss(tmp_path, unigram_entropy=4.0)
    assert (
        path.name == "loss.png" and path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    )
