"""Losses of the policy gradient, ratios and their clipping, KL estimators, aggregation."""

import types

import torch

from llm_basics.alignment import policy_gradient
from llm_basics.learn import probes

step = probes.Step("policy_gradient")
# the right functions, also where one of them is replaced
right = types.SimpleNamespace(**vars(policy_gradient))
draw = probes.numbers(seed=90)

POLICY = -draw(4, 6).abs()
OLD = POLICY + 0.3 * draw(4, 6)
ADVANTAGES = torch.tensor([1.5, -0.7, 0.4, -2.0])
MASK = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0], [1, 1, 0, 0, 0, 0]])


def expected(advantages, policy, method="none", old=None, cliprange=None, mask=None):
    """By cases, token by token."""
    a = advantages.reshape(-1, 1).expand_as(policy)
    if method == "none":
        return -a * policy
    difference = policy - old
    if method == "gspo":
        difference = ((difference * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)).expand_as(policy)
    ratio = difference.exp()
    if method == "noclip":
        return -a * ratio
    # the ratio stops to count above the range for good responses, and below it for bad ones
    return torch.where(a >= 0, -a * ratio.clamp(max=1 + cliprange), -a * ratio.clamp(min=1 - cliprange))


def compare(about, method, advantages=ADVANTAGES, cliprange=None, **ground):
    old = None if method == "none" else OLD
    mask = MASK if method == "gspo" else None

    def ours(a, advantages, policy):
        return a.run_compute_policy_gradient_loss(
            advantages,
            policy,
            importance_reweighting_method=method,
            old_log_probs=old,
            cliprange=cliprange,
            response_mask=mask,
        )[0]

    step.compare(
        about,
        ours,
        lambda advantages, policy: expected(advantages, policy, method, old, cliprange, mask),
        {"advantages": advantages, "policy": POLICY},
        axes="row position",
        **(ground or {"contract": "policy_gradient_loss"}),
    )


compare("none: advantage times log-probability", "none")
compare("none: advantages of (batch, 1)", "none", ADVANTAGES[:, None])
compare("noclip: advantage times ratio", "noclip")
compare("grpo: clipped at 0.2", "grpo", cliprange=0.2)
compare("grpo: clipped at 0.05", "grpo", cliprange=0.05)
compare("gspo: one ratio for each sequence, clipped at 0.05", "gspo", cliprange=0.05)
compare("gspo: not clipped", "gspo", cliprange=9.0)


def compare_ratio(about, method, mask=None):
    def reference(policy):
        difference = policy - OLD
        if method == "gspo":
            difference = ((difference * MASK).sum(1, keepdim=True) / MASK.sum(1, keepdim=True)).expand_as(
                policy
            )
        return difference.exp()

    step.compare(
        about,
        lambda a, policy: a.run_importance_ratio(policy, OLD, method, mask),
        reference,
        {"policy": POLICY},
        axes="row position",
    )


compare_ratio("ratio of each token", "grpo")
compare_ratio("ratio of each sequence", "gspo", MASK)


def clip_fraction(a, cliprange=0.2):
    *_, seen = a.run_compute_policy_gradient_loss(ADVANTAGES, POLICY, "grpo", OLD, cliprange, MASK)
    return float(seen["clip_fraction"])


def right_clip_fraction(cliprange=0.2):
    ratio = (POLICY - OLD).exp()
    positive = (ADVANTAGES > 0)[:, None]
    clipped = torch.where(positive, ratio > 1 + cliprange, ratio < 1 - cliprange)
    return clipped[MASK.bool()].double().mean().item()


step.value(
    "the fraction of the response that is clipped",
    clip_fraction,
    right_clip_fraction(),
    beyond="the assignment leaves the statistics open; without this one, a policy that runs away is not seen",
)
step.compare(
    "masked positions of an older policy that are infinite",
    lambda a, policy: a.run_aggregate_loss_across_microbatch(
        a.run_compute_policy_gradient_loss(
            ADVANTAGES, policy, "gspo", OLD.masked_fill(MASK == 0, float("inf")), 0.2, MASK
        )[0],
        MASK,
    ),
    lambda policy: (
        (expected(ADVANTAGES, policy, "gspo", OLD, 0.2, MASK) * MASK).sum(1) / MASK.sum(1)
    ).mean(),
    {"policy": POLICY},
    gradients=False,
    beyond="rollouts of another engine may leave infinities where nothing was sampled",
)

