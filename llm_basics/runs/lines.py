"""The JSON-lines files of a run.

A line that is not JSON is skipped: silently at the end of an attempt, where a stopped process leaves a torn
line, elsewhere with a warning. Invalid JSON objects, as after editing, are an error with the line number.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def read(path: Path, check: Callable[[dict[str, Any]], None]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, without torn lines. `check` raises ValueError for invalid objects."""
    if not path.exists():
        return
    broken, attempt = 0, 1
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                if broken:
                    _warn(path, broken)
                broken = number
                continue
            if not line.endswith("\n"):
                continue
            try:
                if not isinstance(entry, dict):
                    raise ValueError(f"must be an object, got {entry!r:.60}")
                check(entry)
            except ValueError as error:
                raise ValueError(f"{path}:{number} {error}; correct or delete the line") from None
            if broken and entry.get("attempt", 1) == attempt:
                _warn(path, broken)
            broken, attempt = 0, entry.get("attempt", 1)
            yield entry


@functools.cache
def _warn(path: Path, number: int) -> None:
    """Warn about a skipped line, once per process."""
    print(f"warning: {path}:{number} is not JSON and is skipped", file=sys.stderr)


def check_metrics(entry: dict[str, Any]) -> None:
    """Raise ValueError unless `entry` is a line of metrics."""
    _check_steps(entry)
    for name, value in entry.items():
        # null: a non-finite value; sums of larger numbers may overflow
        is_valid = value is None or (isinstance(value, int | float) and abs(value) < 1e100)
        if not is_valid and name != "nonfinite":
            raise ValueError(f"must have a number as {name}, got {value!r:.60}")


def check_sample(entry: dict[str, Any]) -> None:
    """Raise ValueError unless `entry` is a sample."""
    _check_steps(entry)
    _check_texts(entry, "prompt", "text")


def check_event(entry: dict[str, Any]) -> None:
    """Raise ValueError unless `entry` is an event."""
    _check_steps(entry)
    _check_texts(entry, "event")


def _check_texts(entry: dict[str, Any], *names: str) -> None:
    for name in names:
        if not isinstance(entry.get(name), str):
            raise ValueError(f"must have a text as {name}, got {entry.get(name)!r:.60}")


def _check_steps(entry: dict[str, Any]) -> None:
    for name, value in {"step": None, "attempt": 1, **entry}.items():
        if name in ("step", "attempt") and (type(value) is not int or not 0 <= value < 2**63):
            raise ValueError(f"must have a whole number as {name}, got {value!r:.60}")
