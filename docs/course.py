"""Fills the entries of the course in WORKLOG.md from the lessons and the catalogue of mistakes.

uv run python docs/course.py          the parts that come from the lessons, the index, long lines
uv run python docs/course.py --run    also what a check says of each mistake: it is made, and checked

An entry of the course begins, below its heading, with `<!-- lesson: STEP; mistake: NAME -->`. Its objective,
its actions, and the items that begin with **Passed**, **Recognized** and **Why** are written here; all other
items are written by hand, and stay.
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from llm_basics import swap
from llm_basics.learn import lessons

WORKLOG = Path(__file__).parent.parent / "WORKLOG.md"
LEARN = "uv run python -m llm_basics.learn"
WIDTH = 120

MARK = re.compile(r"^<!-- lesson: (\w+); mistake: (.+?) -->$", re.M)
INDEX = re.compile(r"(?<=<!-- index of the course -->\n).*?(?=<!-- end of the index -->)", re.DOTALL)
SECTIONS = re.compile(r"^(\*\*[^*\n]+:\*\*)\n", re.M)
TITLES = [
    "**Objective:**",
    "**Actions & Command(s):**",
    "**Observations & Results:**",
    "**Analysis & Decisions:**",
    "**Artifacts:**",
]
GENERATED = ("*   **Passed:**", "*   **Recognized:**", "*   **Why:**")

# what a check says of a step with a mistake, by their names
Report = Callable[[str, str], str]


def wrapped(text: str, bullet: str) -> str:
    """An item of a list, in lines of at most 120 characters; code in backticks stays on one line.

    >>> print(wrapped("`a b` " * 30, "*   ").splitlines()[1][:9])
        `a b`
    """
    kept = re.sub(r"`[^`]+`", lambda code: code[0].replace(" ", "\0"), text)
    indent = " " * len(bullet)
    lines = textwrap.fill(
        " ".join(kept.split(" ")),
        WIDTH,
        initial_indent=bullet,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines.replace("\0", " ")


def fenced(text: str) -> str:
    """Text as it is, inside an item."""
    return textwrap.indent(f"```text\n{text.strip()}\n```", "    ", lambda line: bool(line.strip()))


def file_of(piece: str) -> str:
    """The file of a piece.

    >>> file_of("silu")
    'llm_basics/core/functional.py'
    """
    home = swap.HOMES[piece]
    return swap.HOMES_OUTSIDE_CORE.get(home, f"{swap.CORE}.{home}").replace(".", "/") + ".py"


def sentences(text: str) -> list[str]:
    """The sentences of an idea: what, why, the trick, what happens without it, what to mind."""
    return re.split(r"(?<=[.!?])\s+", text.strip())


# --------------------------------------------------------------------------------------------------
# An entry


def objective(lesson: lessons.Lesson) -> str:
    """The idea, the formula and the paper."""
    idea = wrapped(" ".join(sentences(lesson.idea)[:2]), "*   ")
    paper = [wrapped(f"Paper: {lesson.paper}.", "*   ")] if lesson.paper else []
    return joined([f"{idea}\n\n{fenced(lesson.formula)}", *paper])


def actions(lesson: lessons.Lesson) -> str:
    """The question to answer first, the commands that make a stub, check it and show the reference."""
    name, question = lesson.name, lesson.predict
    pieces = ", ".join(f"`{piece}`" for piece in lesson.needed)
    given = [f"`{piece}`" for piece in lesson.optional]
    and_given = f" ({', '.join(given)} if you like)" if given else ""
    files = " and ".join(f"`{file}`" for file in dict.fromkeys(map(file_of, lesson.pieces)))
    choices = " / ".join(question.options)
    text = [
        f"Predict: {question.question} ({choices}) `{LEARN} predict {name}`",
        f"Write {pieces}{and_given} in `mine.py`: `{LEARN} start {name}`",
        f"Check: `{LEARN} check {name}`",
        f"Compare with the reference in {files}: `{LEARN} solution {name}`",
    ]
    if following := [lessons.load(each) for each in after(name)]:
        text.append(f"Next: [{following[0].title}](#{following[0].worklog})")
    return "\n".join(wrapped(each, f"{number}.  ") for number, each in enumerate(text, start=1))


def after(name: str) -> list[str]:
    """The steps of a course after one of them."""
    course = lessons.COURSES[lessons.course_of(name)]
    return course[course.index(name) + 1 :]


def observed(lesson: lessons.Lesson, report: str) -> str:
    """What a check prints if the piece is right, and if it has the entry's mistake."""
    return (
        f"*   **Passed:** `{lesson.name}: passed`\n*   **Recognized:** a mistake that is easily made:\n\n"
        f"{fenced(report)}"
    )


def why(lesson: lessons.Lesson) -> str:
    """The trick, what happens without it, what to mind."""
    return wrapped("**Why:** " + " ".join(sentences(lesson.idea)[2:]), "*   ")


def items(section: str) -> list[str]:
    """The items of a list, with their continuation lines.

    >>> items("*   a\\n    b\\n*   c\\n")
    ['*   a\\n    b', '*   c']
    """
    return [item.rstrip() for item in re.split(r"^(?=\*   )", section, flags=re.M) if item.strip()]


