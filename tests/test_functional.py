"""The pure functions. Alone: `uv run pytest tests/test_functional.py`."""

import math

import pytest
import torch
from torch.nn import functional as tF

from llm_basics.core import functional as F

HALVES = [torch.float16, torch.bfloat16]
THETA = 500.0
CONTEXT = 41
# the tables of angles may be float32: 40 radians are then off by some 5e-6
ROPE_TOLERANCE = {"rtol": 1e-5, "atol": 5e-5}
# snapshots are compared in float32
SNAPSHOT_TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def ramp(like, *shape):
    """Distinct numbers from -1 to 2, as a tensor like `like`."""
    numbers = torch.linspace(-1, 2, math.prod(shape), device=like.device)
    return numbers.reshape(shape).to(like.dtype)


# what every piece on features of size 6 must do, whatever it computes
PIECES = {
    "linear": lambda a, x: a.run_linear(6, 4, ramp(x, 4, 6), x),
    "softmax": lambda a, x: a.run_softmax(x, dim=-1),
    "log_softmax": lambda a, x: a.run_log_softmax(x, dim=-1),
    "silu": lambda a, x: a.run_silu(x),
    "gelu": lambda a, x: a.run_gelu(x),
    "gelu_tanh": lambda a, x: a.run_gelu(x, approximate="tanh"),
    "relu2": lambda a, x: a.run_relu2(x),
    "swiglu": lambda a, x: a.run_swiglu(6, 9, ramp(x, 9, 6), ramp(x, 6, 9), ramp(x, 9, 6).flip(0), x),
    "rmsnorm": lambda a, x: a.run_rmsnorm(6, 1e-2, ramp(x, 6), x),
    "layernorm": lambda a, x: a.run_layernorm(6, 1e-2, ramp(x, 6), ramp(x, 6).flip(0), x),
    "rope": lambda a, x: a.run_rope(6, THETA, CONTEXT, x, 3 + torch.arange(x.shape[-2], device=x.device)),
    "attention": lambda a, x: a.run_scaled_dot_product_attention(x, x.flip(-2), x[..., :4]),
}
each_piece = pytest.mark.parametrize("piece", PIECES.values(), ids=PIECES.keys())

# --------------------------------------------------------------------------------------------------
# Oracle: lookup, projection, activations


def test_linear_matches_torch(adapters, assert_matches, randn):
    assert_matches(
        lambda x, weight: adapters.run_linear(7, 5, weight, x),
        lambda x, weight: tF.linear(x, weight),
        x=randn(2, 3, 4, 7),
        weight=randn(5, 7),
    )


def test_linear_with_bias_matches_torch(assert_matches, randn):
    assert_matches(
        F.linear,
        lambda x, weight, bias: tF.linear(x, weight, bias),
        x=randn(2, 3, 7),
        weight=randn(5, 7),
        bias=randn(5),
    )


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_embedding_matches_torch(adapters, assert_matches, randn, ids_dtype):
    assert_matches(
        lambda ids, weight: adapters.run_embedding(11, 6, weight, ids),
        lambda ids, weight: tF.embedding(ids, weight),
        ids=torch.tensor([[[3, 0, 10], [3, 3, 7]]], dtype=ids_dtype),
        weight=randn(11, 6),
    )


def test_silu_matches_torch(adapters, assert_matches, randn):
    assert_matches(lambda x: adapters.run_silu(x), lambda x: tF.silu(x), x=3 * randn(3, 4, 5))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_matches_torch(adapters, assert_matches, randn, approximate):
    assert_matches(
        lambda x: adapters.run_gelu(x, approximate),
        lambda x: tF.gelu(x, approximate=approximate),
        x=2 * randn(3, 4, 5),
    )


def test_relu2_matches_torch(adapters, assert_matches, randn):
    assert_matches(lambda x: adapters.run_relu2(x), lambda x: tF.relu(x).square(), x=2 * randn(3, 4, 5))


def test_swiglu_matches_torch(adapters, assert_matches, oracle, randn):
    assert_matches(
        lambda x, w1, w2, w3: adapters.run_swiglu(4, 6, w1, w2, w3, x),
        oracle.ffn,
        x=randn(2, 3, 5, 4),
        w1=randn(6, 4),
        w2=randn(4, 6),
        w3=randn(6, 4),
    )


# --------------------------------------------------------------------------------------------------
# Oracle: reductions