# --------------------------------------------------------------------------------------------------
# KL


def compare_kl(about, estimator, reference):
    step.compare(
        about,
        lambda a, policy: a.run_kl_penalty(policy, OLD, estimator),
        reference,
        {"policy": POLICY},
        axes="row position",
    )


compare_kl("k1: the difference", "k1", lambda policy: policy - OLD)
compare_kl("k2: half of its square", "k2", lambda policy: (policy - OLD) ** 2 / 2)
compare_kl("k3: never negative", "k3", lambda policy: (OLD - policy).exp() - 1 - (OLD - policy))
step.compare(
    "k3 has no gradient to the reference",
    lambda a, policy: a.run_kl_penalty(policy, 2 * policy, "k3"),
    lambda policy: (2 * policy.detach() - policy).exp() - 1 - (2 * policy.detach() - policy),
    {"policy": POLICY},
    axes="row position",
)

# --------------------------------------------------------------------------------------------------
# Aggregation

LOSSES = draw(4, 6)


def compare_aggregate(about, reference, *choices, mask=MASK, **ground):
    step.compare(
        about,
        lambda a, losses: a.run_aggregate_loss_across_microbatch(losses, mask, *choices),
        reference,
        {"losses": LOSSES},
        **(ground or {"contract": "aggregate_loss"}),
    )


compare_aggregate(
    "the mean of each response, then of all",
    lambda losses: torch.stack(
        [row[kept.bool()].mean() for row, kept in zip(losses, MASK, strict=True)]
    ).mean(),
)
compare_aggregate("the sum over 24", lambda losses: losses[MASK.bool()].sum() / 24, "constant", 24)
compare_aggregate(
    "an empty response",
    lambda losses: (
        (
            losses[0][MASK[0].bool()].mean()
            + losses[1][MASK[1].bool()].mean()
            + losses[2][MASK[2].bool()].mean()
        )
        / 4
    ),
    mask=MASK * torch.tensor([[1], [1], [1], [0]]),
    beyond="a model that ends at once has an empty response, and its mean is 0 / 0",
)


# --------------------------------------------------------------------------------------------------
# Mistakes


def mistake(piece, source="written for this catalogue", **more):
    return step.mistake(f"policy_gradient.{piece}", source=source, **more)


def losses_by(objective, ratio=right.importance_ratio, columns=True, sign=-1):
    """A wrong loss: `objective(advantage, ratio, cliprange)` where ratios are clipped."""

    def loss(
        raw_rewards_or_advantages,
        policy_log_probs,
        importance_reweighting_method="none",
        old_log_probs=None,
        cliprange=None,
        response_mask=None,
    ):
        if importance_reweighting_method in ("none", "noclip"):
            return right.compute_policy_gradient_loss(
                raw_rewards_or_advantages, policy_log_probs, importance_reweighting_method, old_log_probs
            )
        a = raw_rewards_or_advantages.reshape(-1, 1)
        w = ratio(policy_log_probs, old_log_probs, importance_reweighting_method, response_mask)
        clipped = (w.clamp(1 - cliprange, 1 + cliprange) * a < w * a).float()
        fraction = (
            (clipped * response_mask).sum() / response_mask.sum()
            if response_mask is not None
            else clipped.mean()
        )
        return -objective(a, w, cliprange), {"clip_fraction": fraction}

    return loss


def register(name, piece, function, explanation, source="written for this catalogue"):
    function.__name__, function.__doc__ = name, explanation
    mistake(piece, source)(function)


