"""From conversations to batches in which only answers are learned.

Conversations are kept as token files, rendered by `chat`; who speaks, and so what is learned, is read off the
special tokens, which no content can hold. A row of a batch is one conversation, padded to about the longest
beside it; or several, packed into as many tokens as the model sees. What is not learned has the target
`data.IGNORED`.
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

# changes when the same conversations would be prepared differently
VERSION = 1

# batches are as wide as a multiple of this, so that there are few shapes
WIDTH_STEP = 8

# rows of similar length are sought among those of so many batches
SORTED_BATCHES = 4

# --------------------------------------------------------------------------------------------------
# Conversations -> token files


def prepare_conversations(options: config.Config, log: Callable[[str], None] = print) -> prepare.Prepared:
    """Render the conversations that `options` name, or find them rendered.

    What was asked decides what is held out, not what was answered: a question is never on both sides.
    """
    source = options.tokenizer if options.resume is None else f"{options.resume}/tokenizer"
    tokenizer = chat_template.with_specials(prepare.load_tokenizer(source))
    conversations = read(options.data, options.on_bad_utf8)
    asked = [json.dumps([(m.role, m.content) for m in c if m.role != "assistant"]) for c in conversations]
    if len(set(asked)) < 2:
        raise ValueError(f"--data must hold two questions or more, got {len(set(asked))} in {options.data}")
    folder = Path(options.data_dir) / _key(options, conversations, tokenizer)
    if not (folder / "meta.json").exists():
        log(f"reading {options.data}: {len(conversations):,} conversations")
        survey, digests = documents.SplitStats(), [documents.digest(text) for text in asked]
        for text, digest in zip(asked, digests, strict=True):
            survey.add(documents.Document(options.data, text), digest)
        split = survey.split(options.val_fraction)
        held_out = [split.holds_out(digest) for digest in digests]
        for name, wanted, size in (("train", False, shards.SHARD_TOKENS), ("val", True, sys.maxsize)):
            part = (
                c for c, is_held_out in zip(conversations, held_out, strict=True) if is_held_out == wanted
            )
            rendered = (_render(tokenizer, conversation) for conversation in part)
            shards.write_shards(folder, name, rendered, tokenizer.vocab_size, tokenizer.fingerprint(), size)
        tokenizer.save(folder / "tokenizer")
        # written last: a folder without it was interrupted and is made again
        about = {"data": options.data, "conversations": len(conversations)}
        files.write(folder / "meta.json", json.dumps(about) + "\n")
    return prepare.load(folder)


def read(source: str, on_bad_utf8: str | None = None) -> list[list[chat_template.Message]]:
    """The conversations that `source` names: a file (`chat.read`), or `demo`, made by `questions`."""
    if source == "demo":
        pairs = [(question.asked, question.answer) for question in synthetic_qa.all_questions()]
        return [
            [chat_template.Message("user", asked), chat_template.Message("assistant", answer)]
            for asked, answer in pairs
        ]
    if not Path(source).is_file():
        raise ValueError(f"--data must be a file of conversations, or demo, got {source}")
    return chat_template.read(source, on_bad_utf8)


def _render(
    tokenizer: tokenizers.Tokenizer, messages: Sequence[chat_template.Message]
) -> tuple[list[int], int]:
    ids, _ = chat_template.render(tokenizer, messages)
    return ids, sum(
        len(tokenizers.replace_surrogates(message.content).encode("utf-8")) for message in messages
    )


def _key(
    options: config.Config,
    conversations: Sequence[Sequence[chat_template.Message]],
    tokenizer: tokenizers.Tokenizer,
) -> str:
    """A folder name that changes with the conversations, the split and the tokenizer."""
    settings = [VERSION, options.val_fraction, tokenizer.fingerprint()]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for messages in conversations:
        digest.update(json.dumps([dataclasses.astuple(message) for message in messages]).encode())
    return re.sub(r"[^\w.-]+", "_", f"{Path(options.data).stem}-chat-{digest.hexdigest()[:12]}")


# --------------------------------------------------------------------------------------------------
# Token files -> rows


@dataclass(frozen=True)
class Example:
    """Ids, and which of them are learned."""

    ids: Int[np.ndarray, " n"]
    loss_mask: Bool[np.ndarray, " n"]


@dataclass(frozen=True)
class Rows:
    """The conversations of a token file as rows, and how many were cut or left out to be short enough."""

    rows: list[Example]
    n_cut: int
    n_left_out: int


def rows_of(parts: Sequence[shards.Shard], tokenizer: tokenizers.Tokenizer, most: int) -> Rows:
    """The conversations of token files, each cut to `most` ids; a question that fills these is left out."""
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
    """Which ids are learned, as `chat.render` says: those behind `<|assistant|>` up to the next role."""
    places = np.flatnonzero(begins(ids, tokenizer))
    is_learned = np.zeros(len(ids), dtype=bool)
    for start, end in zip(places, [*places[1:], len(ids)], strict=True):
        is_learned[start + 1 : end] = ids[start] == tokenizer.special_id("<|assistant|>")
    return is_learned


def begins(ids: Int[np.ndarray, " n"], tokenizer: tokenizers.Tokenizer) -> Bool[np.ndarray, " n"]:
    """Where messages begin."""
    return np.isin(ids, [tokenizer.special_id(f"<|{role}|>") for role in chat_template.ROLES])


def truncate(row: Example, tokenizer: tokenizers.Tokenizer, most: int) -> Example | None:
    """The row with at most `most` ids, of which at least one is learned; None where that cannot be.

    The oldest messages go first. Where the last question and its answer alone are too long, the end of the
    answer goes: what is left teaches to begin such an answer, and not to end it too early.
    """
    last = int(np.flatnonzero(row.loss_mask)[-1]) + 1
    starts = np.flatnonzero(begins(row.ids, tokenizer)).tolist()
    # the message before the last answer is what it answers
    answer = max(i for i, start in enumerate(starts) if start < last)
    start = next((s for s in starts[: max(answer, 1)] if last - s <= most), starts[max(answer - 1, 0)])
    end = min(last, start + most)
    if not row.loss_mask[start:end].any():
        return None
    return Example(row.ids[start:end], row.loss_mask[start:end])


def pack(rows: Sequence[Example], most: int) -> list[Example]:
    """The rows put together to as few of at most `most` ids as is easily found: best fit, longest first.

    What follows in a row sees what is before it, as in running text: nothing hides one from the other.
    """
    bins: list[list[Example]] = []
    rooms: list[tuple[int, int]] = []  # what is left in each, ascending
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        place = bisect.bisect_left(rooms, (len(row.ids), 0))
        if place == len(rooms):
            bins.append([])
            room, number = most, len(bins) - 1
        else:
            room, number = rooms.pop(place)
        bins[number].append(row)
        bisect.insort(rooms, (room - len(row.ids), number))
    joined = [[(row.ids, row.loss_mask) for row in packed] for packed in bins]
    return [Example(*(np.concatenate(part) for part in zip(*packed, strict=True))) for packed in joined]


# --------------------------------------------------------------------------------------------------
# Rows -> batches


class Batches:
    """Rows in batches, epoch after epoch, in an order that is a pure function of (seed, epoch, step).

    An epoch shuffles the rows, sorts those of some batches by length, so that little is padded, and shuffles
    the batches. Rows that do not fill a last batch are left out of the epoch; others are in the next.
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
        """The batch whose first row is number `first` since the beginning of training."""
        places = [divmod(number, self.rows_per_epoch) for number in range(first, first + self.batch_size)]
        rows = [self.rows[self._order(epoch)[place]] for epoch, place in places]
        return collate(rows, self.context_length, self.device)

    def _arrange(self, epoch: int) -> Int[np.ndarray, " rows"]:
        """The order of the rows in `epoch`; where they are fewer than a batch has, it begins again."""
        rng = np.random.default_rng((self.seed, epoch))
        order = np.resize(rng.permutation(len(self.rows)), self.rows_per_epoch)
        group = np.arange(len(order)) // (self.batch_size * SORTED_BATCHES)
        batches = order[np.lexsort((self._lengths[order], group))].reshape(-1, self.batch_size)
        return rng.permutation(batches).reshape(-1)


def collate(
    rows: Sequence[Example], context_length: int, device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Inputs, and as targets the ids that follow them where these are learned.

    Padding stands behind a row, where nothing looks at it: its inputs are any id, its targets do not count.

    >>> rows = [Row(np.array([7, 5, 6]), np.array([False, False, True])), Row(np.arange(2), np.ones(2) > 0)]
    >>> to_batch(rows, context_length=3)[1]
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
    """The rows by length, in the same order each time; or so many, evenly spaced."""
    chosen = evenly(sorted(rows, key=lambda row: len(row.ids)), max_batches * batch_size)
    for i in range(0, len(chosen), batch_size):
        yield collate(chosen[i : i + batch_size], context_length, device)


def evenly(items: Sequence[Example], most: int) -> list[Example]:
    """All items, or so many of them, evenly spaced."""
    places = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[place] for place in places]
