"""A hash table of pre-tokens: bytes -> a number, with open addressing, in three arrays.

A pre-token of up to 16 bytes is its own key: two 8-byte words and its length. A longer one stands in a pool,
and its key is a hash and its place there. When three quarters of the slots are taken, or the pool is full,
`insert` returns False and its caller enlarges the table.
"""

from dataclasses import dataclass

import numpy as np

from llm_basics.fast import numba_jit
from llm_basics.fast.text import scanner

# the columns of a slot; a length of zero marks an empty one
LOW, HIGH, LENGTH, VALUE = 0, 1, 2, 3

# how many slots are taken, how many bytes of the pool
TAKEN, POOLED = 0, 1

SHORT = 16
LONGEST_INLINE = np.uint64(SHORT)
NOTHING = np.uint64(0)
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
BYTE_SHIFT = np.uint64(3)
ONE = np.uint64(1)
TWO = np.uint64(2)
HALF = np.uint64(32)
BYTE = np.uint64(0xFF)


@dataclass
class Words:
    """The arrays of a table: slots of four numbers, the bytes of long pre-tokens, and how full both are."""

    slots: np.ndarray
    pool: np.ndarray
    used: np.ndarray

    @classmethod
    def empty(cls, n_slots: int = 1 << 16, n_pool: int = 1 << 16) -> "Words":
        """A table without entries."""
        return cls(_slots(n_slots), np.empty(n_pool, np.uint8), np.zeros(2, np.int64))

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What machine code is handed."""
        return self.slots, self.pool, self.used

    def __len__(self) -> int:
        return int(self.used[TAKEN])

    def copy(self) -> "Words":
        """Another table of the same."""
        return Words(self.slots.copy(), self.pool.copy(), self.used.copy())

    def enlarge(self, n_pool: int) -> None:
        """Make room: twice the slots if three quarters are taken, and `n_pool` more bytes in the pool."""
        if 4 * (len(self) + 1) > 3 * len(self.slots):
            slots = _slots(2 * len(self.slots))
            rehash(self.slots, slots)
            self.slots = slots
        if self.used[POOLED] + n_pool > len(self.pool):
            pool = np.empty(2 * len(self.pool) + n_pool, np.uint8)
            pool[: len(self.pool)] = self.pool
            self.pool = pool

    def add(self, other: "Words") -> None:
        """Add what `other` has counted."""
        done = 0
        while done < len(other.slots):
            done = add(other.slots, other.pool, done, *self.arrays)
            self.enlarge(int(other.used[POOLED]))

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The bytes of all entries in a row, and for each entry its length and its value."""
        lengths = np.empty(len(self), np.int64)
        values = np.empty(len(self), np.int64)
        text = np.empty(int(self.slots[:, LENGTH].sum()), np.uint8)
        write_columns(self.slots, self.pool, text, lengths, values)
        return text, lengths, values


def _slots(n: int) -> np.ndarray:
    """Empty slots; filled here, since what `zeros` gives is zeroed page by page when it is first touched."""
    slots = np.empty((n, 4), np.uint64)
    slots.fill(0)
    return slots


@numba_jit.inlined
def first_bytes(text: np.ndarray, i: int, n: int) -> np.uint64:
    """The `n` bytes of the text from byte `i` on, at least one and at most eight, with zeros behind."""
    return numba_jit.eight_bytes(text, i) & ((TWO << ((np.uint64(n) << BYTE_SHIFT) - ONE)) - ONE)


@numba_jit.inlined
def mix(low: np.uint64, high: np.uint64) -> np.uint64:
    """A hash whose every bit depends on all bits of `low` and `high`."""
    h = (low ^ (high * MULTIPLIER)) * MULTIPLIER
    h ^= h >> HALF
    h *= MULTIPLIER
    return h ^ (h >> HALF)


@numba_jit.jit
def hash_bytes(text: np.ndarray, start: int, n: int) -> np.uint64:
    """A hash of `n` bytes of the text."""
    h = np.uint64(n)
    for i in range(0, n, 8):
        h = mix(first_bytes(text, start + i, min(8, n - i)), h)
    return h


@numba_jit.jit
def same_bytes(text: np.ndarray, start: int, pool: np.ndarray, first: int, n: int) -> bool:
    """Whether `n` bytes of the text are those in the pool."""
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
    # all in unsigned numbers: to compare one with a signed number takes longer than all the rest
    mask, length = np.uint64(len(slots) - 1), np.uint64(n)
    place = mix(low, high) & mask
    while True:
        if slots[place, LENGTH] == length and slots[place, LOW] == low:
            if length > LONGEST_INLINE:
                if same_bytes(text, start, pool, slots[place, HIGH], n):
                    break
            elif slots[place, HIGH] == high:
                break
        elif slots[place, LENGTH] == NOTHING:
            break
        place = (place + ONE) & mask
    return np.int64(place)


