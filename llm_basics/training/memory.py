"""Estimate the memory of training before the first step, without allocating it.

The real model is trained for two steps, evaluated and saved on fake tensors, which have shapes but no data; a
ledger records when each storage would be allocated and freed.
"""

import dataclasses
import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.utils import _python_dispatch, _pytree

from llm_basics.core import config, device
from llm_basics.core import functional as F
from llm_basics.core import model as models
from llm_basics.inference import adapters
from llm_basics.training import activation_checkpointing

# --------------------------------------------------------------------------------------------------
# Memory of a training step


@dataclass(frozen=True)
class Estimate:
    """Bytes allocated at the peak, by kind."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """All other tensors: those saved for the backward pass, and temporaries."""
    checkpoint: int = 0
    """Copies of weights and optimizer state that are written to a file."""
    heap: float = 1.0
    """Resident memory per byte of tensors, due to fragmentation of the heap."""

    @property
    def kinds(self) -> dict[str, int]:
        """The bytes of each kind."""
        return {kind: size for kind, size in dataclasses.asdict(self).items() if kind != "heap"}

    @property
    def total(self) -> int:
        """Bytes of tensors at the peak."""
        return sum(self.kinds.values())

    @property
    def resident(self) -> int:
        """Bytes of resident memory."""
        return round(self.heap * self.total)


# copies of weights and optimizer states in writing a checkpoint: as bytes of each tensor, and of the file
COPIES = 2

# `heap` on a CPU: on six shapes 1.08 to 1.35 with CPU training kernels, which keep their buffers, and 1.25 to
# 1.89 with torch (glibc)
HEAP_OF_KERNELS, HEAP_OF_TORCH = 1.18, 1.55

# the error factor of an estimate on a CPU
ERROR = 1.25

# no estimate is needed if the lower bound is below the available memory by this factor
FAR = 300

OptimizerMaker = Callable[[models.TransformerLM, config.TrainConfig], torch.optim.Optimizer]
LossOfBatch = Callable[[models.TransformerLM, Tensor, Tensor, float], Tensor]

# autograd accumulates gradients with these: in place, except under a dispatch mode
aten = torch.ops.aten
IN_PLACE = {aten.add.Tensor, aten.scatter_add.default, aten.index_add.default, aten.index_put.default}


class Ledger(_python_dispatch.TorchDispatchMode):
    """Record each storage that an operation allocates, and when its last tensor is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.heap = 1.0
        self.entries: list[tuple[int, int]] = []  # storage number and bytes, negative when freed
        self.pending: list[tuple[int, int]] = []
        self.kinds: dict[int, str] = {}
        self.phases: dict[str, tuple[int, int]] = {}  # range of entries of each
        self.numbers: dict[int, int] = {}  # numbers of the allocated storages, by id()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._settle()
        if func is aten._local_scalar_dense.default:
            return 0  # the value of .item() on a fake tensor
        result = func(*args, **(kwargs or {}))
        # a sum is recorded after its terms are freed
        in_place = func in IN_PLACE and torch._C._current_graph_task_id() != -1
        for tensor in _pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self.numbers:
                entry = (len(self.entries) + len(self.pending), storage.nbytes())
                self.numbers[id(storage)] = entry[0]
                (self.pending if in_place else self.entries).append(entry)
                weakref.finalize(storage, self._forget, id(storage), entry).atexit = False
        return result

    def _forget(self, identity: int, entry: tuple[int, int]) -> None:
        del self.numbers[identity]
        if entry in self.pending:
            self._settle()
        self.entries.append((entry[0], -entry[1]))

    def _settle(self) -> None:
        self.entries += self.pending
        self.pending = []

    def end_phase(self, name: str) -> None:
        """Assign the entries since the last phase to phase `name`."""
        self._settle()
        begun = max((end for _, end in self.phases.values()), default=0)
        self.phases[name] = begun, len(self.entries)

    def label(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """Label the storages of `tensors`; storages without a label are activations."""
        for tensor in tensors:
            if tensor is not None:
                self.kinds[self.numbers[id(tensor.untyped_storage())]] = kind

    def peak(self, phase: str | None = None) -> Estimate:
        """The sizes at the peak of the total, within one phase or all."""
        first, end = self.phases[phase] if phase else (0, len(self.entries))
        live: Counter[str] = Counter()
        most: dict[str, int] = {}
        total = highest = 0
        for index, (number, size) in enumerate(self.entries):
            live[self.kinds.get(number, "activations")] += size
            total += size
            if total > highest and first <= index < end:
                highest, most = total, dict(live)
        return Estimate(**{kind: most.get(kind, 0) for kind in Estimate(0, 0, 0, 0).kinds}, heap=self.heap)


def trial(options: config.Config, make_optimizer: OptimizerMaker, batch_loss: LossOfBatch) -> Ledger:
    """The ledger of two training steps, an evaluation and a checkpoint.

    In the second step the optimizer state exists. Raises ValueError if the device is not available.
    """
    train = options.train
    chosen = device.choose(train.device)
    half = isinstance(device.precision(chosen, train.dtype), torch.autocast)
    # fake tensors are on the device cpu, so autocast must be, too
    with fake_tensor.FakeTensorMode(), Ledger() as ledger:
        model = models.TransformerLM(options.model)
        if options.lora.rank is not None:
            adapters.apply(model, options.lora, options.model.padded_vocab_size)
        if train.activation_checkpointing:
            activation_checkpointing.apply(model)
        if chosen.type != "cpu" or train.compile == "on":
            # as in a compiled model, which does not use the CPU kernels
            vars(model)["hidden_states"] = getattr(model, "hidden_states", None)
        optimizer = make_optimizer(model, train)
        ledger.label("parameters", model.parameters())
        inputs = torch.zeros(train.batch_size, options.model.context_length, dtype=torch.long)
        targets = torch.zeros_like(inputs)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            # the second batch accumulates into existing gradients, as do all later ones
            for _ in range(min(train.grad_accumulation_steps, 2)):
                with torch.autocast("cpu", torch.bfloat16, enabled=half):  # as trainer.accumulate_gradients
                    loss = batch_loss(model, inputs, targets, train.z_loss) * 1.0
                is_by_kernels = "CPULoss" in str(loss.grad_fn.next_functions[0][0])  # type: ignore[union-attr]
                loss.backward()
                ledger.label("gradients", [p.grad for p in model.parameters()])
            optimizer.step()
            # a variable would keep these tensors alive
            ledger.label("optimizer", _tensors_of(optimizer))
        del loss
        ledger.end_phase("training")
        logits: Tensor | None = None
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            # as evaluate.evaluate, which has the logits of two batches at once; the kernels have none
            for _ in range(0 if is_by_kernels else 2):
                logits = F.to_float32(model.eval()(inputs))
                F.cross_entropy(logits, targets)
        del logits
        ledger.end_phase("evaluation")
        if chosen.type == "cpu":
            ledger.heap = HEAP_OF_KERNELS if is_by_kernels else HEAP_OF_TORCH
            n_bytes = sum(x.nbytes for x in (*model.parameters(), *_tensors_of(optimizer)))
            copies = torch.empty(COPIES * n_bytes, dtype=torch.uint8)
            ledger.label("checkpoint", [copies])
    ledger._settle()
    return ledger


def _tensors_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))


