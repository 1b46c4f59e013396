"""Softmax, `exp(x_i) / sum_j exp(x_j)` along any axis, and its logarithm."""

import math

import torch

from llm_basics.core import functional as F
from llm_basics.learn import grids, probes

step = probes.Step("softmax")
draw = probes.numbers(seed=1)

ORDINARY = draw(2, 3, 5)
ALONG = {-1: "the last", 1: "the middle", 0: "the first"}

# without gradients, so that what works in place can be seen to change its input
step.compare(
    "one row of scores",
    lambda a, x: a.run_softmax(x, -1),
    lambda x: x.softmax(-1),
    {"x": draw(5)},
    contract="softmax",
    axes="entry",
    gradients=False,
)
# as many rows as columns, so that a lost axis lines up with the wrong one instead of failing
step.compare(
    "a square of scores",
    lambda a, x: a.run_softmax(x, -1),
    lambda x: x.softmax(-1),
    {"x": draw(4, 4)},
    axes="row entry",
    gradients=False,
    contract="softmax",
)
for dim, name in ALONG.items():
    step.compare(
        f"along {name} of three axes",
        lambda a, x, dim=dim: a.run_softmax(x, dim),
        lambda x, dim=dim: x.softmax(dim),
        {"x": ORDINARY},
        axes="batch position entry",
        contract="softmax",
    )
# exp(88.8) is more than float32 can hold, exp(-104) less
step.compare(
    "scores around 1000",
    lambda a, x: a.run_softmax(x, -1),
    lambda x: x.softmax(-1),
    {"x": 1000 + ORDINARY},
    axes="batch position entry",
    contract="softmax",
)
step.compare(
    "scores around -1000",
    lambda a, x: a.run_softmax(x, -1),
    lambda x: x.softmax(-1),
    {"x": ORDINARY - 1000},
    axes="batch position entry",
    contract="softmax",
)
step.compare(
    "rows that are far apart",
    lambda a, x: a.run_softmax(x, -1),
    lambda x: x.softmax(-1),
    {"x": draw(3, 5) + torch.tensor([[0.0], [-1000.0], [30.0]])},
    axes="row entry",
    contract="softmax",
)
step.compare(
    "a row with scores from -1000 to 1000",
    lambda a, x: a.run_softmax(x, -1),
    lambda x: x.softmax(-1),
    {"x": torch.tensor([[1000.0, 999.0, -1000.0], [-1000.0, -1001.0, 1000.0]])},
    axes="row entry",
    contract="softmax",
)
step.compare(
    "one score 100 above the others",
    lambda a, x: a.run_softmax(x, -1),
    lambda x: x.softmax(-1),
    {"x": torch.tensor([[0.0, 100.0, 1.0, 0.5], [-99.0, -98.0, 1.0, -98.5]])},
    axes="row entry",
    contract="softmax",
)
step.compare(
    "scores of -inf, which have probability 0",
    lambda a, x: a.run_softmax(x, -1),
    lambda x: x.softmax(-1),
    {"x": torch.tensor([[0.5, -math.inf, 1.5], [-math.inf, -math.inf, -2.0]])},
    axes="row entry",
    beyond="attention masks scores with -inf",
)


def total(probabilities):
    """The sum of a row of exactly representable probabilities; as text, since any factor may be missing."""
    found = probabilities[0].double().sum().item()
    return "exactly 1" if found == 1 else "a little less" if 0.999 < found < 1 else f"{found:.3g}"


step.value(
    "sum of the probabilities of four equal scores",
    lambda a: total(a.run_softmax(torch.zeros(3, 4, dtype=torch.float64), -1)),
    "exactly 1",
    beyond="a constant added to the denominator is too small for the public tolerance, but not needed",
    words=lambda expected, actual: f"the probabilities of a row must sum to exactly 1, but sum to {actual}",
)

