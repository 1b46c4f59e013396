"""Sweeps: training runs and their comparison. Alone: uv run pytest tests/test_sweep.py

All but the last test of training use the stand-in fixtures/trainer.py, which takes no time.
"""

import csv
import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from llm_basics.analysis import sweep, sweep_figures
from llm_basics.cli import commands, parse
from llm_basics.runs import locks, run_dir
from llm_basics.training import job

TRAINER = Path(__file__).parent / "fixtures" / "trainer.py"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sweep, "TRAIN", (sys.executable, str(TRAINER)))
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.01)
    for text in ("fail", "interrupt"):
        Path(text).touch()
    return tmp_path


def run_sweep(content, *arguments):
    Path("mine.yaml").write_text(content)
    return sweep.main(parse.program_options(commands.SweepConfig(), ["mine.yaml", *arguments], "sweep"))


def calls():
    return [line.split()[:2] for line in Path("calls.txt").read_text().splitlines()]


def results(out="runs/mine"):
    return json.loads((Path(out) / "results.json").read_text())


TWO = "base: {train: {steps: 3}}\ngrid: {train.lr: [1e-2, 1e-3]}"
GRID = "base: {train: {steps: 3}}\ngrid: {train.lr: [1e-2, 1e-3]}\nseeds: [0, 1]"


def test_a_sweep_trains_each_run_and_compares(here, capsys):
    assert run_sweep(GRID) == 0
    output = capsys.readouterr().out
    names = [f"lr={lr},seed={seed}" for lr in (0.01, 0.001) for seed in (0, 1)]
    assert calls() == [["begin", name] for name in names]
    rows = [line.split() for line in output.splitlines() if line.strip().startswith("0.0")]
    assert [row[:4] for row in rows] == [
        ["0.001", "2.0050", "0.0071", "2"],
        ["0.01", "3.0050", "0.0071", "2"],
    ]
    found = results()
    assert [(r["run"], r["state"], r["train.lr"], r["seed"], r["val_loss"]) for r in found] == [
        (names[0], "finished", 0.01, 0, 3.0),
        (names[1], "finished", 0.01, 1, 3.01),
        (names[2], "finished", 0.001, 0, 2.0),
        (names[3], "finished", 0.001, 1, 2.01),
    ]
    with open("runs/mine/results.csv") as file:
        assert [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)] == [
            {k: str(v) for k, v in row.items()} for row in found
        ]
    for picture in ("mine.png", "curves.png"):
        assert Path("runs/mine", picture).read_bytes().startswith(b"\x89PNG")
    assert Path("runs/mine/report.html").read_text().count("<img") == 2


def test_a_finished_sweep_is_only_compared(here, capsys):
    run_sweep(TWO)
    capsys.readouterr()
    Path("calls.txt").unlink()
    shutil.rmtree("runs/mine/lr=0.001,seed=0")
    os.remove("runs/mine/results.json")
    assert run_sweep(TWO) == 0 and calls() == [["begin", "lr=0.001,seed=0"]]
    assert "1 of 2 runs are already finished" in capsys.readouterr().out and len(results()) == 2
    Path("calls.txt").unlink()
    assert run_sweep(TWO) == 0 and not Path("calls.txt").exists()


def test_runs_are_identified_by_their_options(here):
    """Runs with other options are kept and left out of the comparison."""
    run_sweep(TWO)
    Path("calls.txt").unlink()
    longer = TWO.replace("steps: 3", "steps: 4")
    assert run_sweep(longer) == 0
    assert calls() == [["begin", "lr=0.01,seed=0-2"], ["begin", "lr=0.001,seed=0-2"]]
    assert [(r["run"], r["steps"]) for r in results()] == [("lr=0.01,seed=0-2", 4), ("lr=0.001,seed=0-2", 4)]
    Path("calls.txt").unlink()
    assert run_sweep(TWO) == 0 and not Path("calls.txt").exists()
    assert [r["run"] for r in results()][0] == "lr=0.01,seed=0"


