"""The run directory: the interface between a training run and everything that reads it.

    config.json         every option, resolved
    metrics.jsonl       one flat object per line, append-only; `attempt` counts starts and resumes
    samples.jsonl       generated texts
    events.jsonl        events by step: resumed, checkpoint, spike, skipped, steered, refused,
                        stopped, failed, replayed, accuracy (sft, dpo, rl), finding (rl)
    commands.jsonl      requests to the training process (`runs.inbox`)
    log.txt             messages on the terminal
    tokenizer/          vocab.json, merges.txt
    checkpoints/        step_00000500.safetensors
    lock                held by the writing process, and removed when it ends
    loss.png
    rollouts.jsonl      rl: sampled responses, with their rewards
    reference.safetensors  rl, dpo: weights before the first step
    lr_finder.jsonl     learning-rate finder: its measurements, instead of metrics, samples and
    lr_finder.png       checkpoints

Loggers receive every metric and message.
"""

import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llm_basics.core import config, files, presets
from llm_basics.runs import inbox, lines, locks, loggers

C = TypeVar("C", bound=config.Config)

RUNS = Path("runs")
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
EVENTS = "events.jsonl"
LR_FINDER = "lr_finder.jsonl"
ROLLOUTS = "rollouts.jsonl"

# keys in config.json beside the options: the origin of each user piece, the identity of the held-out text,
# baseline losses in nats, and the number of tokens of the training text
ORIGINS = "origins"
HELD_OUT = "held_out"
BASELINES = "baselines"
TRAINING_TOKENS = "training_tokens"
# groups of options of a single program, by its name
PROGRAM_OPTIONS = ("rl", "dpo", "distill")
BESIDE_OPTIONS = (ORIGINS, HELD_OUT, BASELINES, TRAINING_TOKENS, *PROGRAM_OPTIONS)


