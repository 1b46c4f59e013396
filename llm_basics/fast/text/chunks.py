"""Splits a file into chunks that are pre-tokenized independently, in constant memory.

A chunk ends at a pre-token boundary that no later text can move: after a run of letters or numbers, or at a
special token.
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

# the most bytes of a UTF-8 character
CHARACTER_BYTES = 4


@dataclass(frozen=True)
class Chunk:
    """Offset in the file, bytes, spans of ordinary text, and the special token's id after each span."""

    offset: int
    text: bytes
    spans: np.ndarray
    specials: np.ndarray


def split(text: bytes, special_ids: Mapping[bytes, int]) -> tuple[np.ndarray, np.ndarray]:
    """The spans of ordinary text, and the id of the special token after each; -1 after the last.

    >>> [array.tolist() for array in split(b"ab<|end|>c", {b"<|end|>": 7})]
    [[[0, 2], [9, 10]], [7, -1]]
    """
    present = sorted((token for token in special_ids if token in text), key=len, reverse=True)
    matches = []
    if len(present) == 1:
        at = text.find(present[0])
        while at >= 0:
            matches.append((at, at + len(present[0]), special_ids[present[0]]))
            at = text.find(present[0], matches[-1][1])
    elif present:
        for match in re.finditer(b"|".join(map(re.escape, present)), text):
            matches.append((match.start(), match.end(), special_ids[match.group()]))
    spans = np.empty((len(matches) + 1, 2), np.int64)
    spans[0, 0], spans[-1, 1] = 0, len(text)
    spans[1:, 0] = [end for _, end, _ in matches]
    spans[:-1, 1] = [start for start, _, _ in matches]
    return spans, np.array([id for _, _, id in matches] + [-1], np.int64)


def read(file: BinaryIO, special_ids: Mapping[bytes, int], n_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Yield the chunks of an open file, of about `n_bytes`; longer where there is no safe boundary."""
    offset, pending, n_searched = 0, b"", 0
    while block := file.read(n_bytes):
        pending += block
        if len(pending) < 2 * n_searched:
            continue  # searching after every block would be quadratic for text without a boundary
        spans, specials = split(pending, special_ids)
        end = safe_cut(pending, spans, max(CHARACTER_BYTES, *map(len, special_ids), 0))
        n_searched = 0 if end else len(pending)
        if end:
            n = int(np.searchsorted(spans[:, 0], end, side="right"))
            spans, specials = spans[:n], specials[:n]
            spans[-1, 1], specials[-1] = end, -1
            yield Chunk(offset, pending[:end], spans, specials)
            offset, pending = offset + end, pending[end:]
    yield Chunk(offset, pending, *split(pending, special_ids))


def safe_cut(text: bytes, spans: np.ndarray, uncertain: int) -> int:
    """The offset of a pre-token boundary that no later text can move; 0 if there is none.

    The last `uncertain` bytes may be the start of a special token or of a character.

    >>> safe_cut(b"one two, three", np.array([[0, 14]]), 4)
    7
    """
    certain = len(text) - uncertain
    starts = spans[1:, 0][spans[:-1, 1] <= certain]
    start = int(starts[-1]) if len(starts) else 0
    if start >= certain:
        return start
    # there is usually a boundary near the end
    for first in (max(start, certain - 4096), start):
        tail = scanner.padded(text[first : certain + CHARACTER_BYTES])
        matches = int(last_boundary(tail, certain - first, len(text) - first, scanner.classes()))
        if matches:
            return first + matches
    return start


@numba_jit.jit
def last_boundary(text: np.ndarray, last: int, n: int, classes: np.ndarray) -> int:
    """The last offset up to `last` where a run of letters or numbers ends; 0 if there is none."""
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
) -> hash_table.PretokenTable:
    """Count the pre-tokens of a UTF-8 file on `n_workers` threads."""
    size = Path(path).stat().st_size
    if n_workers is None:
        n_workers = reference.usable_cores() if size >= 8 * CHUNK_BYTES else 1
    classes, kind = scanner.classes(), scanner.SCANNERS[vocabulary.own_pattern(pattern)]
    special_ids = dict.fromkeys([special.encode("utf-8") for special in special_tokens if special], 0)
    idle: list[hash_table.PretokenTable] = []

    def count(chunk: Chunk) -> int:
        reference.check_utf8(chunk.text, path, chunk.offset)
        try:
            table = idle.pop()
        except IndexError:
            table = hash_table.PretokenTable.empty()
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
    """Yield the results of `work` in the order of the chunks, with a few in flight at a time."""
    if n_threads <= 1:
        yield from map(work, chunks)
        return
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        for chunk in chunks:
            pending.append(pool.submit(work, chunk))
            if len(pending) > 2 * n_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
