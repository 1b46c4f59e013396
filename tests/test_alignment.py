"""Post-training by hand. Alone: `uv run pytest tests/test_alignment.py`."""

import copy
import math

import pytest
import torch
from torch.nn import functional as tF

from llm_basics.alignment import (
    advantages,
    distillation,
    dpo,
    grpo_step,
    packing,
    policy_gradient,
    response_log_probs,
)
from llm_basics.core import tokenizer as tokenizers
from llm_basics.learn.mistakes import response_log_probs as texts

EXACT = {"rtol": 1e-6, "atol": 1e-9}


# --------------------------------------------------------------------------------------------------
# Oracles, in float64


def test_log_probabilities_and_entropy_are_those_of_torch(randn):
    logits, labels = randn(3, 5, 11), torch.randint(11, (3, 5))
    found = response_log_probs.get_response_log_probs(lambda ids: logits, labels, labels, True)
    torch.testing.assert_close(
        found["log_probs"], -tF.cross_entropy(logits.mT, labels, reduction="none"), **EXACT
    )
    torch.testing.assert_close(
        found["token_entropy"], torch.distributions.Categorical(logits=logits).entropy(), **EXACT
    )


@pytest.mark.parametrize("loss_type, smoothing", [("sigmoid", 0.0), ("sigmoid", 0.1), ("ipo", 0.0)])
def test_dpo_is_the_formula_of_trl(randn, loss_type, smoothing):
    pairs = [randn(7).requires_grad_() for _ in range(4)]
    found = dpo.dpo_loss(*pairs, 0.3, loss_type, smoothing)
    logits = (pairs[0] - pairs[1]) - (pairs[2] - pairs[3])
    if loss_type == "ipo":
        right = (logits - 1 / (2 * 0.3)) ** 2
    else:
        right = -tF.logsigmoid(0.3 * logits) * (1 - smoothing) - tF.logsigmoid(-0.3 * logits) * smoothing
    torch.testing.assert_close(found, right, **EXACT)
    for one, other in zip(*(torch.autograd.grad(loss.sum(), pairs) for loss in (found, right)), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_dpo_starts_at_log_2_with_a_slope_of_half_beta():
    start = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    loss = dpo.dpo_loss(start, start.detach(), start.detach(), start.detach(), beta=0.1)
    assert loss.item() == pytest.approx(math.log(2)) and torch.autograd.grad(loss, start)[0].item() == -0.05


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_divergences_and_their_gradients_are_those_of_torch(randn, direction, temperature):
    student, teacher = randn(3, 5, 11).requires_grad_(), randn(3, 5, 11).requires_grad_()
    found = distillation.kl_divergence(student, teacher, direction, temperature)
    q, p = (torch.distributions.Categorical(logits=x / temperature) for x in (student, teacher.detach()))
    pair = (p, q) if direction == "forward" else (q, p)
    right = temperature**2 * torch.distributions.kl_divergence(*pair)
    torch.testing.assert_close(found, right, **EXACT)
    gradients = [
        torch.autograd.grad(x.square().sum(), [student, teacher], allow_unused=True) for x in (found, right)
    ]
    torch.testing.assert_close(gradients[0][0], gradients[1][0], **EXACT)
    assert gradients[0][1] is None


def test_the_loss_of_distillation_is_a_mean_over_tokens(randn):
    student, teacher, labels = randn(3, 5, 11), randn(3, 5, 11), torch.randint(11, (3, 5))
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]])
    q, p = student[mask.bool()], teacher[mask.bool()]
    soft = tF.kl_div((q / 3).log_softmax(-1), (p / 3).softmax(-1), reduction="batchmean")
    right = 0.9 * 9 * soft + 0.1 * tF.cross_entropy(q, labels[mask.bool()])
    found = distillation.distillation_loss(student, teacher, labels, mask, "forward", 3.0, 0.1)
    torch.testing.assert_close(found, right, **EXACT)


# --------------------------------------------------------------------------------------------------
# Properties


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_at_a_high_temperature_distillation_matches_logits(randn, direction):
    """Its gradient is the difference of centered logits over their number (arXiv 1503.02531, section 2.1)."""
    student, teacher = randn(4, 11).requires_grad_(), randn(4, 11)
    loss = distillation.kl_divergence(student, teacher, direction, temperature=1e5).sum()
    difference = student.detach() - teacher
    right = (difference - difference.mean(-1, keepdim=True)) / 11
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], right, rtol=1e-3, atol=1e-5)


def test_a_divergence_is_positive_and_zero_for_equal_models(randn):
    student, teacher = randn(50, 11), randn(50, 11)
    for direction, other in (("forward", "reverse"), ("reverse", "forward")):
        found = distillation.kl_divergence(student, teacher, direction, 2.0)
        assert (found > 0).all()
        torch.testing.assert_close(found, distillation.kl_divergence(teacher, student, other, 2.0), **EXACT)
        equal = distillation.kl_divergence(student + 3, student, direction)
        torch.testing.assert_close(equal, torch.zeros_like(equal), rtol=0, atol=1e-12)


