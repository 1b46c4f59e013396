"""Benchmarks training throughput in tokens per second against transformers and torch's layers.

uv run --group benchmark python benchmarks/train.py                        a small GPT-2, on the CPU
uv run --group benchmark python benchmarks/train.py --shape llama --threads 1 2
uv run --group benchmark python benchmarks/train.py --shape gpt2 --device cuda

All contenders have the same initial weights, random tokens, batch size, precision, loss, AdamW and gradient
clipping; their first losses must agree. Data loading, evaluation and checkpoints are excluded. Ours runs what
`python -m llm_basics.train` runs, with its process settings. transformers runs with its defaults, without
dropout and cache; its model computes the loss, so that torch.compile includes it. "torch.nn" is a GPT-2 of
torch's layers and fused attention, as in nanoGPT.

Each contender runs in a separate process, which sleeps while others are measured, in blocks of steps by
turns. The figure of a block is the median step, or on CUDA, where steps overlap, the mean. The peak rate of
matrix products is measured in the same turns. Compilers start with empty caches.
"""

import contextlib
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import peers
import torch
import tyro
import workers
from torch import Tensor

from llm_basics import swap
from llm_basics.cli import parse
from llm_basics.core import config, dataloader, device, trainer
from llm_basics.core import model as models
from llm_basics.runs import process
from llm_basics.training import diagnostics, monitor

CPU = config.ModelConfig(vocab_size=256, context_length=64, d_model=128, n_layers=4, n_heads=4)
LARGE = config.ModelConfig(
    vocab_size=50257, context_length=1024, d_model=768, n_layers=12, n_heads=12, vocab_multiple=64
)
GPT2: dict[str, Any] = {
    **{"norm": "layer", "position": "learned", "ffn": "gelu_tanh", "init": "gpt2"},
    **{"tie_embeddings": True, "bias": True},
}
# model config and batch size
SHAPES = {
    "cpu": (dataclasses.replace(CPU, **GPT2), 12),
    "llama": (CPU, 12),
    "gpt2": (dataclasses.replace(LARGE, **GPT2), 64),
    "llama-large": (LARGE, 64),
}
OURS = ("reference", "fast", "reference compiled", "fast compiled", "fast graphs")
THEIRS = ("transformers eager", "transformers compiled", "torch.nn eager", "torch.nn compiled")
PEAK = "products"

# a contender and its number of threads (0: torch's default)
Key = tuple[str, int]

# set by `python -m llm_basics.train` before torch is imported
ENVIRONMENT = {"GOMP_SPINCOUNT": "3000"}

# tolerance of the first losses (same batch, initial weights)
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-2}


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure training throughput, ours and transformers'."""

    shape: Literal["cpu", "llama", "gpt2", "llama-large"] = "cpu"
    """cpu: a GPT-2 of 0.8 million parameters; gpt2: 124 million; llama, llama-large: Llamas of these sizes"""
    device: str = "auto"
    """cuda, mps or cpu; auto: the first available."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward pass; auto: bfloat16 on CUDA, else float32."""
    threads: tuple[int, ...] = ()
    """Numbers of threads to measure; each contender's best counts. Default: torch's choice."""
    rounds: int = 5
    """Blocks per contender, in turns."""
    steps: int = 50
    """Timed steps per block."""
    warmup: int = 5
    """Untimed steps before each block."""
    batch_size: int | None = None
    """Sequences per step. Default: 12 or 64, by shape."""
    only: tuple[str, ...] = (*OURS, *THEIRS)
    """The contenders to measure."""
    same_process_settings: bool = False
    """Run transformers with our process settings: environment variables and allocator."""

    def __post_init__(self) -> None:
        if unknown := set(self.only) - {*OURS, *THEIRS}:
            raise ValueError(f"only must be of {', '.join((*OURS, *THEIRS))}; got {', '.join(unknown)}")
        if min(self.rounds, self.steps, self.warmup, *self.threads) < 1:
            raise ValueError("rounds, steps, warmup and threads must be at least 1")

    @property
    def contenders(self) -> list[str]:
        """The contenders in `only` that this device supports."""
        on_cuda = device.choose(self.device).type == "cuda"
        is_gpt2 = self.model.position == "learned"
        return [
            name
            for name in self.only
            if (on_cuda or not name.endswith("graphs")) and (is_gpt2 or not name.startswith("torch.nn"))
        ]

    @property
    def model(self) -> config.ModelConfig:
        return SHAPES[self.shape][0]

    @property
    def train(self) -> config.TrainConfig:
        """The common optimizer settings; the learning rate is nearly constant."""
        batch_size = self.batch_size or SHAPES[self.shape][1]
        return config.TrainConfig(10**6, batch_size, lr=6e-4, warmup_steps=0, dtype=self.dtype)

    @property
    def arithmetic(self) -> str:
        """The dtype of products."""
        chosen = device.choose(self.device)
        with device.precision(chosen, self.dtype):
            return "bfloat16" if torch.is_autocast_enabled(chosen.type) else "float32"


