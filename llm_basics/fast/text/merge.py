"""BPE merging: one array of symbols, all pairs of neighbors with their positions, and a heap of pairs.

A pair is created only by the merge that makes the newer of its tokens, so its positions are listed then and
never extended. Its count only decreases, so a stale heap entry is updated when it reaches the top. Each
position stores the pair that begins there, so merging needs no lookups.
"""

from typing import NamedTuple

import numpy as np

from llm_basics.fast import numba_jit

# separates words: before each and after the last
BORDER = -1
# no pair begins at this position: the last token of a word, or the inside of a token
NO_PAIR = -1

# columns of `pairs`: two tokens, the count, the index of the first position, the number of positions
LEFT, RIGHT, COUNT, FIRST, N_POSITIONS = 0, 1, 2, 3, 4

# indices into `used`: the used lengths of a Merger's arrays
N_TOKENS, N_PAIRS, N_LISTED, N_HEAP, N_NEW = 0, 1, 2, 3, 4
# the lowest count of pairs on the heap; lowered when it is empty
THRESHOLD = 5

GROWABLE = ("pairs", "positions", "heap", "heap_counts", "tokens", "new_pairs", "new_positions")


class Merger(NamedTuple):
    """All words in one array of symbols, with borders between them, and all pairs of neighbors.

    A token occupies the positions of its bytes. `symbols` stores it at the first and the last of them, where
    its neighbors read it; `pair_at` stores at the first the pair that starts there.
    """

    symbols: np.ndarray
    pair_at: np.ndarray
    word_at: np.ndarray
    frequencies: np.ndarray
    pairs: np.ndarray
    positions: np.ndarray
    # a heap of pairs, and their counts when they were pushed
    heap: np.ndarray
    heap_counts: np.ndarray
    # the bytes of all tokens, and the offset of each token
    tokens: np.ndarray
    begins: np.ndarray
    # pairs of the newest token, by their other token
    with_left: np.ndarray
    with_right: np.ndarray
    # positions of these pairs, in the order of their discovery
    new_pairs: np.ndarray
    new_positions: np.ndarray
    merges: np.ndarray
    # used lengths of the arrays
    used: np.ndarray


@numba_jit.jit
def write_symbols(
    text: np.ndarray, lengths: np.ndarray, symbol_of: np.ndarray, symbols: np.ndarray, word_at: np.ndarray
) -> None:
    """Write the symbols of all words, with a border before each."""
    start = at = 0
    for word in range(len(lengths)):
        at += 1
        for k in range(start, start + lengths[word]):
            symbols[at] = symbol_of[text[k]]
            word_at[at] = word
            at += 1
        start += lengths[word]


@numba_jit.jit
def find_pairs(m: Merger, pair_of: np.ndarray) -> None:
    """Find all pairs of bytes, their counts and positions."""
    n_pairs = 0
    for i in range(len(m.symbols) - 1):
        left, right = m.symbols[i], m.symbols[i + 1]
        if left != BORDER and right != BORDER:
            if pair_of[left, right] == NO_PAIR:
                pair_of[left, right] = n_pairs
                m.pairs[n_pairs, LEFT], m.pairs[n_pairs, RIGHT] = left, right
                n_pairs += 1
            pair = pair_of[left, right]
            m.pair_at[i] = pair
            m.pairs[pair, COUNT] += m.frequencies[m.word_at[i]]
            m.pairs[pair, N_POSITIONS] += 1
    m.used[N_PAIRS] = n_pairs
    n_positions = 0
    for pair in range(n_pairs):
        m.pairs[pair, FIRST] = n_positions
        n_positions += m.pairs[pair, N_POSITIONS]
        m.pairs[pair, N_POSITIONS] = 0
    m.used[N_LISTED] = n_positions
    for i in range(len(m.symbols)):
        pair = m.pair_at[i]
        if pair != NO_PAIR:
            m.positions[m.pairs[pair, FIRST] + m.pairs[pair, N_POSITIONS]] = i
            m.pairs[pair, N_POSITIONS] += 1


@numba_jit.inlined
def length(begins: np.ndarray, token: int) -> int:
    """The number of bytes of `token`."""
    return begins[token + 1] - begins[token]


