"""Knowledge distillation: a model is trained on the probabilities of a trained one (arXiv 1503.02531)."""

import dataclasses
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_basics.alignment import distillation
from llm_basics.core import config, dataloader
from llm_basics.data import prepare
from llm_basics.inference import engine
from llm_basics.post_training import objective
from llm_basics.post_training import options as post_options
from llm_basics.runs import checkpoint, run_dir
from llm_basics.training import job


class Batch(NamedTuple):
    """Text, and its fraction of the sequences of a step."""

    inputs: Int[Tensor, "batch seq"]
    targets: Int[Tensor, "batch seq"]
    weight: float


class DistillState(objective.Objective):
    """The state of a run of distillation."""

    options: post_options.DistillConfig
    has_dropout = True

    def __init__(self, options: post_options.DistillConfig, prepared: prepare.Prepared) -> None:
        super().__init__(options, prepared)
        folder = options.distill.teacher
        teacher, tokenizer = engine.load_run(folder, self.device)
        if tokenizer.fingerprint() != self.tokenizer.fingerprint():
            raise ValueError(
                f"student and teacher must have one tokenizer, but {options.data} is prepared with another "
                f"than that of {folder}; prepare it with --tokenizer {folder}/tokenizer"
            )
        if teacher.config.context_length < options.model.context_length:
            raise ValueError(
                f"model.context_length must be at most that of the teacher, {teacher.config.context_length}, "
                f"got {options.model.context_length}"
            )
        self.teacher = teacher.eval().requires_grad_(False)
        # a checkpoint can only be resumed with the same teacher
        digest = checkpoint.weights_sha256(self.teacher)
        self.prepared_in = f"{prepared.folder.name}, teacher {digest[:12]}"

    def next_batches(self) -> list[Any]:
        """The text of the next step."""
        batches = super().next_batches()
        return [Batch(*batch, 1 / len(batches)) for batch in batches]

    def loss_of(self, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The distillation loss of a batch, and the divergence from the teacher in nats per token."""
        options = self.options.distill
        logits, mask = self.model(batch.inputs), batch.targets != dataloader.IGNORE_INDEX
        with torch.no_grad():
            known = self.teacher(batch.inputs)
            divergence = distillation.kl_divergence(logits, known, options.direction)
        loss = distillation.distillation_loss(
            logits, known, batch.targets, mask, options.direction, options.temperature, options.hard_weight
        )
        return loss, {"kl": divergence[mask].mean().item()}


def make(options: config.Config) -> DistillState:
    """The state of a run on the text of `options.data`."""
    assert isinstance(options, post_options.DistillConfig), "from the command"
    objective.check(options, "distill")
    if not options.distill.teacher:
        raise ValueError("--distill.teacher must name the run of the teacher, got none")
    folder = run_dir.resolve(options.distill.teacher)
    teacher = dataclasses.replace(options.distill, teacher=str(folder))
    chosen = dataclasses.replace(options, distill=teacher, tokenizer=str(folder / "tokenizer"))
    found = prepare.prepare(chosen)
    model = dataclasses.replace(chosen.model, vocab_size=found.tokenizer.vocab_size)
    return DistillState(dataclasses.replace(chosen, model=model), found)


def main(options: config.Config) -> int:
    """Train a student. Returns the exit status."""
    return job.main(options, make)
