"""Ignored targets, in a step and in an evaluation. Alone: uv run pytest tests/test_ignored_targets.py"""

import contextlib
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as tF

from llm_basics import swap
from llm_basics.core import config, dataloader, evaluate, model, optim, trainer
from llm_basics.fast import trainer as fast_trainer

SHAPE = config.ModelConfig(vocab_size=31, context_length=12, d_model=16, n_layers=1, n_heads=2)
# the weights stay, so that gradients can be compared
SETTINGS = config.TrainConfig(lr=0.0, min_lr=0.0, max_grad_norm=1e9, device="cpu")


class Bigrams(nn.Module):
    """A score for each pair of tokens: the smallest language model."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.randn(31, 31))

    def forward(self, tokens):
        return self.scores[tokens]


@pytest.fixture
def lm():
    return model.TransformerLM(SHAPE)


def masked_batch(rows, length, share, rng):
    """Random tokens, of which a share is to be predicted."""
    tokens = torch.from_numpy(rng.integers(0, SHAPE.vocab_size, (rows, length + 1)))
    counted = torch.from_numpy(rng.random((rows, length)) < share)
    return tokens[:, :-1], tokens[:, 1:].masked_fill(~counted, dataloader.IGNORE_INDEX)


def reference(lm, batches):
    """Loss and gradients of all targets at once, by torch's own function."""
    total = sum(tF.cross_entropy(lm(x).flatten(0, 1), y.flatten(), reduction="sum") for x, y in batches)
    loss = total / max(1, sum(int((y != -100).sum()) for _, y in batches))
    return loss.detach(), torch.autograd.grad(loss, list(lm.parameters()))


def step(lm, batches):
    result = trainer.train_step(lm, optim.AdamW(lm.parameters()), batches, 1, SETTINGS)
    return result.train_loss, [p.grad for p in lm.parameters()]


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in expected[1])
    for one, other in zip(found[1], expected[1], strict=True):
        assert (one - other).abs().max() <= 1e-6 * max(largest, 1e-3)


@pytest.mark.parametrize("pieces", ["reference", "fast"])
@pytest.mark.parametrize("n_masks", [100, pytest.param(2_000, marks=pytest.mark.slow)])
def test_any_mask_gives_the_gradient_of_the_whole(pieces, n_masks):
    """Of one to four batches of unequal lengths, with none, few or all targets."""
    lm, rng, n_empty = Bigrams(), np.random.default_rng(0), 0
    used = swap.using("fast", log=lambda line: None) if pieces == "fast" else contextlib.nullcontext()
    with used:
        for _ in range(n_masks):
            share = rng.choice([0.0, 0.05, 0.5, 1.0])
            batches = [
                masked_batch(rng.integers(1, 3), rng.integers(1, 13), share, rng)
                for _ in range(rng.integers(1, 5))
            ]
            found = step(lm, batches)
            assert torch.isfinite(found[0]) and all(torch.isfinite(gradient).all() for gradient in found[1])
            assert_same(found, reference(lm, batches))
            n_empty += all(bool((y == dataloader.IGNORE_INDEX).all()) for _, y in batches)
    assert n_empty > n_masks / 10


@pytest.mark.parametrize("n_parts", [1, 2, 3, 4, 6])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(lm, n_parts):
    rng = np.random.default_rng(n_parts)
    inputs, targets = masked_batch(12, 12, 0.4, rng)
    # lengths from none to all of a row
    targets[torch.arange(12)[None] > torch.arange(12)[:, None]] = dataloader.IGNORE_INDEX
    found = step(lm, list(zip(inputs.chunk(n_parts), targets.chunk(n_parts), strict=True)))
    assert_same(found, reference(lm, [(inputs, targets)]))
    assert_same(found, step(lm, [(inputs, targets)]))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_without_a_target_leaves_numbers(lm, optimizer):
    settings = dataclasses.replace(SETTINGS, lr=1e-2, max_grad_norm=1.0, optimizer=optimizer, z_loss=1e-3)
    chosen = trainer.make_optimizer(lm, settings)
    batch = masked_batch(2, 8, 0.0, np.random.default_rng(0))
    for number in (1, 2):
        result = trainer.train_step(lm, chosen, [batch, batch], number, settings)
        assert (result.train_loss.item(), result.grad_norm.item()) == (0, 0)
    assert all(torch.isfinite(p).all() for p in lm.parameters())


def test_a_loss_in_pieces_counts_the_same_targets(lm, monkeypatch):
    monkeypatch.setitem(fast_trainer.MAX_LOGITS, "cpu", 100)
    monkeypatch.setattr(fast_trainer, "MIN_ROWS", 1)
    rng = np.random.default_rng(0)
    for share in (0.0, 0.1, 1.0):
        inputs, targets = masked_batch(3, 12, share, rng)
        loss = fast_trainer.batch_loss(lm, inputs, targets, 0.0)
        found = loss.detach(), torch.autograd.grad(loss, list(lm.parameters()))
        assert_same(found, reference(lm, [(inputs, targets)]))


def test_what_no_target_hangs_on_has_no_gradient(lm):
    """Of a row whose answer ends early, what follows must not be learned from, nor padding."""
    inputs = torch.tensor([[1, 2, 3, 4, 5, 6]])
    targets = torch.tensor([[-100, 3, 4, -100, -100, -100]])
    step(lm, [(inputs, targets)])
    touched = lm.token_embeddings.weight.grad.abs().sum(-1) > 0
    assert touched.nonzero().flatten().tolist() == [1, 2, 3]


def test_evaluation_counts_what_counts(lm):
    """Batches of unequal lengths, one without any target: means are over targets."""
    rng = np.random.default_rng(0)
    batches = [masked_batch(2, 12, 0.3, rng), masked_batch(1, 5, 0.0, rng), masked_batch(3, 7, 0.9, rng)]
    lengths = torch.arange(31.0)
    found = evaluate.evaluate(lm, iter(batches), lengths)
    logits = torch.cat([lm(x).flatten(0, 1) for x, _ in batches]).double()
    targets = torch.cat([y.flatten() for _, y in batches])
    counted = targets != -100
    loss = tF.cross_entropy(logits[counted], targets[counted]).item()
    assert found["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["accuracy"] == pytest.approx(
        (logits[counted].argmax(-1) == targets[counted]).double().mean().item()
    )
    n_bytes = lengths[targets[counted]].sum().item()
    assert found["bits_per_byte"] == pytest.approx(
        loss * int(counted.sum()) / math.log(2) / n_bytes, rel=1e-5
    )
