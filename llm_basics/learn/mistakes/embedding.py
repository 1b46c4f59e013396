"""Embedding: one row of the weight for each id, and the weights that it starts with."""

import math

import torch
from torch import nn
from torch.nn import functional as tF

from llm_basics.core import layers
from llm_basics.learn import grids, probes
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


# a square table accepts a lookup along the wrong axis, whose result can then be identified
compare(
    "7 ids with 7 features",
    [[3, 5, 1], [4, 2, 6]],
    draw(7, 7),
    "batch position feature",
    contract="embedding",
)
compare(
    "11 ids with 6 features, including the first and the last",
    [[0, 10, 4]],
    draw(11, 6),
    "batch position feature",
    contract="embedding",
)
compare(
    "several leading dimensions, and an id more than once",
    [[[3, 0, 3], [10, 9, 0]], [[3, 1, 1], [2, 3, 8]]],
    draw(11, 6),
    "document batch position feature",
    beyond="a lookup works for ids of any shape; the public test has two axes",
)
compare(
    "a single id",
    4,
    draw(11, 6),
    "feature",
    beyond="a lookup works for ids of any shape; the public test has two axes",
)
step.weight_gradients(
    "the gradient of the vectors, with an id more than once",
    lambda a, ids, weight: a.run_embedding(11, 6, weight, ids),
    lambda ids, weight: tF.embedding(ids, weight),
    {"ids": torch.tensor([[3, 0, 3], [10, 9, 0]])},
    {"weight": draw(11, 6)},
)
# float16 ends at 65,504 and has 11 bits, bfloat16 has 8
compare(
    "large numbers, and numbers of many digits",
    [[1, 0]],
    torch.tensor([[70_000.0, 1.0], [1001.25, 3.0]]),
    "batch position feature",
    rtol=1e-6,
    gradients=False,
    contract="embedding",
)
compare(
    "infinity and NaN in a row that no id selects",
    [2, 0],
    torch.tensor([[1.0, 2.0], [math.inf, math.nan], [3.0, 4.0]]),
    "position feature",
    gradients=False,
    beyond="a product with one-hot vectors reads all rows, so that one bad row spoils every result",
)


def refusal(lookup, token_id):
    try:
        lookup(torch.tensor([token_id]))
    except (IndexError, RuntimeError, ValueError, AssertionError):
        return "refused"
    return "looked up"


def not_refused(expected, actual):
    return "an id outside the vocabulary must raise an error, but a row is returned"


def lookup_in(run_embedding, weight):
    return lambda ids: run_embedding(*weight.shape, weight, ids)


