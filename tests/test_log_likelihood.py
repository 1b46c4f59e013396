"""Log-likelihood of texts and continuations. Alone: `uv run pytest tests/test_log_likelihood.py`."""

import dataclasses

import numpy as np
import pytest
import test_model
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as tF

from llm_basics.core import config, dataloader, evaluate, model
from llm_basics.evaluation import log_likelihood, metrics

TEXT = np.random.default_rng(0).integers(0, test_model.VOCAB, 50).astype(np.uint16)


@pytest.fixture
def lm():
    """A float64 model that is far from uniform, with dropout."""
    shape = config.ModelConfig(23, 9, 24, 2, 3, d_ff=40, dropout=0.5)
    lm = model.TransformerLM(shape, dtype=torch.float64)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(3)
    return lm


def joined(scores):
    """The scores of all windows, concatenated."""
    parts = list(scores)
    names = [field.name for field in dataclasses.fields(log_likelihood.Scores)]
    return log_likelihood.Scores(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def by_transformers():
    """GPT-2 of transformers, and ours with the same weights, in float64."""
    theirs = test_model.gpt2_of_transformers(pytest.importorskip("transformers")).eval().double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.3)
    ours = model.TransformerLM(dataclasses.replace(test_model.GPT2, norm_eps=1e-3), dtype=torch.float64)
    weights = test_model.gpt2_names(theirs.state_dict())
    ours.load_state_dict(weights | {"lm_head.weight": weights["token_embeddings.weight"]})
    return theirs, ours


# --------------------------------------------------------------------------------------------------
# A text


@pytest.mark.parametrize("stride", [1, 5, test_model.CONTEXT])
def test_each_token_equals_transformers_gpt2_on_its_own_window(stride):
    """Token by token, each from the tokens of its window before it."""
    theirs, ours = by_transformers()
    found = joined(log_likelihood.score_text(ours, TEXT, stride))
    assert found.targets.tolist() == TEXT[1:].tolist()
    end, length = 0, test_model.CONTEXT
    for i in range(len(TEXT) - 1):
        if i == end:
            end = min(end + (stride if end else length), len(TEXT) - 1)
        start = end - length
        read = torch.from_numpy(TEXT[start : i + 1].astype(np.int64))
        with torch.no_grad():
            expected = theirs(read[None]).logits[0, -1].log_softmax(-1)
        assert found.log_probabilities[i].item() == pytest.approx(expected[TEXT[i + 1]].item(), rel=1e-9)
        assert found.confidences[i].item() == pytest.approx(expected.max().exp().item(), rel=1e-9)
        assert found.ranks[i] == expected.argsort(descending=True).tolist().index(TEXT[i + 1])
        assert found.positions[i] == i - start


def test_loss_of_a_text_equals_transformers_loss_for_labels():
    theirs, ours = by_transformers()
    text = TEXT[: test_model.CONTEXT]
    labels = torch.from_numpy(text.astype(np.int64))[None]
    expected = theirs(labels, labels=labels).loss.item()
    found = metrics.measure(log_likelihood.score_text(ours, text), torch.ones(test_model.VOCAB))
    assert found.val_loss == pytest.approx(expected, rel=1e-6)


def test_disjoint_windows_equal_evaluate(lm):
    tokens = TEXT[: 4 * 9 + 1]
    expected = evaluate.evaluate(lm, dataloader.sequential_batches(tokens, 3, 9), torch.arange(23.0))
    found = metrics.measure(log_likelihood.score_text(lm.train(), tokens, batch_size=3), torch.arange(23.0))
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-12), name
    assert lm.training


@pytest.mark.parametrize("stride", [2, 9])
def test_batch_size_changes_nothing(lm, stride):
    losses = [
        metrics.measure(log_likelihood.score_text(lm, TEXT, stride, size), torch.ones(23)).val_loss
        for size in (1, 3, 64)
    ]
    assert max(losses) - min(losses) <= 1e-12


