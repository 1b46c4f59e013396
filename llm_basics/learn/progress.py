"""Progress of a learner, in a JSON file beside the pieces; derived from checks, so it can be deleted."""

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

from llm_basics import user_code
from llm_basics.core import files
from llm_basics.learn import lessons

STATUSES = {"passed", "failed", "timed out", "not started"}


class Progress:
    """Results and messages of the last check of `path`, a file of pieces, and the number of hints used."""

    def __init__(self, path: str | Path) -> None:
        self.file = Path(path)
        self.path = self.file.with_suffix(".progress.json")
        self.steps: dict[str, str] = {}
        """One of STATUSES."""
        self.checked: dict[str, str] = {}
        """Digest of the checked file for each step."""
        self.messages: dict[str, str] = {}
        """Message of the last check of each step."""
        self.hints: dict[str, int] = {}
        self.predicted: dict[str, bool] = {}
        if self.path.exists():
            try:
                stored = json.loads(self.path.read_text(encoding="utf-8"))
                self.steps, self.checked = dict(stored["steps"]), dict(stored["checked"])
                self.hints, self.predicted = dict(stored["hints"]), dict(stored["predicted"])
                # missing in files of earlier versions
                self.messages = dict(stored.get("messages", {}))
                if not set(self.steps.values()) <= STATUSES or not all(n >= 0 for n in self.hints.values()):
                    raise ValueError("invalid status or number of hints")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path} is not a valid progress file ({error}); delete it") from None

    def note(self, step: str, status: str, message: str = "") -> None:
        """Record the status of a step, and the message about it."""
        self.steps[step], self.checked[step], self.messages[step] = status, self.digest(step), message

    def begun(self) -> list[str]:
        """The steps with a piece in the file."""
        defined = set(user_code.names(self.file)) if self.file.exists() else set()
        return [name for name in lessons.ORDER if defined & set(lessons.load(name).pieces)]

    def next_step(self, course: str | None = None) -> str | None:
        """The first step that is not passed: in the file, else in the started courses, else in all.

        With `course`, only in that course. None if all steps are passed.
        """
        begun = self.begun()
        courses = [steps for steps in lessons.COURSES.values() if set(steps) & set(begun)]
        steps = [*begun, *(name for steps in courses for name in steps), *lessons.ORDER]
        allowed = lessons.ORDER if course is None else lessons.COURSES[course]
        return next((n for n in steps if n in allowed and self.steps.get(n) != "passed"), None)

    def is_current(self, step: str) -> bool:
        """Whether the code of a step is unchanged since it was checked."""
        return self.checked.get(step) == self.digest(step)

    def digest(self, step: str) -> str:
        """Digest of the file without comments and without the pieces of other steps."""
        try:
            tree = ast.parse(self.file.read_bytes())
        except (OSError, SyntaxError, ValueError):
            return ""
        others = {piece for name in lessons.ORDER if name != step for piece in lessons.load(name).pieces}
        found = [ast.dump(node) for node in tree.body if getattr(node, "name", None) not in others]
        return hashlib.sha256("".join(found).encode()).hexdigest()[:12]

    def save(self) -> None:
        """Write the file."""
        stored: dict[str, Any] = {"steps": self.steps, "checked": self.checked}
        stored |= {"messages": self.messages, "hints": self.hints, "predicted": self.predicted}
        files.write(self.path, json.dumps(stored, indent=2) + "\n")
