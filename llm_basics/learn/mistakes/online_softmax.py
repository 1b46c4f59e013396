"""Online softmax: maximum and sum, log-sum-exp, and weighted sum, from tiles of scores."""

import math

import torch

from llm_basics.core import functional as F
from llm_basics.learn import probes
from llm_basics.systems import online_softmax as right

step = probes.Step("online_softmax")
draw = probes.numbers(seed=1)

MASKED = -math.inf


def maximum_and_sum(scores):
    peak = F.to_float32(scores).amax(-1)
    return torch.stack([peak, (F.to_float32(scores) - peak[..., None]).exp().sum(-1)])


def weighted_sum(scores, values):
    weights = F.to_float32(scores).softmax(-1)
    return (weights[..., None, :] @ F.to_float32(values)).squeeze(-2).to(values.dtype)


def compare_statistics(about, scores, size, **more):
    step.compare(
        about,
        lambda a, scores: torch.stack(tuple(a.run_online_softmax(scores.split(size, -1)))),
        maximum_and_sum,
        {"scores": scores},
        axes="maximum_or_sum row",
        **more,
    )


def compare_log_sum_exp(about, scores, size, **more):
    step.compare(
        about,
        lambda a, scores: a.run_log_sum_exp(scores.split(size, -1)),
        lambda scores: F.to_float32(scores).logsumexp(-1),
        {"scores": scores},
        axes="row",
        **more,
    )


def compare_weighted_sum(about, scores, values, size, **more):
    step.compare(
        about,
        lambda a, scores, values: a.run_online_weighted_sum(scores.split(size, -1), values.split(size, -2)),
        weighted_sum,
        {"scores": scores, "values": values},
        axes="row feature",
        **more,
    )


rows = 3 * draw(4, 12)
rising = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
masked_first = torch.cat([torch.full((2, 4), MASKED), draw(2, 8)], -1)

compare_statistics("maximum and sum of one tile", rows, 12)
compare_statistics("maximum and sum of three tiles, the last one shorter", rows, 5)
compare_statistics("scores that rise from tile to tile, and that fall", rising, 2)
compare_statistics("the first tile is masked", masked_first, 4)
compare_statistics("3,000 equal scores in bfloat16", torch.zeros(1, 3000).bfloat16(), 100, gradients=False)
compare_log_sum_exp("log-sum-exp of three tiles", rows, 5)
compare_log_sum_exp(
    "log-sum-exp of scores around 1000, and around -1000", draw(2, 9) + 1000 * rising[:, :1] - 2500, 4
)
compare_log_sum_exp(
    "log-sum-exp of a row whose scores are all masked", torch.full((2, 6), MASKED), 4, gradients=False
)
compare_weighted_sum("weighted sum of one tile", rows, draw(4, 12, 3), 12)
compare_weighted_sum("weighted sum of three tiles, the last one shorter", rows, draw(4, 12, 3), 5)
compare_weighted_sum("weighted sum, scores that rise and that fall", rising, draw(2, 6, 3), 2)
compare_weighted_sum("weighted sum, the first tile is masked", masked_first, draw(2, 12, 3), 4)
compare_weighted_sum(
    "weighted sum in bfloat16",
    rows[:1].bfloat16(),
    draw(12, 3).bfloat16(),
    5,
    rtol=2e-2,
    atol=1e-2,
    gradients=False,
)


def fold(tiles, update, peak=MASKED, total=0.0):
    """Maximum and sum by `update(peak, total, scores)` for each tile."""
    peak, total = torch.tensor(peak), torch.tensor(total)
    for tile in tiles:
        peak, total = update(peak, total, F.to_float32(tile))
    return peak, total


def mistake(piece, source="written for this catalogue", **more):
    return step.mistake(f"online_softmax.{piece}", source=source, **more)


@mistake("online_softmax", source="the usual first version")
def sum_not_rescaled(tiles):
    """The maximum moves, but the sum so far is not multiplied by exp(old maximum - new maximum). Earlier
    tiles then count relative to another maximum. Rescale before adding the tile."""

    def update(peak, total, scores):
        new, _, weights = right.rescale(peak, scores)
        return new, total + weights.sum(-1)

    return fold(tiles, update)


@mistake("online_softmax")
def correction_upside_down(tiles):
    """The sum is multiplied by exp(new maximum - old maximum). It must shrink when a larger score arrives:
    the factor is exp(old - new), at most 1."""

    def update(peak, total, scores):
        new, correction, weights = right.rescale(peak, scores)
        return new, torch.where(correction > 0, total / correction, 0.0) + weights.sum(-1)

    return fold(tiles, update)


