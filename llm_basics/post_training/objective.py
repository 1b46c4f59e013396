"""Training runs with another loss, in the step of `core.trainer`.

Resuming, signals and non-finite losses are handled as in a training run, but only in a single process.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_basics.core import config, device, optim, trainer
from llm_basics.core import model as models
from llm_basics.runs import checkpoint, process, run_dir, stopwatch
from llm_basics.training import distributed, sft, state

# file of the initial weights in the run directory, with which a resumed run compares
REFERENCE = "reference.safetensors"

# number of held-out prompts whose greedy replies are scored in an evaluation
N_EXACT = 200


class Objective(state.TrainingState):
    """The state of a run whose loss is `loss_of`."""

    n_updates = 1
    """Optimizer updates in a step."""
    has_dropout = False
    """Whether dropout is enabled in updates; off for losses on samples, which are generated without it."""

    @abc.abstractmethod
    def loss_of(self, batch: Any) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The mean loss over the rows of a batch, and metrics."""

    def batch_loss(self, batch: Any) -> Tensor:
        return self.loss_of(batch)[0]

    def accumulate_gradients(self, batches: Sequence[Any]) -> Tensor:
        """Accumulate the gradients of the sum of the losses of `batches`, each times its `weight`."""
        total = torch.zeros((), device=self.device)
        observed: dict[str, float] = {}
        total_weight = sum(batch.weight for batch in batches)
        for batch in batches:
            with device.precision(self.device, self.options.train.dtype):
                loss, seen = self.loss_of(batch)
            share = loss * batch.weight
            share.backward()
            total += share.detach()
            for name, value in seen.items():
                observed[name] = observed.get(name, 0.0) + value * batch.weight / total_weight
        self.observed = self.observed | observed
        return total

    def train_step(
        self, batches: Sequence[Any], accept: Callable[[float], bool] | None = None
    ) -> trainer.StepResult:
        """`trainer.train_step` with the gradients of `accumulate_gradients`, `n_updates` times.

        A non-finite loss in a later update leaves the weights of the previous update.
        """
        self.model.train(self.has_dropout)
        step, options = self.step + 1, self.options.train
        lr = trainer.learning_rate(step, options)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for _ in range(self.n_updates):
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.accumulate_gradients(batches)
            norm = optim.clip_grad_norm_(self.model.parameters(), options.max_grad_norm)
            trainer.check_finite(step, lr, loss, norm)
            if accept is not None and not accept(loss.item()):
                return trainer.StepResult(loss, norm, lr, updated=False)
            self.optimizer.step()
        return trainer.StepResult(loss, norm, lr)


class ChatObjective(Objective, sft.SftState):
    """The state of a run with another loss on conversations."""

    def evaluate(self, max_batches: int) -> dict[str, float]:
        """The metrics of fine-tuning, and the share of exact replies to held-out prompts."""
        cases = self.test_cases(N_EXACT)
        exact = sum(self.reply(case) == case.expected for case in cases) / len(cases)
        return super().evaluate(max_batches) | {"val_exact": exact}


def check(options: config.Config, command: str) -> None:
    """Raise ValueError for options of a training run that `command` does not support."""
    if distributed.world().size > 1:
        raise ValueError(f"{command} must run in one process, got {distributed.world().size}; omit torchrun")
    for name, is_used in (
        ("find_lr", options.find_lr),
        ("replay", options.replay is not None),
        ("packing", options.packing == "on"),
        ("train.compile", options.train.compile in ("on", "graphs")),
        ("train.stride", options.train.stride is not None),
        ("lora.rank", command == "distill" and options.lora.rank is not None),
    ):
        if is_used:
            raise ValueError(f"{command} has no --{name}; omit it")


def work(training: sft.SftState, output: run_dir.RunDir, clock: stopwatch.Stopwatch) -> int:
    """Train, and print the exact matches on held-out questions before and after."""
    if training.step == 0:
        output.log("\nbefore the first step:")
        sft.print_accuracy(training, output)
    return sft.work(training, output, clock)


def reference(training: state.TrainingState, output: run_dir.RunDir) -> models.TransformerLM:
    """A frozen copy of the initial model, saved in the run directory for resuming."""
    path = output.folder / REFERENCE
    model = training.model if training.adapters is None else training.adapters.merged()
    if training.step == 0:
        checkpoint.save_checkpoint(model, optim.AdamW([nn.Parameter(torch.empty(0))]), training.step, path)
    if not path.exists():
        raise ValueError(
            f"{path} must hold the weights of the initial model, but is missing; put it back, or start again"
        )
    random = process.random_state(training.device)
    frozen = models.TransformerLM(model.config, device=training.device)
    process.set_random_state(random, training.device)
    checkpoint.load_checkpoint(path, frozen)
    return frozen.eval().requires_grad_(False)
