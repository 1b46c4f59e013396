"""The state shared by all routes: runs, jobs, models and the queue."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fastapi import Request

from llm_basics.analysis import inspection
from llm_basics.inference import worker
from llm_basics.lab import catalog, jobs, models

T = TypeVar("T")


@dataclass(frozen=True)
class Lab:
    """The state of a server."""

    runs: catalog.Catalog
    jobs: jobs.Jobs
    models: models.Models
    worker: worker.Worker
    mine: str = "mine.py"
    """File of user pieces."""
    is_closing: threading.Event = dataclasses.field(default_factory=threading.Event)
    """Set when the server shuts down, to end live streams."""

    def with_model(self, run: str, checkpoint: str, compute: Callable[[inspection.LoadedModel], T]) -> T:
        """The result of `compute` on a model, called in the queue."""
        # a missing checkpoint is an error before the request is queued
        self.runs.checkpoint(run, checkpoint)
        return self.worker.call(lambda: compute(self.models.load(run, checkpoint)))


def make(root: Path, data: Sequence[str] = (), device: str = "cpu", mine: str = "mine.py") -> Lab:
    """The state of a server over the runs in `root`."""
    runs = catalog.Catalog(root)
    return Lab(runs, jobs.Jobs(runs, data), models.Models(runs, device), worker.Worker(), mine)


def of(request: Request) -> Lab:
    """The state of the server of a request."""
    return request.app.state.lab
