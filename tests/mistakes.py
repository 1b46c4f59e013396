"""The catalogue of mistakes: what a step must do, what learners get wrong in it, and which mistake one made.

Each file of `catalogue/` is a step. It has probes, inputs on which an implementation is observed (what comes
out, its dtype, the gradients, what it changed, how it failed), and mistakes, executable wrong versions of the
step's pieces. A step passes if every probe observes what an independent implementation gives. If not, the
mistake that is observed to do the very same is the one that was made.
"""

import contextlib
import ctypes
import functools
import importlib
import itertools
import math
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_basics import swap

TESTS = Path(__file__).parent

# in learning order
STEPS = (
    "linear embedding softmax cross_entropy silu gelu swiglu rms_norm layer_norm rope attention multi_head "
    "block transformer adamw clipping schedule batches bpe tokenizer train_step evaluation sampling "
    "checkpoint"
).split()

# for one probe; far more than any needs
LIMIT_SECONDS = 10.0

# what a probe saw: "output", "dtype", "gradient of x", "changed", ... or "error"
Observation = dict[str, Any]


class NotThere(Exception):
    """An adapters file has no function of this name."""


class TookTooLong(BaseException):
    """Raised inside of what runs longer than it may."""


# --------------------------------------------------------------------------------------------------
# What a step is made of


@dataclass(frozen=True)
class Probe:
    """One thing that is checked of a step."""

    about: str
    observe: Callable[[Any], Observation]
    expected: Callable[[], Observation]
    rtol: float
    atol: float
    axes: tuple[str, ...] = ()
    words: Callable[[Any, Any], str] | None = None


@dataclass(frozen=True)
class Mistake:
    """A wrong version of a piece. `says`: what it is, why it matters, where to look."""

    name: str
    piece: str
    wrong: Any
    says: str
    source: str
    same_as: str | None = None


@dataclass
class Step:
    """The probes and the mistakes of one step of learning."""

    name: str
    probes: list[Probe] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)

    def compare(
        self,
        about: str,
        ours: Callable[..., Tensor],
        right: Callable[..., Tensor],
        inputs: dict[str, Tensor],
        weights: dict[str, Tensor] | None = None,
        *,
        axes: str = "",
        rtol: float = 1e-4,
        atol: float = 1e-5,
        gradients: bool = True,
        words: Callable[[Any, Any], str] | None = None,
    ) -> None:
        """Check `ours(adapters, **inputs, **weights)` against `right(**inputs, **weights)`.

        Compared are output, dtype, the gradients of all floating-point tensors, and whether an input was
        changed. Gradients of `weights` are not asked of foreign adapters, which may copy them into layers.
        `axes` names the axes of the output; `words` puts the first difference of the output into words.
        """
        weights = weights or {}
        tensors = inputs | weights

        def observe(adapters: Any) -> Observation:
            wanted = tensors if getattr(adapters, "takes_weights_as_they_are", True) else inputs
            return _observe_tensors(functools.partial(ours, adapters), tensors, wanted if gradients else {})

        def expected() -> Observation:
            return _observe_tensors(right, tensors, tensors if gradients else {})

        self.probes.append(Probe(about, observe, expected, rtol, atol, tuple(axes.split()), words))

    def value(
        self,
        about: str,
        ours: Callable[[Any], Any],
        right: Any,
        *,
        axes: str = "",
        rtol: float = 1e-4,
        atol: float = 1e-5,
        words: Callable[[Any, Any], str] | None = None,
    ) -> None:
        """Check that `ours(adapters)` gives `right`: tensors, numbers, texts, or lists and dicts of them."""
        self.probes.append(
            Probe(
                about,
                lambda adapters: {"result": ours(adapters)},
                lambda: {"result": right},
                rtol,
                atol,
                tuple(axes.split()),
                words,
            )
        )

    def mistake(self, piece: str, source: str, same_as: str | None = None) -> Callable[[Any], Any]:
        """Register a wrong version of `functional.softmax` or such; its docstring is for the learner."""

        def register(wrong: Any) -> Any:
            name = _spaced(wrong.__name__)
            says = " ".join(wrong.__doc__.split())
            self.mistakes.append(Mistake(name, piece, wrong, says, source, same_as and _spaced(same_as)))
            return wrong

        return register


