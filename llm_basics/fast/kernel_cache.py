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

# groups of kernels in the order of compilation, and about how many seconds each takes; the two chains share
# no kernel and are compiled side by side
CHAINS = ({"tokenizer": 8, "vocabulary": 8}, {"training": 12, "decoding": 12})

POLL_SECONDS = 0.05


# the processes that compile for this one, by group
_compilers: dict[str, subprocess.Popen[bytes]] = {}


@functools.cache
def folder() -> str:
    """The cache folder of this version of the source; "" for NUMBA_CACHE_DIR, or where none can be written.

    Numba checks the file of a function only, and would miss changes in what was inlined from other files.
    """
    here = Path(__file__).parent
    if os.environ.get("NUMBA_CACHE_DIR"):
        return ""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(here.rglob("*.py")))).hexdigest()
    return cache_folder.find(here, digest[:12])


def marker(group: str) -> Path:
    """The file that exists once a group is compiled."""
    return Path(folder()) / f"{group}.{sys.implementation.cache_tag}.compiled"


def is_compiled(group: str) -> bool:
    """Whether all kernels of a group are in the cache; without a cache folder, Numba takes care of it."""
    return not folder() or marker(group).exists()


def is_pending(group: str) -> bool:
    """Whether a group is being compiled for this process."""
    return group in _compilers and _compilers[group].poll() is None and not is_compiled(group)


def start_compiling(*groups: str) -> None:
    """Compile the groups that are missing, in a process for each chain; returns at once."""
    chains = [[group for group in chain if group in groups and not is_compiled(group)] for chain in CHAINS]
    missing = [group for chain in chains for group in chain]
    if not missing or any(map(is_pending, missing)):
        return
    seconds = max(sum(chain[group] for group in missing if group in chain) for chain in CHAINS)
    print(
        f"compiling CPU kernels (about {seconds} s, cached; disable with --fast off)",
        file=sys.stderr,
        flush=True,
    )
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    for chain in filter(None, chains):
        # where this process fails, the program compiles for itself and shows the error
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.precompile", *chain],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _compilers.update(dict.fromkeys(chain, process))


def start_for_training(tokenizer: str, device: str) -> None:
    """Compile what a training run with these options needs."""
    text = ("tokenizer", "vocabulary") if tokenizer == "bpe" else ("tokenizer",)
    start_compiling(*text, *(("training", "decoding") if device in ("auto", "cpu") else ()))


def wait(group: str) -> None:
    """Wait until a pending group is compiled, or its compiler has failed."""
    while is_pending(group):
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def locked(group: str) -> Iterator[None]:
    """Exclude other compilers of the group's chain; the system releases the lock of a process that dies."""
    first = next(name for chain in CHAINS if group in chain for name in chain)
    Path(folder()).mkdir(parents=True, exist_ok=True)
    with open(Path(folder()) / f"{first}.lock", "w") as file:
        with contextlib.suppress(ImportError):  # Windows: without a lock, two programs compile the same
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
