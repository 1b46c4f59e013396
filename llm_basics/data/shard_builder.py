"""Converts documents to token files, resumable after a kill.

Files are written to `out.partial`, which is renamed to `out` at the end. Whenever a file is full, the state
is committed to a journal; a later run reads the source up to this position and resumes after it.
Files after the last commit are deleted and written again, identically.

    out.partial/train_0000.bin     as in `out`
    out.partial/progress/          ledger.sqlite, and held_0000.bin, ..., which become one val_0000.bin
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_basics.core import bpe, files, tokenizer, vocabulary
from llm_basics.data import documents, shards, sources

META = "meta.json"
PROGRESS = "progress"

# bytes of text per progress update
PROGRESS_BYTES = 1 << 18

DISK_ERRORS = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}

# stored part of a SHA-256: two of 10**12 documents collide once in 10**14 such collections
DIGEST_BYTES = 16


@dataclass(frozen=True)
class SourcePosition:
    """Position in a source: number of documents and of duplicates, and a hash chain over all documents."""

    n_documents: int = 0
    n_duplicates: int = 0
    chain: str = ""


@dataclass(frozen=True)
class Piece:
    """A document to encode, and the source position after it."""

    text: str
    held_out: bool
    position: SourcePosition


@dataclass(frozen=True)
class State:
    """Progress of writing: the source position, and the number of tokens and of full files."""

    position: SourcePosition = SourcePosition()
    n_tokens: int = 0
    n_train: int = 0
    n_held: int = 0
    is_complete: bool = False

    @property
    def is_begun(self) -> bool:
        """Whether anything was committed."""
        return self.position.n_documents > 0


@dataclass
class Reader:
    """The pieces after the position `start`, without duplicates, which `is_new` detects by digest and number.

    Raises ValueError if the documents up to `start` have changed.
    """

    source: sources.Source
    texts: Iterable[documents.Document]
    split: documents.Split
    start: SourcePosition = SourcePosition()
    is_new: Callable[[bytes, int], bool] = lambda digest, number: True

    def __post_init__(self) -> None:
        self.position = self.start

    def __iter__(self) -> Iterator[Piece]:
        number, chain, n_duplicates = 0, "", self.start.n_duplicates
        for number, document in enumerate(self.texts, start=1):
            digest = documents.digest(document.text)
            chain = hashlib.sha256(bytes.fromhex(chain) + digest).hexdigest()
            if number > self.start.n_documents:
                is_new = self.is_new(digest, number)
                n_duplicates += not is_new
                self.position = SourcePosition(number, n_duplicates, chain)
                if is_new:
                    yield Piece(document.text, self.split.holds_out(digest), self.position)
            elif number == self.start.n_documents and chain != self.start.chain:
                self._refuse()
        if number < self.start.n_documents:
            self._refuse()

    def _refuse(self) -> None:
        raise ValueError(
            f"the first {self.start.n_documents} documents of {self.source.name} must be unchanged since the "
            "start of the preparation, but some have changed; delete the prepared files and start again"
        )


class Journal:
    """The committed state of a preparation in `work`, and the digests of all documents so far, on disk.

    Raises ValueError if another process has locked it, or if it was started with other `settings`. In memory
    if `work` is None. `stamp` identifies the files of the source when they were last read.
    """

    def __init__(
        self, work: Path | None, settings: dict[str, Any], stamp: dict[str, Any] | None = None
    ) -> None:
        self.settings, self.stamp, self.state = settings, stamp, State()
        path = self.path = work / PROGRESS / "ledger.sqlite" if work else ":memory:"
        with storing(path):
            self.database = sqlite3.connect(path, isolation_level=None, timeout=0)
        try:
            # locked until the database is closed or the process ends
            self._execute("PRAGMA locking_mode = EXCLUSIVE")
            self._execute("BEGIN EXCLUSIVE")
            self._open(work)
        except BaseException as error:
            self.database.close()
            if isinstance(error, sqlite3.DatabaseError):
                raise ValueError(f"{path} must be intact, and no other process may use it: {error}") from None
            raise

    def _execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        with storing(self.path):
            return self.database.execute(statement, values)

    def _open(self, work: Path | None) -> None:
        execute = self._execute
        execute("CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID")
        execute("CREATE TABLE IF NOT EXISTS committed (state TEXT, settings TEXT)")
        row = execute("SELECT state, settings FROM committed").fetchone()
        if row is not None:
            state, settings = json.loads(row[0]), json.loads(row[1])
            check_settings(self.settings, settings, work)
            self.state = State(SourcePosition(**state.pop("place")), **state)
            if self.state.is_complete:
                self.stamp = settings.get("stamp")
        # the reader may have been ahead of the last commit
        execute("DELETE FROM seen WHERE number > ?", [self.state.position.n_documents])

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.database.close()

    def is_new(self, digest: bytes, number: int) -> bool:
        """Record the digest of document `number`; whether it is the first with this digest."""
        values = [digest[:DIGEST_BYTES], number]
        return self._execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", values).rowcount == 1

    def commit(self, state: State) -> None:
        """Make `state` the one to resume from, atomically."""
        fields = dataclasses.asdict(state)
        fields["place"] = fields.pop("position")
        values = [json.dumps(fields), json.dumps(self.settings | {"stamp": self.stamp})]
        self._execute("DELETE FROM committed")
        self._execute("INSERT INTO committed VALUES (?, ?)", values)
        self._execute("COMMIT")
        self.state = state
        self._execute("BEGIN")


@contextlib.contextmanager
def storing(path: str | Path) -> Iterator[None]:
    """Convert disk errors of SQLite to WriteError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in DISK_ERRORS:
            raise
        raise files.WriteError(None, f"{path} could not be written ({error})") from None


