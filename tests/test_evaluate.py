"""Evaluation against hand calculations. Alone: uv run pytest tests/test_evaluate.py"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from llm_basics import evaluate, tokenizer


class Bigrams(nn.Module):
    """Fixed logits for each input token, and dropout that would show."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, tokens):
        assert not self.training and not torch.is_grad_enabled()
        return self.logits[tokens]


def test_measures_equal_hand_calculation():
    """Over batches of unequal size: the mean is over tokens, not over batches."""
    model = Bigrams().train()
    pairs = [([[0, 1, 2], [3, 4, 0]], [[1, 2, 3], [4, 0, 2]]), ([[2, 2, 1]], [[0, 1, 4]])]
    batches = [(torch.tensor(i), torch.tensor(t)) for i, t in pairs]
    lengths = torch.tensor([1.0, 2.0, 3.0, 1.0, 0.0])
    found = evaluate.evaluate(model, iter(batches), lengths)

    log_probabilities = model.logits.detach().double().log_softmax(-1)
    steps = [
        (i, t)
        for inputs, targets in pairs
        for a, b in zip(inputs, targets, strict=True)
        for i, t in zip(a, b, strict=True)
    ]
    total = -sum(log_probabilities[i, t].item() for i, t in steps)
    assert found["val_loss"] == pytest.approx(total / 9)
    assert found["perplexity"] == pytest.approx(math.exp(total / 9))
    assert found["bits_per_byte"] == pytest.approx(
        total / math.log(2) / sum(lengths[t].item() for _, t in steps)
    )
    assert found["accuracy"] == pytest.approx(sum(model.logits[i].argmax().item() == t for i, t in steps) / 9)
    assert model.training


def test_bytes_of_tokens():
    lengths = evaluate.token_lengths(tokenizer.Tokenizer.of_bytes(["<|endoftext|>"]), 260)
    assert lengths.shape == (260,) and lengths[:256].unique().tolist() == [1] and lengths[256:].sum() == 0
    merged = tokenizer.Tokenizer(
        {**{i: bytes([i]) for i in range(256)}, 256: b"abc", 257: b"ab"}, [(b"a", b"b"), (b"ab", b"c")]
    )
    assert evaluate.token_lengths(merged, 258)[256:].tolist() == [3, 2]


def test_unigram_entropy():
    assert evaluate.unigram_entropy(np.zeros(9, dtype=np.uint16)) == 0
    assert evaluate.unigram_entropy(np.arange(8)) == pytest.approx(math.log(8))
    assert evaluate.unigram_entropy(np.array([1, 1, 1, 7])) == pytest.approx(
        -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    )


def test_loss_is_not_rounded_to_bfloat16():
    model, targets = Bigrams(), torch.tensor([[1, 2, 3]])
    inputs = torch.tensor([[0, 1, 2]])
    model.logits.data = model.logits.data.bfloat16()
    found = evaluate.evaluate(model, [(inputs, targets)], torch.ones(5))["val_loss"]
    expected = torch.nn.functional.cross_entropy(model.logits.detach().double()[inputs[0]], targets[0]).item()
    assert found == pytest.approx(expected, rel=1e-6)
