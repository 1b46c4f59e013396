"""Encodes UTF-8 bytes to token ids: scan for pre-tokens, look each up in the cache, merge the new ones.

Byte b is symbol b, and the merge of rank r produces symbol 256 + r. Symbols are mapped to ids when a
pre-token enters the cache.
"""

import heapq
from typing import NamedTuple

import numpy as np

from llm_basics.fast import numba_jit
from llm_basics.fast.text import hash_table, scanner

# longer pre-tokens are not cached, and are merged with a heap instead of a scan over all pairs
MAX_CACHED_BYTES = 96

# the value of a cached pre-token: its number of ids, and below that bit its only id or the ids' offset
N_IDS_SHIFT = np.uint64(40)
OFFSET_MASK = np.uint64((1 << 40) - 1)

# indices into `counts`: cached ids, written ids
N_CACHED_IDS, N_WRITTEN = 0, 1

# greater than any rank; a rank and a position together fit into 64 bits
NO_MERGE = np.int64(1 << 30)
EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
# an entry of the merge table: left symbol, right symbol, rank
SYMBOL_BITS = np.uint64(21)
MAX_SYMBOL = np.uint64((1 << 21) - 1)


class Merges(NamedTuple):
    """Merge table with open addressing (pair of symbols -> rank), rank -> symbol, symbol -> id."""

    table: np.ndarray
    # ranks of pairs of bytes, looked up most often: (left, right)
    byte_level: np.ndarray
    merged: np.ndarray
    ids: np.ndarray


@numba_jit.inlined
def slot_of(left: int, right: int, table: np.ndarray) -> tuple[np.uint64, np.uint64]:
    """The key of two symbols, and its slot: the one that holds it, or the empty one where it belongs."""
    mask = np.uint64(len(table) - 1)
    key = np.uint64(left) << SYMBOL_BITS | np.uint64(right)
    slot = hash_table.mix(key, EMPTY) & mask
    while table[slot] != EMPTY and table[slot] >> SYMBOL_BITS != key:
        slot = (slot + hash_table.ONE) & mask
    return key, slot


@numba_jit.jit
def fill_merge_table(
    lefts: np.ndarray, rights: np.ndarray, table: np.ndarray, byte_level: np.ndarray
) -> None:
    """Write all merges into the empty table; for duplicate pairs the last rank wins."""
    for rank in range(len(lefts)):
        key, slot = slot_of(lefts[rank], rights[rank], table)
        table[slot] = key << SYMBOL_BITS | np.uint64(rank)
        if lefts[rank] < 256 and rights[rank] < 256:
            byte_level[lefts[rank], rights[rank]] = rank


@numba_jit.jit
def rank_of(left: int, right: int, table: np.ndarray) -> int:
    """The rank of the merge of two symbols, or NO_MERGE."""
    _, slot = slot_of(left, right, table)
    if table[slot] == EMPTY:
        return NO_MERGE
    return np.int64(table[slot] & MAX_SYMBOL)


@numba_jit.jit
def merge_short(
    text: np.ndarray, start: int, n: int, merges: Merges, symbols: np.ndarray, ranks: np.ndarray
) -> int:
    """Merge `n` bytes, always the lowest rank first, into `symbols`; returns how many are left."""
    table, byte_level, merged = merges.table, merges.byte_level, merges.merged
    for k in range(n):
        symbols[k] = text[start + k]
    for k in range(n - 1):
        ranks[k] = byte_level[symbols[k], symbols[k + 1]]
    while n > 1:
        best = 0
        for k in range(1, n - 1):
            if ranks[k] < ranks[best]:
                best = k
        if ranks[best] == NO_MERGE:
            break
        symbols[best] = merged[ranks[best]]
        n -= 1
        for k in range(best + 1, n):
            symbols[k] = symbols[k + 1]
        for k in range(best + 1, n - 1):
            ranks[k] = ranks[k + 1]
        if best > 0:
            ranks[best - 1] = rank_of(symbols[best - 1], symbols[best], table)
        if best < n - 1:
            ranks[best] = rank_of(symbols[best], symbols[best + 1], table)
    return n