@pytest.mark.parametrize("dim", [0, 1, -2, -1])
def test_softmax_matches_torch(adapters, assert_matches, randn, dim):
    x = randn(3, 4, 5, 6) * torch.tensor([0.1, 1, 10]).reshape(3, 1, 1, 1)
    assert_matches(lambda x: adapters.run_softmax(x, dim), lambda x: tF.softmax(x, dim), x=x)


@pytest.mark.parametrize("dim", [0, 1, -2, -1])
def test_log_softmax_matches_torch(adapters, assert_matches, randn, dim):
    x = randn(3, 4, 5, 6) * torch.tensor([0.1, 1, 10]).reshape(3, 1, 1, 1)
    assert_matches(lambda x: adapters.run_log_softmax(x, dim), lambda x: tF.log_softmax(x, dim), x=x)


def rows_of_all_sizes(randn, d_model):
    """[2, 4, d_model]: ordinary rows away from mean 0, large ones, tiny ones below sqrt(eps), and zeros."""
    return (0.5 + randn(2, 4, d_model)) * torch.tensor([1, 50, 3e-3, 0]).reshape(4, 1)


def test_rms_norm_matches_torch(adapters, assert_matches, randn):
    assert_matches(
        lambda x, weight: adapters.run_rmsnorm(7, 1e-2, weight, x),
        lambda x, weight: tF.rms_norm(x, (7,), weight, eps=1e-2),
        x=rows_of_all_sizes(randn, 7),
        weight=randn(7),
    )


def test_layer_norm_matches_torch(adapters, assert_matches, randn):
    assert_matches(
        lambda x, weight, bias: adapters.run_layernorm(7, 1e-2, weight, bias, x),
        lambda x, weight, bias: tF.layer_norm(x, (7,), weight, bias, eps=1e-2),
        x=rows_of_all_sizes(randn, 7),
        weight=randn(7),
        bias=randn(7),
    )


def test_layer_norm_without_bias_matches_torch(assert_matches, randn):
    assert_matches(
        lambda x, weight: F.layer_norm(x, weight, eps=1e-2),
        lambda x, weight: tF.layer_norm(x, (7,), weight, eps=1e-2),
        x=rows_of_all_sizes(randn, 7),
        weight=randn(7),
    )


# --------------------------------------------------------------------------------------------------
# Oracle: positions and attention


@pytest.mark.parametrize(
    "positions",
    [torch.arange(36, 41), torch.tensor([9, 2, 2, 40, 0]), torch.arange(30).reshape(2, 3, 5).flip(0)],
    ids=["offset", "unordered", "batched"],
)
def test_rope_matches_complex_rotation(adapters, assert_matches, oracle, randn, positions):
    assert_matches(
        lambda x: adapters.run_rope(6, THETA, CONTEXT, x, positions),
        lambda x: oracle.rope(x, positions, THETA),
        **ROPE_TOLERANCE,
        x=randn(2, 3, 5, 6),
    )


def attention_inputs(randn):
    return {"q": randn(2, 3, 4, 6), "k": randn(2, 3, 5, 6), "v": randn(2, 3, 5, 7)}


def some_mask(*shape):
    """A random mask with at least one True in each row."""
    mask = torch.rand(shape) < 0.5
    mask[..., 1] = True
    return mask


@pytest.mark.parametrize("mask_shape", [None, (4, 5), (2, 3, 4, 5)], ids=["none", "shared", "batched"])
def test_attention_matches_torch(adapters, assert_matches, randn, mask_shape):
    mask = some_mask(*mask_shape) if mask_shape else None
    assert_matches(
        lambda q, k, v: adapters.run_scaled_dot_product_attention(q, k, v, mask),
        lambda q, k, v: tF.scaled_dot_product_attention(q, k, v, mask),
        **attention_inputs(randn),
    )


def test_attention_is_causal_on_request(assert_matches, randn):
    assert_matches(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda q, k, v: tF.scaled_dot_product_attention(q, k, v, is_causal=True),
        **attention_inputs(randn),
    )


# --------------------------------------------------------------------------------------------------
# Oracle: the objective


def test_cross_entropy_matches_torch(adapters, assert_matches, randn):
    assert_matches(
        lambda logits, targets: adapters.run_cross_entropy(logits, targets),
        lambda logits, targets: tF.cross_entropy(logits, targets),
        logits=4 * randn(5, 9),
        targets=torch.tensor([0, 8, 3, 3, 1]),
    )


