"""fast/bpe.py against the reference and `regex`. Alone: `uv run pytest tests/test_fast_bpe.py`.

Whatever the reference gives, the twin must give: the ends of pre-tokens, their counts, the merges and what is
refused. The first run on a machine compiles for some 20 seconds; later ones find the machine code on disk.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import pytest
import regex
import tokenizers
import trials
from fixtures import make_text_fixtures as slow
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_basics.core import bpe, vocabulary
from llm_basics.fast import bpe as fast
from llm_basics.fast.text import chunks, hash_table, scanner

FIXTURES = Path(__file__).parent / "fixtures"
END_OF_TEXT = "<|endoftext|>"
PATTERNS = [bpe.SPLIT_PATTERN, bpe.CL100K_PATTERN]
TIES = [bpe.GREATEST, bpe.LOWEST_ID]

# the same examples in every run; nothing is written to the working directory
many = settings(max_examples=trials.count(100), deadline=None, derandomize=True, database=None)
both_patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=["gpt2", "cl100k"])
both_ties = pytest.mark.parametrize("ties", TIES)

Merges = list[tuple[bytes, bytes]]

# the classes of the patterns: letters, digits and other numbers, marks, signs, all kinds of white space
LETTERS = ["a", "b", "Z", "\u00e9", "\u00df", "\u0130", "\u01c5", "\u02b0", "\u05d0", "\u4e2d", "\U00010428"]
NUMBERS = ["0", "7", "12", "345", "6789", "\u00b2", "\u0663", "\u2163", "\u2460", "\U0001d7d8", "\U0001f101"]
MARKS = ["\u0301", "\u20dd", "\u0903", "\u200d", "\ufe0f", "\U000e0100"]
SIGNS = [".", "!?", "_", "-", "\x00", "\x7f", "\u00a1", "\u2019", "\u3002", "\ufeff", "\ufffd", "\U0001f600"]
UNASSIGNED = ["\u0378", "\ue000", "\uffff", "\U0010fffd", "\U0010ffff"]
BLANKS = [" ", "  ", "\t", "\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x1f", "\x85", "\xa0"]
BLANKS += ["\u1680", "\u2003", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "\n\n", " \n", "\r\n\r\n"]
# not white space, despite their looks
BLANKS += ["\u200b", "\u180e"]
ENDINGS = "s S d D m M t T l ll LL lL v ve VE Ve vE e r re RE rE x x2 1".split() + ["\u017f", "\u017fs"]
CONTRACTIONS = ["'", "''", " '", *(f"'{ending}" for ending in ENDINGS)]
KINDS = [LETTERS, NUMBERS, MARKS, SIGNS, UNASSIGNED, BLANKS, BLANKS, CONTRACTIONS]
# a lone lead byte, lone continuations, truncated, overlong and surrogate sequences, invalid bytes
BROKEN = [
    b"\xff",
    b"\xfe",
    b"\x80",
    b"\xbf",
    b"\xc0\x80",
    b"\xc1\xbf",
    b"\xc3",
    b"\xe0\x80\x80",
    b"\xe0\x9f\xbf",
]
BROKEN += [
    b"\xe4\xb8",
    b"\xe4",
    b"\xed\xa0\x80",
    b"\xed\xbf\xbf",
    b"\xed\x9f",
    b"\xf0\x8f\xbf\xbf",
    b"\xf0\x9f",
]
BROKEN += [
    b"\xf0\x9f\x98",
    b"\xf4\x90\x80\x80",
    b"\xf5\x80\x80\x80",
    b"\xf8\x88\x80\x80\x80",
    b"'\xc5",
    b"\xc5",
]
BROKEN += [
    b"\xe4\xb8a",
    b"\xf0\x9f\x98a",
    b"\xf0\x9fa\x80",
    b"\xe1a\x80",
    b"'\xc5a",
    b"\xf4\x8f\xbf",
    b"\xee",
]

scraps = st.one_of([st.sampled_from(kind) for kind in KINDS] + [st.characters(exclude_categories=["Cs"])])
rich_texts = st.lists(scraps, max_size=12).map("".join)
broken_texts = st.lists(
    st.one_of(scraps.map(str.encode), st.sampled_from(BROKEN), st.binary(max_size=4)), max_size=12
).map(b"".join)


def random_text(generator: random.Random) -> str:
    return "".join(generator.choice(generator.choice(KINDS)) for _ in range(generator.randrange(1, 16)))


# --------------------------------------------------------------------------------------------------
# Oracle: the scanners, against `regex`

next_end = scanner.next_end


@numba.njit
def scan(text, starts, limits, classes, kind):  # type: ignore[no-untyped-def]
    """The ends of the pre-tokens from each start up to its limit."""
    ends = []
    for k in range(len(starts)):
        i = starts[k]
        while i < limits[k]:
            i = next_end(text, i, limits[k], classes, kind)
            ends.append(i)
    return np.array(ends)


def ends_by_scanner(text: bytes, pattern: regex.Pattern) -> list[int]:
    kind = scanner.SCANNERS[pattern]
    span = np.array([0]), np.array([len(text)])
    return scan(scanner.padded(text), *span, scanner.classes(), kind).tolist() if text else []


def ends_by_regex(text: bytes, pattern: regex.Pattern) -> list[int]:
    ends, end = [], 0
    for match in pattern.finditer(text.decode("utf-8", "surrogateescape")):
        end += len(match.group().encode("utf-8", "surrogateescape"))
        ends.append(end)
    return ends


@both_patterns
@many
@given(st.lists(rich_texts, min_size=4, max_size=4))
@example(["  \n  a", " \r\n a", "\n\n  1", "\t \t!"])
@example(["'\u017fa", "'\u017f", "'ll'LL'lL", "'Re're've'VE"])
@example(["a'", "'", " '", "'l"])
@example(["1234567", " 12345 67", "!a1", "\ra\na"])
def test_pretokens_match_regex(pattern, texts):
    for text in map(str.encode, texts):
        assert ends_by_scanner(text, pattern) == ends_by_regex(text, pattern), text


@both_patterns
def test_pretokens_of_many_random_texts_match_regex(pattern):
    generator = random.Random(1)
    for _ in range(trials.count(20_000)):
        text = random_text(generator).encode("utf-8")
        assert ends_by_scanner(text, pattern) == ends_by_regex(text, pattern), text


@both_patterns
@many
@given(st.lists(broken_texts, min_size=4, max_size=4))
def test_bytes_that_are_not_utf8_are_signs(pattern, texts):
    for text in texts:
        assert ends_by_scanner(text, pattern) == ends_by_regex(text, pattern), text


@both_patterns
def test_many_random_bytes_that_are_not_utf8_are_signs(pattern):
    generator = random.Random(2)
    for _ in range(trials.count(10_000)):
        parts = [
            generator.choice(BROKEN)
            if generator.random() < 0.4
            else random_text(generator)[:2].encode("utf-8")
            for _ in range(generator.randrange(1, 9))
        ]
        # truncated anywhere, even inside a character
        text = b"".join(parts)[: generator.randrange(1, 40)]
        assert ends_by_scanner(text, pattern) == ends_by_regex(text, pattern), text


def code_points(plane: int) -> list[str]:
    """All characters of a plane, without surrogates."""
    return [chr(c) for c in range(plane << 16, (plane + 1) << 16) if not 0xD800 <= c <= 0xDFFF]


def lead_bytes(text: bytes) -> np.ndarray:
    """The offsets of a text's characters, and its end."""
    array = np.frombuffer(text, np.uint8)
    return np.append(np.flatnonzero(array & 0xC0 != 0x80), len(array))


