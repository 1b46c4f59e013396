"""Python to machine code: Numba, told where to keep it, and some things that it cannot say by itself.

Numba counts the users of an array like Python does, with an atomic operation each time it hands one on. In
a loop over words that takes longer than the work, and threads wait for each other: what runs for each word
works on `borrowed` arrays, which are not counted. The caller of the outermost function keeps them alive.
"""

import functools
import hashlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

# what lets sums be taken in any order; infinities and what is not a number stay what they are
ANY_ORDER = {"reassoc", "contract", "nsz"}


def compiled(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """`function` in machine code: made at the first call, kept on disk, and run without Python's lock."""
    kept, numba.config.CACHE_DIR = numba.config.CACHE_DIR, numba.config.CACHE_DIR or _cache_folder()
    try:
        # tests wrap functions to check their annotations; machine code has no use for that
        return numba.njit(cache=True, nogil=True, **settings)(inspect.unwrap(function))
    finally:
        numba.config.CACHE_DIR = kept


def summing(function: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, with many partial sums side by side where one is asked for: as wide as the processor is."""
    # to look before each division whether it is by 0 would keep them apart
    return compiled(function, fastmath=ANY_ORDER, error_model="numpy")


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` copied into the machine code of its callers: for what is short and runs for each word."""
    return numba.njit(inline="always")(inspect.unwrap(function))


@functools.cache
def _cache_folder() -> str:
    """A folder for machine code that changes with any source file here; "" for where Numba keeps it.

    Numba looks at the file of a function alone, and would keep what was inlined into it from another one.
    """
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(here.glob("*.py")))).hexdigest()
    return str(here / "__pycache__" / digest[:12]) if os.access(here, os.W_OK) else ""


def used_before(module: str = "*") -> bool:
    """Whether machine code of this version (of one module) is there already."""
    return any(Path(_cache_folder()).rglob(f"{module}.*.nbc")) if _cache_folder() else True


@intrinsic
def borrowed(_context, value):  # type: ignore[no-untyped-def]
    """An array, or a named tuple of arrays, that is not counted as in use."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        def borrow(kind, one):  # type: ignore[no-untyped-def]
            array = context.make_array(kind)(context, builder, one)
            array.meminfo = cgutils.get_null_value(array.meminfo.type)
            array.parent = cgutils.get_null_value(array.parent.type)
            return array._getvalue()

        (kind,), (one,) = signature.args, arguments
        if not isinstance(kind, types.BaseTuple):
            return borrow(kind, one)
        members = [borrow(k, a) for k, a in zip(kind, cgutils.unpack_tuple(builder, one), strict=True)]
        return context.make_tuple(builder, kind, members)

    return value(value), generate


@intrinsic
def eight_bytes(_context, array, index):  # type: ignore[no-untyped-def]
    """The eight bytes from `index` on as one number, the first lowest; an array needs padding."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        number = context.get_value_type(types.uint64).as_pointer()
        loaded = builder.load(builder.bitcast(builder.gep(data, [arguments[1]]), number))
        loaded.align = 1
        return loaded

    return types.uint64(array, index), generate


@intrinsic
def floats_at(_context, address):  # type: ignore[no-untyped-def]
    """A pointer to the float32 numbers at an address, for `numba.carray`; their owner keeps them alive."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(address), generate


# numbers that `four_sums` takes from a row at a time
AT_ONCE = 32


@intrinsic
def four_sums(_context, rows, n, x):  # type: ignore[no-untyped-def]
    """The products of four rows of 8-bit numbers with `x`, of 16-bit numbers: their addresses, and how many
    numbers each has, a multiple of AT_ONCE.

    Two neighbours are multiplied and added to a sum of 32 bits: one instruction for sixteen or more pairs,
    which the compiler finds if it is said so, and does not in a loop.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        rows, n, x = arguments
        number, address = ir.IntType(32), ir.IntType(64)
        wide, pairs = ir.VectorType(number, AT_ONCE), ir.VectorType(number, AT_ONCE // 2)

        def load(start, bits):  # type: ignore[no-untyped-def]
            vector = ir.VectorType(ir.IntType(bits), AT_ONCE)
            loaded = builder.load(builder.inttoptr(start, vector.as_pointer()))
            loaded.align = 1
            return builder.sext(loaded, wide)

        def every_other(products, first):  # type: ignore[no-untyped-def]
            places = ir.Constant(pairs, list(range(first, AT_ONCE, 2)))
            return builder.shuffle_vector(products, products, places)

        sums = [cgutils.alloca_once_value(builder, ir.Constant(pairs, None)) for _ in range(4)]
        begin, step = ir.Constant(address, 0), ir.Constant(address, AT_ONCE)
        with cgutils.for_range_slice(builder, begin, n, step) as (i, _):
            numbers = load(builder.add(x, builder.add(i, i)), 16)
            start = builder.add(rows, i)
            for total in sums:
                products = builder.mul(load(start, 8), numbers)
                both = builder.add(every_other(products, 0), every_other(products, 1))
                builder.store(builder.add(builder.load(total), both), total)
                start = builder.add(start, n)
        name = f"llvm.vector.reduce.add.v{AT_ONCE // 2}i32"
        add = cgutils.get_or_insert_function(builder.module, ir.FunctionType(number, [pairs]), name)
        return context.make_tuple(
            builder, signature.return_type, [builder.call(add, [builder.load(total)]) for total in sums]
        )

    return types.UniTuple(types.int32, 4)(types.int64, types.int64, types.int64), generate


# --------------------------------------------------------------------------------------------------
# Threads that work together

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


@compiled
def meet(counter: Any, size: int) -> None:
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