def check_settings(given: dict[str, Any], recorded: dict[str, Any], folder: object) -> None:
    """Raise ValueError unless a folder was prepared with the given settings."""
    # default for folders that were prepared before this option existed
    recorded = {"clean": False} | recorded
    differences = [f"{k} was {recorded.get(k)}, now {v}" for k, v in given.items() if recorded.get(k) != v]
    if differences:
        raise ValueError(
            f"{folder} was prepared with other options, which must be the same: {'; '.join(differences)}; "
            "delete it to start again, or choose another --out"
        )


def read_meta(out: Path, settings: dict[str, Any], stamp: dict[str, Any] | None) -> dict[str, Any]:
    """The meta.json of a finished folder. Raises ValueError if settings or source have changed since."""
    with vocabulary.reading(f"{out / META} must be what prepare wrote; delete {out} to prepare it again"):
        meta = files.read_json(out / META)
        recorded = meta.get("stamp")
        numbers = [meta["duplicates"], *(recorded[name] for name in ("files", "bytes") if recorded)]
        for name in ("documents", "tokens", "bytes"):
            numbers += [meta[name]["train"], meta[name]["val"]]
        if wrong := [number for number in numbers if type(number) is not int or number < 0]:
            raise ValueError(f"its counts must be whole numbers, got {wrong[0]!r:.60}")
        if not isinstance(meta["settings"], dict):
            raise ValueError(f"its settings must be an object, got {meta['settings']!r:.60}")
    check_settings(settings, meta["settings"], out)
    if recorded is not None and stamp is not None and recorded != stamp:
        raise ValueError(
            f"{settings['source']} must be what it was when {out} was prepared, but names, sizes or times of "
            f"its files have changed ({recorded['files']:,} with {recorded['bytes']:,} bytes then, "
            f"{stamp['files']:,} with {stamp['bytes']:,} now); choose another --out, or delete {out} to "
            "prepare it again"
        )
    # left over if the process was killed in `publish`
    shutil.rmtree(out / PROGRESS, ignore_errors=True)
    return meta


# --------------------------------------------------------------------------------------------------
# Writing


