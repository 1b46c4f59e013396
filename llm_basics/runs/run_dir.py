"""The run directory: where a training run writes all it knows, and all that reads a run looks.

    config.json         every option, resolved
    metrics.jsonl       one flat object a line, appended; `attempt` counts the starts of the run
    samples.jsonl       generated texts
    log.txt             what was said on the terminal
    tokenizer/          vocab.json, merges.txt
    checkpoints/        step_00000500.safetensors
    lock                held by the process that writes here
    loss.png
    lr_finder.jsonl     instead of metrics, samples, checkpoints and loss: what a search for a learning
    lr_finder.png       rate measured

Followers are told of everything that happens.
"""

import contextlib
import datetime
import itertools
import json
import math
import os
import shutil
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_basics.core import files
from llm_basics.runs import loggers

try:
    import fcntl
except ImportError:  # on Windows nothing keeps two processes apart
    fcntl = None  # type: ignore[assignment]

RUNS = Path("runs")
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
LR_FINDER = "lr_finder.jsonl"

# in config.json, beside the options: which pieces were somebody's own
ORIGINS = "origins"


class RunDir:
    """A run directory that is being written, by one process at a time.

    Raises ValueError if another has it. Where `tolerant`, a log that cannot be written is a warning.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        listeners: Sequence[loggers.Logger] = (),
        tolerant: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.loggers = list(listeners)
        self.tolerant = tolerant
        self.checkpoints = self.folder / CHECKPOINTS
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._held = contextlib.ExitStack()
        self._held.enter_context(locked(self.folder))
        self.attempt = 1 + max((e.get("attempt", 1) for e in _lines(self.folder / METRICS)), default=0)
        # where a line may have been torn, the next begins a new one
        self._torn = {METRICS, LR_FINDER, SAMPLES, "log.txt"}

    def write_config(self, options: dict[str, Any]) -> None:
        """Store the options that the run was started with."""
        with self._tolerating(self.folder / "config.json"):
            files.write(self.folder / "config.json", json.dumps(options, indent=2) + "\n")

    def resumed(self, step: int) -> None:
        """Record that what an earlier attempt measured after `step` is no longer so."""
        self._append(METRICS, json.dumps({"step": step, "attempt": self.attempt, "resumed": True}))

    def metrics(self, step: int, **values: float) -> None:
        """Record numbers measured after `step` updates. One that is not finite becomes null, and is named."""
        entry: dict[str, Any] = {"step": step, "attempt": self.attempt, **values}
        nonfinite = [name for name, value in entry.items() if not math.isfinite(value)]
        if nonfinite:
            entry |= {name: None for name in nonfinite} | {"nonfinite": nonfinite}
        self._append(METRICS, json.dumps(entry, allow_nan=False))
        for follower in self.loggers:
            follower.metrics(entry)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Record a generated text and log it: the prompt, quoted, in the heading, its continuation below."""
        self.record_sample(step, prompt, text)
        self.log(f"sample after step {step}, prompt {prompt!r}:\n" + textwrap.indent(text, "    "))

    def record_sample(self, step: int, prompt: str, text: str) -> None:
        """Record a text that the model wrote after `step` updates."""
        entry = {"step": step, "attempt": self.attempt, "prompt": prompt, "text": text}
        self._append(SAMPLES, json.dumps(entry, ensure_ascii=False))

    def tried(self, step: int, **values: float) -> None:
        """Record what a step measured that tried a learning rate."""
        self._append(LR_FINDER, json.dumps({"step": step, **values}))

    def log(self, text: str = "") -> None:
        """Tell people, on the terminal and in log.txt."""
        for follower in self.loggers:
            follower.message(text)
        self._append("log.txt", text)

    def close(self, seconds: float | None = None) -> None:
        """End the writing. Followers that want to finish have `seconds`, or as long as is usual."""
        while self.loggers:
            self.loggers.pop().close(seconds)
        self._held.close()

    def checkpoint_path(self, step: int) -> Path:
        return checkpoint_path(self.folder, step)

    def _append(self, name: str, line: str) -> None:
        path = self.folder / name
        with self._tolerating(path):
            # what was torn is ended first; should this line be torn, the next one finds it so
            is_torn = name in self._torn and _is_torn(path)
            self._torn.add(name)
            with open(path, "a", encoding="utf-8") as file:
                file.write("\n" * is_torn + line + "\n")
            self._torn.discard(name)

    @contextlib.contextmanager
    def _tolerating(self, path: Path) -> Iterator[None]:
        """Where that was asked for, an error inside is a warning."""
        try:
            yield
        except OSError as error:
            if not self.tolerant:
                raise
            for follower in self.loggers:
                follower.message(f"warning: {path} could not be written ({error.strerror})")


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the run in `folder`: raises ValueError if another process does. Ends with the process, however."""
    with open(Path(folder) / "lock", "a+") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                owner = file.read().strip()
                raise ValueError(f"the run {folder} is locked by pid {owner}, which is writing it") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


# --------------------------------------------------------------------------------------------------
# Reading runs


def make_folder(name: str) -> Path:
    """A new folder under runs/, named by time and `name`; nobody else gets the same one."""
    stem = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{name}"
    for number in itertools.count(1):
        folder = RUNS / (stem if number == 1 else f"{stem}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


@contextlib.contextmanager
def appearing(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill that gets the name `folder` when all is in it; after an error nothing is left of it.

    Raises ValueError if something has that name.
    """
    path = Path(os.path.abspath(folder))
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"--out must be new or an empty folder, got {folder}; delete it or choose another")
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def newest_folder() -> Path:
    """The run under runs/ that was written to last, of those that have a checkpoint."""
    folders = [config.parent for config in RUNS.glob("*/config.json") if checkpoints(config.parent)]
    if not folders:
        raise ValueError(f"there must be a run with a checkpoint under {RUNS}/, got none; train one first")
    return max(folders, key=lambda folder: max(file.stat().st_mtime_ns for file in folder.iterdir()))


