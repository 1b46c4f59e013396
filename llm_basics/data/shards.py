"""Token files ("shards"): the token ids of documents on disk.

A shard has three parts, all little-endian. It is memory-mapped, so it may be larger than memory.

    0     "LLMBASIC", then a JSON header, padded with spaces to 4096 bytes
    4096  the ids of all documents: uint16 if the vocabulary allows it, else uint32
    then  at the next multiple of 8: the exclusive end of each document, uint64
"""

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llm_basics.core import bpe, files
from llm_basics.core import tokenizer as tokenizers

MAGIC = b"LLMBASIC"
HEADER_BYTES = 4096
VERSION = 2
SHARD_TOKENS = 100_000_000
CHECK_TOKENS = 2**20  # ids per chunk in `check_ids`

COUNTS = ("n_tokens", "n_documents", "n_bytes")
FIELDS = {"version": int, "dtype": str, "vocab_size": int, "tokenizer": str, "max_id": int}
FIELDS |= dict.fromkeys((*COUNTS, "crc32"), int)


@dataclass(frozen=True)
class Shard:
    """An open token file: two read-only memory maps, and fields of its header.

    Document i ends before `tokens[document_ends[i]]`. Tokens after the last end belong to a document that
    continues in the next file. `max_id` is the highest id, -1 in an empty file.
    """

    path: Path
    tokens: np.ndarray
    document_ends: np.ndarray
    vocab_size: int
    n_documents: int
    n_bytes: int
    max_id: int
    tokenizer: str


@dataclass
class ShardWriter:
    """Writes ids to `folder/prefix_0000.bin`, `prefix_0001.bin`, ... of about `shard_tokens` ids each.

    `tokenizer` is the fingerprint of the tokenizer, `first` the number of the first file. Files are renamed
    into place when they are complete.

        with ShardWriter(folder, "train", vocab_size, fingerprint) as writer:
            writer.write(ids, ends=[len(ids)], n_bytes=len(text))
        writer.paths
    """

    folder: str | os.PathLike[str]
    prefix: str
    vocab_size: int
    tokenizer: str
    shard_tokens: int = SHARD_TOKENS
    first: int = 0

    def __post_init__(self) -> None:
        files.create_folder(self.folder)
        self.dtype = _dtype(self.vocab_size)
        self.paths: list[Path] = []
        self._file: BinaryIO | None = None
        self._replacing = contextlib.ExitStack()
        self._max_id = -1

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            with self._replacing:
                if exception[1] is not None:
                    raise exception[1]
                if self._file is not None:
                    self._finish()
        except BaseException:
            # an incomplete file must not be renamed into place
            for path in self.paths:
                path.unlink()
            raise

    def write(self, ids: Sequence[int] | np.ndarray, ends: Sequence[int] | np.ndarray, n_bytes: int) -> None:
        """Append the ids of `n_bytes` of text; `ends` are the exclusive ends of documents in `ids`.

        `write([5, 6, 0, 7, 0, 8], ends=[3, 5], n_bytes=20)` appends two documents and the start of a third.
        Raises ValueError for an id outside the vocabulary, or ends that do not ascend from 1 to `len(ids)`.
        """
        array, ends = _integers("token ids", ids), _integers("document ends", ends)
        outside = _first((array < 0) | (array >= self.vocab_size))
        if outside is not None:
            raise ValueError(
                f"a token id must be below the vocabulary size {self.vocab_size}, got {array[outside]}"
            )
        wrong = _first_invalid_end(ends, array.size)
        if wrong is not None:
            raise ValueError(
                f"document ends must ascend from 1 to the {array.size} ids written, got {ends[wrong]} "
                f"as number {wrong}"
            )
        if self._file is None:
            self._begin()
        assert self._file is not None
        self._file.write(array.astype(self.dtype).tobytes())
        self._ends += (ends.astype("<u8") + np.uint64(self._counts["n_tokens"])).astype("<u8").tobytes()
        self._max_id = max(self._max_id, int(array.max()) if array.size else -1)
        for name, n in zip(COUNTS, (array.size, ends.size, n_bytes), strict=True):
            self._counts[name] += n
        if self._counts["n_tokens"] >= self.shard_tokens:
            self._finish()

    def _path(self) -> Path:
        return Path(self.folder) / f"{self.prefix}_{self.first + len(self.paths):04d}.bin"

    def _begin(self) -> None:
        """Open the next file after the space for its header."""
        self._file = self._replacing.enter_context(files.replacing(self._path()))
        self._file.seek(HEADER_BYTES)
        self._counts = dict.fromkeys(COUNTS, 0)
        self._ends = bytearray()  # bytes: a list would take ten times the memory
        self._max_id = -1

    def _finish(self) -> None:
        """Write the document ends and the header of the open file, and rename it."""
        assert self._file is not None
        about = {"version": VERSION, "dtype": self.dtype.name, "vocab_size": self.vocab_size}
        about |= self._counts | {"max_id": self._max_id, "tokenizer": self.tokenizer}
        header = json.dumps(about | {"crc32": _checksum(about)})
        self._file.write(bytes(-self._file.tell() % 8))
        self._file.write(self._ends)
        self._file.seek(0)
        self._file.write((MAGIC + header.encode()).ljust(HEADER_BYTES))
        self._replacing.close()
        self.paths.append(self._path())
        self._file = None


