"""Text to ids and back, against tiktoken and Hugging Face. Alone: `uv run pytest tests/test_tokenizer.py`.

What every implementation must do goes through the adapters; what only ours has (files, `encode_ordinary`,
errors) is tested on `llm_basics.core.tokenizer`. The tests with GPT-2's own vocabulary need two folders:
TIKTOKEN_CACHE_DIR, where tiktoken keeps what it downloaded, and LLM_BASICS_DATA, with gpt2_vocab.json,
gpt2_merges.bpe and tinyshakespeare.txt; without them they skip.
"""

import json
import os
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
import trials
from fixtures import make_text_fixtures as slow
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_basics.core import tokenizer
from llm_basics.data import tokenizer_formats
from llm_basics.fast import tokenizer as fast

either = pytest.mark.parametrize("cls", [tokenizer.Tokenizer, fast.Tokenizer], ids=["reference", "fast"])

FIXTURES = Path(__file__).parent / "fixtures"
END_OF_TEXT = "<|endoftext|>"
SAMPLES = json.loads((FIXTURES / "samples.json").read_text(encoding="utf-8"))

# characters that every Unicode library knows by now, so that all agree on what a letter is
characters = st.characters(codec="utf-8").filter(lambda c: unicodedata.ucd_3_2_0.category(c) != "Cn")
# what the split pattern, the merges of the corpus and the special tokens look at
SCRAPS = [
    "the",
    " the",
    "ing",
    " a",
    "a",
    "s",
    "'",
    "'s",
    "'ll",
    "'L",
    "l",
    "_",
    ".",
    "..",
    "12",
    "\u00e9",
    "e\u0301",
]
BLANKS = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u2028", "\u00a0", "\x00", "\x1c", "\x85", "\u200b"]
SPECIALS = [END_OF_TEXT, END_OF_TEXT + END_OF_TEXT, "<|a b|>", "[x]", "a.c", "\n\n|", "\u00e9\u00e9"]
words = st.sampled_from(
    [*SCRAPS, *BLANKS, "\u6f22", "\U0001f643", "<|", "|>", END_OF_TEXT[:9], "<|a ", "b|>"]
)
texts = st.lists(words | characters, max_size=40).map("".join)
texts_with_specials = st.lists(words | characters | st.sampled_from(SPECIALS), max_size=40).map("".join)

# the same examples in every run; nothing is written to the working directory
many = settings(max_examples=trials.count(200), deadline=None, derandomize=True, database=None)

Merges = list[tuple[bytes, bytes]]
each_sample = pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in SAMPLES.items()])


def read_merges() -> Merges:
    """The merges of the corpus, as the slowest trainer wrote them."""
    byte_of = {character: byte for byte, character in slow.spelling().items()}
    lines = (FIXTURES / "corpus_merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    return [tuple(bytes(byte_of[c] for c in side) for side in line.split(" ")) for line in lines]


MERGES = read_merges()
VOCAB = slow.vocabulary(MERGES, [END_OF_TEXT])


def bytes_and(merges: Merges) -> dict[int, bytes]:
    return slow.vocabulary(merges, [])


def tiktoken_of(merges: Merges) -> tiktoken.Encoding:
    """tiktoken's tokenizer with the ids of `slow.vocabulary(merges, [END_OF_TEXT])`."""
    ranks = {token: id for id, token in slow.vocabulary(merges, [END_OF_TEXT]).items() if id > 0}
    return tiktoken.Encoding(
        "corpus", pat_str=slow.GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 0}
    )


def hugging_face_of(
    vocab: dict[int, bytes], merges: Merges, special_tokens: list[str]
) -> tokenizers.Tokenizer:
    """Hugging Face's tokenizer with the same ids; special tokens stand in its vocabulary as they are."""
    specials = {special.encode("utf-8"): special for special in special_tokens}
    spelled = {specials.get(token) or slow.spell(token): id for id, token in vocab.items()}
    pairs = [(slow.spell(left), slow.spell(right)) for left, right in merges]
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=spelled, merges=pairs))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.add_special_tokens([tokenizers.AddedToken(s, normalized=False) for s in special_tokens])
    return model


