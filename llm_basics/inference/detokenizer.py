"""Incremental detokenization: token ids to text, in whole characters, up to a stop string.

>>> "".join(detokenize(tokenizers.Tokenizer.byte_level(), b"one. two. three.", stops=[" th"]))
'one. two.'
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence

from llm_basics.core import tokenizer as tokenizers


class Detokenizer:
    """Text of a stream of ids, up to the first of the strings `stops`.

    Incomplete UTF-8 and text that may be the start of a stop string are buffered. The pieces returned,
    joined, are the decoded text up to the first stop string.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, stops: Sequence[str] = ()) -> None:
        if "" in stops:
            raise ValueError("a stop string must have at least one character, got an empty one")
        self.is_over = False
        self._tokenizer, self._stops = tokenizer, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._buffer = ""

    def read(self, id: int) -> str:
        """The text that `id` completes. Sets `is_over` at a stop string; must not be called after that."""
        return self._flush(self._decoder.decode(self._tokenizer.decode_bytes([id])), is_last=False)

    def close(self) -> str:
        """The buffered text, at the end of the stream."""
        return "" if self.is_over else self._flush(self._decoder.decode(b"", final=True), is_last=True)

    def _flush(self, text: str, is_last: bool) -> str:
        text = self._buffer + text
        end = _find_stop(text, self._stops, is_last)
        self.is_over = text.startswith(tuple(self._stops), end)
        self._buffer = text[end:]
        return text[:end]


def _find_stop(text: str, stops: Sequence[str], is_last: bool) -> int:
    """Index of the first stop string, or unless `is_last` of a prefix of one at the end; else the length.

    >>> _find_stop("to be", ["b"], False), _find_stop("to b", ["be"], False), _find_stop("to b", ["be"], True)
    (3, 3, 4)
    """
    for i in range(len(text)):
        if any(text.startswith(stop, i) or (not is_last and stop.startswith(text[i:])) for stop in stops):
            return i
    return len(text)


def detokenize(
    tokenizer: tokenizers.Tokenizer, ids: Iterable[int], stops: Sequence[str] = ()
) -> Iterator[str]:
    """Stream the text of `ids` through a `Detokenizer`; no id is consumed after a stop string.

    >>> list(detokenize(tokenizers.Tokenizer.byte_level(), [72, 0xC3, 0xA9, 33]))
    ['H', '\\xe9', '!']
    """
    stream = Detokenizer(tokenizer, stops)
    for id in ids:
        if text := stream.read(id):
            yield text
        if stream.is_over:
            return
    if text := stream.close():
        yield text
