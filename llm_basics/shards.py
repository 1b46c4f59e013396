"""Token files: the ids of documents on disk, in the form in which training reads them.

A token file ("shard") is a header of 4096 bytes, JSON behind eight bytes of magic, and then the ids of all
documents, little-endian, two bytes each where the vocabulary allows it. It is read as a memory map, so it may
be larger than memory.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

MAGIC = b"LLMBASIC"
HEADER_BYTES = 4096
VERSION = 1
SHARD_TOKENS = 100_000_000


@dataclass(frozen=True)
class Shard:
    """An open token file: its ids as a read-only memory map, and what its header says."""

    path: Path
    tokens: np.ndarray
    vocab_size: int
    n_documents: int
    n_bytes: int
    tokenizer: str


class ShardWriter:
    """Writes ids to `folder/prefix_0000.bin` and on, a new file when one has `shard_tokens` ids.

    `tokenizer` is the fingerprint of the tokenizer that made the ids. A file appears under its name only when
    it is complete.

        with ShardWriter(folder, "train", vocab_size, fingerprint) as writer:
            writer.write(ids, n_documents=1, n_bytes=len(text))
        writer.paths
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        prefix: str,
        vocab_size: int,
        tokenizer: str,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.prefix = prefix
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.shard_tokens = shard_tokens
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.paths: list[Path] = []
        self._file: BinaryIO | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        if self._file is not None and exception is None:
            self._finish()
        elif exception is not None:
            # a part of the text would be taken for all of it
            if self._file is not None:
                self._file.close()
                self.paths.append(Path(self._file.name))
            for path in self.paths:
                path.unlink()

    def write(self, ids: Sequence[int] | np.ndarray, n_documents: int, n_bytes: int) -> None:
        """Add ids, in which `n_documents` end and which stand for `n_bytes` of text.

        Raises ValueError for an id outside the vocabulary.
        """
        array = np.asarray(ids, dtype=None if isinstance(ids, np.ndarray) else np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            wrong = array[(array < 0) | (array >= self.vocab_size)][0]
            raise ValueError(f"a token id must be below the vocabulary size {self.vocab_size}, got {wrong}")
        if self._file is None:
            temporary = self.folder / f"{self.prefix}_{len(self.paths):04d}.tmp-{os.getpid()}"
            self._file = open(temporary, "wb")
            self._file.seek(HEADER_BYTES)
            self._counts = {"n_tokens": 0, "n_documents": 0, "n_bytes": 0}
        self._file.write(array.astype(self.dtype).tobytes())
        for name, n in (("n_tokens", array.size), ("n_documents", n_documents), ("n_bytes", n_bytes)):
            self._counts[name] += n
        if self._counts["n_tokens"] >= self.shard_tokens:
            self._finish()

    def _finish(self) -> None:
        """Write the header of the open file, and give it its name."""
        assert self._file is not None
        about = {"version": VERSION, "dtype": self.dtype.name, "vocab_size": self.vocab_size}
        header = json.dumps(about | self._counts | {"tokenizer": self.tokenizer})
        with self._file as file:
            file.seek(0)
            file.write((MAGIC + header.encode()).ljust(HEADER_BYTES))
        path = self.folder / f"{self.prefix}_{len(self.paths):04d}.bin"
        os.replace(self._file.name, path)
        self.paths.append(path)
        self._file = None


def write_shards(
    folder: str | os.PathLike[str],
    prefix: str,
    documents: Iterable[tuple[Sequence[int] | np.ndarray, int]],
    vocab_size: int,
    tokenizer: str,
    shard_tokens: int = SHARD_TOKENS,
) -> list[Path]:
    """Write documents, pairs of ids and the number of bytes of the text, with `ShardWriter`."""
    with ShardWriter(folder, prefix, vocab_size, tokenizer, shard_tokens) as writer:
        for ids, n_bytes in documents:
            writer.write(ids, 1, n_bytes)
    return writer.paths


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
