"""How likely does a model find a text? What it said of each token, before it saw it.

A text longer than the model's context is read in windows, which start `stride` tokens apart; each scores the
tokens that none before it has scored. Side by side (a stride of the whole context), the first token of each
window is predicted from one token alone; windows that overlap leave each at least `context_length - stride`
to go by, and cost `context_length / stride` times as much.

Source: https://huggingface.co/docs/transformers/perplexity, and lm-evaluation-harness for continuations.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_basics.core import functional as F
from llm_basics.core import model as models

BATCH_SIZE = 8


@dataclass(frozen=True)
class Scores:
    """What a model said of tokens, one behind the other: of each a number, on the CPU.

    `ranks` is how many tokens had a higher score, of equals the lower ids; `confidences` the probability of
    the likeliest token; `positions` the place in the window of the last token that had been read.
    """

    targets: Int[Tensor, " tokens"]
    log_probabilities: Float[Tensor, " tokens"]
    ranks: Int[Tensor, " tokens"]
    confidences: Float[Tensor, " tokens"]
    positions: Int[Tensor, " tokens"]


def windows(n_tokens: int, context_length: int, stride: int) -> Iterator[tuple[int, int]]:
    """Where each window starts, and how many of its last targets it scores: each token but the first once.

    All windows are equally long; the last one overlaps as far as it must.

    >>> list(windows(n_tokens=10, context_length=4, stride=3))
    [(0, 4), (3, 3), (5, 2)]
    """
    if not 1 <= stride <= context_length:
        raise ValueError(f"stride must be from 1 to the model's {context_length} tokens, got {stride}")
    length, scored = min(context_length, n_tokens - 1), 0
    while scored < n_tokens - 1:
        new = min(stride if scored else length, n_tokens - 1 - scored)
        scored += new
        yield scored - length, new


def score_text(
    model: models.TransformerLM,
    tokens: np.ndarray,
    stride: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> Iterator[Scores]:
    """What `model` says of each token but the first, in their order. No stride: windows side by side.

    Raises FloatingPointError for a score that is not a number.
    """
    context_length = model.config.context_length
    length = min(context_length, len(tokens) - 1)
    places = list(windows(len(tokens), context_length, stride or context_length))
    for first in range(0, len(places), batch_size):
        batch = places[first : first + batch_size]
        read = np.stack([tokens[start : start + length + 1] for start, _ in batch]).astype(np.int64)
        text = torch.from_numpy(read).to(model.lm_head.weight.device)
        logits = _logits(model, text[:, :-1])
        for row, (_, n_scored) in enumerate(batch):
            yield _score(logits[row, -n_scored:], text[row, -n_scored:], length - n_scored)


def score_continuations(
    model: models.TransformerLM,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int = BATCH_SIZE,
) -> list[tuple[float, bool]]:
    """How likely the second tokens of each pair are behind the first: the sum of their log-probabilities.

    And whether each of them was the likeliest. Of first tokens that the context has no room for, the last
    are read. Shorter pairs are filled up at their end, which causal attention does not see.
    Raises FloatingPointError for a score that is not a number.
    """
    room = model.config.context_length
    if longest := max((len(second) for _, second in pairs if len(second) > room), default=0):
        raise ValueError(f"a continuation must fit into the model's {room} tokens, got {longest}")
    texts = [[*first, *second][-room - 1 :] for first, second in pairs]
    by_length = sorted(range(len(pairs)), key=lambda i: len(texts[i]), reverse=True)
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for start in range(0, len(pairs), batch_size):
        chosen = by_length[start : start + batch_size]
        width = max(2, len(texts[chosen[0]]))
        filled = torch.tensor([texts[i] + [0] * (width - len(texts[i])) for i in chosen])
        filled = filled.to(model.lm_head.weight.device)
        logits = _logits(model, filled[:, :-1])
        for row, i in enumerate(chosen):
            end = len(texts[i])
            begin = end - len(pairs[i][1])
            scores = _score(logits[row, begin - 1 : end - 1], filled[row, begin:end], begin - 1)
            found[i] = scores.log_probabilities.sum().item(), bool((scores.ranks == 0).all())
    return found


def _score(logits: Float[Tensor, "seq vocab"], targets: Int[Tensor, " seq"], position: int) -> Scores:
    """What logits say of the tokens that came; the first of them behind the token at `position`."""
    log_probabilities = F.log_softmax(F.to_float32(logits))
    if log_probabilities.isnan().any():
        raise FloatingPointError("the scores of a model must be numbers, got nan")
    own = targets[:, None]
    reached = logits.gather(-1, own)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    before = (logits > reached) | ((logits == reached) & (ids < own))
    return Scores(
        targets.cpu(),
        log_probabilities.gather(-1, own)[:, 0].double().cpu(),
        before.sum(-1).cpu(),
        log_probabilities.amax(-1).double().exp().cpu(),
        torch.arange(position, position + len(targets)),
    )


@torch.no_grad()
def _logits(
    model: models.TransformerLM, tokens: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq vocab"]:
    """What the model gives without dropout."""
    was_training = model.training
    model.eval()
    try:
        return model(tokens)
    finally:
        model.train(was_training)