def resolve(name: str | os.PathLike[str]) -> Path:
    """The folder of the run `name`: a path, or `newest`."""
    return newest_folder() if str(name) == "newest" else Path(name)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The options of the run in `folder`."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"a run directory must hold config.json, got {folder}")
    options = files.read_json(path)
    options.pop(ORIGINS, None)
    return options


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The measurements of a run, each step once: what the last attempt that got there measured.

    A torn line, and what an attempt measured after the step from which a later one went on, are left out.
    """
    return deduplicate_steps(_lines(Path(folder) / METRICS))


def deduplicate_steps(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is still so of the lines of metrics.jsonl."""
    valid: dict[tuple[int, bool], dict[str, Any]] = {}
    for entry in entries:
        if "resumed" in entry:
            valid = {key: kept for key, kept in valid.items() if key[0] <= entry["step"]}
        else:
            valid[entry["step"], "val_loss" in entry] = entry
    return [valid[key] for key in sorted(valid)]


def read_samples(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The texts that a run wrote on its way, in the order of writing."""
    return list(_lines(Path(folder) / SAMPLES))


def read_tried(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """What a search for a learning rate measured, step by step."""
    return list(_lines(Path(folder) / LR_FINDER))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; one that was torn when a run was killed is no object."""
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    if isinstance(entry, dict) and line.endswith("\n"):
                        yield entry


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted((Path(folder) / CHECKPOINTS).glob("step_*.safetensors"), reverse=True)


def checkpoint_path(folder: str | os.PathLike[str], step: int) -> Path:
    """Where a run keeps the checkpoint after `step` updates."""
    return Path(folder) / CHECKPOINTS / f"step_{step:08d}.safetensors"


# --------------------------------------------------------------------------------------------------


class Stopwatch:
    """Measures seconds of work, without those of interruptions."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, or since the beginning, without pauses."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds

    def total(self) -> float:
        """Seconds since the beginning, pauses included."""
        return time.perf_counter() - self.start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count for the lap."""
        began = time.perf_counter()
        yield
        self.last += time.perf_counter() - began


def _is_torn(path: Path) -> bool:
    """Whether the last line of a file lacks its end."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def as_json(value: Any) -> Any:
    """`value` as JSON can say it: a number that is not finite becomes null.

    >>> as_json({"loss": [1.5, math.nan]})
    {'loss': [1.5, None]}
    """
    if isinstance(value, dict):
        return {key: as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
