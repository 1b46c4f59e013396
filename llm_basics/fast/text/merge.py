"""BPE merging in machine code: one row of symbols, all pairs of neighbors, and a heap of them.

A pair comes to be only in the step that makes the younger of its tokens, so its places are listed then and
never added to. Its count only falls, so an outdated heap entry may wait until it is on top. Each place
remembers which pair begins there, so nothing is looked up while merging.
"""

from typing import NamedTuple

import numpy as np

from llm_basics.fast import numba_jit

# stands for a special token, in front of each word and behind the last
BORDER = -1
# at a place where no pair begins: the last token of a word, and the inside of a token
NO_PAIR = -1

# the columns of a pair: its tokens, how often it occurs, the first of its places and how many there are
LEFT, RIGHT, COUNT, FIRST, PLACES = 0, 1, 2, 3, 4

# how much of the arrays of a `Merger` is in use
N_TOKENS, N_PAIRS, N_PLACES, N_HEAP, N_MADE = 0, 1, 2, 3, 4
# only pairs that are at least so frequent are on the heap; lowered when it is empty
THRESHOLD = 5

GROWING = ("pairs", "places", "heap", "heap_counts", "tokens", "made_pairs", "made_places")


class Merger(NamedTuple):
    """All words in one row of symbols, with a border around each, and all pairs of neighbors.

    A token keeps the places of its bytes; `symbols` has it in the first and the last of them, so that both
    neighbors find it, and `pair_at` has in the first the pair that begins there.
    """

    symbols: np.ndarray
    pair_at: np.ndarray
    word_at: np.ndarray
    frequencies: np.ndarray
    pairs: np.ndarray
    places: np.ndarray
    # a heap of pairs, and their counts when they were put there
    heap: np.ndarray
    heap_counts: np.ndarray
    # the bytes of all tokens, and where those of each begin
    tokens: np.ndarray
    begins: np.ndarray
    # the pairs of the newest token, by their other token
    with_left: np.ndarray
    with_right: np.ndarray
    # where it came to stand, in the order in which that was found
    made_pairs: np.ndarray
    made_places: np.ndarray
    merges: np.ndarray
    # how much of the arrays is in use
    used: np.ndarray


@numba_jit.jit
def lay_out(
    text: np.ndarray, lengths: np.ndarray, symbol_of: np.ndarray, symbols: np.ndarray, word_at: np.ndarray
) -> None:
    """Write the symbols of all words in a row, with a border in front of each."""
    start = at = 0
    for word in range(len(lengths)):
        at += 1
        for k in range(start, start + lengths[word]):
            symbols[at] = symbol_of[text[k]]
            word_at[at] = word
            at += 1
        start += lengths[word]


@numba_jit.jit
def list_pairs(m: Merger, pair_of: np.ndarray) -> None:
    """Find all pairs of bytes, how often they occur, and where."""
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
            m.pairs[pair, PLACES] += 1
    m.used[N_PAIRS] = n_pairs
    n_places = 0
    for pair in range(n_pairs):
        m.pairs[pair, FIRST] = n_places
        n_places += m.pairs[pair, PLACES]
        m.pairs[pair, PLACES] = 0
    m.used[N_PLACES] = n_places
    for i in range(len(m.symbols)):
        pair = m.pair_at[i]
        if pair != NO_PAIR:
            m.places[m.pairs[pair, FIRST] + m.pairs[pair, PLACES]] = i
            m.pairs[pair, PLACES] += 1


@numba_jit.inlined
def size(begins: np.ndarray, token: int) -> int:
    """How many bytes `token` has."""
    return begins[token + 1] - begins[token]


@numba_jit.jit
def needed(m: Merger) -> tuple[int, int, int, int, int, int, int]:
    """The lengths that the arrays named in GROWING must have for the next merge."""
    if m.used[N_HEAP] == 0:
        return 0, 0, 0, 0, 0, 0, 0
    pair = m.pairs[m.heap[0]]
    made = 2 * pair[PLACES]
    end = m.begins[m.used[N_TOKENS]] + size(m.begins, pair[LEFT]) + size(m.begins, pair[RIGHT])
    n_pairs = m.used[N_PAIRS] + made
    return n_pairs, m.used[N_PLACES] + made, n_pairs, n_pairs, end, made, made


@numba_jit.jit
def merge(m: Merger, until: int, by_id: bool) -> bool:
    """Merge the most frequent pairs until there are `until` tokens; False if no pair is left.

    Returns earlier where an array has no room for the next merge.
    """
    m = numba_jit.borrowed(m)
    while m.used[N_TOKENS] < until:
        if not bring_up_most_frequent(m, by_id):
            return False
        pairs, places, heap, _, tokens, made, _ = needed(m)
        if (
            pairs > len(m.pairs)
            or places > len(m.places)
            or heap > len(m.heap)
            or tokens > len(m.tokens)
            or made > len(m.made_pairs)
        ):
            return True
        first = m.used[N_PAIRS]
        pair = m.heap[0]
        replace(m, pair, name_token(m, pair))
        list_places(m, first)
        push(m, first, by_id)
    return True


