"""Checks of versions, processor, memory, disk and files for training, and of known-bad combinations."""

import hashlib
import importlib.metadata
import locale
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from llm_basics import swap
from llm_basics.cli import subcommands
from llm_basics.core import device, files
from llm_basics.doctor import checks
from llm_basics.runs import process
from llm_basics.training import memory

# before 2.10 reading a checkpoint of others may run its code (CVE-2026-24747)
OLDEST_TORCH = (2, 10)

# before 2.4 several operations returned wrong values on MPS (pytorch#107294)
OLDEST_TORCH_ON_MPS = (2, 4)

# compute capability of the first GPUs with bfloat16 (Ampere)
BFLOAT16_CAPABILITY = (8, 0)

# network file systems, which may lack locks and have a slow fsync
NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "lustre", "gpfs", "beegfs", "ceph", "fuse.sshfs"}

# bytes written to measure a disk; minimum free bytes, and minimum bytes per second
SAMPLE_BYTES, LEAST_FREE, LEAST_SPEED = 1 << 24, 1 << 30, 10e6

# NCCL and dataloaders with several processes share memory through /dev/shm; 64 MB by default in containers
LEAST_SHARED = 1 << 28

# files of GPT-2's tokenizer in tiktoken's cache
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = ("vocab.bpe", "encoder.json")


def check(options: subcommands.DoctorCheck) -> Iterator[checks.Check]:
    """All checks of the machine; raises ValueError if the device is not available."""
    yield from versions(torch.__version__)
    yield from accelerator(device.choose(options.device), torch.__version__)
    yield kernels()
    n_cores = len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else os.cpu_count() or 1
    yield threads(n_cores, os.environ.get("OMP_NUM_THREADS", ""))
    yield load(n_cores, os.getloadavg()[0])
    yield from memory_limits(Path("/proc/meminfo"), memory.available(torch.device("cpu")))
    yield from shared_memory(Path("/dev/shm"))
    yield from disk(Path(options.runs))
    yield caches(swap.kernel_cache(), tempfile.gettempdir())
    yield encoding(locale.getpreferredencoding(False))
    yield tokenizer_files(os.environ)


# --------------------------------------------------------------------------------------------------
# Versions and accelerator


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version.

    >>> release("2.9.1+cu128")
    (2, 9, 1)
    """
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def versions(torch_version: str) -> Iterator[checks.Check]:
    """Versions of Python and packages."""
    yield checks.Check("python", checks.OK, f"{platform.python_version()} on {platform.platform()}")
    advice = "uv sync --upgrade-package torch: reading a checkpoint of others may run code (CVE-2026-24747)"
    found = f"{torch_version}, CUDA {torch.version.cuda or 'none'}"
    yield checks.check("torch", found, advice, release(torch_version) < OLDEST_TORCH, checks.ERROR)
    installed = {each.metadata["Name"].lower(): each.version for each in importlib.metadata.distributions()}
    found = ", ".join(f"{name} {installed.get(name, 'none')}" for name in ("numpy", "numba", "triton"))
    yield checks.Check("packages", checks.OK, found)


def accelerator(chosen: torch.device, torch_version: str) -> Iterator[checks.Check]:
    """The device that `auto` selects, and combinations known to fail."""
    if chosen.type == "cuda":
        capability = torch.cuda.get_device_capability(chosen)
        free, total = torch.cuda.mem_get_info(chosen)
        found = f"{torch.cuda.get_device_name(chosen)}, capability {'.'.join(map(str, capability))}, "
        yield bfloat16(found + f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free", capability)
    elif chosen.type == "mps":
        advice = "upgrade torch or train with --train.device cpu: several operations were wrong"
        yield checks.check("accelerator", "mps", advice, release(torch_version) < OLDEST_TORCH_ON_MPS)
    else:
        has_gpu = Path("/proc/driver/nvidia").exists() or Path("/dev/nvidia0").exists()
        advice = "update the driver, or install the torch of its CUDA version: the GPU is not usable"
        found = f"none used, {process.describe(chosen)['device']}"
        yield checks.check("accelerator", found, advice, has_gpu and not torch.cuda.is_available())


def bfloat16(found: str, capability: tuple[int, int]) -> checks.Check:
    """Whether a GPU multiplies bfloat16."""
    advice = "train with --train.dtype float32: bfloat16 is emulated before capability 8.0"
    return checks.check("accelerator", found, advice, capability < BFLOAT16_CAPABILITY)


def kernels() -> checks.Check:
    """The number of functions that fast kernels replace."""
    lines: list[str] = []
    with swap.using("fast", log=lines.append):
        found = f"fast kernels for {len(swap.fast_pieces())} functions"
    return checks.check("kernels", found, "; ".join(lines), bool(lines))


# --------------------------------------------------------------------------------------------------
# Processor and memory


def threads(n_cores: int, requested: str) -> checks.Check:
    """The number of torch's threads relative to cores."""
    number = int(requested) if requested.isdigit() else torch.get_num_threads()
    advice = f"set OMP_NUM_THREADS to at most {n_cores}: threads that share a core wait for each other"
    return checks.check("threads", f"{number} for {n_cores} cores", advice, number > n_cores)


