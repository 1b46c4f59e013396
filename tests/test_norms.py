"""Norms of weights, activations and gradients by layer. Alone: uv run pytest tests/test_norms.py"""

import pytest
import torch
from torch.nn import functional as tF

from llm_basics.analysis import inspection, norms
from llm_basics.core import config, model, tokenizer

# three kinds of model: parts that exist in one and not in the other
SHAPES = {
    "llama": {"qk_norm": True, "n_kv_heads": 1},
    "gpt2": {"norm": "layer", "position": "learned", "ffn": "gelu", "bias": True, "tie_embeddings": True},
    "post": {"norm_placement": "post", "vocab_multiple": 64},
}


@pytest.fixture(params=SHAPES)
def loaded(request):
    chosen = tokenizer.Tokenizer.byte_level()
    shape = config.ModelConfig(chosen.vocab_size, 16, 16, 3, 2, **SHAPES[request.param])
    return inspection.LoadedModel(model.TransformerLM(shape).eval().requires_grad_(False), chosen)


IDS = list(b"to be or not")


def streams_of(lm, tokens):
    """The residual streams of a forward pass by hand."""
    positions = torch.arange(len(tokens))
    x = lm.token_embeddings(tokens)
    if lm.position_embeddings is not None:
        x = x + lm.position_embeddings(positions)
    streams = [x]
    for block in lm.layers:
        streams.append(block(streams[-1], positions))
    return streams


def test_norms_are_root_mean_squares(loaded):
    lm, found = loaded.lm, norms.norms(loaded, IDS).layers
    assert [each.layer for each in found] == [-1, 0, 1, 2]
    for each, stream in zip(found, streams_of(lm, torch.tensor(IDS)), strict=True):
        assert each.activation == pytest.approx(float(stream.square().mean().sqrt()), rel=1e-5)
    for name, parameter in lm.named_parameters():
        outside = not name.startswith("layers.")
        layer, key = (-1, name) if outside else (int(name.split(".")[1]), name.split(".", 2)[2])
        rms = float(parameter.square().mean().sqrt())
        assert found[layer + 1].weights[key] == pytest.approx(rms, rel=1e-5, abs=1e-12)
    assert sum(len(each.weights) for each in found) == len(list(lm.named_parameters()))
    assert found[0].attention is None and found[0].ffn is None


def test_what_sublayers_add_is_the_difference_of_streams(loaded):
    if loaded.lm.config.norm_placement == "post":
        pytest.skip("a norm comes after the sum")
    streams = streams_of(loaded.lm, torch.tensor(IDS))
    blocks = norms.norms(loaded, IDS).layers[1:]
    for each, before, block in zip(blocks, streams, loaded.lm.layers, strict=False):
        attention = block.attn(block.ln1(before), torch.arange(len(IDS)))
        ffn = block.ffn(block.ln2(before + attention))
        assert each.attention == pytest.approx(float(attention.square().mean().sqrt()), rel=1e-5)
        assert each.ffn == pytest.approx(float(ffn.square().mean().sqrt()), rel=1e-5)


def test_gradients_are_those_of_backward(loaded):
    lm, found = loaded.lm, norms.gradients(loaded, IDS)
    assert not any(p.requires_grad or p.grad is not None for p in lm.parameters())
    tokens = torch.tensor(IDS)
    lm.requires_grad_(True)
    streams = streams_of(lm, tokens[:-1])
    for stream in streams:
        stream.retain_grad()
    loss = tF.cross_entropy(lm.logits(lm.ln_final(streams[-1])), tokens[1:])
    loss.backward()
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    whole = torch.cat([p.grad.flatten() for p in lm.parameters()]).norm()
    assert found.total == pytest.approx(float(whole), rel=1e-4)
    for each, stream in zip(found.layers, streams, strict=True):
        assert each.activation == pytest.approx(float(stream.grad.norm()), rel=1e-4)
    for i, block in enumerate(lm.layers):
        expected = {name: float(p.grad.norm()) for name, p in block.named_parameters()}
        # a bias of keys shifts all scores of a query alike: its gradient is rounding
        assert found.layers[i + 1].weights == pytest.approx(expected, rel=1e-4, abs=1e-7)
        together = torch.cat([p.grad.flatten() for p in block.parameters()]).norm()
        assert found.layers[i + 1].total == pytest.approx(float(together), rel=1e-4)


def test_a_loss_needs_two_tokens_within_the_context(loaded):
    for ids, reason in ((IDS[:1], "at least two tokens"), (IDS * 2, "context of 16 tokens")):
        with pytest.raises(ValueError, match=reason):
            norms.gradients(loaded, ids)
    assert not any(p.requires_grad for p in loaded.lm.parameters())


def test_parts_add_up_to_all_parameters(loaded):
    parts = norms.parameters_by_part(loaded.lm.config)
    assert sum(parts.values()) == loaded.lm.n_parameters() == loaded.lm.config.n_parameters
    for part, name in (("attention", ".attn."), ("feed-forward", ".ffn."), ("embeddings", "embeddings")):
        assert parts[part] == sum(p.numel() for n, p in loaded.lm.named_parameters() if name in n) > 0


def test_neighbors_are_those_of_a_brute_force(loaded):
    table = loaded.lm.token_embeddings.weight[: loaded.lm.config.vocab_size]
    similar = {id: float(tF.cosine_similarity(row, table[97], dim=0)) for id, row in enumerate(table)}
    expected = sorted((id for id in similar if id != 97), key=lambda id: -similar[id])[:5]
    found = inspection.neighbors(loaded, 97, 5)
    assert found.token == "a" and [each.id for each in found.neighbors] == expected
    for each in found.neighbors:
        assert each.similarity == pytest.approx(similar[each.id], rel=1e-4)
