"""The checks of `doctor`: what is found on a machine, and what to do about it.

Run alone: uv run pytest tests/test_doctor.py
"""

import json
from pathlib import Path

import pytest
import torch

from llm_basics import swap
from llm_basics.cli import subcommands
from llm_basics.core import device, files
from llm_basics.doctor import __main__ as doctor
from llm_basics.doctor import checks, machine, step
from llm_basics.fast import trainer as fast_trainer

MEMINFO = "MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:   8000000 kB\n"


def by_name(found):
    return {each.name: each for each in found}


@pytest.mark.parametrize(
    ("good", "bad", "level", "advice"),
    [
        (
            lambda: by_name(machine.versions("2.10.0"))["torch"],
            lambda: by_name(machine.versions("2.9.1+cu128"))["torch"],
            checks.ERROR,
            "CVE-2026-24747",
        ),
        (
            lambda: next(machine.accelerator(torch.device("mps"), "2.10.0")),
            lambda: next(machine.accelerator(torch.device("mps"), "2.3.1")),
            checks.WARNING,
            "--train.device cpu",
        ),
        (
            lambda: machine.bfloat16("A100", (8, 0)),
            lambda: machine.bfloat16("T4", (7, 5)),
            checks.WARNING,
            "--train.dtype float32",
        ),
        (
            lambda: machine.threads(4, "4"),
            lambda: machine.threads(4, "8"),
            checks.WARNING,
            "OMP_NUM_THREADS to at most 4",
        ),
        (lambda: machine.load(4, 1.0), lambda: machine.load(4, 3.0), checks.WARNING, "other programs"),
        (
            lambda: machine.encoding("utf-8"),
            lambda: machine.encoding("ANSI_X3.4-1968"),
            checks.WARNING,
            "PYTHONUTF8=1",
        ),
        (
            lambda: machine.caches("/home/a/cache", "/no/temporary"),
            lambda: machine.caches("", "/no/temporary"),
            checks.WARNING,
            "NUMBA_CACHE_DIR",
        ),
        (
            lambda: machine.caches("/home/a/cache", "/no/temporary"),
            lambda: machine.caches("/no/temporary/cache", "/no/temporary"),
            checks.WARNING,
            "NUMBA_CACHE_DIR",
        ),
        (
            lambda: machine.tokenizer_files({}),
            lambda: machine.tokenizer_files({"TIKTOKEN_CACHE_DIR": "/nowhere"}),
            checks.WARNING,
            "unset TIKTOKEN_CACHE_DIR",
        ),
    ],
)
def test_what_is_bad_is_found_with_what_to_do(good, bad, level, advice):
    fine, wrong = good(), bad()
    assert (fine.level, fine.advice) == (checks.OK, "")
    assert wrong.level == level and advice in wrong.advice
    assert len(str(wrong).splitlines()) == 1 and str(wrong).startswith(level)


@pytest.mark.parametrize(("available", "level"), [(8_000_000 * 1024, "ok"), (4_000_000 * 1024, "warning")])
def test_a_limit_below_the_memory_of_the_machine_is_found(tmp_path, available, level):
    (tmp_path / "meminfo").write_text(MEMINFO)
    (found,) = machine.memory_limits(tmp_path / "meminfo", available)
    assert found.level == level and "the machine has 16.4" in found.found
    assert not list(machine.memory_limits(tmp_path / "meminfo", None))


@pytest.mark.parametrize(("free", "level"), [(1 << 26, "warning"), (1 << 30, "ok")])
def test_small_shared_memory_is_found(tmp_path, monkeypatch, free, level):
    monkeypatch.setattr(files, "free_bytes", lambda path: free)
    (found,) = machine.shared_memory(tmp_path)
    assert found.level == level and ("--shm-size" in found.advice) == (level == "warning")
    assert not list(machine.shared_memory(tmp_path / "none"))


