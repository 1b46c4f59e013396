"""The lessons: idea, formula, shapes, three hints and a question per step, one YAML file each."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llm_basics.cli import parse

FOLDER = Path(__file__).parent / "lessons"

# in learning order: functions, modules composed of them, training; systems beneath a model; data;
# post-training
COURSES = {
    "basics": (
        "linear embedding softmax cross_entropy silu gelu relu2 swiglu rms_norm layer_norm rope attention "
        "multi_head block transformer adamw clipping schedule batches bpe tokenizer train_step evaluation "
        "sampling"
    ).split(),
    "systems": (
        "online_softmax flash_attention flash_triton activation_checkpointing ring_all_reduce "
        "data_parallel sharded_optimizer fsdp tensor_parallel"
    ).split(),
    "data": "masking gopher exact_lines minhash".split(),
    "alignment": (
        "response_log_probs rewards advantages policy_gradient grpo_step dpo distillation lora"
    ).split(),
}
ORDER = [step for steps in COURSES.values() for step in steps]


@dataclass(frozen=True)
class Question:
    """A result to predict before running a step; `answer` is the number of the correct option, from 1."""

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
    """Names of the pieces to implement, the most important first."""
    optional: list[str]
    """Pieces for which the reference may be used."""
    idea: str
    formula: str
    shapes: str
    paper: str
    worklog: str
    """Anchor of its entry in WORKLOG.md."""
    hints: list[str]
    predict: Question
    later: dict[str, str] = field(default_factory=dict)
    """Additions of a second stage of the step: parameters of the pieces, or options, with an explanation."""

    @property
    def needed(self) -> list[str]:
        """The pieces that must be implemented."""
        return [piece for piece in self.pieces if piece not in self.optional]


@functools.cache
def load(name: str) -> Lesson:
    """The lesson of a step. Raises ValueError for an unknown name."""
    if name not in ORDER:
        raise ValueError(parse.unknown_name("step", name, ORDER))
    fields: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    question = Question(**fields.pop("predict"))
    texts = {key: value.strip() for key, value in fields.items() if isinstance(value, str)}
    return Lesson(**{**fields, **texts, "name": name, "predict": question})


def course_of(step: str) -> str:
    """The course that a step belongs to."""
    return next(course for course, steps in COURSES.items() if step in steps)


def of_piece(name: str) -> str | None:
    """The step in which a piece is implemented, if any."""
    return next((step for step in ORDER if name in load(step).pieces), None)