def write_shards(
    folder: str | os.PathLike[str],
    prefix: str,
    documents: Iterable[tuple[Sequence[int] | np.ndarray, int]],
    vocab_size: int,
    tokenizer: str,
    shard_tokens: int = SHARD_TOKENS,
) -> list[Path]:
    """Write documents, pairs of non-empty ids and the byte length of the text, with `ShardWriter`."""
    with ShardWriter(folder, prefix, vocab_size, tokenizer, shard_tokens) as writer:
        for ids, n_bytes in documents:
            writer.write(ids, [len(ids)], n_bytes)
    return writer.paths


def encode_to_file(
    chosen: tokenizers.Tokenizer,
    input_path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    prefix: str,
    n_threads: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[str, int, int], None] = bpe.silent,
) -> list[Path]:
    """Encode a UTF-8 file of any size to token files `folder/prefix_0000.bin`, `prefix_0001.bin`, ...

    Documents end with END_OF_TEXT, which is appended to the last one if missing.
    """
    end, last = chosen.end_of_text_id, -1
    size = Path(input_path).stat().st_size
    with ShardWriter(folder, prefix, chosen.vocab_size, chosen.fingerprint(), shard_tokens) as writer:
        for ids, offset, n_bytes in chosen.encode_file(input_path, n_threads):
            writer.write(ids, np.flatnonzero(ids == end) + 1, n_bytes)
            progress("encoding", offset + n_bytes, size)
            last = int(ids[-1]) if len(ids) else last
        if last != end:
            writer.write([end], [1], 0)
    return writer.paths


def read_shard(path: str | os.PathLike[str], tokenizer: str | None = None) -> Shard:
    """Open a token file. Raises ValueError if it is damaged, or made by another `tokenizer` (a fingerprint).

    Reads the header and the document ends; `check_ids` reads the ids.
    """
    path = Path(path)
    with open(path, "rb") as file:
        header = _read_header(path, file.read(HEADER_BYTES))
        if tokenizer is not None and header["tokenizer"] != tokenizer:
            raise ValueError(
                f"{path} was made by tokenizer {header['tokenizer'][:12]}, got tokenizer {tokenizer[:12]}; "
                "prepare the data again with the tokenizer of the model"
            )
        tokens, ends = _map(path, file, header)
    about = {name: header[name] for name in ("vocab_size", "n_documents", "n_bytes", "max_id", "tokenizer")}
    return Shard(path, tokens, ends, **about)


def check_ids(shard: Shard) -> None:
    """Read all ids. Raises ValueError for one outside the vocabulary, or a highest other than `max_id`."""
    highest = -1
    for start in range(0, len(shard.tokens), CHECK_TOKENS):
        chunk = shard.tokens[start : start + CHECK_TOKENS]
        highest = max(highest, int(chunk.max()))
        if highest >= shard.vocab_size:
            at = int(np.argmax(chunk >= shard.vocab_size))
            raise ValueError(
                f"the ids of {shard.path} must be below its vocabulary size {shard.vocab_size}, got "
                f"{chunk[at]} at byte {HEADER_BYTES + (start + at) * chunk.itemsize}; "
                f"delete {shard.path.parent} and start again"
            )
    if highest != shard.max_id:
        raise ValueError(
            f"the highest id of {shard.path} must be {shard.max_id} as in its header, got {highest}: "
            f"the ids were changed; delete {shard.path.parent} and start again"
        )


