"""Spikes, and where values that are not finite begin. Alone: `uv run pytest tests/test_diagnostics.py`."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as tF

from llm_basics.core import config, model
from llm_basics.training import diagnostics

# --------------------------------------------------------------------------------------------------
# Spikes


def losses_of_a_run(seed, noise, correlation=0.8, degrees=math.inf, n=10_000):
    """A slow decay with mean-reverting noise (AR(1)); with few `degrees` of freedom, of heavier tails."""
    rng = np.random.default_rng(seed)
    if math.isinf(degrees):
        pushes = rng.standard_normal(n)
    else:
        pushes = rng.standard_t(degrees, n) / math.sqrt(degrees / (degrees - 2))
    deviations = np.zeros(n)
    for i in range(1, n):
        deviations[i] = correlation * deviations[i - 1] + math.sqrt(1 - correlation**2) * pushes[i]
    return 3 + 3 * np.exp(-np.arange(n) / 3000) + noise * deviations


def spikes(detector, losses):
    """The steps that score above the threshold."""
    return {i for i, loss in enumerate(losses.tolist()) if detector.z_score(loss) > detector.threshold}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize(
    "noise, correlation, degrees, heights",
    [
        (0.05, 0.8, math.inf, (1, 3)),
        (0.05, 0.0, math.inf, (1, 3)),
        (0.2, 0.8, math.inf, (3, 9)),
        (0.2, 0.8, 10, (3, 9)),
    ],
    ids=["usual noise", "no memory", "loud noise", "loud noise with heavy tails"],
)
def test_all_of_50_spikes_are_found_with_at_most_one_false_alarm(seed, noise, correlation, degrees, heights):
    losses = losses_of_a_run(seed, noise, correlation, degrees)
    rng = np.random.default_rng(100 + seed)
    planted = rng.choice(np.arange(32, len(losses)), 50, replace=False)
    losses[planted] += rng.uniform(*heights, 50)
    found = spikes(diagnostics.SpikeDetector(), losses)
    assert found >= set(planted.tolist())
    assert len(found) <= 51


def test_the_score_is_the_robust_z_score():
    losses = losses_of_a_run(0, 0.05)[:300]
    detector = diagnostics.SpikeDetector(window=100, least=50)
    for i, loss in enumerate(losses.tolist()):
        known = np.sort(losses[max(i - 100, 0) : i])
        score = detector.z_score(loss)
        if i < 50:
            assert score == 0
        else:
            deviation = np.median(np.abs(known - np.median(known)))
            assert score == pytest.approx((loss - np.median(known)) / (1.4826 * deviation), rel=1e-9)


@pytest.mark.parametrize("jump", [0.5, 1.0, 2.0, 5.0])
def test_a_lasting_jump_is_a_spike_for_half_a_window_at_most(jump):
    losses = losses_of_a_run(0, 0.05)
    losses[5000:] += jump
    found = spikes(diagnostics.SpikeDetector(), losses)
    assert 5000 in found
    assert found <= set(range(5000, 5065))


def test_a_burst_of_spikes_is_found_to_its_end():
    losses = losses_of_a_run(0, 0.05)
    losses[5000:5030] += 1
    assert spikes(diagnostics.SpikeDetector(), losses) == set(range(5000, 5030))


@pytest.mark.parametrize("level", [0.0, 1e-4, 2.5, 1e4, -3.0])
@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_a_loss_that_stands_still_is_no_spike_but_a_leap_from_it_is(level, noise):
    rng = np.random.default_rng(0)
    losses = level * (1 + noise * rng.standard_normal(1000)) + noise * rng.standard_normal(1000)
    detector = diagnostics.SpikeDetector()
    assert spikes(detector, losses) == set()
    assert detector.z_score(1.1 * abs(level) + 0.1) > 6


def test_a_loss_that_is_not_finite_scores_infinity_and_is_forgotten():
    detector = diagnostics.SpikeDetector(least=2)
    assert [detector.z_score(bad) for bad in (math.nan, math.inf, -math.inf)] == [0, 0, 0]
    for loss in (2.0, 2.1, 2.2):
        detector.z_score(loss)
    before = detector.state()
    assert [detector.z_score(bad) for bad in (math.nan, math.inf, -math.inf)] == 3 * [math.inf]
    assert detector.state() == before == {"losses": [2.0, 2.1, 2.2]}


@pytest.mark.parametrize("stop", [0, 10, 100, 500])
def test_a_detector_goes_on_exactly_from_its_state(stop):
    losses = losses_of_a_run(0, 0.05)[:1000].tolist()
    uninterrupted, first, second = (diagnostics.SpikeDetector() for _ in range(3))
    expected = [uninterrupted.z_score(loss) for loss in losses]
    scores = [first.z_score(loss) for loss in losses[:stop]]
    second.load(json.loads(json.dumps(first.state())))
    scores += [second.z_score(loss) for loss in losses[stop:]]
    assert scores == expected
    assert json.dumps(second.state()) == json.dumps(uninterrupted.state())


def test_a_state_is_a_copy():
    detector = diagnostics.SpikeDetector()
    state = detector.state()
    detector.z_score(1.0)
    assert state == {"losses": []}


@pytest.mark.parametrize("least", [0, 129])
def test_a_detector_that_cannot_work_is_refused(least):
    with pytest.raises(ValueError, match=f"least must be from 1 to window, got {least} and window 128"):
        diagnostics.SpikeDetector(least=least)


# --------------------------------------------------------------------------------------------------
# Values that are not finite

SIZES = {"vocab_size": 50, "context_length": 8, "d_model": 16, "n_layers": 2, "n_heads": 2, "dropout": 0.1}
SHAPES = {
    "llama": config.ModelConfig(**SIZES, qk_norm=True),
    "gpt2": config.ModelConfig(
        **SIZES, norm="layer", position="learned", ffn="gelu_tanh", bias=True, init="gpt2"
    ),
}
NOTHING = "a second pass had finite values only"


def make(name):
    """A model in training, its forward pass to the loss, and gradients from one backward pass."""
    lm = model.TransformerLM(SHAPES[name])
    tokens = torch.arange(18).reshape(2, 9) % 50

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            logits = lm(tokens[:, :-1])
        return tF.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    forward().backward()
    return lm, forward


def spoil_output(module, bad):
    """Put one bad value into what `module` gives out, as a fault in its forward would."""
    inner = module.forward

    def forward(*args, **kwargs):
        output = inner(*args, **kwargs).clone(memory_format=torch.contiguous_format)
        output.view(-1)[3] = bad
        return output

    module.forward = forward


def spoil_parameter(lm, name, bad, count):
    lm.get_parameter(name).data.view(-1)[1 : 1 + count] = bad


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sound_model_is_found_sound(shape):
    assert diagnostics.find_nonfinite(*make(shape)) == NOTHING


@pytest.mark.parametrize(
    "shape, name, bad, count, said",
    [
        ("llama", "token_embeddings.weight", math.nan, 2, "2 of 800 values not finite"),
        ("llama", "layers.0.attn.q_proj.weight", math.inf, 3, "3 of 256 values not finite"),
        ("llama", "layers.1.attn.k_norm.weight", math.nan, 1, "1 of 8 values not finite"),
        ("llama", "layers.1.ffn.w3.weight", -math.inf, 1, "1 of 1,024 values not finite"),
        ("llama", "layers.1.ln2.weight", math.inf, 4, "4 of 16 values not finite"),
        ("llama", "lm_head.weight", math.nan, 7, "7 of 800 values not finite"),
        ("gpt2", "position_embeddings.weight", math.inf, 1, "1 of 128 values not finite"),
        ("gpt2", "layers.0.ln1.bias", math.nan, 1, "1 of 16 values not finite"),
        ("gpt2", "layers.1.ffn.w1.bias", math.inf, 1, "1 of 64 values not finite"),
        ("gpt2", "ln_final.weight", math.nan, 1, "1 of 16 values not finite"),
    ],
)
def test_a_weight_is_named(shape, name, bad, count, said):
    lm, forward = make(shape)
    spoil_parameter(lm, name, bad, count)
    assert diagnostics.find_nonfinite(lm, forward) == f"the weight {name} has {said}"


@pytest.mark.parametrize(
    "shape, name, kind, bad",
    [
        ("llama", "token_embeddings", "Embedding", math.nan),
        ("llama", "layers.0.attn.v_proj", "Linear", math.inf),
        ("llama", "layers.1.attn.q_norm", "RMSNorm", math.nan),
        ("llama", "layers.0.attn.rope", "RotaryEmbedding", math.nan),
        ("llama", "layers.1.ffn", "SwiGLU", math.inf),
        ("llama", "layers.1", "TransformerBlock", -math.inf),
        ("gpt2", "position_embeddings", "Embedding", math.inf),
        ("gpt2", "layers.0.ln2", "LayerNorm", math.nan),
        ("gpt2", "layers.1.ffn.w2", "Linear", math.nan),
        ("gpt2", "layers.1.attn", "MultiHeadSelfAttention", math.inf),
        ("gpt2", "layers.0.dropout", "Dropout", math.nan),
        ("gpt2", "lm_head", "Linear", math.inf),
    ],
)
def test_a_module_is_named(shape, name, kind, bad):
    lm, forward = make(shape)
    spoil_output(lm.get_submodule(name), bad)
    said = diagnostics.find_nonfinite(lm, forward)
    assert said.startswith(f"{name} ({kind}) returned {bad} (")
    assert said.endswith("not finite) although its inputs are finite") and "\n" not in said


@pytest.mark.parametrize("shape, name, kind", [("llama", "ffn", "SwiGLU"), ("gpt2", "ffn.w1", "Linear")])
def test_weights_that_are_too_large_overflow_where_they_multiply(shape, name, kind):
    lm, forward = make(shape)
    weight = lm.get_parameter("layers.1.ffn.w1.weight").data
    weight.copy_(3e38 * weight.sign())
    assert diagnostics.find_nonfinite(lm, forward).startswith(f"layers.1.{name} ({kind}) returned ")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_module_that_computes_between_its_parts_is_named_itself(shape, monkeypatch):
    """What attention mixes never leaves a module of its own, and reaches output_proj when it is spoilt."""
    lm, forward = make(shape)
    monkeypatch.setattr(
        "llm_basics.core.functional.scaled_dot_product_attention", lambda q, k, v, *args, **kwargs: v / 0
    )
    said = diagnostics.find_nonfinite(lm, forward)
    assert said.startswith("layers.0.attn (MultiHeadSelfAttention) returned ")
    assert said.endswith("although its inputs are finite")


@pytest.mark.parametrize("shape, bad", [("llama", math.nan), ("gpt2", math.inf)])
@pytest.mark.parametrize("convert", [torch.Tensor.clone, torch.Tensor.item])
def test_the_loss_is_named(shape, bad, convert):
    lm, forward = make(shape)
    said = diagnostics.find_nonfinite(lm, lambda: convert(forward() + bad))
    assert said == f"the loss is {bad}, although all module outputs are finite"


@pytest.mark.parametrize(
    "shape, name, bad, elements",
    [
        ("llama", "layers.1.ffn.w1.weight", math.nan, 1024),
        ("llama", "lm_head.weight", math.inf, 800),
        ("gpt2", "layers.0.attn.q_proj.bias", -math.inf, 16),
        ("gpt2", "position_embeddings.weight", math.nan, 128),
    ],
)
def test_a_gradient_is_named_and_the_one_nearest_the_end_first(shape, name, bad, elements):
    lm, forward = make(shape)
    lm.get_parameter(name).grad.view(-1)[5] = bad
    lm.token_embeddings.weight.grad.fill_(math.nan)
    lm.ln_final.weight.grad = None
    expected = (
        f"the gradient of {name} has 1 of {elements:,} values not finite, the first in the backward pass"
    )
    assert diagnostics.find_nonfinite(lm, forward) == expected


def test_the_order_is_weights_then_modules_then_loss_then_gradients():
    lm, forward = make("llama")
    lm.lm_head.weight.grad[0, 0] = math.nan
    assert "the gradient of lm_head.weight" in diagnostics.find_nonfinite(lm, forward)
    assert "the loss is nan" in diagnostics.find_nonfinite(lm, lambda: forward() * math.nan)
    spoil_output(lm.ln_final, math.nan)
    assert "ln_final (RMSNorm) returned nan" in diagnostics.find_nonfinite(lm, lambda: forward() * math.nan)
    spoil_parameter(lm, "lm_head.weight", math.nan, 1)
    assert "the weight lm_head.weight" in diagnostics.find_nonfinite(lm, lambda: forward() * math.nan)


# --------------------------------------------------------------------------------------------------
# Any module


class Several(nn.Module):
    """Gives out a tensor in one of several kinds of container, beside things that are no tensors."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        x, counts = (x / 0)[:, :2], torch.tensor([3])
        return {
            "tuple": (counts, "text", x),
            "list": [None, [counts, x]],
            "dict": {"counts": counts, "inner": {"x": x}},
        }[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "list", "dict"])
