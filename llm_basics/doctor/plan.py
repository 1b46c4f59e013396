"""Plan a run on other hardware: memory by component and strategy, the batch that fits, speed, command.

Weights, gradients, optimizer and activations of one device are estimated by `training.memory` with two and
three blocks on fake tensors, and extrapolated to more. Shards, communication and speed are computed.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from llm_basics import swap
from llm_basics.cli import subcommands
from llm_basics.core import config, presets, trainer
from llm_basics.data import prepare
from llm_basics.doctor import cards
from llm_basics.training import memory

# usable fraction of a GPU's memory: the rest is the CUDA context and fragmentation
USABLE = 0.9

# fraction of the peak FLOP/s in training: 0.59 measured for GPT-2 124M on an H200 (benchmarks/README.md)
UTILIZATION = 0.5

# maximum number of tokens per batch in an estimate
TOKENS = 8192

# bfloat16 logits per chunk of the GPU kernels (fast/trainer.py); estimates on fake tensors use the CPU's size
GPU_LOGITS_BYTES = 2 << 30

# bytes per weight that AdamW reads and writes in a step, in float32
OPTIMIZER_TRAFFIC = 28

# GB/s between a GPU and its host, and of the host's memory
HOST_LINK, HOST_MEMORY = 25.0, 20.0

ARITHMETIC = "shards, communication, offload, tokens/s"


@dataclass(frozen=True)
class Strategy:
    """Distribution of a model over devices, as options of `train`."""

    parallel: str
    activation_checkpointing: bool
    offload: bool = False

    @property
    def flags(self) -> str:
        """The options as command-line arguments."""
        given = [f"--train.parallel {self.parallel}"] if self.parallel != "none" else []
        given += ["--train.activation_checkpointing"] if self.activation_checkpointing else []
        return " ".join(given + (["--train.offload"] if self.offload else []))


@dataclass(frozen=True)
class Need:
    """Bytes on one device at the peak."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """All other tensors, with the logits."""
    logits: int
    """Activations that depend on the vocabulary."""
    evaluation: int
    """Activations of an evaluation, in which those of a step are freed."""
    communication: int = 0
    """Buckets of gradients (ddp), or gathered blocks and their gradients (fsdp2)."""
    host: int = 0
    """Host memory per device, with offload."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        states = self.weights + self.gradients + self.optimizer
        return states + max(self.activations, self.evaluation) + self.communication


@dataclass(frozen=True)
class Row:
    """A strategy, its memory at the batch of the config, the largest batch of a device, tokens/s, command."""

    strategy: Strategy
    need: Need
    batch_size: int
    tokens_per_second: float | None
    command: str


@dataclass(frozen=True)
class Plan:
    """The model and devices of a plan, and a row for each strategy."""

    model: str
    device: str
    n_devices: int
    usable: int
    batch_size: int
    rows: tuple[Row, ...]


def make(options: subcommands.DoctorPlan) -> Plan:
    """The plan for a config on a number of GPUs, or on this CPU. Raises ValueError for unknown names."""
    chosen = with_vocabulary(presets.load(options.config))
    is_cpu = options.gpu is None and options.gpu_memory is None
    card, name = (
        cards.measured_cpu() if is_cpu else cards.chosen(options.gpu, options.gpu_memory, options.tflops)
    )
    dtype = "bfloat16" if card.bfloat16 else "float32"
    if is_cpu and options.gpus > 1:
        raise ValueError(f"--gpu or --gpu_memory must be given for --gpus, got {options.gpus} and neither")
    # a GPU uses neither the CPU kernels nor the copies of a checkpoint
    settings = {"device": "cpu", "dtype": dtype, "compile": "off" if is_cpu else "on"}
    chosen = dataclasses.replace(chosen, train=dataclasses.replace(chosen.train, **settings))  # type: ignore[arg-type]
    usable = int(card.memory * 1e9 * (1.0 if is_cpu else USABLE))
    with swap.using("fast", log=lambda line: None):
        models = {on: needs(chosen, on) for on in (False, True)}
    rows = []
    for strategy in strategies(options.gpus, is_cpu):
        local = math.ceil(chosen.train.batch_size / options.gpus)
        of_batch = spread(models[strategy.activation_checkpointing], strategy, options.gpus, chosen)
        largest = largest_batch(lambda n, of=of_batch: of(n).total, usable)  # type: ignore[misc]
        speed = tokens_per_second(chosen, strategy, options.gpus, min(local, largest), card)
        rows.append(
            Row(strategy, of_batch(local), largest, speed, command(options, chosen, strategy, largest))
        )
    shape = chosen.model
    about = f"{options.config}: {shape.n_parameters:,} parameters, context {shape.context_length:,}, {dtype}"
    return Plan(about, name, options.gpus, usable, chosen.train.batch_size, tuple(rows))


