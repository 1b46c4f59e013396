"""Documents -> token files, in steps that a kill cannot tear.

The files grow in a folder beside the one that is asked for, which is renamed when all is there. Whenever a
file is full, what was written so far is `Ledger.commit`ted; a later run reads the source again up to there,
and goes on with the next document. What was written after the last commit is written again, the same.

    out.partial/train_0000.bin     as in `out`
    out.partial/progress/          ledger.sqlite, and held_0000.bin, ... , which become one val_0000.bin
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_basics.core import bpe, files, tokenizer
from llm_basics.data import documents as corpus
from llm_basics.data import shards

META = "meta.json"
PROGRESS = "progress"

# how often progress is told, in bytes of text
TOLD_BYTES = 1 << 18

# of each digest this much is kept: two of 10**12 documents share it once in 10**14 such collections
DIGEST_BYTES = 16


@dataclass(frozen=True)
class SourcePosition:
    """How far a source has been read: documents, how many of them were copies, and what they were."""

    n_documents: int = 0
    n_duplicates: int = 0
    chain: str = ""


@dataclass(frozen=True)
class Piece:
    """A document on its way into a token file, and where the source stands behind it."""

    text: str
    held_out: bool
    place: SourcePosition


@dataclass(frozen=True)
class State:
    """How far writing has come: the place in the source, and how many files are full."""

    place: SourcePosition = SourcePosition()
    n_tokens: int = 0
    n_train: int = 0
    n_held: int = 0
    is_complete: bool = False


class Reader:
    """The pieces behind the place `done`, each text once; and with them how far the source has been read.

    `is_new` is asked of each text, by digest and number. Raises ValueError if what stands before `done` is
    no longer what it was.
    """

    def __init__(
        self,
        name: str,
        documents: Iterable[corpus.Document],
        split: corpus.Split,
        done: SourcePosition = SourcePosition(),
        is_new: Callable[[bytes, int], bool] = lambda digest, number: True,
    ) -> None:
        self.name = name
        self.documents = documents
        self.split = split
        self.done = done
        self.is_new = is_new
        self.place = done

    def __iter__(self) -> Iterator[Piece]:
        number, chain, n_duplicates = 0, "", self.done.n_duplicates
        for number, document in enumerate(self.documents, start=1):
            digest = corpus.digest(document.text)
            chain = hashlib.sha256(bytes.fromhex(chain) + digest).hexdigest()
            if number > self.done.n_documents:
                is_new = self.is_new(digest, number)
                n_duplicates += not is_new
                self.place = SourcePosition(number, n_duplicates, chain)
                if is_new:
                    yield Piece(document.text, self.split.holds_out(digest), self.place)
            elif number == self.done.n_documents and chain != self.done.chain:
                self._refuse()
        if number < self.done.n_documents:
            self._refuse()

    def _refuse(self) -> None:
        raise ValueError(
            f"{self.name} must be what it was when its preparation began, but of its first "
            f"{self.done.n_documents} documents some are not; delete what was prepared and begin again"
        )


class Journal:
    """What was committed of a preparation in `work`, and the digests of all texts so far, on disk.

    Raises ValueError if another process has it, or if it was begun with other `settings`. Where `work` is
    None, it is in memory. `stamp` is that of the source when it was read last.
    """

    def __init__(
        self, work: Path | None, settings: dict[str, Any], stamp: dict[str, Any] | None = None
    ) -> None:
        self.settings = settings
        self.stamp = stamp
        self.state: State | None = None
        path = work / PROGRESS / "ledger.sqlite" if work else ":memory:"
        self.database = sqlite3.connect(path, isolation_level=None, timeout=0)
        try:
            # until it is closed, or its process ends
            self.database.execute("PRAGMA locking_mode = EXCLUSIVE")
            self.database.execute("BEGIN EXCLUSIVE")
            self._open(work)
        except BaseException as error:
            self.database.close()
            if isinstance(error, sqlite3.DatabaseError):
                raise ValueError(f"{path} must be whole, and no other process may use it: {error}") from None
            raise

    def _open(self, work: Path | None) -> None:
        execute = self.database.execute
        execute("CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID")
        execute("CREATE TABLE IF NOT EXISTS committed (state TEXT, settings TEXT)")
        row = execute("SELECT state, settings FROM committed").fetchone()
        if row is not None:
            state, then = json.loads(row[0]), json.loads(row[1])
            check_settings(self.settings, then, work)
            self.state = State(**state | {"place": SourcePosition(**state["place"])})
            if self.state.is_complete:
                self.stamp = then.get("stamp")
        # reading may have been ahead of writing
        n_documents = self.state.place.n_documents if self.state else 0
        execute("DELETE FROM seen WHERE number > ?", [n_documents])

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.database.close()

    def is_new(self, digest: bytes, number: int) -> bool:
        """Whether no text with this digest was seen before; now it has been, as document `number`."""
        values = [digest[:DIGEST_BYTES], number]
        return self.database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", values).rowcount == 1

    def commit(self, state: State) -> None:
        """Make `state` the one to go on from, all or nothing."""
        settings = self.settings | {"stamp": self.stamp}
        values = [json.dumps(dataclasses.asdict(state)), json.dumps(settings)]
        self.database.execute("DELETE FROM committed")
        self.database.execute("INSERT INTO committed VALUES (?, ?)", values)
        self.database.execute("COMMIT")
        self.state = state
        self.database.execute("BEGIN")


def check_settings(now: dict[str, Any], then: dict[str, Any], folder: object) -> None:
    """Raise ValueError unless a folder was prepared with the settings that are asked for now."""
    differences = [f"{k} was {then.get(k)}, now {v}" for k, v in now.items() if then.get(k) != v]
    if differences:
        raise ValueError(
            f"{folder} was prepared with other options, which must be the same: {'; '.join(differences)}; "
            "delete it to begin again, or choose another --out"
        )


def read_meta(out: Path, settings: dict[str, Any], stamp: dict[str, Any] | None) -> dict[str, Any]:
    """What a finished folder says of itself. Raises ValueError if it is not what is asked for now."""
    meta = json.loads((out / META).read_text(encoding="utf-8"))
    check_settings(settings, meta.get("settings", {}), out)
    then = meta.get("stamp")
    if then is not None and stamp is not None and then != stamp:
        raise ValueError(
            f"{settings['source']} must be what it was when {out} was prepared, but names, sizes or times of "
            f"its files have changed ({then['files']:,} with {then['bytes']:,} bytes then, "
            f"{stamp['files']:,} with {stamp['bytes']:,} now); choose another --out, or delete {out} to "
            "prepare it again"
        )
    # the last that is done, and so the last that a kill may leave undone
    shutil.rmtree(out / PROGRESS, ignore_errors=True)
    return meta


# --------------------------------------------------------------------------------------------------
# Writing


@dataclass(frozen=True)
class Packer:
    """Writes pieces into token files of about `shard_tokens` in `work`, until there are `max_tokens`."""

    work: Path
    tokenizer: tokenizer.Tokenizer
    shard_tokens: int = shards.SHARD_TOKENS
    max_tokens: int | None = None
    progress: Callable[[str, int, int], None] = bpe.silent

    def pack(
        self, pieces: Iterable[Piece], reader: Reader, ledger: Journal, fraction: Callable[[], float]
    ) -> None:
        """Write all pieces that are left, and commit whenever a file is full.

        `fraction` says how much of the source has been read.
        """
        state = ledger.state or State()
        rest = self._told(iter(pieces), reader, state, fraction)
        delete_partial(self.work, state)
        fingerprint = self.tokenizer.fingerprint()
        while not state.is_complete:
            about = (self.tokenizer.vocab_size, fingerprint, self.shard_tokens)
            with (
                shards.ShardWriter(self.work, "train", *about, state.n_train) as train,
                shards.ShardWriter(self.work / PROGRESS, "held", *about, state.n_held) as held,
            ):
                place, n_tokens, is_complete = state.place, state.n_tokens, False
                for piece, ids, n_bytes in rest:
                    (held if piece.held_out else train).write(ids, [len(ids)], n_bytes)
                    place, n_tokens = piece.place, n_tokens + len(ids)
                    is_complete = self.max_tokens is not None and n_tokens >= self.max_tokens
                    if is_complete or train.paths or held.paths:
                        break
                else:
                    place, is_complete = reader.place, True
            n_train, n_held = state.n_train + len(train.paths), state.n_held + len(held.paths)
            state = State(place, n_tokens, n_train, n_held, is_complete)
            if is_complete and not place.n_documents:
                raise ValueError(f"{reader.name} must hold text, but is empty")
            if is_complete and not (n_train and n_held):
                raise ValueError(
                    f"val_fraction must leave text on both sides, but of {place.n_documents:,} documents of "
                    f"{reader.name} {'none' if n_train else 'each'} is held out; choose another"
                )
            ledger.commit(state)

    def _told(
        self, pieces: Iterator[Piece], reader: Reader, state: State, fraction: Callable[[], float]
    ) -> Iterator[tuple[Piece, list[int], int]]:
        """Each piece with its ids, the end-of-text token behind them, and its size; progress is told."""
        end = self.tokenizer.special_id(corpus.DOCUMENT_SEPARATOR)
        done = told = 0
        n_tokens, began_at = state.n_tokens, None
        for piece in pieces:
            ids, n_bytes = [*self.tokenizer.encode_ordinary(piece.text), end], len(piece.text.encode("utf-8"))
            yield piece, ids, n_bytes
            done, n_tokens = done + n_bytes, n_tokens + len(ids)
            if done - told >= TOLD_BYTES:
                told = done
                # reading may be ahead of encoding
                part = fraction() * piece.place.n_documents / reader.place.n_documents
                part = max(part, n_tokens / self.max_tokens if self.max_tokens else 0.0)
                began_at = part if began_at is None else began_at
                # at the rate at which it went so far
                left = done * (1 - part) / (part - began_at) if part > began_at else 0
                self.progress("encoding", done, done + int(left) if left else 0)


def delete_partial(work: Path, state: State) -> None:
    """Delete what was written after `state`."""
    for folder, n in ((work, state.n_train), (work / PROGRESS, state.n_held)):
        for path in folder.glob("*_*.*"):
            found = re.fullmatch(r"(?:train|held|val)_(\d+)\.(bin|(?:bin\.)?tmp-.*)", path.name)
            if found and (int(found[1]) >= n or found[2] != "bin"):
                path.unlink()


def finish(work: Path, about: dict[str, Any]) -> None:
    """Put what was held out into one file, and say in meta.json, which is written last, what all is."""
    if (work / META).is_file():
        return
    chosen = tokenizer.Tokenizer.load(work / "tokenizer")
    parts = [shards.read_shard(path) for path in sorted((work / PROGRESS).glob("held_*.bin"))]
    with shards.ShardWriter(work, "val", chosen.vocab_size, chosen.fingerprint(), sys.maxsize) as writer:
        for part in parts:
            writer.write(part.tokens, part.document_ends, part.n_bytes)
    train = [shards.read_shard(path) for path in sorted(work.glob("train_*.bin"))]
    counts = {
        "documents": {"train": sum(s.n_documents for s in train), "val": sum(s.n_documents for s in parts)},
        "tokens": {"train": sum(len(s.tokens) for s in train), "val": sum(len(s.tokens) for s in parts)},
        "bytes": {"train": sum(s.n_bytes for s in train), "val": sum(s.n_bytes for s in parts)},
    }
    meta = about | counts | {"tokenizer": chosen.fingerprint(), "vocab_size": chosen.vocab_size}
    files.write(work / META, json.dumps(meta, indent=2) + "\n")


def publish(work: Path, out: Path) -> dict[str, Any]:
    """Give a finished folder its name, unless another process was first, with the same; returns its meta."""
    if not (out / META).exists():
        try:
            os.rename(work, out)
        except OSError:
            if not (out / META).exists():
                raise
    shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(out / PROGRESS, ignore_errors=True)
    return json.loads((out / META).read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------
# Reading ahead


def keep(pieces: Iterator[Piece], n_bytes: int, path: Path) -> Iterator[str]:
    """The texts to train on among the next pieces, until they have `n_bytes`; `kept` gives all pieces."""
    with open(path, "w", encoding="utf-8") as file:
        for piece in pieces:
            file.write(json.dumps(dataclasses.asdict(piece)) + "\n")
            if not piece.held_out:
                yield piece.text
                n_bytes -= len(piece.text.encode("utf-8"))
                if n_bytes <= 0:
                    return


def kept(path: Path) -> Iterator[Piece]:
    """The pieces that `keep` has read."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            piece = json.loads(line)
            yield Piece(**piece | {"place": SourcePosition(**piece["place"])})
