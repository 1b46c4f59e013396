"""A step of GRPO: rewards, advantages, the gradient in microbatches, the update."""

import types

import torch

# what the first optimizer imports, before the time limit of a probe starts
import torch._dynamo  # noqa: F401

from llm_basics.alignment import advantages, grpo_step, policy_gradient, response_log_probs, rewards
from llm_basics.core import optim
from llm_basics.learn import probes
from llm_basics.learn.mistakes import policy_gradient as losses
from llm_basics.learn.mistakes import response_log_probs as texts

step = probes.Step("grpo_step")
# the right functions, also where one of them is replaced
right = types.SimpleNamespace(**vars(grpo_step))
draw = probes.numbers(seed=95)

# --------------------------------------------------------------------------------------------------
# Two prompts with three responses each, and the same step without microbatches

PROMPTS = ["say red"] * 3 + ["add one and two"] * 3
RESPONSES = ["red", "blue it is", "red red", "four", "three", "it is three and"]
TRUTHS = ["red"] * 3 + ["three"] * 3
TOKENS = texts.tokenized(PROMPTS, RESPONSES)
MASK = TOKENS["response_mask"]


def score(response, truth):
    """Rewards of different size in the two groups, with parts that differ from the whole."""
    size = 4.0 if truth == "three" else 1.0
    return {
        "reward": size * (float(response == truth) + 0.17 * len(response)),
        "format_reward": float(" " in response),
        "answer_reward": float(response == truth) - 0.3 * len(truth),
    }


def equal(response, truth):
    return {"reward": 1.0, "format_reward": 1.0, "answer_reward": 1.0}


def log_probs_of(model):
    logits = model.logits(TOKENS["input_ids"])
    return torch.log_softmax(logits, -1).gather(-1, TOKENS["labels"][..., None])[..., 0]


# of an older policy, on the same padded batch
OLD = log_probs_of(texts.Model()).detach() + 0.3 * draw(*MASK.shape)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.5)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05, betas=(0.8, 0.9), weight_decay=0.3)


CHOICES = {
    "baseline": "mean",
    "advantage_eps": 1e-6,
    "advantage_normalizer": "std",
    "importance_reweighting_method": "none",
    "old_log_probs": None,
    "cliprange": None,
    "loss_normalization": "sequence",
    "normalization_constant": None,
}


def call(a, model, optimizer, n_microbatches=1, max_grad_norm=None, reward_fn=score, **choices):
    old = choices.pop("old_log_probs", None)
    return a.run_grpo_train_step(
        model=model,
        tokenizer=texts.Words(),
        optimizer=optimizer,
        gradient_accumulation_steps=n_microbatches,
        max_grad_norm=max_grad_norm,
        reward_fn=reward_fn,
        repeated_prompts=list(PROMPTS),
        rollout_responses=list(RESPONSES),
        repeated_ground_truths=list(TRUTHS),
        group_size=3,
        **CHOICES | {"old_log_probs": None if old is None else old.clone()} | choices,
    )


def changes(model, start):
    """What the update changed: far smaller than the weights."""
    return {name: p.detach() - start[name] for name, p in model.named_parameters()}


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def stepped(a, make_optimizer=sgd, n_steps=1, gradient=None, **options):
    """The loss of the last of some steps, and what they changed."""
    model = texts.Model()
    optimizer, start = make_optimizer(model), weights(model)
    for p in model.parameters():
        p.grad = None if gradient is None else torch.full_like(p, gradient)
    for _ in range(n_steps):
        loss, _ = call(a, model, optimizer, **options)
    return {"loss": float(loss), "change": changes(model, start)}


def right_advantages(reward_fn, baseline, eps, normalizer):
    scores = [reward_fn(r, t)["reward"] for r, t in zip(RESPONSES, TRUTHS, strict=True)]
    found = []
    for group in torch.tensor(scores).split(3):
        divisor = {"std": group.std() + eps, "mean": group.mean() + eps, "none": 1.0}[normalizer]
        found.append((group - (group.mean() if baseline == "mean" else 0.0)) / divisor)
    return torch.cat(found)