def _spaced(name: str) -> str:
    """`NoOutputProjection` and `no_output_projection` as `no output projection`."""
    parts = "".join(f" {c.lower()}" if c.isupper() else c for c in name) if "_" not in name else name
    return parts.replace("_", " ").strip()


def numbers(seed: int) -> Callable[..., Tensor]:
    """A source of normal random numbers in float32, the same in every run."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


@functools.cache
def load(name: str) -> Step:
    """A step of the catalogue."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    return importlib.import_module(f"catalogue.{name}").step


@functools.cache
def own_adapters() -> ModuleType:
    """The sockets of this package."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    spec = importlib.util.spec_from_file_location("own_adapters", TESTS / "adapters.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --------------------------------------------------------------------------------------------------
# Observing


def _observe_tensors(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], wanted: dict[str, Tensor]
) -> Observation:
    leaves = {k: t.clone().requires_grad_(k in wanted and t.is_floating_point()) for k, t in tensors.items()}
    # a leaf must not be changed in place, so that whoever does it fails; what is handed in here may be
    handed = {name: leaf * 1 if leaf.requires_grad else leaf for name, leaf in leaves.items()}
    output = function(**handed)
    seen: Observation = {
        "output": output.detach().clone(),
        "dtype": str(output.dtype).removeprefix("torch."),
        "changed": [name for name, tensor in tensors.items() if not _same(tensor, handed[name], 0, 0)],
    }
    learned = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not learned:
        return seen
    if not output.requires_grad:
        return seen | {f"gradient of {name}": None for name in learned}
    weighting = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    found = torch.autograd.grad(output, list(learned.values()), weighting, allow_unused=True)
    return seen | {f"gradient of {name}": g for name, g in zip(learned, found, strict=True)}


def observe(probe: Probe, adapters: Any) -> Observation:
    """What a probe sees of an implementation. Errors are seen too; what is missing or not begun is raised."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    try:
        with time_limit(LIMIT_SECONDS):
            return probe.observe(adapters)
    except NotImplementedError:
        raise
    except TookTooLong:
        return {"error": f"it took longer than {LIMIT_SECONDS:.0f} s and was stopped"}
    except NotThere:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        return {"error": f"{type(error).__name__}: {text}" if text else type(error).__name__}


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TookTooLong in the block when the time is over, at the next line of Python that it runs."""
    thread, done, lock = threading.get_ident(), False, threading.Lock()

    def stop() -> None:
        with lock:
            if not done:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread), ctypes.py_object(TookTooLong)
                )

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            done = True
        timer.cancel()


@functools.cache
def _expected(probe_of: str, index: int) -> Observation:
    torch.manual_seed(0)
    return load(probe_of).probes[index].expected()


@functools.cache
def observations_of(step: str, mistake: str | None) -> tuple[Observation, ...]:
    """What the probes of a step see of the reference with one mistake in it."""
    with swap.the_reference_alone():
        chosen = [m for m in load(step).mistakes if m.name == mistake]
        with swap.replaced({m.piece: m.wrong for m in chosen}):
            return tuple(observe(probe, own_adapters()) for probe in load(step).probes)


# --------------------------------------------------------------------------------------------------
# Comparing


def _same(a: Any, b: Any, rtol: float, atol: float) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
            return False
        if not a.is_floating_point():
            return torch.equal(a, b)
        return torch.allclose(a.double(), b.double(), rtol=rtol, atol=atol, equal_nan=True)
    if isinstance(a, float) and isinstance(b, float | int) and not isinstance(b, bool):
        return math.isclose(a, b, rel_tol=rtol, abs_tol=atol) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k], rtol, atol) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y, rtol, atol) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def alike(probe: Probe, one: Observation, other: Observation) -> bool:
    """Whether two observations are the same. Any two errors are; facets that only one has do not count."""
    if "error" in one or "error" in other:
        return "error" in one and "error" in other
    return all(_same(one[k], other[k], probe.rtol, probe.atol) for k in one.keys() & other.keys())


@dataclass(frozen=True)
class Verdict:
    """How an implementation of a step did."""

    step: str
    status: str
    """passed, failed, not started, or missing (an adapters file lacks what the step needs)."""
    probe: str = ""
    difference: tuple[str, ...] = ()
    mistake: Mistake | None = None
    sure: bool = False
    """Whether the mistake was seen to do the same on every probe, not on the failing one alone."""
    missing: tuple[str, ...] = ()
    """What an adapters file lacks, so that it was not checked."""
    seconds: float = 0.0


def judge(step: Step, adapters: Any) -> Verdict:
    """Put an implementation through the probes of a step, and find out which mistake it makes."""
    started = time.perf_counter()
    seen: dict[int, Observation] = {}
    missing = []
    for i, probe in enumerate(step.probes):
        try:
            seen[i] = observe(probe, adapters)
        except NotImplementedError:
            return Verdict(step.name, "not started")
        except NotThere as name:
            missing.append(str(name))
    if not seen:
        return Verdict(step.name, "missing", missing=tuple(missing))
    seconds = time.perf_counter() - started
    wrong = [i for i in seen if not alike(step.probes[i], seen[i], _expected(step.name, i))]
    if not wrong:
        return Verdict(step.name, "passed", missing=tuple(missing), seconds=seconds)
    first = step.probes[wrong[0]]
    mistake, sure = _which(step, seen, wrong)
    words = tuple(explain_difference(first, _expected(step.name, wrong[0]), seen[wrong[0]]))
    return Verdict(step.name, "failed", first.about, words, mistake, sure, tuple(missing), seconds)


def _which(step: Step, seen: dict[int, Observation], wrong: Sequence[int]) -> tuple[Mistake | None, bool]:
    """The mistake that does the same, and whether on all probes, or on the first wrong one and more."""
    best, most = None, 0
    for mistake in step.mistakes:
        theirs = observations_of(step.name, mistake.name)
        equal = {i: alike(step.probes[i], seen[i], theirs[i]) for i in seen}
        if all(equal.values()):
            return mistake, True
        is_clear = equal[wrong[0]] and "error" not in seen[wrong[0]]
        if is_clear and sum(equal[i] for i in wrong) > most:
            best, most = mistake, sum(equal[i] for i in wrong)
    return best, False


# --------------------------------------------------------------------------------------------------
# In words


def explain_difference(probe: Probe, expected: Observation, actual: Observation) -> Iterator[str]:
    """What is wrong in `actual`, most telling first."""
    if "error" in actual:
        yield f"it failed: {actual['error']}"
        return
    if "error" in expected:
        yield "it must refuse this with an error, but gave a result"
        return
    wrong = [k for k in expected if k in actual and not _same(expected[k], actual[k], probe.rtol, probe.atol)]
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
        yield "the output is right; only the gradient is wrong"


def _first_difference(right: Any, found: Any, probe: Probe, axes: Sequence[str]) -> str:
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
            text += f" ({len(places)} of {close.numel()} are wrong"
            off = (right.double() - found.double()).abs().nan_to_num(0, 0, 0) * ~close
            if off.max() > 0:
                largest = tuple(int(i) for i in np.unravel_index(int(off.argmax()), off.shape))
                text += f", by up to {_number(off.max())} {_place(largest, axes).rstrip(' :')}"
            text += ")"
        return text
    if isinstance(right, list | tuple) and isinstance(found, list | tuple):
        for i, (x, y) in enumerate(itertools.zip_longest(right, found, fillvalue="nothing")):
            if not _same(x, y, probe.rtol, probe.atol):
                place = f"{axes[0]} {i}" if axes else f"place {i}"
                if isinstance(x, list | tuple | dict | Tensor) and type(x) is type(y):
                    return f"at {place}: " + _first_difference(x, y, probe, axes[1:])
                return f"at {place}: expected {_short(x)}, got {_short(y)}"
    if isinstance(right, dict) and isinstance(found, dict):
        for key in [*right, *(k for k in found if k not in right)]:
            x, y = right.get(key, "nothing"), found.get(key, "nothing")
            if not _same(x, y, probe.rtol, probe.atol):
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
