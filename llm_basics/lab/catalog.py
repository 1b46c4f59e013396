"""The runs of a folder, by ids. A client names a run by its id, never by a path."""

import contextlib
import hashlib
import os
import re
import shutil
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_basics.analysis import metric_table
from llm_basics.cli import nested
from llm_basics.core import config, files, presets
from llm_basics.lab import run_schemas
from llm_basics.runs import checkpoint, locks, run_dir, tail

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
RESERVED = {"newest", "auto"}

# tables of metrics that are kept in memory
MAX_TABLES = 16
SPARKLINE = 48


class Missing(LookupError):
    """There is no such thing."""


class Conflict(Exception):
    """The state of a run does not allow this."""


def id_of(folder: Path) -> str:
    """The id of a run: a hash of its name."""
    return hashlib.sha256(os.fsencode(folder.name)).hexdigest()[:12]


def check_name(name: str) -> str:
    """`name` if a new run may have it."""
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
        self._summaries: dict[str, tuple[Any, dict[str, Any]]] = {}
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
        """The metrics of a run, as far as they are read."""
        path = self.folder(id) / run_dir.METRICS
        try:
            key = (id, path.stat().st_ino)
        except OSError:
            key = (id, 0)
        with self._lock:
            table = self._tables.setdefault(key, metric_table.Table(path))
            self._tables.move_to_end(key)
            while len(self._tables) > MAX_TABLES:
                self._tables.popitem(last=False)
        return table

    # -- one run ----------------------------------------------------------------------------------

    def options(self, id: str) -> dict[str, Any]:
        """The options of a run, by their names on the command line."""
        with contextlib.suppress(ValueError, OSError):
            return tail.clean(nested.flat(run_dir.read_config(self.folder(id))))
        return {}

    def shape(self, id: str) -> config.ModelConfig | None:
        """The model config of a run; None if this version cannot read it."""
        with contextlib.suppress(ValueError, OSError, TypeError):
            options = run_dir.read_config(self.folder(id)).get("model")
            if isinstance(options, dict):
                return presets.update(config.ModelConfig(), options, "config.json")
        return None

    def summary(self, id: str) -> dict[str, Any]:
        """A row of the list, but for what only the jobs know (`state`)."""
        folder = self.folder(id)
        stamp = tuple(_stamp(folder / name) for name in (run_dir.METRICS, "config.json", "checkpoints"))
        known = self._summaries.get(id)
        if known is None or known[0] != stamp:
            known = self._summaries[id] = stamp, self._read_summary(id, folder)
        return dict(known[1])

    def _read_summary(self, id: str, folder: Path) -> dict[str, Any]:
        options = self.options(id)
        entries = [e for e in tail.sample(folder / run_dir.METRICS, SPARKLINE) if _is_step(e.get("step"))]
        kept: list[dict[str, Any]] = []
        for entry in reversed(entries):  # without what a resumed run replaced
            if not kept or entry["step"] <= kept[-1]["step"]:
                kept.append(entry)
        kept.reverse()
        about = [_about(path) for path in run_dir.checkpoints(folder)]
        losses = [loss for a in about if isinstance(loss := a.get("val_loss"), int | float)]
        steps = [a["step"] for a in about if _is_step(a.get("step"))]
        trained = [entry for entry in kept if "train_loss" in entry]
        sparkline = [tail.clean(entry["train_loss"]) for entry in trained if _is_number(entry["train_loss"])]
        last = trained[-1] if trained else {}
        total = options.get("train.steps")
        preset = options.get("config")
        return {
            "id": id,
            "name": tail.clean(folder.name),
            "config": preset if isinstance(preset, str) else None,
            "step": max([entry["step"] for entry in kept] + steps, default=0),
            "steps": total if _is_step(total) else None,
            "train_loss": _number(last.get("train_loss")),
            "val_loss": next((_number(e["val_loss"]) for e in reversed(kept) if "val_loss" in e), None),
            "best_val_loss": tail.clean(min(losses, default=None)),
            "tokens_per_second": _number(last.get("tokens_per_second")),
            "eta_seconds": _number(last.get("eta_seconds")),
            "updated": _time(folder),
            "sparkline": _thinned(sparkline),
            "has_checkpoint": bool(about),
            "has_metrics": bool(kept),
        }

    def details(self, id: str) -> dict[str, Any]:
        """What `run_schemas.RunDetails` has beyond the summary."""
        folder, shape, options = self.folder(id), self.shape(id), self.options(id)
        origins = {name: v for name, v in options.items() if name.startswith(f"{run_dir.ORIGINS}.")}
        sizes = [options.get(name) for name in ("train.batch_size", "train.grad_accumulation_steps")]
        per_step = None
        if shape is not None and all(_is_step(size) for size in sizes):
            per_step = sizes[0] * sizes[1] * shape.context_length  # type: ignore[operator]
        table = self.table(id)
        with table.lock:
            table.update()
        specials = tail.clean(_specials(folder))
        return {
            "folder": tail.clean(str(folder)),
            "is_chat": "<|assistant|>" in specials,
            "options": {
                k: v for k, v in options.items() if k not in origins and not k.startswith(run_dir.HELD_OUT)
            },
            "origins": {k.removeprefix(f"{run_dir.ORIGINS}."): v for k, v in origins.items()},
            "parameters": shape.n_parameters if shape is not None else None,
            "flops_per_token": shape.flops_per_token if shape is not None else None,
            "tokens_per_step": per_step,
            "metrics": [tail.clean(name) for name in table.names],
        }

    def differences(self, ids: Sequence[str]) -> list[run_schemas.Difference]:
        """The options that are not the same in all of these runs."""
        found = [self.options(id) for id in ids]
        names = dict.fromkeys(name for options in found for name in options)
        values = {name: [options.get(name) for options in found] for name in names}
        return [
            run_schemas.Difference(option=name, values=each)
            for name, each in values.items()
            if any(value != each[0] for value in each)
        ]

    def checkpoints(self, id: str) -> list[run_schemas.Checkpoint]:
        """The checkpoints of a run, newest first."""
        folder = self.folder(id)
        paths = run_dir.checkpoints(folder)
        best = checkpoint.best(folder / run_dir.CHECKPOINTS)
        found = []
        for path in paths:
            with contextlib.suppress(OSError):
                stat, about = path.stat(), _about(path)
                found.append(
                    run_schemas.Checkpoint(
                        step=about.get("step", step_of(path)),
                        val_loss=_number(about.get("val_loss")),
                        n_bytes=stat.st_size,
                        time=stat.st_mtime,
                        is_latest=path == paths[0],
                        is_best=path == best,
                        error=about.get("error"),
                    )
                )
        return found

    def checkpoint(self, id: str, which: str) -> Path:
        """The file of a checkpoint: `latest`, `best` or its step."""
        folder = self.folder(id)
        paths = run_dir.checkpoints(folder)
        found: Path | None
        if which == "latest":
            found = next(iter(paths), None)
        elif which == "best":
            found = checkpoint.best(folder / run_dir.CHECKPOINTS)
        else:
            found = next((path for path in paths if which.isdecimal() and step_of(path) == int(which)), None)
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
            # the lock moves with the folder
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
        """Delete a checkpoint, but not the last valid one."""
        path = self.checkpoint(id, str(step))
        with _unused(self.folder(id)):
            others = [other for other in checkpoint.files(path.parent) if other != path]
            if not any(_is_valid(other) for other in others):
                raise Conflict("the last valid checkpoint of a run is not deleted; delete the run")
            with files.writing(path):
                path.unlink()


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint; -1 if it has none."""
    digits = path.stem.removeprefix("step_")
    return int(digits) if re.fullmatch("[0-9]{1,18}", digits) else -1


@contextlib.contextmanager
def _unused(folder: Path) -> Any:
    """Hold the lock of a run; raises Conflict if it is training."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.locked(folder))
        except ValueError as error:
            raise Conflict(f"the run must not be training: {error}; stop it first") from None
        yield


def _about(path: Path) -> dict[str, Any]:
    try:
        about = checkpoint.read_about(path)
        return about if isinstance(about, dict) else {"error": f"{path.name} must hold an object"}
    except (ValueError, RecursionError, AttributeError, MemoryError, OverflowError) as error:
        return {"error": str(error)}


def _is_valid(path: Path) -> bool:
    try:
        checkpoint.verify(path)
    except (ValueError, TypeError):
        return False
    return True


def _specials(folder: Path) -> Any:
    with contextlib.suppress(ValueError, OSError):
        return files.read_json(folder / "tokenizer" / "special_tokens.json")
    return []


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value <= tail.MAX_EXACT


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _number(value: Any) -> float | None:
    return tail.clean(value) if _is_number(value) else None


def _thinned(values: list[Any]) -> list[Any]:
    """At most SPARKLINE of the values, with the last one."""
    every = -(-len(values) // SPARKLINE) or 1
    return values[::-1][::every][::-1]


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns
    except OSError:
        return None


def _time(folder: Path) -> float:
    for name in (run_dir.METRICS, "config.json"):
        with contextlib.suppress(OSError):
            return (folder / name).stat().st_mtime
    return 0.0
