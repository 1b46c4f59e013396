"""The tokenizer in machine code on several threads, with the ids of the reference.

Pre-tokens and their ids are cached. Each thread has a `PretokenCache` for itself, without locks.
"""

import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import regex

from llm_basics.core import bpe, tokenizer
from llm_basics.fast import kernel_cache
from llm_basics.fast.text import chunks, encode, hash_table, scanner

# characters encoded at a time, so that text and ids stay in the processor's cache
CHUNK_CHARACTERS = 1 << 16

# slots of 32 bytes at which a full cache is reset instead of enlarged
MAX_SLOTS = 1 << 21

# larger vocabularies have gaps in their ids, and Python integers are made on the fly
MAX_CACHED_INTS = 1 << 22

# shorter texts are encoded on one thread
PARALLEL_CHARACTERS = 1 << 20

# the end of a letter or number run, searched backward
BOUNDARY = regex.compile(r"(?r)(?<=\p{L})(?=\P{L})|(?<=\p{N})(?=\P{N})")


class PretokenCache:
    """Pre-tokens with their ids, and buffers for a chunk of text and its ids; used by one thread."""

    def __init__(self, table: hash_table.PretokenTable, ids: np.ndarray, counts: np.ndarray) -> None:
        self.table = table
        self.ids = ids
        self.counts = counts
        self.text = np.zeros(CHUNK_CHARACTERS + scanner.PADDING, np.uint8)
        self.out = np.zeros(CHUNK_CHARACTERS, np.int32)

    @classmethod
    def for_tokens(cls, n: int) -> "PretokenCache":
        """An empty cache, sized for `n` tokens and a text's new pre-tokens."""
        table = hash_table.PretokenTable.empty(1 << (4 * n).bit_length())
        return cls(table, np.zeros(8 * n, np.int32), np.zeros(2, np.int64))

    def copy(self) -> "PretokenCache":
        """An independent copy."""
        return PretokenCache(self.table.copy(), self.ids.copy(), self.counts.copy())

    def load_text(self, content: bytes) -> None:
        """Copy text into the buffer, with space for as many ids as it has bytes."""
        if len(content) + scanner.PADDING > len(self.text):
            self.text = np.zeros(2 * len(content) + scanner.PADDING, np.uint8)
            self.out = np.zeros(2 * len(content), np.int32)
        self.text[: len(content)] = np.frombuffer(content, np.uint8)
        self.counts[encode.N_WRITTEN] = 0

    def grow(self) -> None:
        """Enlarge the arrays that are full."""
        self.table.enlarge(encode.MAX_CACHED_BYTES)
        if self.counts[encode.N_CACHED_IDS] + encode.MAX_CACHED_BYTES > len(self.ids):
            self.ids = np.concatenate([self.ids, np.zeros_like(self.ids)])