@pytest.fixture(scope="session")
def ours(adapters) -> Any:
    """The tokenizer under test, with the vocabulary of the corpus and one special token."""
    return adapters.get_tokenizer(VOCAB, MERGES, [END_OF_TEXT])


@pytest.fixture(scope="session")
def with_specials(adapters) -> Any:
    """The tokenizer under test, with special tokens that overlap, look like patterns, or hold blanks."""
    return adapters.get_tokenizer(VOCAB, MERGES, SPECIALS)


@pytest.fixture(scope="session")
def make(adapters) -> Callable[..., Any]:
    """A tokenizer under test with the 256 bytes and the merges given, then the special tokens."""
    return lambda merges, specials=None: adapters.get_tokenizer(bytes_and(merges), merges, specials)


def tokens(model: Any, text: str) -> list[str]:
    """The text of each token."""
    return [model.decode([id]) for id in model.encode(text)]


# --------------------------------------------------------------------------------------------------
# Oracle


TIKTOKEN = tiktoken_of(MERGES)
HUGGING_FACE = hugging_face_of(VOCAB, MERGES, [END_OF_TEXT])
HUGGING_FACE_SPECIALS = hugging_face_of(
    VOCAB | {len(VOCAB) + i: s.encode("utf-8") for i, s in enumerate(SPECIALS[1:])}, MERGES, SPECIALS
)


@each_sample
def test_samples_get_the_ids_of_tiktoken(ours, text):
    assert ours.encode(text) == TIKTOKEN.encode(text, allowed_special="all")


@each_sample
def test_samples_get_the_ids_of_hugging_face(ours, text):
    assert ours.encode(text) == HUGGING_FACE.encode(text).ids


def test_the_corpus_gets_the_ids_of_tiktoken(ours):
    text = (FIXTURES / "corpus.txt").read_bytes().decode("utf-8")
    assert ours.encode(text) == TIKTOKEN.encode(text, allowed_special="all")


@many
@given(texts)
def test_any_text_gets_the_ids_of_tiktoken(ours, text):
    assert ours.encode(text) == TIKTOKEN.encode(text, allowed_special="all")


@many
@given(texts_with_specials)
@example("".join(SPECIALS) * 2)
@example(END_OF_TEXT * 3)
def test_any_text_with_special_tokens_gets_the_ids_of_hugging_face(with_specials, text):
    assert with_specials.encode(text) == HUGGING_FACE_SPECIALS.encode(text).ids


@many
@given(st.text("ab", max_size=80), st.integers(1, 12), st.text("ab", max_size=40))
def test_dense_merges_of_two_letters_get_the_ids_of_tiktoken(make, training_text, n_merges, text):
    merges = slow.train(training_text, n_merges, [])
    assert make(merges).encode(text) == [id - 1 for id in tiktoken_of(merges).encode(text)]


@many
@given(st.lists(st.integers(0, len(VOCAB) - 1), max_size=12))
def test_any_ids_decode_as_python_decodes_their_bytes(ours, ids):
    assert ours.decode(ids) == b"".join(VOCAB[id] for id in ids).decode("utf-8", errors="replace")


# --------------------------------------------------------------------------------------------------
# Property: there and back


@many
@given(texts)
def test_decoding_gives_the_text_back(ours, text):
    assert ours.decode(ours.encode(text)) == text


@many
@given(texts_with_specials)
def test_decoding_gives_special_tokens_back(with_specials, text):
    assert with_specials.decode(with_specials.encode(text)) == text


@each_sample
def test_decoding_gives_samples_back(with_specials, text):
    assert with_specials.decode(with_specials.encode(text)) == text


def test_nothing_is_no_ids_and_back(ours):
    assert ours.encode("") == []
    assert ours.decode([]) == ""
    assert list(ours.encode_iterable([])) == list(ours.encode_iterable(["", ""])) == []


# --------------------------------------------------------------------------------------------------
# Property: special tokens


def test_pieces_of_a_special_token_are_text(ours):
    for text in [END_OF_TEXT[:-1], END_OF_TEXT[1:], "<| endoftext |>", END_OF_TEXT.upper()]:
        assert 0 not in ours.encode(text)


