"""Reinforcement learning from rewards of groups of responses (GRPO and relatives, arXiv 2402.03300).

A step samples a group of responses to each of several prompts, rewards them, and increases the probability of
responses with rewards above the mean of their group.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llm_basics.alignment import policy_gradient, response_log_probs
from llm_basics.core import config
from llm_basics.core import model as models
from llm_basics.data import chat_template, prepare, sft_dataset, synthetic_qa
from llm_basics.post_training import diagnosis, objective, rollouts
from llm_basics.post_training import options as post_options
from llm_basics.runs import run_dir, stopwatch
from llm_basics.training import job, sft


class RlState(objective.ChatObjective):
    """The state of a run of reinforcement learning."""

    options: post_options.RlConfig
    output: run_dir.RunDir
    reference: models.TransformerLM | None = None

    def __init__(self, options: post_options.RlConfig, prepared: prepare.Prepared) -> None:
        super().__init__(options, prepared)
        self.reward = rollouts.load_reward(options.rl.reward)
        self.n_updates = options.rl.updates
        limit = options.model.context_length - options.rl.max_new_tokens
        cases = self.read_prompts()
        self.prompts = [case for case in cases if len(case.ids) <= limit]
        self.n_left_out = len(cases) - len(self.prompts)
        if not self.prompts:
            raise ValueError(
                f"a prompt must fit into model.context_length {options.model.context_length} with "
                f"rl.max_new_tokens {options.rl.max_new_tokens}, but none of {len(cases):,} does"
            )
        self.diagnosis = diagnosis.Diagnosis(options.rl.group_size, options.rl.max_new_tokens)
        # sorted into batches of similar lengths, for efficient decoding
        size = self.sequences_per_step // options.rl.group_size
        rows = [sft_dataset.Example(np.array(case.ids), np.array([True])) for case in self.prompts]
        self.sampler = sft_dataset.Batches(rows, size, options.model.context_length, options.train.seed)

    def read_prompts(self) -> list[sft.TestCase]:
        """The prompts to train on, none of which is held out."""
        trained = [self.test_case(row) for row in self.train_rows.rows]
        held_out = {tuple(self.test_case(row).ids) for row in self.held_out_rows.rows}
        if (source := self.options.rl.prompts) != "auto":
            found = [self.case_of(messages) for messages in chat_template.read_conversations(source)]
        elif self.options.data != "demo":
            found = trained
        else:
            # the answers to the others were in the fine-tuning data
            new = synthetic_qa.new_pairs()
            kinds = {pair.kind for pair in new}
            found = [self.case_of(sft_dataset.as_messages(pair), pair.kind) for pair in new]
            found += [case for case in trained if case.kind not in kinds]
        return [case for case in found if tuple(case.ids) not in held_out]

    def case_of(self, messages: Sequence[chat_template.Message], kind: str = "all") -> sft.TestCase:
        """A conversation, whose last message is the expected reply."""
        ids = chat_template.render_prompt(self.tokenizer, messages[:-1])
        question = messages[-2].content if len(messages) > 1 else ""
        return sft.TestCase(ids, question, messages[-1].content + chat_template.END, kind)

    def next_cases(self) -> list[sft.TestCase]:
        """The prompts of the next step, each repeated for its group."""
        size = self.options.rl.group_size
        return [
            self.prompts[i] for i in self.sampler.indices_from(self.sequences // size) for _ in range(size)
        ]

    def next_batches(self) -> list[Any]:
        """Sample the rollouts of the next step. Polls signals."""
        train, options, step = self.options.train, self.options.rl, self.step + 1
        cases = self.next_cases()
        found = rollouts.sample(
            self.model,
            self.tokenizer,
            cases,
            options.max_new_tokens,
            rollouts.seeds(train.seed, step, len(cases)),
            self.reward,
            options.temperature,
        )
        found = rollouts.with_advantages(found, options)
        self.observed = rollouts.statistics(found, options.group_size)
        # without a KL penalty the gradient of the others is 0
        kept = [rollout for rollout in found if rollout.advantage != 0 or options.kl] or found[:1]
        size, length = train.batch_size, self.options.model.context_length
        self.model.eval()
        batches = [
            rollouts.collate(
                kept[i : i + size], len(found), self.model, length, self.device, options.temperature
            )
            for i in range(0, len(kept), size)
        ]
        for finding in self.diagnosis.look(step, found):
            self.output.log(f"step {step}: {finding}")
            self.output.event(step, "finding", reason=finding)
        if options.record_every and step % options.record_every == 0:
            log_probs = [row for batch in batches for row in rows_of(batch)]
            scored = dict(zip(map(id, kept), log_probs, strict=True))
            for number, rollout in enumerate(found):
                row = scored.get(id(rollout))
                self.output.rollout(step, **rollouts.as_record(rollout, number // options.group_size, row))
        return batches

    def loss_of(self, batch: rollouts.Batch) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The policy-gradient loss of a batch of rollouts, with the KL penalty if it has a weight."""
        options = self.options.rl
        scored = rollouts.log_probs_of(self.model, batch, options.temperature, with_entropy=True)
        losses, seen = policy_gradient.compute_policy_gradient_loss(
            batch.advantages,
            scored["log_probs"],
            options.method,
            batch.old_log_probs,
            options.cliprange,
            batch.response_mask,
        )
        mask, observed = batch.response_mask, {name: value.item() for name, value in seen.items()}
        if self.reference is not None:
            with torch.no_grad():
                known = rollouts.log_probs_of(self.reference, batch, options.temperature)
            kl = policy_gradient.kl_penalty(scored["log_probs"], known["log_probs"])
            losses = losses + options.kl * kl
            observed["kl"] = response_log_probs.masked_mean(kl.detach(), mask).item()
        loss = policy_gradient.aggregate_loss_across_microbatch(
            losses, mask, options.normalization, options.max_new_tokens * len(losses)
        )
        entropy = response_log_probs.masked_mean(scored["token_entropy"].detach(), mask)
        return loss, observed | {"token_entropy": entropy.item()}