def estimate(options: config.Config, make_optimizer: OptimizerMaker, batch_loss: LossOfBatch) -> Estimate:
    """The peak memory of a training step; `options.model.vocab_size` must be the final one.

    `make_optimizer` and `batch_loss` are those of `trainer`.

    Counts tensors and, on a CPU, heap fragmentation; excludes the program, torch and the CUDA context. Raises
    ValueError if the device is not available.
    """
    return trial(options, make_optimizer, batch_loss).peak()


class NotEnoughMemory(Exception):
    """Raised for a run that exceeds the available memory."""


def check(options: config.Config, estimate: Callable[[config.Config], Estimate | None]) -> None:
    """Raise NotEnoughMemory if a run certainly exceeds the available memory, for any vocabulary.

    The weights, and one tensor per block, are an immediate lower bound. If it is not far below the available
    memory, an estimate on a CPU, divided by its error factor, is a better one.
    """
    chosen = device.choose(options.train.device)
    model, free = options.model, available(chosen)
    # the weights and, unless they are frozen, their gradients and AdamW's two running means
    weights = (16 if options.lora.rank is None else 4) * dataclasses.replace(model, vocab_size=1).n_parameters
    needed = weights + 4 * model.n_layers * options.train.batch_size * model.context_length * model.d_model
    if free is None or needed * FAR < free:
        return
    if needed <= free and chosen.type == "cpu":
        needed = int(_of_few_blocks(options, estimate) / ERROR)
    if needed > free:
        raise NotEnoughMemory(refusal(needed, weights, free))


