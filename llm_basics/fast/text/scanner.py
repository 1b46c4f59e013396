"""Pre-token boundaries in UTF-8 bytes, by hand-written scanners for the patterns of GPT-2 and cl100k_base.

Characters are classified by a table made with `regex`: an ASCII byte directly, others after decoding. A byte
that is not UTF-8 is a character of its own, as in `surrogateescape`.

    >>> text, n = padded(b"It's 10 mice"), 12
    >>> ends = [0]
    >>> while ends[-1] < n:
    ...     ends.append(int(next_end(text, ends[-1], n, classes(), GPT2)))
    >>> ends
    [0, 2, 4, 7, 12]
"""

import functools

import numpy as np
import regex

from llm_basics.core import bpe
from llm_basics.fast import numba_jit

OTHER, LETTER, NUMBER, SPACE = 0, 1, 2, 3

# scanners by pattern; other patterns use `regex`
GPT2, CL100K = 0, 1
SCANNERS = {bpe.SPLIT_PATTERN: GPT2, bpe.CL100K_PATTERN: CL100K}

# bytes that `hash_table` may read past the end of a text, a word of eight at a time
PADDING = 24

# for each of eight bytes: bits, and what added to a byte below 128 sets its high bit from "a", or after "z"
ZERO, THREE, SEVEN = np.uint64(0), np.uint64(3), np.uint64(7)
HIGH_BIT, LOW_BITS = np.uint64(0x8080808080808080), np.uint64(0x7F7F7F7F7F7F7F7F)
LOWER_BIT = np.uint64(0x2020202020202020)
FROM_A, PAST_Z = np.uint64(0x1F1F1F1F1F1F1F1F), np.uint64(0x0505050505050505)