register(
    "clipped_before_the_minimum",
    "compute_policy_gradient_loss",
    losses_by(lambda a, w, c: a * torch.minimum(w, w.clamp(1 - c, 1 + c))),
    """The minimum is taken of the ratios, before they are multiplied by the advantage. For negative
    advantages that is the maximum of the objective, and the lower bound is lost. Take the minimum of the
    products.""",
)
register(
    "clipped_on_both_sides",
    "compute_policy_gradient_loss",
    losses_by(lambda a, w, c: a * w.clamp(1 - c, 1 + c)),
    """The clipped ratio is used alone, without the minimum. A response whose probability changed in the wrong
    direction then has no gradient, and is never corrected. Take the minimum with the unclipped product.""",
)
register(
    "maximum_instead_of_minimum",
    "compute_policy_gradient_loss",
    losses_by(lambda a, w, c: torch.maximum(a * w, a * w.clamp(1 - c, 1 + c))),
    """The maximum of the two products is the objective, which clips changes of the policy in the wrong
    direction, and never those in the right direction. Take the minimum, then the minus of a loss.""",
)
register(
    "never_clipped",
    "compute_policy_gradient_loss",
    losses_by(lambda a, w, c: a * w),
    """The ratio is not clipped. Several steps on the same samples then raise the ratio without limit, until
    the policy breaks down. Use clamp(1 - cliprange, 1 + cliprange).""",
)
register(
    "clipped_around_zero",
    "compute_policy_gradient_loss",
    losses_by(lambda a, w, c: torch.minimum(a * w, a * w.clamp(-c, c))),
    """The ratio is clipped to -c to c. It is a quotient of probabilities, and 1 means no change: clip to 1
    - c and 1 + c.""",
)
register(
    "only_the_upper_side_clipped",
    "compute_policy_gradient_loss",
    losses_by(lambda a, w, c: torch.minimum(a * w, a * w.clamp(max=1 + c))),
    """The ratio has no lower bound. A bad response is then pushed down without limit, long after its
    probability has fallen. Clip to 1 - c as well.""",
)


def _detached(policy, old, method, mask=None):
    return right.importance_ratio(policy.detach(), old, method, mask)


def method_losses(change):
    """`change(advantages, policy, method, old, cliprange, mask)` gives the arguments of the right loss."""

    def loss(
        raw_rewards_or_advantages,
        policy_log_probs,
        importance_reweighting_method="none",
        old_log_probs=None,
        cliprange=None,
        response_mask=None,
    ):
        return right.compute_policy_gradient_loss(
            *change(
                raw_rewards_or_advantages,
                policy_log_probs,
                importance_reweighting_method,
                old_log_probs,
                cliprange,
                response_mask,
            )
        )

    return loss


register(
    "advantage_not_used",
    "compute_policy_gradient_loss",
    method_losses(lambda a, p, m, o, c, k: (torch.ones_like(a), p, m, o, c, k)),
    """The advantage is left out, so all responses are reinforced alike: this is maximum likelihood on the
    model's own samples. Multiply each row by its advantage.""",
)
register(
    "sampled_without_reweighting",
    "compute_policy_gradient_loss",
    method_losses(lambda a, p, m, o, c, k: (a, p, "none", None, None, None)),
    """The old log-probabilities are ignored: each token counts as if the policy had just sampled it. From
    the second step on the same samples, the gradient is that of another objective.""",
)
register(
    "old_and_new_exchanged",
    "compute_policy_gradient_loss",
    method_losses(
        lambda a, p, m, o, c, k: (a, p, m, o, c, k) if o is None else (a, 2 * o.detach() - p, m, o, c, k)
    ),
    """The ratio is upside down, exp(log p_old - log p). Its gradient has the opposite sign: good responses
    become less likely. The policy that is trained is in the numerator.""",
)
register(
    "sequence_ratio_for_each_token",
    "compute_policy_gradient_loss",
    method_losses(lambda a, p, m, o, c, k: (a, p, "grpo" if m == "gspo" else m, o, c, k)),
    """For gspo each token has its own ratio, as in grpo. GSPO weights a response as a whole, by the
    geometric mean of the ratios of its tokens.""",
)


@mistake("compute_policy_gradient_loss", source="the usual first version")
def sign_of_the_loss(
    raw_rewards_or_advantages,
    policy_log_probs,
    importance_reweighting_method="none",
    old_log_probs=None,
    cliprange=None,
    response_mask=None,
):
    """The minus is missing. Optimizers minimize, so the probability of good responses falls, and the reward
    with it. The loss is minus the objective."""
    loss, seen = right.compute_policy_gradient_loss(
        raw_rewards_or_advantages,
        policy_log_probs,
        importance_reweighting_method,
        old_log_probs,
        cliprange,
        response_mask,
    )
    return -loss, seen


