"""The catalogue checks itself. Alone: `uv run pytest tests/test_mistakes.py`.

Every mistake is plugged in, must be caught by the step in which it is made, and be given its own name.
"""

import itertools

import mistakes
import pytest
import wording
from mistakes import Mistake

MISTAKES = [(name, mistake) for name in mistakes.STEPS for mistake in mistakes.load(name).mistakes]
each_step = pytest.mark.parametrize("name", mistakes.STEPS)


@each_step
def test_the_reference_makes_no_mistake(name):
    verdict = mistakes.judge(mistakes.load(name), mistakes.own_adapters())
    assert verdict.status == "passed" and not verdict.missing, verdict


@pytest.mark.parametrize("name, mistake", MISTAKES, ids=[f"{n}: {m.name}" for n, m in MISTAKES])
def test_a_mistake_is_caught_where_it_is_made_and_named(name, mistake: Mistake):
    seen = mistakes.observations_of(name, mistake.name)
    verdict = mistakes.conclude(mistakes.load(name), dict(enumerate(seen)))
    assert verdict.status == "failed"
    assert verdict.sure and verdict.mistake is not None
    assert verdict.mistake.name == (mistake.same_as or mistake.name)
    lines = wording.message(verdict, "next hint").splitlines()
    assert len(lines) <= wording.MOST_LINES and max(map(len, lines)) <= wording.LINE + 2
    assert "Traceback" not in " ".join(lines)


@each_step
def test_no_two_mistakes_are_the_same_unless_the_catalogue_says_so(name):
    step = mistakes.load(name)
    for one, other in itertools.combinations(step.mistakes, 2):
        seen = zip(
            step.probes,
            mistakes.observations_of(name, one.name),
            mistakes.observations_of(name, other.name),
            strict=True,
        )
        same = all(mistakes.alike(*pair) for pair in seen)
        declared = (one.same_as or one.name) == (other.same_as or other.name)
        assert same == declared, f"{one.name} and {other.name}"


@each_step
def test_a_step_is_told_well(name):
    step = mistakes.load(name)
    assert step.name == name
    assert len({mistake.name for mistake in step.mistakes}) == len(step.mistakes)
    for mistake in step.mistakes:
        assert mistake.source
        assert 60 <= len(mistake.says) <= 330, f"{mistake.name}: {len(mistake.says)} letters"
    for probe in step.probes:
        assert len(probe.about) <= 80
