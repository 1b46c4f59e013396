"""Options of a training run as data: by name as arguments of `train`, and with their documentation."""

import ast
import dataclasses
import functools
import inspect
import itertools
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_basics.cli import nested
from llm_basics.core import config, presets

# options besides model.* and train.* that may be overridden by name; none of them is a path
OTHERS = ("fast", "deterministic", "val_fraction", "max_tokens", "on_bad_utf8", "tokenizer")
TOKENIZERS = ("bpe", "bytes", "gpt2")


def preset_names() -> list[str]:
    """The presets of `train`, the default first."""
    names = [path.stem for path in presets.PRESETS.glob("*.yaml") if path.stem not in ("sft", "rl", "dpo")]
    return sorted(names, key=lambda name: (name != config.Config.config, name))


def resolve(preset: str, changes: Mapping[str, Any]) -> config.Config:
    """The options of a preset with overrides by name. Raises ValueError for other options of `train`.

    >>> resolve("tiny", {"train.steps": 5}).train.steps
    5
    """
    if preset not in preset_names():
        raise ValueError(f"preset must be one of {', '.join(preset_names())}, got {preset!r}")
    for name in changes:
        if not name.startswith(("model.", "train.")) and name not in OTHERS:
            raise ValueError(
                f"an option must be of model, of train or one of {', '.join(OTHERS)}, got {name!r}"
            )
    if changes.get("tokenizer", "bpe") not in TOKENIZERS:
        raise ValueError(f"tokenizer must be one of {', '.join(TOKENIZERS)}, got {changes['tokenizer']!r}")
    return presets.update(presets.load(preset), nested.nest(dict(changes)), "the request")


def to_arguments(options: config.Config, names: Iterable[str]) -> list[str]:
    """The options `names` as arguments of `train`.

    >>> to_arguments(config.Config(), ["model.qk_norm", "train.betas", "train.lr"])
    ['--model.no-qk_norm', '--train.betas', '0.9', '0.95', '--train.lr=0.0003']
    """
    values = nested.flat(dataclasses.asdict(options))
    found = []
    for name in names:
        outer, _, inner = name.rpartition(".")
        prefix, value = f"--{outer}." if outer else "--", values[name]
        if isinstance(value, bool):
            found.append(f"{prefix}{'' if value else 'no-'}{inner}")
        elif isinstance(value, tuple):
            found += [prefix + inner, *map(str, value)]
        else:
            found.append(f"{prefix}{inner}={value}")
    return found


@dataclass(frozen=True)
class Option:
    """An option of a training run."""

    name: str
    type: str
    default: Any
    help: str


def all_options(others: Sequence[str] = OTHERS) -> list[Option]:
    """The options of model and train, and `others`, with their documentation."""
    found = [option for option in _options("", config.Config) if option.name in others]
    return [*found, *_options("model.", config.ModelConfig), *_options("train.", config.TrainConfig)]


@functools.cache
def _options(prefix: str, kind: Any) -> list[Option]:
    hints, docs = typing.get_type_hints(kind), field_docs(kind)
    found = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        shown = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        default = getattr(kind, field.name, None)
        found.append(Option(prefix + field.name, shown, default, docs.get(field.name, "")))
    return found


def field_docs(kind: type) -> dict[str, str]:
    """The documentation of each field of a class: the string literal after it."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    pairs = itertools.pairwise(definition.body)
    return {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in pairs
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(doc, ast.Expr)
        and isinstance(doc.value, ast.Constant)
        and isinstance(doc.value.value, str)
    }