@mistake("compute_policy_gradient_loss", same_as="maximum_instead_of_minimum")
def minus_inside_the_minimum(
    raw_rewards_or_advantages,
    policy_log_probs,
    importance_reweighting_method="none",
    old_log_probs=None,
    cliprange=None,
    response_mask=None,
):
    """The minimum is taken of the two losses, not of the two objectives. The minus turns it into a maximum:
    clipping then stops the corrections, not the excess. Write -min(A w, A clip(w))."""
    return losses_by(lambda a, w, c: -torch.minimum(-a * w, -a * w.clamp(1 - c, 1 + c)))(
        raw_rewards_or_advantages,
        policy_log_probs,
        importance_reweighting_method,
        old_log_probs,
        cliprange,
        response_mask,
    )


@mistake("compute_policy_gradient_loss", source="public reviews of solutions of the assignment")
def clip_fraction_over_padding(
    raw_rewards_or_advantages,
    policy_log_probs,
    importance_reweighting_method="none",
    old_log_probs=None,
    cliprange=None,
    response_mask=None,
):
    """The fraction of clipped tokens counts prompt and padding too, where the ratio is mostly 1. It looks
    small while half of the response is clipped. Average it over the mask."""
    loss, seen = right.compute_policy_gradient_loss(
        raw_rewards_or_advantages,
        policy_log_probs,
        importance_reweighting_method,
        old_log_probs,
        cliprange,
        response_mask,
    )
    if "clip_fraction" in seen and importance_reweighting_method == "grpo":
        everywhere = torch.ones_like(policy_log_probs)
        seen = right.compute_policy_gradient_loss(
            raw_rewards_or_advantages, policy_log_probs, "grpo", old_log_probs, cliprange, everywhere
        )[1]
    return loss, seen


@mistake("compute_policy_gradient_loss")
def clip_fraction_of_all_ratios_outside(
    raw_rewards_or_advantages,
    policy_log_probs,
    importance_reweighting_method="none",
    old_log_probs=None,
    cliprange=None,
    response_mask=None,
):
    """Every ratio outside of the range is counted as clipped. The minimum uses the unclipped one on one
    side, depending on the sign of the advantage. Count where the clipped product is the smaller one."""
    loss, seen = right.compute_policy_gradient_loss(
        raw_rewards_or_advantages,
        policy_log_probs,
        importance_reweighting_method,
        old_log_probs,
        cliprange,
        response_mask,
    )
    if "clip_fraction" in seen and response_mask is not None:
        ratio = right.importance_ratio(
            policy_log_probs, old_log_probs, importance_reweighting_method, response_mask
        )
        outside = ((ratio - 1).abs() > cliprange).float()
        seen = {"clip_fraction": (outside * response_mask).sum() / response_mask.sum()}
    return loss, seen


@mistake("importance_ratio", source="public issues: ratio computed from detached log-probabilities")
def ratio_detached(policy_log_probs, old_log_probs, method, response_mask=None):
    """The ratio is computed from detached log-probabilities. Its value is right, but the loss has no
    gradient at all, and the weights never change. Detach the old ones alone."""
    return _detached(policy_log_probs, old_log_probs, method, response_mask)


@mistake("importance_ratio")
def ratio_without_exp(policy_log_probs, old_log_probs, method, response_mask=None):
    """The difference of the log-probabilities is used as the ratio. Where nothing has changed it is 0, not
    1, and the loss is 0. Take exp of it."""
    return right.importance_ratio(policy_log_probs, old_log_probs, method, response_mask).log()


@mistake("importance_ratio")
def quotient_of_logarithms(policy_log_probs, old_log_probs, method, response_mask=None):
    """The log-probabilities are divided by each other. The ratio of probabilities is exp of their
    difference. For a probability near 1 the quotient is huge."""
    ratio = policy_log_probs / old_log_probs
    if method == "gspo":
        mask = response_mask
        ratio = ((ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)).expand_as(ratio)
    return ratio


@mistake("importance_ratio")
def mean_over_the_padding(policy_log_probs, old_log_probs, method, response_mask=None):
    """The log-ratio of a sequence is averaged over all positions, prompt and padding included. It then
    depends on how long the other responses of the batch are. Average over the mask."""
    everywhere = torch.ones_like(policy_log_probs)
    return right.importance_ratio(policy_log_probs, old_log_probs, method, everywhere)


