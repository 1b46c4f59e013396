"""fast/tokenizer.py against the reference, tiktoken and Hugging Face tokenizers.

What both tokenizers promise is asked of both. The tests with GPT-2's own vocabulary need two folders,
TIKTOKEN_CACHE_DIR, where tiktoken keeps what it downloaded, and LLM_BASICS_DATA, with gpt2_vocab.json and
gpt2_merges.bpe; without them they skip. The first run compiles, which takes about half a minute.
Alone: `uv run pytest tests/test_fast_tokenizer.py`, and with `-m slow` texts of a megabyte.
"""

import copy
import functools
import json
import os
import pickle
import random
import re
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import tiktoken
import tokenizers
import trials
from fixtures import make_text_fixtures as slow
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_basics.core import bpe, tokenizer, vocabulary
from llm_basics.data import shards, tokenizer_formats
from llm_basics.fast import bpe as fast_bpe
from llm_basics.fast import tokenizer as fast
from llm_basics.fast.text import chunks, scanner
from llm_basics.fast.text import encode as text_encode
from llm_basics.fast.text import hash_table as table

FIXTURES = Path(__file__).parent / "fixtures"
SAMPLES = json.loads((FIXTURES / "samples.json").read_text(encoding="utf-8"))
END_OF_TEXT = "<|endoftext|>"
N_TOKENS = 2000

CLASSES = {"reference": tokenizer.Tokenizer, "fast": fast.Tokenizer}
PATTERNS = {"gpt2": bpe.SPLIT_PATTERN, "cl100k": bpe.CL100K_PATTERN}
# has no scanner, so `regex` must find the pre-tokens
PLAIN_PATTERN = regex.compile(r"\w+|\W")

# the same examples in every run; nothing is written to the working directory
many = settings(max_examples=trials.count(200), deadline=None, derandomize=True, database=None)
each_pattern = pytest.mark.parametrize("pattern", PATTERNS)

# --------------------------------------------------------------------------------------------------
# Texts

# characters old enough for all Unicode libraries to agree on their classes
ALPHABETS = [(0, 0x3000), (0x4E00, 0x4E80), (0xAC00, 0xAC40), (0xF900, 0xFB00), (0xFE00, 0x10000)]
ALPHABETS += [(0x10300, 0x10450), (0x1D400, 0x1D800), (0x20000, 0x20010)]
KNOWN = [
    chr(code)
    for first, last in ALPHABETS
    for code in range(first, last)
    if unicodedata.ucd_3_2_0.category(chr(code)) not in ("Cn", "Cs")
]
ASCII = [chr(code) for code in range(128)]
BLANKS = [" ", " ", "  ", "    ", "\n", "\n\n", "\r\n", "\r", "\t", "\v", "\u2028", "\u00a0", "\x00"]
BLANKS += ["\x1c", "\x85", "\u3000", "\u200b", "\ufeff", " \n ", "\n \n"]
# the classes of the patterns: contractions in any case, the long s (an s in cl100k), marks, numbers
SCRAPS = ["'", "'s", "'S", "'ll", "'lL", "'l", "'re", "'VE", "'\u017f", "'d", "'m", "'t", "''", "s", "ll"]
SCRAPS += ["the", " the", "The", "ing", " a", "a", "_", ".", "..", "!?", "-", " (", "12", "1234567", "\u0663"]
SCRAPS += ["\u00e9", "e\u0301", "\u0301", "\u6f22", "\u6f22\u5b57", "\u0939\u093f", "\u05e9\u05dc", "\u00b2"]
SCRAPS += ["\U0001f643", "\U0001f469\u200d\U0001f680", "\U00010437", "\U0001d7d9", "\ufffd", "\U0010ffff"]
SCRAPS += [END_OF_TEXT, END_OF_TEXT[:7], END_OF_TEXT[7:], "<|", "|>"]
WORDS = (FIXTURES / "corpus.txt").read_bytes().decode("utf-8").split(" ")


def varied_texts(n: int, seed: int, extra: tuple[str, ...] = ()) -> list[str]:
    """`n` texts of up to 40 parts, each a random mixture of words, fragments, white space and characters."""
    rng = random.Random(seed)
    kinds = [WORDS, SCRAPS, BLANKS, ASCII, KNOWN, extra or SCRAPS]
    texts = []
    for _ in range(trials.count(n)):
        chosen = rng.sample(kinds, rng.randint(2, len(kinds)))
        parts = [rng.choice(rng.choice(chosen)) for _ in range(rng.randint(0, 40))]
        if rng.random() < 0.05:
            parts.append(rng.choice(parts or ["ab"]) * rng.randint(40, 120))
        texts.append("".join(parts))
    return texts