@dataclass(frozen=True)
class Packer:
    """Writes pieces to token files of about `shard_tokens` in `work`, up to `max_tokens` in total."""

    work: Path
    tokenizer: tokenizer.Tokenizer
    shard_tokens: int = shards.SHARD_TOKENS
    max_tokens: int | None = None
    progress: Callable[[str, int, int], None] = bpe.silent

    def pack(self, pieces: Iterable[Piece], reader: Reader, journal: Journal) -> None:
        """Write all remaining pieces; commit whenever a file is full."""
        state = journal.state
        encoded = self._encode(pieces, reader, state)
        delete_uncommitted(self.work, state)
        about = (self.tokenizer.vocab_size, self.tokenizer.fingerprint(), self.shard_tokens)
        while not state.is_complete:
            with (
                shards.ShardWriter(self.work, "train", *about, state.n_train) as train,
                shards.ShardWriter(self.work / PROGRESS, "held", *about, state.n_held) as held,
            ):
                position, n_tokens, is_complete = state.position, state.n_tokens, False
                for piece, ids, n_bytes in encoded:
                    (held if piece.held_out else train).write(ids, [len(ids)], n_bytes)
                    position, n_tokens = piece.position, n_tokens + len(ids)
                    is_complete = self.max_tokens is not None and n_tokens >= self.max_tokens
                    if is_complete or train.paths or held.paths:
                        break
                else:
                    position, is_complete = reader.position, True
            n_train, n_held = state.n_train + len(train.paths), state.n_held + len(held.paths)
            state = State(position, n_tokens, n_train, n_held, is_complete)
            if is_complete and not state.is_begun:
                raise ValueError(f"{reader.source.name} must hold text, but is empty")
            if is_complete and not (n_train and n_held):
                raise ValueError(
                    f"val_fraction must leave text on both sides, but of {position.n_documents:,} documents "
                    f"of {reader.source.name} {'none' if n_train else 'each'} is held out; choose another"
                )
            journal.commit(state)

    def _encode(
        self, pieces: Iterable[Piece], reader: Reader, state: State
    ) -> Iterator[tuple[Piece, list[int], int]]:
        """Each piece, its ids with the end-of-text token, and its size in bytes; reports progress."""
        end = self.tokenizer.end_of_text_id
        done = reported = 0
        n_tokens, first_fraction = state.n_tokens, None
        for piece in pieces:
            ids, n_bytes = [*self.tokenizer.encode_ordinary(piece.text), end], len(piece.text.encode("utf-8"))
            yield piece, ids, n_bytes
            done, n_tokens = done + n_bytes, n_tokens + len(ids)
            if done - reported >= PROGRESS_BYTES:
                reported = done
                # the reader may be ahead of the encoder
                fraction = reader.source.fraction * piece.position.n_documents / reader.position.n_documents
                fraction = max(fraction, n_tokens / self.max_tokens if self.max_tokens else 0.0)
                first_fraction = fraction if first_fraction is None else first_fraction
                # extrapolated from the progress so far
                gained = fraction - first_fraction
                left = done * (1 - fraction) / gained if gained > 0 else 0
                self.progress("encoding", done, done + int(left) if left else 0)


def delete_uncommitted(work: Path, state: State) -> None:
    """Delete the files that were written after `state`."""
    for folder, n in ((work, state.n_train), (work / PROGRESS, state.n_held)):
        for path in folder.glob("*_*.*"):
            found = re.fullmatch(r"(?:train|held|val)_(\d+)\.(bin|(?:bin\.)?tmp-.*)", path.name)
            if found and (int(found[1]) >= n or found[2] != "bin"):
                path.unlink()


def finish(work: Path, about: dict[str, Any]) -> None:
    """Join the held-out files into one, then write meta.json: `about` and the counts."""
    if (work / META).is_file():
        return
    chosen = tokenizer.Tokenizer.load(work / "tokenizer")
    held = [shards.read_shard(path) for path in sorted((work / PROGRESS).glob("held_*.bin"))]
    with shards.ShardWriter(work, "val", chosen.vocab_size, chosen.fingerprint(), sys.maxsize) as writer:
        for shard in held:
            writer.write(shard.tokens, shard.document_ends, shard.n_bytes)
    train = [shards.read_shard(path) for path in sorted(work.glob("train_*.bin"))]
    parts = {"train": train, "val": held}
    counts = {
        "documents": {name: sum(s.n_documents for s in part) for name, part in parts.items()},
        "tokens": {name: sum(len(s.tokens) for s in part) for name, part in parts.items()},
        "bytes": {name: sum(s.n_bytes for s in part) for name, part in parts.items()},
    }
    meta = about | counts | {"tokenizer": chosen.fingerprint(), "vocab_size": chosen.vocab_size}
    files.write(work / META, json.dumps(meta, indent=2) + "\n")


def publish(work: Path, out: Path) -> dict[str, Any]:
    """Rename a finished folder, unless another process did so first; returns its meta.json."""
    if not (out / META).exists():
        try:
            with files.writing(out):
                os.rename(work, out)
        except OSError:
            if not (out / META).exists():
                raise
    for folder in (work, out / PROGRESS):
        shutil.rmtree(folder, ignore_errors=True)
    return json.loads((out / META).read_text(encoding="utf-8"))
