"""Instruction data packed into sequences of equal length, regardless of document boundaries.

There is no padding, but a sequence may start in the middle of a document.

    >>> format_instruction("Say red twice.").splitlines()[-1]
    '### Response:'
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from llm_basics.alignment import response_log_probs
from llm_basics.core import tokenizer as tokenizers

# the template of Stanford Alpaca, as in the public assignment
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{}\n\n### Response:\n"
)


def format_instruction(prompt: str) -> str:
    """The prompt as an instruction, up to the start of the response.

    >>> format_instruction("Add 1 and 2.")[-45:]
    '### Instruction:\\nAdd 1 and 2.\\n\\n### Response:\\n'
    """
    # not str.format of the whole, since a prompt may contain braces
    return ALPACA.replace("{}", prompt)


def end_token(tokenizer: Any) -> str:
    """The special token that ends a document: Hugging Face's `eos_token`, or this package's."""
    return getattr(tokenizer, "eos_token", None) or tokenizers.END_OF_TEXT


class PackedSFTDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sequences of `seq_length` tokens from a JSONL file with a `prompt` and a `response` in each line.

    Each line becomes an instruction, its response and the end token; all are concatenated. Item i has
    `input_ids`, the tokens from `i * seq_length`, and `labels`, shifted by one token. The incomplete rest at
    the end is dropped. `shuffle` permutes the lines first.
    """

    def __init__(
        self, tokenizer: Any, dataset_path: str | os.PathLike, seq_length: int, shuffle: bool
    ) -> None:
        lines = Path(dataset_path).read_text(encoding="utf-8").splitlines()
        pairs = [json.loads(line) for line in lines if line.strip()]
        order = torch.randperm(len(pairs)).tolist() if shuffle else range(len(pairs))
        tokens: list[int] = []
        for pair in (pairs[i] for i in order):
            text = format_instruction(pair["prompt"]) + pair["response"] + end_token(tokenizer)
            tokens += response_log_probs.encode(tokenizer, text)
        self.tokens = torch.tensor(tokens)
        self.seq_length = seq_length

    def __len__(self) -> int:
        # the last label is one token further
        return max(0, len(self.tokens) - 1) // self.seq_length

    def __getitem__(self, index: int) -> dict[str, Int[Tensor, " seq"]]:
        if not 0 <= index < len(self):
            raise IndexError(f"the index must be from 0 to {len(self) - 1}, got {index}")
        start = index * self.seq_length
        part = self.tokens[start : start + self.seq_length + 1]
        return {"input_ids": part[:-1], "labels": part[1:]}


def iterate_batches(
    dataset: Sequence[dict[str, Tensor]] | torch.utils.data.Dataset[dict[str, Tensor]],
    batch_size: int,
    shuffle: bool,
) -> list[dict[str, Int[Tensor, "batch seq"]]]:
    """One epoch: each item once, in batches of `batch_size`, the last of which may be smaller.

    >>> items = [{"input_ids": torch.tensor([i])} for i in range(3)]
    >>> [batch["input_ids"].tolist() for batch in iterate_batches(items, batch_size=2, shuffle=False)]
    [[[0], [1]], [[2]]]
    """
    n = len(dataset)  # type: ignore[arg-type]
    order = torch.randperm(n) if shuffle else torch.arange(n)
    batches = [[dataset[int(i)] for i in part] for part in order.split(batch_size)] if n else []
    return [{name: torch.stack([item[name] for item in items]) for name in items[0]} for items in batches]
