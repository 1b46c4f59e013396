"""Matrix multiplication in bfloat16 by the tile registers of AMX, accumulated in float32.

A tile register has 16 rows of 64 bytes. One instruction multiplies 16 x 32 by 32 x 16 bfloat16 numbers and
adds the product to 16 x 16 float32 sums: 8,192 fused multiply-adds, where an AVX-512 instruction has 16
("Intel Architecture Instruction Set Extensions Programming Reference", chapter 3). One core of an Intel Xeon
(2023): 1,060 to 1,265 GFLOP/s with operands in its cache, 200 in float32.

The right operand has the numbers of two rows, (2i, j) and (2i + 1, j), side by side in 4 bytes. All matrices
are therefore addressed in units of 4 bytes: pairs of bfloat16, or one float32.
"""

import functools

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

from llm_basics.fast import numba_jit
from llm_basics.fast.cpu import matmul

Matrix = matmul.Matrix

HAS_TILES = bool(matmul.FEATURES.get("amx-bf16"))

# rows and columns of a product per step, 2 x 2 tiles; all sizes must be multiples
TILE = 32
# pairs of bfloat16 in a row of a tile
PAIRS = 16

# "palette 1", then the bytes per row and the rows of each of eight tiles; 64 zeros release the registers, so
# that switching to another thread does not save them
CONFIGURATION = np.zeros(128, np.uint8)
CONFIGURATION[0], CONFIGURATION[16:32:2], CONFIGURATION[48:56] = 1, 64, 16

# bfloat16 is the upper half of float32; HALF, and the lowest bit of that half, rounds ties to even
HALF, ONE, SHIFT = np.int32(0x7FFF), np.int32(1), np.int32(16)
NONE, LOWER, UPPER = np.int32(0), np.int32(0xFFFF), np.int32(-65536)

BYTE, INDEX, POINTER, NOTHING = ir.IntType(8), ir.IntType(64), ir.PointerType(), ir.VoidType()


@functools.cache
def is_available() -> bool:
    """Whether the processor has these instructions and the operating system permits them."""
    # asks Linux for the tile registers, which belong to no process at first
    return HAS_TILES and getattr(torch.cpu, "_init_amx", lambda: False)()


