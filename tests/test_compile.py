"""torch.compile around a model in training, and where it fails.

Run alone: uv run pytest tests/test_compile.py
"""

import dataclasses
import inspect
import shutil
import subprocess
import sys

import pytest
import torch

from llm_basics import swap
from llm_basics.core import config, model, trainer
from llm_basics.runs import run_dir
from llm_basics.training import compilation, job, setup

SHAPE = config.ModelConfig(vocab_size=257, context_length=16, d_model=32, n_layers=1, n_heads=2)


@pytest.fixture
def options(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(500)))
    settings = config.TrainConfig(
        steps=3, batch_size=2, warmup_steps=1, eval_batches=1, sample_tokens=2, device="cpu", compile="on"
    )
    with swap.restored():
        yield config.Config(
            data=str(text),
            tokenizer="bytes",
            data_dir=str(tmp_path / "data"),
            run_dir=str(tmp_path / "run"),
            model=SHAPE,
            train=settings,
        )


def test_auto_compiles_nothing_on_a_cpu(options):
    automatic = dataclasses.replace(options.train, compile="auto")
    training, output = setup.start(dataclasses.replace(options, train=automatic))
    output.close()
    assert not training.is_compiled and "hidden_states" not in vars(training.model)


def test_graphs_are_for_cuda_and_one_batch_a_step(options, capsys):
    graphs = dataclasses.replace(options.train, compile="graphs")
    with pytest.raises(SystemExit) as stop:
        job.main(dataclasses.replace(options, train=graphs))
    assert stop.value.code == 2 and "needs CUDA, got the device cpu" in capsys.readouterr().err
    with pytest.raises(
        ValueError, match="grad_accumulation_steps must be 1 with train.compile graphs.*got 2"
    ):
        dataclasses.replace(graphs, grad_accumulation_steps=2)


def test_auto_makes_graphs_of_small_models_on_cuda():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    most = int(compilation.MAX_GRAPH_FLOPS)
    assert compilation.mode("auto", cuda, most, can_be_graph=True) == "graphs"
    assert compilation.mode("auto", cuda, most + 1, can_be_graph=True) == "on"
    assert compilation.mode("auto", cuda, 1, can_be_graph=False) == "on"
    assert compilation.mode("auto", cpu, 1, can_be_graph=True) == "off"
    for how in ("on", "off", "graphs"):
        assert compilation.mode(how, cuda, 10 * most, can_be_graph=True) == how


@pytest.mark.gpu
def test_graphs_learn_the_same(options):
    losses = {}
    for how in ("off", "graphs"):
        settings = dataclasses.replace(options.train, steps=20, device="cuda", dtype="float32", compile=how)
        folder = f"{options.run_dir}-{how}"
        assert job.main(dataclasses.replace(options, run_dir=folder, train=settings)) == 0
        losses[how] = [m["train_loss"] for m in run_dir.read_metrics(folder) if "train_loss" in m]
    assert losses["graphs"] == pytest.approx(losses["off"], rel=1e-4)


def test_what_cannot_be_compiled_is_trained_without_and_that_is_said(options, monkeypatch, capsys):
    def no_compiler(function, **settings):
        def fails(*args, **kwargs):
            raise RuntimeError("no C++ compiler was found\nand more")

        return fails

    losses = []
    step = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", lambda *a: losses.append(result := step(*a)) or result)
    monkeypatch.setattr(torch, "compile", no_compiler)
    assert job.main(options) == 0
    out = capsys.readouterr()
    assert (out.out + out.err).count("could not be compiled (no C++ compiler was found)") == 1
    never = dataclasses.replace(options.train, compile="off")
    assert job.main(dataclasses.replace(options, run_dir=options.run_dir + "2", train=never)) == 0
    assert [x.train_loss for x in losses[:3]] == [x.train_loss for x in losses[3:]]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("fast", "own"), [("on", False), ("off", False), ("on", True)])
def test_a_compiled_model_learns_the_same(tmp_path, fast, own):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(500)))
    mine = tmp_path / "mine.py"
    mine.write_text(inspect.getsource(model))
    losses = []
    for compile in ("on", "off"):
        # in a process of its own, where no annotations are checked: that is code too
        command = [sys.executable, "-m", "llm_basics.train", "--data", str(text), "--tokenizer", "bytes"]
        command += ["--data_dir", str(tmp_path / "data"), "--run_dir", str(tmp_path / f"run_{compile}")]
        command += [
            "--train.compile",
            compile,
            "--fast",
            fast,
            "--train.steps",
            "3",
            "--train.log_every",
            "1",
        ]
        command += ["--model.d_model", "32", "--model.n_heads", "2", "--model.n_layers", "1"]
        command += ["--model.context_length", "16", "--train.sample_tokens", "2", "--train.device", "cpu"]
        done = subprocess.run(
            command + (["--mine", str(mine)] if own else []), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "could not be compiled" not in done.stdout + done.stderr
        metrics = run_dir.read_metrics(tmp_path / f"run_{compile}")
        losses.append([m["train_loss"] for m in metrics if m.get("train_loss") is not None])
    assert len(losses[0]) == 3
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=1e-5)