step.compare(
    "log-softmax of one row of scores",
    lambda a, x: a.run_log_softmax(x, -1),
    lambda x: x.log_softmax(-1),
    {"x": draw(5)},
    axes="entry",
    gradients=False,
)
for dim, name in ALONG.items():
    step.compare(
        f"log-softmax along {name} of three axes",
        lambda a, x, dim=dim: a.run_log_softmax(x, dim),
        lambda x, dim=dim: x.log_softmax(dim),
        {"x": ORDINARY},
        axes="batch position entry",
    )
step.compare(
    "log-softmax of scores around 1000",
    lambda a, x: a.run_log_softmax(x, -1),
    lambda x: x.log_softmax(-1),
    {"x": 1000 + ORDINARY},
    axes="batch position entry",
)
step.compare(
    "log-softmax of rows that are far apart",
    lambda a, x: a.run_log_softmax(x, -1),
    lambda x: x.log_softmax(-1),
    {"x": draw(3, 5) + torch.tensor([[0.0], [-1000.0], [30.0]])},
    axes="row entry",
)


def logarithm_of_a_hopeless_score(run_log_softmax):
    """In words, since a cap can be at any number: what it is of a score 2000 below the other."""
    found = run_log_softmax(torch.tensor([1000.0, -1000.0]), -1)[1].item()
    if math.isclose(found, -2000, rel_tol=1e-4):
        return "-2000"
    return "capped" if -200 < found < 0 else str(found)


step.value(
    "log-softmax of a score 2000 below the other",
    lambda a: logarithm_of_a_hopeless_score(a.run_log_softmax),
    "-2000",
    words=lambda expected, actual: f"the logarithm must be -2000, but is {actual}",
)
# float16 ends at 65,504
step.compare(
    "70,000 equal scores in float16",
    lambda a, x: a.run_softmax(x, -1),
    lambda x: x.float().softmax(-1).half(),
    {"x": torch.zeros(70_000, dtype=torch.float16)},
    axes="entry",
    rtol=1e-2,
    atol=1e-7,
    gradients=False,
    beyond="the public tests have no float16, whose sums end at 65,504; models of half precision do",
)


step.compare(
    "log-softmax in float16",
    lambda a, x: a.run_log_softmax(x, -1),
    lambda x: x.float().log_softmax(-1).half(),
    {"x": (3 * draw(2, 7)).half()},
    axes="row entry",
    rtol=1e-2,
    atol=1e-2,
    gradients=False,
)

step.compare(
    "axes of size 1",
    lambda a, x: a.run_softmax(x, -1),
    lambda x: x.softmax(-1),
    {"x": ORDINARY[:1, :1]},
    axes="batch position entry",
    gradients=False,
    contract="softmax",
)


@step.mistake("functional.softmax", source="public solutions of CS336")
def maximum_not_subtracted(x, dim=-1):
    """exp is computed from the raw scores. It overflows above 88, and inf / inf is NaN. Subtract the maximum
    of each row first; the quotient stays the same."""
    e = F.to_float32(x).exp()
    return (e / e.sum(dim, keepdim=True)).to(x.dtype)


@step.mistake("functional.softmax", source="public solutions of CS336; passes its suite")
def one_maximum_for_the_whole_tensor(x, dim=-1):
    """A single maximum is subtracted from all rows. In a row far below it, all exponentials are exp(-1000) =
    0, and the result is 0 / 0. Use each row's own: amax(dim, keepdim=True)."""
    e = (F.to_float32(x) - x.max()).exp()
    return (e / e.sum(dim, keepdim=True)).to(x.dtype)


@step.mistake("functional.softmax", source="written for this catalogue")
def maximum_of_the_last_axis(x, dim=-1):
    """The maximum is taken along the last axis whatever dim is, so different numbers are subtracted within
    one sum, which changes the result. Use the same dim for amax and sum."""
    e = (F.to_float32(x) - x.amax(-1, keepdim=True)).exp()
    return (e / e.sum(dim, keepdim=True)).to(x.dtype)


