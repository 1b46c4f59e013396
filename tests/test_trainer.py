"""The loss and the Trainer of `update`. Alone: uv run pytest tests/test_trainer.py"""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as tF

from llm_basics import swap
from llm_basics.core import config, device, model, optim
from llm_basics.core import trainer as core_trainer

SHAPE = config.ModelConfig(vocab_size=11, context_length=8, d_model=16, n_layers=1, n_heads=2)


@pytest.fixture
def lm():
    torch.manual_seed(0)
    return model.TransformerLM(SHAPE)


def batch(seed=0):
    tokens = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


# --------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_loss_is_the_mean_cross_entropy_over_what_counts(shape, dtype):
    logits = torch.randn(*shape, 7).to(dtype)
    targets = torch.randint(7, shape)
    if targets.numel() > 1:
        targets.view(-1)[1] = -100
    wide = logits.float() if dtype == torch.bfloat16 else logits
    loss = core_trainer.compute_loss(logits, targets)
    torch.testing.assert_close(loss, tF.cross_entropy(wide.reshape(-1, 7), targets.flatten()))
    with_z = core_trainer.compute_loss(logits, targets, 0.5)
    normalizer = wide.logsumexp(-1).square()[targets != -100].mean()
    torch.testing.assert_close(with_z, loss + 0.5 * normalizer)


def test_a_loss_without_a_target_is_zero():
    assert core_trainer.compute_loss(torch.randn(2, 3, 7), torch.full((2, 3), -100)) == 0


@pytest.mark.parametrize(
    ("logits", "targets"), [((2, 5, 7), (2, 4)), ((2, 5, 7), (10,)), ((10, 7), (2, 5)), ((5,), (5,))], ids=str
)
def test_logits_and_targets_that_do_not_fit_are_refused(logits, targets):
    with pytest.raises(ValueError) as error:
        core_trainer.compute_loss(torch.zeros(logits), torch.zeros(targets, dtype=torch.long))
    assert f"got logits {logits} and targets {targets}" in str(error.value)


@pytest.mark.parametrize("wrong", [7, -1, -99, 1 << 40])
def test_a_target_outside_of_the_vocabulary_is_refused_with_its_position(wrong):
    targets = torch.full((2, 5), -100)
    targets[1, 2] = wrong
    with pytest.raises(ValueError, match=rf"from 0 to 6 \(-100 is ignored\), got {wrong} at \(1, 2\)"):
        core_trainer.compute_loss(torch.zeros(2, 5, 7), targets)


# --------------------------------------------------------------------------------------------------
# The Trainer


def test_a_trainer_makes_the_steps_of_its_config(lm):
    options = config.TrainConfig(steps=5, lr=0.01, warmup_steps=2, optimizer="muon")
    trainer = core_trainer.Trainer(lm, options)
    results = [trainer.training_step(batch(seed)) for seed in range(5)]
    torch.manual_seed(0)
    other = model.TransformerLM(SHAPE)
    optimizer = core_trainer.make_optimizer(other, options)
    for seed, result in enumerate(results):
        expected = core_trainer.train_step(other, optimizer, [batch(seed)], seed + 1, options)
        assert (result.train_loss, result.lr) == (expected.train_loss, expected.lr)
    assert trainer.step == 5 and trainer.losses == [result.train_loss.item() for result in results]
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), other.parameters(), strict=True))


def test_without_a_config_it_is_adamw_at_a_constant_rate(lm):
    trainer = core_trainer.Trainer(lm)
    (group,) = trainer.optimizer.param_groups
    assert isinstance(trainer.optimizer, optim.AdamW)
    assert (group["lr"], group["weight_decay"], group["betas"]) == (3e-4, 0.1, (0.9, 0.95))
    assert {trainer.training_step(batch()).lr for _ in range(3)} == {3e-4}
    assert core_trainer.learning_rate(10**6, trainer.config) == 3e-4
    assert trainer.losses[2] < trainer.losses[0]


def test_an_optimizer_of_ones_own_keeps_its_rate(lm):
    trainer = core_trainer.Trainer(lm, optimizer=torch.optim.SGD(lm.parameters(), lr=0.125))
    assert trainer.training_step(batch()).lr == 0.125 and trainer.step == 1
    groups = [{"params": [p], "lr": 0.1 * (1 + i % 2)} for i, p in enumerate(lm.parameters())]
    with pytest.raises(ValueError, match=r"must have one learning rate, got \[0.1, 0.2\]"):
        core_trainer.Trainer(lm, optimizer=torch.optim.SGD(groups))


def test_a_config_may_be_a_preset_or_a_file(lm, tmp_path: Path):
    assert core_trainer.Trainer(lm, "gpt2-nano").config == core_trainer.presets.load("gpt2-nano").train
    path = tmp_path / "own.yaml"
    path.write_text("train:\n  lr: 0.5\n  warmup_steps: 0\n")
    trainer = core_trainer.Trainer(lm, path)
    assert trainer.config.lr == 0.5 and trainer.optimizer.param_groups[1]["weight_decay"] == 0


def test_several_batches_make_one_step(lm):
    options = config.TrainConfig(steps=2, lr=0.01, warmup_steps=0)
    inputs, targets = batch()
    parts = list(zip(inputs.split(2), targets.split(2), strict=True))
    trainer = core_trainer.Trainer(lm, options)
    result = trainer.training_step(parts)
    assert trainer.step == 1
    torch.manual_seed(0)
    whole = core_trainer.Trainer(model.TransformerLM(SHAPE), options)
    # as torch's DataLoader gives it
    torch.testing.assert_close(whole.training_step([inputs, targets]).train_loss, result.train_loss)


@pytest.mark.parametrize("is_late", [False, True])
def test_a_step_that_is_not_finite_is_not_counted(lm, monkeypatch, is_late):
    if is_late:
        swap.use("fast", lambda line: None)
        monkeypatch.setattr(device, "ASYNCHRONOUS", {"cpu"})
    trainer = core_trainer.Trainer(lm)
    before = [p.clone() for p in lm.parameters()]
    lm.register_forward_hook(lambda module, given, output: output * math.nan)
    with pytest.raises(FloatingPointError, match="step 1: loss nan, lr 0.0003"):
        trainer.training_step(batch())
    assert (trainer.step, trainer.losses) == (0, [])
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), before, strict=True))


def test_any_module_can_be_trained():
    trainer = core_trainer.Trainer(
        nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11)), config.TrainConfig(steps=2)
    )
    assert trainer.training_step(batch()).train_loss > 1