@pytest.mark.parametrize("order", [1, -1])
def test_of_special_tokens_that_begin_together_the_longest_wins(make, order):
    model = make([], ["<a>", "<a><b>", "<a><b><c>"][::order])
    assert tokens(model, "<a><b><c><a><b><a>x<b><c>")[:3] == ["<a><b><c>", "<a><b>", "<a>"]
    assert tokens(make([], [END_OF_TEXT, END_OF_TEXT * 2][::order]), END_OF_TEXT * 3) == [
        END_OF_TEXT * 2,
        END_OF_TEXT,
    ]


@pytest.mark.parametrize(
    "special", ["<|a|b|>", "[xy]", "a.c", "..", "(x", "a+", "\\d", "^$", "a b", " x", "\n\n", "\u00e9"]
)
def test_a_special_token_is_no_pattern(make, special):
    model = make([], [special])
    assert tokens(model, f"a{special}b") == ["a", special, "b"]
    assert tokens(model, special * 2) == [special] * 2
    assert max(model.encode("|<|a|b|> ab x abc . 12 aa \n \u00e8".replace(special, ""))) < 256


def test_special_tokens_that_are_not_given_are_text(adapters):
    for specials in (None, []):
        model = adapters.get_tokenizer(VOCAB, MERGES, specials)
        assert model.encode(END_OF_TEXT) == TIKTOKEN.encode_ordinary(END_OF_TEXT)


# --------------------------------------------------------------------------------------------------
# Property: characters cut in half


def test_characters_are_whole_where_their_tokens_are_not(make):
    model = make([(b"\xf0", b"\x9f")])
    text = "\U0001f643 \u6f22\u00e9"
    ids = model.encode(text)
    assert model.decode(ids) == text
    assert "".join(model.decode([id]) for id in ids) != text


# --------------------------------------------------------------------------------------------------
# Property: streams


def parts(text: str, cuts: list[int]) -> list[str]:
    """The text, cut at these places, with empty parts where they repeat."""
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in zip(places, places[1:], strict=False)]


@many
@given(texts_with_specials, st.lists(st.integers(0, 400), max_size=12))
@example("they'll", [5])
@example("they'll 's", [5, 6, 9])
@example("a  b\r\n\r\n c\x1c\x1c d\u2028\u2028e", [2, 6, 8, 12, 16])
@example(f"a \n{END_OF_TEXT}{END_OF_TEXT}\n\n| b", [5, 12, 20, 30, 31])
@example(f"{END_OF_TEXT}  {END_OF_TEXT * 3}", [13, 14, 15, 28, 41])
@example("x <|a b|> y", [4, 5, 6])
def test_a_stream_gets_the_ids_of_the_whole_text_wherever_it_is_cut(with_specials, text, cuts):
    assert list(with_specials.encode_iterable(parts(text, cuts))) == with_specials.encode(text)


@many
@given(texts_with_specials)
def test_a_stream_of_single_characters_gets_the_ids_of_the_whole_text(with_specials, text):
    assert list(with_specials.encode_iterable(text)) == with_specials.encode(text)


@many
@given(texts_with_specials)
@example("a\n\n\n b\r\n\r\n\x1c \u2028\n")
def test_a_stream_of_lines_gets_the_ids_of_the_whole_text(with_specials, text):
    assert list(with_specials.encode_iterable(text.splitlines(keepends=True))) == with_specials.encode(text)