def test_advantages_of_a_group_do_not_depend_on_the_others(randn):
    rewards = randn(12)
    whole, _ = advantages.compute_group_normalized_rewards(rewards, 4)
    alone = [advantages.compute_group_normalized_rewards(part, 4)[0] for part in rewards.split(4)]
    torch.testing.assert_close(whole, torch.cat(alone), **EXACT)
    turned, _ = advantages.compute_group_normalized_rewards(5 * rewards + 3, 4, advantage_eps=0.0)
    exact, _ = advantages.compute_group_normalized_rewards(rewards, 4, advantage_eps=0.0)
    torch.testing.assert_close(turned, exact, **EXACT)


@pytest.mark.parametrize("method", ["noclip", "grpo", "gspo"])
def test_on_policy_all_methods_have_the_gradient_of_none(randn, method):
    """The ratio is 1, and its derivative that of the log-probability, with means over the response."""
    policy, mask = -randn(4, 6).abs(), torch.ones(4, 6, dtype=torch.bool)
    gradients = []
    for name in ("none", method):
        leaf = policy.clone().requires_grad_()
        losses, _ = policy_gradient.compute_policy_gradient_loss(
            torch.tensor([1.0, -1.0, 2.0, 0.0]), leaf, name, policy, 0.2, mask
        )
        loss = policy_gradient.aggregate_loss_across_microbatch(losses, mask)
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(*gradients, **EXACT)


def test_kl_estimators_have_the_mean_of_the_divergence():
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.5, 0.3]).double()
    divergence = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):
        mean = (p * policy_gradient.kl_penalty(p.log(), q.log(), estimator)).sum()
        torch.testing.assert_close(mean, divergence, **EXACT)


def test_tokens_of_our_tokenizer():
    found = response_log_probs.tokenize_prompt_and_output(
        ["ab", "a"], ["c", "bcd"], tokenizers.Tokenizer.byte_level()
    )
    assert found["response_mask"].tolist() == [[False, True, False], [True, True, True]]


# --------------------------------------------------------------------------------------------------
# A step

PROMPTS = ["say red", "say red", "hi", "hi"]
RESPONSES = ["red", "blue it is", "hello", "no"]


def reward(response, truth):
    return {"reward": float(response == truth), "format_reward": 1.0, "answer_reward": 0.0}


def step(n_microbatches, **choices):
    model = texts.Model().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    truths = ["red", "red", "hello", "hello"]
    loss, seen = grpo_step.grpo_train_step(
        model, texts.Words(), optimizer, n_microbatches, 1.0, reward, PROMPTS, RESPONSES, truths, 2, **choices
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    return model, loss, seen


@pytest.mark.parametrize("normalization", ["sequence", "constant"])
def test_microbatches_give_the_step_of_the_whole_batch(normalization):
    choices = {"loss_normalization": normalization, "normalization_constant": 20}
    (whole, loss, seen), *others = (step(n, **choices) for n in (1, 2, 3, 4))
    for model, other_loss, other in others:
        torch.testing.assert_close(other_loss, loss, **EXACT)
        torch.testing.assert_close(model.table, whole.table, **EXACT)
        assert other["grad_norm"] == pytest.approx(seen["grad_norm"], rel=1e-6)


def test_a_step_makes_the_rewarded_response_likelier():
    before, (after, _, seen) = texts.Model().double(), step(2)
    tokens = response_log_probs.tokenize_prompt_and_output(PROMPTS, RESPONSES, texts.Words())
    gain = dpo.sequence_log_probs(after, tokens) - dpo.sequence_log_probs(before, tokens)
    assert gain[0] > 0 > gain[1] and gain[2] > 0 > gain[3]
    assert seen["reward"] == 0.5 and seen["zero_variance"] == 0.0


def test_equal_rewards_change_nothing():
    model = texts.Model()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, seen = grpo_step.grpo_train_step(
        model, texts.Words(), optimizer, 2, 1.0, reward, PROMPTS, RESPONSES, ["x"] * 4, 2
    )
    assert seen["zero_variance"] == 1.0 and seen["grad_norm"] == 0.0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_old_log_probabilities_of_another_width_are_refused():
    with pytest.raises(ValueError, match="must have the shape of the labels"):
        step(2, importance_reweighting_method="grpo", old_log_probs=torch.zeros(4, 3).double(), cliprange=0.2)


def test_packed_items_and_batches(tmp_path):
    path = tmp_path / "sft.jsonl"
    path.write_text('{"prompt": "say red", "response": "red"}\n' * 3)
    dataset = packing.PackedSFTDataset(tokenizers.Tokenizer.byte_level(), path, 50, shuffle=True)
    batches = packing.iterate_batches(dataset, 2, shuffle=False)
    assert len(batches) == math.ceil(len(dataset) / 2) and batches[0]["labels"].shape == (2, 50)
    assert torch.equal(batches[0]["labels"][0, -1], batches[0]["input_ids"][1, 0])
