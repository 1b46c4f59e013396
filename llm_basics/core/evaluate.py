"""Loss, perplexity, bits per byte and accuracy of a model on held-out text."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_basics.core import dataloader
from llm_basics.core import functional as F
from llm_basics.core import tokenizer as tokenizers


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]],
    token_bytes: Float[Tensor, " vocab"],
) -> dict[str, float]:
    """Metrics of next-token prediction, in evaluation mode.

    `val_loss` is the mean loss in nats; `perplexity` its exponential; `bits_per_byte` is comparable across
    tokenizers (`token_bytes` has the length of each token); `accuracy` is the share of targets with the
    highest score. Targets of `dataloader.IGNORE_INDEX` do not count.
    """
    was_training = model.training
    model.eval()
    loss = correct = n_bytes = 0.0
    n_tokens = 0
    for inputs, targets in batches:
        counted = targets[targets != dataloader.IGNORE_INDEX]
        batch_loss, n_correct = batch_metrics(model, inputs, targets)
        loss, correct = loss + batch_loss, correct + n_correct
        n_bytes += token_bytes[counted].sum().item()
        n_tokens += counted.numel()
    model.train(was_training)
    mean, n_tokens = loss / max(n_tokens, 1), max(n_tokens, 1)
    return {
        "val_loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "bits_per_byte": loss / math.log(2) / max(n_bytes, 1),
        "accuracy": correct / n_tokens,
    }


def batch_metrics(
    model: nn.Module, inputs: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"]
) -> tuple[float, int]:
    """The summed loss of a batch, and the number of targets with the highest score."""
    logits, n_targets = F.to_float32(model(inputs)), int((targets != dataloader.IGNORE_INDEX).sum())
    return F.cross_entropy(logits, targets).item() * n_targets, int((logits.argmax(-1) == targets).sum())


def token_lengths(tokenizer: tokenizers.Tokenizer, size: int) -> Float[Tensor, " vocab"]:
    """Number of bytes of each of `size` token ids; 0 for special tokens."""
    lengths = torch.zeros(size)
    for id, token in tokenizer.vocab.items():
        lengths[id] = len(token)
    for special in tokenizer.special_tokens:
        lengths[tokenizer.special_id(special)] = 0
    return lengths


def unigram_entropy(tokens: np.ndarray) -> float:
    """The entropy of the token frequencies in nats: the loss of the best context-free model.

    >>> unigram_entropy(np.array([5, 7, 5, 7])) == math.log(2)
    True
    """
    counts = np.unique(tokens, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())