def _read_header(path: Path, start: bytes) -> dict[str, Any]:
    """Parse the header. Raises ValueError if it is damaged or of another version."""
    if not start.startswith(MAGIC):
        raise ValueError(
            f"{path} must begin with {MAGIC!r} at byte 0, got {start[:8]!r}: this is not a token file"
        )
    try:
        header = json.loads(start[len(MAGIC) :].decode("ascii"))
        if not isinstance(header, dict) or "version" not in header:
            raise ValueError("it must be a JSON object with a version")
        if header["version"] == VERSION:
            _check_header(header)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"the header of {path}, from byte {len(MAGIC)} to {HEADER_BYTES}, is damaged ({error}); "
            f"delete {path.parent} and start again"
        ) from None
    if header["version"] != VERSION:
        raise ValueError(
            f"{path} must be a token file of version {VERSION}, got version {header['version']!r:.20}; "
            f"delete {path.parent} and prepare the data again"
        )
    return header


def _check_header(header: dict[str, Any]) -> None:
    """Raise ValueError for a field that is missing, invalid or changed."""
    for name, kind in FIELDS.items():
        # not isinstance: True is an int
        if type(header.get(name)) is not kind:
            raise ValueError(f"{name} must be {kind.__name__}, got {header.get(name)!r:.40}")
    for name in COUNTS:
        if header[name] < 0:
            raise ValueError(f"{name} must not be negative, got {header[name]}")
    dtype = _dtype(header["vocab_size"]).name
    if header["dtype"] != dtype:
        raise ValueError(
            f"dtype must be {dtype} for a vocabulary of {header['vocab_size']}, got {header['dtype']:.40}"
        )
    if header["max_id"] not in (range(header["vocab_size"]) if header["n_tokens"] else (-1,)):
        raise ValueError(f"max_id must be in the vocabulary, or -1 without ids, got {header['max_id']}")
    checksum = _checksum({name: value for name, value in header.items() if name != "crc32"})
    if header["crc32"] != checksum:
        raise ValueError(f"crc32 must be {checksum}, got {header['crc32']}: a field was changed")


def _map(path: Path, file: BinaryIO, header: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Map the ids and the document ends. Raises ValueError for a wrong file size or end."""
    dtype, n_tokens, n_documents = _dtype(header["vocab_size"]), header["n_tokens"], header["n_documents"]
    tokens_end = HEADER_BYTES + n_tokens * dtype.itemsize
    ends_start = tokens_end + -tokens_end % 8
    expected, size = ends_start + 8 * n_documents, os.fstat(file.fileno()).st_size
    if size != expected:
        raise ValueError(
            f"{path} must have {expected} bytes for {n_tokens} tokens and {n_documents} documents, "
            f"got {size}; delete {path.parent} and start again"
        )
    # one map for both: numpy cannot map zero bytes
    content = np.memmap(file, np.uint8, mode="r")
    tokens, ends = content[HEADER_BYTES:tokens_end].view(dtype), content[ends_start:].view("<u8")
    wrong = _first_invalid_end(ends, n_tokens)
    if wrong is not None:
        raise ValueError(
            f"the document ends of {path} must ascend from 1 to its {n_tokens} tokens, got {ends[wrong]} "
            f"at byte {ends_start + 8 * wrong}; delete {path.parent} and start again"
        )
    return tokens, ends


def _checksum(header: dict[str, Any]) -> int:
    """The CRC-32 of the fields of a header."""
    return zlib.crc32(json.dumps(header, sort_keys=True).encode())


def _dtype(vocab_size: int) -> np.dtype:
    """uint16 if it holds every id, else uint32. Raises ValueError for larger vocabularies."""
    if not 0 <= vocab_size <= 2**32:
        raise ValueError(f"vocab_size must be from 0 to {2**32}, got {vocab_size}")
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _integers(name: str, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """`numbers` as an array. Raises ValueError unless they are 1-D integers."""
    array = np.asarray(numbers)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be 1-D integers, got {array.dtype}, shape {array.shape}")
    return array


def _first_invalid_end(ends: np.ndarray, n_tokens: int) -> int | None:
    """The index of the first end that does not ascend, or is not from 1 to `n_tokens`."""
    wrong = (ends < 1) | (ends > n_tokens)
    wrong[1:] |= ends[1:] <= ends[:-1]
    return _first(wrong)


def _first(mask: np.ndarray) -> int | None:
    """The index of the first True, or None."""
    return int(np.argmax(mask)) if mask.any() else None
