"""Training: each step, whole runs, resuming, the program. Alone: uv run pytest tests/test_train.py"""

import collections
import dataclasses
import io
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as tF

from llm_basics import swap
from llm_basics.cli import commands, parse
from llm_basics.core import config, device, model, presets, tokenizer, trainer
from llm_basics.data import prepare, shards
from llm_basics.inference import engine, samples
from llm_basics.runs import checkpoint, run_dir
from llm_basics.training import held_out, job, loop, setup, state

SHAPE = config.ModelConfig(vocab_size=257, context_length=16, d_model=32, n_layers=2, n_heads=2)
SETTINGS = config.TrainConfig(
    steps=8,
    batch_size=4,
    lr=1e-2,
    warmup_steps=2,
    log_every=1,
    eval_every=3,
    eval_batches=2,
    sample_every=4,
    sample_tokens=5,
    checkpoint_every=3,
    device="cpu",
)


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
    )


@pytest.fixture
def lm():
    torch.manual_seed(0)
    return model.TransformerLM(SHAPE)


def random_batch(rows, length=16, seed=0):
    tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, 257, (rows, length + 1)))
    return tokens[:, :-1], tokens[:, 1:]


def weights(network):
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


# --------------------------------------------------------------------------------------------------
# One step


def test_a_step_is_forward_loss_backward_clip_update(lm):
    """Compared with the same step written with torch's own loss, clipping and optimizer."""
    other = model.TransformerLM(SHAPE).double()
    other.load_state_dict(lm.double().state_dict())
    optimizer = trainer.make_optimizer(lm, SETTINGS)
    inputs, targets = random_batch(4)
    result = trainer.train_step(lm, optimizer, [(inputs, targets)], 1, SETTINGS)

    loss = tF.cross_entropy(other(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(other.parameters(), SETTINGS.max_grad_norm)
    decayed = [p for p in other.parameters() if p.dim() > 1]
    kept = [p for p in other.parameters() if p.dim() == 1]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}],
        lr=SETTINGS.lr / 2,
        betas=(0.9, 0.95),
    )
    reference.step()
    assert result.train_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    assert result.lr == SETTINGS.lr / 2
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(lm.state_dict()[name], parameter.detach(), rtol=1e-7, atol=1e-7, msg=name)


def test_every_parameter_learns(lm):
    before = weights(lm)
    optimizer = trainer.make_optimizer(lm, SETTINGS)
    trainer.train_step(lm, optimizer, [random_batch(4)], 1, SETTINGS)
    assert all(not torch.equal(before[name], parameter) for name, parameter in weights(lm).items())


def test_gradients_do_not_add_up_over_steps(lm):
    still = dataclasses.replace(SETTINGS, lr=0.0, min_lr=0.0)
    optimizer = trainer.make_optimizer(lm, still)
    norms = [
        trainer.train_step(lm, optimizer, [random_batch(4)], s, still).grad_norm.item() for s in (1, 2, 3)
    ]
    assert norms[0] == pytest.approx(norms[1]) == pytest.approx(norms[2])


