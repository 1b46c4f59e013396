"""The runs of a folder, by id. Clients identify a run by its id, never by a path."""

import contextlib
import hashlib
import os
import re
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from llm_basics.analysis import run_summary
from llm_basics.core import files
from llm_basics.lab import rollouts
from llm_basics.runs import checkpoint, locks, metric_table, run_dir, tail

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
RESERVED = {"newest", "auto"}

# maximum number of metric tables, and of indices of rollouts, in memory
MAX_TABLES = 16

T = TypeVar("T")


class Missing(LookupError):
    """Raised for a missing run, checkpoint or step."""


class Conflict(Exception):
    """Raised for a request that conflicts with the state of a run."""


def id_of(folder: Path) -> str:
    """The id of a run: a hash of its name."""
    return hashlib.sha256(os.fsencode(folder.name)).hexdigest()[:12]


def check_name(name: str) -> str:
    """`name` if it is valid for a new run; else raises ValueError."""
    if not NAME.fullmatch(name) or name in RESERVED:
        raise ValueError(
            "a name must have letters, digits, dots, dashes and underscores, start with a letter or a digit, "
            f"have at most 100 characters and be none of {', '.join(sorted(RESERVED))}, got {name!r}"
        )
    return name


class Catalog:
    """The run directories in `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._tables: OrderedDict[tuple[str, int], metric_table.Table] = OrderedDict()
        self._rollouts: OrderedDict[tuple[str, int], rollouts.Index] = OrderedDict()
        self._summaries: dict[str, tuple[Any, run_summary.Summary]] = {}
        self._lock = threading.Lock()

    def folders(self) -> dict[str, Path]:
        """All runs by id."""
        try:
            with os.scandir(self.root) as entries:
                found = [Path(entry.path) for entry in entries if entry.is_dir()]
        except OSError:
            return {}
        return {id_of(path): path for path in found if (path / "config.json").is_file()}

    def folder(self, id: str) -> Path:
        """The folder of a run."""
        try:
            return self.folders()[id]
        except KeyError:
            raise Missing(f"there is no run {id}") from None

    def named(self, name: str) -> str:
        """The id of a run by its name or its id."""
        folders = self.folders()
        for id, folder in folders.items():
            if name in (id, tail.clean(folder.name)):
                return id
        raise Missing(f"there is no run {name!r}")

    def table(self, id: str) -> metric_table.Table:
        """The metrics of a run, read incrementally."""
        return self._known(self._tables, metric_table.Table, id, run_dir.METRICS)

    def rollouts(self, id: str) -> rollouts.Index:
        """The positions of the responses of an rl run in its file, read incrementally."""
        return self._known(self._rollouts, rollouts.Index, id, run_dir.ROLLOUTS)

    def _known(
        self, cache: OrderedDict[tuple[str, int], T], make: Callable[[Path], T], id: str, name: str
    ) -> T:
        """The cached reader of a file of a run; a new one if the file was replaced."""
        path = self.folder(id) / name
        try:
            key = (id, path.stat().st_ino)
        except OSError:
            key = (id, 0)
        with self._lock:
            found = cache.setdefault(key, make(path))
            cache.move_to_end(key)
            while len(cache) > MAX_TABLES:
                cache.popitem(last=False)
        return found

    # -- one run ----------------------------------------------------------------------------------

    def summary(self, id: str, folder: Path) -> run_summary.Summary:
        """A row of the list, without the fields from the jobs (`state`)."""
        stamp, known = run_summary.stamp(folder), self._summaries.get(id)
        if known is None or known[0] != stamp:
            known = self._summaries[id] = stamp, run_summary.summarize(folder)
        return known[1]

    def checkpoint(self, id: str, which: str) -> Path:
        """The file of a checkpoint: `latest`, `best` or its step."""
        found = run_summary.find_checkpoint(self.folder(id), which)
        if found is None:
            raise Missing(f"the run has no checkpoint {which}")
        return found

    # -- changes ----------------------------------------------------------------------------------

    def rename(self, id: str, name: str) -> str:
        """Rename a run that is not training; returns its new id."""
        folder, target = self.folder(id), self.root / check_name(name)
        with _unused(folder):
            if os.path.lexists(target):
                raise Conflict(f"there is already a run {name}")
            with files.writing(target):
                folder.rename(target)
            # the lock is moved with the folder
            (target / "lock").unlink(missing_ok=True)
        return id_of(target)

    def delete(self, id: str) -> None:
        """Delete a run that is not training."""
        folder = self.folder(id)
        if folder.is_symlink():
            raise Conflict("the run is a link to another folder; delete it there")
        with _unused(folder), files.writing(folder):
            shutil.rmtree(folder)
        self._summaries.pop(id, None)

    def delete_checkpoint(self, id: str, step: int) -> None:
        """Delete a checkpoint, except the last valid one."""
        path = self.checkpoint(id, str(step))
        with _unused(self.folder(id)):
            others = [other for other in checkpoint.files(path.parent) if other != path]
            if not any(_is_valid(other) for other in others):
                raise Conflict("the last valid checkpoint of a run is not deleted; delete the run")
            with files.writing(path):
                path.unlink()


@contextlib.contextmanager
def _unused(folder: Path) -> Any:
    """Lock a run within the context; raises Conflict if it is training."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.locked(folder))
        except ValueError as error:
            raise Conflict(f"the run must not be training: {error}; stop it first") from None
        yield


def _is_valid(path: Path) -> bool:
    try:
        checkpoint.verify(path)
    except (ValueError, TypeError):
        return False
    return True