step.value(
    "an id beyond the vocabulary",
    lambda a: refusal(lookup_in(a.run_embedding, torch.ones(5, 2)), 5),
    "refused",
    words=not_refused,
    beyond="an id that the vocabulary lacks is a mistake of the data, which an error shows at once",
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
    """The vectors are multiplied by sqrt(d_model), as in the original transformer of 2017. Llama, GPT-2 and
    this package do not scale. Return the rows as they are."""
    return tF.embedding(token_ids, weight) * math.sqrt(weight.shape[-1])


@step.mistake("functional.embedding", source="written for this catalogue")
def divided_by_the_root_of_d_model(token_ids, weight):
    """The vectors are divided by sqrt(d_model). That scale belongs to attention scores; an embedding returns
    its rows as they are."""
    return tF.embedding(token_ids, weight) / math.sqrt(weight.shape[-1])


@step.mistake("functional.embedding", source="public solutions of CS336")
def one_hot_matmul(token_ids, weight):
    """Each id becomes a one-hot vector that is multiplied by the whole weight. That is slow and uses much
    memory, and one infinity or NaN in any row spoils all results, since 0 * inf is NaN. Select the rows
    instead."""
    return tF.one_hot(token_ids.long(), weight.shape[0]).to(weight.dtype) @ weight


@step.mistake("functional.embedding", source="written for this catalogue")
def columns_instead_of_rows(token_ids, weight):
    """The ids select columns of the weight, but its shape is (vocab_size, d_model), one row per id. A square
    weight hides it; check which axis is indexed."""
    return tF.embedding(token_ids, weight.T)


@step.mistake("functional.embedding", source="written for this catalogue")
def ids_counted_from_1(token_ids, weight):
    """One is subtracted from each id before the lookup, so each token gets the vector of the previous one,
    and token 0 that of the last. Ids count from 0, like rows."""
    return weight[token_ids - 1]


@step.mistake("functional.embedding", source="public solutions of CS336; passes its suite")
def weight_detached(token_ids, weight):
    """The output is correct, but no gradient reaches the weight, because .data, .detach() or a copy broke the
    graph. The vectors stay random without an error. Index the parameter itself."""
    return tF.embedding(token_ids, weight.detach())


@step.mistake("functional.embedding", source="written for this catalogue")
def weight_gradient_doubled(token_ids, weight):
    """The output is correct, but the gradient of the weight is twice what it must be. Look for a hook, a
    custom backward pass, or a second lookup in the graph."""
    return tF.embedding(token_ids, 2 * weight - weight.detach())


@step.mistake("functional.embedding", source="written for this catalogue")
def token_0_never_learns(token_ids, weight):
    """Token 0 is treated as padding and gets no gradient (padding_idx=0). Here id 0 is an ordinary token;
    leave padding_idx out."""
    return tF.embedding(token_ids, weight, padding_idx=0)


@step.mistake("functional.embedding", source="written for this catalogue")
def row_0_is_zeros(token_ids, weight):
    """Token 0 gets a vector of zeros and never learns, as with padding_idx=0 of a new nn.Embedding. Here id 0
    is an ordinary token; leave padding_idx out."""
    return tF.embedding(token_ids, weight).masked_fill((token_ids == 0).unsqueeze(-1), 0.0)


@step.mistake("functional.embedding", source="written for this catalogue")
def axes_of_size_1_removed(token_ids, weight):
    """squeeze() without an axis removes every axis of size 1, so a batch of one or a single token has another
    shape than any other. The shape must be that of the ids followed by d_model."""
    return tF.embedding(token_ids, weight).squeeze()


@step.mistake("functional.embedding", source="written for this catalogue")
def leading_dimensions_lost(token_ids, weight):
    """The ids are flattened, and the result is not reshaped back. Its shape must be that of the ids followed
    by d_model."""
    return tF.embedding(token_ids.flatten(), weight)


@step.mistake("functional.embedding", source="written for this catalogue")
def gradient_divided_by_the_count(token_ids, weight):
    """An id that occurs k times in the batch gets 1/k of its gradient (scale_grad_by_freq), so frequent
    tokens learn as slowly as rare ones. Gradients of the same row must add up."""
    return tF.embedding(token_ids, weight, scale_grad_by_freq=True)


@step.mistake("functional.embedding", source="written for this catalogue")
def vectors_of_length_1(token_ids, weight):
    """Each vector is divided by its norm. Normalization is a layer of its own; an embedding returns its rows
    as they are."""
    return tF.normalize(tF.embedding(token_ids, weight), dim=-1)


@step.mistake("functional.embedding", source="written for this catalogue")
def ids_clamped_into_the_vocabulary(token_ids, weight):
    """Ids beyond the vocabulary are silently replaced by the last one. A tokenizer that does not match the
    model then goes unnoticed while the text becomes nonsense. Let the lookup raise an error."""
    return tF.embedding(token_ids.clamp(0, len(weight) - 1), weight)


@step.mistake("functional.embedding", source="written for this catalogue")
def negative_ids_count_from_the_end(token_ids, weight):
    """Plain indexing accepts id -1 as the last row, so a padding value such as -100 silently becomes some
    token. Use index_select, which raises an error, or check the ids."""
    return weight[token_ids]


@step.mistake("functional.embedding", source="public solutions of CS336")
def rounded_to_float16(token_ids, weight):
    """The vectors are rounded to float16, which keeps three digits and overflows above 65,504. Keep the dtype
    of the weight."""
    return tF.embedding(token_ids, weight).half().to(weight.dtype)


@step.mistake("functional.embedding", source="public solutions of CS336")
def rounded_to_bfloat16(token_ids, weight):
    """The vectors are rounded to bfloat16, which keeps two to three digits. Keep the dtype of the weight;
    lower precision is up to autocast."""
    return tF.embedding(token_ids, weight).bfloat16().to(weight.dtype)


@step.mistake("functional.embedding", source="written for this catalogue")
def result_always_float32(token_ids, weight):
    """The result is float32 whatever the dtype of the weight. A half-precision model then fails at the next
    layer, or uses twice the memory. Keep the dtype of the weight."""
    return tF.embedding(token_ids, weight).float()


for made in (linear.weight_is_no_parameter, linear.weight_does_not_learn):
    step.mistake("layers.Embedding", source="written for this catalogue")(made(layers.Embedding))


@step.mistake("layers.Embedding", source="written for this catalogue")
class WeightWithSizesExchanged(layers.Embedding):
    """The weight has shape (d_model, vocab_size), but must have one row per id: (vocab_size, d_model). Ids
    beyond d_model fail, and pretrained checkpoints do not load."""

    def __init__(self, num_embeddings, embedding_dim, device=None, dtype=None):
        super().__init__(embedding_dim, num_embeddings, device, dtype)


@step.mistake("layers.Embedding", source="written for this catalogue")
class StartsLikeALinearLayer(layers.Embedding):
    """The vectors are initialized with std sqrt(2 / (vocab_size + d_model)), the rule for Linear. A lookup
    sums nothing, so no fan-in has to be compensated: the std must be 1."""

    def __init__(self, num_embeddings, embedding_dim, device=None, dtype=None):
        super().__init__(num_embeddings, embedding_dim, device, dtype)
        layers.init_truncated_normal_(self.weight, math.sqrt(2 / (num_embeddings + embedding_dim)))


class Started(layers.Embedding):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.start(self.weight)


@step.mistake("layers.Embedding", source="written for this catalogue")
class StartsWithAFixedStd(Started):
    """The vectors are initialized with std 0.02. GPT-2 uses that because its output projection shares the
    weight. Here the two are separate, and the std must be 1."""

    start = staticmethod(lambda weight: layers.init_truncated_normal_(weight, 0.02))


@step.mistake("layers.Embedding", source="written for this catalogue")
class StartsAtZero(Started):
    """All vectors are initialized to zero, so the model cannot distinguish tokens at first. Draw them from a
    normal distribution with std 1."""

    start = staticmethod(nn.init.zeros_)


@step.mistake("layers.Embedding", source="written for this catalogue")
class StartsUniform(Started):
    """The vectors are initialized uniformly from 0 to 1 (torch.rand), so all of them point in similar
    directions. They must be normal with mean 0: nn.init.trunc_normal_."""

    start = staticmethod(nn.init.uniform_)


@step.mistake("layers.Embedding", source="written for this catalogue")
class NoCutOff(Started):
    """The vectors are initialized by torch.randn or normal_ without truncation, so a few numbers exceed 4.
    Truncate at three standard deviations: trunc_normal_ with a=-3, b=3."""

    start = staticmethod(nn.init.normal_)


@step.mistake("layers.Embedding", source="written for this catalogue")
class CutOffAtTwo(Started):
    """The initialization is truncated at two standard deviations, the default of trunc_normal_, instead of
    three, which makes the std too small. Pass a=-3 and b=3."""

    start = staticmethod(nn.init.trunc_normal_)


step.factor("functional.embedding")


# --------------------------------------------------------------------------------------------------
# Mistakes with a parameter that is found from the observations


@step.family("functional.embedding", grids.DTYPES, unknown="a dtype of fewer bits")
def weight_in_another_dtype(value):
    """The weight is rounded to {value}, which keeps three digits or fewer, although the vectors are float32.
    Keep the dtype of the weight; lower precision is up to autocast."""
    return lambda token_ids, weight: tF.embedding(token_ids, weight.to(value).to(weight.dtype))