@step.mistake("functional.softmax", source="public solutions of CS336; passes its suite")
def dim_ignored(x, dim=-1):
    """The softmax always goes along the last axis. It must go along dim, in the maximum and in the sum."""
    return x.softmax(-1)


@step.mistake("functional.softmax", source="written for this catalogue")
def always_along_the_second_axis(x, dim=-1):
    """The softmax is always taken along axis 1, whatever dim is. That is the last axis of a matrix, but not
    of tensors with more axes. Use dim in the maximum and in the sum."""
    return x.softmax(1 if x.ndim > 1 else 0)


@step.mistake("functional.softmax", source="written for this catalogue")
def always_along_the_first_axis(x, dim=-1):
    """The softmax is always taken along axis 0, whatever dim is. That is the only axis of a vector, but the
    batch of a matrix. Use dim in the maximum and in the sum."""
    return x.softmax(0)


@step.mistake("functional.softmax", source="written for this catalogue")
def axes_of_size_1_removed(x, dim=-1):
    """squeeze() without an axis removes every axis of size 1, so a batch of one or a single row has another
    shape than any other. Keep the axis of the sum with keepdim=True, and drop the squeeze."""
    return x.softmax(dim).squeeze()


@step.mistake("functional.softmax", source="written for this catalogue")
def normalized_over_everything(x, dim=-1):
    """All numbers of the tensor together sum to 1 instead of each row: the sum is taken without dim. Use
    sum(dim, keepdim=True)."""
    return x.flatten().softmax(0).reshape(x.shape)


@step.mistake("functional.softmax", source="written for this catalogue")
def sum_without_keepdim(x, dim=-1):
    """The sum loses its axis, so it broadcasts along the wrong one: square inputs give wrong results, others
    fail. Keep the axis: sum(dim, keepdim=True)."""
    e = (F.to_float32(x) - x.amax(dim, keepdim=True)).exp()
    return (e / e.sum(dim)).to(x.dtype)


@step.mistake("functional.softmax", source="written for this catalogue")
def neither_with_keepdim(x, dim=-1):
    """Maximum and sum lose their axis, so they broadcast along the wrong one: square inputs give wrong
    results, others fail. Both need keepdim=True."""
    e = (F.to_float32(x) - x.amax(dim)).exp()
    return (e / e.sum(dim)).to(x.dtype)


@step.mistake("functional.softmax", source="public solutions of CS336; passes its suite")
def input_changed_in_place(x, dim=-1):
    """The maximum is subtracted in place from the caller's tensor (-=, sub_), so later uses of the scores see
    modified values. Write x = x - ..., which makes a new tensor."""
    x -= x.max(dim, keepdim=True).values
    e = F.to_float32(x).exp()
    return (e / e.sum(dim, keepdim=True)).to(x.dtype)


@step.mistake("functional.softmax", source="public solutions of CS336; passes its suite")
def small_constant_in_the_denominator(x, dim=-1):
    """A small constant is added to the sum, so the rows sum to less than 1. It is not needed: once the
    maximum is subtracted, the sum is at least 1. Remove it."""
    wide = F.to_float32(x)
    e = (wide - wide.amax(dim, keepdim=True)).exp()
    return (e / (e.sum(dim, keepdim=True) + 1e-8)).to(x.dtype)


@step.mistake("functional.softmax", source="written for this catalogue")
def mean_subtracted(x, dim=-1):
    """The mean is subtracted instead of the maximum, so exp still overflows if the largest score is far above
    the others. Use amax(dim, keepdim=True)."""
    wide = F.to_float32(x)
    e = (wide - wide.mean(dim, keepdim=True)).exp()
    return (e / e.sum(dim, keepdim=True)).to(x.dtype)


@step.mistake("functional.softmax", source="written for this catalogue")
def minimum_subtracted(x, dim=-1):
    """The minimum is subtracted instead of the maximum, so all exponents are positive, and exp overflows if
    the scores are far apart. Use amax, so that all exponents are at most 0."""
    wide = F.to_float32(x)
    e = (wide - wide.amin(dim, keepdim=True)).exp()
    return (e / e.sum(dim, keepdim=True)).to(x.dtype)


