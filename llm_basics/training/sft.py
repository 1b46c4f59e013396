"""Teach a trained model to answer: supervised fine-tuning on conversations, of which answers are learned.

uv run python -m llm_basics.sft --init_from runs/NAME                        on questions that it makes itself
uv run python -m llm_basics.sft --init_from runs/NAME --data answers.jsonl --train.steps 500
uv run python -m llm_basics.sft --resume runs/CHAT                           go on where it was stopped
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llm_basics.core import config, dataloader, generate
from llm_basics.data import chat_template, prepare, sft_dataset, synthetic_qa, tokenizer_formats
from llm_basics.runs import run_dir, signals
from llm_basics.training import job, state

# questions that are answered before and after, and those by which answers are judged
N_SHOWN, N_JUDGED = 12, 500

# of a text that is shown in a line
LINE_CHARACTERS = 90


@dataclass(frozen=True)
class Asked:
    """A held-out conversation up to its last answer, what was asked last, the answer, and its kind."""

    ids: list[int]
    question: str
    wanted: str
    kind: str


class SftState(state.TrainingState):
    """A training run on conversations."""

    def read(self, prepared: prepare.Prepared) -> tuple[dataloader.BatchSource, np.ndarray]:
        """Rows to train on, and the tokens that are learned of those that are held out."""
        train, length = self.options.train, self.options.model.context_length
        taught = sft_dataset.rows_of(prepared.train, self.tokenizer, length + 1)
        held_out = sft_dataset.rows_of([prepared.val], self.tokenizer, length + 1)
        for part, rows in (("learned from", taught.rows), ("held out", held_out.rows)):
            if not rows:
                raise ValueError(
                    f"a conversation must fit into model.context_length {length}, but of those to be {part} "
                    "none does"
                )
        self.taught, self.withheld = taught, held_out
        rows = sft_dataset.pack(taught.rows, length + 1) if self.options.packing == "on" else taught.rows
        self.n_rows = len(rows)
        batches = sft_dataset.Batches(rows, train.batch_size, length, train.seed, self.device)
        return batches, np.concatenate([row.ids[row.loss_mask] for row in held_out.rows])

    def held_out_batches(self, max_batches: int) -> Iterator[dataloader.Batch]:
        """The conversations that are held out, or so many, evenly spaced."""
        size, length = self.options.train.batch_size, self.options.model.context_length
        return sft_dataset.sequential_batches(self.withheld.rows, size, length, max_batches, self.device)

    def sample(self) -> tuple[str, str]:
        """A held-out conversation, and how the model answers."""
        (asked,) = self.asked(1)
        return self.tokenizer.decode(asked.ids), self.answer(asked)

    def asked(self, most: int) -> list[Asked]:
        """So many of the held-out conversations, evenly spaced."""
        kinds = {question.asked: question.kind for question in synthetic_qa.all_questions()}
        found = []
        for row in sft_dataset.evenly(self.withheld.rows, most):
            *earlier, start = np.flatnonzero(sft_dataset.begins(row.ids, self.tokenizer)).tolist()
            ids = row.ids.tolist()
            question = self.tokenizer.decode(ids[earlier[-1] + 1 : start - 1]) if earlier else ""
            wanted = self.tokenizer.decode(ids[start + 1 :])
            found.append(Asked(ids[: start + 1], question, wanted, kinds.get(question, "all")))
        return found

    def answer(self, asked: Asked) -> str:
        """What the model answers, always the likeliest token, with its `<|end|>` if it came to an end.

        A request to stop is answered between tokens.
        """
        end, most = self.tokenizer.special_id(chat_template.END), self.options.train.sample_tokens
        prompt = torch.tensor(asked.ids, device=self.device)
        with self._as_written():
            tokens = generate.generate(self.model, prompt, most, temperature=0.0, stop_id=end)
            ids = list(signals.polled(tokens))
        return self.tokenizer.decode(ids + [end] * (len(ids) < most))


def make(options: config.Config) -> SftState:
    """A run that learns to answer as the conversations do that `options` name."""
    if options.init_from is None and options.resume is None:
        raise ValueError("--init_from must name what is to be taught: a run, or newest; or give --resume")
    if options.train.stride is not None:
        raise ValueError(
            f"--train.stride must be left out for conversations, got {options.train.stride}: their rows are "
            "not windows of a text"
        )
    if options.resume is not None:
        known = tokenizer_formats.load(Path(options.resume) / "tokenizer")
        if not chat_template.is_chat(known):
            raise ValueError(
                f"--resume must name a run of sft, but {options.resume} is none (its tokenizer has no "
                f"<|user|>); begin with its weights by --init_from {options.resume}, or go on with it by "
                f"python -m llm_basics.train --resume {options.resume}"
            )
    prepared = sft_dataset.prepare_conversations(options)
    model = dataclasses.replace(options.model, vocab_size=prepared.tokenizer.vocab_size)
    return SftState(dataclasses.replace(options, model=model), prepared)


def work(training: state.TrainingState, output: run_dir.RunDir, clock: run_dir.Stopwatch) -> int:
    """Train, and show how the same held-out questions are answered before and after."""
    assert isinstance(training, SftState), "made by `make`"
    taught, shown = training.taught, training.asked(N_SHOWN)
    output.log(
        f"chat      {len(taught.rows):,} conversations in {training.n_rows:,} rows, "
        f"{len(training.withheld.rows):,} held out; {taught.n_cut:,} cut to the context, "
        f"{taught.n_left_out:,} left out whose question fills it"
    )
    if training.step == 0 and not training.options.find_lr:
        output.metrics(0, **training.evaluate(training.options.train.eval_batches))
        for asked in shown:
            output.record_sample(0, training.tokenizer.decode(asked.ids), training.answer(asked))
    status = job.work(training, output, clock)
    if not training.options.find_lr:
        show(training, output, shown)
        judge(training, output)
    return status


def show(training: SftState, output: run_dir.RunDir, shown: Sequence[Asked]) -> None:
    """Record how questions are answered now, beside how they were before the first step."""
    before = {
        entry["prompt"]: entry["text"] for entry in run_dir.read_samples(output.folder) if not entry["step"]
    }
    output.log(f"\n{len(shown)} questions that were held out, and their answers before and after")
    for asked in shown:
        prompt, text = training.tokenizer.decode(asked.ids), training.answer(asked)
        output.record_sample(training.step, prompt, text)
        lines = {"asked": asked.question, "before": before.get(prompt, ""), "after": text}
        lines |= {"wanted": asked.wanted} if text != asked.wanted else {}
        output.log("\n" + "\n".join(f"  {name:10}{_line(line)}" for name, line in lines.items()))


def judge(training: SftState, output: run_dir.RunDir) -> None:
    """Say how many held-out questions are answered exactly, kind by kind, and how many answers end."""
    counts: dict[str, Counter[str]] = {}
    for asked in training.asked(N_JUDGED):
        text = training.answer(asked)
        counts.setdefault(asked.kind, Counter()).update(
            asked=1, exact=text == asked.wanted, ended=text.endswith(chat_template.END)
        )
    total = sum(counts.values(), Counter())
    output.log(
        f"\n{total['exact']} of {total['asked']} held-out questions are answered exactly; "
        f"{total['ended']} answers end within {training.options.train.sample_tokens} tokens"
    )
    if len(counts) > 1:
        for kind, count in sorted(counts.items(), key=lambda item: -item[1]["exact"] / item[1]["asked"]):
            share = count["exact"] / count["asked"]
            output.log(f"  {kind:10}{share:5.0%}   {count['exact']} of {count['asked']}")


def _line(text: str) -> str:
    line = text.removesuffix(chat_template.END).replace("\n", "\\n")
    return line if len(line) <= LINE_CHARACTERS else line[:LINE_CHARACTERS] + " ..."


def main(options: config.Config) -> int:
    """Teach as `options` say. Returns the exit status."""
    return job.main(options, make, work)
