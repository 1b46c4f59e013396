"""FlashAttention: attention in tiles, and its backward pass from the log-sum-exp."""

import math

import torch
from torch.nn import functional as tF
from torch.overrides import TorchFunctionMode

from llm_basics.core import functional as F
from llm_basics.learn import probes
from llm_basics.systems import online_softmax

step = probes.Step("flash_attention")

PUBLIC_SHAPES = "the public test has 128 queries and keys; a text may have any number of tokens"
PIECE = "flash_attention.FlashAttention"

# of the tensors that flash_triton is called with; the interpreter of Triton works on those of the CPU
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def attention(query, key, value, is_causal):
    mixed = tF.scaled_dot_product_attention(
        F.to_float32(query), F.to_float32(key), F.to_float32(value), is_causal=is_causal
    )
    return mixed.to(value.dtype)


# --------------------------------------------------------------------------------------------------
# Probes, which flash_triton has too


def tensors(n_queries, n_keys, d_head, batch=2, scale=1.0):
    draw = probes.numbers(seed=n_queries + n_keys)
    return {
        "q": scale * draw(batch, n_queries, d_head),
        "k": draw(batch, n_keys, d_head),
        "v": draw(batch, n_keys, d_head),
    }


class LargestTensor(TorchFunctionMode):
    """The number of elements of the largest tensor that a function of torch returns."""

    n_elements = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.n_elements = max(self.n_elements, result.numel())
        return result


def saved_by(output):
    """The tensors that an autograd function saved, also as attributes of its context."""
    node = output.grad_fn
    kept = [*getattr(node, "saved_tensors", ()), *getattr(node, "__dict__", {}).values()]
    return [tensor for tensor in kept if isinstance(tensor, torch.Tensor)]


def log_sum_exp_of(function, inputs, is_causal, device):
    """What of the saved tensors has the shape of the log-sum-exp."""
    leaves = [tensor.to(device, copy=True).requires_grad_() for tensor in inputs.values()]
    saved = saved_by(function.apply(*leaves, is_causal))
    found = [tensor for tensor in saved if tensor.shape == leaves[0].shape[:-1]]
    return {"saved": len(found), "log-sum-exp": found[0].detach().float().cpu() if len(found) == 1 else None}


def right_log_sum_exp(inputs, is_causal):
    scores = inputs["q"] @ inputs["k"].mT / math.sqrt(inputs["q"].shape[-1])
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(hidden, -math.inf) if is_causal else scores
    return {"saved": 1, "log-sum-exp": scores.logsumexp(-1)}


def differ_in_log_sum_exp(expected, actual):
    if actual["saved"] != 1:
        return f"exactly one saved tensor must have the shape (batch, queries), got {actual['saved']}"
    right, found = (x["log-sum-exp"].flatten() for x in (expected, actual))
    first = int(((right - found).abs() > 1e-4).nonzero()[0])
    return f"the saved log-sum-exp of query {first} must be {right[first]:.4f}, got {found[first]:.4f}"


def sizes_of(function, n, d_head, device):
    """Where a tensor has as many elements as the matrix of scores."""
    leaves = [t.to(device).requires_grad_() for t in tensors(n, n, d_head, batch=1).values()]
    with LargestTensor() as forward:
        output = function.apply(*leaves, False)
    saved = any(tensor.numel() >= n * n for tensor in saved_by(output))
    backward = LargestTensor()
    # around the node itself: a mode around output.backward() is off within it
    output.grad_fn.register_prehook(lambda gradients: backward.__enter__() and None)
    output.grad_fn.register_hook(lambda *gradients: backward.__exit__(None, None, None))
    output.sum().backward()
    return {
        "saved": saved,
        "made forward": forward.n_elements >= n * n,
        "made backward": backward.n_elements >= n * n,
    }


def differ_in_sizes(expected, actual):
    return f"a tensor of queries x keys is {', '.join(name for name in actual if actual[name])}"


