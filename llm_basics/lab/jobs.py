"""Training runs as separate processes: start, pause, resume, stop. They are independent of the server."""

import contextlib
import datetime
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from llm_basics.cli import overrides
from llm_basics.core import files
from llm_basics.lab import catalog, run_schemas
from llm_basics.runs import locks, run_dir, steering, tail

TRAIN = [sys.executable, "-m", "llm_basics.train"]

# folder of process output, beside the runs
OUTPUT = ".lab"

# a pause is a stop after which the run is expected to be resumed
PAUSE = getattr(signal, "SIGUSR1", signal.SIGTERM)
STOPPED = {0, *(128 + number for number in (signal.SIGINT, signal.SIGTERM, PAUSE))}


class Jobs:
    """The training processes, including those not started by this server."""

    def __init__(self, runs: catalog.Catalog, data: Sequence[str] = ()) -> None:
        self.runs = runs
        # names of training texts -> the value of --data
        self.data = {"stdlib": "stdlib"} | {Path(each).name: each for each in data}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._names: dict[str, str] = {}
        self._signaled: dict[str, int] = {}
        self._paused: set[str] = set()
        self._lock = threading.Lock()

    # -- state ------------------------------------------------------------------------------------

    def summary(self, id: str) -> run_schemas.RunSummary:
        """A row of the list of runs."""
        return self._row(id, self.runs.folder(id))

    def _row(self, id: str, folder: Path) -> run_schemas.RunSummary:
        found = self.runs.summary(id, folder)
        pid = locks.owner(folder)
        state: run_schemas.State
        if pid is not None:
            state = "stopping" if self._signaled.get(id) == pid else "training"
        elif self._status(id) == "running":
            state = "starting"
        elif self._status(id) != "failed" and found.steps is not None and found.step >= found.steps:
            state = "finished"
        elif self._status(id) == "failed" or (found.has_metrics and not found.has_checkpoint):
            state = "failed"
        elif not found.has_metrics:
            state = "untrained"
        else:
            state = "paused" if id in self._paused else "stopped"
        reason = self._output(folder.name)[-1:] if state == "failed" else []
        can_resume = found.has_checkpoint and found.has_metrics and state in ("paused", "stopped", "failed")
        row = vars(found) | {"eta_seconds": found.eta_seconds if state == "training" else None}
        return run_schemas.RunSummary(
            **row, id=id, state=state, can_resume=can_resume, reason=reason[0] if reason else None
        )

    def summaries(self) -> list[run_schemas.RunSummary]:
        """All runs, newest first, after started ones without a run directory."""
        folders = self.runs.folders()
        found = [self._row(id, folder) for id, folder in folders.items()]
        found.sort(key=lambda run: (run.updated, run.name), reverse=True)
        with self._lock:
            new = [id for id in self._processes if id not in folders and self._status(id) != "ended"]
        return [self._placeholder(id) for id in reversed(new)] + found

    def _placeholder(self, id: str) -> run_schemas.RunSummary:
        is_running = self._status(id) == "running"
        return run_schemas.RunSummary(
            id=id,
            name=self._names[id],
            state="starting" if is_running else "failed",
            can_resume=False,
            reason=None if is_running else " ".join(self.output(id)[-1:]),
        )

    def _status(self, id: str) -> str:
        """Status of the process started by this server: running, ended, failed, or none."""
        process = self._processes.get(id)
        if process is None:
            return "none"
        status = process.poll()
        return "running" if status is None else "ended" if status in STOPPED else "failed"

    def output(self, id: str, n_lines: int = 200) -> list[str]:
        """The last lines of output of a run's process."""
        name = self._names.get(id) or self.runs.folders().get(id, Path()).name
        return self._output(name, n_lines) if name else []

    def _output(self, name: str, n_lines: int = 200) -> list[str]:
        return tail.last_lines(self.runs.root / OUTPUT / f"{name}.log", n_lines)

    # -- changes ----------------------------------------------------------------------------------

    def start(self, request: run_schemas.Start) -> str:
        """Start a run; returns its id."""
        if request.data not in self.data:
            raise ValueError(f"data must be one of {', '.join(self.data)}, got {request.data!r}")
        options = overrides.resolve(request.preset, request.options)
        arguments = [f"--config={request.preset}", f"--data={self.data[request.data]}"]
        arguments += overrides.to_arguments(options, request.options)
        if request.init_from is not None:
            arguments.append(f"--init_from={self.runs.folder(request.init_from)}")
        with self._lock:
            name = catalog.check_name(request.name) if request.name else self._new_name(request.preset)
            folder = self.runs.root / name
            if os.path.lexists(folder) or self._status(catalog.id_of(folder)) == "running":
                raise catalog.Conflict(f"there is already a run {name}")
            return self._spawn(folder, [*arguments, f"--run_dir={folder}"])

    def resume(self, id: str) -> None:
        """Resume a run from its newest checkpoint, bitwise equal to an uninterrupted run."""
        folder = self.runs.folder(id)
        with self._lock:
            if locks.owner(folder) is not None or self._status(id) == "running":
                raise catalog.Conflict("the run is training already")
            if not run_dir.checkpoints(folder):
                raise catalog.Conflict("the run has no checkpoint to resume from")
            self._paused.discard(id)
            self._spawn(folder, [f"--resume={folder}"])

    def stop(self, id: str, pauses: bool = False) -> None:
        """Stop a training run after saving, even if started elsewhere; a pause is to be resumed."""
        process = self._processes.get(id)
        pid = locks.owner(self.runs.folder(id)) if id in self.runs.folders() else None
        if pid is None and process is not None and process.poll() is None:
            pid = process.pid
        if pid is None:
            raise catalog.Conflict("the run is not training")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, PAUSE if pauses else signal.SIGTERM)
        self._signaled[id] = pid
        if pauses:
            self._paused.add(id)
        else:
            self._paused.discard(id)

    def steer(self, id: str, request: run_schemas.Steer) -> str:
        """Request changes and actions from a training run, as `llm-basics steer` does; returns their id."""
        folder = self.runs.folder(id)
        if locks.owner(folder) is None:
            raise catalog.Conflict("the run is not training; resume it to change its options")
        return steering.send(folder, request.options, request.actions)

    def forget(self, id: str) -> None:
        """Remove the process of a deleted or renamed run from the records."""
        if self._status(id) == "running":
            raise catalog.Conflict("the run must not be training; stop it first")
        self._processes.pop(id, None)
        self._paused.discard(id)

    def _new_name(self, preset: str) -> str:
        stem = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{preset}"
        names = (stem if number == 1 else f"{stem}-{number}" for number in itertools.count(1))
        return next(
            name
            for name in names
            if not os.path.lexists(self.runs.root / name)
            and catalog.id_of(self.runs.root / name) not in self._processes
        )

    def _spawn(self, folder: Path, arguments: Sequence[str]) -> str:
        path = self.runs.root / OUTPUT / f"{folder.name}.log"
        files.create_folder(path.parent)
        id = catalog.id_of(folder)
        self._signaled.pop(id, None)
        with files.open_output(path, "ab") as log:
            self._processes[id] = subprocess.Popen(
                [*TRAIN, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                # Ctrl-C ends the server, not the run
                start_new_session=True,
            )
        self._names[id] = folder.name
        return id
