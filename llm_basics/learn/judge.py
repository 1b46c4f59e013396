"""The verdict on a step: passed, or the known mistake that explains the failure.

A step passes if every probe observes the results of an independent implementation. If not, the diagnosis is
the mistake of the catalogue with the same observations, a mistake with a fitted parameter, or a pair of
mistakes.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_basics import swap
from llm_basics.learn import families, lessons, messages, mistakes, pairs, probes, sandbox, sockets

# optional packages, by the step that requires them
NEEDS = {"flash_triton": "triton"}

# the steps that can run on this system, in learning order
STEPS = [
    name for name in [*lessons.ORDER, "checkpoint"] if importlib.util.find_spec(NEEDS.get(name, "torch"))
]


# errors of names and imports, and time limits, which are identified by their class
SLIPS = {"NameError", "UnboundLocalError", "ImportError", "ModuleNotFoundError", "stopped"}


@functools.cache
def load(name: str) -> probes.Step:
    """A step of the catalogue. Its wrong classes derive from the reference, not from the pieces in use."""
    with swap.reference_only():
        return importlib.import_module(f"{mistakes.__name__}.{name}").step


@functools.cache
def expected(step: str, index: int) -> probes.Observation:
    """The expected observation of a probe."""
    torch.manual_seed(0)
    with sandbox.unchanged_state():
        return load(step).probes[index].expected()


@functools.cache
def observation_of(step: str, mistake: str, index: int) -> probes.Observation:
    """The observation of a probe on the reference with one mistake."""
    with swap.reference_only(), sandbox.unchecked_shapes():
        made = next(m for m in load(step).mistakes if m.name == mistake)
        with swap.replaced({made.piece: made.wrong}):
            return probes.observe(load(step).probes[index], sockets.own())


@dataclass(frozen=True)
class Finding:
    """A failed probe of an implementation."""

    probe: str
    difference: tuple[str, ...]
    timed_out: bool = False


@dataclass(frozen=True)
class Verdict:
    """Result of an implementation of a step."""

    step: str
    status: str
    """passed, failed, timed out (without other failures) or not started."""
    failures: tuple[Finding, ...] = ()
    n_passed: int = 0
    """Number of the probes that ran."""
    n_probes: int = 0
    mistake: probes.Mistake | None = None
    also: probes.Mistake | None = None
    """The second mistake of a pair."""
    sure: bool = False
    """Whether the mistake, or the pair, explains every probe."""
    left: tuple[Finding, ...] = ()
    """The failures that it does not explain."""
    stub: str = ""
    """The message of the stub, if it is not started."""
    seconds: float = 0.0


def judge(step: probes.Step, adapters: Any) -> Verdict:
    """Run the probes of a step on an implementation, and diagnose its mistake."""
    started = time.perf_counter()
    seen: dict[int, probes.Observation] = {}
    for i, probe in enumerate(step.probes):
        try:
            seen[i] = probes.observe(probe, adapters)
        except NotImplementedError as stub:
            return Verdict(step.name, "not started", stub=str(stub))
        except sockets.MissingAdapter:
            continue  # an adapter of a second stage that is not started
        if probes.timed_out(seen[i]) or probes.kind(seen[i]) == "hangs":
            break  # the other probes would also time out
    seconds = time.perf_counter() - started
    return dataclasses.replace(conclude(step, seen), seconds=seconds)


def verdict_on(step: probes.Step, mistake: probes.Mistake) -> Verdict:
    """The verdict on the reference with one mistake."""
    seen: dict[int, probes.Observation] = {}
    for i in range(len(step.probes)):
        with contextlib.suppress(sockets.MissingAdapter):  # adapters of a second stage
            seen[i] = observation_of(step.name, mistake.name, i)
            if probes.kind(seen[i]) == "hangs":
                break
    return conclude(step, seen)


def conclude(step: probes.Step, seen: dict[int, probes.Observation]) -> Verdict:
    """The verdict on observations by the index of their probe."""
    wrong = [i for i in seen if probes.differing(step.probes[i], seen[i], expected(step.name, i))]
    found = {i: finding(step, i, seen[i]) for i in wrong}
    mistake, also, open_probes = find_mistake(step, seen, wrong) if wrong else NOTHING
    return Verdict(
        step.name,
        status_of(tuple(found.values())),
        tuple(found.values()),
        len(seen) - len(wrong),
        len(seen),
        mistake,
        also,
        mistake is not None and not open_probes,
        tuple(found[i] for i in open_probes),
    )


def finding(step: probes.Step, i: int, seen: probes.Observation) -> Finding:
    """The finding for a wrong observation of a probe."""
    lines = messages.differences(step.probes[i], expected(step.name, i), seen)
    escaped = tuple(line.replace("\r", "\\r").replace("\n", "\\n") for line in lines)
    return Finding(step.probes[i].about, escaped, probes.timed_out(seen))


def status_of(failures: Sequence[Finding]) -> str:
    """The status of a step with these failures."""
    wrong = "timed out" if all(failure.timed_out for failure in failures) else "failed"
    return wrong if failures else "passed"


# a mistake, the second mistake of a pair, and the indices of unexplained probes
Diagnosis = tuple[probes.Mistake | None, probes.Mistake | None, tuple[int, ...]]
NOTHING: Diagnosis = (None, None, ())


def find_mistake(
    step: probes.Step, seen: dict[int, probes.Observation], wrong: Sequence[int], has_pairs: bool = True
) -> Diagnosis:
    """The mistake with the same observations, or with another number or error, or two that explain them.

    If there is none, the one that explains most of them, at least half, and passes all probes that the
    implementation passes, since it may be one of two mistakes. Without pairs: only one that explains all.
    """

    def equals(i: int, known: probes.Observation) -> bool:
        return probes.kind(seen[i]) == probes.kind(known) and not probes.differing(
            step.probes[i], seen[i], known
        )

    def is_equal(mistake: probes.Mistake, i: int) -> bool:
        return equals(i, observation_of(step.name, mistake.name, i))

    order = [*wrong, *(i for i in seen if i not in wrong)]
    for mistake in step.mistakes:
        if all(is_equal(mistake, i) for i in order):
            return mistake, None, ()
    fitted = families.find(step, seen, wrong, equals) or with_another_error(step, seen, wrong)
    if fitted or not has_pairs:
        return fitted, None, ()
    pair = pairs.find(
        step,
        seen,
        wrong,
        lambda i: expected(step.name, i),
        lambda mistake, i: observation_of(step.name, mistake.name, i),
    )
    if pair:
        return *pair, ()
    best: Diagnosis = NOTHING
    # explaining fewer than half, or only errors, is weak evidence
    fewest = len(wrong) // 2 + 1
    for mistake in step.mistakes:
        if all(is_equal(mistake, i) for i in seen if i not in wrong):
            left = tuple(i for i in wrong if not is_equal(mistake, i))
            has_result = any("error" not in seen[i] for i in wrong if i not in left)
            if has_result and len(left) < fewest:
                best, fewest = (mistake, None, left), len(left)
    return best


def with_another_error(
    step: probes.Step, seen: dict[int, probes.Observation], wrong: Sequence[int]
) -> probes.Mistake | None:
    """The only mistake that raises in the same probes, with another class, and agrees elsewhere."""
    kinds = {probes.kind(seen[i]) for i in wrong} - {""}
    # without a result to compare, and for errors unrelated to the step, an error is not evidence
    if not kinds or kinds & SLIPS or all("error" in seen[i] for i in seen):
        return None
    order = [*wrong, *(i for i in seen if i not in wrong)]
    found = [
        mistake
        for mistake in step.mistakes
        if not any(
            probes.differing(step.probes[i], seen[i], observation_of(step.name, mistake.name, i))
            for i in order
        )
    ]
    return found[0] if len({mistake.same_as or mistake.name for mistake in found}) == 1 else None


def gradient_error(probe: probes.Probe) -> str:
    """The difference between the gradients of a probe and finite differences in float64; "" if none."""
    floats = {k: t.double() for k, t in probe.tensors.items() if t.is_floating_point()}
    if probe.function is None or not probe.gradients or not floats:
        return ""
    function = probe.function

    def of_floats(*values: Tensor) -> Tensor:
        return function(sockets.own(), **probe.tensors | dict(zip(floats, values, strict=True)))

    try:
        torch.autograd.gradcheck(of_floats, [t.clone().requires_grad_() for t in floats.values()])
    except Exception as error:
        return " ".join(str(error).split())[:100]
    return ""