@both_patterns
def test_every_code_point_alone_is_one_pretoken(pattern):
    for plane in range(17):
        text = "".join(code_points(plane)).encode("utf-8")
        begins = lead_bytes(text)
        # each is followed by the next, which must not be read
        found = scan(
            scanner.padded(text),
            begins[:-1],
            begins[1:],
            scanner.classes(),
            scanner.SCANNERS[pattern],
        )
        np.testing.assert_array_equal(found, begins[1:])


@both_patterns
def test_every_code_point_in_context_matches_regex(pattern):
    for plane in range(17) if trials.is_full else (0, 1):
        # only planes 0 to 3 and 14 have assigned characters of several classes
        written = "a{0}a 1{0}1 {0} .{0}\n" if plane in (0, 1, 2, 3, 14) else "a{0}1 {0} "
        everything = "".join(map(written.format, code_points(plane)))
        text = everything.encode("utf-8")
        found = scan(
            scanner.padded(text),
            np.array([0]),
            np.array([len(text)]),
            scanner.classes(),
            scanner.SCANNERS[pattern],
        )
        sizes = list(map(len, pattern.findall(everything)))
        np.testing.assert_array_equal(found, lead_bytes(text)[np.cumsum(sizes)])


@both_patterns
def test_pretokens_do_not_depend_on_text_after_their_span(pattern):
    # a span ends at a special token, whose bytes follow directly
    generator = random.Random(3)
    kind = scanner.SCANNERS[pattern]
    for _ in range(trials.count(3000)):
        text = random_text(generator).encode("utf-8")
        behind = scanner.padded(text + random_text(generator).encode("utf-8"))
        found = scan(behind, np.array([0]), np.array([len(text)]), scanner.classes(), kind)
        assert found.tolist() == ends_by_regex(text, pattern), (text, behind.tobytes())


