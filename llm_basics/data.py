"""From documents to batches: find texts, keep their tokens in files, cut windows out of them.

A token file ("shard") is a header of 4096 bytes, JSON behind eight bytes of magic, and then the ids of all
documents, little-endian, two bytes each where the vocabulary allows it. It is read as a memory map, so it may
be larger than memory. The order of the data is a pure function of (seed, epoch, step): nothing is buffered,
and a run that goes on from a step sees what it would have seen.
"""

import dataclasses
import functools
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

# between the documents of a file, by convention of GPT-2's and many later data sets
DOCUMENT_SEPARATOR = "<|endoftext|>"

MAGIC = b"LLMBASIC"
HEADER_BYTES = 4096
VERSION = 1
SHARD_TOKENS = 100_000_000

# --------------------------------------------------------------------------------------------------
# Documents


@dataclass(frozen=True)
class Document:
    """A text and where it came from."""

    name: str
    text: str


def find_files(source: str) -> list[Path]:
    """The files that `source` names: a file, all files of a folder, those of a glob, or `stdlib`."""
    if source == "stdlib":
        return stdlib_files()
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.is_file()]
        files = [file for file in found if not any(p.startswith(".") for p in file.relative_to(path).parts)]
    else:
        files = [Path(name) for name in sorted(glob.glob(source, recursive=True)) if Path(name).is_file()]
    if not files:
        raise ValueError(
            f"--data must name a file, a folder or a glob with files in it, or stdlib, got {source}"
        )
    return files


def stdlib_files() -> list[Path]:
    """The source files of the running Python's standard library, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [file for file in sorted(root.rglob("*.py")) if not left_out & set(file.relative_to(root).parts)]
    if not files:
        raise ValueError(f"this Python keeps no source of its library in {root}; name a text with --data")
    return files


def read_documents(files: Iterable[Path], on_bad_utf8: str = "error") -> list[Document]:
    """The documents of UTF-8 files: a file is one, or several with `<|endoftext|>` between them."""
    documents = []
    for file in files:
        content = file.read_bytes()
        try:
            text = content.decode("utf-8", errors="strict" if on_bad_utf8 == "error" else "replace")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file} must be UTF-8, got byte 0x{content[error.start]:02x} at offset {error.start}; "
                "mend the file, or replace such bytes with --on-bad-utf8 replace"
            ) from None
        parts = [part for part in text.split(DOCUMENT_SEPARATOR) if part.strip()]
        documents += [Document(f"{file}:{i}" if i else str(file), part) for i, part in enumerate(parts)]
    return documents


def split_documents(
    documents: Sequence[Document], val_fraction: float
) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and documents to hold out.

    The SHA-256 of its text decides where a document goes, so that it stays there when others are added, and
    copies of it go the same way. A single document is cut near its end instead, at the end of a line.
    """
    if len(documents) == 1:
        (document,) = documents
        cut = int(len(document.text) * (1 - val_fraction))
        cut = document.text.rfind("\n", 0, cut) + 1 or cut
        return (
            [dataclasses.replace(document, text=document.text[:cut])],
            [dataclasses.replace(document, text=document.text[cut:])],
        )
    shares = [_share(document.text) for document in documents]
    # of a few documents perhaps none falls below the fraction: then the nearest does
    threshold = max(val_fraction, min(shares, default=0.0))
    train = [d for d, share in zip(documents, shares, strict=True) if share > threshold]
    if not train:
        raise ValueError(
            f"val_fraction {val_fraction} must leave text to train on, but all documents are held out "
            f"({len(documents)}); lower it, or give more than copies of one document"
        )
    return train, [d for d, share in zip(documents, shares, strict=True) if share <= threshold]


