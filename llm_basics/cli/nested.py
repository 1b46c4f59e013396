"""Options as nested dictionaries, as in YAML, and flat with the dotted names of the command line."""

from typing import Any

import yaml


def dump(options: dict[str, Any]) -> str:
    """Nested options as YAML, for --config."""
    return yaml.safe_dump(options, sort_keys=False)


def flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested options to the dotted names of the command line.

    >>> flat({"data": "a.txt", "train": {"lr": 1}})
    {'data': 'a.txt', 'train.lr': 1}
    """
    found: dict[str, Any] = {}
    for name, value in options.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def nest(options: dict[str, Any]) -> dict[str, Any]:
    """Nest options with dotted names, the inverse of `flat`; nested options are unchanged.

    >>> nest({"data": "a.txt", "train.lr": 1, "train": {"steps": 5}})
    {'data': 'a.txt', 'train': {'lr': 1, 'steps': 5}}
    """
    nested: dict[str, Any] = {}
    for name, value in options.items():
        outer, _, inner = str(name).partition(".")
        if inner:
            nested.setdefault(outer, {})[inner] = value
        elif isinstance(value, dict):
            nested.setdefault(outer, {}).update(value)
        else:
            nested[outer] = value
    return nested


def differences(*options: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Flattened options that differ between dictionaries, with the value in each; None if missing.

    >>> differences({"train": {"lr": 1, "steps": 5}}, {"train": {"lr": 2, "steps": 5}})
    {'train.lr': (1, 2)}
    """
    flattened = [flat(each) for each in options]
    values = {name: tuple(each.get(name) for each in flattened) for each in flattened for name in each}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}
