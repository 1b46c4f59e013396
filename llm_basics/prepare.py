"""From raw text to token files: find it, split it, learn a vocabulary on it, encode it, once.

The result is kept under `data/` in a folder named by everything that decides its content, so that a second
run on the same text starts at once.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_basics import bpe, config, corpus, followers, shards, swap, tokenizer

# changes when the same text would be prepared differently
VERSION = 2


@dataclass(frozen=True)
class Prepared:
    """A text as a model needs it."""

    folder: Path
    tokenizer: tokenizer.Tokenizer
    train: list[shards.Shard]
    val: shards.Shard


def prepare(options: config.Config, say: Callable[[str], None] = print) -> Prepared:
    """Tokenize the text that `options` names, or find it already tokenized."""
    if options.tokenizer == "bpe":
        bpe.check_vocab_size(options.model.vocab_size, [corpus.DOCUMENT_SEPARATOR])
    files = corpus.find_files(options.data)
    documents = corpus.read_documents(files, options.on_bad_utf8)
    if not documents:
        raise ValueError(f"--data must hold text, but {options.data} is empty ({len(files)} files)")
    train, val = corpus.split_documents(documents, options.val_fraction)
    folder = Path(options.data_dir) / _key(options, documents)
    if not (folder / "meta.json").exists():
        characters = sum(len(document.text) for document in documents)
        say(f"reading {options.data}: {len(documents):,} documents, {characters:,} characters")
        with swap.using("fast", say) if options.fast != "off" else contextlib.nullcontext():
            _tokenize(options, train, val, folder, say)
        # written last: a folder without it was interrupted and is made again
        (folder / "meta.json").write_text(
            json.dumps({"data": options.data, "documents": len(documents)}) + "\n"
        )
    return load(folder)


def _tokenize(
    options: config.Config,
    train: Sequence[corpus.Document],
    val: Sequence[corpus.Document],
    folder: Path,
    say: Callable[[str], None],
) -> None:
    chosen = _make_tokenizer(options, train, say)
    say(f"encoding with {chosen.vocab_size:,} tokens")
    for name, part, size in (("train", train, shards.SHARD_TOKENS), ("val", val, sys.maxsize)):
        with followers.progress_bar() as progress:
            encoded = _encode(chosen, part, progress)
            shards.write_shards(folder, name, encoded, chosen.vocab_size, chosen.fingerprint(), size)
    chosen.save(folder / "tokenizer")


def load(folder: str | os.PathLike[str]) -> Prepared:
    """Open what `prepare` has written. Raises ValueError if files and tokenizer do not belong together."""
    folder = Path(folder)
    chosen = tokenizer.Tokenizer.load(folder / "tokenizer")
    fingerprint = chosen.fingerprint()
    train = [shards.read_shard(path, fingerprint) for path in sorted(folder.glob("train_*.bin"))]
    return Prepared(folder, chosen, train, shards.read_shard(folder / "val_0000.bin", fingerprint))


def _key(options: config.Config, documents: Sequence[corpus.Document]) -> str:
    """A folder name that changes with the text, the split and the tokenizer."""
    digest = hashlib.sha256()
    settings = [VERSION, options.tokenizer, options.val_fraction]
    if options.tokenizer == "bpe":
        settings.append(options.model.vocab_size)
    elif Path(options.tokenizer).exists():
        settings.append(tokenizer.Tokenizer.load(options.tokenizer).fingerprint())
    # what pieces of somebody's own have made must be made by them
    settings += [origin for piece, origin in swap.yours().items() if piece.startswith(("bpe.", "tokenizer."))]
    digest.update(json.dumps(settings).encode())
    for document in documents:
        digest.update(hashlib.sha256(document.text.encode("utf-8")).digest())
    names = [Path(options.data).stem.strip("*") or "text", Path(options.tokenizer).name]
    return re.sub(r"[^\w.-]+", "_", "-".join([*names, digest.hexdigest()[:12]]))


def _make_tokenizer(
    options: config.Config, train: Sequence[corpus.Document], say: Callable[[str], None]
) -> tokenizer.Tokenizer:
    specials = [corpus.DOCUMENT_SEPARATOR]
    match options.tokenizer:
        case "bpe":
            say(f"learning a vocabulary of {options.model.vocab_size:,} tokens")
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "train.txt"
                path.write_bytes(corpus.DOCUMENT_SEPARATOR.join(d.text for d in train).encode("utf-8"))
                with followers.progress_bar() as progress:
                    learned = bpe.train_bpe(path, options.model.vocab_size, specials, progress=progress)
                return tokenizer.Tokenizer(*learned, specials)
        case name:
            found = load_tokenizer(name)
            everything = [*found.special_tokens, *specials]
            chosen = tokenizer.Tokenizer(found.vocab, found.merges, everything, found.pattern)
            if len(chosen.vocab) != chosen.vocab_size:
                raise ValueError(f"the ids of {name} must go from 0 to {len(chosen.vocab) - 1} without gaps")
            return chosen


def load_tokenizer(name: str) -> tokenizer.Tokenizer:
    """The tokenizer that somebody names: `bytes`, `gpt2`, a folder, or a tokenizer.json."""
    if name == "bytes":
        return tokenizer.Tokenizer.of_bytes([corpus.DOCUMENT_SEPARATOR])
    if name == "gpt2":
        return _gpt2()
    if not Path(name).exists():
        raise ValueError(
            "a tokenizer must be bytes, gpt2, a folder or a tokenizer.json with one, or in training bpe, "
            f"got {name}"
        )
    return tokenizer.Tokenizer.load(name)


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
    return tokenizer.Tokenizer.from_ranks(encoding._mergeable_ranks, {"<|endoftext|>": encoding.eot_token})


def _encode(
    chosen: tokenizer.Tokenizer,
    documents: Sequence[corpus.Document],
    progress: Callable[[str, int, int], None] = bpe.silent,
) -> Iterator[tuple[list[int], int]]:
    """The ids of each document with the end-of-text token behind it, and its size in bytes."""
    end = chosen.special_id(corpus.DOCUMENT_SEPARATOR)
    for number, document in enumerate(documents, start=1):
        yield [*chosen.encode_ordinary(document.text), end], len(document.text.encode("utf-8"))
        progress("encoding", number, len(documents))
