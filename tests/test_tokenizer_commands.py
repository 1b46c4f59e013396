"""The tokenizer command. Alone: `uv run pytest tests/test_tokenizer_commands.py`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llm_basics.cli import parse, subcommands
from llm_basics.core import bpe, tokenizer
from llm_basics.data import shards, tokenizer_commands

CORPUS = Path(__file__).parent / "fixtures" / "corpus.txt"
END_OF_TEXT = "<|endoftext|>"


def run(arguments):
    tokenizer_commands.main(parse.program_options(subcommands.TOKENIZER, arguments, "tokenizer"))


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A tokenizer trained once by the command on the corpus."""
    folder = tmp_path_factory.mktemp("cli") / "learned"
    run(["train", "--data", str(CORPUS), "--vocab-size", "600", "--out", str(folder), "--fast", "off"])
    return folder


def test_train_writes_the_tokenizer_of_train_bpe(learned, capsys):
    vocab, merges = bpe.train_bpe(CORPUS, 600, [END_OF_TEXT])
    found = tokenizer.Tokenizer.load(learned)
    assert (found.vocab, found.merges) == (vocab, merges)


def test_train_reads_a_folder_document_by_document(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for name, text in {"a": "hug hug", "b": "hugs"}.items():
        (tmp_path / "texts" / name).write_text(text)
    options = ["--ties", "lowest-id", "--pattern", "cl100k", "--fast", "off"]
    run(["train", "--data", str(tmp_path / "texts"), "--vocab-size", "999", "--out", str(tmp_path), *options])
    out = capsys.readouterr().out
    assert "'hug'" in out and "no pair is left to merge" in out
    assert tokenizer.Tokenizer.load(tmp_path).merges[:2] == [(b"h", b"u"), (b"hu", b"g")]


def test_encode_writes_token_files_that_decode_to_the_text(learned, tmp_path, capsys):
    run(
        ["encode", "--data", str(CORPUS), "--tokenizer", str(learned), "--out", str(tmp_path), "--fast", "on"]
    )
    own = tokenizer.Tokenizer.load(tmp_path / "tokenizer")
    shard = shards.read_shard(tmp_path / "tokens_0000.bin", own.fingerprint())
    assert own.decode(shard.tokens.tolist()) == CORPUS.read_bytes().decode("utf-8")
    assert f"encoded {CORPUS.stat().st_size:,} bytes" in capsys.readouterr().out


def test_inspect_shows_tokens_and_each_merge(tmp_path, capsys):
    merges = [(b"a", b"b"), (b" ", b"ab"), (b" ab", b"c")]
    vocab = dict(enumerate([bytes([b]) for b in range(256)] + [left + right for left, right in merges]))
    tokenizer.Tokenizer(vocab, merges, [END_OF_TEXT]).save(tmp_path)
    capsys.readouterr()
    run(["inspect", "ab abc\u00e9 abc<|endoftext|>", "--tokenizer", str(tmp_path)])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "ab| abc|<c3>|<a9>| abc|<|endoftext|>"
    assert lines[1] == "6 tokens, 25 bytes: 4.17 bytes per token"
    assert "258 ' abc'" in lines and "195 <c3>" in lines and "259 '<|endoftext|>'" in lines
    first = lines.index("bytes 'a' 'b'")
    assert lines[first:] == [
        "bytes 'a' 'b'",
        "merge 1 'ab'",
        "",
        "bytes ' ' 'a' 'b' 'c' <c3> <a9>",
        "merge 1 ' ' 'ab' 'c' <c3> <a9>",
        "merge 2 ' ab' 'c' <c3> <a9>",
        "merge 3 ' abc' <c3> <a9>",
        "",
        "bytes ' ' 'a' 'b' 'c'",
        "merge 1 ' ' 'ab' 'c'",
        "merge 2 ' ab' 'c'",
        "merge 3 ' abc'",
        "",
    ]


@pytest.mark.parametrize("text", ["it's", "''", 'say "\'" it', "'<"])
def test_quotes_are_shown(text, capsys):
    run(["inspect", text, "--tokenizer", "bytes"])
    assert capsys.readouterr().out.splitlines()[0] == "|".join(text)


def test_tokens_are_colored_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    run(["inspect", "[b]", "--tokenizer", "bytes"])
    first = capsys.readouterr().out.splitlines()[0]
    assert "\x1b[30;46m[" in first and "\x1b[30;43mb" in first and "|" not in first


def test_compare_counts_tokens_side_by_side(learned, capsys):
    capsys.readouterr()
    run(["compare", str(learned), "bytes", "--data", str(CORPUS), "--fast", "off"])
    out = capsys.readouterr().out
    n_bytes = sum(len(part.encode("utf-8")) for part in CORPUS.read_bytes().decode().split(END_OF_TEXT))
    rows = [line.split() for line in out.splitlines() if " 600 " in line or " 257 " in line]
    assert rows[1][1:4] == ["257", f"{n_bytes:,}", "1.000"]
    assert 1.5 < float(rows[0][3]) < 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected one of {train, encode, inspect, compare}"),
        (["trian"], "trian"),
        (["train"], "--out"),
        (["train", "--out", "x", "--vocab-size", "12"], "vocab_size must be at least 257"),
        (["inspect", "x", "--tokenizer", "nowhere"], "a tokenizer must be .* got nowhere"),
        (["encode", "--tokenizer", "bytes", "--out", "x", "--data", "nowhere"], "the text must be a file"),
    ],
)
def test_an_error_is_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(arguments)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_the_module_is_a_command():
    command = [sys.executable, "-m", "llm_basics.tokenizer", "inspect", "ab", "--tokenizer", "bytes"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("a|b\n2 tokens")
