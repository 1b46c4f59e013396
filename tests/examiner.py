"""Grading in pytest of an implementation other than the reference: verdicts by step, messages, a report."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grading
import pytest

from llm_basics import swap
from llm_basics.learn import judge, messages, probes, sandbox, sockets

# for one test of user code
LIMIT_SECONDS = 60.0


class Examiner:
    """The implementation under test, its verdicts and test outcomes."""

    def __init__(self, config: pytest.Config) -> None:
        self.path = Path(config.getoption("--adapters")).resolve()
        self.mine = config.getoption("--mine")
        self.report = config.getoption("--report")
        self.is_foreign = self.path != sockets.own_path()
        self.is_grading = self.is_foreign or self.mine is not None
        if self.is_foreign and self.mine is not None:
            raise pytest.UsageError("--mine cannot be combined with --adapters; it uses the adapters here")
        self.verdicts: dict[str, judge.Verdict] = {}
        self.outcomes: dict[str, dict[str, int]] = {}
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
                module = grading.load_adapters(self.path)
            except Exception as error:
                pytest.exit(f"cannot load {self.path}: {type(error).__name__}: {messages.reason(error)}", 2)
            self._adapters = sockets.Adapters(
                module, lambda name: pytest.skip(f"{name} is not in {self.path}")
            )
        return self._adapters

    def judged(self, name: str) -> judge.Verdict:
        """The verdict on a step; skips the test if the user's file has no piece of it."""
        step = judge.load(name)
        own = {piece.split(".")[1] for piece in swap.user_pieces()}
        if self.mine is not None and not own & set(judge.pieces_of(name)):
            pytest.skip(f"{name}: not in {self.mine}")
        if name not in self.verdicts:
            bare = sockets.Adapters(self.adapters._module)
            self.verdicts[name] = judge.judge(step, bare)
        return self.verdicts[name]

    def next_step(self, name: str) -> str:
        """The command to run next for a step that does not pass."""
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
        """Run a test, user code with a time limit."""
        if not self.is_grading:
            return (yield)
        if self.is_foreign and item.get_closest_marker("beyond"):
            pytest.skip("beyond the public assignment")
        try:
            with sandbox.time_limit(LIMIT_SECONDS):
                return (yield)
        except sandbox.TimedOut:
            pytest.fail(f"not finished after {LIMIT_SECONDS:.0f} s", pytrace=False)

    def examine(self, item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
        """Count an outcome, and replace the traceback of a failure by the verdict on its step."""
        if not self.is_grading:
            return
        used = sorted(self._adapters.used) if self._adapters is not None else []
        for fixture in getattr(item, "fixturenames", ()):
            used += sorted(self.used_by.get(fixture, ()))
        if call.when == "teardown" and self._adapters is not None:
            self._adapters.used.clear()
        steps = list(dict.fromkeys(step for name in used if (step := grading.step_of(name))))
        if call.when == "call" or report.outcome != "passed":
            for step in steps:
                counts = self.outcomes.setdefault(step, {"passed": 0, "failed": 0, "skipped": 0})
                counts[report.outcome] += 1
        if call.excinfo is None or report.outcome != "failed" or item.name.startswith("test_step["):
            return
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
            if verdict.status == "failed" and step in self.explained:
                return [*lines[:1], f"{step}: see above, or test_step[{step}]"]
            if verdict.status == "failed":
                self.explained.add(step)
                return [*lines[:1], *messages.message(verdict, self.next_step(step)).splitlines()]
        return lines

    def write(self) -> None:
        """Write the report of `--report`, if given."""
        if self.report is None:
            return
        notes = grading.ready_made_uses(self.path) if self.is_foreign else {}
        project = self.path.parent.parent if self.path.parent.name == "tests" else self.path
        verdicts = {step: self.verdicts[step] for step in judge.STEPS if step in self.verdicts}
        name = self.mine or project.name
        grading.write(Path(self.report), name, verdicts, self.outcomes, self._ratios(), notes)

    def _ratios(self) -> dict[str, float]:
        """Time of each passed step relative to the reference: the fastest of three alternating rounds."""
        ratios = {}
        for name, verdict in self.verdicts.items():
            if verdict.status != "passed":
                continue
            step, bare, fastest = judge.load(name), sockets.Adapters(self.adapters._module), [1e9, 1e9]
            for _ in range(3):
                fastest[0] = min(fastest[0], judge.judge(step, bare).seconds)
                with swap.reference_only():
                    fastest[1] = min(fastest[1], judge.judge(step, sockets.own()).seconds)
            ratios[name] = fastest[0] / fastest[1]
        return ratios
