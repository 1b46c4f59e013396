"""Grading in pytest of an implementation other than the reference: verdicts by step, messages, a report."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grading
import pytest

from llm_basics import swap
from llm_basics.learn import judge, lessons, messages, probes, sandbox, sockets

# for one test of user code, and for loading it
LIMIT_SECONDS = 60.0


def _course_of(step: str) -> str:
    return lessons.course_of(step) if step in lessons.ORDER else "basics"


class Examiner:
    """The implementation under test, and its verdicts."""

    def __init__(self, config: pytest.Config) -> None:
        self.path = Path(config.getoption("--adapters")).resolve()
        self.mine = config.getoption("--mine")
        self.report = config.getoption("--report")
        self.is_foreign = self.path != sockets.own_path()
        self.is_grading = self.is_foreign or self.mine is not None
        if self.is_foreign and self.mine is not None:
            raise pytest.UsageError("--mine cannot be combined with --adapters; it uses the adapters here")
        self.verdicts: dict[str, judge.Verdict] = {}
        self._adapters: sockets.Adapters | None = None
        # adapters by fixture, for those of wider scope than a function
        self.used_by: dict[str, set[str]] = {}
        # steps whose message was printed
        self.explained: set[str] = set()

    @property
    def adapters(self) -> sockets.Adapters:
        """The adapters, loaded on first use."""
        if self._adapters is None:
            try:
                with sandbox.time_limit(LIMIT_SECONDS), sandbox.unchanged_state():
                    self._adapters = (
                        grading.load_adapters(self.path)
                        if self.is_foreign
                        else sockets.Adapters(sockets.run_file(self.path))
                    )
            except sandbox.TimedOut:
                pytest.exit(f"{self.path} must load within {LIMIT_SECONDS:.0f} s", 2)
            except Exception as error:
                pytest.exit(f"cannot load {self.path}: {type(error).__name__}: {messages.reason(error)}", 2)
        return self._adapters

    def judged(self, name: str) -> judge.Verdict:
        """The verdict on a step; skips the test if the user's file has no piece of it."""
        own = {piece.split(".")[1] for piece in swap.user_pieces()}
        if self.mine is not None and not own & self._pieces_of(name):
            pytest.skip(f"{name}: not in {self.mine}")
        if name not in self.verdicts:
            self.verdicts[name] = self._judge(name)
        return self.verdicts[name]

    def _pieces_of(self, name: str) -> set[str]:
        if name in lessons.ORDER:
            return set(lessons.load(name).pieces)
        return {mistake.piece.split(".")[1] for mistake in judge.load(name).mistakes}

    def _judge(self, name: str) -> judge.Verdict:
        if self.is_foreign:
            assert isinstance(self.adapters, grading.Adapters)
            return grading.grade(judge.load(name), self.adapters)
        return judge.judge(judge.load(name), sockets.own())

    def next_step(self, name: str) -> str:
        """What to read or run next for a step that does not pass."""
        if name not in lessons.ORDER:
            return f"no lesson; reference: {swap.HOMES_OUTSIDE_CORE[name].replace('.', '/')}.py"
        if self.mine is not None:
            return f"next hint: uv run python -m llm_basics.learn hint {name} --mine {self.mine}"
        return f"lesson: uv run python -m llm_basics.learn show {name}"

    # -- around each test -------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[Any]:
        """Record the adapters that a shared fixture uses."""
        before = set(self._adapters.used) if self._adapters is not None else set()
        result = yield
        if fixturedef.scope != "function" and self._adapters is not None:
            self.used_by.setdefault(fixturedef.argname, set()).update(self._adapters.used - before)
        return result

    def run(self, item: pytest.Item) -> Iterator[None]:
        """Run a test, user code with a time limit; the probes of a step have their own."""
        if self.mine is None or item.name.startswith("test_step["):
            return (yield)
        try:
            with sandbox.time_limit(LIMIT_SECONDS):
                return (yield)
        except sockets.MissingAdapter as name:
            pytest.skip(f"{name} needs the second stage of a piece")
        except sandbox.TimedOut:
            pytest.fail(f"not finished after {LIMIT_SECONDS:.0f} s", pytrace=False)

    def examine(self, item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
        """Replace the traceback of a failure by the verdict on its step."""
        if self.mine is None:
            return
        used = sorted(self._adapters.used) if self._adapters is not None else []
        for fixture in getattr(item, "fixturenames", ()):
            used += sorted(self.used_by.get(fixture, ()))
        if call.when == "teardown" and self._adapters is not None:
            self._adapters.used.clear()
        if call.excinfo is None or report.outcome != "failed" or item.name.startswith("test_step["):
            return
        steps = list(dict.fromkeys(step for name in used if (step := grading.step_of(name))))
        report.longrepr = "\n".join(self._explain(call, steps)[: messages.MAX_LINES])

    def _explain(self, call: pytest.CallInfo[None], steps: list[str]) -> list[str]:
        assert call.excinfo is not None
        error = call.excinfo.value
        if isinstance(error, NotImplementedError) and probes.is_stub(error):
            return [f"{', '.join(steps)}: not started"]
        text = [line for line in str(error).splitlines() if line.strip()][:5]
        lines = [f"{type(error).__name__}: {text[0] if text else ''}", *text[1:]]
        for step in steps:
            try:
                verdict = self.judged(step)
            except pytest.skip.Exception:
                continue
            if verdict.failures and step in self.explained:
                return [*lines[:1], f"{step}: see above, or test_step[{step}]"]
            if verdict.failures:
                self.explained.add(step)
                return [*lines[:1], *messages.message(verdict, self.next_step(step)).splitlines()]
        return lines

    def write(self) -> None:
        """Write the report of `--report`, if given."""
        if self.report is None:
            return
        ready_made = grading.ready_made_uses(self.path) if self.is_foreign else {}
        project = self.path.parent.parent if self.path.parent.name == "tests" else self.path
        # without steps of which the file has nothing that the public assignment asks for, and without courses
        # of which it has nothing
        courses = {_course_of(step) for step, verdict in self.verdicts.items() if verdict.status != "missing"}
        verdicts = {
            step: self.verdicts[step]
            for step in judge.STEPS
            if step in self.verdicts
            and (
                self.verdicts[step].status != "missing"
                or (self.verdicts[step].missing and _course_of(step) in courses)
            )
        }
        name = self.mine or project.name
        grading.write(Path(self.report), name, verdicts, self._ratios(), ready_made)

    def _ratios(self) -> dict[str, float]:
        """Time of each passed step relative to the reference: of two rounds each, the faster."""
        ratios = {}
        for name, verdict in self.verdicts.items():
            if verdict.status != "passed":
                continue
            seconds = min(verdict.seconds, self._judge(name).seconds)
            with swap.reference_only():
                own = min(judge.judge(judge.load(name), sockets.own()).seconds for _ in range(2))
            ratios[name] = seconds / own
        return ratios
