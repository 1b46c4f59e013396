"""Triton kernels of `cuda.decode`: products, norms, activations and attention of one token.

A program computes some rows of a product, and recomputes the norm of the input: cheaper than another launch.
"""

from triton import language as tl

from llm_basics.fast.cuda import triton_jit

# below any score except -inf
MIN_SCORE = tl.constexpr(-3.4e38)
# closer scores may differ by rounding alone (`vectors.TIE_TOLERANCE`)
TIE_TOLERANCE = tl.constexpr(1e-5)


@triton_jit.kernel
def embed(
    token: triton_jit.Pointer,
    position: triton_jit.Pointer,
    tokens: triton_jit.Pointer,
    positions: triton_jit.Pointer,
    out: triton_jit.Pointer,
    d_model: triton_jit.Number,
    HAS_POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program copies a block of the features."""
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(tokens + tl.load(token) * d_model + ids, mask=ids < d_model)
    if HAS_POSITIONS:
        x += tl.load(positions + tl.load(position) * d_model + ids, mask=ids < d_model)
    tl.store(out + ids, x, mask=ids < d_model)


@triton_jit.kernel
def project_heads(
    x: triton_jit.Pointer,
    norm_weight: triton_jit.Pointer,
    norm_bias: triton_jit.Pointer,
    q_weight: triton_jit.Pointer,
    k_weight: triton_jit.Pointer,
    v_weight: triton_jit.Pointer,
    q_bias: triton_jit.Pointer,
    k_bias: triton_jit.Pointer,
    v_bias: triton_jit.Pointer,
    q_norm: triton_jit.Pointer,
    k_norm: triton_jit.Pointer,
    cos: triton_jit.Pointer,
    sin: triton_jit.Pointer,
    position: triton_jit.Pointer,
    queries: triton_jit.Pointer,
    keys: triton_jit.Pointer,
    values: triton_jit.Pointer,
    d_model: triton_jit.Number,
    n_heads: triton_jit.Number,
    n_kv_heads: triton_jit.Number,
    d_head: triton_jit.Number,
    context_length: triton_jit.Number,
    eps: triton_jit.Number,
    NORM: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_HEAD_NORMS: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program computes one head of queries, keys or values, as pairs of features for RoPE."""
    head = tl.program_id(0)
    index = tl.load(position)
    if head < n_heads:
        weight, bias, head_norm = q_weight, q_bias, q_norm
        out = queries + head * d_head
    elif head < n_heads + n_kv_heads:
        head -= n_heads
        weight, bias, head_norm = k_weight, k_bias, k_norm
        out = keys + (head * context_length + index) * d_head
    else:
        head -= n_heads + n_kv_heads
        weight, bias, head_norm = v_weight, v_bias, k_norm
        out = values + (head * context_length + index) * d_head
    is_value = tl.program_id(0) >= n_heads + n_kv_heads

    pairs = tl.arange(0, HALF)
    is_pair = pairs < d_head // 2
    mean, scale = _norm_statistics(x, d_model, eps, NORM, BLOCK)
    rows = weight + (head * d_head + 2 * pairs)[:, None] * d_model
    first, second = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    for start in range(0, d_model, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        normed = _normalize(x, norm_weight, norm_bias, ids, d_model, mean, scale, NORM, HAS_NORM_BIAS)
        mask, pointers = is_pair[:, None] & (ids < d_model)[None, :], rows + ids[None, :]
        first += tl.sum(tl.load(pointers, mask=mask, other=0.0) * normed[None, :], axis=1)
        second += tl.sum(tl.load(pointers + d_model, mask=mask, other=0.0) * normed[None, :], axis=1)
    if HAS_BIAS:
        first += tl.load(bias + head * d_head + 2 * pairs, mask=is_pair, other=0.0)
        second += tl.load(bias + head * d_head + 2 * pairs + 1, mask=is_pair, other=0.0)
    if not is_value:
        if HAS_HEAD_NORMS:
            first, second = _normalize_head(first, second, head_norm, pairs, d_head, eps)
        if HAS_ROPE:
            rope_offset = index * (d_head // 2) + pairs
            c = tl.load(cos + rope_offset, mask=is_pair, other=0.0)
            s = tl.load(sin + rope_offset, mask=is_pair, other=0.0)
            first, second = first * c - second * s, first * s + second * c
    tl.store(out + 2 * pairs, first, mask=is_pair)
    tl.store(out + 2 * pairs + 1, second, mask=is_pair)


@triton_jit.kernel
def _normalize_head(
    first: triton_jit.Tile,
    second: triton_jit.Tile,
    weight: triton_jit.Pointer,
    pairs: triton_jit.Tile,
    d_head: triton_jit.Number,
    eps: triton_jit.Number,
) -> tuple[triton_jit.Tile, triton_jit.Tile]:
    """RMSNorm of a head, as pairs of features."""
    is_pair = pairs < d_head // 2
    correction = 1.0 / tl.sqrt(tl.sum(first * first + second * second, axis=0) / d_head + eps)
    first *= correction * tl.load(weight + 2 * pairs, mask=is_pair, other=0.0)
    second *= correction * tl.load(weight + 2 * pairs + 1, mask=is_pair, other=0.0)
    return first, second


@triton_jit.kernel
def attend(
    queries: triton_jit.Pointer,
    keys: triton_jit.Pointer,
    values: triton_jit.Pointer,
    position: triton_jit.Pointer,
    out: triton_jit.Pointer,
    scale: triton_jit.Number,
    context_length: triton_jit.Number,
    group: triton_jit.Number,
    d_head: triton_jit.Number,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """One program computes one head: softmax attention over the keys up to `position`."""
    head = tl.program_id(0)
    features = tl.arange(0, WIDTH)
    is_feature = features < d_head
    query = scale * tl.load(queries + head * d_head + features, mask=is_feature, other=0.0)
    n_keys = tl.load(position) + 1
    start = (head // group) * context_length * d_head
    peak, total = tl.full((), MIN_SCORE, tl.float32), tl.full((), 0.0, tl.float32)
    output = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, n_keys, KEYS):
        key_ids = first + tl.arange(0, KEYS)
        offsets = start + key_ids[:, None] * d_head + features[None, :]
        mask = (key_ids < n_keys)[:, None] & is_feature[None, :]
        scores = tl.sum(tl.load(keys + offsets, mask=mask, other=0.0) * query[None, :], axis=1)
        scores = tl.where(key_ids < n_keys, scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=0))
        weights, correction = tl.exp(scores - new_peak), tl.exp(peak - new_peak)
        block_sum = tl.sum(weights[:, None] * tl.load(values + offsets, mask=mask, other=0.0), axis=0)
        output = output * correction + block_sum
        total = total * correction + tl.sum(weights, axis=0)
        peak = new_peak
    tl.store(out + head * d_head + features, output / total, mask=is_feature)


@triton_jit.kernel
def project(
    x: triton_jit.Pointer,
    norm_weight: triton_jit.Pointer,
    norm_bias: triton_jit.Pointer,
    weight: triton_jit.Pointer,
    gate: triton_jit.Pointer,
    bias: triton_jit.Pointer,
    out: triton_jit.Pointer,
    d_in: triton_jit.Number,
    d_out: triton_jit.Number,
    eps: triton_jit.Number,
    NORM: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program computes ROWS outputs."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < d_out
    mean, scale = _norm_statistics(x, d_in, eps, NORM, BLOCK)
    # 64 bits: there may be more than 2^31 weights
    offsets = rows.to(tl.int64)[:, None] * d_in
    y, gates = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, d_in, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        normed = _normalize(x, norm_weight, norm_bias, ids, d_in, mean, scale, NORM, HAS_NORM_BIAS)
        mask = is_row[:, None] & (ids < d_in)[None, :]
        y += tl.sum(tl.load(weight + offsets + ids[None, :], mask=mask, other=0.0) * normed[None, :], axis=1)
        if ACTIVATION == 5:
            gated = tl.load(gate + offsets + ids[None, :], mask=mask, other=0.0) * normed[None, :]
            gates += tl.sum(gated, axis=1)
    if HAS_BIAS:
        y += tl.load(bias + rows, mask=is_row, other=0.0)
    y = _activate(y, gates, ACTIVATION)
    if IS_ADDED:
        y += tl.load(out + rows, mask=is_row, other=0.0)
    tl.store(out + rows, y, mask=is_row)


@triton_jit.kernel
def _activate(y: triton_jit.Tile, gates: triton_jit.Tile, ACTIVATION: tl.constexpr) -> triton_jit.Tile:
    """Apply the activation with this code."""
    if ACTIVATION == 1:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == 2:
        # (1 + tanh u) / 2 = sigmoid(2u)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == 3:
        y = tl.maximum(y, 0.0) * tl.maximum(y, 0.0)
    elif ACTIVATION == 4:
        y = y * tl.sigmoid(y)
    elif ACTIVATION == 5:
        y = y * tl.sigmoid(y) * gates
    return y


@triton_jit.kernel
def choose(
    logits: triton_jit.Pointer,
    token: triton_jit.Pointer,
    position: triton_jit.Pointer,
    generated: triton_jit.Pointer,
    vocab_size: triton_jit.Number,
    BLOCK: tl.constexpr,
) -> None:
    """One program finds the two highest logits."""
    best, second = tl.full((), MIN_SCORE, tl.float32), tl.full((), MIN_SCORE, tl.float32)
    likeliest, n_nan = 0, 0
    for first in range(0, vocab_size, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        scores = tl.load(logits + ids, mask=ids < vocab_size, other=-float("inf"))
        top = tl.max(scores, axis=0)
        lowest = tl.min(tl.where(scores == top, ids, vocab_size), axis=0)
        others = tl.max(tl.where(ids == lowest, -float("inf"), scores), axis=0)
        second = tl.maximum(tl.maximum(second, others), tl.minimum(best, top))
        likeliest = tl.where(top > best, lowest, likeliest)
        best = tl.maximum(best, top)
        n_nan += tl.sum((scores != scores).to(tl.int32), axis=0)
    index = tl.load(position) + 1
    is_unique = (best - second >= TIE_TOLERANCE) & (best < float("inf")) & (n_nan == 0)
    tl.store(token, likeliest)
    tl.store(position, index)
    tl.store(generated + index, tl.where(is_unique, likeliest, -1))


@triton_jit.kernel
def _norm_statistics(
    x: triton_jit.Pointer,
    d_in: triton_jit.Number,
    eps: triton_jit.Number,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[triton_jit.Number, triton_jit.Number]:
    """The mean that a norm subtracts, and the scale that it multiplies by."""
    mean, scale = tl.full((), 0.0, tl.float32), tl.full((), 1.0, tl.float32)
    if NORM == 2:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, d_in, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            total += tl.load(x + ids, mask=ids < d_in, other=0.0)
        mean = tl.sum(total, axis=0) / d_in
    if NORM != 0:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, d_in, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            centered = tl.where(ids < d_in, tl.load(x + ids, mask=ids < d_in, other=0.0) - mean, 0.0)
            squares += centered * centered
        scale = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / d_in + eps)
    return mean, scale


@triton_jit.kernel
def _normalize(
    x: triton_jit.Pointer,
    weight: triton_jit.Pointer,
    bias: triton_jit.Pointer,
    ids: triton_jit.Tile,
    d_in: triton_jit.Number,
    mean: triton_jit.Number,
    scale: triton_jit.Number,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> triton_jit.Tile:
    """A block of features, normalized."""
    mask = ids < d_in
    y = tl.load(x + ids, mask=mask, other=0.0)
    if NORM != 0:
        y = (y - mean) * scale * tl.load(weight + ids, mask=mask, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias + ids, mask=mask, other=0.0)
    return y
