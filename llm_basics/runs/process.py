"""Settings of a training or generation process: hardware, determinism, memory and garbage collection."""

import contextlib
import ctypes
import gc
import os
import platform
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

# parameters of glibc's mallopt: minimum size of mapped memory, and free memory kept at the top of the heap
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1

# Linux's MADV_HUGEPAGE, the size of a large page, and the bytes to be backed by large pages
MADV_HUGEPAGE, PAGE_BYTES, RESERVED_BYTES = 14, 1 << 21, (1 << 30) - (1 << 21)


def describe(device: torch.device) -> dict[str, Any]:
    """The hardware and versions that bitwise results depend on."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    return {
        "device": f"{device.type} ({name})",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def make_deterministic() -> None:
    """Allow only deterministic algorithms; others raise RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the initialization of CUDA
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def tune_allocator() -> None:
    """Make glibc keep freed memory instead of returning it to the system, and use large pages.

    Each step allocates and frees the same megabytes, and memory from the system is mapped and zeroed again:
    keeping it halves the time of GELU and its gradient (768 x 512 elements, 2 cores).

    A TLB has entries for a few thousand pages: with 4 KB each it misses most of a small model, with 2 MB it
    covers all of it. Decoding that reads 49 MB per token became 8% faster.
    """
    if sys.platform.startswith("linux"):
        # other C libraries lack mallopt
        with contextlib.suppress(AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
            libc.malloc.restype = ctypes.c_void_p
            # untouched memory is free of cost; after it is freed, it is allocated first
            if reserved := libc.malloc(ctypes.c_size_t(RESERVED_BYTES)):
                first = -(-reserved // PAGE_BYTES) * PAGE_BYTES
                length = (reserved + RESERVED_BYTES - first) // PAGE_BYTES * PAGE_BYTES
                libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), MADV_HUGEPAGE)
                libc.free(ctypes.c_void_p(reserved))


@contextlib.contextmanager
def gc_frozen() -> Iterator[None]:
    """Exclude existing objects (model, optimizer, modules) from garbage collection within the block.

    A full collection traverses every object of the program, and may run between any two steps.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error; on a CPU torch raises a plain RuntimeError for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


def random_state(device: torch.device) -> list[torch.Tensor]:
    """The state of the random number generators: of the CPU, and of `device` if it is a GPU."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_state(state: list[torch.Tensor], device: torch.device) -> None:
    """Restore a state of `random_state`."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def all_random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of all random generators used in training: tensors, and JSON values for Python and NumPy."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "rng.torch": torch.get_rng_state(),
        "rng.python": torch.tensor(numbers, dtype=torch.int64),
        "rng.numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
    }
    if torch.cuda.is_available():
        tensors |= {f"rng.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        tensors["rng.mps"] = torch.mps.get_rng_state()
    return tensors, {"python": [version, gauss], "numpy": [kind, position, has_gauss, cached]}


def restore_all_random_states(tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """Restore the random generators from the tensors and JSON values of a checkpoint."""
    torch.set_rng_state(tensors["rng.torch"])
    version, gauss = rest["python"]
    random.setstate((version, tuple(tensors["rng.python"].tolist()), gauss))
    kind, *numbers = rest["numpy"]
    np.random.set_state((kind, tensors["rng.numpy"].numpy().astype(np.uint32), *numbers))
    for index in range(torch.cuda.device_count()):
        if (state := tensors.get(f"rng.cuda.{index}")) is not None:
            torch.cuda.set_rng_state(state, index)
    if "rng.mps" in tensors and torch.backends.mps.is_available():
        torch.mps.set_rng_state(tensors["rng.mps"])
