"""Documents to token files, resumed after interruptions. Alone: uv run pytest tests/test_shard_builder.py"""

import dataclasses
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_basics.cli import commands
from llm_basics.data import documents, prepare, shard_builder, shards

WORDS = "the cat sat on a mat and the dog ran far away from its own tail".split()


def make_documents(n, seed=0):
    """Short texts, every seventh of which is a copy of an earlier one."""
    random_words = random.Random(seed)
    texts = []
    for i in range(n):
        fresh = f"{i} " + " ".join(random_words.choices(WORDS, k=random_words.randrange(1, 30)))
        texts.append(random_words.choice(texts) if i % 7 == 6 else fresh)
    return texts


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def source(tmp_path):
    return write_lines(tmp_path / "a.jsonl", make_documents(300))


@pytest.fixture
def options(source, tmp_path):
    def make(out, **changes):
        settings = {"tokenizer": "bytes", "val_fraction": 0.1, "shard_tokens": 3000, "fast": "off"} | changes
        return commands.PrepareConfig(source=str(source), out=str(tmp_path / out), **settings)

    return make


def build(options):
    return prepare.build(options, lambda line: None)


def content(folder):
    """Every file of a folder, byte by byte."""
    folder = Path(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def texts(prepared, parts):
    ids = [int(i) for shard in parts for i in shard.tokens]
    return prepared.tokenizer.decode(ids).split(documents.DOCUMENT_SEPARATOR)[:-1]


# --------------------------------------------------------------------------------------------------
# Content


def test_every_text_is_written_once_on_the_side_of_its_digest(options):
    meta = build(options("out"))
    prepared = prepare.load(options("out").out)
    given = list(dict.fromkeys(make_documents(300)))
    held = [t for t in given if documents.Split(0.1).holds_out(documents.digest(t))]
    assert texts(prepared, [prepared.val]) == held
    assert texts(prepared, prepared.train) == [t for t in given if t not in held]
    assert meta["duplicates"] == 300 - len(given) > 30
    assert meta["documents"] == {"train": len(given) - len(held), "val": len(held)}


def test_duplicates_at_the_end_are_counted(options, source):
    write_lines(source, [*make_documents(50), *["the last"] * 5])
    assert build(options("out"))["duplicates"] == 4 + 7


def test_max_tokens_keeps_the_tail_of_a_single_document(options, source):
    write_lines(source, ["a line\n" * 100])
    meta = build(options("out", max_tokens=200))
    assert meta["documents"] == {"train": 1, "val": 1} and meta["tokens"]["val"] == 71


def test_files_are_full_but_for_the_last(options):
    build(options("out"))
    prepared = prepare.load(options("out").out)
    lengths = [len(shard.tokens) for shard in prepared.train]
    assert len(lengths) > 5 and all(3000 <= n < 3300 for n in lengths[:-1])
    assert [s.path.name for s in prepared.train] == [f"train_{i:04d}.bin" for i in range(len(lengths))]
    for shard in (*prepared.train, prepared.val):
        shards.check_ids(shard)
        assert shard.document_ends[-1] == len(shard.tokens)


def test_meta_counts_match_the_files(options):
    meta = build(options("out"))
    prepared = prepare.load(options("out").out)
    assert meta == json.loads((prepared.folder / "meta.json").read_text())
    assert meta["tokens"]["train"] == sum(len(s.tokens) for s in prepared.train)
    assert meta["bytes"]["val"] == sum(len(t.encode()) for t in texts(prepared, [prepared.val]))
    assert meta["tokenizer"] == prepared.tokenizer.fingerprint() and meta["vocab_size"] == 257
    assert sorted(p.name for p in prepared.folder.iterdir() if not p.name.startswith("train_")) == [
        "meta.json",
        "tokenizer",
        "val_0000.bin",
    ]


def test_documents_stay_on_their_side_when_others_are_added(options, source):
    build(options("few"))
    write_lines(source, make_documents(200, seed=1) + make_documents(300))
    build(options("more"))
    few, more = prepare.load(options("few").out), prepare.load(options("more").out)
    assert set(texts(few, [few.val])) <= set(texts(more, [more.val]))
    assert set(texts(few, few.train)) <= set(texts(more, more.train))


def test_no_text_becomes_a_special_token(options, source):
    evil = [f"{i} <|endoftext|> and <|endof" for i in range(50)]
    write_lines(source, evil)
    meta = build(options("out"))
    prepared = prepare.load(options("out").out)
    ends = sum(int((s.tokens == 256).sum()) for s in (*prepared.train, prepared.val))
    assert ends == sum(meta["documents"].values()) == 50


def test_lone_surrogates_are_replaced(options, source):
    source.write_text('{"text": "a \\ud83d b"}\n{"text": "\\ud83d\\ude00"}\n{"text": "c"}\n')
    build(options("out"))
    prepared = prepare.load(options("out").out)
    found = texts(prepared, prepared.train) + texts(prepared, [prepared.val])
    assert sorted(found) == ["a \ufffd b", "c", "\U0001f600"]


@pytest.mark.parametrize("limit", [1, 4000, 10**9])
def test_max_tokens_stops_after_the_document_that_reaches_it(options, source, limit):
    if limit == 1:
        with pytest.raises(
            ValueError, match="val_fraction must leave text on both sides, but of 1 documents"
        ):
            build(options("out", max_tokens=limit))
        return
    n = sum(build(options("out", max_tokens=limit))["tokens"].values())
    assert limit <= n < limit + 300 if limit < 10**9 else n < 40_000


@pytest.mark.parametrize("texts_given", [["one\ntwo\nthree\n"], ["one", "two"], ["one"] * 3 + ["two"]])
def test_few_documents_are_split(options, source, texts_given):
    write_lines(source, texts_given)
    build(options("out"))
    prepared = prepare.load(options("out").out)
    train, val = texts(prepared, prepared.train), texts(prepared, [prepared.val])
    assert train and val and sorted("".join(train + val)) == sorted("".join(dict.fromkeys(texts_given)))


def test_bpe_trains_on_the_first_training_texts(options, monkeypatch):
    seen = []
    train_bpe = prepare.bpe.train_bpe
    monkeypatch.setattr(
        prepare.bpe,
        "train_bpe",
        lambda path, *args, **kw: seen.append(path.read_bytes().decode()) or train_bpe(path, *args, **kw),
    )
    build(options("out", tokenizer="bpe", vocab_size=300, sample_bytes=5000))
    prepared = prepare.load(options("out").out)
    (sample,) = seen
    read = sample.split(documents.DOCUMENT_SEPARATOR)[:-1]
    assert read == texts(prepared, prepared.train)[: len(read)]
    assert 5000 <= sum(map(len, read)) < 5200 and len(read) < 0.9 * sum(s.n_documents for s in prepared.train)
    assert prepared.tokenizer.vocab_size == 300


# --------------------------------------------------------------------------------------------------
# Interruptions


class Killed(BaseException):
    """Simulates a kill: nothing in the package may handle it."""


def kill_at(monkeypatch, home, name, number, after):
    """Make call `number` of a function raise `Killed`, before or after it runs."""
    original, calls = getattr(home, name), []

    def call(*args, **kw):
        calls.append(name)
        if len(calls) == number and not after:
            raise Killed
        result = original(*args, **kw)
        if len(calls) == number and after:
            raise Killed
        return result

    monkeypatch.setattr(home, name, call)


POINTS = [
    (shard_builder.Journal, "commit", number, after) for number in (1, 2, 4) for after in (False, True)
] + [
    *((shards.ShardWriter, "_finish", number, after) for number in (1, 2, 3, 6) for after in (False, True)),
    *((shard_builder.Journal, "is_new", number, True) for number in (1, 30, 79)),
    *((shard_builder.shutil, "rmtree", 1, after) for after in (False, True)),
    *((shard_builder.os, "rename", 1, after) for after in (False, True)),
    (shard_builder, "delete_uncommitted", 1, True),
]


@pytest.mark.parametrize("kind", [pytest.param("bytes", marks=pytest.mark.slow), "bpe"])
def test_killed_anywhere_and_resumed_gives_the_same_files(options, source, monkeypatch, kind):
    changes = {"tokenizer": kind, "vocab_size": 280, "sample_bytes": 2000}
    changes["shard_tokens"] = {"bytes": 700, "bpe": 350}[kind]
    write_lines(source, make_documents(80))
    build(options("whole", **changes))
    expected = content(options("whole").out)
    assert sum(name.startswith("train_") for name in expected) > 4
    n_killed = 0
    for i, (home, name, number, after) in enumerate(POINTS):
        again = options(f"killed{i}", **changes)
        with monkeypatch.context() as patch:
            kill_at(patch, home, name, number, after)
            # a kill cleans up nothing
            patch.setattr(shards.ShardWriter, "__exit__", _leave_open)
            patch.setattr(Path, "unlink", lambda *args, **kw: None)
            if name != "rmtree":
                patch.setattr(prepare.shutil, "rmtree", lambda *args, **kw: None)
            try:
                build(again)
            except Killed:
                n_killed += 1
        build(again)
        assert content(again.out) == expected, (name, number, after)
        assert not Path(again.out + ".partial").exists()
    assert n_killed >= len(POINTS) - 2


def _leave_open(writer, exception, *_):
    if exception is None and writer._file is not None:
        writer._finish()


def test_killed_again_and_again(options, monkeypatch):
    build(options("whole"))
    again = options("again")
    for _ in range(100):
        with monkeypatch.context() as patch:
            kill_at(patch, shard_builder.Journal, "commit", 2, False)
            try:
                build(again)
                break
            except Killed:
                continue
    assert content(again.out) == content(options("whole").out)


def test_a_later_run_resumes_without_encoding_again(options, monkeypatch):
    build(options("whole"))
    encoded = []
    encode = prepare.tokenizer.Tokenizer.encode_ordinary
    monkeypatch.setattr(
        prepare.tokenizer.Tokenizer,
        "encode_ordinary",
        lambda s, text: encoded.append(text) or encode(s, text),
    )
    with monkeypatch.context() as patch:
        kill_at(patch, shard_builder.Journal, "commit", 3, True)
        with pytest.raises(Killed):
            build(options("again"))
    first = len(encoded)
    lines = []
    prepare.build(options("again"), lines.append)
    assert len(encoded) == len(set(encoded)) > first > 50
    assert lines[1].startswith("resuming after document ")
    prepare.build(options("again"), lines.append)
    assert lines[-1] == f"{options('again').out} is prepared already"


def test_a_finished_folder_that_was_not_renamed_is_not_written_again(options, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, shard_builder, "publish", 1, False)
        with pytest.raises(Killed):
            build(options("out"))
    monkeypatch.setattr(shard_builder.shards, "ShardWriter", pytest.fail)
    assert build(options("out")) == json.loads(Path(options("out").out, "meta.json").read_text())


def test_a_killed_process_resumes(options, source):
    write_lines(source, make_documents(3_000))
    settings = {"shard_tokens": 8_000, "val_fraction": 0.05}
    build(options("whole", **settings))
    again = options("killed", **settings)
    ledger = Path(again.out + ".partial", "progress", "ledger.sqlite")
    flags = [
        f"--{k}={v}" for k, v in dataclasses.asdict(again).items() if v not in (None, False) and k != "source"
    ]
    command = [sys.executable, "-m", "llm_basics.prepare", again.source, *flags]
    kills = 0
    for files in (3, 12):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            if len(list(ledger.parents[1].glob("train_*.bin"))) >= files:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                process.wait()
            time.sleep(0.002)
    assert kills == 2 and ledger.exists()
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "resuming after document" in finished.stdout
    assert f"--data {again.out}" in finished.stdout
    assert content(again.out) == content(options("whole").out)


# --------------------------------------------------------------------------------------------------
# Refusals


def partial(options, monkeypatch, out="out", commits=2):
    """An interrupted preparation."""
    with monkeypatch.context() as patch:
        kill_at(patch, shard_builder.Journal, "commit", commits, True)
        with pytest.raises(Killed):
            build(options(out))


def test_files_after_the_last_commit_are_deleted(options, monkeypatch):
    build(options("whole"))
    partial(options, monkeypatch)
    work = Path(options("out").out + ".partial")
    for name in ("train_0077.bin", "val_0000.tmp-1", "train_0002.bin.tmp-1", "progress/held_0077.bin"):
        (work / name).write_bytes((work / "train_0000.bin").read_bytes())
    build(options("out"))
    assert content(options("out").out) == content(options("whole").out)


def test_a_source_that_has_changed_is_refused(options, source, monkeypatch):
    partial(options, monkeypatch)
    given = make_documents(300)
    for changed in (["new", *given], given[:3]):
        write_lines(source, changed)
        with pytest.raises(ValueError, match="must be unchanged since the start of the preparation"):
            build(options("out"))
    write_lines(source, given)
    build(options("out"))


def test_a_source_that_changed_after_it_was_prepared_is_refused(options, source):
    out, given, about = options("out").out, source.read_text(), source.stat()
    build(options("out"))
    for changed, size, ns in ((given + "{}\n", len(given) + 3, about.st_mtime_ns), (given, len(given), 1)):
        source.write_text(changed)
        os.utime(source, ns=(ns, ns))
        with pytest.raises(ValueError) as error:
            build(options("out"))
        assert str(error.value) == (
            f"{source} must be what it was when {out} was prepared, but names, sizes or times of its files "
            f"have changed (1 with {len(given):,} bytes then, 1 with {size:,} now); choose another --out, or "
            f"delete {out} to prepare it again"
        )
    assert prepare.load(out).train
    # a deleted source has not changed, and meta.json of earlier versions has no stamp
    source.unlink()
    meta = build(options("out"))
    del meta["stamp"]
    Path(out, "meta.json").write_text(json.dumps(meta))
    write_lines(source, ["new"])
    assert build(options("out")) == meta


def test_a_source_that_changes_after_it_was_read_is_refused_later(options, source, monkeypatch):
    build(options("whole"))
    n_commits = len(prepare.load(options("whole").out).train)
    partial(options, monkeypatch, commits=n_commits)
    os.utime(source, ns=(1, 1))
    build(options("out"))
    with pytest.raises(ValueError, match="names, sizes or times of its files have changed"):
        build(options("out"))


def test_other_options_are_refused(options, monkeypatch):
    partial(options, monkeypatch)
    with pytest.raises(
        ValueError, match=r"out.partial was prepared with other .*: val_fraction was 0.1, now 0.2"
    ):
        build(options("out", val_fraction=0.2))
    build(options("out"))
    with pytest.raises(
        ValueError, match=r"out was prepared with other .*: tokenizer was bytes, now gpt2; delete"
    ):
        build(options("out", tokenizer="gpt2"))


def test_a_folder_with_something_else_in_it_is_refused(options, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="--out must be a folder that is new or empty, got .*out"):
        build(options("out"))
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_two_processes_at_once_are_refused(options, tmp_path, monkeypatch):
    partial(options, monkeypatch)
    work = tmp_path / "out.partial"
    settings = json.loads(
        sqlite3.connect(work / "progress" / "ledger.sqlite")
        .execute("SELECT settings FROM committed")
        .fetchone()[0]
    )
    with shard_builder.Journal(work, settings) as journal:
        for _ in range(2):
            with pytest.raises(ValueError, match="no other process may use it: database is locked"):
                build(options("out"))
            journal.commit(journal.state)
    build(options("out"))


def test_two_processes_that_finish_together_give_one_folder(options, monkeypatch):
    build(options("whole"))
    write, publish, find, seen = shard_builder.files.write, shard_builder.publish, prepare.sources.find, []

    def write_while_another_begins(path, text):
        if path.name != shard_builder.META:
            return write(path, text)
        with pytest.raises(ValueError, match="no other process may use it: database is locked"):
            build(options("out"))
        seen.append("refused")
        write(path, text)

    def publish_after_another(work, out):
        monkeypatch.setattr(shard_builder, "publish", publish)
        seen.append(publish(work, out))
        return publish(work, out)

    def find_before_another_ends(*arguments):
        monkeypatch.setattr(prepare.sources, "find", find)
        seen.append(build(options("third")))
        monkeypatch.setattr(prepare, "_write_shards", pytest.fail)
        return find(*arguments)

    monkeypatch.setattr(shard_builder.files, "write", write_while_another_begins)
    monkeypatch.setattr(shard_builder, "publish", publish_after_another)
    assert build(options("out")) == seen[1] and seen[0] == "refused"
    monkeypatch.setattr(shard_builder.files, "write", write)
    stamp = prepare.sources.stamp(options("third").source)
    monkeypatch.setattr(prepare.sources, "stamp", lambda source: stamp)
    monkeypatch.setattr(prepare.sources, "find", find_before_another_ends)
    assert build(options("third")) == seen[2]
    for out in ("out", "third"):
        assert content(options(out).out) == content(options("whole").out)
        assert not Path(options(out).out + ".partial").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{}"], "must have the field text"),
        (["", '{"text": " "}'], "must hold text, but"),
        (['{"text": "same"}'] * 3, "all documents are held out"),
    ],
)
def test_a_source_that_cannot_be_prepared_leaves_nothing(options, source, tmp_path, rows, message):
    source.write_text("\n".join(rows) + "\n")
    with pytest.raises(ValueError, match=message):
        build(options("out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_source_can_be_repaired_after_an_error(options, source):
    build(options("whole"))
    good, about = source.read_text(), source.stat()
    source.write_text(good[: len(good) // 2] + "\n")
    with pytest.raises(ValueError, match="a.jsonl:1.. must be JSON"):
        build(options("out"))
    assert not Path(options("out").out).exists()
    source.write_text(good)
    os.utime(source, ns=(about.st_atime_ns, about.st_mtime_ns))
    build(options("out"))
    assert content(options("out").out) == content(options("whole").out)