@functools.cache
def classes() -> np.ndarray:
    """The class of each code point: letter, number, white space or other."""
    table = np.full(0x110000, OTHER, np.uint8)
    everything = np.arange(0x110000, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    for pattern, kind in ((r"\p{L}+", LETTER), (r"\p{N}+", NUMBER), (r"\s+", SPACE)):
        for match in regex.finditer(pattern, everything):
            table[match.start() : match.end()] = kind
    return table


def padded(text: bytes) -> np.ndarray:
    """The bytes of `text`, zero-padded to a multiple of eight."""
    array = np.empty(-(-(len(text) + PADDING) // 8) * 8, np.uint8)
    array[: len(text)] = np.frombuffer(text, np.uint8)
    array[len(text) :] = 0
    return array


@numba_jit.jit
def character(text: np.ndarray, i: int, n: int) -> tuple[int, int]:
    """The code point at byte `i` and its number of bytes; an invalid byte counts alone."""
    first = np.int64(text[i])
    if first < 0x80:
        return first, 1
    # the lead byte gives the length and the range of the second, which excludes overlong forms and surrogates
    size, low, high = 1, 0x80, 0xBF
    if 0xC2 <= first <= 0xDF:
        size, code = 2, first & 0x1F
    elif 0xE0 <= first <= 0xEF:
        size, code = 3, first & 0x0F
        low = 0xA0 if first == 0xE0 else 0x80
        high = 0x9F if first == 0xED else 0xBF
    elif 0xF0 <= first <= 0xF4:
        size, code = 4, first & 0x07
        low = 0x90 if first == 0xF0 else 0x80
        high = 0x8F if first == 0xF4 else 0xBF
    if size == 1 or i + size > n or not low <= text[i + 1] <= high:
        return 0xDC00 + first, 1
    for k in range(1, size):
        byte = np.int64(text[i + k])
        if byte & 0xC0 != 0x80:
            return 0xDC00 + first, 1
        code = code << 6 | byte & 0x3F
    return code, size


@numba_jit.jit
def run_end(text: np.ndarray, i: int, n: int, classes: np.ndarray, kind: int) -> int:
    """The end of the run of characters of class `kind` from `i`."""
    while i < n:
        byte = text[i]
        if byte < 0x80:
            if classes[byte] != kind:
                return i
            i += 1
        else:
            code, size = character(text, i, n)
            if classes[code] != kind:
                return i
            i += size
    return i


@numba_jit.jit
def contraction_end(text: np.ndarray, i: int, n: int, any_case: bool) -> int:
    """The end of 's 'd 'm 't 'll 've 're at the apostrophe `i`, or `i` if there is none."""
    if i + 1 >= n:
        return i
    fold = 0x20 if any_case else 0
    first = text[i + 1] | fold
    if first == ord("s") or first == ord("d") or first == ord("m") or first == ord("t"):
        return i + 2
    if i + 2 < n:
        second = text[i + 2] | fold
        if (first == ord("l") and second == ord("l")) or (
            (first == ord("v") or first == ord("r")) and second == ord("e")
        ):
            return i + 3
        # the long s (U+017F) equals s when case is ignored
        if any_case and text[i + 1] == 0xC5 and text[i + 2] == 0xBF:
            return i + 3
    return i


@numba_jit.inlined
def non_letters(text: np.ndarray, i: int) -> np.uint64:
    """The high bit of each of the eight bytes from `i` that are not ASCII letters."""
    word = numba_jit.eight_bytes(text, i)
    lower = (word | LOWER_BIT) & LOW_BITS
    return (~((lower + FROM_A) & ~(lower + PAST_Z)) | word) & HIGH_BIT


@numba_jit.inlined
def word_end(text: np.ndarray, start: int, n: int, classes: np.ndarray) -> int:
    """The end of a word of ASCII letters, after at most one space, at `start`; `start` if there is none.

    Eight bytes at a time, without a branch that depends on the length of a short word.
    """
    has_space = text[start] == ord(" ")
    end, others = start, non_letters(text, start) & ~(np.uint64(has_space) << SEVEN)
    while others == ZERO:
        end += 8
        others = non_letters(text, end)
    end += np.int64(numba_jit.trailing_zeros(others) >> THREE)
    if end <= start + has_space:
        return start
    if end >= n:
        return n
    return run_end(text, end, n, classes, LETTER) if text[end] >= 0x80 else end


@numba_jit.inlined
def gpt2_end(text: np.ndarray, start: int, n: int, classes: np.ndarray) -> int:
    """The end of the pre-token that begins at `start`, by GPT-2's pattern."""
    end = word_end(text, start, n, classes)
    return end if end > start else gpt2_rare_end(text, start, n, classes)


@numba_jit.jit
def gpt2_rare_end(text: np.ndarray, start: int, n: int, classes: np.ndarray) -> int:
    """`gpt2_end` for everything but plain words."""
    i = start
    byte = text[i]
    if byte == ord("'"):
        end = contraction_end(text, start, n, False)
        if end > start:
            return end
    elif byte == ord(" ") and i + 1 < n:
        i += 1
        byte = text[i]
    size, kind = 1, classes[byte]
    if byte >= 0x80:
        code, size = character(text, i, n)
        kind = classes[code]
    if kind == SPACE:
        return space_end(text, start, n, classes)
    return run_end(text, i + size, n, classes, kind)


@numba_jit.jit
def space_end(text: np.ndarray, start: int, n: int, classes: np.ndarray) -> int:
    """The end of white space; its last character belongs to the next pre-token unless it is the only one."""
    last = end = start
    while end < n:
        size, kind = 1, classes[text[end]]
        if text[end] >= 0x80:
            code, size = character(text, end, n)
            kind = classes[code]
        if kind != SPACE:
            return last if last > start else end
        last = end
        end += size
    return end


@numba_jit.inlined
def cl100k_end(text: np.ndarray, start: int, n: int, classes: np.ndarray) -> int:
    """The end of the pre-token that begins at `start`, by the pattern of cl100k_base."""
    end = word_end(text, start, n, classes)
    return end if end > start else cl100k_rare_end(text, start, n, classes)


@numba_jit.jit
def cl100k_rare_end(text: np.ndarray, start: int, n: int, classes: np.ndarray) -> int:
    """`cl100k_end` for everything but plain words."""
    if text[start] == ord("'"):
        end = contraction_end(text, start, n, True)
        if end > start:
            return end
    code, size = character(text, start, n)
    kind = classes[code]
    second = start + size
    if kind == LETTER:
        return run_end(text, second, n, classes, LETTER)
    if kind == NUMBER:
        end = second
        for _ in range(2):
            if end < n:
                code, size = character(text, end, n)
                if classes[code] == NUMBER:
                    end += size
        return end
    if second < n:
        after, after_size = character(text, second, n)
        if classes[after] == LETTER and code != ord("\r") and code != ord("\n"):
            return run_end(text, second + after_size, n, classes, LETTER)
        if code == ord(" ") and classes[after] == OTHER:
            kind = OTHER
    if kind == OTHER:
        end = run_end(text, second, n, classes, OTHER)
        while end < n and (text[end] == ord("\r") or text[end] == ord("\n")):
            end += 1
        return end
    end = run_end(text, start, n, classes, SPACE)
    if end < n:
        for i in range(end - 1, start - 1, -1):
            if text[i] == ord("\r") or text[i] == ord("\n"):
                return i + 1
        return space_end(text, start, n, classes)
    return end


@numba_jit.inlined
def next_end(text: np.ndarray, start: int, n: int, classes: np.ndarray, scanner: int) -> int:
    """The end of the pre-token that begins at byte `start` of the `n` bytes of `text`."""
    if scanner == GPT2:
        return gpt2_end(text, start, n, classes)
    return cl100k_end(text, start, n, classes)
