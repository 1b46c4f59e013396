"""fast/functional.py, fast/optim.py, fast/trainer.py and fast/dataloader.py against the reference.

Run alone: uv run pytest tests/test_fast_functional.py
"""

import dataclasses

import numpy as np
import pytest
import torch

from llm_basics import swap
from llm_basics.core import config, dataloader, functional, layers, model, optim, trainer
from llm_basics.fast import dataloader as fast_data
from llm_basics.fast import functional as fast
from llm_basics.fast import layers as fast_layers
from llm_basics.fast import optim as fast_optim
from llm_basics.fast import trainer as fast_update
from llm_basics.fast.cpu import linear

SHAPE = config.ModelConfig(vocab_size=50, context_length=16, d_model=32, n_layers=2, n_heads=4)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


QKV = (normal(2, 3, 5, 8), normal(2, 3, 7, 8), normal(2, 3, 7, 6))
COS, SIN = functional.rope_tables(8, 5)
IDS = torch.tensor([[3, 1, 4], [1, 5, 0]])
TARGETS = torch.tensor([[3, -100, 4], [1, 5, 0]])
MASK = torch.rand(5, 7) > 0.4
MASK[2] = False

# the function, the differentiated tensors, and the other arguments
CASES = {
    "linear": ("linear", (normal(4, 6, 16), normal(24, 16)), {}),
    "linear, one row": ("linear", (normal(16), normal(24, 16)), {}),
    "linear, bias": ("linear", (normal(6, 16), normal(24, 16), normal(24)), {}),
    "linear, no rows": ("linear", (normal(0, 16), normal(24, 16)), {}),
    "linear, transposed": ("linear", (normal(16, 6).T, normal(16, 24).T), {}),
    "linear, every second": ("linear", (normal(6, 32)[:, ::2], normal(48, 16)[::2], normal(48)[::2]), {}),
    "linear, expanded": ("linear", (normal(1, 16).expand(6, 16), normal(24, 16)), {}),
    "embedding": ("embedding", (normal(6, 4),), {"token_ids": IDS}),
    "gelu": ("gelu", (normal(5, 7),), {}),
    "gelu, tanh": ("gelu", (normal(5, 7),), {"approximate": "tanh"}),
    "silu": ("silu", (normal(5, 7),), {}),
    "swiglu": (
        "swiglu",
        (normal(3, 5, 8), *(0.2 * w for w in (normal(12, 8), normal(8, 12), normal(12, 8)))),
        {},
    ),
    "relu2": ("relu2", (normal(5, 7),), {}),
    "rms_norm": ("rms_norm", (normal(3, 5, 16), normal(16)), {}),
    "rms_norm, large eps": ("rms_norm", (normal(5, 16), normal(16)), {"eps": 0.5}),
    "rms_norm, one row": ("rms_norm", (normal(16), normal(16)), {}),
    "layer_norm": ("layer_norm", (normal(3, 5, 16), normal(16), normal(16)), {}),
    "layer_norm, no bias": ("layer_norm", (normal(5, 16), normal(16)), {"eps": 0.5}),
    "apply_rope": ("apply_rope", (normal(2, 5, 8),), {"cos": COS, "sin": SIN}),
    "apply_rope, strided": ("apply_rope", (normal(2, 5, 16)[..., ::2],), {"cos": COS, "sin": SIN}),
    "attention": ("scaled_dot_product_attention", QKV, {}),
    "attention, causal": ("scaled_dot_product_attention", QKV, {"is_causal": True}),
    "attention, mask": ("scaled_dot_product_attention", QKV, {"mask": MASK}),
    "cross_entropy": ("cross_entropy", (normal(2, 3, 9),), {"targets": TARGETS}),
    "cross_entropy, sum": ("cross_entropy", (normal(2, 3, 9),), {"targets": TARGETS, "reduction": "sum"}),
    "cross_entropy, none": ("cross_entropy", (normal(2, 3, 9),), {"targets": TARGETS, "reduction": "none"}),
    "cross_entropy, z-loss": ("cross_entropy", (normal(2, 3, 9),), {"targets": TARGETS, "z_loss": 0.3}),
    "cross_entropy, ignored": ("cross_entropy", (normal(2, 9),), {"targets": torch.tensor([-100, -100])}),
    "cross_entropy, one": ("cross_entropy", (normal(9),), {"targets": torch.tensor(4), "z_loss": 0.1}),
    "cross_entropy, index": ("cross_entropy", (normal(2, 9),), {"targets": IDS[0, :2], "ignore_index": 3}),
}