@each_sample
@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_samples_in_parts_of_equal_size_get_the_ids_of_the_whole(with_specials, text, size):
    stream = (text[i : i + size] for i in range(0, min(len(text), 1200), size))
    assert list(with_specials.encode_iterable(stream)) == with_specials.encode(
        text[: -(-1200 // size) * size]
    )


def test_an_open_file_is_a_stream(ours):
    path = FIXTURES / "corpus.txt"
    with open(path, encoding="utf-8", newline="") as file:
        assert list(ours.encode_iterable(file)) == ours.encode(path.read_bytes().decode("utf-8"))


@pytest.mark.parametrize("unit", ["a ship, or a rock\n", "ship rock", f"ship.{END_OF_TEXT}", "\t\t}\n\n"])
def test_a_stream_is_read_only_as_far_as_needed(ours, unit):
    n_read = 0

    def stream() -> Iterator[str]:
        nonlocal n_read
        for _ in range(1000):
            n_read += 1
            yield unit

    ids = iter(ours.encode_iterable(stream()))
    assert n_read == 0, "read before the first id is requested"
    n_bytes = 0
    for n_ids, id in enumerate(ids):
        n_bytes += len(VOCAB[id])
        behind = n_read - n_bytes // len(unit)
        assert behind <= 20, f"{behind} parts are held in memory at token {n_ids}"
    assert n_read == 1000
    assert n_bytes == 1000 * len(unit)


# --------------------------------------------------------------------------------------------------
# Property: what only our tokenizer has


@pytest.fixture(scope="module")
def mine() -> tokenizer.Tokenizer:
    return tokenizer.Tokenizer(VOCAB, MERGES, SPECIALS)


def test_untrusted_text_never_becomes_a_special_token(mine):
    text = "x".join(SPECIALS) + "".join(SPECIALS)
    special_ids = {mine.special_id(special) for special in SPECIALS}
    assert len(special_ids) == len(SPECIALS)
    assert special_ids.isdisjoint(mine.encode_ordinary(text))
    assert special_ids <= set(mine.encode(text))
    assert mine.decode(mine.encode_ordinary(text)) == text


def test_the_ids_of_ordinary_text_belong_to_the_caller(mine):
    ids = mine.encode_ordinary("the")
    ids.append(-1)
    assert mine.encode_ordinary("the") == ids[:-1]


@many
@given(texts_with_specials)
def test_ordinary_text_gets_the_ids_of_tiktoken(mine, text):
    assert mine.encode_ordinary(text) == TIKTOKEN.encode_ordinary(text)


def test_the_ranks_of_tiktoken_give_the_merges_back():
    ranks = {token: id for id, token in VOCAB.items() if id > 0}
    model = tokenizer.Tokenizer.from_vocabulary(tokenizer_formats.from_ranks(ranks, {END_OF_TEXT: 0}))
    assert model.vocab == VOCAB
    assert model.merges == MERGES
    assert model.special_tokens == [END_OF_TEXT]


@many
@given(st.text("ab", max_size=80), st.integers(1, 12))
@example("a" * 40, 5)
def test_the_ranks_of_dense_merges_give_the_merges_back(training_text, n_merges):
    merges = slow.train(training_text, n_merges, [])
    ranks = {token: id for id, token in bytes_and(merges).items()}
    assert tokenizer.Tokenizer.from_vocabulary(tokenizer_formats.from_ranks(ranks, {})).merges == merges


@many
@given(st.binary(max_size=20))
def test_any_bytes_can_be_decoded(data):
    model = tokenizer.Tokenizer.byte_level()
    assert model.decode_bytes(data) == data
    assert model.decode(data) == data.decode("utf-8", errors="replace")


def test_the_tokenizer_of_bytes_has_a_token_a_byte():
    model = tokenizer.Tokenizer.byte_level()
    assert model.encode(f"h\u00e9{END_OF_TEXT}") == [104, 0xC3, 0xA9, 256]
    assert model.vocab_size == 257
    assert tokenizer.Tokenizer.byte_level([]).vocab_size == 256


@pytest.mark.parametrize("id", [-1, 757 + len(SPECIALS), 10**9])
def test_an_unknown_id_is_refused_and_named(mine, id):
    with pytest.raises(ValueError, match=rf"token id must be in the vocabulary.* got {id}$"):
        mine.decode([1, 2, id])


def test_a_special_token_given_twice_counts_once():
    model = tokenizer.Tokenizer(VOCAB, MERGES, ["<pad>", "<pad>"])
    assert model.special_tokens == ["<pad>"]
    assert model.vocab_size == len(VOCAB) + 1


def test_an_empty_special_token_is_refused():
    with pytest.raises(ValueError, match="special token must have at least two bytes"):
        tokenizer.Tokenizer(VOCAB, MERGES, [END_OF_TEXT, ""])


def test_a_vocabulary_without_a_byte_or_a_merge_is_refused():
    with pytest.raises(ValueError, match=r"lacks b'b'"):
        tokenizer.Tokenizer({id: token for id, token in VOCAB.items() if token != b"b"}, MERGES)
    with pytest.raises(ValueError, match=r"lacks b'zz'"):
        tokenizer.Tokenizer(bytes_and([]), [(b"z", b"z")])


@pytest.mark.parametrize("id", [-1, 2**31, 1.5, "7"])
@either
def test_an_id_that_no_token_file_can_hold_is_refused(cls, id):
    with pytest.raises(
        ValueError, match=r"an id must be a whole number from 0 to 2\*\*31 - 1, got .* for b'xy'"
    ):
        cls({**bytes_and([]), id: b"xy"}, [(b"x", b"y")])


@either
def test_merges_that_do_not_tell_where_a_token_comes_from_are_refused(cls):
    vocab = bytes_and([(b"a", b"b"), (b"b", b"c"), (b"ab", b"c")])
    with pytest.raises(ValueError, match=r"must join bytes or earlier merges, got b'ab' and b'c'"):
        cls(vocab, [(b"ab", b"c"), (b"a", b"b")])
    with pytest.raises(ValueError, match=r"made by one merge, got a second one for b'abc'"):
        cls(vocab, [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"a", b"bc")])


def test_the_fingerprint_tells_tokenizers_apart():
    merges = [(b"a", b"b"), (b"c", b"d")]
    swapped = bytes_and(merges) | {256: b"cd", 257: b"ab"}
    different = [
        tokenizer.Tokenizer(bytes_and(merges), merges),
        tokenizer.Tokenizer(bytes_and(merges), merges[::-1]),
        tokenizer.Tokenizer(bytes_and(merges), merges[:1]),
        tokenizer.Tokenizer(swapped, merges),
        tokenizer.Tokenizer(bytes_and(merges) | {258: b"<pad>"}, merges),
        tokenizer.Tokenizer(bytes_and(merges) | {258: b"<pad>"}, merges, ["<pad>"]),
        tokenizer.Tokenizer(bytes_and(merges), merges, ["<pad>", "<s>"]),
        tokenizer.Tokenizer(bytes_and(merges), merges, ["<s>", "<pad>"]),
        tokenizer.Tokenizer.byte_level(),
        tokenizer.Tokenizer.byte_level([]),
    ]
    assert len({model.fingerprint() for model in different}) == len(different)


def test_the_fingerprint_is_the_same_for_the_same_ids(tmp_path):
    model = tokenizer.Tokenizer(VOCAB, MERGES, SPECIALS)
    before = model.fingerprint()
    model.encode("the ship sails")
    assert model.fingerprint() == before
    same = tokenizer.Tokenizer(dict(reversed(VOCAB.items())), MERGES, SPECIALS)
    assert same.fingerprint() == before
    known = tokenizer.Tokenizer(model.vocab, MERGES, SPECIALS[::-1])
    assert known.fingerprint() == before, "the order of special tokens that have their ids is nothing"


# --------------------------------------------------------------------------------------------------
# Property: files


@pytest.mark.parametrize(
    "specials", [None, [], [END_OF_TEXT], SPECIALS, ["\u6f22 \U0001f643", "\u0120", "a b", "\t\t"]]
)
def test_saved_and_loaded_is_the_same(tmp_path, specials):
    model = tokenizer.Tokenizer(VOCAB, MERGES, specials)
    model.save(tmp_path / "new" / "folder")
    loaded = tokenizer.Tokenizer.load(tmp_path / "new" / "folder")
    assert loaded.vocab == model.vocab
    assert loaded.merges == model.merges
    assert loaded.special_tokens == model.special_tokens
    assert loaded.fingerprint() == model.fingerprint()
    text = "the ship\u00e9 " + "".join(SPECIALS)
    assert loaded.encode(text) == model.encode(text)


def test_saving_twice_writes_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        tokenizer.Tokenizer(VOCAB, MERGES, SPECIALS).save(tmp_path / name)
        tokenizer.Tokenizer.load(tmp_path / name).save(tmp_path / name)
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "second")
    )
    assert first == second
    assert set(first) >= {"vocab.json", "merges.txt"}