def main(options: Options) -> None:
    """Run all contenders and print a table."""
    shape, train = options.model, options.train
    print(
        f"{options.shape}: batch {train.batch_size}, context {shape.context_length}, {options.arithmetic}; "
        f"{options.rounds} rounds of {options.steps} steps\n{process.describe(device.choose(options.device))}"
    )
    with tempfile.TemporaryDirectory() as folder:
        peers.write_weights(options.model, Path(folder))
        with contextlib.ExitStack() as closing:
            started = {}
            for threads, name in itertools.product(options.threads or (0,), (*options.contenders, PEAK)):
                has_our_settings = name in OURS or (name in THEIRS and options.same_process_settings)
                started[name, threads] = workers.Worker(
                    measure,
                    (name, threads, has_our_settings, options, Path(folder)),
                    environment={"TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(dir=folder)}
                    | (ENVIRONMENT if has_our_settings else {}),
                )
                closing.callback(started[name, threads].close)
            results = take_turns(started, options)
    report(results, options)


def take_turns(started: dict[Key, workers.Worker], options: Options) -> dict[Key, list[dict[str, float]]]:
    """Each worker's startup, then its blocks. Raises ValueError if the first losses differ."""
    results = {key: [worker.request()] for key, worker in started.items()}
    losses = [startup["loss"] for startup, *_ in results.values() if "loss" in startup]
    if losses:
        if not max(losses) - min(losses) <= TOLERANCE[options.arithmetic]:
            raise ValueError(f"the first losses must agree, got {results}")
        print(f"first losses: from {min(losses):.6f} to {max(losses):.6f}")
    for _ in range(options.rounds):
        for key, worker in started.items():
            if workers.FAILED not in results[key][-1]:
                results[key].append(worker.request())
    return results


def report(results: dict[Key, list[dict[str, float]]], options: Options) -> None:
    """Print peak rates, and the table with each contender's best number of threads."""
    n_tokens = options.train.batch_size * options.model.context_length
    speeds = {
        key: statistics.median(n_tokens / block["seconds"] for block in blocks)
        for key, (_, *blocks) in results.items()
        if key[0] != PEAK and workers.FAILED not in results[key][-1]
    }
    peak = report_peak(results, options)
    plain = dataclasses.replace(options.model, vocab_multiple=1)
    flops = models.TransformerLM(plain, device="meta").flops_per_token()
    print(
        f"{flops:,} FLOPs per token: 6 per matmul parameter, plus 12 n_layers d_model context_length "
        "for attention"
    )
    if len(options.threads) > 1:
        print("tokens/s:", ", ".join(f"{name} x{n} {speed:,.0f}" for (name, n), speed in speeds.items()))
    print(
        f"\n| contender | threads | thousand tokens/s (all rounds) | {' | '.join(f'/ {t}' for t in THEIRS)} "
        "| utilization | peak memory | compile |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    best = {name: key for key in sorted(speeds, key=speeds.__getitem__) for name in key[:1]}
    for name in options.contenders:
        if (key := best.get(name)) is None:
            print(f"| {name} | | out of memory | | | | | | | |")
            continue
        start, *blocks = results[key]
        every = " ".join(f"{r:.1f}" for r in sorted(n_tokens / b["seconds"] / 1000 for b in blocks))
        ratios = [f"{speeds[key] / speeds[peer]:.2f}" if (peer := best.get(t)) else "-" for t in THEIRS]
        usual = start["steps"] * statistics.median(b["seconds"] for b in blocks)
        print(
            f"| {name} | {key[1] or 'default'} | {speeds[key] / 1000:.1f} ({every}) | {' | '.join(ratios)} "
            f"| {flops * speeds[key] / peak:.1%} | {blocks[-1]['peak'] / 1e6:,.0f} MB "
            f"| {max(0.0, start['seconds'] - usual):.1f} s |"
        )


def report_peak(results: dict[Key, list[dict[str, float]]], options: Options) -> float:
    """Print the FLOP/s of each engine; returns the highest at the contenders' precision."""
    rates: dict[str, float] = {}
    for (name, _), rounds in results.items():
        for engine in rounds[0] if name == PEAK else ():
            rate = statistics.median(result[engine] for result in rounds)
            rates[engine] = max(rate, rates.get(engine, 0.0))
    best = max((engine for engine in rates if engine.startswith(options.arithmetic)), key=rates.__getitem__)
    listing = ", ".join(f"{engine} {rate / 1e9:,.0f} GFLOP/s" for engine, rate in rates.items())
    print(f"matrix products: {listing}; utilization relative to {best}")
    return rates[best]


# --------------------------------------------------------------------------------------------------
# Worker processes


def measure(
    name: str, threads: int, has_our_settings: bool, options: Options, folder: Path
) -> Iterator[dict[str, float]]:
    """The results of one contender's process: its startup, then block by block."""
    if has_our_settings:
        process.tune_allocator()
    if threads:
        torch.set_num_threads(threads)
    if name == PEAK:
        kinds = dict.fromkeys(("float32", options.arithmetic))
        return workers.rates_of_products(device.choose(options.device), list(kinds))
    return measured_blocks(name, options, folder)


def measured_blocks(name: str, options: Options, folder: Path) -> Iterator[dict[str, float]]:
    """Yield the startup with compilation, then block by block."""
    chosen, train = device.choose(options.device), options.train
    random = torch.Generator().manual_seed(0)
    size = 32, train.batch_size, options.model.context_length + 1
    tokens = torch.randint(options.model.vocab_size, size, generator=random).to(chosen)
    pairs = [(batch[:, :-1], batch[:, 1:]) for batch in tokens]
    if name in THEIRS:
        pairs = [(inputs.contiguous(), targets.contiguous()) for inputs, targets in pairs]
    batches = itertools.cycle(pairs)
    if name in OURS:
        step = our_step(name, options, folder)
    else:
        step = peers.make_step(name, folder, chosen, options.model, train)
    start = time.perf_counter()
    loss = step(next(batches)).item()
    for _ in range(options.warmup):
        step(next(batches))
    workers.synchronize(chosen)
    started = {"loss": loss, "seconds": time.perf_counter() - start, "steps": 1 + options.warmup}
    workers.empty_cache(chosen)
    yield started
    while True:
        for _ in range(options.warmup):
            step(next(batches))
        workers.synchronize(chosen)
        seconds = []
        begin = time.perf_counter()
        for batch in itertools.islice(batches, options.steps):
            start = time.perf_counter()
            step(batch)
            seconds.append(time.perf_counter() - start)
        workers.synchronize(chosen)
        mean = (time.perf_counter() - begin) / options.steps
        workers.empty_cache(chosen)
        yield {
            "seconds": mean if chosen.type == "cuda" else statistics.median(seconds),
            "peak": workers.peak_memory(chosen),
        }


# --------------------------------------------------------------------------------------------------
# Our training step


def our_step(name: str, options: Options, folder: Path) -> Callable[[dataloader.Batch], Tensor]:
    """One step of `loop.fit` without data loading and logging."""
    if name.startswith("fast"):
        swap.use("fast", log=lambda line: None)
    chosen, train = device.choose(options.device), options.train
    model = peers.load_ours(options.model, folder).to(chosen).train()
    if name.endswith(("compiled", "graphs")):
        mode = "reduce-overhead" if name.endswith("graphs") else None
        vars(model)["hidden_states"] = torch.compile(model.hidden_states, dynamic=False, mode=mode)
    optimizer = trainer.make_optimizer(model, train)
    spikes, count = diagnostics.SpikeDetector(), itertools.count(1)
    pending: list[Callable[[], list[float]]] = []

    def step(batch: dataloader.Batch) -> Tensor:
        process.random_state(chosen)
        result = trainer.train_step(model, optimizer, [batch], next(count), train)
        pending.append(monitor.start_reading(result))
        # on a GPU, the metrics of the previous step
        if len(pending) > (chosen.type in device.ASYNCHRONOUS):
            spikes.z_score(pending.pop(0)()[0])
        return result.train_loss

    return step


if __name__ == "__main__":
    with parse.exit_on_error():
        main(tyro.cli(Options, description=__doc__))
