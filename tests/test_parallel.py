"""Parallel training by hand on two gloo ranks, and the processes that judge it.

uv run pytest tests/test_parallel.py
"""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import rank_programs
import torch

from llm_basics import swap
from llm_basics.learn import judge, probes, ranks, sockets
from llm_basics.runs import rank_pool
from llm_basics.systems import collectives

PROGRAMS = str(Path(rank_programs.__file__))


def on_ranks(name, world_size=2):
    seen = ranks.observe((PROGRAMS, name), sockets.own(), world_size)
    assert "error" not in seen, seen["error"]
    return seen


def assert_equal(found, right, atol=1e-10):
    assert found.keys() == right.keys()
    for name, weight in right.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# --------------------------------------------------------------------------------------------------
# A transformer with our optimizers trains as in one process


@pytest.mark.parametrize("name", ["data_parallel", "accumulated", "sharded_optimizer", "fsdp"])
def test_a_transformer_trains_as_in_one_process(name):
    # AdamW divides small gradients by their size, and with it their rounding
    dtype, atol = (torch.float32, 1e-4) if name == "fsdp" else (torch.float64, 1e-10)
    _, right = rank_programs.alone(dtype)
    seen = on_ranks(name)
    for rank in range(2):
        assert_equal(seen[f"weights, rank {rank}"], right, atol)


def test_muon_is_sharded_by_whole_matrices():
    right = rank_programs.muon_alone()
    assert_equal(on_ranks("muon")["weights, rank 1"], right)


def test_half_precision_learns_as_fast():
    losses, _ = rank_programs.alone(torch.float32)
    found = on_ranks("fsdp_in_half")["losses, rank 0"]
    assert found == pytest.approx(losses, abs=0.02) and found != pytest.approx(losses, abs=1e-6)


def test_a_tensor_parallel_transformer_trains_as_in_one_process():
    losses, right = rank_programs.alone()
    seen = on_ranks("tensor_parallel")
    for rank in range(2):
        assert seen[f"losses, rank {rank}"] == pytest.approx(losses, abs=1e-10)
        for name, found in seen[f"weights, rank {rank}"].items():
            whole = right[name]
            if ".ffn." in name:
                whole = whole.tensor_split(2, dim=1 if ".w2." in name else 0)[rank]
            torch.testing.assert_close(found, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("n, world_size", [(0, 2), (1, 3), (7, 3), (8, 4)])
def test_chunks_are_those_of_tensor_split(n, world_size):
    sizes = collectives.chunk_sizes(n, world_size)
    assert sizes == [len(chunk) for chunk in torch.zeros(n).tensor_split(world_size)]


# --------------------------------------------------------------------------------------------------
# The processes


def test_workers_are_started_once_and_have_one_thread():
    first, second = on_ranks("environment"), on_ranks("environment")
    assert first == second and first["threads, rank 0"] == 1 and first["world, rank 1"] == 2
    assert first["process, rank 0"] != first["process, rank 1"]


def test_a_hang_is_found_and_the_workers_are_replaced():
    before = on_ranks("environment")
    seen = ranks.observe((PROGRAMS, "wait_for_ever"), sockets.own())
    assert seen["error"].startswith("hangs: rank 1 waits in barrier (rank_programs.py:")
    assert seen["error"].endswith("rank 0 has ended")
    after = on_ranks("environment")
    assert after["process, rank 1"] != before["process, rank 1"]


def test_ranks_that_sleep_and_work_do_not_hang():
    assert on_ranks("busy") == {"rank, rank 0": 0, "rank, rank 1": 1}


def test_an_endless_loop_is_stopped(monkeypatch):
    monkeypatch.setattr(probes, "LIMIT_SECONDS", 0.5)
    seen = ranks.observe((PROGRAMS, "endless"), sockets.own())
    assert probes.timed_out(seen)


def test_a_process_that_ends_is_a_mismatch():
    seen = ranks.observe((PROGRAMS, "crash"), sockets.own())
    assert probes.kind(seen) == "mismatch"
    on_ranks("environment")


def test_the_file_of_a_learner_is_used_on_every_rank(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        textwrap.dedent(
            """
            import torch.distributed as dist

            def average_gradients_(parameters):
                for parameter in parameters:
                    if parameter.grad is not None:
                        dist.all_reduce(parameter.grad)
            """
        )
    )
    with swap.using("mine.py"):
        verdict = judge.judge(judge.load("data_parallel"), sockets.own())
    assert verdict.status == "failed" and verdict.mistake.name == "gradients are summed"
    Path("mine.py").write_text(
        "def average_gradients_(parameters):\n    raise NotImplementedError('average')\n"
    )
    with swap.using("mine.py"):
        assert judge.judge(judge.load("data_parallel"), sockets.own()).status == "not started"


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# a task that needs no piece, so that workers import little
RANK = """
from torch import distributed
from llm_basics.runs import rank_worker
rank_worker.main(start, lambda task: ("seen", distributed.get_rank()), lambda name: None)
"""


@pytest.mark.slow
def test_without_fork_each_worker_is_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(rank_pool, "FORKS", False)
    pool = rank_pool.Pool(RANK)
    try:
        assert pool.run({}, 2, "", 60.0) == [("seen", 0), ("seen", 1)]
        assert [process.pid for process in pool._processes] == pool._pids
    finally:
        pool.close()
    assert all(process.poll() is not None for process in pool._processes)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_process_is_left_when_the_parent_is_killed():
    code = """
        from llm_basics.runs import rank_pool
        sleeps = "lambda task: __import__('time').sleep(600)"
        none = "lambda name: None"
        program = f"from llm_basics.runs import rank_worker; rank_worker.main(start, {sleeps}, {none})"
        rank_pool.ALL_IDLE = 10**6
        pool = rank_pool.Pool(program)
        for rank in range(2):
            pool._start(rank, "")
        print(*pool._pids, pool._processes[0].pid, flush=True)
        pool.run({}, 2, "", 600.0)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 3 and all(map(is_running, pids))
    time.sleep(0.3)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if is_running(pid)]


def test_a_piece_from_nowhere_is_refused():
    with swap.replaced({"data_parallel.average_gradients_": lambda parameters: None}):
        with pytest.raises(ValueError, match="a file or the catalogue"):
            ranks.describe(sockets.own())


def test_a_process_that_forked_has_workers_of_its_own():
    assert ranks.pool() is ranks.pool() is ranks._pool_of(os.getpid())
