"""What each step is about: an idea, a formula, shapes, three hints, a question. One YAML file each."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "lessons"

# in learning order: the pieces, what is composed of them, training
ORDER = (
    "linear embedding softmax cross_entropy silu gelu swiglu rms_norm layer_norm rope attention multi_head "
    "block transformer adamw clipping schedule batches bpe tokenizer train_step evaluation sampling"
).split()


@dataclass(frozen=True)
class Question:
    """Asked before the code of a step is run; `answer` is the number of the right option, from 1."""

    question: str
    options: list[str]
    answer: int
    why: str


@dataclass(frozen=True)
class Lesson:
    """One step of learning."""

    name: str
    title: str
    pieces: list[str]
    """What is to be written, the most important first."""
    optional: list[str]
    """Those of `pieces` that may be left to the reference."""
    idea: str
    formula: str
    shapes: str
    paper: str
    worklog: str
    """The anchor of its entry in WORKLOG.md."""
    hints: list[str]
    predict: Question

    @property
    def needed(self) -> list[str]:
        """The pieces without which the step is not done."""
        return [piece for piece in self.pieces if piece not in self.optional]


@functools.cache
def load(name: str) -> Lesson:
    """The lesson of a step. Raises ValueError for a name that is none."""
    if name not in ORDER:
        raise ValueError(f"a step must be one of {', '.join(ORDER)}; got {name}")
    fields: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    question = Question(**fields.pop("predict"))
    texts = {key: value.strip() for key, value in fields.items() if isinstance(value, str)}
    return Lesson(**{**fields, **texts, "name": name, "predict": question})


def of_piece(name: str) -> str | None:
    """The step in which a piece is written, if any."""
    return next((step for step in ORDER if name in load(step).pieces), None)


def field_names() -> set[str]:
    """What a file must have."""
    return {field.name for field in dataclasses.fields(Lesson)} - {"name"}
