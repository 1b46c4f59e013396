"""Checks of a file of user code: the status of each step, and the mistake in failed ones."""

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from llm_basics import swap, user_code
from llm_basics.cli import parse
from llm_basics.learn import judge, lessons, messages, sandbox, sockets

# time limit for executing a file, before its pieces are called
LOAD_SECONDS = 60.0


@dataclass(frozen=True)
class Result:
    """Result of a step. `text` is the message for the user."""

    step: str
    status: str
    """passed, failed, timed out or not started."""
    text: str


def check(path: str | Path, only: str | None = None, log: Callable[[str], None] = print) -> Iterator[Result]:
    """Check each step with pieces in the file, or `only` this one, in learning order.

    `log` is called with warnings about the file. Raises ValueError if the file fails to run, or if a
    signature does not match the reference.
    """
    torch.set_num_threads(1)
    sandbox.interpret_triton()
    with swap.restored():
        try:
            with sandbox.time_limit(LOAD_SECONDS), sandbox.unchanged_state():
                swap.use(path, log, check_shapes)
        except sandbox.TimedOut:
            raise ValueError(f"{path} must load within {LOAD_SECONDS:.0f} s") from None
        own = {piece.split(".")[1] for piece in swap.user_pieces()}
        wrong: set[str] = set()
        for name in [only] if only else lessons.ORDER:
            lesson = lessons.load(name)
            written = own & set(lesson.pieces)
            if not written:
                continue
            verdict = judge.judge(judge.load(name), sockets.own())
            hint = f"next hint: uv run python -m llm_basics.learn hint {name} --mine {path}"
            missing = [piece for piece in lesson.needed if piece not in own and _is_required(piece, written)]
            stub = verdict.stub.split(".")[0]
            if stub in swap.HOMES and stub not in lesson.pieces:
                yield Result(name, "not started", f"{name}: depends on {stub}, which is not started")
            elif verdict.status == "passed" and missing:
                yield Result(name, "not started", f"{name}: correct so far, {', '.join(missing)} not started")
            elif verdict.status == "passed":
                problems = list(_backward_errors(name, path))
                text = f"{name}: {'failed' if problems else 'passed'}"
                text = "\n".join([text, *problems, *_second_stage(lesson)])
                yield Result(name, "failed" if problems else "passed", text)
            else:
                used = set().union(*(_all_used_by(piece) for piece in written)) - written
                used &= _wrong_among(used & own) if only else wrong
                if used:
                    hint = f"depends on {', '.join(sorted(used))}, which does not pass; fix that first"
                yield Result(name, verdict.status, messages.message(verdict, hint))
            if verdict.status != "passed":
                wrong |= written


def _second_stage(lesson: lessons.Lesson) -> Iterator[str]:
    """A line with the parameters of the step's second stage that are missing in the file, if any."""
    if lesson.later:
        piece = f"{swap.HOMES[lesson.pieces[0]]}.{lesson.pieces[0]}"
        missing = user_code.parameters(swap.reference(piece)) - user_code.parameters(swap.current(piece))
        if missing:
            names = ", ".join(name for name in lesson.later if name in missing)
            yield f"  second stage, see the lesson: {names}"


def _is_required(piece: str, written: set[str]) -> bool:
    """Whether a step needs another piece beside those written: not if a class implements it itself."""
    classes = [name for name in written if name[0].isupper()]
    return not classes or any(piece in _used_by(name) for name in classes)


def _all_used_by(piece: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """The pieces that a piece calls, directly or indirectly."""
    found = _used_by(piece) & swap.HOMES.keys()
    for name in found - seen:
        found = found | _all_used_by(name, seen | found | {piece})
    return found


def _wrong_among(pieces: set[str]) -> set[str]:
    """The user pieces whose steps do not pass."""
    steps = {step for piece in pieces if (step := lessons.of_piece(piece))}
    verdicts = [judge.judge(judge.load(step), sockets.own()) for step in sorted(steps)]
    failed = {verdict.step for verdict in verdicts if verdict.status != "passed"}
    return {piece for piece in pieces if lessons.of_piece(piece) in failed}


def _used_by(piece: str) -> set[str]:
    own: Any = swap.current(f"{swap.HOMES[piece]}.{piece}")
    return user_code.mentioned(own) - {piece}


# --------------------------------------------------------------------------------------------------
# Checks beside the probes: shapes and custom backward passes


def check_shapes(module: ModuleType) -> None:
    """Check shapes against annotations in every call of a function of `module`."""
    try:
        import beartype
        import jaxtyping
    except ImportError:
        return  # installed with the test dependencies only
    checked = jaxtyping.jaxtyped(typechecker=beartype.beartype)

    def _checked(function: Any) -> Any:
        if inspect.isgeneratorfunction(inspect.unwrap(function)):
            return function  # contextlib.contextmanager returns another type than the annotated iterator
        try:
            return checked(function)
        except Exception:
            return function  # a lambda, or an annotation that is not a type, such as torch.tensor

    for name, value in list(vars(module).items()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            setattr(module, name, _checked(value))
        elif inspect.isclass(value) and not _is_autograd(value):
            for method, body in list(vars(value).items()):
                if inspect.isfunction(body):
                    setattr(value, method, _checked(body))


def _is_autograd(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, torch.autograd.Function)


def _backward_errors(name: str, path: str | Path) -> Iterator[str]:
    """Compare custom backward passes with finite differences in float64.

    Skips steps whose piece is a custom backward pass, since their probes compare hundreds of gradients.
    """
    if any(_is_autograd(swap.current(f"{swap.HOMES[piece]}.{piece}")) for piece in lessons.load(name).pieces):
        return
    module = sys.modules[f"yours_{Path(path).resolve().stem}"]
    own = filter(_is_autograd, vars(module).values())
    if not any(value.__module__ == module.__name__ for value in own):
        return
    for probe in judge.load(name).probes:
        wrong = judge.gradient_error(probe)
        if wrong:
            yield f"  {probe.about}: the backward pass is not the derivative of the forward pass: {wrong}"


# --------------------------------------------------------------------------------------------------
# The catalogue


def print_mistakes(only: str | None = None) -> int:
    """Test every known mistake, and print the numbers of caught and named ones."""
    if only is not None and only not in judge.STEPS:
        raise ValueError(parse.unknown_name("step", only, judge.STEPS))
    torch.set_num_threads(1)
    sandbox.interpret_triton()
    totals = [0, 0, 0]
    print("| step | mistakes | caught | named |\n|---|---|---|---|")
    for name in [only] if only else judge.STEPS:
        step = judge.load(name)
        caught = named = 0
        for mistake in step.mistakes:
            verdict = judge.verdict_on(step, mistake)
            caught += verdict.status != "passed"
            found = verdict.mistake.name if verdict.mistake is not None and verdict.sure else None
            named += found == (mistake.same_as or mistake.name)
        counts = [len(step.mistakes), caught, named]
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        print(f"| {name} | {' | '.join(map(str, counts))} |", flush=True)
        if only:
            print("\n" + "\n".join(f"- {mistake.name}: {mistake.explanation}" for mistake in step.mistakes))
    if not only:
        print(f"| all | {' | '.join(map(str, totals))} |")
    return 0 if totals[0] == totals[1] == totals[2] else 1
