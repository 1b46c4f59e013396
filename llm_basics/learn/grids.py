"""Grids of initial values for mistakes with a parameter, and their format in messages."""

import itertools
import math

import torch

# values of families: dtypes of a reduction, and of a table or weights
AXES = {f"axis {axis}": axis for axis in range(-3, 3)} | {
    f"axes {axes}": axes for ends in (range(-3, 0), range(3)) for axes in itertools.combinations(ends, 2)
}
DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")}


def powers(low: float, high: float, per_decade: int = 3) -> list[float]:
    """Numbers from `low` to `high`, evenly spaced by factors."""
    n = round(per_decade * math.log10(high / low))
    return [low * (high / low) ** (i / n) for i in range(n + 1)]


def short(value: float | str) -> str:
    """A number in source code format: 0.25, 1e-3, 500000."""
    if isinstance(value, str):
        return value
    text = f"{value:.6g}" if value == 0 or 1e-2 <= abs(value) < 1e6 else f"{value:.5e}"
    mantissa, _, exponent = text.partition("e")
    if not exponent:
        return text
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