def _share(text: str) -> float:
    """A number from 0 to 1 that depends on nothing but `text`."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


# --------------------------------------------------------------------------------------------------
# Token files


@dataclass(frozen=True)
class Shard:
    """An open token file: its ids as a read-only memory map, and what its header says."""

    path: Path
    tokens: np.ndarray
    vocab_size: int
    n_documents: int
    n_bytes: int
    tokenizer: str


def write_shards(
    folder: str | os.PathLike[str],
    prefix: str,
    documents: Iterable[tuple[Sequence[int], int]],
    vocab_size: int,
    tokenizer: str,
    shard_tokens: int = SHARD_TOKENS,
) -> list[Path]:
    """Write the ids of documents to `folder/prefix_0000.bin` and on, a new file after `shard_tokens` ids.

    `documents` are pairs of ids and the number of bytes that the text had. `tokenizer` is the fingerprint of
    the tokenizer that made them. Raises ValueError for an id outside the vocabulary. A file appears under its
    name only when it is complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    waiting: list[np.ndarray] = []
    n_bytes = n_tokens = 0

    def write() -> None:
        path = folder / f"{prefix}_{len(paths):04d}.bin"
        tokens = np.concatenate(waiting).astype(_dtype(vocab_size))
        header = {
            "version": VERSION,
            "dtype": tokens.dtype.name,
            "vocab_size": vocab_size,
            "n_tokens": n_tokens,
            "n_documents": len(waiting),
            "n_bytes": n_bytes,
            "tokenizer": tokenizer,
        }
        temporary = path.with_suffix(f".tmp-{os.getpid()}")
        with open(temporary, "wb") as file:
            file.write((MAGIC + json.dumps(header).encode()).ljust(HEADER_BYTES))
            file.write(tokens.tobytes())
        os.replace(temporary, path)
        paths.append(path)

    for ids, size in documents:
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() < vocab_size:
            wrong = array[(array < 0) | (array >= vocab_size)][0]
            raise ValueError(f"a token id must be below the vocabulary size {vocab_size}, got {wrong}")
        waiting.append(array)
        n_bytes, n_tokens = n_bytes + size, n_tokens + array.size
        if n_tokens >= shard_tokens:
            write()
            waiting, n_bytes, n_tokens = [], 0, 0
    if waiting:
        write()
    return paths


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def read_shard(path: str | os.PathLike[str], tokenizer: str | None = None) -> Shard:
    """Open a token file. Raises ValueError if it is damaged, or if another `tokenizer` made it."""
    path = Path(path)
    with open(path, "rb") as file:
        start = file.read(HEADER_BYTES)
    if not start.startswith(MAGIC):
        raise ValueError(f"{path} must begin with {MAGIC!r}, got {start[:8]!r}: this is not a token file")
    try:
        header = json.loads(start[len(MAGIC) :])
        dtype, n_tokens = np.dtype(header["dtype"]).newbyteorder("<"), int(header["n_tokens"])
        about = {name: header[name] for name in ("vocab_size", "n_documents", "n_bytes", "tokenizer")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the header of {path} is damaged ({error}); delete {path.parent} and start again"
        ) from None
    expected = HEADER_BYTES + n_tokens * dtype.itemsize
    if path.stat().st_size != expected:
        raise ValueError(
            f"{path} must have {expected} bytes for {n_tokens} tokens, got {path.stat().st_size}; "
            f"delete {path.parent} and start again"
        )
    if tokenizer is not None and about["tokenizer"] != tokenizer:
        raise ValueError(
            f"{path} was made by tokenizer {about['tokenizer'][:12]}, got tokenizer {tokenizer[:12]}; "
            "prepare the data again with the tokenizer of the model"
        )
    tokens = np.memmap(path, dtype, mode="r", offset=HEADER_BYTES, shape=(n_tokens,))
    return Shard(path, tokens, **about)


# --------------------------------------------------------------------------------------------------
# Batches


