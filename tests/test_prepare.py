"""From raw text to token files. Alone: uv run pytest tests/test_prepare.py"""

import contextlib
import dataclasses
import io
import json
import os
import re
import sys
import time
import types

import pytest

from llm_basics.cli import commands, parse
from llm_basics.core import config, presets, tokenizer
from llm_basics.data import documents, prepare
from llm_basics.runs import console, run_dir
from llm_basics.training import setup

DATA = os.environ.get("LLM_BASICS_DATA")


@pytest.fixture
def folder(tmp_path):
    """Twenty documents in twenty files."""
    for i in range(20):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{i}.txt").write_text(f"Document {i}: the cat sat on the mat.\r\n" * (i + 1))
    return tmp_path


@pytest.fixture
def options(folder):
    def make(**changes):
        shape = config.ModelConfig(vocab_size=changes.pop("vocab_size", 270))
        return config.Config(
            data=str(folder / "text"), data_dir=str(folder / "data"), val_fraction=0.3, model=shape, **changes
        )

    return make


def texts(prepared, shards):
    """The documents of token files, decoded."""
    ids = [int(i) for shard in shards for i in shard.tokens]
    return prepared.tokenizer.decode(ids).split(documents.DOCUMENT_SEPARATOR)[:-1]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_every_document_is_whole_on_one_side(folder, options, kind):
    prepared = prepare.prepare(options(tokenizer=kind))
    train, val = texts(prepared, prepared.train), texts(prepared, [prepared.val])
    expected = [(folder / "text" / f"{i}.txt").read_bytes().decode() for i in range(20)]
    assert sorted(train + val) == sorted(expected) and train and val
    assert prepared.tokenizer.vocab_size == {"bytes": 257, "bpe": 270}[kind]
    assert sum(s.n_bytes for s in [*prepared.train, prepared.val]) == sum(map(len, expected))


def test_bpe_trains_on_the_training_split_alone(options, monkeypatch):
    seen = []
    train_bpe = prepare.bpe.train_bpe
    monkeypatch.setattr(
        prepare.bpe,
        "train_bpe",
        lambda path, *args, **kw: seen.append(path.read_bytes().decode()) or train_bpe(path, *args, **kw),
    )
    prepared = prepare.prepare(options())
    expected = "".join(t + documents.DOCUMENT_SEPARATOR for t in texts(prepared, prepared.train))
    assert seen == [expected]


def test_the_second_call_uses_the_cache(options, monkeypatch):
    first = prepare.prepare(options())
    monkeypatch.setattr(prepare.bpe, "train_bpe", pytest.fail)
    monkeypatch.setattr(prepare.shard_builder.Packer, "pack", pytest.fail)
    assert prepare.prepare(options()).folder == first.folder


def test_text_split_and_tokenizer_change_the_folder(folder, options):
    folders = {
        prepare.prepare(o).folder for o in (options(), options(vocab_size=271), options(tokenizer="bytes"))
    }
    folders.add(prepare.prepare(dataclasses.replace(options(), val_fraction=0.4)).folder)
    (folder / "text" / "3.txt").write_text("changed")
    folders.add(prepare.prepare(options()).folder)
    assert len(folders) == 5


