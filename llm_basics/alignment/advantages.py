"""Advantages: rewards of responses relative to the other responses to the same prompt.

A policy gradient weights the log-probability of each response. With the reward as the weight, all responses
to an easy prompt are reinforced equally; with the mean of the group subtracted, responses above it are
reinforced and those below it suppressed. Four methods are cases of one function:

| method | baseline | normalizer | |
|---|---|---|---|
| GRPO | mean | std | arXiv 2402.03300 |
| Dr. GRPO | mean | none | arXiv 2503.20783 |
| rejection sampling (RFT) | none | none | arXiv 2308.01825 |
| MaxRL | mean | mean | arXiv 2602.02710 |

    >>> import torch
    >>> rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    >>> compute_group_normalized_rewards(rewards, 4, advantage_normalizer="mean")[0]
    tensor([ 3.0000, -1.0000, -1.0000, -1.0000])
"""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def compute_group_normalized_rewards(
    raw_rewards: Float[Tensor, " rollouts"],
    group_size: int,
    baseline: str = "mean",
    advantage_eps: float = 1e-6,
    advantage_normalizer: str = "std",
) -> tuple[Float[Tensor, " rollouts"], dict[str, float]]:
    """The advantage of each response within its group: `(r - baseline) / (normalizer + eps)`.

    A group is `group_size` responses in a row. `baseline` is the mean of the group or none; `normalizer` is
    its standard deviation (divided by n - 1), its mean, or none. A group whose rewards are all equal has no
    gradient; the second result counts them as `zero_variance`.

    >>> import torch
    >>> compute_group_normalized_rewards(torch.tensor([1.0, 0.0, 5.0, 5.0]), group_size=2)
    (tensor([ 0.7071, -0.7071,  0.0000,  0.0000]), {'zero_variance': 0.5})
    """
    check_groups(len(raw_rewards), group_size)
    groups = rearrange(raw_rewards, "(groups group) -> groups group", group=group_size)
    means = groups.mean(-1, keepdim=True)
    if baseline not in ("mean", "none"):
        raise ValueError(f"baseline must be 'mean' or 'none', got {baseline!r}")
    advantages = groups - means if baseline == "mean" else groups
    if advantage_normalizer == "std":
        advantages = advantages / (groups.std(-1, keepdim=True) + advantage_eps)
    elif advantage_normalizer == "mean":
        advantages = advantages / (means + advantage_eps)
    elif advantage_normalizer != "none":
        raise ValueError(
            f"advantage_normalizer must be 'std', 'mean' or 'none', got {advantage_normalizer!r}"
        )
    is_flat = (groups == groups[:, :1]).all(-1)
    return rearrange(advantages, "groups group -> (groups group)"), {
        "zero_variance": is_flat.float().mean().item()
    }


def check_groups(n: int, group_size: int) -> None:
    """Raise ValueError unless `n` responses are whole groups of at least one."""
    if group_size < 1 or n % group_size:
        raise ValueError(
            f"the responses must be whole groups of group_size, got {n} responses and group_size={group_size}"
        )
