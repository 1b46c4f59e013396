"""Conversations to batches for supervised fine-tuning (SFT), with loss on assistant tokens only.

Conversations are stored as token files, rendered by `chat_template`; the loss mask is recovered from the
special tokens, which content cannot contain. A row of a batch is one conversation, padded to about the
longest of the batch, or several, packed to the context length. Targets outside the loss mask are ignored.
"""

import bisect
import dataclasses
import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from llm_basics.core import config, dataloader, files
from llm_basics.core import tokenizer as tokenizers
from llm_basics.data import chat_template, documents, prepare, shards, synthetic_qa
from llm_basics.runs import console

# incremented when the token files of the same conversations change
VERSION = 1

# batches are padded to a multiple of this, to limit the number of shapes
WIDTH_STEP = 8

# rows are sorted by length within groups of this many batches
SORTED_BATCHES = 4

# --------------------------------------------------------------------------------------------------
# Conversations -> token files


def prepare_conversations(
    options: config.Config, log: Callable[[str], None] = console.print_line
) -> prepare.Prepared:
    """The token files of the conversations in `options.data`, written unless they are cached.

    The split depends on the prompts alone, so no prompt is on both sides.
    """
    source = options.tokenizer if options.resume is None else f"{options.resume}/tokenizer"
    tokenizer = chat_template.with_specials(prepare.load_tokenizer(source))
    conversations = load_conversations(options.data, options.on_bad_utf8)
    prompts = [json.dumps([(m.role, m.content) for m in c if m.role != "assistant"]) for c in conversations]
    if len(set(prompts)) < 2:
        raise ValueError(f"--data must hold at least two prompts, got {len(set(prompts))} in {options.data}")
    folder = Path(options.data_dir) / _key(options, conversations, tokenizer)
    if not (folder / "meta.json").exists():
        log(f"reading {options.data}: {len(conversations):,} conversations")
        stats, digests = documents.SplitStats(), [documents.digest(prompt) for prompt in prompts]
        for prompt, digest in zip(prompts, digests, strict=True):
            stats.add(documents.Document(options.data, prompt), digest)
        split = stats.split(options.val_fraction)
        for name, is_val, size in (("train", False, shards.SHARD_TOKENS), ("val", True, sys.maxsize)):
            rendered = (
                _render(tokenizer, conversation)
                for conversation, digest in zip(conversations, digests, strict=True)
                if split.holds_out(digest) == is_val
            )
            shards.write_shards(folder, name, rendered, tokenizer.vocab_size, tokenizer.fingerprint(), size)
        tokenizer.save(folder / "tokenizer")
        # written last: an interrupted folder lacks this file and is written again
        about = {"data": options.data, "conversations": len(conversations)}
        files.write(folder / "meta.json", json.dumps(about) + "\n")
    return prepare.load(folder)


def load_conversations(source: str, on_bad_utf8: str | None = None) -> list[list[chat_template.Message]]:
    """The conversations of a file (`chat_template.read_conversations`), or `demo` (`synthetic_qa`)."""
    if source == "demo":
        return [as_messages(pair) for pair in synthetic_qa.all_pairs()]
    if not Path(source).is_file():
        raise ValueError(f"--data must be a file of conversations, or demo, got {source}")
    return chat_template.read_conversations(source, on_bad_utf8)


def as_messages(pair: synthetic_qa.QAPair) -> list[chat_template.Message]:
    """A question and its answer as a conversation."""
    return [chat_template.Message("user", pair.question), chat_template.Message("assistant", pair.answer)]


def _render(
    tokenizer: tokenizers.Tokenizer, messages: Sequence[chat_template.Message]
) -> tuple[list[int], int]:
    """Ids of a conversation, and the byte length of its contents."""
    ids, _ = chat_template.render(tokenizer, messages)
    return ids, sum(len(tokenizers.replace_surrogates(m.content).encode("utf-8")) for m in messages)


def _key(
    options: config.Config,
    conversations: Sequence[Sequence[chat_template.Message]],
    tokenizer: tokenizers.Tokenizer,
) -> str:
    """The cache folder: its name changes with the conversations, the split and the tokenizer."""
    settings = [VERSION, options.val_fraction, tokenizer.fingerprint()]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for messages in conversations:
        digest.update(json.dumps([dataclasses.astuple(message) for message in messages]).encode())
    return re.sub(r"[^\w.-]+", "_", f"{Path(options.data).stem}-chat-{digest.hexdigest()[:12]}")


# --------------------------------------------------------------------------------------------------
# Token files -> rows


@dataclass(frozen=True)
class Example:
    """Ids of a row, and its loss mask."""

    ids: Int[np.ndarray, " n"]
    loss_mask: Bool[np.ndarray, " n"]


@dataclass(frozen=True)
class Rows:
    """Conversations as rows, and the numbers of truncated and dropped conversations."""

    rows: list[Example]
    n_cut: int
    n_left_out: int


def rows_of(parts: Sequence[shards.Shard], tokenizer: tokenizers.Tokenizer, most: int) -> Rows:
    """The conversations of token files, each truncated to `most` ids, or dropped if no loss would remain."""
    rows, n_cut, n_left_out = [], 0, 0
    for part in parts:
        for start, end in zip([0, *part.document_ends[:-1]], part.document_ends, strict=True):
            ids = part.tokens[int(start) : int(end)].astype(np.int64)
            row = truncate(Example(ids, loss_mask(ids, tokenizer)), tokenizer, most)
            n_left_out += row is None
            n_cut += row is not None and len(row.ids) < len(ids)
            rows += [] if row is None else [row]
    return Rows(rows, n_cut, n_left_out)