@numba_jit.jit
def required_lengths(m: Merger) -> tuple[int, int, int, int, int, int, int]:
    """The lengths that the arrays in GROWABLE must have for the next merge."""
    if m.used[N_HEAP] == 0:
        return 0, 0, 0, 0, 0, 0, 0
    pair = m.pairs[m.heap[0]]
    n_new = 2 * pair[N_POSITIONS]
    end = m.begins[m.used[N_TOKENS]] + length(m.begins, pair[LEFT]) + length(m.begins, pair[RIGHT])
    n_pairs = m.used[N_PAIRS] + n_new
    return n_pairs, m.used[N_LISTED] + n_new, n_pairs, n_pairs, end, n_new, n_new


@numba_jit.jit
def merge(m: Merger, until: int, by_id: bool) -> bool:
    """Merge the most frequent pairs until there are `until` tokens; False if no pair is left.

    Returns early if an array is too short for the next merge.
    """
    m = numba_jit.borrowed(m)
    while m.used[N_TOKENS] < until:
        if not update_top(m, by_id):
            return False
        pairs, positions, heap, _, tokens, n_new, _ = required_lengths(m)
        if (
            pairs > len(m.pairs)
            or positions > len(m.positions)
            or heap > len(m.heap)
            or tokens > len(m.tokens)
            or n_new > len(m.new_pairs)
        ):
            return True
        first = m.used[N_PAIRS]
        pair = m.heap[0]
        replace(m, pair, add_token(m, pair))
        list_positions(m, first)
        push(m, first, by_id)
    return True


@numba_jit.jit
def add_token(m: Merger, pair: int) -> int:
    """Append the token that `pair` merges to."""
    new = m.used[N_TOKENS]
    left, right = m.pairs[pair, LEFT], m.pairs[pair, RIGHT]
    m.merges[new - 256, 0], m.merges[new - 256, 1] = left, right
    at = m.begins[new]
    for part in (left, right):
        for k in range(m.begins[part], m.begins[part + 1]):
            m.tokens[at] = m.tokens[k]
            at += 1
    m.begins[new + 1] = at
    m.used[N_TOKENS] += 1
    return new


@numba_jit.jit
def replace(m: Merger, pair: int, new: int) -> None:
    """Replace all occurrences of `pair` by `new`, left to right, and count the new pairs."""
    # local names: each attribute access of the tuple would count references to the array
    symbols, pair_at, pairs, begins = m.symbols, m.pair_at, m.pairs, m.begins
    word_at, frequencies, positions = m.word_at, m.frequencies, m.positions
    with_left, with_right, new_pairs, new_positions = m.with_left, m.with_right, m.new_pairs, m.new_positions
    n_pairs, n_new = m.used[N_PAIRS], 0
    length_left, length_new = length(begins, pairs[pair, LEFT]), length(begins, new)
    for k in range(pairs[pair, FIRST], pairs[pair, FIRST] + pairs[pair, N_POSITIONS]):
        i = positions[k]
        if pair_at[i] != pair:
            continue  # an earlier merge changed this position
        right, end = i + length_left, i + length_new
        before, after = symbols[i - 1], symbols[end]
        count = frequencies[word_at[i]]
        pairs[pair, COUNT] -= count
        pair_at[i] = NO_PAIR
        if before != BORDER:
            at = i - length(begins, before)
            pairs[pair_at[at], COUNT] -= count
            if with_left[before] == NO_PAIR:
                with_left[before] = n_pairs
                n_pairs = add_pair(pairs, n_pairs, before, new)
            pair_at[at] = with_left[before]
            n_new = add_position(pairs, with_left[before], count, new_pairs, new_positions, n_new, at)
        if after != BORDER:
            pairs[pair_at[right], COUNT] -= count
            if with_right[after] == NO_PAIR:
                with_right[after] = n_pairs
                n_pairs = add_pair(pairs, n_pairs, new, after)
            pair_at[i] = with_right[after]
            n_new = add_position(pairs, with_right[after], count, new_pairs, new_positions, n_new, i)
        pair_at[right] = NO_PAIR
        symbols[i] = symbols[end - 1] = new
    m.used[N_PAIRS], m.used[N_NEW] = n_pairs, n_new


@numba_jit.inlined
def add_pair(pairs: np.ndarray, n_pairs: int, left: int, right: int) -> int:
    """Append a pair; returns the new number of pairs."""
    pairs[n_pairs, LEFT], pairs[n_pairs, RIGHT] = left, right
    pairs[n_pairs, COUNT] = pairs[n_pairs, N_POSITIONS] = 0
    return n_pairs + 1


@numba_jit.inlined
def add_position(
    pairs: np.ndarray,
    pair: int,
    count: int,
    new_pairs: np.ndarray,
    new_positions: np.ndarray,
    n_new: int,
    at: int,
) -> int:
    """Append a position of `pair`; returns the new number of new positions."""
    pairs[pair, COUNT] += count
    pairs[pair, N_POSITIONS] += 1
    new_pairs[n_new], new_positions[n_new] = pair, at
    return n_new + 1