def register(
    step, get, sentence, saved_sentence, sizes, d_head=8, batch=2, device="cpu", half=torch.bfloat16
):
    """The probes of a function that `get(adapters)` returns; `sizes` are numbers of queries and keys."""

    def run(function, is_causal, q, k, v):
        return function.apply(q.to(device), k.to(device), v.to(device), is_causal)

    def compare(about, inputs, is_causal, **more):
        step.compare(
            about,
            lambda a, q, k, v: run(get(a), is_causal, q, k, v),
            lambda q, k, v: attention(q, k, v, is_causal),
            inputs,
            axes="batch query feature",
            **more,
        )

    even = tensors(128, 128, 16, batch=1)
    compare("128 queries and keys, not causal", even, False, contract=sentence)
    compare("128 queries and keys, causal", even, True, contract=sentence)
    step.value(
        "the log-sum-exp is saved, alone of its shape",
        lambda a: log_sum_exp_of(get(a), even, False, device),
        right_log_sum_exp(even, False),
        words=differ_in_log_sum_exp,
        contract=saved_sentence,
    )
    few, many = sizes
    for about, n_queries, n_keys, is_causal in (
        (f"{few} queries, {many} keys", few, many, False),
        (f"{few} queries, {many} keys, causal", few, many, True),
        (f"{many} queries, {few} keys, causal", many, few, True),
        (f"one query, {few} keys", 1, few, False),
    ):
        compare(about, tensors(n_queries, n_keys, d_head, batch), is_causal, beyond=PUBLIC_SHAPES)
    compare(
        "scores of 100 and more",
        tensors(few, many, d_head, batch, scale=100.0),
        False,
        rtol=1e-3,
        atol=1e-3,
        beyond="the public test has small scores; exp overflows above 88 where no maximum is subtracted",
    )
    compare(
        str(half).removeprefix("torch."),
        {name: tensor.to(half) for name, tensor in tensors(few, many, d_head, batch).items()},
        True,
        rtol=2e-2,
        atol=2e-2,
        gradients=False,
        beyond="the public test has float32 alone; models of half precision need its dtype",
    )
    step.value(
        "no tensor of queries x keys, with 160 of each",
        lambda a: sizes_of(get(a), 160, d_head, device),
        {"saved": False, "made forward": False, "made backward": False},
        words=differ_in_sizes,
        beyond="the public test does not measure memory, but tiles are there to save it",
    )


register(
    step,
    lambda a: a.get_flashattention_autograd_function_pytorch(),
    "flash_attention",
    "flash_log_sum_exp",
    (37, 53),
)


# --------------------------------------------------------------------------------------------------
# Wrong versions: each changes a part of a right one


