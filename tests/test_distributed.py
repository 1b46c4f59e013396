"""Several processes that train one model: the same losses as one, and an end when one of them fails.

uv run pytest tests/test_distributed.py
uv run pytest -m slow tests/test_distributed.py        under torchrun, twenty tries of each failure
"""

import copy
import datetime
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import trials
from trainers import STEPS, TESTS, Trainers, learned, losses

from llm_basics.cli import parse
from llm_basics.core import config, dataloader, device
from llm_basics.runs import checkpoint, run_dir, sharded_checkpoint, signals
from llm_basics.systems import data_parallel
from llm_basics.training import distributed, job_errors, rendezvous

# divisible by 1, 2 and 4 processes; float32 sums in another order
SAME = {"train.batch_size": 4, "model.dropout": 0, "train.optimizer": "adamw"}
TOLERANCE = 1e-6
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainers]:
    imports = "torch.distributed.fsdp torch.distributed.checkpoint"
    trainers = Trainers(tmp_path_factory.mktemp("nursery"), imports)
    assert trainers.train(tmp_path_factory.mktemp("first") / "run", here=True) == 0, trainers.output
    yield trainers
    assert trainers.process.stdin
    trainers.process.stdin.close()
    trainers.process.wait(20)


@pytest.fixture(scope="module")
def alone(trainers: Trainers, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs of one process, with 1 and with 3 batches to a step."""
    folder = tmp_path_factory.mktemp("alone")
    for n in (1, 3):
        settings = SAME | {"train.grad_accumulation_steps": n}
        assert trainers.train(folder / str(n), settings) == 0, trainers.output
    return {n: folder / str(n) for n in (1, 3)}


def difference(one: Path, other: Path) -> float:
    """The largest difference of two losses of the same step."""
    found = [losses(folder) for folder in (one, other)]
    assert found[0].keys() == found[1].keys()
    return max(abs(found[0][key] - found[1][key]) for key in found[0])


# --------------------------------------------------------------------------------------------------
# The same as one process


@pytest.mark.parametrize(
    ("ranks", "how", "accumulation"),
    [
        (2, "ddp", 3),
        (2, "fsdp2", 3),
        *(
            pytest.param(ranks, how, n, marks=pytest.mark.slow)
            for ranks in (1, 2, 4)
            for how in ("ddp", "fsdp2")
            for n in (1, 3)
            if (ranks, n) != (2, 3)
        ),
    ],
)
def test_processes_learn_what_one_learns(trainers, alone, tmp_path, ranks, how, accumulation):
    settings = SAME | {"train.parallel": how, "train.grad_accumulation_steps": accumulation}
    status = trainers.train(tmp_path / "run", settings, ranks=ranks)
    assert status == 0, trainers.output
    assert difference(alone[accumulation], tmp_path / "run") < TOLERANCE
    # the main process alone has written
    assert trainers.output.count(f"step={STEPS}/{STEPS} train_loss") == 1
    events = [run_dir.read_events(folder) for folder in (tmp_path / "run", alone[accumulation])]
    assert [(e["step"], e["event"]) for e in events[0]] == [(e["step"], e["event"]) for e in events[1]]


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{"train.optimizer": "muon"}, {"model.tie_embeddings": True}])
def test_muon_and_tied_weights_too(trainers, tmp_path, how, options):
    assert trainers.train(tmp_path / "one", SAME | options) == 0, trainers.output
    settings = SAME | options | {"train.parallel": how}
    assert trainers.train(tmp_path / "two", settings, ranks=2) == 0, trainers.output
    # Muon multiplies in bfloat16 where the processor has it, and rounds a sum of two halves otherwise
    is_rounded = options.get("train.optimizer") == "muon" and device.matmul_dtype(CPU) is torch.bfloat16
    assert difference(tmp_path / "one", tmp_path / "two") < (1e-3 if is_rounded else TOLERANCE)


def test_a_run_moves_between_one_process_and_several(trainers, alone, tmp_path):
    stops = [(1, "ddp", 3), (2, "fsdp2", 3), (1, "none", 2)]
    for i, (ranks, how, steps) in enumerate(stops):
        plan: dict[str, Any] = {"phase": "step", "at": steps, "signal": signal.SIGTERM, "ranks": ranks}
        plan |= {} if how != "none" else {"environment": {}}
        if i == 0:
            status = trainers.train(tmp_path / "run", SAME | {"train.parallel": how}, **plan)
        else:
            status = trainers.resume(tmp_path / "run", "--train.parallel", how, **plan)
        assert status == 143, trainers.output
        assert ("processes was" in trainers.output) == (i > 0)
    assert trainers.resume(tmp_path / "run", "--train.parallel", "fsdp2", ranks=2) == 0, trainers.output
    assert difference(alone[1], tmp_path / "run") < TOLERANCE
    state = checkpoint.verify(run_dir.checkpoints(tmp_path / "run")[0])
    assert state["sequences"] == 4 * STEPS and state["step"] == STEPS


def test_dropout_differs_by_process_and_a_resume_repeats_it(trainers, tmp_path):
    settings = {"train.batch_size": 4, "train.parallel": "ddp"}
    assert trainers.train(tmp_path / "whole", settings, ranks=2) == 0, trainers.output
    status = trainers.train(tmp_path / "run", settings, ranks=2, phase="step", at=4, signal=15, rank=1)
    assert status == 143 and trainers.resume(tmp_path / "run", ranks=2) == 0, trainers.output
    assert learned(tmp_path / "run") == learned(tmp_path / "whole")
    distributed_seeds = set()
    for rank in (0, 1):
        os.environ["RANK"] = str(rank)
        try:
            distributed.size, before = (lambda: 2), distributed.size
            distributed.seed(0, 3, torch.device("cpu"))
            distributed_seeds.add(torch.rand(1).item())
        finally:
            distributed.size = before
            del os.environ["RANK"]
    assert len(distributed_seeds) == 2


@pytest.mark.parametrize("n_rows", [1, 2, 3, 7, 8])
def test_the_rows_of_all_processes_are_the_batch(monkeypatch, n_rows):
    inputs = torch.arange(n_rows)[:, None]
    for size in (1, 2, 4):
        monkeypatch.setattr(distributed, "size", lambda size=size: size)
        found = []
        for rank in range(size):
            monkeypatch.setenv("RANK", str(rank))
            mine, targets = distributed.rows((inputs, inputs + 1))
            assert mine.shape == targets.shape and len(mine)
            found += mine[targets != dataloader.IGNORE_INDEX].tolist()
        assert found == list(range(n_rows))


def test_a_learners_own_data_parallelism_trains_too(trainers, alone, tmp_path):
    # not the name of the reference, which a learner's file must not call
    source = Path(data_parallel.__file__).read_text().replace("broadcast_from_rank_0", "from_rank_0")
    (tmp_path / "mine.py").write_text(source)
    settings = SAME | {"train.parallel": "mine", "mine": tmp_path / "mine.py"}
    settings |= {"train.grad_accumulation_steps": 3}
    assert trainers.train(tmp_path / "run", settings, ranks=2) == 0, trainers.output
    assert "DistributedDataParallel from" in trainers.output
    assert difference(alone[3], tmp_path / "run") < TOLERANCE
    (tmp_path / "mine.py").write_text("def silu(x):\n    return x / (1 + (-x).exp())\n")
    assert trainers.train(tmp_path / "other", settings, ranks=2) == 2
    assert trainers.output.count("needs a class DistributedDataParallel") == 1


# --------------------------------------------------------------------------------------------------
# Sharded checkpoints


SHARDED = SAME | {"train.parallel": "fsdp2", "train.checkpoint_every": 4, "train.eval_every": 4}


@pytest.fixture(scope="module")
def sharded(trainers: Trainers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that has written sharded checkpoints while it trained."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    status = trainers.train(folder, SHARDED | {"train.sharded_checkpoints": "async"}, ranks=2)
    assert status == 0, trainers.output
    names = [path.name for path in sharded_checkpoint.folders(folder / "checkpoints")]
    assert names == [f"step_{step:08d}.sharded" for step in (10, 8, 4)]
    return folder


def newest(folder: Path) -> Path:
    return sharded_checkpoint.folders(folder / "checkpoints")[0]


def test_shards_and_one_file_hold_the_same(trainers, sharded, tmp_path):
    assert trainers.train(tmp_path / "one", SHARDED, ranks=2) == 0, trainers.output
    merged = sharded_checkpoint.merge(newest(sharded))
    expected, about = checkpoint.read_checkpoint(run_dir.checkpoints(tmp_path / "one")[0])
    found, about_found = checkpoint.read_checkpoint(merged)
    assert found.keys() == expected.keys() and about["optimizer"] == about_found["optimizer"]
    assert all(torch.equal(found[name], expected[name]) for name in found if name != "rng.torch")
    merged.rename(tmp_path / merged.name)
    folder = sharded_checkpoint.split(tmp_path / merged.name)
    again = sharded_checkpoint.merge(folder)
    assert checkpoint.weights_sha256(again) == checkpoint.weights_sha256(
        run_dir.checkpoints(tmp_path / "one")[0]
    )


@pytest.mark.parametrize("ranks", [2, 0, pytest.param(4, marks=pytest.mark.slow)])
def test_shards_are_resumed_by_any_number_of_processes(trainers, sharded, tmp_path, ranks):
    shutil.copytree(sharded, tmp_path / "run")
    shutil.rmtree(newest(tmp_path / "run"))
    how = [] if ranks else ["--train.parallel", "none", "--train.sharded_checkpoints", "off"]
    plan = {"ranks": ranks} if ranks else {}
    assert trainers.resume(tmp_path / "run", *how, **plan) == 0, trainers.output
    assert "step_00000008.sharded" in trainers.output
    assert difference(tmp_path / "run", sharded) < TOLERANCE
    if ranks == 2:
        assert "bit for bit" in trainers.output and difference(tmp_path / "run", sharded) == 0


def test_incomplete_and_damaged_shards_are_not_used(trainers, sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    newest(tmp_path / "run").rename(checkpoints / "step_00000010.sharded.incomplete")
    damaged = next(newest(tmp_path / "run").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match="must have .* bytes"):
        sharded_checkpoint.read_about(newest(tmp_path / "run"))
    assert trainers.resume(tmp_path / "run", ranks=2) == 0, trainers.output
    assert "step_00000008.sharded" in trainers.output and "not used" in trainers.output
    assert "resuming from" in trainers.output and "step_00000004.sharded" in trainers.output
    assert not list(checkpoints.glob("*.incomplete"))
    assert difference(tmp_path / "run", sharded) < TOLERANCE


# --------------------------------------------------------------------------------------------------
# Failures


@pytest.mark.parametrize(
    ("rank", "plan", "message"),
    [
        (1, {"do": "raise"}, "RuntimeError: the test has failed"),
        (0, {"do": "exit"}, ""),
        (1, {"signal": signal.SIGKILL}, "another process of the job has ended"),
    ],
)
def test_one_process_that_fails_ends_all(trainers, tmp_path, rank, plan, message):
    began = time.monotonic()
    settings = SAME | {"train.steps": 1000}
    status = trainers.train(tmp_path / "run", settings, ranks=2, rank=rank, phase="step", at=3, **plan)
    assert status == {"raise": 1, "exit": 7}.get(plan.get("do"), -9), trainers.output
    # an error is printed once, by the process that failed first, or lost another one
    last = trainers.output.strip().splitlines()[-1]
    assert message in last and trainers.output.count("Traceback") == (plan.get("do") == "raise")
    assert time.monotonic() - began < 60


def test_a_process_that_hangs_prints_where_and_all_end(trainers, tmp_path):
    settings = SAME | {"train.steps": 1000, "train.timeout_seconds": 2}
    plan = {"phase": "step", "at": 3, "do": "hang", "rank": 1, "ranks": 2}
    status = trainers.train(tmp_path / "run", settings, **plan)
    assert status == job_errors.OTHER_FAILED, trainers.output
    assert "longer than train.timeout_seconds" in trainers.output
    assert "rank 1 hangs here" in trainers.output and "nursery.py" in trainers.output


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_saves_once_at_the_same_step(trainers, tmp_path, rank):
    settings = SAME | {"train.checkpoint_every": 0, "train.eval_every": 100}
    plan = {"phase": "backward", "at": 4, "signal": signal.SIGTERM, "rank": rank, "ranks": 2}
    assert trainers.train(tmp_path / "run", settings, **plan) == 143, trainers.output
    (saved,) = run_dir.checkpoints(tmp_path / "run")
    assert saved.name == "step_00000004.safetensors"
    assert trainers.output.count("stopped by SIGTERM after step 4") == 1


PHASES = [
    *((rank, phase, at) for rank in (0, 1) for phase, at in (("backward", 7), ("evaluation batch", 5))),
    *((rank, phase, at) for rank in (0, 1) for phase, at in (("data", 3), ("step", 9), ("evaluation", 2))),
    *((0, phase, at) for phase, at in (("sampling", 2), ("save", 4), ("hashing", 5), ("conclusion", 1))),
]


def test_a_signal_in_any_phase_stops_all_and_a_resume_repeats_nothing(trainers, tmp_path):
    settings = {"train.batch_size": 4, "train.parallel": "ddp"}
    assert trainers.train(tmp_path / "whole", settings, ranks=2) == 0, trainers.output
    for i, (rank, phase, at) in enumerate(PHASES if trials.is_full else PHASES[::6]):
        folder = tmp_path / str(i)
        plan = {"phase": phase, "at": at, "signal": signal.SIGUSR1, "rank": rank, "ranks": 2}
        status = trainers.train(folder, settings, **plan)
        assert status == 128 + signal.SIGUSR1, (phase, rank, trainers.output)
        assert trainers.output.count("stopped by SIGUSR1") == 1
        assert trainers.resume(folder, ranks=2) == 0, trainers.output
        assert learned(folder) == learned(tmp_path / "whole"), (phase, rank)


NAN_LOSS = """
import os, torch
calls = [0]

def compute_loss(logits, targets, z_loss=0.0):
    calls[0] += logits.requires_grad
    loss = -torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0)[..., None]).mean()
    return loss * float("nan") if os.environ["RANK"] == "1" and calls[0] in (5, 6) else loss