class Tokenizer(tokenizer.Tokenizer):
    """`tokenizer.Tokenizer` in machine code, for patterns with a compiled scanner."""

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
        # one Python integer per id, reused in all lists
        is_small = self.vocab_size <= MAX_CACHED_INTS
        self._ints = np.array(range(self.vocab_size), object) if is_small else None
        self._initial_cache = PretokenCache.for_tokens(len(self._ids))
        if self._scanner is not None:
            self._cache_tokens(list(self._ids))
        # for two threads; further threads copy on demand
        self._idle = [self._initial_cache.copy(), self._initial_cache.copy()]

    def encode(self, text: str) -> list[int]:
        return super().encode(text) if self._scanner is None else self._encode_text(text, self._special_bytes)

    def encode_ordinary(self, text: str) -> list[int]:
        return super().encode_ordinary(text) if self._scanner is None else self._encode_text(text, {})

    def encode_bytes(self, content: bytes) -> list[int]:
        if self._scanner is None:
            return super().encode_bytes(content)
        return self._encode([content], {}, len(content))

    def encode_batch(self, texts: Sequence[str], n_threads: int | None = None) -> list[list[int]]:
        """`encode` each text on `n_threads` threads; None: one per core, at most 8."""
        with ThreadPoolExecutor(n_threads or bpe.usable_cores()) as pool:
            return list(pool.map(self.encode, texts))

    def encode_to_array(self, text: str, n_threads: int | None = None) -> np.ndarray:
        if self._scanner is None:
            return super().encode_to_array(text)
        if n_threads is None:
            n_threads = bpe.usable_cores() if len(text) >= PARALLEL_CHARACTERS else 1
        parts = (
            chunks.Chunk(0, part, *chunks.split(part, self._special_bytes))
            for part in _chunks(text, self.special_tokens)
        )
        try:
            return np.concatenate([ids for ids, _, _ in self._encode_chunks(parts, n_threads)])
        except UnicodeEncodeError:
            return self.encode_to_array(tokenizer.replace_surrogates(text), n_threads)

    def encode_file(
        self, path: str | os.PathLike[str], n_threads: int | None = None
    ) -> Iterator[tuple[np.ndarray, int, int]]:
        if self._scanner is None:
            yield from super().encode_file(path, n_threads)
            return
        with open(path, "rb") as file:
            checked = map(functools.partial(_checked, path), chunks.read(file, self._special_bytes))
            yield from self._encode_chunks(checked, n_threads or bpe.usable_cores())

    def _encode_chunks(
        self, parts: Iterable[chunks.Chunk], n_threads: int
    ) -> Iterator[tuple[np.ndarray, int, int]]:
        """The ids of each chunk, its offset and its number of bytes."""

        def encode(chunk: chunks.Chunk) -> tuple[np.ndarray, int, int]:
            cache = self._take_cache()
            ids = self._ids_of(cache, chunk.text, chunk.spans, chunk.specials).copy()
            self._idle.append(cache)
            return ids, chunk.offset, len(chunk.text)

        return chunks.in_order(encode, parts, n_threads)

    def _encode_text(self, text: str, special_ids: Mapping[bytes, int]) -> list[int]:
        specials = self.special_tokens if special_ids else ()
        try:
            return self._encode(_chunks(text, specials), special_ids, len(text))
        except UnicodeEncodeError:
            return self._encode_text(tokenizer.replace_surrogates(text), special_ids)

    def _encode(
        self, text_chunks: Iterable[bytes], special_ids: Mapping[bytes, int], length: int
    ) -> list[int]:
        cache = self._take_cache()
        # preallocated, since a growing list is copied again and again; prose has about 4 characters per token
        ids: list[Any] = [None] * (length // 4)
        n = 0
        try:
            for text_chunk in text_chunks:
                chunk_ids = self._ids_of(cache, text_chunk, *chunks.split(text_chunk, special_ids))
                numbers = chunk_ids if self._ints is None else self._ints[chunk_ids]
                ids[n : n + len(chunk_ids)] = numbers.tolist()
                n += len(chunk_ids)
        finally:
            self._idle.append(cache)
        del ids[n:]
        return ids

    def _cache_tokens(self, tokens: Sequence[bytes]) -> None:
        """Cache the vocabulary's tokens, the most frequent words of the training text."""
        ends = np.cumsum([len(token) for token in tokens], dtype=np.int64)
        spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
        self._ids_of(self._initial_cache, b"".join(tokens), spans, np.full(len(tokens), -1, np.int64))

    def _take_cache(self) -> PretokenCache:
        """A cache that no other thread uses."""
        try:
            return self._idle.pop()
        except IndexError:
            return self._initial_cache.copy()

    def _ids_of(
        self, cache: PretokenCache, content: bytes, spans: np.ndarray, specials: np.ndarray
    ) -> np.ndarray:
        """The ids of one chunk of text, valid until the next call."""
        cache.load_text(content)
        at = np.zeros(2, np.int64)
        while not encode.encode(
            cache.text,
            spans,
            specials,
            at,
            scanner.classes(),
            self._scanner,
            self._merges,
            *cache.table.arrays,
            cache.ids,
            cache.counts,
            cache.out,
        ):
            if len(cache.table.slots) < MAX_SLOTS:
                cache.grow()
            else:
                n_written = cache.counts[encode.N_WRITTEN]
                fresh = self._initial_cache.copy()
                cache.table, cache.ids, cache.counts = fresh.table, fresh.ids, fresh.counts
                cache.counts[encode.N_WRITTEN] = n_written
        return cache.out[: cache.counts[encode.N_WRITTEN]]


def _chunks(text: str, special_tokens: Sequence[str]) -> Iterator[bytes]:
    """UTF-8 chunks of the text, cut at pre-token boundaries; the text must not contain surrogates."""
    start, end = 0, CHUNK_CHARACTERS
    specials = [special for special in special_tokens if special in text]
    while end < len(text):
        boundary = BOUNDARY.search(text, start, end)
        while boundary and any(_crosses(text, boundary.start(), special) for special in specials):
            boundary = BOUNDARY.search(text, start, boundary.start())
        if boundary and boundary.start() > start:
            yield text[start : boundary.start()].encode("utf-8")
            start = boundary.start()
        # double the search range in an endless word, so that the total is linear
        end = max(start + CHUNK_CHARACTERS, end if boundary else start + 2 * (end - start))
    yield text[start:].encode("utf-8")


def _checked(path: str | os.PathLike[str], chunk: chunks.Chunk) -> chunks.Chunk:
    """The chunk of a file, if it is UTF-8."""
    bpe.check_utf8(chunk.text, path, chunk.offset)
    return chunk


def _crosses(text: str, position: int, special: str) -> bool:
    """Whether an occurrence of `special` crosses `position`."""
    return text.find(special, max(0, position - len(special) + 1), position + len(special) - 1) >= 0


def _merges(merges: Sequence[tuple[bytes, bytes]], ids: Mapping[bytes, int]) -> encode.Merges:
    """Merges for `text.encode`: bytes are symbols 0 to 255, and merge r produces symbol 256 + r."""
    if 256 + len(merges) > encode.MAX_SYMBOL:
        raise ValueError(f"a tokenizer must have less than {encode.MAX_SYMBOL} merges, got {len(merges)}")
    symbols = {bytes([byte]): byte for byte in range(256)}
    merged = [symbols.setdefault(left + right, 256 + rank) for rank, (left, right) in enumerate(merges)]
    id_of_symbol = np.zeros(256 + len(merges), np.int32)
    for token, symbol in symbols.items():
        id_of_symbol[symbol] = ids[token]
    table = np.full(1 << (2 * len(merges) + 1).bit_length(), encode.EMPTY, np.uint64)
    byte_level = np.full((256, 256), encode.NO_MERGE, np.int32)
    lefts = np.array([symbols[left] for left, _ in merges], np.int64)
    rights = np.array([symbols[right] for _, right in merges], np.int64)
    encode.fill_merge_table(lefts, rights, table, byte_level)
    return encode.Merges(table, byte_level, np.array(merged, np.int64), id_of_symbol)
