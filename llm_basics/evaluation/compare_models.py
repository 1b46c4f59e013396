"""The program of `evaluate`: models side by side, on text and on questions."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box, console, table

from llm_basics import swap
from llm_basics.cli import commands, parse
from llm_basics.core import config, device, evaluate, files, presets
from llm_basics.core import tokenizer as tokenizers
from llm_basics.data import prepare, shard_builder, shards, sources
from llm_basics.evaluation import log_likelihood, metrics, multiple_choice
from llm_basics.inference import engine
from llm_basics.runs import checkpoint, run_dir
from llm_basics.runs import console as terminal

# as in `train`: a score is not finite
NOT_FINITE = 1

# what a number of a report says, and how it is shown
MEASURES = {
    "val_loss": (
        "validation loss",
        "{:.4f}",
        "nats: minus the log of the probability of the token that came",
    ),
    "perplexity": ("perplexity", "{:.2f}", "as if it chose evenly among so many tokens"),
    "bits_per_byte": ("bits per byte", "{:.4f}", "comparable whatever the tokenizer; knowing nothing is 8"),
    "accuracy": ("accuracy", "{:.2%}", "tokens that it found likeliest"),
    "top5_accuracy": ("accuracy, top 5", "{:.2%}", "tokens among the five that it found likeliest"),
    "calibration_error": (
        "calibration error",
        "{:.4f}",
        "how far its confidence is from its accuracy; 0 is best",
    ),
    "n_tokens": ("tokens", "{:,}", "each predicted once"),
}
ANSWERS = {
    "accuracy": ("answers", "{:.1%}", "right, where it picks the likeliest choice"),
    "accuracy_per_byte": (
        "answers, per byte",
        "{:.1%}",
        "right, where long choices are not at a disadvantage",
    ),
    "chance": ("chance", "{:.1%}", "what guessing reaches"),
    "chance_error": (
        "give or take",
        "{:.1%}",
        "what luck adds or takes, two times in three",
    ),
    "n_questions": ("questions", "{:,}", "each asked once"),
}


@dataclass(frozen=True)
class Judged:
    """A model, what it was judged on, and what was found."""

    run: str
    checkpoint: str
    text: str | None
    report: metrics.Report | None
    answers: multiple_choice.Answers | None


def main(options: commands.EvaluateConfig) -> int:
    """Measure as `options` say. Returns the exit status."""
    with swap.restored(), parse.exit_on_error():
        if options.out is not None and not Path(options.out).parent.is_dir():
            raise ValueError(f"--out must be in a folder that is there, got {options.out}")
        questions = multiple_choice.read(options.choices) if options.choices is not None else []
        if options.mine is not None:
            swap.use(options.mine)
            print(f"pieces    {swap.describe()}", file=sys.stderr)
        if options.fast == "on":
            swap.use("fast", log=lambda line: print(line, file=sys.stderr))
        try:
            with terminal.progress_bar() as progress:
                found = [
                    judge(name, options, questions, progress) for name in options.run_dirs or ("newest",)
                ]
        except FloatingPointError as error:
            print(f"error: {error}", file=sys.stderr)
            return NOT_FINITE
        show(found)
        if options.out is not None:
            files.write(Path(options.out), json.dumps(as_json(found), indent=2, allow_nan=False) + "\n")
            print(f"written to {options.out}")
        return 0


def judge(
    name: str,
    options: commands.EvaluateConfig,
    questions: Sequence[multiple_choice.Question],
    progress: Callable[[str, int, int], None],
) -> Judged:
    """Load a run, and measure it on text, on questions, or both."""
    folder = run_dir.resolve(name)
    path = checkpoint.find(folder / run_dir.CHECKPOINTS, options.checkpoint)
    model, tokenizer = engine.load_run(folder, device.choose(options.device), options.checkpoint)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} must have ids below the {model.config.vocab_size} of its model, "
            f"got {tokenizer.vocab_size} ids"
        )
    report = answers = source = None
    if options.data is not None or not questions:
        source, tokens = find_text(folder, path, tokenizer, options)
        scores = log_likelihood.score_text(model, tokens, options.stride, options.batch_size)
        lengths = evaluate.token_lengths(tokenizer, model.config.vocab_size)
        report = metrics.measure(_told(scores, progress, str(folder), len(tokens) - 1), lengths)
    if questions:
        answers = multiple_choice.ask(model, tokenizer, questions, options.delimiter, options.batch_size)
    return Judged(str(folder), str(path), source, report, answers)


def find_text(
    folder: Path, path: Path, tokenizer: tokenizers.Tokenizer, options: commands.EvaluateConfig
) -> tuple[str, np.ndarray]:
    """The name and the tokens of the text that `options` name, or that the run held out in training."""
    if (source := options.data) is not None:
        documents = sources.find(source, on_bad_utf8=options.on_bad_utf8).documents()
        end = tokenizer.special_id(tokenizers.END_OF_TEXT)
        ids = [[*tokenizer.encode_ordinary(document.text), end] for document in documents]
        if not ids:
            raise ValueError(f"--data must hold text, but {source} is empty")
        return source, np.concatenate([np.array(each, np.int32) for each in ids])
    name = checkpoint.read_about(path).get("data")
    if name is None:
        raise ValueError(f"{folder} was not trained here and has no held-out text; name a text by --data")
    trained = presets.update(config.Config(), run_dir.read_config(folder), origin=f"{folder}/config.json")
    given = Path(trained.data)
    prepared = given if (given / shard_builder.META).is_file() else Path(trained.data_dir) / name
    if not prepared.is_dir():
        raise ValueError(
            f"the held-out text of {folder} must be in {prepared}, which is gone; start from the folder that "
            "has it, or name a text by --data"
        )
    held_out = shards.read_shard(prepare.load(prepared).val.path, tokenizer.fingerprint())
    shards.check_ids(held_out)
    return f"held out in {prepared}", held_out.tokens


def _told(
    scores: Iterator[log_likelihood.Scores],
    progress: Callable[[str, int, int], None],
    stage: str,
    total: int,
) -> Iterator[log_likelihood.Scores]:
    done = 0
    for part in scores:
        done += len(part.targets)
        progress(stage, done, total)
        yield part


# --------------------------------------------------------------------------------------------------
# What people see, and what programs read


def show(found: Sequence[Judged]) -> None:
    """Print the numbers of all models side by side, then loss by position and calibration."""
    screen = console.Console(highlight=False)
    rows = _table("", *(judged.run for judged in found), "what it says")
    reports = [judged.report for judged in found if judged.report is not None]
    answers = [judged.answers for judged in found if judged.answers is not None]
    for kind, of_all in ((MEASURES, reports), (ANSWERS, answers)):
        for name, (title, form, meaning) in kind.items() if of_all else ():
            rows.add_row(title, *(form.format(getattr(each, name)) for each in of_all), meaning)
    for text in dict.fromkeys(judged.text for judged in found if judged.text is not None):
        screen.print(f"text: {text}")
    screen.print(rows)
    if reports:
        screen.print("Loss by position: how much it helps to have read more of the window.")
        screen.print(_by_position(found))
    for judged in found:
        if judged.report is not None:
            screen.print(
                f"Calibration of {judged.run}: when it was so confident in its likeliest token, how often "
                "was it right? (arXiv 1706.04599)"
            )
            screen.print(_calibration(judged.report))


def _by_position(found: Sequence[Judged]) -> table.Table:
    rows = _table("position", *(judged.run for judged in found), "tokens")
    reports = [judged.report for judged in found if judged.report is not None]
    buckets = {bucket.first: bucket for report in reports for bucket in report.by_position}
    for first, bucket in sorted(buckets.items()):
        own = [next((b for b in report.by_position if b.first == first), None) for report in reports]
        losses = [f"{each.loss:.4f}" if each is not None else "" for each in own]
        place = f"{first}" if first == bucket.last else f"{first}-{bucket.last}"
        counts = ", ".join(dict.fromkeys(f"{each.count:,}" for each in own if each is not None))
        rows.add_row(place, *losses, counts)
    return rows


def _calibration(report: metrics.Report) -> table.Table:
    rows = _table("probability", "confidence", "accuracy", "tokens")
    for each in report.calibration:
        rows.add_row(
            f"{each.low:.2f}-{each.high:.2f}",
            f"{each.confidence:.3f}",
            f"{each.accuracy:.3f}",
            f"{each.count:,}",
        )
    return rows


def _table(*titles: str) -> table.Table:
    rows = table.Table(box=box.SIMPLE)
    for number, title in enumerate(titles):
        is_text = number == 0 or title == "what it says"
        rows.add_column(title, justify="left" if is_text else "right", overflow="fold")
    return rows


def as_json(found: Sequence[Judged]) -> list[dict[str, Any]]:
    """All that was found, as JSON can say it: what is no number is null."""
    return [run_dir.as_json(dataclasses.asdict(judged)) for judged in found]
