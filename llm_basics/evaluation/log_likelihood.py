"""Log-likelihood of texts and continuations, token by token.

A text longer than the context is scored in windows that start `stride` tokens apart; each window scores the
tokens that no earlier window has scored. With disjoint windows (a stride of the whole context), the first
token of a window is predicted from one token alone; with overlapping windows every token has at least
`context_length - stride` tokens of context, at `context_length / stride` times the cost.

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
from llm_basics.inference import quantized_model

BATCH_SIZE = 8


@dataclass(frozen=True)
class Scores:
    """Scores of consecutive tokens, on the CPU.

    `ranks` counts the tokens with a higher logit (ties: a lower id); `confidences` is the probability of the
    most likely token; `positions` is the position in the window that a token was predicted from.
    """

    targets: Int[Tensor, " tokens"]
    log_probabilities: Float[Tensor, " tokens"]
    ranks: Int[Tensor, " tokens"]
    confidences: Float[Tensor, " tokens"]
    positions: Int[Tensor, " tokens"]


def windows(n_tokens: int, context_length: int, stride: int) -> Iterator[tuple[int, int]]:
    """Start of each window and the number of its last targets to score: each token but the first once.

    All windows have the same length; the last one overlaps as far as needed.

    >>> list(windows(n_tokens=10, context_length=4, stride=3))
    [(0, 4), (3, 3), (5, 2)]
    """
    if not 1 <= stride <= context_length:
        raise ValueError(f"stride must be from 1 to {context_length} tokens (the context), got {stride}")
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
    """Score each token but the first, in order. Without a stride, windows are disjoint.

    Raises FloatingPointError if a score is NaN.
    """
    context_length = model.config.context_length
    length = min(context_length, len(tokens) - 1)
    spans = list(windows(len(tokens), context_length, stride or context_length))
    for first in range(0, len(spans), batch_size):
        batch = spans[first : first + batch_size]
        read = np.stack([tokens[start : start + length + 1] for start, _ in batch]).astype(np.int64)
        text = torch.from_numpy(read).to(model.token_embeddings.weight.device)
        logits = _logits(model, text[:, :-1])
        for row, (_, n_scored) in enumerate(batch):
            yield _score(logits[row, -n_scored:], text[row, -n_scored:], length - n_scored)


def score_continuations(
    model: models.TransformerLM,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int = BATCH_SIZE,
) -> list[tuple[float, bool]]:
    """The log-probability of each continuation after its context, and whether it is the greedy one.

    A context that is too long is truncated from the left. Shorter pairs are padded on the right, which causal
    attention ignores. Raises FloatingPointError if a score is NaN.
    """
    limit = model.config.context_length
    if longest := max((len(tokens) for _, tokens in pairs if len(tokens) > limit), default=0):
        raise ValueError(f"a continuation must have at most {limit} tokens (the context), got {longest}")
    texts = [[*context, *continuation][-limit - 1 :] for context, continuation in pairs]
    by_length = sorted(range(len(pairs)), key=lambda i: len(texts[i]), reverse=True)
    results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for start in range(0, len(pairs), batch_size):
        batch = by_length[start : start + batch_size]
        width = max(2, len(texts[batch[0]]))
        padded = torch.tensor([texts[i] + [0] * (width - len(texts[i])) for i in batch])
        padded = padded.to(model.token_embeddings.weight.device)
        logits = _logits(model, padded[:, :-1])
        for row, i in enumerate(batch):
            end = len(texts[i])
            begin = end - len(pairs[i][1])
            scores = _score(logits[row, begin - 1 : end - 1], padded[row, begin:end], begin - 1)
            results[i] = scores.log_probabilities.sum().item(), bool((scores.ranks == 0).all())
    return results


def _score(logits: Float[Tensor, "seq vocab"], targets: Int[Tensor, " seq"], position: int) -> Scores:
    """Scores of `targets`, the first of which was predicted from `position`."""
    log_probabilities = F.log_softmax(F.to_float32(logits))
    if log_probabilities.isnan().any():
        raise FloatingPointError("log-probabilities must be numbers, got nan (from the logits of the model)")
    column = targets[:, None]
    target_logits = logits.gather(-1, column)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    higher = (logits > target_logits) | ((logits == target_logits) & (ids < column))
    return Scores(
        targets.cpu(),
        log_probabilities.gather(-1, column)[:, 0].double().cpu(),
        higher.sum(-1).cpu(),
        log_probabilities.amax(-1).double().exp().cpu(),
        torch.arange(position, position + len(targets)),
    )


@torch.no_grad()
def _logits(
    model: models.TransformerLM, tokens: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq vocab"]:
    """Logits in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        # keys and values are quantized when they are cached, in one pass or token by token
        if quantized_model.has_int8_cache(model):
            return model(tokens, caches=model.make_kv_caches(len(tokens)))
        return model(tokens)
    finally:
        model.train(was_training)
