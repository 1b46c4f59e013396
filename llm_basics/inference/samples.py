"""The program of `generate`: one prompt or a file of them, several samples, to the terminal or to a file.

uv run python -m llm_basics.generate runs/NAME --prompt "def " --samples 4 --min_p 0.1
uv run python -m llm_basics.generate runs/NAME --prompts prompts.txt --out texts.jsonl
uv run python -m llm_basics.generate runs/NAME --prompt "def " --show_probs
"""

import io
import itertools
import json
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
from llm_basics.inference import detokenizer, engine

# texts that are written together: their keys and values must fit into memory
AT_ONCE = 16

# how many other tokens --show_probs names
ALTERNATIVES = 4


def main(options: commands.GenerateConfig) -> int:
    """Write as `options` say. Returns the exit status."""
    try:
        with parse.exit_on_error():
            prompts = [{"prompt": options.prompt}]
            if options.prompts is not None:
                prompts = read_prompts(Path(options.prompts))
            lm, chosen = engine.open_run(options)
            if options.out is None:
                write_to_terminal(lm, chosen, [entry["prompt"] for entry in prompts], options)
            else:
                write_to_file(lm, chosen, prompts, options, Path(options.out))
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The prompts of a file: its lines; of a .jsonl, the objects in them. Empty lines do not count."""
    if not path.is_file():
        raise ValueError(f"--prompts must be a file with a prompt a line, got {path}")
    content = path.read_bytes()
    if path.suffix != ".jsonl":
        lines = files.decode(content, path).removeprefix("\ufeff")
        found = [{"prompt": line.removesuffix("\r")} for line in lines.split("\n") if line.strip()]
    else:
        found = []
        for place, record in files.json_lines(path, io.BytesIO(content)):
            if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
                raise ValueError(f'{place} must be an object with a text "prompt", got {record!r:.60}')
            found.append(record)
    if not found:
        raise ValueError(f"--prompts must hold a prompt, but {path} is empty")
    return found


# --------------------------------------------------------------------------------------------------
# Texts


def logits_processor(options: commands.GenerateConfig) -> generate.LogitsProcessor | None:
    """What is done to scores before temperature, top-k and top-p."""
    return generate.make_logits_processor(options.temperature, options.min_p, options.repetition_penalty)


def write(
    lm: model.TransformerLM,
    chosen: tokenizer.Tokenizer,
    asked: Sequence[tuple[str, int]],
    options: commands.GenerateConfig,
) -> Iterator[Iterator[str]]:
    """For each prompt and seed its text, piece by piece; several are written at once, before any is shown."""
    settings = (options.max_new_tokens, options.temperature, options.top_k, options.top_p)
    adjust = logits_processor(options)
    # somebody's own `generate` writes one text at a time
    if len(asked) == 1 or "generate.generate" in swap.user_pieces():
        for prompt, seed in asked:
            yield engine.complete(lm, chosen, prompt, *settings, seed, options.stop, adjust)
        return
    for start in range(0, len(asked), AT_ONCE):
        prompts, seeds = zip(*asked[start : start + AT_ONCE], strict=True)
        texts = engine.complete_batch(lm, chosen, prompts, *settings, seeds, options.stop, adjust)
        yield from (iter([text]) for text in texts)


def write_to_terminal(
    lm: model.TransformerLM,
    chosen: tokenizer.Tokenizer,
    prompts: Sequence[str],
    options: commands.GenerateConfig,
) -> None:
    """Print each prompt and how it goes on."""
    samples = range(options.samples)
    asked = [(prompt, options.seed + sample) for prompt in prompts for sample in samples]
    titles = [
        f"--- prompt {number}, sample {sample + 1}"
        for number in range(1, len(prompts) + 1)
        for sample in samples
    ]
    texts = itertools.repeat(iter(())) if options.show_probs else write(lm, chosen, asked, options)
    for title, (prompt, seed), pieces in zip(titles, asked, texts, strict=False):
        if len(asked) > 1:
            print(title)
        if options.show_probs:
            show_probabilities(lm, chosen, prompt, seed, options)
            continue
        print(prompt, end="")
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


def write_to_file(
    lm: model.TransformerLM,
    chosen: tokenizer.Tokenizer,
    prompts: Sequence[dict[str, Any]],
    options: commands.GenerateConfig,
    path: Path,
) -> None:
    """Write a line for each text: what stood in the line of its prompt, its seed and the new text."""
    seeds = range(options.seed, options.seed + options.samples)
    entries = [{**entry, "seed": seed} for entry in prompts for seed in seeds]
    asked = [(entry["prompt"], entry["seed"]) for entry in entries]
    with files.replacing(path) as file:
        for entry, pieces in zip(entries, write(lm, chosen, asked, options), strict=True):
            line = json.dumps({**entry, "text": "".join(pieces)}, ensure_ascii=False)
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
    """Print each token as it comes, with its probability and what was likely in its place; then the text.

    They are the model's own probabilities, before temperature, penalty and cuts.
    """
    adjust = logits_processor(options)
    found: list[Tensor] = []

    def record(ids: Int[Tensor, " seq"], logits: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
        found[:] = [F.softmax(logits.detach().float()).cpu()]
        return logits if adjust is None else adjust(ids, logits)

    ids = generate.generate(
        lm,
        engine.prompt_tokens(lm, chosen, prompt),
        options.max_new_tokens,
        options.temperature,
        options.top_k,
        options.top_p,
        stop_id=chosen.special_id(tokenizer.END_OF_TEXT),
        generator=torch.Generator().manual_seed(seed),
        adjust=record,
    )
    screen = console.Console(highlight=False)
    stream = detokenizer.Detokenizer(chosen, options.stop)
    whole = text.Text(prompt)
    for id in ids:
        (probabilities,) = found
        screen.print(_row(chosen, id, probabilities), soft_wrap=True)
        whole.append(stream.read(id), style=_style(float(probabilities[id])))
        if stream.is_over:
            break
    whole.append(stream.close())
    screen.print()
    screen.print(whole, soft_wrap=True)


def _row(chosen: tokenizer.Tokenizer, id: int, probabilities: Float[Tensor, " vocab"]) -> text.Text:
    """A token and its probability, and the likeliest others with theirs."""
    row = text.Text()
    probability = float(probabilities[id])
    row.append(f"{probability:7.1%}  {vocabulary.show_token(chosen.vocab[id]):<16}", _style(probability))
    others = [
        other for other in probabilities.topk(min(ALTERNATIVES + 1, len(probabilities))).indices.tolist()
    ]
    for other in [other for other in others if other != id][:ALTERNATIVES]:
        row.append(f"  {vocabulary.show_token(chosen.vocab[other])} {float(probabilities[other]):.1%}", "dim")
    return row


def _style(probability: float) -> str:
    return "green" if probability >= 0.5 else "yellow" if probability >= 0.1 else "red"
