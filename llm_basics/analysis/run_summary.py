"""Summary of a run directory, also while it is written: row in a list, details, checkpoints.

The files are untrusted, and may be torn or of another version: unreadable entries are skipped.
"""

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_basics.analysis import normal_loss
from llm_basics.cli import nested
from llm_basics.core import config, files, presets
from llm_basics.runs import checkpoint, run_dir, tail

# maximum number of values of a sparkline
SPARKLINE = 48


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A run as a row of a list."""

    name: str = ""
    config: str | None = None
    """Preset or file of options."""
    step: int = 0
    steps: int | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    """Seconds to the last step, while the run trains."""
    updated: float = 0.0
    """Time of the last metrics, in seconds since 1970."""
    sparkline: Sequence[float | None] = ()
    """Some of the training losses, oldest first."""
    has_checkpoint: bool = False
    has_metrics: bool = False


@dataclass(frozen=True, kw_only=True)
class Details:
    """Details of a run beside its row in a list."""

    folder: str
    is_chat: bool
    options: dict[str, Any]
    """Options by their names on the command line, as in `train.lr`."""
    origins: dict[str, Any]
    """Pieces of user code in use, and their file."""
    parameters: int | None
    """Number of trained weights."""
    flops_per_token: int | None
    """Floating-point operations per token of a training step."""
    tokens_per_step: int | None
    baselines: dict[str, float]
    """Baseline losses in nats: `unigram entropy`, `entropy rate`."""
    training_tokens: int | None
    """Tokens of the training text: an epoch."""
    normal: normal_loss.Band | None
    """The range of the training loss of most runs with these options."""


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a run after a step, with all that is needed to resume from it."""

    step: int
    val_loss: float | None
    n_bytes: int
    time: float
    is_latest: bool
    is_best: bool
    error: str | None = None
    """The error if it cannot be read."""


@dataclass(frozen=True)
class Difference:
    """An option that differs between runs, and its values."""

    option: str
    values: list[Any]


# --------------------------------------------------------------------------------------------------
# Options


def options(folder: Path) -> dict[str, Any]:
    """The options of a run, by their names on the command line."""
    with contextlib.suppress(ValueError, OSError):
        return tail.clean(nested.flat(run_dir.read_config(folder)))
    return {}


def shape(folder: Path) -> config.ModelConfig | None:
    """The model config of a run; None if this version cannot read it."""
    with contextlib.suppress(ValueError, OSError, TypeError):
        found = run_dir.read_config(folder).get("model")
        if isinstance(found, dict):
            return presets.update(config.ModelConfig(), found, "config.json")
    return None


def differences(folders: Sequence[Path]) -> list[Difference]:
    """The options that differ between these runs."""
    found = nested.differences(*map(options, folders))
    return [Difference(option, list(values)) for option, values in found.items()]


# --------------------------------------------------------------------------------------------------
# Summaries


def stamp(folder: Path) -> tuple[tuple[int, int] | None, ...]:
    """Sizes and times of the files that determine a summary, as the key of a cache."""
    return tuple(_stamp(folder / name) for name in (run_dir.METRICS, "config.json", run_dir.CHECKPOINTS))


def summarize(folder: Path) -> Summary:
    """A run as a row of a list, from a sample of its metrics, in constant time."""
    chosen = options(folder)
    entries = [e for e in tail.sample(folder / run_dir.METRICS, SPARKLINE) if _is_step(e.get("step"))]
    kept: list[dict[str, Any]] = []
    for entry in reversed(entries):  # without entries replaced by a resumed run
        if not kept or entry["step"] <= kept[-1]["step"]:
            kept.append(entry)
    kept.reverse()
    about = [_about(path) for path in run_dir.checkpoints(folder)]
    losses = [loss for a in about if isinstance(loss := a.get("val_loss"), int | float)]
    saved = [a["step"] for a in about if _is_step(a.get("step"))]
    trained = [entry for entry in kept if "train_loss" in entry]
    sparkline = [tail.clean(entry["train_loss"]) for entry in trained if _is_number(entry["train_loss"])]
    last = trained[-1] if trained else {}
    steps, preset = chosen.get("train.steps"), chosen.get("config")
    return Summary(
        name=tail.clean(folder.name),
        config=preset if isinstance(preset, str) else None,
        step=max([entry["step"] for entry in kept] + saved, default=0),
        steps=steps if _is_step(steps) else None,
        train_loss=_number(last.get("train_loss")),
        val_loss=next((_number(e["val_loss"]) for e in reversed(kept) if "val_loss" in e), None),
        best_val_loss=tail.clean(min(losses, default=None)),
        tokens_per_second=_number(last.get("tokens_per_second")),
        eta_seconds=_number(last.get("eta_seconds")),
        updated=_time(folder),
        sparkline=_thinned(sparkline),
        has_checkpoint=bool(about),
        has_metrics=bool(kept),
    )


