"""The tokenizer in machine code on several threads, with the ids of the reference.

The ids of a pre-token are remembered. A thread borrows a `Memory`, since two cannot write to one table.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import regex

from llm_basics.core import bpe, tokenizer
from llm_basics.fast import kernel_cache
from llm_basics.fast.text import chunks, encode, hash_table, scanner

# what is encoded at a time: so little that text and ids stay in the processor's cache
PIECE_CHARACTERS = 1 << 16

# slots for remembered pre-tokens, at 32 bytes each, beyond which a memory begins anew
MOST_SLOTS = 1 << 21

# a vocabulary with higher ids has gaps, and its numbers are made as they come
MOST_NUMBERS = 1 << 22

# searched from the end: where a letter or a number has something else behind it
BOUNDARY = regex.compile(r"(?r)(?<=\p{L})(?=\P{L})|(?<=\p{N})(?=\P{N})")


class Memory:
    """Pre-tokens and their ids, and room for a piece of text, for the use of one thread."""

    def __init__(self, table: hash_table.Words, ids: np.ndarray, counts: np.ndarray) -> None:
        self.table = table
        self.ids = ids
        self.counts = counts
        self.text = np.zeros(PIECE_CHARACTERS + scanner.PADDING, np.uint8)
        self.out = np.zeros(PIECE_CHARACTERS, np.int32)

    @classmethod
    def for_tokens(cls, n: int) -> "Memory":
        """A memory without entries, with room for those that `n` tokens and a text will bring."""
        table = hash_table.Words.empty(1 << (4 * n).bit_length())
        return cls(table, np.zeros(8 * n, np.int32), np.zeros(2, np.int64))

    def copy(self) -> "Memory":
        """Another memory of the same."""
        return Memory(self.table.copy(), self.ids.copy(), self.counts.copy())

    def hold(self, content: bytes) -> None:
        """Put a piece of text in its place, with room for as many ids as it has bytes."""
        if len(content) + scanner.PADDING > len(self.text):
            self.text = np.zeros(2 * len(content) + scanner.PADDING, np.uint8)
            self.out = np.zeros(2 * len(content), np.int32)
        self.text[: len(content)] = np.frombuffer(content, np.uint8)
        self.counts[encode.N_WRITTEN] = 0

    def make_room(self) -> None:
        """Enlarge what is full."""
        self.table.enlarge(encode.REMEMBERED_BYTES)
        if self.counts[encode.N_REMEMBERED] + encode.REMEMBERED_BYTES > len(self.ids):
            self.ids = np.concatenate([self.ids, np.zeros_like(self.ids)])


class Tokenizer(tokenizer.Tokenizer):
    """`tokenizer.Tokenizer`, in machine code, for the patterns that have a scanner."""

    def __init__(
        self,
        vocab: Mapping[int, bytes],
        merges: Sequence[tuple[bytes, bytes]],
        special_tokens: Sequence[str] | None = None,
        pattern: regex.Pattern = bpe.SPLIT_PATTERN,
    ) -> None:
        super().__init__(vocab, merges, special_tokens, pattern)
        kernel_cache.wait("tokenizer")
        self._scanner = scanner.SCANNERS.get(self.pattern)
        self._merges = _merges(self.merges, self._ids)
        self._special_bytes = {special.encode("utf-8"): id for special, id in self._special_ids.items()}
        # one Python number for each id, to be used again and again instead of making new ones
        few = self.vocab_size <= MOST_NUMBERS
        self._numbers = np.array(range(self.vocab_size), object) if few else None
        self._learned = Memory.for_tokens(len(self._ids))
        if self._scanner is not None:
            self._remember(list(self._ids))
        # for two threads; others copy when they need one
        self._idle = [self._learned.copy(), self._learned.copy()]

    def encode(self, text: str) -> list[int]:
        return super().encode(text) if self._scanner is None else self._encode_text(text, self._special_bytes)

    def encode_ordinary(self, text: str) -> list[int]:
        return super().encode_ordinary(text) if self._scanner is None else self._encode_text(text, {})

    def encode_bytes(self, content: bytes) -> list[int]:
        if self._scanner is None:
            return super().encode_bytes(content)
        return self._encode([content], {}, len(content))

    def encode_batch(self, texts: Sequence[str], n_threads: int | None = None) -> list[list[int]]:
        """`encode` of each text, on `n_threads` threads; None means one a core, at most 8."""
        with ThreadPoolExecutor(n_threads or bpe.usable_cores()) as pool:
            return list(pool.map(self.encode, texts))

    def encode_file(
        self, path: str | os.PathLike[str], n_threads: int | None = None
    ) -> Iterator[tuple[np.ndarray, int, int]]:
        if self._scanner is None:
            yield from super().encode_file(path, n_threads)
            return

        def encode(chunk: chunks.Chunk) -> tuple[np.ndarray, int, int]:
            bpe.check_utf8(chunk.text, path, chunk.offset)
            memory = self._borrow()
            ids = self._ids_of(memory, chunk.text, chunk.spans, chunk.specials).copy()
            self._idle.append(memory)
            return ids, chunk.offset, len(chunk.text)

        with open(path, "rb") as file:
            yield from chunks.in_order(
                encode, chunks.read(file, self._special_bytes), n_threads or bpe.usable_cores()
            )

    def _encode_text(self, text: str, special_ids: Mapping[bytes, int]) -> list[int]:
        specials = self.special_tokens if special_ids else ()
        try:
            return self._encode(_pieces(text, specials), special_ids, len(text))
        except UnicodeEncodeError:
            return self._encode_text(tokenizer.replace_surrogates(text), special_ids)

    def _encode(self, pieces: Iterable[bytes], special_ids: Mapping[bytes, int], length: int) -> list[int]:
        memory = self._borrow()
        # a list that grows is moved again and again; four characters a token are usual for prose
        ids: list[Any] = [None] * (length // 4)
        n = 0
        try:
            for piece in pieces:
                found = self._ids_of(memory, piece, *chunks.split(piece, special_ids))
                numbers = found if self._numbers is None else self._numbers[found]
                ids[n : n + len(found)] = numbers.tolist()
                n += len(found)
        finally:
            self._idle.append(memory)
        del ids[n:]
        return ids

    def _remember(self, tokens: Sequence[bytes]) -> None:
        """Encode all tokens: they are the most frequent words of the text that was learned from."""
        ends = np.cumsum([len(token) for token in tokens], dtype=np.int64)
        spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
        self._ids_of(self._learned, b"".join(tokens), spans, np.full(len(tokens), -1, np.int64))

    def _borrow(self) -> Memory:
        """A memory that no other thread uses."""
        try:
            return self._idle.pop()
        except IndexError:
            return self._learned.copy()

    def _ids_of(self, memory: Memory, content: bytes, spans: np.ndarray, specials: np.ndarray) -> np.ndarray:
        """The ids of one piece of text, which stay valid until the next one."""
        memory.hold(content)
        at = np.zeros(2, np.int64)
        while not encode.encode(
            memory.text,
            spans,
            specials,
            at,
            scanner.classes(),
            self._scanner,
            self._merges,
            *memory.table.arrays,
            memory.ids,
            memory.counts,
            memory.out,
        ):
            if len(memory.table.slots) < MOST_SLOTS:
                memory.make_room()
            else:
                n_written = memory.counts[encode.N_WRITTEN]
                fresh = self._learned.copy()
                memory.table, memory.ids, memory.counts = fresh.table, fresh.ids, fresh.counts
                memory.counts[encode.N_WRITTEN] = n_written
        return memory.out[: memory.counts[encode.N_WRITTEN]]


def _pieces(text: str, special_tokens: Sequence[str]) -> Iterator[bytes]:
    """The text in UTF-8, in pieces that end where a pre-token ends; it must not need mending."""
    start, end = 0, PIECE_CHARACTERS
    specials = [special for special in special_tokens if special in text]
    while end < len(text):
        boundary = BOUNDARY.search(text, start, end)
        while boundary and any(_spans(text, boundary.start(), special) for special in specials):
            boundary = BOUNDARY.search(text, start, boundary.start())
        if boundary and boundary.start() > start:
            yield text[start : boundary.start()].encode("utf-8")
            start = boundary.start()
        # an endless word is searched less and less often
        end = max(start + PIECE_CHARACTERS, end if boundary else start + 2 * (end - start))
    yield text[start:].encode("utf-8")


def _spans(text: str, place: int, special: str) -> bool:
    """Whether `special` stands across `place`."""
    return text.find(special, max(0, place - len(special) + 1), place + len(special) - 1) >= 0


def _merges(merges: Sequence[tuple[bytes, bytes]], ids: Mapping[bytes, int]) -> encode.Merges:
    """The merges as `encoding` wants them: bytes are symbols 0 to 255, merge number r makes 256 + r."""
    if 256 + len(merges) > encode.LAST_SYMBOL:
        raise ValueError(f"a tokenizer must have less than {encode.LAST_SYMBOL} merges, got {len(merges)}")
    symbols = {bytes([byte]): byte for byte in range(256)}
    made = [symbols.setdefault(left + right, 256 + rank) for rank, (left, right) in enumerate(merges)]
    of_symbol = np.zeros(256 + len(merges), np.int32)
    for token, symbol in symbols.items():
        of_symbol[symbol] = ids[token]
    table = np.full(1 << (2 * len(merges) + 1).bit_length(), encode.EMPTY, np.uint64)
    byte_level = np.full((256, 256), encode.NO_MERGE, np.int32)
    lefts = np.array([symbols[left] for left, _ in merges], np.int64)
    rights = np.array([symbols[right] for _, right in merges], np.int64)
    encode.put_merges(lefts, rights, table, byte_level)
    return encode.Merges(table, byte_level, np.array(made, np.int64), of_symbol)