@numba_jit.jit
def padded(n: int) -> int:
    """The next multiple of TILE."""
    return -(-n // TILE) * TILE


@numba_jit.jit
def product(a: Matrix, b: Matrix, start: Matrix, out: Matrix, m: int, n: int, k: int, sizes: int) -> None:
    """`out = start + a b`, where `a` is m x k and `b` is k x n, in pairs along k; `start` may be `out`.

    m is rounded up to a multiple of TILE; n and k must be multiples. `sizes` is the address of CONFIGURATION.
    """
    _configure(sizes)
    for column in range(0, n, TILE):
        right = b.address + 4 * (column // matmul.COLUMNS * b.tile), b.row, k // 2
        for row in range(0, m, TILE):
            before = start.address + 4 * (row * start.row + column)
            after = out.address + 4 * (row * out.row + column)
            _tiles((a.address + 4 * row * a.row, a.row), right, (before, start.row, after, out.row))
    _configure(sizes + 64)


# --------------------------------------------------------------------------------------------------
# Operands


@numba_jit.inlined
def rounded(bits: int) -> int:
    """The bits of a float32 whose upper half is the nearest bfloat16."""
    return np.int32(bits + np.int32(HALF + np.int32(np.int32(bits >> SHIFT) & ONE)))


@numba_jit.jit
def round_rows(rows: int, n: int, out: int) -> None:
    """Round `n` float32 numbers: a left operand, in pairs along its rows."""
    numbers = numba_jit.array(rows, (n,)).view(np.int32)
    halves = numba_jit.array(out, (n // 2,)).view(np.int16)
    for i in range(n):
        halves[i] = np.int16(rounded(numbers[i]) >> SHIFT)


@numba_jit.jit
def pair_rows(rows: int, n: int, d: int, out: int) -> None:
    """Round `n` rows of `d` numbers: a right operand, with rows of zeros up to a multiple of TILE."""
    for t in range(0, padded(n), 2):
        pairs = numba_jit.row(out, t // 2, d).view(np.int32)
        even = numba_jit.row(rows, min(t, n - 1), d).view(np.int32)
        odd = numba_jit.row(rows, min(t + 1, n - 1), d).view(np.int32)
        lower, upper = LOWER if t < n else NONE, UPPER if t + 1 < n else NONE
        for i in range(d):
            pairs[i] = np.int32(rounded(odd[i]) & upper) | np.int32((rounded(even[i]) >> SHIFT) & lower)


@numba_jit.jit
def transpose(pairs: int, n: int, d: int, out: int) -> None:
    """The left operand `rows^T`, from what `pair_rows` has written for `n` rows of `d` numbers."""
    width = padded(n) // 2
    for row in range(0, width, matmul.VECTOR):
        for column in range(0, d, matmul.VECTOR):
            first, to = pairs + 4 * (row * d + column), out + 4 * (column * width + row)
            matmul.transpose_block(first, d, matmul.VECTOR, to, width)


@numba_jit.jit
def pack(weight: int, d_out: int, d_in: int, room: int, out: int) -> None:
    """The right operand `weight^T` in panels of COLUMNS columns; `room` has TILE x d_in / 2 numbers."""
    for row in range(0, d_out, TILE):
        round_rows(weight + 4 * row * d_in, TILE * d_in, room)
        matmul.pack(room, d_in // 2, TILE, d_in // 2, out + 4 * row * (d_in // 2))


# --------------------------------------------------------------------------------------------------
# Instructions


def _call(builder, name, kinds=(), *arguments):  # type: ignore[no-untyped-def]
    """An instruction; none where the processor lacks them, since its code is compiled and never run."""
    if HAS_TILES:
        kind = ir.FunctionType(NOTHING, kinds)
        builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


@intrinsic
def _configure(_context, sizes):  # type: ignore[no-untyped-def]
    """Set the sizes of the tile registers."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _call(builder, "ldtilecfg", [POINTER], builder.inttoptr(arguments[0], POINTER))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _tiles(_context, left, right, outputs):  # type: ignore[no-untyped-def]
    """One step of `product`: sums in tiles 0 to 3, operands in 4 to 7.

    `left`: address and row stride of `a`; `right`: address, row stride and number of rows of `b`;
    `outputs`: address and row stride of `start`, then of `out`.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        left, right, outputs = (cgutils.unpack_tuple(builder, argument) for argument in arguments)
        (a, a_row), (b, b_row, k), (start, start_row, out, out_row) = left, right, outputs
        halves = (0, 1)

        def move(name, tile, address, row, numbers, below=0):  # type: ignore[no-untyped-def]
            """Load or store a tile, `numbers` after an address and `below` times 16 rows down."""
            n_bytes = builder.shl(row, ir.Constant(INDEX, 2))
            offset = builder.add(builder.shl(numbers, ir.Constant(INDEX, 2)), address)
            for _ in range(below):
                offset = builder.add(offset, builder.shl(n_bytes, ir.Constant(INDEX, 4)))
            place = builder.inttoptr(offset, POINTER)
            _call(builder, name, [BYTE, POINTER, INDEX], ir.Constant(BYTE, tile), place, n_bytes)

        columns = [ir.Constant(INDEX, 0), ir.Constant(INDEX, PAIRS)]
        for i in halves:
            for j in halves:
                move("tileloadd64", 2 * i + j, start, start_row, columns[j], below=i)
        with cgutils.for_range_slice(builder, columns[0], k, columns[1]) as (pair, _):
            for j in halves:
                at = builder.add(builder.mul(pair, b_row), columns[j])
                move("tileloadd64", 6 + j, b, b_row, at)
            for i in halves:
                move("tileloadd64", 4 + i, a, a_row, pair, below=i)
                for j in halves:
                    tiles = (ir.Constant(BYTE, tile) for tile in (2 * i + j, 4 + i, 6 + j))
                    _call(builder, "tdpbf16ps", [BYTE] * 3, *tiles)
        for i in halves:
            for j in halves:
                move("tilestored64", 2 * i + j, out, out_row, columns[j], below=i)
        return context.get_dummy_value()

    return types.void(left, right, outputs), generate
