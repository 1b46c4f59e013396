"""Sources of documents: text files, JSON lines, Parquet, standard input, data sets at Hugging Face.

A source streams its documents in a fixed order and is never completely in memory.

>>> [document.text for document in json_lines("a.jsonl", [b'{"text": "one"}', b'{"text": "two"}'])]
['one', 'two']
"""

import gzip
import hashlib
import importlib
import io
import json
import re
import sys
import typing
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_basics.data import documents as corpus
from llm_basics.data import jsonl

HUB = "hub:"


@dataclass(frozen=True)
class Dataset:
    """A data set at Hugging Face."""

    name: str
    about: str
    config: str | None = None
    text_field: str = "text"


# sizes from the pages of the data sets
PRESETS = {
    "tinystories": Dataset("roneneldan/TinyStories", "2.1 million short stories, 1 GB"),
    "openwebtext": Dataset("Skylion007/openwebtext", "8 million pages, 13 GB packed, 40 GB of text"),
    "fineweb-edu": Dataset(
        "HuggingFaceFW/fineweb-edu", "10 billion tokens of educational pages, 28 GB", "sample-10BT"
    ),
}


def find(source: str, text_field: str = "text", form: str = "auto", on_bad_utf8: str = "error") -> "Source":
    """The source with this name, not read yet. Raises ValueError for an unknown name.

    `form` is the format of files: text, jsonl or parquet; auto infers it from the file name.
    """
    if source == "-":
        return Pipe("standard input", text_field, form, on_bad_utf8)
    if source in PRESETS:
        preset = PRESETS[source]
        column = preset.text_field if text_field == "text" else text_field
        return Hub(preset.name, column, preset.about, name=preset.config)
    if source.startswith(HUB):
        path, _, config = source.removeprefix(HUB).partition(":")
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
            raise ValueError(f"a data set must be {HUB}NAME or {HUB}NAME:CONFIG, got {source}")
        return Hub(path, text_field, name=config or None)
    try:
        return Files(source, text_field, form, on_bad_utf8, corpus.find_files(source))
    except ValueError as error:
        raise ValueError(
            f"{error}; other sources are - (standard input), {HUB}NAME (a data set at Hugging Face), and "
            f"the data sets {', '.join(PRESETS)}"
        ) from None


def stamp(source: str) -> dict[str, Any] | None:
    """A hash of the names, sizes and times of the files of a source; None if it has none."""
    try:
        found = find(source)
    except ValueError:
        return None
    if not isinstance(found, Files):
        return None
    stats = [path.stat() for path in found.paths]
    rows = [
        (str(path), stat.st_size, stat.st_mtime_ns) for path, stat in zip(found.paths, stats, strict=True)
    ]
    n_bytes = sum(stat.st_size for stat in stats)
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return {"files": len(rows), "bytes": n_bytes, "sha256": digest}


@dataclass
class Source:
    """Documents in a fixed order."""

    name: str
    text_field: str
    # fraction of the source read so far; 0 if unknown
    fraction: float = field(default=0.0, init=False)

    def documents(self) -> Iterator[corpus.Document]:
        """Stream from the beginning. Raises ValueError, with its position, for an invalid record."""
        yield from ()

    def about(self) -> str:
        """Name and size, for messages."""
        return self.name


@dataclass
class Pipe(Source):
    """Standard input."""

    form: str
    on_bad_utf8: str

    def documents(self) -> Iterator[corpus.Document]:
        yield from self._read(self.name, typing.cast(io.BufferedIOBase, sys.stdin.buffer))

    def _read(self, name: str, content: io.BufferedIOBase) -> Iterator[corpus.Document]:
        form = self.form
        if form == "auto":
            ending = re.search(r"\.(jsonl|parquet)(?:\.gz)?$", name)
            form = ending[1] if ending else "text"
        if form == "jsonl":
            return json_lines(name, content, self.text_field, self.on_bad_utf8)
        if form == "parquet":
            return parquet_rows(name, content, self.text_field)
        return corpus.stream_documents(name, content, self.on_bad_utf8)


