"""Runs that are killed, stopped, out of disk or damaged: nothing is lost, and they resume bit for bit.

Short versions run by default; all of it with `uv run pytest -m slow tests/test_survival.py`.
"""

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trials
from trainers import SETTINGS, STEPS, Trainers, learned

from llm_basics.cli import parse
from llm_basics.core import config, optim, trainer
from llm_basics.runs import checkpoint, locks, run_dir, signals
from llm_basics.training import job, monitor, state

INSIDE_A_SAVE = ["open", "write", "flush", "replace", "folder", "done"]


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainers]:
    trainers = Trainers(tmp_path_factory.mktemp("nursery"))
    yield trainers
    assert trainers.process.stdin
    trainers.process.stdin.close()
    trainers.process.wait(20)


@pytest.fixture(scope="module")
def undisturbed(trainers: Trainers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert trainers.train(folder, here=True) == 0, trainers.output
    return folder


def resume_to_the_end(trainers: Trainers, folder: Path) -> None:
    """Resume from the last checkpoint; without one, start again."""
    if run_dir.checkpoints(folder):
        status = trainers.resume(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        status = trainers.train(folder)
    assert status == 0, trainers.output


def count(quick: int, full: int) -> Any:
    """`quick` trials by default, `full` with -m slow."""
    return pytest.mark.parametrize("n_trials", [quick, pytest.param(full, marks=pytest.mark.slow)])


# --------------------------------------------------------------------------------------------------
# Killed


@count(4, 300)
def test_a_killed_run_loses_no_checkpoint_and_ends_as_if_it_had_not_been(
    trainers, undisturbed, tmp_path, n_trials
):
    chance, expected, inside = random.Random(n_trials), learned(undisturbed), 0
    for trial in range(n_trials):
        folder = tmp_path / str(trial)
        if trial % 2:
            plan: dict[str, Any] = {"after": chance.uniform(0.01, 0.3)}
        else:
            plan = {"phase": chance.choice(INSIDE_A_SAVE), "at": chance.randint(1, STEPS)}
        status = trainers.train(folder, signal=signal.SIGKILL, **plan)
        if status == -signal.SIGKILL:
            inside += "phase" in plan
            # a step is recorded, then saved: the last may be missing, the one before must be there
            last = max((e["step"] for e in run_dir.read_metrics(folder)), default=0)
            found, rejected = checkpoint.newest_valid(folder / run_dir.CHECKPOINTS)
            assert not rejected
            assert (checkpoint.verify(found)["step"] if found else 0) >= last - 1, plan
            resume_to_the_end(trainers, folder)
        else:
            assert status == 0, trainers.output  # it was faster than the clock
        assert learned(folder) == expected, plan
        assert not list((folder / run_dir.CHECKPOINTS).glob("*.tmp*"))
        shutil.rmtree(folder)
    assert inside >= n_trials // 2


# --------------------------------------------------------------------------------------------------
# Stopped

# the first six by default
PHASES = ["startup", "step", "evaluation batch", "sampling", "flush", "conclusion"]
PHASES += ["data", "backward", "evaluation", "save", "prune"]
STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]


@count(6, 4 * len(PHASES))
def test_a_signal_in_any_phase_saves_and_is_logged(trainers, undisturbed, tmp_path, n_trials):
    chance, expected = random.Random(n_trials), learned(undisturbed)
    for trial in range(n_trials):
        phase, number, folder = PHASES[trial % len(PHASES)], STOPS[trial % 4], tmp_path / str(trial)
        once = phase in ("startup", "conclusion")
        plan = {"phase": phase, "at": 1 if once else chance.randint(1, 2), "signal": number}
        status = trainers.train(folder, **plan)
        assert status == 128 + number, (plan, trainers.output)
        assert trainers.seconds is not None and trainers.seconds < 5, plan
        assert f"stopped by {signal.Signals(number).name}" in trainers.output
        if phase != "startup":
            found = checkpoint.newest_valid(folder / run_dir.CHECKPOINTS)[0]
            last = max(entry["step"] for entry in run_dir.read_metrics(folder))
            assert found and checkpoint.verify(found)["step"] == last, plan
        resume_to_the_end(trainers, folder)
        assert learned(folder) == expected, plan
        shutil.rmtree(folder)


def test_a_second_interrupt_leaves_at_once(trainers, tmp_path):
    assert trainers.train(tmp_path / "run", {"train.steps": 100000}, phase="twice", at=1, signal=2) < 0
    found, rejected = checkpoint.newest_valid(tmp_path / "run" / run_dir.CHECKPOINTS)
    assert found is None and not rejected


def test_a_signal_is_raised_at_the_next_poll_and_cleared_afterwards():
    with signals.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(signals.Stopped, match="SIGTERM") as stop:
            list(signals.polled([1]))
        assert stop.value.status == 143
    signals.poll()
    with pytest.raises(signals.Stopped), signals.listening(), signals.anywhere():
        os.kill(os.getpid(), signal.SIGUSR1)
        pytest.fail("went on")


# --------------------------------------------------------------------------------------------------
# Resumed


@pytest.mark.parametrize(
    ("dropout", "accumulation"),
    [(0.1, 3), *(pytest.param(d, a, marks=pytest.mark.slow) for d, a in ((0.0, 1), (0.0, 3), (0.1, 1)))],
)
def test_resumed_once_twice_or_five_times_is_the_same_to_the_last_bit(
    trainers, tmp_path, dropout, accumulation
):
    settings = {"model.dropout": dropout, "train.grad_accumulation_steps": accumulation}
    # with 12 windows to an epoch, a step of 4 or 12 windows ends within an epoch and at its end
    settings |= {"model.context_length": 240, "train.checkpoint_every": 100, "train.sample_every": 0}
    assert trainers.train(tmp_path / "whole", settings) == 0
    expected = learned(tmp_path / "whole")
    every = ([1], [2], [3], [9], [4, 6], [1, 2, 3, 5, 9])
    for stops in every if trials.is_full else ([3], [2, 9]):
        folder, before = tmp_path / "-".join(map(str, stops)), 0
        for stop in stops:
            plan = {"phase": "step", "at": stop - before, "signal": signal.SIGTERM}
            status = trainers.resume(folder, **plan) if before else trainers.train(folder, settings, **plan)
            assert status == 143, trainers.output
            assert [path.name for path in run_dir.checkpoints(folder)][0] == f"step_{stop:08d}.safetensors"
            before = stop
        assert trainers.resume(folder) == 0 and "bit for bit" in trainers.output
        assert learned(folder) == expected, stops


@pytest.mark.slow
def test_compiled_is_resumed_to_the_last_bit_too(trainers, tmp_path):
    settings = {"train.compile": "on", "train.eval_every": 100, "train.checkpoint_every": 100}
    assert trainers.train(tmp_path / "whole", settings) == 0, trainers.output
    assert {"model", "optimizer", "rng"} == {
        name.split(".")[0]
        for name in checkpoint.read_checkpoint(run_dir.checkpoints(tmp_path / "whole")[0])[0]
    }
    for stops in ([3], [2, 5]):
        folder, before = tmp_path / "-".join(map(str, stops)), 0
        for stop in stops:
            plan = {"phase": "step", "at": stop - before, "signal": signal.SIGTERM}
            status = trainers.resume(folder, **plan) if before else trainers.train(folder, settings, **plan)
            assert status == 143, trainers.output
            before = stop
        assert trainers.resume(folder) == 0 and "bit for bit" in trainers.output
        assert learned(folder) == learned(tmp_path / "whole"), stops


def test_options_changed_by_a_resume_are_logged(trainers, tmp_path):
    folder = tmp_path / "run"
    assert trainers.train(folder, phase="step", at=4, signal=signal.SIGTERM) == 143
    assert trainers.resume(folder, "--train.lr=0.5", "--train.batch_size=2", "--train.log_every=2") == 0
    assert "different: train.lr was 0.015, now 0.5" in trainers.output
    assert "different: train.batch_size was 4, now 2" in trainers.output
    assert "log_every" not in trainers.output and "may differ in the last bits" in trainers.output
    # the data goes on where it was: 4 steps of 4 windows, then 6 of 2
    about = checkpoint.verify(run_dir.checkpoints(folder)[0])
    assert about["sequences"] == 4 * 4 + 6 * 2 and about["tokens"] == 16 * about["sequences"]


# --------------------------------------------------------------------------------------------------
# Damaged


def damage(path: Path, other: Path, chance: random.Random) -> str:
    """Damage a checkpoint in a way that must be detected."""
    content = bytearray(path.read_bytes())
    kind = chance.choice(["flip", "cut", "empty", "junk", "grow", "swap", "link", "folder", "zeros"])
    match kind:
        case "flip":
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        case "cut":
            content = content[: chance.randrange(len(content))]
        case "empty":
            content = bytearray()
        case "junk":
            content = bytearray(chance.randbytes(chance.randrange(1, 2000)))
        case "grow":
            content += chance.randbytes(chance.randrange(1, 100))
        case "swap":
            content = bytearray(other.read_bytes())
        case "zeros":
            start = chance.randrange(len(content) - 64)
            content[start : start + 64] = bytes(64) if any(content[start : start + 64]) else b"\1" * 64
    path.unlink()
    if kind == "link":
        path.symlink_to(chance.choice([other, path, Path("/dev/zero"), Path("nowhere")]))
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(content)
    return kind


def test_500_damaged_checkpoints_are_seen_and_the_one_before_is_found(undisturbed, tmp_path):
    newest, older = run_dir.checkpoints(undisturbed)[:2]
    chance, kinds = random.Random(0), set()
    for trial in range(500):
        folder = tmp_path / str(trial)
        folder.mkdir()
        for path in (newest, older):
            shutil.copy(path, folder)
        kind = damage(folder / newest.name, folder / older.name, chance)
        kinds.add(kind)
        found, (reason,) = checkpoint.newest_valid(folder)
        assert found == folder / older.name and str(folder / newest.name) in reason, kind
        assert checkpoint.prune(folder, 1) == [] and found.exists()
        shutil.rmtree(folder)
    assert len(kinds) == 9


def test_a_run_resumes_from_the_last_valid_checkpoint_and_logs_why(trainers, undisturbed, tmp_path):
    folder = tmp_path / "run"
    assert trainers.train(folder, phase="step", at=6, signal=signal.SIGTERM) == 143
    with open(run_dir.checkpoints(folder)[0], "rb+") as file:
        file.truncate(1000)
    assert trainers.resume(folder) == 0
    assert "not used" in trainers.output and "resuming from" in trainers.output
    assert (folder / "checkpoints" / "step_00000006.safetensors.unused-1").exists()
    assert learned(folder) == learned(undisturbed)


def test_what_an_attempt_measured_beyond_its_last_checkpoint_is_not_read_after_a_resume(trainers, tmp_path):
    folder, seldom = tmp_path / "run", {"train.checkpoint_every": 5, "train.eval_every": 20}
    assert trainers.train(folder, seldom, phase="step", at=9, signal=signal.SIGKILL) == -signal.SIGKILL
    assert max(entry["step"] for entry in run_dir.read_metrics(folder)) == 8
    assert trainers.resume(folder, phase="step", at=1, signal=signal.SIGTERM) == 143
    read = run_dir.read_metrics(folder)
    assert [(entry["step"], entry["attempt"]) for entry in read] == [*((s, 1) for s in range(1, 6)), (6, 2)]


def test_fewer_steps_than_were_made_are_refused(trainers, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    assert trainers.resume(tmp_path / "run", "--train.steps=5") == 2
    assert "--train.steps must be at least 10" in trainers.output
    assert trainers.resume(tmp_path / "run", "--train.steps=12") == 0


def test_the_newest_and_the_best_are_kept(undisturbed):
    steps = [int(path.stem.removeprefix("step_")) for path in run_dir.checkpoints(undisturbed)]
    measured = {e["step"]: e["val_loss"] for e in run_dir.read_metrics(undisturbed) if "val_loss" in e}
    best = min(measured, key=lambda step: measured[step])
    assert steps == sorted({10, 9, 8, best}, reverse=True)
    assert checkpoint.find(undisturbed / "checkpoints", "best").name == f"step_{best:08d}.safetensors"


# --------------------------------------------------------------------------------------------------
# No room


@count(4, 20)
def test_a_full_disk_leaves_the_last_checkpoint_and_names_the_missing_bytes(trainers, tmp_path, n_trials):
    chance = random.Random(n_trials)
    begun = tmp_path / "begun"
    assert trainers.train(begun, phase="step", at=4, signal=signal.SIGTERM) == 143
    size = run_dir.checkpoints(begun)[0].stat().st_size
    for trial in range(n_trials):
        folder = tmp_path / str(trial)
        shutil.copytree(begun, folder)
        warns = bool(trial % 2)
        room = chance.randrange(8000, size)
        choice = f"--train.on_save_error={'warn' if warns else 'stop'}"
        status = trainers.resume(folder, choice, file_bytes=room)
        assert status == 3 and ("step=10/10" in trainers.output) == warns, (room, trainers.output)
        assert "could not be written" in trainers.output and "File too large" in trainers.output
        assert (
            "bytes, " in trainers.output
            and "are free" in trainers.output
            and "Traceback" not in trainers.output
        )
        found, rejected = checkpoint.newest_valid(folder / run_dir.CHECKPOINTS)
        assert found and not rejected and found.name == "step_00000004.safetensors"
        assert not list((folder / run_dir.CHECKPOINTS).glob("*.tmp*"))


def test_a_disk_without_room_for_one_checkpoint_is_refused_before_the_first_step(trainers, tmp_path):
    status = trainers.train(tmp_path / "run", {"train.checkpoint_every": 1}, phase="no room", at=1, signal=0)
    assert status == 3 and "a checkpoint needs" in trainers.output and "train without" in trainers.output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_out_of_memory_names_the_options_that_save_memory(trainers, tmp_path):
    settings = {
        "model.d_model": 512,
        "model.n_layers": 8,
        "model.context_length": 128,
        "train.batch_size": 64,
    }
    status = trainers.train(tmp_path / "run", settings, address_bytes=600_000_000)
    assert status == 4, trainers.output
    assert "out of memory" in trainers.output and "Traceback" not in trainers.output
    assert all(flag in trainers.output for flag in ("--train.batch_size", "--model.context_length"))


# --------------------------------------------------------------------------------------------------
# Not finite


@pytest.fixture
def options(trainers: Trainers, tmp_path: Path) -> config.Config:
    """The options of the trainers, to train in this process."""
    arguments = [f"--data={trainers.home / 'text.txt'}", "--tokenizer=bytes", "--fast=off"]
    arguments += [f"--data_dir={trainers.home / 'data'}", f"--run_dir={tmp_path / 'run'}"]
    return parse.train_options([*arguments, *(f"--{name}={value}" for name, value in SETTINGS.items())])


def inject(monkeypatch: pytest.MonkeyPatch, kind: str, value: float, at: int) -> None:
    """Inject a non-finite value in step `at`."""
    next_batches, step = state.TrainingState.next_batches, trainer.train_step

    def batches(training: state.TrainingState) -> Any:
        ffn = training.model.layers[0].ffn
        if training.step + 1 == at and kind == "weight":
            with torch.no_grad():
                ffn.w2.weight[0, 0] = value
        elif training.step + 1 == at and kind == "output":
            spoil = ffn.register_forward_hook(lambda module, given, output: output + value)
            training.spoil = spoil  # type: ignore[attr-defined]
        elif training.step + 1 == at and kind == "gradient":
            training.spoil = ffn.w2.weight.register_hook(lambda gradient: gradient * value)  # type: ignore
        return next_batches(training)

    def stepped(model: Any, optimizer: Any, batches: Any, number: int, *rest: Any) -> Any:
        if kind == "loss" and number == at:
            with monkeypatch.context() as patch:
                cross_entropy = trainer.F.cross_entropy
                patch.setattr(trainer.F, "cross_entropy", lambda *a, **k: cross_entropy(*a, **k) * value)
                return step(model, optimizer, batches, number, *rest)
        return step(model, optimizer, batches, number, *rest)

    monkeypatch.setattr(state.TrainingState, "next_batches", batches)
    monkeypatch.setattr(trainer, "train_step", stepped)


NAMED = {
    "weight": "the weight layers.0.ffn.w2.weight",
    "output": "layers.0.ffn (",
    "gradient": "layers.0.ffn.w2.weight",
    "loss": "loss",
}


@pytest.mark.parametrize("at", [1, pytest.param(5, marks=pytest.mark.slow), 10])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", NAMED)
def test_what_is_not_finite_is_never_learned_from_and_its_origin_is_named(
    options, monkeypatch, capsys, kind, value, at
):
    applied = []
    apply = optim.AdamW.step
    # torch gives each class of optimizer a step of its own when the first of it is made
    for kind_of_optimizer in (optim.Muon, optim.AdamW):
        monkeypatch.setattr(kind_of_optimizer, "step", lambda self: applied.append(1) or apply(self))
    monkeypatch.setattr(
        job.setup, "print_summary", lambda *_: applied.clear()
    )  # it runs a step on dummy data
    inject(monkeypatch, kind, value, at)
    assert job.main(options) == parse.NOT_FINITE
    error = capsys.readouterr().err
    assert f"step {at}: loss" in error and "lr 0" in error and NAMED[kind] in error, error
    assert len(applied) == at - 1
    found, rejected = checkpoint.newest_valid(Path(options.run_dir) / run_dir.CHECKPOINTS)
    assert not rejected and (checkpoint.verify(found)["step"] if found else 0) == at - 1
    assert all(
        torch.isfinite(t).all() for t in (checkpoint.read_checkpoint(found)[0].values() if found else [])
    )


@pytest.mark.parametrize("kind", ["output", "gradient", "loss"])
def test_a_non_finite_step_can_be_skipped(options, monkeypatch, capsys, kind):
    inject(monkeypatch, kind, float("nan"), 4)
    step = trainer.train_step

    def mended(model: Any, *rest: Any) -> Any:
        try:
            return step(model, *rest)
        finally:
            model.layers[0].ffn._forward_hooks.clear()
            model.layers[0].ffn.w2.weight._backward_hooks = None

    monkeypatch.setattr(trainer, "train_step", mended)
    skipping = dataclasses.replace(options.train, on_nonfinite="skip")
    assert job.main(dataclasses.replace(options, train=skipping)) == 0
    said = capsys.readouterr().out
    assert "step 4: loss" in said and "the step is skipped" in said
    by_step = {m["step"]: m for m in run_dir.read_metrics(options.run_dir) if "train_loss" in m}
    assert sorted(by_step) == list(range(1, STEPS + 1))
    assert by_step[4]["train_loss"] is None and by_step[5]["train_loss"] is not None
    tensors, about = checkpoint.read_checkpoint(run_dir.checkpoints(options.run_dir)[0])
    assert about["optimizer"]["state"]["0"]["step"] == STEPS - 1
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_steps_left_out_end_a_run_only_if_they_are_many_in_a_row(options, monkeypatch):
    monkeypatch.setattr(monitor, "MAX_SKIPPED", 1)
    skipping = dataclasses.replace(options, train=dataclasses.replace(options.train, on_nonfinite="skip"))
    step = trainer.train_step
    for bad, status in (({2, 4, 6}, 0), ({2, 3}, parse.NOT_FINITE)):

        def sometimes(
            model: Any, optimizer: Any, batches: Any, number: int, *rest: Any, bad: Any = bad
        ) -> Any:
            if number in bad:
                raise FloatingPointError(f"step {number}")
            return step(model, optimizer, batches, number, *rest)

        monkeypatch.setattr(trainer, "train_step", sometimes)
        folder = f"{options.run_dir}-{len(bad)}"
        assert job.main(dataclasses.replace(skipping, run_dir=folder)) == status


def test_what_was_learned_is_saved_before_an_error_ends_the_run(options, monkeypatch, capsys):
    seldom = dataclasses.replace(options.train, checkpoint_every=0, eval_every=100)
    with monkeypatch.context() as patch:
        inject(patch, "loss", float("nan"), 6)
        assert job.main(dataclasses.replace(options, train=seldom)) == parse.NOT_FINITE
    assert checkpoint.verify(run_dir.checkpoints(options.run_dir)[0])["step"] == 5
    # and can be gone on with as if nothing had been tried
    whole = str(Path(options.run_dir).with_name("whole"))
    assert job.main(dataclasses.replace(options, train=seldom, run_dir=whole)) == 0
    assert job.main(parse.train_options(["--resume", str(options.run_dir)])) == 0
    assert weights_of(options.run_dir) == weights_of(whole)


def weights_of(folder: Any) -> str:
    tensors = checkpoint.read_checkpoint(run_dir.checkpoints(folder)[0])[0]
    return repr([(name, t.tolist()) for name, t in sorted(tensors.items()) if not name.startswith("rng")])


def test_what_was_seen_before_a_resume_is_known_after_it(options):
    many = dataclasses.replace(options.train, steps=40, eval_every=7, checkpoint_every=0)
    assert job.main(dataclasses.replace(options, train=many)) == 0
    about = checkpoint.verify(run_dir.checkpoints(options.run_dir)[0])
    resumed = parse.train_options(["--resume", str(options.run_dir)])
    training, output = job.setup.start(resumed)
    output.close()
    assert training.spikes.state() == about["spikes"] and len(about["spikes"]["losses"]) == 40
    assert (
        training.best_loss
        == about["best_loss"]
        == min(m["val_loss"] for m in run_dir.read_metrics(options.run_dir) if "val_loss" in m)
    )


def test_compiled_code_on_several_threads_is_not_promised_to_repeat(options, monkeypatch, capsys):
    assert job.main(options) == 0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    for flag, said in (("--deterministic", False), ("--no_deterministic", True)):
        try:
            arguments = ["--resume", str(options.run_dir), "--train.compile", "on", flag]
            job.setup.start(parse.train_options(arguments))[1].close()
        finally:
            torch.use_deterministic_algorithms(False)
        assert ("order of sums in compiled code" in capsys.readouterr().out) == said


def test_a_weight_that_is_not_finite_cannot_be_left_out(options, monkeypatch, capsys):
    inject(monkeypatch, "weight", float("inf"), 4)
    skipping = dataclasses.replace(options.train, on_nonfinite="skip")
    assert job.main(dataclasses.replace(options, train=skipping)) == parse.NOT_FINITE
    assert "skipping does not help" in capsys.readouterr().err


@pytest.mark.parametrize("choice", ["log", "skip"])
def test_a_spike_is_logged_and_skipped_on_request(options, monkeypatch, capsys, choice):
    many = dataclasses.replace(options.train, steps=60, eval_every=100, checkpoint_every=0, on_spike=choice)
    inject(monkeypatch, "loss", 50.0, 50)
    assert job.main(dataclasses.replace(options, train=many)) == 0
    said = capsys.readouterr().out
    assert "step 50: loss spike" in said
    assert ("the step is skipped" in said) == (choice == "skip")
    about = checkpoint.verify(run_dir.checkpoints(options.run_dir)[0])
    assert about["optimizer"]["state"]["0"]["step"] == (59 if choice == "skip" else 60)


# --------------------------------------------------------------------------------------------------
# One process at a time


def test_a_run_is_locked_until_its_process_ends(tmp_path):
    (tmp_path / run_dir.CHECKPOINTS).mkdir()
    code = f"import time; from llm_basics.runs import locks; h = locks.locked({str(tmp_path)!r}); "
    code += "h.__enter__(); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"is locked by pid {holder.pid}"):
        run_dir.RunDir(tmp_path)
    holder.kill()
    holder.wait()
    assert (tmp_path / "lock").exists()
    for _ in range(2):
        run_dir.RunDir(tmp_path).close()
        assert not (tmp_path / "lock").exists()


def test_a_lock_that_is_removed_while_another_process_opens_it_locks_both_out(tmp_path, monkeypatch):
    """A lock on a file that is no longer there would let a third process in."""
    flock, first = locks.fcntl.flock, locks.locked(tmp_path)
    first.__enter__()

    def late(*arguments):
        if first is not None:
            end()
        flock(*arguments)

    def end():
        nonlocal first
        ending, first = first, None
        ending.__exit__(None, None, None)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    with locks.locked(tmp_path), pytest.raises(ValueError, match="is locked by"):
        locks.locked(tmp_path).__enter__()
    assert not (tmp_path / "lock").exists()