def test_cross_entropy_matches_torch_for_large_logits(adapters, assert_matches, randn):
    assert_matches(
        lambda logits, targets: adapters.run_cross_entropy(logits, targets),
        lambda logits, targets: tF.cross_entropy(logits, targets),
        logits=1e4 * randn(5, 9),
        targets=torch.tensor([0, 8, 3, 3, 1]),
    )


def test_cross_entropy_is_the_mean_over_all_positions(adapters, assert_matches, randn):
    def by_hand(logits, targets):
        probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
        chosen = [probabilities[b, t, targets[b, t]] for b in range(3) for t in range(256)]
        return -torch.stack(chosen).log().sum() / (3 * 256)

    assert_matches(
        lambda logits, targets: adapters.run_cross_entropy(logits, targets),
        by_hand,
        logits=randn(3, 256, 11),
        targets=torch.randint(11, (3, 256)),
    )


@pytest.mark.parametrize("ignore_index", [-100, 4])
def test_ignored_targets_count_neither_in_sum_nor_mean(adapters, assert_matches, randn, ignore_index):
    targets = torch.randint(4, (3, 5))
    targets[0, 1:] = ignore_index  # one counts in the first row, four in the second, all in the third
    targets[1, 0] = ignore_index
    assert_matches(
        lambda logits: adapters.run_masked_cross_entropy(logits, targets, ignore_index),
        lambda logits: tF.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index),
        logits=3 * randn(3, 5, 9),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_reductions_and_z_loss(assert_matches, randn, reduction):
    targets = torch.tensor([[0, 8, -100], [3, -100, -100]])

    def by_hand(logits):
        normalizers = torch.logsumexp(logits, -1)
        losses = tF.cross_entropy(logits.mT, targets, reduction="none") + 0.3 * normalizers**2 * (
            targets >= 0
        )
        return {"mean": losses.sum() / 3, "sum": losses.sum(), "none": losses}[reduction]

    assert_matches(
        lambda logits: F.cross_entropy(logits, targets, z_loss=0.3, reduction=reduction),
        by_hand,
        logits=2 * randn(2, 3, 9),
    )


def test_linear_cross_entropy_matches_torch(adapters, assert_matches, randn):
    targets = torch.tensor([[0, 8, -100], [3, 3, 1]])
    assert_matches(
        lambda x, weight: adapters.run_linear_cross_entropy(x, weight, targets),
        lambda x, weight: tF.cross_entropy(tF.linear(x, weight).flatten(0, 1), targets.flatten()),
        x=randn(2, 3, 4),
        weight=randn(9, 4),
    )


# --------------------------------------------------------------------------------------------------
# Property: any piece


@each_piece
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
@pytest.mark.beyond
def test_dtype_in_is_dtype_out(adapters, randn, piece, dtype):
    exact = randn(5, 6).to(dtype)
    output = piece(adapters, exact)
    assert output.dtype == dtype
    rounding = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        output.double(), piece(adapters, exact.double()), rtol=rounding, atol=8 * rounding
    )


@each_piece
@pytest.mark.beyond
def test_device_is_followed(adapters, piece):
    assert piece(adapters, torch.empty(2, 5, 6, device="meta")).device.type == "meta"


@each_piece
def test_input_is_not_changed(adapters, randn, piece):
    x = randn(2, 5, 6)
    before = x.clone()
    piece(adapters, x)
    assert torch.equal(x, before)


@each_piece
def test_leading_dims_are_independent(adapters, randn, piece):
    x = randn(2, 3, 5, 6)
    alone = [[piece(adapters, x[i, j]) for j in range(3)] for i in range(2)]
    torch.testing.assert_close(piece(adapters, x), torch.stack([torch.stack(row) for row in alone]))


# --------------------------------------------------------------------------------------------------
# Property: half precision