def test_containers_of_tensors_are_looked_into(kind):
    network = nn.ModuleDict({"several": Several(kind)})

    def forward():
        network["several"](torch.tensor([[1.0, -1.0, 2.0], [0.0, 3.0, 4.0]]))
        return torch.tensor(1.0)

    said = diagnostics.find_nonfinite(network, forward)
    assert said.startswith("several (Several) returned nan and inf and -inf (4 of 4 values not")


def test_a_module_that_works_in_place_is_judged_by_what_it_was_given():
    class Halve(nn.Module):
        def forward(self, *, x):
            return x.div_(0)

    halve = Halve()
    said = diagnostics.find_nonfinite(halve, lambda: halve(x=torch.ones(2)).sum())
    assert said.startswith("the model (Halve) returned inf")


def test_values_spoilt_outside_of_all_modules_lead_to_the_first_module_that_was_given_them():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    said = diagnostics.find_nonfinite(network, lambda: network[1](network[0](torch.ones(2)) * math.nan).sum())
    assert said == "1 (Linear) returned nan (2 of 2 values not finite); its inputs had nan"


def test_a_mask_of_infinities_is_no_fault_of_the_module_that_is_given_it():
    class Masked(nn.Module):
        def forward(self, x, mask):
            return (x + mask).softmax(-1), mask

    network = Masked()
    mask = torch.tensor([0.0, -math.inf])
    assert diagnostics.find_nonfinite(network, lambda: network(torch.ones(2), mask)[0].sum()) == NOTHING


