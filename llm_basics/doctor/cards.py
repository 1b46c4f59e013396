"""Figures of common GPUs, from their data sheets: dense, without sparsity."""

from dataclasses import dataclass


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