def any_bytes(n: int, seed: int) -> list[bytes]:
    """`n` byte strings: noise, UTF-8, and damaged UTF-8."""
    rng = random.Random(seed)
    # overlong, a surrogate, past the last code point, leads without continuations, a lone continuation
    odd = [b"\xc0\x80", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xf0\x80\x80\x80", b"\xc2"]
    odd += [b"\xe2\x82", b"\xf0\x9f\x98", b"\x80", b"\xbf", b"\xff", b"\xfe", b"\xf5\x80\x80\x80", b"\xc1"]
    odd += [b"\xe6\xbc", b"\xc3a", b"\xe1\x80 ", b"\xed\x9f\xbf", b"\xef\xbf\xbf", b"\xf4\x8f\xbf\xbf"]
    found = [bytes([first, second]) for first in range(0xC0, 256) for second in (0x20, 0x80, 0xA9, 0xBF)]
    # overlong letters, digits and spaces; the limits of surrogates and of code points
    seconds, rest = b"\x80\x81\x8f\x90\x9f\xa0\xbf", [b"\x81", b"\xa0", b"\xb1"]
    found += [bytes([a, b]) + c for a in b"\xe0\xed\xef" for b in seconds for c in rest]
    found += [bytes([a, b]) + c + d for a in b"\xf0\xf4" for b in seconds for c in rest for d in rest]
    found += [b"a" + content + b"a 1" + content + b"1" for content in found]
    for i, text in enumerate(varied_texts(max(n - len(found), 0), seed)):
        content = bytearray(text.encode("utf-8"))
        if i % 3 == 0:
            content = bytearray(rng.randbytes(rng.randint(0, 60)))
        elif i % 3 == 1:
            for _ in range(rng.randint(1, 6)):
                place = rng.randint(0, len(content))
                content[place : place + rng.randint(0, 2)] = rng.choice(odd)
        found.append(bytes(content))
    return found


# --------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[dict[int, bytes], list]]:
    """Vocabulary and merges learned from the fixtures and some endless words, by pattern."""
    path = tmp_path_factory.mktemp("learned") / "text.txt"
    rng = random.Random(0)
    endless = " ".join("".join(rng.choices("ab'1 \n\u00e9\u6f22\U0001f643", k=9)) for _ in range(4000))
    # merges inside numbers, signs and white space, so that a wrong boundary changes ids
    endless += "".join(rng.choices(["12", "1", "27", " ", "  ", "\n", "\r\n", ".", "!", "'", "'s"], k=20_000))
    endless += " ".join("".join(rng.choices("127", k=rng.randint(2, 9))) for _ in range(3000))
    samples = END_OF_TEXT.join(SAMPLES.values()) * 3
    path.write_bytes(" ".join(WORDS + [samples, endless, "a" * 200, " " * 99, "\n" * 50]).encode("utf-8"))
    return functools.cache(
        lambda pattern: fast_bpe.train_bpe(path, N_TOKENS, [END_OF_TEXT], 1, PATTERNS[pattern])
    )


@pytest.fixture(scope="session")
def make(learned) -> Callable[..., Any]:
    """A new tokenizer of a class by name, with the learned vocabulary."""

    def make(kind: str, pattern: str = "gpt2", specials: tuple[str, ...] = (END_OF_TEXT,)) -> Any:
        return CLASSES[kind](*learned(pattern), specials, PATTERNS[pattern])

    return make


@pytest.fixture(scope="session")
def shared(make) -> Callable[..., Any]:
    """As `make`, but the same tokenizer each time, with a warm cache."""
    return functools.cache(make)


@pytest.fixture(params=CLASSES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def tiktoken_of(shared) -> Callable[..., tiktoken.Encoding]:
    """tiktoken with the learned vocabulary, and with the ids that ours gives to the special tokens."""

    @functools.cache
    def tiktoken_of(pattern: str = "gpt2", specials: tuple[str, ...] = (END_OF_TEXT,)) -> tiktoken.Encoding:
        return tokenizer_formats.to_tiktoken(vocabulary_of(shared("reference", pattern, specials)))

    return tiktoken_of


def vocabulary_of(model: Any) -> vocabulary.Vocabulary:
    return vocabulary.Vocabulary(model.vocab, model.merges, model.special_tokens, model.pattern)


def hugging_face_of(model: Any, folder: Path) -> tokenizers.Tokenizer:
    tokenizer_formats.write_tokenizer_json(vocabulary_of(model), folder / "tokenizer.json")
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def assert_same(texts: list, found: Callable, expected: Callable) -> None:
    """Fail with the shortest of the texts for which two functions differ."""
    wrong = [text for text in texts if found(text) != expected(text)]
    if wrong:
        text = min(wrong, key=len)
        raise AssertionError(f"{len(wrong)} differ, such as {text!r}: {found(text)}, not {expected(text)}")


# --------------------------------------------------------------------------------------------------
# Oracle: tiktoken and Hugging Face


@each_pattern
def test_varied_texts_get_the_ids_of_tiktoken(kind, shared, tiktoken_of, pattern):
    model, theirs = shared(kind, pattern), tiktoken_of(pattern)
    n_texts = trials.count(2500 if kind == "fast" else 500)
    texts = varied_texts(n_texts, seed=1) + list(SAMPLES.values())
    assert_same(texts, model.encode, lambda text: theirs.encode(text, allowed_special="all"))
    assert_same(texts, model.encode_ordinary, theirs.encode_ordinary)
    assert_same(texts, lambda text: model.decode(model.encode(text)), lambda text: text)


@each_pattern
def test_each_character_gets_the_ids_of_tiktoken_among_others(shared, tiktoken_of, pattern):
    model, theirs = shared("fast", pattern), tiktoken_of(pattern)
    texts = [
        template.format(character) for character in KNOWN for template in ("a{0}b1{0}", " {0}{0}.{0}\n{0}\n")
    ]
    assert_same(texts, model.encode_ordinary, theirs.encode_ordinary)


@each_pattern
@many
@given(text=st.lists(st.sampled_from(SCRAPS + BLANKS), max_size=40).map("".join))
@example(text="a\n \n b")
@example(text="\u2028 \r\n\r x")
@example(text=" '\u017f'\u017fa 'S")
@example(text="x" * 96 + " " + "x" * 97)
def test_any_text_gets_the_ids_of_tiktoken(shared, tiktoken_of, pattern, text):
    theirs = tiktoken_of(pattern)
    for kind in CLASSES:
        assert shared(kind, pattern).encode(text) == theirs.encode(text, allowed_special="all")
        assert shared(kind, pattern).encode_ordinary(text) == theirs.encode_ordinary(text)


@each_pattern
def test_varied_texts_get_the_ids_of_hugging_face(shared, tmp_path, pattern):
    model = shared("fast", pattern)
    theirs = hugging_face_of(model, tmp_path)
    assert_same(varied_texts(1500, seed=2), model.encode, lambda text: theirs.encode(text).ids)


@many
@given(st.text("ab", max_size=80), st.integers(1, 12), st.text("ab", max_size=300))
@example("a" * 40, 5, "a" * 1000)
@example("aaab" * 20, 12, "aaab" * 100)
def test_dense_merges_of_two_letters_get_the_ids_of_the_reference(training_text, n_merges, text):
    merges = slow.train(training_text, n_merges, [])
    reference, compiled = (cls(slow.vocabulary(merges, []), merges) for cls in CLASSES.values())
    assert compiled.encode(text) == reference.encode(text)


@pytest.mark.parametrize("size", [90, 95, 96, 97, 98, 150, 1000])
def test_words_around_the_longest_that_is_remembered_get_the_ids_of_tiktoken(make, tiktoken_of, size):
    rng = random.Random(size)
    words = ["".join(rng.choices("abshiptoe", k=size)) for _ in range(20)] + ["a" * size, "ab" * size]
    # each twice, new and cached; then with other bytes after it
    text = " ".join(words + words) + "".join(words)
    assert make("fast").encode(text) == tiktoken_of().encode(text)


# --------------------------------------------------------------------------------------------------
# Oracle: with GPT-2's own vocabulary


@pytest.fixture(scope="module")
def gpt2() -> tiktoken.Encoding:
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR must name the folder where tiktoken keeps GPT-2's vocabulary")
    return tiktoken.get_encoding("gpt2")


@pytest.fixture(scope="module")
def gpt2_of() -> Callable[[str], Any]:
    """Either tokenizer with GPT-2's vocabulary."""
    folder = os.environ.get("LLM_BASICS_DATA")
    if not folder:
        pytest.skip("LLM_BASICS_DATA must name a folder with gpt2_vocab.json and gpt2_merges.bpe")
    files = Path(folder) / "gpt2_vocab.json", Path(folder) / "gpt2_merges.bpe"
    return functools.cache(lambda kind: CLASSES[kind].from_gpt2_files(*files))


@pytest.mark.parametrize(("kind", "n_texts"), [("reference", 2_000), ("fast", 50_000)])
def test_varied_texts_get_the_ids_of_gpt2(gpt2, gpt2_of, kind, n_texts):
    model = gpt2_of(kind)
    texts = varied_texts(n_texts, seed=3)
    assert_same(texts, model.encode, lambda text: gpt2.encode(text, allowed_special="all"))


def test_varied_texts_get_the_ids_that_hugging_face_gives_with_gpt2(gpt2_of, tmp_path):
    model = gpt2_of("fast")
    theirs = hugging_face_of(model, tmp_path)
    assert_same(varied_texts(3000, seed=4), model.encode, lambda text: theirs.encode(text).ids)


# --------------------------------------------------------------------------------------------------
# Oracle: adversarial texts


def repeated(unit: str) -> Callable[[int], str]:
    """A function that repeats a unit to `n_bytes`."""
    return lambda n_bytes: unit * (n_bytes // len(unit.encode("utf-8")))


def drawn(parts: str | list[str]) -> Callable[[int], str]:
    """A function that draws parts at random to about `n_bytes`."""

    def make_text(n_bytes: int) -> str:
        mean = len("".join(parts).encode("utf-8")) / len(parts)
        return "".join(random.Random(5).choices(parts, k=int(n_bytes / mean)))

    return make_text


def fibonacci(n_bytes: int) -> str:
    """The word of two letters that no period fits."""
    before, word = "b", "a"
    while len(word) < n_bytes:
        before, word = word, word + before
    return word[:n_bytes]


LETTERS = "abcdefghijklmnopqrstuvwxyz"
MARKS = "".join(chr(code) for code in range(0x300, 0x340))
HOSTILE = {
    "one letter": repeated("a"),
    "random letters": drawn(LETTERS),
    "letters of both cases": drawn(LETTERS + LETTERS.upper()),
    "two letters": repeated("ab"),
    "two random letters": drawn("ab"),
    "a Fibonacci word": fibonacci,
    "letters with accents": drawn("aeiou\u00e9\u00e8\u00ea\u00e0\u00f4"),
    "one word of words": drawn([word for word in WORDS[:2000] if word.isalpha()]),
    "spaces": repeated(" "),
    "spaces and an x": lambda n: " " * (n - 1) + "x",
    "an x and spaces": lambda n: "x" + " " * (n - 1),
    "two spaces and an x": repeated("  x"),
    "newlines": repeated("\n"),
    "newlines and an x": lambda n: "\n" * (n - 1) + "x",
    "Windows newlines": repeated("\r\n"),
    "tabs": repeated("\t"),
    "mixed white space": drawn(" \n\t\r\v\f"),
    "white space of Unicode": drawn("\u00a0\u2003\u2028\u2029\u3000\x85\x1c"),
    "spaces before newlines": repeated("   \n"),
    "one digit": repeated("7"),
    "digits": drawn("0123456789"),
    "digits of Unicode": drawn("\u0660\u0661\u0966\u0967\u00b2\u2160\U0001d7d8"),
    "apostrophes": repeated("'"),
    "apostrophes with spaces": repeated(" '"),
    "contractions": drawn(["'s", "'d", "'m", "'t", "'ll", "'ve", "'re"]),
    "contractions in capitals": drawn(["'S", "'D", "'LL", "'vE", "'\u017f"]),
    "halves of contractions": repeated("'l'v'r"),
    "one sign": repeated("."),
    "a letter and signs": lambda n: "a" + "." * (n - 1),
    "signs": drawn("!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~"),
    "signs and letters": repeated("-a"),
    "signs and newlines": repeated(".\n"),
    "Chinese": drawn([chr(code) for code in range(0x4E00, 0x9000)]),
    "one Chinese letter": repeated("\u6f22"),
    "rare letters of four bytes": drawn([chr(code) for code in range(0x20000, 0x20100)]),
    "emoji": drawn([chr(code) for code in range(0x1F600, 0x1F640)]),
    "emoji that are joined": repeated("\U0001f469\u200d\U0001f469\u200d\U0001f467"),
    "flags": drawn([chr(code) for code in range(0x1F1E6, 0x1F200)]),
    "marks": drawn(MARKS),
    "letters and marks": repeated("e\u0301\u0323"),
    "special tokens": repeated(END_OF_TEXT),
    "special tokens and letters": repeated(END_OF_TEXT + "a"),
    "first halves": repeated(END_OF_TEXT[:7]),
    "second halves": repeated(END_OF_TEXT[7:]),
    "special tokens begun twice": repeated(END_OF_TEXT[:11] + END_OF_TEXT),
    "special tokens in each other": repeated("<|endof<|endoftext|>text|>"),
    "zeros": repeated("\x00"),
    "byte order marks": repeated("\ufeff"),
    "line separators": repeated("\u2028"),
    "right to left": drawn("\u05d0\u05d1\u05d2 \u0627\u0628\u200f\u202e"),
    "alternating classes": repeated("a1 .\n\u00e91\u3000"),
    "no characters": drawn("\ufffd\ufffe\uffff\U0010ffff\ue000"),
    "words of 96 and 97 bytes": repeated("a" * 95 + "b " + "a" * 96 + "b "),
    "control characters": drawn([chr(code) for code in range(32)] + ["\x7f"]),
}


def survived(encode: Callable[[], list[int]]) -> list[int] | None:
    """tiktoken's ids; None if its regular expressions fail (a Rust panic)."""
    try:
        return encode()
    except BaseException as error:
        if type(error).__name__ not in ("PanicException", "ValueError"):
            raise
        return None


@each_pattern
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_get_the_ids_of_tiktoken_and_come_back(make, tiktoken_of, pattern, name):
    n_bytes = 100_000 if trials.is_full else 25_000
    text = HOSTILE[name](n_bytes)
    assert 0.8 * n_bytes < len(text.encode("utf-8")) < 1.2 * n_bytes
    model, theirs = make("fast", pattern), tiktoken_of(pattern)
    ids, ordinary = model.encode(text), model.encode_ordinary(text)
    assert model.decode(ids) == model.decode(ordinary) == text
    expected = survived(lambda: theirs.encode(text, allowed_special="all"))
    assert expected is None or ids == expected
    expected = survived(lambda: theirs.encode_ordinary(text))
    assert expected is None or ordinary == expected
    # the reference takes minutes for a word of 100,000 letters
    assert model.encode(text[:1000]) == make("reference", pattern).encode(text[:1000])


@pytest.mark.slow
@each_pattern
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_megabyte_takes_ten_times_as_long_as_a_tenth_of_it(make, tiktoken_of, pattern, name):
    make("fast", pattern).encode("compiled by now")
    seconds = {}
    for n_bytes in (100_000, 1_000_000):
        text = HOSTILE[name](n_bytes)
        seconds[n_bytes] = float("inf")
        for _ in range(2):
            model = make("fast", pattern)
            start = time.perf_counter()
            ids = model.encode(text)
            seconds[n_bytes] = min(seconds[n_bytes], time.perf_counter() - start)
    assert model.decode(ids) == text
    expected = survived(lambda: tiktoken_of(pattern).encode(text, allowed_special="all"))
    assert expected is None or ids == expected
    assert seconds[1_000_000] < 5
    # 100 kB are one chunk and fit the cache; a megabyte may take 0.5 s more
    assert seconds[1_000_000] <= 15 * seconds[100_000] + 0.5


# --------------------------------------------------------------------------------------------------
# Property: invalid UTF-8


@each_pattern
def test_any_bytes_come_back_and_get_the_ids_of_the_reference(shared, pattern):
    compiled, reference = shared("fast", pattern), shared("reference", pattern)
    contents = any_bytes(10_000 if pattern == "gpt2" else 3000, seed=6)
    assert sum(b != b.decode("utf-8", "ignore").encode("utf-8") for b in contents) > len(contents) / 3
    assert_same(contents, lambda b: compiled.decode_bytes(compiled.encode_bytes(b)), lambda b: b)
    assert_same(contents, compiled.encode_bytes, reference.encode_bytes)


@each_pattern
def test_any_bytes_are_cut_where_the_pattern_cuts_them(pattern):
    """A wrong boundary that no merge crosses does not change ids."""
    regular, number = PATTERNS[pattern], {"gpt2": scanner.GPT2, "cl100k": scanner.CL100K}[pattern]

    def by_scanner(content: bytes) -> list[int]:
        text, ends = scanner.padded(content), [0]
        while ends[-1] < len(content):
            ends.append(int(scanner.next_end(text, ends[-1], len(content), scanner.classes(), number)))
        return ends[1:]

    def by_pattern(content: bytes) -> list[int]:
        pieces = regular.findall(content.decode("utf-8", "surrogateescape"))
        return np.cumsum(
            [len(piece.encode("utf-8", "surrogateescape")) for piece in pieces], dtype=int
        ).tolist()

    assert_same(any_bytes(5000, seed=28), by_scanner, by_pattern)


def test_the_reference_gives_any_bytes_back(shared):
    model = shared("reference")
    assert_same(any_bytes(3000, seed=7), lambda b: model.decode_bytes(model.encode_bytes(b)), lambda b: b)


def test_bytes_of_a_text_get_its_ids(kind, shared):
    model = shared(kind)
    texts = varied_texts(500, seed=8)
    assert_same(texts, lambda text: model.encode_bytes(text.encode("utf-8")), model.encode_ordinary)
    assert model.encode_bytes(b"") == []


@pytest.mark.parametrize("content", [b"\xff", b"a\xe2\x82", b"\xe2\x82a", b"\xed\xa0\x80 x", b" \xc3 \xa9"])
def test_bytes_that_are_no_text_are_signs(kind, make, content):
    model = make(kind)
    assert model.decode_bytes(model.encode_bytes(content)) == content
    # a sign takes the preceding space, as "!" would, and ends the word
    assert model.encode_bytes(b"the\xff") == [*model.encode_bytes(b"the"), *model.encode_bytes(b"\xff")]


def surrogate_texts() -> Iterator[str]:
    rng = random.Random(9)
    parts = ["\ud83d", "\ude43", "\ud801", "\udc37", "\udfff", "\ud800", "a", " ", "1", "\ud83d\ude43", "\n"]
    yield from ["\ud800", "\udfff", "\ud83d\ude43", "\ude43\ud83d", "a\ud83d", "\ud83d a\ude43"]
    for _ in range(500):
        yield "".join(rng.choices(parts, k=rng.randint(0, 12)))


@each_pattern
def test_lone_surrogates_get_the_ids_of_the_replacement_character(kind, shared, tiktoken_of, pattern):
    model, theirs = shared(kind, pattern), tiktoken_of(pattern)
    for text in surrogate_texts():
        fixed = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        assert model.encode(text) == model.encode_ordinary(text) == model.encode(fixed)
        assert model.encode(text) == theirs.encode(text)
        assert model.decode(model.encode(text)) == fixed


def test_a_lone_surrogate_becomes_a_replacement_character_and_a_pair_its_character(kind, make):
    model = make(kind)
    assert model.decode(model.encode("a\ud800b\udc00")) == "a\ufffdb\ufffd"
    assert model.decode(model.encode("\ud83d\ude43")) == "\U0001f643"
    assert model.encode(f"\ud83d{END_OF_TEXT}\ude43") == [
        *model.encode("\ufffd"),
        model.special_id(END_OF_TEXT),
        *model.encode("\ufffd"),
    ]


@pytest.mark.parametrize("special", ["\ufffd", "\U0001f643", "a\U0001f643", "\ufffd\ufffd"])
def test_special_tokens_are_looked_for_in_the_text_as_it_was_mended(kind, special):
    """As in tiktoken."""
    model = CLASSES[kind].byte_level([special])
    theirs = tokenizer_formats.to_tiktoken(vocabulary_of(model))
    texts = [text + special for text in surrogate_texts()]
    assert_same(texts, model.encode, lambda text: theirs.encode(text, allowed_special="all"))


# --------------------------------------------------------------------------------------------------
# Property: special tokens

# nested, overlapping, with common prefixes, with white space at the ends and inside
SPECIALS = (END_OF_TEXT, END_OF_TEXT * 2, "<|a b|>", "<|a", "|><|", "[x]", "a.c", "\n\n|", "  ", " <s> ")
SPECIALS += ("\u00e9\u00e9", "the", "\u6f22 \U0001f643", "s\n", "'s", "12")
# none is a prefix of another, where tiktoken's choice is arbitrary
DISTINCT = (
    END_OF_TEXT,
    "|><|",
    "a b|>",
    "[x]",
    "a.c",
    "\n\n|",
    "  ",
    " <s> ",
    "\u00e9\u00e9",
    "\u6f22 ",
    "s\n",
)
DISTINCT += ("text|>x",)


def texts_with(specials: tuple[str, ...], n: int, seed: int) -> list[str]:
    """Texts of special tokens, their halves, and ordinary text."""
    rng = random.Random(seed)
    halves = [special[: rng.randint(1, len(special))] for special in specials]
    halves += [special[rng.randint(0, len(special) - 1) :] for special in specials]
    texts = ["".join(specials), "x".join(specials), " ".join(specials[::-1])]
    pools = [list(specials), halves, ["a", " ", "\n", "x", "the ship", ".", "1", "\u00e9", " \n"]]
    for _ in range(trials.count(n)):
        texts.append("".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(0, 14))))
    return texts


def found_by_hand(model: Any, text: str) -> list[int]:
    """Ids with the longest special token at each position."""
    ids, start, i = [], 0, 0
    while i < len(text):
        here = max((s for s in model.special_tokens if text.startswith(s, i)), key=len, default="")
        if here:
            ids += [*model.encode_ordinary(text[start:i]), model.special_id(here)]
            start = i + len(here)
        i += len(here) or 1
    return ids + model.encode_ordinary(text[start:])


@pytest.fixture(scope="session")
def bare_bytes() -> Callable[[str, tuple[str, ...]], Any]:
    """A byte tokenizer with special tokens."""
    return functools.cache(lambda kind, specials: CLASSES[kind].byte_level(specials))


def test_of_special_tokens_the_first_and_then_the_longest_is_taken(kind, bare_bytes):
    model = bare_bytes(kind, SPECIALS)
    texts = texts_with(SPECIALS, 5000 if kind == "fast" else 2000, 10)
    assert_same(texts, model.encode, lambda text: found_by_hand(model, text))


def test_ordinary_text_never_gets_a_special_id(kind, bare_bytes, make):
    for model in (bare_bytes(kind, SPECIALS), make(kind, "cl100k", DISTINCT[:6])):
        special_ids = {model.special_id(special) for special in model.special_tokens}
        assert len(special_ids) == len(model.special_tokens)
        allowed = set()
        for text in texts_with(SPECIALS, 2500, 11):
            ordinary = model.encode_ordinary(text)
            assert special_ids.isdisjoint(ordinary)
            assert model.decode(ordinary) == text
            assert special_ids.isdisjoint(model.encode_bytes(text.encode("utf-8")))
            allowed.update(model.encode(text))
        assert special_ids <= allowed


@each_pattern
def test_texts_with_special_tokens_get_the_ids_of_tiktoken(make, learned, pattern):
    tokens = set(learned(pattern)[0].values()) - {END_OF_TEXT.encode()}
    specials = tuple(special for special in DISTINCT if special.encode("utf-8") not in tokens)
    assert len(specials) > 6
    reference, compiled = (make(kind, pattern, specials) for kind in CLASSES)
    theirs = tokenizer_formats.to_tiktoken(vocabulary_of(reference))
    texts = texts_with(DISTINCT, 5000, 12) + varied_texts(500, 12, specials)
    assert_same(texts, compiled.encode, lambda text: theirs.encode(text, allowed_special="all"))
    assert_same(texts, reference.encode, compiled.encode)
    assert_same(texts, compiled.encode_ordinary, theirs.encode_ordinary)


# --------------------------------------------------------------------------------------------------
# Property: chunks, cache, threads


def long_texts(specials: tuple[str, ...]) -> list[str]:
    """Texts of many chunks of up to 50 characters."""
    texts = [HOSTILE[name](1500) for name in HOSTILE]
    texts += ["".join(varied_texts(20, seed, specials)) for seed in range(20, 50)]
    return texts + ["".join(texts_with(specials, 60, seed)) for seed in range(20)]


@pytest.mark.parametrize("size", [7, 20, 50])
@each_pattern
def test_texts_longer_than_a_chunk_get_the_ids_of_the_reference(make, shared, monkeypatch, pattern, size):
    reference = shared("reference", pattern)
    monkeypatch.setattr(fast, "CHUNK_CHARACTERS", size)
    compiled = make("fast", pattern)
    texts = long_texts((END_OF_TEXT,))
    assert_same(texts, compiled.encode, reference.encode)
    assert_same(texts, compiled.encode_ordinary, reference.encode_ordinary)


@pytest.mark.parametrize("size", [7, 20, 50])
def test_special_tokens_across_chunks_stay_whole(bare_bytes, monkeypatch, size):
    reference = bare_bytes("reference", SPECIALS)
    monkeypatch.setattr(fast, "CHUNK_CHARACTERS", size)
    compiled = fast.Tokenizer.byte_level(SPECIALS)
    assert_same(long_texts(SPECIALS), compiled.encode, reference.encode)


@each_pattern
def test_pairs_of_surrogates_across_chunks_stay_whole(monkeypatch, pattern):
    """A pair is a letter or number only when joined, and belongs to the word before it."""
    merges = [(b"a", b"\xf0"), (b"1", b"\xf0"), (b" ", b"\xf0")]
    vocab = slow.vocabulary(merges, [])
    reference = tokenizer.Tokenizer(vocab, merges, ["a\U0001f643"], PATTERNS[pattern])
    monkeypatch.setattr(fast, "CHUNK_CHARACTERS", 5)
    compiled = fast.Tokenizer(vocab, merges, ["a\U0001f643"], PATTERNS[pattern])
    texts = ["a\ud801\udc37" * 10, "1\ud835\udfd8" * 10, "aa\ud83d\ude43 " * 10, "1\ud801\udc37" * 10]
    fixed = {text: text.encode("utf-16-le", "surrogatepass").decode("utf-16-le") for text in texts}
    assert_same(texts, compiled.encode, lambda text: reference.encode(fixed[text]))
    assert_same(list(surrogate_texts()), compiled.encode_ordinary, reference.encode_ordinary)


def test_a_text_of_several_full_chunks_gets_the_ids_of_tiktoken(make, tiktoken_of):
    text = " ".join(WORDS) + "".join(varied_texts(6000, 13))
    assert len(text) > 2 * fast.CHUNK_CHARACTERS
    assert make("fast").encode(text) == tiktoken_of().encode(text, allowed_special="all")


@pytest.mark.parametrize("most", [1, 1 << 13, 1 << 14])
def test_a_memory_that_begins_anew_changes_no_ids(make, tiktoken_of, monkeypatch, most):
    monkeypatch.setattr(fast, "MAX_SLOTS", most)
    rng = random.Random(14)
    short = [f"{rng.choice(WORDS)}{rng.choices(LETTERS, k=4)}" for _ in range(4000)]
    # pre-tokens over 16 bytes are in the pool, which fills first
    long = ["".join(rng.choices(LETTERS, k=rng.randint(17, 96))) for _ in range(6000)]
    for text in (" ".join(short), " ".join(long), " ".join(rng.sample(short + long, 5000))):
        model = make("fast")
        for _ in range(2):
            assert model.encode(text) == tiktoken_of().encode(text, allowed_special="all")


def test_a_memory_that_grows_changes_no_ids(make, tiktoken_of):
    model, rng = make("fast"), random.Random(15)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(1, 30))) for _ in range(20_000)]
    expected = tiktoken_of().encode(" ".join(words))
    n_slots = len(model._idle[-1].table.slots)
    assert model.encode(" ".join(words)) == expected
    assert len(model._idle[-1].table.slots) > n_slots, "the table was large enough, so nothing was tried"
    n_remembered = len(model._idle[-1].table)
    assert model.encode(" ".join(words)) == expected
    assert len(model._idle[-1].table) == n_remembered, "a pre-token was not found again"


