"""The layers. Alone: `uv run pytest tests/test_layers.py`."""

import math
from itertools import accumulate

import pytest
import torch
from einops import repeat
from torch import nn
from torch.func import functional_call
from torch.nn import functional as tF

from llm_basics.core import layers

D_MODEL, N_HEADS, SEQ = 12, 3, 5
THETA = 500.0
CONTEXT = 32
# the tables of angles may be float32
ROPE_TOLERANCE = {"rtol": 1e-5, "atol": 5e-5}
# snapshots are compared in float32
SNAPSHOT_TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def attention_weights(randn):
    return {name: randn(D_MODEL, D_MODEL) / 2 for name in "qkvo"}


def randomize(module):
    """Let no two parameters be alike, norms and biases included."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.5)
    return module


# --------------------------------------------------------------------------------------------------
# Oracle


def test_attention_without_a_batch_matches_torch(adapters, assert_matches, oracle, randn):
    assert_matches(
        lambda x, q, k, v, o: adapters.run_multihead_self_attention(D_MODEL, N_HEADS, q, k, v, o, x),
        lambda x, q, k, v, o: oracle.attention(x, q, k, v, o, N_HEADS),
        x=randn(SEQ, D_MODEL),
        **attention_weights(randn),
    )


def test_rotary_attention_with_positions_for_all_matches_torch(adapters, assert_matches, oracle, randn):
    positions = torch.tensor([3, 4, 9, 11, 30])
    assert_matches(
        lambda x, q, k, v, o: adapters.run_multihead_self_attention_with_rope(
            D_MODEL, N_HEADS, CONTEXT, THETA, q, k, v, o, x, positions
        ),
        lambda x, q, k, v, o: oracle.attention(x, q, k, v, o, N_HEADS, THETA, positions),
        **ROPE_TOLERANCE,
        x=randn(2, SEQ, D_MODEL),
        **attention_weights(randn),
    )


def test_attention_with_qk_norm_matches_torch(randn, oracle):
    rope = layers.RotaryEmbedding(4, CONTEXT, THETA)
    attention = randomize(layers.MultiHeadSelfAttention(12, 3, rope=rope, qk_norm=True, dtype=torch.float64))
    x = randn(2, SEQ, 12)
    q, k, v = (
        layer(x).unflatten(-1, (3, 4)).transpose(1, 2)
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = (
        oracle.rope(tF.rms_norm(t, (4,), norm.weight, 1e-5), torch.arange(SEQ), THETA)
        for t, norm in ((q, attention.q_norm), (k, attention.k_norm))
    )
    mixed = tF.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(attention(x), attention.output_proj(mixed), **ROPE_TOLERANCE)


MLP_ORACLES = {
    "gelu": tF.gelu,
    "gelu_tanh": lambda x: tF.gelu(x, approximate="tanh"),
    "relu2": lambda x: tF.relu(x).square(),
    "silu": tF.silu,
}


@pytest.mark.parametrize("activation", MLP_ORACLES)
def test_mlp_matches_torch(randn, activation):
    mlp = randomize(layers.MLP(4, 9, activation, bias=True, dtype=torch.float64))
    x = randn(2, 3, 4)
    hidden = MLP_ORACLES[activation](tF.linear(x, mlp.w1.weight, mlp.w1.bias))
    torch.testing.assert_close(mlp(x), tF.linear(hidden, mlp.w2.weight, mlp.w2.bias))


# --------------------------------------------------------------------------------------------------
# Property: attention


@pytest.fixture(params=["plain", "rotary"])
def attend(request, adapters, randn):
    """Multi-head attention with fixed weights, as a function of the input; `weights` may replace them."""
    fixed = attention_weights(randn)

    def plain(x, **weights):
        return adapters.run_multihead_self_attention(D_MODEL, N_HEADS, *(fixed | weights).values(), x)

    def rotary(x, **weights):
        return adapters.run_multihead_self_attention_with_rope(
            D_MODEL, N_HEADS, CONTEXT, THETA, *(fixed | weights).values(), x
        )

    return plain if request.param == "plain" else rotary


def test_attention_sees_itself_and_the_past_and_never_the_future(attend, randn):
    x = randn(SEQ, D_MODEL)
    jacobian = torch.autograd.functional.jacobian(attend, x).abs().sum((1, 3))
    assert torch.equal(jacobian > 1e-6, torch.ones(SEQ, SEQ).tril().bool())
    assert (jacobian.triu(1) == 0).all()


def test_attention_teaches_queries_and_keys(attend, randn):
    weights = {name: weight.requires_grad_() for name, weight in attention_weights(randn).items()}
    attend(randn(2, SEQ, D_MODEL), **weights).square().sum().backward()
    for name, weight in weights.items():
        assert weight.grad is not None, f"no gradient reaches {name}"
        assert weight.grad.abs().max() > 1e-3, f"the gradient of {name} is 0"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_attention_keeps_the_dtype(attend, randn, dtype):
    weights = {name: weight.to(dtype) for name, weight in attention_weights(randn).items()}
    assert attend(randn(2, SEQ, D_MODEL).to(dtype), **weights).dtype == dtype


def test_attention_follows_the_device(attend, randn):
    weights = {name: weight.to("meta") for name, weight in attention_weights(randn).items()}
    assert attend(torch.empty(2, SEQ, D_MODEL, device="meta"), **weights).device.type == "meta"


def test_rotary_attention_ignores_a_shift_of_all_positions(adapters, randn):
    x, weights = randn(2, SEQ, D_MODEL), attention_weights(randn).values()
    near, far = (
        adapters.run_multihead_self_attention_with_rope(
            D_MODEL, N_HEADS, CONTEXT, THETA, *weights, x, shift + torch.tensor([0, 1, 5, 6, 9])
        )
        for shift in (0, 20)
    )
    torch.testing.assert_close(far, near, **ROPE_TOLERANCE)


def test_attention_drops_out_in_training_only(randn):
    x = randn(2, SEQ, 12)
    attention = layers.MultiHeadSelfAttention(12, 3, dropout=0.5, dtype=torch.float64)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    without = functional_call(
        layers.MultiHeadSelfAttention(12, 3, dtype=torch.float64), dict(attention.named_parameters()), x
    )
    torch.testing.assert_close(attention(x), without)


def test_dropout_acts_in_training_only():
    dropout, x = layers.Dropout(0.5), torch.ones(100)
    assert (dropout(x) == 0).any()
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"d_model": 10, "n_heads": 3}, "d_model must be divisible by n_heads, got 10 and 3"),
        (
            {"d_model": 12, "n_heads": 6, "n_kv_heads": 4},
            "n_heads must be divisible by n_kv_heads, got 6 and 4",
        ),
    ],
)
def test_attention_refuses_heads_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        layers.MultiHeadSelfAttention(**options)


def test_mlp_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match="activation must be .* got 'tanh'"):
        layers.MLP(4, 9, "tanh")


# --------------------------------------------------------------------------------------------------
# Property: weights at the start, and their names


@pytest.mark.parametrize(
    "make, std",
    [
        (lambda: layers.Linear(150, 400), math.sqrt(2 / 550)),
        (lambda: layers.Linear(400, 150), math.sqrt(2 / 550)),
        (lambda: layers.Embedding(400, 150), 1.0),
    ],
    ids=["linear up", "linear down", "embedding"],
)
def test_initial_weights_are_normal_and_cut_at_three_std(make, std):
    weight = make().weight / std
    # what is left of a normal distribution between -3 and 3 has this variance
    kept = math.erf(3 / math.sqrt(2))
    variance = 1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / kept
    assert weight.std().item() == pytest.approx(math.sqrt(variance), rel=0.015)
    assert weight.mean().item() == pytest.approx(0, abs=0.02)
    assert 2.9 < weight.abs().max() <= 3 + 1e-5
    within_one_std = (weight.abs() < 1).float().mean().item()
    assert within_one_std == pytest.approx(math.erf(1 / math.sqrt(2)) / kept, abs=0.01)


def test_norms_start_as_the_identity_and_biases_at_zero():
    assert torch.equal(layers.RMSNorm(5).weight, torch.ones(5))
    assert torch.equal(layers.LayerNorm(5).weight, torch.ones(5))
    assert torch.equal(layers.LayerNorm(5).bias, torch.zeros(5))
    assert torch.equal(layers.Linear(3, 5, bias=True).bias, torch.zeros(5))


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_norms_use_their_eps(name):
    x = torch.tensor([1e-3, -1e-3])
    torch.testing.assert_close(getattr(layers, name)(2, eps=4.0)(x), x / 2)


# layer, its parameters' shapes, how it prints itself
LAYERS = [
    (lambda **kind: layers.Linear(3, 5, **kind), {"weight": (5, 3)}, "3 -> 5"),
    (lambda **kind: layers.Linear(3, 5, bias=True, **kind), {"weight": (5, 3), "bias": (5,)}, "3 -> 5, bias"),
    (lambda **kind: layers.Embedding(11, 6, **kind), {"weight": (11, 6)}, "11 ids -> 6"),
    (lambda **kind: layers.RMSNorm(6, 1e-3, **kind), {"weight": (6,)}, "6, eps=0.001"),
    (lambda **kind: layers.LayerNorm(6, **kind), {"weight": (6,), "bias": (6,)}, "6, eps=1e-05, bias"),
    (lambda **kind: layers.LayerNorm(6, bias=False, **kind), {"weight": (6,)}, "6, eps=1e-05"),
    (
        lambda **kind: layers.SwiGLU(4, 9, **kind),
        {"w1.weight": (9, 4), "w2.weight": (4, 9), "w3.weight": (9, 4)},
        "",
    ),
    (
        lambda **kind: layers.MLP(4, 9, bias=True, **kind),
        {"w1.weight": (9, 4), "w1.bias": (9,), "w2.weight": (4, 9), "w2.bias": (4,)},
        "activation=gelu",
    ),
    (
        lambda **kind: layers.MultiHeadSelfAttention(12, 6, 2, qk_norm=True, **kind),
        {
            "q_proj.weight": (12, 12),
            "k_proj.weight": (4, 12),
            "v_proj.weight": (4, 12),
            "output_proj.weight": (12, 12),
            "q_norm.weight": (2,),
            "k_norm.weight": (2,),
        },
        "6 heads, 2 key/value heads, d_head=2",
    ),
    (
        lambda **kind: layers.MultiHeadSelfAttention(12, 3, bias=True, **kind),
        {f"{name}_proj.weight": (12, 12) for name in ("q", "k", "v", "output")}
        | {f"{name}_proj.bias": (12,) for name in ("q", "k", "v", "output")},
        "3 heads, 3 key/value heads, d_head=4",
    ),
]
each_layer = pytest.mark.parametrize("make, shapes, text", LAYERS)


@each_layer
def test_parameters_have_these_names_and_shapes(make, shapes, text):
    layer = make()
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == shapes
    assert layer.extra_repr() == text


@each_layer
def test_layers_are_made_where_and_as_asked(make, shapes, text):
    layer = make(device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


def test_rotary_embedding_has_nothing_to_save():
    rope = layers.RotaryEmbedding(6, CONTEXT, device="meta")
    assert not rope.state_dict()
    assert rope.cos.device.type == "meta"
    assert rope.extra_repr() == "32 positions, 3 pairs"


# --------------------------------------------------------------------------------------------------
# Snapshot


@pytest.mark.parametrize("kind", ["plain", "rotary"])
def test_attention_snapshot(adapters, snapshot, kind):
    arrays = snapshot("multihead")
    inputs = [arrays[name] for name in "qkvox"]
    if kind == "plain":
        actual = adapters.run_multihead_self_attention(D_MODEL, N_HEADS, *inputs)
    else:
        actual = adapters.run_multihead_self_attention_with_rope(D_MODEL, N_HEADS, CONTEXT, THETA, *inputs)
    torch.testing.assert_close(actual, arrays[kind], **SNAPSHOT_TOLERANCE)


# --------------------------------------------------------------------------------------------------
# Parity


def rotary_attention(n_kv_heads=None, **options):
    rope = layers.RotaryEmbedding(4, CONTEXT, THETA)
    attention = layers.MultiHeadSelfAttention(24, 6, n_kv_heads, rope, dtype=torch.float64, **options)
    return randomize(attention).eval()


@pytest.mark.parametrize("n_kv_heads", [1, 2, 3])
def test_grouped_heads_equal_repeated_weights(randn, n_kv_heads):
    grouped, full = rotary_attention(n_kv_heads), rotary_attention()
    weights = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        group = 6 // n_kv_heads
        weights[name] = repeat(
            weights[name], "(heads d_head) d_in -> (heads group d_head) d_in", d_head=4, group=group
        )
    full.load_state_dict(weights)
    x = randn(2, SEQ, 24)
    torch.testing.assert_close(grouped(x), full(x))


@pytest.mark.parametrize("chunks", [[7], [1] * 7, [3, 1, 3], [1, 4, 2]], ids=str)
@pytest.mark.parametrize("options", [{}, {"n_kv_heads": 2, "qk_norm": True}], ids=["plain", "grouped"])
def test_cached_attention_equals_uncached(randn, chunks, options):
    attention, x = rotary_attention(**options), randn(2, 7, 24)
    cache = layers.KVCache(2, attention.n_kv_heads, context_length=7, d_head=4, dtype=torch.float64)
    outputs = [attention(chunk, cache=cache) for chunk in x.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(outputs, dim=1), attention(x))
    assert cache.length == 7


def test_cached_attention_takes_positions_that_are_given(randn):
    attention, x, positions = rotary_attention(), randn(2, 7, 24), torch.tensor([2, 3, 7, 8, 9, 20, 31])
    cache = layers.KVCache(2, 6, context_length=9, d_head=4, dtype=torch.float64)
    ends = list(accumulate([3, 1, 3], initial=0))
    outputs = [
        attention(x[:, start:end], positions[start:end], cache)
        for start, end in zip(ends, ends[1:], strict=False)
    ]
    torch.testing.assert_close(torch.cat(outputs, dim=1), attention(x, positions))


def test_full_cache_refuses_more(randn):
    cache = layers.KVCache(1, 2, context_length=4, d_head=3)
    chunk = torch.zeros(1, 2, 3, 3)
    cache.append(chunk, chunk)
    with pytest.raises(ValueError, match="the KV cache holds 4 tokens, got token 6"):
        cache.append(chunk, chunk)
