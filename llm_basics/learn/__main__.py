"""Learn by implementing the pieces of a language model.

uv run python -m llm_basics.learn                             both courses and your progress
uv run python -m llm_basics.learn --course systems            the steps of one course
uv run python -m llm_basics.learn show rms_norm               the lesson of a step
uv run python -m llm_basics.learn start rms_norm --into mine.py
uv run python -m llm_basics.learn check --mine mine.py        check your pieces and name mistakes
"""

from llm_basics.runs import signals

if __name__ == "__main__":
    signals.end_at_once()

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from llm_basics.cli import parse
from llm_basics.core import option_types
from llm_basics.learn import lessons, overview, progress
from llm_basics.runs import console

TITLE = (__doc__ or "").partition("\n")[0]
PROGRAM = overview.PROGRAM
MARKS = {"passed": "[x]", "failed": "[!]", "timed out": "[!]", "not started": "[ ]"}


@dataclass(frozen=True)
class _File:
    mine: str = "mine.py"
    """Python file with your pieces; your progress is stored beside it."""


@dataclass(frozen=True)
class _Step:
    step: tyro.conf.Positional[str]
    """Name of a step."""


@dataclass(frozen=True)
class _CurrentStep(_File):
    step: tyro.conf.Positional[str | None] = None
    """Name of a step. None: the current one, the first in your file that does not pass."""


@dataclass(frozen=True)
class List(_File, option_types.Options):
    """List the steps in learning order, with your progress."""

    course: Literal["basics", "systems", "data", "alignment"] | None = None
    """List the steps of this course: basics (model and training), systems (kernels and parallelism), data
    (quality) or alignment (post-training). None: all courses."""


@dataclass(frozen=True)
class Show(_Step):
    """Show the lesson of a step: idea, formula, shapes, paper."""


@dataclass(frozen=True)
class Start(_Step):
    """Append the stubs of a step to your file."""

    into: str = "mine.py"
    """Python file with your pieces, created if missing."""


@dataclass(frozen=True)
class Check(_File):
    """Check the pieces in your file and name mistakes. Exit status 1 if a step does not pass."""

    step: tyro.conf.Positional[str | None] = None
    """Check this step only. None: every step with pieces in your file."""
    watch: bool = False
    """Check again on every save, until Ctrl-C."""


@dataclass(frozen=True)
class Hint(_CurrentStep):
    """Print the next of three hints on a step, each more explicit."""


@dataclass(frozen=True)
class Solution(_Step):
    """Print the reference implementation of a step."""


@dataclass(frozen=True)
class Next(_CurrentStep):
    """Show the lesson of the current step."""


@dataclass(frozen=True)
class Predict(_CurrentStep, option_types.Options):
    """Predict a result before running the code of a step."""

    answer: int | None = None
    """Number of your answer; the first one is stored. None: print the question."""


@dataclass(frozen=True)
class Dojo(option_types.Options):
    """Find one hidden mistake in a training run from losses, gradients and probes."""

    seed: option_types.Seed = 0
    """Random seed that selects the mistake."""
    answer: int | None = None
    """Number of your answer. None: print the run and the options."""


@dataclass(frozen=True)
class Mistakes:
    """Test every known mistake, and print the numbers caught and named per step."""

    step: tyro.conf.Positional[str | None] = None
    """Run this step only, and list its mistakes."""


@dataclass(frozen=True)
class Read:
    """Check the metrics of a training run for signs of mistakes."""

    run_dir: tyro.conf.Positional[str] = "newest"
    """Run directory; newest: the most recently written under runs/."""


@dataclass(frozen=True)
class Race(_File, option_types.Options):
    """Train the default model with your pieces and with the reference, and plot both curves."""

    data: str = "stdlib"
    """Training text: a file, a folder or a glob; stdlib is the source of Python's standard library."""
    steps: option_types.Count = 800
    """Number of optimizer steps; all other options are those of the default run, without qk_norm."""
    out: str = "race"
    """Folder for both run directories and the figure."""


COMMANDS = List | Show | Start | Check | Hint | Solution | Next | Predict | Dojo | Mistakes | Read | Race


def main(arguments: Sequence[str]) -> int:
    """Run a subcommand. Returns the exit status; exits with 2 on a usage error."""
    with parse.exit_on_error():
        if not arguments or (arguments[0].startswith("--") and arguments[0] != "--help"):
            arguments = ["list", *arguments]
        options = parse.parse_command(COMMANDS, arguments, "python -m llm_basics.learn", TITLE)
        match options:
            case List():
                show_all(progress.Progress(options.mine), options.course)
            case Show():
                show(lessons.load(options.step))
            case Start():
                start(options.step, options.into)
            case Check():
                return watch(options) if options.watch else check(options)
            case Hint():
                hint(current(options), progress.Progress(options.mine))
            case Solution():
                solution(lessons.load(options.step))
            case Next():
                show(current(options))
            case Predict():
                return predict(current(options), options)
            case _:
                return more(options)
    return 0


