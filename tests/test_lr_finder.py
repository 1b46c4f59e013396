"""The search for a learning rate. Alone: uv run pytest tests/test_lr_finder.py"""

import dataclasses
import json
import math
import os
import signal

import pytest
import torch

from llm_basics.analysis import figures
from llm_basics.cli import parse
from llm_basics.core import config, files, trainer
from llm_basics.data import prepare
from llm_basics.runs import run_dir
from llm_basics.training import job, lr_finder, state

SHAPE = config.ModelConfig(vocab_size=257, context_length=16, d_model=32, n_layers=1, n_heads=2)
SETTINGS = config.TrainConfig(steps=3, batch_size=4, device="cpu", warmup_steps=50, schedule="wsd")


@pytest.fixture
def options(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(300)))
    return config.Config(
        data=str(text),
        tokenizer="bytes",
        data_dir=str(tmp_path / "data"),
        run_dir=str(tmp_path / "run"),
        model=SHAPE,
        train=SETTINGS,
        find_lr=True,
    )


@pytest.fixture
def training(options):
    return state.TrainingState(options, prepare.prepare(options))


# --------------------------------------------------------------------------------------------------
# The rule


def test_rates_rise_by_one_factor_from_end_to_end():
    rates = lr_finder.rates(lr_finder.STEPS)
    factors = [later / earlier for earlier, later in zip(rates, rates[1:], strict=False)]
    assert (rates[0], rates[-1]) == pytest.approx((lr_finder.LOWEST, lr_finder.HIGHEST)) and factors[0] > 1
    assert factors == pytest.approx([factors[0]] * (lr_finder.STEPS - 1))


def test_smoothed_losses_are_weighted_means_of_those_so_far():
    losses = [5.0, 1.0, 4.0, 2.0]
    for n, smoothed in enumerate(lr_finder.smooth(losses), 1):
        weights = [0.9 ** (n - 1 - i) for i in range(n)]
        expected = sum(w * loss for w, loss in zip(weights, losses[:n], strict=True)) / sum(weights)
        assert smoothed == pytest.approx(expected)
    assert lr_finder.smooth([3.0] * 5) == pytest.approx([3.0] * 5) and lr_finder.smooth([]) == []


def test_a_third_of_the_rate_where_the_loss_is_lowest_is_proposed():
    rates = lr_finder.rates(150)
    for best in (1e-4, 6e-3, 0.1):
        losses = [5 + min(0.0, math.log10(1e-6 / lr)) for lr in rates if lr < best]
        losses += [9.0] * (150 - len(losses))
        assert lr_finder.propose(rates, losses) == pytest.approx(best / 3, rel=0.25)
    # a single batch that is easy decides nothing
    lucky = [3 + abs(math.log10(0.01 / lr)) for lr in rates]
    lucky[40] = 2.5
    assert lr_finder.propose(rates, lucky) == pytest.approx(0.02 / 3, rel=0.5)
    assert lr_finder.propose(rates, [5.0, *[5.1] * 149]) is None
    assert lr_finder.propose([], []) is None


def test_every_step_has_the_rate_that_is_tried():
    for schedule in ("cosine", "wsd"):
        options = dataclasses.replace(SETTINGS, schedule=schedule, min_lr=1e-5)
        for lr in (1e-6, 0.0123, 1.0):
            tried = lr_finder.at_rate(options, lr)
            assert {trainer.learning_rate(step, tried) for step in (1, 2, 3, 4, 99)} == {lr}
            assert dataclasses.replace(tried, lr=3e-4, min_lr=1e-5, warmup_steps=50) == options


# --------------------------------------------------------------------------------------------------
# The steps


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_are_those_of_training_on_the_data_of_the_run(options, monkeypatch, optimizer):
    monkeypatch.setattr(lr_finder, "STEPS", 12)
    options = dataclasses.replace(options, train=dataclasses.replace(SETTINGS, optimizer=optimizer))
    first, second = (state.TrainingState(options, prepare.prepare(options)) for _ in range(2))
    torch.manual_seed(0)
    entries = list(lr_finder.try_rates(first))
    for entry, lr in zip(entries, lr_finder.rates(12), strict=True):
        settings = lr_finder.at_rate(options.train, lr)
        batches = second.next_batches()
        result = trainer.train_step(second.model, second.optimizer, batches, second.step + 1, settings)
        second.advance()
        assert (entry["step"], entry["lr"], result.lr) == (second.step, lr, lr)
        assert (entry["train_loss"], entry["grad_norm"]) == (result.train_loss, result.grad_norm)
    weights = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)


@pytest.mark.parametrize(
    ("what", "n_tried", "said"),
    [
        ("leaps", 60, "stopped after 60 of 150 learning rates: the loss diverged"),
        ("is lost", 59, "stopped after 59 of 150 learning rates: step 60: loss nan"),
    ],
)
def test_a_search_ends_where_the_loss_leaps_or_is_lost(options, monkeypatch, capsys, what, n_tried, said):
    train_step = trainer.train_step

    def diverging(*arguments):
        if arguments[3] == 60 and what == "is lost":
            raise FloatingPointError("step 60: loss nan")
        result = train_step(*arguments)
        return result if arguments[3] < 60 else dataclasses.replace(result, train_loss=torch.tensor(23.0))

    monkeypatch.setattr(trainer, "train_step", diverging)
    assert job.main(options) == 0
    told = capsys.readouterr().out
    assert said in told and "--train.lr 7e-05" in told
    assert len(run_dir.read_tried(options.run_dir)) == n_tried


