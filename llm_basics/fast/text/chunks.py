"""A file in chunks that are scanned independently, so that memory holds a few of them and never the text.

A chunk ends where a pre-token ends whatever follows: behind a letter or number, or at a special token.
"""

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import regex

from llm_basics.core import bpe as reference
from llm_basics.core import vocabulary
from llm_basics.fast import numba_jit
from llm_basics.fast.text import hash_table, scanner

T = TypeVar("T")

CHUNK_BYTES = 1 << 18

# the longest character of UTF-8
CHARACTER_BYTES = 4


@dataclass(frozen=True)
class Chunk:
    """A piece of a text: its place, its bytes, the spans between special tokens, and the ids of these."""

    offset: int
    text: bytes
    spans: np.ndarray
    specials: np.ndarray


def split(text: bytes, special_ids: Mapping[bytes, int]) -> tuple[np.ndarray, np.ndarray]:
    """The spans of ordinary text, and the id of the special token behind each; -1 behind the last.

    >>> [array.tolist() for array in split(b"ab<|end|>c", {b"<|end|>": 7})]
    [[[0, 2], [9, 10]], [7, -1]]
    """
    present = sorted((token for token in special_ids if token in text), key=len, reverse=True)
    found = []
    if len(present) == 1:
        at = text.find(present[0])
        while at >= 0:
            found.append((at, at + len(present[0]), special_ids[present[0]]))
            at = text.find(present[0], found[-1][1])
    elif present:
        for match in re.finditer(b"|".join(map(re.escape, present)), text):
            found.append((match.start(), match.end(), special_ids[match.group()]))
    spans = np.empty((len(found) + 1, 2), np.int64)
    spans[0, 0], spans[-1, 1] = 0, len(text)
    spans[1:, 0] = [end for _, end, _ in found]
    spans[:-1, 1] = [start for start, _, _ in found]
    return spans, np.array([id for _, _, id in found] + [-1], np.int64)


def read(file: BinaryIO, special_ids: Mapping[bytes, int], n_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """The chunks of an open file, of about `n_bytes`; longer where it has no place to cut."""
    offset, waiting, searched = 0, b"", 0
    while block := file.read(n_bytes):
        waiting += block
        if len(waiting) < 2 * searched:
            continue  # a search at every block of an endless word would be quadratic
        spans, specials = split(waiting, special_ids)
        cut = safe_cut(waiting, spans, max(CHARACTER_BYTES, *map(len, special_ids), 0))
        searched = 0 if cut else len(waiting)
        if cut:
            n = int(np.searchsorted(spans[:, 0], cut, side="right"))
            spans, specials = spans[:n], specials[:n]
            spans[-1, 1], specials[-1] = cut, -1
            yield Chunk(offset, waiting[:cut], spans, specials)
            offset, waiting = offset + cut, waiting[cut:]
    yield Chunk(offset, waiting, *split(waiting, special_ids))


def safe_cut(text: bytes, spans: np.ndarray, uncertain: int) -> int:
    """An offset in `text` where a pre-token ends, whatever follows; 0 if none is found.

    The last `uncertain` bytes may be the beginning of a special token, or of a character.

    >>> safe_cut(b"one two, three", np.array([[0, 14]]), 4)
    7
    """
    known = len(text) - uncertain
    starts = spans[1:, 0][spans[:-1, 1] <= known]
    start = int(starts[-1]) if len(starts) else 0
    if start >= known:
        return start
    # a boundary is near the end as a rule
    for first in (max(start, known - 4096), start):
        tail = scanner.padded(text[first : known + CHARACTER_BYTES])
        found = int(last_boundary(tail, known - first, len(text) - first, scanner.classes()))
        if found:
            return first + found
    return start


@numba_jit.jit
def last_boundary(text: np.ndarray, last: int, n: int, classes: np.ndarray) -> int:
    """The last place, at most `last`, between a letter or number and something else; 0 if there is none."""
    i = last
    code, _ = scanner.character(text, i, n)
    kind = classes[code]
    while i > 0:
        k = i - 1
        while k > 0 and i - k < CHARACTER_BYTES and text[k] & 0xC0 == 0x80:
            k -= 1
        code, size = scanner.character(text, k, n)
        before = classes[code]
        if k + size == i and before != kind and (before == scanner.LETTER or before == scanner.NUMBER):
            return i
        i, kind = k, before
    return 0


def count_file(
    path: str | os.PathLike[str],
    special_tokens: Sequence[str],
    n_workers: int | None,
    pattern: regex.Pattern,
    progress: Callable[[str, int, int], None],
) -> hash_table.Words:
    """The pre-tokens of a UTF-8 file and how often each occurs, counted by `n_workers` threads."""
    size = Path(path).stat().st_size
    if n_workers is None:
        n_workers = reference.usable_cores() if size >= 8 * CHUNK_BYTES else 1
    classes, kind = scanner.classes(), scanner.SCANNERS[vocabulary.own_pattern(pattern)]
    special_ids = dict.fromkeys([special.encode("utf-8") for special in special_tokens if special], 0)
    idle: list[hash_table.Words] = []

    def count(chunk: Chunk) -> int:
        reference.check_utf8(chunk.text, path, chunk.offset)
        try:
            table = idle.pop()
        except IndexError:
            table = hash_table.Words.empty()
        text, at = scanner.padded(chunk.text), np.zeros(2, np.int64)
        while not hash_table.count(text, chunk.spans, at, classes, kind, *table.arrays):
            table.enlarge(len(chunk.text))
        idle.append(table)
        return chunk.offset + len(chunk.text)

    with open(path, "rb") as file:
        for done in in_order(count, read(file, special_ids), n_workers):
            progress("counting", done, size)
    total = idle.pop()
    for table in idle:
        total.add(table)
    return total


def in_order(work: Callable[[Chunk], T], chunks: Iterable[Chunk], n_threads: int) -> Iterator[T]:
    """The results of `work` on all chunks, in their order, with a few of them under way at a time."""
    if n_threads <= 1:
        yield from map(work, chunks)
        return
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        for chunk in chunks:
            waiting.append(pool.submit(work, chunk))
            if len(waiting) > 2 * n_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