"""


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_in_one_process_updates_none(trainers, tmp_path, how):
    (tmp_path / "mine.py").write_text(NAN_LOSS)
    settings = SAME | {"mine": tmp_path / "mine.py", "train.parallel": how, "train.checkpoint_every": 1}
    assert trainers.train(tmp_path / "stop", settings, ranks=2) == parse.NOT_FINITE, trainers.output
    origin = "rank 1: the loss is nan" if how == "ddp" else "is unknown with sharded weights"
    assert trainers.output.count("step 5: loss nan") == 1 and origin in trainers.output
    assert checkpoint.verify(run_dir.checkpoints(tmp_path / "stop")[0])["step"] == 4
    settings["train.on_nonfinite"] = "skip"
    assert trainers.train(tmp_path / "skip", settings, ranks=2) == 0, trainers.output
    assert "the step is skipped" in trainers.output
    assert [e["event"] for e in run_dir.read_events(tmp_path / "skip")].count("skipped") in (1, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_pickled(number):
    copied = copy.copy(signals.Stopped(number))
    assert (copied.name, copied.status) == (signal.Signals(number).name, 128 + number)


# --------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    ("options", "train", "environment", "message"),
    [
        ({}, {"batch_size": 3}, {}, "divisible by the number of processes, got 3 and 2"),
        ({}, {"parallel": "none"}, {}, "must be ddp or fsdp2 in a job of 2 processes"),
        ({"find_lr": True}, {}, {}, "find_lr must run in one process"),
        ({}, {"compile": "graphs"}, {}, "graphs must run in one process"),
        ({}, {"parallel": "mine"}, {}, "needs --mine FILE"),
        ({}, {"offload": True}, {}, "offload needs --train.parallel fsdp2 and a GPU"),
        ({}, {"sharded_checkpoints": "on"}, {}, "sharded_checkpoints needs --train.parallel fsdp2"),
        ({}, {}, {"TORCHELASTIC_MAX_RESTARTS": "3"}, "--max-restarts needs --run_dir"),
        ({}, {}, {"RANK": "one"}, "must be numbers, as torchrun sets them"),
    ],
)
def test_what_does_not_work_in_a_job_is_refused(monkeypatch, options, train, environment, message):
    for name, value in ({"RANK": "0", "WORLD_SIZE": "2"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.check(config.Config(train=config.TrainConfig(**train), **options))


def test_an_attempt_meets_apart_from_earlier_ones():
    """torchrun keeps its store over restarts: what is left there must not be taken for new."""
    store, found = dist.HashStore(), {}

    def attempt(ranks, patience=10.0):
        def join(rank):
            try:
                found[rank] = rendezvous.agree(store, rank, 3, datetime.timedelta(seconds=patience))
            except Exception as error:
                found[rank] = error

        found.clear()
        threads = [threading.Thread(target=join, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[rank] for rank in ranks]

    (first,) = set(attempt([0, 1, 2]))
    # in the next ones a process ends before it joins
    (error, _) = attempt([0, 1], patience=0.2)
    assert isinstance(error, TimeoutError) and "ranks [2] of 3 have not joined" in str(error)
    assert all(isinstance(each, Exception) for each in attempt([1, 2], patience=0.1))
    (last,) = set(attempt([2, 1, 0]))
    assert isinstance(last, str) and last != first


def test_alone_nothing_is_distributed(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.strategy(config.TrainConfig()) == "none" and distributed.is_main()
    assert distributed.on_main(lambda: 3) == distributed.main_first(lambda: 3) == 3
    assert distributed.sums([1.5]) == [1.5] and distributed.from_main(["a"]) == ["a"]
    with pytest.raises(ValueError, match="sharded_checkpoints needs --train.parallel fsdp2"):
        distributed.check(config.Config(train=config.TrainConfig(sharded_checkpoints="on")))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.strategy(config.TrainConfig()) == "ddp"


# --------------------------------------------------------------------------------------------------
# Under torchrun

OWN_SCHEDULE = """
import os, signal, sys, time