class Parts:
    """FlashAttention in parts that a wrong version overrides."""

    # queries and keys of a tile, in each pass
    forward_tile = backward_tile = 32

    def prepared(self, query, key, value):
        return query, key, value

    def spans(self, n, tile):
        return [slice(a, min(a + tile, n)) for a in range(0, n, tile)]

    def key_spans(self, rows, n_keys, tile, is_causal):
        return self.spans(min(rows.stop, n_keys) if is_causal else n_keys, tile)

    def backward_key_spans(self, rows, n_keys, tile, is_causal):
        return self.key_spans(rows, n_keys, tile, is_causal)

    def hidden(self, rows, columns, n_queries, n_keys):
        queries, keys = (torch.arange(span.start, span.stop) for span in (rows, columns))
        return keys > queries[:, None]

    def backward_hidden(self, rows, columns, n_queries, n_keys):
        return self.hidden(rows, columns, n_queries, n_keys)

    def scale(self, d_head):
        return 1 / math.sqrt(d_head)

    def rescaled(self, peak, total, output, scores, value):
        peak, correction, weights = online_softmax.rescale(peak, scores)
        total = total * correction + weights.sum(-1)
        return peak, total, output * correction[..., None] + weights @ value

    def divided(self, output, total):
        return output / total[..., None]

    def log_sum(self, peak, total):
        return peak + total.log()

    def save(self, ctx, query, key, value, output, log_sum):
        ctx.save_for_backward(query, key, value, output, log_sum)

    def restored(self, ctx):
        return ctx.saved_tensors

    def delta(self, grad_output, output):
        return (grad_output * output).sum(-1)

    def probabilities(self, scores, log_sum):
        return (scores - log_sum[..., None]).exp()

    def score_gradient(self, p, dp, delta):
        return p * (dp - delta[..., None])

    def add(self, total, rows, part):
        total[..., rows, :] += part

    def add_to_query(self, total, rows, part):
        self.add(total, rows, part)

    def add_to_keys(self, total, rows, part):
        self.add(total, rows, part)

    def scales(self, scale):
        """Of the gradients of queries and of keys."""
        return scale, scale

    def gradients(self, dq, dk, dv):
        return dq, dk, dv

    def scores(self, q, k, rows, columns, hidden, n_queries, n_keys, is_causal):
        scores = q @ k.mT * self.scale(q.shape[-1])
        if not is_causal:
            return scores
        return scores.masked_fill(hidden(rows, columns, n_queries, n_keys).to(q.device), -math.inf)

    def dtype(self, value):
        return value.dtype

    def forward(self, ctx, query, key, value, is_causal):
        q, k, v = (F.to_float32(x) for x in self.prepared(query, key, value))
        n = q.shape[-2], k.shape[-2]
        output = torch.zeros(*q.shape[:-1], v.shape[-1], device=q.device)
        log_sum = torch.zeros(q.shape[:-1], device=q.device)
        for rows in self.spans(n[0], self.forward_tile):
            parts = torch.tensor(-math.inf), torch.tensor(0.0), torch.tensor(0.0)
            for columns in self.key_spans(rows, n[1], self.forward_tile, is_causal):
                tile = q[..., rows, :], k[..., columns, :], rows, columns
                parts = self.rescaled(
                    *parts, self.scores(*tile, self.hidden, *n, is_causal), v[..., columns, :]
                )
            peak, total, mixed = parts
            output[..., rows, :] = self.divided(mixed, total) if mixed.dim() else math.nan
            log_sum[..., rows] = self.log_sum(peak, total)
        output = output.to(self.dtype(value))
        self.save(ctx, query, key, value, output, log_sum)
        ctx.is_causal = is_causal
        return output

    def backward(self, ctx, grad_output):
        query, key, value, output, log_sum = self.restored(ctx)
        q, k, v = (F.to_float32(x) for x in self.prepared(query, key, value))
        n, scale = (q.shape[-2], k.shape[-2]), self.scale(q.shape[-1])
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        do = F.to_float32(grad_output)
        delta = self.delta(do, output)
        query_scale, key_scale = self.scales(scale)
        for rows in self.spans(n[0], self.backward_tile):
            for columns in self.backward_key_spans(rows, n[1], self.backward_tile, ctx.is_causal):
                tile = q[..., rows, :], k[..., columns, :], rows, columns
                scores = self.scores(*tile, self.backward_hidden, *n, ctx.is_causal)
                p = self.probabilities(scores, log_sum[..., rows])
                dp = do[..., rows, :] @ v[..., columns, :].mT
                ds = self.score_gradient(p, dp, delta[..., rows])
                self.add_to_query(dq, rows, ds @ k[..., columns, :] * query_scale)
                self.add_to_keys(dk, columns, ds.mT @ q[..., rows, :] * key_scale)
                self.add_to_keys(dv, columns, p.mT @ do[..., rows, :])
        found = self.gradients(dq, dk, dv)
        inputs = query, key, value
        cut = [g if g is None else g[..., : x.shape[-2], :].to(x) for g, x in zip(found, inputs, strict=True)]
        return (*cut, None)


def function_of(parts, tile=None):
    """The autograd function made of `parts`, with its name and explanation."""
    own = parts()
    if tile is not None:
        own.forward_tile = own.backward_tile = tile

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value, is_causal=False):
            return own.forward(ctx, query, key, value, is_causal)

        @staticmethod
        def backward(ctx, grad_output):
            return own.backward(ctx, grad_output)

    Wrong.__name__, Wrong.__doc__ = parts.__name__, parts.__doc__
    return Wrong


# the most usual sizes of a tile
TILES = (16, 32, 64, 128)


