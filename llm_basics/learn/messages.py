"""Messages for a failed step: the first wrong element, the largest difference, the known mistake."""

import itertools
import math
import os.path
import re
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

WIDTH = 100

# width of lines of numbers, which are hard to read when wrapped
LINE = 114

# maximum number of lines of a message, and of its differences
MAX_LINES, MAX_DIFFERENCES = 12, 5

# maximum number of characters of a value, and of the text of an error
SHOWN, ERROR = 60, 180


def same(a: Any, b: Any, rtol: float, atol: float) -> bool:
    """Whether two results are equal, numbers within a tolerance and with NaN equal to NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
            return False
        a, b = a.cpu(), b.cpu()
        if not a.is_floating_point():
            return torch.equal(a, b)
        return torch.allclose(a.double(), b.double(), rtol=rtol, atol=atol, equal_nan=True)
    if all(isinstance(x, Real) and not isinstance(x, bool) for x in (a, b)):
        if isinstance(a, Integral) and isinstance(b, Integral):
            return bool(a == b)
        return math.isclose(a, b, rel_tol=rtol, abs_tol=atol) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], rtol, atol) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y, rtol, atol) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def differences(probe: Any, expected: dict[str, Any], actual: dict[str, Any]) -> Iterator[str]:
    """Descriptions of the differences between `actual` and `expected`, the most informative first."""
    if "error" in actual:
        error = actual["error"]
        yield error if error.startswith(("stopped: ", "hangs: ", "mismatch: ")) else f"it raised {error}"
        return
    if "error" in expected:
        yield "it must raise an error here, but returned a result"
        return
    # outputs before gradients
    wrong = [k for k in expected if k in actual and not same(expected[k], actual[k], probe.rtol, probe.atol)]
    for facet in wrong:
        right, found = expected[facet], actual[facet]
        if facet in ("output", "result") and probe.words is not None:
            try:
                yield probe.words(right, found)
            except Exception:  # foreign code may return any value
                yield _first_difference(right, found, probe, ())
        elif facet == "changed":
            yield f"it modifies its input {', '.join(found)} in place"
        elif facet == "dtype":
            yield f"the dtype must be {right}, got {found}"
        elif facet.startswith("gradient") and found is None:
            yield f"no gradient reaches {facet.removeprefix('gradient of ')}; it was copied or detached"
        else:
            name = "" if facet in ("output", "result") else f"{facet}: "
            yield name + _first_difference(right, found, probe, probe.axes if not name else ())
    if wrong and all(facet.startswith("gradient") for facet in wrong):
        yield "the output is correct, only the gradient is wrong"
    elif "output" in wrong and isinstance(actual["output"], Tensor):
        gradients = [k for k in expected if k.startswith("gradient") and k in actual]
        right = [k for k in gradients if k not in wrong]
        shape, dtype = tuple(actual["output"].shape), str(actual["output"].dtype).removeprefix("torch.")
        which = f"correct: {', '.join(right)}" if right else "the gradients are wrong too"
        yield f"the output is {dtype} of shape {shape}" + (f"; {which}" if gradients else "")


def reason(error: BaseException) -> str:
    """An error as one line with its location; for a failed shape check, the parameter and both shapes."""
    text = " ".join(str(error).split())
    if isinstance(error, RecursionError):
        text = "infinite recursion (a piece called through llm_basics is your piece here)"
    found = re.search(
        r"typechecking parameter '(\w+)'.*?Actual value: (.*?) Expected type: (.*?)\. ?-----", text
    )
    if found:
        text = f"{found[1]} must be {found[3]}, got {found[2]}"
    frames = traceback.extract_tb(error.__traceback__)
    # the innermost line of user code, not of a library
    frame = next((f for f in reversed(frames) if "site-packages" not in f.filename), frames[-1])
    text = textwrap.shorten(text, ERROR, placeholder=" ...") or "no message"
    return f"{text} ({Path(frame.filename).name}:{frame.lineno})"


def message(verdict: Any, next_step: str) -> str:
    """The message for a step that did not pass, in at most twelve lines, with the mistake if it is known."""
    if verdict.status == "not started":
        return f"{verdict.step}: not started"
    first = verdict.failures[0]
    lines = [f"{verdict.step}: {first.probe} ({verdict.n_passed} of {verdict.n_probes} probes passed)"]
    for line in first.difference[:3]:
        wrapped = textwrap.wrap(line, LINE, initial_indent="  ", subsequent_indent="    ")
        # only complete descriptions
        if len(lines) == 1 or len(lines) + len(wrapped) <= MAX_DIFFERENCES + 1:
            lines += wrapped
    return "\n".join([*lines, *_named(verdict)][: MAX_LINES - 1] + [f"  {next_step}"])


def _named(verdict: Any) -> Iterator[str]:
    """The lines on the known mistake, the second one of a pair, and a single unexplained probe."""
    if verdict.mistake is None:
        yield "  no known mistake gives this result"
        return
    name = verdict.mistake.name.upper()
    is_open = not verdict.sure and len(verdict.left) > 1
    yield f"  here it matches: {name} (is there a second mistake?)" if is_open else f"  mistake: {name}"
    # for two mistakes, only the first sentence of each
    text = verdict.mistake.explanation if verdict.also is None else _fault(verdict.mistake.explanation)
    yield from textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")
    if verdict.also is not None:
        yield f"  and also: {verdict.also.name.upper()}"
        text = _fault(verdict.also.explanation)
        yield from textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")
    elif len(verdict.left) == 1:
        left = verdict.left[0]
        text = f"and also, {left.probe}: {left.difference[0]}"
        yield from textwrap.wrap(text, LINE, initial_indent="  ", subsequent_indent="    ")


def _fault(explanation: str) -> str:
    """The first sentence of an explanation."""
    return re.split(r"(?<=[.!?]) (?=[A-Z])", explanation)[0]


def _first_difference(right: Any, found: Any, probe: Any, axes: Sequence[str]) -> str:
    if isinstance(right, Tensor) and isinstance(found, Tensor):
        if right.shape != found.shape:
            return f"the shape must be {tuple(right.shape)}, got {tuple(found.shape)}"
        close = torch.isclose(
            right.double(), found.double(), rtol=probe.rtol, atol=probe.atol, equal_nan=True
        )
        wrong = (~close).nonzero()
        if not len(wrong):
            return f"the dtype must be {right.dtype}, got {found.dtype}"
        first = tuple(wrong[0].tolist())
        named = ", ".join(f"{axis} {i}" for axis, i in zip(axes, first, strict=False))
        text = f"at {named if len(axes) == len(first) else list(first)}: " if first else ""
        text += f"expected {_number(right[first])}, got {_number(found[first])}"
        if close.numel() > 1:
            text += f"; {len(wrong)} of {close.numel()} wrong"
            off = (right.double() - found.double()).abs().nan_to_num(0, 0, 0) * ~close
            if off.max() > 0:
                largest = tuple(int(i) for i in np.unravel_index(int(off.argmax()), off.shape))
                text += f", by up to {off.max():.2g} at {list(largest)}"
        return text
    if isinstance(right, list | tuple) and isinstance(found, list | tuple):
        for i, (x, y) in enumerate(itertools.zip_longest(right, found, fillvalue="nothing")):
            if not same(x, y, probe.rtol, probe.atol):
                position = f"{axes[0]} {i}" if axes else f"index {i}"
                if isinstance(x, list | tuple | dict | Tensor) and type(x) is type(y):
                    return f"at {position}: " + _first_difference(x, y, probe, axes[1:])
                return f"at {position}: {_pair(x, y)}"
    if isinstance(right, dict) and isinstance(found, dict):
        for key in [*right, *(k for k in found if k not in right)]:
            x, y = right.get(key, "nothing"), found.get(key, "nothing")
            if not same(x, y, probe.rtol, probe.atol):
                if isinstance(x, list | tuple | dict | Tensor) and type(x) is type(y):
                    return f"{key}: " + _first_difference(x, y, probe, axes)
                return f"{key}: {_pair(x, y)}"
    return _pair(right, found)


def _number(value: Any) -> str:
    number = value.item() if isinstance(value, Tensor) else value
    return f"{number:.4g}" if isinstance(number, float) else str(number)


def _pair(right: Any, found: Any) -> str:
    """Both values; long ones are cut to start shortly before their first difference."""
    texts = [_number(value) if isinstance(value, float) else repr(value) for value in (right, found)]
    start = max(0, len(os.path.commonprefix(texts)) - SHOWN // 3) if max(map(len, texts)) > SHOWN else 0
    right, found = (
        "..." * (start > 0) + text[start : start + SHOWN] + "..." * (start + SHOWN < len(text))
        for text in texts
    )
    return f"expected {right}, got {found}"
