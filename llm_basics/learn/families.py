"""Mistakes with a parameter (an epsilon fixed at 1e-3, a mean over axis 0), inferred from observations.

Numbers are searched on a grid, refined, and rounded to as few digits as the observations allow; axes, dtypes
and groups are enumerated. The value is reported only if the observations determine it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llm_basics import swap
from llm_basics.learn import probes, sandbox, sockets

# maximum difference of a probe, in tolerances
FARTHEST = 1e6

# number of refinements, each of which divides the interval by 1.6
REFINEMENTS = 20

# number of probes compared in the search; the value found is verified on all
COMPARED = 3

Equal = Callable[[int, probes.Observation], bool]


def find(
    step: probes.Step, seen: dict[int, probes.Observation], wrong: Sequence[int], equal: Equal
) -> probes.Mistake | None:
    """The mistake with the same observations on all probes for some value of its parameter.

    `equal(i, known)` compares the observation of probe i.
    """
    compared = [i for i in wrong if "error" not in seen[i]][:COMPARED]
    passed = [i for i in seen if i not in wrong]
    for family in step.families if compared else ():

        @functools.cache
        def observed(value: Any, i: int, family: probes.Family = family) -> probes.Observation:
            with swap.reference_only(), sandbox.unchecked_shapes():
                with swap.replaced({family.piece: family.make(value)}):
                    return probes.observe(step.probes[i], sockets.own())

        @functools.cache
        def miss(value: float, observed: Callable[..., Any] = observed) -> float:
            return math.fsum(distance(step.probes[i], seen[i], observed(value, i)) for i in compared)

        if family.is_listed:
            found = [v for v in family.values if all(equal(i, observed(v, i)) for i in (*wrong, *passed))]
            if found:
                return family.mistake(found[0], is_determined=len(found) == 1)
            continue
        # rules out most families before the refinement
        nearest = min(family.values, key=miss)
        if passed and not any(equal(i, observed(nearest, i)) for i in passed):
            continue
        value = fit(family, nearest, miss)
        if all(equal(i, observed(value, i)) for i in (*wrong, *passed)):
            return family.mistake(value, is_determined(value, miss))
    return None


def fit(family: probes.Family, best: float, miss: Callable[[float], float]) -> float:
    """The value of minimal `miss` near the best of the grid, with the fewest digits of equal `miss`."""
    grid = family.values
    k = grid.index(best)
    best = min(best, _refined(grid[max(0, k - 1)], grid[min(k + 1, len(grid) - 1)], miss), key=miss)
    for digits in range(1, 7):
        rounded = float(f"{best:.{digits - 1}e}")
        if miss(rounded) <= 1.5 * miss(best) + 1e-3:
            return rounded
    return best


def _refined(low: float, high: float, miss: Callable[[float], float]) -> float:
    """Golden-section search between two numbers, by factors if they have the same sign."""
    sign = math.copysign(1, low)
    by_factors = low * high > 0
    ends = [math.log(abs(x)) if by_factors else x for x in (low, high)]

    def value(x: float) -> float:
        return sign * math.exp(x) if by_factors else x

    ratio = (math.sqrt(5) - 1) / 2
    left, right = ends
    one, two = right - ratio * (right - left), left + ratio * (right - left)
    for _ in range(REFINEMENTS):
        if miss(value(one)) < miss(value(two)):
            one, two, right = two - ratio * (two - left), one, two
        else:
            one, two, left = two, one + ratio * (right - one), one
    return value((left + right) / 2)


def is_determined(value: float, miss: Callable[[float], float]) -> bool:
    """Whether other values fit worse, so that the number can be reported."""
    near = [value * 1.02, value / 1.02] if value else [1e-3, -1e-3]
    return all(miss(other) > 2 * miss(value) + 1e-2 for other in near)


def distance(probe: probes.Probe, one: probes.Observation, other: probes.Observation) -> float:
    """The distance of two observations: mean logarithms of 1 + the difference in tolerances."""
    farthest = math.log1p(FARTHEST)
    if "error" in other:
        return farthest
    total = 0.0
    for facet in (name for name in one if name in other):
        a, b = numbers(one[facet]), numbers(other[facet])
        if a is None or b is None or a.shape != b.shape:
            total += 0.0 if a is b is None and one[facet] == other[facet] else farthest
        elif a.numel():
            off = (a - b).abs() / (probe.atol + probe.rtol * b.abs())
            # equal, both infinite or both NaN
            off[(a == b) | (a.isnan() & b.isnan())] = 0.0
            total += float(off.nan_to_num(FARTHEST).clamp(max=FARTHEST).log1p().mean())
    return total


def numbers(value: Any) -> Tensor | None:
    """All numbers in a tensor, a number, or lists and dicts of them; None for other values."""
    if isinstance(value, Tensor):
        return value.detach().cpu().double().flatten()
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return torch.tensor([float(value)], dtype=torch.float64)
    if isinstance(value, list | tuple | dict) and value:
        parts = [numbers(x) for x in (value.values() if isinstance(value, dict) else value)]
        found = [part for part in parts if part is not None]
        return torch.cat(found) if len(found) == len(parts) else None
    return None
