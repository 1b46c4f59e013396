"""Supervised fine-tuning (SFT): train on conversations, with the loss on the assistant's replies only."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from llm_basics.core import config, dataloader, generate
from llm_basics.data import (
    batch_source,
    chat_template,
    prepare,
    sft_dataset,
    synthetic_qa,
    tokenizer_formats,
)
from llm_basics.runs import run_dir, signals, stopwatch
from llm_basics.training import distributed, job, state

# number of held-out conversations printed before and after training, and scored for accuracy
N_PRINTED, N_SCORED = 12, 500

# longest text printed on a line
LINE_CHARACTERS = 90

C = TypeVar("C", bound=config.Config)


@dataclass(frozen=True)
class TestCase:
    """A held-out conversation up to its last reply: the last question, the expected reply, and its kind."""

    ids: list[int]
    question: str
    expected: str
    kind: str


@functools.cache
def kinds() -> dict[str, str]:
    """The kind of each synthetic question."""
    return {pair.question: pair.kind for pair in synthetic_qa.all_pairs()}


class SftState(state.TrainingState):
    """The state of a fine-tuning run on conversations."""

    def read(self, prepared: prepare.Prepared) -> tuple[batch_source.BatchSource, np.ndarray]:
        """The training batches, and the held-out tokens inside the loss mask."""
        train, length = self.options.train, self.options.model.context_length
        train_rows = sft_dataset.rows_of(prepared.train, self.tokenizer, length + 1)
        held_out = sft_dataset.rows_of([prepared.val], self.tokenizer, length + 1)
        for split, rows in (("training", train_rows.rows), ("held-out", held_out.rows)):
            if not rows:
                raise ValueError(
                    f"no {split} conversation fits into model.context_length {length}; use shorter "
                    "conversations or a model with a longer context"
                )
        self.train_rows, self.held_out_rows = train_rows, held_out
        rows = (
            sft_dataset.pack(train_rows.rows, length + 1) if self.options.packing == "on" else train_rows.rows
        )
        self.n_rows = len(rows)
        batches = sft_dataset.Batches(rows, train.batch_size, length, train.seed, self.device)
        return batches, np.concatenate([row.ids[row.loss_mask] for row in held_out.rows])

    def held_out_batches(self, max_batches: int) -> Iterator[dataloader.Batch]:
        """Batches of held-out conversations, at most `max_batches`, evenly spaced."""
        size, length = self.options.train.batch_size, self.options.model.context_length
        return sft_dataset.sequential_batches(self.held_out_rows.rows, size, length, max_batches, self.device)

    def sample(self) -> tuple[str, str]:
        """A held-out conversation and the model's reply."""
        (case,) = self.test_cases(1)
        return self.tokenizer.decode(case.ids), self.reply(case)

    def test_cases(self, most: int) -> list[TestCase]:
        """At most `most` of the held-out conversations, evenly spaced."""
        return [self.test_case(row) for row in sft_dataset.evenly(self.held_out_rows.rows, most)]

    def test_case(self, row: sft_dataset.Example) -> TestCase:
        """A conversation as a prompt and its expected reply."""
        *earlier, start = np.flatnonzero(sft_dataset.message_starts(row.ids, self.tokenizer)).tolist()
        ids = row.ids.tolist()
        question = self.tokenizer.decode(ids[earlier[-1] + 1 : start - 1]) if earlier else ""
        expected = self.tokenizer.decode(ids[start + 1 :])
        return TestCase(ids[: start + 1], question, expected, kinds().get(question, "all"))

    def reply(self, case: TestCase) -> str:
        """The model's greedy reply, with `<|end|>` if it ended. Polls signals."""
        end, most = self.tokenizer.special_id(chat_template.END), self.options.train.sample_tokens
        prompt = torch.tensor(case.ids, device=self.device)
        with self._eager():
            # a separate generator, so that training does not depend on when replies are generated
            own = torch.Generator()
            tokens = generate.generate(self.model, prompt, most, 0.0, stop_id=end, generator=own)
            ids = list(signals.polled(tokens))
        return self.tokenizer.decode(ids + [end] * (len(ids) < most))