def rows_of(batch: rollouts.Batch) -> list[list[float]]:
    """The log-probability of each token of each response under the sampling policy."""
    rows = zip(batch.old_log_probs, batch.response_mask, strict=True)
    return [log_probs[mask].tolist() for log_probs, mask in rows]


def make(options: config.Config) -> RlState:
    """The state of a run on the prompts of `options.data`."""
    assert isinstance(options, post_options.RlConfig), "from the command"
    objective.check(options, "rl")
    n, group = options.train.batch_size * options.train.grad_accumulation_steps, options.rl.group_size
    if n % group:
        raise ValueError(
            "train.batch_size times train.grad_accumulation_steps, the responses of a step, must be "
            f"divisible by rl.group_size, got {n} and {group}"
        )
    if options.rl.max_new_tokens >= options.model.context_length:
        raise ValueError(
            f"rl.max_new_tokens must be below model.context_length {options.model.context_length}, got "
            f"{options.rl.max_new_tokens}; a prompt needs tokens as well"
        )
    return RlState(*sft.prepared(options, "rl"))


def work(training: Any, output: run_dir.RunDir, clock: stopwatch.Stopwatch) -> int:
    """Train, and print the exact answers to held-out questions before and after."""
    training.output = output
    if training.options.rl.kl:
        training.reference = objective.reference(training, output)
    output.log(
        f"rl        {len(training.prompts):,} prompts, {training.n_left_out:,} dropped (too long); "
        f"{training.sequences_per_step:,} responses a step in groups of {training.options.rl.group_size}"
    )
    return objective.work(training, output, clock)


def main(options: config.Config) -> int:
    """Train on rewards. Returns the exit status."""
    return job.main(options, make, work)
