"""The program of `generate`: samples of one prompt or a file of prompts, to the terminal or a file."""

import io
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich import console, text
from torch import Tensor

from llm_basics import swap
from llm_basics.cli import commands, parse
from llm_basics.core import files, generate, model, tokenizer, vocabulary
from llm_basics.core import functional as F
from llm_basics.data import jsonl
from llm_basics.inference import detokenizer, engine, selection

# maximum texts per batch: their key-value caches must fit into memory
BATCH_SIZE = 16

# alternatives shown for each token by --show_probs
N_ALTERNATIVES = 4

# style of the prompt on a terminal, to distinguish it from the generated text
PROMPT_STYLE = "bold"


def main(options: commands.GenerateConfig) -> int:
    """Generate text. Returns the exit status."""
    with parse.exit_on_error():
        prompts = [{"prompt": options.prompt}]
        if options.prompts is not None:
            prompts = read_prompts(Path(options.prompts))
        lm, chosen = engine.open_run(options)
        if options.out is None:
            write_to_terminal(lm, chosen, prompts, options)
        else:
            write_to_file(lm, chosen, prompts, options, Path(options.out))
    return 0


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Read prompts from a file: its lines, or the objects of a .jsonl. Blank lines are skipped."""
    if not path.is_file():
        raise ValueError(f"--prompts must be a file with one prompt per line, got {path}")
    content = path.read_bytes()
    if path.suffix != ".jsonl":
        lines = files.decode(content, path).removeprefix("\ufeff")
        found = [{"prompt": line.removesuffix("\r")} for line in lines.split("\n") if line.strip()]
    else:
        found = []
        for source, record in jsonl.read(path, io.BytesIO(content)):
            if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
                raise ValueError(f'{source} must be an object with a string "prompt", got {record!r:.60}')
            found.append(record)
    if not found:
        raise ValueError(f"--prompts must hold at least one prompt, got none in {path}")
    return found


# --------------------------------------------------------------------------------------------------
# Text


def logits_processor(options: commands.GenerateConfig) -> generate.LogitsProcessor | None:
    """The logits processor applied before temperature, top-k and top-p."""
    return engine.make_logits_processor(options.temperature, options.min_p, options.repetition_penalty)


def generate_texts(
    lm: model.TransformerLM,
    chosen: tokenizer.Tokenizer,
    requests: Sequence[tuple[str, int]],
    options: commands.GenerateConfig,
) -> Iterator[Iterator[str]]:
    """Generate a text for each prompt and seed: one is streamed, several are generated in batches."""
    settings = (options.max_new_tokens, options.temperature, options.top_k, options.top_p)
    adjust = logits_processor(options)
    # a `generate` of user code accepts one prompt at a time
    if len(requests) == 1 or "generate.generate" in swap.user_pieces():
        for prompt, seed in requests:
            yield engine.complete(lm, chosen, prompt, *settings, seed, options.stop, adjust)
        return
    for start in range(0, len(requests), BATCH_SIZE):
        prompts, seeds = zip(*requests[start : start + BATCH_SIZE], strict=True)
        texts = engine.complete_batch(lm, chosen, prompts, *settings, seeds, options.stop, adjust)
        yield from (iter([text]) for text in texts)


def choose_texts(
    lm: model.TransformerLM,
    chosen: tokenizer.Tokenizer,
    prompts: Sequence[dict[str, Any]],
    options: commands.GenerateConfig,
) -> Iterator[selection.Choice]:
    """Generate `options.samples` texts for each prompt, each selected from several candidates."""
    reward = selection.load_reward(options)
    for entry, number in itertools.product(prompts, range(options.samples)):
        candidates = selection.sample(
            lm,
            chosen,
            engine.prompt_tokens(lm, chosen, entry["prompt"]),
            selection.seeds_of(options, options.n_candidates, number),
            options,
            chosen.end_of_text_id,
            options.stop,
            logits_processor(options),
        )
        yield selection.choose(candidates, options, reward, entry["prompt"], entry.get("expected"))


def write_to_terminal(
    lm: model.TransformerLM,
    chosen: tokenizer.Tokenizer,
    prompts: Sequence[dict[str, Any]],
    options: commands.GenerateConfig,
) -> None:
    """Print each prompt with its continuations, the prompt in bold if stdout is a terminal."""
    samples = range(options.samples)
    requests = [(entry["prompt"], options.seed + sample) for entry in prompts for sample in samples]
    titles = [
        f"--- prompt {number}, sample {sample + 1}"
        for number in range(1, len(prompts) + 1)
        for sample in samples
    ]
    texts: Iterator[Iterator[str] | selection.Choice]
    if options.n_candidates:
        texts = choose_texts(lm, chosen, prompts, options)
    elif options.show_probs:
        texts = itertools.repeat(iter(()))
    else:
        texts = generate_texts(lm, chosen, requests, options)
    for title, (prompt, seed), pieces in zip(titles, requests, texts, strict=False):
        if len(requests) > 1:
            print(title)
        if options.show_probs:
            show_probabilities(lm, chosen, prompt, seed, options)
            continue
        print_prompt(prompt)
        if isinstance(pieces, selection.Choice):
            print(pieces.candidate.text, flush=True)
            print(f"({pieces})", file=sys.stderr, flush=True)
            continue
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


def print_prompt(prompt: str) -> None:
    """Print a prompt without a line break: styled on a terminal, plain in a pipe."""
    if sys.stdout.isatty():
        console.Console().print(text.Text(prompt), style=PROMPT_STYLE, end="", soft_wrap=True)
    else:
        print(prompt, end="")


def write_to_file(
    lm: model.TransformerLM,
    chosen: tokenizer.Tokenizer,
    prompts: Sequence[dict[str, Any]],
    options: commands.GenerateConfig,
    path: Path,
) -> None:
    """Write a JSON line for each text: the fields of its prompt, the seed and the generated text.

    A text selected from several candidates also has its score.
    """
    seeds = range(options.seed, options.seed + options.samples)
    entries = [{**entry, "seed": seed} for entry in prompts for seed in seeds]
    requests = [(entry["prompt"], entry["seed"]) for entry in entries]
    found: Iterator[dict[str, Any]]
    if options.n_candidates:
        found = map(selection.as_fields, choose_texts(lm, chosen, prompts, options))
    else:
        texts = generate_texts(lm, chosen, requests, options)
        found = ({"text": "".join(pieces)} for pieces in texts)
    with files.replacing(path) as file:
        for entry, fields in zip(entries, found, strict=True):
            line = json.dumps({**entry, **fields}, ensure_ascii=False)
            file.write(line.encode("utf-8", "replace") + b"\n")
    print(f"{len(entries)} texts written to {path}")


# --------------------------------------------------------------------------------------------------
# Probabilities


def show_probabilities(
    lm: model.TransformerLM,
    chosen: tokenizer.Tokenizer,
    prompt: str,
    seed: int,
    options: commands.GenerateConfig,
) -> None:
    """Stream each token with its probability and likely alternatives; then print the whole text.

    Probabilities are those of the model, before temperature, repetition penalty, top-k, top-p and min-p.
    """
    adjust = logits_processor(options)
    latest: list[Tensor] = []

    def record(ids: Int[Tensor, " seq"], logits: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
        latest[:] = [F.softmax(logits.detach().float()).cpu()]
        return logits if adjust is None else adjust(ids, logits)

    ids = generate.generate(
        lm,
        engine.prompt_tokens(lm, chosen, prompt),
        options.max_new_tokens,
        options.temperature,
        options.top_k,
        options.top_p,
        stop_id=chosen.end_of_text_id,
        generator=torch.Generator().manual_seed(seed),
        adjust=record,
    )
    screen = console.Console(highlight=False)
    stream = detokenizer.Detokenizer(chosen, options.stop)
    styled = text.Text().append(prompt, style=PROMPT_STYLE)
    for id in ids:
        (probabilities,) = latest
        screen.print(_row(chosen, id, probabilities), soft_wrap=True)
        styled.append(stream.read(id), style=_style(float(probabilities[id])))
        if stream.is_over:
            break
    styled.append(stream.close())
    screen.print()
    screen.print(styled, soft_wrap=True)


def _row(chosen: tokenizer.Tokenizer, id: int, probabilities: Float[Tensor, " vocab"]) -> text.Text:
    """A line of a token and its most likely alternatives, with their probabilities."""
    row = text.Text()
    probability = float(probabilities[id])
    row.append(f"{probability:7.1%}  {vocabulary.show_token(chosen.vocab[id]):<16}", _style(probability))
    likely = probabilities.topk(min(N_ALTERNATIVES + 1, len(probabilities))).indices.tolist()
    for other in [other for other in likely if other != id][:N_ALTERNATIVES]:
        row.append(f"  {vocabulary.show_token(chosen.vocab[other])} {float(probabilities[other]):.1%}", "dim")
    return row


def _style(probability: float) -> str:
    return "green" if probability >= 0.5 else "yellow" if probability >= 0.1 else "red"