@numba_jit.jit
def merge_long(text: np.ndarray, start: int, n: int, merges: Merges, out: np.ndarray, at: int) -> int:
    """Merge `n` bytes in O(n log n) with a heap of ranks; writes ids to `out` and returns their end.

    `merge_short` takes O(n^2), which is faster for short pre-tokens.
    """
    table, byte_level, merged = merges.table, merges.byte_level, merges.merged
    symbols, ranks = np.empty(n, np.int32), np.empty(n, np.int64)
    after, before = np.empty(n, np.int32), np.empty(n, np.int32)
    for k in range(n):
        symbols[k] = text[start + k]
        before[k], after[k] = k - 1, k + 1
    for k in range(n - 1):
        ranks[k] = byte_level[symbols[k], symbols[k + 1]]
    # rank, then position: among equal ranks the leftmost comes first
    heap = [ranks[k] << 32 | k for k in range(n - 1) if ranks[k] != NO_MERGE]
    heapq.heapify(heap)
    while len(heap) > 0:
        top = heapq.heappop(heap)
        rank, k = top >> 32, top & 0xFFFFFFFF
        if symbols[k] < 0 or ranks[k] != rank:
            continue  # another merge changed this pair
        right = after[k]
        symbols[k], symbols[right] = merged[rank], -1
        after[k] = after[right]
        ranks[k] = NO_MERGE
        if after[k] < n:
            before[after[k]] = k
            ranks[k] = rank_of(symbols[k], symbols[after[k]], table)
            if ranks[k] != NO_MERGE:
                heapq.heappush(heap, ranks[k] << 32 | k)
        left = before[k]
        if left >= 0:
            ranks[left] = rank_of(symbols[left], symbols[k], table)
            if ranks[left] != NO_MERGE:
                heapq.heappush(heap, ranks[left] << 32 | left)
    k = 0
    while k < n:
        out[at] = merges.ids[symbols[k]]
        at += 1
        k = after[k]
    return at


@numba_jit.jit
def encode(
    text: np.ndarray,
    spans: np.ndarray,
    specials: np.ndarray,
    at: np.ndarray,
    classes: np.ndarray,
    kind: int,
    merges: Merges,
    slots: np.ndarray,
    pool: np.ndarray,
    used: np.ndarray,
    cached_ids: np.ndarray,
    counts: np.ndarray,
    out: np.ndarray,
) -> bool:
    """Write the ids of the `spans` of `text`, with `specials` between them, to `out`.

    Returns False if the cache is full; `at` then holds the span and byte to resume from.
    """
    text, spans, classes = numba_jit.borrowed(text), numba_jit.borrowed(spans), numba_jit.borrowed(classes)
    slots, pool, used = numba_jit.borrowed(slots), numba_jit.borrowed(pool), numba_jit.borrowed(used)
    cached_ids, counts, out = (
        numba_jit.borrowed(cached_ids),
        numba_jit.borrowed(counts),
        numba_jit.borrowed(out),
    )
    merges = numba_jit.borrowed(merges)
    symbols, ranks = np.empty(MAX_CACHED_BYTES, np.int64), np.empty(MAX_CACHED_BYTES, np.int64)
    k, i, m, ids = at[0], at[1], counts[N_WRITTEN], merges.ids
    while k < len(spans):
        i, stop = max(i, spans[k, 0]), spans[k, 1]
        while i < stop:
            end = scanner.next_end(text, i, stop, classes, kind)
            n = end - i
            if n > MAX_CACHED_BYTES:
                m = merge_long(text, i, n, merges, out, m)
                i = end
                continue
            low, high = hash_table.key_of(text, i, n)
            slot = hash_table.find(slots, pool, text, i, n, low, high)
            if slots[slot, hash_table.LENGTH] == hash_table.ZERO:
                if counts[N_CACHED_IDS] + n > len(cached_ids) or not hash_table.insert(
                    slots, pool, used, slot, text, i, n, low, high
                ):
                    at[0], at[1], counts[N_WRITTEN] = k, i, m
                    return False
                slots[slot, hash_table.VALUE] = cache_ids(
                    merge_short(text, i, n, merges, symbols, ranks), symbols, ids, cached_ids, counts
                )
            m = write_cached(slots[slot, hash_table.VALUE], cached_ids, out, m)
            i = end
        if specials[k] >= 0:
            out[m] = specials[k]
            m += 1
        k += 1
    counts[N_WRITTEN] = m
    return True


@numba_jit.inlined
def write_cached(value: np.uint64, cached_ids: np.ndarray, out: np.ndarray, at: int) -> int:
    """Write the ids encoded in `value` to `out`; returns their end."""
    n_ids, first = np.int64(value >> N_IDS_SHIFT), np.int64(value & OFFSET_MASK)
    if n_ids == 1:
        out[at] = first
    else:
        for k in range(n_ids):
            out[at + k] = cached_ids[first + k]
    return at + n_ids


@numba_jit.jit
def cache_ids(
    n: int, symbols: np.ndarray, ids: np.ndarray, cached_ids: np.ndarray, counts: np.ndarray
) -> np.uint64:
    """The cache value for the ids of `n` symbols; stores several ids in `cached_ids`."""
    if n == 1:
        return hash_table.ONE << N_IDS_SHIFT | np.uint64(ids[symbols[0]])
    first = counts[N_CACHED_IDS]
    for k in range(n):
        cached_ids[first + k] = ids[symbols[k]]
    counts[N_CACHED_IDS] += n
    return np.uint64(n) << N_IDS_SHIFT | np.uint64(first)
