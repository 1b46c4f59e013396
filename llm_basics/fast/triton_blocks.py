"""Blocks of queries and keys, as the kernels of attention see them: which see each other, where they lie.

A block of queries sees some blocks of keys whole, some in part and, if attention is causal, some not at all.
For 4 queries a block and 2 keys a block:

                 keys 0 1   2 3   4 5   6 7
    query 4           x x   x x   x
    query 5           x x   x x   x x
    query 6           x x   x x   x x   x
    query 7           x x   x x   x x   x x
                      whole       on the edge

Only on the edge each pair has to be looked at. What lies beyond is never loaded.
"""

from triton import language as tl

from llm_basics.fast import kernels


@kernels.kernel
def sees(
    queries: kernels.Tile, keys: kernels.Tile, n_keys: kernels.Number, IS_CAUSAL: tl.constexpr
) -> kernels.Tile:
    """Which queries see which keys: those that exist and, if causal, do not come later."""
    seen = keys < n_keys
    if IS_CAUSAL:
        seen = seen & (keys <= queries)
    return seen


@kernels.kernel
def key_range(
    first_query: kernels.Number,
    n_keys: kernels.Number,
    ON_EDGE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
) -> tuple[kernels.Number, kernels.Number]:
    """The keys in blocks that a block of queries sees whole; or those that follow, up to the last seen."""
    whole, end = n_keys, n_keys
    if IS_CAUSAL:
        whole = tl.minimum(first_query + 1, n_keys)
        end = tl.minimum(first_query + QUERIES, n_keys)
    whole = whole // KEYS * KEYS
    if ON_EDGE:
        begin = whole
    else:
        begin, end = 0, whole
    return begin, end


@kernels.kernel
def query_range(
    first_key: kernels.Number,
    n_queries: kernels.Number,
    ON_EDGE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
) -> tuple[kernels.Number, kernels.Number]:
    """The queries in blocks that see a block of keys whole; or those before, from the first that sees any."""
    begin, whole = 0, 0
    if IS_CAUSAL:
        begin = first_key // QUERIES * QUERIES
        whole = tl.cdiv(first_key + KEYS - 1, QUERIES) * QUERIES
    if ON_EDGE:
        end = tl.minimum(whole, n_queries)
    else:
        begin, end = whole, n_queries
    return begin, end


@kernels.kernel
def first_block_first(n_rows: kernels.Number, ROWS: tl.constexpr) -> tuple[kernels.Number, kernels.Number]:
    """The head and the first row that this program works on: one head after the other, for the cache."""
    n_blocks = tl.cdiv(n_rows, ROWS)
    # 64 bits: all heads together may have more than 2^31 elements, one has less
    return (tl.program_id(0) // n_blocks).to(tl.int64), tl.program_id(0) % n_blocks * ROWS


@kernels.kernel
def last_block_first(n_rows: kernels.Number, ROWS: tl.constexpr) -> tuple[kernels.Number, kernels.Number]:
    """The same from the other end: the last queries see most, and what takes longest should begin first."""
    head, first_row = first_block_first(n_rows, ROWS)
    return head, (tl.cdiv(n_rows, ROWS) - 1) * ROWS - first_row


@kernels.kernel
def rows(
    first: kernels.Number,
    n_rows: kernels.Number,
    D_HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tuple[kernels.Tile, kernels.Tile, kernels.Tile]:
    """The numbers of a block's rows, where their elements are in their head, and which of these exist."""
    rows, columns = first + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (rows < n_rows)[:, None] & (columns < D_HEAD)[None, :]
    return rows, rows[:, None] * D_HEAD + columns[None, :], inside


@kernels.kernel
def products(left: kernels.Tile, right: kernels.Tile) -> kernels.Tile:
    """The dot products of all rows of two tiles; "ieee" keeps float32 from being cut to TF32's 11 bits."""
    return tl.dot(left, tl.trans(right), input_precision="ieee")


@kernels.kernel
def times(weights: kernels.Tile, tile: kernels.Tile) -> kernels.Tile:
    """A product of matrices in the precision of `tile`, summed in float32."""
    return tl.dot(weights.to(tile.dtype), tile, input_precision="ieee")