def mistake_of(step, piece, tile):
    """A decorator that registers parts as a mistake; with `by_tile` its result depends on the tile."""

    def mistake(source="written for this catalogue", by_tile=False):
        def register(parts):
            step.mistake(piece, source=source)(function_of(parts, tile))
            if by_tile:

                def make(tile):
                    return function_of(parts, tile)

                make.__name__, make.__doc__ = parts.__name__, parts.__doc__
                step.family(piece, {f"tiles of {size}": size for size in TILES if size != tile})(make)
            return parts

        return register

    return mistake


mistake = mistake_of(step, PIECE, None)


@mistake()
class ScoresNotScaled(Parts):
    """The scores are Q K^T, not divided by sqrt(d). With larger d the softmax becomes sharper. Scale them in
    the forward pass and in the recomputation."""

    def scale(self, d_head):
        return 1.0


@mistake()
class ScaledByD(Parts):
    """The scores are divided by d, not by its square root. Products of d random numbers grow as sqrt(d), so
    the softmax becomes almost uniform."""

    def scale(self, d_head):
        return 1 / d_head


@mistake("public implementations of FlashAttention", by_tile=True)
class OutputNotRescaled(Parts):
    """When the maximum moves, the sum is multiplied by exp(old - new) and the output is not. Values of
    earlier tiles count too much. Rescale both."""

    def rescaled(self, peak, total, output, scores, value):
        peak, correction, weights = online_softmax.rescale(peak, scores)
        return peak, total * correction + weights.sum(-1), output + weights @ value


@mistake(by_tile=True)
class SumNotRescaled(Parts):
    """When the maximum moves, the output is multiplied by exp(old - new) and the sum is not. The weights
    then add up to less than 1. Rescale both."""

    def rescaled(self, peak, total, output, scores, value):
        peak, correction, weights = online_softmax.rescale(peak, scores)
        return peak, total + weights.sum(-1), output * correction[..., None] + weights @ value


@mistake(by_tile=True)
class NothingRescaled(Parts):
    """The maximum moves from tile to tile, but neither the sum nor the output of earlier tiles is multiplied
    by exp(old maximum - new maximum). They are relative to another maximum."""

    def rescaled(self, peak, total, output, scores, value):
        peak, _, weights = online_softmax.rescale(peak, scores)
        return peak, total + weights.sum(-1), output + weights @ value


@mistake()
class NoMaximumSubtracted(Parts):
    """The exponentials are summed without subtracting the running maximum. exp(89) overflows in float32, and
    infinity over infinity is NaN."""

    def rescaled(self, peak, total, output, scores, value):
        weights = scores.exp()
        return torch.zeros(()), total + weights.sum(-1), output + weights @ value


@mistake(by_tile=True)
class DividedInEachTile(Parts):
    """The part of each tile is divided by the sum at that time, and the output again at the end. The sum is
    complete only after the last tile: divide once."""

    def rescaled(self, peak, total, output, scores, value):
        peak, correction, weights = online_softmax.rescale(peak, scores)
        total = total * correction + weights.sum(-1)
        return peak, total, output * correction[..., None] + weights / total[..., None] @ value


@mistake()
class NeverDivided(Parts):
    """The output is not divided by the sum of the exponentials, so the weights do not add up to 1. Divide by
    l after the last tile."""

    def divided(self, output, total):
        return output


@mistake(by_tile=True)
class SoftmaxOfEachTileAdded(Parts):
    """Softmax is applied within each tile, and the outputs of the tiles are added. The weights of a query
    then add up to the number of tiles. One maximum and one sum belong to all tiles."""

    def rescaled(self, peak, total, output, scores, value):
        peak, correction, weights = online_softmax.rescale(peak, scores)
        return (
            peak,
            total * correction + weights.sum(-1),
            output + weights / weights.sum(-1, True) @ value,
        )

    def divided(self, output, total):
        return output


@mistake()
class CausalIgnored(Parts):
    """is_causal is ignored: every query attends to all keys, and the model sees the tokens it must predict.
    Mask the keys after each query, and skip the tiles above the diagonal."""

    def forward(self, ctx, query, key, value, is_causal):
        return super().forward(ctx, query, key, value, False)


