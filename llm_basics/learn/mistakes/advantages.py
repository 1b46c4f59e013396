"""Advantages within a group of responses: baseline and normalizer."""

import types

import torch

from llm_basics.alignment import advantages
from llm_basics.learn import probes

step = probes.Step("advantages")
# the right functions, also where one of them is replaced
right = types.SimpleNamespace(**vars(advantages))
draw = probes.numbers(seed=80)


def expected(rewards, group_size, baseline="mean", eps=1e-6, normalizer="std"):
    groups = rewards.reshape(-1, group_size)
    mean, std = groups.mean(1, keepdim=True), groups.std(1, keepdim=True)
    centered = groups - mean if baseline == "mean" else groups
    divisor = {"std": std + eps, "mean": mean + eps, "none": torch.ones_like(mean)}[normalizer]
    return (centered / divisor).reshape(-1)


def compare(about, rewards, group_size, *choices, **ground):
    names = ("baseline", "advantage_eps", "advantage_normalizer")
    options = dict(zip(names, choices, strict=False))
    step.compare(
        about,
        lambda a, rewards: a.run_compute_group_normalized_rewards(rewards, group_size, **options)[0],
        lambda rewards: expected(rewards, group_size, *choices),
        {"rewards": rewards},
        axes="rollout",
        gradients=False,
        **(ground or {"contract": "group_normalized_rewards"}),
    )


BINARY = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0])
POSITIVE = draw(12).abs() + torch.arange(12.0).div(4, rounding_mode="floor")

compare("GRPO: rewards of 0 and 1, three groups of 4", BINARY, 4)
compare("GRPO: groups on different levels", POSITIVE, 4)
compare("GRPO: groups of 2", POSITIVE, 2)
compare("GRPO: an eps of 0.5", POSITIVE, 4, "mean", 0.5)
compare("Dr. GRPO: no normalizer", POSITIVE, 4, "mean", 1e-6, "none")
compare("RFT: neither baseline nor normalizer", POSITIVE, 4, "none", 1e-6, "none")
compare("MaxRL: divided by the mean", POSITIVE, 4, "mean", 1e-6, "mean")
compare("MaxRL: an eps of 0.5", POSITIVE, 4, "mean", 0.5, "mean")
compare("divided by std without a baseline", POSITIVE, 4, "none", 1e-6, "std")
compare("a group whose rewards are all 1, and one of 0", torch.tensor([1.0] * 4 + [0.0] * 4), 4)
compare(
    "MaxRL: a group without any reward", torch.tensor([0.0] * 4 + [1.0, 0, 0, 0]), 4, "mean", 1e-6, "mean"
)
step.probes.append(
    probes.Probe(
        "responses that are not whole groups",
        lambda a: {"result": len(a.run_compute_group_normalized_rewards(POSITIVE[:10], 4)[0])},
        lambda: {"error": "ValueError: 10 responses are not whole groups of 4"},
        0.0,
        0.0,
        beyond="half a group at the end was dropped in silence, or compared with another prompt",
    )
)


def mistake(source="written for this catalogue", **more):
    return step.mistake("advantages.compute_group_normalized_rewards", source=source, **more)


def normalized(rewards, size, baseline, eps, normalizer, mean=None, std=None, divide=None):
    """The advantages with another mean, deviation or division."""
    right.check_groups(len(rewards), size)
    groups = rewards.reshape(-1, size)
    mean = groups.mean(1, keepdim=True) if mean is None else mean(groups)
    std = groups.std(1, keepdim=True) if std is None else std(groups)
    centered = groups - mean if baseline == "mean" else groups
    divide = divide or (lambda x, by, eps: x / (by + eps))
    if normalizer != "none":
        centered = divide(centered, {"std": std, "mean": mean}[normalizer], eps)
    return centered.reshape(-1), {}


@mistake(source="public issues: rewards whitened over the batch, as in PPO")
def std_over_the_batch(
    raw_rewards, group_size, baseline="mean", advantage_eps=1e-6, advantage_normalizer="std"
):
    """The standard deviation is that of the whole batch, as in PPO. A prompt whose rewards hardly differ
    then has hardly a gradient. In GRPO each group has its own."""
    return normalized(
        raw_rewards,
        group_size,
        baseline,
        advantage_eps,
        advantage_normalizer,
        std=lambda groups: groups.std(),
    )


