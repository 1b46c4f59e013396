"""FlashAttention by hand against torch's attention: time and memory by length of the text.

uv run python benchmarks/flash_attention.py           on a GPU the Triton kernels, on a CPU PyTorch
uv run python benchmarks/flash_attention.py --tune    first choose the tiles that are fastest on this GPU

Forward and backward of causal attention, medians of several rounds in which the implementations alternate.
Memory beyond the inputs: on a GPU the peak by torch's count, on a CPU what is saved for the backward pass.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as tF

from llm_basics.core import functional as F
from llm_basics.systems import flash_attention

SEED = 1337
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The reference of `core`, which stores the scores."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def by_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's fused attention; a head axis lets it choose its FlashAttention."""
    heads = (tensor.unsqueeze(1) for tensor in (query, key, value))
    return tF.scaled_dot_product_attention(*heads, is_causal=True).squeeze(1)


def implementations(device: torch.device) -> dict[str, Attention]:
    """What is compared on a device, by name."""
    found: dict[str, Attention] = {"torch": by_torch, "plain": plain}
    if device.type == "cuda":
        from llm_basics.systems import flash_triton

        found["triton"] = lambda q, k, v: flash_triton.FlashAttentionTriton.apply(q, k, v, True)
    else:
        found["pytorch"] = lambda q, k, v: flash_attention.FlashAttention.apply(q, k, v, True)
    return found


def one_round(attention: Attention, inputs: list[Tensor], weighting: Tensor) -> tuple[float, int]:
    """Seconds of forward and backward, and the bytes beyond the inputs."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    on_gpu = inputs[0].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = attention(*leaves)
    torch.autograd.grad(output, leaves, weighting)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    own = {leaf.data_ptr() for leaf in leaves}
    n_saved = sum(size for pointer, size in saved.items() if pointer not in own)
    return seconds, torch.cuda.max_memory_allocated() - before if on_gpu else n_saved


def inputs_of(args: argparse.Namespace, length: int) -> list[Tensor]:
    """Query, key, value and the gradient of the output."""
    torch.manual_seed(SEED)
    shape = args.batch, length, args.d_head
    return [torch.randn(*shape, device=args.device, dtype=getattr(torch, args.dtype)) for _ in range(4)]


def tune(args: argparse.Namespace) -> None:
    """Set the tiles of the Triton kernels to those that are fastest at the longest length."""
    from llm_basics.systems import flash_triton

    *inputs, weighting = inputs_of(args, max(args.lengths))
    attention, seconds = implementations(args.device)["triton"], {}
    for tiles in itertools.product((32, 64, 128), (32, 64, 128)):
        flash_triton.QUERIES, flash_triton.KEYS = tiles
        try:
            one_round(attention, inputs, weighting)  # compiles
        except Exception as error:
            print(f"tiles {tiles}: {type(error).__name__}, {str(error).splitlines()[0][:80]}")
            continue
        seconds[tiles] = min(one_round(attention, inputs, weighting)[0] for _ in range(3))
        print(f"tiles {tiles}: {1000 * seconds[tiles]:.2f} ms")
    flash_triton.QUERIES, flash_triton.KEYS = min(seconds, key=lambda tiles: seconds[tiles])
    print(f"chosen: {flash_triton.QUERIES} queries, {flash_triton.KEYS} keys")


def compare(args: argparse.Namespace, length: int) -> list[dict]:
    """One row for each implementation that has enough memory."""
    *inputs, weighting = inputs_of(args, length)
    rounds: dict[str, list[tuple[float, int]]] = {}
    compared = implementations(args.device)
    for number in range(args.rounds + 1):
        for name, attention in list(compared.items()):
            try:
                result = one_round(attention, inputs, weighting)
            except torch.OutOfMemoryError:
                compared.pop(name)
                continue
            if number:  # the first round compiles
                rounds.setdefault(name, []).append(result)
    rows = []
    for name, results in rounds.items():
        seconds, n_bytes = (statistics.median(values) for values in zip(*results, strict=True))
        rows.append({"length": length, "implementation": name, "seconds": seconds, "bytes": n_bytes})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--batch", type=int, default=16 if on_gpu else 1)
    parser.add_argument("--d_head", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if on_gpu else "cpu"))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args()
    args.lengths = args.lengths or ([512, 1024, 2048, 4096, 8192, 16384] if on_gpu else [128, 256, 512, 1024])
    if args.tune:
        tune(args)
    rows = []
    print("| length | implementation | ms | MiB beyond the inputs | time / torch |\n|---|---|---|---|---|")
    for length in args.lengths:
        found = compare(args, length)
        own = next((row["seconds"] for row in found if row["implementation"] == "torch"), float("nan"))
        for row in found:
            cells = [length, row["implementation"], f"{1000 * row['seconds']:.2f}"]
            cells += [f"{row['bytes'] / 2**20:.2f}", f"{row['seconds'] / own:.2f}"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
        rows += found
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
