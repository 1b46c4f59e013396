"""Probes of a step: inputs for an implementation, and the expected observation.

An observation consists of the output, its dtype, gradients and the inputs modified in place, or of the error.
"""

import contextlib
import functools
import random
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

# imported by the first gradient; here, so that it does not count in the time limit of a probe
import torch.fx.experimental.symbolic_shapes  # noqa: F401
from torch import Tensor

from llm_basics import swap
from llm_basics.learn import grids, messages, sandbox

# limit of CPU time per probe; the slowest takes a fraction
LIMIT_SECONDS = 10.0

# start of the error of a probe that timed out
TIMEOUT = "stopped: not finished after"

# "output", "dtype", "gradient of x", "changed", ... or "error"
Observation = dict[str, Any]


@dataclass(frozen=True)
class Probe:
    """One check of a step."""

    about: str
    observe: Callable[[Any], Observation]
    expected: Callable[[], Observation]
    rtol: float
    atol: float
    axes: tuple[str, ...] = ()
    words: Callable[[Any, Any], str] | None = None
    # to compare tensors: called with the adapters and `tensors`, and with `tensors` alone
    function: Callable[..., Tensor] | None = None
    right: Callable[..., Tensor] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    # whether gradients of `tensors` are also compared
    gradients: bool = False
    contract: str = ""
    """Key of the sentence of the public assignment (contract.yaml) that requires it; without one, it is
    advice for foreign adapters."""
    beyond: str = ""
    """Reason for a probe that no sentence requires; omitted for functions that the assignment lacks."""
    on_rank: Callable[[Any], Observation] | None = None
    """The function of each rank, for probes on several (`ranks`, with its own detection of deadlocks)."""


@dataclass(frozen=True)
class Mistake:
    """A wrong version of a piece. `explanation`: the fault, its effect, and a hint at its location."""

    name: str
    piece: str
    wrong: Any
    explanation: str
    source: str
    same_as: str | None = None


@dataclass(frozen=True)
class Family:
    """A mistake with a parameter: `make(value)` is the wrong version of the piece.

    `values` is the grid of the search: floats in ascending order, between which the value may be, or a
    complete list of integers or names (`axis -2`). `explanation` contains `{value}`.
    """

    name: str
    piece: str
    make: Callable[[Any], Any]
    values: tuple[Any, ...]
    explanation: str
    unknown: str
    """Placeholder for a value that the probes do not determine."""

    @property
    def is_listed(self) -> bool:
        """Whether the grid is a complete list of values."""
        return not any(isinstance(value, float) for value in self.values)

    def mistake(self, value: Any, is_determined: bool = True) -> Mistake:
        """The mistake with this value, which is reported only if the probes determine it."""
        text = self.explanation.format(value=grids.short(value) if is_determined else self.unknown)
        return Mistake(self.name, self.piece, self.make(value), text, "found by search")


