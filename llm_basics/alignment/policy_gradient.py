"""The policy gradient: losses whose gradient increases the probability of responses with positive advantages.

The value of the loss is not a measure of progress: only its gradient is meaningful. With samples of an older
policy, each token is weighted by the ratio of its current and its old probability, and the ratio is clipped,
so that several steps on the same samples stay close to the old policy (PPO, arXiv 1707.06347).

    >>> log_probs = torch.log(torch.tensor([[0.5, 0.9]]))
    >>> old = torch.log(torch.tensor([[0.5, 0.6]]))
    >>> compute_policy_gradient_loss(torch.tensor([1.0]), log_probs, "grpo", old, cliprange=0.2)[0]
    tensor([[-1.0000, -1.2000]])
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_basics.alignment import response_log_probs


def importance_ratio(
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
    method: str,
    response_mask: Bool[Tensor, "batch seq"]
    | Float[Tensor, "batch seq"]
    | Int[Tensor, "batch seq"]
    | None = None,
) -> Float[Tensor, "batch seq"]:
    """The ratio of a token's probability to that of the sampling policy: `exp(log p - log p_old)`.

    With `gspo` the sequence has one ratio, the geometric mean over the tokens of its response (arXiv
    2507.18071).

    >>> half = torch.log(torch.tensor([[0.5, 0.5]]))
    >>> importance_ratio(torch.log(torch.tensor([[1.0, 0.25]])), half, "grpo")
    tensor([[2.0000, 0.5000]])
    >>> importance_ratio(torch.log(torch.tensor([[1.0, 0.25]])), half, "gspo", torch.tensor([[1, 1]]))
    tensor([[1., 1.]])
    """
    log_ratio = policy_log_probs - old_log_probs
    if method == "gspo":
        if response_mask is None:
            raise ValueError(
                "gspo needs response_mask, since its ratio is a mean over the response; got None"
            )
        mean = response_log_probs.masked_mean(log_ratio, response_mask, dim=1)
        log_ratio = mean[:, None].expand_as(log_ratio)
    return log_ratio.exp()


def compute_policy_gradient_loss(
    raw_rewards_or_advantages: Float[Tensor, " batch"] | Float[Tensor, "batch 1"],
    policy_log_probs: Float[Tensor, "batch seq"],
    importance_reweighting_method: str = "none",
    old_log_probs: Float[Tensor, "batch seq"] | None = None,
    cliprange: float | None = None,
    response_mask: Bool[Tensor, "batch seq"]
    | Float[Tensor, "batch seq"]
    | Int[Tensor, "batch seq"]
    | None = None,
) -> tuple[Float[Tensor, "batch seq"], dict[str, Tensor]]:
    """The loss of each token, and the `clip_fraction` of the response where ratios are clipped.

    With advantage A, ratio `w = exp(log p - log p_old)` of a token, or of the sequence for `gspo`:
    `none`: `-A log p`; `noclip`: `-A w`; `grpo` and `gspo`: `-min(A w, A clip(w, 1 - c, 1 + c))`. The
    minimum is taken after multiplying by A, so that clipping never hides a decrease of the objective.

    >>> loss, _ = compute_policy_gradient_loss(torch.tensor([2.0]), torch.tensor([[-1.0, -3.0]]))
    >>> loss
    tensor([[2., 6.]])
    """
    method = importance_reweighting_method
    advantages = raw_rewards_or_advantages.reshape(-1, 1)
    if method == "none":
        return -advantages * policy_log_probs, {}
    if method not in ("noclip", "grpo", "gspo"):
        raise ValueError(f"the method must be 'none', 'noclip', 'grpo' or 'gspo', got {method!r}")
    if old_log_probs is None or (cliprange is None and method != "noclip"):
        raise ValueError(f"{method} needs old_log_probs{' and cliprange' * (method != 'noclip')}, got None")
    ratio = importance_ratio(policy_log_probs, old_log_probs, method, response_mask)
    objective = advantages * ratio
    if method == "noclip" or cliprange is None:
        return -objective, {}
    clipped = advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    is_clipped = (clipped < objective).to(objective)
    mask = torch.ones_like(objective) if response_mask is None else response_mask
    return -torch.minimum(objective, clipped), {
        "clip_fraction": response_log_probs.masked_mean(is_clipped, mask).detach()
    }


def kl_penalty(
    policy_log_probs: Float[Tensor, "..."], ref_log_probs: Float[Tensor, "..."], estimator: str = "k3"
) -> Float[Tensor, "..."]:
    """An estimate of `KL(policy || reference)` for each token that the policy sampled.

    With `d = log p - log p_ref`: `k1 = d`, unbiased but often negative; `k2 = d^2 / 2`, never negative, with
    the right gradient; `k3 = exp(-d) - 1 + d`, never negative and unbiased (Schulman, "Approximating KL
    divergence", 2020).

    >>> p, reference = torch.tensor([0.0]), torch.tensor([1.0])
    >>> [kl_penalty(p, reference, name).item() for name in ("k1", "k2")]
    [-1.0, 0.5]
    """
    difference = policy_log_probs - ref_log_probs.detach()
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"estimator must be 'k1', 'k2' or 'k3', got {estimator!r}")


def aggregate_loss_across_microbatch(
    per_token_policy_gradient_loss: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"] | Float[Tensor, "batch seq"] | Int[Tensor, "batch seq"],
    loss_normalization: str = "sequence",
    normalization_constant: int | float | None = None,
) -> Float[Tensor, ""]:
    """Reduce the losses of the tokens where `mask` is 1 to a scalar.

    `sequence`: the mean over each response, then over the responses (GRPO); tokens of long responses have
    smaller weights. `constant`: the sum of all, divided by the constant (Dr. GRPO), with equal weights for
    all tokens.

    >>> losses, mask = torch.tensor([[1.0, 3.0], [8.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
    >>> aggregate_loss_across_microbatch(losses, mask)
    tensor(5.)
    >>> aggregate_loss_across_microbatch(losses, mask, "constant", normalization_constant=4)
    tensor(3.)
    """
    if loss_normalization == "sequence":
        return response_log_probs.masked_mean(per_token_policy_gradient_loss, mask, dim=1).mean()
    if loss_normalization != "constant":
        raise ValueError(f"loss_normalization must be 'sequence' or 'constant', got {loss_normalization!r}")
    if normalization_constant is None:
        raise ValueError("constant needs normalization_constant, got None; the longest response is usual")
    return response_log_probs.masked_normalize(
        per_token_policy_gradient_loss, mask, normalize_constant=normalization_constant
    )
