"""Responses of a run of rl: where each step lies in rollouts.jsonl, and the lines of one step.

The index is made from the first bytes of each line and read on as the file grows; JSON is parsed for the step
that is shown alone. The content is untrusted, as in `runs.tail`.
"""

import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_basics.lab import run_schemas
from llm_basics.runs import tail

# how `RunDir.rollout` begins a line
HEAD = re.compile(rb'\{"step": (\d{1,15}), "attempt": (\d{1,9}), ')

# most steps of an index, most bytes of a step that are parsed, and most characters of a text
MAX_STEPS = 10_000
MAX_STEP_BYTES = 4 << 20
MAX_TEXT = 20_000


class Index:
    """The place of each step in a file: attempt, first and last byte."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.is_complete = True
        self.spans: dict[int, tuple[int, int, int]] = {}
        self.lock = threading.Lock()

    @property
    def steps(self) -> list[int]:
        return sorted(self.spans)

    def update(self) -> None:
        """Read on from the last call, at most `tail.MAX_BYTES`; the next call reads more."""
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < self.offset:  # the file was replaced
                    self.offset, self.spans = 0, {}
                file.seek(self.offset)
                end = min(size, self.offset + tail.MAX_BYTES)
                while self.offset < end and (line := file.readline(tail.CHUNK_BYTES)):
                    if not line.endswith(b"\n") and len(line) < tail.CHUNK_BYTES:
                        break  # a torn last line: read again when it is complete
                    if found := HEAD.match(line):
                        self._add(int(found[1]), int(found[2]), len(line))
                    self.offset += len(line)
                self.is_complete = end == size
        except OSError:
            self.offset, self.spans = 0, {}

    def _add(self, step: int, attempt: int, n_bytes: int) -> None:
        known, first = self.spans.get(step), self.offset
        if known is not None and known[0] > attempt:
            return
        if known is not None and known[0] == attempt:
            first = known[1]
        else:
            # a resumed run samples these steps again
            later = [each for each in self.spans if each >= step and self.spans[each][0] < attempt]
            for each in later:
                del self.spans[each]
        if step in self.spans or len(self.spans) < MAX_STEPS:
            self.spans[step] = attempt, first, self.offset + n_bytes

    def read(self, step: int) -> tuple[list[dict[str, Any]], bool]:
        """The responses of a step, and whether these are all: of a long step only the first are read."""
        attempt, first, last = self.spans[step]
        found, end = tail.read(self.path, first, min(last - first, MAX_STEP_BYTES))
        own = [each for each in found if (each.get("step"), each.get("attempt")) == (step, attempt)]
        return own, end >= last


def grouped(records: Sequence[dict[str, Any]]) -> list[run_schemas.RolloutGroup]:
    """Responses by prompt, in the order of the file."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for each in records:
        number = each.get("group")
        groups.setdefault(number if isinstance(number, int) else None, []).append(each)
    return [
        run_schemas.RolloutGroup(
            prompt=_text(own[0].get("prompt")),
            expected=_text(own[0].get("expected")),
            responses=[_response(each) for each in own],
        )
        for own in groups.values()
    ]


def _response(record: dict[str, Any]) -> run_schemas.Response:
    ids = record.get("tokens")
    return run_schemas.Response(
        text=_text(record.get("text")),
        reward=_number(record.get("reward")),
        advantage=_number(record.get("advantage")),
        n_tokens=len(ids) if isinstance(ids, list) else None,
        is_exact=record.get("exact") is True,
        is_cut_off=record.get("ended") is False,
    )


def _text(value: Any) -> str:
    return tail.clean(value[:MAX_TEXT]) if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    found = tail.clean(value)
    return found if isinstance(found, int | float) and not isinstance(found, bool) else None