def test_hugging_face_reads_our_files(tmp_path):
    tokenizer.Tokenizer(VOCAB, MERGES, [END_OF_TEXT]).save(tmp_path)
    files = str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    theirs = tokenizers.ByteLevelBPETokenizer.from_file(*files)
    theirs.add_special_tokens([END_OF_TEXT])
    plain = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*files))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    mine = tokenizer.Tokenizer(VOCAB, MERGES, [END_OF_TEXT])
    for text in SAMPLES.values():
        assert theirs.encode(text).ids == mine.encode(text)
        assert plain.encode(text).ids == mine.encode_ordinary(text)


def test_we_read_the_files_of_hugging_face(tmp_path):
    corpus = (FIXTURES / "corpus.txt").read_bytes().decode("utf-8")
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(
        corpus.split(END_OF_TEXT), vocab_size=400, special_tokens=[END_OF_TEXT], show_progress=False
    )
    theirs.save_model(str(tmp_path))
    mine = tokenizer.Tokenizer.from_gpt2_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert mine.special_tokens == [END_OF_TEXT]
    assert mine.vocab_size == 400
    for text in SAMPLES.values():
        assert mine.encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_missing_file_is_named(tmp_path, name):
    tokenizer.Tokenizer.byte_level().save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=name.replace(".", r"\.") + ".*missing"):
        tokenizer.Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "{"),
        ("vocab.json", ""),
        ("vocab.json", "[1, 2]"),
        ("vocab.json", '{"a": 1}'),
        ("vocab.json", '{"a": "x"}'),
        ("vocab.json", b"\xff\xfe"),
        ("merges.txt", "a b c\n"),
        ("merges.txt", "ab\n"),
        ("merges.txt", "z z\n"),
        ("merges.txt", b"\xff\xfe"),
        ("special_tokens.json", "{"),
        ("special_tokens.json", '"<pad>"'),
        ("special_tokens.json", "[1]"),
        ("special_tokens.json", '[""]'),
    ],
)
def test_a_garbled_file_is_named(tmp_path, name, content):
    tokenizer.Tokenizer.byte_level().save(tmp_path)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        tokenizer.Tokenizer.load(tmp_path)


