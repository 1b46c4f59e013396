"""One step of reinforcement learning from rewards of groups of responses (GRPO, arXiv 2402.03300).

Rewards of sampled responses are converted to advantages within each group, and one gradient step increases
the probability of responses with positive advantages. The batch is computed in microbatches that fit into
memory; the gradient is that of the whole batch. But: it does not sample the responses.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llm_basics.alignment import advantages, policy_gradient, response_log_probs, rewards
from llm_basics.core import optim


def accumulate_policy_gradient(
    model: Any,
    tokens: dict[str, Tensor],
    advantage: Float[Tensor, " batch"],
    gradient_accumulation_steps: int = 1,
    importance_reweighting_method: str = "none",
    old_log_probs: Float[Tensor, "batch seq"] | None = None,
    cliprange: float | None = None,
    loss_normalization: str = "sequence",
    normalization_constant: int | float | None = None,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Add the gradient of the loss of all responses to the parameters, in microbatches.

    `tokens` are those of `tokenize_prompt_and_output`. Returns the loss, and `token_entropy` and
    `clip_fraction` as means over the microbatches. A mean over sequences is weighted by their number; sums
    that are divided by a constant are added.
    """
    n, shape = len(advantage), tokens["labels"].shape
    if old_log_probs is not None and old_log_probs.shape != shape:
        raise ValueError(
            f"old_log_probs must have the shape of the labels, got {tuple(old_log_probs.shape)} and "
            f"{tuple(shape)}; compute them on the same padded batch"
        )
    total, observed = torch.zeros((), device=advantage.device), dict[str, float]()
    for rows in torch.arange(n).tensor_split(min(gradient_accumulation_steps, n)):
        inputs, labels, mask = (tokens[name][rows] for name in ("input_ids", "labels", "response_mask"))
        scored = response_log_probs.get_response_log_probs(model, inputs, labels, return_token_entropy=True)
        old = None if old_log_probs is None else old_log_probs[rows]
        losses, seen = policy_gradient.compute_policy_gradient_loss(
            advantage[rows], scored["log_probs"], importance_reweighting_method, old, cliprange, mask
        )
        loss = policy_gradient.aggregate_loss_across_microbatch(
            losses, mask, loss_normalization, normalization_constant
        )
        share = len(rows) / n
        loss = loss * share if loss_normalization == "sequence" else loss
        loss.backward()
        total = total + loss.detach()
        seen["token_entropy"] = response_log_probs.masked_mean(scored["token_entropy"].detach(), mask)
        for name, value in seen.items():
            observed[name] = observed.get(name, 0.0) + share * value.item()
    return total, observed


def grpo_train_step(
    model: Any,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    gradient_accumulation_steps: int,
    max_grad_norm: float | None,
    reward_fn: Callable[[str, str], dict[str, float]],
    repeated_prompts: Sequence[str],
    rollout_responses: Sequence[str],
    repeated_ground_truths: Sequence[str],
    group_size: int,
    baseline: str = "mean",
    advantage_eps: float = 1e-6,
    advantage_normalizer: str = "std",
    importance_reweighting_method: str = "none",
    old_log_probs: Float[Tensor, "batch seq"] | None = None,
    cliprange: float | None = None,
    loss_normalization: str = "sequence",
    normalization_constant: int | float | None = None,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """One update of the model from the responses to each prompt: rewards, advantages, gradient, step.

    The `group_size` responses to a prompt are consecutive. The gradient is clipped to `max_grad_norm`, if
    given. Returns the loss before the update, and statistics: the means of the rewards and their parts,
    `zero_variance`, `token_entropy`, `clip_fraction`, `grad_norm` before clipping.
    Gradients are None before and after.
    """
    device = next(model.parameters()).device
    tokens = response_log_probs.tokenize_prompt_and_output(repeated_prompts, rollout_responses, tokenizer)
    raw, parts = rewards.compute_rollout_rewards(reward_fn, rollout_responses, repeated_ground_truths)
    advantage, groups = advantages.compute_group_normalized_rewards(
        raw, group_size, baseline, advantage_eps, advantage_normalizer
    )
    optimizer.zero_grad(set_to_none=True)
    loss, observed = accumulate_policy_gradient(
        model,
        {name: tensor.to(device) for name, tensor in tokens.items()},
        advantage.to(device),
        gradient_accumulation_steps,
        importance_reweighting_method,
        None if old_log_probs is None else old_log_probs.to(device),
        cliprange,
        loss_normalization,
        normalization_constant,
    )
    no_limit = float("inf")
    norm = optim.clip_grad_norm_(model.parameters(), no_limit if max_grad_norm is None else max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, {**parts, **groups, **observed, "grad_norm": norm.item()}