def test_what_is_remembered_is_not_mixed_up_with_what_begins_alike(make, tiktoken_of):
    """Lengths around 8 and 16, where the key format changes, with trailing zeros."""
    bodies = ["\x01\x02" * 10, "abcdefgh" * 3, "\x00" * 20, "!\x00" * 10, "-" * 20, "\u00e9" * 10]
    units = [body[:n] for body in bodies for n in range(1, 20)]
    text = "".join(f"{unit} a{unit}1" for unit in units)
    model = make("fast")
    for _ in range(2):
        assert model.encode(text) == tiktoken_of().encode(text)
        assert_same(units, model.encode, tiktoken_of().encode)


def test_pretokens_with_the_same_first_eight_bytes_are_distinguished(make, tiktoken_of):
    """Enough for collisions in the table."""
    rng = random.Random(26)
    words = ["abcdefgh" + "".join(rng.choices(LETTERS, k=4)) for _ in range(6000)]
    assert make("fast").encode(" ".join(words)) == tiktoken_of().encode(" ".join(words))
    assert make("fast").encode("1".join(words)) == tiktoken_of().encode("1".join(words))


def mix(low: int, high: int) -> int:
    """`hash_table.mix` in Python integers."""
    h = ((low ^ (high * MULTIPLIER)) * MULTIPLIER) & LAST
    h = ((h ^ (h >> 32)) * MULTIPLIER) & LAST
    return h ^ (h >> 32)


