"""Tokenization of a text: tokens with their offsets, and every merge, step by step."""

import itertools
from dataclasses import dataclass

from llm_basics.analysis import inspection
from llm_basics.core import bpe

# maximum number of characters whose merges are replayed, and of merges per page
MAX_REPLAYED = 2000
MAX_MERGES = 1000


@dataclass(frozen=True)
class Piece:
    """A token of a text."""

    id: int
    token: str
    start: int
    """Offset in bytes of UTF-8."""
    end: int
    is_special: bool


@dataclass(frozen=True)
class Pretoken:
    """A pre-token and the merges of its bytes: `steps[0]` are the bytes, each later step is one merge."""

    text: str
    steps: list[list[str]]
    ranks: list[int]
    """For each merge, its position in the order of learning, from 1."""


@dataclass(frozen=True)
class Tokenized:
    """A text as tokens."""

    tokens: list[Piece]
    n_bytes: int
    vocab_size: int


@dataclass(frozen=True)
class Merges:
    """The merges of a text, by distinct pre-token."""

    pretokens: list[Pretoken]


@dataclass(frozen=True)
class LearnedMerge:
    """A merge of the tokenizer."""

    rank: int
    left: str
    right: str
    token: str
    id: int


@dataclass(frozen=True)
class LearnedMerges:
    """Merges in the order of learning."""

    merges: list[LearnedMerge]
    n_total: int


def tokenize(loaded: inspection.LoadedModel, text: str, ids: list[int] | None = None) -> Tokenized:
    """The tokens of a text, where special tokens get their own ids."""
    tokenizer = loaded.tokenizer
    ids = loaded.check(ids) if ids is not None else tokenizer.encode(text)
    special = {tokenizer.special_id(each) for each in tokenizer.special_tokens}
    tokens, end = [], 0
    for id in ids:
        start, end = end, end + len(tokenizer.vocab[id])
        tokens.append(Piece(id=id, token=loaded.show(id), start=start, end=end, is_special=id in special))
    return Tokenized(tokens=tokens, n_bytes=end, vocab_size=tokenizer.vocab_size)


def merges(loaded: inspection.LoadedModel, text: str) -> Merges:
    """Every merge of a text, step by step."""
    tokenizer = loaded.tokenizer
    if len(text) > MAX_REPLAYED:
        raise ValueError(f"merges are replayed for at most {MAX_REPLAYED} characters, got {len(text)}")
    ranks = {left + right: rank for rank, (left, right) in enumerate(tokenizer.merges, start=1)}
    found = []
    for pretoken in dict.fromkeys(bpe.pretokenize(text, tokenizer.special_tokens, tokenizer.pattern)):
        steps = list(tokenizer.merge_steps(pretoken.encode("utf-8", "replace")))
        made = [next(t for t in after if t not in before) for before, after in itertools.pairwise(steps)]
        found.append(
            Pretoken(
                text=pretoken,
                steps=[[inspection.show(part) for part in parts] for parts in steps],
                ranks=[ranks[token] for token in made],
            )
        )
    return Merges(pretokens=found)


def learned_merges(loaded: inspection.LoadedModel, first: int, count: int) -> LearnedMerges:
    """`count` merges from rank `first`, in the order of learning."""
    ids = {token: id for id, token in loaded.tokenizer.vocab.items()}
    chosen = loaded.tokenizer.merges[first - 1 : first - 1 + min(count, MAX_MERGES)]
    return LearnedMerges(
        merges=[
            LearnedMerge(
                rank=rank,
                left=inspection.show(left),
                right=inspection.show(right),
                token=inspection.show(left + right),
                id=ids[left + right],
            )
            for rank, (left, right) in enumerate(chosen, start=first)
        ],
        n_total=len(loaded.tokenizer.merges),
    )
