"""Small tasks whose right answers are known, to see whether a stack of pieces can learn.

A task draws sequences of tokens and says at which places a token is an answer. Only answers count in the
loss, so that what cannot be known, such as the letters to be reversed, does not blur it.

    reverse      [BOS] c a t [SEP] t a c      look as far back as it takes: attention and positions
    invert       [BOS] c a t [SEP] x z g      the same distance for all, and a letter for each letter
    copy         [BOS] c a t [SEP] c a t      the same distance for all
    addition     [BOS] 5 9 [SEP] 1            a rule that also holds for pairs never seen (here modulo 13)
    induction    c a t s t s c a              what came after this the last time? two layers in a row
    markov       a b b d a c b ...            a source whose entropy is known: no model can go below
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
    """What to learn, from what, and by which model.

    Every sequence is as long as `model.context_length` + 1: all but its last token go in, all but its first
    are to be predicted.
    """

    name: str
    """What the task is called."""
    about: str
    """What is to be done and what it shows, in two sentences."""
    symbols: tuple[str, ...]
    """How the tokens are written; a token's id is its place here."""
    draw: Draw
    """Makes so many sequences."""
    answers: tuple[int, ...]
    """The places of a sequence that hold answers."""
    chance: float
    """The share of answers that guessing gets right."""
    losses: dict[str, float]
    """Losses, in nats per answer, to compare with: of the best possible model first, of guessing last."""
    model: config.ModelConfig
    """The model that learns it."""
    train: config.TrainConfig
    """How it learns."""
    key: Callable[[list[int]], tuple[int, ...]] = field(default=tuple)
    """Sequences of the same key count as the same when some are held out."""
    n_held_out: int = 500
    """Sequences to judge by, which are never trained on."""
    needed: float = 1.0
    """The share of these that must be exact."""
    source: "Source | None" = None
    """Where the tokens come from, if there is no right answer but only a likeliest."""

    def show(self, row: list[int]) -> str:
        """A sequence as text, with a `_` for each answer, and below these the answers."""
        words = [self.symbols[token] for token in row]
        if self.source is not None:
            return f"example   {' '.join(words)}"
        given = ["_" * len(word) if i in self.answers else word for i, word in enumerate(words)]
        wanted = [word if i in self.answers else " " * len(word) for i, word in enumerate(words)]
        return f"given     {' '.join(given)}\nwanted    {' '.join(wanted)}"


# --------------------------------------------------------------------------------------------------
# Sequences


def hold_out(task: Task, seed: int) -> Int[np.ndarray, "n length"]:
    """Different sequences to judge by, drawn before any that are trained on."""
    rng = np.random.default_rng((seed, 0))
    rows: dict[tuple[int, ...], list[int]] = {}
    while len(rows) < task.n_held_out:
        for row in task.draw(task.n_held_out, rng).tolist():
            rows.setdefault(task.key(row), row)
    return np.array(list(rows.values()))[: task.n_held_out]


def fresh(
    task: Task, held_out: Int[np.ndarray, "n length"], seed: int
) -> Iterator[Int[np.ndarray, "batch length"]]:
    """Sequences to train on, a batch at a time without end; those held out are left out where drawn again."""
    rng = np.random.default_rng((seed, 1))
    kept_back = {task.key(row) for row in held_out.tolist()}
    while True:
        drawn = task.draw(task.train.batch_size, rng)
        yield drawn[[task.key(row) not in kept_back for row in drawn.tolist()]]


# --------------------------------------------------------------------------------------------------
# Answers that follow from a prefix (prefix language modelling, arXiv 1910.10683)


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
        "Write nine letters backwards. Each answer stands at another distance, which attention must find by "
        "position."
    )
    return _prefix_task("reverse", about, 800, lambda x: x[:, ::-1])


def invert(seed: int) -> Task:
    """Write for each of nine letters its mirror in the alphabet: a for z, b for y, ..."""
    about = (
        "Write for each of nine letters its mirror in the alphabet: z for a, y for b, and so on. Attention "
        "must bring each letter, and the weights must hold what becomes of it."
    )
    return _prefix_task("invert", about, 300, lambda x: len(LETTERS) - 1 - x)


def copy(seed: int) -> Task:
    """Write nine letters again."""
    about = "Write nine letters again. Attention must bring each from ten places before."
    return _prefix_task("copy", about, 300, lambda x: x)


def addition(seed: int) -> Task:
    """`[BOS] a b [SEP] c`, c = (a + b) mod p, with held-out pairs (arXiv 2201.02177).

    With a + b, b + a is held out too: it would give the answer away.
    """
    p = 31
    bos, sep = p, p + 1

    def draw(size: int, rng: np.random.Generator) -> Int[np.ndarray, "n length"]:
        a, b = rng.integers(0, p, (2, size))
        return np.stack([np.full(size, bos), a, b, np.full(size, sep), (a + b) % p], axis=1)

    return Task(
        "addition",
        f"Add two numbers modulo {p}. Some pairs are never trained on: to answer them, the model must find "
        "the rule, where learning by heart is of no use.",
        (*map(str, range(p)), "[BOS]", "[SEP]"),
        draw,
        answers=(4,),
        chance=1 / p,
        losses={"all known": 0.0, f"guessing (ln {p})": math.log(p)},
        model=config.ModelConfig(p + 2, 4, d_model=64, n_layers=1, n_heads=2, init="gpt2"),
        # a rate that goes down to 0 settles the last few pairs
        train=config.TrainConfig(
            steps=2000, batch_size=256, lr=3e-3, min_lr=0.0, warmup_steps=50, weight_decay=2.0
        ),
        key=lambda row: tuple(sorted(row[1:3])),
        n_held_out=50,
    )