def test_a_full_slow_or_remote_disk_is_found(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    fine = by_name(machine.disk(runs))
    assert fine["disk"].level == "ok" and not list(tmp_path.iterdir())
    monkeypatch.setattr(files, "free_bytes", lambda path: 1 << 26)
    monkeypatch.setattr(machine, "write_speed", lambda path: 1e6)
    monkeypatch.setattr(machine, "file_system", lambda path, mounts: "nfs4")
    found = by_name(machine.disk(runs))
    assert {each.level for each in found.values()} == {"warning"}
    assert set(found) == {"disk", "disk speed", "file system"}
    assert all("--run_dir" in each.advice for each in found.values())


def test_speed_is_that_of_a_real_file(tmp_path):
    assert 1e4 < machine.write_speed(tmp_path) < 1e12 and not list(tmp_path.iterdir())


def test_the_innermost_mount_counts():
    mounts = "/dev/a / ext4 rw\nserver:/b /data nfs4 rw\n/dev/c /data/local xfs rw\nbroken\n"
    paths = ("/home/x", "/data", "/data/runs", "/data/local/runs", "/database")
    found = [machine.file_system(Path(path), mounts) for path in paths]
    assert found == ["ext4", "nfs4", "nfs4", "xfs", "ext4"]


# --------------------------------------------------------------------------------------------------
# One training step


def test_a_step_of_this_machine_is_right():
    assert [each.level for each in step.check("cpu")] == ["ok"]
    # what was in use is in use again
    assert not swap.fast_pieces()


def test_a_wrong_kernel_is_an_error(monkeypatch):
    def batch_loss(*given):
        return 1.01 * original(*given)

    original = fast_trainer.batch_loss
    batch_loss.__module__ = fast_trainer.__name__
    monkeypatch.setattr(fast_trainer, "batch_loss", batch_loss)
    (found,) = step.check("cpu")
    assert found.level == checks.ERROR and "--fast off" in found.advice


def test_losses_and_gradients_are_compared():
    expected = [5.0, 4.0], {"a": torch.tensor([1.0, 2.0]), "b": torch.ones(2)}
    cases = {
        "ok": ([5.0, 4.0009], {"a": torch.tensor([1.001, 2.0]), "b": torch.ones(2)}),
        "second loss": ([5.0, 4.002], expected[1]),
        "a gradient": ([5.0, 4.0], {"a": torch.tensor([1.003, 2.0]), "b": torch.ones(2)}),
        "nan": ([5.0, 4.0], {"a": torch.tensor([float("nan"), 2.0]), "b": torch.ones(2)}),
        "loss nan": ([5.0, float("nan")], expected[1]),
        "none for b": ([5.0, 4.0], {"a": torch.tensor([1.0, 2.0])}),
    }
    levels = {name: step.compare("x", expected, found, "").level for name, found in cases.items()}
    assert levels == {name: "ok" if name == "ok" else "error" for name in cases}


def test_a_device_that_lacks_an_operation_is_an_error(monkeypatch):
    monkeypatch.setattr(device, "choose", lambda name: torch.device("meta"))
    on_cpu, reference, fast = step.check("auto")
    assert on_cpu.level == "ok"
    assert (reference.level, fast.level) == ("error", "error")
    assert "--train.device cpu" in reference.advice and "meta" in reference.found


# --------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize("is_wrong", [False, True])
def test_the_exit_status_and_json(monkeypatch, capsys, is_wrong):
    rows = [checks.check("one", "found", "do this", is_wrong, checks.ERROR)]
    monkeypatch.setattr(machine, "check", lambda options: iter(rows))
    monkeypatch.setattr(step, "check", lambda name: iter([checks.Check("two", "warning", "slow")]))
    assert doctor.main(subcommands.DoctorCheck()) == is_wrong
    assert capsys.readouterr().out.splitlines()[1] == "warning  two          slow"
    assert doctor.main(subcommands.DoctorCheck(json=True)) == is_wrong
    found = json.loads(capsys.readouterr().out)
    assert [each["level"] for each in found] == ["error" if is_wrong else "ok", "warning"]


def test_all_checks_run_here(tmp_path):
    options = subcommands.DoctorCheck(device="cpu", runs=str(tmp_path / "runs"))
    found = list(machine.check(options))
    names = {each.name for each in found}
    assert {"python", "torch", "kernels", "threads", "load", "disk", "caches", "encoding"} <= names
    assert all(bool(each.advice) == (each.level != checks.OK) for each in found)
