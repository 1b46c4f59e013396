"""The probability of a response under a model: tokens with a mask, log-probabilities, masked means.

Every method of post-training compares log-probabilities of responses. Prompt and response are one sequence;
the model predicts each of its tokens from those before it, and `response_mask` marks the predictions that
belong to the response. Padding is at the end, where a causal model ignores it.

Models return logits, or an object with `logits`; tokenizers are of this package or of Hugging Face.

    >>> uniform = lambda tokens: torch.zeros(*tokens.shape, 4)
    >>> tokens = torch.tensor([[0, 1, 2]])
    >>> get_response_log_probs(uniform, tokens[:, :-1], tokens[:, 1:])["log_probs"]  # log(1 / 4)
    tensor([[-1.3863, -1.3863]])
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_basics.core import functional as F


def encode(tokenizer: Any, text: str) -> list[int]:
    """The ids of `text` as a part of a sequence, without tokens that mark its start or end.

    >>> from llm_basics.core import tokenizer
    >>> encode(tokenizer.Tokenizer.byte_level(), "Hi")
    [72, 105]
    """
    is_hugging_face = hasattr(tokenizer, "pad_token_id")
    return tokenizer.encode(text, add_special_tokens=False) if is_hugging_face else tokenizer.encode(text)


def tokenize_prompt_and_output(
    prompt_strs: Sequence[str], output_strs: Sequence[str], tokenizer: Any
) -> dict[str, Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"]]:
    """Each prompt followed by its output, as `input_ids`, `labels` (the next token) and `response_mask`.

    Both are encoded separately, so that no token spans the boundary between them. The mask is True where the
    label is a token of the output. Shorter sequences are padded at the end.

    >>> from llm_basics.core import tokenizer
    >>> found = tokenize_prompt_and_output(["ab", "a"], ["c", "bcd"], tokenizer.Tokenizer.byte_level())
    >>> found["labels"]
    tensor([[ 98,  99,   0],
            [ 98,  99, 100]])
    >>> found["response_mask"]
    tensor([[False,  True, False],
            [ True,  True,  True]])
    """
    prompts = [encode(tokenizer, text) for text in prompt_strs]
    outputs = [encode(tokenizer, text) for text in output_strs]
    sequences = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
    longest = max(map(len, sequences))
    # any id is valid, since the mask is False there, and a tokenizer may lack a padding token
    padding = getattr(tokenizer, "pad_token_id", None) or 0
    tokens = torch.full((len(sequences), longest), padding)
    is_response = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
        is_response[row, len(prompt) : len(sequence)] = True
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "response_mask": is_response[:, 1:]}


def compute_entropy(logits: Float[Tensor, "... vocab"]) -> Float[Tensor, "..."]:
    """The entropy of the next-token distribution in nats: `-sum_v p_v log p_v`.

    >>> compute_entropy(torch.tensor([0.0, 0.0]))  # log 2
    tensor(0.6931)
    """
    log_probs = F.log_softmax(F.to_float32(logits))
    return -(log_probs.exp() * log_probs).sum(-1)


def get_response_log_probs(
    model: Callable[..., Any],
    input_ids: Int[Tensor, "batch seq"],
    labels: Int[Tensor, "batch seq"],
    return_token_entropy: bool = False,
) -> dict[str, Float[Tensor, "batch seq"]]:
    """`log_probs`, `log p(label_t | input_ids up to t)` of each token, and `token_entropy` if requested.

    Prompt and padding are not masked; the caller masks them. Half precision is computed in float32. The
    model's mode is unchanged: dropout must be off if it was off in the rollout.
    """
    output = model(input_ids)
    logits = F.to_float32(getattr(output, "logits", output))
    log_probs = F.log_softmax(logits).gather(-1, labels[..., None]).squeeze(-1)
    return {"log_probs": log_probs} | (
        {"token_entropy": compute_entropy(logits)} if return_token_entropy else {}
    )


def masked_normalize(
    tensor: Float[Tensor, "..."],
    mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | Int[Tensor, "..."],
    dim: int | None = None,
    normalize_constant: int | float = 1.0,
) -> Float[Tensor, "..."]:
    """The sum of the elements where `mask` is 1, along `dim` or of all, divided by a constant.

    Masked elements may be infinite or NaN.

    >>> masked_normalize(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[1, 1, 0]]), 1, normalize_constant=4)
    tensor([0.7500])
    """
    kept = tensor.masked_fill(mask == 0, 0.0)
    return (kept.sum() if dim is None else kept.sum(dim)) / normalize_constant


def masked_mean(
    tensor: Float[Tensor, "..."],
    mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | Int[Tensor, "..."],
    dim: int | None = None,
) -> Float[Tensor, "..."]:
    """The mean of the elements where `mask` is 1, along `dim` or of all; 0 without such elements.

    >>> masked_mean(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1, 1, 0]]), dim=1)
    tensor([2.])
    """
    counts = (mask != 0).sum() if dim is None else (mask != 0).sum(dim)
    # 0 for an empty response, instead of NaN, which would propagate to the whole batch
    return masked_normalize(tensor, mask, dim) / counts.clamp(min=1)