def outcome(function, tensors, others):
    """The output, and the gradients of a weighted sum of it."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    others = dict(others)
    first = [others.pop("token_ids")] if "token_ids" in others else []
    output = function(*first, *leaves, **others)
    weights = torch.linspace(-1, 2, output.numel()).view(output.shape).to(output.dtype)
    (output * weights).sum().backward()
    return [output.detach(), *[leaf.grad for leaf in leaves]]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"),
    [(torch.float64, 1e-6, 1e-6), (torch.float32, 1e-5, 2e-6), (torch.bfloat16, 2e-2, 3e-2)],
    ids=str,
)
def test_fast_functions_match_the_reference(case, dtype, rtol, atol):
    name, tensors, others = CASES[case]
    # float64 with atol 1e-6, since apply_rope has float32 tables
    tensors = [tensor.to(dtype) for tensor in tensors]  # keeps strides
    expected = outcome(getattr(functional, name), tensors, others)
    found = outcome(getattr(fast, name), tensors, others)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.fixture
def by_onednn(monkeypatch):
    """Force products by oneDNN, also where MKL is as fast."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch comes without oneDNN here")
    monkeypatch.setattr(linear, "prefers_onednn", lambda: True)


def test_products_in_float32_are_made_by_onednn(by_onednn):
    x, weight = torch.randn(3, 16, requires_grad=True), torch.randn(24, 16)
    assert type(fast.linear(x, weight).grad_fn).__name__ == "_OneDNNLinearBackward"
    with torch.autocast("cpu", torch.bfloat16):
        assert fast.linear(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("linear")])
def test_products_by_onednn_are_the_same(case, by_onednn):
    name, tensors, others = CASES[case]
    found, expected = (outcome(getattr(F, name), tensors, others) for F in (fast, functional))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("made_by", "capability"), [("GenuineIntel", "AVX512"), ("AuthenticAMD", "AVX2")])