def right_gradient(model, reward_fn=score, **choices):
    """The loss of all responses at once, and its gradient."""
    c = CHOICES | choices
    a = right_advantages(reward_fn, c["baseline"], c["advantage_eps"], c["advantage_normalizer"])
    each = losses.expected(
        a,
        log_probs_of(model),
        c["importance_reweighting_method"],
        c["old_log_probs"],
        c["cliprange"],
        MASK,
    )
    if c["loss_normalization"] == "constant":
        loss = each[MASK].sum() / c["normalization_constant"]
    else:
        loss = torch.stack([row[kept].mean() for row, kept in zip(each, MASK, strict=True)]).mean()
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def right_norm(gradients):
    return torch.cat([g.flatten() for g in gradients]).norm()


def right_stepped(make_optimizer=sgd, n_steps=1, max_grad_norm=None, **choices):
    model = texts.Model()
    optimizer, start = make_optimizer(model), weights(model)
    for _ in range(n_steps):
        loss, gradients = right_gradient(model, **choices)
        norm = right_norm(gradients)
        scale = 1.0 if max_grad_norm is None or norm <= max_grad_norm else max_grad_norm / norm
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient * scale
        optimizer.step()
    return {"loss": loss, "change": changes(model, start)}


# --------------------------------------------------------------------------------------------------
# Probes


def check(about, n_microbatches=1, gradient=None, beyond=None, **options):
    step.value(
        about,
        lambda a: stepped(a, n_microbatches=n_microbatches, gradient=gradient, **options),
        right_stepped(**options),
        **({"beyond": beyond} if beyond else {"contract": "grpo_train_step"}),
    )


OFF_POLICY = {"importance_reweighting_method": "grpo", "old_log_probs": OLD, "cliprange": 0.2}
DR_GRPO = {
    "advantage_normalizer": "none",
    "loss_normalization": "constant",
    "normalization_constant": 7,
}

check("the whole batch at once")
check("two microbatches", 2)
check("three microbatches", 3)
check("one response in each microbatch", 6)
check("clipped to a norm of 0.01, two microbatches", 2, max_grad_norm=0.01)
check("a norm far below its maximum", 2, max_grad_norm=100.0)
check("grpo: ratios clipped at 0.2, two microbatches", 2, **OFF_POLICY)
check("grpo: ratios clipped at 0.05, three microbatches", 3, **OFF_POLICY | {"cliprange": 0.05})
check("gspo, two microbatches", 2, **OFF_POLICY | {"importance_reweighting_method": "gspo"})
check(
    "Dr. GRPO: no normalizer, a constant of 7, three microbatches",
    3,
    **DR_GRPO,
)
check("MaxRL: the mean as normalizer", 2, advantage_normalizer="mean")
check("RFT: no baseline and no normalizer", 2, baseline="none", advantage_normalizer="none")
check("an eps of 0.5", advantage_eps=0.5)
check("three steps with AdamW", 2, make_optimizer=adamw, n_steps=3)
check("all rewards equal", 2, reward_fn=equal)
check(
    "gradients of an earlier backward pass",
    2,
    gradient=1.0,
    beyond="gradients that an evaluation or an interrupted step left behind would be added to the first step",
)
check(
    "four microbatches of six responses",
    4,
    beyond="the assignment divides batches that divide; a rest that is dropped or counts more shows nowhere",
)


def left_behind(a):
    model = texts.Model()
    call(a, model, sgd(model), 2)
    kinds = {None: "None", False: "zeros", True: "numbers"}
    found = {name: p.grad if p.grad is None else bool(p.grad.any()) for name, p in model.named_parameters()}
    return {name: kinds[value] for name, value in found.items()}


step.value(
    "gradients after the step",
    left_behind,
    {"table": "None", "before": "None"},
    contract="grpo_train_step",
)


def reward_calls(a):
    model, calls = texts.Model(), []

    def recorded(response, truth):
        calls.append((response, truth))
        return score(response, truth)

    call(a, model, sgd(model), reward_fn=recorded)
    return sorted(set(calls))


step.value(
    "what the reward function is given",
    reward_calls,
    sorted(set(zip(RESPONSES, TRUTHS, strict=True))),
    contract="grpo_train_step",
)


def with_dropout(a):
    model = texts.Model(dropout=0.5).eval()
    start = weights(model)
    loss, _ = call(a, model, sgd(model))
    return {"loss": float(loss), "change": changes(model, start), "training": model.training}