def loss_mask(ids: Int[np.ndarray, " n"], tokenizer: tokenizers.Tokenizer) -> Bool[np.ndarray, " n"]:
    """The loss mask of `chat_template.render`: ids after `<|assistant|>` up to the next role token."""
    starts = np.flatnonzero(message_starts(ids, tokenizer))
    mask = np.zeros(len(ids), dtype=bool)
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        mask[start + 1 : end] = ids[start] == tokenizer.special_id("<|assistant|>")
    return mask


def message_starts(ids: Int[np.ndarray, " n"], tokenizer: tokenizers.Tokenizer) -> Bool[np.ndarray, " n"]:
    """Whether each id is a role token."""
    return np.isin(ids, [tokenizer.special_id(f"<|{role}|>") for role in chat_template.ROLES])


def truncate(row: Example, tokenizer: tokenizers.Tokenizer, most: int) -> Example | None:
    """The row with at most `most` ids; None if the loss mask would be empty.

    The oldest messages are dropped first. If the last prompt and its answer are still too long, the answer is
    truncated at its end, without `<|end|>`.
    """
    last = int(np.flatnonzero(row.loss_mask)[-1]) + 1
    starts = np.flatnonzero(message_starts(row.ids, tokenizer)).tolist()
    # the prompt is the message before the last answer
    answer = max(i for i, start in enumerate(starts) if start < last)
    start = next((s for s in starts[: max(answer, 1)] if last - s <= most), starts[max(answer - 1, 0)])
    end = min(last, start + most)
    if not row.loss_mask[start:end].any():
        return None
    return Example(row.ids[start:end], row.loss_mask[start:end])


def pack(rows: Sequence[Example], most: int) -> list[Example]:
    """Concatenate rows to at most `most` ids each: best-fit decreasing bin packing.

    Attention is not masked between the conversations of a row, as in pretraining.
    """
    bins: list[list[Example]] = []
    free: list[tuple[int, int]] = []  # (free ids, bin), ascending
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        best = bisect.bisect_left(free, (len(row.ids), 0))
        if best == len(free):
            bins.append([])
            n_free, number = most, len(bins) - 1
        else:
            n_free, number = free.pop(best)
        bins[number].append(row)
        bisect.insort(free, (n_free - len(row.ids), number))
    joined = [[(row.ids, row.loss_mask) for row in packed] for packed in bins]
    return [Example(*(np.concatenate(part) for part in zip(*packed, strict=True))) for packed in joined]


# --------------------------------------------------------------------------------------------------
# Rows -> batches


class Batches:
    """Batches of rows; the order is a pure function of (seed, epoch, step).

    Each epoch shuffles the rows, sorts groups of batches by length to reduce padding, and shuffles the
    batches. Rows that do not fill the last batch are dropped in this epoch.
    """

    def __init__(
        self,
        rows: Sequence[Example],
        batch_size: int,
        context_length: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rows = list(rows)
        self.context_length = context_length
        self.shards = [row.ids for row in self.rows]
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.rows_per_epoch = max(len(self.rows) // batch_size, 1) * batch_size
        self._lengths = np.array([len(row.ids) for row in self.rows])
        self._order = functools.lru_cache(maxsize=2)(self._arrange)

    def starting_at(self, first: int) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
        """The batch that begins with row number `first`, counted from the start of training."""
        rows = [self.rows[index] for index in self.indices_from(first)]
        return collate(rows, self.context_length, self.device)

    def indices_from(self, first: int) -> list[int]:
        """The indices in `rows` of the batch that begins with row number `first`."""
        numbers = (divmod(number, self.rows_per_epoch) for number in range(first, first + self.batch_size))
        return [int(self._order(epoch)[index]) for epoch, index in numbers]

    def _arrange(self, epoch: int) -> Int[np.ndarray, " rows"]:
        """The order of the rows in `epoch`; repeated if they are fewer than a batch."""
        rng = np.random.default_rng((self.seed, epoch))
        order = np.resize(rng.permutation(len(self.rows)), self.rows_per_epoch)
        group = np.arange(len(order)) // (self.batch_size * SORTED_BATCHES)
        batches = order[np.lexsort((self._lengths[order], group))].reshape(-1, self.batch_size)
        return rng.permutation(batches).reshape(-1)


def collate(
    rows: Sequence[Example], context_length: int, device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Inputs and next-token targets, padded on the right; targets outside the loss mask are ignored.

    >>> rows = [Example(np.array([7, 5, 6]), np.array([0, 0, 1]) > 0), Example(np.arange(2), np.ones(2) > 0)]
    >>> collate(rows, context_length=3)[1]
    tensor([[-100,    6, -100],
            [   1, -100, -100]])
    """
    longest = max(len(row.ids) - 1 for row in rows)
    width = min(-(-longest // WIDTH_STEP) * WIDTH_STEP, context_length)
    inputs = np.zeros((len(rows), width), dtype=np.int64)
    targets = np.full((len(rows), width), dataloader.IGNORE_INDEX)
    for i, row in enumerate(rows):
        n = len(row.ids) - 1
        inputs[i, :n] = row.ids[:-1]
        targets[i, :n] = np.where(row.loss_mask[1:], row.ids[1:], dataloader.IGNORE_INDEX)
    return torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)


def sequential_batches(
    rows: Sequence[Example],
    batch_size: int,
    context_length: int,
    max_batches: int,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]]:
    """All rows sorted by length, or an evenly spaced subset of `max_batches` batches."""
    chosen = evenly(sorted(rows, key=lambda row: len(row.ids)), max_batches * batch_size)
    for i in range(0, len(chosen), batch_size):
        yield collate(chosen[i : i + batch_size], context_length, device)


def evenly(items: Sequence[Example], most: int) -> list[Example]:
    """At most `most` of the items, evenly spaced."""
    indices = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[index] for index in indices]
