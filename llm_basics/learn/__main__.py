"""Learn by implementing the pieces of a language model.

uv run python -m llm_basics.learn                             all steps and your progress
uv run python -m llm_basics.learn show rms_norm               the lesson of a step
uv run python -m llm_basics.learn start rms_norm --into mine.py
uv run python -m llm_basics.learn check --mine mine.py        check your pieces and name mistakes
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llm_basics import user_code
from llm_basics.cli import parse
from llm_basics.learn import lessons, progress, sockets

TITLE = (__doc__ or "").partition("\n")[0]
PROGRAM = "uv run python -m llm_basics.learn"
MARKS = {"passed": "[x]", "failed": "[!]", "not started": "[ ]"}


@dataclass(frozen=True)
class List:
    """List all steps in learning order, with your progress."""

    mine: str = "mine.py"
    """Python file with your pieces."""


@dataclass(frozen=True)
class Show:
    """Show the lesson of a step: idea, formula, shapes, paper."""

    step: tyro.conf.Positional[str]
    """Name of a step."""


@dataclass(frozen=True)
class Start:
    """Append the stubs of a step to your file."""

    step: tyro.conf.Positional[str]
    """Name of a step."""
    into: str = "mine.py"
    """Python file with your pieces, created if missing."""


@dataclass(frozen=True)
class Check:
    """Check the pieces in your file and name mistakes. Exit status 1 if a step does not pass."""

    step: tyro.conf.Positional[str | None] = None
    """Check this step only. None: every step that your file has pieces of."""
    mine: str = "mine.py"
    """Python file with your pieces."""
    watch: bool = False
    """Check again on every save, until Ctrl-C."""


@dataclass(frozen=True)
class Hint:
    """Print the next of three hints on a step, each more explicit."""

    step: tyro.conf.Positional[str]
    """Name of a step."""
    mine: str = "mine.py"
    """Python file with your pieces; hints used are stored beside it."""


@dataclass(frozen=True)
class Solution:
    """Print the reference implementation of a step."""

    step: tyro.conf.Positional[str]
    """Name of a step."""


@dataclass(frozen=True)
class Next:
    """Show the first step that is not passed."""

    mine: str = "mine.py"
    """Python file with your pieces."""


@dataclass(frozen=True)
class Predict:
    """Predict a result before running the code of a step."""

    step: tyro.conf.Positional[str]
    """Name of a step."""
    answer: int | None = None
    """Number of your answer. None: print the question."""
    mine: str = "mine.py"
    """Python file with your pieces; your first answer is stored beside it."""


@dataclass(frozen=True)
class Dojo:
    """Find one hidden mistake in a training run from losses, gradients and probes."""

    seed: int = 0
    """Random seed that selects the mistake."""
    answer: int | None = None
    """Number of your answer. None: print the run and the options."""


@dataclass(frozen=True)
class Mistakes:
    """Plug in every known mistake and print how many are caught and named per step."""

    step: tyro.conf.Positional[str | None] = None
    """Run this step only, and list its mistakes."""


@dataclass(frozen=True)
class Read:
    """Check the metrics of a training run for signs of mistakes."""

    run_dir: tyro.conf.Positional[str] = "newest"
    """Run directory; newest is the one under runs/ written to last."""


@dataclass(frozen=True)
class Race:
    """Train the default model with your pieces and with the reference, and plot both curves."""

    mine: str = "mine.py"
    """Python file with your pieces."""
    data: str = "stdlib"
    """Training text: a file, a folder or a glob; stdlib is the source of Python's standard library."""
    steps: int = 800
    """Number of optimizer steps; all other options are those of the default run."""
    out: str = "race"
    """Folder for both run directories and the figure."""


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
    """Run a subcommand. Returns the exit status; exits with 2 on a usage error."""
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
# Lessons


def show_all(mine: str) -> None:
    """Print all steps with their status, and the next command."""
    known = progress.Progress(mine)
    defined = set(user_code.names(mine)) if Path(mine).exists() else set()
    for number, name in enumerate(lessons.ORDER, start=1):
        lesson = lessons.load(name)
        begun = bool(defined & set(lesson.pieces))
        mark = MARKS[known.steps.get(name, "not started")] if begun else MARKS["not started"]
        stale = "  (changed since the last check)" if begun and not known.is_current(name) else ""
        print(f"{mark} {number:2} {name:14} {lesson.title}{stale}")
    n_passed = sum(known.steps.get(name) == "passed" for name in lessons.ORDER)
    advice = f"{PROGRAM} next" if n_passed < len(lessons.ORDER) else f"{PROGRAM} race --mine {mine}"
    print(f"\n{n_passed} of {len(lessons.ORDER)} steps passed; next: {advice}")