@mistake("public implementations of FlashAttention", by_tile=True)
class DiagonalTileSkipped(Parts):
    """With is_causal the loop ends before the tile on the diagonal, so a query attends to earlier tiles
    only, the first ones to nothing. The last tile of keys is the one that contains the query itself."""

    def key_spans(self, rows, n_keys, tile, is_causal):
        return self.spans(min(rows.start, n_keys) if is_causal else n_keys, tile)


@mistake(by_tile=True)
class DiagonalTileDoubled(Parts):
    """With is_causal the tile on the diagonal is processed twice: in the loop over full tiles and once more
    with the mask. Its keys have twice their weight. End the first loop before it."""

    def key_spans(self, rows, n_keys, tile, is_causal):
        spans = super().key_spans(rows, n_keys, tile, is_causal)
        return [*spans, *(s for s in spans[-1:] if is_causal and s.start == rows.start)]


@mistake(by_tile=True)
class DiagonalTileNotMasked(Parts):
    """Tiles above the diagonal are skipped, but within the tile on the diagonal nothing is masked, so a
    query attends to later keys of its own tile. Compare positions inside that tile."""

    def hidden(self, rows, columns, n_queries, n_keys):
        return torch.zeros(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.bool)


@mistake(by_tile=True)
class MaskByPositionsInTheTile(Parts):
    """The mask compares positions within the tiles, without the offsets of the tiles. Every tile is then
    masked as if it were on the diagonal. Add the first row and the first column."""

    def hidden(self, rows, columns, n_queries, n_keys):
        queries, keys = (torch.arange(span.stop - span.start) for span in (rows, columns))
        return keys > queries[:, None]


@mistake()
class QueryCannotSeeItself(Parts):
    """The mask hides the key at the query's own position. The first query attends to nothing, which gives
    NaN. Query i attends to keys 0 to i: hide where key > query."""

    def hidden(self, rows, columns, n_queries, n_keys):
        queries, keys = (torch.arange(span.start, span.stop) for span in (rows, columns))
        return keys >= queries[:, None]


@mistake()
class OneKeyTooMany(Parts):
    """Query i attends to key i + 1 too, which is the token that it must predict. Hide where key > query."""

    def key_spans(self, rows, n_keys, tile, is_causal):
        return self.spans(n_keys, tile)

    def hidden(self, rows, columns, n_queries, n_keys):
        queries, keys = (torch.arange(span.start, span.stop) for span in (rows, columns))
        return keys > queries[:, None] + 1


@mistake()
class DiagonalFromTheLastKey(Parts):
    """With different numbers of queries and keys the diagonal ends at the last query and the last key. Here
    it starts at the first ones, as in torch: query i attends to keys 0 to i."""

    def key_spans(self, rows, n_keys, tile, is_causal):
        return self.spans(n_keys, tile)

    def hidden(self, rows, columns, n_queries, n_keys):
        queries, keys = (torch.arange(span.start, span.stop) for span in (rows, columns))
        return keys > queries[:, None] + n_keys - n_queries


