"""Inspection of a model: attention weights, logit lens, neighbors of an embedding."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_basics import swap
from llm_basics.core import functional as F
from llm_basics.core import model as models
from llm_basics.core import tokenizer as tokenizers
from llm_basics.core import vocabulary

# maximum number of values per response: heads x tokens x tokens of attention, layers x tokens of the lens
MAX_WEIGHTS = 1_000_000
MAX_CELLS = 8192

ATTENTION = "functional.scaled_dot_product_attention"


@dataclass(frozen=True)
class Alternative:
    """A token and its probability at a position, before temperature and the other options."""

    id: int
    token: str
    """Text of the token; bytes that are not UTF-8 in hexadecimal, `<e2 82>`."""
    probability: float


@dataclass(frozen=True)
class Attention:
    """Attention weights."""

    tokens: list[str]
    ids: list[int]
    layer: int
    n_layers: int
    n_heads: int
    heads: list[int]
    weights: list[list[list[float]]]
    """`weights[head][query]` has the weights of keys 0 to `query`."""


@dataclass(frozen=True)
class LensCell:
    """The prediction at a position after a layer."""

    top: list[Alternative]
    entropy: float
    """Entropy of the prediction in nats."""
    target_probability: float | None
    """Probability of the next token in the text; None at the end."""


@dataclass(frozen=True)
class Lens:
    """Predictions after each layer: layer 0 are the embeddings, the last one is the model's output."""

    tokens: list[str]
    ids: list[int]
    layers: list[list[LensCell]]


@dataclass(frozen=True)
class Neighbor:
    """A token and the cosine similarity of its embedding."""

    id: int
    token: str
    similarity: float


