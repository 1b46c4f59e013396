"""Where documents come from: files of text, JSON lines or Parquet, standard input, data sets by name.

A source gives its documents one by one, always in the same order, and is never in memory as a whole.

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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_basics.core import files
from llm_basics.data import documents as corpus

HUB = "hub:"


@dataclass(frozen=True)
class Dataset:
    """A data set at Hugging Face."""

    name: str
    about: str
    config: str | None = None
    text_field: str = "text"


# sizes as the pages of the data sets give them
PRESETS = {
    "tinystories": Dataset("roneneldan/TinyStories", "2.1 million short stories, 1 GB"),
    "openwebtext": Dataset("Skylion007/openwebtext", "8 million pages, 13 GB packed, 40 GB of text"),
    "fineweb-edu": Dataset(
        "HuggingFaceFW/fineweb-edu", "10 billion tokens of instructive pages, 28 GB", "sample-10BT"
    ),
}


def find(source: str, text_field: str = "text", form: str = "auto", on_bad_utf8: str = "error") -> "Source":
    """What `source` names. Raises ValueError if it names nothing; nothing is read or fetched yet.

    `form` is how files are written, text, jsonl or parquet; auto goes by their names.
    """
    if source == "-":
        return Pipe("standard input", text_field, form, on_bad_utf8)
    if source in PRESETS:
        known = PRESETS[source]
        field = known.text_field if text_field == "text" else text_field
        return Hub(known.name, field, known.about, name=known.config)
    if source.startswith(HUB):
        path, _, config = source.removeprefix(HUB).partition(":")
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
            raise ValueError(f"a data set must be {HUB}NAME or {HUB}NAME:CONFIG, got {source}")
        return Hub(path, text_field, name=config or None)
    try:
        return Files(source, text_field, form, on_bad_utf8, corpus.find_files(source))
    except ValueError as error:
        raise ValueError(
            f"{error}; beside these, - is standard input, {HUB}NAME a data set at Hugging Face, and "
            f"{', '.join(PRESETS)} are such data sets"
        ) from None


def stamp(source: str) -> dict[str, Any] | None:
    """What tells the files of a source from others, none of them read; None if it has none, or no longer."""
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


class Source:
    """Documents in an order that does not change."""

    # whether reading it again gives the same, and costs no more than reading
    is_local = False
    # how much of it has been read; 0 where that is unknown
    fraction = 0.0

    def __init__(self, name: str, text_field: str) -> None:
        self.name = name
        self.text_field = text_field

    def documents(self) -> Iterator[corpus.Document]:
        """Read from the beginning. Raises ValueError for what is no document, and says where it stands."""
        yield from ()

    def about(self) -> str:
        """What there is to read, for people."""
        return self.name


class Pipe(Source):
    """What another program writes into this one."""

    def __init__(self, name: str, text_field: str, form: str, on_bad_utf8: str) -> None:
        super().__init__(name, text_field)
        self.form = form
        self.on_bad_utf8 = on_bad_utf8

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


class Files(Pipe):
    """Files, one after the other; those that end in .gz are unpacked on the way."""

    is_local = True

    def __init__(
        self, name: str, text_field: str, form: str, on_bad_utf8: str, paths: Iterable[Path]
    ) -> None:
        super().__init__(name, text_field, form, on_bad_utf8)
        self.paths = list(paths)

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
                    raise ValueError(f"{path} must be whole, packed by gzip; {error}") from None
            before += size
            self.fraction = before / total

    def about(self) -> str:
        size = sum(path.stat().st_size for path in self.paths)
        return f"{self.name} ({len(self.paths):,} files, {size:,} bytes)"


class Hub(Source):
    """A data set of Hugging Face, streamed: what is not needed is not fetched.

    `arguments` go to `datasets.load_dataset`: the name of a configuration, or files of one's own.
    """

    def __init__(self, path: str, text_field: str, about: str = "", **arguments: Any) -> None:
        super().__init__(HUB + path, text_field)
        self.path = path
        self.arguments = arguments
        self._about = about

    def documents(self) -> Iterator[corpus.Document]:
        rows = self._rows()
        for number, row in enumerate(rows, start=1):
            text = text_of(row, self.text_field, f"row {number} of {self.name}")
            if text.strip():
                yield corpus.Document(f"{self.name}:{number}", text)

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        datasets = needed("datasets")
        datasets.disable_progress_bars()
        try:
            yield from datasets.load_dataset(self.path, split="train", streaming=True, **self.arguments)
        except Exception as error:
            # whatever is wrong with the net, the name or the data set, and however it is called there
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{self.about()} must be fetched from huggingface.co, which failed "
                f"({type(error).__name__}: {reason}); connect to the internet, or name a file of your own"
            ) from None

    def about(self) -> str:
        return f"{self.name} ({self._about})" if self._about else self.name


# --------------------------------------------------------------------------------------------------
# Forms of files


def json_lines(
    name: str, lines: Iterable[bytes], text_field: str = "text", on_bad_utf8: str = "error"
) -> Iterator[corpus.Document]:
    """The documents of JSON lines, one object each; lines that are empty, or whose text is, hold none."""
    for place, row in files.json_lines(name, lines, on_bad_utf8):
        if not isinstance(row, dict):
            raise ValueError(f"{place} must be a JSON object, got {type(row).__name__}")
        text = text_of(row, text_field, place)
        if text.strip():
            yield corpus.Document(place, text)


def parquet_rows(name: str, content: Any, text_field: str = "text") -> Iterator[corpus.Document]:
    """The documents of a Parquet file, one a row; a row whose text is empty holds none."""
    arrow, parquet = needed("pyarrow"), needed("pyarrow.parquet")
    number = 0
    try:
        file = parquet.ParquetFile(content)
        names = file.schema_arrow.names
        columns = [text_field] if text_field in names else names
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                text = text_of(row, text_field, f"row {number} of {name}")
                if text.strip():
                    yield corpus.Document(f"{name}:{number}", text)
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name} must be Parquet, which fails behind row {number}; {reason}") from None


def text_of(row: Mapping[str, Any], text_field: str, place: str) -> str:
    """The text in a field of a row. Raises ValueError if there is none."""
    if text_field not in row:
        fields = ", ".join(map(str, row)) or "none"
        raise ValueError(f"{place} must have the field {text_field}, got {fields:.200}; see --text_field")
    text = row[text_field]
    if not isinstance(text, str):
        raise ValueError(f"{text_field} in {place} must be text, got {text!r:.40}")
    return text


def needed(module: str) -> Any:
    """A module that only data sets and Parquet need. Raises ValueError that says how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is needed for Parquet and for data sets by name: uv sync --extra data"
        ) from None
