"""Learn by writing the pieces of a language model yourself.

uv run python -m llm_basics.learn                             the steps, and how far you are
uv run python -m llm_basics.learn show rms_norm               what it is about
uv run python -m llm_basics.learn start rms_norm --into mine.py
uv run python -m llm_basics.learn check --mine mine.py        which steps are right, which mistake was made
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llm_basics import user_code
from llm_basics.cli import parse
from llm_basics.learn import lessons, progress

TITLE = (__doc__ or "").partition("\n")[0]
PROGRAM = "uv run python -m llm_basics.learn"
MARKS = {"passed": "[x]", "failed": "[!]", "not started": "[ ]"}


@dataclass(frozen=True)
class List:
    """All steps in learning order, and how far your file is."""

    mine: str = "mine.py"
    """The file with your pieces."""


@dataclass(frozen=True)
class Show:
    """What a step is about: the idea, the formula, shapes, the paper, its tests."""

    step: tyro.conf.Positional[str]
    """The name of a step."""


@dataclass(frozen=True)
class Start:
    """Add the blanks of a step to your file."""

    step: tyro.conf.Positional[str]
    """The name of a step."""
    into: str = "mine.py"
    """The file with your pieces; it is made if there is none."""


@dataclass(frozen=True)
class Check:
    """Test what is in your file, and say which mistake was made. The exit status is 1 if one was."""

    step: tyro.conf.Positional[str | None] = None
    """One step alone; without, all that your file has pieces of."""
    mine: str = "mine.py"
    """The file with your pieces."""
    watch: bool = False
    """Check again whenever the file is saved, until Ctrl-C."""


@dataclass(frozen=True)
class Hint:
    """The next of three hints on a step, each stronger than the one before."""

    step: tyro.conf.Positional[str]
    """The name of a step."""
    mine: str = "mine.py"
    """The file with your pieces, beside which is noted how many hints you had."""


@dataclass(frozen=True)
class Solution:
    """The reference of a step."""

    step: tyro.conf.Positional[str]
    """The name of a step."""


@dataclass(frozen=True)
class Next:
    """The first step that is not done, and how to begin it."""

    mine: str = "mine.py"
    """The file with your pieces."""


@dataclass(frozen=True)
class Predict:
    """A question on what will be seen, before the code of a step is run."""

    step: tyro.conf.Positional[str]
    """The name of a step."""
    answer: int | None = None
    """The number of your answer; without, the question is asked."""
    mine: str = "mine.py"
    """The file with your pieces, beside which your answer is noted."""


@dataclass(frozen=True)
class Dojo:
    """A model that learns with one hidden mistake: find it from losses, gradients and probes."""

    seed: int = 0
    """Another seed, another mistake."""
    answer: int | None = None
    """The number of the mistake that you think it is."""


@dataclass(frozen=True)
class Mistakes:
    """The table of all steps: how many mistakes are known, caught and named. It tries them all."""

    step: tyro.conf.Positional[str | None] = None
    """One step alone, with the name of each mistake."""


@dataclass(frozen=True)
class Read:
    """Look through the log of a training run for signs of mistakes."""

    run_dir: tyro.conf.Positional[str] = "newest"
    """The folder of a run; newest is the one under runs/ that was written to last."""


@dataclass(frozen=True)
class Race:
    """Train the real model twice, with your pieces and with the reference's, and draw both curves."""

    mine: str = "mine.py"
    """The file with your pieces."""
    data: str = "stdlib"
    """The text to learn: a file, a folder or a glob; stdlib is the source of Python's own library."""
    steps: int = 800
    """Steps of training; all else is as in the default run."""
    out: str = "race"
    """The folder for both runs and the picture."""


COMMANDS = (
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Start, tyro.conf.subcommand("start")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Hint, tyro.conf.subcommand("hint")]
    | Annotated[Solution, tyro.conf.subcommand("solution")]
    | Annotated[Next, tyro.conf.subcommand("next")]
    | Annotated[Predict, tyro.conf.subcommand("predict")]
    | Annotated[Dojo, tyro.conf.subcommand("dojo")]
    | Annotated[Mistakes, tyro.conf.subcommand("mistakes")]
    | Annotated[Read, tyro.conf.subcommand("read")]
    | Annotated[Race, tyro.conf.subcommand("race")]
)


def main(arguments: Sequence[str]) -> int:
    """Do what the command line says. Returns the exit status; 2 for a mistake in what was asked for."""
    with parse.exit_on_error():
        options = parse.parse_command(COMMANDS, arguments or ["list"], "python -m llm_basics.learn", TITLE)
        match options:
            case List():
                show_all(options.mine)
            case Show():
                show(lessons.load(options.step))
            case Start():
                start(options.step, options.into)
            case Check():
                return watch(options) if options.watch else check(options)
            case Hint():
                hint(lessons.load(options.step), progress.Progress(options.mine))
            case Solution():
                solution(lessons.load(options.step))
            case Next():
                show_next(options.mine)
            case Predict():
                return predict(lessons.load(options.step), options)
            case _:
                return more(options)
    return 0


# --------------------------------------------------------------------------------------------------
# Reading


