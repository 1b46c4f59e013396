"""Diagnostics of a training step: loss spikes, and the origin of non-finite values."""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# --------------------------------------------------------------------------------------------------
# Loss spikes


class SpikeDetector:
    """Robust z-scores of losses; above `threshold` a loss is a spike.

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
        """The robust z-score of `loss` relative to the last `window` losses; then records `loss`.

        `(loss - median) / (1.4826 * median absolute deviation)`: 1.4826 makes it the usual z-score for
        normally distributed losses, and a median is robust to spikes. 0 while fewer than `least` losses are
        recorded; then infinity for a non-finite loss, which is never recorded.
        """
        score = 0.0
        if len(self.losses) >= self.least:
            recorded = np.array(self.losses)
            median = float(np.median(recorded))
            deviation = 1.4826 * float(np.median(np.abs(recorded - median)))
            # a change of a few thousandths of the loss is noise, even after constant losses
            deviation = max(deviation, 1e-3 * abs(median), 1e-6)
            score = (loss - median) / deviation if math.isfinite(loss) else math.inf
        if math.isfinite(loss):
            # spikes are recorded too: otherwise a permanent jump by 1 is a spike at all 5,000 later steps,
            # instead of 52; single spikes are found in both cases, 50 of 50 in each of 70 series
            self.losses.append(loss)
        return score

    def state(self) -> dict[str, Any]:
        """The state to resume from exactly, as JSON types."""
        return {"losses": list(self.losses)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a state from `state`."""
        self.losses = deque(state["losses"], maxlen=self.losses.maxlen)


# --------------------------------------------------------------------------------------------------
# Non-finite values

NONE = "a second pass had finite values only"


@torch.no_grad()
def find_nonfinite(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Describe the origin of the first non-finite value in one line.

    Checks the weights; then the outputs of all modules and the loss in a second pass, `forward()`, which
    returns the loss; then the gradients. Restores all state that a pass changes.

    >>> layer = nn.Linear(2, 3)
    >>> find_nonfinite(layer, lambda: layer(torch.ones(2)).sum() * math.nan)
    'the loss is nan, although all module outputs are finite'
    """
    for name, weight in model.named_parameters():
        if _kinds(weight):
            return f"the weight {_plain(name)} has {_count(weight)}"
    with _restored(model), _output_checks(model) as (created, propagated):
        loss = forward()
    if created:
        return created[0]
    if _kinds(loss):
        # only for a non-finite loss: propagated values such as a mask of -inf can be valid
        if propagated:
            return propagated[0]
        return f"the loss is {_kinds(loss)}, although all module outputs are finite"
    # the backward pass starts at the output
    for name, weight in reversed(list(model.named_parameters())):
        if _kinds(weight.grad):
            return f"the gradient of {_plain(name)} has {_count(weight.grad)}, the first in the backward pass"
    return NONE


@contextlib.contextmanager
def _output_checks(model: nn.Module) -> Iterator[tuple[list[str], list[str]]]:
    """Collect modules with non-finite outputs: one list for finite inputs, one for non-finite inputs.

    Inner modules return first, so they are listed before the modules that contain them.
    """
    labels = {m: f"{_plain(name) or 'the model'} ({type(m).__name__})" for name, m in model.named_modules()}
    inputs: dict[nn.Module, str] = {}
    created: list[str] = []
    propagated: list[str] = []

    # checked before the forward pass, which may modify the inputs in place
    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs[module] = _kinds((args, kwargs))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not created and _kinds(output):
            line = f"{labels[module]} returned {_kinds(output)} ({_count(output)})"
            if inputs[module]:
                propagated.append(f"{line}; its inputs had {inputs[module]}")
            else:
                created.append(f"{line} although its inputs are finite")

    handles = []
    try:
        for module in labels:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        # compiled code would bypass the hooks
        with torch.compiler.set_stance("force_eager"):
            yield created, propagated
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore the random state, and training mode and buffers of `model`, after the block."""
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
    """The floating-point tensors in `value`: a tensor, a number or nested containers of these."""
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
    """The kinds of non-finite values in `value`, such as "nan and inf"; "" if all are finite."""
    bad = [tensor for tensor in _tensors(value) if not tensor.isfinite().all()]
    tests = {"nan": torch.isnan, "inf": torch.isposinf, "-inf": torch.isneginf}
    return " and ".join(kind for kind, test in tests.items() if any(test(tensor).any() for tensor in bad))


def _count(value: Any) -> str:
    """The number of non-finite values, as text."""
    n_bad = sum(int((~tensor.isfinite()).sum()) for tensor in _tensors(value))
    total = sum(tensor.numel() for tensor in _tensors(value))
    return f"{n_bad:,} of {total:,} values not finite"


def _plain(name: str) -> str:
    """The name of a module or weight without the prefixes of torch.compile."""
    return name.replace("_orig_mod.", "").removesuffix("_orig_mod")
