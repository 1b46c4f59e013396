"""Metrics of a model on text: loss, perplexity, bits per byte, accuracy and calibration."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from llm_basics.evaluation import log_likelihood

# bins of confidence, as in arXiv 1706.04599
N_BINS = 15


@dataclass(frozen=True)
class Bucket:
    """Mean loss of the tokens predicted from positions `first` to `last` of a window."""

    first: int
    last: int
    count: int
    loss: float


@dataclass(frozen=True)
class Bin:
    """Predictions whose confidence (probability of the most likely token) is in (`low`, `high`].

    `confidence` is the mean, `accuracy` the share of them that were correct.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Report:
    """Metrics of a model on a text (see `measure`)."""

    n_tokens: int
    n_bytes: int
    val_loss: float
    perplexity: float
    bits_per_byte: float
    accuracy: float
    top5_accuracy: float
    calibration_error: float
    by_position: list[Bucket]
    calibration: list[Bin]


def measure(scores: Iterable[log_likelihood.Scores], token_bytes: Float[Tensor, " vocab"]) -> Report:
    """Aggregate the scores of a text.

    Loss, perplexity, bits per byte and accuracy as in `evaluate`; `top5_accuracy` is the share of tokens
    among the five most likely. `by_position` has the loss at positions 0, 1, 2-3, 4-7, ... of a window.
    `calibration_error` is `sum_b n_b / n |accuracy_b - confidence_b|` over the bins `calibration` of equal
    width (expected calibration error, arXiv 1706.04599). Sums are float64, whatever the dtype of the model.
    Raises ValueError if there is no token.
    """
    # rows: count, loss; columns: binary digits of a position, at most 63
    positions = np.zeros((2, 64))
    # rows: count, confidence, correct
    bins = np.zeros((3, N_BINS))
    n_top5, n_bytes = 0, 0
    for part in scores:
        confidence, is_correct = part.confidences.numpy(), (part.ranks == 0).numpy()
        # binary digits of a position: 0, 1, 2, 2, 3, 3, 3, 3, ...
        digits = np.frexp(part.positions.numpy())[1]
        values = (None, -part.log_probabilities.numpy())
        positions += [np.bincount(digits, weights=value, minlength=64) for value in values]
        # a bin includes its upper end
        index = np.clip(np.ceil(confidence * N_BINS).astype(int) - 1, 0, N_BINS - 1)
        bins += [
            np.bincount(index, weights=value, minlength=N_BINS) for value in (None, confidence, is_correct)
        ]
        n_top5 += int((part.ranks < 5).sum())
        n_bytes += int(token_bytes[part.targets].sum())
    n_tokens, loss = positions.sum(1)
    if not n_tokens:
        raise ValueError("a text must have at least two tokens to be scored, got fewer")
    mean = loss / n_tokens
    return Report(
        n_tokens=int(n_tokens),
        n_bytes=n_bytes,
        val_loss=float(mean),
        perplexity=math.exp(min(mean, 700.0)),
        bits_per_byte=float(loss / math.log(2) / n_bytes) if n_bytes else math.nan,
        accuracy=float(bins[2].sum() / n_tokens),
        top5_accuracy=n_top5 / n_tokens,
        calibration_error=float(np.abs(bins[2] - bins[1]).sum() / n_tokens),
        by_position=[
            Bucket((1 << digits) >> 1, (1 << digits) - 1, int(count), float(total / count))
            for digits, (count, total) in enumerate(positions.T)
            if count
        ],
        calibration=[
            Bin(i / N_BINS, (i + 1) / N_BINS, int(count), float(confidence / count), float(correct / count))
            for i, (count, confidence, correct) in enumerate(bins.T)
            if count
        ],
    )