@dataclass(frozen=True)
class Neighbors:
    """The closest tokens, the closest first."""

    token: str
    neighbors: list[Neighbor]


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer."""

    lm: models.TransformerLM
    tokenizer: tokenizers.Tokenizer

    def encode(self, text: str, ids: list[int] | None = None) -> list[int]:
        """`ids`, or those of `text`, where special tokens are ordinary text. Raises ValueError for none."""
        ids = ids if ids is not None else self.tokenizer.encode_ordinary(text)
        if not ids:
            raise ValueError("the text must have at least one token, got none")
        return self.check(ids)

    def check(self, ids: list[int]) -> list[int]:
        """`ids` if all are in the vocabulary."""
        for id in ids:
            if id not in self.tokenizer.vocab:
                n_tokens = len(self.tokenizer.vocab)
                raise ValueError(f"a token id must be in the vocabulary of {n_tokens} tokens, got {id}")
        return ids

    def tensor(self, ids: list[int]) -> Int[Tensor, " seq"]:
        """Ids on the device of the model."""
        return torch.tensor(ids, device=self.lm.lm_head.weight.device)

    def show(self, id: int) -> str:
        """A token as text; bytes that are not UTF-8 in hexadecimal."""
        return show(self.tokenizer.vocab.get(id, b""))

    def likely(self, probabilities: Float[Tensor, " vocab"], n: int) -> list[Alternative]:
        """The `n` most likely tokens."""
        values, ids = probabilities.topk(min(n, len(probabilities)))
        return [
            Alternative(id, self.show(id), value)
            for id, value in zip(ids.tolist(), values.tolist(), strict=True)
        ]


def show(token: bytes) -> str:
    """A token as text; bytes that are not UTF-8 in hexadecimal.

    >>> show(b" the"), show(b"\\xe2\\x82")
    (' the', '<e2 82>')
    """
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return vocabulary.show_token(token)


# --------------------------------------------------------------------------------------------------
# Inside the model


@torch.no_grad()
def attention(loaded: LoadedModel, ids: list[int], layer: int = 0, head: int | None = None) -> Attention:
    """The attention weights of a layer for each head, or one head."""
    lm = loaded.lm
    check_length(loaded, ids)
    shape = lm.config
    _check_below("layer", layer, shape.n_layers)
    if head is not None:
        _check_below("head", head, shape.n_heads)
    heads = [head] if head is not None else list(range(shape.n_heads))
    if len(heads) * len(ids) ** 2 > MAX_WEIGHTS:
        longest = int((MAX_WEIGHTS / len(heads)) ** 0.5)
        raise ValueError(
            f"the text must have at most {longest} tokens for {len(heads)} heads, got {len(ids)}; shorten it "
            "or choose one head"
        )
    found: list[Tensor] = []
    plain = swap.current(ATTENTION)

    def record(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
        # the mean of one-hot values is the row of weights
        one_hot = torch.eye(key.shape[-2], dtype=value.dtype, device=value.device)
        found.append(plain(query, key, one_hot.expand(*key.shape[:-2], -1, -1), *arguments, **options))
        return plain(query, key, value, *arguments, **options)

    with swap.replaced({ATTENTION: record}):
        lm(loaded.tensor(ids)[None])
    if len(found) != shape.n_layers:
        raise ValueError("attention weights need the reference's attention; start the lab with --fast off")
    weights = found[layer][0].float().cpu()
    return Attention(
        tokens=[loaded.show(id) for id in ids],
        ids=ids,
        layer=layer,
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        heads=heads,
        weights=[
            [[round(w, 5) for w in row[: i + 1]] for i, row in enumerate(weights[head].tolist())]
            for head in heads
        ],
    )


@torch.no_grad()
def lens(loaded: LoadedModel, ids: list[int], top: int = 3) -> Lens:
    """Predictions of the output projection from the residual stream at each layer (nostalgebraist 2020)."""
    lm = loaded.lm
    check_length(loaded, ids)
    if (lm.config.n_layers + 1) * len(ids) > MAX_CELLS:
        longest = MAX_CELLS // (lm.config.n_layers + 1)
        raise ValueError(f"the text must have at most {longest} tokens, got {len(ids)}; shorten it")
    with residual_streams(lm) as streams:
        lm(loaded.tensor(ids)[None])
    layers = []
    for stream in streams:
        probabilities = F.softmax(lm.logits(lm.ln_final(stream[0])).float()).cpu()
        layers.append([_cell(loaded, row, ids[i + 1 :], top) for i, row in enumerate(probabilities)])
    return Lens(tokens=[loaded.show(id) for id in ids], ids=ids, layers=layers)


def _cell(
    loaded: LoadedModel, probabilities: Float[Tensor, " vocab"], following: list[int], top: int
) -> LensCell:
    return LensCell(
        top=loaded.likely(probabilities, top),
        entropy=float(torch.special.entr(probabilities).sum()),
        target_probability=float(probabilities[following[0]]) if following else None,
    )


@torch.no_grad()
def neighbors(loaded: LoadedModel, id: int, count: int = 10) -> Neighbors:
    """The tokens with the highest cosine similarity of their embeddings."""
    loaded.check([id])
    table = loaded.lm.token_embeddings.weight[: loaded.lm.config.vocab_size].float()
    table = table / table.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    similarities = table @ table[id]
    values, ids = similarities.topk(min(count + 1, len(table)))
    found = [
        Neighbor(other, loaded.show(other), value)
        for other, value in zip(ids.tolist(), values.tolist(), strict=True)
        if other != id
    ]
    return Neighbors(token=loaded.show(id), neighbors=found[:count])


@contextlib.contextmanager
def residual_streams(lm: nn.Module) -> Iterator[list[Tensor]]:
    """Record the residual stream before the first block and after each block within the context."""
    streams: list[Tensor] = []
    blocks: Any = lm.layers

    def before(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        streams.append(inputs[0])

    def after(block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        streams.append(output)

    handles = [blocks[0].register_forward_pre_hook(before)]
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()


def check_length(loaded: LoadedModel, ids: list[int]) -> None:
    """Raise ValueError for a text longer than the context."""
    if len(ids) > loaded.lm.config.context_length:
        raise ValueError(
            f"the text must fit into the context of {loaded.lm.config.context_length} tokens, got {len(ids)}"
        )


def _check_below(name: str, value: int, end: int) -> None:
    if value >= end:
        raise ValueError(f"{name} must be from 0 to {end - 1}, got {value}")