MULTIPLIER, LAST = int(table.MULTIPLIER), (1 << 64) - 1


def same_hash(word: bytes, rng: random.Random) -> bytes:
    """Another pre-token of 24 bytes with the hash of `word`: eight bytes, and eight that cancel them."""
    first, second = (int.from_bytes(word[i : i + 8], "little") for i in (0, 8))
    while True:
        other = bytes(rng.choices(SIGNS, k=8))
        carried = mix(first, 24), mix(int.from_bytes(other, "little"), 24)
        follows = second ^ (carried[0] * MULTIPLIER & LAST) ^ (carried[1] * MULTIPLIER & LAST)
        found = other + follows.to_bytes(8, "little") + word[16:]
        if set(found) <= set(SIGNS):
            return found


# neither letters, numbers nor white space, alone or in a row
SIGNS = b'!"#$%&()*+,-./:;<=>?@[]^_`{|}~' + bytes(range(0x80, 0xC0)) + bytes(range(0xF5, 0x100))


def test_pretokens_with_equal_hashes_are_distinguished(make):
    model, rng = make("fast"), random.Random(27)
    words = [bytes(rng.choices(SIGNS, k=24)) for _ in range(3)]
    words += [same_hash(word, rng) for word in words]
    hashes = {int(table.hash_bytes(scanner.padded(word), 0, 24)) for word in words}
    assert len(hashes) == len(words) // 2, "these words were made for another hash"
    assert_same(words, lambda word: model.decode_bytes(model.encode_bytes(word)), lambda word: word)
    assert_same(words, model.encode_bytes, make("reference").encode_bytes)


