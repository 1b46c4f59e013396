"""The program of `evaluate`: compares models on text and on multiple-choice questions."""

import dataclasses
import json
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
from llm_basics.evaluation import exact_answers, log_likelihood, metrics, multiple_choice
from llm_basics.inference import engine, selection, user_reward
from llm_basics.runs import checkpoint, run_dir
from llm_basics.runs import console as terminal

# title, format and meaning of the figures shown
MEASURES = {
    "val_loss": ("validation loss", "{:.4f}", "nats per token: mean of -log p(token)"),
    "perplexity": ("perplexity", "{:.2f}", "exp(loss): equivalent number of equally likely tokens"),
    "bits_per_byte": ("bits per byte", "{:.4f}", "independent of the tokenizer; uniform over bytes: 8"),
    "accuracy": ("accuracy", "{:.2%}", "the token was the most likely one"),
    "top5_accuracy": ("accuracy, top 5", "{:.2%}", "the token was among the 5 most likely"),
    "calibration_error": ("calibration error", "{:.4f}", "mean |accuracy - confidence|; best: 0"),
    "n_tokens": ("tokens", "{:,}", "each predicted once"),
}
ANSWERS = {
    "accuracy": ("answers", "{:.1%}", "correct, by the log-probability of a choice"),
    "accuracy_per_byte": ("answers, per byte", "{:.1%}", "correct, by log-probability per byte"),
    "chance": ("chance", "{:.1%}", "accuracy of random guessing"),
    "standard_error": ("standard error", "{:.1%}", "of the accuracy of random guessing"),
    "n_questions": ("questions", "{:,}", "multiple choice"),
}
EXACT = {
    "greedy": ("exact, greedy", "{:.1%}", "the whole reply is the expected one"),
    "sample": ("exact, one sample", "{:.1%}", "mean of all samples"),
    "best_of": (
        "exact, best of n",
        "{:.1%}",
        "the sample with the highest log-probability per token or reward",
    ),
    "majority": ("exact, majority of n", "{:.1%}", "the most frequent sample"),
    "any": ("exact, any of n", "{:.1%}", "at least one sample is right"),
    "n_questions": ("questions", "{:,}", ""),
}
MEANING = "meaning"


@dataclass(frozen=True)
class Evaluation:
    """The results of one model: `report` on the text called `text`, `answers` on questions."""

    run: str
    checkpoint: str
    text: str | None
    report: metrics.Report | None
    answers: multiple_choice.Results | None
    exact: exact_answers.Results | None = None


def main(options: commands.EvaluateConfig) -> int:
    """Evaluate models and print the results. Returns the exit status."""
    with swap.restored(), parse.exit_on_error():
        if options.out is not None and not Path(options.out).parent.is_dir():
            raise ValueError(f"--out must be in an existing folder, got {options.out}")
        questions = multiple_choice.read(options.choices) if options.choices is not None else []
        reward = selection.load_reward(options)
        swap.use_for_command(options.mine, options.fast)
        with terminal.progress_bar() as progress:
            results = [
                evaluate_run(name, options, questions, progress, reward)
                for name in options.run_dirs or ("newest",)
            ]
        show(results)
        if options.out is not None:
            files.write(Path(options.out), json.dumps(as_json(results), indent=2, allow_nan=False) + "\n")
            print(f"written to {options.out}")
        return 0


def evaluate_run(
    name: str,
    options: commands.EvaluateConfig,
    questions: Sequence[multiple_choice.Question],
    progress: Callable[[str, int, int], None],
    reward: user_reward.UserReward | None = None,
) -> Evaluation:
    """Load a run and evaluate it on text, multiple-choice questions or exact answers, as selected."""
    folder = run_dir.resolve(name)
    path = checkpoint.find(folder / run_dir.CHECKPOINTS, options.checkpoint)
    model, tokenizer = engine.load_run(folder, device.choose(options.device), options.checkpoint)
    engine.quantize_for_command(model, options)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer must have at most the {model.config.vocab_size} ids of the model, got "
            f"{tokenizer.vocab_size} ({folder})"
        )
    report = answers = source = exact = None
    if options.data is not None or not (questions or options.answers):
        source, tokens = find_text(folder, path, tokenizer, options)
        scores = log_likelihood.score_text(model, tokens, options.stride, options.batch_size)
        lengths = evaluate.token_lengths(tokenizer, model.config.vocab_size)
        report = metrics.measure(_with_progress(scores, progress, str(folder), len(tokens) - 1), lengths)
    if questions:
        answers = multiple_choice.evaluate(model, tokenizer, questions, options.delimiter, options.batch_size)
    if options.answers is not None:
        length = model.config.context_length
        items = exact_answers.read(options.answers, tokenizer, length, lambda: prepared_folder(folder, path))
        exact = exact_answers.evaluate(
            model, tokenizer, items, options, reward, lambda done: progress(str(folder), done, len(items))
        )
    return Evaluation(str(folder), str(path), source, report, answers, exact)