def test_where_mkl_is_as_wide_it_is_used(made_by, capability, monkeypatch):
    monkeypatch.setattr(linear, "is_intel", lambda: made_by == "GenuineIntel")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert not linear.prefers_onednn.__wrapped__()
    monkeypatch.setattr(linear, "is_intel", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert linear.prefers_onednn.__wrapped__() == torch.backends.mkldnn.is_available()


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"n_kv_heads": 2, "qk_norm": True}, {"n_kv_heads": 1, "bias": True}],
    ids=str,
)
@pytest.mark.parametrize("seq", [1, linear.MIN_ROWS // 2, linear.MIN_ROWS])
def test_one_product_projects_as_three_do(options, seq, monkeypatch):
    apart = layers.MultiHeadSelfAttention(24, 4, **options).double()
    together = fast_layers.MultiHeadSelfAttention(24, 4, **options).double()
    together.load_state_dict(apart.state_dict())
    n_merged = []
    merged = linear.merged
    monkeypatch.setattr(linear, "merged", lambda *given: n_merged.append(1) or merged(*given))
    x = normal(2, seq, 24, dtype=torch.float64)
    found = [outcome(lambda x, *_, a=a: a(x), (x,), {}) for a in (together, apart)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)
    assert len(n_merged) == (2 * seq >= linear.MIN_ROWS)


@pytest.mark.parametrize("biases", [False, True])
def test_merged_products(biases):
    x, weights = normal(2, 3, 8), [normal(5, 8), normal(2, 8), normal(7, 8)]
    b = [normal(len(weight)) if biases else None for weight in weights]
    for one, weight, bias in zip(linear.merged(x, weights, b), weights, b, strict=True):
        torch.testing.assert_close(one, functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_linear_computes_only_the_required_gradients():
    x, weight = torch.randn(3, 16), torch.randn(24, 16, requires_grad=True)
    fast.linear(x, weight).sum().backward()
    assert x.grad is None and weight.grad is not None


def test_invalid_arguments_raise_as_in_the_reference():
    x = torch.randn(2, 3)
    for call in (
        lambda F: F.gelu(x, approximate="sigmoid"),
        lambda F: F.cross_entropy(x, torch.tensor([0, 1]), reduction="median"),
        lambda F: F.scaled_dot_product_attention(x, x, x, torch.ones(2, 2, dtype=torch.bool), is_causal=True),
    ):
        with pytest.raises(ValueError) as expected:
            call(functional)
        with pytest.raises(ValueError) as found:
            call(fast)
        assert str(found.value) == str(expected.value)
    for F in (functional, fast):
        with pytest.raises(IndexError):
            F.embedding(torch.tensor([-1]), x)


# --------------------------------------------------------------------------------------------------
# The optimizer


def train(lm: model.TransformerLM, optimizer: torch.optim.Optimizer, steps: int) -> list[torch.Tensor]:
    """The weights after some steps on the same tokens."""
    tokens = torch.arange(34).view(2, 17) % lm.config.vocab_size
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(lm(tokens[:, :-1]), tokens[:, 1:]).backward()
        optim.clip_grad_norm_(lm.parameters(), 0.5)
        optimizer.step()
    return [parameter.detach().clone() for parameter in lm.parameters()]


def test_optimizer_states_are_interchangeable():
    weights = []
    for order in (("reference", "reference"), ("reference", "fast"), ("fast", "reference"), ("fast", "fast")):
        torch.manual_seed(0)
        lm = model.TransformerLM(SHAPE)
        optimizer = optim.AdamW(lm.parameters(), lr=0.01, weight_decay=0.2)
        for which in order:
            pieces = {
                "optim.adamw_step_": fast_optim.adamw_step_,
                "optim.clip_grad_norm_": fast_optim.clip_grad_norm_,
            }
            with swap.replaced(pieces if which == "fast" else {}):
                after = train(lm, optimizer, steps=3)
        assert {state["step"] for state in optimizer.state.values()} == {6}
        weights.append(after)
    for found in weights[1:]:
        for one, other in zip(found, weights[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_parameters_that_joined_later_have_a_count_of_their_own():
    results = []
    for step_ in (optim.adamw_step_, fast_optim.adamw_step_):
        first, second = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
        states = [{}, {}]
        first.grad, second.grad = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 3.0])
        with torch.no_grad():
            step_([first], states[:1], 0.1, (0.9, 0.95), 1e-8, 0.1)
            step_([first, second], states, 0.1, (0.9, 0.95), 1e-8, 0.1)
        assert [state["step"] for state in states] == [2, 1]
        results.append(torch.cat([first, second]).detach())
    torch.testing.assert_close(*results)


def test_clipping_without_gradients_and_with_mixed_ones():
    assert fast_optim.clip_grad_norm_([torch.ones(2)], 1.0) == 0
    for dtypes in ((torch.float32, torch.float64), (torch.bfloat16,), (torch.float32, torch.float32)):
        norms, clipped = [], []
        for clip in (optim.clip_grad_norm_, fast_optim.clip_grad_norm_):
            parameters = [torch.zeros(2, dtype=dtype, requires_grad=True) for dtype in dtypes]
            for parameter in parameters:
                parameter.grad = torch.tensor([3.0, 4.0], dtype=parameter.dtype)
            norms.append(clip(iter(parameters), 1.0))
            clipped.append(torch.cat([parameter.grad.double() for parameter in parameters]))
        torch.testing.assert_close(*norms)
        torch.testing.assert_close(*clipped)


def test_clipping_refuses_what_is_not_finite_and_changes_nothing():
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.tensor([1e3, float("nan")])
    with pytest.raises(RuntimeError, match="nothing was clipped"):
        fast_optim.clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True)
    assert parameter.grad[0] == 1e3


# --------------------------------------------------------------------------------------------------
# The chunked loss


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize(
    "changes", [{}, {"vocab_multiple": 64}, {"tie_embeddings": True}, {"dropout": 0.2}], ids=str
)
def test_chunked_loss_matches(monkeypatch, changes, z_loss):
    shape = dataclasses.replace(SHAPE, **changes)
    torch.manual_seed(1)
    lm = model.TransformerLM(shape)
    tokens = torch.randint(0, 50, (3, 17))
    losses, gradients = [], []
    for of_batch, most in (
        (trainer.batch_loss, 0),
        (fast_update.batch_loss, 200),
        (fast_update.batch_loss, 7),
    ):
        monkeypatch.setitem(fast_update.MAX_LOGITS, "cpu", most)
        monkeypatch.setattr(fast_update, "MIN_ROWS", 1)
        lm.zero_grad()
        torch.manual_seed(2)
        loss = of_batch(lm, tokens[:, :-1], tokens[:, 1:], z_loss)
        (loss * 0.7).backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad for parameter in lm.parameters()])
    for loss, found in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0])
        for one, other in zip(found, gradients[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_chunked_loss_holds_few_logits(monkeypatch):
    monkeypatch.setitem(fast_update.MAX_LOGITS, "cpu", 200)
    monkeypatch.setattr(fast_update, "MIN_ROWS", 1)
    lm = model.TransformerLM(SHAPE)
    sizes = []
    lm.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    tokens = torch.randint(0, 50, (3, 17))
    fast_update.batch_loss(lm, tokens[:, :-1], tokens[:, 1:], 0.0)
    assert max(sizes) <= 200 and sum(sizes) == 3 * 16 * 50


def test_user_models_use_forward():
    class Other(torch.nn.Module):
        def forward(self, tokens):
            return torch.zeros(*tokens.shape, 1 << 21)

    loss = fast_update.batch_loss(Other(), torch.zeros(1, 3).long(), torch.zeros(1, 3).long(), 0.0)
    torch.testing.assert_close(loss, torch.tensor(float(1 << 21)).log())


# --------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64])
@pytest.mark.parametrize(("way", "stride"), [("resident", None), ("ahead", None), ("resident", 3)])
def test_batches_are_those_of_the_reference(way, stride, dtype):
    shards = [(np.arange(n) * 7 % min(60_000, np.iinfo(dtype).max)).astype(dtype) for n in (9_001, 5, 70, 40)]
    expected = dataloader.Batches(shards, batch_size=4, context_length=8, seed=3, stride=stride)
    found = fast_data.Batches(shards, batch_size=4, context_length=8, seed=3, stride=stride)
    if way == "resident":
        found._keep_resident()
    else:
        found.on_gpu = True
    # into the second epoch, then back, as after a resume
    for first in [*range(0, 2 * expected.windows_per_epoch, 4), 12, 16, 3, 7]:
        for one, other in zip(found.starting_at(first), expected.starting_at(first), strict=True):
            assert one.dtype == other.dtype == torch.int64 and torch.equal(one, other), first
