"""Small tasks with known answers, to test whether a stack of pieces can learn.

A task samples sequences of tokens and lists the positions of answers. Only answers are in the loss, so that
unpredictable tokens, such as the letters to be reversed, do not add noise.

    reverse      [BOS] c a t [SEP] t a c      attention to varying distances: needs positions
    invert       [BOS] c a t [SEP] x z g      attention to a fixed distance, and a mapping of letters
    copy         [BOS] c a t [SEP] c a t      attention to a fixed distance
    addition     [BOS] 5 9 [SEP] 1            a rule that generalizes to unseen pairs (here modulo 13)
    induction    c a t s t s c a              induction heads: two attention layers
    markov       a b b d a c b ...            a source with a known entropy rate, a lower bound of the loss
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from llm_basics.core import config

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")

Draw = Callable[[int, np.random.Generator], Int[np.ndarray, "n length"]]


@dataclass(frozen=True)
class Task:
    """A task: its sequences, and the model and options to learn it.

    Every sequence has `model.context_length` + 1 tokens: inputs omit the last, targets the first.
    """

    name: str
    about: str
    """The task and what it tests, in two sentences."""
    symbols: tuple[str, ...]
    """Token strings, by token id."""
    draw: Draw
    """Samples the given number of sequences."""
    answers: tuple[int, ...]
    """Positions of the answers in a sequence."""
    chance: float
    """Accuracy of guessing."""
    losses: dict[str, float]
    """Baseline losses in nats per answer, from the best possible model to guessing."""
    model: config.ModelConfig
    train: config.TrainConfig
    key: Callable[[list[int]], tuple[int, ...]] = field(default=tuple)
    """Sequences with the same key are held out together."""
    n_held_out: int = 500
    """Number of sequences for evaluation, never trained on."""
    needed: float = 1.0
    """Required fraction of exact ones."""
    source: "Source | None" = None
    """Source of the tokens, for a task with a known entropy rate instead of answers."""

    def show(self, row: list[int]) -> str:
        """A sequence as text with a `_` for each answer, and the answers on a second line."""
        words = [self.symbols[token] for token in row]
        if self.source is not None:
            return f"example   {' '.join(words)}"
        given = ["_" * len(word) if i in self.answers else word for i, word in enumerate(words)]
        expected = [word if i in self.answers else " " * len(word) for i, word in enumerate(words)]
        return f"input     {' '.join(given)}\nexpected  {' '.join(expected)}"


# --------------------------------------------------------------------------------------------------
# Sequences


def hold_out(task: Task, seed: int) -> Int[np.ndarray, "n length"]:
    """Distinct held-out sequences for evaluation."""
    rng = np.random.default_rng((seed, 0))
    rows: dict[tuple[int, ...], list[int]] = {}
    while len(rows) < task.n_held_out:
        for row in task.draw(task.n_held_out, rng).tolist():
            rows.setdefault(task.key(row), row)
    return np.array(list(rows.values()))[: task.n_held_out]


def fresh(
    task: Task, held_out: Int[np.ndarray, "n length"], seed: int
) -> Iterator[Int[np.ndarray, "batch length"]]:
    """Infinite batches of training sequences, without held-out ones."""
    rng = np.random.default_rng((seed, 1))
    excluded = {task.key(row) for row in held_out.tolist()}
    while True:
        drawn = task.draw(task.train.batch_size, rng)
        yield drawn[[task.key(row) not in excluded for row in drawn.tolist()]]


# --------------------------------------------------------------------------------------------------
# Answers determined by a prefix (prefix language modeling, arXiv 1910.10683)


def _prefix_task(
    name: str, about: str, steps: int, answer: Callable[[Int[np.ndarray, "n 9"]], Int[np.ndarray, "n 9"]]
) -> Task:
    """`[BOS] X [SEP] Y`: nine random letters X, and Y = answer(X)."""
    n, length = len(LETTERS), 9
    bos, sep = n, n + 1

    def draw(size: int, rng: np.random.Generator) -> Int[np.ndarray, "n length"]:
        x = rng.integers(0, n, (size, length))
        return np.hstack([np.full((size, 1), bos), x, np.full((size, 1), sep), answer(x)])

    return Task(
        name,
        about,
        (*LETTERS, "[BOS]", "[SEP]"),
        draw,
        answers=tuple(range(length + 2, 2 * length + 2)),
        chance=1 / n,
        losses={"all known": 0.0, "guessing (ln 26)": math.log(n)},
        model=config.ModelConfig(n + 2, 2 * length + 1, d_model=64, n_layers=2, n_heads=4),
        train=config.TrainConfig(steps=steps, batch_size=64, lr=3e-3, min_lr=0.0, warmup_steps=50),
    )


def reverse(seed: int) -> Task:
    """Write nine letters backwards."""
    about = (
        "Write nine letters backwards. Each answer is at a different distance from its letter, so attention "
        "must use positions."
    )
    return _prefix_task("reverse", about, 800, lambda x: x[:, ::-1])


def invert(seed: int) -> Task:
    """Map each of nine letters to its mirror in the alphabet: a to z, b to y, ..."""
    about = (
        "Map each of nine letters to its mirror in the alphabet: a to z, b to y, and so on. Attention must "
        "fetch each letter, and the weights must store the mapping."
    )
    return _prefix_task("invert", about, 300, lambda x: len(LETTERS) - 1 - x)


def copy(seed: int) -> Task:
    """Copy nine letters."""
    about = "Copy nine letters. Attention must fetch each from ten positions before."
    return _prefix_task("copy", about, 300, lambda x: x)


def addition(seed: int) -> Task:
    """`[BOS] a b [SEP] c`, c = (a + b) mod p, with held-out pairs (arXiv 2201.02177).

    b + a is held out with a + b, since it would leak the answer.
    """
    p = 31
    bos, sep = p, p + 1

    def draw(size: int, rng: np.random.Generator) -> Int[np.ndarray, "n length"]:
        a, b = rng.integers(0, p, (2, size))
        return np.stack([np.full(size, bos), a, b, np.full(size, sep), (a + b) % p], axis=1)

    return Task(
        "addition",
        f"Add two numbers modulo {p}. Held-out pairs are never trained on, so the model must find the rule "
        "instead of memorizing.",
        (*map(str, range(p)), "[BOS]", "[SEP]"),
        draw,
        answers=(4,),
        chance=1 / p,
        losses={"all known": 0.0, f"guessing (ln {p})": math.log(p)},
        model=config.ModelConfig(p + 2, 4, d_model=64, n_layers=1, n_heads=2, init="gpt2"),
        # a learning rate that decays to 0 settles the last few pairs
        train=config.TrainConfig(
            steps=2000, batch_size=256, lr=3e-3, min_lr=0.0, warmup_steps=50, weight_decay=2.0
        ),
        key=lambda row: tuple(sorted(row[1:3])),
        n_held_out=50,
    )


def induction(seed: int) -> Task:
    """Pairs of letters, then the same pairs in another order.

    This requires an induction head (arXiv 2209.11895): one layer attends to the previous token, the next to
    the position after an earlier occurrence of the current token.
    """
    n_pairs = 8
    half = 2 * n_pairs

    def draw(size: int, rng: np.random.Generator) -> Int[np.ndarray, "n length"]:
        letters = rng.permuted(np.tile(np.arange(len(LETTERS)), (size, 1)), axis=1)[:, :half]
        order = rng.permuted(np.tile(np.arange(n_pairs), (size, 1)), axis=1)
        pairs = letters.reshape(size, n_pairs, 2)
        again = np.take_along_axis(pairs, order[..., None], axis=1).reshape(size, half)
        return np.hstack([letters, again])

    return Task(
        "induction",
        f"{n_pairs} random pairs of letters are followed by the same pairs in another order; predict the "
        "second letter of each. Pairs are new in each sequence, so it takes an induction head (two layers).",
        LETTERS,
        draw,
        answers=tuple(range(half + 1, 2 * half, 2)),
        chance=1 / half,
        losses={"all known": 0.0, f"guessing (ln {half})": math.log(half)},
        model=config.ModelConfig(len(LETTERS), 2 * half - 1, d_model=64, n_layers=2, n_heads=4),
        train=config.TrainConfig(steps=800, batch_size=64, lr=3e-3, min_lr=0.0, warmup_steps=50),
        # retrieval by attention is not exact: about one answer in thousands is wrong
        needed=0.99,
    )


# --------------------------------------------------------------------------------------------------
# A source of known entropy


@dataclass(frozen=True)
class Source:
    """A Markov chain of order 1: `transitions[i, j]` is the probability that j follows i.

    >>> fair_coin = Source(np.full((2, 2), 0.5))
    >>> round(fair_coin.entropy_rate() / math.log(2), 6)
    1.0
    """

    transitions: Float[np.ndarray, "n n"]

    def stationary(self) -> Float[np.ndarray, " n"]:
        """The stationary distribution: `pi P = pi` and `sum(pi) = 1`."""
        n = len(self.transitions)
        equations = np.vstack([self.transitions.T - np.eye(n), np.ones(n)])
        return np.linalg.lstsq(equations, np.append(np.zeros(n), 1.0))[0]

    def entropy_rate(self) -> float:
        """The lowest loss that any model can reach: `-sum_i pi_i sum_j P_ij ln P_ij` (Shannon 1948)."""
        p = self.transitions
        logs = np.log(p, where=p > 0, out=np.zeros_like(p))
        return float(-(self.stationary() @ (p * logs).sum(axis=1)))

    def unigram_entropy(self) -> float:
        """The lowest loss of a model that ignores the context: `-sum pi ln pi`."""
        pi = self.stationary()
        return float(-(pi * np.log(pi)).sum())

    def best_accuracy(self) -> float:
        """Accuracy of always predicting the likeliest next token."""
        return float(self.stationary() @ self.transitions.max(axis=1))

    def surprisal(self, sequences: Int[np.ndarray, "n length"]) -> Float[np.ndarray, "n steps"]:
        """`-ln P` of each token but the first: the loss of the best possible model."""
        return -np.log(self.transitions[sequences[:, :-1], sequences[:, 1:]])

    def draw(self, size: int, length: int, rng: np.random.Generator) -> Int[np.ndarray, "size length"]:
        """Sequences whose first token is drawn from the stationary distribution."""
        ends = np.cumsum(self.transitions, axis=1)[:, :-1]
        tokens = np.empty((size, length), dtype=np.int64)
        tokens[:, 0] = rng.choice(len(ends), size, p=self.stationary())
        for i in range(1, length):
            tokens[:, i] = (rng.random((size, 1)) >= ends[tokens[:, i - 1]]).sum(axis=1)
        return tokens


def markov(seed: int) -> Task:
    """Predict a random Markov chain with 16 states."""
    n, length = 16, 65
    rng = np.random.default_rng((seed, 2))
    # a Dirichlet parameter below 1 makes a few transitions likely and most rare
    source = Source(rng.dirichlet(np.full(n, 0.3), size=n) * 0.99 + 0.01 / n)
    return Task(
        "markov",
        f"Predict a Markov chain over {n} letters: each letter depends on the previous one only. The lowest "
        "possible loss, the entropy rate, is known.",
        LETTERS[:n],
        lambda size, rng: source.draw(size, length, rng),
        answers=tuple(range(1, length)),
        chance=float(source.stationary().max()),
        losses={
            "entropy rate": source.entropy_rate(),
            "unigram entropy": source.unigram_entropy(),
            f"guessing (ln {n})": math.log(n),
        },
        model=config.ModelConfig(n, length - 1, d_model=64, n_layers=2, n_heads=4),
        train=config.TrainConfig(steps=400, batch_size=32, lr=3e-3, warmup_steps=50),
        source=source,
    )


TASKS: dict[str, Callable[[int], Task]] = {
    task.__name__: task for task in (reverse, invert, copy, addition, induction, markov)
}


def task_names(name: str) -> list[str]:
    """The tasks of a name, "all" included. Raises ValueError for an unknown name.

    >>> task_names("copy")
    ['copy']
    """
    if name != "all" and name not in TASKS:
        raise ValueError(f"task must be {', '.join(TASKS)} or all, got {name}")
    return list(TASKS) if name == "all" else [name]