def cosine_schedule(step: int, max_lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    how, rank, at = os.environ["FAULT"].split(",")
    if step == int(at) and os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        with open(os.environ["FAULT_TIME"], "w") as file:
            file.write(str(time.time()))
        if how == "raise":
            raise RuntimeError("the schedule is broken")
        if how == "exit":
            sys.exit(7)
        while how == "hang":
            time.sleep(0.1)
        os.kill(os.getpid(), getattr(signal, how))
    return max_lr
"""


class Torchrun:
    """Runs of a small model under torchrun on two processes, with a failure in one."""

    def __init__(self, home: Path) -> None:
        self.home, self.output = home, ""
        (home / "mine.py").write_text(OWN_SCHEDULE)
        (home / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(200)))

    def run(self, folder: Path, fault: str, how: str = "ddp", *options: str) -> tuple[int, float]:
        """The exit status, and the seconds from the failure to the end."""
        environment = os.environ | {"FAULT": fault, "FAULT_TIME": str(self.home / "time")}
        environment |= {"PYTHONPATH": str(TESTS.parent)}
        command = (
            f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2 {' '.join(options)}"
        )
        command += f" -m llm_basics.train --data {self.home}/text.txt --tokenizer bytes --fast off"
        command += f" --data_dir {self.home}/data --run_dir {folder} --mine {self.home}/mine.py"
        command += " --model.d_model 16 --model.n_layers 1 --model.n_heads 2 --model.context_length 16"
        command += " --train.batch_size 4 --train.steps 30 --train.log_every 1 --train.schedule cosine"
        command += f" --train.checkpoint_every 5 --train.sample_tokens 5 --train.parallel {how}"
        done = subprocess.run(command.split(), env=environment, capture_output=True, text=True, timeout=300)
        ended, file = time.time(), self.home / "time"
        self.output = done.stdout + done.stderr
        seconds = ended - float(file.read_text()) if file.exists() else 0.0
        file.unlink(missing_ok=True)
        return done.returncode, seconds


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Torchrun:
    return Torchrun(tmp_path_factory.mktemp("torchrun"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "exit", "SIGKILL", "hang", "SIGSTOP", "SIGTERM"])
def test_a_failure_under_torchrun_ends_the_job_within_20_seconds(torchrun, tmp_path, how):
    random.seed(0)
    found = []
    for i in range(trials.count(20)):
        rank, at, strategy = random.randrange(2), random.randrange(1, 30), random.choice(["ddp", "fsdp2"])
        status, seconds = torchrun.run(tmp_path / str(i), f"{how},{rank},{at}", strategy)
        assert status == 1 and seconds < 20, torchrun.output
        found.append(seconds)
        root = torchrun.output.rpartition("Root Cause")[2]
        # the first error is the last that is printed
        expected = {"raise": "the schedule is broken", "SIGKILL": "SIGKILL", "exit": "exitcode  : 7"}
        assert expected.get(how, "") in root, torchrun.output
        left = subprocess.run(["pgrep", "-f", str(tmp_path / str(i))], capture_output=True, text=True).stdout
        assert not left, f"processes are left: {left}"
        if how == "SIGTERM":
            saved = run_dir.checkpoints(tmp_path / str(i))[0]
            assert checkpoint.verify(saved)["step"] == at and "after step" in torchrun.output
    print(f"{how}: {len(found)} tries, {min(found):.1f} to {max(found):.1f} s")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_torchrun_restarts_a_job_to_the_last_bit(torchrun, tmp_path, how):
    assert torchrun.run(tmp_path / "whole", "none,0,0", how)[0] == 0, torchrun.output
    for i, fault in enumerate(("SIGKILL,1,13", "raise,0,2", "exit,1,30")):
        folder = tmp_path / str(i)
        assert torchrun.run(folder, fault, how, "--max-restarts", "2")[0] == 0, torchrun.output
        paths = [run_dir.checkpoints(each)[0] for each in (tmp_path / "whole", folder)]
        assert checkpoint.weights_sha256(paths[0]) == checkpoint.weights_sha256(paths[1])
        assert losses(tmp_path / "whole") == losses(folder)