def refusal(needed: int, weights: int, free: int) -> str:
    """The error message for a run that needs `needed` bytes, of which `weights` are not for activations."""
    flags = "--model.d_model or --model.n_layers" if 2 * weights > needed else "--train.batch_size"
    return (
        f"training needs at least {needed / 1e9:,.1f} GB of memory ({weights / 1e9:,.1f} for weights, "
        f"gradients and optimizer), {free / 1e9:,.1f} are free; lower {flags}"
    )


def _of_few_blocks(options: config.Config, estimate: Callable[[config.Config], Estimate | None]) -> int:
    """A lower bound of the estimate with a vocabulary of 1, extrapolated from few blocks.

    A maximum of sums that are linear in the number of blocks is convex, so extrapolation from two points
    underestimates it.
    """
    n, totals = options.model.n_layers, []
    for n_layers in (min(n, 2), min(n, 3)):
        model = dataclasses.replace(options.model, vocab_size=1, n_layers=n_layers)
        found = estimate(dataclasses.replace(options, model=model))
        totals.append(found.resident if found else 0)
    return totals[1] + max(0, n - 3) * (totals[1] - totals[0])


def describe(estimate: Estimate, options: config.Config, free: int | None = 0) -> str:
    """The estimate by kind; if it may exceed `free` bytes, also the options that reduce it.

    One option per line, the most effective first.

    >>> print(describe(Estimate(10**9, 0, 2 * 10**9, 10**8), config.Config()))
    memory    3.1 GB of tensors at the peak: 1.0 parameters, 2.0 optimizer, 0.1 activations
              to reduce it, lower
              --model.d_model or --model.n_layers
              --train.batch_size (raise --train.grad_accumulation_steps)
              --model.context_length
              or add --train.activation_checkpointing
    """
    unit, name = (10**9, "GB") if estimate.total >= 10**8 else (10**6, "MB")
    parts = {kind: size / unit for kind, size in estimate.kinds.items()}
    shown = ", ".join(f"{size:.1f} {part}" for part, size in parts.items() if size >= 0.05)
    flags = ["--model.context_length", "--model.d_model or --model.n_layers"]
    if options.train.batch_size > 1:
        flags.insert(0, "--train.batch_size (raise --train.grad_accumulation_steps)")
    if estimate.total > 2 * estimate.activations:
        flags.insert(0, flags.pop())
    total = f"{estimate.total / unit:.1f} {name} of tensors at the peak"
    if estimate.heap > 1:
        total += f" ({estimate.resident / unit:.1f} {name} of the process)"
    lines = [f"memory    {total}: {shown}"]
    if free is not None and estimate.resident * ERROR > free:
        lines += ["to reduce it, lower", *flags]
        lines += [] if options.train.activation_checkpointing else ["or add --train.activation_checkpointing"]
    return f"\n{' ' * 10}".join(lines)


# --------------------------------------------------------------------------------------------------
# Available memory


def available(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on `device`; None if unknown.

    On a CPU the minimum of the machine's available memory, its control groups' limits (containers) and
    `ulimit -v`; on CUDA the free memory, plus unused memory of torch's allocator.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return None
    import resource  # Unix only

    limits = []
    if found := re.search(r"MemAvailable:\s+(\d+) kB", _read(Path("/proc/meminfo"))):
        limits.append(int(found[1]) * 1024)
    limits += _left_in_groups(Path("/sys/fs/cgroup"), _read(Path("/proc/self/cgroup")))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        limits.append(limit - int(_read(Path("/proc/self/statm")).split()[0]) * resource.getpagesize())
    return max(min(limits), 0) if limits else None


def _left_in_groups(root: Path, memberships: str) -> list[int]:
    """Bytes left in each control group of a process, version 2 or 1; file cache counts as free."""
    names = {
        "": (root, "memory.max", "memory.current", r"^inactive_file (\d+)"),
        "memory": (
            root / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            r"^total_inactive_file (\d+)",
        ),
    }
    left = []
    for line in memberships.splitlines():
        _, kinds, path = line.split(":", 2)
        for kind in names.keys() & set(kinds.split(",")):
            base, limit, usage, pattern = names[kind]
            inner = base / path.lstrip("/")
            for folder in (inner, *inner.parents):
                most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
                if folder.is_relative_to(base) and most.isdigit() and used.isdigit():
                    cached = re.search(pattern, _read(folder / "memory.stat"), re.MULTILINE)
                    left.append(int(most) - int(used) + (int(cached[1]) if cached else 0))
    return left


def _read(path: Path) -> str:
    """The text of a file; "" if it does not exist or is not readable."""
    try:
        return path.read_text()
    except OSError:
        return ""
