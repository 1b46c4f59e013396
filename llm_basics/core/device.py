"""Where to compute, and how precisely."""

import contextlib
import ctypes
import gc
import os
import platform
import sys
from collections.abc import Iterator
from typing import Any

import torch

# from glibc's malloc.h: what is larger is asked of the system; what is free above is given back to it
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1

# from Linux's mman.h: let memory have large pages; their size, and how much is to have them
HUGEPAGE, PAGE, RESERVED = 14, 1 << 21, (1 << 30) - (1 << 21)

# floating-point operations in a step of a small model, whose kernels are over before the next is started: at
# 1.2 * 10^12 a step took an H200 8 to 11 ms by graphs, 17 to 20 without
MOST_GRAPHED = 2e12

# devices that compute while the program goes on, whose results are read a step later
ASYNCHRONOUS = {"cuda"}


def choose(name: str) -> torch.device:
    """The device called `name`; for "auto" the first of cuda, mps and cpu that is there.

    Raises ValueError if it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the device must be there and usable, got {name} ({reason}); try auto") from None
    return torch.device(name)


def precision(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """Inside, multiply in bfloat16 if `dtype` says so, or is "auto" and CUDA can; weights stay float32."""
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" or (dtype == "auto" and has_bfloat16):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def matmul_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if `device` has instructions that multiply it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    return torch.float32


def compile_mode(how: str, device: torch.device, n_flops: int, can_be_graph: bool) -> str:
    """What `train.compile` comes to on `device`, for steps of `n_flops`: off, on or graphs.

    Raises ValueError for graphs that cannot be.
    """
    if how == "graphs" and device.type != "cuda":
        raise ValueError(f"train.compile graphs needs CUDA, got the device {device}; try on or auto")
    if how != "auto":
        return how
    if device.type != "cuda":
        return "off"
    return "graphs" if can_be_graph and n_flops <= MOST_GRAPHED else "on"


def describe(device: torch.device) -> dict[str, Any]:
    """What the last bit of a result depends on besides program and settings."""
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
    """Allow only algorithms that give the same result each time; others raise RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def tune_allocator() -> None:
    """Let this program keep the memory that tensors give back, where glibc would return it to the system.

    Each step takes and frees the same megabytes. What comes from the system must be mapped and filled with
    zeros again: GELU and its gradient took half the time without that (768 x 512 numbers, 2 cores).

    And where a page of memory lies, a processor knows of some thousand pages. With 4 KB each it must look up
    the others again and again; with 2 MB it knows where all of a small model is. Loops that read 49 MB for
    each token write 8% more of them.
    """
    if sys.platform.startswith("linux"):
        # other C libraries of Linux have no such function
        with contextlib.suppress(AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
            libc.malloc.restype = ctypes.c_void_p
            # what nobody writes to costs nothing; once free, it is the next to be given out
            if reserved := libc.malloc(ctypes.c_size_t(RESERVED)):
                first = -(-reserved // PAGE) * PAGE
                length = (reserved + RESERVED - first) // PAGE * PAGE
                libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), HUGEPAGE)
                libc.free(ctypes.c_void_p(reserved))


@contextlib.contextmanager
def gc_frozen() -> Iterator[None]:
    """Inside, the garbage collector passes over all that there is now: a model, its optimizer, the modules.

    A full collection looks through every object of the program, and may come between any two steps.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def random_state(device: torch.device) -> list[torch.Tensor]:
    """Where the random numbers of a step begin: on the CPU, and on `device` if it is a GPU."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_state(state: list[torch.Tensor], device: torch.device) -> None:
    """Begin there again."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is not enough; on a CPU torch has no class of its own for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