step.value(
    "a model with dropout, in evaluation",
    with_dropout,
    right_stepped() | {"training": False},
    beyond="the rollout was sampled without dropout: with it, the log-probabilities are of another policy",
)


def statistics(a):
    model = texts.Model()
    *_, seen = call(a, model, sgd(model), 2, max_grad_norm=0.01, **OFF_POLICY)
    names = ("reward", "grad_norm", "token_entropy", "clip_fraction", "zero_variance")
    return {name: float(seen[name]) for name in names}


def right_statistics():
    model = texts.Model()
    entropy = torch.distributions.Categorical(logits=model.logits(TOKENS["input_ids"])).entropy().detach()
    scores = [score(r, t)["reward"] for r, t in zip(RESPONSES, TRUTHS, strict=True)]
    ratio = (log_probs_of(model).detach() - OLD).exp()
    a = right_advantages(score, "mean", 1e-6, "std")[:, None]
    clipped = torch.where(a > 0, ratio > 1.2, ratio < 0.8).float()
    halves = [slice(0, 3), slice(3, 6)]
    return {
        "reward": sum(scores) / len(scores),
        "grad_norm": right_norm(right_gradient(model, **OFF_POLICY)[1]).item(),
        "token_entropy": sum(entropy[h][MASK[h]].mean().item() for h in halves) / 2,
        "clip_fraction": sum(clipped[h][MASK[h]].mean().item() for h in halves) / 2,
        "zero_variance": 0.0,
    }


step.value(
    "rewards, the norm before clipping, entropy and clipped tokens",
    statistics,
    right_statistics(),
    beyond="the assignment leaves the statistics open; without these, a run that collapses is not seen",
)


def another_width(a):
    model = texts.Model()
    try:
        call(a, model, sgd(model), 2, **OFF_POLICY | {"old_log_probs": torch.cat([OLD, OLD[:, :2]], 1)})
    except ValueError:
        return "ValueError"
    return "no error"


step.value(
    "old log-probabilities of another width",
    another_width,
    "ValueError",
    beyond="log-probabilities of another padding are those of other tokens, and their ratios mean nothing",
)


def accumulated(a, n_microbatches, **choices):
    """The gradient alone, added to one that is there."""
    model, given = texts.Model(), torch.tensor([1.0, -1.0, 0.5, 2.0, -0.5, -2.0])
    model.table.grad = torch.ones_like(model.table)
    tokens = {name: tensor.clone() for name, tensor in TOKENS.items()}
    loss, _ = a.run_accumulate_policy_gradient(
        model, tokens, given, gradient_accumulation_steps=n_microbatches, **choices
    )
    return {"loss": float(loss)} | {
        f"gradient of {n}": p.grad.clone() if p.grad is not None else "none"
        for n, p in model.named_parameters()
    }


def right_accumulated():
    model, given = texts.Model(), torch.tensor([1.0, -1.0, 0.5, 2.0, -0.5, -2.0])
    each = -given[:, None] * log_probs_of(model)
    loss = torch.stack([row[kept].mean() for row, kept in zip(each, MASK, strict=True)]).mean()
    first, second = torch.autograd.grad(loss, [model.table, model.before])
    return {"loss": loss.item(), "gradient of table": first + 1, "gradient of before": second}


step.value("the gradient of two microbatches, added to one", lambda a: accumulated(a, 2), right_accumulated())


# --------------------------------------------------------------------------------------------------
# Mistakes of the accumulation


def register(piece, name, function, explanation, source="written for this catalogue", same_as=None):
    function.__name__, function.__doc__ = name, explanation
    step.mistake(f"grpo_step.{piece}", source=source, same_as=same_as)(function)


def rows_of(n, k):
    return torch.arange(n).tensor_split(min(k, n))


