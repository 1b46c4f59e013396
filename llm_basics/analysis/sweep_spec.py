"""Parses a sweep file into the training runs (trials) of the sweep.

base: shakespeare                  a preset, or options as in a file for --config
grid:                              every combination of these values
  train.lr: [1e-3, 3e-3]
  train.batch_size, train.steps: [[4, 2000], [16, 500]]    linked options
variants:                          named sets of options, each combined with the whole grid
  post-norm: {model.norm_placement: post}
seeds: [0, 1, 2]                   each combination is trained with each seed
figure: options                    loss over the changed options; or scaling: over parameters and compute
"""

import dataclasses
import itertools
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_basics.cli import nested
from llm_basics.core import config, files, presets

SWEEPS = presets.PRESETS / "sweeps"

KEYS = ("base", "grid", "variants", "seeds", "figure")
FIGURES = ("options", "scaling")

# options that the sweep sets for each trial
PER_TRIAL = ("run_dir", "resume", "find_lr")
RESERVED = ("config", *PER_TRIAL, "train.seed")

# key of the variant's name in the setting of a trial
VARIANT = "variant"


@dataclass(frozen=True)
class Trial:
    """One training run of a sweep."""

    name: str
    """Name of the run directory."""
    setting: dict[str, Any]
    """Changed options and their values, without the seed."""
    seed: int
    options: config.Config


@dataclass(frozen=True)
class Sweep:
    """The trials of a sweep in the order of training."""

    name: str
    trials: list[Trial]
    figure: str


# maximum number of characters of a run directory's name
LONGEST_NAME = 100

# the entry in a trial's setting, and the options to set
Choice = tuple[dict[str, Any], dict[str, Any]]


def load(name_or_path: str) -> Sweep:
    """Load the sweep of a preset or a YAML file. Raises ValueError with the file and the key.

    >>> [trial.name for trial in load("lr").trials][:2]
    ['lr=0.0003,optimizer=adamw,seed=0', 'lr=0.0003,optimizer=muon,seed=0']
    """
    path = presets.find(name_or_path, SWEEPS, "a sweep")
    return parse(presets.read_file(path), path.stem, str(path))


def parse(content: dict[str, Any], name: str, origin: str) -> Sweep:
    """The sweep described by the content of a file."""
    for key in content:
        if key not in KEYS:
            raise ValueError(f"unknown key {key} ({origin}); a sweep has {', '.join(KEYS)}")
    figure = content.get("figure", FIGURES[0])
    if figure not in FIGURES:
        raise ValueError(f"figure must be {' or '.join(FIGURES)}, got {figure!r} ({origin})")
    base = _base(content.get("base", {}), origin)
    axes = [_linked(key, values, origin) for key, values in _mapping(content, "grid", origin).items()]
    if "variants" in content:
        axes.append(_variants(content, origin))
    if not axes:
        raise ValueError(f"a sweep must have grid or variants, got none ({origin})")
    seeds = content.get("seeds", [base.train.seed])
    if not isinstance(seeds, list) or not seeds or len(set(map(repr, seeds))) < len(seeds):
        raise ValueError(f"seeds must be a list of distinct integers, got {seeds!r} ({origin})")
    trials: list[Trial] = []
    for choices in itertools.product(*axes):
        changed = {option: value for _, options in choices for option, value in options.items()}
        if taken := [name for name in changed if name in RESERVED]:
            raise ValueError(f"{taken[0]} is set by the sweep; remove it ({origin})")
        for seed in seeds:
            options = set_options(base, {**changed, "train.seed": seed}, origin)
            # values of the config, because YAML parses 1e-3 as text
            setting = {
                key: get_option(options, key) if value is None else value
                for setting, _ in choices
                for key, value in setting.items()
            }
            # a value listed twice is trained once
            if all((options, setting) != (trial.options, trial.setting) for trial in trials):
                trials.append(Trial(_name(setting, seed, trials), setting, options.train.seed, options))
    return Sweep(name, trials, figure)


# --------------------------------------------------------------------------------------------------
# Axes of the sweep