@mistake("public implementations of FlashAttention", by_tile=True)
class LastKeysDropped(Parts):
    """The number of tiles of keys is rounded down, so keys after the last full tile are never seen. Round
    up, and let the last tile be shorter."""

    def key_spans(self, rows, n_keys, tile, is_causal):
        spans = self.spans(n_keys // tile * tile, tile)
        return [span for span in spans if span.start < rows.stop or not is_causal]


@mistake("public implementations of FlashAttention", by_tile=True)
class KeysPastTheEndCount(Parts):
    """The last tile of keys is filled up with zeros, whose score of 0 counts in the softmax. Set the scores
    of keys past the end to -inf."""

    tile = property(lambda self: self.forward_tile)

    def prepared(self, query, key, value):
        missing = -key.shape[-2] % self.tile
        return query, *(tF.pad(x, (0, 0, 0, missing)) for x in (key, value))


@mistake()
class OutputLeftInFloat32(Parts):
    """The output is float32 whatever the dtype of the inputs. The next layer of a half-precision model then
    fails or upcasts. Convert the output back to the dtype of the values."""

    def dtype(self, value):
        return F.to_float32(value).dtype


@mistake()
class WholeMatrixOfScores(Parts):
    """The result is right, but all scores are computed as one matrix of queries x keys, which is the memory
    that FlashAttention avoids. Loop over tiles, forward and backward."""

    forward_tile = backward_tile = 1 << 20


@mistake("public solutions of CS336; passes its suite")
class WholeMatrixInTheBackwardPass(Parts):
    """The forward pass is tiled, but the backward pass recomputes all probabilities as one matrix of queries
    x keys. Training then needs as much memory as before. Loop over tiles there too."""

    backward_tile = 1 << 20


@mistake()
class ProbabilitiesSaved(Parts):
    """The probabilities are saved for the backward pass, a matrix of queries x keys, and need not be. Save
    the log-sum-exp of each query, and recompute them: exp(S - L)."""

    def save(self, ctx, query, key, value, output, log_sum):
        super().save(ctx, query, key, value, output, log_sum)
        ctx.probabilities = (query @ key.mT * self.scale(query.shape[-1]) - log_sum[..., None]).exp()


@mistake()
class MaximumAndSumSaved(Parts):
    """Two tensors of one number per query are saved, the maximum and the sum. One is enough: the
    log-sum-exp, m + log(l), from which each probability is exp(s - L)."""

    def save(self, ctx, query, key, value, output, log_sum):
        ctx.save_for_backward(query, key, value, output, log_sum, torch.zeros_like(log_sum))

    def restored(self, ctx):
        return ctx.saved_tensors[:5]


@mistake()
class LogSumExpNotSaved(Parts):
    """The log-sum-exp is not saved, so the backward pass must go through all keys once more before it can
    compute a probability. Save one number per query: m + log(l)."""

    def save(self, ctx, query, key, value, output, log_sum):
        ctx.save_for_backward(query, key, value, output)

    def restored(self, ctx):
        query, key, value, output = ctx.saved_tensors
        scores = F.to_float32(query) @ F.to_float32(key).mT * self.scale(query.shape[-1])
        if ctx.is_causal:
            n_queries, n_keys = scores.shape[-2:]
            hidden = self.hidden(slice(0, n_queries), slice(0, n_keys), n_queries, n_keys)
            scores = scores.masked_fill(hidden.to(scores.device), -math.inf)
        return query, key, value, output, scores.logsumexp(-1)


@mistake()
class LogSumExpToBase2(Parts):
    """The saved number is m + log2(l), while the backward pass uses exp. The logarithm must have the base of
    the exponential: log with exp, or log2 and exp2 with all scores times log2(e)."""

    def log_sum(self, peak, total):
        return peak + total.log2()


@mistake()
class LogSumExpInUnitsOfBase2(Parts):
    """The gradients are right, but the saved log-sum-exp is to base 2, as in kernels that use exp2. Others
    expect natural units: divide by log2(e) before it is stored."""

    def log_sum(self, peak, total):
        return (peak + total.log()) / math.log(2)

    def probabilities(self, scores, log_sum):
        return (scores - log_sum[..., None] * math.log(2)).exp()


@mistake()
class LogOfTheSumAlone(Parts):
    """The saved number is log(l), without the maximum. The sum is relative to the maximum, so the
    log-sum-exp is m + log(l), and exp(S - log l) is too large by exp(m)."""

    def log_sum(self, peak, total):
        return total.log()


@mistake()
class MaximumSaved(Parts):
    """The saved number is the maximum of the scores, without log(l). exp(S - m) is not divided by the sum,
    so the recomputed probabilities do not add up to 1."""

    def log_sum(self, peak, total):
        return peak + 0 * total


@mistake("public implementations of FlashAttention")
class NoDTerm(Parts):
    """The D term of the softmax's derivative is missing: dS = P dP. Since probabilities add up to 1, a score
    that grows takes from all others: dS = P (dP - D), D = sum of dO O."""

    def score_gradient(self, p, dp, delta):
        return p * dp


@mistake()
class DTermAdded(Parts):
    """The D term has the wrong sign: dS = P (dP + D). It is subtracted, so that the gradients of the scores
    of a query sum to 0."""

    def score_gradient(self, p, dp, delta):
        return p * (dp + delta[..., None])


@mistake()
class DOfTheGradientAlone(Parts):
    """D is the sum of dO over d. It is the sum of dO times O: what the gradient would be of scaling all
    probabilities of a query."""

    def delta(self, grad_output, output):
        return grad_output.sum(-1)


@mistake()
class DIsAMean(Parts):
    """D is the mean of dO O over d, so it is too small by the factor d. It is the sum: equal to the sum of P
    dP over the keys."""

    def delta(self, grad_output, output):
        return (grad_output * output).mean(-1)


@mistake()
class DOutsideTheProduct(Parts):
    """dS = P dP - D. The D term belongs inside the product: dS = P (dP - D). Otherwise keys with no weight
    get a gradient too."""

    def score_gradient(self, p, dp, delta):
        return p * dp - delta[..., None]


@mistake()
class GradientsOfQAndKNotScaled(Parts):
    """dQ = dS K and dK = dS^T Q lack the factor 1 / sqrt(d), which the scores have in the forward pass. Both
    gradients are too large by sqrt(d)."""

    def scales(self, scale):
        return 1.0, 1.0


@mistake()
class GradientOfQNotScaled(Parts):
    """dQ = dS K lacks the factor 1 / sqrt(d) that the scores have in the forward pass. It is the same as
    that of dK."""

    def scales(self, scale):
        return 1.0, scale


@mistake()
class GradientOfKNotScaled(Parts):
    """dK = dS^T Q lacks the factor 1 / sqrt(d) that the scores have in the forward pass. It is the same as
    that of dQ."""

    def scales(self, scale):
        return scale, 1.0


@mistake(by_tile=True)
class GradientOfQFromTheLastTile(Parts):
    """dQ is set for each tile of keys, and keeps what the last one gave. A query's gradient is a sum over
    all keys: use +=."""

    def add_to_query(self, total, rows, part):
        total[..., rows, :] = part


@mistake(by_tile=True)
class GradientsOfKAndVFromTheLastTile(Parts):
    """dK and dV are set for each tile of queries, and keep what the last one gave. They are sums over all
    queries: use +=."""

    def add_to_keys(self, total, rows, part):
        total[..., rows, :] = part


@mistake()
class GradientsOfKAndVSwapped(Parts):
    """backward returns the gradients in the order query, value, key. It must be the order of the inputs:
    query, key, value."""

    def gradients(self, dq, dk, dv):
        return dq, dv, dk


@mistake()
class NoGradientOfV(Parts):
    """backward returns None for the values, so what computes them does not learn. dV = P^T dO."""

    def gradients(self, dq, dk, dv):
        return dq, dk, None


@mistake()
class MaskMissingInTheBackwardPass(Parts):
    """The recomputed scores are not masked: exp(S - L) of a key after its query is then not 0, and gradients
    flow from the future. Mask in both passes."""

    def backward_hidden(self, rows, columns, n_queries, n_keys):
        return torch.zeros(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.bool)

    def backward_key_spans(self, rows, n_keys, tile, is_causal):
        return self.spans(n_keys, tile)


@mistake()
class GradientOfTheOutputIgnored(Parts):
    """The backward pass computes with ones in the place of the gradient that it is given. That is right only
    for a sum of all outputs."""

    def backward(self, ctx, grad_output):
        return super().backward(ctx, torch.ones_like(grad_output))


@mistake()
class QueryScaledInPlace(Parts):
    """The queries are multiplied by 1 / sqrt(d) in place (*=), so the caller's tensor changes. Make a new
    one, or scale the scores."""

    def forward(self, ctx, query, key, value, is_causal):
        before = query.clone()
        query.mul_(self.scale(query.shape[-1]))
        return super().forward(ctx, before, key, value, is_causal)
