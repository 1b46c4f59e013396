"""A hash table from pre-tokens to uint64 values, with open addressing, in three arrays.

A slot has four columns. A pre-token of up to 16 bytes is its own key: two 8-byte words and its length. For a
longer one, the key is a hash, and its offset in a pool of bytes. At a load factor of 3/4, or when the pool is
full, `insert` returns False and the caller enlarges the table.
"""

from dataclasses import dataclass

import numpy as np

from llm_basics.fast import numba_jit
from llm_basics.fast.text import scanner

# columns of a slot; an empty slot has length 0
LOW, HIGH, LENGTH, VALUE = 0, 1, 2, 3

# indices into `used`: occupied slots, occupied bytes of the pool
N_ENTRIES, N_POOL_BYTES = 0, 1

MAX_INLINE = 16
INLINE_LENGTH = np.uint64(MAX_INLINE)
ZERO = np.uint64(0)
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
BYTE_SHIFT = np.uint64(3)
ONE = np.uint64(1)
TWO = np.uint64(2)
HALF_SHIFT = np.uint64(32)
BYTE = np.uint64(0xFF)


@dataclass
class PretokenTable:
    """The arrays of a table: slots (n, 4), the bytes of long pre-tokens, and how full both are."""

    slots: np.ndarray
    pool: np.ndarray
    used: np.ndarray

    @classmethod
    def empty(cls, n_slots: int = 1 << 16, n_pool: int = 1 << 16) -> "PretokenTable":
        """A table without entries."""
        return cls(_slots(n_slots), np.empty(n_pool, np.uint8), np.zeros(2, np.int64))

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The arguments of the kernels."""
        return self.slots, self.pool, self.used

    def __len__(self) -> int:
        return int(self.used[N_ENTRIES])

    def copy(self) -> "PretokenTable":
        """An independent copy."""
        return PretokenTable(self.slots.copy(), self.pool.copy(), self.used.copy())

    def enlarge(self, n_pool: int) -> None:
        """Double the slots at a load factor of 3/4, and provide `n_pool` free bytes in the pool."""
        if 4 * (len(self) + 1) > 3 * len(self.slots):
            slots = _slots(2 * len(self.slots))
            rehash(self.slots, slots)
            self.slots = slots
        if self.used[N_POOL_BYTES] + n_pool > len(self.pool):
            pool = np.empty(2 * len(self.pool) + n_pool, np.uint8)
            pool[: len(self.pool)] = self.pool
            self.pool = pool

    def add(self, other: "PretokenTable") -> None:
        """Add the counts of `other`."""
        done = 0
        while done < len(other.slots):
            done = add(other.slots, other.pool, done, *self.arrays)
            self.enlarge(int(other.used[N_POOL_BYTES]))

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The concatenated bytes of all entries, their lengths and their values."""
        lengths = np.empty(len(self), np.int64)
        values = np.empty(len(self), np.int64)
        text = np.empty(int(self.slots[:, LENGTH].sum()), np.uint8)
        write_columns(self.slots, self.pool, text, lengths, values)
        return text, lengths, values


def _slots(n: int) -> np.ndarray:
    """Empty slots, zeroed now: the pages of `np.zeros` are zeroed at first access, which is slower."""
    slots = np.empty((n, 4), np.uint64)
    slots.fill(0)
    return slots


@numba_jit.inlined
def first_bytes(text: np.ndarray, i: int, n: int) -> np.uint64:
    """0 <= `n` <= 8 bytes of the text from byte `i`, zero-padded to a word."""
    # shifted twice, since a shift by all 64 bits is undefined
    half = np.uint64(n) << TWO
    return numba_jit.eight_bytes(text, i) & ((ONE << half << half) - ONE)


@numba_jit.inlined
def mix(low: np.uint64, high: np.uint64) -> np.uint64:
    """A hash of two words in which every bit depends on all bits of both."""
    h = (low ^ (high * MULTIPLIER)) * MULTIPLIER
    h ^= h >> HALF_SHIFT
    h *= MULTIPLIER
    return h ^ (h >> HALF_SHIFT)


@numba_jit.jit
def hash_bytes(text: np.ndarray, start: int, n: int) -> np.uint64:
    """Hash of `n` bytes of the text."""
    h = np.uint64(n)
    for i in range(0, n, 8):
        h = mix(first_bytes(text, start + i, min(8, n - i)), h)
    return h


@numba_jit.jit
def same_bytes(text: np.ndarray, start: int, pool: np.ndarray, first: int, n: int) -> bool:
    """Whether `n` bytes of the text equal those in the pool."""
    at = np.int64(first)
    for k in range(n):
        if text[start + k] != pool[at + k]:
            return False
    return True


@numba_jit.jit
def find(
    slots: np.ndarray,
    pool: np.ndarray,
    text: np.ndarray,
    start: int,
    n: int,
    low: np.uint64,
    high: np.uint64,
) -> int:
    """The slot of the pre-token at `start`, or the empty one where it belongs."""
    # all unsigned: mixed-sign comparisons would dominate the run time
    mask, length = np.uint64(len(slots) - 1), np.uint64(n)
    slot = mix(low, high) & mask
    while True:
        if slots[slot, LENGTH] == length and slots[slot, LOW] == low:
            if length > INLINE_LENGTH:
                if same_bytes(text, start, pool, slots[slot, HIGH], n):
                    break
            elif slots[slot, HIGH] == high:
                break
        elif slots[slot, LENGTH] == ZERO:
            break
        slot = (slot + ONE) & mask
    return np.int64(slot)