# the size of the inputs, the piece, its reference
REDUCTIONS = {
    "softmax": (1, lambda a, x: a.run_softmax(x, dim=-1), lambda x: tF.softmax(x, -1)),
    "log_softmax": (1, lambda a, x: a.run_log_softmax(x, dim=-1), lambda x: tF.log_softmax(x, -1)),
    "rmsnorm": (
        300,  # the square of 256 is more than float16 can hold
        lambda a, x: a.run_rmsnorm(x.shape[-1], 1e-2, torch.full_like(x[0], 0.5), x),
        lambda x: tF.rms_norm(x, x.shape[-1:], torch.full_like(x[0], 0.5), 1e-2),
    ),
    "layernorm": (
        300,
        lambda a, x: a.run_layernorm(x.shape[-1], 1e-2, torch.full_like(x[0], 0.5), torch.ones_like(x[0]), x),
        lambda x: tF.layer_norm(x, x.shape[-1:], torch.full_like(x[0], 0.5), torch.ones_like(x[0]), 1e-2),
    ),
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size, piece, reference", REDUCTIONS.values(), ids=REDUCTIONS.keys())
@pytest.mark.beyond
def test_half_precision_is_rounded_only_at_the_end(adapters, randn, size, piece, reference, dtype):
    x = (size * (3 + randn(40, 50))).to(dtype)
    # one rounding is half an eps; float16 is spaced by 6e-8 near zero
    rounding = {"rtol": 0.6 * torch.finfo(dtype).eps, "atol": 6e-8}
    torch.testing.assert_close(piece(adapters, x).double(), reference(x.double()), **rounding)


@pytest.mark.beyond
def test_softmax_of_more_entries_than_float16_can_count(adapters):
    probabilities = adapters.run_softmax(torch.zeros(70_000, dtype=torch.float16), dim=0)
    torch.testing.assert_close(probabilities.double().sum().item(), 1.0, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.beyond
def test_cross_entropy_of_half_precision(adapters, dtype):
    logits = torch.zeros(2, 70_000, dtype=dtype)  # float16 ends at 65,504
    logits[1, :2] = torch.tensor([800, 796])  # bfloat16 is spaced by 4 here
    losses = [adapters.run_cross_entropy(row[None], torch.tensor([0])) for row in logits]
    assert all(loss.dtype == dtype for loss in losses)
    expected = torch.tensor([math.log(70_000), math.log1p(math.exp(-4))])
    torch.testing.assert_close(torch.stack(losses).float(), expected, rtol=1e-2, atol=0)


# --------------------------------------------------------------------------------------------------
# Property: lookup and scores


def test_embedding_reads_only_the_rows_it_was_asked_for(adapters):
    weight = torch.tensor([[1.0, 2.0], [math.inf, math.nan], [3.0, 4.0]])
    assert adapters.run_embedding(3, 2, weight, torch.tensor([2, 0])).tolist() == [[3, 4], [1, 2]]


def test_embedding_refuses_ids_beyond_the_vocabulary(adapters):
    with pytest.raises(IndexError):
        adapters.run_embedding(3, 2, torch.zeros(3, 2), torch.tensor([3]))


@pytest.mark.beyond
def test_softmax_is_a_distribution_to_the_last_digit(adapters, randn):
    sums = adapters.run_softmax(5 * randn(4, 100), dim=-1).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["run_softmax", "run_log_softmax"])
@pytest.mark.parametrize("shift", [1e4, -1e4])
@pytest.mark.beyond
def test_softmax_ignores_a_shift(adapters, randn, name, shift):
    x = randn(3, 5)
    softmax = getattr(adapters, name)
    torch.testing.assert_close(softmax(x + shift, dim=0), softmax(x, dim=0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["run_softmax", "run_log_softmax"])
def test_softmax_of_a_row_far_below_the_others(adapters, assert_matches, randn, name):
    x = randn(3, 5)
    x[1] -= 1e4
    reference = tF.softmax if name == "run_softmax" else tF.log_softmax
    assert_matches(lambda x: getattr(adapters, name)(x, dim=-1), lambda x: reference(x, dim=-1), x=x)


def test_log_softmax_of_a_hopeless_entry_is_finite(adapters):
    assert adapters.run_log_softmax(torch.tensor([1000.0, -1000.0]), dim=0).tolist() == [0, -2000]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_silu_and_its_gradient_are_finite_for_large_inputs(adapters, dtype):
    x = torch.tensor([-1e4, -800, -90, 90, 800, 1e4], dtype=dtype, requires_grad=True)
    y = adapters.run_silu(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, x.clamp(min=0))
    torch.testing.assert_close(gradient, (x > 0).to(dtype))


def test_gelu_refuses_an_unknown_approximation():
    with pytest.raises(ValueError, match="'none' or 'tanh', got 'sigmoid'"):
        F.gelu(torch.zeros(1), approximate="sigmoid")


# --------------------------------------------------------------------------------------------------
# Property: dropout


def test_dropout_keeps_the_expectation_and_scales_the_gradient_alike(randn):
    x = torch.ones(100_000, requires_grad=True)
    y = F.dropout(x, p=0.3)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, gradient)
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_dropout_refuses_a_share_out_of_range(p):
    with pytest.raises(ValueError, match=f"below 1, got {p}"):
        F.dropout(torch.ones(3), p)


# --------------------------------------------------------------------------------------------------
# Property: positions


def test_rope_scores_depend_on_differences_of_positions_only(adapters, randn):
    q, k, positions = randn(4, 6), randn(4, 6), torch.tensor([3, 0, 7, 1])

    def scores(shift):
        turned = [adapters.run_rope(6, THETA, CONTEXT, x, positions + shift) for x in (q, k)]
        return turned[0] @ turned[1].T

    torch.testing.assert_close(scores(30), scores(0), **ROPE_TOLERANCE)
    assert (scores(0) - q @ k.T).abs().max() > 0.1


def test_rope_leaves_position_zero_and_all_lengths(adapters, randn):
    x = randn(5, 6)
    turned = adapters.run_rope(6, THETA, CONTEXT, x, torch.tensor([0, 1, 5, 20, 40]))
    torch.testing.assert_close(turned[0], x[0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), **ROPE_TOLERANCE)


def test_rope_tables_are_exact_at_distant_positions():
    cos, sin = F.rope_tables(d_head=4, context_length=30_000, theta=THETA)
    angle = 29_999 / math.sqrt(THETA)
    expected = torch.tensor([math.cos(angle), math.sin(angle)])
    torch.testing.assert_close(torch.stack([cos[-1, 1], sin[-1, 1]]), expected, rtol=0, atol=1e-6)


def test_rope_refuses_an_odd_number_of_features():
    with pytest.raises(ValueError, match="d_head must be even, .* got 5"):
        F.rope_tables(d_head=5, context_length=4)


# --------------------------------------------------------------------------------------------------
# Property: attention


def test_attention_ignores_the_order_of_keys(adapters, randn):
    q, k, v = attention_inputs(randn).values()
    mask, order = some_mask(2, 3, 4, 5), torch.tensor([3, 1, 4, 0, 2])
    shuffled = adapters.run_scaled_dot_product_attention(
        q, k[..., order, :], v[..., order, :], mask[..., order]
    )
    torch.testing.assert_close(shuffled, adapters.run_scaled_dot_product_attention(q, k, v, mask))


@pytest.mark.beyond
def test_attention_to_a_masked_key_is_zero_however_well_it_matches(adapters, randn):
    q, k, v = torch.full((4, 6), 1e3), torch.full((5, 6), -1e3), randn(5, 7)
    k[2] *= -1
    mask = (torch.arange(5) != 2).expand(4, 5)
    output = adapters.run_scaled_dot_product_attention(q.double(), k.double(), v, mask)
    torch.testing.assert_close(output, v[mask[0]].mean(0).expand(4, 7))


@pytest.mark.beyond
def test_query_that_may_attend_to_nothing_gets_zeros_and_no_gradient(adapters, randn):
    q, k, v = (x.requires_grad_() for x in attention_inputs(randn).values())
    mask = some_mask(4, 5)
    mask[2] = False
    output = adapters.run_scaled_dot_product_attention(q, k, v, mask)
    gradients = torch.autograd.grad(output.square().sum(), [q, k, v])
    assert torch.equal(output[..., 2, :], torch.zeros(2, 3, 7, dtype=torch.float64))
    assert (output[..., 3, :] != 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert torch.equal(gradients[0][..., 2, :], torch.zeros(2, 3, 6, dtype=torch.float64))


def test_attention_does_not_change_its_inputs(adapters, randn):
    inputs = [*attention_inputs(randn).values(), some_mask(4, 5)]
    before = [x.clone() for x in inputs]
    adapters.run_scaled_dot_product_attention(*inputs)
    assert all(map(torch.equal, inputs, before))


def test_attention_drops_probabilities():
    q, k = torch.zeros(500, 2, 4), torch.zeros(500, 8, 4)
    value = torch.cat([torch.eye(8), torch.ones(8, 1)], dim=1).expand(
        500, 8, 9
    )  # shows each weight, and their sum
    kept = F.scaled_dot_product_attention(q, k, value, dropout_p=0.25)
    assert kept[..., :8].unique().tolist() == pytest.approx([0, 1 / 8 / 0.75])
    assert (kept[..., :8] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(kept[..., 8], kept[..., :8].sum(-1))


def test_attention_refuses_two_masks(randn):
    with pytest.raises(ValueError, match="either a mask or is_causal"):
        F.scaled_dot_product_attention(
            *attention_inputs(randn).values(), mask=some_mask(4, 5), is_causal=True
        )


def test_causal_mask_counts_from_the_offset():
    assert F.causal_mask(2, 4, offset=1).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]


# --------------------------------------------------------------------------------------------------
# Property: the objective


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary(adapters):
    assert adapters.run_cross_entropy(torch.full((4, 9), 3.0), torch.arange(4)).item() == pytest.approx(
        math.log(9)
    )


def test_cross_entropy_has_no_cap(adapters):
    logits = torch.tensor([[0.0, -1000.0]])
    assert adapters.run_cross_entropy(logits, torch.tensor([1])).item() == 1000


def test_cross_entropy_does_not_change_its_inputs(adapters, randn):
    logits, targets = randn(3, 9), torch.tensor([0, 8, -100])
    before = logits.clone(), targets.clone()
    adapters.run_masked_cross_entropy(logits, targets, -100)
    assert torch.equal(logits, before[0]) and torch.equal(targets, before[1])


def test_cross_entropy_of_nothing_is_zero(randn):
    assert F.cross_entropy(randn(3, 9), torch.full((3,), -100)).item() == 0


def test_cross_entropy_refuses_an_unknown_reduction(randn):
    with pytest.raises(ValueError, match="'mean', 'sum' or 'none', got 'median'"):
        F.cross_entropy(randn(3, 9), torch.zeros(3, dtype=torch.long), reduction="median")


# --------------------------------------------------------------------------------------------------
# Snapshot


SNAPSHOTS = {
    "linear": ("linear", "y", lambda a, s: a.run_linear(7, 5, s["weight"], s["x"])),
    "embedding": ("embedding", "y", lambda a, s: a.run_embedding(11, 6, s["weight"], s["ids"])),
    "softmax": ("softmax", "y", lambda a, s: a.run_softmax(s["x"], dim=1)),
    "silu": ("activations", "silu", lambda a, s: a.run_silu(s["x"])),
    "gelu": ("activations", "gelu", lambda a, s: a.run_gelu(s["x"])),
    "gelu_tanh": ("activations", "gelu_tanh", lambda a, s: a.run_gelu(s["x"], "tanh")),
    "swiglu": ("swiglu", "y", lambda a, s: a.run_swiglu(4, 6, s["w1"], s["w2"], s["w3"], s["x"])),
    "rmsnorm": ("norms", "rms", lambda a, s: a.run_rmsnorm(8, 1e-2, s["weight"], s["x"])),
    "layernorm": ("norms", "layer", lambda a, s: a.run_layernorm(8, 1e-2, s["weight"], s["bias"], s["x"])),
    "rope": ("rope", "y", lambda a, s: a.run_rope(6, THETA, CONTEXT, s["x"], s["positions"])),
    "attention": (
        "attention",
        "y",
        lambda a, s: a.run_scaled_dot_product_attention(s["q"], s["k"], s["v"], s["mask"]),
    ),
    "cross_entropy": ("cross_entropy", "loss", lambda a, s: a.run_cross_entropy(s["logits"], s["targets"])),
}


@pytest.mark.parametrize("name, result, piece", SNAPSHOTS.values(), ids=SNAPSHOTS.keys())
def test_snapshot(adapters, snapshot, name, result, piece):
    arrays = snapshot(name)
    torch.testing.assert_close(piece(adapters, arrays), arrays[result], **SNAPSHOT_TOLERANCE)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_of_half_precision_loses_no_digits_far_from_zero(adapters, approximate):
    x = torch.tensor([-3.0, -2.5, -1.0, 2.0], dtype=torch.bfloat16)
    expected = tF.gelu(x.double(), approximate=approximate)
    torch.testing.assert_close(adapters.run_gelu(x, approximate).double(), expected, rtol=4e-3, atol=0)


@pytest.mark.beyond
def test_embedding_refuses_negative_ids(adapters):
    with pytest.raises(IndexError):
        adapters.run_embedding(5, 2, torch.zeros(5, 2), torch.tensor([-1]))
