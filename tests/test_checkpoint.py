"""Checkpoints: all state is restored, damage is detected. Alone: uv run pytest tests/test_checkpoint.py"""

import io
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import trials
from fixtures import make_checkpoint
from torch import nn

from llm_basics.cli import checkpoint_commands, parse, subcommands
from llm_basics.core import config, model, optim, trainer
from llm_basics.runs import checkpoint, locks, run_dir

FIXTURES = Path(__file__).parent / "fixtures"


class TwoLayers(nn.Module):
    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.first = nn.Linear(3, width)
        self.second = nn.Linear(width, 2)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def train(network, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.randn(4, 3, generator=generator)).square().mean().backward()
        optimizer.step()


def make(optimizer_class, seed=0):
    torch.manual_seed(seed)
    network = TwoLayers()
    groups = [{"params": network.first.parameters()}, {"params": network.second.parameters(), "lr": 0.02}]
    return network, optimizer_class(groups, lr=0.01, betas=(0.8, 0.91), weight_decay=0.3)


@pytest.mark.parametrize("optimizer_class", [optim.AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("kind", ["path", "file"])
def test_going_on_from_a_checkpoint_changes_nothing(adapters, optimizer_class, kind, tmp_path):
    network, optimizer = make(optimizer_class)
    train(network, optimizer, 5, seed=1)
    out = tmp_path / "checkpoint" if kind == "path" else io.BytesIO()
    adapters.run_save_checkpoint(network, optimizer, 5, out)
    train(network, optimizer, 5, seed=2)

    other, other_optimizer = make(optimizer_class, seed=9)
    source = out if kind == "path" else io.BytesIO(out.getvalue())
    assert adapters.run_load_checkpoint(source, other, other_optimizer) == 5
    train(other, other_optimizer, 5, seed=2)
    for name, tensor in network.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_settings_of_the_optimizer_come_back(adapters):
    network, optimizer = make(optim.AdamW)
    optimizer.param_groups[1]["lr"] = 0.5
    out = io.BytesIO()
    adapters.run_save_checkpoint(network, optimizer, 0, out)
    other, other_optimizer = make(optim.AdamW)
    assert adapters.run_load_checkpoint(io.BytesIO(out.getvalue()), other, other_optimizer) == 0
    assert [group["lr"] for group in other_optimizer.param_groups] == [0.01, 0.5]
    assert other_optimizer.param_groups[0]["betas"] == (0.8, 0.91)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_are_refused_and_nothing_changes(adapters, change, tmp_path):
    network, optimizer = make(optim.AdamW)
    train(network, optimizer, 2, seed=1)
    adapters.run_save_checkpoint(network, optimizer, 2, tmp_path / "checkpoint")
    other = TwoLayers(width=6 if change == "shape" else 5)
    if change == "missing":
        other.third = nn.Linear(2, 2)
    if change == "extra":
        del other.second
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError)) as error:
        adapters.run_load_checkpoint(tmp_path / "checkpoint", other, optim.AdamW(other.parameters()))
    assert {"missing": "third", "extra": "second", "shape": "first"}[change] in str(error.value)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in before.items())


def test_shape_difference_is_told():
    out = io.BytesIO()
    checkpoint.save_checkpoint(*make(optim.AdamW), 0, out)
    with pytest.raises(ValueError, match=r"first.weight must be \(6, 3\), got \(5, 3\)"):
        checkpoint.load_checkpoint(io.BytesIO(out.getvalue()), TwoLayers(width=6))


def test_random_state_comes_back(tmp_path):
    network, optimizer = make(optim.AdamW)
    checkpoint.save_checkpoint(network, optimizer, 0, tmp_path / "checkpoint")
    np.random.randn()  # leaves a second number waiting, and so does the next line
    random.gauss(0, 1)
    checkpoint.save_checkpoint(network, optimizer, 0, tmp_path / "checkpoint")

    def draw():
        return [
            torch.rand(1).item(),
            random.gauss(0, 1),
            random.random(),
            np.random.randn(),
            np.random.rand(),
        ]

    expected = draw()
    assert draw() != expected
    checkpoint.load_checkpoint(tmp_path / "checkpoint", network, optimizer, restore_rng=True)
    assert draw() == expected


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    shape = config.ModelConfig(
        vocab_size=90, context_length=8, d_model=16, n_layers=1, n_heads=2, tie_embeddings=True
    )
    lm, other = model.TransformerLM(shape), model.TransformerLM(shape)
    checkpoint.save_checkpoint(lm, optim.AdamW(lm.parameters()), 3, tmp_path / "checkpoint", note="hello")
    assert checkpoint.load_checkpoint(tmp_path / "checkpoint", other)["note"] == "hello"
    assert other.lm_head.weight is other.token_embeddings.weight
    assert torch.equal(other.lm_head.weight, lm.lm_head.weight)
    names = [
        name
        for name in safetensors.torch.load_file(tmp_path / "checkpoint")
        if "lm_head" in name or "token" in name
    ]
    assert len(names) == 1


