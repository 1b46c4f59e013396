"""Pairs of mistakes in one step, inferred from the observations of each alone.

A probe affected by neither must have the correct observation; by one, that one's; by both, that of their
composition: both run together, or the sum or product of their deviations. Both must be evident.
"""

import contextlib
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llm_basics import swap
from llm_basics.learn import families, messages, probes, sandbox, sockets

# maximum number of pairs to run together, to reproduce the observations
MOST_RUN = 400

Pair = tuple[probes.Mistake, probes.Mistake]


def find(
    step: probes.Step,
    seen: dict[int, probes.Observation],
    wrong: Sequence[int],
    expected: Callable[[int], probes.Observation],
    observed: Callable[[probes.Mistake, int], probes.Observation],
) -> Pair | None:
    """The only pair of mistakes that explains all observations, or None."""
    if all("error" in seen[i] for i in wrong):
        return None  # errors alone are weak evidence
    passed = [i for i in seen if i not in wrong]

    def is_right(mistake: probes.Mistake, i: int) -> bool:
        return not probes.differing(step.probes[i], expected(i), observed(mistake, i))

    distinct = [mistake for mistake in step.mistakes if mistake.same_as is None]
    possible = [mistake for mistake in distinct if all(is_right(mistake, i) for i in passed)]
    found: list[tuple[int, Pair]] = []
    for pair in itertools.combinations(possible, 2):
        evident, n_open = [0, 0], 0
        for i in wrong:
            two = [observed(mistake, i) for mistake in pair]
            share = explained(step.probes[i], expected(i), seen[i], *two)
            if share is None:
                break
            evident = [count + is_evident for count, is_evident in zip(evident, share[0], strict=True)]
            n_open += share[1]
        else:
            # each is evident in a probe, and in as many as are open
            if min(evident) >= max(n_open, 1):
                found.append((n_open, pair))
    found.sort(key=lambda each: each[0])
    candidates = [pair for _, pair in found] or list(itertools.combinations(possible, 2))[:MOST_RUN]
    run = [pair for pair in candidates if is_given_by(step, seen, (*wrong, *passed), pair)]
    best = run or [pair for n_open, pair in found if n_open == found[0][0]]
    return best[0] if len(best) == 1 else None


def explained(
    probe: probes.Probe,
    right: probes.Observation,
    seen: probes.Observation,
    one: probes.Observation,
    other: probes.Observation,
) -> tuple[tuple[bool, bool], bool] | None:
    """Whether each of two mistakes is evident in an observation, and whether the observation is open.

    It is open if both change a result that is neither their sum nor their product. None if the observation
    contradicts the pair.
    """

    def is_equal(known: probes.Observation) -> bool:
        return probes.kind(seen) == probes.kind(known) and not probes.differing(probe, seen, known)

    off = [probes.differing(probe, right, known) for known in (one, other)]
    if not all(off):
        shown = one if off[0] else other
        has_result = "error" not in seen
        return (
            ((bool(off[0]) and has_result, bool(off[1]) and has_result), False) if is_equal(shown) else None
        )
    if any("error" in each for each in (seen, one, other)):
        return ((False, False), False) if is_equal(one) or is_equal(other) else None
    evident, is_open = [False, False], False
    for facet in (name for name in right if all(name in each for each in (seen, one, other))):
        changed = [facet in each for each in off]
        if all(changed):
            values = (value[facet] for value in (right, seen, one, other))
            *shares, is_unlike = mixed(probe, *map(families.numbers, values))
            evident = [a or b for a, b in zip(evident, shares, strict=True)]
            # gradients depend on the output
            is_open |= is_unlike and not facet.startswith("gradient")
            continue
        alone = one if changed[0] else other if changed[1] else right
        if messages.same(seen[facet], alone[facet], probe.rtol, probe.atol):
            evident = [a or b for a, b in zip(evident, changed, strict=True)]
        elif not facet.startswith("gradient"):
            return None
    return (evident[0], evident[1]), is_open


def mixed(probe: probes.Probe, *values: Tensor | None) -> tuple[bool, bool, bool]:
    """Whether each of two mistakes is evident in numbers that both change, and whether the result is open.

    A number changed by one mistake must equal that one's; if changed by both, it must deviate by their
    product or sum. A sum is not evidence, since other pairs may give the same.
    """
    right, seen, one, other = (torch.zeros(0) if value is None else value for value in values)
    if not right.numel() or not right.shape == seen.shape == one.shape == other.shape:
        return False, False, True

    def is_close(x: Tensor, y: Tensor) -> Tensor:
        return torch.isclose(x, y, rtol=probe.rtol, atol=probe.atol, equal_nan=True)

    off = [~is_close(value, right) for value in (one, other)]
    # NaN equals NaN
    finite = seen.isfinite()
    both = off[0] & off[1]
    alone = torch.where(off[0], one, torch.where(off[1], other, right))
    if not is_close(seen, alone)[~both].all():
        return False, False, True
    if not is_close(seen, one * other / right)[both].all():
        return False, False, not bool(is_close(seen, one + other - right)[both].all())
    return bool((off[0] & finite).any()), bool((off[1] & finite).any()), False


# --------------------------------------------------------------------------------------------------
# Run together


def is_given_by(
    step: probes.Step, seen: dict[int, probes.Observation], order: Sequence[int], pair: Pair
) -> bool:
    """Whether two mistakes, run together if possible, reproduce all observations."""
    for pieces in together(*pair):
        for i in order:
            with swap.reference_only(), sandbox.unchecked_shapes(), swap.replaced(pieces):
                known = probes.observe(step.probes[i], sockets.own())
            if probes.kind(seen[i]) != probes.kind(known):
                break
            if probes.differing(step.probes[i], seen[i], known):
                break
        else:
            return True
    return False


def together(one: probes.Mistake, other: probes.Mistake) -> Iterator[dict[str, Any]]:
    """Pieces with both mistakes: of two pieces, two classes, or a function that calls the correct one."""
    if one.piece != other.piece:
        yield {one.piece: one.wrong, other.piece: other.wrong}
        return
    for first, second in ((one.wrong, other.wrong), (other.wrong, one.wrong)):
        if isinstance(first, type) and isinstance(second, type):
            with contextlib.suppress(TypeError):  # one derives from the other
                yield {one.piece: type("Both", (first, second), {})}
        elif isinstance(first, types.FunctionType):
            right = swap.reference(one.piece)
            calls = {name: second for name in first.__code__.co_names if first.__globals__.get(name) is right}
            if calls:
                known = first.__globals__ | calls
                both = types.FunctionType(
                    first.__code__, known, first.__name__, first.__defaults__, first.__closure__
                )
                yield {one.piece: both}
