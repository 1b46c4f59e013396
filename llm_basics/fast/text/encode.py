"""From the bytes of a text to token ids in machine code: scan, look each pre-token up, merge the new ones.

A byte is its own symbol, and merge number r, its rank, makes symbol 256 + r. Ids come in when a pre-token is
remembered.
"""

import heapq
from typing import NamedTuple

import numpy as np

from llm_basics.fast import numba_jit
from llm_basics.fast.text import hash_table, scanner

# pre-tokens up to this many bytes are remembered, and merged by looking at all pairs again after each merge
REMEMBERED_BYTES = 96

# the value of a remembered pre-token: how many ids it has, above its only id or where the ids stand
N_IDS_SHIFT = np.uint64(40)
PLACE = np.uint64((1 << 40) - 1)

# what a coder counts: ids remembered, ids written
N_REMEMBERED, N_WRITTEN = 0, 1

# greater than any rank, and a rank and a place together still fit into 64 bits
NO_MERGE = np.int64(1 << 30)
EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
# an entry of the table of merges: left symbol, right symbol, rank
SYMBOL_BITS = np.uint64(21)
LAST_SYMBOL = np.uint64((1 << 21) - 1)


class Merges(NamedTuple):
    """What a tokenizer has learned: pairs of symbols -> rank, by open addressing; rank -> symbol -> id."""

    table: np.ndarray
    # the ranks of pairs of bytes, which are looked up most, by both
    byte_level: np.ndarray
    made: np.ndarray
    ids: np.ndarray


@numba_jit.inlined
def place_of(left: int, right: int, table: np.ndarray) -> tuple[np.uint64, np.uint64]:
    """The key of two symbols, and its place in the table: where it is, or where it would have to be."""
    mask = np.uint64(len(table) - 1)
    key = np.uint64(left) << SYMBOL_BITS | np.uint64(right)
    place = hash_table.mix(key, EMPTY) & mask
    while table[place] != EMPTY and table[place] >> SYMBOL_BITS != key:
        place = (place + hash_table.ONE) & mask
    return key, place


@numba_jit.jit
def put_merges(lefts: np.ndarray, rights: np.ndarray, table: np.ndarray, byte_level: np.ndarray) -> None:
    """Write all merges into the empty table; of a pair that occurs twice the last rank counts."""
    for rank in range(len(lefts)):
        key, place = place_of(lefts[rank], rights[rank], table)
        table[place] = key << SYMBOL_BITS | np.uint64(rank)
        if lefts[rank] < 256 and rights[rank] < 256:
            byte_level[lefts[rank], rights[rank]] = rank


@numba_jit.jit
def rank_of(left: int, right: int, table: np.ndarray) -> int:
    """The rank of the merge of two symbols, or NO_MERGE."""
    _, place = place_of(left, right, table)
    if table[place] == EMPTY:
        return NO_MERGE
    return np.int64(table[place] & LAST_SYMBOL)


@numba_jit.jit
def merge_short(
    text: np.ndarray, start: int, n: int, merges: Merges, symbols: np.ndarray, found: np.ndarray
) -> int:
    """Merge `n` bytes, always the lowest rank first, into `symbols`; returns how many are left."""
    table, byte_level, made = merges.table, merges.byte_level, merges.made
    for k in range(n):
        symbols[k] = text[start + k]
    for k in range(n - 1):
        found[k] = byte_level[symbols[k], symbols[k + 1]]
    while n > 1:
        best = 0
        for k in range(1, n - 1):
            if found[k] < found[best]:
                best = k
        if found[best] == NO_MERGE:
            break
        symbols[best] = made[found[best]]
        n -= 1
        for k in range(best + 1, n):
            symbols[k] = symbols[k + 1]
        for k in range(best + 1, n - 1):
            found[k] = found[k + 1]
        if best > 0:
            found[best - 1] = rank_of(symbols[best - 1], symbols[best], table)
        if best < n - 1:
            found[best] = rank_of(symbols[best], symbols[best + 1], table)
    return n


