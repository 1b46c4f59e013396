"""Learning merges, against the slowest trainer there is. Alone: `uv run pytest tests/test_bpe.py`.

What every implementation must do goes through the adapters; what only ours promises (errors, workers, counts
of work) is tested on `llm_basics.core.bpe` itself.
"""

import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tokenizers
import trials
from fixtures import make_text_fixtures as slow
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_basics.core import bpe

FIXTURES = Path(__file__).parent / "fixtures"
END_OF_TEXT = "<|endoftext|>"

# few letters, so that pairs repeat, overlap and tie; what the split pattern and the specials look at
SCRAPS = [
    "a",
    "b",
    "aa",
    "ab",
    "ba",
    "A",
    "\u00e9",
    "\u6f22",
    "1",
    "_",
    "'",
    "s",
    "ll",
    ".",
    "<|a|>",
    "<|a|><|b|>",
]
BLANKS = [" ", "  ", "\n", "\r\n", "\t", "\u2028", "\u00a0", "\x00", "\x1c", "\x85"]
texts = st.lists(st.sampled_from(SCRAPS + BLANKS), max_size=60).map("".join)
special_sets = st.lists(
    st.sampled_from(["<|a|>", "<|a|><|b|>", "<|b|>", "aa", "ab", ".a"]), max_size=3, unique=True
)

# the same examples in every run; nothing is written to the working directory
many = settings(max_examples=trials.count(150), deadline=None, derandomize=True, database=None)

Merges = list[tuple[bytes, bytes]]


@pytest.fixture(scope="session")
def train(
    adapters, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[dict[int, bytes], Merges]]:
    """Train through the adapters on a text that is handed in, up to a number of merges."""
    path = tmp_path_factory.mktemp("train") / "text.txt"

    def train(text: str, n_merges: int, special_tokens: list[str] | None = None):
        specials = special_tokens or []
        path.write_bytes(text.encode("utf-8"))
        return adapters.run_train_bpe(path, 256 + len(specials) + n_merges, specials)

    return train


@pytest.fixture(scope="session")
def learn(train) -> Callable[..., Merges]:
    """As `train`, but only the merges."""
    return lambda *args: train(*args)[1]


def lines(**frequencies: int) -> str:
    """Each word on its own lines, as often as its count: no word has a neighbor."""
    return "".join(f"{word}\n" * frequency for word, frequency in frequencies.items())


def pairs(*spaced: str) -> Merges:
    """`pairs("a bc")` is `[(b"a", b"bc")]`."""
    return [tuple(side.encode("utf-8") for side in pair.split(" ")) for pair in spaced]


# --------------------------------------------------------------------------------------------------
# Oracle


@many
@given(texts, special_sets, st.integers(0, 30))
@example("aaaa aaa aa a aaaaaaa", [], 9)
@example("\r\n\r\n\r\na\r\n\r\n\r\na\r\n", [], 9)
@example("ab<|a|><|b|>ab<|a|>ab<|b|>ab", ["<|a|>", "<|a|><|b|>"], 9)
def test_merges_equal_those_of_recounting_everything(learn, text, special_tokens, n_merges):
    assert learn(text, n_merges, special_tokens) == slow.train(text, n_merges, special_tokens)


@pytest.mark.parametrize("seed", range(4))
def test_merges_equal_those_of_hugging_face_as_long_as_nothing_ties(learn, seed):
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcd", k=generator.randint(2, 12))) for _ in range(150)]
    text = lines(**{word: generator.randint(1, 800) for word in words})
    n_merges = merges_before_a_tie(text)
    assert n_merges > 40
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + n_merges, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([text], trainer)
    ids = model.get_vocab()
    learned = sorted((token for token in ids if len(token) > 1), key=ids.__getitem__)
    assert [left + right for left, right in learn(text, n_merges)] == [t.encode("utf-8") for t in learned]


def merges_before_a_tie(text: str) -> int:
    words = slow.count_words(text, [])
    for n_merges in range(1000):
        (best, most), (_, second) = slow.count_pairs(words).most_common(2)
        if most == second:
            return n_merges
        words = Counter({slow.merge_word(word, best): frequency for word, frequency in words.items()})
    raise AssertionError("no tie in 1000 merges")


@many
@given(texts)
def test_pretokens_equal_those_of_hugging_face(text):
    pieces = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    assert list(bpe.pretokenize(text)) == [text[start:end] for _, (start, end) in pieces]


