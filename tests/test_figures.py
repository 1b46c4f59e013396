"""Figures of runs. Alone: uv run pytest tests/test_figures.py"""

import subprocess
import sys
import time

import numpy as np
import pytest
import recorded
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import figure

from llm_basics.analysis import figures, run_data
from llm_basics.cli import commands, parse
from llm_basics.runs import run_dir

HOSTILE = "<img src=x> $\\frac{$ _x\n\u202e\u6f22"


def made(losses, name="a run", step=10, **more):
    metrics = [{"step": step * i, "train_loss": loss, **more} for i, loss in enumerate(losses, start=1)]
    return run_data.Record(name, {}, metrics, [])


def legend_of(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=60), st.integers(1, 90))
def test_smoothing_keeps_length_bounds_and_constants(values, window):
    smooth = figures.smoothed(np.array(values), window)
    assert len(smooth) == len(values)
    assert min(values) - 1e-6 <= smooth.min() and smooth.max() <= max(values) + 1e-6
    np.testing.assert_allclose(figures.smoothed(np.full(len(values), 3.0), window), 3.0)


def test_window_of_one_is_the_identity_and_gaps_stay_nan():
    values = np.array([1.0, np.nan, 3.0, 8.0])
    np.testing.assert_array_equal(figures.smoothed(values, 1), values)
    assert np.isnan(figures.smoothed(np.array([np.nan, np.nan]), 3)).all()


def test_losses_share_a_panel_and_other_metrics_have_their_own(tmp_path, drawn):
    runs = [made([4.0, 3.0, 2.0], val_loss=2.5, lr=0.1, grad_norm=1.0)]
    assert is_picture(
        figures.draw(runs, tmp_path / "a.png", ys=["train_loss", "val_loss", "lr", "grad_norm"])
    )
    assert [sum(len(line.get_xdata()) > 0 for line in axes.lines) for axes in drawn[0].axes] == [2, 1, 1]
    assert [axes.get_ylabel() for axes in drawn[0].axes] == [
        "loss (nats per token)",
        "learning rate",
        "gradient norm",
    ]


def test_smoothing_applies_to_training_metrics_only(tmp_path, drawn):
    metrics = [{"step": i, "train_loss": float(i % 2), "val_loss": float(i % 2)} for i in range(40)]
    figures.draw([run_data.Record("r", {}, metrics, [])], tmp_path / "a.png", smooth=10, log=True)
    curves = [np.asarray(line.get_ydata()) for line in drawn[0].axes[0].lines]
    faint, smooth, evaluated = (curve for curve in curves if len(curve))
    assert np.ptp(faint) == np.ptp(evaluated) == 1 and np.ptp(smooth[5:-5]) < 0.01
    assert drawn[0].axes[0].get_yscale() == "log"


def test_the_best_of_many_runs_are_colored_and_named(tmp_path, drawn):
    runs = [made([5.0, 1.0 + i / 100], name=f"number {i}") for i in range(100)]
    began = time.perf_counter()
    assert is_picture(figures.draw(runs[::-1], tmp_path / "a.png", ys=["train_loss"]))
    assert time.perf_counter() - began < 20
    n = len(figures.COLORS)
    assert legend_of(drawn[0]) == [*(f"number {i}" for i in reversed(range(n))), f"{100 - n} more runs"]


def test_a_million_points_are_drawn_in_seconds(tmp_path):
    losses = np.random.default_rng(0).normal(3, 1, 1_000_000)
    record = made([1.0])
    object.__setattr__(record, "curve", lambda y, x="step": (np.arange(1e6), losses))
    began = time.perf_counter()
    figures.draw([record], tmp_path / "a.png", ys=["train_loss"], smooth=50)
    assert time.perf_counter() - began < 10


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_literally(tmp_path, drawn):
    for count in (1, 2):
        assert is_picture(
            figures.draw([made([3.0, 2.0], name=HOSTILE)] * count, tmp_path / "a.png", ys=["train_loss"])
        )
    figures.draw(
        [made([3.0, 2.0], name=name) for name in (HOSTILE, "_b")], tmp_path / "a.png", ys=["train_loss"]
    )
    assert legend_of(drawn[-1]) == [figures.readable(HOSTILE), " _b"]
    assert "\n" not in figures.readable(HOSTILE) and len(figures.readable("x" * 500)) == figures.NAME_LENGTH


def test_runs_without_finite_values_are_drawn(tmp_path):
    runs = [made([None, None], name="lost"), made([3.0, None, 2.0], name="partly")]
    assert is_picture(figures.draw(runs, tmp_path / "a.png", ys=["train_loss"]))


def test_y_limits_leave_out_the_steep_beginning(tmp_path, drawn):
    figures.draw([made([100.0, *np.linspace(3, 2, 60)])], tmp_path / "a.png", ys=["train_loss"])
    assert drawn[0].axes[0].get_ylim()[1] < 4


@pytest.mark.whole_run
def test_plot_loss_draws_the_unigram_entropy(tmp_path, drawn):
    folder = recorded.record(tmp_path / "r", [4.0, 3.0, 2.0])
    assert figures.plot_loss(folder, unigram_entropy=3.3) == folder / "loss.png"
    (axes,) = drawn[0].axes
    assert legend_of(drawn[0]) == ["training", "validation", "unigram entropy"]
    assert axes.get_title(loc="left") == "r" and axes.get_ylim()[1] > 3.3


def test_a_figure_is_written_atomically(tmp_path, monkeypatch):
    path = figures.draw([made([3.0, 2.0])], tmp_path / "a.png", ys=["train_loss"])
    before = path.read_bytes()

    def full(self, file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure.Figure, "savefig", full)
    with pytest.raises(OSError):
        figures.draw([made([3.0, 1.0])], path, ys=["train_loss"])
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.png"]


# --------------------------------------------------------------------------------------------------
# The command


def options_of(*arguments):
    return parse.program_options(commands.PlotConfig(), arguments, prog="plot")


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_command_draws_runs(tmp_path, monkeypatch, capsys, ending):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        recorded.record(run_dir.RUNS / name, [3.0, 2.0, 1.0])
    options = options_of("one", "runs/two", "--x", "time", "--smooth", "2", "--out", f"both.{ending}")
    assert figures.main(options) == 0 and capsys.readouterr().out == f"both.{ending}\n"
    assert (tmp_path / f"both.{ending}").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["r", "--y", "valloss"], "y must be a metric of the runs (accuracy, bits_per_byte, lr, "),
        (["nowhere"], "a run must be a folder with config.json"),
        (["r", "--out", "nowhere/a.png"], "No such file or directory"),
        (["r", "--out", "a.gif"], "out must end in .png, .svg or .pdf, got a.gif"),
        (["r", "--smooth", "0"], "smooth must be at least 1, got 0"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    recorded.record(run_dir.RUNS / "r", [3.0, 2.0])
    with pytest.raises(SystemExit) as stop:
        figures.main(options_of(*arguments))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_plot_compare_and_sweep_do_not_import_torch():
    code = "import sys; from llm_basics import plot, compare, sweep; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
