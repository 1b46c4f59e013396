"""Two training steps of a small model by the reference on the CPU, against fast kernels and the accelerator.

Some devices return wrong values without an error (MPS: pytorch#107294, nanoGPT#28).
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from llm_basics import swap
from llm_basics.core import config, device, model, trainer
from llm_basics.doctor import checks

SHAPE = config.ModelConfig(vocab_size=256, context_length=32, d_model=64, n_layers=2, n_heads=4)
TRAIN = config.TrainConfig(batch_size=8, warmup_steps=0, dtype="float32")

# maximum difference of the loss, and of gradients relative to the largest of each tensor
LIMIT = 1e-3

Result = tuple[list[float], dict[str, Tensor]]


def check(name: str) -> Iterator[checks.Check]:
    """The comparisons available on this machine; `name` is the device."""
    cpu, chosen = torch.device("cpu"), device.choose(name)
    with swap.reference_only():
        torch.manual_seed(0)
        weights = model.TransformerLM(SHAPE).state_dict()
        expected = steps(weights, cpu)
    advice = "train with --fast off, and report this line: a fast kernel is wrong on this machine"
    with quietly_fast():
        title = "step, kernels" if is_by_kernels() else "step, fast"
        yield compare(title, expected, steps(weights, cpu), advice)
    if chosen.type == "cpu":
        return
    advice = "train with --train.device cpu, or upgrade torch and the driver: results are wrong"
    for title, pieces in (("reference", swap.reference_only()), ("fast", quietly_fast())):
        try:
            with pieces:
                yield compare(f"{chosen.type}, {title}", expected, steps(weights, chosen), advice)
        except RuntimeError as error:  # an operation that the device lacks
            yield checks.Check(f"{chosen.type}, {title}", checks.ERROR, str(error).splitlines()[0], advice)


def quietly_fast() -> contextlib.AbstractContextManager[None]:
    """Use fast kernels, without messages, within the context."""
    return swap.using("fast", log=lambda line: None)


def batch() -> tuple[Tensor, Tensor]:
    """The inputs and targets of both steps."""
    shape = (TRAIN.batch_size, SHAPE.context_length + 1)
    tokens = torch.randint(SHAPE.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def is_by_kernels() -> bool:
    """Whether the CPU training kernels in use compute the loss of this model and batch."""
    return "CPULoss" in str(trainer.batch_loss(model.TransformerLM(SHAPE), *batch(), 0.0).grad_fn)


def steps(weights: dict[str, Tensor], chosen: torch.device) -> Result:
    """The losses of two steps in float32, and the gradients of the first."""
    network = model.TransformerLM(SHAPE)
    network.load_state_dict(weights)
    network.to(chosen)
    optimizer = trainer.make_optimizer(network, TRAIN)
    inputs, targets = (each.to(chosen) for each in batch())
    losses, gradients = [], {}
    for step in (1, 2):
        result = trainer.train_step(network, optimizer, [(inputs, targets)], step, TRAIN)
        losses.append(float(result.train_loss))
        if step == 1:
            gradients = {n: p.grad.cpu().clone() for n, p in network.named_parameters() if p.grad is not None}
    return losses, gradients


def difference(found: Tensor | float, expected: Tensor | float) -> float:
    """The largest absolute difference; infinity instead of NaN.

    >>> difference(math.nan, 1.0)
    inf
    """
    largest = float((torch.as_tensor(found) - torch.as_tensor(expected)).abs().max())
    return math.inf if math.isnan(largest) else largest


def compare(name: str, expected: Result, found: Result, advice: str) -> checks.Check:
    """An error if the losses or a gradient differ from the reference's by more than LIMIT."""
    of_loss = max(difference(b, a) for a, b in zip(expected[0], found[0], strict=True))
    of_gradients = {key: math.inf for key in expected[1]}
    for key, value in found[1].items():
        of_gradients[key] = difference(value, expected[1][key]) / float(expected[1][key].abs().max())
    worst = max(of_gradients, key=lambda key: of_gradients[key])
    line = f"loss differs by {of_loss:.1e}, gradients by {of_gradients[worst]:.1e} at most ({worst})"
    is_right = of_loss <= LIMIT and of_gradients[worst] <= LIMIT
    return checks.check(name, line, advice, not is_right, checks.ERROR)