def induction(seed: int) -> Task:
    """Pairs of letters, then the same pairs in another order: after A comes what came after it before.

    One layer finds what stood before each letter, the next looks for where that was the letter at hand: an
    induction head (arXiv 2209.11895).
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
        f"After {n_pairs} random pairs of letters the same pairs come in another order: after the first "
        "letter of a pair say its second. No weight can know it; two layers of attention must find it.",
        LETTERS,
        draw,
        answers=tuple(range(half + 1, 2 * half, 2)),
        chance=1 / half,
        losses={"all known": 0.0, f"guessing (ln {half})": math.log(half)},
        model=config.ModelConfig(len(LETTERS), 2 * half - 1, d_model=64, n_layers=2, n_heads=4),
        train=config.TrainConfig(steps=800, batch_size=64, lr=3e-3, min_lr=0.0, warmup_steps=50),
        # what was seen decides here, not a rule, and now and then one of thousands is mistaken for another
        needed=0.99,
    )


# --------------------------------------------------------------------------------------------------
# A source of known entropy


@dataclass(frozen=True)
class Source:
    """A Markov chain of order 1: `transitions[i, j]` is the probability that j comes after i.

    >>> fair_coin = Source(np.full((2, 2), 0.5))
    >>> round(fair_coin.entropy_rate() / math.log(2), 6)
    1.0
    """

    transitions: Float[np.ndarray, "n n"]

    def stationary(self) -> Float[np.ndarray, " n"]:
        """How often each token comes in the long run: `pi P = pi` and `sum(pi) = 1`."""
        n = len(self.transitions)
        equations = np.vstack([self.transitions.T - np.eye(n), np.ones(n)])
        return np.linalg.lstsq(equations, np.append(np.zeros(n), 1.0))[0]

    def entropy_rate(self) -> float:
        """The lowest loss that any model can reach: `-sum_i pi_i sum_j P_ij ln P_ij` (Shannon 1948)."""
        p = self.transitions
        logs = np.log(p, where=p > 0, out=np.zeros_like(p))
        return float(-(self.stationary() @ (p * logs).sum(axis=1)))

    def unigram_entropy(self) -> float:
        """The loss of a model that knows how often each token comes, and nothing else: `-sum pi ln pi`."""
        pi = self.stationary()
        return float(-(pi * np.log(pi)).sum())

    def best_accuracy(self) -> float:
        """How often the likeliest next token comes."""
        return float(self.stationary() @ self.transitions.max(axis=1))

    def surprisal(self, sequences: Int[np.ndarray, "n length"]) -> Float[np.ndarray, "n steps"]:
        """`-ln P` of each token but the first: what the loss of a model that knows the source would be."""
        return -np.log(self.transitions[sequences[:, :-1], sequences[:, 1:]])

    def draw(self, size: int, length: int, rng: np.random.Generator) -> Int[np.ndarray, "size length"]:
        """Sequences, begun anywhere in the long run of the source."""
        ends = np.cumsum(self.transitions, axis=1)[:, :-1]
        tokens = np.empty((size, length), dtype=np.int64)
        tokens[:, 0] = rng.choice(len(ends), size, p=self.stationary())
        for i in range(1, length):
            tokens[:, i] = (rng.random((size, 1)) >= ends[tokens[:, i - 1]]).sum(axis=1)
        return tokens


def markov(seed: int) -> Task:
    """Tokens of a random Markov chain of 16 states."""
    n, length = 16, 65
    rng = np.random.default_rng((seed, 2))
    # small parameters make some followers likely and most rare
    source = Source(rng.dirichlet(np.full(n, 0.3), size=n) * 0.99 + 0.01 / n)
    return Task(
        "markov",
        f"Predict a text of {n} letters, each drawn with a probability that depends on the letter before. So "
        "the lowest possible loss, the entropy rate, is known: a model comes close to it, but never below.",
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
    "reverse": reverse,
    "invert": invert,
    "copy": copy,
    "addition": addition,
    "induction": induction,
    "markov": markov,
}


def named(name: str) -> list[str]:
    """The tasks that a name stands for. Raises ValueError for one that is not known.

    >>> named("copy")
    ['copy']
    """
    if name != "all" and name not in TASKS:
        raise ValueError(f"the task must be {', '.join(TASKS)} or all, got {name}")
    return list(TASKS) if name == "all" else [name]


# --------------------------------------------------------------------------------------------------
# The options of `probe`, here where no torch is loaded
