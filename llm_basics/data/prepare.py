"""From raw text to token files: find it, split it, learn a vocabulary on it, encode it, once.

uv run python -m llm_basics.prepare book.txt --out data/book
uv run python -m llm_basics.prepare tinystories --max_tokens 10000000 --out data/stories

Training does it by itself, and keeps the result under `data/` in a folder named by everything that decides
its content, so that a second run on the same text starts at once.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_basics import swap
from llm_basics.cli import commands, parse
from llm_basics.core import bpe, config, tokenizer
from llm_basics.data import documents as corpus
from llm_basics.data import shard_builder, shards, sources, tokenizer_formats
from llm_basics.runs import console

# changes when the same text would be prepared differently
VERSION = 2

# a folder that is not whole yet
PARTIAL = ".partial"


@dataclass(frozen=True)
class Prepared:
    """A text as a model needs it."""

    folder: Path
    tokenizer: tokenizer.Tokenizer
    train: list[shards.Shard]
    val: shards.Shard


def load(folder: str | os.PathLike[str]) -> Prepared:
    """Open what was prepared. Raises ValueError if files and tokenizer do not belong together."""
    folder = Path(folder)
    chosen = tokenizer.Tokenizer.load(folder / "tokenizer")
    fingerprint = chosen.fingerprint()
    train = [shards.read_shard(path, fingerprint) for path in sorted(folder.glob("train_*.bin"))]
    return Prepared(folder, chosen, train, shards.read_shard(folder / "val_0000.bin", fingerprint))


# --------------------------------------------------------------------------------------------------
# For a training run


def prepare(options: config.Config, log: Callable[[str], None] = print) -> Prepared:
    """Tokenize the text that `options` names, or find it already tokenized."""
    if (Path(options.data) / shard_builder.META).is_file():
        return _load_for(options, log)
    if options.tokenizer == "bpe":
        bpe.check_vocab_size(options.model.vocab_size, [corpus.DOCUMENT_SEPARATOR])
    source = sources.find(options.data, on_bad_utf8=options.on_bad_utf8)
    if isinstance(source, sources.Hub):
        folder = _folder(options, hashlib.sha256(json.dumps([*_settings(options), options.data]).encode()))
        if not (folder / shard_builder.META).exists():
            much = "all of it" if options.max_tokens is None else f"{options.max_tokens:,} tokens of it"
            log(f"fetching {source.about()}, {much}, to {folder}")
            build(_as_program(options, folder), log)
        return load(folder)
    if not source.is_local:
        raise ValueError(f"--data {options.data} must be prepared first; see python -m llm_basics.prepare")
    survey, content = corpus.SplitStats(), hashlib.sha256(json.dumps(_settings(options)).encode())
    for document in _documents(source):
        digest = corpus.digest(document.text)
        survey.add(document, digest)
        content.update(digest)
    if survey.first is None:
        raise ValueError(f"--data must hold text, but {options.data} is empty")
    split = survey.split(options.val_fraction)
    folder = _folder(options, content)
    if not (folder / shard_builder.META).exists():
        log(f"reading {options.data}: {survey.n_documents:,} documents, {survey.n_characters:,} characters")
        documents: Iterable[corpus.Document] = _documents(source)
        if survey.n_documents == 1:
            documents = corpus.split_tail(survey.first, options.val_fraction)[::-1]
        work = folder.with_name(f"{folder.name}{PARTIAL}-{os.getpid()}")
        # copies of documents stay, and bpe learns from all of the training text
        program = dataclasses.replace(_as_program(options, folder), sample_bytes=sys.maxsize)
        try:
            (work / shard_builder.PROGRESS).mkdir(parents=True)
            with shard_builder.Journal(None, {}) as ledger:
                _fill(program, source, shard_builder.Reader(source.name, documents, split), work, ledger, log)
            about = {"source": options.data, "settings": _settings(options), "versions": _versions()}
            shard_builder.finish(work, about)
            shard_builder.publish(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return load(folder)


def _load_for(options: config.Config, log: Callable[[str], None]) -> Prepared:
    """A folder that was prepared. Raises ValueError if another tokenizer is asked for than it was made by."""
    found = load(options.data)
    # bpe is what nobody has asked for: one that was learned there
    if options.tokenizer != "bpe":
        asked = _with_separator(load_tokenizer(options.tokenizer), options.tokenizer)
        if asked.fingerprint() != found.tokenizer.fingerprint():
            raise ValueError(
                f"{options.data} must be trained on with the tokenizer it was prepared with, which has "
                f"{found.tokenizer.vocab_size:,} tokens, got --tokenizer {options.tokenizer} with "
                f"{asked.vocab_size:,}; take its own, {found.folder / 'tokenizer'}, or prepare the text again"
            )
    log(f"{options.data} is prepared; its tokenizer has {found.tokenizer.vocab_size:,} tokens")
    return found


def _settings(options: config.Config) -> list[Any]:
    """All but the text that decides what is prepared."""
    settings: list[Any] = [VERSION, options.tokenizer, options.val_fraction]
    if options.tokenizer == "bpe":
        settings.append(options.model.vocab_size)
    elif Path(options.tokenizer).exists():
        settings.append(tokenizer_formats.load(options.tokenizer).fingerprint())
    # what pieces of somebody's own have made must be made by them
    settings += [
        origin for piece, origin in swap.user_pieces().items() if piece.startswith(("bpe.", "tokenizer."))
    ]
    return settings if options.max_tokens is None else [*settings, f"max_tokens {options.max_tokens}"]


def _folder(options: config.Config, content: Any) -> Path:
    """Where the result is kept: a name that changes with the text, the split and the tokenizer."""
    names = [Path(options.data).stem.strip("*") or "text", Path(options.tokenizer).name]
    name = re.sub(r"[^\w.-]+", "_", "-".join([*names, content.hexdigest()[:12]]))
    return Path(options.data_dir) / name


def _as_program(options: config.Config, folder: Path) -> commands.PrepareConfig:
    return commands.PrepareConfig(
        source=options.data,
        out=str(folder),
        tokenizer=options.tokenizer,
        vocab_size=options.model.vocab_size,
        val_fraction=options.val_fraction,
        max_tokens=options.max_tokens,
        fast=options.fast,
    )


# --------------------------------------------------------------------------------------------------
# As a program


def build(options: commands.PrepareConfig, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Make the folder `options.out`, or go on where that was cut off. Returns what its meta.json says."""
    out = Path(options.out)
    work = out.with_name(out.name + PARTIAL)
    settings = dataclasses.asdict(options) | {"version": VERSION}
    for name in ("out", "fast"):
        del settings[name]
    if options.tokenizer == "bpe":
        bpe.check_vocab_size(options.vocab_size, [corpus.DOCUMENT_SEPARATOR])
    stamp = sources.stamp(options.source)
    if (out / shard_builder.META).is_file():
        meta = shard_builder.read_meta(out, settings, stamp)
        log(f"{out} is prepared already")
        return meta
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out must be a folder that is new or empty, got {out}")
    source = sources.find(options.source, options.text_field, options.form, options.on_bad_utf8)
    (work / shard_builder.PROGRESS).mkdir(parents=True, exist_ok=True)
    with shard_builder.Journal(work, settings, stamp) as ledger:
        # unless another process has come to its end since this one looked
        if not (out / shard_builder.META).is_file():
            state = ledger.state or shard_builder.State()
            try:
                if not state.is_complete:
                    log(f"reading {source.about()}")
                    split, documents = corpus.split_ahead(_documents(source), options.val_fraction)
                    reader = shard_builder.Reader(source.name, documents, split, state.place, ledger.is_new)
                    _fill(options, source, reader, work, ledger, log)
            except BaseException:
                if ledger.state is None:
                    shutil.rmtree(work)
                raise
            duplicates = ledger.state.place.n_duplicates if ledger.state else 0
            about = {"source": options.source, "stamp": ledger.stamp, "duplicates": duplicates}
            shard_builder.finish(work, about | {"settings": settings, "versions": _versions()})
    return shard_builder.publish(work, out)


