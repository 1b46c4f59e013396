"""LoRA by hand and in runs. Alone: `uv run pytest tests/test_lora.py`."""

import pytest
import torch
from torch import nn

from llm_basics.alignment import lora
from llm_basics.core import layers


def adapted(rank=3, alpha=5.0, dropout=0.0):
    """A layer in float64 whose A and B are not zero."""
    torch.manual_seed(0)
    layer = lora.LoRALinear(layers.Linear(6, 4, bias=True, dtype=torch.float64), rank, alpha, dropout)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def test_output_and_gradients_equal_the_formula():
    layer, x, weighting = adapted(), torch.randn(7, 6).double(), torch.randn(7, 4).double()
    weight, bias, a, b = (t.detach() for t in (layer.base.weight, layer.base.bias, layer.a, layer.b))
    output = layer(x)
    (output * weighting).sum().backward()
    exact = {"rtol": 1e-6, "atol": 1e-12}
    expected = x @ weight.T + bias + 5 / 3 * (x @ a.T @ b.T)
    torch.testing.assert_close(output, expected, **exact)
    torch.testing.assert_close(layer.a.grad, 5 / 3 * (b.T @ weighting.T @ x), **exact)
    torch.testing.assert_close(layer.b.grad, 5 / 3 * (weighting.T @ x @ a.T), **exact)
    torch.testing.assert_close(layer.weight, weight + 5 / 3 * (b @ a), **exact)
    assert layer.base.weight.grad is None and layer.base.bias.grad is None


def test_merged_equals_unmerged_and_back():
    layer, x = adapted().float(), torch.randn(50, 6)
    output, weight = layer(x), layer.base.weight.clone()
    lora.merge_lora(layer)
    torch.testing.assert_close(layer(x), output, rtol=1e-6, atol=1e-6)
    assert not torch.equal(layer.base.weight, weight) and layer.weight is layer.base.weight
    lora.unmerge_lora(layer)
    torch.testing.assert_close(layer.base.weight, weight, rtol=0, atol=1e-6)


def test_a_target_or_a_rank_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"each target must be the name of a layer \(w1, w2, w3\), got w4"):
        lora.apply_lora(layers.SwiGLU(4, 8), ["w1", "w4"], 2, 4.0)
    with pytest.raises(ValueError, match="the rank must be at least 1, got 0"):
        lora.apply_lora(layers.SwiGLU(4, 8), ["w1"], 0, 4.0)
    one, other = (nn.ModuleDict({"w": layers.Linear(4, 4)}) for _ in range(2))
    lora.apply_lora(one, ["w"], 2, 4.0)
    lora.apply_lora(other, ["w"], 3, 4.0)
    with pytest.raises(ValueError, match="got another w.a, w.b; apply LoRA with the same targets and rank"):
        lora.load_lora_state(one, lora.lora_state(other))
