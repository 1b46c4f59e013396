"""The run directory, its followers, and the figure. Alone: uv run pytest tests/test_run.py"""

import json
import sys
import types

import pytest

from llm_basics import followers, plot, run


def test_metrics_are_flat_json_lines_and_nan_is_null(tmp_path):
    output = run.Run(tmp_path)
    output.metrics(1, train_loss=2.5, lr=0.1)
    output.metrics(2, train_loss=float("nan"), lr=float("inf"))
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").open()]
    assert lines[0] == {"step": 1, "train_loss": 2.5, "lr": 0.1}
    assert lines[1] == {"step": 2, "train_loss": None, "lr": None, "nonfinite": ["train_loss", "lr"]}


def test_after_a_resume_each_step_is_read_once_and_the_last_word_counts(tmp_path):
    output = run.Run(tmp_path)
    for step, loss in [(1, 3.0), (2, 2.0), (3, 1.0), (2, 2.5), (3, 1.5)]:
        output.metrics(step, train_loss=loss)
    output.metrics(3, val_loss=9.0)
    read = run.read_metrics(tmp_path)
    assert [(m["step"], m.get("train_loss"), m.get("val_loss")) for m in read] == [
        (1, 3.0, None),
        (2, 2.5, None),
        (3, 1.5, None),
        (3, None, 9.0),
    ]


def test_samples_and_messages_are_kept(tmp_path, capsys):
    output = run.Run(tmp_path, [followers.Terminal(total_steps=5)])
    output.sample(3, "def ", "f():\n    pass")
    output.say("done")
    assert json.loads((tmp_path / "samples.jsonl").read_text()) == {
        "step": 3,
        "prompt": "def ",
        "text": "f():\n    pass",
    }
    assert "    def f():\n        pass\ndone\n" in (tmp_path / "log.txt").read_text()
    assert "    def f():" in capsys.readouterr().out


def test_piped_output_is_one_greppable_line_a_measurement(tmp_path, capsys):
    output = run.Run(tmp_path, [followers.Terminal(total_steps=1000)])
    output.metrics(
        10, train_loss=3.14159, lr=3e-4, grad_norm=0.5, tokens_per_second=12345.6, eta_seconds=61.0
    )
    output.metrics(10, val_loss=3.5, perplexity=33.1, bits_per_byte=1.25, accuracy=0.0)
    assert capsys.readouterr().out.splitlines() == [
        "step=10/1000 train_loss=3.142 lr=0.0003 grad_norm=0.5 tokens_per_second=12346 eta_seconds=61",
        "step=10/1000 val_loss=3.5 perplexity=33.1 bits_per_byte=1.25 accuracy=0",
    ]


def test_terminal_shows_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    terminal = followers.Terminal(total_steps=4)
    terminal.metrics({"step": 2, "train_loss": 3.0, "lr": 0.1, "tokens_per_second": 5.0})
    terminal.message("[not] markup")
    terminal.close()
    out = capsys.readouterr().out
    assert "[not] markup" in out and "step 2/4" in out and "train_loss=3" in out


def test_long_work_shows_a_bar_on_a_terminal_and_nowhere_else(monkeypatch, capsys):
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setenv("TERM", "xterm")
        with followers.progress_bar() as report:
            report("reading", 1, 4)
            report("reading", 2, 4)
            report("merging", 1, 1)
        out = capsys.readouterr().out
        assert [word in out for word in ("reading", "50%", "merging", "100%")] == [terminal] * 4, out


def fake_wandb(monkeypatch, **functions):
    calls = []
    tracked = types.SimpleNamespace(
        log=lambda values: calls.append(values),
        finish=lambda: calls.append("finish"),
        define_metric=lambda *a, **k: None,
    )
    for name, function in functions.items():
        if name != "init":
            setattr(tracked, name, function)
    module = types.SimpleNamespace(
        login=lambda **options: False,
        Settings=lambda **options: None,
        init=functions.get("init", lambda **options: calls.append(options["mode"]) or tracked),
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return calls


def test_wandb_follows(tmp_path, monkeypatch):
    calls = fake_wandb(monkeypatch)
    output = run.Run(tmp_path, [followers.WandbFollower(tmp_path, {})])
    output.metrics(1, train_loss=2.0)
    output.close()
    assert calls == ["offline", {"step": 1, "train_loss": 2.0}, "finish"]


def fail(*_, **__):
    raise ConnectionError("no network")


@pytest.mark.parametrize("broken", ["init", "log", "finish", "missing"])
def test_wandb_cannot_stop_a_run(tmp_path, monkeypatch, capsys, broken):
    if broken == "missing":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        fake_wandb(monkeypatch, **{broken: fail})
    output = run.Run(tmp_path, [followers.WandbFollower(tmp_path, {})])
    for step in range(3):
        output.metrics(step, train_loss=2.0)
    output.close()
    assert len(run.read_metrics(tmp_path)) == 3
    assert capsys.readouterr().err.count("warning: wandb stopped following") == 1


def test_folders_get_new_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {run.make_folder("tiny") for _ in range(4)}
    assert len(folders) == 4 and all(folder.is_dir() and "-tiny" in folder.name for folder in folders)


def test_a_torn_last_line_loses_at_most_itself(tmp_path):
    run.Run(tmp_path).metrics(1, train_loss=2.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "tr')
    assert [m["step"] for m in run.read_metrics(tmp_path)] == [1]
    run.Run(tmp_path).metrics(3, train_loss=1.0)
    assert [m["step"] for m in run.read_metrics(tmp_path)] == [1, 3]


def test_newest_folder_is_the_last_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="train one first"):
        run.newest_folder()
    for name in ("b", "a", "without checkpoint"):
        output = run.Run(run.RUNS / name)
        output.write_config({"name": name})
        if len(name) == 1:
            output.checkpoint_path(1).touch()
    for name in ("b", "without checkpoint"):
        run.Run(run.RUNS / name).metrics(1, train_loss=1.0)
    assert run.newest_folder().name == "b"
    assert run.read_config(run.RUNS / "a") == {"name": "a"}


def test_checkpoints_are_listed_newest_first(tmp_path):
    output = run.Run(tmp_path)
    for step in (9, 10, 100_000_000):
        output.checkpoint_path(step).touch()
    assert run.checkpoints(tmp_path) == [output.checkpoint_path(step) for step in (100_000_000, 10, 9)]


def test_stopwatch_leaves_out_pauses(monkeypatch):
    now = iter([0.0, 1.0, 5.0, 6.0, 7.0])
    monkeypatch.setattr(run.time, "perf_counter", lambda: next(now))
    watch = run.Stopwatch()
    with watch.paused():
        pass
    assert watch.lap() == 2.0
    assert watch.total() == 7.0


def test_loss_curve_is_drawn(tmp_path):
    output = run.Run(tmp_path)
    for step in range(1, 9):
        output.metrics(step, train_loss=5 / step if step != 3 else float("nan"))
    output.metrics(8, val_loss=1.0)
    path = plot.plot_loss(tmp_path, unigram_entropy=4.0)
    assert (
        path.name == "loss.png" and path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    )