def details(folder: Path) -> Details:
    """The details of a run."""
    model, chosen = shape(folder), options(folder)
    recorded = _recorded(folder)
    n_tokens, origins = recorded.get(run_dir.TRAINING_TOKENS), recorded.get(run_dir.ORIGINS)
    baselines = found if isinstance(found := recorded.get(run_dir.BASELINES), dict) else {}
    return Details(
        folder=tail.clean(str(folder)),
        is_chat="<|assistant|>" in tail.clean(_specials(folder)),
        options=chosen,
        origins=origins if isinstance(origins, dict) else {},
        parameters=None if model is None else model.n_parameters,
        flops_per_token=None if model is None else model.flops_per_token,
        tokens_per_step=_tokens_per_step(model, chosen),
        baselines={name: loss for name, loss in baselines.items() if isinstance(loss, int | float)},
        training_tokens=n_tokens if _is_step(n_tokens) else None,
        normal=normal_loss.of_run(chosen),
    )


def checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints of a run, newest first."""
    paths = run_dir.checkpoints(folder)
    best = checkpoint.best(folder / run_dir.CHECKPOINTS)
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            stat, about = path.stat(), _about(path)
            is_latest, is_best = path == paths[0], path == best
            step, loss = about.get("step", step_of(path)), _number(about.get("val_loss"))
            found.append(
                Checkpoint(step, loss, stat.st_size, stat.st_mtime, is_latest, is_best, about.get("error"))
            )
    return found


def find_checkpoint(folder: Path, which: str) -> Path | None:
    """The file of a checkpoint: `latest`, `best` or its step."""
    paths = run_dir.checkpoints(folder)
    if which == "latest":
        return next(iter(paths), None)
    if which == "best":
        return checkpoint.best(folder / run_dir.CHECKPOINTS)
    return next((path for path in paths if which.isdecimal() and step_of(path) == int(which)), None)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint; -1 without a step.

    >>> step_of(Path("checkpoints/step_00000500.safetensors"))
    500
    """
    digits = path.stem.removeprefix("step_")
    return int(digits) if re.fullmatch("[0-9]{1,18}", digits) else -1


def _tokens_per_step(model: config.ModelConfig | None, chosen: Mapping[str, Any]) -> int | None:
    sizes = [chosen.get(name) for name in ("train.batch_size", "train.grad_accumulation_steps")]
    if model is None or not all(_is_step(size) for size in sizes):
        return None
    return sizes[0] * sizes[1] * model.context_length  # type: ignore[operator]


def _about(path: Path) -> dict[str, Any]:
    try:
        about = checkpoint.read_about(path)
        return about if isinstance(about, dict) else {"error": f"{path.name} must hold an object"}
    except (ValueError, RecursionError, AttributeError, MemoryError, OverflowError) as error:
        return {"error": str(error)}


def _recorded(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(ValueError, OSError):
        return tail.clean(run_dir.read_recorded(folder))
    return {}


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
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    except OSError:
        return None


def _time(folder: Path) -> float:
    for name in (run_dir.METRICS, "config.json"):
        with contextlib.suppress(OSError):
            return (folder / name).stat().st_mtime
    return 0.0