def load(n_cores: int, average: float) -> checks.Check:
    """The load by other programs."""
    advice = "other programs use the cores: training will be slower, and measured times are not comparable"
    return checks.check("load", f"{average:.1f} for {n_cores} cores", advice, average > n_cores / 2)


def memory_limits(meminfo: Path, available: int | None) -> Iterator[checks.Check]:
    """Free memory, and limits below it: those of containers and of `ulimit -v`."""
    if available is None:
        return
    sizes = dict(re.findall(r"(Mem\w+): +(\d+) kB", files.read_text(meminfo)))
    total, free = (int(sizes[name]) * 1024 for name in ("MemTotal", "MemAvailable"))
    found = f"{available / 1e9:.1f} GB available, the machine has {total / 1e9:.1f}"
    advice = "raise the limit of the container (docker --memory) or ulimit -v, or plan with this amount"
    yield checks.check("memory", found, advice, available < 0.8 * free)


def shared_memory(folder: Path) -> Iterator[checks.Check]:
    """Size of the memory that processes share."""
    if folder.is_dir():
        free = files.free_bytes(folder)
        advice = "raise it (docker --shm-size 1g): training on several GPUs of one machine fails without"
        yield checks.check("shared", f"{free / 1e6:,.0f} MB in {folder}", advice, free < LEAST_SHARED)


# --------------------------------------------------------------------------------------------------
# Disk and files


def disk(folder: Path) -> Iterator[checks.Check]:
    """Free space, speed and file system of the disk of run directories."""
    free = files.free_bytes(folder)
    parent = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    found = f"{free / 1e9:.1f} GB free for {folder}/"
    advice = "free some, or choose another --run_dir: a run without space stops at its next checkpoint"
    yield checks.check("disk", found, advice, free < LEAST_FREE)
    if free > 2 * SAMPLE_BYTES and os.access(parent, os.W_OK):
        speed = write_speed(parent)
        advice = "choose a --run_dir on a local disk, or raise --train.checkpoint_every"
        yield checks.check("disk speed", f"{speed / 1e6:.0f} MB/s with fsync", advice, speed < LEAST_SPEED)
    elif not os.access(parent, os.W_OK):
        yield checks.Check("disk speed", checks.ERROR, f"{parent} cannot be written", "choose a --run_dir")
    if (mounts := Path("/proc/mounts")).is_file():
        kind = file_system(parent.resolve(), files.read_text(mounts))
        advice = "choose a local --run_dir: locks and fsync of network file systems are slow or missing"
        yield checks.check("file system", kind, advice, kind in NETWORK)


def write_speed(folder: Path) -> float:
    """Bytes per second of writing a file to `folder` with fsync."""
    content = os.urandom(SAMPLE_BYTES)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return SAMPLE_BYTES / (time.perf_counter() - start)


def file_system(path: Path, mounts: str) -> str:
    """The kind of the file system of a path, from the lines of /proc/mounts.

    >>> file_system(Path("/home/a"), "/dev/sda / ext4 rw 0 0\\nserver:/x /home nfs4 rw 0 0")
    'nfs4'
    """
    rows: Iterable[list[str]] = (line.split() for line in mounts.splitlines())
    kinds = {Path(row[1]): row[2] for row in rows if len(row) > 2}
    return next((kinds[folder] for folder in (path, *path.parents) if folder in kinds), "unknown")


def caches(folder: str, temporary: str) -> checks.Check:
    """The cache folder of compiled CPU kernels."""
    advice = "set NUMBA_CACHE_DIR to a permanent folder: each program compiles kernels again, for about 10 s"
    is_source_temporary = Path(__file__).is_relative_to(temporary)
    is_bad = not folder or (Path(folder).is_relative_to(temporary) and not is_source_temporary)
    return checks.check("caches", folder or "no folder for kernels", advice, is_bad)


def encoding(name: str) -> checks.Check:
    """The encoding of text on this system."""
    is_bad = name.upper().replace("-", "") != "UTF8"
    return checks.check("encoding", name, "set PYTHONUTF8=1: output is not UTF-8 otherwise", is_bad)


def tokenizer_files(environment: os._Environ[str] | dict[str, str]) -> checks.Check:
    """Whether GPT-2's tokenizer is on this machine; `bytes` and `bpe` need no files."""
    default = Path(tempfile.gettempdir()) / "data-gym-cache"
    folder = Path(environment.get("TIKTOKEN_CACHE_DIR") or environment.get("DATA_GYM_CACHE_DIR") or default)
    names = [hashlib.sha1(f"{GPT2_URL}{name}".encode()).hexdigest() for name in GPT2_FILES]
    is_there = all((folder / name).is_file() for name in names)
    found = f"gpt2 {'is' if is_there else 'is not'} in {folder}"
    # tiktoken downloads missing files, unless a folder without them was set explicitly
    is_bad = not is_there and bool(environment.get("TIKTOKEN_CACHE_DIR"))
    advice = "copy tiktoken's files there, or unset TIKTOKEN_CACHE_DIR to download them"
    return checks.check("tokenizers", found, advice, is_bad)
