"""Python to machine code by Numba, cached on disk, with intrinsics that Numba lacks.

Numba counts references to arrays with atomic operations. Inner loops use `borrowed` arrays, which are not
counted; the caller of the outermost function keeps them alive.
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

# fast-math flags: sums may be reordered; infinities and NaN keep their semantics
ANY_ORDER = {"reassoc", "contract", "nsz"}


def jit(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """Compile `function` at its first call, with an on-disk cache if possible, to run without the GIL."""
    # tests wrap functions to check their annotations, which Numba cannot compile
    compiled = numba.njit(nogil=True, **settings)(inspect.unwrap(function))
    previous, numba.config.CACHE_DIR = numba.config.CACHE_DIR, numba.config.CACHE_DIR or kernel_cache.folder()
    try:
        compiled._cache = _Cache(compiled.py_func)
    except RuntimeError:  # no folder is writable
        cache_folder.warn_uncached("no cache folder is writable; set NUMBA_CACHE_DIR to a writable folder")
    finally:
        numba.config.CACHE_DIR = previous
    return compiled


class _Cache(caching.FunctionCache):
    """Numba's cache; a failed write, as on a full disk, is only a warning."""

    def save_overload(self, sig: Any, data: Any) -> None:
        """Save compiled code; after a failed write the next process compiles it again."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            cache_folder.warn_uncached(f"{self.cache_path}: {error.strerror}")


def summing(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jit` with reordered sums, so that LLVM vectorizes reductions."""
    # Python's error model checks each division for 0, which prevents vectorization
    return jit(function, fastmath=ANY_ORDER, error_model="numpy")


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Inline `function` into its callers; for short functions in inner loops."""
    return numba.njit(inline="always")(inspect.unwrap(function))


@functools.cache
def used_before(module: str = "*") -> bool:
    """Whether the cache has kernels of this version, of one module or any."""
    folder = kernel_cache.folder()
    return any(Path(folder).rglob(f"{module}.*.nbc")) if folder else True


@intrinsic
def borrowed(_context, value):  # type: ignore[no-untyped-def]
    """An array, or a named tuple of arrays, without reference counting."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        def borrow(kind, counted):  # type: ignore[no-untyped-def]
            array = context.make_array(kind)(context, builder, counted)
            array.meminfo = cgutils.get_null_value(array.meminfo.type)
            array.parent = cgutils.get_null_value(array.parent.type)
            return array._getvalue()

        (kind,), (argument,) = signature.args, arguments
        if not isinstance(kind, types.BaseTuple):
            return borrow(kind, argument)
        members = [borrow(k, a) for k, a in zip(kind, cgutils.unpack_tuple(builder, argument), strict=True)]
        return context.make_tuple(builder, kind, members)

    return value(value), generate


@intrinsic
def eight_bytes(_context, array, index):  # type: ignore[no-untyped-def]
    """Eight bytes from `index` as a little-endian uint64; the array must be padded."""

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
    """A float32 pointer for `numba.carray`; the caller keeps the memory alive."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(address), generate


@inlined
def array(address: int, shape: tuple[int, ...]) -> Any:
    """A float32 array view of the memory at `address`; the caller keeps the memory alive."""
    return numba.carray(floats_at(address), shape)


@inlined
def row(address: int, number: int, d: int) -> Any:
    """Row `number` of the float32 matrix with `d` columns at `address`."""
    return array(address + 4 * number * d, (d,))


# --------------------------------------------------------------------------------------------------
# Dot products in SIMD vectors, where LLVM does not vectorize the loop

# elements of a row per iteration: int8, and float32
BYTES_AT_ONCE, FLOATS_AT_ONCE = 32, 8
WORD, FLOATS = ir.IntType(64), ir.VectorType(ir.FloatType(), FLOATS_AT_ONCE)


def _vector(builder, address, kind, n):  # type: ignore[no-untyped-def]
    """Load a vector of `n` elements, unaligned."""
    vector = builder.load(builder.inttoptr(address, ir.VectorType(kind, n).as_pointer()))
    vector.align = 1
    return vector


def _shuffled_sum(builder, add, a, b, lanes, step):  # type: ignore[no-untyped-def]
    """`ab[lanes] + ab[lanes + step]`, where `ab` is the concatenation of two vectors."""

    def shuffled(lanes):  # type: ignore[no-untyped-def]
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
        return builder.shuffle_vector(a, b, mask)

    return add(shuffled(lanes), shuffled([lane + step for lane in lanes]))


def _four_totals(builder, add, a, b, c, d):  # type: ignore[no-untyped-def]
    """The horizontal sums of four vectors, by pairwise addition of all four at once."""
    n = a.type.count
    pairs = [lane for i in range(0, n, 2) for lane in (i, n + i)]
    ab = _shuffled_sum(builder, add, a, b, pairs, 1)
    cd = _shuffled_sum(builder, add, c, d, pairs, 1)
    total = _shuffled_sum(
        builder, add, ab, cd, [lane for i in range(0, n, 4) for lane in (i, i + 1, n + i, n + i + 1)], 2
    )
    while n > 4:
        n //= 2
        total = _shuffled_sum(builder, add, total, total, list(range(n)), n)
    return [builder.extract_element(total, ir.Constant(ir.IntType(32), i)) for i in range(4)]


@intrinsic
def four_sums(_context, rows, n, x):  # type: ignore[no-untyped-def]
    """The dot products of four adjacent int8 rows with an int16 vector `x`, accumulated in int32.

    `rows` and `x` are addresses; the length `n` is a multiple of BYTES_AT_ONCE. Adding the products of
    neighboring elements is one instruction (`vpmaddwd`) for sixteen or more pairs.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        rows, n, x = arguments
        byte, short = ir.IntType(8), ir.IntType(16)
        wide = ir.VectorType(ir.IntType(32), BYTES_AT_ONCE)
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), BYTES_AT_ONCE // 2), None)
        sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(4)]
        steps = ir.Constant(WORD, 0), n, ir.Constant(WORD, BYTES_AT_ONCE)
        with cgutils.for_range_slice(builder, *steps) as (i, _):
            x_block = builder.sext(
                _vector(builder, builder.add(x, builder.add(i, i)), short, BYTES_AT_ONCE), wide
            )
            start = builder.add(rows, i)
            for total in sums:
                products = builder.mul(
                    builder.sext(_vector(builder, start, byte, BYTES_AT_ONCE), wide), x_block
                )
                evens = list(range(0, BYTES_AT_ONCE, 2))
                pair_sums = _shuffled_sum(builder, builder.add, products, products, evens, 1)
                builder.store(builder.add(builder.load(total), pair_sums), total)
                start = builder.add(start, n)
        totals = _four_totals(builder, builder.add, *map(builder.load, sums))
        return context.make_tuple(builder, signature.return_type, totals)

    return types.UniTuple(types.int32, 4)(types.int64, types.int64, types.int64), generate


