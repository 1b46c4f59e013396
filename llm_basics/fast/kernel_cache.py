"""The cache of compiled CPU kernels, and the processes that fill it while a program starts.

Results of code just compiled may differ in the last bits from those of the same code loaded from the cache: a
function with several callers is compiled in several versions, and which one is called depends on the order.
So a training run only loads kernels. They are compiled in separate processes (`precompile`), one for each
chain of groups, which start with the program and write a marker file after each group.
"""

import contextlib
import functools
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from llm_basics.fast import cache_folder

# groups of kernels in the order of compilation, with the approximate compile time in seconds; the two chains
# share no kernel and are compiled in parallel
CHAINS = ({"tokenizer": 8, "vocabulary": 8}, {"training": 12, "decoding": 12})

POLL_SECONDS = 0.05


# compiler processes started by this one, by group
_compilers: dict[str, subprocess.Popen[bytes]] = {}


@functools.cache
def folder() -> str:
    """The cache folder of this version of the source; "" with NUMBA_CACHE_DIR or without a writable folder.

    Numba checks only the file of a function, and would miss changes in code inlined from other files.
    """
    source = Path(__file__).parent
    if os.environ.get("NUMBA_CACHE_DIR"):
        return ""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(source.rglob("*.py")))).hexdigest()
    return cache_folder.find(source, digest[:12])


def marker(group: str) -> Path:
    """The file that exists once a group is compiled."""
    return Path(folder()) / f"{group}.{sys.implementation.cache_tag}.compiled"


def is_compiled(group: str) -> bool:
    """Whether all kernels of a group are in the cache; True without a cache folder of this package."""
    return not folder() or marker(group).exists()


def is_pending(group: str) -> bool:
    """Whether a process started by this one is compiling the group."""
    return group in _compilers and _compilers[group].poll() is None and not is_compiled(group)


def start_compiling(*groups: str) -> None:
    """Compile missing groups in the background, with one process per chain."""
    chains = [[group for group in chain if group in groups and not is_compiled(group)] for chain in CHAINS]
    missing = [group for chain in chains for group in chain]
    if not missing or any(map(is_pending, missing)):
        return
    seconds = max(sum(chain[group] for group in missing if group in chain) for chain in CHAINS)
    line = f"compiling CPU kernels (about {seconds} s, cached; disable with --fast off)"
    print(line, file=sys.stderr, flush=True)
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    for chain in filter(None, chains):
        # if this process fails, the caller compiles the kernels itself and reports the error
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.precompile", *chain],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _compilers.update(dict.fromkeys(chain, process))


def start_for_training(tokenizer: str, device: str) -> None:
    """Compile the groups for a training run with these options, in the background."""
    text = ("tokenizer", "vocabulary") if tokenizer == "bpe" else ("tokenizer",)
    start_compiling(*text, *(("training", "decoding") if device in ("auto", "cpu") else ()))


def wait(group: str) -> None:
    """Wait until a pending group is compiled or its compiler process has failed."""
    while is_pending(group):
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def locked(group: str) -> Iterator[None]:
    """Lock the group's chain against other compiler processes; the system releases a dead process's lock."""
    first = next(name for chain in CHAINS if group in chain for name in chain)
    Path(folder()).mkdir(parents=True, exist_ok=True)
    with open(Path(folder()) / f"{first}.lock", "w") as file:
        with contextlib.suppress(ImportError):  # Windows: no lock, so two processes may compile the same
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