def _fill(
    options: commands.PrepareConfig,
    source: sources.Source,
    reader: shard_builder.Reader,
    work: Path,
    ledger: shard_builder.Journal,
    log: Callable[[str], None],
) -> None:
    """Write the token files that are not written yet: choose a tokenizer, unless there is one, and encode."""
    pieces = iter(reader)
    with swap.using("fast", log) if options.fast == "on" else contextlib.nullcontext():
        if ledger.state is not None:
            done = ledger.state
            log(f"going on behind document {done.place.n_documents:,}, with {done.n_tokens:,} tokens")
            chosen = tokenizer.Tokenizer.load(work / "tokenizer")
        elif options.tokenizer == "bpe":
            ahead = work / shard_builder.PROGRESS / "ahead.jsonl"
            chosen = _learn(shard_builder.keep(pieces, options.sample_bytes, ahead), options.vocab_size, log)
            pieces = itertools.chain(shard_builder.kept(ahead), pieces)
        else:
            chosen = _with_separator(load_tokenizer(options.tokenizer), options.tokenizer)
        if ledger.state is None:
            chosen.save(work / "tokenizer")
        log(f"encoding with {chosen.vocab_size:,} tokens")
        with console.progress_bar("bytes") as progress:
            packer = shard_builder.Packer(work, chosen, options.shard_tokens, options.max_tokens, progress)
            packer.pack(pieces, reader, ledger, lambda: source.fraction)


