"""Direct preference optimization: train on pairs of responses, of which one is preferred (arXiv 2305.18290).

The probability of the preferred response increases relative to the other, compared with the initial model.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_basics.alignment import dpo as losses
from llm_basics.core import config, dataloader
from llm_basics.core import model as models
from llm_basics.data import chat_template, prepare, sft_dataset, tokenizer_formats
from llm_basics.post_training import objective, pairs
from llm_basics.post_training import options as post_options
from llm_basics.runs import run_dir, signals, stopwatch
from llm_basics.training import job, sft


class Batch(NamedTuple):
    """Pairs as rows, all chosen responses before all rejected ones."""

    inputs: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    response_mask: Bool[Tensor, "batch seq"]
    weight: float
    """Fraction of the pairs of a step."""


class DpoState(objective.ChatObjective):
    """The state of a run on preference pairs."""

    options: post_options.DpoConfig
    reference: models.TransformerLM

    def __init__(self, options: post_options.DpoConfig, prepared: prepare.Prepared) -> None:
        super().__init__(options, prepared)
        path = Path(options.dpo.pairs or options.data)
        held_out = {tuple(self.test_case(row).ids) for row in self.held_out_rows.rows}
        found = list(pairs.read(str(path), self.tokenizer))
        fitting = [pair for pair in found if pair.length <= options.model.context_length + 1]
        self.pairs = [pair for pair in fitting if tuple(pair.prompt) not in held_out]
        self.held_out_pairs = [pair for pair in fitting if tuple(pair.prompt) in held_out]
        self.n_left_out = len(found) - len(fitting)
        if not self.pairs:
            raise ValueError(
                f"{path} must hold pairs to train on, but of {len(found):,} {self.n_left_out:,} are longer "
                f"than model.context_length {options.model.context_length}, and the others are held out"
            )
        # a checkpoint can only be resumed with the same pairs
        self.prepared_in = f"{prepared.folder.name}, {path.name}"
        self._order = functools.lru_cache(maxsize=2)(self._arrange)

    def _arrange(self, epoch: int) -> Int[np.ndarray, " pairs"]:
        """The order of the pairs in `epoch`."""
        return np.random.default_rng((self.options.train.seed, epoch)).permutation(len(self.pairs))

    def next_batches(self) -> list[Any]:
        """The pairs of the next step."""
        size = self.options.train.batch_size
        numbers = range(self.sequences, self.sequences + self.sequences_per_step)
        positions = (divmod(number, len(self.pairs)) for number in numbers)
        chosen = [self.pairs[self._order(epoch)[index]] for epoch, index in positions]
        return [self.collate(chosen[i : i + size]) for i in range(0, len(chosen), size)]

    def collate(self, some: Sequence[pairs.Pair]) -> Batch:
        """Pairs as a batch."""
        rows = []
        for prompt, response in [(p.prompt, p.chosen) for p in some] + [(p.prompt, p.rejected) for p in some]:
            ids = np.array(prompt + response)
            rows.append(sft_dataset.Example(ids, np.arange(len(ids)) >= len(prompt)))
        inputs, targets = sft_dataset.collate(rows, self.options.model.context_length, self.device)
        weight = len(some) / self.sequences_per_step
        return Batch(inputs, targets.clamp(min=0), targets != dataloader.IGNORE_INDEX, weight)

    def loss_of(self, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The DPO loss of a batch; `margin` is the difference of the two rewards, in nats."""
        options, n = self.options.dpo, len(batch.inputs) // 2
        tokens = {"input_ids": batch.inputs, "labels": batch.labels, "response_mask": batch.response_mask}
        policy = losses.sequence_log_probs(self.model, tokens)
        with torch.no_grad():
            known = losses.sequence_log_probs(self.reference, tokens)
        loss = losses.dpo_loss(
            policy[:n], policy[n:], known[:n], known[n:], options.beta, options.loss, options.label_smoothing
        )
        likelihood = policy[:n].sum() / batch.response_mask[:n].sum()
        reward = options.beta * (policy - known).detach()
        margin = reward[:n] - reward[n:]
        return loss.mean() - options.sft_weight * likelihood, {
            "dpo_loss": loss.detach().mean().item(),
            "margin": margin.mean().item(),
            "pair_accuracy": (margin > 0).float().mean().item(),
            "chosen_log_prob": policy[:n].detach().mean().item(),
            "rejected_log_prob": policy[n:].detach().mean().item(),
        }

    @torch.no_grad()
    def evaluate(self, max_batches: int) -> dict[str, float]:
        """The metrics of fine-tuning, and the share of held-out pairs with a positive margin."""
        metrics, size = super().evaluate(max_batches), self.options.train.batch_size
        some = self.held_out_pairs[: max_batches * size]
        if not some or not hasattr(self, "reference"):
            return metrics
        batches = signals.polled(some[i : i + size] for i in range(0, len(some), size))
        right = sum(self.loss_of(self.collate(each))[1]["pair_accuracy"] * len(each) for each in batches)
        return metrics | {"val_pair_accuracy": right / len(some)}


def make(options: config.Config) -> DpoState:
    """The state of a run on the pairs of `dpo.pairs`, of `data`, or of the initial model."""
    assert isinstance(options, post_options.DpoConfig), "from the command"
    objective.check(options, "dpo")
    if options.init_from is not None and options.resume is None:
        tokenizer = tokenizer_formats.load(Path(options.init_from) / "tokenizer")
        if not chat_template.is_chat(tokenizer):
            raise ValueError(
                f"--init_from must name a fine-tuned run, but {options.init_from} has no chat tokens; run "
                f"python -m llm_basics.sft --init_from {options.init_from} first"
            )
    chosen, prepared = sft.prepared(options, "dpo")
    if chosen.dpo.pairs is None and not pairs.is_pairs(chosen.data):
        found = dataclasses.replace(chosen.dpo, pairs=str(pairs.from_model(chosen, prepared)))
        chosen = dataclasses.replace(chosen, dpo=found)
    return DpoState(chosen, prepared)


def work(training: Any, output: run_dir.RunDir, clock: stopwatch.Stopwatch) -> int:
    """Train, and print the exact answers to held-out questions before and after."""
    training.reference = objective.reference(training, output)
    output.log(
        f"dpo       {len(training.pairs):,} pairs, {len(training.held_out_pairs):,} held out, "
        f"{training.n_left_out:,} dropped (too long)"
    )
    return objective.work(training, output, clock)


def main(options: config.Config) -> int:
    """Train on preferences. Returns the exit status."""
    return job.main(options, make, work)