@numba_jit.jit
def rehash(old: np.ndarray, new: np.ndarray) -> None:
    """Put all entries of `old` into the empty and larger `new`."""
    mask = len(new) - 1
    for k in range(len(old)):
        if old[k, LENGTH] != NOTHING:
            high = old[k, HIGH] if old[k, LENGTH] <= SHORT else np.uint64(0)
            place = np.int64(mix(old[k, LOW], high) & np.uint64(mask))
            while new[place, LENGTH] != NOTHING:
                place = (place + 1) & mask
            new[place] = old[k]


@numba_jit.inlined
def key_of(text: np.ndarray, start: int, n: int) -> tuple[np.uint64, np.uint64]:
    """The two numbers that stand for `n` bytes of the text: themselves, or for more than 16 a hash."""
    if n <= 8:
        return first_bytes(text, start, n), NOTHING
    if n <= SHORT:
        return numba_jit.eight_bytes(text, start), first_bytes(text, start + 8, n - 8)
    return hash_bytes(text, start, n), NOTHING


@numba_jit.jit
def insert(
    slots: np.ndarray,
    pool: np.ndarray,
    used: np.ndarray,
    place: int,
    text: np.ndarray,
    start: int,
    n: int,
    low: np.uint64,
    high: np.uint64,
) -> bool:
    """Write a new key into the empty slot `place`; False if the table needs to be enlarged first."""
    if 4 * (used[TAKEN] + 1) > 3 * len(slots) or (n > SHORT and used[POOLED] + n > len(pool)):
        return False
    slots[place, LOW], slots[place, HIGH], slots[place, LENGTH] = low, high, np.uint64(n)
    used[TAKEN] += 1
    if n > SHORT:
        slots[place, HIGH] = np.uint64(used[POOLED])
        for k in range(n):
            pool[used[POOLED] + k] = text[start + k]
        used[POOLED] += n
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
    """Count the pre-tokens in `spans` of a text; False, and where in `at`, if the table must be enlarged."""
    text, spans, classes = numba_jit.borrowed(text), numba_jit.borrowed(spans), numba_jit.borrowed(classes)
    slots, pool, used = numba_jit.borrowed(slots), numba_jit.borrowed(pool), numba_jit.borrowed(used)
    k, i = at[0], at[1]
    while k < len(spans):
        i, stop = max(i, spans[k, 0]), spans[k, 1]
        while i < stop:
            end = scanner.next_end(text, i, stop, classes, kind)
            low, high = key_of(text, i, end - i)
            place = find(slots, pool, text, i, end - i, low, high)
            if slots[place, LENGTH] == NOTHING and not insert(
                slots, pool, used, place, text, i, end - i, low, high
            ):
                at[0], at[1] = k, i
                return False
            slots[place, VALUE] += ONE
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
    """Add the values of another table from slot `done` on; returns where the table must be enlarged."""
    other_slots, other_pool = numba_jit.borrowed(other_slots), numba_jit.borrowed(other_pool)
    slots, pool, used = numba_jit.borrowed(slots), numba_jit.borrowed(pool), numba_jit.borrowed(used)
    for k in range(done, len(other_slots)):
        n = np.int64(other_slots[k, LENGTH])
        if n > 0:
            low, high, start = other_slots[k, LOW], other_slots[k, HIGH], 0
            if n > SHORT:
                start, high = np.int64(high), np.uint64(0)
            place = find(slots, pool, other_pool, start, n, low, high)
            if slots[place, LENGTH] == NOTHING and not insert(
                slots, pool, used, place, other_pool, start, n, low, high
            ):
                return k
            slots[place, VALUE] += other_slots[k, VALUE]
    return len(other_slots)


@numba_jit.jit
def write_columns(
    slots: np.ndarray, pool: np.ndarray, text: np.ndarray, lengths: np.ndarray, values: np.ndarray
) -> None:
    """Write all entries into the three arrays."""
    entry = at = 0
    for k in range(len(slots)):
        n = np.int64(slots[k, LENGTH])
        if n > 0:
            lengths[entry], values[entry] = n, slots[k, VALUE]
            entry += 1
            for j in range(n):
                if n > SHORT:
                    text[at + j] = pool[np.int64(slots[k, HIGH]) + j]
                else:
                    word = slots[k, LOW] if j < 8 else slots[k, HIGH]
                    text[at + j] = (word >> (np.uint64(j & 7) << BYTE_SHIFT)) & BYTE
            at += n