@numba_jit.jit
def name_token(m: Merger, pair: int) -> int:
    """Make the token that `pair` merges to."""
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
    """Put token `new` in all places of `pair`, from left to right, and count its pairs with its neighbors."""
    # an array in a local name costs nothing to use; as an attribute it is counted as in use each time
    symbols, pair_at, pairs, begins = m.symbols, m.pair_at, m.pairs, m.begins
    word_at, frequencies, places = m.word_at, m.frequencies, m.places
    with_left, with_right, made_pairs, made_places = m.with_left, m.with_right, m.made_pairs, m.made_places
    n_pairs, n_made = m.used[N_PAIRS], 0
    size_left, size_new = size(begins, pairs[pair, LEFT]), size(begins, new)
    for k in range(pairs[pair, FIRST], pairs[pair, FIRST] + pairs[pair, PLACES]):
        i = places[k]
        if pair_at[i] != pair:
            continue  # an earlier merge took the pair apart here
        right, end = i + size_left, i + size_new
        before, after = symbols[i - 1], symbols[end]
        count = frequencies[word_at[i]]
        pairs[pair, COUNT] -= count
        pair_at[i] = NO_PAIR
        if before != BORDER:
            at = i - size(begins, before)
            pairs[pair_at[at], COUNT] -= count
            if with_left[before] == NO_PAIR:
                with_left[before] = n_pairs
                n_pairs = add_pair(pairs, n_pairs, before, new)
            pair_at[at] = with_left[before]
            n_made = add_place(pairs, with_left[before], count, made_pairs, made_places, n_made, at)
        if after != BORDER:
            pairs[pair_at[right], COUNT] -= count
            if with_right[after] == NO_PAIR:
                with_right[after] = n_pairs
                n_pairs = add_pair(pairs, n_pairs, new, after)
            pair_at[i] = with_right[after]
            n_made = add_place(pairs, with_right[after], count, made_pairs, made_places, n_made, i)
        pair_at[right] = NO_PAIR
        symbols[i] = symbols[end - 1] = new
    m.used[N_PAIRS], m.used[N_MADE] = n_pairs, n_made


@numba_jit.inlined
def add_pair(pairs: np.ndarray, n_pairs: int, left: int, right: int) -> int:
    """A new pair behind the `n_pairs` there are; returns how many there are now."""
    pairs[n_pairs, LEFT], pairs[n_pairs, RIGHT] = left, right
    pairs[n_pairs, COUNT] = pairs[n_pairs, PLACES] = 0
    return n_pairs + 1


@numba_jit.inlined
def add_place(
    pairs: np.ndarray,
    pair: int,
    count: int,
    made_pairs: np.ndarray,
    made_places: np.ndarray,
    n_made: int,
    at: int,
) -> int:
    """Another place for `pair`; returns how many were made."""
    pairs[pair, COUNT] += count
    pairs[pair, PLACES] += 1
    made_pairs[n_made], made_places[n_made] = pair, at
    return n_made + 1


@numba_jit.jit
def list_places(m: Merger, first: int) -> None:
    """Sort the places of the pairs from `first` on by pair, and forget which are the newest token's."""
    pairs, places, n_places = m.pairs, m.places, m.used[N_PLACES]
    with_left, with_right, made_pairs, made_places = m.with_left, m.with_right, m.made_pairs, m.made_places
    for pair in range(first, m.used[N_PAIRS]):
        with_left[pairs[pair, LEFT]] = with_right[pairs[pair, RIGHT]] = NO_PAIR
        pairs[pair, FIRST] = n_places
        n_places += pairs[pair, PLACES]
        pairs[pair, PLACES] = 0
    for k in range(m.used[N_MADE]):
        pair = made_pairs[k]
        places[pairs[pair, FIRST] + pairs[pair, PLACES]] = made_places[k]
        pairs[pair, PLACES] += 1
    m.used[N_PLACES] = n_places


# --------------------------------------------------------------------------------------------------
# The heap


@numba_jit.jit
def push(m: Merger, first: int, by_id: bool) -> None:
    """Put the pairs from `first` on that are frequent enough on the heap."""
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
def bring_up_most_frequent(m: Merger, by_id: bool) -> bool:
    """Put counts that fell in their place, until the top of the heap is up to date; False if none is left."""
    refresh(m, by_id)
    while m.used[N_HEAP] == 0 and m.used[THRESHOLD] > 1:
        m.used[THRESHOLD] >>= 1
        push(m, 0, by_id)
    return m.used[N_HEAP] > 0


@numba_jit.jit
def refresh(m: Merger, by_id: bool) -> None:
    """Sink what is on top of the heap with a count that is out of date, or drop it if that fell too far."""
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
    """Of two pairs that are equally frequent, whether `a` is merged before `b`."""
    for side in (LEFT, RIGHT):
        token_a, token_b = pairs[a, side], pairs[b, side]
        if token_a == token_b:
            continue
        if by_id:
            return token_a < token_b
        at_a, at_b = begins[token_a], begins[token_b]
        size_a, size_b = size(begins, token_a), size(begins, token_b)
        for k in range(min(size_a, size_b)):
            if tokens[at_a + k] != tokens[at_b + k]:
                return tokens[at_a + k] > tokens[at_b + k]
        return size_a > size_b
    return False