class RunDir:
    """A run directory opened for writing, locked to this process.

    Raises ValueError if another process holds it. With `tolerant`, a failed write is a warning.
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
        files.create_folder(self.checkpoints)
        earlier = lines.read(self.folder / METRICS, lines.check_metrics)
        self.attempt = 1 + max((entry.get("attempt", 1) for entry in earlier), default=0)
        self._lock = contextlib.ExitStack()
        self._lock.enter_context(locks.locked(self.folder))
        # reads commands from now on; older ones were for earlier attempts
        self.inbox = inbox.Inbox(self.folder)
        self.config: dict[str, Any] = {}
        # files whose last line may be torn: the next line starts with a newline
        self._maybe_torn = {METRICS, LR_FINDER, SAMPLES, EVENTS, ROLLOUTS, "log.txt"}

    def write_config(self, options: dict[str, Any]) -> None:
        """Write the resolved options to config.json, and keep its other entries."""
        self.config |= options
        with self._tolerating(self.folder / "config.json"):
            files.write(self.folder / "config.json", json.dumps(self.config, indent=2) + "\n")

    def resumed(self, step: int, **values: Any) -> None:
        """Record a resume from `step`, which invalidates later metrics of earlier attempts."""
        self._append(METRICS, json.dumps({"step": step, "attempt": self.attempt, "resumed": True}))
        self.event(step, "resumed", **values)

    def event(self, step: int, event: str, **values: Any) -> None:
        """Record an event after `step` updates."""
        entry = {"step": step, "attempt": self.attempt, "event": event, **values}
        self._append(EVENTS, json.dumps(as_json(entry), ensure_ascii=False, allow_nan=False))

    def metrics(self, step: int, **values: float) -> None:
        """Record metrics after `step` updates; non-finite values become null, listed in `nonfinite`."""
        entry: dict[str, Any] = {"step": step, "attempt": self.attempt, **values}
        nonfinite = [name for name, value in entry.items() if not math.isfinite(value)]
        if nonfinite:
            entry |= {name: None for name in nonfinite} | {"nonfinite": nonfinite}
        self._append(METRICS, json.dumps(entry, allow_nan=False))
        for logger in self.loggers:
            logger.metrics(entry)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Record a generated text and log it: the prompt, quoted, in the heading, its continuation below."""
        self.record_sample(step, prompt, text)
        self.log(f"sample after step {step}, prompt {prompt!r}:\n" + textwrap.indent(text, "    "))

    def record_sample(self, step: int, prompt: str, text: str) -> None:
        """Record a text sampled after `step` updates."""
        entry = {"step": step, "attempt": self.attempt, "prompt": prompt, "text": text}
        self._append(SAMPLES, json.dumps(entry, ensure_ascii=False))

    def rollout(self, step: int, **values: Any) -> None:
        """Record a response that was sampled in a step of reinforcement learning."""
        entry = {"step": step, "attempt": self.attempt, **values}
        self._append(ROLLOUTS, json.dumps(entry, ensure_ascii=False, allow_nan=False))

    def tried(self, step: int, **values: float) -> None:
        """Record a step of the learning-rate finder."""
        self._append(LR_FINDER, json.dumps({"step": step, **values}))

    def log(self, text: str = "") -> None:
        """Log a message to all loggers and to log.txt."""
        for logger in self.loggers:
            logger.message(text)
        self._append("log.txt", text)

    def close(self, seconds: float | None = None) -> None:
        """Close the loggers, each within `seconds` (None: its default), and release the lock."""
        while self.loggers:
            self.loggers.pop().close(seconds)
        self._lock.close()

    def checkpoint_path(self, step: int) -> Path:
        return checkpoint_path(self.folder, step)

    def _append(self, name: str, line: str) -> None:
        path = self.folder / name
        with self._tolerating(path):
            # ends a torn line first; if this write fails, the next one checks again
            is_torn = name in self._maybe_torn and _is_torn(path)
            self._maybe_torn.add(name)
            with files.open_output(path, "ab") as file:
                file.write(("\n" * is_torn + line + "\n").encode("utf-8"))
            self._maybe_torn.discard(name)

    @contextlib.contextmanager
    def _tolerating(self, path: Path) -> Iterator[None]:
        """With `tolerant`, log an error as a warning."""
        try:
            with files.writing(path):
                yield
        except files.WriteError as error:
            if not self.tolerant:
                raise
            for logger in self.loggers:
                logger.message(f"warning: {error}")


class ReadOnly(RunDir):
    """The run directory in processes of a job other than the main process, which do not write to it."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.checkpoints = self.folder / CHECKPOINTS
        self.loggers = []
        self.attempt = 1
        self.inbox = inbox.Inbox(self.folder)
        self.config = {}
        self._lock = contextlib.ExitStack()

    def write_config(self, options: dict[str, Any]) -> None:
        """Do nothing; the main process writes."""

    def _append(self, name: str, line: str) -> None:
        pass


# --------------------------------------------------------------------------------------------------
# Reading runs


def make_folder(name: str) -> Path:
    """Create a new folder under runs/, named by time and `name`."""
    stem = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{name}"
    for number in itertools.count(1):
        folder = RUNS / (stem if number == 1 else f"{stem}-{number}")
        with files.writing(folder), contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


@contextlib.contextmanager
def appearing(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Create `folder` atomically: yield a temporary folder, renamed at the end and removed after an error.

    Raises ValueError unless `folder` is new or empty.
    """
    path = Path(os.path.abspath(folder))
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"--out must be new or an empty folder, got {folder}; delete it or choose another")
    temporary = files.temporary(path)
    with files.writing(folder):
        temporary.mkdir(parents=True)
    try:
        yield temporary
        with files.writing(folder):
            if path.exists():
                path.rmdir()
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def newest_folder() -> Path:
    """The most recently written run under runs/ with a checkpoint."""
    folders = [config.parent for config in RUNS.glob("*/config.json") if checkpoints(config.parent)]
    if not folders:
        raise ValueError(f"{RUNS}/ must hold a run with a checkpoint, got none; train one first")
    return max(folders, key=lambda folder: max(file.stat().st_mtime_ns for file in folder.iterdir()))


