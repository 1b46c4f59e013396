"""Presets and YAML files of options, which override the defaults of `config`."""

import contextlib
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from llm_basics.core import config, files, option_types

PRESETS = Path(__file__).parents[1] / "configs"

# removed options, with the only value allowed in a stored config
REMOVED = {"model.value_embeddings": False, "model.x0_skips": False, "model.logit_softcap": None}

T = TypeVar("T")


def load(name_or_path: str) -> config.Config:
    """The config of a preset (`tiny`) or of a YAML file. Raises ValueError, naming the file and the key.

    >>> load("gpt2-small").model.n_heads
    12
    """
    return update(config.Config(), read_yaml(name_or_path), origin=name_or_path)


def read_yaml(name_or_path: str) -> dict[str, Any]:
    """The options that a preset or YAML file sets, as nested dictionaries."""
    return {"config": name_or_path, **read_file(find(name_or_path, PRESETS, "--config"))}


def find(name_or_path: str, folder: Path, what: str) -> Path:
    """The YAML file of a preset in `folder`, or of a path; `what` is the option, for errors."""
    path = folder / f"{name_or_path}.yaml"
    if not path.exists():
        path = Path(name_or_path)
    if not path.is_file():
        presets = ", ".join(sorted(preset.stem for preset in folder.glob("*.yaml")))
        raise ValueError(f"{what} must be a preset ({presets}) or a YAML file, got {name_or_path}")
    return path


def read_file(path: Path) -> dict[str, Any]:
    """The options in a YAML file of `option: value` lines."""
    text = files.read_text(path)
    try:
        options = yaml.safe_load(text) or {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        assert mark is not None, "errors in text have a mark"
        raise ValueError(
            f"{path}:{mark.line + 1} must be YAML; {error.problem} in column {mark.column + 1}"
        ) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position].split("\n")
        raise ValueError(
            f"{path}:{len(before)} must be YAML; {error.reason} in column {len(before[-1]) + 1}"
        ) from None
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold `option: value` lines, got {type(options).__name__}")
    return options


def update(base: T, options: dict[str, Any], origin: str, prefix: str = "") -> T:
    """A copy of `base` with `options` set; nested dictionaries update nested configs.

    Removed options are dropped if they were off, as in the config of an old run.

    >>> update(config.Config(), {"model": {"n_layers": 2}}, origin="here").model.n_layers
    2
    """
    hints = option_types.declared(type(base))  # type: ignore[arg-type]
    fields = {field.name: field for field in _fields(base)}
    values: dict[str, Any] = {}
    for name, value in options.items():
        if (full_name := f"{prefix}{name}") in REMOVED:
            if value != REMOVED[full_name]:
                raise ValueError(
                    f"{full_name} must be {REMOVED[full_name]}, got {value!r} ({origin}); this version has "
                    "no such option: use the version that trained the run"
                )
        elif name not in hints:
            inner = [f"{outer}.{f.name}" for outer, hint in hints.items() for f in _fields(hint)]
            raise ValueError(unknown_option(full_name, [prefix + n for n in [*hints, *inner]], origin))
        elif isinstance(value, str) and value in (retired := fields[name].metadata.get("retired", {})):
            print(
                f"{full_name} {value} ({origin}) no longer exists: loaded as {retired[value]}",
                file=sys.stderr,
            )
            values[name] = retired[value]
        elif dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise ValueError(f"{full_name} must be a mapping of options, got {value!r} ({origin})")
            values[name] = update(getattr(base, name), value, origin, f"{full_name}.")
        else:
            values[name] = _converted(value, hints[name])
            if wrong := option_types.fault(values[name], hints[name]):
                raise ValueError(f"{full_name} must be {wrong}, got {value!r} ({origin})")
    try:
        return dataclasses.replace(base, **values)  # type: ignore[type-var]
    except ValueError as error:
        raise ValueError(f"{error} ({origin})") from None


def _fields(hint: Any) -> tuple[Any, ...]:
    return dataclasses.fields(hint) if dataclasses.is_dataclass(hint) else ()


def _converted(value: Any, hint: Any) -> Any:
    """A value of a YAML file converted to type `hint` if possible: YAML parses 1e-3 as text, on as true."""
    while typing.get_origin(hint) in (typing.Annotated, typing.Union, types.UnionType):
        hint = typing.get_args(hint)[0]
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal and isinstance(value, bool):
        return "on" if value else "off"
    if kind is tuple and isinstance(value, list | tuple) and len(value) == len(arguments):
        return tuple(map(_converted, value, arguments))
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    return value


def unknown_option(name: str, known: Sequence[str], origin: str) -> str:
    """The error message for an unknown option, with the closest known one."""
    # compare without dashes, and with the last part alone: lr may mean train.lr
    full_name = {option.rpartition(".")[2].lstrip("-"): option for option in known}
    full_name |= {option.lstrip("-"): option for option in known}
    near = difflib.get_close_matches(name.lstrip("-"), full_name, n=1)
    return f"unknown option {name} ({origin}); " + (
        f"the closest is {full_name[near[0]]}" if near else "--help lists all"
    )
