"""Figures of common GPUs, from their data sheets (dense, without sparsity), and of this CPU, measured."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llm_basics.cli import parse
from llm_basics.training import memory

# GB/s of the link between unknown cards: PCIe 4
LINK = 32.0


@dataclass(frozen=True)
class Card:
    """Memory in GB, peak TFLOP/s of matrix products, GB/s of its memory and of its link in one direction."""

    memory: float
    tflops: float
    bandwidth: float
    link: float
    bfloat16: bool = True
    """Whether it multiplies bfloat16; else the peak is that of float32."""


CARDS = {
    "B200": Card(180, 2250, 8000, 900),
    "H200": Card(141, 989, 4800, 450),
    "H100": Card(80, 989, 3350, 450),
    "H100-PCIe": Card(80, 756, 2000, 64),
    "A100-80GB": Card(80, 312, 2039, 300),
    "A100-40GB": Card(40, 312, 1555, 300),
    "L40S": Card(48, 362, 864, 32),
    "L4": Card(24, 121, 300, 32),
    "A10G": Card(24, 70, 600, 32),
    "RTX5090": Card(32, 210, 1792, 64),
    "RTX4090": Card(24, 165, 1008, 32),
    "RTX3090": Card(24, 71, 936, 32),
    "V100": Card(32, 15.7, 900, 150, bfloat16=False),
    "T4": Card(16, 8.1, 320, 16, bfloat16=False),
}


def chosen(name: str | None, gigabytes: float | None, tflops: float | None) -> tuple[Card, str]:
    """The card `name`, with figures replaced if given, and its description. Raises ValueError if unknown.

    >>> chosen("l4", 20, None)[1]
    'L4 of 20 GB'
    """
    names = {each.lower(): each for each in CARDS}
    known = names.get((name or "").lower())
    if name is not None and known is None:
        raise ValueError(parse.unknown_name("GPU", name, list(CARDS)))
    card = CARDS[known] if known else Card(0, 0, 0, LINK)
    card = dataclasses.replace(card, memory=gigabytes or card.memory, tflops=tflops or card.tflops)
    return card, f"{known or 'GPU'} of {card.memory:g} GB"


def measured_cpu() -> tuple[Card, str]:
    """This CPU: its free memory, and FLOP/s and bytes/s of a short product and copy."""
    a, n_flops = torch.rand(768, 768), 2 * 768**3
    tflops = n_flops / best_seconds(lambda: a @ a) / 1e12
    source = torch.empty(1 << 24)
    bandwidth = 2 * source.nbytes / best_seconds(source.clone) / 1e9
    free = memory.available(torch.device("cpu"))
    if free is None:
        raise ValueError("--gpu_memory must be given, since the free memory of this system is unknown")
    name = f"this CPU, {tflops:.2f} TFLOP/s and {bandwidth:.1f} GB/s measured, {free / 1e9:.1f} GB free"
    return Card(free / 1e9, tflops, bandwidth, LINK, bfloat16=False), name


def best_seconds(work: Callable[[], object], rounds: int = 5) -> float:
    """The minimum time over several rounds."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
