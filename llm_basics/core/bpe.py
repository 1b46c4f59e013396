"""Byte-pair encoding: learn a vocabulary by repeatedly merging the most frequent pair of neighbors.

The text is split at special tokens, then into pre-tokens (words with their leading space, numbers,
punctuation, runs of white space), which merges never cross; each pre-token starts as a sequence of bytes, and
merges form longer tokens (Sennrich et al., arXiv 1508.07909; on bytes: Radford et al. 2019).

    >>> vocab, merges = learn_merges(Counter({b"low": 5, b"lower": 2}), vocab_size=258, special_tokens=[])
    >>> merges
    [(b'o', b'w'), (b'l', b'ow')]
"""

import contextlib
import heapq
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import BinaryIO, TypeVar

import regex

from llm_basics.core import workers

T = TypeVar("T", int, bytes)

# GPT-2's pattern: contractions; letters, digits or punctuation, each with one leading space; white space,
# whose last character belongs to the following word
SPLIT_PATTERN = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# cl100k_base, as written in tiktoken: contractions in any case, at most three digits; one other character
# before a word joins it, line ends join the punctuation before them
CL100K_PATTERN = regex.compile(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)

# tie-breaking of equally frequent pairs: the lexicographically greater pair of byte strings first, or, as in
# Hugging Face's trainer, the lower pair of ids, where bytes have GPT-2's ids
GREATEST, LOWEST_ID = "greatest", "lowest-id"

# below this size, starting processes takes longer than they save
PARALLEL_BYTES = 32_000_000


def silent(stage: str, done: int, total: int) -> None:
    """The default progress callback: does nothing."""


# --------------------------------------------------------------------------------------------------
# Cutting text into pre-tokens


def special_pattern(special_tokens: Sequence[str]) -> regex.Pattern:
    """A pattern that matches any special token; the longer one if two start at the same character.

    >>> special_pattern(["<a>", "<a><b>"]).findall("<a><b>")
    ['<a><b>']
    """
    if not special_tokens:
        return regex.compile(r"(?!)")
    return regex.compile("|".join(regex.escape(t) for t in sorted(special_tokens, key=len, reverse=True)))


def pretokenize(
    text: str, special_tokens: Sequence[str] = (), pattern: regex.Pattern = SPLIT_PATTERN
) -> Iterator[str]:
    """The pre-tokens of `text` in order, without special tokens.

    >>> list(pretokenize("It's  10 mice.<|endoftext|>Run", ["<|endoftext|>"]))
    ['It', "'s", ' ', ' 10', ' mice', '.', 'Run']
    """
    for segment in special_pattern(special_tokens).splititer(text):
        for match in pattern.finditer(segment):
            yield match.group()