def test_rates_that_are_far_too_large_are_not_gone_through(training, monkeypatch):
    """With nothing to hold a step back, the real loss diverges."""
    monkeypatch.setattr(lr_finder, "HIGHEST", 1e6)
    entries = list(lr_finder.try_rates(training))
    assert 40 < len(entries) < lr_finder.STEPS and entries[-1]["lr"] < 1e5


# --------------------------------------------------------------------------------------------------
# The program


def test_a_search_proposes_the_same_rate_each_time_and_keeps_no_weights(options, tmp_path, capsys):
    said = []
    for name in ("one", "two"):
        assert job.main(dataclasses.replace(options, run_dir=str(tmp_path / name))) == 0
        said.append(capsys.readouterr().out)
    files = {"config.json", "log.txt", "lr_finder.jsonl", "lr_finder.png", "tokenizer"}
    assert {path.name for path in (tmp_path / "one").iterdir()} == files
    proposals = [float(text.split("--train.lr ")[1]) for text in said]
    assert proposals[0] == proposals[1] and 1e-3 < proposals[0] < 0.1
    assert run_dir.read_tried(tmp_path / "one") == run_dir.read_tried(tmp_path / "two")
    entries = run_dir.read_tried(tmp_path / "one")
    assert [entry["lr"] for entry in entries] == lr_finder.rates(lr_finder.STEPS)[: len(entries)]
    assert set(entries[0]) == {"step", "lr", "train_loss", "smoothed_loss", "grad_norm"}
    assert len([line for line in said[0].splitlines() if "e-0" in line]) >= 10
    assert json.loads((tmp_path / "one" / "config.json").read_text())["find_lr"] is True


@pytest.mark.slow
def test_the_proposal_is_better_than_rates_far_from_it(options, tmp_path):
    """After 60 steps, than a thirtieth of it and than thirty times as much."""
    job.main(options)
    tried = run_dir.read_tried(options.run_dir)
    proposal = lr_finder.propose([e["lr"] for e in tried], [e["train_loss"] for e in tried])
    losses = []
    for factor in (1 / 30, 1, 30):
        settings = dataclasses.replace(SETTINGS, steps=60, lr=factor * proposal, warmup_steps=5)
        training = state.TrainingState(dataclasses.replace(options, train=settings), prepare.prepare(options))
        while training.step < settings.steps:
            batches = training.next_batches()
            trainer.train_step(training.model, training.optimizer, batches, training.step + 1, settings)
            training.advance()
        losses.append(training.evaluate(10)["val_loss"])
    assert losses[1] < losses[0] - 0.1 and losses[1] < losses[2] - 0.1


def test_without_a_rate_that_helps_none_is_proposed(options, tmp_path, capsys, monkeypatch):
    train_step = trainer.train_step

    def worse_and_worse(*arguments):
        return dataclasses.replace(train_step(*arguments), train_loss=torch.tensor(float(arguments[3])))

    monkeypatch.setattr(trainer, "train_step", worse_and_worse)
    assert job.main(options) == job.NO_RATE
    said = capsys.readouterr().out
    assert (
        "stopped after 5 of 150 learning rates" in said
        and "no suggestion" in said
        and "--train.lr" not in said
    )
    assert not (tmp_path / "run" / "lr_finder.png").exists()


def test_a_search_that_is_interrupted_says_that_nothing_is_kept(options, capsys, monkeypatch):
    train_step = trainer.train_step

    def interrupted(*arguments):
        if arguments[3] == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*arguments)

    monkeypatch.setattr(trainer, "train_step", interrupted)
    assert job.main(options) == 130
    assert "stopped by SIGINT after step 5; no weights kept" in capsys.readouterr().out
    assert len(run_dir.read_tried(options.run_dir)) == 5


def test_a_figure_that_cannot_be_written_costs_no_proposal(options, capsys, monkeypatch):
    def full(*arguments):
        raise files.WriteError(28, "lr_finder.png could not be written (No space left on device)")

    monkeypatch.setattr(figures, "plot_lr_finder", full)
    assert job.main(options) == 0
    said = capsys.readouterr().out
    assert (
        "warning: lr_finder.png could not be written (No space left on device)" in said
        and "--train.lr 0.0" in said
    )


def test_a_run_is_not_searched_and_not_overwritten(options, tmp_path, capsys):
    trained = dataclasses.replace(options, find_lr=False)
    job.main(trained)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="2"):
        parse.train_options(["--resume", options.run_dir, "--find-lr"])
    assert "find_lr must be used without resume" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        job.main(options)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("flag", ["--find-lr", "--find_lr"])
def test_the_flag_has_two_spellings(flag):
    assert parse.train_options([flag]).find_lr and not parse.train_options([]).find_lr
