"""The seam between reference and fast twins. Alone: uv run pytest tests/test_swap.py"""

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import regex

import llm_basics
from llm_basics import bpe, config, prepare, swap, tokenizer
from llm_basics.fast import machine


def test_twins_have_the_signature_of_their_reference():
    for module, name, twin in swap._twins():
        reference = getattr(module, name)
        assert list(inspect.signature(twin).parameters) == list(inspect.signature(reference).parameters), name
        for method, of_twin in vars(twin).items() if inspect.isclass(twin) else ():
            if not method.startswith("_") and inspect.isfunction(of_twin):
                expected = inspect.signature(getattr(reference, method)).parameters
                assert list(inspect.signature(of_twin).parameters) == list(expected), method


def test_what_has_a_twin():
    names = {"bpe.count_pretokens", "bpe.learn_merges", "bpe.train_bpe", "tokenizer.Tokenizer"}
    assert {f"{swap._home(module)}.{name}" for module, name, _ in swap._twins()} == names
    assert not any(origin.startswith("llm_basics.fast.") for origin in swap.origins().values())


def test_twins_stand_in_for_the_length_of_a_block():
    before = bpe.train_bpe, tokenizer.Tokenizer
    with pytest.raises(RuntimeError), swap.using("fast", lambda line: None):
        assert bpe.train_bpe is not before[0]
        assert swap.origins()["bpe.train_bpe"] == "llm_basics.fast.bpe"
        assert type(tokenizer.Tokenizer.of_bytes()).__module__ == "llm_basics.fast.tokenizer"
        raise RuntimeError("the block ends early")
    assert (bpe.train_bpe, tokenizer.Tokenizer) == before


def test_a_piece_that_somebody_put_there_stays(monkeypatch):
    def train_bpe(*args):
        return {}, []

    monkeypatch.setattr(bpe, "train_bpe", train_bpe)
    with swap.using("fast", lambda line: None):
        assert bpe.train_bpe is train_bpe
        assert bpe.learn_merges.__module__ == "llm_basics.fast.bpe"
    assert bpe.train_bpe is train_bpe


def test_a_name_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="must be fast or a Python file with your pieces, got 'quick'"):
        swap.use("quick")


def test_a_pattern_without_a_scanner_is_learned_and_used_as_by_the_reference(tmp_path):
    path = tmp_path / "text"
    path.write_text("one-two three-four one-two " * 20)
    pattern = regex.compile(r"\w+|\W+")
    expected = bpe.train_bpe(path, 280, pattern=pattern)
    ids = tokenizer.Tokenizer(*expected, pattern=pattern).encode("one-two four")
    with swap.using("fast", lambda line: None):
        assert bpe.train_bpe(path, 280, pattern=pattern) == expected
        assert tokenizer.Tokenizer(*expected, pattern=pattern).encode("one-two four") == ids


def test_prepared_with_and_without_twins_is_the_same_to_the_byte(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        (texts / f"{i}.txt").write_text(f"text {i}: " + "a few words, and caf\u00e9s " * (i + 1))
    written = {}
    for fast in ("on", "off"):
        model = config.ModelConfig(vocab_size=300, context_length=8)
        options = config.Config(data=str(texts), data_dir=str(tmp_path / fast), fast=fast, model=model)
        folder = prepare.prepare(options, lambda line: None).folder
        written[fast] = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert written["on"] == written["off"]
    assert len(written["on"]) >= 5


def test_yaml_may_say_on_and_off():
    assert config.update(config.Config(), {"fast": False}, "a test").fast == "off"
    assert config.update(config.Config(), {"fast": True}, "a test").fast == "on"


def test_machine_code_is_made_again_when_any_source_changes(tmp_path):
    shutil.copytree(Path(llm_basics.__file__).parent, tmp_path / "llm_basics")
    script = "from llm_basics.fast import machine; print(machine._cache_folder())"

    def folder() -> str:
        command = [sys.executable, "-c", script]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    before = folder()
    assert str(tmp_path) in before
    with open(tmp_path / "llm_basics" / "fast" / "words.py", "a") as file:
        file.write("# changed\n")
    assert folder() != before


def test_machine_code_of_this_version_is_known():
    tokenizer_twin = __import__("llm_basics.fast.tokenizer", fromlist=["Tokenizer"])
    tokenizer_twin.Tokenizer.of_bytes().encode("compiled now at the latest")
    assert machine.used_before()