def test_a_compiled_model_is_looked_into_and_named_as_if_it_were_not():
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    compiled = torch.compile(network, backend="eager")

    def forward():
        return compiled(torch.full((2,), 3e38)).sum()

    forward()
    network[0].weight.data.fill_(3e38)
    assert diagnostics.find_nonfinite(compiled, forward).startswith("0 (Linear) returned inf")
    network[0].weight.data[0, 0] = math.nan
    assert diagnostics.find_nonfinite(compiled, forward).startswith(
        "the weight 0.weight has 1 of 4 values not finite"
    )


# --------------------------------------------------------------------------------------------------
# All is as it was


def hooks(network):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


@pytest.mark.parametrize("raises", [False, True])
def test_a_search_leaves_all_as_it_was(raises):
    lm, inner = make("llama")
    lm.layers[1].eval()
    lm.norm = nn.BatchNorm1d(3)
    lm.ln_final.register_forward_hook(lambda *_: None)
    weights, modes = copy.deepcopy(lm.state_dict()), [m.training for m in lm.modules()]
    gradients = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
    random_state = torch.get_rng_state()

    def forward():
        assert not torch.is_grad_enabled() and hooks(lm) > 2
        loss = inner()
        lm.norm(torch.randn(4, 3))
        lm.eval()
        if raises:
            raise RuntimeError("the forward pass failed")
        return loss

    if raises:
        with pytest.raises(RuntimeError, match="the forward pass failed"):
            diagnostics.find_nonfinite(lm, forward)
    else:
        assert diagnostics.find_nonfinite(lm, forward) == NOTHING
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in lm.modules()] == modes
    assert hooks(lm) == 1 and torch.is_grad_enabled()
    torch.testing.assert_close(lm.state_dict(), weights, rtol=0, atol=0)
    after = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
    torch.testing.assert_close(after, gradients, rtol=0, atol=0)


@pytest.mark.gpu
def test_a_search_on_the_gpu_leaves_its_random_state_as_it_was():
    lm = model.TransformerLM(SHAPES["llama"], device="cuda")
    tokens = torch.arange(8, device="cuda")[None]
    random_state = torch.cuda.get_rng_state()

    def forward():
        with torch.autocast("cuda", torch.bfloat16):
            return lm(tokens).float().logsumexp(-1).mean() * torch.rand((), device="cuda")

    assert diagnostics.find_nonfinite(lm, forward) == NOTHING
    spoil_output(lm.layers[1].ffn, math.inf)
    assert diagnostics.find_nonfinite(lm, forward).startswith("layers.1.ffn (SwiGLU) returned inf")
    assert torch.equal(torch.cuda.get_rng_state(), random_state)