def test_an_interrupted_preparation_starts_again(options, monkeypatch):
    save = tokenizer.Tokenizer.save
    monkeypatch.setattr(tokenizer.Tokenizer, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(options())
    monkeypatch.setattr(tokenizer.Tokenizer, "save", save)
    assert prepare.prepare(options()).train


def test_saved_tokenizer_can_be_used_for_other_text(folder, options):
    made = prepare.prepare(options())
    (folder / "text" / "new.txt").write_text("something else")
    again = prepare.prepare(options(tokenizer=str(made.folder / "tokenizer")))
    assert again.tokenizer.fingerprint() == made.tokenizer.fingerprint() and again.folder != made.folder


def test_a_separator_in_text_divides_documents(folder, options):
    (folder / "text" / "0.txt").write_text("one<|endoftext|>two")
    prepared = prepare.prepare(options(tokenizer="bytes"))
    both = texts(prepared, prepared.train) + texts(prepared, [prepared.val])
    assert {"one", "two"} <= set(both) and len(both) == 21


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "bpe", "vocab_size": 256}, "vocab_size must be at least 257"),
        (
            {"tokenizer": "nothing"},
            "must be bytes, gpt2, a folder or a tokenizer.json with one, or in training bpe, got nothing",
        ),
    ],
)
def test_errors(options, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare.prepare(options(**changes))


def test_empty_text_is_refused(options, folder):
    for file in (folder / "text").iterdir():
        file.write_text("\n")
    with pytest.raises(ValueError, match="must hold text, but .* is empty"):
        prepare.prepare(options())
    assert not (folder / "data").exists()


def test_duplicates_are_kept(folder, options):
    (folder / "text" / "copy.txt").write_bytes((folder / "text" / "3.txt").read_bytes())
    prepared = prepare.prepare(options(tokenizer="bytes"))
    assert len(texts(prepared, prepared.train) + texts(prepared, [prepared.val])) == 21


def test_documents_are_not_kept_in_memory(folder, options, monkeypatch):
    alive = []

    class Counted(documents.Document):
        def __init__(self, name, text):
            super().__init__(name, text)
            alive.append(name)

        def __del__(self):
            alive.pop()

    most = []
    digest = documents.digest
    monkeypatch.setattr(documents, "Document", Counted)
    monkeypatch.setattr(documents, "digest", lambda text: most.append(len(alive)) or digest(text))
    prepare.prepare(options(tokenizer="bytes"))
    assert len(most) >= 40 and max(most) <= 5


def test_max_tokens_changes_the_folder(options):
    whole = prepare.prepare(options(tokenizer="bytes"))
    few = prepare.prepare(options(tokenizer="bytes", max_tokens=3000))
    assert few.folder != whole.folder
    assert 3000 <= sum(len(s.tokens) for s in (*few.train, few.val)) < 3900
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        options(max_tokens=0)


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    assert prepare._versions().keys() == {"llm_basics", "regex", "python"}
    monkeypatch.setattr(prepare.importlib.metadata, "distributions", lambda name: [])
    assert prepare._versions().keys() == {"python"}


def test_the_folder_name_is_stable_across_versions(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(f"text {i}\n" * (i + 1))
    found = prepare.prepare(config.Config(data=str(tmp_path / "*.txt"), data_dir=str(tmp_path / "data")))
    assert found.folder.name == "text-bpe-e25ed2fd85bc"


# --------------------------------------------------------------------------------------------------
# Prepared folders


@pytest.fixture
def made(folder):
    """A folder that the command prepared."""
    settings = {"tokenizer": "bpe", "vocab_size": 270, "val_fraction": 0.3, "fast": "off"}
    options = commands.PrepareConfig(source=str(folder / "text"), out=str(folder / "made"), **settings)
    prepare.build(options, lambda line: None)
    return folder / "made"


def test_a_prepared_folder_is_trained_on_as_it_is(made, options, monkeypatch):
    monkeypatch.setattr(prepare.shard_builder.Packer, "pack", pytest.fail)
    given = dataclasses.replace(options(), data=str(made))
    prepared = prepare.prepare(given)
    assert prepared.folder == made and prepared.tokenizer.vocab_size == 270
    assert len(texts(prepared, prepared.train) + texts(prepared, [prepared.val])) == 20
    same = prepare.prepare(dataclasses.replace(given, tokenizer=str(made / "tokenizer")))
    assert same.folder == made


def test_another_tokenizer_than_that_of_a_prepared_folder_is_refused(made, options):
    with pytest.raises(
        ValueError,
        match="prepared with, which has 270 tokens, got --tokenizer bytes with 257; "
        f"use {made}/tokenizer, or prepare",
    ):
        prepare.prepare(dataclasses.replace(options(tokenizer="bytes"), data=str(made)))


def test_training_begins_from_a_prepared_folder(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = ["--model.context_length=16", "--model.d_model=16", "--model.n_heads=2", "--fast=off"]
    options = parse.train_options(["--data", str(made), *sizes, "--run_dir", "run"])
    training, output = setup.start(options)
    output.close()
    assert "is prepared; its tokenizer has 270 tokens" in capsys.readouterr().out
    assert training.options.model.vocab_size == 270 and training.prepared_in == "made"
    assert run_dir.read_config("run")["tokenizer"] == f"{made}/tokenizer"
    # the recorded options load the same folder
    assert prepare.prepare(training.options).folder == made
    assert len(training.held_out) == len(prepare.load(made).val.tokens)
    assert not (tmp_path / "data").exists()


# --------------------------------------------------------------------------------------------------
# Data sets by name


@pytest.fixture
def hub(monkeypatch):
    """A fake `datasets` with 200 stories; returns the calls to it."""
    calls = []
    rows = [{"text": f"story {i} of a cat" * (i % 5 + 1)} for i in range(200)]
    fetched = types.SimpleNamespace(
        disable_progress_bars=lambda: None,
        load_dataset=lambda *args, **kw: calls.append(args[0]) or iter(rows),
    )
    monkeypatch.setitem(sys.modules, "datasets", fetched)
    return calls


def test_a_preset_names_a_data_set_that_is_fetched_once(hub, tmp_path):
    options = dataclasses.replace(
        presets.load("pretrain_small"), tokenizer="bytes", data_dir=str(tmp_path), max_tokens=5000, fast="off"
    )
    lines = []
    prepared = prepare.prepare(options, lines.append)
    assert hub == ["roneneldan/TinyStories"]
    assert 5000 <= sum(len(s.tokens) for s in (*prepared.train, prepared.val)) < 5200
    assert lines[0].startswith(
        "fetching hub:roneneldan/TinyStories (2.1 million short stories, 1 GB), 5,000 tokens of it, to "
    )
    assert prepare.prepare(options).folder == prepared.folder and len(hub) == 1
    other = prepare.prepare(dataclasses.replace(options, max_tokens=6000), lines.append)
    assert other.folder != prepared.folder and len(hub) == 2


def test_a_preset_can_train_on_a_local_file(folder, options):
    given = options(tokenizer="bytes")
    preset = dataclasses.replace(presets.load("pretrain_small"), tokenizer="bytes", val_fraction=0.3)
    prepared = prepare.prepare(dataclasses.replace(preset, data=given.data, data_dir=given.data_dir))
    assert len(texts(prepared, prepared.train) + texts(prepared, [prepared.val])) == 20


def test_standard_input_must_be_prepared_first(options):
    with pytest.raises(ValueError, match="--data - must be prepared first; see python -m llm_basics.prepare"):
        prepare.prepare(dataclasses.replace(options(), data="-"))


# --------------------------------------------------------------------------------------------------
# The command


def prepare_program(*arguments):
    options = parse.program_options(commands.PrepareConfig(), list(arguments), prog="prepare")
    return prepare.main(options)


def test_the_command_prints_a_summary(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert prepare_program("text", "--tokenizer", "bytes", "--val_fraction", "0.3", "--fast", "off") == 0
    out = capsys.readouterr().out
    meta = json.loads((folder / "data" / "text" / "meta.json").read_text())
    n_train, n_val = meta["documents"]["train"], meta["documents"]["val"]
    assert f"documents   {n_train} for training, {n_val} held out, 0 duplicates removed" in out
    assert "train on it uv run python -m llm_basics.train --data data/text" in out


def test_the_command_reads_standard_input(folder, monkeypatch):
    content = b"".join(json.dumps({"text": f"line {i}"}).encode() + b"\n" for i in range(100))
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(content)))
    arguments = ["-", "--form", "jsonl", "--vocab_size", "260", "--sample_bytes", "99", "--fast", "off"]
    prepare_program(*arguments, "--val_fraction", "0.2", "--out", str(folder / "out"))
    prepared = prepare.load(folder / "out")
    found = texts(prepared, prepared.train) + texts(prepared, [prepared.val])
    assert sorted(found) == sorted(f"line {i}" for i in range(100))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "the text must be a file"),
        (["bad.jsonl"], "bad.jsonl:2 must be JSON; Expecting value in column 1\n"),
        (["bad.jsonl", "--text_field", "x"], "bad.jsonl:1 must have the field x, got text"),
        (["text", "--vocab_size", "12"], "vocab_size must be at least 257"),
        (["text", "--tokenizer", "nothing"], "a tokenizer must be bytes, gpt2, a folder"),
        (["text", "--val_fraction", "2"], "val_fraction must be above 0 and below 1, got 2.0"),
        (["text", "--max_tokens", "0"], "max_tokens must be at least 1, got 0"),
        (["text", "--shard_token", "0"], "the closest is --shard_tokens"),
        (["-"], "--out must name the output folder when reading standard input (-), got none\n"),
        (["text", "--out", "text"], "--out must be a folder that is new or empty, got text"),
    ],
)
def test_errors_exit_with_one_line(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    (folder / "bad.jsonl").write_text('{"text": "one"}\nnot JSON\n')
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        prepare_program(*arguments, "--fast", "off")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert [path for path in sorted(folder.rglob("*")) if path.name != "data"] == before


def test_without_a_terminal_progress_is_lines(monkeypatch):
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), console.progress_bar("bytes") as progress:
        progress("encoding", 3_000_000, 12_000_000)
        progress("encoding", 6_000_000, 0)
    first, second = out.getvalue().splitlines()
    assert re.fullmatch(r"encoding 3 MB, [\d.]+ MB/s, about \d+ s left", first)
    assert re.fullmatch(r"encoding 6 MB, [\d.]+ MB/s", second)


def test_on_a_terminal_progress_is_a_bar_with_speed_and_time(monkeypatch):
    out = io.StringIO()
    out.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with contextlib.redirect_stdout(out), console.progress_bar("bytes") as progress:
        for done in range(0, 6_000_001, 1_000_000):
            progress("encoding", done, 12_000_000)
            time.sleep(0.02)
    assert "encoding" in out.getvalue() and "50%" in out.getvalue() and "MB/s" in out.getvalue()


@pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR names no folder with gpt2"
)
def test_gpt2_vocabulary(options):
    import tiktoken

    chosen = prepare.prepare(options(tokenizer="gpt2")).tokenizer
    text = "It's  a test;\n\n\tdef f(x): return 1234567 \u00e9\u4e2d\U0001f600<|endoftext|>"
    assert chosen.encode(text) == tiktoken.get_encoding("gpt2").encode(text, allowed_special="all")
    assert chosen.vocab_size == 50257 and len(chosen.merges) == 50000
