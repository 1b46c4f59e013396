"""Texts to learn from: find them, read them, hold some out.

>>> train, val = split_documents([Document("a", "one\\ntwo\\n")], val_fraction=0.5)
>>> train[0].text, val[0].text
('one\\n', 'two\\n')
"""

import dataclasses
import glob
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# between the documents of a file, by convention of GPT-2's and many later data sets
DOCUMENT_SEPARATOR = "<|endoftext|>"


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
        files = [file for file in found if not any(map(hidden.match, file.relative_to(path).parts))]
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
