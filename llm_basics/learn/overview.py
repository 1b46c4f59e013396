"""Progress of a learner: the steps with their status, and the next command."""

from dataclasses import dataclass

from llm_basics.learn import lessons, progress

PROGRAM = "uv run python -m llm_basics.learn"


@dataclass(frozen=True)
class Step:
    """A step and its state."""

    course: str
    name: str
    title: str
    status: str
    """passed, failed, timed out or not started, as of the last check."""
    is_current: bool
    """False if the code was changed since."""
    message: str
    """Message of the last check; empty before the first."""


def steps(known: progress.Progress) -> list[Step]:
    """All steps in learning order; one without a piece in the file is not started."""
    begun = known.begun()
    found = []
    for name in lessons.ORDER:
        is_begun = name in begun
        status = known.steps.get(name, "not started") if is_begun else "not started"
        message = known.messages.get(name, "") if is_begun else ""
        is_current = not is_begun or known.is_current(name)
        course, title = lessons.course_of(name), lessons.load(name).title
        found.append(Step(course, name, title, status, is_current, message))
    return found


def advice(known: progress.Progress, course: str | None = None) -> str:
    """The next command, optionally within a course."""
    name = known.next_step(course)
    if name is None:
        return f"train the default model with your pieces: {PROGRAM} race --mine {known.file}"
    if name in known.begun():
        verb = "hint" if known.is_current(name) else "check"
        return f"{PROGRAM} {verb} {name} --mine {known.file}"
    return f"{PROGRAM} show {name}"
