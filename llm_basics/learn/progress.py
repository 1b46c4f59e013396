"""What somebody has done so far, in a small file beside theirs: derived from tests, so it can be deleted."""

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

from llm_basics.learn import lessons

STATUSES = {"passed", "failed", "not started"}


class Progress:
    """What was found when `path`, a file of pieces, was last checked; which hints were taken."""

    def __init__(self, path: str | Path) -> None:
        self.file = Path(path)
        self.path = self.file.with_suffix(".progress.json")
        self.steps: dict[str, str] = {}
        """passed, failed or not started."""
        self.checked: dict[str, str] = {}
        """The digest that the file had for them at that time."""
        self.hints: dict[str, int] = {}
        self.predicted: dict[str, bool] = {}
        if self.path.exists():
            try:
                stored = json.loads(self.path.read_text(encoding="utf-8"))
                self.steps, self.checked = dict(stored["steps"]), dict(stored["checked"])
                self.hints, self.predicted = dict(stored["hints"]), dict(stored["predicted"])
                if not set(self.steps.values()) <= STATUSES or not all(n >= 0 for n in self.hints.values()):
                    raise ValueError("a status or a number of hints that there is not")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path} is not what was written there ({error}); delete it") from None

    def note(self, step: str, status: str) -> None:
        """Record how a step did."""
        self.steps[step], self.checked[step] = status, self.digest(step)

    def is_current(self, step: str) -> bool:
        """Whether the file is as it was when the step was checked."""
        return self.checked.get(step) == self.digest(step)

    def digest(self, step: str) -> str:
        """A fingerprint of the file as it is now, but for the pieces of other steps, and for comments."""
        try:
            tree = ast.parse(self.file.read_bytes())
        except (OSError, SyntaxError, ValueError):
            return ""
        others = {piece for name in lessons.ORDER if name != step for piece in lessons.load(name).pieces}
        found = [ast.dump(node) for node in tree.body if getattr(node, "name", None) not in others]
        return hashlib.sha256("".join(found).encode()).hexdigest()[:12]

    def save(self) -> None:
        """Write it."""
        stored: dict[str, Any] = {"steps": self.steps, "checked": self.checked}
        stored |= {"hints": self.hints, "predicted": self.predicted}
        self.path.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
