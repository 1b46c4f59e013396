"""Exact answers of a chat model: greedy, one sample, best of n, and the majority of n samples.

An answer is correct if the whole reply is the expected one and ends. `any` is the share of questions with a
correct answer among the samples: an upper bound for any selection.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llm_basics.cli import commands
from llm_basics.core import generate
from llm_basics.core import model as models
from llm_basics.core import tokenizer as tokenizers
from llm_basics.data import chat_template, prepare, sft_dataset
from llm_basics.inference import selection, user_reward

HELD_OUT = "held_out"


@dataclass(frozen=True)
class Question:
    """A conversation up to its last reply, as ids; its last message, and the expected reply."""

    ids: list[int]
    question: str
    expected: str


@dataclass(frozen=True)
class Results:
    """Shares of correct answers; None for a method that was not selected.

    `sample` is the mean over all samples, `any` uses as many samples as the larger n.
    """

    n_questions: int
    greedy: float
    sample: float | None
    best_of: float | None
    majority: float | None
    any: float | None


def read(
    source: str, tokenizer: tokenizers.Tokenizer, context_length: int, prepared: Callable[[], Path]
) -> list[Question]:
    """The questions of a file of conversations, or of the held-out split in the folder `prepared`."""
    if not chat_template.is_chat(tokenizer):
        raise ValueError(
            "answers need a model fine-tuned on conversations, got one whose tokenizer has no <|user|>; "
            "fine-tune it first: uv run python -m llm_basics.sft --help"
        )
    if source == HELD_OUT:
        part = prepare.load(prepared()).val
        rows = sft_dataset.rows_of([part], tokenizer, context_length + 1).rows
    else:
        found = []
        for messages in chat_template.read_conversations(source):
            ids, mask = (np.array(each) for each in chat_template.render(tokenizer, messages))
            found.append(sft_dataset.truncate(sft_dataset.Example(ids, mask), tokenizer, context_length + 1))
        rows = [row for row in found if row is not None]
    if not rows:
        raise ValueError(f"answers must hold a conversation that fits into the context, got none in {source}")
    return [_question(row, tokenizer) for row in rows]


def _question(row: sft_dataset.Example, tokenizer: tokenizers.Tokenizer) -> Question:
    *earlier, start = np.flatnonzero(sft_dataset.message_starts(row.ids, tokenizer)).tolist()
    ids = row.ids.tolist()
    question = tokenizer.decode(ids[earlier[-1] + 1 : start - 1]) if earlier else ""
    expected = tokenizer.decode(ids[start + 1 :]).removesuffix(chat_template.END)
    return Question(ids[: start + 1], question, expected)


def evaluate(
    model: models.TransformerLM,
    tokenizer: tokenizers.Tokenizer,
    questions: Sequence[Question],
    options: commands.EvaluateConfig,
    reward: user_reward.UserReward | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Results:
    """Generate greedy answers and samples with distinct seeds; all selection methods use the same samples."""
    end, n = tokenizer.special_id(chat_template.END), options.n_candidates
    right: dict[str, list[float]] = {"greedy": [], "sample": [], "best_of": [], "majority": [], "any": []}
    for number, question in enumerate(questions):
        limit = model.config.context_length - len(question.ids)
        sampling = options.sampling(min(options.max_new_tokens, max(limit, 1)))
        prompt = torch.tensor(question.ids, device=model.token_embeddings.weight.device)
        ids = generate.generate(model, prompt, sampling.max_new_tokens, temperature=0.0, stop_id=end)
        reply = list(ids)
        is_right = tokenizer.decode(reply) == question.expected and len(reply) < sampling.max_new_tokens
        right["greedy"].append(is_right)
        if n:
            seeds = selection.seeds_of(sampling, n, number)
            found = selection.sample(model, tokenizer, prompt, seeds, sampling, end)
            exact = [each.is_finished and each.text == question.expected for each in found]
            right["sample"].append(sum(exact) / n)
            right["any"].append(any(exact))
            for name, choice in options.each_selection():
                some = found[: choice.n_candidates]
                kept = selection.choose(some, choice, reward, question.question, question.expected)
                right[name].append(exact[found.index(kept.candidate)])
        progress(number + 1)
    means = {name: float(np.mean(values)) if values else None for name, values in right.items()}
    return Results(len(questions), **means)  # type: ignore[arg-type]
