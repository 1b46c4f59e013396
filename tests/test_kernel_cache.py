"""Kernels that are compiled beside a starting program. Alone: uv run pytest tests/test_kernel_cache.py"""

import subprocess
import sys
import time

import pytest
import torch

from llm_basics.core import config, generate, model
from llm_basics.fast import generate as fast_generate
from llm_basics.fast import kernel_cache, precompile


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and no compiling process."""
    monkeypatch.setattr(kernel_cache, "folder", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_cache._Compiler, "process", None)
    monkeypatch.setattr(kernel_cache._Compiler, "groups", ())
    return tmp_path / "cache"


def run(monkeypatch, script, groups):
    """Start a compiling process that runs `script` instead."""
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **settings: popen([sys.executable, "-c", script])
    )
    kernel_cache.start_compiling(*groups)
    return kernel_cache._Compiler.process


def test_a_wait_ends_with_its_group(cache, monkeypatch, capsys):
    cache.mkdir()
    script = f"import time; open({str(kernel_cache.marker('training'))!r}, 'w'); time.sleep(60)"
    process = run(monkeypatch, script, ["training", "decoding"])
    try:
        kernel_cache.wait("training")
        assert kernel_cache.is_compiled("training") and process.poll() is None
        assert kernel_cache.is_pending("decoding") and not kernel_cache.is_pending("training")
        assert not kernel_cache.is_pending("tokenizer"), "not requested"
    finally:
        process.kill()
        process.wait()
    assert not kernel_cache.is_pending("decoding")
    assert capsys.readouterr().err.count("compiling CPU kernels (about 24 s, cached") == 1


def test_a_failed_compiler_is_not_waited_for(cache, monkeypatch):
    run(monkeypatch, "raise SystemExit(1)", ["training"])
    kernel_cache.wait("training")
    assert not kernel_cache.is_compiled("training")


def test_nothing_is_started_where_nothing_is_missing(cache, monkeypatch):
    cache.mkdir()
    for group in kernel_cache.SECONDS:
        kernel_cache.marker(group).touch()
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)
    kernel_cache.start_for_training("bpe", "auto")


@pytest.mark.parametrize(
    ("tokenizer", "device", "groups"),
    [
        ("bpe", "auto", ["tokenizer", "vocabulary", "training", "decoding"]),
        ("bytes", "cpu", ["tokenizer", "training", "decoding"]),
        ("gpt2", "cuda:1", ["tokenizer"]),
    ],
)
def test_a_run_compiles_what_it_needs(cache, monkeypatch, tokenizer, device, groups):
    commands = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **settings: commands.append(command))
    kernel_cache.start_for_training(tokenizer, device)
    assert commands[0][3:] == groups


def test_two_processes_compile_each_group_once(cache, monkeypatch):
    compiled = []
    monkeypatch.setattr(precompile, "GROUPS", {g: lambda g=g: compiled.append(g) for g in "ab"})
    with kernel_cache.locked():
        script = f"from llm_basics.fast import kernel_cache\nkernel_cache.folder = lambda: {str(cache)!r}\n"
        script += "from llm_basics.fast import precompile\nprecompile.GROUPS = dict.fromkeys('ab', int)\n"
        other = subprocess.Popen([sys.executable, "-c", script + "precompile.main(['a'])"])
        time.sleep(0.5)
        assert other.poll() is None and not kernel_cache.is_compiled("a"), "must wait for the lock"
    assert other.wait() == 0
    precompile.main(["a", "b"])
    assert compiled == ["b"] and kernel_cache.is_compiled("a") and kernel_cache.is_compiled("b")


def test_text_is_generated_by_the_reference_while_kernels_are_pending(monkeypatch):
    lm = model.TransformerLM(config.ModelConfig(61, 16, d_model=32, n_layers=1, n_heads=2))
    prompt = torch.tensor([1, 2])
    expected = list(generate.generate(lm, prompt, 8, temperature=0.0))
    monkeypatch.setattr(kernel_cache, "is_pending", lambda group: group == "decoding")
    monkeypatch.setattr(fast_generate, "Loops", pytest.fail)
    assert list(fast_generate.generate(lm, prompt, 8, temperature=0.0)) == expected