@mistake("online_softmax")
def maximum_of_the_last_tile(tiles):
    """The maximum is that of the current tile alone, and earlier, larger scores are forgotten. The sum is
    right relative to it, but may overflow. Take the larger of the old maximum and the tile's."""

    def update(peak, total, scores):
        new, correction, weights = right.rescale(torch.tensor(MASKED), scores)
        factor = torch.where(new == MASKED, 0.0, (peak - torch.where(new == MASKED, 0.0, new)).exp())
        return new, total * factor + weights.sum(-1)

    return fold(tiles, update)


@mistake("online_softmax")
def weights_relative_to_the_old_maximum(tiles):
    """The exponentials of a tile are taken relative to the maximum before it. They overflow when the tile has
    a larger score, and belong to another sum. Update the maximum first."""

    def update(peak, total, scores):
        new, correction, _ = right.rescale(peak, scores)
        before = torch.where(peak == MASKED, torch.where(new == MASKED, 0.0, new), peak)
        return new, total * correction + (scores - before[..., None]).exp().sum(-1)

    return fold(tiles, update)


@mistake("online_softmax")
def no_maximum_subtracted(tiles):
    """The exponentials are summed as they are, and the maximum is reported beside them. exp(89) overflows in
    float32, and the sum is not relative to the maximum. Subtract the running maximum."""

    def update(peak, total, scores):
        return torch.maximum(peak, scores.amax(-1)), total + scores.exp().sum(-1)

    return fold(tiles, update)


@mistake("online_softmax")
def maximum_starts_at_zero(tiles):
    """The running maximum starts at 0, so a row of negative scores has the maximum 0. Far below 0 all
    exponentials vanish and the log-sum-exp is -inf. Start from -inf."""

    def update(peak, total, scores):
        new, correction, weights = right.rescale(peak, scores)
        return new, total * correction + weights.sum(-1)

    return fold(tiles, update, peak=0.0)


@mistake("online_softmax")
def sum_starts_at_one(tiles):
    """The sum starts at 1 and the maximum at the first tile's, as if there were one more score as large as
    the first maximum. Start from a sum of 0."""

    def update(peak, total, scores):
        first = torch.where(
            peak == MASKED, torch.where(scores.amax(-1) == MASKED, 0.0, scores.amax(-1)), peak
        )
        new, correction, weights = right.rescale(first, scores)
        return new, total * correction + weights.sum(-1)

    return fold(tiles, update, total=1.0)


@mistake("online_softmax", source="public implementations of FlashAttention")
def masked_tile_gives_nan(tiles):
    """While all scores so far are -inf, the maximum is -inf too, and -inf - -inf is NaN, which stays in the
    sum for good. Take the exponentials relative to 0 where the maximum is -inf."""

    def update(peak, total, scores):
        new = torch.maximum(peak, scores.amax(-1))
        return new, total * (peak - new).exp() + (scores - new[..., None]).exp().sum(-1)

    return fold(tiles, update)


@mistake("online_softmax")
def one_maximum_for_all_rows(tiles):
    """The maximum is taken over the whole tile, so all rows share it. The exponentials of rows far below it
    vanish. Take it along the last axis, one for each row."""

    def update(peak, total, scores):
        everything = scores.amax().expand(scores.shape[:-1])
        new = torch.maximum(peak, everything)
        shift = torch.where(new == MASKED, 0.0, new)
        return new, total * (peak - shift).exp() + (scores - shift[..., None]).exp().sum(-1)

    return fold(tiles, update)


@mistake("online_softmax")
def sum_in_half_precision(tiles):
    """The sum has the dtype of the scores. In bfloat16, with 8 bits, it stops growing after some hundred
    terms. Convert each tile to float32 first."""
    peak = total = None
    for tile in tiles:
        if peak is None:
            peak, total = torch.full_like(tile[..., 0], MASKED), torch.zeros_like(tile[..., 0])
        peak, correction, weights = right.rescale(peak, tile)
        total = total * correction + weights.sum(-1)
    return peak, total


@mistake("online_softmax")
def last_tile_dropped(tiles):
    """The last tile is left out where it is shorter than the others. The number of tiles is that of full
    ones rounded up. Iterate over all of them."""
    tiles = list(tiles)
    full = [tile for tile in tiles if tile.shape[-1] == tiles[0].shape[-1]]
    return fold(full, _right_update)


@mistake("online_softmax")
def mean_of_the_exponentials(tiles):
    """The exponentials of a tile are averaged, not summed, so that its size cancels. The sum over a row has
    one term for each score. Use sum."""

    def update(peak, total, scores):
        new, correction, weights = right.rescale(peak, scores)
        return new, total * correction + weights.mean(-1)

    return fold(tiles, update)


