"""Rollouts: responses sampled by a model, with their rewards and advantages.

Each response has its own seed, so that the responses of a group differ, and a resumed run samples the same
ones. Training uses the sampled ids, since encoding the decoded text may give others.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_basics.alignment import advantages, response_log_probs, rewards
from llm_basics.core import dataloader
from llm_basics.core import model as models
from llm_basics.core import tokenizer as tokenizers
from llm_basics.data import chat_template, sft_dataset
from llm_basics.inference import engine, user_reward
from llm_basics.post_training import options as post_options
from llm_basics.runs import signals
from llm_basics.training import sft

BUILT_IN = {
    "exact": rewards.exact_match_reward,
    "number": rewards.number_reward,
    "tagged": rewards.tagged_answer_reward,
}

# prompt, response and expected response -> reward, and its parts
Reward = Callable[[str, str, str], dict[str, float]]


@dataclass(frozen=True)
class Rollout:
    """A response to a prompt. `ids` end with `<|end|>` unless the response was truncated."""

    case: sft.TestCase
    ids: list[int]
    text: str
    ended: bool
    is_exact: bool
    parts: dict[str, float]
    advantage: float = 0.0

    @property
    def reward(self) -> float:
        return self.parts["reward"]


class Batch(NamedTuple):
    """Rows of rollouts for a forward pass.

    `labels` are the next tokens of the last positions of `inputs`; earlier positions have no response tokens.
    """

    inputs: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch last"]
    response_mask: Bool[Tensor, "batch last"]
    advantages: Float[Tensor, " batch"]
    weight: float
    """Fraction of the responses of a step."""
    old_log_probs: Float[Tensor, "batch last"]


def load_reward(name: str) -> Reward:
    """The reward function of an `rl.reward`: one of BUILT_IN, or FILE.py:FUNCTION."""
    if name in BUILT_IN:
        built_in = BUILT_IN[name]
        return lambda prompt, response, expected: built_in(response, expected)
    if ".py" not in name:
        raise ValueError(f"rl.reward must be {', '.join(BUILT_IN)} or FILE.py:FUNCTION, got {name!r}")
    score = user_reward.load(name)
    return lambda prompt, response, expected: {"reward": score(prompt, response, expected)}


def seeds(seed: int, step: int, n: int) -> list[int]:
    """The seeds of the `n` responses of a step, all different."""
    found = np.random.SeedSequence((seed, step)).generate_state(n, np.uint64)
    return [int(value) >> 1 for value in found]


def sample(
    model: models.TransformerLM,
    tokenizer: tokenizers.Tokenizer,
    cases: Sequence[sft.TestCase],
    max_new_tokens: int,
    sample_seeds: Sequence[int],
    reward: Reward,
    temperature: float = 1.0,
) -> list[Rollout]:
    """A response of the model to each case. Polls signals."""
    end = tokenizer.special_id(chat_template.END)
    device = model.lm_head.weight.device

    def poll(row: int, token: int) -> bool:
        signals.poll()
        return False

    sampled = engine.generate_batch(
        model,
        [torch.tensor(case.ids, device=device) for case in cases],
        max_new_tokens,
        temperature,
        stop_id=end,
        generators=[torch.Generator().manual_seed(seed) for seed in sample_seeds],
        ends_with=poll,
    )
    return [
        score(case, ids, len(ids) < max_new_tokens, tokenizer, reward)
        for case, ids in zip(cases, sampled, strict=True)
    ]


def score(
    case: sft.TestCase, ids: list[int], ended: bool, tokenizer: tokenizers.Tokenizer, reward: Reward
) -> Rollout:
    """A response with its reward; 0 for a truncated response, which lacks an answer."""
    text, expected = tokenizer.decode(ids), case.expected.removesuffix(chat_template.END)
    parts = reward(case.question, text, expected)
    if not ended:
        parts = dict.fromkeys(parts, 0.0)
    is_exact = ended and rewards.same_answer(text, expected)
    return Rollout(
        case, ids + [tokenizer.special_id(chat_template.END)] * ended, text, ended, is_exact, parts
    )


def with_advantages(found: Sequence[Rollout], options: post_options.RlOptions) -> list[Rollout]:
    """The rollouts, ordered by group, with their advantages."""
    values, _ = advantages.compute_group_normalized_rewards(
        torch.tensor([rollout.reward for rollout in found]),
        options.group_size,
        options.baseline,
        advantage_normalizer=options.normalizer,
    )
    pairs = zip(found, values.tolist(), strict=True)
    return [dataclasses.replace(rollout, advantage=value) for rollout, value in pairs]


@torch.no_grad()
def collate(
    found: Sequence[Rollout],
    n_responses: int,
    model: models.TransformerLM,
    context_length: int,
    device: torch.device,
    temperature: float = 1.0,
) -> Batch:
    """Rollouts of a step of `n_responses` as rows, with the log-probabilities of the sampling model."""
    rows = []
    for rollout in found:
        ids = np.array(rollout.case.ids + rollout.ids)
        rows.append(sft_dataset.Example(ids, np.arange(len(ids)) >= len(rollout.case.ids)))
    inputs, targets = sft_dataset.collate(rows, context_length, device)
    targets = targets[:, min(len(rollout.case.ids) for rollout in found) - 1 :]
    mask, labels = targets != dataloader.IGNORE_INDEX, targets.clamp(min=0)
    values = torch.tensor([rollout.advantage for rollout in found], device=device)
    weight = len(found) / n_responses
    batch = Batch(inputs, labels, mask, values, weight, torch.zeros(labels.shape, device=device))
    return batch._replace(old_log_probs=log_probs_of(model, batch, temperature)["log_probs"])


def log_probs_of(
    model: models.TransformerLM, batch: Batch, temperature: float = 1.0, with_entropy: bool = False
) -> dict[str, Float[Tensor, "batch last"]]:
    """`get_response_log_probs` of the last positions only, since logits dominate its cost."""
    n = batch.labels.shape[1]
    return response_log_probs.get_response_log_probs(
        lambda inputs: model.logits(model.hidden_states(inputs)[:, -n:]) / temperature,
        batch.inputs,
        batch.labels,
        with_entropy,
    )


def statistics(found: Sequence[Rollout], group_size: int) -> dict[str, float]:
    """Means over the rollouts of a step: rewards and their parts, exact answers, lengths, and the fraction of
    groups with equal rewards."""
    metrics = {name: fmean([r.parts[name] for r in found]) for name in found[0].parts}
    groups = [found[i : i + group_size] for i in range(0, len(found), group_size)]
    return metrics | {
        "exact": fmean([r.is_exact for r in found]),
        "response_tokens": fmean([len(r.ids) for r in found]),
        "cut_off": fmean([not r.ended for r in found]),
        "zero_variance": fmean([len({r.reward for r in group}) == 1 for group in groups]),
    }


def as_record(rollout: Rollout, group: int, log_probs: Sequence[float] | None) -> dict[str, Any]:
    """A line of rollouts.jsonl, with the log-probability of each token if the rollout was trained on."""
    return {
        "group": group,
        "prompt": rollout.case.question,
        "expected": rollout.case.expected.removesuffix(chat_template.END),
        "kind": rollout.case.kind,
        "text": rollout.text,
        "tokens": rollout.ids,
        "ended": rollout.ended,
        "log_probs": log_probs and [round(value, 5) for value in log_probs],
        **rollout.parts,
        "exact": rollout.is_exact,
        "advantage": rollout.advantage,
    }