def test_a_failed_run_is_reported_and_stops_no_other(here, capsys):
    content = "base: {train: {steps: 3}}\nvariants: {a: {}, b: {data: fail}, c: {train.lr: 1e-2}}"
    assert run_sweep(content) == 1
    output = capsys.readouterr().out
    assert "[2/3] b,seed=0: failed after " in output
    assert " s with status 1: error: failed on request (see runs/mine/b" in output
    assert [r["state"] for r in results()] == ["finished", "failed", "finished"]
    assert [line.split()[1] for line in output.splitlines() if line.startswith(("  a ", "  b ", "  c "))] == [
        "2.5229",
        "3.0000",
        "none",
    ]


def test_results_are_written_when_all_runs_fail(here, capsys):
    assert run_sweep("variants: {b: {data: fail}}") == 1
    output = capsys.readouterr().out
    assert results()[0]["state"] == "failed" and "no run has finished" in output
    (row,) = [line.split() for line in output.splitlines() if line.startswith("  b ")]
    assert row == ["b", "none", "-", "0", "-", "-"]
    assert not Path("runs/mine/mine.png").exists()


def tables(output):
    """The first two columns of each table."""
    parts = re.split(r"^ +[\w.]+ .*spread.*$", output, flags=re.M)[1:]
    return [re.findall(r"^  (\S+) +([\d.]+|none) +[\d.-]+ +\d ", part, flags=re.M) for part in parts]


def test_settings_with_other_tokenizers_are_ranked_by_bits_per_byte(here, capsys, drawn):
    """Here a larger vocabulary has the higher loss per token, and fewer bits per byte."""
    base = "base: {train: {steps: 3, lr: 1e-3}, tokenizer: bpe}\n"
    small, large = "{model.vocab_size: 300}", "{model.vocab_size: 3000, train.lr: 1e-2}"
    assert run_sweep(f"{base}variants: {{small: {small}, large: {large}}}") == 0
    output = capsys.readouterr().out
    assert tables(output) == [[("large", "4.0000"), ("small", "12.0000")]]
    assert "2 runs, ranked by bits per byte: losses per token of different tokenizers are not" in output
    assert "  bits per byte  " in output and "val loss" not in output
    assert drawn[0].axes[0].get_title(loc="left") == "Bits per byte relative to: small"


def test_settings_with_other_text_are_ranked_apart(here, capsys):
    """Also in figures; a setting without a finished run is last."""
    Path("other").touch()
    other = "{data: other}, d: {data: other, train.lr: 1e-4}, e: {data: fail}"
    base = "base: {train: {steps: 3, lr: 1e-3}}\n"
    assert run_sweep(f"{base}variants: {{a: {{train.lr: 1e-2}}, b: {{}}, c: {other}}}") == 1
    output = capsys.readouterr().out
    found = [[("b", "2.0000"), ("a", "3.0000")], [("c", "2.0000"), ("d", "3.0000"), ("e", "none")]]
    assert tables(output) == found
    assert "held-out text of stdlib: 2 runs\n" in output and "held-out text of other: 2 runs\n" in output
    assert "2 held-out texts: results of different tables are not comparable\n" in output
    pictures = ["mine.png", "curves.png", "mine-2.png", "curves-2.png"]
    assert [line.rpartition("/")[2] for line in output.splitlines() if line.endswith(".png")] == pictures
    assert Path("runs/mine/report.html").read_text().count("<img") == 4


@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_an_interrupted_sweep_saves_and_resumes(here, capsys, jobs):
    content = "base: {train: {steps: 3}}\nvariants: {a: {}, b: {data: interrupt}, c: {train.lr: 1e-2}}"
    assert run_sweep(content, "--jobs", jobs) == 130
    assert "stopped by SIGINT; running trials are saved; resume with: uv run" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run_sweep(content, "--jobs", jobs) == 0
    made = calls()
    assert ["resume", "b,seed=0"] in made and made.count(["begin", "a,seed=0"]) == 1
    assert [r["state"] for r in results()] == ["finished"] * 3