@numba_jit.jit
def rehash(old: np.ndarray, new: np.ndarray) -> None:
    """Insert all entries of `old` into the empty, larger `new`."""
    mask = len(new) - 1
    for k in range(len(old)):
        if old[k, LENGTH] != ZERO:
            high = old[k, HIGH] if old[k, LENGTH] <= MAX_INLINE else np.uint64(0)
            slot = np.int64(mix(old[k, LOW], high) & np.uint64(mask))
            while new[slot, LENGTH] != ZERO:
                slot = (slot + 1) & mask
            new[slot] = old[k]


@numba_jit.inlined
def key_of(text: np.ndarray, start: int, n: int) -> tuple[np.uint64, np.uint64]:
    """The two words of the key of `n` bytes: the bytes themselves, or a hash if more than 16."""
    if n > MAX_INLINE:
        return hash_bytes(text, start, n), ZERO
    # without a branch at eight bytes, which would be unpredictable
    n_low = min(n, 8)
    return first_bytes(text, start, n_low), first_bytes(text, start + 8, n - n_low)


@numba_jit.jit
def insert(
    slots: np.ndarray,
    pool: np.ndarray,
    used: np.ndarray,
    slot: int,
    text: np.ndarray,
    start: int,
    n: int,
    low: np.uint64,
    high: np.uint64,
) -> bool:
    """Write a new key into the empty slot `slot`; False if the table must be enlarged first."""
    if 4 * (used[N_ENTRIES] + 1) > 3 * len(slots) or (n > MAX_INLINE and used[N_POOL_BYTES] + n > len(pool)):
        return False
    slots[slot, LOW], slots[slot, HIGH], slots[slot, LENGTH] = low, high, np.uint64(n)
    used[N_ENTRIES] += 1
    if n > MAX_INLINE:
        slots[slot, HIGH] = np.uint64(used[N_POOL_BYTES])
        for k in range(n):
            pool[used[N_POOL_BYTES] + k] = text[start + k]
        used[N_POOL_BYTES] += n
    return True


@numba_jit.jit
def count(
    text: np.ndarray,
    spans: np.ndarray,
    at: np.ndarray,
    classes: np.ndarray,
    kind: int,
    slots: np.ndarray,
    pool: np.ndarray,
    used: np.ndarray,
) -> bool:
    """Count the pre-tokens in `spans` of a text.

    Returns False if the table must be enlarged; `at` then holds the span and byte to resume from.
    """
    text, spans, classes = numba_jit.borrowed(text), numba_jit.borrowed(spans), numba_jit.borrowed(classes)
    slots, pool, used = numba_jit.borrowed(slots), numba_jit.borrowed(pool), numba_jit.borrowed(used)
    k, i = at[0], at[1]
    while k < len(spans):
        i, stop = max(i, spans[k, 0]), spans[k, 1]
        while i < stop:
            end = scanner.next_end(text, i, stop, classes, kind)
            low, high = key_of(text, i, end - i)
            slot = find(slots, pool, text, i, end - i, low, high)
            if slots[slot, LENGTH] == ZERO and not insert(
                slots, pool, used, slot, text, i, end - i, low, high
            ):
                at[0], at[1] = k, i
                return False
            slots[slot, VALUE] += ONE
            i = end
        k += 1
    return True


@numba_jit.jit
def add(
    other_slots: np.ndarray,
    other_pool: np.ndarray,
    done: int,
    slots: np.ndarray,
    pool: np.ndarray,
    used: np.ndarray,
) -> int:
    """Add another table's values from slot `done`; returns the slot to resume from after enlarging."""
    other_slots, other_pool = numba_jit.borrowed(other_slots), numba_jit.borrowed(other_pool)
    slots, pool, used = numba_jit.borrowed(slots), numba_jit.borrowed(pool), numba_jit.borrowed(used)
    for k in range(done, len(other_slots)):
        n = np.int64(other_slots[k, LENGTH])
        if n > 0:
            low, high, start = other_slots[k, LOW], other_slots[k, HIGH], 0
            if n > MAX_INLINE:
                start, high = np.int64(high), np.uint64(0)
            slot = find(slots, pool, other_pool, start, n, low, high)
            if slots[slot, LENGTH] == ZERO and not insert(
                slots, pool, used, slot, other_pool, start, n, low, high
            ):
                return k
            slots[slot, VALUE] += other_slots[k, VALUE]
    return len(other_slots)


@numba_jit.jit
def write_columns(
    slots: np.ndarray, pool: np.ndarray, text: np.ndarray, lengths: np.ndarray, values: np.ndarray
) -> None:
    """Write the bytes, lengths and values of all entries into three arrays."""
    entry = at = 0
    for k in range(len(slots)):
        n = np.int64(slots[k, LENGTH])
        if n > 0:
            lengths[entry], values[entry] = n, slots[k, VALUE]
            entry += 1
            for j in range(n):
                if n > MAX_INLINE:
                    text[at + j] = pool[np.int64(slots[k, HIGH]) + j]
                else:
                    word = slots[k, LOW] if j < 8 else slots[k, HIGH]
                    text[at + j] = (word >> (np.uint64(j & 7) << BYTE_SHIFT)) & BYTE
            at += n
