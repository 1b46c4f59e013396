"""Raw text to token files: find the text, split it, train or load a tokenizer, encode.

uv run python -m llm_basics.prepare book.txt --out data/book
uv run python -m llm_basics.prepare tinystories --max_tokens 10000000 --out data/stories

Training prepares its text automatically and caches the result under `data/`, in a folder named by a hash of
everything that determines its content.
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_basics import swap
from llm_basics.cli import commands, parse
from llm_basics.core import bpe, config, files, option_types, tokenizer
from llm_basics.data import cleaning, documents, shard_builder, shards, sources, spool, tokenizer_formats
from llm_basics.runs import console, signals

# incremented when the token files of the same text change
VERSION = 2

PARTIAL_SUFFIX = ".partial"


@dataclass(frozen=True)
class Prepared:
    """Token files and their tokenizer."""

    folder: Path
    tokenizer: tokenizer.Tokenizer
    train: list[shards.Shard]
    val: shards.Shard


def load(folder: str | os.PathLike[str]) -> Prepared:
    """Open a prepared folder. Raises ValueError if token files and tokenizer do not belong together."""
    folder = Path(folder)
    chosen = tokenizer.Tokenizer.load(folder / "tokenizer")
    fingerprint = chosen.fingerprint()
    train = [shards.read_shard(path, fingerprint) for path in sorted(folder.glob("train_*.bin"))]
    return Prepared(folder, chosen, train, shards.read_shard(folder / "val_0000.bin", fingerprint))


# --------------------------------------------------------------------------------------------------
# For a training run


def prepare(options: config.Config, log: Callable[[str], None] = console.print_line) -> Prepared:
    """The token files of `options.data`, written unless they are cached."""
    if (Path(options.data) / shard_builder.META).is_file():
        return _load_prepared(options, log)
    if options.tokenizer == "bpe":
        bpe.check_vocab_size(options.model.vocab_size, [documents.DOCUMENT_SEPARATOR])
    source = sources.find(options.data, on_bad_utf8=options.on_bad_utf8)
    if isinstance(source, sources.Files):
        return load(_prepare_local(options, source, log))
    if not isinstance(source, sources.Hub):
        raise ValueError(f"--data {options.data} must be prepared first; see python -m llm_basics.prepare")
    folder = _folder(options, hashlib.sha256(json.dumps([*_settings(options), options.data]).encode()))
    if not (folder / shard_builder.META).exists():
        amount = "all of it" if options.max_tokens is None else f"{options.max_tokens:,} tokens of it"
        log(f"fetching {source.about()}, {amount}, to {folder}")
        build(_prepare_config(options, folder), log)
    return load(folder)


def _prepare_local(options: config.Config, source: sources.Source, log: Callable[[str], None]) -> Path:
    """Read all documents to hash and split them, then write their token files unless they are cached."""
    stats, content = documents.SplitStats(), hashlib.sha256(json.dumps(_settings(options)).encode())
    for document in _documents(source):
        digest = documents.digest(document.text)
        stats.add(document, digest)
        content.update(digest)
    if stats.first is None:
        raise ValueError(f"--data must hold text, but {options.data} is empty")
    split, folder = stats.split(options.val_fraction), _folder(options, content)
    if (folder / shard_builder.META).exists():
        return folder
    log(f"reading {options.data}: {stats.n_documents:,} documents, {stats.n_characters:,} characters")
    texts: Iterable[documents.Document] = _documents(source)
    if stats.n_documents == 1:
        texts = documents.split_tail(stats.first, options.val_fraction)[::-1]
    # a folder per process: several runs may prepare the same text at once
    work = folder.with_name(f"{folder.name}{PARTIAL_SUFFIX}-{os.getpid()}")
    # duplicates are kept, and BPE trains on the whole training split
    settings = dataclasses.replace(_prepare_config(options, folder), sample_bytes=option_types.MOST)
    try:
        files.create_folder(work / shard_builder.PROGRESS)
        with shard_builder.Journal(None, {}) as journal:
            _write_shards(settings, shard_builder.Reader(source, texts, split), work, journal, log)
        about = {"source": options.data, "settings": _settings(options), "versions": _versions()}
        shard_builder.finish(work, about)
        shard_builder.publish(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _load_prepared(options: config.Config, log: Callable[[str], None]) -> Prepared:
    """Open the prepared folder `options.data`. Raises ValueError if it was made by another tokenizer."""
    found = load(options.data)
    # bpe, the default, selects the tokenizer in the folder
    if options.tokenizer != "bpe":
        given = _gapless(options.tokenizer)
        if given.fingerprint() != found.tokenizer.fingerprint():
            raise ValueError(
                f"{options.data} must be trained on with the tokenizer it was prepared with, which has "
                f"{found.tokenizer.vocab_size:,} tokens, got --tokenizer {options.tokenizer} with "
                f"{given.vocab_size:,}; use {found.folder / 'tokenizer'}, or prepare the text again"
            )
    log(f"{options.data} is prepared; its tokenizer has {found.tokenizer.vocab_size:,} tokens")
    return found


def _settings(options: config.Config) -> list[Any]:
    """Everything but the text that determines the token files."""
    settings: list[Any] = [VERSION, options.tokenizer, options.val_fraction]
    if options.tokenizer == "bpe":
        settings.append(options.model.vocab_size)
    elif Path(options.tokenizer).exists():
        settings.append(tokenizer_formats.load(options.tokenizer).fingerprint())
    # user code for these pieces may change the ids
    settings += [
        origin for piece, origin in swap.user_pieces().items() if piece.startswith(("bpe.", "tokenizer."))
    ]
    return settings if options.max_tokens is None else [*settings, f"max_tokens {options.max_tokens}"]


def _folder(options: config.Config, content: Any) -> Path:
    """The cache folder: its name changes with the text, the split and the tokenizer."""
    names = [Path(options.data).stem.strip("*") or "text", Path(options.tokenizer).name]
    name = re.sub(r"[^\w.-]+", "_", "-".join([*names, content.hexdigest()[:12]]))
    return Path(options.data_dir) / name


def _prepare_config(options: config.Config, folder: Path) -> commands.PrepareConfig:
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
# As a command


def build(options: commands.PrepareConfig, log: Callable[[str], None] = console.print_line) -> dict[str, Any]:
    """Write the folder `options.out`, or resume writing it. Returns the content of its meta.json."""
    out = Path(options.out)
    work = out.with_name(out.name + PARTIAL_SUFFIX)
    settings = dataclasses.asdict(options) | {"version": VERSION}
    for name in ("out", "fast"):
        del settings[name]
    if options.tokenizer == "bpe":
        bpe.check_vocab_size(options.vocab_size, [documents.DOCUMENT_SEPARATOR])
    stamp = sources.stamp(options.source)
    if (out / shard_builder.META).is_file():
        meta = shard_builder.read_meta(out, settings, stamp)
        log(f"{out} is prepared already")
        return meta
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out must be a folder that is new or empty, got {out}")
    source = sources.find(options.source, options.text_field, options.form, options.on_bad_utf8)
    source = cleaning.CleanSource(source) if options.clean else source
    is_new = not work.exists()
    try:
        files.create_folder(work / shard_builder.PROGRESS)
        opened = shard_builder.Journal(work, settings, stamp)
    except files.WriteError:
        if is_new:
            shutil.rmtree(work, ignore_errors=True)
        raise
    with opened as journal:
        # another process may have finished between the first check and this lock
        if not (out / shard_builder.META).is_file():
            try:
                if not journal.state.is_complete:
                    log(f"reading {source.about()}")
                    split, texts = documents.split_ahead(_documents(source), options.val_fraction)
                    position = journal.state.position
                    reader = shard_builder.Reader(source, texts, split, position, journal.is_new)
                    _write_shards(options, reader, work, journal, log)
            except BaseException:
                if not journal.state.is_begun:
                    shutil.rmtree(work, ignore_errors=True)
                raise
            position = journal.state.position
            about = {"source": options.source, "stamp": journal.stamp, "duplicates": position.n_duplicates}
            if isinstance(source, cleaning.CleanSource):
                about["dropped"] = source.dropped_before(position.n_documents)
            shard_builder.finish(work, about | {"settings": settings, "versions": _versions()})
    return shard_builder.publish(work, out)


def _write_shards(
    options: commands.PrepareConfig,
    reader: shard_builder.Reader,
    work: Path,
    journal: shard_builder.Journal,
    log: Callable[[str], None],
) -> None:
    """Write the remaining token files; first train or load the tokenizer if necessary."""
    pieces, state = iter(reader), journal.state
    with swap.using("fast", log) if options.fast == "on" else contextlib.nullcontext():
        if state.is_begun:
            log(f"resuming after document {state.position.n_documents:,}, with {state.n_tokens:,} tokens")
            chosen = tokenizer.Tokenizer.load(work / "tokenizer")
        else:
            if options.tokenizer == "bpe":
                ahead = work / shard_builder.PROGRESS / "ahead.jsonl"
                sample = spool.write(pieces, options.sample_bytes, ahead)
                chosen = _train_bpe(sample, options.vocab_size, log)
                pieces = itertools.chain(spool.read(ahead), pieces)
            else:
                chosen = _gapless(options.tokenizer)
            chosen.save(work / "tokenizer")
        log(f"encoding with {chosen.vocab_size:,} tokens")
        with console.progress_bar("bytes") as progress:
            packer = shard_builder.Packer(work, chosen, options.shard_tokens, options.max_tokens, progress)
            packer.pack(pieces, reader, journal)


def _documents(source: sources.Source) -> Iterator[documents.Document]:
    """The documents of a source with lone surrogates replaced, which JSON allows and UTF-8 does not."""
    for document in source.documents():
        yield documents.Document(document.name, tokenizer.replace_surrogates(document.text))


def _versions() -> dict[str, str]:
    """Versions of the installed packages that determine tokenization."""
    packages = (p for name in ("llm_basics", "regex") for p in importlib.metadata.distributions(name=name))
    return {p.name: p.version for p in packages} | {"python": platform.python_version()}


# --------------------------------------------------------------------------------------------------
# Tokenizers


def _train_bpe(texts: Iterable[str], vocab_size: int, log: Callable[[str], None]) -> tokenizer.Tokenizer:
    specials = [documents.DOCUMENT_SEPARATOR]
    with documents.joined(texts) as path:
        log(f"learning a vocabulary of {vocab_size:,} tokens from {path.stat().st_size:,} bytes")
        with console.progress_bar() as progress:
            vocab, merges = bpe.train_bpe(path, vocab_size, specials, progress=progress)
    if len(vocab) < vocab_size:
        log(f"the vocabulary has {len(vocab):,} tokens: no pair is left to merge in this text")
    return tokenizer.Tokenizer(vocab, merges, specials)


def with_separator(found: tokenizer.Tokenizer) -> tokenizer.Tokenizer:
    """The tokenizer with the special token between documents, added if it is missing."""
    specials = [*found.special_tokens, documents.DOCUMENT_SEPARATOR]
    return tokenizer.Tokenizer(found.vocab, found.merges, specials, found.pattern)


def _gapless(name: str) -> tokenizer.Tokenizer:
    """`load_tokenizer`, `with_separator`. Raises ValueError if its ids have gaps."""
    chosen = with_separator(load_tokenizer(name))
    if len(chosen.vocab) != chosen.vocab_size:
        raise ValueError(f"the ids of {name} must go from 0 to {len(chosen.vocab) - 1} without gaps")
    return chosen


def load_tokenizer(name: str) -> tokenizer.Tokenizer:
    """A tokenizer by name: `bytes`, `gpt2`, a folder, or a tokenizer.json."""
    if name == "bytes":
        return tokenizer.Tokenizer.byte_level([documents.DOCUMENT_SEPARATOR])
    if name == "gpt2":
        return _gpt2()
    if not Path(name).exists():
        raise ValueError(
            "a tokenizer must be bytes, gpt2, a folder or a tokenizer.json with one, or in training bpe, "
            f"got {name}"
        )
    return tokenizer_formats.load(name)


def _gpt2() -> tokenizer.Tokenizer:
    """GPT-2's vocabulary, downloaded by tiktoken or read from TIKTOKEN_CACHE_DIR."""
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
    """Run the command. Returns the exit status."""
    if not options.out:
        name = re.sub(r"[^\w.-]+", "_", Path(options.source).stem.strip("*")) or "text"
        options = dataclasses.replace(options, out=str(Path("data") / name))
    with parse.exit_on_error():
        try:
            meta = build(options, console.print_line)
        except signals.Stopped as stop:
            console.print_line(f"stopped by {stop.name}; run the same command to resume")
            return stop.status
        n_documents, tokens, n_bytes = meta["documents"], meta["tokens"], meta["bytes"]
        for rule, n_dropped in meta.get("dropped", {}).items():
            console.print_line(f"dropped     {n_dropped:,}: {rule}")
        console.print_line(
            f"documents   {n_documents['train']:,} for training, {n_documents['val']:,} held out, "
            f"{meta['duplicates']:,} duplicates removed\n"
            f"tokens      {tokens['train']:,} for training, {tokens['val']:,} held out, "
            f"{sum(n_bytes.values()) / max(1, sum(tokens.values())):.2f} bytes each\n"
            f"train on it uv run python -m llm_basics.train --data {options.out}"
        )
    return 0