def test_a_shorter_text_sees_nothing_of_a_longer_one_before_it(make, tiktoken_of):
    model = make("fast")
    model.encode("s1 \u00e9\u6f22" * 1000)
    texts = [" ", "'", "a", "1", "  ", "\n", "'l", "s1 ", "\u6f22", " '", ""]
    assert_same(texts, model.encode, tiktoken_of().encode)


def test_buffers_hold_a_chunk_and_the_padding_after_it(make, monkeypatch):
    """Kernels do not check bounds; an overflow would corrupt other memory."""
    monkeypatch.setattr(fast, "CHUNK_CHARACTERS", 100)
    for n_letters in (1, 99, 100, 101, 110, 123, 124, 125, 1000):
        model = make("fast")
        model.encode_bytes(b"x" * n_letters)
        memory = model._idle[-1]
        assert len(memory.text) >= n_letters + scanner.PADDING
        assert len(memory.out) >= n_letters


def test_a_batch_is_each_text(kind, make):
    model = make(kind)
    texts = varied_texts(200, 16) + ["", END_OF_TEXT]
    expected = [model.encode(text) for text in texts]
    assert model.encode_batch(texts) == expected
    for n_threads in (1, 2, 5):
        assert model.encode_batch(texts, n_threads) == expected
    assert model.encode_batch([]) == []


