"""Synthetic question-answer pairs with checkable answers, to fine-tune a small model without a download.

Each kind is one operation on words or numbers. Held-out questions show whether a model has learned the
operation rather than the answers. `opposite` is different: that cold is the opposite of hot does not follow
from other pairs, so each pair has several phrasings.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

WORDS = tuple(
    """
    name value file line path list item key text data type object string number size index count
    result error state code call test module method function table order level mode field block
    group match point process thread message header buffer cache option command version default address
    server socket client request response user host port time date year month day hour minute second
    start stop begin end open close read write load save copy move add remove insert delete find search
    sort split join format parse print input output source target left right first last next old new
    long short small large red green blue black white tree node root leaf parent child edge map set pair
    head tail stack queue token word letter sign
    """.split()
)

OPPOSITES = """
    hot cold, big small, up down, left right, open closed, start stop, first last, new old, long short,
    high low, true false, yes no, in out, on off, more less, fast slow, begin end, read write, add remove,
    push pull, empty full, before after, above below, early late, inside outside, black white
    """

NUMBERS = range(20)

# maximum number of questions of a kind, and of new ones for training and testing
PER_KIND = 500
NEW_TRAIN, NEW_TEST = 1_000, 400


@dataclass(frozen=True)
class QAPair:
    """A question with its only correct answer."""

    kind: str
    question: str
    answer: str


Generator = Callable[[random.Random], tuple[str, str]]


def _three(rng: random.Random) -> list[str]:
    return rng.sample(WORDS, 3)


def _twice(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(WORDS)
    return f"Say {word} twice.", f"{word} {word}"


def _place(rng: random.Random) -> tuple[str, str]:
    words, index = _three(rng), rng.randrange(3)
    return f"What is the {('first', 'second', 'third')[index]} of {', '.join(words)}?", words[index]


def _reverse(rng: random.Random) -> tuple[str, str]:
    words = _three(rng)
    return f"Reverse the order of {', '.join(words)}.", ", ".join(reversed(words))


def _member(rng: random.Random) -> tuple[str, str]:
    words = _three(rng)
    word = rng.choice([rng.choice(words), rng.choice(WORDS)])
    return f"Is {word} one of {', '.join(words)}?", "yes" if word in words else "no"


def _count(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.randint(1, 6))
    return f"How many words are in: {' '.join(words)}?", str(len(words))


def _larger(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(range(100), 2)
    return f"Which is larger, {a} or {b}?", str(max(a, b))


def _plus(rng: random.Random) -> tuple[str, str]:
    a, b = rng.choice(NUMBERS), rng.choice(NUMBERS)
    return f"What is {a} plus {b}?", str(a + b)


def _call(rng: random.Random) -> tuple[str, str]:
    function, *arguments = rng.sample(WORDS, rng.randint(2, 3))
    return f"Call {function} with {' and '.join(arguments)}.", f"{function}({', '.join(arguments)})"


def _define(rng: random.Random) -> tuple[str, str]:
    function, argument, value = _three(rng)
    question = f"Define {function} of {argument} that returns {value}."
    return question, f"def {function}({argument}):\n    return {value}"


def _spell(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(WORDS)
    return f"Spell {word}.", " ".join(word)


def _opposite(rng: random.Random) -> tuple[str, str]:
    pairs = [pair.split() for pair in OPPOSITES.split(",")]
    word, other = rng.choice([*pairs, *(pair[::-1] for pair in pairs)])
    forms = (
        "What is the opposite of {}?",
        "Name the opposite of {}.",
        "Not {}, but?",
        "{} and its opposite?",
    )
    return rng.choice(forms).format(word), other


GENERATORS = _twice, _place, _reverse, _call, _define, _member, _count, _larger, _plus, _spell, _opposite
KINDS: dict[str, Generator] = {generator.__name__[1:]: generator for generator in GENERATORS}


def all_pairs() -> list[QAPair]:
    """All pairs, with distinct questions, kind by kind; deterministic.

    >>> next(pair for pair in all_pairs() if pair.kind == "plus")
    QAPair(kind='plus', question='What is 2 plus 10?', answer='12')
    """
    return [pair for kind in KINDS for pair in _of_kind(kind)]


def new_pairs(split: Literal["train", "test"] = "train") -> list[QAPair]:
    """Pairs whose questions are not in `all_pairs`; of some kinds there are none.

    >>> sorted({pair.kind for pair in all_pairs()} - {pair.kind for pair in new_pairs()})
    ['opposite', 'plus', 'spell', 'twice']
    """
    known = {pair.question for pair in all_pairs()}
    found: list[QAPair] = []
    for kind in KINDS:
        drawn = _of_kind(kind, NEW_TRAIN + NEW_TEST + PER_KIND, seed=f"new {kind}")
        new = [pair for pair in drawn if pair.question not in known][: NEW_TRAIN + NEW_TEST]
        found += new[:NEW_TRAIN] if split == "train" else new[NEW_TRAIN:]
    return found


def _of_kind(kind: str, most: int = PER_KIND, seed: str | None = None) -> list[QAPair]:
    rng = random.Random(seed or kind)
    found: dict[str, str] = {}
    # some kinds have fewer distinct questions
    for _ in range(20 * most):
        if len(found) < most:
            found.setdefault(*KINDS[kind](rng))
    return [QAPair(kind, question, answer) for question, answer in found.items()]
