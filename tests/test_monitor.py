"""What is recorded of steps: metrics, spikes, skipped steps; on some devices a step late.

What a GPU does is done here on the CPU, whose numbers are read late if it is told to be such a device. Alone:
uv run pytest tests/test_monitor.py
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_basics import swap
from llm_basics.cli import parse
from llm_basics.core import config, dataloader, device, optim, trainer
from llm_basics.core import model as models
from llm_basics.fast import optim as fast_optim
from llm_basics.runs import checkpoint, run_dir, signals
from llm_basics.training import job
from llm_basics.training import state as training_state

STEPS = 9
SHAPE = config.ModelConfig(256, 8, d_model=16, n_layers=1, n_heads=2, dropout=0.1)


@pytest.fixture
def options(tmp_path: Path) -> config.Config:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i} is {i + i}.\n" for i in range(300)))
    settings = config.TrainConfig(
        STEPS,
        4,
        lr=0.01,
        warmup_steps=0,
        log_every=1,
        eval_every=6,
        eval_batches=1,
        sample_tokens=2,
        checkpoint_every=3,
        keep_checkpoints=0,
        device="cpu",
    )
    return config.Config(
        data=str(text), tokenizer="bytes", data_dir=str(tmp_path / "data"), model=SHAPE, train=settings
    )


@pytest.fixture(params=["at once", "late"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    choose(monkeypatch, request.param)
    return request.param


def choose(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(device, "ASYNCHRONOUS", {"cuda", "cpu"} if way == "late" else {"cuda"})


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Let the batches of these steps, and no others, make the model give out what is not finite."""
    bad: list[Tensor] = []
    next_batches, embed = training_state.TrainingState.next_batches, models.TransformerLM.hidden_states

    def batches(training: training_state.TrainingState) -> list[dataloader.Batch]:
        found = next_batches(training)
        if training.step + 1 in steps:
            bad.append(found[0][0])
        return found

    def hidden_states(self: models.TransformerLM, tokens: Tensor, *rest: Any) -> Tensor:
        hidden = embed(self, tokens, *rest)
        # not those without content, by which memory is estimated
        is_bad = type(tokens) is Tensor and any(torch.equal(tokens, inputs) for inputs in bad)
        return hidden * float("nan") if is_bad else hidden

    monkeypatch.setattr(training_state.TrainingState, "next_batches", batches)
    monkeypatch.setattr(models.TransformerLM, "hidden_states", hidden_states)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let somebody ask the run to stop in that step."""
    next_batches = training_state.TrainingState.next_batches

    def batches(training: training_state.TrainingState) -> list[dataloader.Batch]:
        if training.step + 1 == step:
            signals._State.number = signals.SIGNALS[0]
        return next_batches(training)

    monkeypatch.setattr(training_state.TrainingState, "next_batches", batches)


def changed(options: config.Config, folder: Path, **settings: Any) -> config.Config:
    """The options with other settings of training, and a folder of their own."""
    return dataclasses.replace(
        options, run_dir=str(folder), train=dataclasses.replace(options.train, **settings)
    )


def told(folder: Path) -> list[dict[str, Any]]:
    """What a run wrote of its steps, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    without = {"time", "step_seconds", "tokens_per_second", "eta_seconds"}
    return [{key: value for key, value in line.items() if key not in without} for line in lines]