def test_an_array_has_the_ids_of_the_list(kind, make, monkeypatch):
    model = make(kind)
    monkeypatch.setattr(fast, "CHUNK_CHARACTERS", 50)
    monkeypatch.setattr(fast, "PARALLEL_CHARACTERS", 1000)
    texts = [*varied_texts(40, 18), "", END_OF_TEXT, "lone \ud800 surrogate", f"a word{END_OF_TEXT} " * 200]
    for text in texts:
        for n_threads in (None, 1, 3):
            ids = model.encode_to_array(text, n_threads)
            assert ids.dtype == np.int32 and ids.tolist() == model.encode(text)


def test_many_threads_at_once_get_the_right_ids(make, tiktoken_of):
    rng = random.Random(17)
    texts = [
        " ".join("".join(rng.choices(LETTERS, k=rng.randint(1, 30))) for _ in range(800)) for _ in range(60)
    ]
    texts += ["a" * 5000 + str(n) for n in range(20)]
    expected = [tiktoken_of().encode(text) for text in texts]
    model = make("fast")
    for _ in range(2):
        assert model.encode_batch(texts, 8) == expected
    found: dict[int, list[list[int]]] = {}

    def work(n: int) -> None:
        found[n] = [model.encode(text) for text in texts[n::4]]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[n] == expected[n::4] for n in range(4))