@mistake("importance_ratio")
def sum_over_the_sequence(policy_log_probs, old_log_probs, method, response_mask=None):
    """The ratio of a sequence is the product over its tokens. A long response then leaves every range at
    once. GSPO takes the geometric mean: divide the sum by the number of tokens."""
    if method != "gspo":
        return right.importance_ratio(policy_log_probs, old_log_probs, method, response_mask)
    difference = ((policy_log_probs - old_log_probs).masked_fill(response_mask == 0, 0.0)).sum(
        1, keepdim=True
    )
    return difference.exp().expand_as(policy_log_probs)


@mistake("importance_ratio")
def mean_of_the_ratios(policy_log_probs, old_log_probs, method, response_mask=None):
    """The arithmetic mean of the ratios is taken, not the geometric one: exp before the mean. One token
    with a large ratio then decides for the sequence. Average the logarithms."""
    if method != "gspo":
        return right.importance_ratio(policy_log_probs, old_log_probs, method, response_mask)
    ratio = (policy_log_probs - old_log_probs).exp().masked_fill(response_mask == 0, 0.0)
    return (ratio.sum(1, keepdim=True) / response_mask.sum(1, keepdim=True)).expand_as(ratio)


@mistake("importance_ratio")
def masked_infinity_is_nan(policy_log_probs, old_log_probs, method, response_mask=None):
    """The mask is multiplied in. An old log-probability that is infinite in the padding gives 0 times
    infinity, NaN, for the whole sequence. Replace what is masked by 0."""
    if method != "gspo":
        return right.importance_ratio(policy_log_probs, old_log_probs, method, response_mask)
    difference = (policy_log_probs - old_log_probs) * response_mask
    return (difference.sum(1, keepdim=True) / response_mask.sum(1, keepdim=True)).exp().expand_as(difference)


@mistake("kl_penalty", source="public issues: KL estimator of the wrong direction")
def kl_of_the_wrong_direction(policy_log_probs, ref_log_probs, estimator="k3"):
    """Policy and reference are exchanged. The samples are the policy's, so for k3 this is no estimate of a
    divergence, and for k1 the sign is turned: the penalty rewards going away."""
    return right.kl_penalty(2 * ref_log_probs.detach() - policy_log_probs, ref_log_probs, estimator)


@mistake("kl_penalty")
def k1_for_all(policy_log_probs, ref_log_probs, estimator="k3"):
    """The argument is ignored: the estimator is always the difference. k1 is often negative, and its gradient
    has an expectation of 0: as a loss it does not constrain the policy at all."""
    return right.kl_penalty(policy_log_probs, ref_log_probs, "k1")


@mistake("kl_penalty")
def k3_without_the_one(policy_log_probs, ref_log_probs, estimator="k3"):
    """The - 1 is missing in k3, so that the penalty is 1 where policy and reference agree. exp(-d) - 1 + d
    is 0 there and positive elsewhere."""
    return right.kl_penalty(policy_log_probs, ref_log_probs, estimator) + (estimator == "k3")


@mistake("kl_penalty")
def k3_with_the_sign_of_the_difference(policy_log_probs, ref_log_probs, estimator="k3"):
    """The linear term of k3 has the wrong sign: exp(-d) - 1 - d. Its slope at 0 is -2, so it is negative
    for a policy that is a little likelier, and pushes it away. The slope must be 0."""
    d = policy_log_probs - ref_log_probs.detach()
    return (
        torch.expm1(-d) - d
        if estimator == "k3"
        else right.kl_penalty(policy_log_probs, ref_log_probs, estimator)
    )


@mistake("kl_penalty")
def square_not_halved(policy_log_probs, ref_log_probs, estimator="k3"):
    """The half of k2 is missing, so the penalty is twice the divergence, and its coefficient means
    something else. Near 0 all three estimators must agree in the second order."""
    return right.kl_penalty(policy_log_probs, ref_log_probs, estimator) * (2 if estimator == "k2" else 1)