def _base(content: Any, origin: str) -> config.Config:
    if isinstance(content, str):
        content = {"config": content}
    if not isinstance(content, dict):
        raise ValueError(f"base must be a preset or a mapping of options, got {content!r} ({origin})")
    under = presets.load(content["config"]) if "config" in content else config.Config(config=origin)
    base = set_options(under, {key: value for key, value in content.items() if key != "config"}, origin)
    for name in PER_TRIAL:
        if getattr(base, name) != getattr(config.Config, name):
            raise ValueError(f"base: {name} is set by the sweep; remove it ({origin})")
    return base


def _linked(key: str, values: Any, origin: str) -> list[Choice]:
    """The values of an option, or of several linked options separated by commas."""
    options = [option.strip() for option in str(key).split(",")]
    if not isinstance(values, list) or not values:
        raise ValueError(f"grid: {key} must be a list of values, got {values!r} ({origin})")
    rows = values if len(options) > 1 else [[value] for value in values]
    for row in rows:
        if not isinstance(row, list) or len(row) != len(options):
            raise ValueError(
                f"grid: {key} must have {len(options)} values in each row, got {row!r} ({origin})"
            )
    # the first option identifies a row, unless two rows share its value
    is_clear = len({repr(row[0]) for row in rows}) == len(rows)
    shown = options[:1] if is_clear else options
    return [(dict.fromkeys(shown), dict(zip(options, row, strict=True))) for row in rows]


def _variants(content: dict[str, Any], origin: str) -> list[Choice]:
    variants = _mapping(content, "variants", origin)
    for name, options in variants.items():
        if not isinstance(options, dict):
            raise ValueError(f"variants: {name} must be a mapping of options, got {options!r} ({origin})")
    return [({VARIANT: str(name)}, options) for name, options in variants.items()]


def _mapping(content: dict[str, Any], key: str, origin: str) -> dict[str, Any]:
    found = content.get(key, {})
    if not isinstance(found, dict) or (key in content and not found):
        raise ValueError(f"{key} must map options to values, got {found!r} ({origin})")
    for option in found if key != "variants" else ():
        for name in map(str.strip, str(option).split(",")):
            if name in RESERVED:
                advice = "; use seeds" if name == "train.seed" else ""
                raise ValueError(f"{key}: {name} is set by the sweep{advice} ({origin})")
    return found


def _name(setting: dict[str, Any], seed: int, others: Sequence[Trial]) -> str:
    """A unique directory name from the setting and the seed."""
    words = [str(v) if k == VARIANT else f"{k.rpartition('.')[2]}={v}" for k, v in setting.items()]
    words = [re.sub(r"[^\w.=+-]+", "-", word).lstrip(".") for word in [*words, f"seed={seed}"]]
    taken = {trial.name for trial in others}
    return next(name for name in numbered(",".join(words)[-LONGEST_NAME:]) if name not in taken)


def numbered(name: str) -> Iterator[str]:
    """The name, then the name with the suffixes -2, -3, ..."""
    yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))


# --------------------------------------------------------------------------------------------------
# Options by their names


def set_options(base: config.Config, changed: dict[str, Any], origin: str) -> config.Config:
    """A copy of `base` with options set, by their names on the command line or nested.

    >>> set_options(config.Config(), {"train.lr": "1e-3"}, "here").train.lr
    0.001
    """
    return presets.update(base, nested.nest(changed), origin)


def get_option(options: config.Config, name: str) -> Any:
    """The value of the option `name`, as in `train.lr`."""
    return operator.attrgetter(name)(options)


def changed_options(options: config.Config) -> dict[str, Any]:
    """Options that differ from the defaults, by their names on the command line; not the preset's name.

    >>> changed_options(config.Config(data="a.txt", train=config.TrainConfig(lr=0.5)))
    {'data': 'a.txt', 'train.lr': 0.5}
    """
    defaults = config.Config(config=options.config)
    changed = nested.differences(dataclasses.asdict(defaults), dataclasses.asdict(options))
    return {name: value for name, (_, value) in changed.items()}


def write_options(options: config.Config, path: Path) -> None:
    """Write a file for --config."""
    files.write(path, nested.dump(nested.nest(changed_options(options))))