def resolve(name: str | os.PathLike[str]) -> Path:
    """The run directory of `name`: a path, or `newest`."""
    return newest_folder() if str(name) == "newest" else Path(name)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The options in `folder` that are common to all training runs."""
    return {name: value for name, value in _read_config(folder).items() if name not in BESIDE_OPTIONS}


def load_options(folder: str | os.PathLike[str], defaults: C) -> C:
    """The options of the run in `folder`, to resume it.

    Raises ValueError if the run is of another program than `defaults`.
    """
    found = _read_config(folder)
    group = next((each.name for each in dataclasses.fields(defaults) if each.name in PROGRAM_OPTIONS), None)
    other = next((name for name in PROGRAM_OPTIONS if name in found and name != group), None)
    if other is not None:
        raise ValueError(f"{folder} is a run of {other}; use python -m llm_basics.{other} --resume {folder}")
    if group is not None and group not in found:
        raise ValueError(f"{folder} must be a run of {group}, but its config.json has no {group} options")
    kept = read_config(folder) | ({group: found[group]} if group is not None else {})
    return presets.update(defaults, kept, origin=f"{folder}/config.json")


def read_recorded(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The entries of config.json in BESIDE_OPTIONS, some of which old runs lack."""
    return {name: value for name, value in _read_config(folder).items() if name in BESIDE_OPTIONS}


def read_held_out(folder: str | os.PathLike[str]) -> dict[str, str] | None:
    """The identity of a run's held-out text: hashes of `text` and `tokenizer`; None if not recorded."""
    found = read_recorded(folder).get(HELD_OUT)
    return found if isinstance(found, dict) and found.keys() >= {"text", "tokenizer"} else None


def _read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"a run directory must hold config.json, got {folder}")
    options = files.read_json(path)
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold an object of options, got {type(options).__name__}")
    return options


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The metrics of a run, one entry per step: that of the last attempt.

    Skips lines that are not JSON, and metrics after a step from which a later attempt resumed. Raises
    ValueError for an invalid line.
    """
    return deduplicate_steps(lines.read(Path(folder) / METRICS, lines.check_metrics))


def deduplicate_steps(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are not replaced by a later attempt."""
    valid: dict[tuple[int, bool], dict[str, Any]] = {}
    for entry in entries:
        if "resumed" in entry:
            valid = {key: kept for key, kept in valid.items() if key[0] <= entry["step"]}
        else:
            valid[entry["step"], "val_loss" in entry] = entry
    return [valid[key] for key in sorted(valid)]


def read_samples(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The samples of a run, in order."""
    return list(lines.read(Path(folder) / SAMPLES, lines.check_sample))


def read_events(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events of a run, in the order of recording."""
    return list(lines.read(Path(folder) / EVENTS, lines.check_event))


def read_tried(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The measurements of the learning-rate finder, step by step."""
    return list(lines.read(Path(folder) / LR_FINDER, lines.check_metrics))


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted((Path(folder) / CHECKPOINTS).glob("step_*.safetensors"), reverse=True)


def checkpoint_path(folder: str | os.PathLike[str], step: int) -> Path:
    """Path of the checkpoint after `step` updates."""
    return Path(folder) / CHECKPOINTS / f"step_{step:08d}.safetensors"


def _is_torn(path: Path) -> bool:
    """Whether the last line of a file lacks its newline."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def as_json(value: Any) -> Any:
    """`value` with non-finite numbers as null, for JSON.

    >>> as_json({"loss": [1.5, math.nan]})
    {'loss': [1.5, None]}
    """
    if isinstance(value, dict):
        return {key: as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
