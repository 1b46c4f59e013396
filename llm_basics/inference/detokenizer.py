"""From token ids to text, as they come: whole characters, and nothing of a stop string.

>>> "".join(stream_text(tokenizers.Tokenizer.byte_level(), b"one. two. three.", stops=[" th"]))
'one. two.'
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence

from llm_basics.core import tokenizer as tokenizers


class Detokenizer:
    """Text from ids as they come, up to the first of the strings `stops`.

    Held back is what may yet turn out to be something else: a character until all its bytes are there, and
    what may be the beginning of a stop string. All that is given out, together, is the decoded text, cut
    where the first stop string begins.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, stops: Sequence[str] = ()) -> None:
        if "" in stops:
            raise ValueError("a stop string must have at least one character, got an empty one")
        self.is_over = False
        self._tokenizer, self._stops = tokenizer, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._waiting = ""

    def read(self, id: int) -> str:
        """The text that is certain now that `id` is there. Nothing more comes once `is_over` is set."""
        return self._certain(self._decoder.decode(self._tokenizer.decode_bytes([id])), is_last=False)

    def close(self) -> str:
        """What was held back, since no id follows."""
        return "" if self.is_over else self._certain(self._decoder.decode(b"", final=True), is_last=True)

    def _certain(self, text: str, is_last: bool) -> str:
        text = self._waiting + text
        at = _stop_in(text, self._stops, is_last)
        self.is_over = text.startswith(tuple(self._stops), at)
        self._waiting = text[at:]
        return text[:at]


def _stop_in(text: str, stops: Sequence[str], is_last: bool) -> int:
    """Where the first of `stops` begins, or may begin if the text goes on; the end if there is no such place.

    >>> _stop_in("to be", ["b"], False), _stop_in("to b", ["be"], False), _stop_in("to b", ["be"], True)
    (3, 3, 4)
    """
    for at in range(len(text)):
        if any(text.startswith(stop, at) or (not is_last and stop.startswith(text[at:])) for stop in stops):
            return at
    return len(text)


def detokenize(
    tokenizer: tokenizers.Tokenizer, ids: Iterable[int], stops: Sequence[str] = ()
) -> Iterator[str]:
    """The text of `ids` as it comes, by `TextStream`; after a stop string no more ids are asked for.

    >>> list(stream_text(tokenizers.Tokenizer.byte_level(), [72, 0xC3, 0xA9, 33]))
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