@mistake()
def mean_over_the_batch(
    raw_rewards, group_size, baseline="mean", advantage_eps=1e-6, advantage_normalizer="std"
):
    """The baseline is the mean of the whole batch. All responses to an easy prompt then have a positive
    advantage, also the worst. Subtract the mean of the group."""
    return normalized(
        raw_rewards,
        group_size,
        baseline,
        advantage_eps,
        advantage_normalizer,
        mean=lambda groups: groups.mean(),
    )


@mistake()
def groups_across_prompts(
    raw_rewards, group_size, baseline="mean", advantage_eps=1e-6, advantage_normalizer="std"
):
    """The rewards are reshaped to (group_size, prompts), so a group has one response of each of several
    prompts. The responses to a prompt stand in a row: reshape to (prompts, group_size)."""
    right.check_groups(len(raw_rewards), group_size)
    turned = raw_rewards.reshape(group_size, -1).T.reshape(-1)
    found, more = right.compute_group_normalized_rewards(
        turned, group_size, baseline, advantage_eps, advantage_normalizer
    )
    return found.reshape(-1, group_size).T.reshape(-1), more


@mistake()
def std_divided_by_n(
    raw_rewards, group_size, baseline="mean", advantage_eps=1e-6, advantage_normalizer="std"
):
    """The variance is divided by n, not by n - 1, as in NumPy. In a group of 4 all advantages are 15%
    larger. torch.std divides by n - 1."""
    return normalized(
        raw_rewards,
        group_size,
        baseline,
        advantage_eps,
        advantage_normalizer,
        std=lambda groups: groups.std(1, keepdim=True, correction=0),
    )


@mistake()
def variance_instead_of_std(
    raw_rewards, group_size, baseline="mean", advantage_eps=1e-6, advantage_normalizer="std"
):
    """The rewards are divided by the variance. The advantages then depend on the unit of the reward: twice
    the reward, half the advantage. Divide by its square root."""
    return normalized(
        raw_rewards,
        group_size,
        baseline,
        advantage_eps,
        advantage_normalizer,
        std=lambda groups: groups.var(1, keepdim=True),
    )


@mistake()
def eps_missing(raw_rewards, group_size, baseline="mean", advantage_eps=1e-6, advantage_normalizer="std"):
    """Nothing is added to the divisor. In a group whose rewards are all equal, 0 is divided by 0, and one
    NaN in the loss ruins every weight. Add advantage_eps."""
    return normalized(
        raw_rewards,
        group_size,
        baseline,
        advantage_eps,
        advantage_normalizer,
        divide=lambda x, by, eps: x / by,
    )


@mistake()
def eps_subtracted_from_nothing(
    raw_rewards, group_size, baseline="mean", advantage_eps=1e-6, advantage_normalizer="std"
):
    """eps is added after the division, to the advantage, instead of to the divisor. It protects nothing,
    and every advantage is shifted. Write x / (std + eps)."""
    return normalized(
        raw_rewards,
        group_size,
        baseline,
        advantage_eps,
        advantage_normalizer,
        divide=lambda x, by, eps: x / by + eps,
    )


@mistake()
def eps_under_the_root(
    raw_rewards, group_size, baseline="mean", advantage_eps=1e-6, advantage_normalizer="std"
):
    """eps is added to the variance, under the root, as in layer norm. An eps of 1e-6 is then 1e-3 beside
    the standard deviation. Add it to the standard deviation."""
    return normalized(
        raw_rewards,
        group_size,
        baseline,
        advantage_eps,
        advantage_normalizer,
        divide=lambda x, by, eps: x / ((by.square() + eps).sqrt()),
    )


@mistake()
def eps_as_a_lower_bound(
    raw_rewards, group_size, baseline="mean", advantage_eps=1e-6, advantage_normalizer="std"
):
    """The divisor is clamped to eps from below, instead of being raised by it. With a large eps, which
    dampens groups of nearly equal rewards, the result is another. Write x / (std + eps)."""
    return normalized(
        raw_rewards,
        group_size,
        baseline,
        advantage_eps,
        advantage_normalizer,
        divide=lambda x, by, eps: x / by.clamp(min=eps),
    )


@mistake()
def eps_fixed(raw_rewards, group_size, baseline="mean", advantage_eps=1e-6, advantage_normalizer="std"):
    """advantage_eps is ignored, and 1e-6 is used whatever is given. Use the parameter."""
    return right.compute_group_normalized_rewards(
        raw_rewards, group_size, baseline, 1e-6, advantage_normalizer
    )