def test_a_run_killed_before_its_first_checkpoint_restarts(here):
    run_sweep(TWO)
    for path in Path("runs/mine/lr=0.01,seed=0/checkpoints").iterdir():
        path.unlink()
    assert run_sweep(TWO) == 0
    assert calls()[2:] == [["begin", "lr=0.01,seed=0-2"]]


def test_jobs_share_the_cores_and_the_first_prepares_the_text(here, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert run_sweep(TWO, "--jobs", "3") == 0
    assert {line.split()[2] for line in Path("calls.txt").read_text().splitlines()} == {"2"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert run_sweep(TWO, "--out", "other") == 0
    assert Path("calls.txt").read_text().splitlines()[-1].split()[2] == "5"


def test_a_second_run_waits_until_the_first_has_its_text(here, monkeypatch):
    begun = []
    start = sweep.start

    def watched(trial_run, jobs):
        begun.append([(other / "config.json").exists() for other in begun_folders])
        begun_folders.append(trial_run.folder)
        return start(trial_run, jobs)

    begun_folders = []
    monkeypatch.setattr(sweep, "start", watched)
    assert run_sweep(TWO, "--jobs", "4") == 0
    assert begun == [[], [True]]


def test_two_sweeps_do_not_write_one_folder(here, capsys):
    Path("runs/mine").mkdir(parents=True)
    with locks.locked("runs/mine"), pytest.raises(SystemExit) as stop:
        run_sweep(GRID)
    assert stop.value.code == 2 and "runs/mine is locked by pid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("grid: {train.lrr: [1]}", "unknown option train.lrr (mine.yaml); the closest is train.lr"),
        ("grids: {train.lr: [1]}", "unknown key grids (mine.yaml); a sweep has base, grid"),
        ("base: {data: nowhere.txt}\ngrid: {train.lr: [1]}", "data: the text must be a file, a folder or a"),
        ("variants: {a: {}, b: {data: nowhere.txt}}", " got nowhere.txt; "),
    ],
)
def test_errors_are_one_line_and_create_no_files(here, capsys, content, message):
    with pytest.raises(SystemExit) as stop:
        run_sweep(content)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert sorted(path.name for path in here.iterdir()) == ["fail", "interrupt", "mine.yaml"]


def test_a_finished_sweep_needs_no_text(here):
    content = "base: {data: book.txt, train: {steps: 3}}\ngrid: {train.lr: [1e-2]}"
    Path("book.txt").touch()
    assert run_sweep(content) == 0
    os.remove("book.txt")
    os.remove("runs/mine/results.json")
    assert run_sweep(content) == 0 and results()[0]["state"] == "finished"


def test_options_of_a_run_are_written_atomically(here, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match="3"):
        run_sweep(TWO)
    assert not [*Path("runs/mine").glob("*.yaml*")]


@pytest.mark.slow
def test_a_sweep_of_the_real_program_is_the_run_itself(here, monkeypatch):
    """Training with the options file of a trial gives bitwise the same losses."""
    monkeypatch.setattr(sweep, "TRAIN", (sys.executable, "-m", "llm_basics.train"))
    Path("text.txt").write_text("All is well that ends well.\n" * 60)
    model = "{context_length: 8, d_model: 16, n_layers: 1, n_heads: 2}"
    steps = "{steps: 5, batch_size: 2, eval_batches: 1, sample_tokens: 5, device: cpu}"
    base = f"{{data: text.txt, tokenizer: bytes, fast: off, model: {model}, train: {steps}}}"
    assert run_sweep(f"base: {base}\nvariants: {{no norm: {{model.norm: none}}}}\nfigure: scaling") == 0
    arguments = ["--config", "runs/mine/no-norm,seed=0.yaml", "--run_dir", "alone"]
    assert job.main(parse.train_options(arguments)) == 0
    losses = [
        [m.get("val_loss", m.get("train_loss")) for m in run_dir.read_metrics(folder)]
        for folder in ("runs/mine/no-norm,seed=0", "alone")
    ]
    assert losses[0] == losses[1] and results()[0]["val_loss"] == losses[0][-1]