def accumulation(
    split=rows_of,
    weight=lambda loss, rows, n, k, normalization: (
        loss * len(rows) / n if normalization == "sequence" else loss
    ),
    advantage_rows=lambda rows, k: rows,
    old=lambda old, rows, labels, log_probs: old[rows],
    mask=lambda mask: mask,
    reported=lambda parts, n, k: sum(parts),
    choices=lambda c: c,
    entropy_mask=lambda mask: mask,
    checked=True,
):
    """The accumulation with something wrong in it."""

    def accumulate(
        model,
        tokens,
        advantage,
        gradient_accumulation_steps=1,
        importance_reweighting_method="none",
        old_log_probs=None,
        cliprange=None,
        loss_normalization="sequence",
        normalization_constant=None,
    ):
        n, k = len(advantage), gradient_accumulation_steps
        c = choices(
            {
                "method": importance_reweighting_method,
                "old": old_log_probs,
                "cliprange": cliprange,
                "normalization": loss_normalization,
                "constant": normalization_constant,
            }
        )
        if checked and old_log_probs is not None and old_log_probs.shape != tokens["labels"].shape:
            raise ValueError(f"old_log_probs must have the shape of the labels, got {old_log_probs.shape}")
        parts, observed = [], {}
        for rows in split(n, k):
            labels, kept = tokens["labels"][rows], tokens["response_mask"][rows]
            scored = response_log_probs.get_response_log_probs(
                model, tokens["input_ids"][rows], labels, return_token_entropy=True
            )
            given = c["old"]
            given = None if given is None else old(given, rows, labels, scored["log_probs"])
            each, seen = policy_gradient.compute_policy_gradient_loss(
                advantage[advantage_rows(rows, k)],
                scored["log_probs"],
                c["method"],
                given,
                c["cliprange"],
                kept,
            )
            loss = policy_gradient.aggregate_loss_across_microbatch(
                each, mask(kept), c["normalization"], c["constant"]
            )
            loss = weight(loss, rows, n, k, c["normalization"])
            loss.backward()
            parts.append(loss.detach())
            seen["token_entropy"] = response_log_probs.masked_mean(
                scored["token_entropy"].detach(), entropy_mask(kept)
            )
            for name, value in seen.items():
                observed[name] = observed.get(name, 0.0) + len(rows) / n * value.item()
        return reported(parts, n, k), observed

    return accumulate


def accumulate_mistake(name, explanation, source="written for this catalogue", **changes_):
    register("accumulate_policy_gradient", name, accumulation(**changes_), explanation, source)


accumulate_mistake(
    "microbatches_added_without_a_factor",
    """The mean loss of each microbatch is added as it is, so that the gradient grows with the number of
    microbatches, and the learning rate with it. Weight each mean by its share of the responses.""",
    source="the usual first version",
    weight=lambda loss, rows, n, k, normalization: loss,
)
accumulate_mistake(
    "divided_by_the_microbatches_twice",
    """The loss is divided by the number of microbatches twice: once in the mean, once before backward. With
    8 of them the steps are 8 times too short, and the run looks flat. Scale once.""",
    weight=lambda loss, rows, n, k, normalization: (
        loss * len(rows) / n / k if normalization == "sequence" else loss
    ),
)
accumulate_mistake(
    "constant_divided_by_the_microbatches",
    """With a constant the loss of a microbatch is divided by the number of microbatches besides. These are
    sums: the constant divides the sum of all, so microbatches are added without a factor.""",
    source="public solutions of the assignment",
    weight=lambda loss, rows, n, k, normalization: loss * len(rows) / n,
)
accumulate_mistake(
    "microbatches_counted_alike",
    """Each microbatch is weighted by 1 / k, whatever its size. In a smaller one each response then counts
    more than in the others. Weight by its number of responses over that of the batch.""",
    weight=lambda loss, rows, n, k, normalization: loss / min(k, n) if normalization == "sequence" else loss,
)


def without_the_rest(n, k):
    size = n // min(k, n)
    return [torch.arange(i * size, (i + 1) * size) for i in range(min(k, n))]


