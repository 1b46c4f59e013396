"""Mistakes with a number, pairs of mistakes, other exceptions. Alone: `uv run pytest tests/test_families.py`.

Nothing tried here is in the catalogue as it stands: each must be named all the same, with its number.
"""

import pytest

from llm_basics import swap
from llm_basics.learn import judge, messages, probes, sockets

# of a step and a family: values that its grid does not have, as they must be stated
VALUES = {
    ("rms_norm", "epsilon fixed at a number"): ["3e-4", "0.07", "1.25e-6"],
    ("rms_norm", "factor on the output"): ["0.7", "-1.5", "1.05"],
    ("layer_norm", "epsilon fixed at a number"): ["3e-4", "0.07", "1.25e-6"],
    ("layer_norm", "factor on the output"): ["0.7", "-1.5", "1.05"],
    ("attention", "exponent of the scale"): ["0.3", "0.45", "0.9"],
    ("attention", "scale fixed at a number"): ["0.3", "0.07", "1.5"],
    ("attention", "masked with a number"): ["-3", "-7.5", "-0.3"],
    ("attention", "masked with a number but rows of zeros"): ["-3", "-7.5", "-0.3"],
    ("attention", "factor on the output"): ["0.7", "-1.5", "1.05"],
    ("rope", "theta fixed at a number"): ["2000", "50000", "640"],
    ("rope", "positions offset by a number"): ["2", "-1", "5"],
    ("rope", "factor on the output"): ["0.7", "-1.5", "1.05"],
    ("adamw", "epsilon fixed at a number"): ["3e-4", "0.07", "0.5"],
    ("adamw", "weight decay fixed at a number"): ["0.05", "0.3", "7e-3"],
    ("schedule", "floor fixed at a number"): ["0.4", "0.07", "1.5e-4"],
    ("schedule", "warm up of a fixed length"): ["2", "7", "3"],
    ("schedule", "steps offset by a number"): ["2", "-1", "-3"],
    ("schedule", "factor on the output"): ["0.7", "1.5", "0.9"],
    ("cross_entropy", "factor on the output"): ["1.3", "0.7", "0.9"],
    ("silu", "factor on the output"): ["0.7", "-1.5", "1.05"],
}
CASES = [(*key, value) for key, values in VALUES.items() for value in values]
# the first of each by default
MARKED = [
    pytest.param(*case, id=" ".join(case), marks=[] if case[2] == VALUES[case[:2]][0] else pytest.mark.slow)
    for case in CASES
]

# steps whose mistakes run in a second or two
QUICK = ("schedule", "multi_head")


def family_of(step: str, name: str) -> probes.Family:
    return next(family for family in judge.load(step).families if family.name == name)


def verdict_on(step: str, pieces: dict) -> judge.Verdict:
    with swap.replaced(pieces):
        return judge.judge(judge.load(step), sockets.own())


@pytest.mark.parametrize("step, name, value", MARKED)
def test_a_mistake_is_named_with_its_number(step, name, value):
    family = family_of(step, name)
    verdict = verdict_on(step, {family.piece: family.make(int(value) if family.is_whole else float(value))})
    assert verdict.status == "failed" and verdict.mistake is not None
    assert verdict.sure and verdict.mistake.name == name, verdict.mistake
    assert f" {value}" in verdict.mistake.explanation
    lines = messages.message(verdict, "next hint").splitlines()
    assert len(lines) <= messages.MAX_LINES and max(map(len, lines)) <= messages.LINE + 2


def test_a_number_that_the_probes_do_not_determine_is_not_stated():
    family = family_of("adamw", "epsilon fixed at a number")
    verdict = verdict_on("adamw", {family.piece: family.make(1.5e-6)})
    assert verdict.sure and verdict.mistake is not None
    assert verdict.mistake.explanation.startswith("Your epsilon is a fixed number")


def test_an_error_of_another_class_is_the_same_mistake():
    step = judge.load("schedule")
    made = next(m for m in step.mistakes if m.name == "division by no warm up")

    def wrong(*args, error=ValueError):
        try:
            return made.wrong(*args)
        except ZeroDivisionError:
            raise error("no warmup") from None

    verdict = verdict_on("schedule", {made.piece: wrong})
    assert verdict.sure and verdict.mistake is not None and verdict.mistake.name == made.name
    verdict = verdict_on("schedule", {made.piece: lambda *args: wrong(*args, error=NameError)})
    assert verdict.status == "failed" and verdict.mistake is None


@pytest.mark.parametrize("error", ["EinopsError", "AssertionError", "TypeError", "IndexError"])
@pytest.mark.parametrize(
    "name",
    [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in judge.STEPS],
)
def test_mistakes_that_raise_are_named_with_any_class_of_error(name, error):
    step = judge.load(name)
    for mistake in step.mistakes:
        seen = {i: judge.observation_of(name, mistake.name, i) for i in range(len(step.probes))}
        if not any("error" in each for each in seen.values()):
            continue
        changed = {
            i: each | {"error": f"{error}: {each['error']}"} if "error" in each else each
            for i, each in seen.items()
        }
        verdict = judge.conclude(step, changed)
        assert verdict.status == "failed"
        right = mistake.same_as or mistake.name
        assert (verdict.mistake.name if verdict.mistake and verdict.sure else right) == right, mistake.name
        if name in QUICK:
            assert verdict.sure and verdict.mistake is not None, mistake.name


def test_explanations_of_families_have_their_number_once():
    for step in judge.STEPS:
        for family in judge.load(step).families:
            assert family.explanation.count("{value}") == 1
            assert 60 <= len(family.explanation) <= 330, family.name
