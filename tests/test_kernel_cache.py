"""Kernels that are compiled beside a starting program. Alone: uv run pytest tests/test_kernel_cache.py"""

import errno
import itertools
import os
import subprocess
import sys
import time

import pytest
import torch

from llm_basics.core import config, generate, model
from llm_basics.fast import cache_folder, kernel_cache, numba_jit, precompile
from llm_basics.fast import generate as fast_generate


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and no compiling process."""
    monkeypatch.setattr(kernel_cache, "folder", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_cache, "_compilers", {})
    return tmp_path / "cache"


def run(monkeypatch, script, groups):
    """Start a compiling process that runs `script` instead."""
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **settings: popen([sys.executable, "-c", script])
    )
    kernel_cache.start_compiling(*groups)
    return kernel_cache._compilers[groups[0]]


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
    for group in itertools.chain(*kernel_cache.CHAINS):
        kernel_cache.marker(group).touch()
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)
    kernel_cache.start_for_training("bpe", "auto")


@pytest.mark.parametrize(
    ("tokenizer", "device", "chains"),
    [
        ("bpe", "auto", [["tokenizer", "vocabulary"], ["training", "decoding"]]),
        ("bytes", "cpu", [["tokenizer"], ["training", "decoding"]]),
        ("gpt2", "cuda:1", [["tokenizer"]]),
    ],
)
def test_a_run_compiles_what_it_needs(cache, monkeypatch, capsys, tokenizer, device, chains):
    commands = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **settings: commands.append(command))
    kernel_cache.start_for_training(tokenizer, device)
    assert [command[3:] for command in commands] == chains
    # side by side: as long as the longest
    assert f"(about {24 if len(chains) > 1 else 8} s" in capsys.readouterr().err


def test_two_processes_compile_each_group_once(cache, monkeypatch):
    compiled = []
    one, next_one = kernel_cache.CHAINS[0]
    groups = {group: lambda group=group: compiled.append(group) for group in (one, next_one)}
    monkeypatch.setattr(precompile, "GROUPS", groups)
    # the lock is that of the chain
    with kernel_cache.locked(next_one):
        script = f"from llm_basics.fast import kernel_cache\nkernel_cache.folder = lambda: {str(cache)!r}\n"
        script += f"from llm_basics.fast import precompile\nprecompile.GROUPS = {{{one!r}: int}}\n"
        other = subprocess.Popen([sys.executable, "-c", script + f"precompile.main([{one!r}])"])
        time.sleep(0.5)
        assert other.poll() is None and not kernel_cache.is_compiled(one), "must wait for the lock"
    assert other.wait() == 0
    precompile.main([one, next_one])
    assert compiled == [next_one] and kernel_cache.is_compiled(one) and kernel_cache.is_compiled(next_one)


def test_text_is_generated_by_the_reference_while_kernels_are_pending(monkeypatch):
    lm = model.TransformerLM(config.ModelConfig(61, 16, d_model=32, n_layers=1, n_heads=2))
    prompt = torch.tensor([1, 2])
    expected = list(generate.generate(lm, prompt, 8, temperature=0.0))
    monkeypatch.setattr(kernel_cache, "is_pending", lambda group: group == "decoding")
    monkeypatch.setattr(fast_generate, "CPUDecoder", pytest.fail)
    assert list(fast_generate.generate(lm, prompt, 8, temperature=0.0)) == expected


# --------------------------------------------------------------------------------------------------
# Folders that cannot be written


def test_kernels_are_cached_beside_the_source_or_by_the_user_or_temporarily(tmp_path, monkeypatch, capsys):
    package, user, temporary = (tmp_path / name for name in ("package", "user", "temporary"))
    temporary.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(user))
    monkeypatch.setattr(cache_folder.tempfile, "gettempdir", lambda: str(temporary))
    own = temporary / f"llm_basics-{os.getuid()}"
    assert cache_folder.find(package, "v") == str(package / "__pycache__" / "v")
    monkeypatch.setattr(os, "access", lambda path, mode: package not in path.parents)
    assert cache_folder.find(package, "v") == str(user / "llm_basics" / "v")
    user.rename(tmp_path / "before")
    user.touch()
    assert capsys.readouterr().err == ""
    assert cache_folder.find(package, "v") == str(own / "v") and own.stat().st_mode & 0o777 == 0o700
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(package) in said and str(user) in said and str(own) in said
    # a folder into which others may put machine code is not used
    own.chmod(0o777)
    assert cache_folder.find(package, "v") == "" and capsys.readouterr().err == ""
    own.rename(temporary / "of others").chmod(0o700)
    own.symlink_to(temporary / "of others")
    assert cache_folder.find(package, "v") == ""


def test_a_home_that_is_unknown_is_not_a_folder_named_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert cache_folder.find(tmp_path, "v") == "" and not (tmp_path / "~").exists()


def twice(x):
    return 2 * x


def test_without_a_folder_kernels_are_not_cached(monkeypatch, capsys):
    monkeypatch.setattr(kernel_cache, "folder", lambda: "")
    monkeypatch.setattr(cache_folder, "uncached", [])
    monkeypatch.setattr(numba_jit.caching.CacheImpl, "_locator_classes", [])
    assert [numba_jit.jit(twice)(x) for x in (1, 2)] == [2, 4]
    said = capsys.readouterr().err
    start = "warning: compiled CPU kernels are not cached (no cache folder"
    assert said.startswith(start) and said.count("\n") == 1


def test_a_full_disk_does_not_stop_what_is_compiled(cache, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_folder, "uncached", [])
    monkeypatch.setattr(numba_jit.caching.IndexDataCacheFile, "_save_data", full)
    calls = []
    monkeypatch.setattr(precompile, "GROUPS", {"training": lambda: calls.append(numba_jit.jit(twice)(21))})
    precompile.main(["training"])
    assert calls == [42] and not kernel_cache.is_compiled("training")
    said = capsys.readouterr().err
    assert str(cache) in said and "No space left on device)" in said and said.count("\n") == 1