@pytest.mark.parametrize("rows", [(6,), (3, 3), (2, 2, 2), (1,) * 6, (1, 5), (3, 1, 2)])
def test_accumulated_gradient_is_that_of_the_whole_batch(lm, rows):
    inputs, targets = random_batch(6)
    whole = lm.double()
    optimizer = trainer.make_optimizer(whole, SETTINGS)
    start = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    expected = trainer.train_step(whole, optimizer, [(inputs, targets)], 3, SETTINGS)
    gradients = [p.grad.clone() for p in whole.parameters()]
    after = weights(whole)

    whole.load_state_dict(start)
    parts = list(zip(inputs.split(rows), targets.split(rows), strict=True))
    found = trainer.train_step(whole, trainer.make_optimizer(whole, SETTINGS), parts, 3, SETTINGS)
    torch.testing.assert_close(found.train_loss, expected.train_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close([p.grad for p in whole.parameters()], gradients, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(weights(whole), after, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("lengths", [(16, 5), (3, 16, 1, 9), (1, 1, 2)])
def test_accumulated_gradient_counts_each_target_once_where_lengths_differ(lm, lengths):
    parts = [random_batch(2, length, seed=length) for length in lengths]
    trainer.train_step(
        lm, trainer.make_optimizer(lm, SETTINGS), parts, 1, dataclasses.replace(SETTINGS, lr=0.0, min_lr=0.0)
    )
    found = [p.grad.clone() for p in lm.parameters()]
    lm.zero_grad()
    losses_ = [tF.cross_entropy(lm(x).flatten(0, 1), y.flatten(), reduction="sum") for x, y in parts]
    (sum(losses_) / sum(y.numel() for _, y in parts)).backward()
    norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), SETTINGS.max_grad_norm)
    assert norm > 0
    torch.testing.assert_close(found, [p.grad for p in lm.parameters()], rtol=1e-5, atol=1e-6)


def test_deterministic_runs_repeat_bit_for_bit(options, monkeypatch, capsys):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        for name in "ab":
            chosen = dataclasses.replace(options, deterministic=True, run_dir=options.run_dir + name)
            assert job.main(chosen) == 0
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(options.run_dir + "a") == losses(options.run_dir + "b")
    assert "deterministic" in capsys.readouterr().out


def test_z_loss_reaches_the_loss(lm):
    batch = random_batch(2)
    plain = trainer.train_step(lm, trainer.make_optimizer(lm, SETTINGS), [batch], 8, SETTINGS).train_loss
    lm.load_state_dict(model_of_seed_0().state_dict())
    heavy = dataclasses.replace(SETTINGS, z_loss=0.5)
    with_z = trainer.train_step(lm, trainer.make_optimizer(lm, heavy), [batch], 8, heavy).train_loss
    expected = model_of_seed_0()(batch[0]).logsumexp(-1).square().mean() * 0.5
    assert (with_z - plain).item() == pytest.approx(expected.item(), rel=1e-4)


def model_of_seed_0():
    torch.manual_seed(0)
    return model.TransformerLM(SHAPE)


def test_optimizer_defaults_and_groups(lm):
    optimizer = trainer.make_optimizer(lm, config.TrainConfig())
    assert all((g["lr"], g["betas"]) == (3e-4, (0.9, 0.95)) for g in optimizer.param_groups)
    decay_of = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in lm.named_parameters():
        assert decay_of[id(parameter)] == (0.0 if "ln" in name else 0.1), name


def test_biases_do_not_decay():
    gpt2 = model.TransformerLM(dataclasses.replace(presets.load("gpt2-nano").model, n_layers=1))
    optimizer = trainer.make_optimizer(gpt2, config.TrainConfig())
    decay_of = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert sorted(decay_of) == sorted(id(p) for p in gpt2.parameters())
    for name, parameter in gpt2.named_parameters():
        assert decay_of[id(parameter)] == (0.0 if "ln" in name or "bias" in name else 0.1), name


def test_gradient_that_is_not_finite_stops_before_the_update(lm):
    with torch.no_grad():
        lm.layers[1].ffn.w1.weight[0, 0] = math.inf
    before = weights(lm)
    with pytest.raises(
        FloatingPointError,
        match="step 5: loss nan, lr 0.00.*gradient norm nan; loss and gradient norm must be finite",
    ):
        trainer.train_step(lm, trainer.make_optimizer(lm, SETTINGS), [random_batch(2)], 5, SETTINGS)
    assert all(torch.equal(before[name], parameter) for name, parameter in weights(lm).items())


def test_loss_falls_on_a_pattern(lm):
    """A text of period 7 is predicted with certainty after a few steps; at first it is ln 257."""
    tokens = torch.arange(17).repeat(8, 1) % 7
    settings = dataclasses.replace(SETTINGS, steps=60)
    optimizer = trainer.make_optimizer(lm, settings)
    batch = (tokens[:, :-1], tokens[:, 1:])
    losses = [trainer.train_step(lm, optimizer, [batch], s, settings).train_loss.item() for s in range(1, 61)]
    assert abs(losses[0] - math.log(257)) < 1.0
    assert losses[-1] < 0.05


def test_random_tokens_cannot_be_learned():
    """What sees its targets would fall far below ln 23 on tokens that nothing predicts."""
    torch.manual_seed(0)
    lm = model.TransformerLM(dataclasses.replace(SHAPE, vocab_size=23))
    settings = dataclasses.replace(SETTINGS, steps=80)
    optimizer = trainer.make_optimizer(lm, settings)
    for step in range(1, 81):
        inputs, targets = random_batch(8, seed=step)
        loss = trainer.train_step(
            lm, optimizer, [(inputs % 23, targets % 23)], step, settings
        ).train_loss.item()
    assert math.log(23) - 0.1 < loss < math.log(23) + 0.4


def test_devices():
    assert device.choose("cpu").type == "cpu"
    assert device.choose("auto").type in ("cpu", "cuda", "mps")
    for wrong in ("abacus", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(ValueError, match=f"the device must be available, got {wrong}"):
            device.choose(wrong)


def test_loss_is_not_rounded_to_bfloat16(lm):
    settings = dataclasses.replace(SETTINGS, dtype="bfloat16")
    batch = random_batch(4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = tF.cross_entropy(lm(batch[0]).double().flatten(0, 1), batch[1].flatten())
    result = trainer.train_step(lm, trainer.make_optimizer(lm, settings), [batch], 1, settings)
    assert result.train_loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_bfloat16_on_request(lm):
    settings = dataclasses.replace(SETTINGS, dtype="bfloat16")
    seen = []
    lm.layers[0].attn.q_proj.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    result = trainer.train_step(lm, trainer.make_optimizer(lm, settings), [random_batch(2)], 1, settings)
    assert seen == [torch.bfloat16] and result.train_loss.isfinite()
    assert all(p.dtype == torch.float32 for p in lm.parameters())


# --------------------------------------------------------------------------------------------------
# Whole runs


def losses(folder):
    return {m["step"]: m["train_loss"] for m in run_dir.read_metrics(folder) if "train_loss" in m}


@pytest.mark.whole_run
def test_a_run_leaves_everything_in_its_directory(options, tmp_path, capsys):
    assert job.main(options) == 0
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "config.json",
        "events.jsonl",
        "log.txt",
        "loss.png",
        "metrics.jsonl",
        "samples.jsonl",
        "tokenizer",
    }
    assert [path.name for path in run_dir.checkpoints(folder)] == [
        f"step_{step:08d}.safetensors" for step in (8, 6, 3)
    ]
    metrics = run_dir.read_metrics(folder)
    assert [m["step"] for m in metrics if "train_loss" in m] == list(range(1, 9))
    assert [m["step"] for m in metrics if "val_loss" in m] == [3, 6, 8]
    measured = {"train_loss", "lr", "grad_norm", "step_seconds", "tokens_per_second", "eta_seconds"}
    assert set(metrics[0]) == {"step", "attempt"} | measured
    said = capsys.readouterr().out
    assert "unigram entropy" in said and f"python -m llm_basics.generate {folder}" in said
    restored, tokenizer = engine.load_run(folder)
    assert restored.config == SHAPE and tokenizer.vocab_size == 257


@pytest.mark.parametrize("rise", [0.1, 0.3])
def test_overfitting_is_reported(options, monkeypatch, capsys, rise):
    evaluate = state.TrainingState.evaluate

    def rising(self, n_batches):
        # the loss is exactly 1 first
        losses.append(1.0 + (rise if losses else 0.0))
        return evaluate(self, n_batches) | {"val_loss": losses[-1]}

    losses = []
    monkeypatch.setattr(state.TrainingState, "evaluate", rising)
    assert job.main(options) == 0
    said = capsys.readouterr().out
    assert ("overfitting: the validation loss rose from 1.000 to 1.300" in said) == (rise == 0.3)


def test_a_run_records_what_its_losses_are_measured_on(options):
    """The hash of the held-out text is the same for all tokenizers."""

    def recorded(**changes):
        training = setup.of_text(dataclasses.replace(options, **changes))
        return training.measured_on["text"], training.measured_on["tokenizer"]

    text, bytes_only = recorded()
    same, bpe = recorded(tokenizer="bpe", model=dataclasses.replace(SHAPE, vocab_size=270))
    assert same == text and bpe != bytes_only
    assert recorded(val_fraction=0.2)[0] != text
    assert job.main(options) == 0
    assert run_dir.read_held_out(options.run_dir) == {"text": text, "tokenizer": bytes_only}
    assert run_dir.HELD_OUT not in run_dir.read_config(options.run_dir)


def test_a_run_records_the_unigram_entropy_of_its_held_out_text(options):
    held_out = setup.of_text(options).held_out
    assert job.main(options) == 0
    counts = collections.Counter(held_out.tolist()).values()
    entropy = -sum(n / len(held_out) * math.log(n / len(held_out)) for n in counts)
    recorded = run_dir.read_recorded(options.run_dir)
    assert recorded[run_dir.BASELINES] == {"unigram entropy": pytest.approx(entropy)}
    assert recorded[run_dir.TRAINING_TOKENS] > len(held_out)
    assert not recorded.keys() & run_dir.read_config(options.run_dir).keys()


def test_long_text_is_recorded_by_its_beginning(monkeypatch):
    """Whatever the tokenizer, whose tokens may end within a character."""
    monkeypatch.setattr(held_out, "DIGEST_CHARACTERS", 10)
    merged = tokenizer.Tokenizer({b: bytes([b]) for b in range(256)} | {256: b"th"}, [(b"t", b"h")])
    text = "th\u00e9 \U0001f600\U0001f600 th\u00e9" * 9
    hashes = {
        held_out.digest(each, np.array(each.encode(text)), n_bytes)
        for each in (tokenizer.Tokenizer.byte_level(), merged)
        for n_bytes in (5, 6)
    }
    assert len(hashes) == 2


def test_the_program_writes_the_same_with_and_without_twins(options, capsys):
    assert job.main(options) == 0
    capsys.readouterr()
    texts = {}
    for fast in ("on", "off"):
        asked = commands.GenerateConfig(
            options.run_dir, prompt="3 times ", samples=2, fast=fast, device="cpu"
        )
        with swap.restored():
            assert samples.main(asked) == 0
        texts[fast] = capsys.readouterr().out
    assert texts["on"] == texts["off"] and texts["on"].count("3 times ") == 2


def test_logged_losses_are_the_computed_ones(options):
    prepared = prepare.prepare(options)
    training = state.TrainingState(options, prepared)
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    inputs, targets = training.next_batches()[0]
    job.main(options)
    training.model.load_state_dict(before)
    expected = tF.cross_entropy(training.model(inputs).flatten(0, 1), targets.flatten()).item()
    assert losses(options.run_dir)[1] == pytest.approx(expected, rel=1e-6)


def test_steps_count_by_one_and_see_new_batches_each(options):
    accumulating = dataclasses.replace(SETTINGS, grad_accumulation_steps=3, steps=4)
    training = state.TrainingState(dataclasses.replace(options, train=accumulating), prepare.prepare(options))
    seen = []
    while training.step < 4:
        seen += [inputs for inputs, _ in training.next_batches()]
        training.advance()
    assert len(seen) == 12
    assert all(torch.equal(seen[i], training.batches[i][0]) for i in range(12))
    training.step = training.sequences = 0
    training.evaluated = True
    loop.fit(training, run_dir.RunDir(options.run_dir))
    assert training.step == 4
    assert training.optimizer.state[training.model.lm_head.weight]["step"] == 4


def test_validation_text_is_not_trained_on(options):
    prepared = prepare.prepare(options)
    train_text = prepared.tokenizer.decode(prepared.train[0].tokens.tolist())
    val_text = prepared.tokenizer.decode(prepared.val.tokens.tolist())
    assert not set(train_text.splitlines()) & set(val_text.removesuffix("<|endoftext|>").splitlines())


def test_evaluation_and_sampling_do_not_change_the_course(options):
    """Neither weights nor dropout's random numbers depend on how often one looks."""
    rough = dataclasses.replace(options, model=dataclasses.replace(SHAPE, dropout=0.2))
    job.main(dataclasses.replace(rough, run_dir=options.run_dir + "1"))
    quiet = dataclasses.replace(SETTINGS, eval_every=100, sample_every=0, checkpoint_every=0)
    job.main(dataclasses.replace(rough, run_dir=options.run_dir + "2", train=quiet))
    assert losses(options.run_dir + "1") == losses(options.run_dir + "2")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("stop_at", [1, pytest.param(3, marks=pytest.mark.slow), 7])
def test_resumed_is_bitwise_the_same_as_uninterrupted(options, stop_at, dropout, tmp_path):
    settings = dataclasses.replace(
        SETTINGS, grad_accumulation_steps=2, checkpoint_every=1, keep_checkpoints=0
    )
    options = dataclasses.replace(options, model=dataclasses.replace(SHAPE, dropout=dropout), train=settings)
    job.main(options)
    whole, folder = losses(options.run_dir), tmp_path / "interrupted"
    reference = checkpoint.read_checkpoint(run_dir.checkpoints(options.run_dir)[0])[0]

    interrupted = dataclasses.replace(options, run_dir=str(folder))
    job.main(interrupted)
    for path in run_dir.checkpoints(folder)[: 8 - stop_at]:
        path.unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= stop_at]
    (folder / "metrics.jsonl").write_text("".join(kept))
    torch.manual_seed(12345)
    assert job.main(parse.train_options(["--resume", str(folder)])) == 0
    assert losses(folder) == whole
    found = checkpoint.read_checkpoint(run_dir.checkpoints(folder)[0])[0]
    assert found.keys() == reference.keys()
    # the type checker of these tests draws from Python's generator
    different = [name for name in found if not torch.equal(found[name], reference[name])]
    assert set(different) <= {"rng.python"}


@pytest.mark.parametrize("change", ["text", "heads", "theta"])
def test_resume_refuses_other_data_and_another_model(options, capsys, change):
    """Also where every shape still fits."""
    job.main(options)
    if change == "text":
        with open(options.data, "a") as file:
            file.write("more\n")
    shapes = {"heads": {"n_heads": 4}, "theta": {"rope_theta": 99.0}, "text": {}}
    other = dataclasses.replace(options, model=dataclasses.replace(SHAPE, **shapes[change]))
    with pytest.raises(SystemExit) as stop:
        job.main(dataclasses.replace(other, resume=options.run_dir))
    said = {
        "text": "now the data is",
        "heads": "n_heads was 2, now 4",
        "theta": "rope_theta was 10000.0, now 99.0",
    }
    assert stop.value.code == 2 and said[change] in capsys.readouterr().err


def test_interrupted_run_is_saved_and_goes_on_as_if_it_had_not_been(options, capsys, monkeypatch, tmp_path):
    job.main(options)
    whole, train_step = losses(options.run_dir), trainer.train_step

    def interrupted(*arguments):
        if arguments[3] == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*arguments)

    folder = str(tmp_path / "interrupted")
    monkeypatch.setattr(trainer, "train_step", interrupted)
    assert job.main(dataclasses.replace(options, run_dir=folder)) == 130
    assert f"stopped by SIGINT after step 5; resume with --resume {folder}" in capsys.readouterr().out
    monkeypatch.setattr(trainer, "train_step", train_step)
    assert max(losses(folder)) == 5
    assert job.main(parse.train_options(["--resume", folder])) == 0
    assert losses(folder) == whole