# --------------------------------------------------------------------------------------------------
# Snapshot


def test_gpt2_files_that_another_program_wrote():
    model = tokenizer.Tokenizer.from_gpt2_files(
        FIXTURES / "corpus_vocab.json", FIXTURES / "corpus_merges.txt"
    )
    assert model.vocab == VOCAB
    assert model.merges == MERGES
    assert model.special_tokens == [END_OF_TEXT]


def test_saved_files_are_those_that_another_program_wrote(tmp_path):
    tokenizer.Tokenizer(VOCAB, MERGES, [END_OF_TEXT]).save(tmp_path)
    assert (tmp_path / "vocab.json").read_bytes() == (FIXTURES / "corpus_vocab.json").read_bytes()
    assert (tmp_path / "merges.txt").read_bytes() == (FIXTURES / "corpus_merges.txt").read_bytes()


# --------------------------------------------------------------------------------------------------
# Parity: with GPT-2's own vocabulary


@pytest.fixture(scope="module")
def data() -> Path:
    folder = os.environ.get("LLM_BASICS_DATA")
    if not folder:
        pytest.skip("LLM_BASICS_DATA must name a folder with gpt2_vocab.json and gpt2_merges.bpe")
    return Path(folder)


@pytest.fixture(scope="module")
def gpt2() -> tiktoken.Encoding:
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR must name the folder where tiktoken keeps GPT-2's vocabulary")
    return tiktoken.get_encoding("gpt2")


@pytest.fixture(scope="module")
def gpt2_ours(adapters, data) -> Any:
    """The tokenizer under test with GPT-2's vocabulary and merges."""
    model = tokenizer.Tokenizer.from_gpt2_files(data / "gpt2_vocab.json", data / "gpt2_merges.bpe")
    return adapters.get_tokenizer(model.vocab, model.merges, [END_OF_TEXT])