# --------------------------------------------------------------------------------------------------
# Property: which pair is next


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(lines(zb=2, za=2, zc=2), pairs("z c", "z b", "z a"), id="equal left sides"),
        pytest.param(
            lines(ab=9, xab=2, xac=2), pairs("a b", "x ab", "x a", "xa c"), id="a prefix is less, right"
        ),
        pytest.param(
            lines(ce=9, cd=8, ced=2, cde=2), pairs("c e", "c d", "ce d", "cd e"), id="bytes, not ids, left"
        ),
        # GPT-2 spells 00 and the space with characters after the letters
        pytest.param("\x00\x00\nzz\n", [(b"z", b"z"), (b"\0", b"\0")], id="bytes, not their spelling"),
    ],
)
def test_a_tie_goes_to_the_lexicographically_greater_pair_of_byte_strings(learn, text, expected):
    assert learn(text, len(expected)) == expected


def test_a_frequent_word_outweighs_many_words():
    words = {b"ab%d" % i: 1 for i in range(50)} | {b"xy": 51}
    assert bpe.learn_merges(words, 257, [])[1] == pairs("x y")


@pytest.mark.parametrize("text", ["", "a", "\n", "a1_", END_OF_TEXT * 3])
def test_a_text_without_pairs_gives_the_bytes_and_the_special_tokens(train, text):
    vocab, merges = train(text, 50, [END_OF_TEXT])
    assert merges == []
    assert sorted(vocab.values()) == sorted([END_OF_TEXT.encode()] + [bytes([b]) for b in range(256)])


# --------------------------------------------------------------------------------------------------
# Property: where merges may happen


def test_no_token_crosses_a_pretoken(learn):
    text = "it's a dog, it's a dog's dog; don't they'll 12 ab12 12ab  a\n\n\nb \r\n\r\n x_y_z __a__\t\tb " * 9
    words = set(regex.findall(slow.GPT2_PATTERN, text))
    merges = learn(text, 400)
    assert merges, "nothing was learned"
    for left, right in merges:
        assert any((left + right).decode("utf-8") in word for word in words), left + right


def test_line_ends_and_byte_order_marks_are_bytes_like_others(learn):
    assert (b"\r", b"\n") in learn("a\r\n\r\n\r\n" * 9, 9)
    assert learn("\ufeffab", 9) == [(b"\xef", b"\xbb"), (b"\xef\xbb", b"\xbf"), (b"a", b"b")]


def test_special_tokens_that_are_not_given_are_text(learn):
    assert learn(END_OF_TEXT * 9, 3, []) == slow.train(END_OF_TEXT * 9, 3, [])


@pytest.mark.parametrize(
    ("special", "text"),
    [
        ("<|a|b|>", "<|a|b|>" * 9 + "b|>ab<|a" * 5),
        ("[x]", "xxxx[x]xyxx" * 5),
        ("a.c", "abcadca.cabc" * 5),
        ("..", "ab..cd. ef" * 5),
        ("a+", "aaaa+aaa" * 5),
        ("(x", "ab(xcd" * 5),
        ("\\d", "12\\d34d" * 5),
        ("^$", "ab^$cd" * 5),
        ("a b", "a  ba bxa b" * 5),
        ("# ", "a # b #c" * 5),
        ("\u00e9", "\u00e9\u00e8\u00e9ab" * 5),
        ("\n\n", "ab\ncd\n\nab" * 5),
    ],
)
def test_a_special_token_is_no_pattern(learn, special, text):
    assert learn(text, 50, [special]) == slow.train(text, 50, [special])


# --------------------------------------------------------------------------------------------------
# Property: the vocabulary


def test_each_merge_joins_what_the_vocabulary_had_before(train):
    _, merges = train((FIXTURES / "corpus.txt").read_bytes().decode("utf-8")[:20_000], 200, [END_OF_TEXT])
    known = {bytes([b]) for b in range(256)}
    for left, right in merges:
        assert left in known and right in known
        known.add(left + right)
    assert len(known) == 256 + 200


def test_fewer_merges_are_a_prefix_of_more(learn):
    text = (FIXTURES / "corpus.txt").read_bytes().decode("utf-8")[:20_000]
    assert learn(text, 40, [END_OF_TEXT]) == learn(text, 120, [END_OF_TEXT])[:40]