def _products(n_x):  # type: ignore[no-untyped-def]
    """The code generator for the dot products of four float32 rows with each of `n_x` vectors."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        rows, n, x = arguments
        sums = [[_sum_of_floats(builder) for _ in range(4)] for _ in range(n_x)]

        def load_rows(start, i, n_rows):  # type: ignore[no-untyped-def]
            indices = [builder.add(i, builder.mul(n, ir.Constant(WORD, row))) for row in range(n_rows)]
            return [_floats(builder, start, index) for index in indices]

        steps = ir.Constant(WORD, 0), n, ir.Constant(WORD, FLOATS_AT_ONCE)
        with cgutils.for_range_slice(builder, *steps) as (i, _):
            weights = load_rows(rows, i, 4)
            for x_block, totals in zip(load_rows(x, i, n_x), sums, strict=True):
                for weight, total in zip(weights, totals, strict=True):
                    _add_product(builder, total, weight, x_block)
        totals = [_four_totals(builder, builder.fadd, *map(builder.load, four)) for four in sums]
        return context.make_tuple(
            builder, signature.return_type, [total for four in totals for total in four]
        )

    return generate


@intrinsic
def four_products(_context, rows, n, x):  # type: ignore[no-untyped-def]
    """The dot products of four adjacent float32 rows with `x`; `rows` and `x` are addresses, and the length
    `n` is a multiple of FLOATS_AT_ONCE."""
    return types.UniTuple(types.float32, 4)(types.int64, types.int64, types.int64), _products(1)


@intrinsic
def sixteen_products(_context, rows, n, x):  # type: ignore[no-untyped-def]
    """`four_products` with each of four adjacent vectors at `x`, in their order: eight loads for sixteen
    multiplications."""
    return types.UniTuple(types.float32, 16)(types.int64, types.int64, types.int64), _products(4)


@intrinsic
def weighted_sum(_context, rows, stride, n, weights):  # type: ignore[no-untyped-def]
    """The weighted sum of `n` float32 rows, a multiple of four, over FLOATS_AT_ONCE columns; `stride` is the
    number of elements from row to row."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        rows, stride, n, weights = arguments
        # independent accumulators hide the latency of the additions
        sums = [_sum_of_floats(builder) for _ in range(4)]
        steps = ir.Constant(WORD, 0), n, ir.Constant(WORD, 4)
        with cgutils.for_range_slice(builder, *steps) as (first, _):
            for i, total in enumerate(sums):
                row = builder.add(first, ir.Constant(WORD, i))
                pointer = builder.inttoptr(_address(builder, weights, row), ir.FloatType().as_pointer())
                weight = ir.Constant(FLOATS, ir.Undefined)
                for lane in range(FLOATS_AT_ONCE):
                    index = ir.Constant(ir.IntType(32), lane)
                    weight = builder.insert_element(weight, builder.load(pointer), index)
                _add_product(builder, total, weight, _floats(builder, rows, builder.mul(row, stride)))
        a, b, c, d = map(builder.load, sums)
        total = builder.fadd(builder.fadd(a, b), builder.fadd(c, d))
        lanes = [ir.Constant(ir.IntType(32), lane) for lane in range(FLOATS_AT_ONCE)]
        lanes = [builder.extract_element(total, lane) for lane in lanes]
        return context.make_tuple(builder, signature.return_type, lanes)

    result = types.UniTuple(types.float32, FLOATS_AT_ONCE)
    return result(types.int64, types.int64, types.int64, types.int64), generate


def _address(builder, start, index):  # type: ignore[no-untyped-def]
    """The address of the float32 element at `index`."""
    return builder.add(start, builder.shl(index, ir.Constant(WORD, 2)))


def _floats(builder, start, index):  # type: ignore[no-untyped-def]
    return _vector(builder, _address(builder, start, index), ir.FloatType(), FLOATS_AT_ONCE)


def _sum_of_floats(builder):  # type: ignore[no-untyped-def]
    return cgutils.alloca_once_value(builder, ir.Constant(FLOATS, None))


def _add_product(builder, total, a, b):  # type: ignore[no-untyped-def]
    """`total += a * b` as a fused multiply-add, which does not round the product."""
    flags = ("contract",)
    product = builder.fmul(a, b, flags=flags)
    builder.store(builder.fadd(builder.load(total), product, flags=flags), total)
