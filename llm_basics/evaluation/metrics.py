"""How good is a model on text that it has not seen?

uv run python -m llm_basics.evaluate runs/NAME --choices questions.jsonl --out report.json
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from llm_basics.evaluation import log_likelihood

# of confidence, as in arXiv 1706.04599
N_BINS = 15


# --------------------------------------------------------------------------------------------------
# All that can be told of a text


@dataclass(frozen=True)
class Bucket:
    """The tokens that came when the last token read stood from `first` to `last` in its window."""

    first: int
    last: int
    count: int
    loss: float


@dataclass(frozen=True)
class Bin:
    """The tokens before which the likeliest had a probability above `low`, and up to `high`.

    `confidence` is the mean of these probabilities, `accuracy` how often the likeliest token came.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Report:
    """What `measure` found."""

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
    """Sum up what a model said of a text.

    Loss, perplexity, bits per byte and accuracy as in `evaluate`; `top5_accuracy` is the share of tokens that
    were among the five likeliest. `by_position` has the loss at the places 0, 1, 2-3, 4-7, ... of a window.
    `calibration_error` is `sum_b n_b / n |accuracy_b - confidence_b|` over the bins `calibration` of equal
    width (expected calibration error, arXiv 1706.04599). Sums are float64, whatever the model computes in.
    Raises ValueError if there is no token.
    """
    # count, loss; an int has 63 bits
    positions = np.zeros((2, 64))
    # count, confidence, correct
    bins = np.zeros((3, N_BINS))
    n_top5, n_bytes = 0, 0
    for part in scores:
        confidence, is_first = part.confidences.numpy(), (part.ranks == 0).numpy()
        # 0, 1, 2, 2, 3, 3, 3, 3, ...: how many binary digits a position has
        digits = np.frexp(part.positions.numpy())[1]
        values = (None, -part.log_probabilities.numpy())
        positions += [np.bincount(digits, weights=value, minlength=64) for value in values]
        # of a bin its upper end is a part
        place = np.clip(np.ceil(confidence * N_BINS).astype(int) - 1, 0, N_BINS - 1)
        bins += [
            np.bincount(place, weights=value, minlength=N_BINS) for value in (None, confidence, is_first)
        ]
        n_top5 += int((part.ranks < 5).sum())
        n_bytes += int(token_bytes[part.targets].sum())
    n_tokens, loss = positions.sum(1)
    if not n_tokens:
        raise ValueError("a text must have at least two tokens, of which the second is predicted")
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
            Bin(place / N_BINS, (place + 1) / N_BINS, int(count), float(sure / count), float(right / count))
            for place, (count, sure, right) in enumerate(bins.T)
            if count
        ],
    )
