"""Programs on a full or read-only disk: one line, status 3, no half-written file.

Alone: uv run pytest tests/test_disk.py
"""

import contextlib
import errno
import json
import os
import re
import sys
from pathlib import Path

import pytest
import recorded

from llm_basics.analysis import compare, figures
from llm_basics.cli import commands, parse, subcommands
from llm_basics.core import files
from llm_basics.data import documents, prepare, shard_builder, shards, tokenizer_commands
from llm_basics.evaluation import compare_models
from llm_basics.inference import chat_session, engine, samples
from llm_basics.interop import hf_export, hf_import
from llm_basics.learn import __main__ as learn
from llm_basics.learn import probe, probe_tasks
from llm_basics.runs import run_dir
from llm_basics.training import sft

resource = pytest.importorskip("resource")

MINE = b"import torch\r\n\r\n\r\ndef silu(x):\r\n    return x * torch.sigmoid(x)\r\n"
SFT = "model.dropout=0 train.steps=2 train.batch_size=2 train.eval_batches=1 train.sample_tokens=2".split()


@contextlib.contextmanager
def largest_file(n_bytes):
    """No file can become larger, as on a disk that is full by then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        # Python before 3.12.8 does not see that only a part of a file of bytecode was written
        patch.setattr(sys, "dont_write_bytecode", True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def read_only():
    """No file can be opened for writing, and no folder made."""

    def refuse(*_, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def refused(self, path, mode):
        with files.writing(path):
            refuse()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files._Output, "__init__", refused)
        patch.setattr(Path, "mkdir", refuse)
        patch.setattr(
            run_dir,
            "open",
            lambda path, mode="r", **o: refuse() if "a" in mode else open(path, mode, **o),
            raising=False,
        )
        yield


def parsed(options, *arguments):
    return parse.program_options(options, arguments, "a test")


def run_generate():
    (Path("prompts.txt")).write_text("a\nb\n")
    options = ("run", "--prompts=prompts.txt", "--out=texts.jsonl", "--max_new_tokens=3", "--device=cpu")
    return samples.main(parsed(commands.GenerateConfig(), *options, "--fast=off"))


def run_evaluate():
    options = ("run", "--data=text.txt", "--out=report.json", "--device=cpu", "--fast=off")
    return compare_models.main(parsed(commands.EvaluateConfig(), *options))


def run_tokenizer(*arguments):
    tokenizer_commands.main(parsed(subcommands.TOKENIZER, *arguments, "--data=text.txt", "--fast=off"))
    return 0


def run_prepare():
    options = ("text.txt", "--out=prepared", "--tokenizer=bytes", "--val_fraction=0.3", "--fast=off")
    return prepare.main(parsed(commands.PrepareConfig(), *options))


def run_sft():
    options = [*(f"--{option}" for option in SFT), "--init_from=run", "--data=chat.jsonl", "--fast=off"]
    return sft.main(parse.train_options([*options, "--run_dir=chat", "--data_dir=cache"], preset="sft"))


def run_probe():
    with parse.exit_on_error():
        files.create_folder("probes")
    outcome = probe.Outcome(probe_tasks.TASKS["copy"](0), [2.0, 1.0])
    outcome.measured.append(probe.Measurement(1, 1.0, 1.0, 0.5, 0.5, 0.1))
    with parse.exit_on_error():
        probe.draw(outcome, Path("probes/copy.png"))
    return 0


# each program, and what it may leave behind: what a later run of it replaces or resumes, file by file whole
PROGRAMS = {
    "generate": (run_generate, r"prompts.txt"),
    "evaluate": (run_evaluate, r""),
    "export": (lambda: hf_export.main(parsed(commands.ExportConfig(), "run", "--out=exported")), r""),
    "import_model": (
        lambda: hf_import.main(parsed(commands.ImportConfig(), "theirs", "--out=imported")),
        r"",
    ),
    "plot": (lambda: figures.main(parsed(commands.PlotConfig(), "logged", "--out=loss.png")), r""),
    "compare": (
        lambda: compare.main(parsed(commands.CompareConfig(), "logged", "--out=page.html")),
        r"page.png",
    ),
    "tokenizer train": (lambda: run_tokenizer("train", "--out=learned", "--vocab_size=260"), r"learned"),
    "tokenizer encode": (
        lambda: run_tokenizer("encode", "--out=encoded", "--tokenizer=run/tokenizer"),
        r"encoded(/tokens_0000.bin|/tokenizer)?",
    ),
    "prepare": (run_prepare, r"prepared.partial.*"),
    "learn start": (lambda: learn.main(["start", "gelu", "--into", "mine.py"]), r""),
    "learn hint": (lambda: learn.main(["hint", "silu", "--mine", "mine.py"]), r""),
    "sft": (run_sft, r"(chat|cache)(/.*)?"),
    "probe": (run_probe, r"probes"),
}


@pytest.fixture
def here(untrained_run, tmp_path, monkeypatch):
    """A working folder with what the programs read."""
    untrained_run("run")
    recorded.record(tmp_path / "logged", [3.0, 2.0], [("a", "b")])
    (tmp_path / "text.txt").write_text("All is well that ends well.\n" * 200)
    (tmp_path / "mine.py").write_bytes(MINE)
    record = {"prompt": "Say {}", "completion": "well"}
    lines = [json.dumps(record).replace("{}", str(number)) for number in range(20)]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    hf_export.main(parsed(commands.ExportConfig(), "run", "--out=theirs"))
    return tmp_path


def tree(folder):
    """All paths below a folder, with their contents."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def failed(program, left, here, capsys, disk):
    """The message of a program that fails on this disk; nothing else has changed."""
    before = tree(here)
    with disk:
        try:
            status = program()
        except SystemExit as stop:
            status = stop.code
    error = capsys.readouterr().err.splitlines()
    assert status == parse.NOT_SAVED, (status, error)
    error = [line for line in error if not line.startswith("warning")]
    assert len(error) == 1 and error[0].startswith("error: ") and "[Errno" not in error[0], error
    assert ".tmp-" not in error[0] and " could not be written (" in error[0]
    after = {name: content for name, content in tree(here).items() if not re.fullmatch(left or "-", name)}
    assert {name: content for name, content in after.items() if before.get(name, "") != content} == {}
    assert before.keys() <= tree(here).keys() and not [name for name in tree(here) if ".tmp-" in name]
    return error[0]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_full_disk(name, here, capsys):
    program, left = PROGRAMS[name]
    message = failed(program, left, here, capsys, largest_file(50))
    assert re.search(r"it needs at least [\d,]+ bytes, [\d,]+ are free", message) or name == "prepare"
    assert "File too large" in message or name == "prepare"
    # and there is nothing in the way of another try
    with open("/dev/full", "w", buffering=1) as full, pytest.MonkeyPatch.context() as patch:
        if name == "sft":  # a run goes on where its output is lost
            patch.setattr(sys, "stdout", full)
        assert program() in (0, None), capsys.readouterr().err
        patch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert not [path for path in tree(here) if ".tmp-" in path or ".partial" in path]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_read_only_disk(name, here, capsys):
    program, left = PROGRAMS[name]
    assert "(Read-only file system)" in failed(program, "prompts.txt", here, capsys, read_only())


