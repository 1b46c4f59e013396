"""Distributed training under torchrun: environment, process group, collectives.

    uv run torchrun --nproc_per_node 2 -m llm_basics.train

In a single process every function of this module is the identity. No other module reads torchrun's
environment. Tensors on a CPU are exchanged through gloo, those on GPUs through NCCL.
"""

import contextlib
import datetime
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from llm_basics.core import config, dataloader, device
from llm_basics.runs import signals
from llm_basics.training import rendezvous

T = TypeVar("T")

# timeout for work of a single process while the others wait: preparing data, compiling, sampling, saving
PATIENCE = datetime.timedelta(hours=2)

# parts of the error message of a collective if another process has ended, or after a timeout
LOST = ("connection closed", "connection reset", "broken pipe", "connection refused", "socket")
LATE = ("timed out", "timeout")


@dataclass(frozen=True)
class World:
    """Size of the job and rank of this process; rank 0, the main process, logs and saves."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank among the processes of this machine."""
    local_size: int = 1
    restarts: int = 0
    """Number of restarts by torchrun."""
    max_restarts: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world() -> World:
    """The job from torchrun's environment variables; a single process without them."""
    defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    defaults |= {"TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0}
    try:
        return World(*(int(os.environ.get(name, value)) for name, value in defaults.items()))
    except ValueError as error:
        raise ValueError(f"{', '.join(defaults)} must be numbers, as torchrun sets them ({error})") from None


def strategy(train: config.TrainConfig) -> str:
    """Resolve `train.parallel`: none, ddp, fsdp2 or mine."""
    n_processes = world().size
    if train.parallel == "none" and n_processes > 1:
        raise ValueError(
            f"train.parallel must be ddp or fsdp2 in a job of {n_processes} processes, got none; start one "
            "process without torchrun instead"
        )
    if train.parallel == "auto":
        return "ddp" if n_processes > 1 else "none"
    return train.parallel


def check(options: config.Config) -> None:
    """Raise ValueError for options that do not work in this job."""
    train, job = options.train, world()
    resolved = strategy(train)
    if train.batch_size % job.size:
        raise ValueError(
            f"train.batch_size must be divisible by the number of processes, got {train.batch_size} and "
            f"{job.size}; it is the number of sequences of all processes together"
        )
    if train.sharded_checkpoints != "off" and resolved != "fsdp2":
        raise ValueError("--train.sharded_checkpoints needs --train.parallel fsdp2")
    if train.offload and (resolved != "fsdp2" or choose_device(train.device).type != "cuda"):
        raise ValueError("--train.offload needs --train.parallel fsdp2 and a GPU")
    if resolved == "none":
        return
    choose_device(train.device)
    if options.find_lr:
        raise ValueError("--find_lr must run in one process; start it without torchrun")
    if train.compile == "graphs":
        raise ValueError("train.compile graphs must run in one process; try train.compile on")
    if resolved == "mine" and options.mine is None:
        raise ValueError("--train.parallel mine needs --mine FILE with a class DistributedDataParallel")
    if job.max_restarts and options.run_dir is None and options.resume is None:
        raise ValueError("torchrun --max-restarts needs --run_dir, to find the checkpoints after a restart")


# --------------------------------------------------------------------------------------------------
# The process group


class _Job:
    """The CPU process groups of a joined job; `pids` are the processes on this machine."""

    is_restarted = False

    patient: Any = None
    """Group with the timeout PATIENCE."""
    saving: Any = None
    """Group for threads that write checkpoints."""
    seconds = PATIENCE.total_seconds()
    """Timeout of a collective."""
    pids: list[int] = []


def size() -> int:
    """Number of processes in the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process logs and saves."""
    return world().is_main


def is_restarted() -> bool:
    """Whether torchrun has restarted the job, on any machine."""
    return _Job.is_restarted


def local_pids() -> list[int]:
    """The process ids of the job on this machine."""
    return _Job.pids


def saving_group() -> Any:
    """The group for writing checkpoints."""
    return _Job.saving


def choose_device(name: str) -> torch.device:
    """`device.choose`; with several GPUs, the one of this process."""
    chosen = device.choose(name)
    job = world()
    if chosen.type != "cuda" or chosen.index is not None or job.local_size == 1:
        return chosen
    n_gpus = torch.cuda.device_count()
    if job.local_size > n_gpus:
        raise ValueError(
            f"each process needs a GPU, got {job.local_size} processes and {n_gpus} GPUs on this machine; "
            f"use torchrun --nproc_per_node {n_gpus}, or --train.device cpu"
        )
    return torch.device("cuda", job.local_rank)


@contextlib.contextmanager
def joined(train: config.TrainConfig) -> Iterator[None]:
    """Initialize the process group within the context."""
    job = world()
    if strategy(train) == "none":
        yield
        return
    signals.expect_launcher()
    share_threads(job)
    chosen = choose_device(train.device)
    settings: dict[str, Any] = {"backend": "gloo", "timeout": PATIENCE}
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        settings["backend"] = "cpu:gloo,cuda:nccl"
    single = dist.HashStore(), 0, 1  # a single process without torchrun
    store, rank, n = rendezvous.meet(PATIENCE) if "RANK" in os.environ else single
    dist.init_process_group(**settings, store=store, rank=rank, world_size=n)
    try:
        _Job.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        _Job.saving = dist.new_group(backend="gloo", timeout=PATIENCE)
        processes: list[Any] = [None] * job.size
        this_process = socket.gethostname(), os.getpid(), job.restarts
        dist.all_gather_object(processes, this_process, group=_Job.patient)
        _Job.pids = [pid for host, pid, _ in processes if host == socket.gethostname()]
        # each machine counts its own restarts
        _Job.is_restarted = any(restarts for *_, restarts in processes)
        yield
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def share_threads(job: World) -> None:
    """Divide the cores among the processes of this machine; torchrun's default is one thread each."""
    if job.local_size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        affinity = getattr(os, "sched_getaffinity", None)
        n_cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        torch.set_num_threads(max(1, n_cores // job.local_size))


def expect_steps(seconds: float) -> None:
    """Set the timeout of collectives to `seconds`, after the first step, which may compile."""
    if size() > 1 and seconds != _Job.seconds:
        _Job.seconds = seconds
        # the private name is that before torch 2.15
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        set_timeout(datetime.timedelta(seconds=seconds), dist.group.WORLD)


def describe() -> dict[str, Any]:
    """Properties that bitwise results depend on: the number of processes, which changes the order of sums."""
    return {"processes": size()}


ALONE = {"processes": 1}


def seed(run_seed: int, step: int, chosen: torch.device) -> None:
    """Seed the generators by run, step and rank, so that a resumed run repeats the random numbers."""
    if size() > 1:
        step_seed = int(np.random.SeedSequence((run_seed, step, world().rank)).generate_state(1)[0])
        torch.default_generator.manual_seed(step_seed)
        if chosen.type == "cuda":
            torch.cuda.default_generators[chosen.index or 0].manual_seed(step_seed)


# --------------------------------------------------------------------------------------------------
# Collectives


def mean(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    if size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / size()


def sums(values: list[float]) -> list[float]:
    """The sum of each number over all processes, in float64."""
    if size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def rows(batch: dataloader.Batch) -> dataloader.Batch:
    """The rows of a global batch for this process, a contiguous part.

    An empty part is replaced by the first row with all targets ignored.
    """
    n_processes, rank = size(), world().rank
    if n_processes == 1:
        return batch
    inputs, targets = batch
    part = slice(rank * len(inputs) // n_processes, (rank + 1) * len(inputs) // n_processes)
    if part.start == part.stop:
        return inputs[:1], torch.full_like(targets[:1], dataloader.IGNORE_INDEX)
    return inputs[part], targets[part]


def from_main(values: list[str]) -> list[str]:
    """Broadcast a list from the main process; its length first, since it is empty at most steps."""
    if size() == 1:
        return values
    n_values = torch.tensor([len(values)])
    dist.broadcast(n_values, 0)
    if not n_values:
        return []
    box: list[Any] = [values]
    dist.broadcast_object_list(box, 0, group=_Job.patient)
    return box[0]


def first_found(text: str, none: str) -> str:
    """The text of the first process whose text is not `none`, with its rank."""
    if size() == 1:
        return text
    texts: list[Any] = [None] * size()
    dist.all_gather_object(texts, text, group=_Job.patient)
    found = [f"rank {rank}: {each}" for rank, each in enumerate(texts) if each != none]
    return found[0] if found else none


def on_main(function: Callable[[], T]) -> T | None:
    """Run `function` in the main process while the others wait.

    Returns its result there, None elsewhere. Signals and errors of files or data are raised in all processes.
    """
    if size() == 1:
        return function()
    result, box = None, [None]
    if is_main():
        with signals.unshared():
            result, box[0] = _attempt(function)
    dist.broadcast_object_list(box, 0, group=_Job.patient)
    if box[0] is not None:
        raise box[0]
    return result


def main_first(function: Callable[[], T]) -> T:
    """The result of `function`, run first by the main process, which fills the caches that others read.

    Next is one process per machine, which may have its own disk. Errors are raised in all processes.
    """
    if size() == 1:
        return function()
    job, result = world(), None
    own_phase = 0 if job.is_main else 1 if job.local_rank == 0 else 2
    for phase in range(3):
        error: BaseException | None = None
        if phase == own_phase:
            result, error = _attempt(function)
        errors: list[Any] = [None] * job.size
        dist.all_gather_object(errors, error, group=_Job.patient)
        for each in filter(None, errors):
            raise each
    assert result is not None, "every process runs the function in one phase"
    return result


def _attempt(function: Callable[[], T]) -> tuple[T | None, Any]:
    """The result of `function`, or an error to raise in all processes."""
    try:
        return function(), None
    except (signals.Stopped, ValueError, OSError, FloatingPointError) as error:
        return None, error


@contextlib.contextmanager
def sharing_signals() -> Iterator[None]:
    """Within the context `signals.poll` is collective: a signal to one process stops all at the same step."""
    if size() == 1:
        yield
        return

    def agree(number: int) -> int:
        highest = torch.tensor([number])
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)

    with signals.shared(agree):
        yield
