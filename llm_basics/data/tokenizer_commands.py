"""The tokenizer command: train a tokenizer, encode text, inspect tokens, compare two tokenizers.

uv run python -m llm_basics.tokenizer train --data book.txt --vocab-size 2000 --out my_tokenizer
uv run python -m llm_basics.tokenizer encode --data book.txt --tokenizer my_tokenizer --out tokens
uv run python -m llm_basics.tokenizer inspect "It's a tokenizer." --tokenizer my_tokenizer
uv run python -m llm_basics.tokenizer compare my_tokenizer gpt2 --data book.txt
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box, console, table, text

from llm_basics import swap
from llm_basics.cli import parse, subcommands
from llm_basics.core import bpe, tokenizer, vocabulary
from llm_basics.data import documents, prepare, shards
from llm_basics.runs import console as terminal

PATTERNS = {"gpt2": bpe.SPLIT_PATTERN, "cl100k": bpe.CL100K_PATTERN}

# adjacent tokens differ in color
COLORS = ["black on cyan", "black on yellow", "black on green", "black on magenta"]

# length of the text that `compare` shows
SAMPLE_CHARACTERS = 64


def main(options: Any) -> None:
    """Run the subcommand that `options` belong to; on an error, print one line and exit with 2."""
    with parse.exit_on_error():
        match options:
            case subcommands.TokenizerTrain():
                train(options)
            case subcommands.TokenizerEncode():
                encode(options)
            case subcommands.TokenizerInspect():
                inspect(prepare.load_tokenizer(options.tokenizer), options.text)
            case subcommands.TokenizerCompare():
                compare(options)


def train(options: subcommands.TokenizerTrain) -> None:
    """Train a tokenizer and save it."""
    specials = bpe.check_special_tokens(options.special_tokens)
    bpe.check_vocab_size(options.vocab_size, specials)
    pattern = PATTERNS[options.pattern]
    with _swapped(options), _one_file(options.data) as path, terminal.progress_bar() as progress:
        began = time.perf_counter()
        vocab, merges = bpe.train_bpe(
            path, options.vocab_size, specials, pattern=pattern, ties=options.ties, progress=progress
        )
        seconds, size = time.perf_counter() - began, path.stat().st_size
    tokenizer.Tokenizer(vocab, merges, specials, pattern).save(options.out)
    print(f"learned {len(vocab):,} tokens from {size:,} bytes in {seconds:.2f} s: {options.out}")
    if len(vocab) < options.vocab_size:
        print(f"no pair is left to merge: the vocabulary has {len(vocab):,} tokens")
    print("first merges: " + ", ".join(vocabulary.show_token(left + right) for left, right in merges[:8]))
    longest = sorted((left + right for left, right in merges), key=len)[-5:]
    print("longest tokens: " + ", ".join(map(vocabulary.show_token, longest)))


def encode(options: subcommands.TokenizerEncode) -> None:
    """Encode text to token files."""
    with _swapped(options), _one_file(options.data) as path:
        chosen = prepare.with_separator(prepare.load_tokenizer(options.tokenizer))
        with terminal.progress_bar() as progress:
            began = time.perf_counter()
            written = shards.encode_to_file(chosen, path, options.out, "tokens", progress=progress)
            seconds, size = time.perf_counter() - began, path.stat().st_size
    chosen.save(Path(options.out) / "tokenizer")
    print(f"encoded {size:,} bytes in {seconds:.2f} s ({size / seconds / 1e6:.0f} MB/s)")
    print("\n".join(f"{path}  {path.stat().st_size:,} bytes" for path in written))


def inspect(chosen: tokenizer.Tokenizer, content: str) -> None:
    """Print the tokens of a text with their ids, and the merges of each pre-token."""
    screen, content = _screen(), tokenizer.replace_surrogates(content)
    ids, n_bytes = chosen.encode(content), len(content.encode("utf-8"))
    screen.print(_colored(chosen, ids))
    screen.print(f"{len(ids)} tokens, {n_bytes} bytes: {n_bytes / max(1, len(ids)):.2f} bytes per token\n")
    rows = table.Table(box=box.SIMPLE)
    rows.add_column("id", justify="right")
    rows.add_column("token")
    for id in ids:
        rows.add_row(str(id), text.Text(vocabulary.show_token(chosen.vocab[id])))
    screen.print(rows)
    rank_of = {left + right: rank for rank, (left, right) in enumerate(chosen.merges, start=1)}
    for pretoken in dict.fromkeys(bpe.pretokenize(content, chosen.special_tokens, chosen.pattern)):
        before: list[bytes] = []
        for parts in chosen.merge_steps(pretoken.encode("utf-8")):
            made = next((part for part in parts if part not in before), b"") if before else b""
            label = f"merge {rank_of[made]:,}" if made in rank_of and before else "bytes"
            shown = "  ".join(map(vocabulary.show_token, parts))
            screen.print(text.Text(f"{label:>14}   {shown}"), soft_wrap=True)
            before = parts
        screen.print()


def compare(options: subcommands.TokenizerCompare) -> None:
    """Print the number of tokens of two tokenizers for the same text, and their tokens of a sample."""
    rows = table.Table(box=box.SIMPLE)
    for title in ("", "vocabulary", "tokens", "bytes per token", "unused tokens"):
        rows.add_column(title, justify="left" if not title else "right", overflow="fold")
    samples = []
    with _swapped(options):
        found = documents.read_documents(documents.find_files(options.data))
        texts = [document.text for document in found]
        if not texts:
            raise ValueError(f"--data must hold text, but {options.data} is empty")
        n_bytes = sum(len(content.encode("utf-8")) for content in texts)
        for name in (options.first, options.second):
            chosen = prepare.load_tokenizer(name)
            n_tokens, used = 0, set()
            for ids in chosen.encode_batch(texts):
                n_tokens += len(ids)
                used.update(ids)
            unused = len(chosen.vocab) - len(used)
            rows.add_row(
                name, f"{len(chosen.vocab):,}", f"{n_tokens:,}", f"{n_bytes / n_tokens:.3f}", f"{unused:,}"
            )
            start = texts[len(texts) // 2].strip()[:SAMPLE_CHARACTERS]
            samples.append((name, _colored(chosen, chosen.encode_ordinary(start))))
    screen = _screen()
    screen.print(f"{options.data}: {n_bytes:,} bytes")
    screen.print(rows)
    for title, sample in samples:
        screen.print(text.Text(title), sample, sep="\n")


def _colored(chosen: tokenizer.Tokenizer, ids: Sequence[int]) -> text.Text:
    """The tokens in a line: colored on a terminal, elsewhere separated by bars."""
    line = text.Text()
    for number, id in enumerate(ids):
        if number and not sys.stdout.isatty():
            line.append("|")
        shown = vocabulary.show_token(chosen.vocab[id])
        bare = shown[1:-1] if shown[0] in "'\"" else shown
        line.append(bare, style=COLORS[number % len(COLORS)])
    return line


def _screen() -> console.Console:
    return console.Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def _swapped(
    options: subcommands.TokenizerTrain | subcommands.TokenizerEncode | subcommands.TokenizerCompare,
) -> contextlib.AbstractContextManager[None]:
    return swap.using("fast") if options.fast == "on" else contextlib.nullcontext()


def _one_file(source: str) -> contextlib.AbstractContextManager[Path]:
    """A single file with all documents of `source`, temporary unless the source is one file."""
    files = documents.find_files(source)
    if len(files) == 1:
        return contextlib.nullcontext(files[0])
    return documents.joined(document.text for file in files for document in documents.read_documents([file]))