@step.mistake("functional.softmax", source="written for this catalogue")
def scores_clamped(x, dim=-1):
    """Scores are clamped to the range of exp, which makes all large ones equal. Subtract the maximum of the
    row instead, which does not change the quotient."""
    e = F.to_float32(x).clamp(-80, 80).exp()
    return (e / e.sum(dim, keepdim=True)).to(x.dtype)


@step.mistake("functional.softmax", source="written for this catalogue")
def divided_by_the_largest(x, dim=-1):
    """The exponentials are divided by the largest of them instead of their sum, so the largest is always 1,
    and the rows sum to more than 1. Divide by the sum."""
    wide = F.to_float32(x)
    return (wide - wide.amax(dim, keepdim=True)).exp().to(x.dtype)


@step.mistake("functional.softmax", source="written for this catalogue")
def powers_of_2(x, dim=-1):
    """2^x is used instead of e^x, so the distribution is too flat. Use torch.exp."""
    return (F.to_float32(x) * math.log(2)).softmax(dim).to(x.dtype)


@step.mistake("functional.softmax", source="written for this catalogue")
def scores_divided_by_their_sum(x, dim=-1):
    """The scores are divided by their sum without exp. Negative scores then give negative results, and a sum
    near 0 explodes. Apply exp first."""
    return x / x.sum(dim, keepdim=True)


@step.mistake("functional.softmax", source="written for this catalogue")
def logarithm_returned(x, dim=-1):
    """This is log-softmax: negative numbers, not probabilities. Softmax is its exp; divide by the sum of the
    exponentials instead of subtracting its logarithm."""
    return x.log_softmax(dim)


@step.mistake("functional.softmax", source="written for this catalogue")
def result_detached(x, dim=-1):
    """The output is correct, but it has no gradient: .data, .detach(), no_grad or a new tensor broke the
    graph, so attention's queries and keys never learn."""
    return x.detach().softmax(dim)


@step.mistake("functional.softmax", source="written for this catalogue")
def denominator_detached(x, dim=-1):
    """The output is correct, but the sum is detached, so the gradient lacks the part that lowers the other
    entries. Only the maximum may be detached, since it cancels."""
    wide = F.to_float32(x)
    e = (wide - wide.amax(dim, keepdim=True).detach()).exp()
    return (e / e.sum(dim, keepdim=True).detach()).to(x.dtype)


@step.mistake("functional.softmax", source="written for this catalogue")
def summed_in_half_precision(x, dim=-1):
    """Half-precision scores are summed in half precision: float16 ends at 65,504, and bfloat16 has 8
    significant bits. Convert to float32 first, and back at the end."""
    e = (x - x.amax(dim, keepdim=True)).exp()
    return e / e.sum(dim, keepdim=True)


@step.mistake("functional.softmax", source="written for this catalogue")
def result_left_in_float32(x, dim=-1):
    """The sum is computed in float32, which is right, but the result stays in it, and the product with
    half-precision values fails. Convert back to x.dtype at the end."""
    return F.to_float32(x).softmax(dim)


@step.mistake("functional.log_softmax", source="public solutions of CS336")
def logarithm_of_the_softmax(x, dim=-1):
    """The log is taken of the finished softmax. A small probability underflows to 0 first, and its logarithm
    is -inf. Compute it directly: x - max - log(sum(exp(x - max)))."""
    return F.to_float32(x).softmax(dim).log().to(x.dtype)


@step.mistake("functional.log_softmax", source="public solutions of CS336")
def logarithm_of_the_softmax_plus_a_constant(x, dim=-1):
    """log(p + 1e-8) avoids the -inf of an underflow, but no result can be below -18.4, and the smallest
    probabilities get no gradient. Compute the logarithm directly, without a constant."""
    return (F.to_float32(x).softmax(dim) + 1e-8).log().to(x.dtype)