@given(n_tokens=st.integers(0, 60), context_length=st.integers(1, 20), share=st.floats(0, 1))
def test_windows_score_each_token_but_the_first_once(n_tokens, context_length, share):
    stride = max(1, round(share * context_length))
    scored = []
    for start, n_scored in log_likelihood.windows(n_tokens, context_length, stride):
        end = start + min(context_length, n_tokens - 1)
        assert start >= 0 and end < n_tokens and 1 <= n_scored
        scored += range(end + 1 - n_scored, end + 1)
        # after the first window, every token has enough context
        assert start == 0 or scored[-n_scored] - start > context_length - stride
    assert scored == list(range(1, n_tokens))


def test_windows_are_those_of_the_harness():
    utils = pytest.importorskip("lm_eval.utils", reason="uv sync --extra eval")
    for n_tokens in range(1, 30):
        for stride in range(1, 8):
            tokens = list(range(n_tokens))
            theirs = list(utils.get_rolling_token_windows(tokens, -1, 7, 7 - stride + 1))
            text = [-1, *tokens]
            ours = [
                (start, n_scored, text[start : start + min(7, n_tokens)])
                for start, n_scored in log_likelihood.windows(n_tokens + 1, 7, stride)
            ]
            assert [read for _, _, read in ours] == [read[: min(7, n_tokens)] for read, _ in theirs]
            assert [n for _, n, _ in ours] == [len(predicted) for _, predicted in theirs]


@pytest.mark.parametrize("stride", [0, 10])
def test_a_stride_that_skips_tokens_is_refused(lm, stride):
    with pytest.raises(ValueError, match=f"stride must be from 1 to 9 tokens .* got {stride}"):
        list(log_likelihood.windows(20, 9, stride))


def test_nan_scores_are_refused(lm):
    lm.ln_final.weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="must be numbers"):
        list(log_likelihood.score_text(lm, TEXT))
    with pytest.raises(FloatingPointError, match="must be numbers"):
        log_likelihood.score_continuations(lm, [([1], [2])])


def test_ties_go_to_the_lower_id(lm):
    """As in argmax: a uniform model would otherwise always be correct."""
    lm.ln_final.weight.data.zero_()
    found = joined(log_likelihood.score_text(lm, TEXT))
    assert found.ranks.tolist() == found.targets.tolist()
    assert found.confidences.tolist() == pytest.approx([1 / 23] * 49)


# --------------------------------------------------------------------------------------------------
# Continuations


def test_continuations_equal_transformers_gpt2_one_by_one():
    theirs, ours = by_transformers()
    pairs = [([3], [5, 1]), ([1, 2, 3, 4], [7]), ([9] * 20, [4, 4, 2]), ([2, 2], [8] * 16), ([1], [])]
    with torch.no_grad():
        likeliest = [theirs(torch.tensor([[6, 2]])).logits[0, -1].argmax().item()]
    pairs.append(([6, 2], likeliest))
    found = log_likelihood.score_continuations(ours, pairs, batch_size=4)
    for (first, second), (score, is_greedy) in zip(pairs, found, strict=True):
        text = torch.tensor([*first, *second][-test_model.CONTEXT - 1 :])
        with torch.no_grad():
            logits = theirs(text[None, :-1]).logits[0] if len(text) > 1 else torch.zeros(0, 1)
        n = len(second)
        rows, targets = logits[len(logits) - n :], text[len(text) - n :]
        expected = -tF.cross_entropy(rows, targets, reduction="sum").item() if n else 0.0
        assert score == pytest.approx(expected, rel=1e-9)
        assert is_greedy == (rows.argmax(-1).tolist() == targets.tolist())
    assert [is_greedy for _, is_greedy in found][-2:] == [True, True]


def test_a_continuation_longer_than_the_context_is_refused(lm):
    with pytest.raises(ValueError, match="must have at most 9 tokens .*, got 10"):
        log_likelihood.score_continuations(lm, [([1], [2]), ([1], [2] * 10)])


def test_no_continuations_are_no_scores(lm):
    assert log_likelihood.score_continuations(lm, []) == []
