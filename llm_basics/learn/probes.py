"""The probes of a step: inputs on which an implementation is observed, and what must be observed.

An observation has what came out, its dtype, the gradients, the inputs that were changed, or the error.
"""

import functools
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_basics.learn import messages, sandbox

# for one probe; far more than any needs
LIMIT_SECONDS = 10.0

TOO_LONG = "it took longer than"

# "output", "dtype", "gradient of x", "changed", ... or "error"
Observation = dict[str, Any]


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
    """Where tensors are compared: what is called with the adapters and `tensors`."""
    right: Callable[..., Tensor] | None = None
    """Where tensors are compared: the independent implementation, called with `tensors`."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    gradients: bool = False
    """Whether the gradients of `tensors` are compared, not the output alone."""
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
            return observe_tensors(functools.partial(ours, adapters), tensors, wanted if gradients else {})

        def expected() -> Observation:
            return observe_tensors(right, tensors, tensors if gradients else {})

        names = tuple(axes.split())
        self.probes.append(
            Probe(about, observe, expected, rtol, atol, names, words, ours, right, tensors, gradients, beyond)
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


# --------------------------------------------------------------------------------------------------
# Observing


def observe_tensors(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], wanted: dict[str, Tensor]
) -> Observation:
    """What `function(**tensors)` returns and changes, and the gradients of `wanted` for random weights."""
    leaves = {k: t.clone().requires_grad_(k in wanted and t.is_floating_point()) for k, t in tensors.items()}
    # a leaf must not be changed in place, so that whoever does it fails; what is handed in here may be
    handed = {name: leaf * 1 if leaf.requires_grad else leaf for name, leaf in leaves.items()}
    output = function(**handed)
    if not isinstance(output, Tensor):
        raise TypeError(f"it must return a tensor, but returned {type(output).__name__}")
    seen: Observation = {
        "output": output.detach().clone(),
        "dtype": str(output.dtype).removeprefix("torch."),
        "changed": [
            name for name, tensor in tensors.items() if not messages.same(tensor, handed[name], 0.0, 0.0)
        ],
    }
    learned = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not learned:
        return seen
    if not output.requires_grad:
        return seen | {f"gradient of {name}": None for name in learned}
    weighting = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    found = torch.autograd.grad(output, list(learned.values()), weighting, allow_unused=True)
    return seen | {f"gradient of {name}": g for name, g in zip(learned, found, strict=True)}


@functools.cache
def _load_autograd() -> None:
    """Compute a gradient: torch then imports sympy, which a time limit must not cut off."""
    with torch.enable_grad():
        x = torch.ones(1, requires_grad=True)
        torch.autograd.grad(x * 1, x, torch.ones(1))


def observe(probe: Probe, adapters: Any) -> Observation:
    """What a probe sees of an implementation. Errors are seen too; what is missing or not begun is raised."""
    _load_autograd()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    try:
        with sandbox.time_limit(LIMIT_SECONDS), sandbox.unchanged_state():
            return probe.observe(adapters)
    except NotImplementedError as error:
        if is_blank(error):
            raise
        return {"error": f"NotImplementedError: {' '.join(str(error).split())}"}
    except sandbox.TookTooLong:
        return {"error": f"{TOO_LONG} {LIMIT_SECONDS:.0f} s and was stopped"}
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {messages.reason(error)}"}


def is_blank(error: NotImplementedError) -> bool:
    """Whether somebody's own line raises it; torch does so too, as for a module without `forward`."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    by_torch = "torch" in Path(place.filename).parts
    return (place.line or "").startswith("raise NotImplementedError") and not by_torch