accumulate_mistake(
    "rest_dropped",
    """The microbatches have n // k responses each, and those left over are never computed. The advantages of
    their groups then no longer add up to 0. Split all rows, the sizes differing by one.""",
    split=without_the_rest,
)
accumulate_mistake(
    "half_of_the_rollouts_dropped",
    """Only the first half of the responses is computed: they were sampled and rewarded, and teach nothing.
    The loss looks normal. Each row must be in exactly one microbatch.""",
    source="public reviews of solutions of the assignment",
    split=lambda n, k: [rows for rows in rows_of(n, k) if rows[0] < n // 2],
)
accumulate_mistake(
    "only_the_first_microbatch",
    """The loop ends after the first microbatch, as by a return or a backward pass in the wrong place. The
    gradient is that of a few responses. Return after the loop.""",
    split=lambda n, k: rows_of(n, k)[:1],
)
accumulate_mistake(
    "advantages_of_the_first_microbatch",
    """The advantages are cut to the size of a microbatch, but not moved with it: all use those of the first.
    Responses are then rewarded for those of another prompt. Take the same rows of both.""",
    source="public issues",
    advantage_rows=lambda rows, k: rows - rows[0],
)
accumulate_mistake(
    "rows_mixed_against_the_advantages",
    """The microbatches take every k-th response, and the advantages are cut in a row. Each response gets the
    advantage of another. Index tokens, old log-probabilities and advantages by the same rows.""",
    advantage_rows=lambda rows, k: rows.flip(0),
)
accumulate_mistake(
    "old_log_probabilities_of_the_first_microbatch",
    """All microbatches are compared with the old log-probabilities of the first one, so the ratios of the
    others are of different tokens, and mostly clipped. Take the same rows.""",
    old=lambda old, rows, labels, log_probs: old[rows - rows[0]],
)
accumulate_mistake(
    "old_log_probabilities_recomputed",
    """The old log-probabilities are taken from the policy that is trained, so that every ratio is 1 and none
    is clipped. After the first step on the same samples that is another objective. Use those given.""",
    old=lambda old, rows, labels, log_probs: log_probs.detach(),
)
accumulate_mistake(
    "old_log_probabilities_cut_to_the_width",
    """Old log-probabilities of another width are cut until they fit. They belong to another padding, so the
    ratios may be of other tokens, without an error. Refuse them: raise ValueError.""",
    source="public reviews of solutions of the assignment",
    old=lambda old, rows, labels, log_probs: old[rows, : labels.shape[1]],
    checked=False,
)
accumulate_mistake(
    "prompt_inside_the_loss",
    """The mask is not used in the mean, so prompt and padding are trained like the response: the model is
    rewarded for text that it did not write. Pass response_mask to the aggregation.""",
    mask=torch.ones_like,
)
accumulate_mistake(
    "method_not_passed_on",
    """The loss is always that of on-policy samples: method, old log-probabilities and cliprange are not
    passed on. From the second step on the same samples, nothing is corrected or clipped.""",
    choices=lambda c: c | {"method": "none"},
)
accumulate_mistake(
    "normalization_not_passed_on",
    """The loss is always the mean over sequences, since loss_normalization is not passed on. Dr. GRPO then
    still has the bias by length that it is to remove.""",
    choices=lambda c: c | {"normalization": "sequence"},
)
accumulate_mistake(
    "gradient_of_the_unclipped_ratio",
    """The cliprange is not passed on, and the ratios are not clipped (noclip). Several steps on the same
    samples then move the policy without limit.""",
    choices=lambda c: c | {"method": "noclip" if c["method"] in ("grpo", "gspo") else c["method"]},
)
accumulate_mistake(
    "loss_of_the_last_microbatch",
    """The loss that is returned is that of the last microbatch, while the gradient is that of all. A plot of
    it shows noise alone. Add the losses up.""",
    reported=lambda parts, n, k: parts[-1],
)
accumulate_mistake(
    "loss_of_the_log_divided_again",
    """The sum of the losses, each weighted already, is divided by the number of microbatches for the log. The
    gradient is right, but the loss depends on how the batch is cut. Return the sum.""",
    reported=lambda parts, n, k: sum(parts) / k,
)
accumulate_mistake(
    "entropy_over_prompt_and_padding",
    """The entropy is averaged over all positions, prompt and padding included. It then hardly falls while the
    responses collapse to one. Average over the mask.""",
    source="public reviews of solutions of the assignment",
    entropy_mask=torch.ones_like,
)


def gradients_replaced(model, tokens, advantage, gradient_accumulation_steps=1, *rest, **choices):
    """Gradients are cleared in each microbatch, as by zero_grad inside the loop. Only the last microbatch
    counts; the others are computed for nothing. Clear once, before the loop."""
    loss, seen = right.accumulate_policy_gradient(
        model, tokens, advantage, gradient_accumulation_steps, *rest, **choices
    )
    for p in model.parameters():
        p.grad = None
    n = len(advantage)
    rows = rows_of(n, gradient_accumulation_steps)[-1]
    keys = ("importance_reweighting_method", "old_log_probs", "cliprange", "loss_normalization")
    named = dict(zip((*keys, "normalization_constant"), rest, strict=False)) | choices
    old = named.pop("old_log_probs", None)
    part = {name: tensor[rows] for name, tensor in tokens.items()}
    share = len(rows) / n if named.get("loss_normalization", "sequence") == "sequence" else 1.0
    right.accumulate_policy_gradient(
        model, part, advantage[rows], 1, old_log_probs=None if old is None else old[rows], **named
    )
    for p in model.parameters():
        p.grad = p.grad * share
    return loss, seen


register(
    "accumulate_policy_gradient",
    "gradients_replaced",
    gradients_replaced,
    gradients_replaced.__doc__,
    "the usual first version",
)


# --------------------------------------------------------------------------------------------------
# Mistakes of the step


def train_with(
    tokens_of=lambda c, tokens: tokens,
    reward=lambda f, response, truth: f(response, truth),
    advantage_of=None,
    before=lambda model, optimizer: optimizer.zero_grad(set_to_none=True),
    clip=lambda parameters, norm: optim.clip_grad_norm_(parameters, float("inf") if norm is None else norm),
    update=lambda optimizer: optimizer.step(),
    after=lambda model, optimizer: optimizer.zero_grad(set_to_none=True),
    late_clip=False,
    norm_of=lambda model, norm: norm,
    options=lambda c: c,
    accumulate=None,
):
    """The step with something wrong in it."""

    def train(**c):
        c = options(dict(c))
        model, optimizer = c["model"], c["optimizer"]
        tokens = tokens_of(
            c,
            response_log_probs.tokenize_prompt_and_output(
                c["repeated_prompts"], c["rollout_responses"], c["tokenizer"]
            ),
        )
        raw, parts = rewards.compute_rollout_rewards(
            lambda response, truth: reward(c["reward_fn"], response, truth),
            c["rollout_responses"],
            c["repeated_ground_truths"],
        )
        advantage, groups = advantages.compute_group_normalized_rewards(
            raw, c["group_size"], c["baseline"], c["advantage_eps"], c["advantage_normalizer"]
        )
        if advantage_of is not None:
            advantage = advantage_of(raw, advantage, c)
        before(model, optimizer)
        loss, observed = (accumulate or grpo_step.accumulate_policy_gradient)(
            model,
            tokens,
            advantage,
            c["gradient_accumulation_steps"],
            c["importance_reweighting_method"],
            c["old_log_probs"],
            c["cliprange"],
            c["loss_normalization"],
            c["normalization_constant"],
        )
        if late_clip:
            update(optimizer)
        norm = clip(model.parameters(), c["max_grad_norm"])
        norm = float(norm_of(model, norm))
        if not late_clip:
            update(optimizer)
        after(model, optimizer)
        return loss, {**parts, **groups, **observed, "grad_norm": norm}

    return train


def step_mistake(name, explanation, source="written for this catalogue", same_as=None, **changes_):
    register("grpo_train_step", name, train_with(**changes_), explanation, source, same_as)


def std_of_the_batch(raw, advantage, c):
    if c["advantage_normalizer"] != "std":
        return advantage
    groups = raw.reshape(-1, c["group_size"])
    centered = groups - groups.mean(1, keepdim=True) if c["baseline"] == "mean" else groups
    return (centered / (raw.std() + c["advantage_eps"])).flatten()


def interleaved(raw, advantage, c):
    n_groups = len(raw) // c["group_size"]
    by_column = raw.reshape(-1, n_groups).T.flatten()
    found, _ = advantages.compute_group_normalized_rewards(
        by_column, c["group_size"], c["baseline"], c["advantage_eps"], c["advantage_normalizer"]
    )
    return found.reshape(n_groups, -1).T.flatten()


step_mistake(
    "std_over_the_batch",
    """The advantages are divided by the standard deviation of all rewards, not by that of their group. A
    prompt whose rewards differ much then drowns the others. Normalize each group by itself.""",
    source="public issues",
    advantage_of=std_of_the_batch,
)
step_mistake(
    "batch_is_one_group",
    """Mean and standard deviation are over the whole batch, as if all responses were to one prompt. Those to
    an easy prompt are all pushed up. Pass group_size on.""",
    options=lambda c: c | {"group_size": len(c["repeated_prompts"])},
)
step_mistake(
    "groups_interleaved",
    """The groups are formed of every n-th response. The responses to one prompt stand in a row, so these
    groups mix prompts. Reshape to (groups, group_size).""",
    advantage_of=interleaved,
)
step_mistake(
    "rewards_instead_of_advantages",
    """The raw rewards are used in place of the advantages. If they are positive, all responses are pushed up,
    and the differences drown in noise. Subtract the mean of the group.""",
    source="the usual first version",
    advantage_of=lambda raw, advantage, c: raw,
)
step_mistake(
    "equal_rewards_make_nan",
    """The normalizer has no eps. A group whose rewards are all equal is 0 / 0, and one such group turns all
    weights into NaN. Add advantage_eps to the divisor.""",
    source="public issues: all rewards of a group equal",
    options=lambda c: c | {"advantage_eps": 0.0},
)
step_mistake(
    "baseline_not_passed_on",
    """The baseline is always the mean of the group. With baseline none, as in rejection sampling, wrong
    responses must have no gradient at all. Pass baseline on.""",
    options=lambda c: c | {"baseline": "mean"},
)
step_mistake(
    "normalizer_not_passed_on",
    """The advantages are always divided by the standard deviation. Dr. GRPO and MaxRL differ from GRPO in
    just that. Pass advantage_normalizer on.""",
    options=lambda c: c | {"advantage_normalizer": "std"},
)
step_mistake(
    "part_of_the_reward",
    """The advantage is computed from answer_reward, a part of the reward. What else is rewarded, such as the
    format, is then never learned. Use the entry reward.""",
    reward=lambda f, response, truth: (found := f(response, truth)) | {"reward": found["answer_reward"]},
)
step_mistake(
    "response_and_truth_exchanged",
    """The reward function is called with the truth as response and the other way round. Where they are only
    compared it makes no difference; a parser then reads the wrong text. The response is first.""",
    reward=lambda f, response, truth: f(truth, response),
)
step_mistake(
    "gradients_never_cleared",
    """The gradients are never cleared, so each step adds those of all steps before. The weights drift further
    and further. Clear them before the backward passes, and leave None behind.""",
    source="the usual first version",
    before=lambda model, optimizer: None,
    after=lambda model, optimizer: None,
)
step_mistake(
    "gradients_cleared_afterwards_only",
    """The gradients are cleared after the step, not before the first backward pass. What an evaluation or an
    interrupted step left behind is added to the first step. Clear them at the start too.""",
    before=lambda model, optimizer: None,
)
step_mistake(
    "gradients_left_behind",
    """The gradients of the step stay in the parameters. They hold memory as large as the weights while the
    next rollout is sampled. End with zero_grad(set_to_none=True).""",
    after=lambda model, optimizer: None,
)
step_mistake(
    "gradients_set_to_zero",
    """Gradients of zero are left behind, not None. They hold memory, and an optimizer with momentum or decay
    still moves a weight that gets none. Use set_to_none=True.""",
    after=lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
)
step_mistake(
    "no_update",
    """The optimizer takes no step: the loss is computed and the weights stay. The rewards of a run then only
    show the noise of sampling. Call optimizer.step() after clipping.""",
    source="public issues: why is my RL flat",
    update=lambda optimizer: None,
)


def two_updates(optimizer):
    optimizer.step()
    optimizer.step()


step_mistake(
    "two_updates",
    """The optimizer takes two steps on one gradient. With SGD that is twice the learning rate; the second
    step of Adam has moments of the same gradient. Call step once.""",
    update=two_updates,
)
step_mistake(
    "never_clipped",
    """max_grad_norm is not used. The norm of a policy gradient varies much from batch to batch, and one
    outlier can undo many steps. Clip the whole gradient before the update.""",
    clip=lambda parameters, norm: optim.clip_grad_norm_(parameters, float("inf")),
)
step_mistake(
    "clipped_after_the_update",
    """The gradient is clipped after the optimizer has used it, which has no effect. One bad group may move
    the weights as far as it likes. Clip, then step.""",
    same_as="never_clipped",
    late_clip=True,
)


def clipped_alone(parameters, norm):
    parameters = list(parameters)
    before = optim.clip_grad_norm_(parameters, float("inf"))
    for p in parameters:
        if norm is not None:
            optim.clip_grad_norm_([p], norm)
    return before


def clipped_by_value(parameters, norm):
    parameters = list(parameters)
    before = optim.clip_grad_norm_(parameters, float("inf"))
    for p in parameters:
        if norm is not None:
            p.grad.clamp_(-norm, norm)
    return before


step_mistake(
    "each_parameter_clipped_alone",
    """The gradient of each parameter is clipped to the norm by itself, which changes the direction of the
    whole. Clip by the norm of all together.""",
    clip=clipped_alone,
)
step_mistake(
    "clipped_by_value",
    """Each entry of the gradient is clamped to the maximum, instead of scaling the whole to that norm. Its
    direction changes, and its norm may be far larger. Use clip_grad_norm_.""",
    clip=clipped_by_value,
)
step_mistake(
    "clipped_to_one_if_none",
    """Without max_grad_norm the gradient is clipped to 1, a default that was not chosen. None means no
    clipping; compute the norm alone.""",
    clip=lambda parameters, norm: optim.clip_grad_norm_(parameters, 1.0 if norm is None else norm),
)
step_mistake(
    "norm_after_clipping",
    """The norm that is reported is that of the clipped gradient, which never exceeds the maximum. An outlier
    is then not seen. Report what clip_grad_norm_ returns.""",
    norm_of=lambda model, norm: optim.clip_grad_norm_(model.parameters(), float("inf")),
)


def in_training(model, optimizer):
    model.train()
    optimizer.zero_grad(set_to_none=True)


step_mistake(
    "model_set_to_training",
    """The step calls model.train(). Dropout that was off in the rollout is then on in the log-probabilities,
    which are of another policy, and ratios on the samples are not 1. Leave the mode as it is.""",
    source="unsloth-zoo, pull request 832",
    before=in_training,
)


def clipped_in_each(model, tokens, advantage, k, method, old, cliprange, normalization, constant, clip=None):
    """The right accumulation, with `clip` after each microbatch."""
    total, observed, n = 0.0, {}, len(advantage)
    for rows in rows_of(n, k):
        kept = {p: p.grad for p in model.parameters()}
        for p in model.parameters():
            p.grad = None
        part = {name: tensor[rows] for name, tensor in tokens.items()}
        loss, seen = right.accumulate_policy_gradient(
            model,
            part,
            advantage[rows],
            1,
            method,
            None if old is None else old[rows],
            cliprange,
            normalization,
            constant,
        )
        share = len(rows) / n if normalization == "sequence" else 1.0
        for p, before in kept.items():
            p.grad = p.grad * share if before is None else before + p.grad * share
        clip(model)
        total = total + share * loss
        for name, value in seen.items():
            observed[name] = observed.get(name, 0.0) + len(rows) / n * value
    return total, observed


def _clip_within(**c):
    def accumulate(model, tokens, advantage, *rest):
        old = rest[2]
        if old is not None and old.shape != tokens["labels"].shape:
            raise ValueError("old_log_probs must have the shape of the labels")

        def clip(model):
            if c["max_grad_norm"] is not None:
                optim.clip_grad_norm_(model.parameters(), c["max_grad_norm"])

        return clipped_in_each(model, tokens, advantage, *rest, clip=clip)

    return train_with(accumulate=accumulate)(**c)


def _step_within(**c):
    def accumulate(model, tokens, advantage, *rest):
        old = rest[2]
        if old is not None and old.shape != tokens["labels"].shape:
            raise ValueError("old_log_probs must have the shape of the labels")

        def update(model):
            optim.clip_grad_norm_(
                model.parameters(), float("inf") if c["max_grad_norm"] is None else c["max_grad_norm"]
            )
            c["optimizer"].step()
            c["optimizer"].zero_grad(set_to_none=True)

        return clipped_in_each(model, tokens, advantage, *rest, clip=update)

    return train_with(accumulate=accumulate, update=lambda optimizer: None)(**c)


register(
    "grpo_train_step",
    "clipped_in_each_microbatch",
    _clip_within,
    """The gradient is clipped after each microbatch, before the accumulation ends. The first ones are cut
    again and again, the last one counts most. Clip once, when all are added.""",
    "public issues: clipping before the accumulation ends",
)
register(
    "grpo_train_step",
    "update_in_each_microbatch",
    _step_within,
    """The optimizer takes a step in each microbatch. Each step is then a noisy one of a few responses, and
    the later ones are of another policy than the samples. Step once, after the loop.""",
)