# --------------------------------------------------------------------------------------------------
# The atomic writer


def test_files_that_belong_together_are_all_or_none(tmp_path):
    contents = {tmp_path / "a": "old", tmp_path / "b": "old"}
    files.write_all(contents)
    before = tree(tmp_path)
    message = "/b could not be written .File too large.; it needs at least 5,000 bytes"
    with largest_file(4000), pytest.raises(files.WriteError, match=message):
        files.write_all(dict(zip(contents, ("new", "n" * 5000), strict=True)))
    assert tree(tmp_path) == before
    files.write_all(dict.fromkeys(contents, b"new"))
    assert set(tree(tmp_path).values()) == {b"new"}


def test_a_file_keeps_its_permissions_and_its_link(tmp_path):
    (tmp_path / "mine.py").write_text("old")
    (tmp_path / "mine.py").chmod(0o640)
    (tmp_path / "link.py").symlink_to("mine.py")
    files.write(tmp_path / "link.py", "new")
    assert (tmp_path / "link.py").is_symlink() and (tmp_path / "mine.py").read_text() == "new"
    assert (tmp_path / "mine.py").stat().st_mode & 0o777 == 0o640


def test_a_file_without_permission_to_write_is_not_replaced(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("old")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(SystemExit, match="3"), parse.exit_on_error():
        files.write(tmp_path / "mine.py", "new")
    assert capsys.readouterr().err.endswith("mine.py could not be written (Permission denied)\n")
    assert tree(tmp_path) == {"mine.py": b"old"}


def test_devices_and_pipes_are_written_directly(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write(tmp_path / "pipe", "text")
    assert os.read(reader, 10) == b"text" and [path.name for path in tmp_path.iterdir()] == ["pipe"]
    os.close(reader)
    with pytest.raises(files.WriteError, match="^/dev/full could not be written .No space left on device"):
        files.write("/dev/full", "text")


def test_a_folder_in_place_of_a_file_is_a_wrong_path(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"), parse.exit_on_error():
        files.write(tmp_path, "text")
    assert capsys.readouterr().err == f"error: {tmp_path} could not be written (Is a directory)\n"


def test_the_stubs_of_a_step_keep_the_line_ends_of_a_file(here):
    assert learn.main(["start", "gelu", "--into", "mine.py"]) == 0
    content = Path("mine.py").read_bytes()
    assert b"def gelu" in content and content.count(b"\n") == content.count(b"\r\n")
    assert b"\r\r" not in content and content.replace(b"\r\n", b"\n").count(b"x * torch.sigmoid(x)") == 1


def test_a_saved_conversation_is_added_or_the_file_is_unchanged(untrained_run, tmp_path):
    options = commands.ChatConfig()
    session = chat_session.ChatSession(*engine.load_run(untrained_run("run")), options)
    session.turns = [chat_session.chat_template.Message("user", "a")]
    path = tmp_path / "chat.jsonl"
    session.save(str(path))
    once = path.read_bytes()
    with largest_file(len(once) + 10), pytest.raises(files.WriteError):
        session.save(str(path))
    assert path.read_bytes() == once
    session.save(str(path))
    assert path.read_bytes() == 2 * once


# --------------------------------------------------------------------------------------------------
# What is no single file


def test_shards_of_which_the_last_does_not_fit_are_removed(tmp_path):
    writer = shards.ShardWriter(tmp_path, "train", 300, "", shard_tokens=10)
    with largest_file(5000), pytest.raises(files.WriteError), writer:
        writer.write(list(range(10)), [10], 10)
        assert len(writer.paths) == 1
        writer.write([1] * 9, [9], 9)
        writer.shard_tokens = 10_000
        writer.write([1] * 2000, [2000], 9)
    assert list(tmp_path.iterdir()) == []


def test_errors_of_sqlite_that_are_the_disks_say_so(tmp_path):
    (tmp_path / shard_builder.PROGRESS).mkdir()
    with shard_builder.Journal(tmp_path, {}) as journal:
        journal.is_new(bytes(16), 1)
        journal.database.execute("PRAGMA max_page_count = 1")
        with pytest.raises(files.WriteError, match=r"ledger.sqlite could not be written .*full"):
            for number in range(10_000):
                journal.is_new(number.to_bytes(16, "big"), number)


def test_temporary_text_that_does_not_fit(capsys):
    with pytest.raises(SystemExit, match="3"), largest_file(100), parse.exit_on_error():
        with documents.joined(["a" * 200]):
            pass
    assert re.search("documents.txt could not be written .File too large.; it needs", capsys.readouterr().err)


def test_an_error_of_reading_is_not_the_disks(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"), parse.exit_on_error():
        (tmp_path / "nothing").read_bytes()
    assert capsys.readouterr().err == f"error: {tmp_path}/nothing: No such file or directory\n"


def test_standard_output_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit, match="3"), parse.exit_on_error():
            print("text")
        # what Python does at its exit
        full.flush()
    assert capsys.readouterr().err == "error: the output could not be written (No space left on device)\n"