@dataclass
class Files(Pipe):
    """Files in order; those that end in .gz are decompressed."""

    paths: list[Path]

    def documents(self) -> Iterator[corpus.Document]:
        sizes = [path.stat().st_size for path in self.paths]
        before, total = 0, max(1, sum(sizes))
        for path, size in zip(self.paths, sizes, strict=True):
            with open(path, "rb") as file:
                content = gzip.open(file) if path.suffix == ".gz" else file
                try:
                    for document in self._read(str(path), content):
                        self.fraction = (before + file.tell()) / total
                        yield document
                except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                    raise ValueError(f"{path} must be a complete gzip file; {error}") from None
            before += size
            self.fraction = before / total

    def about(self) -> str:
        size = sum(path.stat().st_size for path in self.paths)
        return f"{self.name} ({len(self.paths):,} files, {size:,} bytes)"


class Hub(Source):
    """A data set at Hugging Face, streamed: only the documents that are read are fetched.

    `arguments` go to `datasets.load_dataset`: the name of a configuration, or data files.
    """

    def __init__(self, path: str, text_field: str, about: str = "", **arguments: Any) -> None:
        super().__init__(HUB + path, text_field)
        self.path = path
        self.arguments = arguments
        self._about = about

    def documents(self) -> Iterator[corpus.Document]:
        return _documents(_numbered(self.name, self._rows()), self.text_field)

    def _rows(self) -> Iterator[Any]:
        datasets = import_optional("datasets")
        datasets.disable_progress_bars()
        try:
            yield from datasets.load_dataset(self.path, split="train", streaming=True, **self.arguments)
        except Exception as error:
            # `datasets` raises many types of errors for network failures, wrong names and broken data sets
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{self.about()} must be fetched from huggingface.co, which failed "
                f"({type(error).__name__}: {reason}); connect to the internet, or use a local file"
            ) from None

    def about(self) -> str:
        return f"{self.name} ({self._about})" if self._about else self.name


# --------------------------------------------------------------------------------------------------
# Formats


def json_lines(
    name: str, lines: Iterable[bytes], text_field: str = "text", on_bad_utf8: str = "error"
) -> Iterator[corpus.Document]:
    """The documents of JSON lines, one object each; blank lines and blank texts are skipped."""
    return _documents(jsonl.read(name, lines, on_bad_utf8), text_field)


def parquet_rows(name: str, content: Any, text_field: str = "text") -> Iterator[corpus.Document]:
    """The documents of a Parquet file, one per row; blank texts are skipped."""
    arrow, parquet = import_optional("pyarrow"), import_optional("pyarrow.parquet")
    try:
        file = parquet.ParquetFile(content)
        names = file.schema_arrow.names
        batches = file.iter_batches(batch_size=256, columns=[text_field] if text_field in names else names)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from _documents(_numbered(name, rows), text_field)
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name} must be Parquet; {reason}") from None


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number} of {name}", row) for number, row in enumerate(rows, start=1))


def _documents(rows: Iterable[tuple[str, Any]], text_field: str) -> Iterator[corpus.Document]:
    """The documents of rows, without blank ones. Raises ValueError for an invalid row."""
    for position, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{position} must be a JSON object, got {type(row).__name__}")
        if text_field not in row:
            fields = ", ".join(map(str, row)) or "none"
            raise ValueError(
                f"{position} must have the field {text_field}, got {fields:.200}; see --text_field"
            )
        text = row[text_field]
        if not isinstance(text, str):
            raise ValueError(f"{text_field} in {position} must be text, got {text!r:.40}")
        if text.strip():
            yield corpus.Document(position, text)


def import_optional(module: str) -> Any:
    """Import a module of the extra `data`. Raises ValueError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is needed for Parquet and for data sets by name: uv sync --extra data"
        ) from None
