"""How much memory will training take? Known before the first step, and without taking any.

The real model is trained for a step on tensors that have shapes but no content, and every piece of memory
that they would have had is entered in a ledger when it is made and when it dies.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.utils import _python_dispatch, _pytree

from llm_basics import config, device, optim
from llm_basics import functional as F
from llm_basics import model as models

# --------------------------------------------------------------------------------------------------
# What a step takes


@dataclass(frozen=True)
class Estimate:
    """What lives when the most memory is taken, in bytes; a kind that is not alive just then counts 0."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """All the rest: what the forward pass keeps for the backward one, and what is only passed through."""

    @property
    def total(self) -> int:
        """The peak, in bytes."""
        return self.parameters + self.gradients + self.optimizer + self.activations


class Ledger(_python_dispatch.TorchDispatchMode):
    """Inside, notes each storage that an operation makes, and when the last tensor that uses it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int, int]] = []  # storage number, bytes; negative where it dies
        self.kinds: dict[int, str] = {}
        self.numbers: dict[int, int] = {}  # of the living, by identity

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # what tensors without content answer when a program asks for a number
        result = func(*args, **(kwargs or {}))
        for tensor in _pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self.numbers:
            number = self.numbers[id(storage)] = len(self.entries)
            self.entries.append((number, storage.nbytes()))
            weakref.finalize(storage, self._forget, id(storage), storage.nbytes()).atexit = False

    def _forget(self, identity: int, size: int) -> None:
        self.entries.append((self.numbers.pop(identity), -size))

    def label(self, kind: str, tensors: Iterable[Any]) -> None:
        """Say what `tensors`, alive now, are; what nobody labels is an activation."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self.kinds[self.numbers[id(tensor.untyped_storage())]] = kind

    def peak(self) -> Estimate:
        """What lived when the most did."""
        live: Counter[str] = Counter()
        most: Counter[str] = Counter()
        for number, size in self.entries:
            live[self.kinds.get(number, "activations")] += size
            if live.total() > most.total():
                most = live.copy()
        return Estimate(most["parameters"], most["gradients"], most["optimizer"], most["activations"])


def estimate(options: config.Config) -> Estimate:
    """The memory of a training step where it takes most; `options.model.vocab_size` must be the final one.

    Counts tensors. Not counted are the program itself (torch and CUDA's context: what is taken before a model
    is made), and what libraries and allocators set aside. Raises ValueError if the device cannot be used.
    """
    train = options.train
    half = isinstance(device.precision(device.choose(train.device), train.dtype), torch.autocast)
    # tensors without content play the CPU on every device: what they are asked for is the same
    with fake_tensor.FakeTensorMode(), Ledger() as ledger:
        model = models.TransformerLM(options.model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = optim.AdamW(parameters)
        ledger.label("parameters", model.parameters())
        shape = (train.batch_size, options.model.context_length)
        batch = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)

        def accumulate() -> None:
            # as in train.train_step
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = F.cross_entropy(F.widen(model(batch[0])), batch[1], z_loss=train.z_loss) * 1.0
            loss.backward()
            ledger.label("gradients", [p.grad for p in parameters])

        def update() -> None:
            optimizer.step()
            ledger.label("optimizer", [x for s in optimizer.state.values() for x in s.values()])

        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        ledger.label("gradients", [p.grad for p in parameters])
        update()  # from here on the optimizer has its state, as in every step but the first
        optimizer.zero_grad(set_to_none=True)
        accumulate()
        if train.grad_accumulation_steps > 1:
            accumulate()  # once more, beside the gradients of the first; all others are like this one
        update()
    return ledger.peak()


# --------------------------------------------------------------------------------------------------
# What there is, and what to say


def explain(estimated: Estimate, options: config.Config) -> str:
    """What a step takes, and the three flags that would make it less, the first being worth most."""
    kinds = ("parameters", "gradients", "optimizer", "activations")
    parts = ", ".join(f"{_megabytes(getattr(estimated, kind))} {kind}" for kind in kinds)
    train, model = options.train, options.model
    of_text = [
        f"--train.batch_size (now {train.batch_size}; more --train.grad_accumulation_steps make up for it)",
        f"--model.context_length (now {model.context_length})",
    ]
    of_weights = [f"--model.d_model (now {model.d_model})", f"--model.n_layers (now {model.n_layers})"]
    is_text = estimated.activations > estimated.total / 2
    flags = [*of_text, of_weights[1]] if is_text else [*of_weights, of_text[0]]
    return (
        f"memory    {_megabytes(estimated.total)} at the peak: {parts};\n"
        f"          less with a smaller {', '.join(flags[:2])} or {flags[2]}"
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
