"""Read text and JSON with the location of every error, and write files atomically.

Errors name the file and line, `a.jsonl:3`. File formats are not here: each has its own module.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


def decode(
    content: bytes, name: object, on_bad_utf8: str | None = None, line: int = 1, offset: int = 0
) -> str:
    """Decode bytes that start in `line` and at `offset` of a file. Raises ValueError if they are not UTF-8.

    `on_bad_utf8` is `replace`, `error`, or None if the caller has no such option.
    """
    try:
        return content.decode("utf-8", errors="replace" if on_bad_utf8 == "replace" else "strict")
    except UnicodeDecodeError as error:
        number, byte = line + content.count(b"\n", 0, error.start), content[error.start]
        advice = ", or replace such bytes with --on_bad_utf8 replace" if on_bad_utf8 else ""
        raise ValueError(
            f"{name}:{number} must be UTF-8, got byte 0x{byte:02x} at offset {offset + error.start}; "
            f"fix the file{advice}"
        ) from None


def parse_json(text: str, name: object, line: int = 1) -> Any:
    """Parse JSON that starts in `line` of a file. Raises ValueError if it is invalid."""
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        location = f"{name}:{line + error.lineno - 1}"
        raise ValueError(f"{location} must be JSON; {error.msg} in column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}:{line} must be JSON; {error}") from None


def read_text(path: Path) -> str:
    """The text of a file. Raises ValueError if it is not UTF-8."""
    return decode(path.read_bytes(), path)


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises ValueError if it is invalid."""
    return parse_json(read_text(path), path)


def json_lines(
    name: object, lines: Iterable[bytes], on_bad_utf8: str | None = None
) -> Iterator[tuple[str, Any]]:
    """The location and value of each non-empty line of JSON.

    >>> list(json_lines("a.jsonl", [b"[1]\\n", b"\\n", b"2\\n"]))
    [('a.jsonl:1', [1]), ('a.jsonl:3', 2)]
    """
    offset = 0
    for number, line in enumerate(lines, start=1):
        if line.strip():
            text = decode(line, name, on_bad_utf8, number, offset)
            yield f"{name}:{number}", parse_json(text.rstrip(), name, number)
        offset += len(line)


# --------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a temporary file that replaces `path` on success; after an error `path` is unchanged.

    If the process or the machine stops, `path` has all of the old content or all of the new.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the new name must reach the disk as well
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(
                OSError
            ):  # unsupported by some network file systems; the file itself is safe
                os.fsync(folder)
        finally:
            os.close(folder)


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file atomically (`replacing`); text as UTF-8, with its line ends unchanged."""
    with replacing(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