def show_all(mine: str) -> None:
    """The steps, their marks, and what to do next."""
    known = progress.Progress(mine)
    there = set(user_code.names(mine)) if Path(mine).exists() else set()
    for number, name in enumerate(lessons.ORDER, start=1):
        lesson = lessons.load(name)
        begun = bool(there & set(lesson.pieces))
        mark = MARKS[known.steps.get(name, "not started")] if begun else MARKS["not started"]
        stale = "  (changed since it was checked)" if begun and not known.is_current(name) else ""
        print(f"{mark} {number:2} {name:14} {lesson.title}{stale}")
    n_passed = sum(known.steps.get(name) == "passed" for name in lessons.ORDER)
    advice = f"{PROGRAM} next" if n_passed < len(lessons.ORDER) else f"{PROGRAM} race --mine {mine}"
    print(f"\n{n_passed} of {len(lessons.ORDER)} steps passed; go on: {advice}")


def show(lesson: lessons.Lesson) -> None:
    """The page of a step."""
    print(f"{lesson.title} ({', '.join(lesson.pieces)})\n\n{lesson.idea}\n")
    for line in lesson.formula.splitlines():
        print(f"    {line}")
    print("\n" + "\n".join(f"    {line}" for line in lesson.shapes.splitlines()))
    if lesson.optional:
        print(f"\nmay be left to the reference: {', '.join(lesson.optional)}")
    if lesson.paper:
        print(f"\npaper     {lesson.paper}")
    print(f"worklog   WORKLOG.md#{lesson.worklog}")
    print(f"its test  uv run pytest tests/test_steps.py -k '[{lesson.name}]' --mine mine.py")
    print(f"begin     {PROGRAM} start {lesson.name} --into mine.py")


def show_next(mine: str) -> None:
    """The first step that is not passed."""
    known = progress.Progress(mine)
    left = [name for name in lessons.ORDER if known.steps.get(name) != "passed"]
    if not left:
        print(f"all steps are passed; train the real model with your pieces: {PROGRAM} race --mine {mine}")
        return
    show(lessons.load(left[0]))


def hint(lesson: lessons.Lesson, known: progress.Progress) -> None:
    """The next hint; after the last, the way to the solution."""
    number = min(known.hints.get(lesson.name, 0), len(lesson.hints) - 1)
    print(f"{lesson.name}, hint {number + 1} of {len(lesson.hints)}: {lesson.hints[number]}")
    if number + 1 == len(lesson.hints):
        print(f"this was the last one; the reference: {PROGRAM} solution {lesson.name}")
    known.hints[lesson.name] = number + 1
    known.save()


def predict(lesson: lessons.Lesson, options: Predict) -> int:
    """Ask, or judge an answer."""
    question = lesson.predict
    if options.answer is None:
        print(question.question)
        for number, option in enumerate(question.options, start=1):
            print(f"  {number}  {option}")
        print(f"your answer: {PROGRAM} predict {lesson.name} --answer NUMBER")
        return 0
    if not 1 <= options.answer <= len(question.options):
        raise ValueError(f"--answer must be from 1 to {len(question.options)}, got {options.answer}")
    is_right = options.answer == question.answer
    known = progress.Progress(options.mine)
    known.predicted.setdefault(lesson.name, is_right)
    known.save()
    verdict = "right" if is_right else f"no: it is {question.answer}, {question.options[question.answer - 1]}"
    print(f"{verdict}. {question.why}")
    return 0 if is_right else 1


# --------------------------------------------------------------------------------------------------
# Writing and checking; torch is loaded only from here on


def start(step: str, into: str) -> None:
    """Write the blanks, and ask the question."""
    from llm_basics.learn import stubs

    names = stubs.start(step, into)
    print(f"{into} has blanks for {', '.join(names)}; write them, then: {PROGRAM} check {step} --mine {into}")
    print(f"before you run it, a question: {PROGRAM} predict {step}")


def solution(lesson: lessons.Lesson) -> None:
    """The sources of the pieces."""
    from llm_basics.learn import stubs

    print("\n\n".join(stubs.solution(piece).rstrip() for piece in lesson.pieces))


def check(options: Check) -> int:
    """One check of the file."""
    from llm_basics.learn import checks

    if not Path(options.mine).exists():
        raise ValueError(
            f"there is no {options.mine}; begin with: {PROGRAM} start linear --into {options.mine}"
        )
    known = progress.Progress(options.mine)
    statuses = []
    for result in checks.check(options.mine, options.step):
        print(result.text, flush=True)
        known.note(result.step, result.status)
        known.save()
        statuses.append(result.status)
    if not statuses:
        raise ValueError(f"{options.mine} has pieces, but none that a step is about")
    if not options.step:
        print(f"{statuses.count('passed')} of {len(lessons.ORDER)} steps passed")
    return 0 if set(statuses) <= {"passed"} else 1


def watch(options: Check) -> int:
    """Check now, and again at each change, until Ctrl-C."""
    import watchfiles

    def once() -> None:
        print(f"\n--- {options.mine}", flush=True)
        try:
            check(options)
        except (ValueError, OSError) as error:
            print(f"error: {error}", flush=True)

    path = Path(options.mine).resolve()
    once()
    # editors replace files, so the folder is watched
    try:
        for changes in watchfiles.watch(path.parent):
            if any(Path(changed) == path for _, changed in changes):
                once()
    except KeyboardInterrupt:
        print()
    return 0


def more(options: Dojo | Mistakes | Read | Race) -> int:
    """What is about whole models."""
    from llm_basics.learn import checks, dojo, log_checks, race

    match options:
        case Dojo():
            return dojo.enter(options.seed, options.answer)
        case Mistakes():
            return checks.print_mistakes(options.step)
        case Read():
            return log_checks.main(options.run_dir)
        case Race():
            return race.run_both(options.mine, options.data, options.steps, Path(options.out))
    return 0


if __name__ == "__main__":
    # a message may quote any character of somebody's file
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.exit(main(sys.argv[1:]))