@mistake("kl_penalty", source="public issues: reference model not frozen")
def reference_with_a_gradient(policy_log_probs, ref_log_probs, estimator="k3"):
    """A gradient flows into the reference. If it shares weights with the policy, as an adapter does, it is
    moved towards the policy, and the penalty vanishes. Detach it."""
    d = policy_log_probs - ref_log_probs
    return {"k1": d, "k2": 0.5 * d.square(), "k3": torch.expm1(-d) + d}[estimator]


@mistake("aggregate_loss_across_microbatch")
def mean_over_all_tokens(
    per_token_policy_gradient_loss, mask, loss_normalization="sequence", normalization_constant=None
):
    """For sequence the mean is taken over all tokens of the batch, so a long response counts more than a
    short one. GRPO averages each response first, then the responses."""
    if loss_normalization != "sequence":
        return right.aggregate_loss_across_microbatch(
            per_token_policy_gradient_loss, mask, loss_normalization, normalization_constant
        )
    return (per_token_policy_gradient_loss * mask).sum() / mask.sum()


@mistake("aggregate_loss_across_microbatch", source="Dr. GRPO, arXiv 2503.20783")
def length_bias_with_the_constant(
    per_token_policy_gradient_loss, mask, loss_normalization="sequence", normalization_constant=None
):
    """For constant the mean of each response is divided by the constant, which brings back the bias that it
    is to remove: wrong answers that are long cost less per token. Divide the sum."""
    if loss_normalization == "sequence":
        return right.aggregate_loss_across_microbatch(per_token_policy_gradient_loss, mask)
    means = (per_token_policy_gradient_loss * mask).sum(1) / mask.sum(1)
    return means.sum() / normalization_constant


@mistake("aggregate_loss_across_microbatch")
def constant_and_mean_over_responses(
    per_token_policy_gradient_loss, mask, loss_normalization="sequence", normalization_constant=None
):
    """For constant the sum of each response is divided by the constant, and the mean over the responses is
    taken besides. The constant divides the total: choose it with the number of responses in it."""
    if loss_normalization == "sequence":
        return right.aggregate_loss_across_microbatch(per_token_policy_gradient_loss, mask)
    return (per_token_policy_gradient_loss * mask).sum(1).mean() / normalization_constant


@mistake("aggregate_loss_across_microbatch")
def mean_over_the_whole_width(
    per_token_policy_gradient_loss, mask, loss_normalization="sequence", normalization_constant=None
):
    """The masked losses are averaged over the whole width, padding included, so that the gradient depends
    on the longest row of the batch. Divide by the sum of the mask."""
    if loss_normalization != "sequence":
        return right.aggregate_loss_across_microbatch(
            per_token_policy_gradient_loss, mask, loss_normalization, normalization_constant
        )
    return (per_token_policy_gradient_loss * mask).mean()


@mistake("aggregate_loss_across_microbatch")
def sums_of_responses_averaged(
    per_token_policy_gradient_loss, mask, loss_normalization="sequence", normalization_constant=None
):
    """For sequence the losses of a response are summed, not averaged. Long responses then have large
    gradients, and the learning rate depends on the length. Divide by the number of tokens."""
    if loss_normalization != "sequence":
        return right.aggregate_loss_across_microbatch(
            per_token_policy_gradient_loss, mask, loss_normalization, normalization_constant
        )
    return (per_token_policy_gradient_loss * mask).sum(1).mean()


@mistake("aggregate_loss_across_microbatch")
def prompt_inside_the_sums(
    per_token_policy_gradient_loss, mask, loss_normalization="sequence", normalization_constant=None
):
    """The mask is not used: the losses of prompt and padding are inside the sums. The model is rewarded for
    prompts that it did not write. Multiply by the mask first."""
    return right.aggregate_loss_across_microbatch(
        per_token_policy_gradient_loss, torch.ones_like(mask), loss_normalization, normalization_constant
    )


@mistake("aggregate_loss_across_microbatch")
def empty_response_makes_nan(
    per_token_policy_gradient_loss, mask, loss_normalization="sequence", normalization_constant=None
):
    """The mean of an empty response is 0 / 0. One model that ends at once makes the loss of all NaN. Divide
    by at least 1."""
    if loss_normalization != "sequence":
        return right.aggregate_loss_across_microbatch(
            per_token_policy_gradient_loss, mask, loss_normalization, normalization_constant
        )
    return ((per_token_policy_gradient_loss * mask).sum(1) / mask.sum(1)).mean()