# --------------------------------------------------------------------------------------------------
# Figures


def outcome(loss, weights=1000, tokens=1000, flops=1e9, **setting):
    losses = [float(one) for one in (loss if isinstance(loss, list) else [loss])]
    return sweep_figures.Outcome(setting, losses, weights, tokens, flops)


def legend_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_numeric_options_are_lines_on_a_logarithmic_axis_if_far_apart(tmp_path, drawn):
    found = [outcome([3 - i, 3.2 - i], lr=10.0**-i, kind=kind) for i in range(3) for kind in ("a", "b")]
    sweep_figures.draw_options([*found, outcome([], lr=5.0, kind="a")], tmp_path / "a.png")
    (axes,) = drawn[0].axes
    means = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert len(means) == 2 and axes.get_xscale() == "log"
    np.testing.assert_allclose(means[0].get_xdata(), [0.01, 0.1, 1.0])
    np.testing.assert_allclose(means[0].get_ydata(), [1.1, 2.1, 3.1])
    assert legend_of(axes) == ["kind a", "kind b"]
    assert axes.get_title(loc="left") == "Lowest validation loss: 1.100 at lr 0.01, kind a"


def test_other_options_are_bars_relative_to_the_first(tmp_path, drawn):
    found = [outcome([2.0, 2.2], variant="$x_"), outcome([1.5], variant="b"), outcome([3.0], variant="c")]
    sweep_figures.draw_options(found, tmp_path / "a.png")
    (axes,) = drawn[0].axes
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], [0.9, 0.0, -0.6])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c", "$x_", "b"]
    assert [text.get_text() for text in axes.texts] == ["3.000  (+0.900)", "2.100", "1.500  (-0.600)"]


def test_y_limits_leave_out_losses_far_above_the_others(tmp_path, drawn):
    sweep_figures.draw_options(
        [outcome(loss, lr=i) for i, loss in enumerate([2.0, 2.1, 2.2, 2.3, 90.0])], tmp_path / "a.png"
    )
    assert drawn[0].axes[0].get_ylim()[1] < 3


def test_power_laws_are_recovered(tmp_path, drawn):
    found = [
        outcome(20 * n**-0.1 * d**-0.05, n, d, 6.0 * n * d, model_d=n, steps=d)
        for n in (1000, 3000, 9000)
        for d in (10_000, 40_000, 160_000)
    ]
    laws = sweep_figures.scaling_laws([*found, outcome([], 27_000, 160_000, 1e12)])
    assert (laws["weights"].exponent, laws["tokens"].exponent) == pytest.approx((-0.1, -0.05))
    assert laws["weights"](np.array([1000.0])) == pytest.approx(found[2].mean)
    best = sweep_figures.frontier(found)
    assert [o.flops for o in best] == sorted(o.flops for o in best)
    for one in found:
        assert any(o.flops <= one.flops and o.mean <= one.mean for o in best)
    sweep_figures.draw_scaling(found, tmp_path / "a.png")
    left, right = drawn[0].axes
    assert legend_of(left)[:3] == ["10k tokens", "40k tokens", "160k tokens"]
    assert legend_of(right)[:3] == ["1k weights", "3k weights", "9k weights"]
    assert all("^{-0." in legend_of(axes)[3] for axes in (left, right))


def test_a_law_needs_three_points(tmp_path):
    found = [outcome(2.0, 1000), outcome(1.9, 2000, flops=2e9)]
    assert sweep_figures.scaling_laws(found) == {}
    assert sweep_figures.draw_scaling(found, tmp_path / "a.png").exists()


def test_spread_is_the_standard_deviation_over_seeds():
    assert outcome([1.0, 2.0, 3.0]).spread == 1.0 and math.isnan(outcome([1.0]).spread)
