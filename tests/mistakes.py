"""The catalogue of mistakes: what a step must do, what learners get wrong in it, and which mistake one made.

Each file of `catalogue/` is a step. It has probes, inputs on which an implementation is observed (what comes
out, its dtype, the gradients, what it changed, how it failed), and mistakes, executable wrong versions of the
step's pieces. A step passes if every probe observes what an independent implementation gives. If not, the
mistake that is observed to do the very same is the one that was made.
"""

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import random
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import jaxtyping
import numpy as np
import torch
import wording
from torch import Tensor

from llm_basics import swap
from llm_basics.learn import lessons

TESTS = Path(__file__).resolve().parent

# in learning order
STEPS = [*lessons.ORDER, "checkpoint"]

# for one probe; far more than any needs
LIMIT_SECONDS = 10.0

TOO_LONG = "it took longer than"

# beyond the limit, before the whole program is ended
PATIENCE = 5.0

# what a probe saw: "output", "dtype", "gradient of x", "changed", ... or "error"
Observation = dict[str, Any]


class NotThere(BaseException):
    """An adapters file has no function of this name."""


class Adapters:
    """The functions of an adapters file. What to do about one that it lacks, `missing` says."""

    def __init__(self, module: ModuleType, missing: Callable[[str], Any] | None = None) -> None:
        self._module = module
        self._missing = missing
        self.used: set[str] = set()
        # a foreign one may copy them into layers, and then no gradient reaches them
        path = Path(getattr(module, "__file__", None) or ".").resolve()
        self.takes_weights_as_they_are = path == TESTS / "adapters.py"

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(("run_", "get_")):
            raise AttributeError(name)
        self.used.add(name)
        if not hasattr(self._module, name):
            if self._missing is not None:
                self._missing(name)
            raise NotThere(name)
        return getattr(self._module, name)


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
    function: Callable[..., Tensor] | None = None
    """Where tensors are compared: what is called with the adapters and these tensors."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    beyond: bool = False
    """Asked of our own pieces; of foreign ones, which do as the public assignment says, only advised."""


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
        beyond: bool = False,
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

        names = tuple(axes.split())
        differentiable = tensors if gradients else {}
        self.probes.append(
            Probe(about, observe, expected, rtol, atol, names, words, ours, differentiable, beyond)
        )

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
        beyond: bool = False,
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
                beyond=beyond,
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
    """A step of the catalogue, whose wrong classes are made from the reference's, whatever is in place."""
    with swap.reference_only():
        return importlib.import_module(f"catalogue.{name}").step


def sockets(step: str) -> list[str]:
    """The adapters that a step is reached through, that of its first probe first."""
    source = (TESTS / "catalogue" / f"{step}.py").read_text(encoding="utf-8")
    return list(dict.fromkeys(re.findall(r"\b(?:a|adapters)\.((?:run|get)_\w+)", source)))


@functools.cache
def step_of(adapter: str) -> str | None:
    """The first step in learning order that an adapter is used in."""
    return next((step for step in STEPS if adapter in sockets(step)), None)


@functools.cache
def own_adapters() -> Adapters:
    """The sockets of this package."""
    return Adapters(load_adapters(TESTS / "adapters.py"))


def load_adapters(path: Path) -> ModuleType:
    """An adapters file, which finds what stands beside it, or the package whose tests folder it is in."""
    for folder in (str(path.parent), str(path.parent.parent), str(path.parent.parent / "src")):
        if folder not in sys.path and Path(folder).is_dir():
            sys.path.insert(0, folder)
    _let_name_its_version(path.parent.parent)
    name = f"adapters_{abs(hash(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _let_name_its_version(project: Path) -> None:
    """Packages often ask for the version that is installed; one that stands beside its adapters is not."""
    known = importlib.metadata.version

    def version(name: str) -> str:
        try:
            return known(name)
        except importlib.metadata.PackageNotFoundError:
            if (project / name.replace("-", "_")).is_dir():
                return "0"
            raise

    importlib.metadata.version = version


# --------------------------------------------------------------------------------------------------
# Observing


