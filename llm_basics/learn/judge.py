"""The verdict on a step: passed, or which mistake was made.

A step passes if every probe observes what an independent implementation gives. If not, the mistake that is
observed to do the very same is the one that was made.
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
    """A step of the catalogue, whose wrong classes are made from the reference's, whatever is in place."""
    with swap.reference_only():
        return importlib.import_module(f"{mistakes.__name__}.{name}").step


@functools.cache
def _expected(probe_of: str, index: int) -> probes.Observation:
    torch.manual_seed(0)
    with sandbox.unchanged_state():
        return load(probe_of).probes[index].expected()


@functools.cache
def observation_of(step: str, mistake: str, index: int) -> probes.Observation:
    """What a probe of a step sees of the reference with one mistake in it."""
    with swap.reference_only(), sandbox.unchecked_shapes():
        made = next(m for m in load(step).mistakes if m.name == mistake)
        with swap.replaced({made.piece: made.wrong}):
            return probes.observe(load(step).probes[index], sockets.own())


def observations_of(step: str, mistake: str) -> dict[int, probes.Observation]:
    """What all probes of a step see of the reference with one mistake in it, by their number."""
    return {index: observation_of(step, mistake, index) for index in range(len(load(step).probes))}


# --------------------------------------------------------------------------------------------------
# Comparing


def alike(probe: probes.Probe, one: probes.Observation, other: probes.Observation) -> bool:
    """Whether two observations are the same. Any two errors are; facets that only one has do not count."""
    if "error" in one or "error" in other:
        return "error" in one and "error" in other
    return all(messages.same(one[k], other[k], probe.rtol, probe.atol) for k in one.keys() & other.keys())


@dataclass(frozen=True)
class Verdict:
    """How an implementation of a step did."""

    step: str
    status: str
    """passed, failed, not started, or missing (an adapters file lacks what the step needs)."""
    probe: str = ""
    difference: tuple[str, ...] = ()
    mistake: probes.Mistake | None = None
    sure: bool = False
    """Whether the mistake was seen to do the same on every probe, not on the failing one alone."""
    advice: tuple[str, ...] = ()
    """What would be better still; a foreign implementation passes without."""
    missing: tuple[str, ...] = ()
    """What an adapters file lacks, so that it was not checked."""
    seconds: float = 0.0


def judge(step: probes.Step, adapters: Any) -> Verdict:
    """Put an implementation through the probes of a step, and find out which mistake it makes."""
    started = time.perf_counter()
    seen: dict[int, probes.Observation] = {}
    lacking: dict[str, None] = {}
    for i, probe in enumerate(step.probes):
        try:
            seen[i] = probes.observe(probe, adapters)
        except NotImplementedError as blank:
            return Verdict(step.name, "not started", difference=(str(blank),))
        except sockets.NotThere as name:
            lacking[str(name)] = None
        if i in seen and probes.TOO_LONG in seen[i].get("error", ""):
            break  # each of the others would wait as long
    if not seen:
        return Verdict(step.name, "missing", missing=tuple(lacking))
    seconds = time.perf_counter() - started
    advice: tuple[str, ...] = ()
    if not adapters.takes_weights_as_they_are:
        more = [i for i in seen if step.probes[i].beyond]
        verdicts = [(step.probes[i].about, conclude(step, {i: seen.pop(i)})) for i in more]
        advice = tuple(about for about, verdict in verdicts if verdict.status != "passed")
    verdict = conclude(step, seen)
    return dataclasses.replace(verdict, advice=advice, missing=tuple(lacking), seconds=seconds)


def conclude(step: probes.Step, seen: dict[int, probes.Observation]) -> Verdict:
    """What follows from observations, by the number of the probe."""
    wrong = [i for i in seen if not alike(step.probes[i], seen[i], _expected(step.name, i))]
    if not wrong:
        return Verdict(step.name, "passed")
    first = step.probes[wrong[0]]
    mistake, sure = _which(step, seen, wrong)
    told = tuple(messages.differences(first, _expected(step.name, wrong[0]), seen[wrong[0]]))
    return Verdict(step.name, "failed", first.about, told, mistake, sure)


def _kind(seen: probes.Observation) -> str:
    """The type of an error, if it is one."""
    return seen.get("error", "").split(":")[0]


def _which(
    step: probes.Step, seen: dict[int, probes.Observation], wrong: Sequence[int]
) -> tuple[probes.Mistake | None, bool]:
    """The mistake that does the same, and whether on all probes.

    If there is none, the one that does the same on the first wrong probe and on most others, and nothing
    wrong where the implementation is right: it may be one of two.
    """
    best, most = None, 0
    for mistake in step.mistakes:

        def is_equal(i: int, name: str = mistake.name) -> bool:
            theirs = observation_of(step.name, name, i)
            return alike(step.probes[i], seen[i], theirs) and _kind(seen[i]) == _kind(theirs)

        # most differ here already
        if not is_equal(wrong[0]) or not all(is_equal(i) for i in seen if i not in wrong):
            continue
        equal = [i for i in wrong if is_equal(i)]
        if equal == list(wrong):
            return mistake, True
        # that both fail with an error says little
        if any("error" not in seen[i] for i in equal) and len(equal) > most:
            best, most = mistake, len(equal)
    return best, False


def gradient_error(probe: probes.Probe) -> str:
    """How the gradients of a probe differ from finite differences in float64; "" where they do not."""
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
    """The names that somebody writes in a step."""
    if step in lessons.ORDER:
        return lessons.load(step).pieces
    return sorted({mistake.piece.split(".")[1] for mistake in load(step).mistakes})
