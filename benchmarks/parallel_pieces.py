"""Cost of data parallelism and FSDP written by hand against PyTorch's: two gloo processes, one thread each.

uv run python benchmarks/parallel_pieces.py
"""

import argparse
import json
import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import parallel

from llm_basics.core import config, model, optim
from llm_basics.core import functional as F
from llm_basics.systems import data_parallel, fsdp

WORLD_SIZE, BATCH, LR = 2, 8, 1e-3


class Contender:
    """A wrapped model, its optimizer, and what its owner calls after backward."""

    def __init__(self, name: str, shape: config.ModelConfig) -> None:
        torch.manual_seed(0)
        lm = model.TransformerLM(shape)
        self.name, self.finish = name, lambda: None
        if name == "ours: data parallel":
            self.model: Any = data_parallel.DistributedDataParallel(lm)
            self.finish = self.model.finish_gradient_synchronization
        elif name == "PyTorch's DDP":
            self.model = parallel.DistributedDataParallel(lm)
        elif name == "ours: FSDP":
            self.model = fsdp.FullyShardedDataParallel(lm)
        elif name == "PyTorch's fully_shard":
            mesh = device_mesh.init_device_mesh("cpu", (WORLD_SIZE,))
            for block in lm.layers:
                fully_shard(block, mesh=mesh)
            self.model = fully_shard(lm, mesh=mesh)
        else:
            self.model = lm
        self.optimizer = optim.AdamW(self.model.parameters(), lr=LR)
        self.losses: list[float] = []

    def step(self, tokens: torch.Tensor) -> float:
        """Seconds of one step on this rank."""
        dist.barrier()
        started = time.perf_counter()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        self.finish()
        self.optimizer.step()
        seconds = time.perf_counter() - started
        self.losses.append(float(loss.detach()))
        return seconds


PAIRS = (("ours: data parallel", "PyTorch's DDP"), ("ours: FSDP", "PyTorch's fully_shard"))


def work(rank: int, port: int, options: argparse.Namespace) -> None:
    """Time all contenders on one rank; rank 0 prints."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    shape = config.ModelConfig(
        options.vocab_size, options.context_length, options.d_model, options.n_layers, n_heads=4
    )
    generator = torch.Generator().manual_seed(rank)
    names = ["no communication", *(name for pair in PAIRS for name in pair)]
    contenders = [Contender(name, shape) for name in names]
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(options.warmup + options.steps):
        tokens = torch.randint(options.vocab_size, (BATCH, options.context_length + 1), generator=generator)
        # in turns, so that a busy moment of the machine meets all of them
        for contender in contenders[i % len(names) :] + contenders[: i % len(names)]:
            seconds = contender.step(tokens)
            if i >= options.warmup:
                times[contender.name].append(seconds)
    if rank == 0:
        report(times, {c.name: c.losses for c in contenders})
    dist.destroy_process_group()


def report(times: dict[str, list[float]], losses: dict[str, list[float]]) -> None:
    """Print the median of the ratios of steps side by side, and how far the losses are apart."""
    result = {}
    for ours, theirs in PAIRS:
        ratios = [a / b for a, b in zip(times[ours], times[theirs], strict=True)]
        apart = max(abs(a - b) for a, b in zip(losses[ours], losses[theirs], strict=True))
        result[f"{ours} / {theirs}"] = round(statistics.median(ratios), 3)
        result[f"largest difference in loss, {ours}"] = apart
    result |= {f"median ms: {name}": round(1e3 * statistics.median(t), 2) for name, t in times.items()}
    print(json.dumps(result, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (
        *(("steps", 60), ("warmup", 5), ("d_model", 128), ("n_layers", 4)),
        *(("context_length", 64), ("vocab_size", 512)),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    # a port that is free now
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    mp.spawn(work, (port, parser.parse_args()), nprocs=WORLD_SIZE)


if __name__ == "__main__":
    main()
