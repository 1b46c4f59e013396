"""The verdict on a step: passed, or the known mistake that it makes.

A step passes if every probe observes the results of an independent implementation. If not, the mistake of the
catalogue with exactly the same observations is named.
"""

import dataclasses
import functools
import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_basics import swap
from llm_basics.learn import lessons, messages, mistakes, probes, sandbox, sockets

# in learning order
STEPS = [*lessons.ORDER, "checkpoint"]


@functools.cache
def load(name: str) -> probes.Step:
    """A step of the catalogue. Its wrong classes derive from the reference, whatever is in use."""
    with swap.reference_only():
        return importlib.import_module(f"{mistakes.__name__}.{name}").step


@functools.cache
def _expected(probe_of: str, index: int) -> probes.Observation:
    torch.manual_seed(0)
    with sandbox.unchanged_state():
        return load(probe_of).probes[index].expected()


@functools.cache
def observation_of(step: str, mistake: str, index: int) -> probes.Observation:
    """The observation of one probe on the reference with one mistake in it."""
    with swap.reference_only(), sandbox.unchecked_shapes():
        made = next(m for m in load(step).mistakes if m.name == mistake)
        with swap.replaced({made.piece: made.wrong}):
            return probes.observe(load(step).probes[index], sockets.own())


# --------------------------------------------------------------------------------------------------
# Comparing


def alike(probe: probes.Probe, one: probes.Observation, other: probes.Observation) -> bool:
    """Whether two observations are equal. Any two errors are; facets that only one has are ignored."""
    if "error" in one or "error" in other:
        return "error" in one and "error" in other
    return all(messages.same(one[k], other[k], probe.rtol, probe.atol) for k in one.keys() & other.keys())


@dataclass(frozen=True)
class Verdict:
    """Result of an implementation of a step."""

    step: str
    status: str
    """passed, failed, not started, or missing (the adapters file lacks functions of the step)."""
    probe: str = ""
    difference: tuple[str, ...] = ()
    mistake: probes.Mistake | None = None
    sure: bool = False
    """Whether the mistake matches on every probe, not only on the failing one."""
    advice: tuple[str, ...] = ()
    """Probes beyond the public assignment that failed; a foreign implementation passes without them."""
    missing: tuple[str, ...] = ()
    """Functions that the adapters file lacks, which were not checked."""
    seconds: float = 0.0


def judge(step: probes.Step, adapters: Any) -> Verdict:
    """Run the probes of a step on an implementation, and find the mistake that it makes."""
    started = time.perf_counter()
    seen: dict[int, probes.Observation] = {}
    lacking: dict[str, None] = {}
    for i, probe in enumerate(step.probes):
        try:
            seen[i] = probes.observe(probe, adapters)
        except NotImplementedError as stub:
            return Verdict(step.name, "not started", difference=(str(stub),))
        except sockets.MissingAdapter as name:
            lacking[str(name)] = None
        if i in seen and probes.TIMEOUT in seen[i].get("error", ""):
            break  # the other probes would time out too
    if not seen:
        return Verdict(step.name, "missing", missing=tuple(lacking))
    seconds = time.perf_counter() - started
    advice: tuple[str, ...] = ()
    if not adapters.keeps_weights:
        more = [i for i in seen if step.probes[i].beyond]
        verdicts = [(step.probes[i].about, conclude(step, {i: seen.pop(i)})) for i in more]
        advice = tuple(about for about, verdict in verdicts if verdict.status != "passed")
    verdict = conclude(step, seen)
    return dataclasses.replace(verdict, advice=advice, missing=tuple(lacking), seconds=seconds)


def conclude(step: probes.Step, seen: dict[int, probes.Observation]) -> Verdict:
    """The verdict on observations, by the number of the probe."""
    wrong = [i for i in seen if not alike(step.probes[i], seen[i], _expected(step.name, i))]
    if not wrong:
        return Verdict(step.name, "passed")
    first = step.probes[wrong[0]]
    mistake, sure = _which(step, seen, wrong)
    lines = tuple(messages.differences(first, _expected(step.name, wrong[0]), seen[wrong[0]]))
    return Verdict(step.name, "failed", first.about, lines, mistake, sure)


def _kind(seen: probes.Observation) -> str:
    """The type of the error, or ""."""
    return seen.get("error", "").split(":")[0]


def _which(
    step: probes.Step, seen: dict[int, probes.Observation], wrong: Sequence[int]
) -> tuple[probes.Mistake | None, bool]:
    """The mistake with the same observations, and whether on all probes.

    If there is none, the one that matches on the first wrong probe and on most others, and passes every probe
    that the implementation passes: it may be one of two mistakes.
    """
    best, most = None, 0
    for mistake in step.mistakes:

        def is_equal(i: int, name: str = mistake.name) -> bool:
            known = observation_of(step.name, name, i)
            return alike(step.probes[i], seen[i], known) and _kind(seen[i]) == _kind(known)

        # rules out most mistakes
        if not is_equal(wrong[0]) or not all(is_equal(i) for i in seen if i not in wrong):
            continue
        equal = [i for i in wrong if is_equal(i)]
        if equal == list(wrong):
            return mistake, True
        # two errors alone are weak evidence
        if any("error" not in seen[i] for i in equal) and len(equal) > most:
            best, most = mistake, len(equal)
    return best, False


def gradient_error(probe: probes.Probe) -> str:
    """How the gradients of a probe differ from finite differences in float64, or ""."""
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


def pieces_of(step: str) -> list[str]:
    """Names of the pieces of a step."""
    if step in lessons.ORDER:
        return lessons.load(step).pieces
    return sorted({mistake.piece.split(".")[1] for mistake in load(step).mistakes})
