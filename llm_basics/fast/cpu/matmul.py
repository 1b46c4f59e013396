"""Matrix multiplication by register tiles, in float32.

A tile of `out = a b` is ROWS x 2 vectors, 8 x 32 with AVX-512. Each step along k loads two vectors of `b` and
8 elements of `a` for 16 fused multiply-adds. The tiles of a column share a panel of `b`, which stays in the
L1 or L2 cache (Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication"). One core of
an Intel Xeon (2023): 180 to 187 GFLOP/s, MKL 165 to 190.
"""

from typing import NamedTuple

import llvmlite.binding as llvm  # type: ignore[import-untyped]
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from llm_basics.fast import numba_jit

FEATURES = llvm.get_host_cpu_features()

# float32 lanes of a vector; AVX2 has 16 registers, AVX-512 and ARM have 32
VECTOR = 16 if FEATURES.get("avx512f") else 8 if FEATURES.get("avx2") else 4
ROWS = 4 if VECTOR == 8 else 8
COLUMNS = 2 * VECTOR

# rows of a panel per pass, 64 KB with AVX-512, to fit a core's caches
DEPTH = 512

FLOAT, INDEX, LANE = ir.FloatType(), ir.IntType(64), ir.IntType(32)
FLOATS = ir.VectorType(FLOAT, VECTOR)
FUSED = ("contract",)


class Matrix(NamedTuple):
    """The address and the strides, in elements, of a float32 matrix.

    `tile` is the distance between tiles: ROWS rows of a left operand, COLUMNS columns of a right operand,
    whose columns must be contiguous within a tile.
    """

    address: int
    row: int
    column: int
    tile: int


@numba_jit.inlined
def rows_at(address: int, n: int) -> Matrix:
    """A left operand or an output whose rows are `n` elements apart."""
    return Matrix(address, n, 1, n * ROWS)


@numba_jit.inlined
def columns_at(address: int, n: int) -> Matrix:
    """A right operand whose rows are `n` elements apart."""
    return Matrix(address, n, 1, COLUMNS)


@numba_jit.inlined
def packed(address: int, k: int) -> Matrix:
    """A right operand written by `pack` from rows of `k` elements."""
    return Matrix(address, COLUMNS, 1, k * COLUMNS)


@numba_jit.inlined
def transposed(address: int, k: int) -> Matrix:
    """A left operand written by `transpose` from `k` rows."""
    return Matrix(address, 1, ROWS, k * ROWS)


@numba_jit.inlined
def transposed_at(address: int, n: int) -> Matrix:
    """A left operand that is the transpose of rows `n` elements apart."""
    return Matrix(address, 1, n, ROWS)


@numba_jit.inlined
def broadcast_at(address: int) -> Matrix:
    """One row, broadcast to all rows."""
    return Matrix(address, 0, 1, 0)


@numba_jit.inlined
def start_at(start: int, out: int, n: int) -> Matrix:
    """The start of `product`: the rows of `out` itself if `start == out`, else one broadcast row."""
    return Matrix(start, n if start == out else 0, 1, 0)


