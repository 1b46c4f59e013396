"""Records appended to the files of a run since a position, for programs that watch runs.

A position is the offset in each file, in bytes, and suffices to resume reading after an interruption.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llm_basics.runs import run_dir, tail

# watched files, by the name of their records
FILES = {"metrics": run_dir.METRICS, "samples": run_dir.SAMPLES, "events": run_dir.EVENTS}

# beyond this distance, rereading the files is cheaper than following them
MAX_BEHIND_BYTES = 4 << 20
MAX_RECORDS = 2000

Position = tuple[int, ...]


def end_of(folder: Path) -> Position:
    """The position after the last complete lines of a run."""
    return tuple(_last_line_end(folder / file, _size(folder / file)) for file in FILES.values())


def appended(folder: Path, position: Position) -> Iterator[tuple[str, list[dict[str, Any]] | None, Position]]:
    """Names and records of the lines after `position`, each with the position after them.

    The records are None if a file was replaced or has grown too much, and must be reread.
    """
    offsets = list(position)
    for number, (name, file) in enumerate(FILES.items()):
        size = _size(folder / file)
        if size < offsets[number] or size - offsets[number] > MAX_BEHIND_BYTES:
            offsets[number] = _last_line_end(folder / file, size)
            yield name, None, tuple(offsets)
            continue
        while size > offsets[number]:
            records, end = tail.read(folder / file, offsets[number])
            if end <= offsets[number]:
                break
            offsets[number] = end
            for start in range(0, len(records), MAX_RECORDS):
                part = [tail.clean(record) for record in records[start : start + MAX_RECORDS]]
                yield name, part, tuple(offsets)


def parse(text: str) -> dict[str, Position]:
    """The positions in `ID:METRICS:SAMPLES:EVENTS;...`; invalid parts are skipped.

    >>> parse("a:1:2:3;b:1;c:4:5:6")
    {'a': (1, 2, 3), 'c': (4, 5, 6)}
    """
    found = {}
    for part in text[:4096].split(";"):
        id, *numbers = part.split(":")
        if len(numbers) == len(FILES) and all(n.isascii() and n.isdecimal() and len(n) < 16 for n in numbers):
            found[id] = tuple(map(int, numbers))
    return found


def format(positions: Mapping[str, Position]) -> str:
    """The inverse of `parse`."""
    return ";".join(":".join([id, *map(str, numbers)]) for id, numbers in positions.items())


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _last_line_end(path: Path, size: int) -> int:
    """The offset after the last newline; the end of the file if the last line is torn and long."""
    try:
        with open(path, "rb") as file:
            start = max(0, size - tail.CHUNK_BYTES)
            file.seek(start)
            end = file.read(size - start).rfind(b"\n") + 1
            return start + end if end or not start else size
    except OSError:
        return 0