def current(options: _CurrentStep) -> lessons.Lesson:
    """The lesson of the step named in the options, or of the current step."""
    known = progress.Progress(options.mine)
    name = options.step or known.next_step()
    if name is None:
        raise ValueError(f"all steps of {options.mine} passed; name a step, or {overview.advice(known)}")
    return lessons.load(name)


# --------------------------------------------------------------------------------------------------
# Lessons


def show_all(known: progress.Progress, only: str | None = None) -> None:
    """Print the steps of each course, or of `only` this one, with their status and the next command."""
    for course, names in lessons.COURSES.items():
        if only not in (None, course):
            continue
        width = max(map(len, names))
        print(f"{course}\n")
        steps = [step for step in overview.steps(known) if step.course == course]
        for number, step in enumerate(steps, start=1):
            stale = "" if step.is_current else "  (changed since the last check)"
            print(f"{MARKS[step.status]} {number:2} {step.name:{width}}  {step.title}{stale}")
        n_passed = sum(known.steps.get(name) == "passed" for name in names)
        print(f"\n{n_passed} of {len(names)} steps passed; next: {overview.advice(known, course)}\n")


def show(lesson: lessons.Lesson) -> None:
    """Print the lesson of a step."""
    print(console.wrap(f"{lesson.title} ({', '.join(lesson.pieces)})\n\n{lesson.idea}\n"))
    for line in ["", *lesson.formula.splitlines(), "", *lesson.shapes.splitlines()]:
        print(f"    {line}".rstrip())
    if lesson.optional:
        print(f"\noptional (the reference is used): {', '.join(lesson.optional)}")
    if lesson.later:
        print("\nsecond stage, once the step passes; until then, train without these options:")
        print(console.wrap("\n".join(f"    {name}: {text}" for name, text in lesson.later.items())))
    print(console.wrap(f"\npaper     {lesson.paper}" if lesson.paper else ""))
    print(f"worklog   WORKLOG.md#{lesson.worklog}")
    if (Path(__file__).parents[2] / "tests" / "test_steps.py").is_file():
        print(f"test      uv run pytest tests/test_steps.py -k '[{lesson.name}]' --mine mine.py")
    print(f"start     {PROGRAM} start {lesson.name} --into mine.py")


def hint(lesson: lessons.Lesson, known: progress.Progress) -> None:
    """Print the next hint; after the last one, the command that prints the solution."""
    number = min(known.hints.get(lesson.name, 0), len(lesson.hints) - 1)
    print(console.wrap(f"{lesson.name}, hint {number + 1} of {len(lesson.hints)}: {lesson.hints[number]}"))
    if number + 1 == len(lesson.hints):
        print(f"last hint; reference: {PROGRAM} solution {lesson.name}")
    known.hints[lesson.name] = number + 1
    known.save()


def predict(lesson: lessons.Lesson, options: Predict) -> int:
    """Print the question, or grade an answer."""
    question = lesson.predict
    if options.answer is None:
        options_shown = [f"  {number}  {option}" for number, option in enumerate(question.options, start=1)]
        print(console.wrap("\n".join([f"{lesson.name}: {question.question}", *options_shown])))
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
    print(console.wrap(f"{verdict}. {question.why}"))
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
    lesson = lessons.load(options.step) if options.step else None
    if not Path(options.mine).exists():
        raise ValueError(f"no file {options.mine}; create it: {PROGRAM} start linear --into {options.mine}")
    known = progress.Progress(options.mine)
    steps = [name for name in known.begun() if lesson is None or name == lesson.name]
    if not steps:
        pieces = f"one of {', '.join(lesson.pieces)}" if lesson else "a piece of a step"
        stubs = f"add stubs: {PROGRAM} start {lesson.name}" if lesson else f"list them: {PROGRAM} list"
        raise ValueError(f"{options.mine} must define {pieces}; {stubs}")
    # before the import of torch, which takes seconds
    print(console.wrap(f"checking {options.mine}: {', '.join(steps)}"), file=sys.stderr, flush=True)
    from llm_basics.learn import checks

    statuses: dict[str, str] = {}
    for result in checks.check(options.mine, options.step):
        print(console.wrap(result.text), flush=True)
        known.note(result.step, result.status, result.text)
        known.save()
        statuses[result.step] = result.status
    for course, names in lessons.COURSES.items() if not options.step else ():
        if found := [status for name, status in statuses.items() if name in names]:
            print(f"{course}: {found.count('passed')} of {len(names)} steps passed")
    if "failed" not in statuses.values():
        print(f"next: {overview.advice(known)}")
    return 0 if set(statuses.values()) <= {"passed"} else 1


def watch(options: Check) -> int:
    """Check now and after every save, until Ctrl-C."""
    import watchfiles

    def once() -> None:
        print(f"\n--- {options.mine}", flush=True)
        try:
            check(options)
        except (ValueError, OSError) as error:
            print(f"error: {parse.message(error)}", flush=True)
        print(f"waiting for {options.mine} to be saved; Ctrl-C stops", flush=True)

    path = Path(options.mine).resolve()
    try:
        once()
        # the folder, since editors replace files
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
    # messages may quote any character of user code
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    signals.run(main, sys.argv[1:])
