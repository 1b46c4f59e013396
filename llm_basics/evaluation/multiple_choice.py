"""Multiple-choice questions; the prediction is the choice with the highest log-probability.

A file has one JSON object per line:

    {"prompt": "The capital of France is", "choices": ["Lyon", "Paris"], "answer": 1}

Longer choices have lower probabilities, so each choice has two scores: the sum of the log-probabilities of
its tokens, and that sum per byte (`acc` and `acc_bytes` of lm-evaluation-harness).
"""

import io
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_basics.core import model as models
from llm_basics.core import tokenizer as tokenizers
from llm_basics.data import jsonl
from llm_basics.evaluation import log_likelihood


@dataclass(frozen=True)
class Question:
    """A prompt, its choices and the index of the correct one. `source` is its file and line."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    source: str = "a question"


@dataclass(frozen=True)
class Prediction:
    """The log-probability of each choice, the choices predicted from them, and the correct one."""

    log_probabilities: list[float]
    picked: int
    picked_per_byte: int
    answer: int


@dataclass(frozen=True)
class Results:
    """Accuracy and predictions over all questions.

    `chance` is the expected accuracy of random guessing, `standard_error` its standard error.
    """

    n_questions: int
    accuracy: float
    accuracy_per_byte: float
    chance: float
    standard_error: float
    questions: list[Prediction]


def read(path: str | os.PathLike[str]) -> list[Question]:
    """Read the questions of a file. Raises ValueError with the line number if one is invalid."""
    questions = []
    for source, fields in jsonl.read(path, io.BytesIO(Path(path).read_bytes())):
        try:
            questions.append(_question(fields, source))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
    if not questions:
        raise ValueError(f"{path} must hold one question per line, got none")
    return questions


def _question(fields: Any, source: str) -> Question:
    """Parse the JSON value of a line."""
    if not isinstance(fields, dict):
        raise ValueError(f"a question must be an object with fields, got {type(fields).__name__}")
    names = [name for name in ("prompt", "question") if name in fields]
    if len(names) != 1:
        raise ValueError(
            f"a question must have one of prompt and question, got {' and '.join(names) or 'none'}"
        )
    prompt = fields[names[0]]
    if not isinstance(prompt, str):
        raise ValueError(f"{names[0]} must be a string, got {prompt!r}")
    if missing := [name for name in ("choices", "answer") if name not in fields]:
        raise ValueError(f"a question must have {missing[0]}, got {', '.join(fields)}")
    options, answer = fields["choices"], fields["answer"]
    if not isinstance(options, list) or len(options) < 2:
        raise ValueError(f"choices must be a list of at least two strings, got {options!r}")
    if wrong := [option for option in options if not isinstance(option, str) or not option.strip()]:
        raise ValueError(f"choices must be non-empty strings, got {wrong[0]!r}")
    # not isinstance: bool is a subclass of int
    if type(answer) is not int or not 0 <= answer < len(options):
        raise ValueError(f"answer must be an index from 0 to {len(options) - 1}, got {answer!r}")
    return Question(prompt, tuple(options), answer, source)


def encode(
    tokenizer: tokenizers.Tokenizer, question: Question, delimiter: str = " "
) -> list[tuple[list[int], list[int]]]:
    """For each choice, the context tokens and the tokens to score.

    Prompt and choice are encoded together, since a token may span both. Such a token is scored, for every
    choice: the context is the token prefix that all choices share with the prompt, stripped of its trailing
    white space. For an empty prompt it is END_OF_TEXT.

    >>> question = Question("2 + 2 =", ("4", "five"), answer=0)
    >>> encode(tokenizers.Tokenizer.byte_level(), question)[0]
    ([50, 32, 43, 32, 50, 32, 61], [32, 52])
    """
    prompt = tokenizers.replace_surrogates(question.prompt)
    texts = []
    for choice in question.choices:
        has_space = prompt[-1:].isspace() or choice[:1].isspace() or not prompt
        texts.append(tokenizer.encode_ordinary(prompt + ("" if has_space else delimiter) + choice))
    columns = zip(tokenizer.encode_ordinary(prompt.rstrip()), *texts, strict=False)
    common = [ids[0] for ids in itertools.takewhile(lambda ids: len(set(ids)) == 1, columns)]
    before = common or [tokenizer.end_of_text_id]
    return [(before, text[len(common) :]) for text in texts]


def evaluate(
    model: models.TransformerLM,
    tokenizer: tokenizers.Tokenizer,
    questions: Sequence[Question],
    delimiter: str = " ",
    batch_size: int = log_likelihood.BATCH_SIZE,
) -> Results:
    """Predict the choice of each question; ties go to the first choice."""
    pairs, counts = [], []
    for question in questions:
        encoded = encode(tokenizer, question, delimiter)
        longest = max(len(scored) for _, scored in encoded)
        if longest > model.config.context_length:
            raise ValueError(
                f"a choice must have at most {model.config.context_length} tokens (the context), got "
                f"{longest} ({question.source})"
            )
        pairs += encoded
        counts.append(len(encoded))
    scores = iter(log_likelihood.score_continuations(model, pairs, batch_size))
    predictions = [
        _predict(question, [next(scores)[0] for _ in range(n)])
        for question, n in zip(questions, counts, strict=True)
    ]
    n_questions = len(predictions)
    chances = [1 / n for n in counts]
    return Results(
        n_questions,
        accuracy=sum(each.picked == each.answer for each in predictions) / n_questions,
        accuracy_per_byte=sum(each.picked_per_byte == each.answer for each in predictions) / n_questions,
        chance=sum(chances) / n_questions,
        standard_error=math.sqrt(sum(p * (1 - p) for p in chances)) / n_questions,
        questions=predictions,
    )


def _predict(question: Question, log_probabilities: list[float]) -> Prediction:
    per_byte = [
        score / len(tokenizers.replace_surrogates(choice).encode("utf-8"))
        for score, choice in zip(log_probabilities, question.choices, strict=True)
    ]
    return Prediction(
        log_probabilities,
        picked=log_probabilities.index(max(log_probabilities)),
        picked_per_byte=per_byte.index(max(per_byte)),
        answer=question.answer,
    )
