"""Fast implementation of `core.evaluate`: the forward pass of the CPU training kernels."""

from jaxtyping import Int
from torch import Tensor, nn

from llm_basics.core import evaluate
from llm_basics.fast.cpu import trainer

# bound here because `swap` replaces the name in the reference module
reference_metrics = evaluate.batch_metrics


def batch_metrics(
    model: nn.Module, inputs: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"]
) -> tuple[float, int]:
    """`evaluate.batch_metrics` by the CPU training kernels, if they support the model."""
    kernels = trainer.learner_for(model, inputs, targets)
    return kernels.evaluate(inputs, targets) if kernels else reference_metrics(model, inputs, targets)
