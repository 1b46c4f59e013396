"""Texts to learn from: find them, read them, hold some out."""

import glob
import hashlib
import io
import itertools
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llm_basics.core import files

# between the documents of a file, by convention of GPT-2's and many later data sets
DOCUMENT_SEPARATOR = "<|endoftext|>"

# what is read of a file at once
BLOCK_BYTES = 1 << 20

# how far to look for a document to hold out, before it is known where one goes
AHEAD_CHARACTERS = 1 << 24


@dataclass(frozen=True)
class Document:
    """A text and where it came from."""

    name: str
    text: str


def find_files(source: str) -> list[Path]:
    """The files that `source` names: a file, all files of a folder but hidden ones and Python's cache, those
    of a glob, or `stdlib`."""
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
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    paths = [file for file in sorted(root.rglob("*.py")) if not left_out & set(file.relative_to(root).parts)]
    if not paths:
        raise ValueError(f"this Python keeps no source of its library in {root}; name a text with --data")
    return paths


def read_documents(paths: Iterable[Path], on_bad_utf8: str | None = None) -> list[Document]:
    """The documents of UTF-8 files, all at once."""
    documents: list[Document] = []
    for file in paths:
        with open(file, "rb") as content:
            documents += stream_documents(file, content, on_bad_utf8)
    return documents


def stream_documents(
    name: object, content: io.BufferedIOBase, on_bad_utf8: str | None = None
) -> Iterator[Document]:
    """The documents of UTF-8 text one by one: all of it, or what stands between two `<|endoftext|>`."""
    separator = DOCUMENT_SEPARATOR.encode()
    waiting, searched, offset, line, number = bytearray(), 0, 0, 1, 0
    while True:
        block = content.read(BLOCK_BYTES)
        waiting += block
        while (end := waiting.find(separator, searched)) >= 0 or not block:
            part = bytes(waiting[:end] if end >= 0 else waiting)
            text = files.decode(part, name, on_bad_utf8, line, offset)
            if text.strip():
                yield Document(f"{name}:{number}" if number else str(name), text)
                number += 1
            if end < 0:
                return
            del waiting[: end + len(separator)]
            offset, line, searched = offset + end + len(separator), line + part.count(b"\n"), 0
        searched = max(0, len(waiting) - len(separator) + 1)


# --------------------------------------------------------------------------------------------------
# Holding some out


def digest(text: str) -> bytes:
    """The SHA-256 of a text: what tells it from all others."""
    return hashlib.sha256(text.encode("utf-8")).digest()


@dataclass(frozen=True)
class Split:
    """Which documents are held out, by their `digest` alone.

    So a document stays where it is when others are added, and copies of it go the same way.
    """

    threshold: float
    """The highest share of all possible digests below which a document is held out."""
    tail: bytes | None = None
    """One that is held out anyway: the end of a single document."""

    def holds_out(self, digest: bytes) -> bool:
        """Whether the document with this digest is held out."""
        return _share(digest) <= self.threshold or digest == self.tail


class SplitStats:
    """What must be known of all documents before they can be split."""

    def __init__(self) -> None:
        self.n_documents = self.n_characters = 0
        self.lowest, self.highest = 1.0, 0.0
        self.first: Document | None = None

    def add(self, document: Document, digest: bytes) -> None:
        """Look at one more document."""
        self.first = self.first or document
        self.n_documents += 1
        self.n_characters += len(document.text)
        self.lowest = min(self.lowest, _share(digest))
        self.highest = max(self.highest, _share(digest))

    def is_split_by(self, val_fraction: float) -> bool:
        """Whether of the documents so far some are held out, and some are not."""
        return self.lowest <= val_fraction < self.highest

    def split(self, val_fraction: float) -> Split:
        """How all documents are split; a single one is to be `cut`."""
        if self.n_documents == 1 and self.first is not None:
            return Split(-1.0, digest(split_tail(self.first, val_fraction)[1].text))
        # of a few documents perhaps none falls below the fraction: then the nearest does
        threshold = max(val_fraction, self.lowest)
        if threshold >= self.highest:
            raise ValueError(
                f"val_fraction {val_fraction} must leave text to train on, but all documents are held out "
                f"({self.n_documents}); lower it, or give more than copies of one document"
            )
        return Split(threshold)


def split_ahead(
    documents: Iterator[Document], val_fraction: float
) -> tuple[Split, Iterator[Document] | tuple[Document, ...]]:
    """How to split documents of which only the first are looked at, and all of them again.

    If these are all there are, it is as `Survey.split` has it; a single one then comes in two parts, its end
    first, since a limit may stop behind the other.
    """
    head, survey = [], SplitStats()
    for document in documents:
        head.append(document)
        survey.add(document, digest(document.text))
        if survey.is_split_by(val_fraction) or (len(head) > 1 and survey.n_characters > AHEAD_CHARACTERS):
            return Split(val_fraction), itertools.chain(head, documents)
    if not head:
        return Split(val_fraction), ()
    split = survey.split(val_fraction)
    return split, split_tail(head[0], val_fraction)[::-1] if len(head) == 1 else iter(head)


def split_tail(document: Document, val_fraction: float) -> tuple[Document, Document]:
    """A document without its end, at the end of a line, and that end.

    >>> [part.text for part in cut(Document("a", "one\\ntwo\\n"), val_fraction=0.5)]
    ['one\\n', 'two\\n']
    """
    at = int(len(document.text) * (1 - val_fraction))
    at = document.text.rfind("\n", 0, at) + 1 or at
    return Document(document.name, document.text[:at]), Document(document.name, document.text[at:])


def _share(digest: bytes) -> float:
    """A number from 0 to 1 that depends on nothing but a digest."""
    return int.from_bytes(digest[:8], "big") / 2**64
