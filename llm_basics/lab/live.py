"""The live stream: lines appended to the files of runs, as server-sent events."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from llm_basics.lab import catalog, jobs
from llm_basics.runs import follow

MAX_RUNS = 16


@dataclasses.dataclass(frozen=True)
class Event:
    """A server-sent event; `position` is its id."""

    name: str
    data: dict[str, Any]
    position: str


class Follower:
    """Follows runs from the positions in `position` (`runs.follow`), or from the ends of their files."""

    def __init__(self, of_jobs: jobs.Jobs, ids: Sequence[str], position: str | None = None) -> None:
        self.jobs = of_jobs
        known = follow.parse(position or "")
        self.positions = {id: known.get(id) or end_of(of_jobs.runs, id) for id in ids[:MAX_RUNS]}
        self.is_list = not ids
        self._summaries: dict[str, Any] = {}

    @property
    def position(self) -> str:
        """The position of the next events."""
        return follow.format(self.positions)

    def poll(self) -> Iterator[Event]:
        """The events since the last call."""
        for id in list(self.positions):
            try:
                folder = self.jobs.runs.folder(id)
            except catalog.Missing:
                continue
            for name, records, position in follow.appended(folder, self.positions[id]):
                self.positions[id] = position
                if records is None:
                    yield Event("reset", {"run": id, "of": name}, self.position)
                else:
                    yield Event(name, {"run": id, "records": records}, self.position)
        yield from self._changed()

    def _changed(self) -> Iterator[Event]:
        """The changed rows of the list of runs."""
        if self.is_list:
            runs = self.jobs.summaries()
        else:
            runs = [run for id in self.positions if (run := self._summary(id)) is not None]
        current = {run.id: run for run in runs}
        for id, run in current.items():
            if self._summaries.get(id) != run:
                yield Event("run", dataclasses.asdict(run), self.position)
        for id in self._summaries.keys() - current.keys():
            yield Event("gone", {"run": id}, self.position)
        self._summaries = current

    def _summary(self, id: str) -> Any:
        try:
            return self.jobs.summary(id)
        except catalog.Missing:
            return None


def end_of(runs: catalog.Catalog, id: str) -> follow.Position:
    """The position after the last complete lines of a run; the start if its directory does not exist yet."""
    try:
        return follow.end_of(runs.folder(id))
    except catalog.Missing:
        return (0,) * len(follow.FILES)