def test_a_transposed_view_is_not_taken_for_the_same_weight(tmp_path):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.arange(4.0).reshape(2, 2))
            self.b = nn.Parameter(self.a.detach().T)

    views, other = Views(), Views()
    checkpoint.save_checkpoint(views, optim.AdamW(views.parameters()), 0, tmp_path / "checkpoint")
    checkpoint.load_checkpoint(tmp_path / "checkpoint", other)
    assert torch.equal(other.b, views.b) and torch.equal(other.a, views.a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_come_back_bitwise(dtype):
    network = TwoLayers().to(dtype)
    out = io.BytesIO()
    checkpoint.save_checkpoint(network, optim.AdamW(network.parameters()), 0, out)
    other = TwoLayers().to(dtype)
    checkpoint.load_checkpoint(io.BytesIO(out.getvalue()), other)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


def test_every_flipped_bit_is_seen(tmp_path):
    network, optimizer = make(optim.AdamW)
    train(network, optimizer, 1, seed=0)
    path = tmp_path / "checkpoint"
    checkpoint.save_checkpoint(network, optimizer, 1, path)
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    changed = [offset for offset in range(8 + header, len(content), 97)]
    changed.append(content.index(b"step") + 8)  # the step itself, in the description
    for offset in changed:
        path.write_bytes(content[:offset] + bytes([content[offset] ^ 4]) + content[offset + 1 :])
        with pytest.raises(ValueError, match="damaged|must be an llm_basics checkpoint"):
            checkpoint.read_checkpoint(path)
    for end in (0, 7, 100, header, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match="checkpoint"):
            checkpoint.read_checkpoint(path)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    network, optimizer = make(optim.AdamW)
    path = tmp_path / "checkpoint"
    checkpoint.save_checkpoint(network, optimizer, 1, path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save_checkpoint(network, optimizer, 2, path)
    assert checkpoint.read_checkpoint(path)[1]["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


def test_content_is_on_disk_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: calls.append(n) or r(*a))
    checkpoint.save_checkpoint(*make(optim.AdamW), 1, tmp_path / "checkpoint")
    assert calls == ["fsync", "replace", "fsync"]


def test_foreign_safetensors_are_refused(tmp_path):
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="must be an llm_basics checkpoint"):
        checkpoint.read_checkpoint(tmp_path / "foreign")


def test_file_is_plain_safetensors_with_json(tmp_path):
    network, optimizer = make(optim.AdamW)
    checkpoint.save_checkpoint(network, optimizer, 7, tmp_path / "checkpoint")
    with safetensors.safe_open(tmp_path / "checkpoint", "pt") as file:
        assert json.loads(file.metadata()["llm_basics"])["step"] == 7
        assert {name.split(".")[0] for name in file.keys()} == {"model", "rng"}  # noqa: SIM118


@pytest.mark.parametrize(
    "path", sorted(FIXTURES.glob("checkpoint_schema_*.safetensors")), ids=lambda p: p.stem
)
def test_checkpoints_of_every_version_so_far_can_be_gone_on_with(path):
    about = checkpoint.read_about(path)
    shape, settings = config.ModelConfig(**about["config"]["model"]), about["config"]["train"]
    settings = config.TrainConfig(**settings | {"betas": tuple(settings["betas"])})
    lm = model.TransformerLM(shape)
    optimizer = trainer.make_optimizer(lm, settings)
    assert checkpoint.load_checkpoint(path, lm, optimizer, restore_rng=True)["step"] == 3
    steps = [(step, make_checkpoint.batch(step)) for step in (4, 5)]
    found = [
        trainer.train_step(lm, optimizer, [batch], step, settings).train_loss.item() for step, batch in steps
    ]
    # dropout's random numbers included; the last bits are those of the machine
    assert found == pytest.approx(about["next_losses"], rel=1e-5)


# --------------------------------------------------------------------------------------------------
# A folder of them


@pytest.fixture
def folder(tmp_path):
    """A run with checkpoints after 1 to 6 steps, of which 2 was the best and 5 is damaged."""
    (tmp_path / "checkpoints").mkdir()
    for step, loss in enumerate([3.0, 1.5, None, 2.0, 1.5, None], start=1):
        path = run_dir.checkpoint_path(tmp_path, step)
        checkpoint.save_checkpoint(*make(optim.AdamW), step, path, val_loss=loss)
    with open(run_dir.checkpoint_path(tmp_path, 5), "rb+") as file:
        file.seek(-3, 2)
        file.write(b"abc")
    return tmp_path


def steps_in(folder):
    return [int(path.stem[5:]) for path in run_dir.checkpoints(folder)]


@pytest.mark.parametrize(("which", "step"), [("latest", 6), ("best", 2), ("4", 4)])
def test_a_checkpoint_is_found_by_name_or_step(folder, which, step):
    assert checkpoint.find(folder / "checkpoints", which) == run_dir.checkpoint_path(folder, step)


@pytest.mark.parametrize(("which", "said"), [("7", "of step 7"), ("newest", "latest, best or a step")])
def test_a_checkpoint_that_is_not_there_is_an_error(folder, which, said):
    with pytest.raises(ValueError, match=said):
        checkpoint.find(folder / "checkpoints", which)
    with pytest.raises(ValueError, match="got none"):
        checkpoint.find(folder, "latest")


def test_the_newest_and_the_best_are_kept(folder):
    (folder / "checkpoints" / "step_00000000.safetensors").mkdir()
    checkpoint.prune(folder / "checkpoints", 2)
    assert steps_in(folder) == [6, 5, 2, 0]


def test_what_killed_saves_left_is_swept(folder):
    (folder / "checkpoints" / "step_00000003.safetensors.tmp-99").touch()
    checkpoint.delete_partial(folder / "checkpoints")
    assert not list((folder / "checkpoints").glob("*.tmp*")) and len(steps_in(folder)) == 6


def test_a_damaged_one_does_not_count_as_kept(folder):
    run_dir.checkpoint_path(folder, 6).unlink()
    checkpoint.prune(folder / "checkpoints", 1)
    assert steps_in(folder) == [5, 4, 2]
    with pytest.raises(ValueError, match="at least 1"):
        checkpoint.prune(folder / "checkpoints", 0)


def test_1000_turns_of_saving_killing_and_pruning_never_leave_less_than_one_whole(tmp_path):
    chance, step, best = random.Random(0), 0, {}
    network, optimizer = make(optim.AdamW)
    for _ in range(trials.count(1000)):
        match chance.choice(["save", "kill", "prune", "damage"]):
            case "save":
                step += 1
                best[step] = chance.choice([None, chance.random()])
                path = tmp_path / f"step_{step:08d}.safetensors"
                checkpoint.save_checkpoint(network, optimizer, step, path, val_loss=best[step])
            case "kill":
                (tmp_path / f"step_{step + 1:08d}.safetensors.tmp-1").write_bytes(b"half")
            case "damage" if len(found := checkpoint.files(tmp_path)) > 1:
                if checkpoint.newest_valid(tmp_path) == (found[0], []):
                    found[1].write_bytes(found[1].read_bytes()[:-5])
            case "prune":
                checkpoint.prune(tmp_path, chance.randint(1, 3))
        if step:
            assert checkpoint.newest_valid(tmp_path)[0] is not None
            readable = {s: loss for s, loss in best.items() if loss is not None and is_readable(tmp_path, s)}
            if readable:
                assert min(readable.values()) == best[int(checkpoint.best(tmp_path).stem[5:])]


def is_readable(folder, step):
    path = folder / f"step_{step:08d}.safetensors"
    try:
        return bool(checkpoint.read_about(path))
    except ValueError:
        return False


def run(arguments):
    checkpoint_commands.main(parse.program_options(subcommands.CHECKPOINT, arguments, "checkpoint"))


def test_the_program_verifies_lists_and_prunes(folder, capsys):
    with pytest.raises(SystemExit, match="1"):
        run(["verify", str(folder)])
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["valid", "damaged", *["valid"] * 4] and "SHA-256" in out[1]
    run(["list", str(folder)])
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[1] == "6" and out[0].endswith("latest")
    assert "1.5000" in out[4] and out[4].endswith("best") and "MB" in out[4]
    with locks.locked(folder), pytest.raises(SystemExit, match="2"):
        run(["prune", str(folder)])
    assert "locked by pid" in capsys.readouterr().err
    run(["prune", str(folder), "--keep", "1"])
    assert steps_in(folder) == [6, 2]
    run(["list", str(folder)])
    with pytest.raises(SystemExit, match="0"):
        run(["verify", str(folder)])
    with pytest.raises(SystemExit, match="2"):
        run(["list", str(folder / "checkpoints")])