def test_a_sample_begins_with_a_line_that_asks_for_more():
    assert held_out.opening_line("a\n  def f(x):\n    return x") == "  def f(x):"
    assert held_out.opening_line("\n\nonly this\n") == "only this"
    assert held_out.opening_line(" \n<|endoftext|>def f(x):") == ""


# --------------------------------------------------------------------------------------------------
# The program


@pytest.mark.parametrize(
    ("content", "arguments", "said"),
    [
        ("", [], "--data must hold text, but {data} is empty"),
        ("short", [], "the training text must have more tokens than model.context_length 16"),
        ("long enough\n" * 10, [], "the held-out text must have more tokens than model.context_length 16"),
        (None, [], "the text must be a file, a folder or a glob"),
        (b"caf\xe9 " * 500, [], "{data}:1 must be UTF-8, got byte 0xe9 at offset 3"),
        ("x " * 500, ["--tokenizer", "bpe", "--model.vocab_size", "200"], "vocab_size must be at least 257"),
        ("x " * 500, ["--train.device", "abacus"], "the device must be available, got abacus"),
    ],
)
def test_input_that_cannot_be_trained_on(tmp_path, capsys, content, arguments, said):
    """One line, exit status 2, and no run directory."""
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    fixed = ["--tokenizer=bytes", "--model.context_length=16", f"--data={path}"]
    places = [f"--data_dir={tmp_path / 'data'}", f"--run_dir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as stop:
        job.main(parse.train_options([*fixed, *places, *arguments]))
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.startswith("error: " + said.format(data=path)) and captured.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", ["id", "cut", "tokenizer"])
def test_token_files_that_do_not_fit_are_refused_before_the_first_step(options, capsys, tmp_path, change):
    folder = prepare.prepare(options).folder
    path = folder / "train_0000.bin"
    content = bytearray(path.read_bytes())
    if change == "id":
        content[shards.HEADER_BYTES + 20 : shards.HEADER_BYTES + 22] = b"\xff\xff"
    path.write_bytes(content[:-6] if change == "cut" else content)
    if change == "tokenizer":
        prepare.tokenizer.Tokenizer.byte_level(["<|other|>"]).save(folder / "tokenizer")
    with pytest.raises(SystemExit, match="2"):
        job.main(options)
    error = capsys.readouterr().err
    said = {"id": f"{shards.HEADER_BYTES + 20}", "cut": "bytes", "tokenizer": "was made by tokenizer"}
    assert error.count("\n") == 1 and str(path) in error and said[change] in error, error
    assert not (tmp_path / "run").exists()


def test_a_run_directory_is_not_overwritten(options, capsys):
    job.main(options)
    with pytest.raises(SystemExit):
        job.main(options)
    assert f"--run_dir must be new or empty, got {options.run_dir}" in capsys.readouterr().err


def test_programs_from_the_command_line(options, tmp_path, monkeypatch, capsys):
    """As a user runs them: train, then generate from the run."""

    command = [sys.executable, "-m", "llm_basics.train", f"--data={options.data}", "--tokenizer=bytes"]
    command += ["--train.steps=3", "--model.n_layers=1", "--run_dir=r"]
    trained = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert trained.returncode == 0, trained.stderr
    assert "step=3/3 train_loss=" in trained.stdout and "val_loss=" in trained.stdout
    # in this process, which has imported torch
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys, "argv", ["generate", "r", "--prompt", "12 times", "--max_new_tokens=9"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("llm_basics.generate", run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out.startswith("12 times")


@pytest.mark.slow
def test_the_default_run_learns_python(tmp_path):
    """The command that README begins with, on the text that every machine has."""
    command = [sys.executable, "-m", "llm_basics.train", "--run_dir=r"]
    trained = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert trained.returncode == 0, trained.stderr
    entropy = float(re.search(r"unigram entropy.*: ([\d.]+)\)", trained.stdout)[1])
    assert run_dir.read_metrics(tmp_path / "r")[-1]["val_loss"] < 0.65 * entropy
    sample = (tmp_path / "r" / "samples.jsonl").read_text().splitlines()[-1]
    assert sum(word in sample for word in ("def ", "self", "return", "import", "if ", "):")) >= 3
