"""BPE training on gigabytes of text: the algorithm of `core.bpe` on arrays, compiled with Numba.

`text.chunks` counts pre-tokens on several threads, and `text.merge` merges them; this module combines both.

    >>> learn_merges({b"low": 5, b"lower": 2}, vocab_size=258, special_tokens=[])[1]
    [(b'o', b'w'), (b'l', b'ow')]
"""

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import regex

from llm_basics.core import bpe as reference
from llm_basics.core import vocabulary
from llm_basics.fast import kernel_cache
from llm_basics.fast.text import chunks, merge, scanner

# bound here because `swap` replaces the name in the reference module
count_with_regex = reference.count_pretokens

# merges per progress report
REPORT_EVERY = 1000


def train_bpe(
    input_path: str | os.PathLike[str],
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    n_workers: int | None = None,
    pattern: regex.Pattern = reference.SPLIT_PATTERN,
    ties: str = reference.GREATEST,
    progress: Callable[[str, int, int], None] = reference.silent,
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """`bpe.train_bpe` on several threads; the same vocabulary and merges."""
    special_tokens = reference.check_special_tokens(special_tokens)
    reference.check_vocab_size(vocab_size, special_tokens)
    if vocabulary.own_pattern(pattern) not in scanner.SCANNERS:
        pretokens = count_with_regex(input_path, special_tokens, n_workers, pattern, progress)
        return learn_merges(pretokens, vocab_size, special_tokens, ties, progress)
    kernel_cache.wait("vocabulary")
    counted = chunks.count_file(input_path, special_tokens, n_workers, pattern, progress).columns()
    return _learn(counted, vocab_size, special_tokens, ties, progress)


def count_pretokens(
    input_path: str | os.PathLike[str],
    special_tokens: Sequence[str],
    n_workers: int | None = None,
    pattern: regex.Pattern = reference.SPLIT_PATTERN,
    progress: Callable[[str, int, int], None] = reference.silent,
) -> dict[bytes, int]:
    """`bpe.count_pretokens` on several threads; the same counts."""
    if vocabulary.own_pattern(pattern) not in scanner.SCANNERS:
        return count_with_regex(input_path, special_tokens, n_workers, pattern, progress)
    counted = chunks.count_file(input_path, special_tokens, n_workers, pattern, progress)
    text, lengths, counts = counted.columns()
    content, ends = text.tobytes(), np.cumsum(lengths).tolist()
    bounds = zip([0, *ends], ends, counts.tolist(), strict=False)
    return {content[start:end]: count for start, end, count in bounds}


def learn_merges(
    pretokens: Mapping[bytes, int],
    vocab_size: int,
    special_tokens: Sequence[str],
    ties: str = reference.GREATEST,
    progress: Callable[[str, int, int], None] = reference.silent,
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """`bpe.learn_merges` with compiled kernels; the same vocabulary and merges."""
    text = np.frombuffer(b"".join(pretokens), np.uint8)
    lengths = np.array([len(word) for word in pretokens], np.int64)
    counts = np.array(list(pretokens.values()), np.int64)
    return _learn((text, lengths, counts), vocab_size, special_tokens, ties, progress)


def _learn(
    pretokens: tuple[np.ndarray, np.ndarray, np.ndarray],
    vocab_size: int,
    special_tokens: Sequence[str],
    ties: str,
    progress: Callable[[str, int, int], None],
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    alphabet = reference.alphabet(ties)
    vocab = dict(enumerate([token.encode("utf-8") for token in special_tokens] + alphabet))
    # each merge removes a symbol, so `len(text)` bounds their number
    n_requested = max(0, vocab_size - len(vocab))
    n_merges = min(n_requested, len(pretokens[0]))
    by_id = ties == reference.LOWEST_ID
    merger = _make_merger(pretokens, alphabet, n_merges, by_id)
    done, has_pairs = 0, True
    while has_pairs and done < n_merges:
        # returns early when an array is full
        has_pairs = merge.merge(merger, 256 + min(n_merges, done + REPORT_EVERY), by_id)
        done = int(merger.used[merge.N_TOKENS]) - 256
        progress("merging", done, n_requested)
        merger = _grow(merger)
    tokens = list(alphabet)
    merges = []
    for left, right in merger.merges[:done].tolist():
        merges.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
    vocab.update(enumerate(tokens[256:], start=len(vocab)))
    return vocab, merges


def _make_merger(
    pretokens: tuple[np.ndarray, np.ndarray, np.ndarray],
    alphabet: Sequence[bytes],
    n_merges: int,
    by_id: bool,
) -> merge.Merger:
    text, lengths, frequencies = pretokens
    n = len(text) + len(lengths) + 1
    if n >= 2**31:
        raise ValueError(f"the distinct pre-tokens must have fewer than 2**31 bytes in total, got {n}")
    symbol_of = np.empty(256, np.int32)
    symbol_of[[byte[0] for byte in alphabet]] = np.arange(256)
    symbols, word_at = np.full(n, merge.BORDER, np.int32), np.zeros(n, np.int32)
    merge.write_symbols(text, lengths, symbol_of, symbols, word_at)
    n_tokens = 256 + n_merges
    merger = merge.Merger(
        symbols=symbols,
        pair_at=np.full(n, merge.NO_PAIR, np.int32),
        word_at=word_at,
        frequencies=frequencies,
        pairs=np.zeros((1 << 17, 5), np.int64),
        positions=np.empty(2 * n, np.int32),
        heap=np.empty(1 << 17, np.int32),
        heap_counts=np.empty(1 << 17, np.int64),
        tokens=np.frombuffer(b"".join(alphabet).ljust(1 << 16), np.uint8).copy(),
        begins=np.zeros(n_tokens + 1, np.int64),
        with_left=np.full(n_tokens, merge.NO_PAIR, np.int32),
        with_right=np.full(n_tokens, merge.NO_PAIR, np.int32),
        new_pairs=np.empty(1 << 12, np.int32),
        new_positions=np.empty(1 << 12, np.int32),
        merges=np.empty((n_merges, 2), np.int32),
        used=np.array([256, 0, 0, 0, 0, 0], np.int64),
    )
    merger.begins[:257] = np.arange(257)
    merge.find_pairs(merger, np.full((256, 256), merge.NO_PAIR, np.int32))
    merger.used[merge.THRESHOLD] = merger.pairs[:, merge.COUNT].max() + 1
    return merger


def _grow(m: merge.Merger) -> merge.Merger:
    """The same state, with every array enlarged that the next merge could overflow."""
    larger = {}
    for name, n in zip(merge.GROWABLE, merge.required_lengths(m), strict=True):
        array = getattr(m, name)
        if n > len(array):
            larger[name] = np.empty((2 * n, *array.shape[1:]), array.dtype)
            larger[name][: len(array)] = array
    return m._replace(**larger)