def test_our_vocabulary_has_specials_first_then_bytes_then_merges(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("low lower lowest " * 3)
    vocab, merges = bpe.train_bpe(path, 262, [END_OF_TEXT, "<pad>"])
    assert vocab == slow.vocabulary(merges, [END_OF_TEXT, "<pad>"])
    assert list(vocab) == list(range(262))


def test_a_special_token_given_twice_counts_once(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("low lower lowest " * 3)
    twice = bpe.train_bpe(path, 260, [END_OF_TEXT, "<pad>", END_OF_TEXT])
    assert twice == bpe.train_bpe(path, 260, [END_OF_TEXT, "<pad>"])


def test_an_empty_special_token_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("low lower lowest")
    with pytest.raises(ValueError, match="special token must have at least two bytes"):
        bpe.train_bpe(path, 300, [END_OF_TEXT, ""])


@pytest.mark.parametrize(
    ("vocab_size", "specials", "least"), [(255, [], 256), (257, ["<|a|>", "<|b|>"], 258)]
)
def test_a_vocabulary_too_small_for_the_bytes_is_refused(tmp_path, vocab_size, specials, least):
    path = tmp_path / "text.txt"
    path.write_text("low lower lowest")
    with pytest.raises(ValueError, match=rf"vocab_size must be at least {least}\b.*got {vocab_size}"):
        bpe.train_bpe(path, vocab_size, specials)
    assert bpe.train_bpe(path, least, specials)[1] == []


# --------------------------------------------------------------------------------------------------
# Property: any bytes, any extreme


@many
@given(st.dictionaries(st.binary(max_size=12), st.integers(1, 5), max_size=12))
@example({b"\xff\xff": 1, b"\x00\x00": 1, b"zz": 1, b"\xff\x00": 1, b"\x00\xff": 1})
@example({b"\x00": 1, b"\x00\x00\x00\x00": 2, b"a\x00": 2, b"a": 2})
def test_words_of_any_bytes_merge_as_by_recounting_everything(frequencies):
    words = Counter({tuple(bytes([b]) for b in word): f for word, f in frequencies.items()})
    expected = []
    while found := slow.count_pairs(words):
        expected.append(max(found, key=lambda pair: (found[pair], pair)))
        merged: Counter[tuple[bytes, ...]] = Counter()
        for word, frequency in words.items():
            merged[slow.merge_word(word, expected[-1])] += frequency
        words = merged
    assert bpe.learn_merges(frequencies, 10_000, [])[1] == expected


@pytest.mark.parametrize("at", [0, 5, 3000])
def test_bytes_that_are_not_utf8_are_named_with_file_and_offset(tmp_path, at):
    path = tmp_path / "broken.txt"
    path.write_bytes((b"<s>a\n" * 600)[:at] + b"\xff" + b"cd<s>" * 60)
    with pytest.raises(
        ValueError, match=rf"broken\.txt:{at // 5 + 1} must be UTF-8, got byte 0xff at offset {at}$"
    ):
        bpe.train_bpe(path, 300, ["<s>"])
    with pytest.raises(ValueError, match=rf"broken\.txt:{at // 5 + 1} .* offset {at}$"):
        bpe.train_bpe(path, 300, ["<s>"], n_workers=2)


def test_a_merge_touches_only_the_words_that_hold_the_pair(monkeypatch):
    pretokens = bpe.count_pretokens(FIXTURES / "corpus.txt", [END_OF_TEXT])
    n_pairs = sum(len(word) - 1 for word in pretokens)
    work: Counter[str] = Counter()
    merge_pair = bpe.merge_pair

    class Counting(bpe.PairCounts):
        def add(self, pair, index, count):
            work["updates"] += 1
            super().add(pair, index, count)

    def merge_pair_counting(*args):
        work["words"] += 1
        return merge_pair(*args)

    monkeypatch.setattr(bpe, "PairCounts", Counting)
    monkeypatch.setattr(bpe, "merge_pair", merge_pair_counting)
    _, merges = bpe.learn_merges(pretokens, 256 + 1 + 500, [END_OF_TEXT])
    assert len(merges) == 500
    # counting anew takes 500 updates a pair and 500 looks at each word; this takes some 7 and 3
    assert n_pairs <= work["updates"] < 12 * n_pairs
    assert len(merges) <= work["words"] < 6 * len(pretokens)


# --------------------------------------------------------------------------------------------------
# Snapshot


def test_the_corpus_gives_the_frozen_merges_and_vocabulary(adapters):
    vocab, merges = adapters.run_train_bpe(FIXTURES / "corpus.txt", 256 + 1 + slow.N_MERGES, [END_OF_TEXT])
    frozen = (FIXTURES / "corpus_merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    assert len(merges) == slow.N_MERGES
    assert [f"{slow.spell(left)} {slow.spell(right)}" for left, right in merges] == frozen
    expected = slow.vocabulary(merges, [END_OF_TEXT])
    assert set(vocab) == set(expected)
    assert set(vocab.values()) == set(expected.values())


# --------------------------------------------------------------------------------------------------
# Parity: again, and with more workers


def test_the_same_text_gives_the_same_merges_again(learn):
    text = (FIXTURES / "corpus.txt").read_bytes().decode("utf-8")[:20_000]
    assert learn(text, 100, [END_OF_TEXT]) == learn(text, 100, [END_OF_TEXT])


@pytest.mark.parametrize("n_workers", [2, 3])
def test_any_number_of_workers_counts_the_same(n_workers):
    corpus = FIXTURES / "corpus.txt"
    assert len(bpe.chunk_boundaries(corpus, [END_OF_TEXT], n_workers)) == n_workers + 1
    alone = bpe.count_pretokens(corpus, [END_OF_TEXT], n_workers=1)
    assert bpe.count_pretokens(corpus, [END_OF_TEXT], n_workers=n_workers) == alone


def test_workers_train_the_same(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes((FIXTURES / "corpus.txt").read_bytes()[:30_000])
    alone, together = (bpe.train_bpe(path, 300, [END_OF_TEXT], n_workers=n) for n in (1, 3))
    assert list(alone[0].items()) == list(together[0].items())
    assert alone[1] == together[1]


@many
@given(texts, special_sets, st.integers(1, 9))
@example("<|a|><|b|>" * 20, ["<|a|>", "<|a|><|b|>"], 5)
@example("<|a|><|b|>" * 20, ["<|b|>", "<|a|><|b|>"], 5)
@example("aaa" * 20, ["aa"], 5)
@example("ab" * 20 + "ba", ["ab", "ba"], 5)
@example("\u00e9" * 20, ["\u00e9"], 7)
def test_counts_of_the_parts_add_up(tmp_path_factory, text, special_tokens, n_chunks):
    path = tmp_path_factory.getbasetemp() / "parts.txt"
    path.write_bytes(text.encode("utf-8"))
    boundaries = bpe.chunk_boundaries(path, special_tokens, n_chunks)
    assert boundaries == sorted(boundaries) and len(boundaries) <= n_chunks + 1
    total: Counter[str] = Counter()
    for start, end in pairwise(boundaries):
        total.update(bpe.pretokenize(path.read_bytes()[start:end].decode("utf-8"), special_tokens))
    assert total == Counter(bpe.pretokenize(text, special_tokens))


def test_parts_begin_at_special_tokens(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("ab cd<s>" * 100)
    boundaries = bpe.chunk_boundaries(path, ["<s>"], 4)
    assert len(boundaries) == 5 and boundaries[0] == 0 and boundaries[-1] == 800
    assert all(path.read_bytes()[start:].startswith(b"<s>") for start in boundaries[1:-1])


@pytest.mark.parametrize(
    ("text", "special_tokens", "n_chunks", "expected"),
    [
        ("ab cd " * 100, [], 4, [0, 600]),
        ("ab cd " * 100, ["<s>"], 4, [0, 600]),
        ("ab cd<s>" * 100, ["<s>"], 1, [0, 800]),
        ("<s>" + "ab cd " * 100, ["<s>"], 4, [0, 603]),
        # "aa" may begin at any letter of a run, and "ab" may stand across two "ba"
        ("a" * 600, ["aa"], 4, [0, 600]),
        ("ab" * 300, ["ab", "ba"], 4, [0, 600]),
    ],
)
def test_a_file_that_cannot_be_cut_stays_whole(tmp_path, text, special_tokens, n_chunks, expected):
    path = tmp_path / "text.txt"
    path.write_text(text)
    assert bpe.chunk_boundaries(path, special_tokens, n_chunks) == expected


@pytest.mark.parametrize("shift", range(4))
def test_a_special_token_across_two_reads_is_found(tmp_path, shift):
    path = tmp_path / "text.txt"
    megabyte = 1 << 20
    start = 3 * megabyte - shift
    path.write_bytes(b"x" * start + b"<s>" + b"x" * (megabyte - 3 + shift))
    assert bpe.chunk_boundaries(path, ["<s>"], 2) == [0, start, 4 * megabyte]


def test_words_that_never_occur_teach_nothing():
    assert bpe.learn_merges({b"ab": 0, b"cd": 1}, 300, [])[1] == [(b"c", b"d")]
