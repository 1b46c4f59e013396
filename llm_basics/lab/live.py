"""The live stream: what was appended to the files of runs, as server-sent events."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

from llm_basics.lab import catalog, jobs
from llm_basics.runs import run_dir, tail

# files that are followed, and the name of their events
FILES = {"metrics": run_dir.METRICS, "samples": run_dir.SAMPLES, "events": run_dir.EVENTS}

MAX_RUNS = 16

# a client that is further behind gets `reset` instead, and reads the buckets again
MAX_BEHIND_BYTES = 4 << 20
MAX_RECORDS = 2000


@dataclasses.dataclass(frozen=True)
class Event:
    """A server-sent event; `position` is its id."""

    name: str
    data: dict[str, Any]
    position: str


class Follower:
    """Follows some runs from a position on: `RUN:METRICS:SAMPLES:EVENTS`, offsets in bytes, joined by `;`.

    The position is all that a client needs to go on after an interruption, also of the server.
    """

    def __init__(self, of_jobs: jobs.Jobs, ids: Sequence[str], position: str | None = None) -> None:
        self.jobs = of_jobs
        known = parse_position(position or "")
        self.offsets = {id: known.get(id) or end_of(of_jobs.runs, id) for id in ids[:MAX_RUNS]}
        self.is_list = not ids
        self._summaries: dict[str, Any] = {}

    @property
    def position(self) -> str:
        """Where the next events begin."""
        return format_position(self.offsets)

    def poll(self) -> Iterator[Event]:
        """What has happened since the last call."""
        for id in list(self.offsets):
            try:
                folder = self.jobs.runs.folder(id)
            except catalog.Missing:
                continue
            for number, (name, file) in enumerate(FILES.items()):
                yield from self._appended(id, number, name, folder / file)
        yield from self._changed()

    def _appended(self, id: str, number: int, name: str, path: Any) -> Iterator[Event]:
        offset = self.offsets[id][number]
        size = _size(path)
        if size < offset or size - offset > MAX_BEHIND_BYTES:
            self._move(id, number, _last_line_end(path, size))
            yield Event("reset", {"run": id, "of": name}, self.position)
            return
        while size > offset:
            records, end = tail.read(path, offset)
            if end <= offset:
                return
            offset = end
            self._move(id, number, end)
            for start in range(0, len(records), MAX_RECORDS):
                part = [tail.clean(record) for record in records[start : start + MAX_RECORDS]]
                yield Event(name, {"run": id, "records": part}, self.position)

    def _changed(self) -> Iterator[Event]:
        """Rows of the list of runs that have changed."""
        if self.is_list:
            runs = self.jobs.summaries()
        else:
            runs = [run for id in self.offsets if (run := self._summary(id)) is not None]
        current = {run.id: run.model_dump() for run in runs}
        for id, row in current.items():
            if self._summaries.get(id) != row:
                yield Event("run", row, self.position)
        for id in self._summaries.keys() - current.keys():
            yield Event("gone", {"run": id}, self.position)
        self._summaries = current

    def _summary(self, id: str) -> Any:
        try:
            return self.jobs.summary(id)
        except catalog.Missing:
            return None

    def _move(self, id: str, number: int, offset: int) -> None:
        offsets = list(self.offsets[id])
        offsets[number] = offset
        self.offsets[id] = tuple(offsets)


def end_of(runs: catalog.Catalog, id: str) -> tuple[int, ...]:
    """The offsets after the last complete lines of a run."""
    try:
        folder = runs.folder(id)
    except catalog.Missing:
        return (0,) * len(FILES)
    return tuple(_last_line_end(folder / file, _size(folder / file)) for file in FILES.values())


def parse_position(position: str) -> dict[str, tuple[int, ...]]:
    """The offsets of each run in a position; parts that are none are left out."""
    found = {}
    for part in position[:4096].split(";"):
        id, *numbers = part.split(":")
        if len(numbers) == len(FILES) and all(n.isascii() and n.isdecimal() and len(n) < 16 for n in numbers):
            found[id] = tuple(map(int, numbers))
    return found


def format_position(offsets: dict[str, tuple[int, ...]]) -> str:
    """The inverse of `parse_position`."""
    return ";".join(":".join([id, *map(str, numbers)]) for id, numbers in offsets.items())


def _size(path: Any) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _last_line_end(path: Any, size: int) -> int:
    """The offset after the last newline; where the last lines are torn and long, the end of the file."""
    try:
        with open(path, "rb") as file:
            start = max(0, size - tail.CHUNK_BYTES)
            file.seek(start)
            end = file.read(size - start).rfind(b"\n") + 1
            return start + end if end or not start else size
    except OSError:
        return 0
