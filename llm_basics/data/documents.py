"""Text documents: find their files, read them, split off a validation set."""

import contextlib
import glob
import hashlib
import io
import itertools
import re
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llm_basics.core import files

# separator of the documents in a file, as in GPT-2 and many later data sets
DOCUMENT_SEPARATOR = "<|endoftext|>"

# read size
BLOCK_BYTES = 1 << 20

# maximum number of characters that `split_ahead` reads to find documents on both sides of the split
AHEAD_CHARACTERS = 1 << 24


@dataclass(frozen=True)
class Document:
    """A text and its origin."""

    name: str
    text: str


def find_files(source: str) -> list[Path]:
    """The files of `source`: a file, a folder (no hidden files or `__pycache__`), a glob, or `stdlib`."""
    if source == "stdlib":
        return stdlib_files()
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.is_file()]
        hidden = re.compile(r"\.|__pycache__$")
        paths = [file for file in found if not any(map(hidden.match, file.relative_to(path).parts))]
    else:
        paths = [Path(name) for name in sorted(glob.glob(source, recursive=True)) if Path(name).is_file()]
    if not paths:
        raise ValueError(
            f"the text must be a file, a folder or a glob with files in it, or stdlib, got {source}"
        )
    return paths


def stdlib_files() -> list[Path]:
    """The source files of the running Python's standard library, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    excluded = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    paths = [file for file in sorted(root.rglob("*.py")) if not excluded & set(file.relative_to(root).parts)]
    if not paths:
        raise ValueError(f"this Python has no library sources in {root}; name a text with --data")
    return paths


def read_documents(paths: Iterable[Path], on_bad_utf8: str | None = None) -> list[Document]:
    """The documents of UTF-8 files, in memory."""
    found: list[Document] = []
    for file in paths:
        with open(file, "rb") as content:
            found += stream_documents(file, content, on_bad_utf8)
    return found


def stream_documents(
    name: object, content: io.BufferedIOBase, on_bad_utf8: str | None = None
) -> Iterator[Document]:
    """Stream the documents of UTF-8 text, separated by `<|endoftext|>`; blank ones are skipped."""
    separator = DOCUMENT_SEPARATOR.encode()
    buffer, searched, offset, line, number = bytearray(), 0, 0, 1, 0
    while True:
        block = content.read(BLOCK_BYTES)
        buffer += block
        while (end := buffer.find(separator, searched)) >= 0 or not block:
            part = bytes(buffer[:end] if end >= 0 else buffer)
            text = files.decode(part, name, on_bad_utf8, line, offset)
            if text.strip():
                yield Document(f"{name}:{number}" if number else str(name), text)
                number += 1
            if end < 0:
                return
            del buffer[: end + len(separator)]
            offset, line, searched = offset + end + len(separator), line + part.count(b"\n"), 0
        searched = max(0, len(buffer) - len(separator) + 1)


@contextlib.contextmanager
def joined(texts: Iterable[str]) -> Iterator[Path]:
    """A temporary file with all texts, each followed by `<|endoftext|>`."""
    with files.writing("a temporary folder"):
        folder = tempfile.TemporaryDirectory()
    with folder:
        path = Path(folder.name) / "documents.txt"
        with files.open_output(path) as file:
            for text in texts:
                file.write((text + DOCUMENT_SEPARATOR).encode("utf-8"))
        yield path


# --------------------------------------------------------------------------------------------------
# Train / validation split


def digest(text: str) -> bytes:
    """The SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8")).digest()


@dataclass(frozen=True)
class Split:
    """Holds out documents by their `digest` alone.

    Adding documents does not move others to the other side, and duplicates are on the same side.
    """

    threshold: float
    """A document is held out if its digest, as a fraction of all digests, is at most this."""
    tail: bytes | None = None
    """Digest of a document that is always held out: the tail of a single document."""

    def holds_out(self, digest: bytes) -> bool:
        """Whether the document with this digest is held out."""
        return _fraction(digest) <= self.threshold or digest == self.tail


class SplitStats:
    """Statistics of all documents for `split`."""

    def __init__(self) -> None:
        self.n_documents = self.n_characters = 0
        self.lowest, self.highest = 1.0, 0.0
        self.first: Document | None = None

    def add(self, document: Document, digest: bytes) -> None:
        """Count one more document."""
        self.first = self.first or document
        self.n_documents += 1
        self.n_characters += len(document.text)
        self.lowest = min(self.lowest, _fraction(digest))
        self.highest = max(self.highest, _fraction(digest))

    def is_split_by(self, val_fraction: float) -> bool:
        """Whether both sides have a document."""
        return self.lowest <= val_fraction < self.highest

    def split(self, val_fraction: float) -> Split:
        """The split of these documents; a single document must go through `split_tail`."""
        if self.n_documents == 1 and self.first is not None:
            return Split(-1.0, digest(split_tail(self.first, val_fraction)[1].text))
        # with few documents none may be below the fraction: hold out the lowest
        threshold = max(val_fraction, self.lowest)
        if threshold >= self.highest:
            raise ValueError(
                f"val_fraction {val_fraction} must leave text to train on, but all documents are held out "
                f"({self.n_documents}); lower it, or add documents that are not duplicates"
            )
        return Split(threshold)


def split_ahead(
    documents: Iterator[Document], val_fraction: float
) -> tuple[Split, Iterator[Document] | tuple[Document, ...]]:
    """The split of a stream, determined from its beginning, and the complete stream.

    A short stream is split as by `SplitStats.split`. A single document is split in two, its tail first, since
    a token limit may stop after the other part.
    """
    head, stats = [], SplitStats()
    for document in documents:
        head.append(document)
        stats.add(document, digest(document.text))
        if stats.is_split_by(val_fraction) or (len(head) > 1 and stats.n_characters > AHEAD_CHARACTERS):
            return Split(val_fraction), itertools.chain(head, documents)
    if not head:
        return Split(val_fraction), ()
    split = stats.split(val_fraction)
    return split, split_tail(head[0], val_fraction)[::-1] if len(head) == 1 else iter(head)


def split_tail(document: Document, val_fraction: float) -> tuple[Document, Document]:
    """Split a document in two near its end, after a line break if there is one.

    >>> [part.text for part in split_tail(Document("a", "one\\ntwo\\n"), val_fraction=0.5)]
    ['one\\n', 'two\\n']
    """
    at = int(len(document.text) * (1 - val_fraction))
    at = document.text.rfind("\n", 0, at) + 1 or at
    return Document(document.name, document.text[:at]), Document(document.name, document.text[at:])


def _fraction(digest: bytes) -> float:
    """A digest as a number from 0 to 1."""
    return int.from_bytes(digest[:8], "big") / 2**64