def numbers(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a checkpoint holds, but for Python's random state: others draw from that, for names of files."""
    tensors, about = checkpoint.read_checkpoint(path)
    return {name: tensor for name, tensor in tensors.items() if name != "rng.python"}, about


def assert_equal(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


def events(folder: Path, kind: str) -> list[int]:
    """The steps of the events of a kind."""
    return [event["step"] for event in run_dir.read_events(folder) if event["event"] == kind]


def assert_same(one: Path, other: Path) -> None:
    assert told(one) == told(other)
    names = [path.name for path in run_dir.checkpoints(one)]
    assert names == [path.name for path in run_dir.checkpoints(other)]
    for name in names:
        (tensors, about), (others, about_other) = (
            numbers(folder / run_dir.CHECKPOINTS / name) for folder in (one, other)
        )
        assert_equal(tensors, others)
        for key in ("step", "sequences", "evaluated", "val_loss", "best_loss", "spikes", "optimizer"):
            assert about[key] == about_other[key], (name, key)


def test_a_run_is_the_same_run(options, tmp_path, monkeypatch):
    for way in ("at once", "late"):
        choose(monkeypatch, way)
        assert job.main(changed(options, tmp_path / way)) == 0
    assert_same(tmp_path / "late", tmp_path / "at once")


CASES: dict[str, dict[str, Any]] = {
    "one in the middle": {"bad": [4]},
    "two in a row": {"bad": [4, 5]},
    "every other, and the last": {"bad": [2, 4, STEPS]},
    "the one before an evaluation": {"bad": [5]},
    "one that is evaluated": {"bad": [3, 6]},
    "lines are few": {"bad": [4], "log_every": 5},
    "parts": {"bad": [4], "grad_accumulation_steps": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_steps_that_are_not_finite_are_skipped(options, tmp_path, monkeypatch, capsys, way, case):
    settings = dict(CASES[case])
    bad = settings.pop("bad")
    poison(monkeypatch, *bad)
    assert job.main(changed(options, tmp_path / "run", on_nonfinite="skip", **settings)) == 0
    said = capsys.readouterr().out
    assert [f"step {step}: loss nan" in said for step in range(1, STEPS + 1)] == [
        step in bad for step in range(1, STEPS + 1)
    ]
    assert said.count("; the step is skipped") == len(bad)
    assert events(tmp_path / "run", "skipped") == bad
    losses = {line["step"]: line["train_loss"] for line in told(tmp_path / "run") if "train_loss" in line}
    assert [step for step, loss in losses.items() if loss is None] == bad
    assert list(losses) == sorted(losses)
    if "log_every" not in settings:
        assert len(losses) == STEPS
    tensors, _ = numbers(run_dir.checkpoints(tmp_path / "run")[0])
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize(("at", "late_by"), [(1, 1), (4, 1), (6, 0), (STEPS, 0)])
def test_a_run_ends_at_what_is_not_finite(options, tmp_path, monkeypatch, capsys, way, at, late_by):
    """A late device is one good step further, unless its numbers are waited for."""
    poison(monkeypatch, at)
    assert job.main(changed(options, tmp_path / "run", checkpoint_every=0)) == parse.NOT_FINITE
    error = capsys.readouterr().err.splitlines()[-1]
    after = at + late_by if way == "late" else at - 1
    assert f"step {at}: loss nan" in error and f"after step {after}" in error
    newest = run_dir.checkpoints(tmp_path / "run")[0]
    assert checkpoint.verify(newest)["step"] == after
    assert all(tensor.isfinite().all() for tensor in numbers(newest)[0].values())


@pytest.mark.parametrize("bad", [[], [4]], ids=str)
@pytest.mark.parametrize("at", [*(pytest.param(s, marks=pytest.mark.slow) for s in (1, 3, 6)), 4, 5, STEPS])
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(options, tmp_path, monkeypatch, way, at, bad):
    poison(monkeypatch, *bad)
    options = changed(options, tmp_path / "whole", on_nonfinite="skip")
    assert job.main(options) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, at)
        assert job.main(changed(options, tmp_path / "run")) == 128 + signals.SIGNALS[0]
    newest = run_dir.checkpoints(tmp_path / "run")[0]
    assert checkpoint.verify(newest)["step"] == at
    assert job.main(dataclasses.replace(options, resume=str(tmp_path / "run"))) == 0
    assert_equal(*(numbers(run_dir.checkpoints(tmp_path / name)[0])[0] for name in ("run", "whole")))


def test_a_run_that_is_stopped_in_a_step_that_fails(options, tmp_path, monkeypatch, way):
    poison(monkeypatch, 4)
    stop_at(monkeypatch, 4)
    assert job.main(changed(options, tmp_path / "run")) == parse.NOT_FINITE
    newest = run_dir.checkpoints(tmp_path / "run")[0]
    assert checkpoint.verify(newest)["step"] == (4 if way == "late" else 3)


def test_what_cannot_be_written_ends_a_run_with_the_weights_of_a_step(options, tmp_path, monkeypatch, way):
    assert job.main(changed(options, tmp_path / "whole", checkpoint_every=1)) == 0
    metrics = run_dir.RunDir.metrics

    def full(self: run_dir.RunDir, step: int, **values: Any) -> None:
        if step == 5:
            raise OSError(28, "No space left on device")
        metrics(self, step, **values)

    monkeypatch.setattr(run_dir.RunDir, "metrics", full)
    # with no evaluation that would be waited for
    given = changed(options, tmp_path / "run", checkpoint_every=0, eval_every=100)
    assert job.main(given) == parse.NOT_SAVED
    newest = run_dir.checkpoints(tmp_path / "run")[0]
    assert checkpoint.verify(newest)["step"] == (6 if way == "late" else 5)
    assert_equal(numbers(newest)[0], numbers(tmp_path / "whole" / run_dir.CHECKPOINTS / newest.name)[0])


def test_a_spike_is_told_by_the_number_of_its_step(options, tmp_path, monkeypatch, capsys, way):
    step = models.TransformerLM.hidden_states
    calls = []

    def hidden_states(self: models.TransformerLM, *given: Any) -> Tensor:
        calls.append(self.training)
        return step(self, *given) * (30.0 if calls.count(True) == 43 and self.training else 1.0)

    monkeypatch.setattr(models.TransformerLM, "hidden_states", hidden_states)
    given = changed(options, tmp_path / "run", steps=50, eval_every=100, checkpoint_every=0)
    print_summary = job.setup.print_summary
    monkeypatch.setattr(job.setup, "print_summary", lambda *a: print_summary(*a) or calls.clear())
    assert job.main(given) == 0
    assert "step 43: loss spike" in capsys.readouterr().out
    assert events(tmp_path / "run", "spike") == [43]


def batch() -> list[tuple[Tensor, Tensor]]:
    tokens = torch.randint(256, (4, 9), generator=torch.Generator().manual_seed(1))
    return [(tokens[:, :-1], tokens[:, 1:])]


def test_a_step_waits_for_its_numbers_only_where_it_must(monkeypatch):
    plain = config.TrainConfig(10, 4, dtype="float32")
    lm = models.TransformerLM(SHAPE)
    held: list[Tensor] = []

    def is_held(optimizer: torch.optim.Optimizer | None = None, **settings: Any) -> bool:
        held.clear()
        chosen = dataclasses.replace(plain, **settings)
        trainer.train_step(lm, optimizer or trainer.make_optimizer(lm, chosen), batch(), 1, chosen)
        return bool(held)

    skip_if = fast_optim.skip_if
    monkeypatch.setattr(fast_optim, "skip_if", lambda flag: held.append(flag) or skip_if(flag))
    choose(monkeypatch, "late")
    assert not is_held()
    with swap.using("fast", lambda line: None):
        muon = dataclasses.replace(plain, optimizer="muon", lr=0.01)
        assert is_held() and is_held(trainer.make_optimizer(lm, muon))
        assert not is_held(torch.optim.SGD(lm.parameters(), lr=0.1))
        refused = trainer.train_step(
            lm, trainer.make_optimizer(lm, plain), batch(), 1, plain, lambda loss: False
        )
        assert not refused.updated
        # another class may go by the same name
        own = type("AdamW", (optim.AdamW,), {"__module__": "mine"})
        with swap.replaced({"optim.AdamW": own}):
            assert not is_held(own(lm.parameters()))
        # and clipping may return a number of another shape
        with swap.replaced({"optim.clip_grad_norm_": lambda *given, **options: torch.ones(1)}):
            assert is_held()
        with swap.replaced({"optim.adamw_step_": swap.reference("optim.adamw_step_")}):
            assert not is_held()
        choose(monkeypatch, "at once")
        assert not is_held()


def test_own_clipping_and_loss_are_called_by_fast_steps(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def clip_grad_norm_(parameters, max_norm, error_if_nonfinite=False):\n    return 1.0\n")
    said: list[str] = []
    with swap.using("fast", said.append):
        swap.use(path)
        assert trainer.train_step.__module__ == "llm_basics.fast.trainer"
    path.write_text(
        "def cross_entropy(logits, targets, ignore_index=-100, z_loss=0.0):\n    return logits.sum()\n"
    )
    with swap.using(path), swap.using("fast", said.append):
        assert trainer.batch_loss.__module__ == "llm_basics.core.trainer"
    assert not any("train_step" in line for line in said)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_on_a_card_is_the_same_run(options, tmp_path, monkeypatch, optimizer):
    poison(monkeypatch, 4)
    given = {"on_nonfinite": "skip", "device": "cuda", "compile": "off", "optimizer": optimizer}
    for way, late in (("late", {"cuda"}), ("at once", set())):
        monkeypatch.setattr(device, "ASYNCHRONOUS", late)
        assert job.main(changed(options, tmp_path / way, **given)) == 0
    for one, other in zip(told(tmp_path / "late"), told(tmp_path / "at once"), strict=True):
        assert one.keys() == other.keys() and one["step"] == other["step"]
        for key in one:
            assert one[key] == other[key] or one[key] == pytest.approx(other[key], rel=1e-3), (one, key)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_that_is_held_changes_nothing(kind):
    settings = config.TrainConfig(10, 4, optimizer=kind, lr=0.01, dtype="float32")
    with swap.using("fast", lambda line: None):
        lms = [models.TransformerLM(dataclasses.replace(SHAPE, dropout=0.0)) for _ in range(2)]
        lms[1].load_state_dict(lms[0].state_dict())
        optimizers = [trainer.make_optimizer(lm, settings) for lm in lms]
        assert all(map(fast_optim.supports_skip, optimizers))
        for held in (0.0, 1.0, 0.0):
            for lm, optimizer, late in zip(lms, optimizers, (True, False), strict=True):
                optimizer.zero_grad()
                trainer.accumulate_gradients(lm, batch(), settings)
                if late:
                    with fast_optim.skip_if(torch.tensor(held)):
                        optimizer.step()
                    for state in optimizer.state.values():
                        if held and "step" in state:
                            state["step"] -= 1
                elif not held:
                    optimizer.step()
            for one, other in zip(*(lm.parameters() for lm in lms), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert isinstance(optimizers[0], optim.AdamW)