@mistake()
def always_normalized_by_std(
    raw_rewards, group_size, baseline="mean", advantage_eps=1e-6, advantage_normalizer="std"
):
    """The argument is ignored: the normalizer is always the standard deviation. Dr. GRPO leaves it out, since
    it favors prompts that are very easy or very hard."""
    return right.compute_group_normalized_rewards(raw_rewards, group_size, baseline, advantage_eps, "std")


@mistake()
def always_centered(raw_rewards, group_size, baseline="mean", advantage_eps=1e-6, advantage_normalizer="std"):
    """The mean is subtracted although baseline is none. Rejection sampling trains on right answers alone,
    with weights of 1 and 0, and pushes no answer down."""
    return right.compute_group_normalized_rewards(
        raw_rewards, group_size, "mean", advantage_eps, advantage_normalizer
    )


@mistake()
def never_centered(raw_rewards, group_size, baseline="mean", advantage_eps=1e-6, advantage_normalizer="std"):
    """The mean of the group is not subtracted. All responses with a reward are pushed up, and none is
    pushed down, so the gradient is larger and noisier. Subtract it for baseline mean."""
    return right.compute_group_normalized_rewards(
        raw_rewards, group_size, "none", advantage_eps, advantage_normalizer
    )


@mistake()
def mean_of_the_centered_rewards(
    raw_rewards, group_size, baseline="mean", advantage_eps=1e-6, advantage_normalizer="std"
):
    """The mean to divide by is taken after the baseline was subtracted, so it is 0, and the advantages are
    divided by eps. MaxRL divides by the mean of the rewards themselves."""
    if advantage_normalizer != "mean":
        return right.compute_group_normalized_rewards(
            raw_rewards, group_size, baseline, advantage_eps, advantage_normalizer
        )
    centered, more = right.compute_group_normalized_rewards(
        raw_rewards, group_size, baseline, advantage_eps, "none"
    )
    groups = centered.reshape(-1, group_size)
    # exactly 0 in the mathematics, and here
    return (groups / (0 * groups.mean(1, keepdim=True) + advantage_eps)).reshape(-1), more


@mistake()
def sign_turned(raw_rewards, group_size, baseline="mean", advantage_eps=1e-6, advantage_normalizer="std"):
    """The rewards are subtracted from the mean, not the mean from the rewards. The worst responses are
    reinforced, and the reward falls. The advantage of the best response is positive."""
    found, more = right.compute_group_normalized_rewards(
        raw_rewards, group_size, baseline, advantage_eps, advantage_normalizer
    )
    return (-found if baseline == "mean" else found), more


@mistake()
def left_out_of_its_own_baseline(
    raw_rewards, group_size, baseline="mean", advantage_eps=1e-6, advantage_normalizer="std"
):
    """The baseline of a response is the mean of the others (RLOO), so the advantages are larger by n / (n -
    1). That is another method: here the mean is over the whole group."""
    found, more = right.compute_group_normalized_rewards(
        raw_rewards, group_size, baseline, advantage_eps, advantage_normalizer
    )
    return (found * group_size / (group_size - 1) if baseline == "mean" else found), more


@mistake(source="public reviews of solutions: half a rollout dropped")
def incomplete_group_dropped(
    raw_rewards, group_size, baseline="mean", advantage_eps=1e-6, advantage_normalizer="std"
):
    """Responses at the end that fill no group are left out without an error, and the advantages no longer
    belong to the responses. Raise ValueError unless group_size divides their number."""
    whole = len(raw_rewards) // group_size * group_size
    return right.compute_group_normalized_rewards(
        raw_rewards[:whole], group_size, baseline, advantage_eps, advantage_normalizer
    )


@mistake()
def kept_in_groups(raw_rewards, group_size, baseline="mean", advantage_eps=1e-6, advantage_normalizer="std"):
    """The result has the shape (groups, group_size). It no longer lines up with the responses, and
    broadcasts against (batch, seq) into something else. Flatten it."""
    found, more = right.compute_group_normalized_rewards(
        raw_rewards, group_size, baseline, advantage_eps, advantage_normalizer
    )
    return found.reshape(-1, group_size), more


@mistake()
def rewards_changed_in_place(
    raw_rewards, group_size, baseline="mean", advantage_eps=1e-6, advantage_normalizer="std"
):
    """The mean is subtracted in place, in the tensor that was given. The rewards that are logged afterwards
    are centered ones, with a mean of 0. Compute a new tensor."""
    found, more = right.compute_group_normalized_rewards(
        raw_rewards, group_size, baseline, advantage_eps, advantage_normalizer
    )
    if baseline == "mean":
        groups = raw_rewards.view(-1, group_size)
        groups -= groups.mean(1, keepdim=True)
    return found, more