@step.mistake("functional.log_softmax", source="written for this catalogue")
def log_of_the_sum_without_a_maximum(x, dim=-1):
    """x - log(sum(exp(x))) is right on paper, but exp overflows above 88, and for very negative scores the
    sum is 0. Subtract the maximum of each row first."""
    wide = F.to_float32(x)
    return (wide - wide.exp().sum(dim, keepdim=True).log()).to(x.dtype)


@step.mistake("functional.log_softmax", source="written for this catalogue")
def one_maximum_for_all_logarithms(x, dim=-1):
    """A single maximum is subtracted from all rows. In a row far below it all exponentials underflow to 0,
    and the logarithm of their sum is -inf. Use each row's own: amax(dim, keepdim=True)."""
    wide = F.to_float32(x) - x.max()
    return (wide - wide.exp().sum(dim, keepdim=True).log()).to(x.dtype)


@step.mistake("functional.log_softmax", source="written for this catalogue")
def maximum_lost_on_the_way(x, dim=-1):
    """The maximum is subtracted inside exp, but not from x itself, so the result is too large by the maximum.
    Subtract it once, and use the shifted scores in both places."""
    wide = F.to_float32(x)
    shifted = wide - wide.amax(dim, keepdim=True)
    return (wide - shifted.exp().sum(dim, keepdim=True).log()).to(x.dtype)


@step.mistake("functional.log_softmax", source="written for this catalogue")
def dim_ignored_by_log_softmax(x, dim=-1):
    """The log-softmax is always taken along the last axis. It must be taken along dim, in the maximum and in
    the sum."""
    return x.log_softmax(-1)


@step.mistake("functional.log_softmax", source="written for this catalogue")
def log_softmax_along_the_first_axis(x, dim=-1):
    """The log-softmax is always taken along axis 0, whatever dim is. It must be taken along dim, in the
    maximum and in the sum."""
    return x.log_softmax(0)


@step.mistake("functional.log_softmax", source="written for this catalogue")
def sign_of_the_logarithm(x, dim=-1):
    """The sign is wrong: this is -log p, which is the loss. A log-probability is never above 0."""
    return -x.log_softmax(dim)


@step.mistake("functional.log_softmax", source="written for this catalogue")
def logarithm_to_base_2(x, dim=-1):
    """The logarithm is to base 2 (bits) instead of natural (nats): its exp must be the softmax. Use
    torch.log."""
    return x.log_softmax(dim) / math.log(2)


@step.mistake("functional.log_softmax", source="written for this catalogue")
def scores_changed_in_place(x, dim=-1):
    """The maximum is subtracted in place from the caller's tensor (-=, sub_), so later uses of the scores see
    modified values. Write x = x - ..., which makes a new tensor."""
    x -= x.max(dim, keepdim=True).values
    return x.log_softmax(dim)


@step.mistake("functional.log_softmax", source="written for this catalogue")
def log_softmax_left_in_float32(x, dim=-1):
    """The sum is computed in float32, which is right, but the result stays in it. It must have the dtype of
    the input; convert back to x.dtype at the end."""
    return F.to_float32(x).log_softmax(dim)


# --------------------------------------------------------------------------------------------------
# Mistakes with a parameter that is found from the observations


def log_p(x, dim):
    """The log-softmax along one axis or several."""
    wide = F.to_float32(x)
    shifted = wide - wide.amax(dim, keepdim=True).detach()
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


@step.family("functional.softmax", grids.AXES, unknown="another axis")
def always_along_another_axis(value):
    """The softmax is always taken along {value}, whatever dim is. Use dim in the maximum and in the sum, both
    with keepdim=True."""
    return lambda x, dim=-1: log_p(x, value).exp().to(x.dtype)


@step.family("functional.log_softmax", grids.AXES, unknown="another axis")
def log_softmax_along_another_axis(value):
    """The log-softmax is always taken along {value}, whatever dim is. Use dim in the maximum and in the sum,
    both with keepdim=True."""
    return lambda x, dim=-1: log_p(x, value).to(x.dtype)


step.factor("functional.softmax")