def _documents(source: sources.Source) -> Iterator[corpus.Document]:
    """The documents of a source, fit to be written as UTF-8: JSON may hold halves of characters."""
    for document in source.documents():
        yield corpus.Document(document.name, tokenizer.replace_surrogates(document.text))


def _versions() -> dict[str, str]:
    """What decides how text is cut, beside the options. What was never installed has no version."""
    packages = (p for name in ("llm_basics", "regex") for p in importlib.metadata.distributions(name=name))
    return {p.name: p.version for p in packages} | {"python": platform.python_version()}


# --------------------------------------------------------------------------------------------------
# Tokenizers


def _learn(texts: Iterable[str], vocab_size: int, log: Callable[[str], None]) -> tokenizer.Tokenizer:
    """The tokenizer that is learned from texts, which are on disk meanwhile."""
    specials = [corpus.DOCUMENT_SEPARATOR]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.txt"
        with open(path, "wb") as file:
            for number, text in enumerate(texts):
                file.write((corpus.DOCUMENT_SEPARATOR * (number > 0) + text).encode("utf-8"))
        log(f"learning a vocabulary of {vocab_size:,} tokens from {path.stat().st_size:,} bytes")
        with console.progress_bar() as progress:
            learned = bpe.train_bpe(path, vocab_size, specials, progress=progress)
    return tokenizer.Tokenizer(*learned, specials)


def _with_separator(found: tokenizer.Tokenizer, name: str) -> tokenizer.Tokenizer:
    """A tokenizer that has a token to put between documents. Raises ValueError if its ids have gaps."""
    specials = [*found.special_tokens, corpus.DOCUMENT_SEPARATOR]
    chosen = tokenizer.Tokenizer(found.vocab, found.merges, specials, found.pattern)
    if len(chosen.vocab) != chosen.vocab_size:
        raise ValueError(f"the ids of {name} must go from 0 to {len(chosen.vocab) - 1} without gaps")
    return chosen


def load_tokenizer(name: str) -> tokenizer.Tokenizer:
    """The tokenizer that somebody names: `bytes`, `gpt2`, a folder, or a tokenizer.json."""
    if name == "bytes":
        return tokenizer.Tokenizer.byte_level([corpus.DOCUMENT_SEPARATOR])
    if name == "gpt2":
        return _gpt2()
    if not Path(name).exists():
        raise ValueError(
            "a tokenizer must be bytes, gpt2, a folder or a tokenizer.json with one, or in training bpe, "
            f"got {name}"
        )
    return tokenizer_formats.load(name)


def _gpt2() -> tokenizer.Tokenizer:
    """Our own tokenizer with GPT-2's vocabulary, which tiktoken fetches or has in TIKTOKEN_CACHE_DIR."""
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise ValueError(
            f"--tokenizer gpt2 must be downloaded once by tiktoken, which failed ({type(error).__name__}); "
            "connect to the internet, or set TIKTOKEN_CACHE_DIR to a folder that has it"
        ) from None
    specials = {tokenizer.END_OF_TEXT: encoding.eot_token}
    return tokenizer.Tokenizer.from_vocabulary(
        tokenizer_formats.from_ranks(encoding._mergeable_ranks, specials)
    )


# --------------------------------------------------------------------------------------------------


def main(options: commands.PrepareConfig) -> int:
    """Prepare as `options` say. Returns the exit status."""
    if not options.out:
        name = re.sub(r"[^\w.-]+", "_", Path(options.source).stem.strip("*")) or "text"
        options = dataclasses.replace(options, out=str(Path("data") / name))
    with parse.exit_on_error():
        try:
            meta = build(options, console.print_line)
        except KeyboardInterrupt:
            console.print_line("stopped; the same command goes on")
            return 130
        documents, tokens, n_bytes = meta["documents"], meta["tokens"], meta["bytes"]
        console.print_line(
            f"documents   {documents['train']:,} to train on, {documents['val']:,} held out, "
            f"{meta['duplicates']:,} copies left out\n"
            f"tokens      {tokens['train']:,} to train on, {tokens['val']:,} held out, "
            f"{sum(n_bytes.values()) / max(1, sum(tokens.values())):.2f} bytes each\n"
            f"train on it uv run python -m llm_basics.train --data {options.out}"
        )
    return 0