@mistake("online_softmax")
def detached(tiles):
    """The numbers are right, but computed under no_grad or detached, so that no gradient reaches the scores.
    All operations here are differentiable: leave them in the graph."""
    return fold([tile.detach() for tile in tiles], _right_update)


def _right_update(peak, total, scores):
    new, correction, weights = right.rescale(peak, scores)
    return new, total * correction + weights.sum(-1)


@mistake("log_sum_exp")
def logarithm_to_base_2(tiles):
    """The logarithm is to base 2, as in kernels that use exp2 throughout. With exp, the log-sum-exp is in
    natural units: m + ln(l). Mixed, softmax recomputed from it is wrong."""
    peak, total = right.online_softmax(tiles)
    return peak + total.log2()


@mistake("log_sum_exp")
def maximum_not_added_back(tiles):
    """log(l) alone is the log-sum-exp relative to the maximum. The maximum was subtracted from all scores, so
    it must be added: m + log(l)."""
    return right.online_softmax(tiles)[1].log()


@mistake("log_sum_exp")
def maximum_subtracted_twice(tiles):
    """The maximum has the wrong sign: log(l) - m. The scores were shifted down by m, so the logarithm must be
    shifted up: m + log(l)."""
    peak, total = right.online_softmax(tiles)
    return total.log() - peak


@mistake("log_sum_exp")
def maximum_and_sum_added(tiles):
    """The logarithm is missing: m + l. The sum is of exponentials, so it is log(l) that adds to the
    maximum."""
    peak, total = right.online_softmax(tiles)
    return peak + total


@mistake("log_sum_exp")
def maximum_alone(tiles):
    """The maximum is returned. It is a lower bound of the log-sum-exp, close where one score is far above the
    others. Add log(l)."""
    return right.online_softmax(tiles)[0] + 0 * right.online_softmax(tiles)[1].log().nan_to_num(neginf=0.0)


def weighted(tiles, values, update):
    """The weighted sum by `update(output, total, correction, weights, value)` for each tile."""
    peak, total, output = torch.tensor(MASKED), torch.tensor(0.0), torch.tensor(0.0)
    for tile, value in zip(tiles, values, strict=True):
        peak, correction, weights = right.rescale(peak, F.to_float32(tile))
        mixed = (weights[..., None, :] @ value.to(weights.dtype)).squeeze(-2)
        output, total = update(output, total, correction, weights, mixed)
    return (output / total[..., None]).to(value.dtype)


@mistake("online_weighted_sum", source="public implementations of FlashAttention")
def output_not_rescaled(tiles, values):
    """The sum is rescaled when the maximum moves, the output is not, so the values of earlier tiles count too
    much. Both are relative to the maximum: multiply the output by the same factor."""

    def update(output, total, correction, weights, mixed):
        return output + mixed, total * correction + weights.sum(-1)

    return weighted(tiles, values, update)


@mistake("online_weighted_sum")
def divided_in_each_tile(tiles, values):
    """Each tile's part is divided by the sum at that time, and again at the end. The sum is complete only
    after the last tile: divide once, at the end."""

    def update(output, total, correction, weights, mixed):
        total = total * correction + weights.sum(-1)
        safe = torch.where(total == 0, 1.0, total)
        return output * correction[..., None] + mixed / safe[..., None], total

    return weighted(tiles, values, update)


@mistake("online_weighted_sum")
def never_divided(tiles, values):
    """The output is not divided by the sum, so the weights do not add up to 1. The result grows with the
    number of scores. Divide by l at the end."""

    def update(output, total, correction, weights, mixed):
        return output * correction[..., None] + mixed, torch.ones(())

    return weighted(tiles, values, update)


@mistake("online_weighted_sum")
def mean_over_the_tiles(tiles, values):
    """Softmax is applied to each tile, and the results are averaged. Every tile then has the same weight,
    however small its scores are. Keep one maximum and one sum for all tiles."""
    found = [
        (F.softmax(F.to_float32(tile).clamp(min=-1e30))[..., None, :] @ value.float()).squeeze(-2)
        for tile, value in zip(tiles, values, strict=True)
    ]
    return torch.stack(found).mean(0).to(value_dtype(values))


def value_dtype(values):
    return next(iter(values)).dtype


@mistake("online_weighted_sum")
def weighted_sum_left_in_float32(tiles, values):
    """The result is float32 whatever the dtype of the values. The next layer of a half-precision model then
    fails or upcasts. Convert back to the dtype of the values at the end."""
    return right.online_weighted_sum(tiles, [value.float() for value in values])


step.factor("online_softmax.online_weighted_sum")
