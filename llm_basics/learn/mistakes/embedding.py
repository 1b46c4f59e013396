"""Embedding: one row of the weight for each id, and the weights that it starts with."""

import math

import torch
from torch import nn
from torch.nn import functional as tF

from llm_basics.core import layers
from llm_basics.learn import probes
from llm_basics.learn.mistakes import linear

step = probes.Step("embedding")
draw = probes.numbers(seed=1)


def compare(about, ids, weight, axes, **more):
    step.compare(
        about,
        lambda a, ids, weight: a.run_embedding(*weight.shape, weight, ids),
        lambda ids, weight: tF.embedding(ids, weight),
        {"ids": torch.tensor(ids)},
        {"weight": weight},
        axes=axes,
        **more,
    )


# a square table lets a lookup along the wrong axis through, which then gives numbers that can be told
compare("7 ids with 7 features", [[3, 5, 1], [4, 2, 6]], draw(7, 7), "batch position feature")
compare(
    "11 ids with 6 features, including the first and the last", [0, 10, 4], draw(11, 6), "position feature"
)
compare(
    "several leading dimensions, and an id more than once",
    [[[3, 0, 3], [10, 9, 0]], [[3, 1, 1], [2, 3, 8]]],
    draw(11, 6),
    "document batch position feature",
)
compare("one id alone", 4, draw(11, 6), "feature")
# float16 ends at 65,504 and has 11 bits, bfloat16 has 8
compare(
    "large numbers, and numbers of many digits",
    [1, 0],
    torch.tensor([[70_000.0, 1.0], [1001.25, 3.0]]),
    "position feature",
    rtol=1e-6,
    gradients=False,
)
compare(
    "infinity and NaN in a row that no id selects",
    [2, 0],
    torch.tensor([[1.0, 2.0], [math.inf, math.nan], [3.0, 4.0]]),
    "position feature",
    gradients=False,
)


def refusal(lookup, token_id):
    try:
        lookup(torch.tensor([token_id]))
    except (IndexError, RuntimeError, ValueError, AssertionError):
        return "refused"
    return "looked up"


def not_refused(expected, actual):
    return "an id outside of the vocabulary must be refused with an error, but something was looked up"


def lookup_in(run_embedding, weight):
    return lambda ids: run_embedding(*weight.shape, weight, ids)


step.value(
    "an id beyond the vocabulary",
    lambda a: refusal(lookup_in(a.run_embedding, torch.ones(5, 2)), 5),
    "refused",
    words=not_refused,
)
step.value(
    "a negative id",
    lambda a: refusal(a.get_embedding(5, 2), -1),
    "refused",
    words=not_refused,
)
step.value(
    "parameters of the layer",
    lambda a: linear.parameters(a.get_embedding(11, 6)),
    {"weight": (11, 6)},
    words=linear.differ_in_parameters,
)
step.value(
    "initial weights",
    lambda a: linear.initial_weights(a.get_embedding(400, 150).weight, std=1.0),
    {"mean": 0.0, "standard deviation": linear.KEPT, "largest": 3 / linear.KEPT},
    rtol=0.05,
    words=lambda expected, actual: linear.differ_in_spread(expected, actual, f"{linear.KEPT:.2f}", ""),
)
step.value(
    "a layer converted to bfloat16",
    lambda a: linear.as_bfloat16(a.get_embedding(11, 6), torch.tensor([3, 0])),
    "bfloat16",
)


@step.mistake("functional.embedding", source="public solutions of CS336")
def scaled_by_the_root_of_d_model(token_ids, weight):
    """The vectors are multiplied by sqrt(d_model), as in the first Transformer of 2017. Llama and GPT-2 do
    not; this package does not. Return the rows as they are."""
    return tF.embedding(token_ids, weight) * math.sqrt(weight.shape[-1])


@step.mistake("functional.embedding", source="written for this catalogue")
def divided_by_the_root_of_d_model(token_ids, weight):
    """The vectors are divided by sqrt(d_model). That scale belongs to the scores of attention; an embedding
    gives its rows as they are."""
    return tF.embedding(token_ids, weight) / math.sqrt(weight.shape[-1])


@step.mistake("functional.embedding", source="public solutions of CS336")
def one_hot_matmul(token_ids, weight):
    """Each id becomes a vector as long as the vocabulary, multiplied by the whole weight. That is slow and
    large, and one infinity or NaN in any row spoils all results, since 0 * inf is NaN. Look the rows up."""
    return tF.one_hot(token_ids.long(), weight.shape[0]).to(weight.dtype) @ weight


@step.mistake("functional.embedding", source="written for this catalogue")
def columns_instead_of_rows(token_ids, weight):
    """The ids pick columns of the weight, but it is (vocab_size, d_model): each id has a row. A square weight
    hides it; check which axis you index."""
    return tF.embedding(token_ids, weight.T)


@step.mistake("functional.embedding", source="written for this catalogue")
def ids_counted_from_1(token_ids, weight):
    """One is subtracted from each id before the lookup, so each token has the vector of its neighbor, and
    token 0 that of the last. Ids count from 0, as rows do."""
    return weight[token_ids - 1]


@step.mistake("functional.embedding", source="public solutions of CS336; passes its suite")
def weight_detached(token_ids, weight):
    """The output is right, but no gradient reaches the weight: .data, .detach() or a copy cut it off. The
    vectors stay random for ever, and nothing fails. Index the parameter itself."""
    return tF.embedding(token_ids, weight.detach())


