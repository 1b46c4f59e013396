"""Threads that work together: some that share work, and loops on several threads that meet on the way."""

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
    """Threads that wait for work beside the one that asks."""
    return concurrent.futures.ThreadPoolExecutor(n, "loops")


def parallel_map(work: Callable[[int], Any], n_threads: int) -> list[Any]:
    """What `work` returns for each number below `n_threads`: done at the same time, the first by the caller.

    Whatever happens, no thread works on when this ends.
    """
    others = [helpers(n_threads - 1).submit(work, number) for number in range(1, n_threads)]
    try:
        first = work(0)
    finally:
        concurrent.futures.wait(others)
    return [first, *(other.result() for other in others)]


if hasattr(os, "register_at_fork"):
    # a process has but one thread when it begins
    os.register_at_fork(after_in_child=helpers.cache_clear)

# tries to see the others arrive, some microseconds, before a thread offers its core to somebody else
TRIES = 10_000

# of the system, where there is one of that name
offer_core = types.ExternalFunction("sched_yield", types.int32())
CAN_MEET = hasattr(os, "sched_yield")


@intrinsic
def count_up(_context, counter):  # type: ignore[no-untyped-def]
    """Add 1 to the first number of an array, which other threads may do just now; returns what it was."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", data, context.get_constant(types.int64, 1), "seq_cst")

    return types.int64(counter), generate


@intrinsic
def counted(_context, counter):  # type: ignore[no-untyped-def]
    """The first number of an array as other threads have left it, and all that they wrote before it."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load_atomic(data, "acquire", 8)

    return types.int64(counter), generate


@numba_jit.jit
def barrier(counter: Any, size: int) -> None:
    """Wait until `size` threads are here, and with that many for the next time.

    `counter` begins as two zeros. Where the second is no more, somebody will not come: nobody waits.
    """
    if size == 1:
        return
    everybody = (count_up(counter) // size + 1) * size
    tries = 0
    while counted(counter) < everybody and counter[1] == 0:
        tries += 1
        if tries > TRIES:
            offer_core()
