"""The run directory: where a training run writes all it knows, and all that reads a run looks.

    config.json         every option, resolved
    metrics.jsonl       one flat object a line, appended
    samples.jsonl       generated texts
    log.txt             what was said on the terminal
    tokenizer/          vocab.json, merges.txt
    checkpoints/        step_00000500.safetensors
    loss.png

Followers are told of everything that happens.
"""

import contextlib
import datetime
import itertools
import json
import math
import os
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_basics import followers

RUNS = Path("runs")


class Run:
    """A run directory that is being written."""

    def __init__(self, folder: str | os.PathLike[str], listeners: Sequence[followers.Follower] = ()) -> None:
        self.folder = Path(folder)
        self.followers = list(listeners)
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        _drop_torn_line(self.folder / "metrics.jsonl")

    def write_config(self, options: dict[str, Any]) -> None:
        """Store the options that the run was started with."""
        _write(self.folder / "config.json", json.dumps(options, indent=2) + "\n")

    def metrics(self, step: int, **values: float) -> None:
        """Record numbers measured after `step` updates. One that is not finite becomes null, and is named."""
        entry: dict[str, Any] = {"step": step, **values}
        nonfinite = [name for name, value in entry.items() if not math.isfinite(value)]
        if nonfinite:
            entry |= {name: None for name in nonfinite} | {"nonfinite": nonfinite}
        self._append("metrics.jsonl", entry)
        for follower in self.followers:
            follower.metrics(entry)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Record and show a text that the model wrote after `step` updates."""
        self._append("samples.jsonl", {"step": step, "prompt": prompt, "text": text})
        self.say(f"sample after step {step}:\n" + textwrap.indent(prompt + text, "    "))

    def say(self, text: str = "") -> None:
        """Tell people, on the terminal and in log.txt."""
        with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(text + "\n")
        for follower in self.followers:
            follower.message(text)

    def close(self) -> None:
        for follower in self.followers:
            follower.close()

    def checkpoint_path(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step_{step:08d}.safetensors"

    def _append(self, name: str, entry: dict[str, Any]) -> None:
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")


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


def newest_folder() -> Path:
    """The run under runs/ that was written to last, of those that have a checkpoint."""
    folders = [config.parent for config in RUNS.glob("*/config.json") if checkpoints(config.parent)]
    if not folders:
        raise ValueError(f"there must be a run with a checkpoint under {RUNS}/, got none; train one first")
    return max(folders, key=lambda folder: max(file.stat().st_mtime_ns for file in folder.iterdir()))


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The options of the run in `folder`."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"a run directory must hold config.json, got {folder}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON; {error}") from None


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl; after a resume, the last word on each step."""
    entries: dict[tuple[int, bool], dict[str, Any]] = {}
    with open(Path(folder) / "metrics.jsonl", encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                break  # being written, or torn when the run was killed
            entry = json.loads(line)
            entries[entry["step"], "val_loss" in entry] = entry
    return [entries[key] for key in sorted(entries)]


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted((Path(folder) / "checkpoints").glob("step_*.safetensors"), reverse=True)


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


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line that a killed run did not finish."""
    if path.exists():
        with open(path, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)