# --------------------------------------------------------------------------------------------------
# Oracle: counting, against the reference

SPECIALS = [
    END_OF_TEXT,
    "<|a|>",
    "<|a|><|b|>",
    "<|b|>",
    "|>a",
    "aa",
    "ab",
    "ba",
    "a b",
    " \n",
    "\n\n",
    "1.",
    "\u4e2d",
]
SPECIALS += ["a", "\u3000\u4e2d", "\u00e9\u00e9", "<" + 40 * "=" + ">"]


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the chunk size of file reads."""
    read = chunks.read

    def in_chunks(n_bytes: int) -> None:
        monkeypatch.setattr(chunks, "CHUNK_BYTES", n_bytes)
        monkeypatch.setattr(chunks, "read", lambda file, special_ids: read(file, special_ids, n_bytes))

    return in_chunks


def random_file(generator: random.Random, specials: list[str], n: int) -> str:
    """A random text in one of several styles, with special tokens and fragments of them."""
    manner = generator.choice(
        [
            [*"abc ", " ", "\n"],
            [scrap for kind in KINDS for scrap in kind],
            [*"\u4e2d\u6587\u5b57\u8bcd"],
            [*"\u4e2d\u6587\u5b57\u8bcd\u3002\uff0c"],
            ["a", "b" * 30, "word " * 3, "supercalifragilistic", " supercalifragilistic", "1" * 20, "=" * 25],
            [*"aab"],
            [".", "-", " ", "\n"],
            ["a", "1", "\u0301"],
        ]
    )
    pieces = [s[:k] for s in specials for k in range(1, len(s) + 1)]
    return "".join(
        generator.choice(pieces)
        if pieces and generator.random() < 0.1
        else generator.choice(specials)
        if specials and generator.random() < 0.1
        else generator.choice(manner)
        for _ in range(n)
    )


@both_patterns
@pytest.mark.parametrize("seed", range(3))
def test_counts_of_random_files_equal_the_references(tmp_path, in_chunks, pattern, seed):
    generator = random.Random(seed)
    path = tmp_path / "text.txt"
    for _ in range(trials.count(50)):
        specials = generator.sample(SPECIALS, generator.randrange(4))
        text = random_file(generator, specials, generator.randrange(300)).encode("utf-8")
        path.write_bytes(text)
        in_chunks(generator.choice([1, 2, 3, 5, 8, 13, 40, 100, 1000]))
        expected = bpe.count_pretokens(path, specials, 1, pattern)
        n_workers = generator.randrange(1, 4)
        assert fast.count_pretokens(path, specials, n_workers, pattern) == expected, (text, specials)


@both_patterns
@many
@given(rich_texts, st.lists(st.sampled_from(SPECIALS), max_size=3), st.integers(1, 9))
@example("", [], 1)
@example("<|a|><|b|>" * 9, ["<|a|>", "<|a|><|b|>"], 3)
@example("aaa" * 9, ["aa", "a"], 2)
@example("ab" * 9 + "ba", ["ab", "ba"], 5)
@example("a b a  b\n\n\nb", ["a b", "\n\n"], 4)
def test_chunks_of_a_text_have_its_pretokens(tmp_path_factory, pattern, text, specials, n_bytes):
    path = tmp_path_factory.getbasetemp() / "chunks.txt"
    path.write_bytes(text.encode("utf-8"))
    found, end = [], 0
    with open(path, "rb") as file:
        for chunk in chunks.read(
            file, {special.encode("utf-8"): k for k, special in enumerate(specials)}, n_bytes
        ):
            assert chunk.offset == end
            end += len(chunk.text)
            assert len(chunk.spans) == len(chunk.specials) and chunk.specials[-1] == -1
            stretches = [chunk.text[start:stop].decode("utf-8") for start, stop in chunk.spans.tolist()]
            found += [match for stretch in stretches for match in pattern.findall(stretch)]
            # the special tokens are between the spans, in order
            gaps = zip(chunk.spans[:-1, 1].tolist(), chunk.spans[1:, 0].tolist(), strict=True)
            between = [chunk.text[start:stop].decode("utf-8") for start, stop in gaps]
            assert [specials.index(token) for token in between] == [
                specials.index(specials[id]) for id in chunk.specials[:-1].tolist()
            ]
    assert end == len(text.encode("utf-8"))
    assert found == list(bpe.pretokenize(text, specials, pattern))


def test_a_text_is_read_in_chunks_where_it_can_be_cut(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"some words, " * 1000)
    with open(path, "rb") as file:
        sizes = [len(chunk.text) for chunk in chunks.read(file, {b"<|endoftext|>": 0}, 500)]
    # a chunk holds back at most its last word and a possible prefix of a special token
    assert len(sizes) == 24 or len(sizes) == 25
    assert max(sizes) < 550


@pytest.mark.parametrize("n_workers", [1, 2, 3])
@pytest.mark.parametrize("n_bytes", [30, 1000, 1 << 20])
def test_the_corpus_counts_as_the_reference_does(in_chunks, n_bytes, n_workers):
    in_chunks(n_bytes)
    corpus = FIXTURES / "corpus.txt"
    for pattern in PATTERNS:
        expected = bpe.count_pretokens(corpus, [END_OF_TEXT], 1, pattern)
        assert fast.count_pretokens(corpus, [END_OF_TEXT], n_workers, pattern) == expected


@both_patterns
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param("a", id="one byte"),
        pytest.param("\u4e2d\u6587\u5b57" * 9000, id="Chinese"),
        pytest.param("\u4e2d\u6587\uff0c\u5b57\u3002" * 9000, id="Chinese with punctuation"),
        pytest.param(" " * 9000, id="white space"),
        pytest.param("=" * 9000 + "\n" * 9000, id="signs and line ends"),
        pytest.param("1" * 9000, id="digits"),
        pytest.param("word " * 3 + "x" * 20_000 + " word", id="a word longer than a chunk"),
        pytest.param("a" * 10_000 + "." * 10_000 + "b", id="a place to cut far from the end"),
        pytest.param(END_OF_TEXT * 99, id="only special tokens"),
    ],
)
def test_texts_that_are_hard_to_cut_count_as_the_reference_does(tmp_path, in_chunks, pattern, text):
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode("utf-8"))
    expected = bpe.count_pretokens(path, [END_OF_TEXT], 1, pattern)
    for n_bytes, n_workers in ((100, 1), (1000, 2), (1 << 20, 1)):
        in_chunks(n_bytes)
        assert fast.count_pretokens(path, [END_OF_TEXT], n_workers, pattern) == expected


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 40])
def test_words_that_differ_in_any_byte_are_different(tmp_path, length):
    path = tmp_path / "text.txt"
    spelled = ["x" * k + letter + "x" * (length - k - 1) for k in range(length) for letter in "yz"]
    # one byte more or less makes another word
    spelled += ["x" * length, "x" * (length + 1), "x" * length + "\0"]
    path.write_text("\n".join(word for k, word in enumerate(spelled) for _ in range(k + 1)), encoding="utf-8")
    assert fast.count_pretokens(path, []) == bpe.count_pretokens(path, [])


def test_zero_bytes_count(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(b"\0" * n + b"a" for n in range(40)) * 2)
    assert fast.count_pretokens(path, []) == bpe.count_pretokens(path, [])


@pytest.mark.parametrize("n_workers", [1, 2])
def test_tables_grow(tmp_path, in_chunks, n_workers):
    # more words than half of the slots, and more long ones than the pool holds
    empty = hash_table.PretokenTable.empty()
    path = tmp_path / "text.txt"
    generator = random.Random(4)
    # they share the first word of their keys, so those in neighboring slots differ only in the second
    short = [
        "likewise" + "".join(generator.choices("abcdefghij", k=6)) for _ in range(len(empty.slots) * 2 // 3)
    ]
    long = ["w" + bytes(generator.choices(b"abcdefgh", k=30)).decode() for _ in range(len(empty.pool) // 20)]
    text = (" ".join(short + long + short[:999]) + "\n") * 2
    path.write_text(text)
    in_chunks(len(text) // 5)
    expected = bpe.count_pretokens(path, [], 1)
    assert len(expected) > len(empty.slots) // 2 and sum(len(w) for w in expected if len(w) > 16) > len(
        empty.pool
    )
    assert fast.count_pretokens(path, [], n_workers) == expected


@pytest.mark.parametrize(("n_slots", "n_pool"), [(2, 1), (8, 64), (1 << 12, 1)])
def test_tables_of_any_size_add_up(n_slots, n_pool):
    generator = random.Random(5)
    total, expected = hash_table.PretokenTable.empty(n_slots, n_pool), Counter()
    for _ in range(4):
        text = " ".join("ab" * generator.randrange(1, 99) + "c" * generator.randrange(3) for _ in range(99))
        table, at = hash_table.PretokenTable.empty(n_slots, n_pool), np.zeros(2, np.int64)
        span, array = np.array([[0, len(text)]], np.int64), scanner.padded(text.encode("utf-8"))
        while not hash_table.count(
            array, span, at, scanner.classes(), scanner.GPT2, table.slots, table.pool, table.used
        ):
            table.enlarge(len(text))
        total.add(table)
        expected.update(bpe.pretokenize(text))
    content, lengths, values = total.columns()
    starts = np.cumsum(lengths) - lengths
    found = {
        content[s : s + n].tobytes().decode(): v for s, n, v in zip(starts, lengths, values, strict=True)
    }
    assert len(total) == len(found) and found == expected


def colliding_words() -> tuple[bytes, bytes]:
    """Two words of 24 lowercase letters with the same hash in `hash_table`."""
    # the hash takes eight bytes at a time, so the second eight can cancel the first; one such word in about
    # 100,000 consists of letters
    mask, multiplier = (1 << 64) - 1, int(hash_table.MULTIPLIER)

    def mix(low: np.ndarray, high: int) -> np.ndarray:
        h = (low ^ np.uint64(high * multiplier & mask)) * np.uint64(multiplier)
        h ^= h >> np.uint64(32)
        h *= np.uint64(multiplier)
        return h ^ (h >> np.uint64(32))

    generator = np.random.default_rng(6)
    first = generator.integers(ord("a"), ord("z") + 1, (1 << 21, 8), np.uint8)
    second = generator.integers(ord("a"), ord("z") + 1, 8, np.uint8)
    mixed = mix(first.view("<u8")[:, 0], 24) * np.uint64(multiplier)
    undone = (second.view("<u8")[0] ^ mixed ^ mixed[0]).view(np.uint8).reshape(-1, 8)
    letters = ((undone | 0x20) >= ord("a")) & ((undone | 0x20) <= ord("z"))
    found = int(np.flatnonzero(letters.all(axis=1))[1])
    tail = b"abcdefgh"
    return first[0].tobytes() + second.tobytes() + tail, first[found].tobytes() + undone[
        found
    ].tobytes() + tail


def test_words_with_equal_hashes_are_distinguished(tmp_path):
    one, other = colliding_words()
    hashes = {int(hash_table.hash_bytes(scanner.padded(word), 0, len(word))) for word in (one, other)}
    assert one != other and len(one) == len(other) and len(hashes) == 1
    path = tmp_path / "text.txt"
    path.write_bytes(b"\n".join([one, other, other]))
    assert fast.count_pretokens(path, []) == {one: 1, other: 2, b"\n": 2}
    # also when the tables of two threads are merged
    tables = hash_table.PretokenTable.empty(), hash_table.PretokenTable.empty()
    for word, table in zip((one, other), tables, strict=True):
        span, at = np.array([[0, len(word)]]), np.zeros(2, np.int64)
        columns = table.slots, table.pool, table.used
        assert hash_table.count(scanner.padded(word), span, at, scanner.classes(), scanner.GPT2, *columns)
    tables[0].add(tables[1])
    assert len(tables[0]) == 2


# --------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("n_workers", [1, 2])
@pytest.mark.parametrize("broken", [b"\xff", b"\xc3", b"\xe4\xb8", b"\xed\xa0\x80", b"\xf0\x9f\x98", b"\x80"])
def test_bytes_that_are_not_utf8_are_named_as_the_reference_names_them(
    tmp_path, in_chunks, broken, n_workers
):
    path = tmp_path / "broken.txt"
    generator = random.Random(7)
    for at in (0, 1, 5, 99, 1200, 3000):
        content = ("ab<s> \u4e2d1 caf\u00e9 " * 300).encode("utf-8")[:at]
        content = (
            content.decode("utf-8", "ignore").encode("utf-8")
            + broken
            + generator.choice([b"", b" cd", b"<s>"])
        )
        # a later invalid byte is not reported
        path.write_bytes(content + b"x\xffy" * generator.randrange(2))
        with pytest.raises(ValueError, match=r"must be UTF-8") as expected:
            bpe.count_pretokens(path, ["<s>"], 1)
        for n_bytes in (1, 3, 10, 1 << 20):
            in_chunks(n_bytes)
            with pytest.raises(ValueError, match=f"^{re.escape(str(expected.value))}$"):
                fast.train_bpe(path, 300, ["<s>"], n_workers)


def test_both_refuse_the_same(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("low lower lowest")
    for train in (bpe.train_bpe, fast.train_bpe):
        with pytest.raises(ValueError, match=r"special token must have at least two bytes, got ''"):
            train(path, 300, [END_OF_TEXT, ""])
        with pytest.raises(ValueError, match=r"vocab_size must be at least 257 .*got 256"):
            train(path, 256, [END_OF_TEXT])
        with pytest.raises(ValueError, match=r"ties must be greatest or lowest-id, got least"):
            train(path, 300, [], ties="least")
        with pytest.raises(ValueError, match=r"must be a list of texts"):
            train(path, 300, END_OF_TEXT)
        with pytest.raises(FileNotFoundError):
            train(tmp_path / "none.txt", 300)


# --------------------------------------------------------------------------------------------------
# Oracle: merging, against the reference


@both_ties
@pytest.mark.parametrize("seed", range(3))
def test_random_texts_of_few_letters_train_as_in_the_reference(tmp_path, ties, seed):
    generator = random.Random(seed)
    path = tmp_path / "text.txt"
    for _ in range(trials.count(30)):
        letters = generator.choice(
            ["ab", "abc", "ab 12'st\n", "a\u00e9\u4e2d ", "abcdefgh ", "aaaab ", "\x00\xffa "]
        )
        text = "".join(generator.choices(letters, k=generator.randrange(400)))
        if generator.random() < 0.3:
            text += END_OF_TEXT + text[:50]
        path.write_text(text, encoding="utf-8")
        for pattern in PATTERNS:
            arguments = path, 257 + generator.randrange(80), [END_OF_TEXT], 1, pattern, ties
            expected = bpe.train_bpe(*arguments)
            found = fast.train_bpe(*arguments)
            assert found == expected, text
            assert list(found[0]) == list(expected[0])


@both_ties
@many
@given(st.dictionaries(st.binary(max_size=12), st.integers(0, 5), max_size=12), st.integers(0, 40))
@example({b"\xff\xff": 1, b"\x00\x00": 1, b"zz": 1, b"\xff\x00": 1, b"\x00\xff": 1}, 40)
@example({b"\x00": 1, b"\x00\x00\x00\x00": 2, b"a\x00": 2, b"a": 2}, 40)
@example({b"aaaaaaaaaaaa": 1, b"aaa": 2, b"aaaaa": 1, b"baaab": 1}, 40)
@example({b"abababa": 1, b"babab": 1, b"": 3}, 40)
@example({}, 3)
@example({b"ab": 0}, 3)
def test_words_of_any_bytes_merge_as_in_the_reference(ties, frequencies, n_merges):
    for specials in ([], [END_OF_TEXT, "\u00e9"]):
        arguments = frequencies, 256 + len(specials) + n_merges, specials, ties
        assert fast.learn_merges(*arguments) == bpe.learn_merges(*arguments)


@both_ties
@many
@given(st.dictionaries(st.text("ab", max_size=16).map(str.encode), st.integers(1, 3), max_size=9))
def test_words_of_two_letters_merge_to_the_end_as_in_the_reference(ties, frequencies):
    assert fast.learn_merges(frequencies, 10_000, [], ties) == bpe.learn_merges(frequencies, 10_000, [], ties)


@both_ties
@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 15, 31, 32, 33, 1000, 4999])
def test_runs_merge_as_in_the_reference(ties, length):
    frequencies = {b"a" * length: 3, b"b" + b"a" * length + b"b": 2, b"ab" * length: 1}
    found = fast.learn_merges(frequencies, 1000, [], ties)
    assert found == bpe.learn_merges(frequencies, 1000, [], ties)


@both_ties
def test_every_pair_of_bytes_may_tie(ties):
    # all 65,536 pairs, each once: only the rule for ties decides
    everything = {bytes([left, right]): 1 for left in range(256) for right in range(256)}
    found = fast.learn_merges(everything, 256 + 300, [], ties)[1]
    order = {byte: id for id, byte in enumerate(bpe.alphabet(ties))}
    in_order = sorted(
        ((bytes([word[0]]), bytes([word[1]])) for word in everything),
        key=lambda pair: tuple(order[byte] for byte in pair),
        reverse=ties == bpe.GREATEST,
    )
    assert found == in_order[:300]


@both_ties
@pytest.mark.parametrize(
    "frequencies",
    [
        {b"ab": 2**32 + 1, b"cd": 2**32 + 2, b"ef": 3, b"gh": 2**33},
        # these tie as floats; "ab" occurs more than 2**61 times
        {b"ab": 2**60 + 1, b"cd": 2**60, b"aab": 2**60, b"xy": 2**61 + 3, b"yz": 2**61 + 2},
    ],
)
def test_huge_counts_are_exact(ties, frequencies):
    assert fast.learn_merges(frequencies, 999, [], ties) == bpe.learn_merges(frequencies, 999, [], ties)


@both_ties
@pytest.mark.parametrize("pattern", PATTERNS, ids=["gpt2", "cl100k"])
def test_the_corpus_trains_as_in_the_reference(ties, pattern):
    corpus = FIXTURES / "corpus.txt"
    vocab_size = trials.count(2000) + 600
    expected = bpe.train_bpe(corpus, vocab_size, [END_OF_TEXT], 1, pattern, ties)
    for n_workers in (1, 3):
        assert fast.train_bpe(corpus, vocab_size, [END_OF_TEXT], n_workers, pattern, ties) == expected


@pytest.mark.parametrize("pattern", [r"\S+|\s+", r"[a-z]|[^a-z]+", r"(?s:.+)"])
def test_patterns_without_a_scanner_are_left_to_regex(tmp_path, pattern):
    path = tmp_path / "text.txt"
    path.write_bytes((FIXTURES / "corpus.txt").read_bytes()[:1500].decode("utf-8", "ignore").encode("utf-8"))
    custom = regex.compile(pattern)
    assert fast.count_pretokens(path, [END_OF_TEXT], 1, custom) == bpe.count_pretokens(
        path, [END_OF_TEXT], 1, custom
    )
    arguments = path, 400, [END_OF_TEXT], 1, custom
    assert fast.train_bpe(*arguments) == bpe.train_bpe(*arguments)


@pytest.mark.parametrize("vocab_size", [256, 257, 258, 259, 300, 5000, 1_000_000])
def test_training_ends_where_the_reference_ends(vocab_size):
    frequencies = {b"low": 5, b"lower": 2}
    found = fast.learn_merges(frequencies, vocab_size, [])
    assert found == bpe.learn_merges(frequencies, vocab_size, [])
    assert len(found[1]) <= 4


def test_arrays_grow_while_merging():
    # a pair at very many positions, and many pairs: all arrays grow, some repeatedly
    generator = random.Random(8)
    frequencies = {bytes(generator.choices(b"abcdefgh", k=9)): generator.randrange(1, 9) for _ in range(1500)}
    frequencies |= {b"xy" * 9000 + b"q": 999, b"z" * 90_000: 99_999}
    initial = 256 + 65_536
    vocab, merges = fast.learn_merges(frequencies, 256 + 100, [])
    assert sum(map(len, vocab.values())) > initial
    assert (vocab, merges) == bpe.learn_merges(frequencies, 256 + 100, [])


@both_ties
def test_the_order_of_documents_and_words_does_not_matter(tmp_path, ties):
    documents = (FIXTURES / "corpus.txt").read_bytes().decode("utf-8").split(END_OF_TEXT)
    path = tmp_path / "text.txt"
    found = []
    for seed in range(3):
        random.Random(seed).shuffle(documents)
        path.write_bytes(END_OF_TEXT.join(documents).encode("utf-8"))
        found.append(fast.train_bpe(path, 1000, [END_OF_TEXT], ties=ties))
    counted = list(fast.count_pretokens(path, [END_OF_TEXT]).items())
    random.Random(9).shuffle(counted)
    found.append(fast.learn_merges(dict(counted), 1000, [END_OF_TEXT], ties))
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_progress_rises_and_ends(in_chunks, n_workers):
    corpus = FIXTURES / "corpus.txt"
    size = corpus.stat().st_size
    in_chunks(10_000)
    reports: list[tuple[str, int, int]] = []
    fast.train_bpe(corpus, 2757, [END_OF_TEXT], n_workers, progress=lambda *report: reports.append(report))
    counted = [report[1:] for report in reports if report[0] == "counting"]
    merged = [report[1:] for report in reports if report[0] == "merging"]
    assert reports == [("counting", *r) for r in counted] + [("merging", *r) for r in merged]
    assert len(counted) >= 10 and counted[-1] == (size, size)
    assert merged[-1] == (2500, 2500) and merged[0][0] <= 1000
    for reported in (counted, merged):
        assert reported == sorted(reported) and len({total for _, total in reported}) == 1


def test_progress_ends_where_training_ends_early():
    reports: list[tuple[str, int, int]] = []
    fast.learn_merges({b"low": 5, b"lower": 2}, 5000, [], progress=lambda *report: reports.append(report))
    assert reports[-1] == ("merging", 4, 5000 - 256)


# --------------------------------------------------------------------------------------------------
# Oracle: both, against Hugging Face's trainer


def merges_of_hugging_face(documents: list[str], vocab_size: int) -> Merges:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=0,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(documents, trainer)
    merges = json.loads(model.to_str())["model"]["merges"]
    return [tuple(map(vocabulary.unicode_to_bytes, pair)) for pair in merges]


def texts_for_hugging_face() -> dict[str, str]:
    generator = random.Random(10)
    corpus = (FIXTURES / "corpus.txt").read_bytes().decode("utf-8")
    few = "".join(generator.choices("ab c\n", k=3000))
    words = ["".join(generator.choices("abcd", k=generator.randint(2, 9))) for _ in range(300)]
    return {
        "corpus": corpus,
        "its beginning": corpus[:3000],
        "few letters": few,
        "words": " ".join(generator.choices(words, k=2000)),
        "runs": " ".join("a" * generator.randrange(1, 20) for _ in range(200)) + "\n" * 99,
        "any characters": "".join(random_text(generator) for _ in range(300)),
        "Chinese": "".join(generator.choices("\u4e2d\u6587\u5b57\u8bcd\u3002", k=2000)),
        "python": Path(__file__).read_text(encoding="utf-8"),
    }


@pytest.mark.parametrize("name", list(texts_for_hugging_face()))
def test_hugging_face_reference_and_fast_learn_the_same(tmp_path, name):
    text = texts_for_hugging_face()[name]
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode("utf-8"))
    # its trainer does not split at special tokens
    documents = text.split(END_OF_TEXT)
    for vocab_size in (257, 400, 3000 if trials.is_full else 1000):
        expected = merges_of_hugging_face(documents, vocab_size)
        assert bpe.train_bpe(path, vocab_size, [END_OF_TEXT], ties=bpe.LOWEST_ID)[1] == expected
        vocab, merges = fast.train_bpe(path, vocab_size, [END_OF_TEXT], ties=bpe.LOWEST_ID)
        assert merges == expected
        # ids are in the same order, too
        assert list(vocab.values()) == [END_OF_TEXT.encode(), *bpe.alphabet(bpe.LOWEST_ID)] + [
            left + right for left, right in merges
        ]
    assert expected, "nothing was learned"


def test_the_corpus_gives_the_frozen_merges():
    merges = fast.train_bpe(FIXTURES / "corpus.txt", 257 + slow.N_MERGES, [END_OF_TEXT])[1]
    frozen = (FIXTURES / "corpus_merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    assert [f"{slow.spell(left)} {slow.spell(right)}" for left, right in merges] == frozen


# --------------------------------------------------------------------------------------------------
# Property: one endless word


@both_ties
def test_a_word_of_two_megabytes_trains(tmp_path, ties):
    # the reference would take minutes: it renews all counts of a word for each merge
    letters = np.random.default_rng(11).choice(np.frombuffer(b"etaoinshrdlu", np.uint8), 2_000_000)
    path = tmp_path / "text.txt"
    path.write_bytes(letters.tobytes())
    n_merges = trials.count(1000)
    vocab, merges = fast.train_bpe(path, 256 + n_merges, ties=ties)
    assert len(merges) == n_merges
    ids = {token: id for id, token in vocab.items()}
    assert len(ids) == 256 + n_merges, "two merges make the same token"
    text = np.array([ids[bytes([byte])] for byte in range(256)], np.uint16)[letters]
    known = set(bpe.alphabet())
    for step, (left, right) in enumerate(merges):
        assert left in known and right in known
        known.add(left + right)
        if step % 50 == 0 or step == n_merges - 1:
            counts = count_pairs(text)
            most = max(counts.values())
            ties_with = [pair for pair, count in counts.items() if count == most]
            if ties == bpe.GREATEST:
                assert (left, right) == max((vocab[a], vocab[b]) for a, b in ties_with)
            else:
                assert (ids[left], ids[right]) == min(ties_with)
        text = replace(text, ids[left], ids[right], ids[left + right])
    # remaining pairs are at most as frequent as the last merged, and the text is unchanged
    assert max(count_pairs(text).values()) <= most
    assert b"".join(map(vocab.__getitem__, text.tolist())) == letters.tobytes()


def count_pairs(text: np.ndarray) -> dict[tuple[int, int], int]:
    keys, counts = np.unique(text[:-1].astype(np.uint32) << 16 | text[1:], return_counts=True)
    return {
        (key >> 16, key & 0xFFFF): count for key, count in zip(keys.tolist(), counts.tolist(), strict=True)
    }


def replace(text: np.ndarray, left: int, right: int, new: int) -> np.ndarray:
    """Replace each occurrence of a pair by the new token, left to right."""
    at = np.flatnonzero((text[:-1] == left) & (text[1:] == right))
    if left == right and len(at):
        # overlapping occurrences: every other one, from the first
        begins = np.flatnonzero(np.diff(at, prepend=-2) != 1)
        at = at[(np.arange(len(at)) - np.repeat(begins, np.diff([*begins, len(at)]))) % 2 == 0]
    replaced = text.copy()
    replaced[at] = new
    return np.delete(replaced, at + 1)