def test_the_ids_belong_to_the_caller(kind, make):
    model = make(kind)
    ids = model.encode("the ship sails")
    before = ids.copy()
    assert all(type(id) is int for id in ids)
    ids.append(-1)
    model.encode("something else entirely")
    assert model.encode("the ship sails") == before == ids[:-1]


# --------------------------------------------------------------------------------------------------
# Property: the common interface


@each_pattern
def test_streams_get_the_ids_of_the_whole(kind, shared, pattern):
    model = shared(kind, pattern)
    for text in varied_texts(60, 18, SPECIALS) + ["a\n\n\n b\r\n\r\n\x1c \u2028\n"]:
        expected = model.encode(text)
        assert list(model.encode_iterable(text)) == expected
        for size in (2, 9, 50):
            assert list(model.encode_iterable(re.findall(f"(?s).{{1,{size}}}", text))) == expected


@each_pattern
@pytest.mark.parametrize(
    "copied", [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy, copy.copy]
)
def test_a_pickle_or_a_copy_is_the_same_tokenizer(kind, make, pattern, copied):
    model = make(kind, pattern, (END_OF_TEXT, "<|a b|>"))
    model.encode("the ship")
    same = copied(model)
    assert type(same) is type(model)
    assert same.fingerprint() == model.fingerprint()
    texts = [*SAMPLES.values(), f"It'S 12345{END_OF_TEXT}\u017f"]
    assert_same(texts, same.encode, model.encode)
    # an equal pattern object must select the same scanner
    n_read = 0

    def stream() -> Iterator[str]:
        nonlocal n_read
        for _ in range(100):
            n_read += 1
            yield "a ship or a rock\n"

    assert next(same.encode_iterable(stream())) == same.encode("a ship")[0]
    assert n_read < 20, "the copy holds the whole stream in memory"


def test_a_batch_of_ids_is_each_text(kind, make):
    model = make(kind)
    texts = varied_texts(100, 19)
    assert model.decode_batch(model.encode_batch(texts)) == texts
    assert model.decode_batch([]) == []
    assert model.decode_batch(iter([[], iter(model.encode("the ship"))])) == ["", "the ship"]


def test_either_class_reads_what_the_other_wrote(tmp_path, make):
    for name, pattern in (("first", "gpt2"), ("second", "cl100k")):
        model = make("reference", pattern)
        model.save(tmp_path / name)
        loaded = fast.Tokenizer.load(tmp_path / name)
        assert type(loaded) is fast.Tokenizer
        assert loaded.fingerprint() == model.fingerprint()
        assert loaded.encode("It'S  1234 ships") == model.encode("It'S  1234 ships")


def test_a_pattern_without_a_scanner_gets_the_ids_of_the_reference(learned, tmp_path):
    reference, compiled = (cls(*learned("gpt2"), [END_OF_TEXT], PLAIN_PATTERN) for cls in CLASSES.values())
    texts = varied_texts(300, 20)
    assert_same(texts, compiled.encode, reference.encode)
    assert_same(texts, compiled.encode_ordinary, reference.encode_ordinary)
    assert_same(any_bytes(600, 20), compiled.encode_bytes, reference.encode_bytes)
    assert compiled.encode_batch(texts, 2) == reference.encode_batch(texts)
    assert list(compiled.encode_iterable(texts)) == reference.encode("".join(texts))
    path = tmp_path / "text.txt"
    path.write_bytes("".join(texts).encode("utf-8"))
    assert ids_in(shards.encode_to_file(compiled, path, tmp_path, "x", 2))[:-1] == reference.encode(
        "".join(texts)
    )
    assert compiled.encode("It's") != fast.Tokenizer(*learned("gpt2"), [END_OF_TEXT]).encode("It's")


def test_ids_need_not_be_in_the_order_of_learning(learned):
    vocab, merges = learned("gpt2")
    order = random.Random(21).sample(sorted(vocab), len(vocab))
    shuffled = {3 * new + 5: vocab[old] for new, old in enumerate(order)}
    reference, compiled = (cls(shuffled, merges, [END_OF_TEXT]) for cls in CLASSES.values())
    assert compiled.vocab_size == 3 * len(vocab) + 3
    assert_same(varied_texts(500, 21), compiled.encode, reference.encode)


@pytest.mark.parametrize("high", [1 << 22, (1 << 31) - 1])
def test_one_high_id_takes_no_memory(learned, high):
    vocab, merges = learned("gpt2")
    vocab = {(high if token == b"the" else id): token for id, token in vocab.items()}
    reference, compiled = (cls(vocab, merges, [END_OF_TEXT]) for cls in CLASSES.values())
    assert compiled.vocab_size == high + 1
    assert_same(varied_texts(100, 22), compiled.encode, reference.encode)
    assert compiled.decode([high]) == reference.decode([high])
    ids = compiled.encode("the")
    assert ids == [high] and type(ids[0]) is int


# --------------------------------------------------------------------------------------------------
# Property: files