def _observe_tensors(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], wanted: dict[str, Tensor]
) -> Observation:
    leaves = {k: t.clone().requires_grad_(k in wanted and t.is_floating_point()) for k, t in tensors.items()}
    # a leaf must not be changed in place, so that whoever does it fails; what is handed in here may be
    handed = {name: leaf * 1 if leaf.requires_grad else leaf for name, leaf in leaves.items()}
    output = function(**handed)
    if not isinstance(output, Tensor):
        raise TypeError(f"it must return a tensor, but returned {type(output).__name__}")
    seen: Observation = {
        "output": output.detach().clone(),
        "dtype": str(output.dtype).removeprefix("torch."),
        "changed": [name for name, tensor in tensors.items() if not wording.same(tensor, handed[name], 0, 0)],
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
        with time_limit(LIMIT_SECONDS), unchanged_state():
            return probe.observe(adapters)
    except NotImplementedError as error:
        if is_blank(error):
            raise
        return {"error": f"NotImplementedError: {' '.join(str(error).split())}"}
    except TookTooLong:
        return {"error": f"{TOO_LONG} {LIMIT_SECONDS:.0f} s and was stopped"}
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {wording.reason(error)}"}


def is_blank(error: NotImplementedError) -> bool:
    """Whether somebody's own line raises it; torch does so too, as for a module without `forward`."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    by_torch = "torch" in Path(place.filename).parts
    return (place.line or "").startswith("raise NotImplementedError") and not by_torch


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TookTooLong in the block when the time is over, and again and again until the block ends.

    Where there are signals, they end a sleep or a wait too; elsewhere it takes a next line of Python. What
    does not end even so ends the program.
    """
    over = threading.Event()
    thread, is_main = threading.get_ident(), threading.current_thread() is threading.main_thread()
    by_signal = is_main and hasattr(signal, "setitimer")

    def raise_it(*_: Any) -> None:
        raise TookTooLong

    def watch() -> None:
        waited = over.wait(seconds)
        while not waited and not by_signal and not (waited := over.wait(0.2)):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TookTooLong))
        if not waited and not over.wait(PATIENCE):
            print(
                f"error: what runs longer than {seconds:.0f} s cannot be stopped", file=sys.stderr, flush=True
            )
            os._exit(1)

    if by_signal:
        started, handler = time.monotonic(), signal.signal(signal.SIGALRM, raise_it)
        left, _ = signal.setitimer(signal.ITIMER_REAL, seconds, 0.2)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()
        if by_signal:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            if left:  # that of a block around this one
                signal.setitimer(signal.ITIMER_REAL, max(left - time.monotonic() + started, 0.01), 0.2)


@contextlib.contextmanager
def unchanged_state() -> Iterator[None]:
    """What code can change for all that runs after it is as usual in the block, and as before behind it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(before)


@functools.cache
def _expected(probe_of: str, index: int) -> Observation:
    torch.manual_seed(0)
    with unchanged_state():
        return load(probe_of).probes[index].expected()


@functools.cache
def observation_of(step: str, mistake: str, index: int) -> Observation:
    """What a probe of a step sees of the reference with one mistake in it."""
    with swap.reference_only(), _unchecked_shapes():
        made = next(m for m in load(step).mistakes if m.name == mistake)
        with swap.replaced({made.piece: made.wrong}):
            return observe(load(step).probes[index], own_adapters())


def observations_of(step: str, mistake: str) -> dict[int, Observation]:
    """What all probes of a step see of the reference with one mistake in it, by their number."""
    return {index: observation_of(step, mistake, index) for index in range(len(load(step).probes))}


@contextlib.contextmanager
def _unchecked_shapes() -> Iterator[None]:
    """Let a mistake go as far as it goes: that shapes are checked would stop it early, and in tests alone."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


# --------------------------------------------------------------------------------------------------
# Comparing


def alike(probe: Probe, one: Observation, other: Observation) -> bool:
    """Whether two observations are the same. Any two errors are; facets that only one has do not count."""
    if "error" in one or "error" in other:
        return "error" in one and "error" in other
    return all(wording.same(one[k], other[k], probe.rtol, probe.atol) for k in one.keys() & other.keys())


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
    advice: tuple[str, ...] = ()
    """What would be better still; a foreign implementation passes without."""
    missing: tuple[str, ...] = ()
    """What an adapters file lacks, so that it was not checked."""
    seconds: float = 0.0


def judge(step: Step, adapters: Any) -> Verdict:
    """Put an implementation through the probes of a step, and find out which mistake it makes."""
    started = time.perf_counter()
    seen: dict[int, Observation] = {}
    lacking: dict[str, None] = {}
    for i, probe in enumerate(step.probes):
        try:
            seen[i] = observe(probe, adapters)
        except NotImplementedError as blank:
            return Verdict(step.name, "not started", difference=(str(blank),))
        except NotThere as name:
            lacking[str(name)] = None
        if i in seen and TOO_LONG in seen[i].get("error", ""):
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


def conclude(step: Step, seen: dict[int, Observation]) -> Verdict:
    """What follows from observations, by the number of the probe."""
    wrong = [i for i in seen if not alike(step.probes[i], seen[i], _expected(step.name, i))]
    if not wrong:
        return Verdict(step.name, "passed")
    first = step.probes[wrong[0]]
    mistake, sure = _which(step, seen, wrong)
    told = tuple(wording.differences(first, _expected(step.name, wrong[0]), seen[wrong[0]]))
    return Verdict(step.name, "failed", first.about, told, mistake, sure)


def _kind(seen: Observation) -> str:
    """The type of an error, if it is one."""
    return seen.get("error", "").split(":")[0]


def _which(step: Step, seen: dict[int, Observation], wrong: Sequence[int]) -> tuple[Mistake | None, bool]:
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


def gradient_error(probe: Probe) -> str:
    """How the gradients of a probe differ from finite differences in float64; "" where they do not."""
    floats = {k: t.double() for k, t in probe.tensors.items() if t.is_floating_point()}
    if probe.function is None or not floats:
        return ""
    function = probe.function

    def of_floats(*values: Tensor) -> Tensor:
        return function(own_adapters(), **probe.tensors | dict(zip(floats, values, strict=True)))

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
