"""Incremental detokenization. Alone: uv run pytest tests/test_detokenizer.py"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_basics.core import tokenizer
from llm_basics.inference import detokenizer

BYTES = tokenizer.Tokenizer.byte_level()


class Pieces(tokenizer.Tokenizer):
    """A tokenizer with any bytes as its tokens."""

    def __init__(self, pieces):
        self.vocab = dict(enumerate(pieces))


def stream(pieces, stops=()):
    return list(detokenizer.detokenize(Pieces(pieces), range(len(pieces)), stops))


def cut(text, stops):
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]


@st.composite
def tokens_of(draw, texts):
    """Bytes cut into tokens anywhere, also inside characters."""
    content = draw(texts).encode("utf-8", "replace")
    cuts = sorted(draw(st.lists(st.integers(0, len(content)), max_size=12)))
    return [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]


# --------------------------------------------------------------------------------------------------
# Characters


@given(st.text())
def test_streamed_text_is_the_text_and_never_half_a_character(text):
    text = text.encode("utf-8", "replace").decode()
    pieces = list(detokenizer.detokenize(BYTES, list(text.encode())))
    assert "".join(pieces) == text
    assert all(len(piece) == 1 for piece in pieces)


def test_streaming_waits_only_for_the_character():
    ids = iter(b"a\xe2\x82\xacb")
    stream = detokenizer.detokenize(BYTES, ids)
    assert next(stream) == "a" and list(ids)[:1] == [0xE2]


def test_half_a_character_at_the_end_is_replaced():
    assert "".join(detokenizer.detokenize(BYTES, b"ok\xe2\x82")) == "ok\ufffd"


@given(tokens_of(st.text()))
def test_a_stream_of_any_tokens_is_the_text(tokens):
    """Of all languages that Unicode has (H30)."""
    pieces = stream(tokens)
    assert "".join(pieces) == b"".join(tokens).decode("utf-8")
    assert all(pieces)


@given(st.binary())
def test_a_stream_of_any_bytes_is_what_decoding_gives(content):
    assert "".join(detokenizer.detokenize(BYTES, content)) == BYTES.decode(content)


SAMPLES = [
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0",
    "\u041f\u0440\u0438\u0432\u0435\u0442",
    "\u0645\u0631\u062d\u0628\u0627",
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
    "e\u0301 \u00e9",
]


@pytest.mark.parametrize("text", SAMPLES)
def test_languages_byte_by_byte(text):
    pieces = list(detokenizer.detokenize(BYTES, text.encode()))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert all(len(piece) == 1 for piece in pieces)


# --------------------------------------------------------------------------------------------------
# Stop strings

# few letters, so that stop strings occur, overlap and almost occur
FEW = st.text("ab\u00e9\n")


@given(tokens_of(FEW), st.lists(st.text("ab\u00e9\n", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(tokens, stops):
    assert "".join(stream(tokens, stops)) == cut(b"".join(tokens).decode(), stops)


@given(tokens_of(FEW), st.lists(st.text("ab\u00e9\n", min_size=1, max_size=4), max_size=3))
def test_returned_text_is_a_prefix_of_every_final_text(tokens, stops):
    """Whatever tokens follow."""
    text = detokenizer.Detokenizer(BYTES, stops)
    out = "".join(text.read(id) for id in b"".join(tokens) if not text.is_over)
    prefix = b"".join(tokens).decode()
    for suffix in ["", *stops]:
        assert cut(prefix + suffix, stops).startswith(out)


def test_only_a_prefix_of_a_stop_string_is_buffered():
    text = detokenizer.Detokenizer(BYTES, ["\n\nQ"])
    assert [text.read(id) for id in b"a\nb\n\n\nQ"] == ["a", "", "\nb", "", "", "\n", ""]
    assert text.is_over and text.close() == ""


def test_buffered_text_is_returned_at_the_end():
    assert list(detokenizer.detokenize(BYTES, b"a<|en", ["<|end|>"])) == ["a", "<|en"]


def test_no_id_is_consumed_after_a_stop_string():
    ids = iter(b"one. two. three")
    assert "".join(detokenizer.detokenize(BYTES, ids, [". t"])) == "one"
    assert bytes(ids) == b"wo. three"


def test_of_two_stop_strings_the_one_that_begins_first():
    """Even if the other is complete first."""
    assert stream([b"x", b"ab", b"c", b"d"], ["b", "abc"]) == ["x"]
    assert stream([b"x", b"ab", b"d"], ["b", "abc"]) == ["x", "a"]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="at least one character"):
        detokenizer.Detokenizer(BYTES, ["a", ""])
