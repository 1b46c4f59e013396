"""Inference-time scaling: selects one of several samples of a prompt.

Best of n keeps the sample with the highest mean log-probability per token, or the highest reward (arXiv
2110.14168 with a trained verifier). Self-consistency keeps the most frequent answer (arXiv 2203.11171).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from llm_basics import swap
from llm_basics.cli import generation_options
from llm_basics.core import generate as core_generate
from llm_basics.core import model as models
from llm_basics.core import tokenizer as tokenizers
from llm_basics.inference import engine, user_reward

# maximum samples per batch: their key-value caches must fit into memory
BATCH_SIZE = 16


@dataclass(frozen=True)
class Candidate:
    """A sample of a prompt.

    `mean_log_probability` is per token, including the stop token, in the model's distribution before
    temperature and truncation. `is_finished`: not truncated by the maximum length.
    """

    text: str
    seed: int
    mean_log_probability: float
    is_finished: bool


@dataclass(frozen=True)
class Choice:
    """The selected candidate, and the figures of the selection: `best_of` n with its score, or `majority`."""

    candidate: Candidate
    figures: dict[str, int | float]

    def __str__(self) -> str:
        figures = ", ".join(
            f"{name.replace('_', ' ')} {value}"
            if isinstance(value, int)
            else f"{name.replace('_', ' ')} {value:.4g}"
            for name, value in self.figures.items()
        )
        return f"{figures}, seed {self.candidate.seed}"


def highest(scores: Sequence[float]) -> int:
    """Index of the highest score; the first of equal ones.

    >>> highest([0.5, 2.0, 2.0])
    1
    """
    return max(range(len(scores)), key=lambda i: scores[i])


def majority(answers: Sequence[str]) -> tuple[int, float]:
    """Index of the first of the most frequent answers, and their share. Outer spaces are ignored.

    Ties are resolved in favor of the earliest answer.

    >>> majority(["6", "8", " 8"])
    (1, 0.6666666666666666)
    """
    counts = Counter(answer.strip() for answer in answers)
    ((answer, count),) = counts.most_common(1)
    return next(i for i, other in enumerate(answers) if other.strip() == answer), count / len(answers)


def choose(
    candidates: Sequence[Candidate],
    options: generation_options.SelectionOptions,
    reward: user_reward.UserReward | None = None,
    prompt: str = "",
    expected: str | None = None,
) -> Choice:
    """The candidate selected by `options.best_of` or `options.majority`.

    `reward`, if any, is called with the prompt and the expected answer.
    """
    if options.majority is not None:
        index, share = majority([each.text for each in candidates])
        return Choice(candidates[index], {"majority": len(candidates), "share": share})
    name = "mean_log_probability" if reward is None else "reward"
    scores = [
        each.mean_log_probability if reward is None else reward(prompt, each.text, expected)
        for each in candidates
    ]
    index = highest(scores)
    return Choice(candidates[index], {"best_of": len(candidates), name: scores[index]})


def load_reward(options: generation_options.SelectionOptions) -> user_reward.UserReward | None:
    """The function of `options.reward`, if there is one."""
    return None if options.reward is None else user_reward.load(options.reward)


def sample(
    model: models.TransformerLM,
    tokenizer: tokenizers.Tokenizer,
    prompt: Int[Tensor, " seq"],
    seeds: Sequence[int],
    options: generation_options.SamplingOptions,
    stop_id: int,
    stops: Sequence[str] = (),
    adjust: core_generate.LogitsFunction | None = None,
) -> list[Candidate]:
    """A sample of the prompt for each seed, in batches; each text is that of `generate` with its seed."""
    if "generate.generate" in (pieces := swap.user_pieces()):
        raise ValueError(
            "several samples are generated as a batch, but generate is of your "
            f"{pieces['generate.generate']}, which continues one prompt at a time; omit --best_of and "
            "--majority, or remove generate from the file"
        )
    found: list[Candidate] = []
    for start in range(0, len(seeds), BATCH_SIZE):
        some = seeds[start : start + BATCH_SIZE]
        log_probabilities: list[list[float]] = [[] for _ in some]
        texts = engine.continue_batch(
            model,
            tokenizer,
            [prompt] * len(some),
            some,
            options,
            stop_id,
            stops,
            adjust,
            record=lambda i, value, kept=log_probabilities: kept[i].append(value),  # type: ignore[misc]
        )
        for seed, (text, is_finished), values in zip(some, texts, log_probabilities, strict=True):
            mean = sum(values) / max(len(values), 1)
            found.append(Candidate(text, seed, mean, is_finished))
    return found


def seeds_of(options: generation_options.SamplingOptions, n: int, number: int = 0) -> list[int]:
    """The seeds of the `n` candidates of text `number`: all different, and for the first text equal to those
    of `n` separate samples.

    >>> seeds_of(generation_options.SamplingOptions(seed=5), n=3, number=1)
    [8, 9, 10]
    """
    first = options.seed + number * n
    return list(range(first, first + n))


def as_fields(choice: Choice) -> dict[str, int | float | str]:
    """The fields of a choice in a JSON line."""
    return {"seed": choice.candidate.seed, "text": choice.candidate.text, **choice.figures}
