"""What goes wrong in a step, and where it began: losses that leap, and values that are not finite."""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# --------------------------------------------------------------------------------------------------
# Losses that leap


class SpikeDetector:
    """How far a loss stands out from those before it; above `threshold` it is a spike.

    >>> detector = SpikeDetector()
    >>> scores = [detector.z_score(loss) for loss in 20 * [2.0, 2.1, 2.2]]
    >>> round(max(scores), 2), round(detector.z_score(3.5), 1)
    (0.67, 9.4)
    """

    def __init__(self, window: int = 128, threshold: float = 6.0, least: int = 32) -> None:
        if not 1 <= least <= window:
            raise ValueError(f"least must be from 1 to window, got {least} and window {window}")
        self.threshold = threshold
        self.least = least
        self.losses: deque[float] = deque(maxlen=window)

    def z_score(self, loss: float) -> float:
        """The robust z-score of `loss` among the last `window` losses; remembers it.

        `(loss - median) / (1.4826 * median absolute deviation)`: 1.4826 makes it the usual z-score where
        losses are normal, and spikes among them hardly move a median. 0 while fewer than `least` losses are
        known; from then on a loss that is not finite scores infinity, and is never remembered.
        """
        score = 0.0
        if len(self.losses) >= self.least:
            known = np.array(self.losses)
            median = float(np.median(known))
            deviation = 1.4826 * float(np.median(np.abs(known - median)))
            # a leap by less than some thousandths of the loss is rounding, however still it stood before
            deviation = max(deviation, 1e-3 * abs(median), 1e-6)
            score = (loss - median) / deviation if math.isfinite(loss) else math.inf
        if math.isfinite(loss):
            # spikes too: else a lasting jump by 1 would be called a spike at all 5,000 steps after it, not at
            # 52; single spikes are found as well either way, 50 of 50 in each of 70 series
            self.losses.append(loss)
        return score

    def state(self) -> dict[str, Any]:
        """All that going on exactly from here needs, fit for JSON."""
        return {"losses": list(self.losses)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.losses = deque(state["losses"], maxlen=self.losses.maxlen)


# --------------------------------------------------------------------------------------------------
# Values that are not finite


@torch.no_grad()
def find_nonfinite(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Say in one line where a value that is not finite came first.

    Looks at the weights; then at every module in a second pass, `forward()`, which returns the loss, and at
    this loss; then at the gradients that are there. All that a pass changes is afterwards as it was.

    >>> layer = nn.Linear(2, 3)
    >>> find_nonfinite(layer, lambda: layer(torch.ones(2)).sum() * math.nan)
    'the loss is nan, though no module gave out such values'
    """
    for name, weight in model.named_parameters():
        if _kinds(weight):
            return f"the weight {_plain(name)} has {_count(weight)}"
    with _unchanged(model), _watched(model) as (made, passed_on):
        loss = forward()
    if made:
        return made[0]
    if _kinds(loss):
        said = f"the loss is {_kinds(loss)}, though no module gave out such values"
        # asked only now: where the loss is finite, what was passed on is no fault, but a mask of -inf, say
        return passed_on[0] if passed_on else said
    # the backward pass begins at the end
    for name, weight in reversed(list(model.named_parameters())):
        if _kinds(weight.grad):
            return f"the gradient of {_plain(name)} has {_count(weight.grad)}, the first from the end"
    return "nothing that is not finite was found in a second pass"


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[tuple[list[str], list[str]]]:
    """Inside, notes each module that gives out what is not finite: given finite values; given others.

    Inner modules end first, so they are noted before those that they are part of.
    """
    labels = {m: f"{_plain(name) or 'the model'} ({type(m).__name__})" for name, m in model.named_modules()}
    given: dict[nn.Module, str] = {}
    made: list[str] = []
    passed_on: list[str] = []

    # looked at before the module runs, which may work in place
    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        given[module] = _kinds((args, kwargs))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not made and _kinds(output):
            line = f"{labels[module]} gave out {_kinds(output)} ({_count(output)})"
            if given[module]:
                passed_on.append(f"{line} and was given {given[module]}")
            else:
                made.append(f"{line} although all that it was given is finite")

    handles = []
    try:
        for module in labels:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        # compiled code would run past the hooks
        with torch.compiler.set_stance("force_eager"):
            yield made, passed_on
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Afterwards the random state, the training mode and the buffers of `model` are as before."""
    training = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices, device_type="cuda"):
        try:
            yield
        finally:
            for module, mode in training:
                module.training = mode
            for buffer, value in buffers:
                buffer.copy_(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in `value`, be it a tensor, a number or containers of such."""
    if isinstance(value, float):
        yield torch.tensor(value, dtype=torch.float64)
    elif isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _kinds(value: Any) -> str:
    """What in `value` is not finite: "nan and inf", say; "" if nothing is."""
    bad = [tensor for tensor in _tensors(value) if not tensor.isfinite().all()]
    tests = {"nan": torch.isnan, "inf": torch.isposinf, "-inf": torch.isneginf}
    return " and ".join(kind for kind, test in tests.items() if any(test(tensor).any() for tensor in bad))


def _count(value: Any) -> str:
    """How much in `value` is not finite."""
    n_bad = sum(int((~tensor.isfinite()).sum()) for tensor in _tensors(value))
    total = sum(tensor.numel() for tensor in _tensors(value))
    values, are = ("value", "is") if n_bad == 1 else ("values", "are")
    return f"{n_bad:,} {values} of {total:,} that {are} not finite"


def _plain(name: str) -> str:
    """The name of a module or weight without what torch.compile puts in it."""
    return name.replace("_orig_mod.", "").removesuffix("_orig_mod")