def find_text(
    folder: Path, path: Path, tokenizer: tokenizers.Tokenizer, options: commands.EvaluateConfig
) -> tuple[str, np.ndarray]:
    """The name and tokens of the text to evaluate on: --data, or the held-out split of the run."""
    if (source := options.data) is not None:
        documents = sources.find(source, on_bad_utf8=options.on_bad_utf8).documents()
        end = tokenizer.end_of_text_id
        ids = [[*tokenizer.encode_ordinary(document.text), end] for document in documents]
        if not ids:
            raise ValueError(f"--data must hold text, got an empty source ({source})")
        return source, np.concatenate([np.array(each, np.int32) for each in ids])
    prepared = prepared_folder(folder, path)
    held_out = shards.read_shard(prepare.load(prepared).val.path, tokenizer.fingerprint())
    shards.check_ids(held_out)
    return f"held out in {prepared}", held_out.tokens


def prepared_folder(folder: Path, path: Path) -> Path:
    """The folder of token files that a run was trained on."""
    name = checkpoint.read_about(path).get("data")
    if name is None:
        raise ValueError(f"{folder} was not trained here and has no held-out split; name a text with --data")
    trained = presets.update(config.Config(), run_dir.read_config(folder), origin=f"{folder}/config.json")
    given = Path(trained.data)
    # behind the folder, dpo names its file of pairs and distill its teacher
    in_cache = Path(trained.data_dir) / str(name).partition(", ")[0]
    prepared = given if (given / shard_builder.META).is_file() else in_cache
    if not prepared.is_dir():
        raise ValueError(
            f"the held-out split must be in {prepared}, got no such folder ({folder}/config.json); run from "
            "the folder that holds it, or name a text with --data"
        )
    return prepared


def _with_progress(
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
# Output


def show(results: Sequence[Evaluation]) -> None:
    """Print the figures of all models side by side, then loss by position and calibration."""
    screen = console.Console(highlight=False)
    texts = list(dict.fromkeys(result.text for result in results))
    runs = [result.run for result in results]
    if len(texts) > 1:
        runs = [f"{result.run} (text {texts.index(result.text) + 1})" for result in results]
    rows = _table("", *runs, MEANING)
    reports = [result.report for result in results if result.report is not None]
    answers = [result.answers for result in results if result.answers is not None]
    exact = [result.exact for result in results if result.exact is not None]
    for kind, of_all in ((MEASURES, reports), (ANSWERS, answers), (EXACT, exact)):
        for name, (title, form, meaning) in kind.items() if of_all else ():
            if any(getattr(each, name) is None for each in of_all):
                continue
            rows.add_row(title, *(form.format(getattr(each, name)) for each in of_all), meaning)
    for number, text in enumerate(texts, start=1):
        if text is not None:
            screen.print(f"text {number}: {text}" if len(texts) > 1 else f"text: {text}")
    if len(texts) > 1:
        screen.print("Results on different texts are not comparable; --data evaluates all runs on one text.")
    screen.print(rows)
    if reports:
        screen.print("Loss by position in the window: how much more context helps.")
        screen.print(_by_position(reports, runs))
    for run, result in zip(runs, results, strict=True):
        if result.report is not None:
            screen.print(
                f"Calibration of {run}: accuracy by the probability of the most likely token "
                "(arXiv 1706.04599)."
            )
            screen.print(_calibration(result.report))


def _by_position(reports: Sequence[metrics.Report], runs: Sequence[str]) -> table.Table:
    rows = _table("position", *runs, "tokens")
    buckets = {bucket.first: bucket for report in reports for bucket in report.by_position}
    for first, bucket in sorted(buckets.items()):
        column = [next((b for b in report.by_position if b.first == first), None) for report in reports]
        losses = [f"{each.loss:.4f}" if each is not None else "" for each in column]
        position = f"{first}" if first == bucket.last else f"{first}-{bucket.last}"
        counts = ", ".join(dict.fromkeys(f"{each.count:,}" for each in column if each is not None))
        rows.add_row(position, *losses, counts)
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
        is_text = number == 0 or title == MEANING
        rows.add_column(title, justify="left" if is_text else "right", overflow="fold")
    return rows


def as_json(results: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """The results as JSON values; a number that is not finite becomes null."""
    return [run_dir.as_json(dataclasses.asdict(result)) for result in results]