@numba_jit.jit
def product(a: Matrix, b: Matrix, start: Matrix, out: Matrix, m: int, n: int, k: int) -> None:
    """`out = start + a b`, where `a` is m x k and `b` is k x n.

    `out`, `start` and `b` have n rounded up to a multiple of VECTOR. `start` may be `out`, or one row.
    """
    for done in range(0, k, DEPTH):
        depth, initial = min(DEPTH, k - done), out if done else start
        for column in range(0, n, COLUMNS):
            panel = b.address + 4 * (done * b.row + column // COLUMNS * b.tile)
            is_whole = n - column > VECTOR
            row = 0
            while row < m:
                n_rows = ROWS if row + ROWS <= m else 1
                first = row // ROWS * a.tile + row % ROWS * a.row + done * a.column
                left, right = (a.address + 4 * first, a.row, a.column), (panel, b.row, depth)
                before = initial.address + 4 * (row * initial.row + column)
                outputs = before, initial.row, out.address + 4 * (row * out.row + column), out.row
                if n_rows == ROWS and is_whole:
                    _tile(ROWS, 2, left, right, outputs)
                elif n_rows == ROWS:
                    _tile(ROWS, 1, left, right, outputs)
                elif is_whole:
                    _tile(1, 2, left, right, outputs)
                else:
                    _tile(1, 1, left, right, outputs)
                row += n_rows


@numba_jit.jit
def pack(rows: int, step: int, n: int, k: int, out: int) -> None:
    """Transpose `n` rows of `k` elements, `step` apart, into panels of COLUMNS columns, zero-padded.

    `k` must be a multiple of VECTOR; `out` must hold `packed_size(n, k)` elements.
    """
    for row in range(0, n, VECTOR):
        panel = out + 4 * (row // COLUMNS * k * COLUMNS + row % COLUMNS)
        for column in range(0, k, VECTOR):
            first = rows + 4 * (row * step + column)
            transpose_block(first, step, min(VECTOR, n - row), panel + 4 * column * COLUMNS, COLUMNS)


@numba_jit.jit
def transpose(rows: int, step: int, k: int, n: int, out: int) -> None:
    """Transpose `k` rows, `step` apart, of `n` elements into tiles of ROWS rows.

    `out` must hold `whole_tiles(n) * k` elements.
    """
    for first in range(0, n - n % ROWS, ROWS):
        _copy_strip(rows + 4 * first, 4 * step, k, out + 4 * first * k)
    first = n - n % ROWS
    for i in range(k):
        source = numba_jit.array(rows + 4 * (i * step + first), (n % ROWS,))
        destination = numba_jit.array(out + 4 * (first * k + i * ROWS), (n % ROWS,))
        for column in range(n % ROWS):
            destination[column] = source[column]


@numba_jit.jit
def padded(n: int) -> int:
    """The next multiple of VECTOR.

    >>> padded(1) == VECTOR
    True
    """
    return -(-n // VECTOR) * VECTOR


@numba_jit.jit
def whole_tiles(n: int) -> int:
    """The next multiple of ROWS."""
    return -(-n // ROWS) * ROWS


@numba_jit.jit
def packed_size(n: int, k: int) -> int:
    """The number of elements that `pack` writes for `n` rows of `k`, with padding."""
    return -(-n // COLUMNS) * COLUMNS * k


@intrinsic
def maximum(_context, row, n):  # type: ignore[no-untyped-def]
    """The maximum of `n` elements at an address, a multiple of VECTOR."""

    def generate(_, builder, signature, arguments):  # type: ignore[no-untyped-def]
        row, n = arguments
        running = cgutils.alloca_once_value(builder, ir.Constant(FLOATS, [float("-inf")] * VECTOR))
        with cgutils.for_range_slice(builder, _index(0), n, _index(VECTOR)) as (i, _):
            _store_maximum(builder, running, _load(builder, _offset(builder, row, i)))
        width = VECTOR
        while width > 1:
            width //= 2
            lanes = [(lane + width) % VECTOR for lane in range(VECTOR)]
            _store_maximum(builder, running, _shuffle(builder, builder.load(running), lanes))
        return builder.extract_element(builder.load(running), ir.Constant(LANE, 0))

    return types.float32(types.int64, types.int64), generate


# --------------------------------------------------------------------------------------------------
# Instructions


@intrinsic(prefer_literal=True)
def _tile(_context, n_rows, n_vectors, left, right, outputs):  # type: ignore[no-untyped-def]
    """One tile of `product`: `n_rows` x `n_vectors` vectors of sums in registers.

    `left`: address, row and column stride of `a`; `right`: address, row stride and number of rows of `b`;
    `outputs`: address and row stride of `start`, then of `out`.
    """
    if not isinstance(n_rows, types.IntegerLiteral):
        return None
    sizes = n_rows.literal_value, n_vectors.literal_value

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        left, right, outputs = (cgutils.unpack_tuple(builder, argument) for argument in arguments[2:])
        (a, a_row, a_column), (b, b_row, k), (start, start_row, out, out_row) = left, right, outputs
        tiles = [(_index(row), VECTOR * vector) for row in range(sizes[0]) for vector in range(sizes[1])]

        def numbers_at(address, distance, row, extra):  # type: ignore[no-untyped-def]
            return _offset(builder, address, builder.mul(row, distance), extra)

        sums = [
            cgutils.alloca_once_value(builder, _load(builder, numbers_at(start, start_row, *tile)))
            for tile in tiles
        ]
        rows = [_offset(builder, a, builder.mul(_index(row), a_row)) for row in range(sizes[0])]
        with cgutils.for_range_slice(builder, _index(0), k, _index(1)) as (i, _):
            vectors = [_load(builder, numbers_at(b, b_row, i, VECTOR * j)) for j in range(sizes[1])]
            column = builder.mul(i, a_column)
            for row, address in enumerate(rows):
                factor = _broadcast(builder, _offset(builder, address, column))
                for j, vector in enumerate(vectors):
                    total = sums[row * sizes[1] + j]
                    addend = builder.fmul(factor, vector, flags=FUSED)
                    builder.store(builder.fadd(builder.load(total), addend, flags=FUSED), total)
        for total, tile in zip(sums, tiles, strict=True):
            _store(builder, builder.load(total), numbers_at(out, out_row, *tile))
        return context.get_dummy_value()

    return types.void(n_rows, n_vectors, left, right, outputs), generate


@intrinsic
def _copy_strip(_context, rows, step, n, out):  # type: ignore[no-untyped-def]
    """Copy ROWS elements of each of `n` rows, `step` bytes apart, contiguously."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        rows, step, n, out = arguments
        strip = ir.VectorType(FLOAT, ROWS)
        with cgutils.for_range_slice(builder, _index(0), n, _index(1)) as (i, _):
            numbers = builder.load(_pointer(builder, builder.add(rows, builder.mul(i, step)), strip))
            numbers.align = 4
            destination = _offset(builder, out, builder.mul(i, _index(ROWS)))
            builder.store(numbers, _pointer(builder, destination, strip)).align = 4
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def transpose_block(_context, rows, row, n, out, out_row):  # type: ignore[no-untyped-def]
    """Transpose a block of VECTOR elements of `n` <= VECTOR rows, zero-padded.

    `row` and `out_row` are the distances of rows. log2(VECTOR) perfect shuffles transpose a square matrix.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        rows, row, n, out, out_row = arguments
        square = []
        for i in range(VECTOR):
            row_vector = cgutils.alloca_once_value(builder, ir.Constant(FLOATS, None))
            with builder.if_then(builder.icmp_signed("<", _index(i), n)):
                builder.store(_load(builder, _offset(builder, rows, builder.mul(_index(i), row))), row_vector)
            square.append(builder.load(row_vector))
        half = VECTOR // 2
        lower = [lane for i in range(half) for lane in (i, VECTOR + i)]
        upper = [lane + half for lane in lower]
        for _ in range(VECTOR.bit_length() - 1):
            pairs = zip(square[:half], square[half:], strict=True)
            square = [_shuffle(builder, a, lanes, b) for a, b in pairs for lanes in (lower, upper)]
        for i, vector in enumerate(square):
            _store(builder, vector, _offset(builder, out, builder.mul(_index(i), out_row)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def _index(n):  # type: ignore[no-untyped-def]
    return ir.Constant(INDEX, n)


def _offset(builder, start, numbers, addend=0):  # type: ignore[no-untyped-def]
    """The address `numbers + addend` float32 elements after `start`."""
    return builder.add(builder.add(start, builder.shl(numbers, _index(2))), _index(4 * addend))


def _pointer(builder, address, kind):  # type: ignore[no-untyped-def]
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder, address):  # type: ignore[no-untyped-def]
    vector = builder.load(_pointer(builder, address, FLOATS))
    vector.align = 4
    return vector


def _broadcast(builder, address):  # type: ignore[no-untyped-def]
    """A vector with the element at an address in every lane."""
    number = builder.load(_pointer(builder, address, FLOAT))
    first = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), number, ir.Constant(LANE, 0))
    return _shuffle(builder, first, [0] * VECTOR)


def _store(builder, vector, address):  # type: ignore[no-untyped-def]
    builder.store(vector, _pointer(builder, address, FLOATS)).align = 4


def _shuffle(builder, one, lanes, other=None):  # type: ignore[no-untyped-def]
    """The given lanes of one vector, or of two concatenated."""
    tiles = ir.Constant(ir.VectorType(LANE, len(lanes)), lanes)
    return builder.shuffle_vector(one, ir.Constant(FLOATS, ir.Undefined) if other is None else other, tiles)


def _store_maximum(builder, running, numbers):  # type: ignore[no-untyped-def]
    before = builder.load(running)
    builder.store(builder.select(builder.fcmp_ordered(">", numbers, before), numbers, before), running)
