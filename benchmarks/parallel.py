"""Training in several processes: equality with one process, and what it costs.

    uv run python benchmarks/parallel.py same        losses of 50 steps by processes, strategy, accumulation
    uv run python benchmarks/parallel.py same --compile on
    uv run python benchmarks/parallel.py scaling     two processes of one thread against one
    uv run python benchmarks/parallel.py cost        ddp and fsdp2 against none, on a GPU if any

Each run is a program of its own, started by torchrun, with the source of Python's library as text.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

SHAPE = "--model.vocab_size 512 --model.d_model 64 --model.n_layers 2 --model.n_heads 2"
LARGER = "--model.vocab_size 512 --model.d_model 256 --model.n_layers 4 --model.n_heads 4"
GPU = "--config gpt2-small --tokenizer bpe --model.vocab_size 4096"


@dataclass(frozen=True)
class Same:
    """Compare the losses of 50 steps with those of one process, for the same global batch."""

    compile: str = "off"
    """train.compile."""
    optimizer: str = "adamw"
    """train.optimizer; muon multiplies in bfloat16 on processors that have it."""
    sizes: tuple[int, ...] = (1, 2, 4)
    """Numbers of processes."""


@dataclass(frozen=True)
class Scaling:
    """Tokens per second of two processes with one thread each over twice those of one."""

    rounds: int = 3
    """Runs of each kind, alternating."""


@dataclass(frozen=True)
class Cost:
    """Time of a step with ddp and fsdp2 in a single process, over that without."""

    rounds: int = 3
    """Runs of each kind, alternating."""


def train(folder: Path, n_processes: int, arguments: str, threads: int = 1) -> list[dict[str, float]]:
    """The lines of metrics of a run; `n_processes` 0: without torchrun."""
    command = sys.executable
    if n_processes:
        command += f" -m torch.distributed.run --standalone --nproc_per_node {n_processes}"
    command += f" -m llm_basics.train --run_dir {folder} --data_dir {folder.parent}/data {arguments}"
    command += " --train.eval_every 100000 --train.eval_batches 1 --train.sample_tokens 1"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command.split(), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(entries: list[dict[str, float]]) -> list[float]:
    """Training losses, step by step, then validation losses."""
    return [e["train_loss"] for e in entries if "train_loss" in e] + [
        e["val_loss"] for e in entries if "val_loss" in e
    ]


def step_seconds(entries: list[dict[str, float]]) -> float:
    """The median time of a step, without the first ones."""
    return statistics.median(e["step_seconds"] for e in entries[3:] if "step_seconds" in e)


def same(home: Path, options: Same) -> None:
    """Print the largest difference of a loss by processes, strategy and accumulation."""
    print("| processes | strategy | accumulation | largest difference | bitwise |\n|---|---|---|---|---|")
    for accumulation in (1, 3):
        arguments = f"{SHAPE} --model.context_length 32 --train.batch_size 8 --train.steps 50"
        arguments += f" --train.log_every 1 --train.dtype float32 --train.compile {options.compile}"
        arguments += f" --train.optimizer {options.optimizer}"
        arguments += f" --train.grad_accumulation_steps {accumulation}"
        expected = losses(train(home / f"one-{accumulation}", 0, arguments))
        for size in options.sizes:
            for how in ("none", "ddp", "fsdp2") if size == 1 else ("ddp", "fsdp2"):
                run = home / f"{size}-{how}-{accumulation}"
                found = losses(train(run, size, f"{arguments} --train.parallel {how}"))
                differences = [abs(a - b) for a, b in zip(expected, found, strict=True)]
                is_same = "yes" if not any(differences) else "no"
                print(f"| {size} | {how} | {accumulation} | {max(differences):.1e} | {is_same} |", flush=True)


def scaling(home: Path, options: Scaling) -> None:
    """Print the efficiency of two processes with a batch of their own each."""
    arguments = f"{LARGER} --model.context_length 128 --train.steps 30 --train.log_every 1 --train.device cpu"
    for how in ("ddp", "fsdp2"):
        ratios = []
        for i in range(options.rounds):
            one = step_seconds(train(home / f"one-{how}-{i}", 1, f"{arguments} --train.batch_size 8"))
            several = f"{arguments} --train.batch_size 16 --train.parallel {how}"
            two = step_seconds(train(home / f"two-{how}-{i}", 2, several))
            ratios.append(one / two)
            print(
                f"{how}: one process {one:.3f} s a step, two {two:.3f} s, efficiency {ratios[-1]:.2f}",
                flush=True,
            )
        print(f"{how}: median efficiency {statistics.median(ratios):.2f}")


def cost(home: Path, options: Cost) -> None:
    """Print the time of a step of each strategy in one process over that without."""
    is_gpu = torch.cuda.is_available()
    arguments = f"{GPU} --train.batch_size 16" if is_gpu else f"{LARGER} --model.context_length 128"
    arguments += " --train.steps 40 --train.log_every 1"
    ratios: dict[str, list[float]] = {"ddp": [], "fsdp2": []}
    for i in range(options.rounds):
        base = step_seconds(train(home / f"none-{i}", 1, f"{arguments} --train.parallel none"))
        for how, found in ratios.items():
            seconds = step_seconds(train(home / f"{how}-{i}", 1, f"{arguments} --train.parallel {how}"))
            found.append(seconds / base)
    for how, found in ratios.items():
        print(f"{how}: {statistics.median(found):.3f} of none ({' '.join(f'{each:.3f}' for each in found)})")


def main() -> None:
    subcommand = tyro.conf.subcommand
    kinds = (
        Annotated[Same, subcommand("same")]
        | Annotated[Scaling, subcommand("scaling")]
        | Annotated[Cost, subcommand("cost")]
    )
    options = tyro.cli(kinds, description=__doc__)
    with tempfile.TemporaryDirectory() as home:
        {Same: same, Scaling: scaling, Cost: cost}[type(options)](Path(home), options)  # type: ignore[operator]


if __name__ == "__main__":
    main()
