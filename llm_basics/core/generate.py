"""Text generation: logits processors, sampling and `generate`.

A logits processor changes the logits of the next token before temperature, top-k and top-p are applied.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_basics.core import functional as F
from llm_basics.core import model as models

# ids of the sequence so far and logits of the next token -> processed logits
LogitsFunction = Callable[[Int[Tensor, " seq"], Float[Tensor, " vocab"]], Float[Tensor, " vocab"]]


def penalize_repetition(
    logits: Float[Tensor, " vocab"], ids: Int[Tensor, " seq"], penalty: float
) -> Float[Tensor, " vocab"]:
    """Make ids of the sequence less likely: divide their logits by `penalty` if positive, else multiply
    (arXiv 1909.05858).

    >>> penalize_repetition(torch.tensor([3.0, -1.0, 2.0]), torch.tensor([0, 1, 0]), 2.0)
    tensor([ 1.5000, -2.0000,  2.0000])
    """
    if not 0 < penalty < math.inf:
        raise ValueError(f"repetition_penalty must be above 0, got {penalty}")
    seen = logits[ids]
    return logits.index_put((ids,), torch.where(seen < 0, seen * penalty, seen / penalty))


def keep_likely(
    logits: Float[Tensor, " vocab"], min_p: float, temperature: float = 1.0
) -> Float[Tensor, " vocab"]:
    """Keep tokens with at least `min_p` times the highest probability at this temperature; the logits of all
    others become -inf (min-p sampling, arXiv 2407.01082).

    >>> keep_likely(torch.tensor([0.6, 0.1, 0.3]).log(), min_p=0.5)
    tensor([-0.5108,    -inf, -1.2040])
    """
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be from 0 to 1, got {min_p}")
    if min_p == 0:
        return logits
    return logits.masked_fill(logits < logits.max() + temperature * math.log(min_p), -math.inf)


@dataclass(frozen=True)
class LogitsProcessor:
    """Repetition penalty, then min-p: a logits processor for the `adjust` of `generate`."""

    temperature: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __call__(self, ids: Int[Tensor, " seq"], logits: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
        """Process the logits of the token after `ids`."""
        logits = penalize_repetition(logits, ids, self.repetition_penalty)
        return keep_likely(logits, self.min_p, self.temperature)


# --------------------------------------------------------------------------------------------------
# Generating


def next_token_probabilities(
    logits: Float[Tensor, "... vocab"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, "... vocab"]:
    """The sampling distribution of the next token.

    `temperature` divides the logits: below 1 sharpens the distribution, 0 is greedy. `top_k` keeps the k
    likeliest tokens. `top_p` keeps the smallest set of likeliest tokens whose probability reaches p (nucleus
    sampling, arXiv 1904.09751). Among equally likely tokens, lower ids rank first.

    >>> next_token_probabilities(torch.tensor([0.5, 0.2, 0.3]).log(), top_p=0.6)
    tensor([0.6250, 0.0000, 0.3750])
    """
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if temperature == 0:
        temperature, top_k = 1.0, 1
    # with a maximum of 0, a tiny temperature cannot cause overflow
    shifted = logits.float() - logits.float().amax(-1, keepdim=True)
    probabilities = F.softmax(shifted / temperature)
    if top_k is None and top_p is None:
        return probabilities
    probabilities, ids = probabilities.sort(descending=True, stable=True)
    if top_k is not None:
        probabilities[..., top_k:] = 0
    if top_p is not None:
        total = probabilities.sum(-1, keepdim=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before >= top_p * total] = 0
    probabilities /= probabilities.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, ids, probabilities)


def sample(probabilities: Float[Tensor, " vocab"], generator: torch.Generator | None = None) -> int:
    """Sample a token id, on the CPU, where a seed determines the result on every machine."""
    probabilities = probabilities.cpu()
    try:
        return int(torch.multinomial(probabilities, 1, generator=generator))
    except RuntimeError:
        raise FloatingPointError("probabilities must be finite, got nan (from the model's weights)") from None


@torch.no_grad()
def generate(
    model: models.TransformerLM,
    prompt: Int[Tensor, " seq"],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_id: int | None = None,
    generator: torch.Generator | None = None,
    adjust: LogitsFunction | None = None,
) -> Iterator[int]:
    """Continue `prompt` token by token, until `stop_id`, which is not yielded, or `max_new_tokens`.

    Keys and values of earlier tokens are cached. Once the sequence is longer than the context, the last
    `context_length` tokens are recomputed for each new one. `adjust` is a logits processor, which maps all
    ids and the logits of the next token to the logits to sample from.
    """
    if prompt.numel() == 0:
        raise ValueError("the prompt must have at least one token, got none")
    was_training = model.training
    model.eval()
    context_length = model.config.context_length
    tokens = prompt[None]
    caches = model.make_kv_caches(batch=1)
    try:
        for _ in range(max_new_tokens):
            if tokens.shape[-1] <= context_length:
                logits = model(tokens[:, caches[0].length :], caches=caches)[0, -1]
            else:
                logits = model(tokens[:, -context_length:])[0, -1]
            if adjust is not None:
                logits = adjust(tokens[0], logits)
            probabilities = next_token_probabilities(logits, temperature, top_k, top_p)
            token = sample(probabilities, generator)
            if token == stop_id:
                return
            tokens = torch.cat([tokens, tokens.new_tensor([[token]])], dim=-1)
            yield token
    finally:
        model.train(was_training)