def show(lesson: lessons.Lesson) -> None:
    """Print the lesson of a step."""
    print(f"{lesson.title} ({', '.join(lesson.pieces)})\n\n{lesson.idea}\n")
    for line in lesson.formula.splitlines():
        print(f"    {line}")
    print("\n" + "\n".join(f"    {line}" for line in lesson.shapes.splitlines()))
    if lesson.optional:
        print(f"\noptional (the reference is used): {', '.join(lesson.optional)}")
    if lesson.paper:
        print(f"\npaper     {lesson.paper}")
    print(f"worklog   WORKLOG.md#{lesson.worklog}")
    if sockets.is_clone():
        print(f"test      uv run pytest tests/test_steps.py -k '[{lesson.name}]' --mine mine.py")
    print(f"start     {PROGRAM} start {lesson.name} --into mine.py")


def show_next(mine: str) -> None:
    """Print the lesson of the first step that is not passed."""
    known = progress.Progress(mine)
    left = [name for name in lessons.ORDER if known.steps.get(name) != "passed"]
    if not left:
        print(f"all steps passed; train the default model with your pieces: {PROGRAM} race --mine {mine}")
        return
    show(lessons.load(left[0]))


def hint(lesson: lessons.Lesson, known: progress.Progress) -> None:
    """Print the next hint; after the last one, the command that prints the solution."""
    number = min(known.hints.get(lesson.name, 0), len(lesson.hints) - 1)
    print(f"{lesson.name}, hint {number + 1} of {len(lesson.hints)}: {lesson.hints[number]}")
    if number + 1 == len(lesson.hints):
        print(f"last hint; reference: {PROGRAM} solution {lesson.name}")
    known.hints[lesson.name] = number + 1
    known.save()


def predict(lesson: lessons.Lesson, options: Predict) -> int:
    """Print the question, or grade an answer."""
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
    verdict = (
        "correct" if is_right else f"wrong: it is {question.answer}, {question.options[question.answer - 1]}"
    )
    print(f"{verdict}. {question.why}")
    return 0 if is_right else 1


# --------------------------------------------------------------------------------------------------
# Writing and checking; these import torch


def start(step: str, into: str) -> None:
    """Append the stubs to a file and point to the question."""
    from llm_basics.learn import stubs

    names = stubs.start(step, into)
    print(f"added to {into}: {', '.join(names)}; implement, then: {PROGRAM} check {step} --mine {into}")
    print(f"predict first: {PROGRAM} predict {step}")


def solution(lesson: lessons.Lesson) -> None:
    """Print the source of each piece of a step."""
    from llm_basics.learn import stubs

    print("\n\n".join(stubs.solution(piece).rstrip() for piece in lesson.pieces))


def check(options: Check) -> int:
    """Check a file once."""
    from llm_basics.learn import checks

    if not Path(options.mine).exists():
        raise ValueError(f"no file {options.mine}; create it: {PROGRAM} start linear --into {options.mine}")
    known = progress.Progress(options.mine)
    statuses = []
    for result in checks.check(options.mine, options.step):
        print(result.text, flush=True)
        known.note(result.step, result.status)
        known.save()
        statuses.append(result.status)
    if not statuses:
        raise ValueError(f"{options.mine} must define a piece of a step; list them: {PROGRAM} list")
    if not options.step:
        print(f"{statuses.count('passed')} of {len(lessons.ORDER)} steps passed")
    return 0 if set(statuses) <= {"passed"} else 1


def watch(options: Check) -> int:
    """Check now and after every save, until Ctrl-C."""
    import watchfiles

    def once() -> None:
        print(f"\n--- {options.mine}", flush=True)
        try:
            check(options)
        except (ValueError, OSError) as error:
            print(f"error: {parse.message(error)}", flush=True)

    path = Path(options.mine).resolve()
    once()
    # the folder, since editors replace files
    try:
        for changes in watchfiles.watch(path.parent):
            if any(Path(changed) == path for _, changed in changes):
                once()
    except KeyboardInterrupt:
        print()
    return 0


def more(options: Dojo | Mistakes | Read | Race) -> int:
    """Run a subcommand on whole models."""
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
    # messages may quote any character of a user's file
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.exit(main(sys.argv[1:]))
