"""The entries of the course in WORKLOG.md, and docs/course.py. Alone: `uv run pytest tests/test_course.py`.

What a check says of each mistake is compared for a few steps by default, for all with
`-m "slow or not slow"`.
"""

import dataclasses
import doctest
import importlib.util
import re
from types import ModuleType

import documents
import pytest

from llm_basics.learn import judge, lessons

TEXT = documents.WORKLOG.read_text(encoding="utf-8")
QUICK = ("softmax", "rms_norm", "clipping", "schedule", "bpe", "online_softmax", "rewards", "advantages")


def load_course() -> ModuleType:
    """The program docs/course.py as a module."""
    spec = importlib.util.spec_from_file_location("course", documents.ROOT / "docs" / "course.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


course = load_course()
NUMBERS = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?")
HEADINGS = re.findall(r"^#### (Step \d+\w?: .+)$", TEXT, re.M)
MARKED = dict(re.findall(r"^#### (Step .+)\n\n<!-- lesson: (\w+); mistake: .+ -->$", TEXT, re.M))


def test_the_entries_are_those_of_the_lessons():
    assert course.filled(TEXT) == TEXT, "out of date; write it: uv run python docs/course.py"


def test_each_lesson_has_an_entry_with_its_anchor():
    found = {step: heading for heading, step in MARKED.items()}
    for name in lessons.ORDER:
        lesson = lessons.load(name)
        assert name in found, f"WORKLOG.md has no entry with <!-- lesson: {name}; mistake: ... -->"
        assert found[name].endswith(f": {lesson.title}"), f"the heading of {name} is the lesson's title"
        assert lesson.worklog == course.slug(found[name]) == documents.slug(found[name])


def test_no_number_is_given_twice():
    numbers = [heading.split(":")[0] for heading in HEADINGS]
    assert len(numbers) == len(set(numbers)) > 40
    assert len(numbers) == len(documents.worklog_entries(TEXT)), (
        "each entry has a heading: #### Step N: title"
    )


def test_lines_are_short():
    long = [line for line in TEXT.splitlines() if len(line) > course.WIDTH and not line.startswith("|")]
    assert not long


def test_a_change_of_a_lesson_changes_its_entry(monkeypatch):
    heading = next(heading for heading, step in MARKED.items() if step == "silu")
    idea = "One. Two. Three. Four. Make sure of five."
    changed, right = dataclasses.replace(lessons.load("silu"), idea=idea), lessons.load
    monkeypatch.setattr(lessons, "load", lambda name: changed if name == "silu" else right(name))
    after = course.filled(TEXT)
    entry = after.partition(f"#### {heading}\n")[2].partition("\n---\n")[0]
    assert "*   One. Two.\n" in entry and "*   **Why:** Three. Four. Make sure of five.\n" in entry
    before = TEXT.partition(f"#### {heading}\n")[2].partition("\n---\n")[0]
    by_hand = [course.by_hand(part) for part in course.SECTIONS.split(before)[1:]]
    assert by_hand and all(item in entry for part in by_hand[5::2] for item in part)


@pytest.mark.parametrize(
    ("step", "mistake"),
    [
        pytest.param(*found, marks=() if found[0] in QUICK else pytest.mark.slow, id=found[0])
        for found in re.findall(course.MARK, TEXT)
    ],
)
def test_a_check_says_of_a_mistake_what_the_entry_says(step, mistake):
    if step not in judge.STEPS:
        pytest.skip(f"{step} needs a package that is not installed")
    entry = TEXT.partition(f"<!-- lesson: {step}; mistake: {mistake} -->")[2].partition("\n---\n")[0]
    shown = course.present(course.SECTIONS.split(entry)[6])
    assert f"mistake: {mistake.upper()}" in shown
    # the last digits are those of a machine
    said, written = (NUMBERS.sub("#", text) for text in (course.run(step, mistake), shown.rstrip()))
    assert said == written, "write it: uv run python docs/course.py --run"


def test_an_unknown_mistake_is_refused():
    with pytest.raises(ValueError, match="has no mistake 'no such'"):
        course.run("silu", "no such")


def test_a_new_entry_is_filled_in_and_one_without_a_section_is_refused():
    blank = "\n\n".join(course.TITLES)
    entry = f"#### Step 99: SiLU\n\n<!-- lesson: silu; mistake: sigmoid alone -->\n\n{blank}\n\n---\n"
    after = course.filled(entry, lambda step, mistake: f"{step}: {mistake}")
    assert "x * sigmoid(x)" in after and "    silu: sigmoid alone\n" in after and after.endswith("\n---\n")
    assert course.filled(after) == after
    with pytest.raises(ValueError, match="the entry of silu must have the sections"):
        course.filled(entry.replace("**Artifacts:**", ""))


def test_the_examples_of_the_program():
    assert doctest.testmod(course).failed == 0