@step.mistake("functional.embedding", source="written for this catalogue")
def token_0_never_learns(token_ids, weight):
    """Token 0 is treated as padding and gets no gradient (padding_idx=0). Here id 0 is a token as any other,
    so leave padding_idx out."""
    return tF.embedding(token_ids, weight, padding_idx=0)


@step.mistake("functional.embedding", source="written for this catalogue")
def leading_dimensions_lost(token_ids, weight):
    """The ids are flattened, and the result is never given its batch and position axes back. Its shape must
    be that of the ids followed by d_model."""
    return tF.embedding(token_ids.flatten(), weight)


@step.mistake("functional.embedding", source="written for this catalogue")
def gradient_divided_by_the_count(token_ids, weight):
    """An id that stands k times in the batch gets a k-th of its gradient (scale_grad_by_freq). Frequent
    tokens then learn as slowly as rare ones. Gradients of the same row must add up."""
    return tF.embedding(token_ids, weight, scale_grad_by_freq=True)


@step.mistake("functional.embedding", source="written for this catalogue")
def vectors_of_length_1(token_ids, weight):
    """Each vector is divided by its length. That is a norm, which has its own place in the model; an
    embedding gives its rows as they are."""
    return tF.normalize(tF.embedding(token_ids, weight), dim=-1)


@step.mistake("functional.embedding", source="written for this catalogue")
def ids_clamped_into_the_vocabulary(token_ids, weight):
    """Ids beyond the vocabulary silently become the last one. A tokenizer that does not fit the model then
    goes unnoticed while the text turns to nonsense. Let the lookup fail."""
    return tF.embedding(token_ids.clamp(0, len(weight) - 1), weight)


@step.mistake("functional.embedding", source="written for this catalogue")
def negative_ids_count_from_the_end(token_ids, weight):
    """Plain indexing takes id -1 for the last row, so that a padding mark such as -100 silently becomes some
    token. Use index_select, or check the ids, so that it is refused."""
    return weight[token_ids]


@step.mistake("functional.embedding", source="public solutions of CS336")
def rounded_to_float16(token_ids, weight):
    """The vectors pass through float16, which leaves three digits and makes infinity of what is past 65,504.
    Keep the dtype of the weight."""
    return tF.embedding(token_ids, weight).half().to(weight.dtype)


@step.mistake("functional.embedding", source="public solutions of CS336")
def rounded_to_bfloat16(token_ids, weight):
    """The vectors pass through bfloat16, which leaves two to three digits. Keep the dtype of the weight;
    autocast is there for who wants speed."""
    return tF.embedding(token_ids, weight).bfloat16().to(weight.dtype)


@step.mistake("functional.embedding", source="written for this catalogue")
def result_always_float32(token_ids, weight):
    """The result is float32 whatever the weight is. A model in half precision then fails at the next layer,
    or quietly runs at twice the size. Leave the dtype as it is."""
    return tF.embedding(token_ids, weight).float()


for made in (linear.weight_is_no_parameter, linear.weight_does_not_learn):
    step.mistake("layers.Embedding", source="written for this catalogue")(made(layers.Embedding))


@step.mistake("layers.Embedding", source="written for this catalogue")
class WeightWithSizesExchanged(layers.Embedding):
    """The weight is made as (d_model, vocab_size), but there must be a row for each id: (vocab_size,
    d_model). Ids past d_model fail, and checkpoints of others do not load."""

    def __init__(self, num_embeddings, embedding_dim, device=None, dtype=None):
        super().__init__(embedding_dim, num_embeddings, device, dtype)


@step.mistake("layers.Embedding", source="written for this catalogue")
class StartsLikeALinearLayer(layers.Embedding):
    """The vectors start with deviation sqrt(2 / (vocab_size + d_model)), the rule for Linear. A lookup adds
    nothing up, so nothing has to be kept small: the deviation must be 1."""

    def __init__(self, num_embeddings, embedding_dim, device=None, dtype=None):
        super().__init__(num_embeddings, embedding_dim, device, dtype)
        layers.init_truncated_normal_(self.weight, math.sqrt(2 / (num_embeddings + embedding_dim)))


class Started(layers.Embedding):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.start(self.weight)


@step.mistake("layers.Embedding", source="written for this catalogue")
class StartsWithAFixedStd(Started):
    """The vectors start with deviation 0.02, which GPT-2 needs because its output layer shares the weight.
    Here the two are apart, and the deviation must be 1."""

    start = staticmethod(lambda weight: layers.init_truncated_normal_(weight, 0.02))


@step.mistake("layers.Embedding", source="written for this catalogue")
class StartsAtZero(Started):
    """All vectors start at zero, so all tokens are the same to the model at first. Draw them from a normal
    distribution of deviation 1."""

    start = staticmethod(nn.init.zeros_)


@step.mistake("layers.Embedding", source="written for this catalogue")
class StartsUniform(Started):
    """The vectors are drawn evenly from 0 to 1 (torch.rand), so that all of them point in much the same
    direction. They must be normal around 0: nn.init.trunc_normal_."""

    start = staticmethod(nn.init.uniform_)


@step.mistake("layers.Embedding", source="written for this catalogue")
class NoCutOff(Started):
    """The first vectors come from torch.randn or normal_, which has no end: a few numbers are past 4. Cut the
    distribution off at three standard deviations: trunc_normal_ with a=-3, b=3."""

    start = staticmethod(nn.init.normal_)


@step.mistake("layers.Embedding", source="written for this catalogue")
class CutOffAtTwo(Started):
    """The first vectors are cut off at two standard deviations, the default of trunc_normal_, instead of
    three. They are spread less than they should be; give it a=-3 and b=3."""

    start = staticmethod(nn.init.trunc_normal_)
