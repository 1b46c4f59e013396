"""What is wrong, in words: the first wrong element, the largest difference, the mistake that was made."""

import itertools
import math
import re
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

WIDTH = 100

# of numbers, which read badly on two lines
LINE = 114

# of a message, all told
MOST_LINES = 12


def same(a: Any, b: Any, rtol: float, atol: float) -> bool:
    """Whether two results are equal, numbers within a tolerance and NaN like NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
            return False
        if not a.is_floating_point():
            return torch.equal(a, b)
        return torch.allclose(a.double(), b.double(), rtol=rtol, atol=atol, equal_nan=True)
    numbers = [isinstance(x, float | int) and not isinstance(x, bool) for x in (a, b)]
    if all(numbers) and (isinstance(a, float) or isinstance(b, float)):
        return math.isclose(a, b, rel_tol=rtol, abs_tol=atol) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], rtol, atol) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y, rtol, atol) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def differences(probe: Any, expected: dict[str, Any], actual: dict[str, Any]) -> Iterator[str]:
    """What is wrong in `actual`, most telling first."""
    if "error" in actual:
        yield f"it failed: {actual['error']}"
        return
    if "error" in expected:
        yield "it must refuse this with an error, but gave a result"
        return
    # what comes out first, then what goes back
    wrong = [k for k in expected if k in actual and not same(expected[k], actual[k], probe.rtol, probe.atol)]
    for facet in wrong:
        right, found = expected[facet], actual[facet]
        if facet in ("output", "result") and probe.words is not None:
            yield probe.words(right, found)
        elif facet == "changed":
            yield f"it changes its input {', '.join(found)} in place"
        elif facet == "dtype":
            yield f"the result must be {right}, got {found}"
        elif facet.startswith("gradient") and found is None:
            yield f"no gradient reaches {facet.removeprefix('gradient of ')}: it was copied or detached"
        else:
            name = "" if facet in ("output", "result") else f"{facet}: "
            yield name + _first_difference(right, found, probe, probe.axes if not name else ())
    if wrong and all(facet.startswith("gradient") for facet in wrong):
        yield "the output is right, only the gradient is wrong"
    elif "output" in wrong and isinstance(actual["output"], Tensor):
        gradients = [k for k in expected if k.startswith("gradient") and k in actual]
        right = [k for k in gradients if k not in wrong]
        shape, dtype = tuple(actual["output"].shape), actual["dtype"]
        which = f"right: {', '.join(right)}" if right else "the gradients are wrong too"
        yield f"the output is {dtype} of shape {shape}" + (f"; {which}" if gradients else "")


def reason(error: BaseException) -> str:
    """What an error says, in one line: of a shape that was checked the parameter, what it must be and what it
    was; and the place in the code that it came from."""
    text = " ".join(str(error).split())
    if isinstance(error, RecursionError):
        text = "it calls itself without end (what is reached through llm_basics is your own piece here)"
    found = re.search(
        r"typechecking parameter '(\w+)'.*?Actual value: (.*?) Expected type: (.*?)\. ?-----", text
    )
    if found:
        text = f"{found[1]} must be {found[3]}, got {found[2]}"
    places = traceback.extract_tb(error.__traceback__)
    # where somebody's own code is, and not a library that it calls
    place = next((p for p in reversed(places) if "site-packages" not in p.filename), places[-1])
    return f"{text or 'without a word'} ({Path(place.filename).name}:{place.lineno})"


def message(verdict: Any, how_to_go_on: str) -> str:
    """What a learner reads of a step that is not right: twelve lines at most, the mistake among them."""
    if verdict.status == "not started":
        return f"{verdict.step}: not started"
    lines = [f"{verdict.step}: {verdict.probe}"]
    for line in verdict.difference[:3]:
        # what an error says has no end that could be left out
        width = 2 * WIDTH if line.startswith("it failed") else LINE
        lines += textwrap.wrap(
            textwrap.shorten(line, width), LINE, initial_indent="  ", subsequent_indent="    "
        )
    mistake = verdict.mistake
    if mistake is None:
        lines.append("  no known mistake does the same")
    else:
        name = mistake.name.upper()
        unsure = f"here it does the same as: {name} (is there a second mistake?)"
        lines.append(f"  this is: {name}" if verdict.sure else f"  {unsure}")
        lines += textwrap.wrap(mistake.says, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join([*lines[: MOST_LINES - 1], f"  {how_to_go_on}"])


def _first_difference(right: Any, found: Any, probe: Any, axes: Sequence[str]) -> str:
    if isinstance(right, Tensor) and isinstance(found, Tensor):
        if right.shape != found.shape:
            return f"the shape must be {tuple(right.shape)}, got {tuple(found.shape)}"
        close = torch.isclose(
            right.double(), found.double(), rtol=probe.rtol, atol=probe.atol, equal_nan=True
        )
        places = (~close).nonzero()
        if not len(places):
            return f"it must be {right.dtype}, got {found.dtype}"
        first = tuple(places[0].tolist())
        text = f"{_place(first, axes)}expected {_number(right[first])}, got {_number(found[first])}"
        if close.numel() > 1:
            text += f"; {len(places)} of {close.numel()} wrong"
            off = (right.double() - found.double()).abs().nan_to_num(0, 0, 0) * ~close
            if off.max() > 0:
                largest = tuple(int(i) for i in np.unravel_index(int(off.argmax()), off.shape))
                text += f", by up to {off.max():.2g} at {list(largest)}"
        return text
    if isinstance(right, list | tuple) and isinstance(found, list | tuple):
        for i, (x, y) in enumerate(itertools.zip_longest(right, found, fillvalue="nothing")):
            if not same(x, y, probe.rtol, probe.atol):
                place = f"{axes[0]} {i}" if axes else f"place {i}"
                if isinstance(x, list | tuple | dict | Tensor) and type(x) is type(y):
                    return f"at {place}: " + _first_difference(x, y, probe, axes[1:])
                return f"at {place}: expected {_short(x)}, got {_short(y)}"
    if isinstance(right, dict) and isinstance(found, dict):
        for key in [*right, *(k for k in found if k not in right)]:
            x, y = right.get(key, "nothing"), found.get(key, "nothing")
            if not same(x, y, probe.rtol, probe.atol):
                if isinstance(x, list | tuple | dict | Tensor) and type(x) is type(y):
                    return f"{key}: " + _first_difference(x, y, probe, axes)
                return f"{key}: expected {_short(x)}, got {_short(y)}"
    return f"expected {_short(right)}, got {_short(found)}"


def _place(index: tuple[int, ...], axes: Sequence[str]) -> str:
    """`at batch 0, query 3: ` for named axes, counted from the last; else `at [0, 3]: `."""
    if not index:
        return ""
    if len(axes) != len(index):
        return f"at {list(index)}: "
    return "at " + ", ".join(f"{axis} {i}" for axis, i in zip(axes, index, strict=True)) + ": "


def _number(value: Any) -> str:
    number = value.item() if isinstance(value, Tensor) else value
    return f"{number:.4g}" if isinstance(number, float) else str(number)


def _short(value: Any) -> str:
    text = _number(value) if isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
