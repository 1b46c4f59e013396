"""How good is a model on text that it has not seen?

uv run python -m llm_basics.evaluate runs/NAME --choices questions.jsonl --out report.json
"""

import sys

from llm_basics import command_line, programs

if __name__ == "__main__":
    # before torch is loaded, which takes seconds: --help and mistakes answer at once
    OPTIONS = command_line.program_options(
        programs.EvaluateConfig(), sys.argv[1:], prog="python -m llm_basics.evaluate"
    )
    command_line.spin_less()

import importlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_basics import data, likelihood
from llm_basics import functional as F
from llm_basics import tokenizer as tokenizers

# of confidence, as in arXiv 1706.04599
N_BINS = 15


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]],
    token_bytes: Float[Tensor, " vocab"],
) -> dict[str, float]:
    """Mean loss of the next token in nats, and what it means.

    `val_loss`; `perplexity` is its exponential, as if the model chose evenly among so many tokens;
    `bits_per_byte` does not depend on the tokenizer (`token_bytes` says how many bytes each token is);
    `accuracy` is the share of tokens that had the highest score. Targets of `data.IGNORED` count nowhere.
    Dropout is off meanwhile.
    """
    was_training = model.training
    model.eval()
    loss = correct = n_bytes = 0.0
    n_tokens = 0
    for inputs, targets in batches:
        logits = F.widen(model(inputs))
        counted = targets[targets != data.IGNORED]
        loss += F.cross_entropy(logits, targets).item() * counted.numel()
        correct += (logits.argmax(-1) == targets).sum().item()
        n_bytes += token_bytes[counted].sum().item()
        n_tokens += counted.numel()
    model.train(was_training)
    mean = loss / n_tokens
    return {
        "val_loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "bits_per_byte": loss / math.log(2) / n_bytes,
        "accuracy": correct / n_tokens,
    }


def token_lengths(tokenizer: tokenizers.Tokenizer, size: int) -> Float[Tensor, " vocab"]:
    """How many bytes of text each of `size` token ids stands for; special tokens stand for none."""
    lengths = torch.zeros(size)
    for id, token in tokenizer.vocab.items():
        lengths[id] = len(token)
    for special in tokenizer.special_tokens:
        lengths[tokenizer.special_id(special)] = 0
    return lengths


def unigram_entropy(tokens: np.ndarray) -> float:
    """The entropy of the token frequencies, in nats: the loss of a model that knows nothing else.

    >>> unigram_entropy(np.array([5, 7, 5, 7])) == math.log(2)
    True
    """
    counts = np.unique(tokens, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


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


def measure(scores: Iterable[likelihood.Scores], token_bytes: Float[Tensor, " vocab"]) -> Report:
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


if __name__ == "__main__":
    # the program uses what stands on the floors above this one
    sys.exit(importlib.import_module("llm_basics.evaluate_cli").main(OPTIONS))
