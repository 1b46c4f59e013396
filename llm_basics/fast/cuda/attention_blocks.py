"""Causal masks by blocks of queries and keys: visible in full, in part or not at all.

For 4 queries a block and 2 keys a block:

                 keys 0 1   2 3   4 5   6 7
    query 4           x x   x x   x
    query 5           x x   x x   x x
    query 6           x x   x x   x x   x
    query 7           x x   x x   x x   x x
                      full        on the diagonal

Only blocks on the diagonal (ON_EDGE) need a mask; blocks above it are never loaded.
"""

from triton import language as tl

from llm_basics.fast.cuda import triton_jit


@triton_jit.kernel
def sees(
    queries: triton_jit.Tile, keys: triton_jit.Tile, n_keys: triton_jit.Number, IS_CAUSAL: tl.constexpr
) -> triton_jit.Tile:
    """The mask of queries and keys: keys that exist and, if causal, do not come after the query."""
    seen = keys < n_keys
    if IS_CAUSAL:
        seen = seen & (keys <= queries)
    return seen


@triton_jit.kernel
def key_range(
    first_query: triton_jit.Number,
    n_keys: triton_jit.Number,
    ON_EDGE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
) -> tuple[triton_jit.Number, triton_jit.Number]:
    """The range of keys in blocks fully visible to a block of queries; or those on the diagonal."""
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


@triton_jit.kernel
def query_range(
    first_key: triton_jit.Number,
    n_queries: triton_jit.Number,
    ON_EDGE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
) -> tuple[triton_jit.Number, triton_jit.Number]:
    """The range of queries in blocks to which a block of keys is fully visible; or those on the diagonal."""
    begin, whole = 0, 0
    if IS_CAUSAL:
        begin = first_key // QUERIES * QUERIES
        whole = tl.cdiv(first_key + KEYS - 1, QUERIES) * QUERIES
    if ON_EDGE:
        end = tl.minimum(whole, n_queries)
    else:
        begin, end = whole, n_queries
    return begin, end


@triton_jit.kernel
def first_block_first(
    n_rows: triton_jit.Number, ROWS: tl.constexpr
) -> tuple[triton_jit.Number, triton_jit.Number]:
    """The head and the first row of this program; head by head, for the cache."""
    n_blocks = tl.cdiv(n_rows, ROWS)
    # 64 bits: all heads together may have more than 2^31 elements, one has less
    return (tl.program_id(0) // n_blocks).to(tl.int64), tl.program_id(0) % n_blocks * ROWS


@triton_jit.kernel
def last_block_first(
    n_rows: triton_jit.Number, ROWS: tl.constexpr
) -> tuple[triton_jit.Number, triton_jit.Number]:
    """`first_block_first` in reverse: the last queries see most keys, and the longest work starts first."""
    head, first_row = first_block_first(n_rows, ROWS)
    return head, (tl.cdiv(n_rows, ROWS) - 1) * ROWS - first_row


@triton_jit.kernel
def rows(
    first: triton_jit.Number,
    n_rows: triton_jit.Number,
    D_HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tuple[triton_jit.Tile, triton_jit.Tile, triton_jit.Tile]:
    """The indices of a block's rows, the offsets of their elements in the head, and the mask of those."""
    rows, columns = first + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (rows < n_rows)[:, None] & (columns < D_HEAD)[None, :]
    return rows, rows[:, None] * D_HEAD + columns[None, :], inside
