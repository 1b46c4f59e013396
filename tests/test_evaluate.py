"""Evaluation against hand calculations. Alone: uv run pytest tests/test_evaluate.py"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from llm_basics.core import config, evaluate, model, tokenizer
from llm_basics.evaluation import log_likelihood, metrics


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
    lengths = evaluate.token_lengths(tokenizer.Tokenizer.byte_level(["<|endoftext|>"]), 260)
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


# --------------------------------------------------------------------------------------------------
# All metrics of a text


def said(log_probabilities, ranks=None, confidences=None, positions=None, targets=None):
    """Scores of which a test needs some."""
    n = len(log_probabilities)
    numbers = [
        targets or [0] * n,
        log_probabilities,
        [0] * n if ranks is None else ranks,
        [1.0] * n if confidences is None else confidences,
        list(range(n)) if positions is None else positions,
    ]
    dtypes = [torch.long, torch.float64, torch.long, torch.float64, torch.long]
    return log_likelihood.Scores(*(torch.tensor(v, dtype=t) for v, t in zip(numbers, dtypes, strict=True)))


def test_calibration_error_by_hand():
    """(0, 1/15]: 1 of 2 right at 0.04 and 1/15; (8/15, 9/15]: 3 of 3 at 0.6 (a bin has its upper end)."""
    parts = [
        said([-1.0] * 3, ranks=[0, 3, 0], confidences=[0.04, 1 / 15, 0.6]),
        said([-1.0] * 3, ranks=[0, 0, 1], confidences=[0.6, 0.6, 1.0]),
    ]
    found = metrics.measure(parts, torch.ones(1))
    in_bins = [(round(b.low * 15), b.count, b.confidence, b.accuracy) for b in found.calibration]
    assert in_bins == [
        (0, 2, pytest.approx((0.04 + 1 / 15) / 2), 0.5),
        (8, 3, pytest.approx(0.6), 1.0),
        (14, 1, 1.0, 0.0),
    ]
    expected = (2 * abs(0.5 - (0.04 + 1 / 15) / 2) + 3 * 0.4 + 1 * 1.0) / 6
    assert found.calibration_error == pytest.approx(expected)
    assert found.accuracy == pytest.approx(4 / 6) and found.top5_accuracy == 1.0


def test_calibration_error_equals_one_of_numpy_masks():
    rng = np.random.default_rng(0)
    confidences, ranks = rng.random(5000), rng.integers(0, 3, 5000)
    found = metrics.measure([said([-1.0] * 5000, ranks.tolist(), confidences.tolist())], torch.ones(1))
    edges = np.linspace(0, 1, metrics.N_BINS + 1)
    expected = 0.0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (confidences > low) & (confidences <= high)
        expected += inside.mean() * abs((ranks[inside] == 0).mean() - confidences[inside].mean())
    assert found.calibration_error == pytest.approx(expected)
    assert sum(b.count for b in found.calibration) == 5000


def test_a_model_that_means_what_it_says_is_calibrated():
    rng = np.random.default_rng(1)
    confidences = rng.random(100_000)
    ranks = (rng.random(100_000) > confidences).astype(int)
    found = metrics.measure([said([-1.0] * 100_000, ranks.tolist(), confidences.tolist())], torch.ones(1))
    assert found.calibration_error < 0.01


class KnowsPositions(model.TransformerLM):
    """Gives the token that comes, which is always 1, a loss of 1 / (1 + its position)."""

    def __init__(self) -> None:
        super().__init__(config.ModelConfig(vocab_size=2, context_length=16, d_model=8, n_layers=1))

    def forward(self, tokens):
        p = torch.exp(-1 / (1 + torch.arange(tokens.shape[1], dtype=torch.float64)))
        return torch.stack([(1 - p).log(), p.log()], -1).expand(*tokens.shape, 2)


def test_loss_by_position_of_a_model_that_knows_positions():
    tokens = np.ones(1 + 3 * 16, dtype=np.uint16)
    found = metrics.measure(log_likelihood.score_text(KnowsPositions(), tokens, batch_size=2), torch.ones(2))
    losses = [1 / (1 + position) for position in range(16)]
    expected = [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
    assert [(b.first, b.last) for b in found.by_position] == expected
    for bucket in found.by_position:
        part = losses[bucket.first : bucket.last + 1]
        assert bucket.loss == pytest.approx(sum(part) / len(part)) and bucket.count == 3 * len(part)
    # with a stride of 4, the last four positions of every window but the first
    found = metrics.measure(log_likelihood.score_text(KnowsPositions(), tokens, stride=4), torch.ones(2))
    assert [bucket.count for bucket in found.by_position] == [1, 1, 2, 4, 8 + 32]
    assert found.val_loss == pytest.approx((sum(losses) + 8 * sum(losses[12:])) / 48)


class OneByteIsAsGoodAsAnother(model.TransformerLM):
    """Finds a token of n bytes as likely as any n bytes."""

    def __init__(self, lengths):
        super().__init__(config.ModelConfig(len(lengths), context_length=8, d_model=8, n_layers=1))
        self.lengths = lengths

    def forward(self, tokens):
        logits = torch.where(self.lengths > 0, -self.lengths.double() * math.log(256), -math.inf)
        return logits.expand(*tokens.shape, len(logits))


def test_bits_per_byte_do_not_depend_on_the_tokenizer():
    text = "abcabcab " * 20
    plain = tokenizer.Tokenizer.byte_level([])
    pairs = [(b"a", b"b"), (b"ab", b"c"), (b" ", b"abc")]
    vocab = dict(enumerate([bytes([b]) for b in range(256)] + [left + right for left, right in pairs]))
    for own in (plain, tokenizer.Tokenizer(vocab, pairs)):
        tokens = np.array(own.encode(text))
        lengths = evaluate.token_lengths(own, own.vocab_size)
        scores = log_likelihood.score_text(OneByteIsAsGoodAsAnother(lengths), tokens)
        # the longer tokens take a share that no byte gives up
        assert metrics.measure(scores, lengths).bits_per_byte == pytest.approx(8, abs=1e-4)


def test_top_5_are_the_five_likeliest():
    found = metrics.measure([said([-1.0] * 6, ranks=[0, 1, 3, 4, 5, 9])], torch.ones(1))
    assert (found.accuracy, found.top5_accuracy) == (1 / 6, 4 / 6)


def test_a_text_of_one_token_is_refused():
    with pytest.raises(ValueError, match="at least two tokens"):
        metrics.measure(log_likelihood.score_text(KnowsPositions(), np.ones(1, np.uint16)), torch.ones(2))