def joined(items: list[str]) -> str:
    """A list of items, with an empty line after code, which the site's Markdown needs."""
    return "\n".join(f"{item}\n" if item.endswith("```") else item for item in items).rstrip("\n")


def by_hand(section: str) -> list[str]:
    """The items that this program does not write."""
    return [item for item in items(section) if not item.startswith(GENERATED)]


def present(section: str) -> str:
    """The report that an entry has."""
    found = re.search(r"```text\n(.*?)^ *```$", section, re.DOTALL | re.M)
    return textwrap.dedent(" " * 4 + found[1].lstrip(" ")) if found else ""


def entry(name: str, mistake: str, text: str, report: Report | None) -> str:
    """An entry below its mark, with its parts filled in."""
    lesson = lessons.load(name)
    head, *parts = SECTIONS.split(text)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    if list(sections) != TITLES:
        raise ValueError(
            f"the entry of {name} must have the sections {', '.join(TITLES)}, got {list(sections)}"
        )
    shown = report(name, mistake) if report else present(sections["**Observations & Results:**"])
    sections["**Objective:**"] = objective(lesson)
    sections["**Actions & Command(s):**"] = actions(lesson)
    for title, made in (
        ("**Observations & Results:**", observed(lesson, shown)),
        ("**Analysis & Decisions:**", why(lesson)),
    ):
        sections[title] = joined([made, *by_hand(sections[title])])
    return (
        head
        + "\n\n".join(f"{title}\n{section.strip(chr(10))}" for title, section in sections.items())
        + "\n\n"
    )


# --------------------------------------------------------------------------------------------------
# The file


def slug(heading: str) -> str:
    """The anchor of a heading on GitHub.

    >>> slug("Step 4a: Rotary positions (RoPE)")
    'step-4a-rotary-positions-rope'
    """
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def index(text: str) -> str:
    """Tables of the courses in learning order, then of the programs, with links to the entries."""
    lines = []
    for course, names in lessons.COURSES.items():
        lines += ["", f"**{course}**", "", "| | piece | step | code |", "|---|---|---|---|"]
        for number, lesson in enumerate(map(lessons.load, names), start=1):
            link = f"[{lesson.title}](#{lesson.worklog})"
            lines.append(
                f"| {number} | {link} | `{lesson.name}` | `{file_of(lesson.pieces[0]).partition('/')[2]}` |"
            )
    lines += ["", "**programs**", "", "| step | |", "|---|---|"]
    for number, title in reversed(re.findall(r"^#### Step (\d+\w?): (.+)$(?!\n\n<!-- lesson)", text, re.M)):
        lines.append(f"| {number} | [{title}](#{slug(f'Step {number}: {title}')}) |")
    return "\n".join(lines) + "\n\n"


def short(text: str) -> str:
    """Text with long lines of its lists wrapped; code and tables stay.

    >>> print(short("1.  " + "word " * 30).splitlines()[1])
        word word word word word word word
    """
    parts = re.split(r"(^ *```.*?^ *```$)", text, flags=re.DOTALL | re.MULTILINE)
    line = re.compile(rf"^( *(?:\*|\d+\.|) +)(?=[^|\s])(.{{{WIDTH - 8},}})$", re.MULTILINE)

    def kept_or_wrapped(found: re.Match[str]) -> str:
        return wrapped(found[2], found[1]) if len(found[0]) > WIDTH else found[0]

    return "".join(part if "```" in part else line.sub(kept_or_wrapped, part) for part in parts)


def filled(text: str, report: Report | None = None) -> str:
    """The text of the worklog with the index and all entries filled in; without `report`, reports stay."""
    before, *rest = MARK.split(INDEX.sub(lambda _: index(text), short(text)))
    made = [before]
    for name, mistake, after in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        body, line, other = after.partition("\n---\n")
        mark = f"<!-- lesson: {name}; mistake: {mistake} -->"
        made += [mark, entry(name, mistake, body, report), line.lstrip("\n"), other]
    return "".join(made)


def run(step: str, mistake: str) -> str:
    """What a check says of the reference with a mistake of the catalogue in it, without the hint."""
    from llm_basics.learn import judge, messages, sandbox

    sandbox.interpret_triton()
    known = judge.load(step)
    made = [each for each in known.mistakes if each.name == mistake]
    if not made:
        raise ValueError(f"the catalogue of {step} has no mistake {mistake!r}; see {LEARN} mistakes {step}")
    return messages.message(judge.verdict_on(known, made[0]), "").rstrip()


def main() -> int:
    """Write what has changed. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help="make each mistake, and check it")
    options = parser.parse_args()
    before = WORKLOG.read_text(encoding="utf-8")
    if missing := set(lessons.ORDER) - {name for name, _ in MARK.findall(before)}:
        names = ", ".join(sorted(missing))
        parser.error(f"{WORKLOG.name} has no entry for {names}; add one by the template at its end")
    after = filled(before, run if options.run else None)
    WORKLOG.write_text(after, encoding="utf-8")
    print("nothing has changed" if after == before else f"{WORKLOG.name} is up to date now")
    return 0


if __name__ == "__main__":
    sys.exit(main())
