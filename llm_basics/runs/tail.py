"""Read the growing JSON-lines files of a run directory from an offset, for programs that watch a run.

A line is read once its newline is written, so a torn last line is read when it is complete. The content is
untrusted: lines that are not JSON objects are skipped.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# maximum number of bytes per read; longer lines are skipped
CHUNK_BYTES = 1 << 20

# maximum bytes of a file whose records are listed, and of the end of a text file
MAX_BYTES = 64 << 20
TEXT_BYTES = 1 << 16

# larger integers are not exact in JSON readers that use doubles
MAX_EXACT = 2**53


def read(path: Path, offset: int = 0, n_bytes: int = CHUNK_BYTES) -> tuple[list[dict[str, Any]], int]:
    """The objects on complete lines from `offset`, and the offset after them.

    The returned offset is 0 if the file is shorter than `offset`, since it was replaced. Non-finite literals
    become infinity.
    """
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size < offset:
                return [], 0
            file.seek(offset)
            content = file.read(n_bytes)
    except OSError:
        return [], 0
    end = content.rfind(b"\n") + 1
    if not end:
        return [], offset + (len(content) if len(content) == n_bytes else 0)
    return parse(content[:end].splitlines()), offset + end


def parse(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """The objects among lines of JSON."""
    try:
        # one call for all lines takes half the time
        found = _loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError):
        found = []
        for line in lines:
            try:
                found.append(_loads(line))
            except (ValueError, RecursionError):
                continue
    return [entry for entry in found if isinstance(entry, dict)]


def _loads(content: bytes) -> Any:
    return json.loads(content.decode("utf-8", "replace"), parse_constant=lambda name: math.inf)


def sample(path: Path, n_lines: int) -> list[dict[str, Any]]:
    """The objects of about `n_lines` evenly spaced lines and the last one, in constant time."""
    try:
        size = path.stat().st_size
        if size <= n_lines * 512:
            return read(path)[0]
        lines = []
        with open(path, "rb") as file:
            for i in range(n_lines):
                file.seek(size * i // n_lines)
                if i:
                    file.readline(CHUNK_BYTES)
                lines.append(file.readline(CHUNK_BYTES))
            file.seek(max(0, size - 8192))
            lines += file.read(8192).splitlines(keepends=True)[1:]
    except OSError:
        return []
    return parse([line for line in lines if line.endswith(b"\n")])


def records(path: Path, skip: int, limit: int) -> tuple[list[dict[str, Any]], int]:
    """`limit` objects after the first `skip`, and the number of objects in the first MAX_BYTES of a file."""
    found: list[dict[str, Any]] = []
    offset = 0
    while offset < MAX_BYTES:
        more, end = read(path, offset)
        if end <= offset:
            break
        found, offset = found + more, end
    return [clean(record) for record in found[skip : skip + limit]], len(found)


def last_lines(path: Path, n_lines: int) -> list[str]:
    """The last lines of a text file."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - TEXT_BYTES))
            return file.read(TEXT_BYTES).decode("utf-8", "replace").splitlines()[-n_lines:]
    except (OSError, ValueError):
        return []


def clean(value: Any, depth: int = 8) -> Any:
    """`value` as strictly valid JSON: without NaN, infinity, lone surrogates or deep nesting.

    >>> clean({"loss": math.inf, "text": "\\ud800", "step": 3})
    {'loss': None, 'text': '?', 'step': 3}
    """
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {clean(str(k)): clean(v, depth - 1) for k, v in value.items()} if depth else None
    if isinstance(value, list | tuple):
        return [clean(inner, depth - 1) for inner in value] if depth else None
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return value if abs(value) <= MAX_EXACT else None
    return value if isinstance(value, float) and math.isfinite(value) else None
