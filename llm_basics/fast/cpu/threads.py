"""A thread pool, and a spinning barrier for kernels that run on several threads."""

import concurrent.futures
import functools
import os
from collections.abc import Callable
from typing import Any

from numba.core import types
from numba.extending import intrinsic

from llm_basics.fast import numba_jit


@functools.cache
def helpers(n: int) -> concurrent.futures.ThreadPoolExecutor:
    """A pool of `n` worker threads, in addition to the calling thread."""
    return concurrent.futures.ThreadPoolExecutor(n, "kernels")


def parallel_map(work: Callable[[int], Any], n_threads: int) -> list[Any]:
    """`[work(0), ..., work(n_threads - 1)]`, in parallel; the calling thread runs the first.

    Returns, or raises, only after all threads have finished.
    """
    others = [helpers(n_threads - 1).submit(work, number) for number in range(1, n_threads)]
    try:
        first = work(0)
    finally:
        concurrent.futures.wait(others)
    return [first, *(other.result() for other in others)]


if hasattr(os, "register_at_fork"):
    # threads do not survive a fork
    os.register_at_fork(after_in_child=helpers.cache_clear)

# a thread spins for some microseconds before it yields its core
MAX_SPINS = 10_000

# POSIX only
sched_yield = types.ExternalFunction("sched_yield", types.int32())
CAN_MEET = hasattr(os, "sched_yield")


@intrinsic
def fetch_add(_context, counter):  # type: ignore[no-untyped-def]
    """Atomically add 1 to the first element of an int64 array; returns the old value."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", data, context.get_constant(types.int64, 1), "seq_cst")

    return types.int64(counter), generate


@intrinsic
def load_acquire(_context, counter):  # type: ignore[no-untyped-def]
    """The first element of an array, loaded with acquire ordering."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load_atomic(data, "acquire", 8)

    return types.int64(counter), generate


@numba_jit.jit
def barrier(counter: Any, size: int) -> None:
    """Wait until `size` threads have arrived; reusable with the same number of threads.

    `counter` starts as two zeros. A nonzero second element (a thread failed) releases all threads.
    """
    if size == 1:
        return
    target = (fetch_add(counter) // size + 1) * size
    spins = 0
    while load_acquire(counter) < target and counter[1] == 0:
        spins += 1
        if spins > MAX_SPINS:
            sched_yield()