def test_gpt2_ranks_give_the_merges_of_its_files(data, gpt2):
    model = tokenizer.Tokenizer.from_gpt2_files(data / "gpt2_vocab.json", data / "gpt2_merges.bpe")
    same = tokenizer.Tokenizer.from_vocabulary(
        tokenizer_formats.from_ranks(gpt2._mergeable_ranks, gpt2._special_tokens)
    )
    assert same.merges == model.merges
    assert same.fingerprint() == model.fingerprint()


def test_gpt2_has_50257_tokens(data):
    model = tokenizer.Tokenizer.from_gpt2_files(data / "gpt2_vocab.json", data / "gpt2_merges.bpe")
    assert model.vocab_size == len(model.vocab) == 50257
    assert len(model.merges) == 50000
    assert model.special_tokens == [END_OF_TEXT]
    assert model.special_id(END_OF_TEXT) == model.end_of_text_id == 50256


@each_sample
def test_samples_get_the_ids_of_gpt2(gpt2_ours, gpt2, text):
    assert gpt2_ours.encode(text) == gpt2.encode(text, allowed_special="all")
    assert list(gpt2_ours.encode_iterable(text)) == gpt2.encode(text, allowed_special="all")


@many
@given(texts)
def test_any_text_gets_the_ids_of_gpt2(gpt2_ours, gpt2, text):
    assert gpt2_ours.encode(text) == gpt2.encode(text, allowed_special="all")


@pytest.mark.parametrize("name", ["tinyshakespeare.txt"])
def test_a_book_gets_the_ids_of_gpt2(gpt2_ours, gpt2, data, name):
    text = (data / name).read_text(encoding="utf-8")
    ids = gpt2_ours.encode(text)
    assert ids == gpt2.encode(text)
    assert gpt2_ours.decode(ids) == text


@pytest.mark.parametrize("special", ["", ".", "ab"])
def test_special_tokens_that_are_ordinary_ones_too_are_refused(special):
    """Otherwise untrusted text could contain one."""
    vocab = {**{i: bytes([i]) for i in range(256)}, 256: b"ab"}
    with pytest.raises(ValueError, match="a special token must"):
        tokenizer.Tokenizer(vocab, [(b"a", b"b")], [special])


def test_a_text_is_no_list_of_special_tokens():
    with pytest.raises(ValueError, match="must be a list of texts, got the text '<s>'"):
        tokenizer.Tokenizer.byte_level("<s>")


def test_merges_are_recovered_from_ranks_with_gaps():
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 1000, b"cd": 1001, b"bc": 1002, b"abcd": 1003}
    found = tokenizer.Tokenizer.from_vocabulary(tokenizer_formats.from_ranks(ranks, {"<|endoftext|>": 2000}))
    assert found.merges == [(b"a", b"b"), (b"c", b"d"), (b"b", b"c"), (b"ab", b"cd")]
    assert found.encode("abcd<|endoftext|>bc") == [1003, 2000, 1002]


def test_merges_that_look_like_the_first_line_and_a_byte_order_mark_are_read(tmp_path):
    merges = [
        (b"#", b"v"),
        (b"#v", b"e"),
        (b"#ve", b"r"),
        (b"#ver", b"s"),
        (b"#vers", b"i"),
        (b"#versi", b"on"),
    ]
    merges.insert(5, (b"o", b"n"))
    merges.append((b"#version", b":"))
    vocab = {i: bytes([i]) for i in range(256)} | {256 + i: a + b for i, (a, b) in enumerate(merges)}
    tokenizer.Tokenizer(vocab, merges).save(tmp_path)
    assert tokenizer.Tokenizer.load(tmp_path).merges == merges
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text(
            "\ufeff" + (tmp_path / name).read_text(encoding="utf-8"), encoding="utf-8"
        )
    assert tokenizer.Tokenizer.load(tmp_path).merges == merges


def test_the_end_of_text_has_an_id():
    assert tokenizer.Tokenizer.byte_level(["<|user|>", END_OF_TEXT]).end_of_text_id == 257
    with pytest.raises(ValueError, match=r"must have the special token <\|endoftext\|>.*got <\|user\|>$"):
        _ = tokenizer.Tokenizer.byte_level(["<|user|>"]).end_of_text_id