@dataclass
class Step:
    """The probes and the mistakes of one step."""

    name: str
    probes: list[Probe] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    families: list[Family] = field(default_factory=list)

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
        **ground: Any,
    ) -> None:
        """Check `ours(adapters, **inputs, **weights)` against `right(**inputs, **weights)`.

        Compares output, dtype, gradients of all floating-point tensors, and in-place changes of inputs.
        Gradients of `weights` are not compared for foreign adapters, which may copy weights into layers.
        `axes` are the names of the axes of the output; `words` describes the first difference of the output;
        `ground` is `contract` or `beyond`, the sentence or the reason for foreign adapters.
        """
        weights = weights or {}
        tensors = inputs | weights

        def observe(adapters: Any) -> Observation:
            wanted = inputs if adapters.is_foreign else tensors
            return observe_tensors(functools.partial(ours, adapters), tensors, wanted if gradients else {})

        def expected() -> Observation:
            return observe_tensors(right, tensors, tensors if gradients else {})

        more = tuple(axes.split()), words, ours, right, tensors, gradients
        self.probes.append(Probe(about, observe, expected, rtol, atol, *more, **ground))

    def weight_gradients(
        self,
        about: str,
        ours: Callable[..., Tensor],
        right: Callable[..., Tensor],
        inputs: dict[str, Tensor],
        weights: dict[str, Tensor],
    ) -> None:
        """Check the gradients of the parameters of a layer, including foreign layers."""
        beyond = "the public tests do not train a layer, but its weights learn from their gradients alone"

        def observe(adapters: Any) -> Observation:
            return observe_weights(functools.partial(ours, adapters), inputs, weights)

        right_ones = functools.partial(observe_weights, right, inputs, weights)
        self.probes.append(Probe(about, observe, right_ones, 1e-4, 1e-5, beyond=beyond))

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
        **ground: Any,
    ) -> None:
        """Check that `ours(adapters)` equals `right`: tensors, numbers, strings, lists, dicts."""

        def observe(adapters: Any) -> Observation:
            return {"result": ours(adapters)}

        more = tuple(axes.split()), words
        self.probes.append(Probe(about, observe, lambda: {"result": right}, rtol, atol, *more, **ground))

    def mistake(self, piece: str, source: str, same_as: str | None = None) -> Callable[[Any], Any]:
        """Register a wrong version of a piece (`functional.softmax`); its docstring is the explanation."""

        def register(wrong: Any) -> Any:
            name = _spaced(wrong.__name__)
            text = " ".join(wrong.__doc__.split())
            self.mistakes.append(Mistake(name, piece, wrong, text, source, same_as and _spaced(same_as)))
            return wrong

        return register

    def family(
        self, piece: str, values: Iterable[float] | Mapping[str, Any], unknown: str = "a fixed number"
    ) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
        """Register a function from a value to a wrong version; its docstring is the explanation.

        Values other than numbers (axes, dtypes) have names for the message.
        """

        def register(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
            text = " ".join((make.__doc__ or "").split())
            by_name = (lambda name: make(values[name])) if isinstance(values, Mapping) else make
            self.families.append(Family(_spaced(make.__name__), piece, by_name, tuple(values), text, unknown))
            return make

        return register

    def factor(self, piece: str) -> None:
        """Register a constant factor on the output of a piece as a mistake."""
        right = swap.reference(piece)

        @self.family(piece, [sign * x for sign in (-1, 1) for x in grids.powers(1e-3, 1e3)])
        def factor_on_the_output(value: float) -> Any:
            """The output is {value} times what it must be, the same for every input. Look for a constant that
            multiplies or divides it, or for a mean that counts too much or too little."""
            return lambda *args, **kwargs: right(*args, **kwargs) * value


def _spaced(name: str) -> str:
    """`NoOutputProjection` and `no_output_projection` as `no output projection`."""
    parts = "".join(f" {c.lower()}" if c.isupper() else c for c in name) if "_" not in name else name
    return parts.replace("_", " ").strip()


def numbers(seed: int) -> Callable[..., Tensor]:
    """A deterministic generator of normal random tensors in float32."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


# --------------------------------------------------------------------------------------------------
# Observations


def observe_tensors(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], wanted: dict[str, Tensor]
) -> Observation:
    """The output of `function(**tensors)`, inputs that it modifies, and gradients of `wanted`.

    The gradients are those of a random weighting of the output.
    """
    leaves = {k: t.clone().requires_grad_(k in wanted and t.is_floating_point()) for k, t in tensors.items()}
    # torch forbids in-place changes of leaves, but not of these copies
    arguments = {name: leaf * 1 if leaf.requires_grad else leaf for name, leaf in leaves.items()}
    output = function(**arguments)
    if not isinstance(output, Tensor):
        raise TypeError(f"the result must be a tensor, got {type(output).__name__}")
    seen: Observation = {
        "output": output.detach().cpu().clone(),
        "dtype": str(output.dtype).removeprefix("torch."),
        "changed": [
            name for name, tensor in tensors.items() if not messages.same(tensor, arguments[name], 0.0, 0.0)
        ],
    }
    inputs = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not inputs:
        return seen
    if not output.requires_grad:
        return seen | {f"gradient of {name}": None for name in inputs}
    weighting = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    found = torch.autograd.grad(output, list(inputs.values()), weighting, allow_unused=True)
    return seen | {f"gradient of {name}": g for name, g in zip(inputs, found, strict=True)}


def observe_weights(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], weights: dict[str, Tensor]
) -> Observation:
    """Gradients of the weights of a layer that stores them unchanged, copied, or transposed.

    Parameters are found by value among the leaves of the graph; concatenated ones are not observed.
    """
    given = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    output = function(**{name: tensor.clone() for name, tensor in inputs.items()}, **given)
    found = graph_leaves(output.grad_fn)
    if not found:
        return {f"gradient of {name}": None for name in weights}
    weighting = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    gradients = torch.autograd.grad(output, found, weighting)
    seen: Observation = {}
    for name, weight in weights.items():
        for leaf, gradient in zip(found, gradients, strict=True):
            values = leaf.detach().to(weight)
            if torch.equal(values, weight):
                seen[f"gradient of {name}"] = gradient
            elif torch.equal(values.mT if values.dim() > 1 else values, weight):
                seen[f"gradient of {name}"] = gradient.mT
    if len(found) == len(seen):
        seen |= {f"gradient of {name}": None for name in weights if f"gradient of {name}" not in seen}
    return seen


def graph_leaves(node: Any) -> list[Tensor]:
    """The leaf tensors of a graph."""
    leaves: list[Tensor] = []
    waiting, known = [node], {None}
    while waiting:
        node = waiting.pop()
        if node not in known:
            known.add(node)
            leaves += [node.variable] if hasattr(node, "variable") else []
            waiting += [following for following, _ in node.next_functions]
    return leaves


def observe(probe: Probe, adapters: Any, seconds: float | None = None) -> Observation:
    """The observation of a probe. It includes errors, except those of missing adapters and of stubs."""
    seconds = seconds or LIMIT_SECONDS
    random.seed(0)
    np.random.seed(0)
    # torch.manual_seed also records a traceback per kind of device: a quarter of the time of a check
    torch.default_generator.manual_seed(0)
    try:
        limit = contextlib.nullcontext() if probe.on_rank else sandbox.time_limit(seconds)
        with limit, sandbox.unchanged_state():
            return probe.observe(adapters)
    except NotImplementedError as error:
        if is_stub(error):
            raise
        return {"error": f"NotImplementedError: {' '.join(str(error).split())}"}
    except sandbox.TimedOut:
        return {"error": f"{TIMEOUT} {seconds:.0f} s of CPU time or of waiting"}
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {messages.reason(error)}"}


def differing(probe: Probe, one: Observation, other: Observation) -> list[str]:
    """The common facets in which two observations differ. Any two errors are equal."""
    if "error" in one or "error" in other:
        return [] if "error" in one and "error" in other else ["error"]
    shared = [facet for facet in one if facet in other]
    return [f for f in shared if not messages.same(one[f], other[f], probe.rtol, probe.atol)]


def kind(seen: Observation) -> str:
    """The class of the error in an observation, or ""."""
    return str(seen.get("error", "")).split(":")[0]


def timed_out(seen: Observation) -> bool:
    """Whether a probe was stopped at its time limit."""
    return str(seen.get("error", "")).startswith(TIMEOUT)


def is_stub(error: NotImplementedError) -> bool:
    """Whether user code raised the error, and not torch, as for a module without `forward`."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    by_torch = "torch" in Path(frame.filename).parts
    return (frame.line or "").startswith("raise NotImplementedError") and not by_torch