def with_vocabulary(options: config.Config) -> config.Config:
    """Options with the vocabulary size of the tokenizer, if that is fixed."""
    if options.tokenizer == "bpe":
        return options
    # GPT-2's is known without a download
    size = 50257 if options.tokenizer == "gpt2" else prepare.load_tokenizer(options.tokenizer).vocab_size
    return dataclasses.replace(options, model=dataclasses.replace(options.model, vocab_size=size))


# --------------------------------------------------------------------------------------------------
# Memory


def needs(options: config.Config, is_recomputed: bool) -> Callable[[int], Need]:
    """The memory of one device as a function of its batch, from estimates of few blocks and two batches."""
    # memory is linear in the number of tokens, and estimates with few are faster
    high = max(2, min(options.train.batch_size, TOKENS // options.model.context_length))
    batches = (high // 2, high)
    found = {n: of_blocks(options, is_recomputed, n, options.model.vocab_size) for n in batches}
    without = of_blocks(options, is_recomputed, high, vocab_size=1)
    share = max(0.0, 1 - without["activations"] / found[high]["activations"])

    def of_batch(batch: int) -> Need:
        def line(kind: str) -> int:
            low, high = (found[n][kind] for n in batches)
            return round(low + (high - low) * (batch - batches[0]) / (batches[1] - batches[0]))

        activations, more = line("activations"), more_logits(options, batch)
        return Need(
            weights=line("parameters"),
            gradients=line("gradients"),
            optimizer=line("optimizer"),
            activations=activations + more,
            logits=round(share * activations) + more,
            evaluation=line("evaluation"),
        )

    return of_batch


def more_logits(options: config.Config, batch: int) -> int:
    """Bytes of logits on a GPU beyond those of an estimate; on a CPU the estimate has all of them."""
    if options.train.compile == "off":
        return 0
    n_logits = batch * options.model.context_length * options.model.padded_vocab_size
    return min(2 * n_logits, GPU_LOGITS_BYTES)


def of_blocks(
    options: config.Config, is_recomputed: bool, batch_size: int, vocab_size: int
) -> dict[str, int]:
    """Bytes of each kind for a batch, extrapolated from estimates of two and three blocks."""
    n, found = options.model.n_layers, []
    train = dataclasses.replace(options.train, activation_checkpointing=is_recomputed, batch_size=batch_size)
    for n_layers in sorted({min(n, 2), min(n, 3)}):
        model = dataclasses.replace(options.model, n_layers=n_layers, vocab_size=vocab_size)
        part = dataclasses.replace(options, model=model, train=train)
        ledger = memory.trial(part, trainer.make_optimizer, trainer.batch_loss)
        sizes = ledger.peak("training").kinds
        found.append(sizes | {"evaluation": ledger.peak("evaluation").activations})
    more = max(0, n - 3)
    return {kind: found[-1][kind] + more * (found[-1][kind] - found[0][kind]) for kind in found[0]}


def strategies(n_gpus: int, is_cpu: bool) -> list[Strategy]:
    """The strategies for a number of devices."""
    kinds = ("none",) if is_cpu or n_gpus == 1 else ("ddp", "fsdp2")
    found = [Strategy(kind, on) for kind in kinds for on in (False, True)]
    return found if is_cpu else found + [Strategy("fsdp2", on, offload=True) for on in (False, True)]


def spread(
    of_one: Callable[[int], Need], strategy: Strategy, n_gpus: int, options: config.Config
) -> Callable[[int], Need]:
    """The memory of each of several devices as a function of its batch."""
    total, block, rest = sizes(options)
    width = 2 if options.train.dtype == "bfloat16" else 4

    def of_batch(batch: int) -> Need:
        need = of_one(batch)
        if strategy.parallel == "ddp":
            return dataclasses.replace(need, communication=4 * total)
        if strategy.parallel == "none":
            return need
        kinds = ("weights", "gradients", "optimizer")
        shards = {kind: math.ceil(getattr(need, kind) / n_gpus) for kind in kinds}
        # gathered: the rest, this block and the next; gradients of the largest of them, and their shards' sum
        gathered = width * (rest + 2 * block) + (width + 4) * max(rest, block)
        if not strategy.offload:
            return dataclasses.replace(need, **shards, communication=gathered)
        on_host = sum(shards.values())
        return dataclasses.replace(
            need, weights=0, gradients=0, optimizer=0, communication=gathered, host=on_host
        )

    return of_batch


def sizes(options: config.Config) -> tuple[int, int, int]:
    """Weights of the model, of one block, and of all outside of blocks."""
    total = options.model.n_parameters
    more = dataclasses.replace(options.model, n_layers=options.model.n_layers + 1).n_parameters
    block = more - total
    return total, block, total - options.model.n_layers * block


def largest_batch(total: Callable[[int], int], usable: int) -> int:
    """The largest batch whose total is at most `usable`, for an increasing total; 0 if there is none."""
    if total(1) > usable:
        return 0
    high = 1
    while total(high) <= usable and high < 2**20:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(middle) <= usable else (low, middle)
    return low


# --------------------------------------------------------------------------------------------------
# Speed and command


def tokens_per_second(
    options: config.Config, strategy: Strategy, n_gpus: int, batch: int, card: cards.Card
) -> float | None:
    """Expected tokens/s of all devices; None if the peak is unknown or no batch fits.

    Communication overlaps with matrix products; the optimizer and offload do not.
    """
    if not batch or not card.tflops:
        return None
    shape = options.model
    total, block, _ = sizes(options)
    n_flops = shape.flops_per_token
    if strategy.activation_checkpointing:
        n_flops += (n_flops - 6 * shape.d_model * shape.padded_vocab_size) // 3
    tokens = batch * shape.context_length * options.train.grad_accumulation_steps
    products = tokens * n_flops / (card.tflops * 1e12 * UTILIZATION)
    width = 2 if options.train.dtype == "bfloat16" else 4
    shards = n_gpus if strategy.parallel == "fsdp2" else 1
    moved = {"none": 0, "ddp": 8 * total, "fsdp2": (2 * width + 4) * total}[strategy.parallel]
    n_moves = options.train.grad_accumulation_steps if strategy.parallel == "fsdp2" else 1
    links = n_moves * moved * (n_gpus - 1) / n_gpus / (card.link * 1e9)
    bandwidth = HOST_MEMORY if strategy.offload else card.bandwidth
    update = OPTIMIZER_TRAFFIC * total / shards / (bandwidth * 1e9) if bandwidth else 0.0
    offloaded = 8 * total / shards / (HOST_LINK * 1e9) if strategy.offload else 0.0
    return n_gpus * tokens / (max(products, links) + update + offloaded)


def command(options: subcommands.DoctorPlan, chosen: config.Config, strategy: Strategy, largest: int) -> str:
    """The training command with the config's tokens per step in batches that fit; "" if none fits."""
    if not largest:
        return ""
    train = chosen.train
    local = math.ceil(train.batch_size * train.grad_accumulation_steps / options.gpus)
    accumulation = math.ceil(local / min(largest, local))
    batch = math.ceil(local / accumulation)
    program = "python -m" if options.gpus == 1 else f"torchrun --nproc_per_node {options.gpus} -m"
    words = [f"uv run {program} llm_basics.train --config {options.config}", strategy.flags]
    words.append(f"--train.batch_size {batch * options.gpus}")
    words.append(f"--train.grad_accumulation_steps {accumulation}")
    return " ".join(word for word in words if word)


def describe(plan: Plan) -> str:
    """The plan as a table in GB, and one command for each strategy."""
    names: tuple[str, ...] = ("weights", "gradients", "optimizer", "activations", "logits", "evaluation")
    names += ("communication", "host", "total")
    short = ("weights", "grads", "optim", "activ", "logits", "eval", "comm", "host", "total")
    rows = [f"{'strategy':34}" + "".join(f"{name:>9}" for name in short) + f"{'batch':>8}{'tokens/s':>12}"]
    for row in plan.rows:
        flags = row.strategy.flags.replace("--train.", "").replace("activation_checkpointing", "recompute")
        sizes = "".join(f"{getattr(row.need, name) / 1e9:9.3f}" for name in names)
        speed = f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "-"
        rows.append(f"{flags or 'none':34}{sizes}{row.batch_size or 'none':>8}{speed:>12}")
    commands = "\n".join(row.command for row in plan.rows if row.command)
    return (
        f"model     {plan.model}\n"
        f"device    {plan.n_devices} x {plan.device}, {plan.usable / 1e9:.1f} GB usable\n"
        f"memory    GB of one device with a batch of {plan.batch_size} in all\n"
        f"          logits are part of activ; the larger of activ and eval counts in total\n"
        f"batch     the largest that fits one device\n"
        f"by        fake tensors: {', '.join(short[:6])}\n"
        f"          arithmetic only: {ARITHMETIC}\n\n"
        + "\n".join(rows)
        + (f"\n\n{commands}" if commands else "\n\nno strategy fits")
    )
