"""Python to machine code by Numba, cached on disk, with intrinsics that Numba lacks.

Numba counts references to arrays by atomic operations. What runs for each word uses `borrowed` arrays, which
are not counted; the caller of the outermost function keeps them alive.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import caching, cgutils, types
from numba.extending import intrinsic

from llm_basics.fast import cache_folder, kernel_cache

# what lets sums be taken in any order; infinities and what is not a number stay what they are
ANY_ORDER = {"reassoc", "contract", "nsz"}


def jit(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """Compile `function` at its first call, with an on-disk cache if possible, to run without the GIL."""
    # tests wrap functions to check their annotations; machine code has no use for that
    compiled = numba.njit(nogil=True, **settings)(inspect.unwrap(function))
    previous, numba.config.CACHE_DIR = numba.config.CACHE_DIR, numba.config.CACHE_DIR or kernel_cache.folder()
    try:
        compiled._cache = _Cache(compiled.py_func)
    except RuntimeError:  # no folder can be written
        cache_folder.warn_uncached(
            "no folder for a cache can be written; set NUMBA_CACHE_DIR to one that can"
        )
    finally:
        numba.config.CACHE_DIR = previous
    return compiled


class _Cache(caching.FunctionCache):
    """Numba's cache, but a disk that is full does not stop the program."""

    def save_overload(self, sig: Any, data: Any) -> None:
        """Save compiled code; what cannot be saved is compiled again by the next program."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            cache_folder.warn_uncached(f"{self.cache_path}: {error.strerror}")


def summing(function: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, with many partial sums side by side where one is asked for: as wide as the processor is."""
    # to look before each division whether it is by 0 would keep them apart
    return jit(function, fastmath=ANY_ORDER, error_model="numpy")


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` copied into the machine code of its callers: for what is short and runs for each word."""
    return numba.njit(inline="always")(inspect.unwrap(function))


@functools.cache
def used_before(module: str = "*") -> bool:
    """Whether the cache has kernels of this version (of one module)."""
    folder = kernel_cache.folder()
    return any(Path(folder).rglob(f"{module}.*.nbc")) if folder else True


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
def trailing_zeros(_context, number):  # type: ignore[no-untyped-def]
    """The number of zero bits below the lowest one of a uint64."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.cttz(arguments[0], context.get_constant(types.boolean, 0))

    return types.uint64(number), generate


@intrinsic
def floats_at(_context, address):  # type: ignore[no-untyped-def]
    """A pointer to the float32 numbers at an address, for `numba.carray`; their owner keeps them alive."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(address), generate


@inlined
def array(address: int, shape: tuple[int, ...]) -> Any:
    """The float32 numbers from an address on, as an array; their owner keeps them alive."""
    return numba.carray(floats_at(address), shape)


@inlined
def row(address: int, number: int, d: int) -> Any:
    """A row of a matrix of `d` columns that begins at an address."""
    return array(address + 4 * number * d, (d,))


# --------------------------------------------------------------------------------------------------
# Sums of products, in vectors of the processor where the compiler does not find them in a loop

# numbers that are taken from a row at a time: whole ones of 8 bits, and float32
BYTES_AT_ONCE, FLOATS_AT_ONCE = 32, 8
WORD, FLOATS = ir.IntType(64), ir.VectorType(ir.FloatType(), FLOATS_AT_ONCE)


def _vector(builder, address, kind, n):  # type: ignore[no-untyped-def]
    """`n` numbers from an address on."""
    vector = builder.load(builder.inttoptr(address, ir.VectorType(kind, n).as_pointer()))
    vector.align = 1
    return vector


def _shuffled_sum(builder, add, one, other, places, step):  # type: ignore[no-untyped-def]
    """Numbers of two vectors, one after the other, at some places, and those a step further, added."""

    def at(places):  # type: ignore[no-untyped-def]
        chosen = ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places)
        return builder.shuffle_vector(one, other, chosen)

    return add(at(places), at([place + step for place in places]))


def _four_totals(builder, add, a, b, c, d):  # type: ignore[no-untyped-def]
    """The sums of the numbers of four vectors: pairs, and pairs of these, of all four at once."""
    n = a.type.count
    pairs = [place for i in range(0, n, 2) for place in (i, n + i)]
    ab = _shuffled_sum(builder, add, a, b, pairs, 1)
    cd = _shuffled_sum(builder, add, c, d, pairs, 1)
    total = _shuffled_sum(
        builder, add, ab, cd, [place for i in range(0, n, 4) for place in (i, i + 1, n + i, n + i + 1)], 2
    )
    while n > 4:
        n //= 2
        total = _shuffled_sum(builder, add, total, total, list(range(n)), n)
    return [builder.extract_element(total, ir.Constant(ir.IntType(32), i)) for i in range(4)]


@intrinsic
def four_sums(_context, rows, n, x):  # type: ignore[no-untyped-def]
    """The products of four rows of 8-bit numbers with `x`, of 16-bit numbers: their addresses, and how many
    numbers each has, a multiple of BYTES_AT_ONCE.

    Two neighbours are multiplied and added to a sum of 32 bits: one instruction for sixteen or more pairs.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        rows, n, x = arguments
        byte, short = ir.IntType(8), ir.IntType(16)
        wide = ir.VectorType(ir.IntType(32), BYTES_AT_ONCE)
        nothing = ir.Constant(ir.VectorType(ir.IntType(32), BYTES_AT_ONCE // 2), None)
        sums = [cgutils.alloca_once_value(builder, nothing) for _ in range(4)]
        steps = ir.Constant(WORD, 0), n, ir.Constant(WORD, BYTES_AT_ONCE)
        with cgutils.for_range_slice(builder, *steps) as (i, _):
            numbers = builder.sext(
                _vector(builder, builder.add(x, builder.add(i, i)), short, BYTES_AT_ONCE), wide
            )
            start = builder.add(rows, i)
            for total in sums:
                products = builder.mul(
                    builder.sext(_vector(builder, start, byte, BYTES_AT_ONCE), wide), numbers
                )
                evens = list(range(0, BYTES_AT_ONCE, 2))
                both = _shuffled_sum(builder, builder.add, products, products, evens, 1)
                builder.store(builder.add(builder.load(total), both), total)
                start = builder.add(start, n)
        totals = _four_totals(builder, builder.add, *map(builder.load, sums))
        return context.make_tuple(builder, signature.return_type, totals)

    return types.UniTuple(types.int32, 4)(types.int64, types.int64, types.int64), generate


def _products(n_x):  # type: ignore[no-untyped-def]
    """What writes the products of four rows of float32 numbers with `n_x` others: four sums for each."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        rows, n, x = arguments
        sums = [[_sum_of_floats(builder) for _ in range(4)] for _ in range(n_x)]

        def some(start, i, n_rows):  # type: ignore[no-untyped-def]
            places = [builder.add(i, builder.mul(n, ir.Constant(WORD, row))) for row in range(n_rows)]
            return [_floats(builder, start, place) for place in places]

        steps = ir.Constant(WORD, 0), n, ir.Constant(WORD, FLOATS_AT_ONCE)
        with cgutils.for_range_slice(builder, *steps) as (i, _):
            weights = some(rows, i, 4)
            for numbers, totals in zip(some(x, i, n_x), sums, strict=True):
                for weight, total in zip(weights, totals, strict=True):
                    _add_product(builder, total, weight, numbers)
        totals = [_four_totals(builder, builder.fadd, *map(builder.load, four)) for four in sums]
        return context.make_tuple(
            builder, signature.return_type, [total for four in totals for total in four]
        )

    return generate


@intrinsic
def four_products(_context, rows, n, x):  # type: ignore[no-untyped-def]
    """The products of four rows of float32 numbers with `x`: their addresses, and how many numbers each has,
    a multiple of FLOATS_AT_ONCE."""
    return types.UniTuple(types.float32, 4)(types.int64, types.int64, types.int64), _products(1)


@intrinsic
def sixteen_products(_context, rows, n, x):  # type: ignore[no-untyped-def]
    """`four_products` with four rows at `x`, those with the first of them first: eight vectors are loaded for
    sixteen that are multiplied."""
    return types.UniTuple(types.float32, 16)(types.int64, types.int64, types.int64), _products(4)


@intrinsic
def weighted_sum(_context, rows, stride, n, weights):  # type: ignore[no-untyped-def]
    """FLOATS_AT_ONCE columns of `n` rows of float32 numbers, a multiple of four, each row times its weight
    and all added; `stride` numbers lie between two rows."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        rows, stride, n, weights = arguments
        # several sums: the next product need not wait until the last is added
        sums = [_sum_of_floats(builder) for _ in range(4)]
        steps = ir.Constant(WORD, 0), n, ir.Constant(WORD, 4)
        with cgutils.for_range_slice(builder, *steps) as (first, _):
            for i, total in enumerate(sums):
                row = builder.add(first, ir.Constant(WORD, i))
                pointer = builder.inttoptr(_address(builder, weights, row), ir.FloatType().as_pointer())
                weight = ir.Constant(FLOATS, ir.Undefined)
                for lane in range(FLOATS_AT_ONCE):
                    place = ir.Constant(ir.IntType(32), lane)
                    weight = builder.insert_element(weight, builder.load(pointer), place)
                _add_product(builder, total, weight, _floats(builder, rows, builder.mul(row, stride)))
        a, b, c, d = map(builder.load, sums)
        total = builder.fadd(builder.fadd(a, b), builder.fadd(c, d))
        lanes = [ir.Constant(ir.IntType(32), lane) for lane in range(FLOATS_AT_ONCE)]
        lanes = [builder.extract_element(total, lane) for lane in lanes]
        return context.make_tuple(builder, signature.return_type, lanes)

    result = types.UniTuple(types.float32, FLOATS_AT_ONCE)
    return result(types.int64, types.int64, types.int64, types.int64), generate


def _address(builder, start, place):  # type: ignore[no-untyped-def]
    """Of the float32 number at a place."""
    return builder.add(start, builder.shl(place, ir.Constant(WORD, 2)))


def _floats(builder, start, place):  # type: ignore[no-untyped-def]
    return _vector(builder, _address(builder, start, place), ir.FloatType(), FLOATS_AT_ONCE)


def _sum_of_floats(builder):  # type: ignore[no-untyped-def]
    return cgutils.alloca_once_value(builder, ir.Constant(FLOATS, None))


def _add_product(builder, total, one, other):  # type: ignore[no-untyped-def]
    """In one instruction: what is added at once need not be rounded before."""
    fused = ("contract",)
    product = builder.fmul(one, other, flags=fused)
    builder.store(builder.fadd(builder.load(total), product, flags=fused), total)
