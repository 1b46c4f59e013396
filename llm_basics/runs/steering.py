"""Changes of options during training: steerable options, requests, and recorded changes.

A change is recorded in events.jsonl, as `"changed": {"train.lr": [0.003, 0.001]}` of an event after the step
where it took effect. These events determine the options at any step, for resuming and for `train --replay`.
"""

import contextlib
import functools
import os
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from llm_basics.core import config, presets
from llm_basics.runs import inbox, locks, run_dir

_EVERY = "log_every eval_every eval_batches sample_every checkpoint_every keep_checkpoints"
STEERABLE = tuple(f"train.{name}" for name in f"lr min_lr max_grad_norm {_EVERY}".split())

# actions that run once; stop also saves a checkpoint
ACTIONS = ("evaluate", "sample", "save", "stop")

# options whose change on a resume can be replayed in one process; others affect data or optimizer at setup
_ON_RESUME = (
    "steps warmup_steps schedule decay_fraction sample_tokens sample_prompt on_nonfinite on_save_error"
)
REPLAYABLE = {*STEERABLE, *(f"train.{name}" for name in _ON_RESUME.split())}

# polling interval for the response
POLL_SECONDS = 0.1


# --------------------------------------------------------------------------------------------------
# Commands


def parse(words: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """The values and the actions of a command line.

    >>> parse(["train.lr=1e-3", "train.eval_every=50", "save"])
    ({'train.lr': '1e-3', 'train.eval_every': 50}, ['save'])
    """
    values: dict[str, Any] = {}
    actions: list[str] = []
    for word in words:
        name, is_value, text = word.partition("=")
        if is_value:
            with contextlib.suppress(yaml.YAMLError):
                values[name] = yaml.safe_load(text)
            if not isinstance(values.get(name, ()), int | float | str | None):
                raise ValueError(f"{name} must be a number, got {text!r} (command line)")
        else:
            actions.append(word)
    return values, actions


def check(values: object, actions: object) -> None:
    """Raise ValueError unless all values and actions are valid for a command."""
    if not isinstance(values, dict) or not isinstance(actions, list) or not (values or actions):
        raise ValueError(
            f"a command must set an option (train.lr=1e-3) or name an action ({', '.join(ACTIONS)}), got none"
        )
    for name in values:
        if name not in STEERABLE:
            raise ValueError(
                f"{name} cannot be changed while a run trains; these can: {', '.join(STEERABLE)}"
            )
    for action in actions:
        if action not in ACTIONS:
            raise ValueError(f"an action must be one of {', '.join(ACTIONS)}, got {action}")


def send(folder: str | os.PathLike[str], values: Mapping[str, Any], actions: Sequence[str] = ()) -> str:
    """Request changes and actions from the training run in `folder`. Returns the id of the command.

    Raises ValueError for an invalid command, or if the run is not training.
    """
    check(dict(values), list(actions))
    if locks.owner(folder) is None:
        raise ValueError(
            f"a run must be training to be steered, got {folder}; resume it with --resume {folder} and the "
            "changed options"
        )
    command_id = uuid.uuid4().hex[:12]
    inbox.send(folder, {"id": command_id, "set": dict(values), "do": list(actions)})
    return command_id


def answer(folder: str | os.PathLike[str], command_id: str, seconds: float) -> dict[str, Any] | None:
    """Wait for the response to a command: an event `steered` or `refused`, the latter with a `reason`.

    None after a timeout of `seconds`. Raises ValueError if the run ends without a response.
    """
    end = time.monotonic() + seconds
    while True:
        is_training = locks.owner(folder) is not None
        for event in run_dir.read_events(folder):
            if event.get("id") == command_id:
                return event
        if not is_training:
            raise ValueError(f"{folder} ended before it read the command; nothing was changed")
        if time.monotonic() >= end:
            return None
        time.sleep(POLL_SECONDS)


# --------------------------------------------------------------------------------------------------
# Changes


@dataclass(frozen=True)
class Change:
    """An option `name` that changed after `step` updates."""

    step: int
    name: str
    was: Any
    value: Any


def read_changes(folder: str | os.PathLike[str]) -> list[Change]:
    """The recorded changes of a run by step, without those replaced by a later attempt."""
    kept: list[Change] = []
    for event in run_dir.read_events(folder):
        try:
            step = int(event["step"])
            for name, (was, value) in event.get("changed", {}).items():
                kept = [change for change in kept if change.name != name or change.step <= step]
                kept.append(Change(step, name, was, value))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(
                f"{folder}/{run_dir.EVENTS} must hold events with step and changed, got {event}"
            ) from None
    return sorted(kept, key=lambda change: change.step)


def describe(event: Mapping[str, Any]) -> str:
    """The changes and actions of an event as text.

    >>> describe({"changed": {"train.lr": [0.003, 0.001]}, "do": ["save"]})
    'train.lr 0.003 -> 0.001, save'
    """
    changed = [f"{name} {was} -> {value}" for name, (was, value) in event["changed"].items()]
    return ", ".join([*changed, *event.get("do", [])]) or "no change, the values are in effect already"


def value_of(options: config.Config, name: str) -> Any:
    """The value of the option with a dotted name."""
    return functools.reduce(getattr, name.split("."), options)


def with_values(options: config.Config, values: Mapping[str, Any], origin: str) -> config.Config:
    """`options` with values by dotted names, validated as at the start of a run.

    >>> with_values(config.Config(), {"train.lr": "1e-2"}, "here").train.lr
    0.01
    """
    nested: dict[str, Any] = {}
    for name, value in values.items():
        outer, _, inner = name.rpartition(".")
        (nested.setdefault(outer, {}) if outer else nested)[inner] = value
    return presets.update(options, nested, origin)


def at_step(options: config.Config, changes: Iterable[Change], step: int) -> config.Config:
    """The options in effect after `step` updates."""
    values: dict[str, Any] = {}
    for change in changes:
        if change.step <= step:
            values[change.name] = change.value
        else:
            values.setdefault(change.name, change.was)
    return with_values(options, values, run_dir.EVENTS)


def original(options: config.Config, folder: str | os.PathLike[str]) -> config.Config:
    """The initial options of the run in `folder`; `options` are its current ones.

    Raises ValueError if a change on a resume cannot be repeated by `train --replay`.
    """
    changes = read_changes(folder)
    for change in changes:
        if change.name not in REPLAYABLE:
            raise ValueError(
                f"--replay needs a run whose changes can be repeated, but {folder} was resumed after step "
                f"{change.step} with {change.name} {change.value} instead of {change.was}"
            )
    return at_step(options, changes, -1)
