"""What is done to scores before a token is drawn. Alone: uv run pytest tests/test_logits_processor.py"""

import math

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper

from llm_basics.core import generate
from llm_basics.inference import engine

LOGITS = [torch.tensor([0.1, 2.0, -1.0, 1.5, 1.4, -3.0]), *(3 * torch.randn(20, 50))]


@pytest.mark.parametrize("min_p", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_min_p_is_that_of_transformers(min_p, temperature):
    n_kept = set()
    for logits in LOGITS:
        found = generate.keep_likely(logits, min_p, temperature)
        tempered = TemperatureLogitsWarper(temperature)(torch.tensor([[0]]), logits[None])
        expected = torch.softmax(MinPLogitsWarper(min_p)(torch.tensor([[0]]), tempered)[0], -1)
        torch.testing.assert_close(generate.next_token_probabilities(found, temperature), expected)
        n_kept.add(int((expected > 0).sum()))
    assert min_p == 1.0 or len(n_kept) > 1


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3, 5.0])
def test_the_penalty_is_that_of_transformers(penalty):
    for logits in LOGITS:
        ids = torch.randint(len(logits), (9,))
        before = logits.clone()
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids[None], logits[None])[0]
        assert torch.equal(generate.penalize_repetition(logits, ids, penalty), expected)
        assert torch.equal(logits, before)


def test_what_changes_nothing():
    for logits in LOGITS:
        ids = torch.randint(len(logits), (9,))
        assert torch.equal(generate.LogitsProcessor()(ids, logits), logits)
        assert torch.equal(generate.penalize_repetition(logits, ids, 1.0), logits)
        assert torch.equal(generate.keep_likely(logits, 0.0), logits)
        assert torch.equal(generate.penalize_repetition(logits, ids[:0], 2.0), logits)
    assert (
        engine.make_logits_processor(0.7, None, 1.0) is None
        and engine.make_logits_processor(0.7, 0.0, 1.0) is None
    )


def test_the_likeliest_is_kept_at_temperature_zero():
    found = generate.keep_likely(LOGITS[0], 0.5, temperature=0.0)
    assert (found > -math.inf).nonzero().tolist() == [[1]]


def test_the_penalty_comes_first():
    adjust = engine.make_logits_processor(1.0, 1.0, 2.0)
    # 2 becomes 1, so that 1.5 is the likeliest, which alone is kept
    assert (adjust(torch.tensor([1]), LOGITS[0]) > -math.inf).nonzero().tolist() == [[3]]


@pytest.mark.parametrize(
    "wrong", [{"min_p": -0.1}, {"min_p": 1.1}, {"repetition_penalty": 0.0}, {"repetition_penalty": math.nan}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be .*, got"):
        generate.LogitsProcessor(**wrong)(torch.tensor([1]), LOGITS[0])