def get_batch(
    tokens: np.ndarray,
    batch_size: int,
    context_length: int,
    device: torch.device | str = "cpu",
    rng: np.random.Generator | None = None,
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Windows from random places in `tokens`, and the same windows one token on: inputs and targets.

    Every place where a window and its last target fit is equally likely. Reads no more than the windows.

    >>> inputs, targets = get_batch(np.arange(5), batch_size=1, context_length=4)
    >>> inputs, targets
    (tensor([[0, 1, 2, 3]]), tensor([[1, 2, 3, 4]]))
    """
    check_length(len(tokens), context_length)
    rng = rng or np.random.default_rng()
    starts = rng.integers(0, len(tokens) - context_length, size=batch_size)
    return _to_batch([tokens[start : start + context_length + 1] for start in starts], device)


def _to_batch(
    windows: Sequence[np.ndarray], device: torch.device | str
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    batch = torch.from_numpy(np.stack(windows).astype(np.int64)).to(device)
    return batch[:, :-1], batch[:, 1:]


def check_length(n_tokens: int, context_length: int, what: str = "the text") -> None:
    """Raise ValueError unless `n_tokens` hold a window of `context_length` and its last target."""
    if n_tokens < context_length + 1:
        raise ValueError(
            f"{what} must have more tokens than model.context_length {context_length}, got {n_tokens}; "
            "give more text, a smaller --model.context_length or another --val_fraction"
        )


class Batches:
    """All of the data in shuffled windows, epoch after epoch: `batches[i]` is batch number i.

    An epoch cuts every shard into windows side by side, from an offset of its own, and shuffles them: each
    token is seen about once. Windows do not reach from one shard into the next.

    >>> batches = Batches([np.arange(9)], batch_size=2, context_length=2, seed=0)
    >>> batches.windows_per_epoch
    3
    >>> inputs, targets = batches[7]
    >>> torch.equal(targets, inputs + 1)
    True
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        batch_size: int,
        context_length: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shards = [tokens for tokens in shards if len(tokens) > context_length]
        check_length(max(map(len, shards), default=0), context_length)
        self.batch_size = batch_size
        self.context_length = context_length
        self.seed = seed
        self.device = device
        # one window fewer than fit leaves room for the offset
        fit = [(len(tokens) - 1) // context_length for tokens in self.shards]
        self._first = np.cumsum([0] + [max(1, windows - 1) for windows in fit])
        self.windows_per_epoch = int(self._first[-1])
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    def __getitem__(self, number: int) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
        first = number * self.batch_size
        return _to_batch([self._window(i) for i in range(first, first + self.batch_size)], self.device)

    def _window(self, number: int) -> np.ndarray:
        """Window `number` since the beginning of training, with the target of its last token."""
        epoch, place = divmod(number, self.windows_per_epoch)
        offsets, order = self._order(epoch)
        shard = int(np.searchsorted(self._first, order[place], side="right")) - 1
        start = offsets[shard] + (order[place] - self._first[shard]) * self.context_length
        return self.shards[shard][start : start + self.context_length + 1]

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The offset of each shard, and the order of all windows, in `epoch`."""
        rng = np.random.default_rng((self.seed, epoch))
        rooms = [
            len(tokens) - windows * self.context_length
            for tokens, windows in zip(self.shards, np.diff(self._first), strict=True)
        ]
        return rng.integers(0, rooms), rng.permutation(self.windows_per_epoch)


def sequential_batches(
    tokens: np.ndarray,
    batch_size: int,
    context_length: int,
    max_batches: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]]:
    """Windows side by side from beginning to end, in the same order each time; or so many, evenly spaced."""
    n_windows = (len(tokens) - 1) // context_length
    wanted = n_windows if max_batches is None else min(n_windows, max_batches * batch_size)
    starts = np.linspace(0, n_windows - 1, wanted).round().astype(int) * context_length
    for i in range(0, wanted, batch_size):
        chosen = starts[i : i + batch_size]
        yield _to_batch([tokens[start : start + context_length + 1] for start in chosen], device)