@numba_jit.jit
def merge_long(text: np.ndarray, start: int, n: int, merges: Merges, out: np.ndarray, at: int) -> int:
    """Merge `n` bytes with a heap of ranks, for pre-tokens of any length; writes ids, returns where they end.

    Takes n log n steps where `merge_short` takes n squared.
    """
    table, byte_level, made = merges.table, merges.byte_level, merges.made
    symbols, found = np.empty(n, np.int32), np.empty(n, np.int64)
    after, before = np.empty(n, np.int32), np.empty(n, np.int32)
    for k in range(n):
        symbols[k] = text[start + k]
        before[k], after[k] = k - 1, k + 1
    for k in range(n - 1):
        found[k] = byte_level[symbols[k], symbols[k + 1]]
    # rank, then place: of equal ranks the leftmost comes first
    heap = [found[k] << 32 | k for k in range(n - 1) if found[k] != NO_MERGE]
    heapq.heapify(heap)
    while len(heap) > 0:
        top = heapq.heappop(heap)
        rank, k = top >> 32, top & 0xFFFFFFFF
        if symbols[k] < 0 or found[k] != rank:
            continue  # another merge changed this pair
        right = after[k]
        symbols[k], symbols[right] = made[rank], -1
        after[k] = after[right]
        found[k] = NO_MERGE
        if after[k] < n:
            before[after[k]] = k
            found[k] = rank_of(symbols[k], symbols[after[k]], table)
            if found[k] != NO_MERGE:
                heapq.heappush(heap, found[k] << 32 | k)
        left = before[k]
        if left >= 0:
            found[left] = rank_of(symbols[left], symbols[k], table)
            if found[left] != NO_MERGE:
                heapq.heappush(heap, found[left] << 32 | left)
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
    memory: np.ndarray,
    counts: np.ndarray,
    out: np.ndarray,
) -> bool:
    """Write the ids of the `spans` of `text`, with `specials` between them, to `out`.

    False, and where in `at`, if the table of remembered pre-tokens must be enlarged before it goes on.
    """
    text, spans, classes = numba_jit.borrowed(text), numba_jit.borrowed(spans), numba_jit.borrowed(classes)
    slots, pool, used = numba_jit.borrowed(slots), numba_jit.borrowed(pool), numba_jit.borrowed(used)
    memory, counts, out = numba_jit.borrowed(memory), numba_jit.borrowed(counts), numba_jit.borrowed(out)
    merges = numba_jit.borrowed(merges)
    symbols, found = np.empty(REMEMBERED_BYTES, np.int64), np.empty(REMEMBERED_BYTES, np.int64)
    k, i, m, ids = at[0], at[1], counts[N_WRITTEN], merges.ids
    while k < len(spans):
        i, stop = max(i, spans[k, 0]), spans[k, 1]
        while i < stop:
            end = scanner.next_end(text, i, stop, classes, kind)
            n = end - i
            if n > REMEMBERED_BYTES:
                m = merge_long(text, i, n, merges, out, m)
                i = end
                continue
            low, high = hash_table.key_of(text, i, n)
            place = hash_table.find(slots, pool, text, i, n, low, high)
            if slots[place, hash_table.LENGTH] == hash_table.NOTHING:
                if counts[N_REMEMBERED] + n > len(memory) or not hash_table.insert(
                    slots, pool, used, place, text, i, n, low, high
                ):
                    at[0], at[1], counts[N_WRITTEN] = k, i, m
                    return False
                slots[place, hash_table.VALUE] = remember(
                    merge_short(text, i, n, merges, symbols, found), symbols, ids, memory, counts
                )
            m = recall(slots[place, hash_table.VALUE], memory, out, m)
            i = end
        if specials[k] >= 0:
            out[m] = specials[k]
            m += 1
        k += 1
    counts[N_WRITTEN] = m
    return True


@numba_jit.inlined
def recall(value: np.uint64, memory: np.ndarray, out: np.ndarray, at: int) -> int:
    """Write the ids that `value` stands for; returns where they end."""
    n_ids, first = np.int64(value >> N_IDS_SHIFT), np.int64(value & PLACE)
    if n_ids == 1:
        out[at] = first
    else:
        for k in range(n_ids):
            out[at + k] = memory[first + k]
    return at + n_ids


@numba_jit.jit
def remember(
    n: int, symbols: np.ndarray, ids: np.ndarray, memory: np.ndarray, counts: np.ndarray
) -> np.uint64:
    """The value that stands for the ids of `n` symbols; several ids go into `memory`."""
    if n == 1:
        return hash_table.ONE << N_IDS_SHIFT | np.uint64(ids[symbols[0]])
    first = counts[N_REMEMBERED]
    for k in range(n):
        memory[first + k] = ids[symbols[k]]
    counts[N_REMEMBERED] += n
    return np.uint64(n) << N_IDS_SHIFT | np.uint64(first)