@numba_jit.jit
def list_positions(m: Merger, first: int) -> None:
    """List the new positions by pair, for pairs from `first`, and reset the newest token's pairs."""
    pairs, positions, n_positions = m.pairs, m.positions, m.used[N_LISTED]
    with_left, with_right, new_pairs, new_positions = m.with_left, m.with_right, m.new_pairs, m.new_positions
    for pair in range(first, m.used[N_PAIRS]):
        with_left[pairs[pair, LEFT]] = with_right[pairs[pair, RIGHT]] = NO_PAIR
        pairs[pair, FIRST] = n_positions
        n_positions += pairs[pair, N_POSITIONS]
        pairs[pair, N_POSITIONS] = 0
    for k in range(m.used[N_NEW]):
        pair = new_pairs[k]
        positions[pairs[pair, FIRST] + pairs[pair, N_POSITIONS]] = new_positions[k]
        pairs[pair, N_POSITIONS] += 1
    m.used[N_LISTED] = n_positions


# --------------------------------------------------------------------------------------------------
# The heap


@numba_jit.jit
def push(m: Merger, first: int, by_id: bool) -> None:
    """Push the pairs from `first` whose counts reach the threshold."""
    heap, counts, n = m.heap, m.heap_counts, m.used[N_HEAP]
    pairs, tokens, begins, threshold = m.pairs, m.tokens, m.begins, m.used[THRESHOLD]
    for pair in range(first, m.used[N_PAIRS]):
        count = pairs[pair, COUNT]
        if count < threshold:
            continue
        k = n
        n += 1
        while k > 0:
            parent = (k - 1) >> 1
            if counts[parent] > count or (
                counts[parent] == count and wins_tie(pairs, heap[parent], pair, tokens, begins, by_id)
            ):
                break
            heap[k], counts[k] = heap[parent], counts[parent]
            k = parent
        heap[k], counts[k] = pair, count
    m.used[N_HEAP] = n


@numba_jit.jit
def update_top(m: Merger, by_id: bool) -> bool:
    """Update the heap until its top has the current highest count; False if no pair is left."""
    refresh(m, by_id)
    while m.used[N_HEAP] == 0 and m.used[THRESHOLD] > 1:
        m.used[THRESHOLD] >>= 1
        push(m, 0, by_id)
    return m.used[N_HEAP] > 0


@numba_jit.jit
def refresh(m: Merger, by_id: bool) -> None:
    """Sift down stale entries at the top of the heap; drop those below the threshold."""
    heap, counts, n = m.heap, m.heap_counts, m.used[N_HEAP]
    pairs, tokens, begins, threshold = m.pairs, m.tokens, m.begins, m.used[THRESHOLD]
    while n > 0 and counts[0] != pairs[heap[0], COUNT]:
        pair, count = heap[0], pairs[heap[0], COUNT]
        if count < threshold:
            n -= 1
            pair, count = heap[n], counts[n]
        k = 0
        while 2 * k + 1 < n:
            child = 2 * k + 1
            if child + 1 < n and (
                counts[child + 1] > counts[child]
                or (
                    counts[child + 1] == counts[child]
                    and wins_tie(pairs, heap[child + 1], heap[child], tokens, begins, by_id)
                )
            ):
                child += 1
            if count > counts[child] or (
                count == counts[child] and wins_tie(pairs, pair, heap[child], tokens, begins, by_id)
            ):
                break
            heap[k], counts[k] = heap[child], counts[child]
            k = child
        heap[k], counts[k] = pair, count
    m.used[N_HEAP] = n


@numba_jit.jit
def wins_tie(pairs: np.ndarray, a: int, b: int, tokens: np.ndarray, begins: np.ndarray, by_id: bool) -> bool:
    """Whether `a` is merged before the equally frequent `b`."""
    for side in (LEFT, RIGHT):
        token_a, token_b = pairs[a, side], pairs[b, side]
        if token_a == token_b:
            continue
        if by_id:
            return token_a < token_b
        at_a, at_b = begins[token_a], begins[token_b]
        length_a, length_b = length(begins, token_a), length(begins, token_b)
        for k in range(min(length_a, length_b)):
            if tokens[at_a + k] != tokens[at_b + k]:
                return tokens[at_a + k] > tokens[at_b + k]
        return length_a > length_b
    return False
