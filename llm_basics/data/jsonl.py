"""Files of JSON lines, with the location of every error."""

from collections.abc import Iterable, Iterator
from typing import Any

from llm_basics.core import files


def read(name: object, lines: Iterable[bytes], on_bad_utf8: str | None = None) -> Iterator[tuple[str, Any]]:
    """The location and value of each non-empty line of JSON.

    >>> list(read("a.jsonl", [b"[1]\\n", b"\\n", b"2\\n"]))
    [('a.jsonl:1', [1]), ('a.jsonl:3', 2)]
    """
    offset = 0
    for number, line in enumerate(lines, start=1):
        if line.strip():
            text = files.decode(line, name, on_bad_utf8, number, offset)
            yield f"{name}:{number}", files.parse_json(text.rstrip(), name, number)
        offset += len(line)