def prepared(options: C, command: str = "sft") -> tuple[C, prepare.Prepared]:
    """The conversations of `options.data` as token files, and the options with their vocabulary size."""
    if options.init_from is None and options.resume is None:
        raise ValueError(
            "--init_from must name the run to fine-tune (or newest), got none; or resume with --resume"
        )
    if options.train.stride is not None:
        raise ValueError(
            f"--train.stride must be omitted for conversations, got {options.train.stride}; it is for "
            "plain text"
        )
    if options.resume is not None:
        tokenizer = tokenizer_formats.load(Path(options.resume) / "tokenizer")
        if not chat_template.is_chat(tokenizer):
            raise ValueError(
                f"--resume must name a run of {command}, but the tokenizer of {options.resume} has no "
                f"<|user|>; fine-tune it with --init_from {options.resume}, or resume it with python -m "
                f"llm_basics.train --resume {options.resume}"
            )
    found = distributed.main_first(lambda: sft_dataset.prepare_conversations(options))
    model = dataclasses.replace(options.model, vocab_size=found.tokenizer.vocab_size)
    return dataclasses.replace(options, model=model), found


def make(options: config.Config) -> SftState:
    """The state of a fine-tuning run on the conversations of `options.data`."""
    return SftState(*prepared(options))


def work(training: state.TrainingState, output: run_dir.RunDir, clock: stopwatch.Stopwatch) -> int:
    """Train, and print the replies to held-out questions before and after."""
    assert isinstance(training, SftState), "from `make`"
    rows, printed = training.train_rows, training.test_cases(N_PRINTED)
    output.log(
        f"chat      {len(rows.rows):,} conversations in {training.n_rows:,} rows, "
        f"{len(training.held_out_rows.rows):,} held out; {rows.n_cut:,} truncated to the context, "
        f"{rows.n_left_out:,} dropped (no space for a reply)"
    )
    if training.step == 0 and not training.options.find_lr:
        output.metrics(0, **training.evaluate(training.options.train.eval_batches))
        training.on_main(lambda: record_replies(training, output, printed))
    status = job.work(training, output, clock)
    if not training.options.find_lr:
        training.on_main(lambda: print_replies(training, output, printed))
        training.on_main(lambda: print_accuracy(training, output))
    return status


def record_replies(training: SftState, output: run_dir.RunDir, cases: Sequence[TestCase]) -> None:
    """Record the replies before the first step."""
    for case in cases:
        output.record_sample(0, training.tokenizer.decode(case.ids), training.reply(case))


def print_replies(training: SftState, output: run_dir.RunDir, cases: Sequence[TestCase]) -> None:
    """Record and print the replies after training, next to those before the first step."""
    before = {
        entry["prompt"]: entry["text"] for entry in run_dir.read_samples(output.folder) if not entry["step"]
    }
    output.log(f"\n{len(cases)} held-out questions, with replies before and after training")
    for case in cases:
        prompt, text = training.tokenizer.decode(case.ids), training.reply(case)
        output.record_sample(training.step, prompt, text)
        lines = {"question": case.question, "before": before.get(prompt, ""), "after": text}
        lines |= {"expected": case.expected} if text != case.expected else {}
        output.log("\n" + "\n".join(f"  {name:10}{_line(line)}" for name, line in lines.items()))


def print_accuracy(training: SftState, output: run_dir.RunDir) -> None:
    """Print and record exact matches on held-out questions by kind, and the number of complete replies."""
    counts: dict[str, Counter[str]] = {}
    for case in training.test_cases(N_SCORED):
        text = training.reply(case)
        counts.setdefault(case.kind, Counter()).update(
            n=1, exact=text == case.expected, ended=text.endswith(chat_template.END)
        )
    total = sum(counts.values(), Counter())
    kinds = {kind: [count["exact"], count["n"]] for kind, count in counts.items()}
    output.event(training.step, "accuracy", exact=total["exact"], n=total["n"], kinds=kinds)
    output.log(
        f"\nexact match on {total['exact']} of {total['n']} held-out questions; "
        f"{total['ended']} replies end within {training.options.train.sample_tokens} tokens"
    )
    if len(counts) > 1:
        for kind, count in sorted(counts.items(), key=lambda item: -item[1]["exact"] / item[1]["n"]):
            accuracy = count["exact"] / count["n"]
            output.log(f"  {kind:10}{accuracy:5.0%}   {count['exact']} of {count['n']}")


def _line(text: str) -> str:
    line = text.removesuffix(chat_template.END).replace("\n", "\\n")
    return line if len(line) <= LINE_CHARACTERS else line[:LINE_CHARACTERS] + " ..."


def main(options: config.Config) -> int:
    """Fine-tune on conversations. Returns the exit status."""
    return job.main(options, make, work)