@pytest.fixture(params=[40, 500, None], ids=["parts of 40", "parts of 500", "parts of the true size"])
def part_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Set the size of file chunks."""
    if request.param:
        monkeypatch.setattr(tokenizer, "PART_BYTES", request.param)
        monkeypatch.setattr(chunks, "read", functools.partial(chunks.read, n_bytes=request.param))
    return request.param


def ids_in(paths: list[Path]) -> list[int]:
    return np.concatenate([shards.read_shard(path).tokens for path in paths]).tolist()


def documents(n: int) -> str:
    """Documents, some empty, some one endless word, with halves of END_OF_TEXT between them."""
    texts = varied_texts(n, 22) + list(SAMPLES.values()) + ["", "", "a" * 3000, " " * 999, "\u6f22" * 700]
    return END_OF_TEXT.join(texts + ["one\r\n\r\n two", "x<|endof", "text|>", "the end."])


FILES = {
    "documents": documents(150),
    "documents with a last end": documents(100) + END_OF_TEXT,
    "nothing": "",
    "a letter": "a",
    "an end": END_OF_TEXT,
    "two ends": END_OF_TEXT * 2,
    "one word": "a" * 5000,
    "no place to cut": " \n" * 2500,
    "letters of four bytes": "\U00010437" * 1200,
    "marks and words": "e\u0301\u6f22. " * 500,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_file_gets_the_ids_of_its_text(kind, make, tmp_path, part_bytes, n_threads, name):
    text, pattern = FILES[name], "cl100k" if n_threads == 3 else "gpt2"
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode("utf-8"))
    model, reports = make(kind, pattern), []
    paths = shards.encode_to_file(
        model, path, tmp_path / "ids", "train", n_threads, progress=lambda *report: reports.append(report)
    )
    assert paths == sorted((tmp_path / "ids").iterdir()) == [tmp_path / "ids" / "train_0000.bin"]
    end, shard = model.special_id(END_OF_TEXT), shards.read_shard(paths[0], model.fingerprint())
    expected = model.encode(text)
    if not text.endswith(END_OF_TEXT):
        expected.append(end)
    assert shard.tokens.tolist() == expected
    assert shard.n_documents == expected.count(end)
    assert shard.n_bytes == len(text.encode("utf-8"))
    assert shard.vocab_size == N_TOKENS
    size = path.stat().st_size
    assert {(stage, total) for stage, _, total in reports} <= {("encoding", size)}
    done = [done for _, done, _ in reports]
    assert not size or done[-1] == size
    assert all(before <= after for before, after in pairwise(done))
    if part_bytes == 40 and name.startswith("documents"):
        assert len(done) > 50, "the file was not read in parts"


def test_a_file_in_several_shards_gets_the_ids_of_its_text(kind, make, tmp_path, part_bytes):
    path, text = tmp_path / "text.txt", FILES["documents"]
    path.write_bytes(text.encode("utf-8"))
    model = make(kind)
    paths = shards.encode_to_file(model, path, tmp_path / "ids", "train", 2, shard_tokens=300)
    assert sorted((tmp_path / "ids").iterdir()) == paths
    assert part_bytes is None or len(paths) > 5
    read = [shards.read_shard(path) for path in paths]
    end = model.special_id(END_OF_TEXT)
    assert ids_in(paths) == [*model.encode(text), end]
    assert all(len(shard.tokens) >= 300 for shard in read[:-1])
    assert [shard.n_documents for shard in read] == [int((s.tokens == end).sum()) for s in read]
    assert sum(shard.n_bytes for shard in read) == path.stat().st_size


@pytest.mark.parametrize("specials", [SPECIALS, (END_OF_TEXT, "of"), (END_OF_TEXT, "xt|><|en", "  a")])
def test_a_file_with_special_tokens_in_each_other_gets_the_ids_of_its_text(
    kind, tmp_path, part_bytes, specials
):
    path, text = tmp_path / "text.txt", "".join(texts_with(specials, 250, 23))
    path.write_bytes(text.encode("utf-8"))
    model = CLASSES[kind].byte_level(specials)
    found = ids_in(shards.encode_to_file(model, path, tmp_path / "ids", "train", 1))
    expected = model.encode(text)
    assert found == expected + ([] if expected[-1] == model.special_id(END_OF_TEXT) else [found[-1]])
    assert found[-1] == model.special_id(END_OF_TEXT)


@pytest.mark.parametrize(
    ("content", "offset"),
    [
        (b"\xff", 0),
        (b"the ship " * 99 + b"\xff sails " * 99, 891),
        (b"the ship<|endoftext|>" * 99 + b"\xed\xa0\x80" + b"<|endoftext|>" * 9, 2079),
        (b"x" * 700 + b"\xc3", 700),
        (b" \n" * 700 + b"\xe2\x82", 1400),
        (b"one\xe6\xbc\xa2 " * 50 + b"a\xf0\x9f\x98 b" + b"\xff" * 500, 351),
    ],
)
@pytest.mark.parametrize("n_threads", [1, 3])
def test_invalid_utf8_is_reported_with_file_and_offset(
    kind, make, tmp_path, part_bytes, n_threads, content, offset
):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    line = content[:offset].count(b"\n") + 1
    message = f"{path}:{line} must be UTF-8, got byte 0x{content[offset]:02x} at offset {offset}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        shards.encode_to_file(make(kind), path, tmp_path / "ids", "train", n_threads)
    assert list((tmp_path / "ids").iterdir()) == [], "no half of a file stays behind"


def test_a_failure_leaves_the_tokenizer_as_it_was(kind, make, tmp_path, tiktoken_of):
    model, path = make(kind), tmp_path / "text.txt"
    path.write_bytes(b"the ship \xff")
    with pytest.raises(ValueError, match="must be UTF-8"):
        shards.encode_to_file(model, path, tmp_path, "train", 2)
    assert_same(varied_texts(50, 24), model.encode, lambda t: tiktoken_of().encode(t, allowed_special="all"))


def test_a_file_without_an_end_of_text_in_the_vocabulary_is_refused(kind, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"the ship")
    with pytest.raises((KeyError, ValueError), match=re.escape(END_OF_TEXT)):
        shards.encode_to_file(CLASSES[kind].byte_level([]), path, tmp_path / "ids", "train")
    assert not (tmp_path / "ids").exists()


def test_the_cache_holds_the_longest_pretokens(make):
    """A pre-token of MAX_CACHED_BYTES without merges needs as many ids."""
    model = make("fast")
    rng = random.Random(25)
    words = ["".join(chr(rng.randint(0xC0, 0xD6)) for _ in range(48)) for _ in range(2000)]
    assert len(words[0].encode("utf-8")) == text_encode.MAX_CACHED_BYTES
    text = "1".join(words)
    assert model.decode(model.encode(text)) == text
    one = model.encode("1")
    ids = [id for word in words for id in one + model.encode(word)]
    assert model.encode(text) == ids[1:]
