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
# Oracle: what no step of the catalogue compares (tests/test_steps.py)


def test_linear_with_bias_matches_torch(assert_matches, randn):
    assert_matches(
        F.linear,
        lambda x, weight, bias: tF.linear(x, weight, bias),
        x=randn(2, 3, 7),
        weight=randn(5, 7),
        bias=randn(5),
    )


def test_embedding_of_int32_ids_matches_torch(adapters, assert_matches, randn):
    assert_matches(
        lambda ids, weight: adapters.run_embedding(11, 6, weight, ids),
        lambda ids, weight: tF.embedding(ids, weight),
        ids=torch.tensor([[[3, 0, 10], [3, 3, 7]]], dtype=torch.int32),
        weight=randn(11, 6),
    )


def test_relu2_matches_torch(adapters, assert_matches, randn):
    assert_matches(lambda x: adapters.run_relu2(x), lambda x: tF.relu(x).square(), x=2 * randn(3, 4, 5))


# --------------------------------------------------------------------------------------------------
# Oracle: reductions


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_along_the_last_axis_but_one_matches_torch(adapters, assert_matches, randn, name):
    ours, right = getattr(adapters, f"run_{name}"), getattr(tF, name)
    assert_matches(lambda x: ours(x, -2), lambda x: right(x, -2), x=randn(3, 4, 5))


def rows_of_all_sizes(randn, d_model):
    """[2, 4, d_model]: ordinary rows away from mean 0, large ones, tiny ones below sqrt(eps), and zeros."""
    return (0.5 + randn(2, 4, d_model)) * torch.tensor([1, 50, 3e-3, 0]).reshape(4, 1)


def test_layer_norm_without_bias_matches_torch(assert_matches, randn):
    assert_matches(
        lambda x, weight: F.layer_norm(x, weight, eps=1e-2),
        lambda x, weight: tF.layer_norm(x, (7,), weight, eps=1e-2),
        x=rows_of_all_sizes(randn, 7),
        weight=randn(7),
    )


# --------------------------------------------------------------------------------------------------
# Oracle: attention


def attention_inputs(randn):
    return {"q": randn(2, 3, 4, 6), "k": randn(2, 3, 5, 6), "v": randn(2, 3, 5, 7)}


def some_mask(*shape):
    """A random mask with at least one True in each row."""
    mask = torch.rand(shape) < 0.5
    mask[..., 1] = True
    return mask


def test_attention_is_causal_on_request(assert_matches, randn):
    assert_matches(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda q, k, v: tF.scaled_dot_product_attention(q, k, v, is_causal=True),
        **attention_inputs(randn),
    )


# --------------------------------------------------------------------------------------------------
# Oracle: the objective


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


# --------------------------------------------------------------------------------------------------
# Property: any piece


@each_piece
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_dtype_in_is_dtype_out(adapters, randn, piece, dtype):
    exact = randn(5, 6).to(dtype)
    output = piece(adapters, exact)
    assert output.dtype == dtype
    rounding = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        output.double(), piece(adapters, exact.double()), rtol=rounding, atol=8 * rounding
    )


@each_piece
def test_device_is_followed(adapters, piece):
    assert piece(adapters, torch.empty(2, 5, 6, device="meta")).device.type == "meta"


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
def test_half_precision_is_rounded_only_at_the_end(adapters, randn, size, piece, reference, dtype):
    x = (size * (3 + randn(40, 50))).to(dtype)
    # one rounding is half an eps; float16 is spaced by 6e-8 near zero
    rounding = {"rtol": 0.6 * torch.finfo(dtype).eps, "atol": 6e-8}
    torch.testing.assert_close(piece(adapters, x).double(), reference(x.double()), **rounding)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_cross_entropy_of_half_precision(adapters, dtype):
    logits = torch.zeros(2, 70_000, dtype=dtype)  # float16 ends at 65,504
    logits[1, :2] = torch.tensor([800, 796])  # bfloat16 is spaced by 4 here
    losses = [adapters.run_cross_entropy(row[None], torch.tensor([0])) for row in logits]
    assert all(loss.dtype == dtype for loss in losses)
    expected = torch.tensor([math.log(70_000), math.log1p(math.exp(-4))])
    torch.testing.assert_close(torch.stack(losses).float(), expected, rtol=1e-2, atol=0)


# --------------------------------------------------------------------------------------------------
# Property: lookup and scores


@pytest.mark.parametrize("token_id", [3, -1])
def test_embedding_refuses_ids_outside_the_vocabulary(adapters, token_id):
    with pytest.raises(IndexError):
        adapters.run_embedding(3, 2, torch.zeros(3, 2), torch.tensor([token_id]))


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


def test_attention_to_a_masked_key_is_zero_however_well_it_matches(adapters, randn):
    q, k, v = torch.full((4, 6), 1e3), torch.full((5, 6), -1e3), randn(5, 7)
    k[2] *= -1
    mask = (torch.arange(5) != 2).expand(4, 5)
    output = adapters.run_scaled_dot_product_attention(q.double(), k.double(), v, mask)
    torch.testing.assert_close(output, v[mask[0]].mean(0).expand(4, 7))


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