def count_pretokens(
    input_path: str | os.PathLike[str],
    special_tokens: Sequence[str],
    n_workers: int | None = None,
    pattern: regex.Pattern = SPLIT_PATTERN,
    progress: Callable[[str, int, int], None] = silent,
) -> Counter[bytes]:
    """Count the pre-tokens of a UTF-8 file.

    The file is cut at special tokens into parts that `n_workers` processes count; None means one process per
    core, at most 8, for large files, else none. Programs that use processes need an
    `if __name__ == "__main__"` guard.
    """
    size = Path(input_path).stat().st_size
    if n_workers is None:
        n_workers = usable_cores() if size >= PARALLEL_BYTES else 1
    # one part per worker, small enough to fit into memory
    boundaries = chunk_boundaries(input_path, special_tokens, max(n_workers, size // 2**28 + 1))
    chunks = [(input_path, start, end, special_tokens, pattern) for start, end in pairwise(boundaries)]
    total: Counter[bytes] = Counter()
    in_parallel = n_workers > 1 and len(chunks) > 1
    with (
        workers.mapped(_count_chunk, chunks, n_workers)
        if in_parallel
        else contextlib.nullcontext(map(_count_chunk, chunks))
    ) as counted:
        for counter, end in zip(counted, boundaries[1:], strict=False):
            total.update(counter)
            progress("counting", end, size)
    return total


def usable_cores(most: int = 8) -> int:
    """Number of cores that this process may use, capped at `most`."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, most)


def chunk_boundaries(
    input_path: str | os.PathLike[str], special_tokens: Sequence[str], n_chunks: int
) -> list[int]:
    """Byte offsets that split a file into at most `n_chunks` parts, each at a special token.

    If no special token is a safe delimiter (one may be part of another, or overlap it), the file is one part.
    """
    size = Path(input_path).stat().st_size
    delimiter = _clean_delimiter([token.encode() for token in special_tokens])
    if delimiter is None:
        return [0, size]
    boundaries = {0, size}
    with open(input_path, "rb") as file:
        for i in range(1, n_chunks):
            boundaries.add(_find_from(file, delimiter, size * i // n_chunks, size))
    return sorted(boundaries)


def _clean_delimiter(tokens: Sequence[bytes]) -> bytes | None:
    """A special token whose bytes are never part of another token's, nor overlap them."""
    for delimiter in tokens:
        inside = any(delimiter in other for other in tokens if other != delimiter)
        across = any(
            other.endswith(delimiter[:k])
            for other in tokens
            for k in range(1, min(len(delimiter), len(other)))
        )
        if not inside and not across:
            return delimiter
    return None


def _find_from(file: BinaryIO, delimiter: bytes, offset: int, size: int) -> int:
    """The offset of the next `delimiter` at or after `offset`; `size` if there is none."""
    file.seek(offset)
    tail = b""
    while block := file.read(1 << 20):
        found = (tail + block).find(delimiter)
        if found >= 0:
            return file.tell() - len(tail) - len(block) + found
        tail = (tail + block)[-(len(delimiter) - 1) :] if len(delimiter) > 1 else b""
    return size


def _count_chunk(
    chunk: tuple[str | os.PathLike[str], int, int, Sequence[str], regex.Pattern],
) -> Counter[bytes]:
    path, start, end, special_tokens, pattern = chunk
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(end - start)
    words = Counter(pretokenize(check_utf8(data, path, start), special_tokens, pattern))
    return Counter({word.encode("utf-8"): count for word, count in words.items()})


def check_utf8(data: bytes, path: str | os.PathLike[str], offset: int) -> str:
    """Decode `data`, read from `path` at `offset`. Raises ValueError if it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte, position = data[error.start], offset + error.start
        with open(path, "rb") as file:
            ends = enumerate(accumulate(map(len, file)), start=1)
            line = next(number for number, end in ends if end > position)
        raise ValueError(f"{path}:{line} must be UTF-8, got byte 0x{byte:02x} at offset {position}") from None


# --------------------------------------------------------------------------------------------------
# Learning merges


def alphabet(ties: str = GREATEST) -> list[bytes]:
    """All bytes in the order of their ids: 0 to 255, or, for `lowest-id`, GPT-2's printable ones first."""
    if ties not in (GREATEST, LOWEST_ID):
        raise ValueError(f"ties must be {GREATEST} or {LOWEST_ID}, got {ties}")
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [bytes([byte]) for byte in (range(256) if ties == GREATEST else printable + others)]


def train_bpe(
    input_path: str | os.PathLike[str],
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    n_workers: int | None = None,
    pattern: regex.Pattern = SPLIT_PATTERN,
    ties: str = GREATEST,
    progress: Callable[[str, int, int], None] = silent,
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """Learn a vocabulary of `vocab_size` tokens from a UTF-8 file.

    Returns the vocabulary, id -> bytes (special tokens first, then the 256 bytes, then one entry per merge),
    and the merges in the order of learning. Stops early when no pair is left to merge. The result does not
    depend on the number of workers.
    """
    special_tokens = check_special_tokens(special_tokens)
    check_vocab_size(vocab_size, special_tokens)
    pretokens = count_pretokens(input_path, special_tokens, n_workers, pattern, progress)
    return learn_merges(pretokens, vocab_size, special_tokens, ties, progress)


def check_special_tokens(special_tokens: Sequence[str]) -> list[str]:
    """The special tokens without duplicates. Raises ValueError for a token of fewer than two bytes."""
    if isinstance(special_tokens, str):
        raise ValueError(f"special tokens must be a list of texts, got the text {special_tokens!r}")
    for special in special_tokens:
        if len(special.encode("utf-8")) < 2:
            raise ValueError(f"a special token must have at least two bytes, got {special!r}")
    return list(dict.fromkeys(special_tokens))


def check_vocab_size(vocab_size: int, special_tokens: Sequence[str]) -> None:
    """Raise ValueError unless `vocab_size` includes the 256 bytes and the special tokens."""
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size must be at least {least} (256 bytes and {len(special_tokens)} special tokens), "
            f"got {vocab_size}"
        )


def learn_merges(
    pretokens: Mapping[bytes, int],
    vocab_size: int,
    special_tokens: Sequence[str],
    ties: str = GREATEST,
    progress: Callable[[str, int, int], None] = silent,
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """Merge the most frequent pair until the vocabulary is full.

    Of equally frequent pairs, the lexicographically greater pair of byte strings is merged first (`ties`). A
    merge changes only the words that contain the pair, so only their counts are updated.
    """
    vocab = dict(enumerate([token.encode("utf-8") for token in special_tokens] + alphabet(ties)))
    ids = {byte: id for id, byte in vocab.items() if len(byte) == 1}
    words = [[ids[bytes([byte])] for byte in word] for word in pretokens]
    pairs = PairCounts(words, list(pretokens.values()), vocab, ties)
    merges: list[tuple[bytes, bytes]] = []
    n_merges = vocab_size - len(vocab)
    while len(vocab) < vocab_size and (pair := pairs.most_frequent()) is not None:
        new_id = len(vocab)
        merges.append((vocab[pair[0]], vocab[pair[1]]))
        vocab[new_id] = vocab[pair[0]] + vocab[pair[1]]
        pairs.merge(pair, new_id)
        progress("merging", len(merges), n_merges)
    return vocab, merges


class PairCounts:
    """Counts of the pairs of neighboring tokens in all words, updated by each merge."""

    def __init__(
        self, words: list[list[int]], frequencies: list[int], vocab: Mapping[int, bytes], ties: str = GREATEST
    ) -> None:
        self.words = words
        self.frequencies = frequencies
        self.vocab = vocab
        self.ties = ties
        self.counts: Counter[tuple[int, int]] = Counter()
        self.occurrences: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
        for index, word in enumerate(words):
            for pair in pairwise(word):
                self.add(pair, index, frequencies[index])
        # entries may be stale; `most_frequent` compares them with the current count
        self.heap = [self._entry(pair) for pair in self.counts]
        heapq.heapify(self.heap)

    def add(self, pair: tuple[int, int], index: int, count: int) -> None:
        """Add `count`, which may be negative, to the count of `pair` for word `index`."""
        self.counts[pair] += count
        if count > 0:
            self.occurrences[pair].add(index)

    def most_frequent(self) -> tuple[int, int] | None:
        """The pair with the highest count, or None if no pair is left."""
        while self.heap:
            negative_count, *_, pair = self.heap[0]
            count = self.counts[pair]
            if 0 < count == -negative_count:
                return pair
            # the count has decreased since the entry was pushed: push an updated one
            heapq.heappop(self.heap)
            if count > 0:
                heapq.heappush(self.heap, self._entry(pair))
        return None

    def merge(self, pair: tuple[int, int], new_id: int) -> None:
        """Replace `pair` by `new_id` in every word, from left to right, and count the new neighbors."""
        made: set[tuple[int, int]] = set()
        for index in self.occurrences.pop(pair):
            old = self.words[index]
            new = merge_pair(old, pair, new_id)
            if len(new) == len(old):
                continue  # an earlier merge removed the pair from this word
            frequency = self.frequencies[index]
            for neighbors in pairwise(old):
                self.add(neighbors, index, -frequency)
            for neighbors in pairwise(new):
                self.add(neighbors, index, frequency)
                if new_id in neighbors:
                    made.add(neighbors)
            self.words[index] = new
        del self.counts[pair]
        for neighbors in made:
            heapq.heappush(self.heap, self._entry(neighbors))

    def _entry(self, pair: tuple[int, int]) -> tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, int]]:
        """Sort key in the heap: highest count first, then by the rule for ties."""
        if self.ties == LOWEST_ID:
            return -self.counts[pair], (), (), pair
        left, right = pair
        return -self.counts[pair], _descending(self.vocab[left]), _descending(self.vocab[right]), pair


def merge_pair(tokens: list[T], pair: tuple[T, T], merged: T) -> list[T]:
    """Replace each occurrence of `pair` by `merged`, from left to right.

    >>> merge_pair([1, 1, 1, 2, 1], (1, 1), 9)
    [9, 1, 2, 1]
    """
    result, i = [], 0
    while i < len(tokens):
        if i + 1 < len(tokens) and (tokens[i], tokens[i + 1]) == pair:
            result.append(merged)
            i += 2
        else:
            result.append(tokens[i])
            i += 1
    return result


def _descending(token: bytes) -> tuple[int, ...]:
    """A key that sorts byte strings from the lexicographically greatest to the least."""
    return (*(-byte for byte in token), 1)
